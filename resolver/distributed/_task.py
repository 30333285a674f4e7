"""Runs one task on a worker: plan bytes in, files in the exchange out.

The edge where DataFusion meets the network. Plan bytes are a stranger's until they have
been decoded; whatever a running plan raises, a Rust panic included, ends here as an
error of that task and of nothing else.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import datafusion
import pyarrow as pa
from pyarrow import flight

from ._batches import Compactor, checked, merged_schema
from ._cutter import UNDERSTOOD
from ._exchange import Exchange, QueryReleasedError
from ._inputs import Fetcher, InputLostError, with_inputs
from ._loops import run_all
from ._partition import PartitionWriter, StoredPartition, nothing_stored
from ._plan_proto import PlanDecodeError, PlanNode
from ._wire import INLINE_BYTES, NodeMetrics, TaskReport, TaskRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from resolver._resolver import ChannelResolver

    from ._inputs import Headers

__all__ = ["InvalidPlanError", "decode_plan", "plan_metrics", "run_task"]

MAX_PARTITIONS: Final = 1_024
"""Output partitions of one task; each runs on a thread of its own."""

# Whatever else a plan may hold, such as a sink that writes anywhere, is nobody's task.
_TASK_KINDS: Final = UNDERSTOOD | {
    "arrow_scan",
    "avro_scan",
    "csv_scan",
    "json_scan",
    "parquet_scan",
    "stage_input",
}


class InvalidPlanError(ValueError):
    """The bytes do not decode to a plan that this worker may run."""


def decode_plan(
    data: bytes, context: datafusion.SessionContext, *, allow_python_udfs: bool = False
) -> datafusion.ExecutionPlan:
    """Decode plan bytes, without running any code that they may carry.

    A pickled Python function in a plan is code of whoever sent it. It is refused unless
    ``allow_python_udfs``; functions registered in ``context`` are found by name.
    """
    codec = context.with_python_udf_inlining(enabled=allow_python_udfs)
    try:
        plan = datafusion.ExecutionPlan.from_bytes(codec, data)
        partitions = plan.partition_count
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is a BaseException
        raise InvalidPlanError(f"these plan bytes were refused: {error}") from error
    if not 0 < partitions <= MAX_PARTITIONS:
        raise InvalidPlanError(f"a task of {partitions} partitions; 1 to {MAX_PARTITIONS} can run")
    return plan


def run_task(
    request: TaskRequest,
    context: datafusion.SessionContext,
    exchange: Exchange,
    is_cancelled: Callable[[], bool],
    *,
    resolver: ChannelResolver,
    headers: Headers | None = None,
    allow_python_udfs: bool = False,
) -> TaskReport:
    """Run every output partition of ``request.plan`` and keep the output in ``exchange``.

    ``context`` must have the options of ``_settings.EXECUTION``. What the task reads of
    other workers is fetched through ``resolver``, with ``headers``. ``is_cancelled`` is
    asked several times a second. Raises ``InvalidPlanError``, ``WireError``,
    ``QueryReleasedError`` when the query ended meanwhile, ``FlightServerError`` with the
    URL of an input that is lost, or what the plan raised.
    """
    started = time.monotonic()
    _check_nodes(request.plan)

    def check() -> None:
        exchange.check_running(request.output.query)
        if is_cancelled():
            raise QueryReleasedError("the coordinator has gone away, or given the task up")

    with exchange.task(request.output) as stem:
        fetcher = Fetcher(
            resolver,
            exchange,
            request.output,
            stem,
            headers=headers or [],
            silence=request.worker_timeout,
            check=check,
        )
        try:
            node = PlanNode.parse(request.plan).with_memory(_rewritten)
            node = with_inputs(node, request.inputs, fetcher, context, stem)
        except InputLostError as error:
            lost = json.dumps({"lost": error.url}).encode()
            raise flight.FlightServerError(str(error), extra_info=lost) from error
        decode = functools.partial(
            decode_plan, context=context, allow_python_udfs=allow_python_udfs
        )
        running, plan = _cooperating(node, decode)
        new_writer = functools.partial(_writer, exchange, request, stem)
        results = _run_partitions(plan, context, new_writer, check)
        schemas = [schema for _, schema in results if schema is not None]
        schema = merged_schema(schemas) if schemas else _schema_of(node, decode, context)
        fetcher.remove()
        partitions = [partition for partition, _ in results]
        exchange.publish(request.output, partitions)
    return TaskReport(
        partitions=tuple(partition.report for partition in partitions),
        schema=schema.serialize().to_pybytes(),
        seconds=time.monotonic() - started,
        fetched_bytes=fetcher.fetched_bytes,
        nodes=_metrics_of(running, plan),
        files=_contents(partitions),
        probed=not schemas,
    )


def plan_metrics(plan: datafusion.ExecutionPlan) -> Iterator[NodeMetrics]:
    """What every node of a plan that has run did, in the order of its display."""
    metrics = plan.metrics()
    if metrics is None:
        yield NodeMetrics(0, 0.0, 0)
    else:
        yield NodeMetrics(
            metrics.output_rows or 0,
            (metrics.elapsed_compute or 0) / 1e9,
            metrics.spilled_bytes or 0,
        )
    for child in plan.children():
        yield from plan_metrics(child)


def _cooperating(
    node: PlanNode, decode: Callable[[bytes], datafusion.ExecutionPlan]
) -> tuple[PlanNode, datafusion.ExecutionPlan]:
    """``node`` with joins that give way to others, where DataFusion still decodes it then.

    It decodes plans of some fifty levels, and every such join is one more.
    """
    running = node.cooperating()
    try:
        return running, decode(running.to_bytes())
    except InvalidPlanError:
        return node, decode(node.to_bytes())


def _metrics_of(node: PlanNode, plan: datafusion.ExecutionPlan) -> tuple[NodeMetrics, ...]:
    """Those of the nodes that the task was sent, without what was put over its joins."""
    nodes, metrics = list(node.walk()), list(plan_metrics(plan))
    if len(nodes) != len(metrics):
        return tuple(metrics)
    return tuple(
        each for each, below in zip(metrics, nodes, strict=True) if not below.is_cooperating_join
    )


def _check_nodes(data: bytes) -> None:
    """Refuse plans that do more than read files and compute: a sink writes anywhere.

    And those that divide rows into so many partitions that there is no memory for them.
    """
    try:
        nodes = list(PlanNode.parse(data).walk())
        kinds = {node.kind for node in nodes}
        parts = [node.divides_into for node in nodes]
    except PlanDecodeError as error:
        raise InvalidPlanError(f"these plan bytes were refused: {error}") from error
    if not 0 < min(parts) <= max(parts) <= MAX_PARTITIONS:
        raise InvalidPlanError(
            f"a task that divides rows into {max(parts)} partitions; 1 to {MAX_PARTITIONS} can run"
        )
    if kinds - _TASK_KINDS:
        shown = ", ".join(sorted(kinds - _TASK_KINDS))
        raise InvalidPlanError(f"these plan bytes were refused: no part of a task is: {shown}")


def _rewritten(table: bytes) -> bytes:
    """A partition of an in-memory table, if it is one."""
    if not table:
        return table
    sink = pa.BufferOutputStream()
    try:
        with pa.ipc.open_stream(table) as reader, pa.ipc.new_stream(sink, reader.schema) as writer:
            for batch in checked(reader):
                writer.write_batch(batch)
    except (pa.ArrowException, OSError) as error:
        raise InvalidPlanError(
            f"these plan bytes were refused: an in-memory table cannot be read: {error}"
        ) from error
    rewritten: bytes = sink.getvalue().to_pybytes()
    return rewritten


_Result = tuple[StoredPartition, pa.Schema | None]
_NewWriter = Callable[[int, pa.Schema], PartitionWriter]


def _writer(
    exchange: Exchange, request: TaskRequest, stem: Path, partition: int, schema: pa.Schema
) -> PartitionWriter:
    return exchange.writer(request.output, stem, partition, schema, request.compression)


def _run_partitions(
    plan: datafusion.ExecutionPlan,
    context: datafusion.SessionContext,
    new_writer: _NewWriter,
    check: Callable[[], object],
) -> list[_Result]:
    """All partitions of the one plan object at once.

    They share its RepartitionExec; one that nobody reads would make it buffer the rows of
    the others.
    """
    partitions = range(plan.partition_count)
    return run_all(
        [_written(plan, index, context, new_writer) for index in partitions], check=check
    )


async def _written(
    plan: datafusion.ExecutionPlan,
    index: int,
    context: datafusion.SessionContext,
    new_writer: _NewWriter,
) -> _Result:
    schema: pa.Schema | None = None
    writer: PartitionWriter | None = None
    try:
        async for item in context.execute(plan, index):
            batch = item.to_pyarrow()
            if writer is None:
                schema = batch.schema
                compactor = Compactor(schema)
                writer = new_writer(index, compactor.schema)
            if batch.num_rows:
                writer.write(compactor.compacted(batch))
        if writer is None:
            return nothing_stored(), None
        return writer.finish(), schema
    except BaseException:
        if writer is not None:
            writer.discard()
        raise


def _contents(partitions: Sequence[StoredPartition]) -> tuple[tuple[bytes, ...], ...] | None:
    """What the files of a small output hold, so that nobody need fetch them."""
    if sum(partition.report.bytes for partition in partitions) > INLINE_BYTES:
        return None
    return tuple(tuple(path.read_bytes() for path in partition.files) for partition in partitions)


def _schema_of(
    node: PlanNode,
    decode: Callable[[bytes], datafusion.ExecutionPlan],
    context: datafusion.SessionContext,
) -> pa.Schema:
    """The schema of a plan that gave no batch, which is all that DataFusion shows it with."""
    probe = decode(node.without_rows().always_one_row().to_bytes())
    for item in context.execute(probe, 0):
        return item.to_pyarrow().schema
    raise RuntimeError("DataFusion gave no schema for a stage without rows")
