"""One connect that any number of threads wait for.

Knows nothing of caches, URLs or Flight. The cache holds it as an opaque object.
"""

from __future__ import annotations

import copy
import threading
from typing import Any


class PendingConnect:
    """The shared outcome of one connect: a client, an error, or abandoned.

    The thread that made it connects and calls one of ``succeed``, ``fail`` and
    ``abandon``; the first call decides. Others ``wait``. Thread-safe, and safe against
    finalizers that run in the middle and come back here: every step is one atomic list
    operation, no lock is held.
    """

    __slots__ = ("_outcomes", "_waiters", "owner")

    def __init__(self) -> None:
        self.owner = threading.get_ident()
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

    def raise_error(self) -> None:
        """Raise the error of a failed connect, as an exception of the caller's own."""
        error = self._outcomes[0][1]
        if error is not None:
            raise _without_traceback(error)

    def wait(self, seconds: float | None) -> bool:
        """Wait for the outcome; False when it did not come within `seconds`."""
        latch = threading.Lock()
        latch.acquire()
        self._waiters.append(latch)
        # Whoever ends the connect writes the outcome first and then looks for waiters.
        if self.ended:
            return True
        if seconds is None:
            return latch.acquire()
        return latch.acquire(timeout=min(max(seconds, 0), threading.TIMEOUT_MAX))

    def succeed(self, client: Any) -> None:
        """The connect gave `client`."""
        self._end(client, None)

    def fail(self, error: BaseException) -> None:
        """The connect failed with `error`; waiters raise copies of it."""
        # Raising one exception object on many threads would splice their tracebacks,
        # and keep the connecting thread's frames alive.
        self._end(None, _without_traceback(error))

    def abandon(self) -> None:
        """The connecting thread was interrupted; one of the waiters should connect."""
        self._end(None, None)

    def _end(self, client: Any, error: BaseException | None) -> None:
        outcome = (client, error)
        self._outcomes.append(outcome)
        if self._outcomes[0] is outcome:
            while self._waiters:
                self._waiters.pop().release()


def _without_traceback(error: BaseException) -> BaseException:
    duplicate = copy.copy(error)
    duplicate.__traceback__ = None
    duplicate.__cause__ = error.__cause__
    duplicate.__suppress_context__ = True
    return duplicate
