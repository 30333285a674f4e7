"""What a layer sees of a call: its beginning, which it may change, and its end, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

End: TypeAlias = Callable[[str], None]
"""Called once when a call has ended, with the name of its gRPC status, as in ``"OK"``."""

FLIGHT_SERVICE = "arrow.flight.protocol.FlightService"

_log = logging.getLogger("resolver")


@dataclass(slots=True)
class Call:
    """A call about to be sent. A layer may add to ``headers`` and set ``timeout``.

    ``method`` is gRPC's full name, ``/arrow.flight.protocol.FlightService/DoGet``.
    ``headers`` are (name, value) pairs with lower-case names; values are ``bytes`` under
    names that end in ``-bin``, else ``str``. Through pyarrow they begin empty, and only
    what is added is sent. ``timeout`` is in seconds, None where the call has none.
    """

    method: str
    headers: list[tuple[str, str | bytes]] = field(default_factory=list)
    timeout: float | None = None

    @property
    def service(self) -> str:
        """The service's name, without slashes."""
        return self.method.strip("/").rpartition("/")[0]

    @property
    def name(self) -> str:
        """The method's name within its service, as in ``"DoGet"``."""
        return self.method.rpartition("/")[2]


class Begins(Protocol):
    """What the adapters need of a layer."""

    def begin(self, call: Call) -> End | None:
        """See a call before it is sent."""
        ...

    async def begin_async(self, call: Call) -> End | None:
        """As `begin`, without blocking the event loop."""
        ...


def left(seconds: float | None, since: float) -> float | None:
    """What is left of ``seconds`` that began at the monotonic time ``since``; None of None."""
    return None if seconds is None else max(0.0, seconds - (time.monotonic() - since))


class EndOnce:
    """An `End` that is called at most once, by whoever notices first. Thread-safe.

    What it raises goes to the log: it would end the thread on which grpcio hears of all
    calls of a channel, and make an error of a call that went well.
    """

    __slots__ = ("_left",)

    def __init__(self, end: End) -> None:
        self._left = [end]

    def __call__(self, status: str) -> None:
        try:
            end = self._left.pop()
        except IndexError:
            return
        try:
            end(status)
        except Exception:  # noqa: BLE001 -- see above
            _log.exception("a layer failed at the end of a call")
