"""Threads that fetch endpoints into a bounded buffer; the inside of `read_batches`.

Knows nothing of locations or Flight: a job is handed in. Batches wait here in the order
of their endpoints or as they come, never more than the bound, and the first error, or
`stop`, ends everything. Holds no reference to who reads, so dropping the reader stops it.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any, Final, Protocol

from ._buffer import NOT_YET, Buffer

if TYPE_CHECKING:
    from collections.abc import Callable

THREAD_NAME: Final = "resolver-read"


class Cancellable(Protocol):
    """A stream that another thread can end."""

    def cancel(self) -> None:
        """End it; a read that waits raises."""


class Stopped(Exception):  # noqa: N818 -- a signal to a job, not an error
    """The reader is gone; the job ends without a word."""


class Fetch(Buffer):
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
        super().__init__(count, ordered=ordered, prefetch=prefetch)
        self._job = job
        self._concurrency = min(concurrency, count)
        self._changed = threading.Condition()
        self._next = 0
        self._streams: set[Cancellable] = set()
        self._started = False

    # -- for the reader --------------------------------------------------------------------

    def take(self) -> Any:
        """The next batch, or None at the end. Blocks; raises the first error of any job."""
        self._start()
        with self._changed:
            while (batch := self._next_locked()) is NOT_YET:
                self._changed.wait()
            return batch

    def schema(self) -> Any:
        """The schema of the endpoint that answers first. Blocks; None without endpoints."""
        self._start()
        with self._changed:
            while (schema := self._first_schema_locked()) is NOT_YET:
                self._changed.wait()
            return schema

    def stop(self) -> None:
        """End every job, without waiting for it; idempotent, for any thread."""
        if self._is_inherited:  # to cancel would be to write to the parent's connection
            return
        with self._changed:
            self._stop_locked()
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

    def first_within(self, seconds: float, call: Callable[[], Any]) -> tuple[Any, Any] | None:
        """The stream that `call` opens and the first that it gives, None where it is empty.

        Or None after `seconds`: that stream is cancelled then, or as soon as it is opened.
        """
        answers: queue.SimpleQueue[tuple[Any, Any, BaseException | None]] = queue.SimpleQueue()
        streams: list[Cancellable] = []
        is_left = threading.Event()

        def begin() -> None:
            try:
                stream = call()
                streams.append(stream)
                with self.opened(stream):
                    if is_left.is_set():
                        raise Stopped  # noqa: TRY301 -- for `opened`
                    answers.put((stream, next(iter(stream), None), None))
            except BaseException as error:  # noqa: BLE001 -- raised where it is waited for
                answers.put((None, None, error))

        threading.Thread(target=begin, name=THREAD_NAME, daemon=True).start()
        try:
            stream, first, error = answers.get(timeout=seconds)
        except queue.Empty:
            is_left.set()
            for each in streams:
                with contextlib.suppress(Exception):  # it may have ended meanwhile
                    each.cancel()
            return None
        try:
            if error is not None:
                raise error
        finally:
            error = None  # or it, its traceback and this frame form a cycle
        return stream, first

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
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room_locked(index))
            self.check_running()
            self._put_locked(index, batch)

    # -- inside ----------------------------------------------------------------------------

    def _start(self) -> None:
        self._check_process()
        with self._changed:
            if self._started or self._stopped:
                return
            self._started = True
        try:
            for _ in range(self._concurrency):
                threading.Thread(target=self._run, name=THREAD_NAME, daemon=True).start()
        except BaseException as error:
            self.fail(error)  # those that did start must not fetch for nobody
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
