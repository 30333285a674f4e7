"""The rule that turns a physical plan into stages, or says why it must not.

A plan is cut only if every one of its nodes is known to mean the same when cut, and it
comes back from the wire as it was. Anything else stays on a single node: a slow right
answer, with the reason in the tree. Where to cut is ``_cutter``'s business.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import datafusion

from ._cutter import cut
from ._options import DistributedOptions
from ._plan_proto import PlanDecodeError, PlanNode, python_functions
from ._settings import EXECUTION
from ._stage import DistributedPlan, SingleNodePlan, plan_lines
from ._task import InvalidPlanError, decode_plan
from ._tree import TreeError, tree_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from ._tree import Stage
    from ._workers import WorkerSlots

__all__ = ["DistributedPhysicalOptimizerRule", "first_line", "single_node"]

_LOCAL_FILES: Final = "file:///"
_UNENCODED: Final = re.compile(r"\bPlan: (\w+)")  # and all that the node holds


class _NotDistributableError(Exception):
    """Carries the reason."""


class DistributedPhysicalOptimizerRule:
    """Turns a physical plan into stages that run on workers.

    ``partitions_per_slot`` is how many partitions are planned for each slot of each
    worker. Stateless, therefore safe to share.
    """

    def __init__(self, *, partitions_per_slot: int = 1) -> None:
        if partitions_per_slot < 1:
            raise ValueError(f"partitions_per_slot is {partitions_per_slot}, at least 1 counts")
        self.partitions_per_slot: Final = partitions_per_slot

    def target_partitions(self, workers: Sequence[WorkerSlots]) -> int:
        """For how many partitions a query over ``workers`` is planned.

        At least two: with one, DataFusion plans no boundary to cut at.
        """
        return max(2, sum(worker.slots for worker in workers) * self.partitions_per_slot)

    def distribute(
        self,
        plan: datafusion.ExecutionPlan,
        context: datafusion.SessionContext,
        workers: Sequence[WorkerSlots],
        *,
        options: DistributedOptions | None = None,
        worker_context: datafusion.SessionContext | None = None,
        stores: Collection[str] = (),
        functions: Collection[str] = (),
    ) -> DistributedPlan | SingleNodePlan:
        """Cut ``plan``, which ``context`` planned under ``_settings.PLANNING``.

        ``worker_context`` is a session with what workers have (default: nothing but
        DataFusion's own); ``stores`` and ``functions`` name the object stores and the
        Python functions among it. Never raises for a
        plan: what cannot be cut comes back with the reason.
        """
        options = options or DistributedOptions()
        try:
            worker_context = worker_context or bare_session()
            root, head = _encoded(plan, context, worker_context, options, functions)
            _check_sources(root, stores, options)
            _check_worthwhile(head, workers)
        except (_NotDistributableError, TreeError) as reason:
            return single_node(str(reason), plan)
        return DistributedPlan(head, tuple(workers), options, root)

    def __repr__(self) -> str:
        return f"DistributedPhysicalOptimizerRule(partitions_per_slot={self.partitions_per_slot})"


def single_node(reason: str, plan: datafusion.ExecutionPlan) -> SingleNodePlan:
    """``plan`` left to DataFusion, for ``reason``."""
    return SingleNodePlan(reason, plan_lines(plan.display_indent()), plan.partition_count)


def bare_session() -> datafusion.SessionContext:
    """What a worker has when it was given nothing."""
    config = datafusion.SessionConfig()
    for name, value in EXECUTION.items():
        config = config.set(name, value)
    return datafusion.SessionContext(config)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a reason."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _encoded(
    plan: datafusion.ExecutionPlan,
    context: datafusion.SessionContext,
    worker_context: datafusion.SessionContext,
    options: DistributedOptions,
    functions: Collection[str],
) -> tuple[PlanNode, Stage]:
    """The plan as its bytes say it, proven to mean the same in a worker's session; and cut."""
    displayed = plan.display_indent()
    if "DynamicFilter" in displayed:
        raise _NotDistributableError("a dynamic filter connects parts of the plan while it runs")
    try:
        inlined = plan.to_bytes(context.with_python_udf_inlining(enabled=True))
        data = plan.to_bytes(context.with_python_udf_inlining(enabled=False))
    except Exception as error:
        node = _UNENCODED.search(str(error))
        raise _NotDistributableError(
            f"the plan has no wire encoding ({node[1] if node else first_line(error)})"
        ) from error
    try:
        root = PlanNode.parse(data)
        head = cut(tree_of(plan, root))  # the plainest reason first
    except PlanDecodeError as error:
        raise _NotDistributableError(str(error)) from error
    pickled = inlined != data
    if pickled and _by_name(inlined, functions):
        pickled = False
    if pickled:
        if not options.python_udfs:
            raise _NotDistributableError(
                "it calls a Python function that workers are not known to have: give it to the "
                "session's builder and to the workers' with with_udf, or set the option python_udfs"
            )
        data = inlined
        root = PlanNode.parse(data)
        head = cut(tree_of(plan, root))
    try:
        decoded = decode_plan(data, worker_context, allow_python_udfs=pickled)
    except InvalidPlanError as error:
        raise _NotDistributableError(
            f"a worker could not decode the plan ({first_line(error)})"
        ) from error
    if decoded.display_indent() != displayed:
        raise _NotDistributableError("the plan changes on the wire")
    return root, head


def _by_name(inlined: bytes, functions: Collection[str]) -> bool:
    """Whether workers have all Python functions of a plan, under their names.

    One that merely bears the name of a function of theirs would give other rows.
    """
    try:
        names = python_functions(inlined)
    except PlanDecodeError:
        return False
    return bool(names) and names <= frozenset(functions)


def _check_sources(root: PlanNode, stores: Collection[str], options: DistributedOptions) -> None:
    inline = 0
    for node in root.walk():
        if node.is_scan and node.object_store_url not in {_LOCAL_FILES, *stores}:
            raise _NotDistributableError(
                f"it reads from {node.object_store_url}, which workers are not known to reach: "
                "register the store on both sides with SessionStateBuilder.with_object_store"
            )
        if node.kind == "memory_scan":
            inline += sum(node.memory_partitions)
    if inline > options.inline_limit:
        raise _NotDistributableError(
            f"its in-memory tables have {inline:,} bytes, and inline_limit is "
            f"{options.inline_limit:,}"
        )


def _check_worthwhile(head: Stage, workers: Sequence[WorkerSlots]) -> None:
    if not workers:
        raise _NotDistributableError("the worker resolver names no workers")
    stages = [stage for stage in head.walk() if stage is not head]
    if not stages:
        raise _NotDistributableError(
            "the plan is a single partition, so there is nothing to spread"
        )
    leaves = [tree for stage in head.walk() for tree in stage.tree.walk() if not tree.children]
    if not any(
        tree.kind == "memory_scan" or (tree.node.is_scan and tree.node.file_ranges)
        for tree in leaves
    ):
        raise _NotDistributableError("it reads no files")
