"""Runs a distributed plan: its stages on workers, its head here.

The head starts only once all that it reads is here, so a task that has to run again
elsewhere costs time and never a row. What runs where is ``_scheduler``'s business.
"""

from __future__ import annotations

import functools
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Final

import datafusion

from . import _wire
from ._calls import WorkerCalls
from ._errors import DistributedError
from ._inputs import Fetcher, InputLostError, scan_of_nothing, with_inputs
from ._plan_proto import PlanNode
from ._scheduler import Scheduler
from ._task import plan_metrics
from ._threads import call_all, call_beside, call_interruptibly
from ._tree import Boundary, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pyarrow as pa

    from resolver._resolver import ChannelResolver

    from ._exchange import Exchange
    from ._inputs import Headers
    from ._options import DistributedOptions
    from ._report import RunReport
    from ._stage import DistributedPlan

__all__ = ["HeadRun", "encoded_headers", "run"]

_HEAD_ATTEMPTS: Final = 8


class HeadRun:
    """The head stage of one query, ready to run once.

    ``close()`` removes the stage output it reads; so does losing the last reference. What
    workers held is removed meanwhile, and has been when ``close()`` returns.
    """

    def __init__(
        self,
        context: datafusion.SessionContext,
        node: PlanNode,
        exchange: Exchange,
        query: str,
        *,
        report: RunReport,
        lost: frozenset[str],
        wait_for_workers: Callable[[], None],
    ) -> None:
        self._context = context
        self._node = node
        self._wait_for_workers = wait_for_workers
        self.report: Final = report
        self.lost: Final = lost
        """The URLs of the workers that were lost meanwhile."""
        # A collector may run on any thread, even one that is waited for: it does not wait.
        self._release: Final = weakref.finalize(self, exchange.release, query)

    def close(self) -> None:
        """Idempotent."""
        self._release()
        self._wait_for_workers()

    def stream(self) -> datafusion.RecordBatchStream:
        """All rows as one stream, as DataFusion's own ``execute_stream()`` gives them."""
        plan = self._decode(self._node)
        if plan.partition_count > 1:
            plan = self._decode(self._node.coalesced())
        return self._context.execute(plan, 0)

    def analyze(self) -> RunReport:
        """Read all rows, keep none, and return the report of the whole query."""
        plan = self._decode(self._node.coalesced())
        self.report.head_rows = sum(
            item.to_pyarrow().num_rows for item in self._context.execute(plan, 0)
        )
        # The head's own, below the coalesce that was put over it.
        self.report.head_nodes = tuple(plan_metrics(plan))[1:]
        return self.report

    def partition_streams(self) -> list[datafusion.RecordBatchStream]:
        """One stream per partition. Read them all, at the same time."""
        plan = self._decode(self._node)
        return [self._context.execute(plan, index) for index in range(plan.partition_count)]

    def partitions(self) -> list[list[pa.RecordBatch]]:
        """The batches of every partition."""

        def read(stream: datafusion.RecordBatchStream) -> list[pa.RecordBatch]:
            return [item.to_pyarrow() for item in stream]

        streams = self.partition_streams()
        return call_all([functools.partial(read, stream) for stream in streams], name="head")

    def _decode(self, node: PlanNode) -> datafusion.ExecutionPlan:
        return datafusion.ExecutionPlan.from_bytes(self._context, node.to_bytes())


def run(
    plan: DistributedPlan,
    *,
    resolver: ChannelResolver,
    exchange: Exchange,
    context: datafusion.SessionContext,
    settings: Mapping[str, str],
    headers: Mapping[str, str],
    options: DistributedOptions,
    report: RunReport,
    check: Callable[[], object] = lambda: None,
) -> HeadRun:
    """Run the stages of ``plan`` and return its head, ready to be read.

    ``context`` is a session to run the head in and ``headers`` go with every call. Blocks
    until the head's input is in ``exchange``, or until ``check``, which is called several
    times a second, raises. Raises ``TaskFailedError`` with DataFusion's
    message, ``WorkerLostError`` or ``WorkerConnectError`` naming URLs; then, and when
    interrupted, the query is ended on every worker first.
    """
    query = uuid.uuid4().hex
    encoded = encoded_headers(headers)
    calls = WorkerCalls(resolver, headers=encoded, worker_timeout=options.worker_timeout)
    scheduler = Scheduler(
        query,
        workers=plan.workers,
        calls=calls,
        options=options,
        settings=settings,
        passthrough=list(headers),
        empty=functools.partial(_without_rows, context=context, exchange=exchange),
        first_new_number=len(plan.stages) + 1,
        report=report,
    )
    over = threading.Event()

    def keep() -> None:
        while not over.wait(options.lease / 3):
            calls.renew_lease(scheduler.called, query)

    def check_running() -> None:
        if over.is_set():
            raise DistributedError(f"query {query} is over")

    def end() -> None:
        over.set()
        scheduler.end()
        report.seconds = time.monotonic() - started

    def release() -> None:
        # Also what stops the other tasks when one has failed.
        calls.release(scheduler.called, query)

    new_fetcher = functools.partial(
        Fetcher,
        resolver,
        exchange,
        headers=encoded,
        silence=options.worker_timeout,
        check=check_running,
    )
    threading.Thread(target=keep, name="lease", daemon=True).start()
    started = time.monotonic()
    try:
        node = call_interruptibly(
            lambda: _head(plan, scheduler, new_fetcher, context, exchange, report=report),
            name="query",
            check=check,
        )
        end()
        # All that the head reads is here.
        released = call_beside(release, name="release")
    except BaseException:
        exchange.release(query)
        end()
        release()
        raise
    return HeadRun(
        context,
        node,
        exchange,
        query,
        report=report,
        lost=scheduler.lost,
        wait_for_workers=released,
    )


def _head(
    plan: DistributedPlan,
    scheduler: Scheduler,
    new_fetcher: Callable[[_wire.OutputKey, Path], Fetcher],
    context: datafusion.SessionContext,
    exchange: Exchange,
    *,
    report: RunReport,
) -> PlanNode:
    """The plan of the head, over the files that it reads."""
    settled = scheduler.settle_head(plan.head)
    # Each worker may be found lost by itself.
    attempts = len(plan.workers) + _HEAD_ATTEMPTS
    for attempt in range(attempts):
        inputs, read = scheduler.inputs_of(settled, settled.stage.tree)
        key = _wire.OutputKey(scheduler.query, 0, 0, attempt)
        try:
            with exchange.task(key) as stem:
                fetcher = new_fetcher(key, stem)
                node = with_inputs(settled.stage.tree.plan(), inputs, fetcher, context, stem)
                exchange.publish(key, ())
        except InputLostError as error:
            scheduler.lose(error)
            continue
        report.head_fetched_bytes += fetcher.fetched_bytes
        if scheduler.is_current(read):
            return node
    raise DistributedError(f"the output of query {scheduler.query} was lost {attempts} times")


def _without_rows(tree: Tree, *, context: datafusion.SessionContext, exchange: Exchange) -> Tree:
    """A scan of no files in place of ``tree``: its columns, its partitions, and no rows."""
    probe = PlanNode.parse(_uncut(tree).to_bytes()).without_rows().always_one_row()
    plan = datafusion.ExecutionPlan.from_bytes(context, probe.to_bytes())
    schemas = [item.to_pyarrow().schema for item in context.execute(plan, 0)]
    scan = scan_of_nothing(schemas[0], tree.partitions, exchange.path / "empty", context)
    # A scan, or names over one.
    leaf = Tree((scan.children or (scan,))[0], f"EmptyExec: in place of {tree.name}")
    return Tree(scan.bare(), f"ProjectionExec: of {tree.name}", (leaf,)) if scan.children else leaf


def _uncut(tree: Tree) -> PlanNode:
    """The plan that ``tree`` was cut from, so that it can be decoded by itself."""
    if tree.source is None:
        return tree.node.over(*(_uncut(child) for child in tree.children))
    whole = _uncut(tree.source.whole)
    return whole.coalesced() if tree.source.boundary is Boundary.BROADCAST else whole


def encoded_headers(headers: Mapping[str, str]) -> Headers:
    """Headers as Flight wants them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]
