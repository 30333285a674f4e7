"""How much there is to read, and what that is worth: figures, and what follows from them.

Sizes of stage output are measured, sizes of files are known. Which join runs how is
``_adapt``'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._tree import Boundary, Stage, Tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from ._options import DistributedOptions
    from ._plan_proto import PlanNode

__all__ = [
    "Measured",
    "divided_bytes",
    "is_tiny",
    "reads_little",
    "rows_and_bytes",
    "small_files",
    "task_count",
]

_ROW_BY_ROW: Final = frozenset({"coalesce_batches", "cooperative", "filter", "projection"})
_ALL_PAIRS: Final = frozenset({"cross_join", "nested_loop_join"})
_LEAST_ROW: Final = 8  # bytes of a row in memory, at least
_SMALL_FILES: Final = 1 << 20  # bytes: to read them again costs less than another task


@dataclass(frozen=True, slots=True)
class Measured:
    """What the output of a stage came to. ``most_rows`` is what any of its nodes gave."""

    rows: int
    bytes: int
    most_rows: int = 0


def small_files(options: DistributedOptions) -> int:
    """How many bytes of files are few enough that several tasks may read the same."""
    return min(_SMALL_FILES, options.scan_bytes_per_task, options.broadcast_threshold)


def is_tiny(stage: Stage, options: DistributedOptions) -> bool:
    """Whether it reads files of little size, and gives the same rows to whoever reads them."""
    if stage.boundary is not Boundary.SHUFFLE:
        return False
    below = list(stage.tree.children[0].walk())
    if not all(tree.node.is_scan or tree.kind in _ROW_BY_ROW for tree in below):
        return False
    if any(tree.may_be_volatile for tree in below):
        return False
    if any(tree.node.fetch is not None or ", fetch=" in tree.line for tree in below):
        return False  # which rows those are is up to whoever reads
    scans = [tree for tree in below if tree.node.is_scan]
    limit = small_files(options)
    rows = [scan.node.file_rows for scan in scans]
    return all(
        count is not None and count * _LEAST_ROW <= limit and scan.node.file_bytes <= limit
        for count, scan in zip(rows, scans, strict=True)
    )


def rows_and_bytes(measured: Mapping[int, Measured], tree: Tree) -> Measured:
    """What all inputs of ``tree`` came to."""
    inputs = [measured[leaf.source.number] for leaf in tree.walk() if leaf.source is not None]
    return Measured(sum(m.rows for m in inputs), sum(m.bytes for m in inputs))


def divided_bytes(tree: Tree, measured: Mapping[int, Measured]) -> int:
    """What all tasks of a stage read together, but for build sides that each of them reads.

    Bytes of files as they are on disk, and of other stages' output as measured.
    """
    return sum(
        measured[below.source.number].bytes if below.source is not None else below.node.read_bytes
        for below in _divided(tree)
        if below.source is not None or below.node.is_scan
    )


def task_count(
    stage: Stage, measured: Mapping[int, Measured], options: DistributedOptions, workers: int
) -> int:
    """How many tasks a stage is worth, at most one per worker."""
    pieces, size = _scanned(below.node for below in _divided(stage.tree))
    size += rows_and_bytes(measured, stage.tree).bytes
    if pieces:
        worth = math.ceil(pieces / options.files_per_task)
        most = options.scan_bytes_per_task
        if any(tree.kind in _ALL_PAIRS for tree in stage.tree.walk()):
            most = min(most, _SMALL_FILES)  # there is more to do than to read
        if most:
            worth = min(worth, math.ceil(size / most))
    elif options.bytes_per_task:
        worth = math.ceil(size / options.bytes_per_task)
    else:
        worth = workers
    return max(1, min(worth, workers, stage.divisible))


def reads_little(tree: Tree, measured: Mapping[int, Measured], options: DistributedOptions) -> bool:
    """Whether all that ``tree`` reads is no more than a task's worth, of files as of stages.

    A stage that is not among those ``measured`` counts for nothing.
    """
    known = [
        measured[leaf.source.number].bytes
        for leaf in tree.walk()
        if leaf.source is not None and leaf.source.number in measured
    ]
    files = _scanned(below.node for below in tree.walk())[1]
    if files > min(_SMALL_FILES, options.scan_bytes_per_task):
        return False
    return 0 < options.bytes_per_task >= sum(known) + files


def _scanned(nodes: Iterable[PlanNode]) -> tuple[int, int]:
    """How many pieces of files and of tables in memory these nodes read, and their bytes.

    Of a well compressed file the size tells little: many rows of the same are few bytes.
    """
    pieces = size = 0
    for node in nodes:
        if node.is_scan:
            pieces += node.file_ranges
            size += max(node.file_bytes, _LEAST_ROW * (node.file_rows or 0))
        elif node.kind == "memory_scan":
            pieces += len(node.memory_partitions)
            size += sum(node.memory_partitions)
    return pieces, size


def _divided(tree: Tree) -> Iterator[Tree]:
    """What tasks share out, without the build sides that every task has whole."""
    yield tree
    for child in tree.children[1:] if tree.collects_left else tree.children:
        yield from _divided(child)
