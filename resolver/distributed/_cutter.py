"""Cuts a plan into stages at its network boundaries.

What is below a hash repartition is a stage whose output is shuffled; what is below a
coalesce or a merge is one whose partitions are brought together; the build side of a
join that collects it is one that is broadcast. Every build side is closed this way, so
what a task of the join runs is the same for all of them, a LIMIT or a random() included.

A node is cut apart only if it is known to mean the same then. Everything else raises
``TreeError`` with the reason. Sizes are not looked at: ``_adapt`` does, while it runs.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Final

from ._plan_proto import AggregateMode, PlanNode
from ._tree import Boundary, Stage, Tree, TreeError

__all__ = ["UNDERSTOOD", "cut", "input_of"]

# One row, or one partition, at a time: true of a part of the partitions as of all.
_PARTITION_WISE: Final = frozenset(
    {
        "buffer",
        "coalesce_batches",
        "cooperative",
        "filter",
        "local_limit",
        "placeholder_row",
        "empty",
        "projection",
        "union",
        "unnest",
    }
)
UNDERSTOOD: Final = _PARTITION_WISE | {
    "aggregate",
    "coalesce_partitions",
    "cross_join",
    "global_limit",
    "hash_join",
    "memory_scan",
    "nested_loop_join",
    "repartition",
    "sort",
    "sort_merge_join",
    "sort_preserving_merge",
    "window",
}
"""Kinds of nodes that a task may consist of, besides file scans."""

_SINK: Final = "it writes files, which this process does"
_REASONS: Final = {
    "explain": "it explains a plan and reads no files",
    "analyze": "EXPLAIN ANALYZE measures a plan in this process",
    "scalar_subquery": "its value is computed inside the node that uses it",
    "generate_series": "its rows are made in one place",
    "interleave": "its inputs must say how they are divided, and files cannot",
    "symmetric_hash_join": "joins of endless streams run in this process",
    "json_sink": _SINK,
    "csv_sink": _SINK,
    "parquet_sink": _SINK,
}
_NOT_UNDERSTOOD: Final = "this kind of node is not distributed"

_KEEPS_ORDER: Final = frozenset(
    {
        "aggregate",
        "buffer",
        "coalesce_batches",
        "cooperative",
        "filter",
        "global_limit",
        "local_limit",
        "projection",
        "window",
    }
)
"""Kinds of nodes that may pass on the order of their input; joins that of their right one."""

_DIRECTION: Final = re.compile(r"\b(ASC|DESC) NULLS (FIRST|LAST)\b")
_NEEDS_ONE_PARTITION: Final = frozenset({AggregateMode.FINAL, AggregateMode.SINGLE})


def cut(root: Tree) -> Stage:
    """The head stage of ``root``, over all the others. Raises ``TreeError``."""
    return _Cutter().head(root)


class _Cutter:
    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def head(self, root: Tree) -> Stage:
        tree = self._within(root)
        if tree.partitions > 1:
            tree = self._input(Boundary.COALESCE, tree, root)
        return Stage(0, Boundary.HEAD, tree, root)

    def _within(self, tree: Tree) -> Tree:
        """``tree`` with everything beyond a boundary replaced by what comes from there."""
        node = tree.node
        _check(tree)
        if node.is_round_robin:
            # Only spreads rows evenly within one process, which a task has no use for.
            return self._within(tree.children[0])
        if tree.keeps_order:
            # What is above may count on it, and a scan of stage output would not declare it.
            return tree.over(self._within(tree.children[0]))
        if node.is_hash_repartition:
            below = self._within(tree.children[0])
            return self._input(Boundary.SHUFFLE, tree.over(below), tree)
        if node.kind in {"coalesce_partitions", "sort_preserving_merge"}:
            return tree.over(self._closed(Boundary.COALESCE, tree.children[0]))
        if tree.collects_left:
            return self._collecting(tree)
        cut = tree.over(*(self._within(child) for child in tree.children))
        _check_partitions(cut)
        return replace(cut, node=node.with_whole_files()) if node.is_scan else cut

    def _collecting(self, join: Tree) -> Tree:
        left, right = join.children
        build = self._build_side(left)
        if join.emits_build_side and not right.may_be_sorted:
            # One task runs it, so at least what it reads is made by all.
            return join.over(build, self._closed(Boundary.COALESCE, right))
        return join.over(build, self._within(right))

    def _build_side(self, tree: Tree) -> Tree:
        """``tree`` as every task reads it. Columns are named in the tasks, not by one before."""
        if _is_gathered(tree):
            if tree.kind == "projection":
                return tree.over(self._build_side(tree.children[0]))
            tree = tree.children[0]
        return self._input(Boundary.BROADCAST, self._within(tree), tree)

    def _closed(self, boundary: Boundary, tree: Tree) -> Tree:
        """``tree`` as a stage of its own, unless it is one already."""
        below = self._within(tree)
        return below if below.source is not None else self._input(boundary, below, tree)

    def _input(self, boundary: Boundary, tree: Tree, whole: Tree) -> Tree:
        # After what is below it: stages are numbered in the order in which they can run.
        return input_of(Stage(next(self._numbers), boundary, tree, whole))


def input_of(stage: Stage) -> Tree:
    """The leaf that stands for the output of ``stage``."""
    line = f"{stage.boundary.value}: stage {stage.number}"
    return Tree(PlanNode.stage_input(stage.number), line, source=stage)


def _is_gathered(tree: Tree) -> bool:
    """Whether all its rows are brought into one partition and then only projected.

    By each task anew: to the same values, that is.
    """
    while tree.kind == "projection" and not tree.may_be_volatile:
        (tree,) = tree.children
    return tree.kind == "coalesce_partitions" and tree.node.fetch is None


def _check(tree: Tree) -> None:
    node = tree.node
    if node.kind not in UNDERSTOOD and not node.is_scan:
        raise TreeError(f"{tree.name}: {_REASONS.get(node.kind, _NOT_UNDERSTOOD)}")
    if node.preserves_order:
        raise TreeError(f"{tree.name}: it merges sorted partitions while it repartitions")
    if node.kind == "repartition" and not (node.is_hash_repartition or node.is_round_robin):
        raise TreeError(f"{tree.name}: it divides rows in a way that is not distributed")
    if node.is_scan and node.declares_partitioning:
        raise TreeError("the scan promises a partitioning that a cut would break")
    if node.kind == "aggregate" and tree.line.count("ORDER BY") > 1:
        # Their partial states bear the names of what they are ordered by; two may share
        # one, and stage output is read by name.
        raise TreeError("AggregateExec: more than one aggregate with an ORDER BY of its own")
    if node.kind == "window":
        _check_window(tree)


def _check_window(tree: Tree) -> None:
    """Refuse functions of which the encoding loses something; only their names tell it."""
    for function in tree.node.window_functions:
        for lost in ("FILTER (WHERE", "IGNORE NULLS"):
            if lost in function.name:
                raise TreeError(
                    f"{tree.name}: a worker would not know of its {lost.split(' (')[0]}"
                )
        # Over rows in the opposite order DataFusion runs lag() as lead(), but still says lag.
        asked = [
            (way == "ASC", nulls == "FIRST") for way, nulls in _DIRECTION.findall(function.name)
        ]
        if asked != list(function.order):
            raise TreeError(f"{tree.name}: it computes a function backwards, unknown to a worker")


def _check_partitions(tree: Tree) -> None:
    """Nodes that need all rows in one place must have them there, whatever was planned."""
    node = tree.node
    needs_one = (
        node.kind == "global_limit"
        or node.aggregate_mode in _NEEDS_ONE_PARTITION
        or (node.kind == "sort" and not node.is_partition_wise_sort)
        or (node.kind == "window" and not node.is_partitioned_window)
    )
    if needs_one and tree.children[0].partitions != 1:
        raise TreeError(f"{tree.name}: it needs all rows in one partition")
    if node.is_partitioned_window and ("mode=[Sorted]" in tree.line or "mode=" not in tree.line):
        _check_keys_are_sorted(tree)


def _check_keys_are_sorted(window: Tree) -> None:
    """A column that is known to be constant, or equal to another, need not be in a sort.

    Of stage output nobody knows it, and a worker's DataFusion would refuse to run the
    window. Whether its keys are in the sort that it relies on is told by their number:
    in between they may change their places.
    """
    node = window.node
    needed = {*node.partition_keys, *(k for f in node.window_functions for k in f.order_keys)}
    (below,) = window.children
    while (is_join := "join" in below.kind) or below.kind in _KEEPS_ORDER or below.keeps_order:
        below = below.children[-1 if is_join else 0]
    keys = below.node.sort_keys
    short = len(keys) < len(needed) and any(leaf.source for leaf in below.walk())
    if below is window.children[0] and any(child.source for child in below.children):
        short = not {*node.partition_keys} <= {*keys}
    if short:
        raise TreeError(
            f"{window.name}: it relies on columns that are constant or equal, unknown to a worker"
        )
