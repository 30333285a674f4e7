"""Runs one task on a worker: plan bytes in, files in the exchange out.

The edge where DataFusion meets the network. Plan bytes are a stranger's until they have
been decoded; whatever a running plan raises, a Rust panic included, ends here as an
error of that task and of nothing else.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

import datafusion
import pyarrow as pa

from ._batches import plain_schema
from ._exchange import Exchange, PartitionWriter, QueryReleasedError, StoredPartition
from ._plan_proto import PlanDecodeError, PlanNode
from ._wire import PartitionReport, TaskReport, TaskRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["InvalidPlanError", "decode_plan", "run_task"]

MAX_PARTITIONS: Final = 1_024
"""Output partitions of one task; each runs on a thread of its own."""

# What the planner puts into a stage. Whatever else a plan may hold is nobody's task.
_STAGE_KINDS: Final = frozenset(
    {
        "aggregate",
        "arrow_scan",
        "avro_scan",
        "coalesce_batches",
        "cooperative",
        "filter",
        "local_limit",
        "parquet_scan",
        "projection",
        "repartition",
        "sort",
    }
)
_CANCEL_POLL: Final = 0.1  # seconds between looks at whether the caller is still there


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
    allow_python_udfs: bool = False,
) -> TaskReport:
    """Run every output partition of ``request.plan`` and keep the output in ``exchange``.

    ``context`` must have the options of ``_settings.EXECUTION``. ``is_cancelled`` is
    asked several times a second, by this thread only. Raises ``InvalidPlanError``,
    ``QueryReleasedError`` when the query ended meanwhile, or what the plan raised.
    """
    started = time.monotonic()
    _check_kinds(request.plan)
    plan = decode_plan(request.plan, context, allow_python_udfs=allow_python_udfs)
    with exchange.task(request.output) as directory:
        results = _run_partitions(plan, context, directory, request, exchange, is_cancelled)
        schemas = [schema for _, schema in results if schema is not None]
        if any(not schema.equals(schemas[0]) for schema in schemas):
            raise RuntimeError("the partitions of one plan disagree about its schema")
        exchange.publish(request.output, [partition for partition, _ in results])
    return TaskReport(
        partitions=tuple(partition.report for partition, _ in results),
        schema=schemas[0].serialize().to_pybytes() if schemas else None,
        seconds=time.monotonic() - started,
    )


def _check_kinds(data: bytes) -> None:
    """Refuse plans that do more than read files and compute: a sink writes anywhere."""
    try:
        kinds = {node.kind for node in PlanNode.parse(data).walk()}
    except PlanDecodeError as error:
        raise InvalidPlanError(f"these plan bytes were refused: {error}") from error
    if kinds - _STAGE_KINDS:
        shown = ", ".join(sorted(kinds - _STAGE_KINDS))
        raise InvalidPlanError(f"these plan bytes were refused: no part of a task is: {shown}")


_Result = tuple[StoredPartition, pa.Schema | None]


def _run_partitions(  # noqa: PLR0917  # all of them, once
    plan: datafusion.ExecutionPlan,
    context: datafusion.SessionContext,
    directory: Path,
    request: TaskRequest,
    exchange: Exchange,
    is_cancelled: Callable[[], bool],
) -> list[_Result]:
    stop = threading.Event()

    # All partitions of the one plan object at once: they share its RepartitionExec, and
    # one that nobody reads would make it buffer the rows of the others.
    with ThreadPoolExecutor(plan.partition_count, thread_name_prefix="task") as pool:
        try:
            futures = [
                pool.submit(_run_partition, plan, index, context, directory, stop)
                for index in range(plan.partition_count)
            ]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, _CANCEL_POLL, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                exchange.check_running(request.output.query)
                if is_cancelled():
                    raise QueryReleasedError("the coordinator has gone away")
        finally:
            stop.set()
    return [future.result() for future in futures]


def _run_partition(
    plan: datafusion.ExecutionPlan,
    index: int,
    context: datafusion.SessionContext,
    directory: Path,
    stop: threading.Event,
) -> _Result:
    schema: pa.Schema | None = None
    writer: PartitionWriter | None = None
    try:
        for item in context.execute(plan, index):
            if stop.is_set():
                raise QueryReleasedError("another partition of the task failed")
            batch = item.to_pyarrow()
            if schema is None:
                schema = batch.schema
                writer = PartitionWriter(directory, index, plain_schema(schema))
            if batch.num_rows:
                assert writer is not None
                writer.write(batch)
        if writer is None:
            return StoredPartition((), PartitionReport(0, 0, 0)), None
        return writer.finish(), schema
    finally:
        if writer is not None:
            writer.close()
