"""Runs a distributed plan: its stages on workers, its head here.

A head starts only once all that it reads is here, so a task that has to run again
elsewhere costs time and never a row. What runs where is ``_scheduler``'s business.
"""

from __future__ import annotations

import functools
import time
import uuid
import weakref
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import datafusion

from . import _wire
from ._calls import WorkerCalls
from ._errors import DistributedError
from ._inputs import Fetcher, InputLostError, scan_of_nothing, with_inputs
from ._keeper import Keeper
from ._plan_proto import PlanNode
from ._scheduler import Scheduler
from ._task import plan_metrics
from ._threads import call_all, call_interruptibly
from ._tree import Boundary, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import pyarrow as pa

    from resolver._resolver import ChannelResolver

    from ._exchange import Exchange
    from ._inputs import Headers
    from ._options import DistributedOptions
    from ._report import RunReport
    from ._runs import StageRun, TaskRun
    from ._stage import DistributedPlan

__all__ = ["HeadRun", "QueryRun", "encoded_headers"]

_HEAD_ATTEMPTS: Final = 8


class HeadRun:
    """The head stage of one query, or of one piece of it, ready to run once.

    ``close()`` removes the stage output it reads; so does losing the last reference. What
    workers held for a query without more pieces is removed meanwhile, and has been when
    ``close()`` returns.
    """

    def __init__(
        self,
        context: datafusion.SessionContext,
        node: PlanNode,
        release: Callable[[], object],
        *,
        report: RunReport,
        wait_for_workers: Callable[[], object],
    ) -> None:
        self._context = context
        self._node = node
        self._wait_for_workers = wait_for_workers
        self.report: Final = report
        # A collector may run on any thread, even one that is waited for: it does not wait.
        self._release: Final = weakref.finalize(self, release)

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


class QueryRun:
    """A query that runs: ``next_head()`` gives its head, or one for each of its pieces.

    For one thread at a time, but for ``end()``. ``context`` is a session to run heads in and
    ``headers`` go with every call. ``pieces`` is into how many the last stage is cut at most;
    what it reads stays on the workers until the last of them has run, or ``end()``.
    """

    def __init__(
        self,
        plan: DistributedPlan,
        *,
        resolver: ChannelResolver,
        exchange: Exchange,
        context: datafusion.SessionContext,
        settings: Mapping[str, str],
        headers: Mapping[str, str],
        options: DistributedOptions,
        report: RunReport,
        pieces: int = 1,
    ) -> None:
        self.report: Final = report
        self._plan = plan
        self._exchange = exchange
        self._context = context
        self._pieces = pieces
        self._query = uuid.uuid4().hex
        encoded = encoded_headers(headers)
        self._calls = WorkerCalls(resolver, headers=encoded, worker_timeout=options.worker_timeout)
        self._scheduler = Scheduler(
            self._query,
            workers=plan.workers,
            calls=self._calls,
            options=options,
            settings=settings,
            passthrough=list(headers),
            empty=functools.partial(_without_rows, context=context, exchange=exchange),
            first_new_number=len(plan.stages) + 1,
            report=report,
        )
        self._new_fetcher = functools.partial(
            Fetcher,
            resolver,
            exchange,
            headers=encoded,
            silence=options.worker_timeout,
            check=self._check_running,
        )
        self._heads: list[StageRun] | None = None
        self._schema: bytes | None = None
        self._keeper = Keeper(self._scheduler, self._calls, options.lease)

    @property
    def has_more(self) -> bool:
        """Whether there is another head; before the first there is."""
        return self._heads is None or bool(self._heads)

    def end(self) -> None:
        """Stop what runs, and remove what workers hold; soon. Idempotent, from any thread.

        Waits for nothing and takes no lock, so that a finalizer may do it.
        """
        self._keeper.end()

    def next_head(self) -> HeadRun:
        """Run the query as far as the next head needs it, and return that.

        Blocks until the head's input is in the exchange. Raises ``TaskFailedError`` with
        DataFusion's message, ``WorkerLostError`` or ``WorkerConnectError`` naming URLs; then,
        and when interrupted, the query is ended on every worker first.
        """
        started = time.monotonic()
        name = uuid.uuid4().hex
        release = functools.partial(self._exchange.release, name)
        try:
            self._keeper.start()
            node = call_interruptibly(
                lambda: self._next_node(name), name="query", check=self._check_running
            )
            self.report.seconds += time.monotonic() - started
            self.report.progress = None  # from now on rows are read
            if not self.has_more:
                self.end()
        except BaseException:
            release()
            self.end()
            self._keeper.join()
            raise
        return HeadRun(
            self._context,
            node,
            release,
            report=self.report,
            # Nothing is removed before the last piece is here.
            wait_for_workers=(lambda: None) if self.has_more else self._keeper.join,
        )

    def _check_running(self) -> None:
        if self._keeper.is_over:
            raise DistributedError(f"query {self._query} is over")

    def _next_node(self, name: str) -> PlanNode:
        """The plan of the next head, over the files that it reads, which ``name`` stands for."""
        if self._heads is None:
            heads = self._scheduler.settle_head(self._plan.head, self._pieces)
            if len(heads) > 1:
                self._schema = self._schema_of_pieces()
            self._heads = heads
        head = self._heads[0]
        # Each worker may be found lost by itself.
        attempts = len(self._plan.workers) + _HEAD_ATTEMPTS
        for attempt in range(attempts):
            inputs, read = self._scheduler.inputs_of(head, head.stage.tree)
            if self._schema is not None:
                inputs = tuple(replace(each, schema=self._schema) for each in inputs)
            key = _wire.OutputKey(name, 0, 0, attempt)
            try:
                with self._exchange.task(key) as stem:
                    fetcher = self._new_fetcher(key, stem)
                    plan = head.stage.tree.plan()
                    node = with_inputs(plan, inputs, fetcher, self._context, stem)
                    self._exchange.publish(key, ())
            except InputLostError as error:
                self._scheduler.lose(error)
                continue
            self.report.head_fetched_bytes += fetcher.fetched_bytes
            if self._scheduler.is_current(read):
                del self._heads[0]
                self._give_back(read)
                return node
        raise DistributedError(f"the output of query {self._query} was lost {attempts} times")

    def _give_back(self, read: Iterable[tuple[TaskRun, _wire.OutputKey]]) -> None:
        """What one piece was read from. After the last one everything is."""
        if self.has_more:
            outputs = defaultdict(list)
            for task, key in read:
                if task.output is not None:
                    outputs[task.output.url].append(key)
            self._calls.release_outputs(outputs)

    def _schema_of_pieces(self) -> bytes | None:
        """What all pieces have in common, if it is not what each of them has."""
        (last,) = self._plan.head.inputs
        # One of a stage below may have become a part of the last one.
        if not any(tree.kind == "union" for stage in last.walk() for tree in stage.tree.walk()):
            return None
        schema: bytes = _schema_of(last.tree, self._context).serialize().to_pybytes()
        return schema


def _without_rows(tree: Tree, *, context: datafusion.SessionContext, exchange: Exchange) -> Tree:
    """A scan of no files in place of ``tree``: its columns, its partitions, and no rows."""
    schema = _schema_of(tree, context)
    scan = scan_of_nothing(schema, tree.partitions, exchange.path / "empty", context)
    # A scan, or names over one.
    leaf = Tree((scan.children or (scan,))[0], f"EmptyExec: in place of {tree.name}")
    return Tree(scan.bare(), f"ProjectionExec: of {tree.name}", (leaf,)) if scan.children else leaf


def _schema_of(tree: Tree, context: datafusion.SessionContext) -> pa.Schema:
    """The schema of what ``tree`` gives, all columns nullable."""
    probe = PlanNode.parse(_uncut(tree).to_bytes()).without_rows().always_one_row()
    plan = datafusion.ExecutionPlan.from_bytes(context, probe.to_bytes())
    schemas = [item.to_pyarrow().schema for item in context.execute(plan, 0)]
    return schemas[0]


def _uncut(tree: Tree) -> PlanNode:
    """The plan that ``tree`` was cut from, so that it can be decoded by itself."""
    if tree.source is None:
        return tree.node.over(*(_uncut(child) for child in tree.children))
    whole = _uncut(tree.source.whole)
    return whole.coalesced() if tree.source.boundary is Boundary.BROADCAST else whole


def encoded_headers(headers: Mapping[str, str]) -> Headers:
    """Headers as Flight wants them."""
    return [(name.encode(), value.encode()) for name, value in headers.items()]
