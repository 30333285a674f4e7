"""The result of a distributed query as a stream, piece by piece.

While one piece is read the next one is computed, and none beyond it: whoever reads slowly
holds up the workers, and memory and disk hold two pieces at most. How a query is cut into
pieces is ``_pieces``' business, how one runs ``_executor``'s.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import datafusion

from resolver._errors import ForkedProcessError

from ._errors import DistributedError
from ._report import RunReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._executor import HeadRun
    from ._stage import DistributedPlan

__all__ = ["ResultStream", "Runner"]


class Runner(Protocol):
    """Runs a plan up to its head, as ``_executor.run`` does."""

    def __call__(
        self, plan: DistributedPlan, *, report: RunReport, check: Callable[[], object] = ...
    ) -> HeadRun: ...


class ResultStream(datafusion.RecordBatchStream):
    """All batches of ``head``, and then of the ``rest`` of the query. For one reader at a time.

    What a piece raises comes after the rows of those before it. Holds the stage output it
    reads until it has ended or is dropped; dropped, it also stops the piece that is computed
    ahead.
    """

    def __init__(self, head: HeadRun, rest: Sequence[tuple[DistributedPlan, Runner]] = ()) -> None:
        self._process = os.getpid()
        self._dropped = threading.Event()
        weakref.finalize(self, self._dropped.set).atexit = False
        self._at = self._place(head, tuple(rest), frozenset())

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
            self._enter(self._at.ahead.result())

    async def __anext__(self) -> Any:
        while True:
            try:
                return await super().__anext__()
            except StopAsyncIteration:
                await asyncio.to_thread(self._at.head.close)
                if self._at.ahead is None:
                    raise
            self._check_process()
            self._enter(await asyncio.wrap_future(self._at.ahead))

    def _enter(self, head: HeadRun) -> None:
        """Go on to the next piece; as one step, so that whatever is raised, none is left out."""
        self._at = self._place(head, self._at.rest, self._at.lost)

    def _place(
        self,
        head: HeadRun,
        rest: tuple[tuple[DistributedPlan, Runner], ...],
        lost: frozenset[str],
    ) -> _Place:
        """Before the first row of ``head``, with the first of the ``rest`` under way."""
        rows = head.stream().rbs
        lost |= head.lost
        if not rest:
            return _Place(head, rows, None, (), lost)
        (plan, run), *later = rest
        left = tuple(worker for worker in plan.workers if worker.url not in lost)
        ahead = _computed(replace(plan, workers=left or plan.workers), run, self._dropped)
        return _Place(head, rows, ahead, tuple(later), lost)

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedProcessError(
                "the result of the query is computed in the process that this one was forked "
                "from; run the query in here, in a process started with spawn or forkserver"
            )


class _Place(NamedTuple):
    """Where a stream is: the piece that is read, and what comes after it."""

    head: HeadRun
    rows: Any
    ahead: Future[HeadRun] | None
    rest: tuple[tuple[DistributedPlan, Runner], ...]
    lost: frozenset[str]


_computing: Final[dict[threading.Thread, threading.Event]] = {}
"""The pieces that are computed ahead, and what tells them that nobody wants them."""

_END_TIMEOUT: Final = 1.0  # seconds


def _computed(plan: DistributedPlan, run: Runner, dropped: threading.Event) -> Future[HeadRun]:
    """The head of ``plan``, once it has run on a thread of its own."""
    future: Future[HeadRun] = Future()
    future.set_running_or_notify_cancel()  # whoever waits may give up; the piece goes on

    def check() -> None:
        if dropped.is_set():
            raise DistributedError("the result of the query was dropped before its end")

    def compute() -> None:
        try:
            future.set_result(run(plan, report=RunReport(), check=check))
        except BaseException as error:  # noqa: BLE001  # it is raised where it is waited for
            future.set_exception(error)
        finally:
            _computing.pop(threading.current_thread(), None)

    thread = threading.Thread(target=compute, name="piece", daemon=True)
    _computing[thread] = dropped
    try:
        thread.start()
    except BaseException:
        _computing.pop(thread, None)  # it may have started, and ended, before an interrupt
        raise
    return future


@atexit.register
def _end_pieces() -> None:
    """Let workers know that what runs ahead is not wanted, while there still are threads."""
    running = list(_computing.items())
    for _, dropped in running:
        dropped.set()
    for thread, _ in running:
        thread.join(_END_TIMEOUT)
