"""Stages and tasks, and the tree that ``explain()`` prints.

What a planned query is: either a head stage over a leaf stage, joined by a network
boundary, or one plan for a single node and the reason for it. Values only; deciding is
the planner's, running the executor's.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ._plan_proto import PlanNode

__all__ = ["Boundary", "DistributedPlan", "SingleNodePlan", "Source", "Stage", "Task"]

DEFAULT_WIDTH: Final = 110
"""Characters to which a line of the tree is clipped, unless told otherwise."""

_INDENT: Final = "  "
_TASKS_SHOWN: Final = 16
_FILE_GROUPS: Final = re.compile(r"file_groups=\{(\d+ groups?): \[(.*?)\]\}, ")


class Boundary(enum.Enum):
    """How the output of a stage reaches its consumer; the value is its name in a tree."""

    SHUFFLE = "NetworkShuffle"
    """Partition k of the consumer is partition k of every task."""
    COALESCE = "NetworkCoalesce"
    """Every partition of every task is a partition of the consumer."""


@dataclass(frozen=True, slots=True)
class Task:
    """A stage's work on one worker.

    ``groups`` are the partitions of the stage's scan that are this task's own, and
    ``plan`` is the stage's plan over just those.
    """

    index: int
    url: str
    groups: tuple[int, ...]
    plan: PlanNode


@dataclass(frozen=True, slots=True)
class Source:
    """One output partition of one task."""

    task: int
    partition: int


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a plan that runs as several tasks without talking to anyone.

    ``plan`` covers all partitions; ``inputs[k]`` is what partition k of the consumer is
    made of; ``lines`` is the plan as DataFusion displays it.
    """

    number: int
    boundary: Boundary
    plan: PlanNode
    tasks: tuple[Task, ...]
    inputs: tuple[tuple[Source, ...], ...]
    lines: tuple[str, ...]

    def partitions_of(self, task: Task) -> int:
        """How many output partitions ``task`` has."""
        return sum(source.task == task.index for sources in self.inputs for source in sources)


@dataclass(frozen=True, slots=True)
class DistributedPlan:
    """A head stage, run by the coordinator, over a stage that runs on workers.

    ``head`` are the head's nodes from the root down; ``urls`` all workers of the query.
    """

    head: tuple[PlanNode, ...]
    head_lines: tuple[str, ...]
    partitions: int
    stage: Stage
    urls: tuple[str, ...]

    def splice(self, leaf: PlanNode) -> PlanNode:
        """The head's plan over ``leaf``, which stands for the stage's output."""
        for node in reversed(self.head):
            leaf = node.with_input(leaf)
        return leaf

    def display(self, width: int | None = DEFAULT_WIDTH) -> str:
        """The tree, lines clipped to ``width`` characters (``None``: whole)."""
        stage = self.stage
        boundary = (
            f"[Stage {stage.number}] ⇐ {stage.boundary.value}: "
            f"{_count(len(stage.inputs), 'partition')} from {_count(len(stage.tasks), 'task')}"
        )
        depth = len(self.head_lines)
        head = _box(
            f"Head stage ── coordinator ── {_count(self.partitions, 'partition')}",
            [*_indented(self.head_lines), _INDENT * depth + boundary],
        )
        leaf = _box(
            f"Stage {stage.number} ── {_count(len(stage.tasks), 'task')}",
            [*_task_lines(stage), "", *stage.lines],
        )
        return "\n".join(_clipped([*head, *(_INDENT + line for line in leaf)], width))

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
        box = _box(
            f"Single node ── coordinator ── {_count(self.partitions, 'partition')}",
            [f"not distributed: {self.reason}", "", *self.lines],
        )
        return "\n".join(_clipped(box, width, keep="not distributed"))

    def __str__(self) -> str:
        return self.display()


def plan_lines(display: str) -> tuple[str, ...]:
    """The lines of ``display_indent()``, each scan's list of files cut down to counts."""
    return tuple(_FILE_GROUPS.sub(_counted_files, line) for line in display.rstrip().splitlines())


def _counted_files(match: re.Match[str]) -> str:
    files = re.findall(r"[^\[\], ][^\[\],]*", match[2])
    names = {re.sub(r":\d+\.\.\d+$", "", file) for file in files}
    return f"{_count(len(names), 'file')} in {match[1]}, "


def _task_lines(stage: Stage) -> Iterator[str]:
    for task in stage.tasks[:_TASKS_SHOWN]:
        groups = ", ".join(f"p{group}" for group in task.groups)
        yield f"t{task.index} @ {task.url} reads {groups}"
    hidden = len(stage.tasks) - _TASKS_SHOWN
    if hidden > 0:
        yield f"… and {_count(hidden, 'more task')}"


def _indented(lines: Sequence[str]) -> Iterator[str]:
    for depth, line in enumerate(lines):
        yield _INDENT * depth + line.strip()


def _box(title: str, lines: Sequence[str]) -> list[str]:
    bottom = "─" * (len(title) + 8)
    return [f"┌───── {title}", *(f"│ {line}".rstrip() for line in lines), f"└{bottom}"]


def _clipped(lines: Sequence[str], width: int | None, keep: str | None = None) -> list[str]:
    return [
        line
        if width is None or len(line) <= width or (keep is not None and keep in line)
        else line[: width - 1] + "…"
        for line in lines
    ]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
