"""A query cut into several, of which each gives a part of its rows.

What filters and projects files, and no more, gives the rows of one file whatever it reads
besides. So its result can be read from the first files on while the others are still to
be scanned, and what has been read of it never has to be made again. Values only; running
one piece after another is ``_stream``'s business.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ._tree import Boundary, Share, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._stage import DistributedPlan
    from ._tree import Tree

__all__ = ["piece_count", "pieces"]

# No union: its inputs may have other schemas than it has.
_ROW_WISE: Final = frozenset(
    {"buffer", "coalesce_batches", "cooperative", "filter", "projection", "unnest"}
)
_MOST_PIECES: Final = 256
"""More would be planned for no use: each costs milliseconds."""


def piece_count(plan: DistributedPlan) -> int:
    """Into how many pieces ``plan`` is worth to be cut; 1: it is run as a whole."""
    wanted = plan.options.stream_bytes
    if not wanted or not _is_row_wise(plan):
        return 1
    size = sum(tree.node.read_bytes for tree in _only_stage(plan).tree.walk() if tree.node.is_scan)
    return min(_MOST_PIECES, max(1, math.ceil(size / wanted)))


def pieces(plan: DistributedPlan, count: int) -> list[DistributedPlan]:
    """``plan``, which has partitions for ``count`` pieces or fewer, as that many plans."""
    if not _is_row_wise(plan):
        return [plan]
    stage = _only_stage(plan)
    slots = sum(worker.slots for worker in plan.workers)
    # No partition is left if the files are gone since their bytes were counted.
    count = max(1, min(count, math.ceil(stage.tree.partitions / slots)))
    return list(_cut(plan, stage, count))


def _cut(plan: DistributedPlan, stage: Stage, count: int) -> Iterator[DistributedPlan]:
    for number in range(count):
        tree = stage.tree.shared(Share(number, number + 1, count))
        if tree is not None:
            piece = replace(plan.head.tree, source=replace(stage, tree=tree))
            yield replace(plan, head=replace(plan.head, tree=piece))


def _only_stage(plan: DistributedPlan) -> Stage:
    (stage,) = plan.stages
    return stage


def _is_row_wise(plan: DistributedPlan) -> bool:
    """Whether it scans files, and makes of each row what it makes of it alone."""
    source = plan.head.tree.source
    if source is None or source.boundary is not Boundary.COALESCE:
        return False
    return all(_is_row_wise_node(tree) for tree in source.tree.walk())


def _is_row_wise_node(tree: Tree) -> bool:
    # A limit may stand in any node, and counts rows. A path may merely look like one.
    if tree.node.fetch is not None or "fetch=" in tree.line or "limit=" in tree.line:
        return False
    return tree.kind in _ROW_WISE or tree.node.is_scan
