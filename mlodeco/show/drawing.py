"""The dataflow graph as a person looks at it: text, a tree, a figure, Mermaid, Graphviz."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from mlodeco.graph import Edge, Graph, sees_more
from mlodeco.show.dot import to_dot
from mlodeco.show.figures import has_matplotlib, save_figure, to_svg
from mlodeco.show.mermaid import to_mermaid
from mlodeco.show.picture import draw_graph
from mlodeco.show.words import LOOKS, kinds, label, printable, rows

if TYPE_CHECKING:
    from mlodeco.show.figures import Figure

_SHOWN_PATHS = 12


class GraphView(Graph):
    """A graph that can be looked at: ``print(program.graph())``, or as a tree by rich, in colour.

    A notebook shows it as a picture, if matplotlib is installed.

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

    def to_mermaid(self) -> str:
        """The graph as a Mermaid flowchart, for a fenced block of a Markdown page.

        The highest levels are on top. Lower-to-upper edges have an arrowhead at their end and
        bear their methods, upper-to-lower ones in another colour have it in their middle;
        sideways edges are dashed, ordering alone is dotted.
        """
        return to_mermaid(self, self.methods)

    def to_dot(self) -> str:
        """The graph in Graphviz's language: ``dot -Tsvg``.

        The highest levels are on top. Lower-to-upper edges bear their methods, upper-to-lower
        ones have another colour; sideways edges are dashed, ordering alone is dotted.
        """
        return to_dot(self, self.methods)

    def draw(self) -> Figure:
        """The graph as a figure of matplotlib, as large as it needs to be.

        A row for each depth, the highest on top. Lower-to-upper edges are solid, with filled
        arrowheads, and bear their methods; upper-to-lower ones are dashed, with hollow ones;
        sideways edges and ordering alone are thin. No line crosses a box or a text of another.

        Raises:
            RunError: matplotlib is not installed.
        """
        return draw_graph(self, self.methods)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the figure of :meth:`draw`, as its ending says: ``.svg``, ``.png`` or ``.pdf``.

        The same graph gives the same file. In SVG the texts are texts.

        Raises:
            RunError: the file has another ending or cannot be written, or matplotlib is not
                installed.
        """
        return save_figure(self.draw(), path)

    def _repr_svg_(self) -> str | None:
        return to_svg(self.draw()) if has_matplotlib() else None

    def __str__(self) -> str:
        lines: list[str] = []
        for name in reversed(self.order):
            lines.append(printable(name))
            lines += [f"  {self._edge_text(edge).plain}" for edge in self._edges_to(name)]
        lines.append("")
        for title, *paths in self._path_texts():
            lines += [title, *(f"  {path}" for path in paths)]
        return "\n".join(lines).rstrip("\n")

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> RenderableType:
        tree = Tree(self._legend(), guide_style="bright_black")
        for depth, names in rows(self):
            row = tree.add(Text(f"depth {depth}", style="bright_black"))
            for name in names:
                branch = row.add(Text(printable(name), style="bold"))
                for edge in self._edges_to(name):
                    branch.add(self._edge_text(edge))
        for title, *paths in self._path_texts():
            branch = tree.add(Text(title))
            for path in paths:
                branch.add(Text(path))
        return tree

    def _edges_to(self, name: str) -> list[Edge]:
        return [edge for edge in self.edges if edge.target == name]

    def _legend(self) -> Text:
        found = kinds(self)
        text = Text("levels, and under each what it reads")
        for number, kind in enumerate(found):
            text.append(", " if number else ": ")
            text.append(f"{LOOKS[kind].mark} {kind.value}", style=LOOKS[kind].style)
        return text

    def _edge_text(self, edge: Edge) -> Text:
        method = label(edge, self.methods)
        words = f"{edge.kind.value}, {printable(method)}" if method else edge.kind.value
        look = LOOKS[edge.kind]
        return Text(f"{look.mark} {printable(edge.source)}  ({words})", style=look.style)

    def _path_texts(self) -> Iterator[list[str]]:
        """For each level with paths a title and these; then one or two for the others."""
        without: dict[bool, list[str]] = {True: [], False: []}
        for name in reversed(self.order):
            first = list(islice(self.walk_paths(name), _SHOWN_PATHS + 1))
            if first:
                shown = [" -> ".join(map(printable, path)) for path in first[:_SHOWN_PATHS]]
                more = ["..."] if len(first) > _SHOWN_PATHS else []
                yield [f"paths of {printable(name)}:", *shown, *more]
            elif self.lower[name]:
                more_by_nesting = sees_more(self, name, lambda upper, low: True)
                without[more_by_nesting].append(printable(name))
        for more_by_nesting, names in without.items():
            if names:
                whose = "its hypergradient is" if len(names) == 1 else "their hypergradients are"
                end = "; nested=True sees more" if more_by_nesting else ""
                yield [f"paths of {', '.join(names)}: none, {whose} the direct gradient{end}"]
