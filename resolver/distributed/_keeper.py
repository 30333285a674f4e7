"""What keeps a query on its workers while it runs, and ends it there.

One thread per query: it renews leases until the query is over, and then removes what the
workers hold of it. What the query does meanwhile is its own business.
"""

from __future__ import annotations

import atexit
import queue
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ._calls import WorkerCalls
    from ._scheduler import Scheduler

__all__ = ["Keeper"]

_END_TIMEOUT: Final = 2.0  # seconds; workers are given less to answer


class Keeper:
    """Keeps the query of ``scheduler``; ``lease`` is in seconds. Thread-safe."""

    def __init__(self, scheduler: Scheduler, calls: WorkerCalls, lease: float) -> None:
        self._scheduler = scheduler
        self._calls = calls
        self._lease = lease
        # Its put() may be called by a finalizer, on whatever thread and wherever that is.
        self._told: Final[queue.SimpleQueue[None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.is_over = False

    def start(self) -> None:
        """Idempotent."""
        if self._thread is not None:
            return
        # A daemon: a query that nobody ends must not keep an interpreter from ending.
        thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread = thread
        _keepers[thread] = self
        try:
            thread.start()
        except BaseException:
            _keepers.pop(thread, None)
            self._thread = None
            raise

    def end(self) -> None:
        """The query is over: nothing more starts, and workers are told. Waits for nothing."""
        self.is_over = True
        self._told.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait until workers have been told, or have had time enough to listen."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _keep(self) -> None:
        try:
            while True:
                try:
                    self._told.get(timeout=self._lease / 3)
                    break
                except queue.Empty:
                    self._calls.renew_lease(self._scheduler.called, self._scheduler.query)
            self._scheduler.end()
            # Also what stops the other tasks when one has failed.
            self._calls.release(self._scheduler.called, self._scheduler.query)
        finally:
            _keepers.pop(threading.current_thread(), None)


_keepers: Final[dict[threading.Thread, Keeper]] = {}


@atexit.register
def _end_queries() -> None:
    """Let workers know that nobody waits any more, while there still are threads."""
    running = list(_keepers.values())
    for keeper in running:
        keeper.end()
    for keeper in running:
        keeper.join(_END_TIMEOUT)
