"""The tree that ``explain(analyze=True)`` prints: what a query did, stage by stage.

Reads a report and nothing else.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from ._stage import DEFAULT_WIDTH, box, clipped, count, node_line, one_task_lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ._report import RunReport, StageReport
    from ._tree import Tree
    from ._wire import NodeMetrics

__all__ = ["display_analyzed", "size"]

_INDENT: Final = "  "
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_KIB: Final = 1024
_PROSE: Final = 92  # characters to a line of words, which are not clipped


def display_analyzed(
    report: RunReport,
    *,
    resolvers: Mapping[str, Mapping[str, int]] | None = None,
    width: int | None = DEFAULT_WIDTH,
) -> str:
    """The tree of a query that ran, lines clipped to ``width`` characters (``None``: whole).

    ``resolvers`` gives, for each process, what its ChannelResolver did meanwhile.
    """
    lines = [*_head(report), *_summary(report), *_resolvers(resolvers or {})]
    return "\n".join(clipped(lines, width))


def size(number: float) -> str:
    """A number of bytes, for a person."""
    unit = 0
    while number >= _KIB and unit < len(_UNITS) - 1:
        number, unit = number / _KIB, unit + 1
    return f"{number:.0f} {_UNITS[unit]}" if unit == 0 else f"{number:.1f} {_UNITS[unit]}"


def _head(report: RunReport) -> Iterator[str]:
    assert report.head is not None
    title = f"Head stage ── coordinator ── {report.head_rows:,} rows"
    lines = [*_decisions(report, 0), *_node_lines(report.head, report.head_nodes)]
    yield from box(title, lines)
    yield from _below(report, report.head, 1, set())


def _below(report: RunReport, tree: Tree, depth: int, shown: set[int]) -> Iterator[str]:
    inputs = [leaf.source for leaf in tree.walk() if leaf.source is not None]
    for source in reversed(inputs):
        stage = report.stages[source.number]
        if source.number in shown:  # the keys of a join also filter what it is joined with
            continue
        shown.add(source.number)
        for line in box(_title(stage), [*_stage_lines(report, stage)]):
            yield _INDENT * depth + line
        yield from _below(report, stage.stage.tree, depth + 1, shown)


def _title(stage: StageReport) -> str:
    return (
        f"Stage {stage.stage.number} ── {count(len(stage.tasks), 'task')} ── "
        f"{stage.rows:,} rows, {size(stage.bytes)} ── {stage.seconds:.3f} s"
    )


def _stage_lines(report: RunReport, stage: StageReport) -> Iterator[str]:
    for task in stage.tasks:
        line = f"t{task.index} @ {task.url}: {task.rows:,} rows, {size(task.bytes)}"
        if task.report is not None:
            line += f", {task.report.seconds:.3f} s"
            if task.report.fetched_bytes:
                line += f", fetched {size(task.report.fetched_bytes)}"
        yield line
    yield from _decisions(report, stage.stage.number)
    yield from one_task_lines(stage.stage)
    yield ""
    yield from _node_lines(stage.stage.tree, stage.nodes())


def _decisions(report: RunReport, number: int) -> Iterator[str]:
    for decision in report.decisions.get(number, ()):
        yield from textwrap.wrap(f"decided: {decision}", _PROSE, subsequent_indent="         ")


def _node_lines(tree: Tree, nodes: Sequence[NodeMetrics] | None) -> Iterator[str]:
    placed = tree.lines()
    # A task may run less than the stage's tree, such as one child of a union.
    known = nodes if nodes is not None and len(nodes) == len(placed) else [None] * len(placed)
    for (depth, node), metrics in zip(placed, known, strict=True):
        yield f"{_column(metrics)}  {_INDENT * depth}{node_line(node)}"


def _column(metrics: NodeMetrics | None) -> str:
    if metrics is None:
        return f"{'-':>12} rows {'-':>9}"
    column = f"{metrics.rows:>12,} rows {metrics.seconds:>7.3f} s"
    return f"{column} spilled {size(metrics.spilled)}" if metrics.spilled else column


def _summary(report: RunReport) -> Iterator[str]:
    yield (
        f"{count(len(report.stages), 'stage')}, {count(report.tasks, 'task')}, "
        f"{size(report.bytes)} written, {size(report.fetched_bytes)} fetched, "
        f"{count(len(report.retries), 'retry').replace('retrys', 'retries')}; "
        f"planned in {report.planning_seconds:.3f} s, stages ran for {report.seconds:.3f} s"
    )
    for retry in report.retries:
        yield f"retried: {retry}"


def _resolvers(resolvers: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for process, stats in resolvers.items():
        shown = ", ".join(f"{name} {value:,}" for name, value in stats.items())
        yield f"resolver of {process}: {shown}"
