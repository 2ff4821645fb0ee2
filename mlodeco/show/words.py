"""What the drawings of a graph have in common: words, colours, rows and edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlodeco.graph import Edge, EdgeKind, Graph

Methods = Mapping[tuple[str, str], str]
"""For each lower-to-upper edge (upper, lower), its method in words."""


@dataclass(frozen=True)
class Look:
    """How an edge of one kind is drawn: on the terminal, in a picture, in words."""

    mark: str
    style: str
    colour: str
    dots: str
    meaning: str


LOOKS = {
    EdgeKind.LOWER_TO_UPPER: Look(
        "^", "cyan", "#0b7285", "solid", "lower-to-upper, a best response and its method"
    ),
    EdgeKind.UPPER_TO_LOWER: Look(
        "v", "magenta", "#a61e8c", "solid", "upper-to-lower, a constant of the solve"
    ),
    EdgeKind.SIDEWAYS: Look("~", "yellow", "#9a6700", "dashed", "sideways, a constant"),
    EdgeKind.ORDERING: Look(".", "bright_black", "#6e7781", "dotted", "ordering only"),
}


def printable(name: str) -> str:
    """The name on one line: characters that do not print as Python writes them."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in name
    )


def rows(graph: Graph) -> list[tuple[int, list[str]]]:
    """Depths and their levels as declared, the highest first."""
    depths = graph.depths
    return [
        (depth, [name for name in graph.levels if depths[name] == depth])
        for depth in sorted(set(depths.values()), reverse=True)
    ]


def label(edge: Edge, methods: Methods) -> str:
    """The method of a lower-to-upper edge, else nothing."""
    if edge.kind is not EdgeKind.LOWER_TO_UPPER:
        return ""
    return methods.get((edge.target, edge.source), "")


def kinds(graph: Graph) -> list[EdgeKind]:
    """The kinds of edges that the graph has."""
    found = {edge.kind for edge in graph.edges}
    return [kind for kind in LOOKS if kind in found]
