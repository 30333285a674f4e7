"""What a query that ran did: stages, tasks, decisions, retries.

Filled in by the scheduler while the query runs, read by ``explain(analyze=True)`` and by
whoever shows progress. Nothing is decided here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ._tree import Stage, Tree
    from ._wire import NodeMetrics, TaskReport

__all__ = ["Progress", "RunReport", "StageReport", "TaskRecord"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a query has come: told whenever a stage starts and a task finishes.

    ``done`` of the ``tasks`` of stage ``stage`` have finished; all stages together
    have ``total_done`` of ``total_tasks`` so far, and more may follow.
    """

    stage: int
    done: int
    tasks: int
    total_done: int
    total_tasks: int


@dataclass(slots=True)
class TaskRecord:
    """One task: where it ran last, and what came of it. Times are in seconds."""

    index: int
    url: str
    tree: Tree
    report: TaskReport | None = None
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return 0 if self.report is None else sum(p.rows for p in self.report.partitions)

    @property
    def bytes(self) -> int:
        return 0 if self.report is None else sum(p.bytes for p in self.report.partitions)


@dataclass(slots=True)
class StageReport:
    """One stage as it ran."""

    stage: Stage
    tasks: list[TaskRecord]

    @property
    def rows(self) -> int:
        return sum(task.rows for task in self.tasks)

    @property
    def bytes(self) -> int:
        """Size of its output on disk."""
        return sum(task.bytes for task in self.tasks)

    @property
    def fetched_bytes(self) -> int:
        """What its tasks fetched from other workers."""
        return sum(0 if task.report is None else task.report.fetched_bytes for task in self.tasks)

    @property
    def seconds(self) -> float:
        """The time of its longest task."""
        return max((task.seconds for task in self.tasks), default=0.0)

    def nodes(self) -> list[NodeMetrics] | None:
        """The metrics of its plan's nodes, summed over tasks; ``None``: plans differed."""
        reports = [task.report.nodes for task in self.tasks if task.report is not None]
        if not reports or len({len(nodes) for nodes in reports}) != 1:
            return None
        return [
            type(nodes[0])(
                rows=sum(node.rows for node in nodes),
                seconds=sum(node.seconds for node in nodes),
                spilled=sum(node.spilled for node in nodes),
            )
            for nodes in zip(*reports, strict=True)
        ]


@dataclass(slots=True)
class RunReport:
    """One query as it ran. Thread-safe to fill in; read it when the query is over."""

    progress: Callable[[Progress], object] | None = None
    stages: dict[int, StageReport] = field(default_factory=dict)
    decisions: dict[int, tuple[str, ...]] = field(default_factory=dict)
    retries: list[str] = field(default_factory=list)
    head: Tree | None = None
    head_nodes: tuple[NodeMetrics, ...] | None = None
    head_rows: int = 0
    head_fetched_bytes: int = 0
    planning_seconds: float = 0.0
    seconds: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def tasks(self) -> int:
        return sum(len(stage.tasks) for stage in self.stages.values())

    @property
    def bytes(self) -> int:
        """What all stages wrote for others."""
        return sum(stage.bytes for stage in self.stages.values())

    @property
    def fetched_bytes(self) -> int:
        """What went from one process to another."""
        stages = self.stages.values()
        return self.head_fetched_bytes + sum(stage.fetched_bytes for stage in stages)

    def decided(self, stage: int, decisions: Sequence[str]) -> None:
        with self._lock:
            self.decisions[stage] = tuple(decisions)

    def started(self, stage: Stage, tasks: Sequence[tuple[int, str, Tree]]) -> None:
        with self._lock:
            records = [TaskRecord(index, url, tree) for index, url, tree in tasks]
            self.stages[stage.number] = StageReport(stage, records)
        self._tell(stage.number)

    def finished(self, stage: int, task: int, url: str, report: TaskReport, seconds: float) -> None:
        with self._lock:
            record = self.stages[stage].tasks[task]
            record.url, record.report, record.seconds = url, report, seconds
        self._tell(stage)

    def retried(self, stage: int, task: int, why: str) -> None:
        with self._lock:
            self.retries.append(f"stage {stage} task {task}: {why}")

    def _tell(self, number: int) -> None:
        if self.progress is None:
            return
        with self._lock:
            stage = self.stages[number]
            finished = [_done(stage) for stage in self.stages.values()]
            progress = Progress(number, _done(stage), len(stage.tasks), sum(finished), self.tasks)
        self.progress(progress)


def _done(stage: StageReport) -> int:
    return sum(task.report is not None for task in stage.tasks)
