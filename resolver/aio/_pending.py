"""One connect that any number of tasks of one event loop wait for.

Knows nothing of caches, URLs or Flight. The cache holds it as an opaque object.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from resolver._errors import WorkerConnectError
from resolver._shared_errors import without_traceback

if TYPE_CHECKING:
    from collections.abc import Callable


class PendingConnect:
    """The shared outcome of one connect: a client or an error; the first one counts.

    ``task`` is the task that connects, while it does. It belongs to nobody who waits, so
    cancelling one of these cancels neither it nor the others. For one loop's thread only,
    but for `fail_from_anywhere`.
    """

    __slots__ = ("_loop", "_now", "_outcome", "retry_at", "task")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.task: asyncio.Task[None] | None = None
        self.retry_at: float | None = None  # of `now`: until then it is remembered
        self._now = now
        self._loop = loop
        self._outcome: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    @property
    def ended(self) -> bool:
        """Whether the outcome is known."""
        return self._outcome.done()

    @property
    def seconds_left(self) -> float:
        """For how much longer a failure is remembered."""
        return 0.0 if self.retry_at is None else max(self.retry_at - self._now(), 0.0)

    async def wait(self) -> Any:
        """The client, once there is one. Raises the error as an exception of the caller's own."""
        client, error = await asyncio.shield(self._outcome)
        if error is None:
            return client
        error = without_traceback(error)
        if self.retry_at is not None and isinstance(error, WorkerConnectError):
            error.retry_after = self.seconds_left
        try:
            raise error
        finally:
            del error  # or the traceback and this frame form a cycle

    def succeed(self, client: Any) -> None:
        """The connect gave `client`."""
        if not self._outcome.done():
            self._outcome.set_result((client, None))

    def fail(self, error: BaseException) -> None:
        """The connect failed with `error`; each waiter raises a copy of it."""
        # As a result, not as the future's exception: nobody need be left to retrieve it.
        if not self._outcome.done():
            self._outcome.set_result((None, without_traceback(error)))

    def fail_from_anywhere(self, error: BaseException) -> None:
        """`fail`, soon, on the loop's own thread. Thread-safe."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there
            self._loop.call_soon_threadsafe(self.fail, error)
