"""The dataflow graph in Mermaid's language, which Markdown pages render."""

from __future__ import annotations

from mlodeco.graph import Edge, EdgeKind, Graph
from mlodeco.show.words import LOOKS, Methods, kinds, label, printable, rows

_DASHES = {"solid": "", "dashed": ",stroke-dasharray:8 4", "dotted": ",stroke-dasharray:2 4"}
_DOWN = "#9660;"
"""A triangle that points down, as an entity, which any stdout can print."""


def to_mermaid(graph: Graph, methods: Methods) -> str:
    """A flowchart: a row for each depth, the highest on top.

    Mermaid ranks by links alone and takes those of a cycle in any order. So every link is
    written from the lower level to the higher one, as long as the depths are apart; what flows
    down has its arrowhead in the middle of the link. Two levels of one depth are joined by way
    of a point above them.
    """
    ids = {name: f"n{number}" for number, name in enumerate(graph.levels)}
    drawing = _Drawing()
    drawing.lines.append("flowchart BT")
    for _, names in rows(graph):
        drawing.lines += [f'  {ids[name]}["{_escaped(name)}"]' for name in names]
    for edge in graph.edges:
        drawing.add(edge, ids, graph.depths, label(edge, methods))
    drawing.add_legend(kinds(graph))
    return "\n".join([*drawing.lines, *drawing.styles()])


class _Drawing:
    """Lines, and the kinds of the links in their order, by which Mermaid styles them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._links: list[EdgeKind] = []
        self._points = 0

    def add(self, edge: Edge, ids: dict[str, str], depths: dict[str, int], text: str) -> None:
        source, target = ids[edge.source], ids[edge.target]
        distance = depths[edge.target] - depths[edge.source]
        if distance > 0:
            self._link(edge.kind, source, target, distance, ">", _escaped(text))
        elif distance < 0:
            self._link(edge.kind, target, source, -distance, "-", _DOWN)
        else:
            point = f"p{self._points}"
            self._points += 1
            self.lines.append(f'  {point}((" "))')
            self._link(edge.kind, source, point, 1, ">", "")
            self._link(edge.kind, target, point, 1, "-", _DOWN)

    def add_legend(self, found: list[EdgeKind]) -> None:
        if not found:
            return
        self.lines += [
            '  subgraph legend["legend"]',
            "  direction BT",
            '  low["lower level"]',
            '  up["upper level"]',
        ]
        for kind in found:
            down = kind is EdgeKind.UPPER_TO_LOWER
            text = f"{_DOWN} {LOOKS[kind].meaning}" if down else LOOKS[kind].meaning
            self._link(kind, "low", "up", 1, "-" if down else ">", text)
        self.lines.append("  end")

    def styles(self) -> list[str]:
        """A line for each kind of link."""
        lines = []
        for kind in dict.fromkeys(self._links):
            numbers = ",".join(str(n) for n, other in enumerate(self._links) if other is kind)
            look = LOOKS[kind]
            dashes = _DASHES[look.dots]
            lines.append(f"  linkStyle {numbers} stroke:{look.colour},color:{look.colour}{dashes}")
        return lines

    def _link(
        self, kind: EdgeKind, low: str, high: str, distance: int, head: str, text: str
    ) -> None:
        named = f'|"{text}"|' if text else ""
        self.lines.append(f"  {low} {'-' * (distance + 1)}{head}{named} {high}")
        self._links.append(kind)


def _escaped(text: str) -> str:
    """The text with all but letters, digits and single joints between them as entities."""
    plain = printable(text)
    around = zip([" ", *plain], plain, [*plain[1:], " "], strict=False)
    return "".join(
        char
        if char.isalnum() or (char in " _-" and before.isalnum() and after.isalnum())
        else f"#{ord(char)};"
        for before, char, after in around
    )
