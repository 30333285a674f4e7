"""What ran of a query: stages, tasks, their outputs; and what their consumers are told of it.

Values, but for which output of a task is in use. What runs when is ``_scheduler``'s business.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pyarrow as pa

from . import _wire
from ._batches import merged_schema
from ._errors import DistributedError
from ._plan_proto import PlanNode
from ._sizes import Measured
from ._tree import Boundary, Stage, Tree

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = [
    "Output",
    "StageRun",
    "TaskRun",
    "as_run",
    "is_latest",
    "measured_of",
    "replaced",
    "sizes_of",
    "stage_input",
]


@dataclass(frozen=True, slots=True)
class Output:
    """What one attempt at a task left on its worker, and what it was made from."""

    key: _wire.OutputKey
    url: str
    report: _wire.TaskReport
    read: tuple[tuple[TaskRun, _wire.OutputKey], ...]


@dataclass(slots=True, eq=False)
class TaskRun:
    """One task of a stage. ``output`` changes under ``lock`` only.

    ``missed`` are the workers whose outputs it turned out to be too late for.
    """

    stage: StageRun
    index: int
    tree: Tree
    url: str
    lock: threading.RLock = field(default_factory=threading.RLock)
    output: Output | None = None
    attempts: int = 0
    failures: int = 0
    missed: set[str] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class StageRun:
    """A stage with its tree settled and its tasks placed."""

    stage: Stage
    inputs: Mapping[int, StageRun]
    tasks: list[TaskRun] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.stage.number

    def measured(self) -> Measured:
        """What there is now, of whichever attempts: a matter of size, not of rows."""
        return measured_of([task.output for task in self.tasks if task.output is not None])


def as_run(tree: Tree, runs: Mapping[int, StageRun]) -> Tree:
    """``tree`` over the stages as they ran: not all have the partitions that were planned."""
    if tree.source is not None:
        run = runs.get(tree.source.number)
        if run is None:
            return tree
        stage = run.stage
        return replace(
            tree, source=Stage(stage.number, tree.source.boundary, stage.tree, stage.whole)
        )
    return tree.over(*(as_run(child, runs) for child in tree.children))


def sizes_of(inputs: Mapping[int, StageRun]) -> dict[int, Measured]:
    return {number: below.measured() for number, below in inputs.items()}


def replaced(tree: Tree, trees: Mapping[int, Tree]) -> Tree:
    """``tree`` with the outputs of these stages replaced by what the stages would run."""
    if tree.source is not None:
        inside = trees.get(tree.source.number, tree)
        if tree.source.boundary is Boundary.BROADCAST and inside.partitions > 1:
            return Tree(PlanNode.coalesce(), "CoalescePartitionsExec", (inside,))
        return inside
    return tree.over(*(replaced(child, trees) for child in tree.children))


def measured_of(outputs: Collection[Output]) -> Measured:
    reports = [output.report for output in outputs]
    partitions = [partition for report in reports for partition in report.partitions]
    alike = len({len(report.nodes) for report in reports}) == 1
    nodes = zip(*(report.nodes for report in reports), strict=True) if alike else ()
    return Measured(
        sum(p.rows for p in partitions),
        sum(p.bytes for p in partitions),
        max((sum(node.rows for node in same) for same in nodes), default=0),
    )


def is_latest(task: TaskRun, key: _wire.OutputKey) -> bool:
    return task.output is not None and task.output.key == key


def stage_input(leaf: Tree, run: StageRun, there: Mapping[TaskRun, Output]) -> _wire.StageInput:
    """The partitions of ``leaf``, each with the outputs that it is made of."""
    assert leaf.source is not None
    outputs = [there[task] for task in run.inputs[leaf.source.number].tasks]
    every = [
        [_source(output, index) for index in range(len(output.report.partitions))]
        for output in outputs
    ]
    if leaf.source.boundary is Boundary.SHUFFLE:
        divided = [list(sources) for sources in zip(*every, strict=True)]
        partitions = [
            list(itertools.chain.from_iterable(divided[first : first + leaf.merges]))
            for first in range(0, len(divided), leaf.merges)
        ]
    elif leaf.source.boundary is Boundary.BROADCAST:
        partitions = [[source for sources in every for source in sources]]
    else:
        partitions = [[source] for sources in every for source in sources]
    if leaf.own is not None:
        partitions = [partitions[index] for index in leaf.own]
    return _wire.StageInput(
        leaf.source.number,
        _schema([output.report for output in outputs]),
        tuple(tuple(s for s in sources if s.batches) for sources in partitions),
    )


def _source(output: Output, partition: int) -> _wire.PartitionSource:
    report, files = output.report.partitions[partition], output.report.files
    return _wire.PartitionSource(
        url=output.url,
        output=output.key,
        partition=partition,
        rows=report.rows,
        batches=report.batches,
        size=report.bytes,
        files=() if files is None else files[partition],
    )


def _schema(reports: Sequence[_wire.TaskReport]) -> bytes:
    shown = [report for report in reports if not report.probed]
    encoded = {report.schema for report in shown or reports}
    if len(encoded) == 1:
        return encoded.pop()
    schemas = [pa.ipc.read_schema(pa.py_buffer(data)) for data in sorted(encoded)]
    try:
        merged: bytes = merged_schema(schemas).serialize().to_pybytes()
    except ValueError as error:
        raise DistributedError(
            f"the tasks of one stage have no schema in common: {error}"
        ) from error
    return merged
