"""What measured sizes change about a plan while it runs.

A stage's output is known before its consumer is planned. So a small build side is sent
to every task, and the probe side is then not shuffled at all; a join without build rows
is not run; a stage that reads little gets few tasks. Pure decisions over trees; nothing
is run here, and every decision is a sentence that ``explain(analyze=True)`` can show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ._plan_proto import AggregateMode, JoinType
from ._tree import Boundary, Tree

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ._options import DistributedOptions
    from ._tree import Stage

__all__ = ["Adapted", "Measured", "adapt", "rows_and_bytes", "task_count", "waits_for_build_side"]

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


@dataclass(frozen=True, slots=True)
class Measured:
    """What the output of a stage came to."""

    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Adapted:
    """A stage's tree as it will run, and why it differs from the plan."""

    tree: Tree
    decisions: tuple[str, ...]


def waits_for_build_side(tree: Tree) -> frozenset[int]:
    """Numbers of the stages under ``tree`` that may turn out not to be needed as they are.

    The probe side of a join whose build side has not been measured yet.
    """
    return frozenset(
        right.source.number
        for join in tree.walk()
        if _is_undecided(join)
        for right in [join.children[1]]
        if right.source is not None and right.source.boundary is Boundary.SHUFFLE
    )


def _is_undecided(join: Tree) -> bool:
    if not join.node.is_partitioned_join:
        return False
    left = join.children[0].source
    if left is None or left.boundary is not Boundary.SHUFFLE:
        return False
    return not join.emits_build_side or join.node.join_type in _EMPTY_WITHOUT_BUILD


def adapt(
    tree: Tree,
    measured: Mapping[int, Measured],
    probe_sides: Mapping[int, Tree],
    options: DistributedOptions,
    empty: Callable[[Tree], Tree],
) -> Adapted:
    """Decide every join of ``tree`` whose build side is among ``measured``.

    ``probe_sides`` are the trees of the stages that waited, as they would run by
    themselves; ``empty`` gives a tree without rows in place of another.
    """
    adapter = _Adapter(measured, probe_sides, options, empty)
    adapted = adapter.adapt(tree, free=True)
    return Adapted(adapted, tuple(adapter.decisions))


class _Adapter:
    def __init__(
        self,
        measured: Mapping[int, Measured],
        probe_sides: Mapping[int, Tree],
        options: DistributedOptions,
        empty: Callable[[Tree], Tree],
    ) -> None:
        self._measured = measured
        self._probe_sides = probe_sides
        self._options = options
        self._empty = empty
        self.decisions: list[str] = []

    def adapt(self, tree: Tree, *, free: bool) -> Tree:
        """``free``: nothing above depends on which partition a row of ``tree`` is in."""
        if tree.source is not None or not tree.children:
            return tree
        if self._has_no_build_rows(tree):
            number = tree.children[0].source.number  # type: ignore[union-attr]
            self.decisions.append(f"{tree.name} is empty: stage {number} gave it no build rows")
            return self._empty(tree)
        if tree.collects_left:
            left, right = tree.children
            return tree.over(left, self.adapt(right, free=free))
        if tree.node.is_partitioned_join:
            return self._join(tree, free=free)
        below = free and (
            tree.kind in _ANY_PARTITION or tree.node.aggregate_mode == AggregateMode.PARTIAL
        )
        return tree.over(*(self.adapt(child, free=below) for child in tree.children))

    def _has_no_build_rows(self, join: Tree) -> bool:
        if not (join.collects_left or join.node.is_partitioned_join):
            return False
        build = join.children[0].source
        if build is None or build.number not in self._measured:
            return False
        if self._measured[build.number].rows:
            return False
        return join.kind == "cross_join" or join.node.join_type in _EMPTY_WITHOUT_BUILD

    def _join(self, join: Tree, *, free: bool) -> Tree:
        left, right = join.children
        if not self._may_broadcast(join) or (right.source is not None and not free):
            return join.over(*(self.adapt(side, free=False) for side in join.children))
        assert left.source is not None
        build = left.source
        size = self._measured[build.number].bytes
        decided = f"{size:,} bytes of stage {build.number}, broadcast_threshold is "
        decided += f"{self._options.broadcast_threshold:,}"
        if size > self._options.broadcast_threshold:
            self.decisions.append(f"shuffled: {decided}")
            return join.over(*(self.adapt(side, free=False) for side in join.children))
        if right.source is not None:
            self.decisions.append(
                f"broadcast: {decided}; stage {right.source.number} need not be shuffled"
            )
            right = self._probe_sides[right.source.number]
        else:
            self.decisions.append(f"broadcast: {decided}")
            right = self.adapt(right, free=free)
        line = join.line.replace("mode=Partitioned", "mode=CollectLeft", 1)
        whole = replace(build, boundary=Boundary.BROADCAST)
        left = replace(left, source=whole, line=f"{whole.boundary.value}: stage {whole.number}")
        return Tree(join.node.collecting_left(), line, (left, right))

    def _may_broadcast(self, join: Tree) -> bool:
        build = join.children[0].source
        if build is None or build.boundary is not Boundary.SHUFFLE:
            return False
        if build.number not in self._measured or join.emits_build_side:
            return False
        right = join.children[1].source
        return right is None or right.number in self._probe_sides


def rows_and_bytes(measured: Mapping[int, Measured], tree: Tree) -> Measured:
    """What all inputs of ``tree`` came to."""
    inputs = [measured[leaf.source.number] for leaf in tree.walk() if leaf.source is not None]
    return Measured(sum(m.rows for m in inputs), sum(m.bytes for m in inputs))


def task_count(
    stage: Stage, measured: Mapping[int, Measured], options: DistributedOptions, workers: int
) -> int:
    """How many tasks a stage is worth, at most one per worker."""
    nodes = [tree.node for tree in stage.tree.walk()]
    ranges = sum(node.file_ranges for node in nodes if node.is_scan)
    ranges += sum(len(node.memory_partitions) for node in nodes if node.kind == "memory_scan")
    if ranges:
        worth = math.ceil(ranges / options.files_per_task)
    elif options.bytes_per_task:
        size = rows_and_bytes(measured, stage.tree).bytes
        worth = math.ceil(size / options.bytes_per_task)
    else:
        worth = workers
    return max(1, min(worth, workers, stage.divisible))
