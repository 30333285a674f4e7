"""One connect that any number of threads wait for.

Knows nothing of caches, URLs or Flight. The cache holds it as an opaque object.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Any

from ._shared_errors import without_traceback

_LONGEST_SLEEP = 1.0  # seconds that a waiter can lose if whoever should wake it is interrupted


class PendingConnect:
    """The shared outcome of one connect: a client, an error, or abandoned.

    The thread that made it connects and calls one of ``succeed``, ``fail`` and
    ``abandon``; the first call decides. Others ``wait``. Thread-safe, and safe against
    finalizers that run in the middle and come back here: every step is one atomic list
    operation, no lock is held.
    """

    __slots__ = ("_outcomes", "_waiters", "connecting_thread", "retry_at")

    connecting_thread: int | None
    """The thread that has the connector on its stack, while it has."""
    retry_at: float | None
    """Of a failed connect that is remembered: until when, on the clock of who set it."""

    def __init__(self) -> None:
        self.connecting_thread = None
        self.retry_at = None
        self._outcomes: list[tuple[Any, BaseException | None]] = []
        self._waiters: list[threading.Lock] = []

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return bool(self._outcomes)

    @property
    def client(self) -> Any:
        """What the connect gave, once ended; None where it failed or was abandoned."""
        return self._outcomes[0][0]

    @property
    def error(self) -> BaseException | None:
        """The error of a failed connect, once ended, as an exception of the caller's own."""
        error = self._outcomes[0][1]
        return None if error is None else without_traceback(error)

    def raise_error(self) -> None:
        """Raise the error of a failed connect, if it has one."""
        error = self.error
        if error is not None:
            raise error

    def wait(self, seconds: float | None) -> bool:
        """Wait for the outcome; False when it did not come within `seconds`."""
        latch = threading.Lock()
        latch.acquire()
        self._waiters.append(latch)
        until = math.inf if seconds is None else time.monotonic() + seconds
        # Whoever ends the connect writes the outcome first and then looks for waiters.
        while not self.ended:
            left = until - time.monotonic()
            if left <= 0:
                return False
            latch.acquire(timeout=min(left, _LONGEST_SLEEP))
        return True

    def succeed(self, client: Any) -> None:
        """The connect gave `client`."""
        self._end(client, None)

    def fail(self, error: BaseException) -> None:
        """The connect failed with `error`; waiters raise copies of it."""
        # Raising one exception object on many threads would splice their tracebacks,
        # and keep the connecting thread's frames alive.
        self._end(None, without_traceback(error))

    def abandon(self) -> None:
        """The connecting thread was interrupted; one of the waiters should connect."""
        self._end(None, None)

    def _end(self, client: Any, error: BaseException | None) -> None:
        outcome = (client, error)
        self._outcomes.append(outcome)
        if self._outcomes[0] is outcome:
            while self._waiters:
                self._waiters.pop().release()
