"""The dataflow graph in Graphviz's language."""

from __future__ import annotations

from mlodeco.graph import EdgeKind, Graph
from mlodeco.show.words import LOOKS, Methods, kinds, label, printable, rows


def to_dot(graph: Graph, methods: Methods) -> str:
    """A digraph: a row for each depth, the highest on top.

    Only what goes from a lower level to an upper one has a say in the layout; rows are tied
    together by an invisible chain.
    """
    ids = {name: f"n{number}" for number, name in enumerate(graph.levels)}
    lines = [
        "digraph levels {",
        "  rankdir=BT;",
        '  node [shape=box, style=rounded, fontname="Helvetica"];',
        '  edge [fontname="Helvetica", fontsize=10];',
    ]
    lines += [f"  {ids[name]} [label={_quoted(name)}];" for name in graph.levels]
    for depth, names in rows(graph):
        members = "; ".join(ids[name] for name in names)
        lines += [
            f'  d{depth} [label="depth {depth}", shape=plaintext, fontcolor=gray];',
            f"  {{ rank=same; d{depth}; {members}; }}",
        ]
        if depth:
            lines.append(f"  d{depth - 1} -> d{depth} [style=invis];")
    for edge in graph.edges:
        look = _look(edge.kind)
        method = label(edge, methods)
        if method:
            look += f", label={_quoted(method)}"
        if edge.kind in (EdgeKind.UPPER_TO_LOWER, EdgeKind.SIDEWAYS):
            look += ", constraint=false"
        lines.append(f"  {ids[edge.source]} -> {ids[edge.target]} [{look}];")
    return "\n".join([*lines, *_legend(graph), "}"])


def _legend(graph: Graph) -> list[str]:
    found = kinds(graph)
    if not found:
        return []
    lines = ["  subgraph cluster_legend {", '    label="legend"; fontname="Helvetica"; color=gray;']
    for number, kind in enumerate(found):
        meaning = _quoted(LOOKS[kind].meaning)
        lines += [
            f'    f{number} [label="", shape=point];',
            f"    t{number} [label={meaning}, shape=plaintext, fontsize=10];",
            f"    {{ rank=same; f{number}; t{number}; }}",
            f"    f{number} -> t{number} [{_look(kind)}];",
        ]
        if number:
            lines.append(f"    f{number} -> f{number - 1} [style=invis];")
    return [*lines, "  }"]


def _look(kind: EdgeKind) -> str:
    look = LOOKS[kind]
    return f'color="{look.colour}", fontcolor="{look.colour}", style={look.dots}'


def _quoted(text: str) -> str:
    """A string of DOT that is shown as the text: quotes, escapes and entities are no such."""
    plain = printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return f'"{plain}"'
