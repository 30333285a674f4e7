"""A planned query, and the tree that ``explain()`` prints of it.

Either stages under a head, joined by network boundaries, or one plan for a single node
and the reason for it. Values only; deciding is the planner's, running the executor's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._tree import Boundary

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._options import DistributedOptions
    from ._plan_proto import PlanNode
    from ._tree import Stage, Tree
    from ._workers import WorkerSlots

__all__ = [
    "DEFAULT_WIDTH",
    "DistributedPlan",
    "SingleNodePlan",
    "box",
    "clipped",
    "count",
    "node_line",
    "one_task_lines",
    "plan_lines",
]

DEFAULT_WIDTH: Final = 110
"""Characters to which a line of the tree is clipped, unless told otherwise."""

_INDENT: Final = "  "
_FILE_GROUPS: Final = re.compile(r"file_groups=\{(\d+ groups?): \[(.*?)\]\}, ")


@dataclass(frozen=True, slots=True, eq=False)
class DistributedPlan:
    """A head stage, run by the coordinator, over stages that run on workers.

    How many tasks a stage gets, and whether a join is broadcast or shuffled, is decided
    from measured sizes while the query runs. ``root`` is the plan before it was cut.
    """

    head: Stage
    workers: tuple[WorkerSlots, ...]
    options: DistributedOptions
    root: PlanNode

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages but the head, by number, which is an order in which they could run."""
        return tuple(sorted(self.head.walk(), key=lambda stage: stage.number)[1:])

    @property
    def urls(self) -> tuple[str, ...]:
        """The workers of the query."""
        return tuple(worker.url for worker in self.workers)

    def display(self, width: int | None = DEFAULT_WIDTH) -> str:
        """The tree, lines clipped to ``width`` characters (``None``: whole)."""
        return "\n".join(clipped(self._boxes(self.head, 0), width))

    def _boxes(self, stage: Stage, depth: int) -> Iterator[str]:
        for line in box(self._title(stage), [*one_task_lines(stage), *_tree_lines(stage.tree)]):
            yield _INDENT * depth + line
        for below in reversed(stage.inputs):
            yield from self._boxes(below, depth + 1)

    def _title(self, stage: Stage) -> str:
        partitions = count(stage.tree.partitions, "partition")
        if stage.boundary is Boundary.HEAD:
            return f"Head stage ── coordinator ── {partitions}"
        tasks = min(len(self.workers), stage.divisible)
        most = count(tasks, "task") if tasks == 1 else f"up to {tasks} tasks"
        return f"Stage {stage.number} ── {most} ── {partitions}"

    def __str__(self) -> str:
        return self.display()


@dataclass(frozen=True, slots=True)
class SingleNodePlan:
    """A plan that DataFusion runs in this process, and why it is not distributed."""

    reason: str
    lines: tuple[str, ...]
    partitions: int

    def display(self, width: int | None = DEFAULT_WIDTH) -> str:
        """The tree, lines clipped to ``width`` characters (``None``: whole)."""
        lines = box(
            f"Single node ── coordinator ── {count(self.partitions, 'partition')}",
            [f"not distributed: {self.reason}", "", *self.lines],
        )
        return "\n".join(clipped(lines, width, keep="not distributed"))

    def __str__(self) -> str:
        return self.display()


def plan_lines(display: str) -> tuple[str, ...]:
    """The lines of ``display_indent()``, each scan's list of files cut down to counts."""
    return tuple(_FILE_GROUPS.sub(_counted_files, line) for line in display.rstrip().splitlines())


def one_task_lines(stage: Stage) -> list[str]:
    """Why the stage is not divided, where its partitions do not tell."""
    reason = None if stage.boundary is Boundary.HEAD else stage.tree.one_task_reason
    return [] if reason is None else [f"in one task: {reason}"]


def _tree_lines(tree: Tree) -> Iterator[str]:
    for depth, node in tree.lines():
        yield _INDENT * depth + node_line(node)


def node_line(tree: Tree) -> str:
    """One node as a line: DataFusion's own display, or where its rows come from."""
    if tree.source is None:
        return plan_lines(tree.line)[0]
    stage = tree.source
    partitions = count(tree.partitions, "partition")
    return f"[Stage {stage.number}] ⇐ {stage.boundary.value}: {partitions}"


def _counted_files(match: re.Match[str]) -> str:
    files = re.findall(r"[^\[\], ][^\[\],]*", match[2])
    names = {re.sub(r":\d+\.\.\d+$", "", file) for file in files}
    return f"{count(len(names), 'file')} in {match[1]}, "


def box(title: str, lines: Sequence[str]) -> list[str]:
    """``lines`` in a box under ``title``."""
    bottom = "─" * (len(title) + 8)
    return [f"┌───── {title}", *(f"│ {line}".rstrip() for line in lines), f"└{bottom}"]


def clipped(
    lines: Iterator[str] | Sequence[str], width: int | None, keep: str | None = None
) -> list[str]:
    return [
        line
        if width is None or len(line) <= width or (keep is not None and keep in line)
        else line[: width - 1] + "…"
        for line in lines
    ]


def count(number: int, noun: str) -> str:
    """``number`` of ``noun``, in words that agree."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
