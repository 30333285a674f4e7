"""A query whose last stage runs in pieces, of which each gives a part of its rows.

A partition of a stage's output depends on no other one. So the result can be read from the
first partitions on while the others are still to be made, and what has been read of it never
has to be made again. Only what the last stage reads may have to be, when a worker is lost; it
must be the same then. Nothing is run here; running pieces is ``_scheduler``'s business, and
reading them one after another ``_stream``'s.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from ._repeatable import has_limit, is_repeatable
from ._tree import Boundary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ._runs import StageRun
    from ._stage import DistributedPlan

__all__ = ["may_be_read_in_pieces", "piece_count"]

_MOST_PIECES: Final = 256
"""More would be planned for no use: each costs milliseconds."""
_MOST_SHUFFLED: Final = 256
"""Partitions. Each is an open file of every task whose output is shuffled."""


def piece_count(plan: DistributedPlan, partitions: int) -> int:
    """For how many pieces ``plan`` is worth to be planned; 1: it is run as a whole.

    ``partitions`` are those that are planned for each piece.
    An estimate: what the last stage reads is known, and whether what it reads is the same
    if made again, once all else has run.
    """
    wanted = plan.options.stream_bytes
    last = plan.head.tree.source
    if not wanted or last is None or last.boundary is not Boundary.COALESCE:
        return 1
    trees = [tree for stage in last.walk() for tree in stage.tree.walk()]
    size = sum(tree.node.read_bytes for tree in trees if tree.node.is_scan)
    most = _MOST_PIECES
    if last.inputs:
        most = min(most, _MOST_SHUFFLED // partitions)
    pieces = min(most, math.ceil(size / wanted))
    # The sizes first: most queries are small, and to look at every node takes longer.
    if pieces <= 1 or any(map(has_limit, trees)):
        return 1
    if not all(
        is_repeatable(stage.tree, may_group=stage in last.inputs)
        for below in last.inputs
        for stage in below.walk()
    ):
        return 1
    return pieces


def may_be_read_in_pieces(inputs: Mapping[int, StageRun]) -> bool:
    """Whether what was made of ``inputs`` stays right if some of them are made again."""
    return all(
        is_repeatable(run.stage.tree, may_group=run.stage.boundary is Boundary.SHUFFLE)
        for run in inputs.values()
    ) and all(is_repeatable(run.stage.tree) for top in inputs.values() for run in _below(top))


def _below(run: StageRun) -> Iterator[StageRun]:
    for below in run.inputs.values():
        yield below
        yield from _below(below)
