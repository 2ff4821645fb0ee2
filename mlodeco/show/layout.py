"""Where the boxes, texts and lines of a drawn graph are: plain numbers, in points.

Rows of boxes and rows of texts alternate. A line is vertical within a row, where it has room of
its own, and bends between rows. So no line meets a box or a text that is not its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from mlodeco.graph import Edge, Graph
from mlodeco.show.slots import Link, Rows, Slot, order_rows, place_rows

Size = tuple[float, float]
Point = tuple[float, float]

_STUB: Final = 9.0
"""How far lines are straight outside a box: the length of an arrowhead."""
_PORT: Final = 12.0
_WIDEST_PORT: Final = 22.0
_INSET: Final = 9.0
_BEND: Final = (20.0, 60.0)
"""The least and the largest height of the room between two rows."""
_SLOPE: Final = 0.4
_ARC: Final = 7.0
_SAMPLES: Final = 24


@dataclass(frozen=True)
class Rectangle:
    """A rectangle by its middle."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """A graph in points, upwards and to the right.

    Attributes:
        boxes: those of the levels.
        labels: the texts of edges.
        lines: for each edge its points, from the source to the target.
    """

    boxes: dict[str, Rectangle]
    labels: dict[Edge, Rectangle]
    lines: dict[Edge, list[Point]]


def lay_out(graph: Graph, boxes: Mapping[str, Size], labels: Mapping[Edge, Size]) -> Layout:
    """A row for each depth, the highest on top.

    Args:
        graph: the graph.
        boxes: for each level the room that its box needs.
        labels: the same for the text of each edge that has one, between levels of two depths.
    """
    return _Plan(graph, boxes, labels).layout()


class _Plan:
    """Slots of levels, and of the lines on their way through the rows between."""

    def __init__(
        self, graph: Graph, boxes: Mapping[str, Size], labels: Mapping[Edge, Size]
    ) -> None:
        self._graph, self._labels = graph, labels
        self._levels = {name: Slot(width) for name, (width, _) in boxes.items()}
        self._box_height = max(height for _, height in boxes.values())
        self._label_height = max((height for _, height in labels.values()), default=0.0)
        self._rows: Rows = [[] for _ in range(2 * max(graph.depths.values()) + 1)]
        for name in graph.levels:
            self._rows[2 * graph.depths[name]].append(self._levels[name])
        self._chains = {edge: self._chain(edge) for edge in graph.edges if not self._is_flat(edge)}
        self._text_rows = {edge: 2 * ((sum(self._ends(edge)) - 1) // 2) + 1 for edge in labels}
        for edge, (width, _) in labels.items():
            self._slot(edge, self._text_rows[edge]).width = width
        order_rows(self._rows)
        self._arc_ports: dict[tuple[Edge, str], float] = {}
        for name in graph.levels:
            self._make_ports(name)
        place_rows(self._rows)
        texts = set(self._text_rows.values())
        # rows between boxes without any text are left out
        drawn = [row for row in range(len(self._rows)) if not row % 2 or row in texts]
        self._knots = {edge: self._knots_of(edge, drawn) for edge in self._chains}
        self._bottoms = self._stack(drawn)

    def layout(self) -> Layout:
        depths = self._graph.depths
        boxes = {
            name: Rectangle(slot.x, self._middle(2 * depths[name]), slot.width, self._box_height)
            for name, slot in self._levels.items()
        }
        labels = {
            edge: Rectangle(
                self._slot(edge, row := self._text_rows[edge]).x, self._middle(row), *size
            )
            for edge, size in self._labels.items()
        }
        lines = {edge: self._line(edge) for edge in self._graph.edges}
        return Layout(boxes, labels, lines)

    # what there is

    def _is_flat(self, edge: Edge) -> bool:
        return self._graph.depths[edge.source] == self._graph.depths[edge.target]

    def _ends(self, edge: Edge) -> tuple[int, int]:
        """The depths, the lower first."""
        low, high = sorted((self._graph.depths[edge.source], self._graph.depths[edge.target]))
        return low, high

    def _chain(self, edge: Edge) -> list[Link]:
        """The links from the lower level through all rows between to the upper one."""
        low, high = self._ends(edge)
        first, last = edge.source, edge.target
        if self._graph.depths[first] != low:
            first, last = last, first
        passes = [Slot() for _ in range(2 * low + 1, 2 * high)]
        for row, slot in enumerate(passes, 2 * low + 1):
            self._rows[row].append(slot)
        slots = [self._levels[first], *passes, self._levels[last]]
        inner = range(1, len(slots) - 2)
        return [
            Link(one, other, weight=4.0 if n in inner else 1.0)
            for n, (one, other) in enumerate(pairwise(slots))
        ]

    def _slot(self, edge: Edge, row: int) -> Slot:
        return self._chains[edge][row - 2 * self._ends(edge)[0]].low

    # where lines leave and arrive

    def _make_ports(self, name: str) -> None:
        """Spreads the lines over both sides of a box, which grows if it is too narrow.

        On the upper side arcs to the left come first and arcs to the right last, so that lines
        that go up cross none of them at the box, and nested arcs do not cross each other.
        """
        box = self._levels[name]
        arcs = [e for e in self._graph.edges if name in (e.source, e.target) and self._is_flat(e)]
        tops: list[tuple[tuple[float, ...], Link | Edge]] = [
            ((1, link.high.rank), link) for link in box.above
        ]
        for edge in arcs:
            other = self._levels[edge.target if edge.source == name else edge.source]
            side = 0 if other.rank < box.rank else 2
            number = self._graph.edges.index(edge)
            tops.append(((side, -other.rank, number * (side - 1)), edge))
        tops.sort(key=lambda top: top[0])
        bottoms = sorted(box.below, key=lambda link: link.low.rank)
        most = max(len(tops), len(bottoms))
        box.width = max(box.width, (most - 1) * _PORT + 2 * _INSET)
        for port, (_, line) in zip(_spread(len(tops), box.width), tops, strict=True):
            if isinstance(line, Edge):
                self._arc_ports[line, name] = port
            else:
                line.low_port = port
        for port, link in zip(_spread(len(bottoms), box.width), bottoms, strict=True):
            link.high_port = port

    # how high everything is

    def _height(self, row: int) -> float:
        return self._label_height if row % 2 else self._box_height + 2 * _STUB

    def _stack(self, rows: Sequence[int]) -> dict[int, float]:
        """The bottoms of rows; between two is more room the further lines go sideways."""
        shifts = dict.fromkeys(rows, 0.0)
        for knots in self._knots.values():
            for (row, x), (_, other) in pairwise(knots):
                shifts[row] = max(shifts[row], abs(x - other))
        bottoms = {0: 0.0}
        for row, above in pairwise(rows):
            least, largest = _BEND
            bend = min(max(least, _SLOPE * shifts[row]), largest)
            arcs = 0 if row % 2 else len(self._arcs(row // 2))
            gap = max(bend, (arcs + 1) * _ARC)
            bottoms[above] = bottoms[row] + self._height(row) + gap
        return bottoms

    def _knots_of(self, edge: Edge, rows: Sequence[int]) -> list[tuple[int, float]]:
        """The rows that an edge goes through, upwards, and where it does."""
        links, low = self._chains[edge], 2 * self._ends(edge)[0]
        passed = ((row, link.end) for row, link in enumerate(links, low + 1) if row in rows)
        return [(low, links[0].start), *passed]

    def _middle(self, row: int) -> float:
        return self._bottoms[row] + self._height(row) / 2

    def _arcs(self, depth: int) -> list[Edge]:
        """The edges between levels of a depth, the shortest first."""
        depths, levels = self._graph.depths, self._levels
        found = [e for e in self._graph.edges if self._is_flat(e) and depths[e.source] == depth]
        number = {edge: n for n, edge in enumerate(self._graph.edges)}
        spans = {e: abs(levels[e.source].rank - levels[e.target].rank) for e in found}
        # of two between the same levels the first has the outer ports
        return sorted(found, key=lambda edge: (spans[edge], -number[edge]))

    # lines

    def _line(self, edge: Edge) -> list[Point]:
        if self._is_flat(edge):
            return self._arc(edge)
        knots = self._knots[edge]
        (low, start), (high, end) = knots[0], knots[-1]
        points = [(start, self._middle(low) + self._box_height / 2)]
        for (row, x), (above, other) in pairwise(knots):
            leaves = (x, self._bottoms[row] + self._height(row))
            points += _bend(leaves, (other, self._bottoms[above]))
        points.append((end, self._middle(high) - self._box_height / 2))
        return points if 2 * self._graph.depths[edge.source] == low else points[::-1]

    def _arc(self, edge: Edge) -> list[Point]:
        depth = self._graph.depths[edge.source]
        start, end = (
            self._levels[name].x + self._arc_ports[edge, name]
            for name in (edge.source, edge.target)
        )
        top = self._bottoms[2 * depth] + self._height(2 * depth)
        rise = _ARC * (1 + self._arcs(depth).index(edge))
        edge_of_box = top - _STUB
        bow = _curve(
            (start, top), (start, top + rise * 4 / 3), (end, top + rise * 4 / 3), (end, top)
        )
        return [(start, edge_of_box), *bow, (end, edge_of_box)]


def _spread(count: int, width: float) -> list[float]:
    """Places on a side of a box, from its middle."""
    step = min(_WIDEST_PORT, (width - 2 * _INSET) / max(count - 1, 1))
    return [(n - (count - 1) / 2) * step for n in range(count)]


def _bend(start: Point, end: Point) -> list[Point]:
    """From a vertical line over to another."""
    middle = (start[1] + end[1]) / 2
    return _curve(start, (start[0], middle), (end[0], middle), end)


def _curve(*controls: Point) -> list[Point]:
    """Points of a cubic Bezier curve."""
    return [_bezier(controls, n / _SAMPLES) for n in range(_SAMPLES + 1)]


def _bezier(controls: Sequence[Point], t: float) -> Point:
    weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
    x, y = (
        sum(weight * point[axis] for weight, point in zip(weights, controls, strict=True))
        for axis in (0, 1)
    )
    return x, y
