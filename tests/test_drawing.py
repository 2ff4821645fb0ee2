"""Drawings of a graph, read back by small parsers: Graphviz, Mermaid, the tree, the text."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlodeco import Program
from mlodeco.graph import EdgeKind, Graph
from mlodeco.show import GraphView
from tests.test_graph import declare_figure_one, graphs, ladder

UP, DOWN = EdgeKind.LOWER_TO_UPPER, EdgeKind.UPPER_TO_LOWER
SIDE, TURN = EdgeKind.SIDEWAYS, EdgeKind.ORDERING
TRIANGLE = "\N{BLACK DOWN-POINTING TRIANGLE}"


def depths(graph):
    """By a definition of their own: how often the levels without lowers can be taken away."""
    found, left = {}, set(graph.levels)
    while left:
        bottom = {name for name in left if not left & set(graph.lower[name])}
        row = 1 + max(found.values(), default=-1)
        found.update(dict.fromkeys(bottom, row))
        left -= bottom
    return found


def shown(text):
    """How a name looks: on one line, and what does not print spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


@dataclass
class Picture:
    """What a parser finds: names by node, drawn edges as (source, target, colour, line, text)."""

    names: dict[str, str] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    edges: list[tuple[str, str, str, str, str]] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)


# Graphviz


TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\.)*")|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>\d+)"""
    r"""|(?P<sign>->|[{}\[\];=,]))""",
    re.VERBOSE | re.DOTALL,
)


def dot_tokens(text):
    place, found = 0, []
    while text[place:].strip():
        match = TOKEN.match(text, place)
        assert match, f"no token at {text[place : place + 40]!r}"
        found.append(match[0].strip())
        place = match.end()
    return found


def unquoted(token):
    """What Graphviz shows for a string: escapes undone, then entities."""
    assert token.startswith('"')
    body = token[1:-1]
    assert not re.search(r"\\[^\"\\]", body.replace("\\\\", "")), "an escape with a meaning"
    return html.unescape(re.sub(r"\\(.)", r"\1", body))


class DotParser:
    """``digraph ID { ... }`` with statements for nodes, edges, attributes and subgraphs."""

    def __init__(self, text):
        self.tokens = dot_tokens(text)
        self.nodes, self.edges, self.ranks, self.attributes = {}, [], [], {}
        assert self.take() == "digraph"
        self.take()
        self.block("", {})
        assert not self.tokens

    def take(self, wanted=None):
        token = self.tokens.pop(0)
        assert wanted is None or token == wanted, (token, wanted)
        return token

    def block(self, where, inherited):
        self.take("{")
        own, members = {}, []
        while self.tokens[0] != "}":
            first = self.tokens[0]
            if first == "{":
                self.block(where, inherited)
            elif first == "subgraph":
                self.take()
                self.block(self.take(), {})
            else:
                self.take()
                if self.tokens[0] == "=":
                    self.take()
                    own[first] = self.take()
                elif self.tokens[0] == "->":
                    self.take()
                    target = self.take()
                    self.edges.append((where, first, target, self.options()))
                else:
                    options = self.options()
                    if first not in ("node", "edge", "graph"):
                        members.append(first)
                        if options:
                            self.nodes[first] = (where, options)
            if self.tokens[0] == ";":
                self.take()
        self.take("}")
        if own.get("rank") == "same":
            self.ranks.append((where, members))
        else:
            self.attributes[where] = own

    def options(self):
        found = {}
        if self.tokens[0] == "[":
            self.take()
            while self.tokens[0] != "]":
                key = self.take()
                self.take("=")
                found[key] = self.take()
                if self.tokens[0] != "]":
                    self.take(",")
            self.take("]")
        return found


def read_dot(text):
    parsed = DotParser(text)
    picture = Picture()
    ids = {n for n in parsed.nodes if n.startswith("n")}
    picture.names = {n: unquoted(parsed.nodes[n][1]["label"]) for n in ids}
    anchors = {n for n in parsed.nodes if n.startswith("d")}
    drawn = [e for e in parsed.edges if not e[0] and e[3]["style"] != "invis"]
    for _, source, target, options in drawn:
        assert options["color"] == options["fontcolor"]
        look = (unquoted(options["color"]), options["style"])
        text = unquoted(options["label"]) if "label" in options else ""
        assert {source, target} <= ids
        picture.edges.append((source, target, *look, text))
    # rows: sets of one rank, one anchor in each, and the anchors in an invisible chain
    assert parsed.attributes[""]["rankdir"] == "BT"
    sets = {
        anchor: [m for m in members if m != anchor]
        for where, members in parsed.ranks
        if not where
        for anchor in members
        if anchor in anchors
    }
    chain = {s: t for where, s, t, o in parsed.edges if not where and o["style"] == "invis"}
    bottom = next(a for a in anchors if a not in chain.values())
    while bottom:
        picture.rows.append(sets[bottom])
        bottom = chain.get(bottom)
    # only what goes up has a say in the ranks
    place = {n: row for row, members in enumerate(picture.rows) for n in members}
    for where, source, target, options in parsed.edges:
        if not where and source in ids and options.get("constraint") != "false":
            assert place[source] < place[target]
    for where, _, target, options in parsed.edges:
        if where == "cluster_legend" and options["style"] != "invis":
            meaning = unquoted(parsed.nodes[target][1]["label"])
            picture.legend.append((unquoted(options["color"]), options["style"], meaning))
    return picture


# Mermaid


NODE = re.compile(r'  (\w+)(?:\["([^"]*)"\]|(\(\(" "\)\)))')
LINK = re.compile(r'  (\w+) (-{2,})(>|-)(?:\|"([^"|]+)"\|)? (\w+)')
STYLE = re.compile(
    r"  linkStyle (\d+(?:,\d+)*) stroke:(#[0-9a-f]{6}),color:(#[0-9a-f]{6})"
    r"(?:,stroke-dasharray:(\d+ \d+))?"
)
DASHES = {None: "solid", "8 4": "dashed", "2 4": "dotted"}


def entities(text):
    """What Mermaid shows for a label; nothing but plain words stands beside the entities."""
    rest = re.sub(r"#\d+;", "", text)
    assert all(c.isalnum() or c in " -_," for c in rest), text
    return re.sub(r"#(\d+);", lambda found: chr(int(found[1])), text)


def read_mermaid(text):
    first, *lines = text.split("\n")
    assert first == "flowchart BT"
    picture, links, looks, points, in_legend = Picture(), [], {}, set(), False
    for line in lines:
        if line == '  subgraph legend["legend"]':
            in_legend = True
        elif line == "  direction BT":
            assert in_legend
        elif line == "  end":
            assert in_legend
            in_legend = False
        elif found := NODE.fullmatch(line):
            name, title, point = found.groups()
            if point:
                points.add(name)
            elif not in_legend:
                assert name not in picture.names
                picture.names[name] = entities(title)
        elif found := LINK.fullmatch(line):
            low, dashes, head, title, high = found.groups()
            # the arrowhead counts as one character of a link: --> and --- are of length 1
            links.append((low, high, len(dashes) - 1, head, entities(title or ""), in_legend))
        else:
            found = STYLE.fullmatch(line)
            assert found, line
            assert found[2] == found[3]
            for number in found[1].split(","):
                assert int(number) not in looks
                looks[int(number)] = found[2], DASHES[found[4]]
    assert set(looks) == set(range(len(links)))
    rank = mermaid_ranks([*picture.names, *points], links)
    for row in range(max(rank[n] for n in picture.names) + 1):
        picture.rows.append([n for n in picture.names if rank[n] == row])
    halves = {}
    for number, (low, high, _, head, title, is_legend) in enumerate(links):
        if is_legend:
            picture.legend.append((*looks[number], title.removeprefix(f"{TRIANGLE} ")))
        elif high in points:
            halves.setdefault((high, *looks[number]), {})[head] = low
            assert title == (TRIANGLE if head == "-" else "")
        elif head == "-":
            assert title == TRIANGLE
            picture.edges.append((high, low, *looks[number], ""))
        else:
            picture.edges.append((low, high, *looks[number], title))
    picture.edges += [(h[">"], h["-"], *look, "") for (_, *look), h in halves.items()]
    assert len(halves) == len(points)
    return picture


def mermaid_ranks(nodes, links):
    """The rows of a layered layout: no link shorter than its length, and none longer here."""
    rank = dict.fromkeys(nodes, 0)
    for _ in nodes:
        for low, high, length, _, _, is_legend in links:
            if not is_legend:
                rank[high] = max(rank[high], rank[low] + length)
    for low, high, length, _, _, is_legend in links:
        assert is_legend or rank[high] == rank[low] + length, "no such rows, or not tight"
    return rank


# what every drawing shows


READERS = {"dot": (GraphView.to_dot, read_dot), "mermaid": (GraphView.to_mermaid, read_mermaid)}


def check_picture(view, form):
    write, read = READERS[form]
    picture = read(write(view))
    assert sorted(picture.names.values()) == sorted(shown(name) for name in view.levels)
    depth = depths(view)
    by_row = [sorted(picture.names[n] for n in row) for row in picture.rows]
    wanted = [
        sorted(shown(n) for n in view.levels if depth[n] == row)
        for row in range(1 + max(depth.values()))
    ]
    assert by_row == wanted
    look = {}
    names = {shown(name): name for name in view.levels}
    kinds = {(e.source, e.target): e.kind for e in view.edges}
    assert len(picture.edges) == len(kinds)
    for source, target, colour, line, text in picture.edges:
        edge = names[picture.names[source]], names[picture.names[target]]
        kind = kinds.pop(edge)
        look.setdefault(kind, set()).add((colour, line))
        method = view.methods.get((edge[1], edge[0]), "") if kind is UP else ""
        assert text == shown(method)
    assert not kinds
    lines = {UP: "solid", DOWN: "solid", SIDE: "dashed", TURN: "dotted"}
    for kind, looks in look.items():
        ((colour, line),) = looks
        assert line == lines[kind]
        mine = [text for c, ln, text in picture.legend if (c, ln) == (colour, line)]
        assert len(mine) == 1
        assert mine[0].startswith(kind.value)
    assert len({colour for ((colour, _),) in look.values()}) == len(look)
    assert len(picture.legend) == len(look)


NAMES = ["end", 'a"b', "a\\", "\\N", "<b>&lt;", "x\ny", "style: #foo; bar", "1. x", "__init__"]
NAMES += ["[x]", "graph TD;", "%% c", "`m`", "\u540d", "- a", "a\tb|c", "n0", "legend", "low"]
NAMES += ["&amp;#34;", "#quot;", "\x1b[31m", "x -->|y| z", 'x"];', "\ud800", "  ", "{", "d1"]


def odd_view():
    lower = {name: NAMES[:number][-2:] for number, name in enumerate(NAMES)}
    reads = {
        name: NAMES[:number][-3:] + NAMES[number + 1 : number + 2]
        for number, name in enumerate(NAMES)
    }
    methods = {(a, b): f"<lambda> {b}" for a in NAMES for b in NAMES}
    return GraphView(Graph(lower, reads), methods)


def twelve():
    """A ladder with a level aside and one on top that waits for another."""
    rungs = ladder(3)
    lower = {**rungs.lower, "aside": (), "top": ("0", "3")}
    reads = {**rungs.reads, "left1": ("right1", "0"), "aside": ("left3", "top"), "top": ("left1",)}
    return GraphView(Graph(lower, reads), {("3", "left3"): "Neumann", ("top", "left1"): "CG"})


VIEWS = {
    "figure_1": lambda: declare_figure_one().graph(),
    "twelve_levels": twelve,
    "odd_names": odd_view,
    "one_level": lambda: GraphView(Graph({"x": ()}, {}), {}),
    "apart": lambda: GraphView(Graph({"a": (), "b": (), "c": ("b",)}, {"c": ("b",)}), {}),
    "both_sideways": lambda: GraphView(Graph({"a": (), "b": ()}, {"a": ("b",), "b": ("a",)}), {}),
}


@pytest.mark.parametrize("form", READERS)
@pytest.mark.parametrize("view", VIEWS)
def test_pictures_hold_each_level_row_edge_method_and_a_legend(view, form):
    check_picture(VIEWS[view](), form)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(graphs(), st.sampled_from(sorted(READERS)))
def test_pictures_of_any_graph(graph, form):
    methods = {(e.target, e.source): f"{e.source}{e.target}" for e in graph.edges}
    check_picture(GraphView(graph, methods), form)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(min_size=1), st.text(min_size=1), st.sampled_from(sorted(READERS)))
def test_pictures_with_any_names(low, top, form):
    if shown(low) == shown(top):
        return
    view = GraphView(
        Graph({low: (), top: (low,)}, {low: (top,), top: (low,)}), {(top, low): low + top}
    )
    check_picture(view, form)


def test_graphviz_accepts_what_it_is_given():
    graphviz = pytest.importorskip("graphviz")
    for make in VIEWS.values():
        try:
            graphviz.Source(make().to_dot()).pipe(format="svg")
        except graphviz.backend.ExecutableNotFound:
            pytest.skip("no dot on this machine")


def test_methods_and_closed_edges_are_named():
    graph = declare_figure_one().graph()
    for text in (graph.to_dot(), graph.to_mermaid()):
        for method in ("CG", "Identity", "Neumann"):
            assert text.count(f'"{method}"') == 1
    program = Program()
    common = {"module": {"x": torch.ones(2)}}
    program.level("low", **common)(lambda own, top: (own.x * top.x).sum())
    program.level("top", lower=["low"], hypergrad=None, **common)(
        lambda own, low: (own.x * low.x).sum()
    )
    assert '"direct gradient only"' in program.graph().to_dot()
    assert '"direct gradient only"' in program.graph().to_mermaid()


def test_depth_is_the_longest_chain_below():
    graph = Graph({"a": (), "b": ("a",), "c": ("a", "b"), "d": ()}, {})
    assert graph.depths == {"a": 0, "b": 1, "c": 2, "d": 0}


# the terminal


def lines_of(view, **options):
    console = Console(file=io.StringIO(), width=100, force_terminal=True, **options)
    console.print(view)
    return console.file.getvalue().splitlines()


def plain(line):
    return re.sub(r"\x1b\[[\d;]*m", "", line)


def test_the_tree_holds_rows_levels_and_edges_by_depth():
    tree = [plain(line) for line in lines_of(declare_figure_one().graph(), color_system="standard")]
    assert tree == [
        "levels, and under each what it reads: ^ lower-to-upper, v upper-to-lower",
        "├── depth 2",
        "│   └── four",
        "│       └── ^ three  (lower-to-upper, CG)",
        "├── depth 1",
        "│   └── three",
        "│       ├── ^ one  (lower-to-upper, Identity)",
        "│       ├── ^ two  (lower-to-upper, Neumann)",
        "│       └── v four  (upper-to-lower)",
        "├── depth 0",
        "│   ├── one",
        "│   │   ├── v three  (upper-to-lower)",
        "│   │   └── v four  (upper-to-lower)",
        "│   └── two",
        "├── paths of four:",
        "│   ├── four -> three -> four",
        "│   └── four -> one -> three -> four",
        "└── paths of three:",
        "    └── three -> one -> three",
    ]


def test_the_tree_has_a_colour_for_each_kind_and_marks_them_without_colour():
    view = VIEWS["twelve_levels"]()
    lines = lines_of(view, color_system="standard")
    colours = {}
    for line in lines[3:]:
        for kind in EdgeKind:
            if f"({kind.value}" in line:
                colours.setdefault(kind, set()).add(re.findall(r"\x1b\[([\d;]+)m", line)[-2])
    assert set(colours) == set(EdgeKind)
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 4
    marks = Counter(
        match[1]
        for line in lines_of(view, no_color=True)
        if (match := re.search(r"─ (.) .*\(", line))
    )
    kinds = Counter(edge.kind for edge in view.edges)
    assert marks == {"^": kinds[UP], "v": kinds[DOWN], "~": kinds[SIDE], ".": kinds[TURN]}


def test_names_are_shown_as_they_are_and_never_as_markup_or_escapes():
    tree = "\n".join(lines_of(odd_view(), color_system=None, no_color=True))
    for text in (tree, str(odd_view())):
        assert "\x1b[31m" not in text
        for name in ("[x]", "\\x1b[31m", "x\\ny", "a\\tb|c", "<b>&lt;"):
            assert name in text


def test_the_text_of_many_levels_is_short():
    text = str(twelve())
    assert max(len(line) for line in text.splitlines() if ": none" not in line) < 80
    assert len(re.findall(r"^paths of .*none", text, re.MULTILINE)) == 1
    assert repr(twelve()) == text


def test_pictures_are_printable_anywhere():
    graph = declare_figure_one().graph()
    for text in (graph.to_mermaid(), graph.to_dot(), str(graph)):
        text.encode("ascii")
