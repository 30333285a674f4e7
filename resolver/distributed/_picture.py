"""A staged plan as a picture: Graphviz text, or SVG without Graphviz.

One box per stage with its operators, an edge for every boundary, the head on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape

from ._stage import DistributedPlan, SingleNodePlan, count, node_line
from ._tree import Boundary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._tree import Stage

__all__ = ["graphviz", "svg"]

_SHOWN: Final = 64  # characters of an operator's line
_CHARACTER: Final = 7.2
_LINE: Final = 18
_PADDING: Final = 12
_GAP: Final = 48
_FONT: Final = "font-family='ui-monospace, Menlo, monospace' font-size='12'"


@dataclass(frozen=True, slots=True)
class _Box:
    """A stage as it is drawn; ``boundary`` leads to the box above."""

    number: int
    title: str
    lines: tuple[str, ...]
    boundary: str
    below: tuple[_Box, ...]

    @property
    def width(self) -> float:
        longest = max(len(line) for line in (self.title, *self.lines))
        return longest * _CHARACTER + 2 * _PADDING

    @property
    def height(self) -> float:
        return (len(self.lines) + 1) * _LINE + 2 * _PADDING

    @property
    def span(self) -> float:
        """The width of the box and all below it."""
        below = sum(box.span for box in self.below) + _GAP * max(0, len(self.below) - 1)
        return max(self.width, below)


def graphviz(plan: DistributedPlan | SingleNodePlan) -> str:
    """The plan in the language of Graphviz."""
    lines = ["digraph plan {", "  rankdir=BT;", '  node [shape=box, fontname="monospace"];']
    for box in _walk(_box(plan)):
        label = "\\l".join(_quoted(line) for line in (box.title, *box.lines))
        lines.append(f'  stage{box.number} [label="{label}\\l"];')
        lines += [
            f'  stage{below.number} -> stage{box.number} [label="{below.boundary}"];'
            for below in box.below
        ]
    return "\n".join([*lines, "}"]) + "\n"


def svg(plan: DistributedPlan | SingleNodePlan) -> str:
    """The plan as an SVG document."""
    root = _box(plan)
    shapes: list[str] = []
    bottom = _drawn(root, _GAP / 2, _GAP / 2, shapes)
    width, height = root.span + _GAP, bottom + _GAP / 2
    size, box = f"width='{width:.0f}' height='{height:.0f}'", f"{width:.0f} {height:.0f}"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} viewBox='0 0 {box}'>",
            "<rect width='100%' height='100%' fill='white'/>",
            *shapes,
            "</svg>\n",
        ]
    )


def _drawn(box: _Box, left: float, top: float, shapes: list[str]) -> float:
    """Draw ``box`` and all below it; returns how far down they reach."""
    x = left + (box.span - box.width) / 2
    middle, bottom = x + box.width / 2, top + box.height
    shapes.append(
        f"<rect x='{x:.1f}' y='{top:.1f}' width='{box.width:.1f}' height='{box.height:.1f}' "
        "rx='6' fill='#f6f8fa' stroke='#57606a'/>"
    )
    for row, line in enumerate((box.title, *box.lines)):
        y = top + _PADDING + (row + 0.75) * _LINE
        weight = " font-weight='bold'" if row == 0 else ""
        shapes.append(
            f"<text x='{x + _PADDING:.1f}' y='{y:.1f}' {_FONT}{weight} xml:space='preserve'>"
            f"{escape(line)}</text>"
        )
    reached = bottom
    for below in box.below:
        center, below_top = left + below.span / 2, bottom + _GAP
        shapes.append(
            f"<path d='M {center:.1f} {below_top:.1f} L {middle:.1f} {bottom:.1f}' "
            "stroke='#57606a' fill='none'/>"
        )
        shapes.append(
            f"<text x='{center + 6:.1f}' y='{below_top - 6:.1f}' {_FONT} fill='#0969da'>"
            f"{escape(below.boundary)}</text>"
        )
        reached = max(reached, _drawn(below, left, below_top, shapes))
        left += below.span + _GAP
    return reached


def _walk(box: _Box) -> Iterator[_Box]:
    yield box
    for below in box.below:
        yield from _walk(below)


def _box(plan: DistributedPlan | SingleNodePlan) -> _Box:
    if isinstance(plan, SingleNodePlan):
        lines = (f"not distributed: {plan.reason}", *plan.lines)
        return _Box(0, "Single node", tuple(_short(line) for line in lines), "", ())
    return _stage_box(plan.head)


def _stage_box(stage: Stage) -> _Box:
    partitions = count(stage.tree.partitions, "partition")
    is_head = stage.boundary is Boundary.HEAD
    title = f"Head stage, {partitions}" if is_head else f"Stage {stage.number}, {partitions}"
    return _Box(
        stage.number,
        title,
        tuple(_short("  " * depth + node_line(tree)) for depth, tree in stage.tree.lines()),
        stage.boundary.value,
        tuple(_stage_box(below) for below in stage.inputs),
    )


def _short(line: str) -> str:
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"


def _quoted(line: str) -> str:
    return line.replace("\\", "\\\\").replace('"', '\\"')
