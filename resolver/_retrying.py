"""A ``FlightClient`` that makes a refused call once more, where somebody knows a remedy.

pyarrow's middleware sees that a call was refused and can do nothing about it. What the remedy
is, a new token for instance, is the business of who made the middleware.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pyarrow import flight

from ._headers import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Remedy", "RetryingFlightClient"]

T = TypeVar("T")


class Remedy(Protocol):
    """Middleware that may have a remedy."""

    def last_call(self) -> Any:
        """What it knows of the last call that this thread began."""
        ...

    def refused(self, call: Any) -> bool:
        """After ``call`` was refused: whether to make it once more."""
        ...


class RetryingFlightClient(flight.FlightClient):  # type: ignore[misc]  # pyarrow is untyped
    """Makes a call that is UNAUTHENTICATED once more, if nothing of its answer was read.

    ``do_put`` and ``do_exchange`` are not: what was written cannot be written again. Both
    attempts, and what happens before and between them, share the timeout of the call.
    """

    def __init__(self, *args: Any, remedies: Sequence[Remedy], **options: Any) -> None:
        super().__init__(*args, **options)
        self._remedies = remedies

    def list_actions(self, *args: Any, **options: Any) -> Any:
        return self._call(super().list_actions, args, options)

    def get_flight_info(self, *args: Any, **options: Any) -> Any:
        return self._call(super().get_flight_info, args, options)

    def get_schema(self, *args: Any, **options: Any) -> Any:
        return self._call(super().get_schema, args, options)

    def do_get(self, *args: Any, **options: Any) -> Any:
        return self._call(super().do_get, args, options)

    def do_action(self, *args: Any, **options: Any) -> Iterator[Any]:
        return self._stream(super().do_action, args, options)

    def list_flights(self, *args: Any, **options: Any) -> Iterator[Any]:
        return self._stream(super().list_flights, args, options, lazy=True)

    def do_put(self, *args: Any, **options: Any) -> Any:
        with until(_deadline_of(args, options)):
            return super().do_put(*args, **options)

    def do_exchange(self, *args: Any, **options: Any) -> Any:
        with until(_deadline_of(args, options)):
            return super().do_exchange(*args, **options)

    def _call(self, call: Callable[..., T], args: Any, options: Any) -> T:
        deadline = _deadline_of(args, options)
        with until(deadline):
            try:
                return call(*args, **options)
            except (flight.FlightUnauthenticatedError, OSError) as error:
                if not self._may_retry(error, self._last_calls()):
                    raise
            return _again(call, args, options, deadline)

    def _stream(
        self, call: Callable[..., Iterator[T]], args: Any, options: Any, *, lazy: bool = False
    ) -> Iterator[T]:
        # Sent here and now, also if nobody ever reads what it answers; but pyarrow sends a
        # ``lazy`` one when it is first read, on whichever thread that is.
        deadline = _deadline_of(args, options)
        with until(deadline):
            results = iter(call(*args, **options))
        begun = None if lazy else self._last_calls()

        def read() -> Iterator[T]:
            nonlocal results, deadline
            if lazy:
                deadline = _deadline_of(args, options)
            try:
                with until(deadline):
                    first = next(results)
            except StopIteration:
                return
            except (flight.FlightUnauthenticatedError, OSError) as error:
                with until(deadline):
                    if not self._may_retry(error, self._last_calls() if begun is None else begun):
                        raise
                    results = iter(_again(call, args, options, deadline))
            else:
                yield first
            yield from results

        return read()

    def _last_calls(self) -> list[Any]:
        return [each.last_call() for each in self._remedies]

    def _may_retry(self, error: Exception, calls: list[Any]) -> bool:
        if not is_unauthenticated(error):
            return False
        remedies = zip(self._remedies, calls, strict=True)
        return any([each.refused(call) for each, call in remedies])  # noqa: C419 -- ask all


def _deadline_of(args: Any, options: Any) -> float:
    """Until when a call with these arguments may take that begins now (monotonic clock)."""
    given = [each.timeout for each in (*args, *options.values()) if _has_timeout(each)]
    return time.monotonic() + min(given, default=math.inf)


def _has_timeout(argument: Any) -> bool:
    # pyarrow's way of saying that there is none is a negative one.
    return isinstance(argument, flight.FlightCallOptions) and argument.timeout >= 0


def _again(call: Callable[..., T], args: Any, options: Any, deadline: float) -> T:
    """Make it in what is left of its time."""
    left = deadline - time.monotonic()
    if left <= 0:  # of which gRPC takes no notice if the answer is quick
        raise flight.FlightTimedOutError("refused once, the call has no time left for another try")

    def shortened(argument: Any) -> Any:
        if not _has_timeout(argument):
            return argument
        return flight.FlightCallOptions(
            timeout=left,
            write_options=argument.write_options,
            headers=argument.headers,
            read_options=argument.read_options,
        )

    return call(*map(shortened, args), **{name: shortened(each) for name, each in options.items()})


def is_unauthenticated(error: Exception) -> bool:
    """Whether a call was refused so; of ``get_schema``, pyarrow makes it a plain ``OSError``."""
    if isinstance(error, flight.FlightUnauthenticatedError):
        return True
    return not isinstance(error, flight.FlightError) and "Detail: Unauthenticated" in str(error)
