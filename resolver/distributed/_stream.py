"""The result of a distributed query as a stream, piece by piece.

While one piece is read the next one is computed, and none beyond it: whoever reads slowly
holds up the workers, and memory and disk hold two pieces at most. How a query is cut into
pieces is ``_pieces``' business, how one runs ``_executor``'s.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

import datafusion

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
        self._rest = deque(rest)
        self._lost: frozenset[str] = frozenset()
        self._dropped = threading.Event()
        self._ahead: Future[HeadRun] | None = None
        weakref.finalize(self, self._dropped.set).atexit = False
        self._enter(head)

    def __next__(self) -> Any:
        while True:
            try:
                return super().__next__()
            except StopIteration:
                self._head.close()
                if self._ahead is None:
                    raise
            self._enter(self._ahead.result())

    async def __anext__(self) -> Any:
        while True:
            try:
                return await super().__anext__()
            except StopAsyncIteration:
                await asyncio.to_thread(self._head.close)
                if self._ahead is None:
                    raise
            self._enter(await asyncio.wrap_future(self._ahead))

    def _enter(self, head: HeadRun) -> None:
        """Read ``head`` from now on, and have the piece after it computed meanwhile."""
        self._head = head
        self._lost |= head.lost
        self._ahead = None
        super().__init__(head.stream().rbs)
        if self._rest:
            plan, run = self._rest.popleft()
            left = tuple(worker for worker in plan.workers if worker.url not in self._lost)
            self._ahead = _computed(replace(plan, workers=left or plan.workers), run, self._dropped)


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
    thread.start()
    return future


@atexit.register
def _end_pieces() -> None:
    """Let workers know that what runs ahead is not wanted, while there still are threads."""
    running = list(_computing.items())
    for _, dropped in running:
        dropped.set()
    for thread, _ in running:
        thread.join(_END_TIMEOUT)
