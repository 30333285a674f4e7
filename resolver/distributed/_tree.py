"""The tree that is cut: plan nodes with their display lines, and the stages below them.

A ``Tree`` is a physical plan, or a part of one whose lower ends are the outputs of other
stages. It knows how many partitions it has and what a task's share of it is. Values only;
where to cut is ``_cutter``'s business, what runs when ``_scheduler``'s.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ._plan_proto import JoinType, PlanNode

if TYPE_CHECKING:
    from collections.abc import Iterator

    import datafusion

__all__ = ["Boundary", "Share", "Stage", "Tree", "TreeError", "tree_of"]

_SORTED: Final = frozenset({"sort", "sort_preserving_merge", "sort_merge_join", "window"})
_ONE_PARTITION: Final = frozenset({"coalesce_partitions", "sort_preserving_merge"})

_CAST: Final = re.compile(r"\b(?:TRY_)?CAST\(|\bAS (?:Decimal\d+|Timestamp|Time\d+|Duration)\(")
_CALL: Final = re.compile(r"[^\s(\[,]\(")

# These emit rows of the build side by themselves. With that side in every task, every
# task would emit them.
_EMITS_BUILD_SIDE: Final = frozenset(
    {JoinType.LEFT, JoinType.FULL, JoinType.LEFT_SEMI, JoinType.LEFT_ANTI, JoinType.LEFT_MARK}
)


class TreeError(ValueError):
    """The plan is not of a shape that is understood; the message is a reason."""


class Boundary(enum.Enum):
    """How the output of a stage reaches its consumer; the value is its name in a tree."""

    SHUFFLE = "NetworkShuffle"
    """Partition k of the consumer is partition k of every task."""
    COALESCE = "NetworkCoalesce"
    """Every partition of every task is a partition of the consumer."""
    BROADCAST = "NetworkBroadcast"
    """Every task of the consumer reads everything, as one partition."""
    HEAD = "Head"
    """None: the caller reads it."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A part of a plan that runs without talking to anyone but for its inputs.

    ``whole`` is the part of the plan that it stands for, uncut.
    """

    number: int
    boundary: Boundary
    tree: Tree
    whole: Tree

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The stages that this one reads, from left to right."""
        return tuple(tree.source for tree in self.tree.walk() if tree.source is not None)

    @property
    def divisible(self) -> int:
        """Among how many tasks it can be divided at most."""
        if self.tree.needs_one_task:
            return 1
        top = self.tree
        return (top.children[0] if top.node.is_hash_repartition else top).partitions

    @property
    def depth(self) -> int:
        """How many stages run one after another until it has, itself included."""
        return 1 + max((stage.depth for stage in self.inputs), default=0)

    def walk(self) -> Iterator[Stage]:
        """Yield the stage and all below it, consumers first."""
        yield self
        for stage in self.inputs:
            yield from stage.walk()


@dataclass(frozen=True, slots=True)
class Share:
    """Which partitions are a task's own: those from ``low`` to ``high`` of ``total`` parts.

    Contiguous, so that outputs read in the order of tasks are in the order of the plan.
    """

    low: int
    high: int
    total: int

    def of(self, partitions: int) -> range:
        """The task's own of ``partitions`` partitions."""
        return range(
            partitions * self.low // self.total,
            partitions * self.high // self.total,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A plan node over other trees. Immutable.

    ``line`` is how DataFusion displays the node. A leaf with a ``source`` is the output
    of that stage, each ``merges`` adjacent partitions as one, or the partitions ``own`` of
    those. A join that ``may_repeat`` is read for which rows of its build side there are, so
    several tasks may emit the same one.
    """

    node: PlanNode
    line: str
    children: tuple[Tree, ...] = ()
    source: Stage | None = None
    merges: int = 1
    own: range | None = None
    may_repeat: bool = False

    @property
    def kind(self) -> str:
        return self.node.kind

    @property
    def name(self) -> str:
        """The operator's name."""
        return self.line.partition(":")[0]

    def over(self, *children: Tree) -> Tree:
        """The same node over other children."""
        return replace(self, children=children)

    def walk(self) -> Iterator[Tree]:
        """Yield the tree and all below it, up to the outputs of other stages."""
        waiting = [self]
        while waiting:
            tree = waiting.pop()
            yield tree
            waiting.extend(reversed(tree.children))

    def plan(self) -> PlanNode:
        """The whole as one plan, with ``stage_input`` nodes for the other stages' outputs."""
        return self.node.over_encoded([child.plan().to_bytes() for child in self.children])

    def lines(self) -> list[tuple[int, Tree]]:
        """Every node with its depth, in the order of a display."""
        return [(0, self)] + [
            (depth + 1, tree) for child in self.children for depth, tree in child.lines()
        ]

    @property
    def partitions(self) -> int:
        """Output partitions. Raises ``TreeError`` for inputs that do not fit together."""
        node = self.node
        if self.own is not None:
            return len(self.own)
        if self.source is not None:
            return math.ceil(_input_partitions(self.source) / self.merges)
        if node.is_hash_repartition:
            return node.hash_partitions
        if node.kind in _ONE_PARTITION:
            return 1
        return self._partitions_of_inputs() if self.children else self._partitions_of_leaf()

    def _partitions_of_leaf(self) -> int:
        if self.node.is_scan:
            return self.node.file_groups
        return len(self.node.memory_partitions) if self.kind == "memory_scan" else 1

    def _partitions_of_inputs(self) -> int:
        counts = [child.partitions for child in self.children]
        if self.kind == "union":
            return sum(counts)
        if self.is_aligned and len(set(counts)) != 1:
            raise TreeError(f"{self.name}: its inputs have {counts} partitions")
        return counts[-1]

    @property
    def is_aligned(self) -> bool:
        """Partition k of the node is made of partition k of every input."""
        return self.node.is_partitioned_join or self.kind == "sort_merge_join"

    @property
    def collects_left(self) -> bool:
        """A join whose left side is one partition that meets all of the right side."""
        if self.kind == "hash_join":
            return not self.node.is_partitioned_join
        return self.kind in {"cross_join", "nested_loop_join"}

    @property
    def emits_build_side(self) -> bool:
        """A join that emits rows of its left side by themselves, or depends on all of the right."""
        if self.kind not in {"hash_join", "nested_loop_join"}:
            return False
        return self.node.is_null_aware or self.node.join_type in _EMITS_BUILD_SIDE

    @property
    def keeps_order(self) -> bool:
        """A hash repartition of one sorted partition, whose outputs are sorted too."""
        return self.node.is_hash_repartition and "maintains_sort_order=true" in self.line

    @property
    def may_be_sorted(self) -> bool:
        """Whether what is above could count on an order that a boundary would not keep."""
        return any(
            tree.kind in _SORTED
            or "output_ordering" in tree.line
            or (tree.source is not None and tree.source.whole.may_be_sorted)
            for tree in self.walk()
        )

    @property
    def may_be_volatile(self) -> bool:
        """Whether it calls a function: any may be one such as ``random()``. Casts are none."""
        # Of a scan's line the paths come first.
        line = self.line.partition(", projection=")[2] if self.node.is_scan else self.line
        return _CALL.search(_CAST.sub(" ", line)) is not None

    @property
    def needs_one_task(self) -> bool:
        """Whether, divided among tasks, it would give other rows."""
        return self.one_task_reason is not None

    @property
    def one_task_reason(self) -> str | None:
        """Why, divided among tasks, it would give other rows; ``None``: it would not."""
        for tree in self.walk():
            if tree.collects_left and tree.emits_build_side and not tree.may_repeat:
                return f"{tree.name} emits rows of its build side, each of which must come once"
            if tree.node.is_hash_repartition and tree is not self:
                return f"{tree.name} divides all rows of the stage by a hash"
        return None

    def shared(self, share: Share) -> Tree | None:
        """What a task with this share runs; ``None``: nothing.

        Partitions that belong together stay together: equal counts are divided equally.
        What has one partition is run by one task, and a broadcast is read by all.
        """
        node = self.node
        if self.source is not None and self.source.boundary is Boundary.BROADCAST:
            return self
        if self.source is not None or node.is_scan or node.kind == "memory_scan":
            return self._sliced(share)
        if not self.children or node.kind in _ONE_PARTITION:
            return self if share.of(1) else None
        return self._shared_inputs(share)

    def _shared_inputs(self, share: Share) -> Tree | None:
        if self.collects_left:
            left, right = self.children
            own = right.shared(share)
            return None if own is None else self.over(left, own)
        kept = [own for child in self.children if (own := child.shared(share)) is not None]
        if not kept:
            return None
        if self.kind == "union":
            # A union of one is that one; DataFusion makes no such node.
            return kept[0] if len(kept) == 1 else self.over(*kept)
        if len(kept) != len(self.children):
            raise TreeError(f"{self.name}: its inputs cannot be divided alike")
        return self.over(*kept)

    def merged(self, most: int) -> Tree:
        """The same with at most that many partitions at every leaf, adjacent ones as one.

        Rows that belong together stay together. What is sorted, or one partition for its
        consumer, stays as it is.
        """
        if self.children:
            return self.over(*(child.merged(most) for child in self.children))
        count = math.ceil(self.partitions / most)
        if count <= 1:
            return self
        if self.source is not None and self.source.boundary is Boundary.SHUFFLE:
            return replace(self, merges=count)
        if self.node.is_scan and "output_ordering" not in self.line:
            return replace(self, node=self.node.with_file_groups_merged(count))
        return self

    def _sliced(self, share: Share) -> Tree | None:
        own = share.of(self.partitions)
        if len(own) == self.partitions:
            return self
        if not own:
            return None
        if self.source is not None:
            return replace(self, own=own)
        if self.node.is_scan:
            return replace(self, node=self.node.with_file_groups(own))
        return replace(self, node=self.node.with_memory_partitions(own))


def _input_partitions(stage: Stage) -> int:
    return 1 if stage.boundary is Boundary.BROADCAST else stage.tree.partitions


def tree_of(plan: datafusion.ExecutionPlan, root: PlanNode) -> Tree:
    """A decoded plan and its encoding as one tree. Raises ``TreeError`` where they differ."""
    nodes, plans = root.children, plan.children()
    line = plan.display().strip()
    if len(nodes) != len(plans):
        raise TreeError(f"{line.partition(':')[0]}: this kind of node is not distributed")
    children = tuple(tree_of(below, node) for below, node in zip(plans, nodes, strict=True))
    return Tree(root.bare(), line, children)
