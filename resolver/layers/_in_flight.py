"""The layer that lets only so many calls be under way at once.

First come, first served, over threads and event loops alike. Nothing here polls, and no
call is cut short: a call that waits too long is refused before it is sent.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Final

from resolver._errors import ResolverError
from resolver._headers import time_left

from ._layer import Layer

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._call import Call, End


class TooManyCallsError(ResolverError, TimeoutError):
    """A call waited too long for others to end, and was not sent."""


class InFlightLimit(Layer):
    """At most `limit` calls under way at once; others wait their turn.

    A stream counts until it has ended, was cancelled, or nobody holds it any more (pyarrow
    says that one was cancelled only when it is read again, or let go). So a
    thread that opens a second stream while it reads the first needs two places, and with
    none left it would wait for itself: ``wait`` bounds that.

    - ``wait``: seconds after which a call that waits is refused with `TooManyCallsError`
      (through pyarrow, ``FlightInternalError``); 0: at once; ``None``: never. Less where the
      call's own timeout, which pyarrow does not tell, or a connect's deadline is nearer.
    - ``shared``: one limit for all channels and clients it is used for, instead of one
      for each, which with a resolver is one for each worker and connection.

    Thread-safe. In asyncio it waits without blocking the event loop.
    """

    def __init__(self, limit: int, *, wait: float | None = 30.0, shared: bool = False) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int):
            raise TypeError(f"limit is a whole number of calls, not {type(limit).__name__}")
        if limit < 1:
            raise ValueError("limit is 1 or more")
        if wait is not None and (isinstance(wait, bool) or not isinstance(wait, (int, float))):
            raise TypeError("wait is a number of seconds or None")
        if wait is not None and not 0 <= wait <= threading.TIMEOUT_MAX:
            raise ValueError("wait is 0 or more seconds")
        self.limit = limit
        self.wait = wait
        self.shared = shared
        self._gate: Final = _Gate(limit)
        self._gates = weakref.WeakSet([self._gate])
        self._roll = threading.RLock()  # of the gates; a finalizer may come back to it

    @property
    def in_flight(self) -> int:
        """Calls under way now, over all channels and clients. A snapshot."""
        with self._roll:
            gates = list(self._gates)
        return sum(gate.taken for gate in gates)

    def bind(self) -> Layer:
        """A limit of its own for one more channel; this very one if it is shared."""
        if self.shared:
            return self
        bound = InFlightLimit(self.limit, wait=self.wait, shared=True)
        with self._roll:
            self._gates.add(bound._gate)
        return bound

    def begin(self, call: Call) -> End:
        """Wait for a place; it is given back when the call ends."""
        patience = self._patience(call)
        place = threading.Event()
        if not self._gate.enter(place.set):
            try:
                arrived = place.wait(patience)
            except BaseException:
                if self._gate.leave_queue(place.set):
                    self._gate.leave()
                raise
            if not arrived and not self._gate.leave_queue(place.set):
                raise self._refusal(call, patience)
        return lambda _status: self._gate.leave()

    async def begin_async(self, call: Call) -> End:
        """As `begin`, without blocking the event loop."""
        patience = self._patience(call)
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()

        def arrive() -> None:
            if not place.done():
                place.set_result(None)

        def grant() -> None:
            loop.call_soon_threadsafe(arrive)

        if not self._gate.enter(grant):
            try:
                await asyncio.wait_for(asyncio.shield(place), patience)
            except TimeoutError:
                if not self._gate.leave_queue(grant):
                    raise self._refusal(call, patience) from None
            except BaseException:
                if self._gate.leave_queue(grant):
                    self._gate.leave()
                raise
        return lambda _status: self._gate.leave()

    def _patience(self, call: Call) -> float | None:
        """Seconds for which ``call`` may wait; None: for ever."""
        bounds = (self.wait, call.timeout, time_left())
        patience = max(0.0, min(each for each in bounds if each is not None))
        return patience if patience <= threading.TIMEOUT_MAX else None

    def _refusal(self, call: Call, waited: float | None) -> TooManyCallsError:
        return TooManyCallsError(
            f"{call.name} waited {waited or 0:.3g} s for one of {self.limit} calls under way to "
            "end and was not sent; read streams to their end or cancel them, or raise limit or wait"
        )

    def __repr__(self) -> str:
        return f"InFlightLimit({self.limit}, wait={self.wait}, shared={self.shared})"


class _Gate:
    """Places, and a queue of those who want one."""

    def __init__(self, places: int) -> None:
        # Re-entrant: the end of a call may be a finalizer's, which runs anywhere.
        self._lock = threading.RLock()
        self._places = places
        self._free = places
        self._queue: deque[Callable[[], object]] = deque()

    @property
    def taken(self) -> int:
        return self._places - self._free

    def enter(self, grant: Callable[[], object]) -> bool:
        """Take a place; False when there is none, and then `grant` is called once there is."""
        with self._lock:
            if self._free and not self._queue:
                self._free -= 1
                return True
            self._queue.append(grant)
            return False

    def leave_queue(self, grant: Callable[[], object]) -> bool:
        """Wait no longer; True when a place was granted meanwhile, which is the caller's."""
        with self._lock:
            try:
                self._queue.remove(grant)
            except ValueError:
                return True
            return False

    def leave(self) -> None:
        """Give a place to the next in the queue, or back."""
        while True:
            with self._lock:
                if not self._queue:
                    self._free += 1
                    return
                grant = self._queue.popleft()
            try:
                grant()
            except RuntimeError:
                continue  # its event loop is closed, so nobody waits there
            return
