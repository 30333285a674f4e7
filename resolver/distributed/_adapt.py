"""What measured sizes change about a plan while it runs.

A stage's output is known before its consumer is planned. So a small build side is sent
to every task, and the probe side is then not shuffled at all; a join without build rows
is not run; a stage that reads little gets few tasks. Pure decisions over trees; nothing
is run here, and every decision is a sentence that ``explain(analyze=True)`` can show.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ._cutter import input_of
from ._plan_proto import AggregateMode, JoinType, PlanNode, column_expression
from ._sizes import Measured, is_tiny, small_files
from ._tree import Boundary, Stage, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from ._options import DistributedOptions

__all__ = [
    "Adapted",
    "adapt",
    "read_by_every_task",
    "waits_for_build_side",
]

# Without rows on the build side these have none either.
_EMPTY_WITHOUT_BUILD: Final = frozenset(
    {
        JoinType.INNER,
        JoinType.LEFT,
        JoinType.LEFT_SEMI,
        JoinType.LEFT_ANTI,
        JoinType.LEFT_MARK,
        JoinType.RIGHT_SEMI,
    }
)
# Of the right side, only rows with a partner on the left mean anything to these.
_NEEDS_PARTNERS_ONLY: Final = frozenset(
    {
        JoinType.INNER,
        JoinType.LEFT,
        JoinType.LEFT_SEMI,
        JoinType.LEFT_ANTI,
        JoinType.LEFT_MARK,
        JoinType.RIGHT_SEMI,
    }
)
# And of those no more than that there is one.
_NEEDS_ONE_PARTNER: Final = frozenset({JoinType.LEFT_SEMI, JoinType.LEFT_ANTI, JoinType.LEFT_MARK})
_SELECTIVE: Final = 0.5
"""A build side with less than this of the rows that it was made of drops probe rows too."""

# Through these, what is above does not depend on which partition a row is in.
_ANY_PARTITION: Final = frozenset(
    {
        "buffer",
        "coalesce_batches",
        "coalesce_partitions",
        "cooperative",
        "filter",
        "local_limit",
        "projection",
        "repartition",
        "sort",
        "sort_preserving_merge",
        "union",
        "unnest",
    }
)


_GROUPS_WITHIN_PARTITIONS: Final = frozenset(
    {AggregateMode.FINAL_PARTITIONED, AggregateMode.SINGLE_PARTITIONED}
)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A stage's tree as it will run, and why it differs from the plan.

    ``created`` are stages that it reads and that the plan did not have.
    """

    tree: Tree
    decisions: tuple[str, ...]
    created: tuple[Stage, ...] = ()


def waits_for_build_side(tree: Tree, measured: Collection[int] = ()) -> frozenset[int]:
    """Numbers of the stages under ``tree`` that may turn out not to be needed as they are.

    The probe side of a join whose build side is not among those ``measured`` yet.
    """
    return frozenset(
        right.source.number
        for join in tree.walk()
        if _is_undecided(join, measured)
        for right in [join.children[1]]
        if right.source is not None and right.source.boundary is Boundary.SHUFFLE
    )


def read_by_every_task(tree: Tree, options: DistributedOptions) -> frozenset[int]:
    """Numbers of the stages under ``tree`` that need not run if their join is broadcast.

    Build sides of so little that every task may as well read their files itself.
    """
    return frozenset(
        left.source.number
        for join in tree.walk()
        if join.node.is_partitioned_join and not join.emits_build_side
        for left in [join.children[0]]
        if left.source is not None and is_tiny(left.source, options)
    )


def _is_undecided(join: Tree, measured: Collection[int]) -> bool:
    if not join.node.is_partitioned_join:
        return False
    left = join.children[0].source
    if left is None or left.boundary is not Boundary.SHUFFLE or left.number in measured:
        return False
    return not join.emits_build_side or join.node.join_type in _EMPTY_WITHOUT_BUILD


def adapt(
    tree: Tree,
    measured: Mapping[int, Measured],
    probe_sides: Mapping[int, Tree],
    options: DistributedOptions,
    *,
    empty: Callable[[Tree], Tree],
    new_number: Callable[[], int],
) -> Adapted:
    """Decide every join of ``tree`` whose build side is among ``measured``.

    ``probe_sides`` are the trees of the stages that waited, as they would run by
    themselves; ``empty`` gives a tree without rows in place of another, and
    ``new_number`` the number of a stage that is created.
    """
    adapter = _Adapter(measured, probe_sides, options, empty, new_number)
    adapted = adapter.adapt(tree, free=True)
    return Adapted(adapted, tuple(adapter.decisions), tuple(adapter.created))


class _Adapter:
    def __init__(
        self,
        measured: Mapping[int, Measured],
        probe_sides: Mapping[int, Tree],
        options: DistributedOptions,
        empty: Callable[[Tree], Tree],
        new_number: Callable[[], int],
    ) -> None:
        self._arguments = (measured, probe_sides, options, empty, new_number)
        self._freed_of: dict[Tree, tuple[Tree, _Adapter | None]] = {}
        self._measured = measured
        self._probe_sides = probe_sides
        self._options = options
        self._empty = empty
        self._new_number = new_number
        self.decisions: list[str] = []
        self.created: list[Stage] = []
        self.moved_rows = False  # to other partitions than the plan has them in

    def adapt(self, tree: Tree, *, free: bool) -> Tree:
        """``free``: nothing above depends on which partition a row of ``tree`` is in."""
        if tree.source is not None or not tree.children:
            return tree
        empty = self._empty_build_side(tree)
        if empty is not None:
            why = f"stage {empty.number} gave it no build rows"
            self.decisions.append(f"{tree.name} is empty: {why}")
            return self._empty(tree)
        if tree.collects_left:
            left, right = tree.children
            return tree.over(left, self.adapt(right, free=free))
        if tree.node.is_partitioned_join:
            return self._join(tree, free=free)
        if tree.node.aggregate_mode in _GROUPS_WITHIN_PARTITIONS:
            return self._aggregate(tree, free=free)
        below = free and (
            tree.kind in _ANY_PARTITION or tree.node.aggregate_mode == AggregateMode.PARTIAL
        )
        return tree.over(*(self.adapt(child, free=below) for child in tree.children))

    def _empty_build_side(self, join: Tree) -> Stage | None:
        """The stage without rows, without which ``join`` has none.

        Not where what is above may insist on an order, which no scan of nothing declares.
        """
        if not (join.collects_left or join.node.is_partitioned_join) or join.may_be_sorted:
            return None
        build = join.children[0]
        while build.kind == "projection":
            (build,) = build.children
        stage = build.source
        if stage is None or stage.number not in self._measured or self._measured[stage.number].rows:
            return None
        may_be = join.kind == "cross_join" or join.node.join_type in _EMPTY_WITHOUT_BUILD
        return stage if may_be else None

    def _join(self, join: Tree, *, free: bool) -> Tree:
        left, right = join.children
        if self._may_read_build_side(join, free=free):
            return self._reading_build_side(join, free=free)
        if not self._may_broadcast(join) or (right.source is not None and not free):
            return self._filtered(join) or self._shuffled(join)
        assert left.source is not None
        build = left.source
        size = self._measured[build.number].bytes
        decided = f"{size:,} bytes of stage {build.number}, broadcast_threshold is "
        decided += f"{self._options.broadcast_threshold:,}"
        if size > self._options.broadcast_threshold:
            self.decisions.append(f"shuffled: {decided}")
            return self._shuffled(join)
        whole = replace(build, boundary=Boundary.BROADCAST)
        left = replace(left, source=whole, line=f"{whole.boundary.value}: stage {whole.number}")
        return self._collecting(join, left, f"broadcast: {decided}", free=free)

    def _collecting(self, join: Tree, left: Tree, decision: str, *, free: bool) -> Tree:
        """``join`` with ``left``, whole, in every task, and its probe side not shuffled."""
        right = join.children[1]
        if right.source is not None:
            decision += f"; stage {right.source.number} need not be shuffled"
            self.moved_rows = True
            right = self._probe_sides[right.source.number]
        else:
            right = self.adapt(right, free=free)
        self.decisions.append(decision)
        line = join.line.replace("mode=Partitioned", "mode=CollectLeft", 1)
        return Tree(join.node.collecting_left(), line, (left, right))

    def _may_read_build_side(self, join: Tree, *, free: bool) -> bool:
        build, probe = join.children[0].source, join.children[1].source
        if build is None or build.number in self._measured or join.emits_build_side:
            return False
        if probe is not None and not (free and probe.number in self._probe_sides):
            return False
        return is_tiny(build, self._options)

    def _reading_build_side(self, join: Tree, *, free: bool) -> Tree:
        build = join.children[0].source
        assert build is not None
        (left,) = build.tree.children
        size = sum(tree.node.file_bytes for tree in left.walk() if tree.node.is_scan)
        if left.partitions > 1:
            left = Tree(PlanNode.coalesce(), "CoalescePartitionsExec", (left,))
        decided = f"broadcast: every task reads the {size:,} bytes of files of stage "
        decided += f"{build.number}, {small_files(self._options):,} are few enough"
        return self._collecting(join, left, decided, free=free)

    def _filtered(self, join: Tree) -> Tree | None:
        """``join`` with its probe side reduced, before it is shuffled, to rows with a partner.

        Every row stays in the partition that it was planned for.
        """
        left, right = join.children
        build, probe = left.source, right.source
        if build is None or probe is None or build.boundary is not Boundary.SHUFFLE:
            return None
        if build.number not in self._measured or probe.number not in self._probe_sides:
            return None
        measured = self._measured[build.number]
        if (
            measured.bytes > self._options.broadcast_threshold
            or measured.rows > _SELECTIVE * measured.most_rows
            or join.node.is_null_aware
            or join.node.join_type not in _NEEDS_PARTNERS_ONLY
        ):
            return None
        whole = replace(build, boundary=Boundary.BROADCAST)
        keys = replace(left, source=whole, line=f"{whole.boundary.value}: stage {whole.number}")
        found = (keys, self._probe_sides[probe.number])
        only = f"rows with a partner in stage {build.number}"
        columns = join.node.left_key_columns
        if join.node.join_type in _NEEDS_ONE_PARTNER and join.node.compares_keys_only and columns:
            only = f"the keys of {only}, each once per task"
            join, top = _keys_with_partner(join, probe, found, columns)
            stage = Stage(self._new_number(), Boundary.SHUFFLE, top, top)
        else:
            top = probe.tree.over(_partners(join, JoinType.RIGHT_SEMI, found))
            stage = Stage(self._new_number(), Boundary.SHUFFLE, top, probe.whole)
        self.created.append(stage)
        self.decisions.append(
            f"stage {stage.number} shuffles what stage {probe.number} would have, but only "
            f"{only}: {measured.rows:,} rows of {measured.most_rows:,}, {measured.bytes:,} bytes"
        )
        return join.over(left, input_of(stage))

    def _may_broadcast(self, join: Tree) -> bool:
        build = join.children[0].source
        if build is None or build.boundary is not Boundary.SHUFFLE:
            return False
        if build.number not in self._measured or join.emits_build_side:
            return False
        right = join.children[1].source
        return right is None or right.number in self._probe_sides

    def _shuffled(self, join: Tree) -> Tree:
        """A join that stays partitioned; each side may still gain from being shuffled anew."""
        partitions = join.partitions
        freed = [self._freed(side) for side in join.children]
        hashed = [
            _is_hashed_by(side, keys, partitions)
            for side, keys in zip(join.children, join.node.join_keys, strict=True)
        ]
        gains = any(adapter is not None for _, adapter in freed)
        # What is above may count on the order of the other side.
        if not gains or any(
            adapter is None and not as_planned and side.may_be_sorted
            for (side, adapter), as_planned in zip(freed, hashed, strict=True)
        ):
            return join.over(*(self.adapt(side, free=False) for side in join.children))
        sides = []
        for (side, adapter), keys, as_planned in zip(
            freed, join.node.join_keys, hashed, strict=True
        ):
            if adapter is not None:
                sides.append(self._reshuffled(side, keys, partitions, adapter))
            elif as_planned:
                sides.append(side)
            else:
                other = self.adapt(side, free=True)
                sides.append(self._reshuffled(other, keys, partitions, None))
        return join.over(*sides)

    def _aggregate(self, aggregate: Tree, *, free: bool) -> Tree:
        """Groups by (a, b) may have been planned over a hash of (a), for a node above too."""
        (child,) = aggregate.children
        partitions, keys = child.partitions, aggregate.node.group_keys
        if free and keys and "ordering_mode" not in aggregate.line:
            freed, adapter = self._freed(child)
            if adapter is not None:
                self.moved_rows = True
                return aggregate.over(self._reshuffled(freed, keys, partitions, adapter))
        return aggregate.over(self.adapt(child, free=False))

    def _freed(self, side: Tree) -> tuple[Tree, _Adapter | None]:
        """``side`` as it would run if it were shuffled once more, if that saves a shuffle."""
        if side not in self._freed_of:  # asked at every join above: not each time anew
            self._freed_of[side] = self._newly_freed(side)
        return self._freed_of[side]

    def _newly_freed(self, side: Tree) -> tuple[Tree, _Adapter | None]:
        if side.source is not None or side.may_be_sorted:
            return side, None
        adapter = _Adapter(*self._arguments)
        adapter._freed_of = self._freed_of
        freed = adapter.adapt(side, free=True)
        return (freed, adapter) if adapter.moved_rows else (side, None)

    def _reshuffled(
        self, side: Tree, keys: Sequence[bytes], partitions: int, adapter: _Adapter | None
    ) -> Tree:
        if adapter is not None:
            self.decisions += adapter.decisions
            self.created += adapter.created
        line = f"RepartitionExec: partitioning=Hash(keys of the node above, {partitions})"
        top = Tree(PlanNode.hash_repartition(keys, partitions), line, (side,))
        stage = Stage(self._new_number(), Boundary.SHUFFLE, top, top)
        self.created.append(stage)
        self.decisions.append(f"shuffled after its joins, not before: stage {stage.number}")
        return input_of(stage)


def _partners(join: Tree, type_: JoinType, sides: tuple[Tree, Tree]) -> Tree:
    """The rows of one of ``sides`` with a partner on the other, by the keys of ``join``."""
    name = {JoinType.LEFT_SEMI: "LeftSemi", JoinType.RIGHT_SEMI: "RightSemi"}[type_]
    line = f"HashJoinExec: mode=CollectLeft, join_type={name}, on=keys of the join above"
    return Tree(join.node.finding_partners(type_), line, sides)


def _keys_with_partner(
    join: Tree, probe: Stage, sides: tuple[Tree, Tree], columns: Sequence[tuple[str, int]]
) -> tuple[Tree, Tree]:
    """``join`` over the keys of its build side that have a partner; and those, hashed as planned.

    Every task finds its own among the same keys. That some are found twice, by two tasks,
    means nothing to ``join``.
    """
    rows = replace(_partners(join, JoinType.LEFT_SEMI, sides), may_repeat=True)
    names = [f"key {index}" for index in range(len(columns))]
    pairs = zip(columns, names, strict=True)
    shown = ", ".join(f"{column}@{index} as {name}" for (column, index), name in pairs)
    line = f"ProjectionExec: expr=[{shown}]"
    keys = Tree(PlanNode.projection(columns, names), line, (rows,))
    hashed = [column_expression(name, index) for index, name in enumerate(names)]
    partitions = probe.tree.node.hash_partitions
    line = f"RepartitionExec: partitioning=Hash(keys of the join above, {partitions})"
    top = Tree(PlanNode.hash_repartition(hashed, partitions), line, (keys,))
    return replace(join, node=join.node.with_right_keys(hashed)), top


def _is_hashed_by(side: Tree, keys: Sequence[bytes], partitions: int) -> bool:
    """The output of a stage that is divided exactly so, sorted or not."""
    while side.kind == "sort":
        (side,) = side.children
    if side.source is None or side.source.boundary is not Boundary.SHUFFLE:
        return False
    top = side.source.tree.node
    return top.hash_expressions == tuple(keys) and top.hash_partitions == partitions
