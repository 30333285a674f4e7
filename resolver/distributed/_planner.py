"""The rule that cuts a physical plan into stages, or says why it must not.

This step of the project cuts once: scan, filter, projection, partial aggregate and
partition-wise sort run on the workers, up to and including the hash repartition of a
shuffle; everything above runs in the coordinator. A plan is cut only if every one of
its nodes is known to mean the same when cut, and comes back from the wire as it was.
Anything else stays on a single node: a slow right answer, with the reason in the tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import datafusion

from ._plan_proto import PlanDecodeError, PlanNode
from ._settings import EXECUTION
from ._stage import Boundary, DistributedPlan, SingleNodePlan, Source, Stage, Task, plan_lines
from ._task import InvalidPlanError, decode_plan

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DistributedPhysicalOptimizerRule", "first_line", "single_node"]

_LOCAL_FILES: Final = "file:///"

# One row, or one partition, at a time: true of a part of the partitions as of all.
_PARTITION_WISE: Final = frozenset(
    {"filter", "projection", "coalesce_batches", "local_limit", "cooperative"}
)
# One input, and nothing about it matters but its rows, partition by partition.
_HEAD: Final = _PARTITION_WISE | {
    "aggregate",
    "sort",
    "coalesce_partitions",
    "sort_preserving_merge",
    "global_limit",
    "repartition",
}
_JOIN: Final = "joins run on a single node for now"
_UNION: Final = "unions run on a single node for now"
_SINK: Final = "it writes files, which this process does"
_REASONS: Final = {
    "hash_join": _JOIN,
    "cross_join": _JOIN,
    "nested_loop_join": _JOIN,
    "symmetric_hash_join": _JOIN,
    "sort_merge_join": _JOIN,
    "union": _UNION,
    "interleave": _UNION,
    "window": "window functions run on a single node for now",
    "memory_scan": "it reads an in-process table, whose rows are in this process only",
    "empty": "it reads no files",
    "placeholder_row": "it reads no files",
    "generate_series": "it reads no files",
    "explain": "it explains a plan and reads no files",
    "analyze": "EXPLAIN ANALYZE measures a plan in this process",
    "scalar_subquery": "scalar subqueries run on a single node for now",
    "json_sink": _SINK,
    "csv_sink": _SINK,
    "parquet_sink": _SINK,
}
# Terminator, compression and array format are lost on the wire, and not displayed either.
_LOSSY_SCANS: Final = {
    "csv_scan": "it reads CSV, whose options do not all survive the way to a worker",
    "json_scan": "it reads JSON, whose options do not all survive the way to a worker",
}
_NOT_UNDERSTOOD: Final = "this kind of node is not distributed"


class _NotDistributableError(Exception):
    """Carries the reason."""


class DistributedPhysicalOptimizerRule:
    """Turns a physical plan into stages that run on workers.

    ``partitions_per_worker`` is how many partitions of a scan each worker gets, and so
    how many of its cores a query can use. Stateless, therefore safe to share.
    """

    def __init__(self, *, partitions_per_worker: int = 1) -> None:
        if partitions_per_worker < 1:
            raise ValueError(f"partitions_per_worker is {partitions_per_worker}, at least 1 counts")
        self.partitions_per_worker: Final = partitions_per_worker

    def target_partitions(self, workers: int) -> int:
        """For how many partitions a query over ``workers`` workers is planned.

        At least two: with one, DataFusion plans no boundary to cut at.
        """
        return max(2, workers * self.partitions_per_worker)

    def distribute(
        self,
        plan: datafusion.ExecutionPlan,
        context: datafusion.SessionContext,
        urls: Sequence[str],
    ) -> DistributedPlan | SingleNodePlan:
        """Cut ``plan``, which ``context`` planned under ``_settings.PLANNING``.

        Never raises for a plan: what cannot be cut comes back with the reason.
        """
        try:
            return _cut(plan, context, tuple(urls))
        except _NotDistributableError as reason:
            return single_node(str(reason), plan)

    def __repr__(self) -> str:
        return (
            f"DistributedPhysicalOptimizerRule(partitions_per_worker={self.partitions_per_worker})"
        )


def single_node(reason: str, plan: datafusion.ExecutionPlan) -> SingleNodePlan:
    """``plan`` left to DataFusion, for ``reason``."""
    return SingleNodePlan(reason, plan_lines(plan.display_indent()), plan.partition_count)


def _cut(
    plan: datafusion.ExecutionPlan, context: datafusion.SessionContext, urls: tuple[str, ...]
) -> DistributedPlan:
    if not urls:
        raise _NotDistributableError("the worker resolver names no workers")
    root = _encoded(plan, context)
    nodes, names = _chain(root, plan)
    bottom = _leaf_stage_top(nodes, names)
    leaf = [node for node in nodes[bottom:] if not node.is_round_robin]
    stage = _stage(leaf, urls)
    return DistributedPlan(
        head=tuple(nodes[:bottom]),
        head_lines=tuple(names[:bottom]),
        partitions=plan.partition_count if bottom else len(stage.inputs),
        stage=stage,
        urls=urls,
    )


def _encoded(plan: datafusion.ExecutionPlan, context: datafusion.SessionContext) -> PlanNode:
    """The plan's bytes, proven to mean the same in a session that knows nothing else."""
    displayed = plan.display_indent()
    if "DynamicFilter" in displayed:
        raise _NotDistributableError("a dynamic filter connects parts of the plan while it runs")
    try:
        data = plan.to_bytes(context.with_python_udf_inlining(enabled=False))
        inlined = plan.to_bytes(context.with_python_udf_inlining(enabled=True))
    except Exception as error:
        raise _NotDistributableError(
            f"the plan has no wire encoding ({first_line(error)})"
        ) from error
    try:
        root = PlanNode.parse(data)
    except PlanDecodeError as error:
        raise _NotDistributableError(str(error)) from error
    _chain(root, plan)  # the plainest reason first
    if inlined != data:
        raise _NotDistributableError("it calls a Python function, which workers do not accept")
    try:
        decoded = decode_plan(data, _bare_session())
    except InvalidPlanError as error:
        raise _NotDistributableError(
            f"a worker could not decode the plan ({first_line(error)})"
        ) from error
    if decoded.display_indent() != displayed:
        raise _NotDistributableError("the plan changes on the wire")
    return root


def _chain(root: PlanNode, plan: datafusion.ExecutionPlan) -> tuple[list[PlanNode], list[str]]:
    """The nodes from the root to the scan, and how DataFusion displays each."""
    nodes, names = [root], [plan.display().strip()]
    while not nodes[-1].is_scan:
        node, name = nodes[-1], names[-1].partition(":")[0]
        if node.kind not in _HEAD:
            raise _NotDistributableError(f"{name}: {_REASONS.get(node.kind, _NOT_UNDERSTOOD)}")
        if node.preserves_order:
            raise _NotDistributableError(
                f"{name}: it merges sorted partitions while it repartitions"
            )
        inputs, below = node.children, plan.children()
        if len(inputs) != 1 or len(below) != 1:
            raise _NotDistributableError(f"{name}: {_NOT_UNDERSTOOD}")
        plan = below[0]
        nodes.append(inputs[0])
        names.append(plan.display().strip())
    return nodes, names


def _leaf_stage_top(nodes: Sequence[PlanNode], names: Sequence[str]) -> int:
    """Index of the node at which the leaf stage begins: itself and all below it."""
    scan = nodes[-1]
    if scan.object_store_url != _LOCAL_FILES:
        raise _NotDistributableError(
            f"it reads from {scan.object_store_url}, which workers are not known to reach"
        )
    if scan.kind in _LOSSY_SCANS:
        raise _NotDistributableError(_LOSSY_SCANS[scan.kind])
    if scan.declares_partitioning:
        raise _NotDistributableError("the scan promises a partitioning that a cut would break")
    if scan.file_groups == 1:
        raise _NotDistributableError(
            "the scan is a single partition, so there is nothing to spread"
        )
    top = len(nodes) - 1
    while top > 0 and _is_partition_wise(nodes[top - 1]):
        top -= 1
        if nodes[top].kind == "aggregate" and names[top].count("ORDER BY") > 1:
            # Their partial states bear the names of what they are ordered by; two may share
            # one, and stage output is read by name.
            raise _NotDistributableError(
                "AggregateExec: more than one aggregate with an ORDER BY of its own"
            )
    if top == 0 or nodes[top - 1].kind in ("coalesce_partitions", "sort_preserving_merge"):
        return top
    if nodes[top - 1].is_hash_repartition:
        return top - 1
    name = names[top - 1].partition(":")[0]
    raise _NotDistributableError(f"{name}: it is no boundary at which a plan can be cut")


def _is_partition_wise(node: PlanNode) -> bool:
    return (
        node.kind in _PARTITION_WISE
        or node.is_partial_aggregate
        or node.is_partition_wise_sort
        # Only spreads rows evenly within one process, which a task has no use for.
        or node.is_round_robin
    )


def _stage(leaf: Sequence[PlanNode], urls: tuple[str, ...]) -> Stage:
    scan = leaf[-1]
    groups = range(scan.file_groups)
    used = urls[: len(groups)]
    tasks = tuple(
        Task(index, url, own, _over(leaf, scan.with_file_groups(own)))
        for index, url in enumerate(used)
        for own in [tuple(groups[index :: len(used)])]
    )
    plan = _over(leaf, scan)
    inputs: list[tuple[Source, ...]]
    if leaf[0].is_hash_repartition:
        boundary = Boundary.SHUFFLE
        inputs = [
            tuple(Source(task.index, k) for task in tasks) for k in range(leaf[0].hash_partitions)
        ]
    else:
        boundary = Boundary.COALESCE
        # In the scan's own order, so that the answer does not depend on the workers.
        place = {
            group: Source(task.index, local)
            for task in tasks
            for local, group in enumerate(task.groups)
        }
        inputs = [(place[group],) for group in groups]
    displayed = decode_plan(plan.to_bytes(), _bare_session()).display_indent()
    return Stage(1, boundary, plan, tasks, tuple(inputs), plan_lines(displayed))


def _over(nodes: Sequence[PlanNode], leaf: PlanNode) -> PlanNode:
    """``nodes`` but for the last, over ``leaf``."""
    for node in reversed(nodes[:-1]):
        leaf = node.with_input(leaf)
    return leaf


def _bare_session() -> datafusion.SessionContext:
    """What a worker has when it was given nothing."""
    config = datafusion.SessionConfig()
    for name, value in EXECUTION.items():
        config = config.set(name, value)
    return datafusion.SessionContext(config)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a reason."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
