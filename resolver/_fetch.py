"""Threads that fetch endpoints into a bounded buffer; the inside of `read_batches`.

Knows nothing of locations or Flight: a job is handed in. Batches wait here in the order
of their endpoints or as they come, never more than the bound, and the first error, or
`stop`, ends everything. Holds no reference to who reads, so dropping the reader stops it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from ._errors import ForkedProcessError, ResolverError

if TYPE_CHECKING:
    from collections.abc import Callable

THREAD_NAME: Final = "resolver-read"


class Cancellable(Protocol):
    """A stream that another thread can end."""

    def cancel(self) -> None:
        """End it; a read that waits raises."""


class Stopped(Exception):  # noqa: N818 -- a signal to a job, not an error
    """The reader is gone; the job ends without a word."""


def interrupted() -> ResolverError:
    """What who reads on is told after a cancellation, or a signal, in the middle."""
    return ResolverError(
        "Reading was interrupted half-way, and every stream has ended: read from the start"
    )


class OfOneProcess:
    """What a forked child has inherited and must leave alone: its parent's streams."""

    def __init__(self) -> None:
        self._process = os.getpid()

    @property
    def _is_inherited(self) -> bool:
        return self._process != os.getpid()

    def _check_process(self) -> None:
        if self._is_inherited:
            raise ForkedProcessError(
                f"Process {self._process} was reading here when this process was forked from it, "
                "and gRPC does not survive a fork: read in one of them alone, or start processes "
                "with the 'spawn' or 'forkserver' method of multiprocessing"
            )


class Fetch(OfOneProcess):
    """Runs ``job(index, fetch)`` for each of `count` endpoints, `concurrency` at a time.

    A job calls `opened`, then `put` for each batch, and raises what went wrong. At most
    ``prefetch + 1`` batches wait and one more is in the hands of each of `concurrency`
    threads. Endpoints are begun in their order: the thread of the endpoint that an ordered
    reader waits for may always put one batch, so a full buffer of later ones is no deadlock.
    """

    def __init__(
        self,
        job: Callable[[int, Fetch], None],
        count: int,
        *,
        ordered: bool,
        concurrency: int,
        prefetch: int,
    ) -> None:
        super().__init__()
        self._job = job
        self._count = count
        self._ordered = ordered
        self._concurrency = min(concurrency, count)
        self._prefetch = prefetch
        self._changed = threading.Condition()
        self._queues: dict[int, deque[Any]] = {}
        self._waiting = 0
        self._peak = 0
        self._next = 0
        self._head = 0
        self._done: set[int] = set()
        self._streams: set[Cancellable] = set()
        self._schema: Any = None
        self._error: BaseException | None = None
        self._stopped = False
        self._started = False

    @property
    def peak(self) -> int:
        """The most batches that ever waited at once."""
        return self._peak

    # -- for the reader --------------------------------------------------------------------

    def take(self) -> Any:
        """The next batch, or None at the end. Blocks; raises the first error of any job."""
        self._start()
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._stopped:
                    return None
                if queue := self._queues.get(self._head):
                    batch = queue.popleft()
                    self._waiting -= 1
                    self._changed.notify_all()
                    return batch
                if len(self._done) == self._count and not self._waiting:
                    return None
                if self._ordered and self._head in self._done:
                    self._queues.pop(self._head, None)
                    self._head += 1
                    self._changed.notify_all()  # whose turn it is may put beyond the bound
                else:
                    self._changed.wait()

    def schema(self) -> Any:
        """The schema of the endpoint that answers first. Blocks; None without endpoints."""
        self._start()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._schema is not None
                    or self._error is not None
                    or self._stopped
                    or len(self._done) == self._count
                )
            )
            if self._error is not None:
                raise self._error
            return self._schema

    def stop(self) -> None:
        """End every job, without waiting for it; idempotent, for any thread."""
        if self._is_inherited:  # to cancel would be to write to the parent's connection
            return
        with self._changed:
            self._stopped = True
            self._queues.clear()
            self._waiting = 0
            streams = list(self._streams)
            self._changed.notify_all()
        for stream in streams:
            with contextlib.suppress(Exception):  # it may have ended meanwhile
                stream.cancel()

    def fail(self, error: BaseException) -> None:
        """End every job; who reads on gets `error`, and never a part as if it were all."""
        if self._is_inherited:
            return
        with self._changed:
            # A stream cancelled by `stop` raises too: that is no news.
            if self._stopped:
                return
            self._error = error
            self._stopped = True  # so that no later error replaces the first
        self.stop()

    # -- for the jobs ----------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self, stream: Cancellable) -> Any:
        """Have `stream` cancelled when the reader goes, until the block ends."""
        with self._changed:
            self._streams.add(stream)
        try:
            self.check_running()  # `stop` may have come before the stream was known to it
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # what was raised says more
                stream.cancel()
            raise
        finally:
            with self._changed:
                self._streams.discard(stream)

    def agree(self, schema: Any) -> Any:
        """The schema that counts: the one of the endpoint that answered first."""
        with self._changed:
            if self._schema is None:
                self._schema = schema
                self._changed.notify_all()
            return self._schema

    def check_running(self) -> None:
        """Raise `Stopped` when nobody reads any more."""
        if self._stopped:
            raise Stopped

    def put(self, index: int, batch: Any) -> None:
        """Hand over one batch of endpoint `index`. Blocks while too many wait."""
        slot = index if self._ordered else 0
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room_locked(slot))
            self.check_running()
            self._queues.setdefault(slot, deque()).append(batch)
            self._waiting += 1
            self._peak = max(self._peak, self._waiting)
            self._changed.notify_all()

    # -- inside ----------------------------------------------------------------------------

    def _has_room_locked(self, slot: int) -> bool:
        if self._waiting < self._prefetch:
            return True
        return slot == self._head and not self._queues.get(slot)

    def _start(self) -> None:
        self._check_process()
        with self._changed:
            if self._started or self._stopped:
                return
            self._started = True
        try:
            for _ in range(self._concurrency):
                threading.Thread(target=self._run, name=THREAD_NAME, daemon=True).start()
        except BaseException:
            self.stop()  # those that did start must not fetch for nobody
            raise

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopped or self._next == self._count:
                    return
                index = self._next
                self._next += 1
            try:
                self._job(index, self)
            except Stopped:
                return
            except BaseException as error:  # noqa: BLE001 -- the reader raises it
                self.fail(error)
                return
            with self._changed:
                self._done.add(index)
                self._changed.notify_all()
