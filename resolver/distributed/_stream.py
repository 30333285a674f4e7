"""The result of a distributed query as a stream, piece by piece.

While one piece is read the next one is computed, and none beyond it: whoever reads slowly
holds up the workers, and memory and disk hold two pieces at most. How a query is cut into
pieces is ``_pieces``' business, how one runs ``_executor``'s.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import datafusion

from resolver._errors import ForkedProcessError

if TYPE_CHECKING:
    from ._executor import HeadRun

__all__ = ["Query", "ResultStream"]


class Query(Protocol):
    """Gives its heads one after another, as ``_executor.QueryRun`` does."""

    @property
    def has_more(self) -> bool: ...

    def next_head(self) -> HeadRun: ...

    def end(self) -> None: ...


class ResultStream(datafusion.RecordBatchStream):
    """All rows of ``query``, head after head. For one reader at a time.

    Blocks until the first head is there. What a later one raises comes after the rows of
    those before it. Holds the stage output it reads until it has ended or is dropped;
    dropped, it also ends the query.
    """

    def __init__(self, query: Query) -> None:
        self._process = os.getpid()
        self._query = query
        weakref.finalize(self, query.end).atexit = False
        self._enter(query.next_head())

    @property
    def rbs(self) -> Any:
        """What the base reads."""
        return self._at.rows

    def __next__(self) -> Any:
        while True:
            try:
                return super().__next__()
            except StopIteration:
                self._at.head.close()
                if self._at.ahead is None:
                    raise
            self._check_process()
            self._enter(self._at.ahead.started().result())

    async def __anext__(self) -> Any:
        while True:
            try:
                return await super().__anext__()
            except StopAsyncIteration:
                await asyncio.to_thread(self._at.head.close)
                if self._at.ahead is None:
                    raise
            self._check_process()
            self._enter(await asyncio.wrap_future(self._at.ahead.started()))

    def _enter(self, head: HeadRun) -> None:
        """Stand before the first row of ``head``, with the next one under way.

        Whatever is raised, the stream is here or where it was, and no head is left out.
        """
        rows = head.stream().rbs
        self._at = _Place(head, rows, _Ahead(self._query) if self._query.has_more else None)
        if self._at.ahead is not None:
            self._at.ahead.started()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedProcessError(
                "the result of the query is computed in the process that this one was forked "
                "from; run the query in here, in a process started with spawn or forkserver"
            )


class _Ahead(Future["HeadRun"]):
    """The next head of ``query``, which runs on a thread of its own.

    Once, however often it is started: an interrupt of a start does not tell whether it was.
    """

    def __init__(self, query: Query) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()  # whoever waits may give up; the head goes on
        self._to_run = [query.next_head]

    def started(self) -> Self:
        if self._to_run:
            threading.Thread(target=self._run, name="piece", daemon=True).start()
        return self

    def _run(self) -> None:
        try:
            run = self._to_run.pop()
        except IndexError:
            return
        try:
            self.set_result(run())
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            self.set_exception(error)


class _Place(NamedTuple):
    """Where a stream is: the head that is read, and what comes after it."""

    head: HeadRun
    rows: Any
    ahead: _Ahead | None
