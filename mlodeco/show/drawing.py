"""The dataflow graph as text."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from rich.console import Group, RenderableType
from rich.text import Text

from mlodeco.graph import EdgeKind, Graph

_MARKS = {
    EdgeKind.LOWER_TO_UPPER: ("^", "cyan"),
    EdgeKind.UPPER_TO_LOWER: ("v", "magenta"),
    EdgeKind.SIDEWAYS: ("~", "yellow"),
    EdgeKind.ORDERING: (".", "bright_black"),
}
_SHOWN_PATHS = 12


class GraphView(Graph):
    """A graph that can be looked at: ``print(program.graph())``, or shown by rich in colour.

    Levels are listed with the highest first. Under each stand the levels that it reads:
    ``^`` lower to upper (a best response flows up, with its method), ``v`` upper to lower
    (a constant of the solve), ``~`` sideways (a constant), ``.`` ordering only.

    Args:
        graph: the graph.
        methods: for each lower-to-upper edge (upper, lower), the method in words.
    """

    def __init__(self, graph: Graph, methods: Mapping[tuple[str, str], str]) -> None:
        super().__init__(graph.lower, graph.reads)
        self.methods = dict(methods)

    def __str__(self) -> str:
        return "\n".join(text.plain for text in self._lines())

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> RenderableType:
        return Group(*self._lines())

    def _lines(self) -> list[Text]:
        lines: list[Text] = []
        for name in reversed(self.order):
            lines.append(Text(name, style="bold"))
            for edge in self.edges:
                if edge.target == name:
                    lines.append(self._edge_line(edge.source, name, edge.kind))
        lines.append(Text(""))
        for name in reversed(self.order):
            if self.lower[name]:
                lines.extend(self._path_lines(name))
        return lines

    def _edge_line(self, source: str, target: str, kind: EdgeKind) -> Text:
        mark, colour = _MARKS[kind]
        method = self.methods.get((target, source))
        detail = f", {method}" if kind is EdgeKind.LOWER_TO_UPPER and method else ""
        return Text(f"  {mark} {source}  ({kind.value}{detail})", style=colour)

    def _path_lines(self, name: str) -> list[Text]:
        first = list(islice(self.walk_paths(name), _SHOWN_PATHS + 1))
        if not first:
            return [Text(f"paths of {name}: none, its hypergradient is the direct gradient")]
        lines = [Text(f"paths of {name}:")]
        lines += [Text("  " + " -> ".join(path)) for path in first[:_SHOWN_PATHS]]
        if len(first) > _SHOWN_PATHS:
            lines.append(Text("  ..."))
        return lines
