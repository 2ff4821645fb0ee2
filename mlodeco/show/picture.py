"""The dataflow graph as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mlodeco.graph import Edge, EdgeKind, Graph
from mlodeco.show.figures import add_box, fit_page, make_page, measure, styled
from mlodeco.show.layout import Layout, Point, lay_out
from mlodeco.show.words import LOOKS, Methods, kinds, label, printable, rows

if TYPE_CHECKING:
    from mlodeco.show.figures import Axes, Figure


@dataclass(frozen=True)
class _Line:
    """How an edge is drawn, so that kinds are told apart without their colours."""

    dashes: Any
    width: float
    head: float
    is_filled: bool


_LINES: Final = {
    EdgeKind.LOWER_TO_UPPER: _Line("-", 1.5, 8.0, True),
    EdgeKind.UPPER_TO_LOWER: _Line((0, (4, 2)), 1.5, 8.0, False),
    EdgeKind.SIDEWAYS: _Line((0, (6, 2, 1, 2)), 0.9, 6.0, True),
    EdgeKind.ORDERING: _Line((0, (1, 2)), 0.9, 6.0, False),
}

_NAME: Final[dict[str, Any]] = {"fontsize": 11}
_METHOD: Final[dict[str, Any]] = {"fontsize": 9}
_ASIDE: Final[dict[str, Any]] = {"fontsize": 8}
_INK: Final = "#1b1f24"
_GREY: Final = "#57606a"
_MARGIN: Final = 8.0
_SAMPLE: Final = 34.0
"""The length of a line in the legend."""


def draw_graph(graph: Graph, methods: Methods) -> Figure:
    """A figure as large as the graph: a row for each depth, the highest on top, and a legend."""
    with styled():
        figure, axes = make_page()
        texts = {edge: printable(label(edge, methods)) for edge in graph.edges}
        sizes = {edge: _padded(axes, text, 3, 2, _METHOD) for edge, text in texts.items() if text}
        boxes = {name: _padded(axes, printable(name), 10, 7, _NAME) for name in graph.levels}
        layout = lay_out(graph, boxes, sizes)
        for edge, points in layout.lines.items():
            _draw_line(axes, edge, points)
        for name, box in layout.boxes.items():
            add_box(axes, box.x, box.y, box.width, box.height, fc="white", ec=_INK, zorder=4)
            _write(axes, box.x, box.y, printable(name), _NAME, ha="center", c=_INK, zorder=5)
        for edge, spot in layout.labels.items():
            add_box(axes, spot.x, spot.y, spot.width, spot.height, fc="white", lw=0, zorder=3)
            colour = LOOKS[edge.kind].colour
            _write(axes, spot.x, spot.y, texts[edge], _METHOD, ha="center", c=colour, zorder=5)
        left, bottom, right, top = _extent(layout)
        left = _draw_depths(axes, graph, layout, left)
        bottom, right = _draw_legend(axes, graph, left, bottom, right)
        fit_page(axes, left - _MARGIN, bottom - _MARGIN, right + _MARGIN, top + _MARGIN)
    return figure


def _padded(axes: Axes, text: str, x: float, y: float, font: dict[str, Any]) -> tuple[float, float]:
    width, height = measure(axes, text, **font)
    return width + 2 * x, height + 2 * y


def _write(axes: Axes, x: float, y: float, text: str, font: dict[str, Any], **options: Any) -> None:
    axes.text(x, y, text, va="center", parse_math=False, **font, **options)


def _draw_line(axes: Axes, edge: Edge, points: list[Point]) -> None:
    line = _LINES[edge.kind]
    (x, end), (_, before) = points[-1], points[-2]
    way = 1 if end > before else -1
    # the marker is drawn around its middle
    points = [*points[:-1], (x, end - way * (line.head / 2 + line.width))]
    _add_line(axes, edge.kind, points, "^" if way > 0 else "v", f"{edge.source} -> {edge.target}")


def _add_line(axes: Axes, kind: EdgeKind, points: list[Point], head: str, name: str) -> None:
    line, colour = _LINES[kind], LOOKS[kind].colour
    axes.plot(
        *zip(*points, strict=True),
        label=name,
        color=colour,
        linestyle=line.dashes,
        linewidth=line.width,
        marker=head,
        markevery=[len(points) - 1],
        markersize=line.head,
        markerfacecolor=colour if line.is_filled else "white",
        zorder=2,
    )


def _extent(layout: Layout) -> tuple[float, float, float, float]:
    spots = [*layout.boxes.values(), *layout.labels.values()]
    points = [point for line in layout.lines.values() for point in line]
    xs = [x for s in spots for x in (s.x - s.width / 2, s.x + s.width / 2)]
    ys = [y for s in spots for y in (s.y - s.height / 2, s.y + s.height / 2)]
    xs += [x for x, _ in points]
    ys += [y for _, y in points]
    return min(xs), min(ys), max(xs), max(ys)


def _draw_depths(axes: Axes, graph: Graph, layout: Layout, left: float) -> float:
    """The depths at the left of their rows; returns where they begin."""
    texts = {names[0]: f"depth {depth}" for depth, names in rows(graph)}
    width = max(measure(axes, text, **_ASIDE)[0] for text in texts.values())
    start = left - width - 2 * _MARGIN
    for name, text in texts.items():
        _write(axes, start, layout.boxes[name].y, text, _ASIDE, c=_GREY)
    return start


def _draw_legend(
    axes: Axes, graph: Graph, left: float, bottom: float, right: float
) -> tuple[float, float]:
    """A line for each kind, under the graph; returns the new bottom and right."""
    found = kinds(graph)
    bottom -= _MARGIN if found else 0
    for kind in found:
        meaning = LOOKS[kind].meaning
        width, height = measure(axes, meaning, **_ASIDE)
        y = bottom - height / 2 - 3
        _add_line(axes, kind, [(left, y), (left + _SAMPLE, y)], ">", kind.value)
        start = left + _SAMPLE + _MARGIN
        _write(axes, start, y, meaning, _ASIDE, c=_INK)
        bottom, right = y - height / 2 - 3, max(right, start + width)
    return bottom, right
