"""Graphs as figures: what is where, no two things on top of each other, the files."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.patches import FancyBboxPatch
from PIL import Image

from mlodeco.errors import RunError
from mlodeco.graph import EdgeKind, Graph
from mlodeco.show import FORMATS, GraphView, save_figure
from mlodeco.show.figures import make_figure, styled
from mlodeco.show.layout import lay_out
from mlodeco.show.slots import GAP, Link, Slot, count_crossings, order_rows, place_rows
from tests.test_drawing import NAMES, VIEWS, depths, shown
from tests.test_graph import declare_figure_one, graphs

UP, DOWN = EdgeKind.LOWER_TO_UPPER, EdgeKind.UPPER_TO_LOWER
SIDE, TURN = EdgeKind.SIDEWAYS, EdgeKind.ORDERING


def chain(size):
    """Levels above each other, each of which reads the two below; two read the highest."""
    names = [f"level_{n}" for n in range(size)]
    lower = {name: names[max(n - 2, 0) : n] for n, name in enumerate(names)}
    reads = {
        name: [*lower[name], *names[-1:]] if n % 4 == 0 else lower[name]
        for n, name in enumerate(names[:-1])
    }
    reads[names[-1]] = lower[names[-1]]
    return GraphView(Graph(lower, reads), {(b, a): "Neumann" for a in names for b in names})


def two_uppers():
    lower = {"classifier": (), "reweight": ("classifier",), "correct": ("classifier",)}
    reads = {**lower, "classifier": ("reweight", "correct")}
    methods = {("reweight", "classifier"): "Identity(scale=0.1)", ("correct", "classifier"): "CG"}
    return GraphView(Graph(lower, reads), methods)


def plain_names():
    """Names that mean something to matplotlib, and one that is long."""
    names = ["a$x$", "_b", "\\alpha", "l" * 60, "\u00fcb\u00e9r", "{c}^2", "%d", "<&>"]
    lower = {name: names[max(n - 3, 0) : n : 2] for n, name in enumerate(names)}
    reads = {name: [*lower[name], *names[n + 1 : n + 2]] for n, name in enumerate(names)}
    return GraphView(Graph(lower, reads), {(b, a): f"${a}$" for a in names for b in names})


VIEWS = {
    **{name: make for name, make in VIEWS.items() if name != "odd_names"},
    "chain": lambda: chain(12),
    "two_uppers": two_uppers,
    "plain_names": plain_names,
    "three_in_a_row": lambda: GraphView(
        Graph({"a": (), "b": (), "c": ()}, {"a": ("b", "c"), "b": ("a",), "c": ("a", "b")}), {}
    ),
}


def overlap(one, other, slack=0.0):
    """Whether two rectangles (left, bottom, right, top) share more than the slack."""
    return (
        min(one[2], other[2]) - max(one[0], other[0]) > slack
        and min(one[3], other[3]) - max(one[1], other[1]) > slack
    )


def within(one, other):
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


def crosses(points, rectangle):
    """Whether a line of many points comes into a rectangle."""
    fine = [
        np.linspace(one, other, 8) for one, other in itertools.pairwise(np.asarray(points, float))
    ]
    x, y = np.concatenate(fine).T
    left, bottom, right, top = rectangle
    return bool(((x > left) & (x < right) & (y > bottom) & (y < top)).any())


def corners(spot):
    return (
        spot.x - spot.width / 2,
        spot.y - spot.height / 2,
        spot.x + spot.width / 2,
        spot.y + spot.height / 2,
    )


# where things are


def check_layout(graph, layout, labels):
    boxes = {name: corners(spot) for name, spot in layout.boxes.items()}
    texts = {edge: corners(spot) for edge, spot in layout.labels.items()}
    assert boxes.keys() == set(graph.levels)
    assert texts.keys() == labels.keys()
    assert layout.lines.keys() == set(graph.edges)
    for one, other in itertools.combinations([*boxes.values(), *texts.values()], 2):
        assert not overlap(one, other)
    depth = depths(graph)
    heights = {(depth[name], spot.y) for name, spot in layout.boxes.items()}
    assert [row for row, _ in sorted(heights, key=lambda found: found[1])] == list(
        range(len(heights))
    )
    starts = []
    for edge, points in layout.lines.items():
        for end, name in ((points[0], edge.source), (points[-1], edge.target)):
            left, bottom, right, top = boxes[name]
            assert left < end[0] < right
            assert end[1] == pytest.approx(bottom) or end[1] == pytest.approx(top)
            starts.append((name, *np.round(end, 6)))
        for box in boxes.values():
            assert not crosses(points, np.add(box, [1e-6, 1e-6, -1e-6, -1e-6]))
        for other, text in texts.items():
            assert crosses(points, text) == (other == edge)
    assert len(set(starts)) == len(starts), "two lines leave a box at one point"


@settings(derandomize=True, deadline=None, max_examples=25)
@given(graphs(), st.data())
def test_no_line_meets_what_is_not_its_own(graph, data):
    sizes = st.tuples(st.floats(1, 150), st.floats(5, 30))
    boxes = {name: data.draw(sizes) for name in graph.levels}
    labels = {edge: data.draw(sizes) for edge in graph.edges if edge.kind is UP}
    layout = lay_out(graph, boxes, labels)
    check_layout(graph, layout, labels)
    for name, (width, height) in boxes.items():
        assert layout.boxes[name].width >= width
        assert layout.boxes[name].height >= height


def rows_of(sizes, pairs, weights=(1.0,) * 9):
    """Rows of slots, and links between slots of neighbouring rows."""
    rows = [[Slot(width) for width in row] for row in sizes]
    for row, low, high in pairs:
        Link(rows[row][low], rows[row + 1][high], weights[row])
    return rows


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_crossings_are_counted_and_become_no_more(pairs):
    rows = rows_of([[0.0] * 5] * 3, pairs)
    links = [link for row in rows for slot in row for link in slot.above]

    def brute_force():
        place = {id(slot): n for row in rows for n, slot in enumerate(row)}
        level = {id(slot): r for r, row in enumerate(rows) for slot in row}
        return sum(
            level[id(a.low)] == level[id(b.low)]
            and (place[id(a.low)] - place[id(b.low)]) * (place[id(a.high)] - place[id(b.high)]) < 0
            for a, b in itertools.combinations(links, 2)
        )

    before = brute_force()
    order_rows(rows)
    assert count_crossings(rows) == brute_force() <= before


@pytest.mark.parametrize("ends", list(itertools.permutations(range(4))))
def test_lines_that_need_not_cross_do_not(ends):
    rows = rows_of([[0.0] * 4] * 2, [(0, low, high) for low, high in enumerate(ends)])
    order_rows(rows)
    assert count_crossings(rows) == 0


def test_a_line_bends_where_it_matters_least():
    """From the left of a wide box to the right of another: at the ends, where weights are 1."""
    sizes = [[0.0, 186.0], *[[0.0, 0.0]] * 5, [186.0, 0.0]]
    held = [(0, 1, 1), *((row, 1, 1) for row in range(1, 5)), (5, 1, 0)]
    free = [(row, 0, 0) for row in range(5)] + [(5, 0, 1)]
    rows = rows_of(sizes, free, [1, 4, 4, 4, 4, 1])
    for row, low, high in held:
        Link(rows[row][low], rows[row + 1][high], 1000.0)
    place_rows(rows)
    inner = [row[0] for row in rows[1:6]]
    assert max(slot.x for slot in inner) - min(slot.x for slot in inner) < 1
    # the wide boxes stand above each other, each end beside its own
    assert rows[6][1].x - rows[0][0].x == pytest.approx(186 + 2 * GAP, abs=1)
    assert rows[0][0].x - 1 < inner[0].x < rows[6][1].x + 1
    for row in rows:
        for left, right in itertools.pairwise(row):
            assert right.x - left.x >= (left.width + right.width) / 2 + GAP - 1e-9


# the figure


def in_points(figure, extent):
    scale = 72 / figure.dpi
    return tuple(scale * value for value in extent.extents)


def check_figure(view):
    figure = view.draw()
    (axes,) = figure.axes
    page = (0, 0, *(72 * figure.get_size_inches()))
    texts = [(text.get_text(), in_points(figure, text.get_window_extent())) for text in axes.texts]
    visible = [(text, place) for text, place in texts if text.strip()]
    for _, place in visible:
        assert within(place, page)
    for one, other in itertools.combinations(visible, 2):
        assert not overlap(one[1], other[1]), (one, other)
    boxes = [
        in_points(figure, patch.get_window_extent())
        for patch in axes.patches
        if isinstance(patch, FancyBboxPatch) and patch.get_linewidth()
    ]
    assert len(boxes) == len(view.levels)
    names = sorted(shown(name) for name in view.levels)
    inside = [[text for text, place in visible if overlap(place, box)] for box in boxes]
    assert sorted(text for found in inside for text in found) == [n for n in names if n.strip()]
    for text, place in visible:
        for box in boxes:
            assert not overlap(place, box) or within(place, box), text
    wanted = [*names, *(f"depth {depth}" for depth in set(depths(view).values()))]
    wanted += [
        shown(view.methods.get((e.target, e.source), "")) for e in view.edges if e.kind is UP
    ]
    rest = [text for text, _ in texts]
    for text in filter(None, wanted):
        rest.remove(text)
    kinds = {edge.kind for edge in view.edges}
    assert sorted(text.partition(",")[0] for text in rest) == sorted(k.value for k in kinds)
    check_lines(view, axes, page)
    return figure


def check_lines(view, axes, page):
    looks = {}
    lines = {line.get_label(): line for line in axes.lines}
    for edge in view.edges:
        line = lines[f"{edge.source} -> {edge.target}"]
        points = axes.transData.transform(line.get_xydata()) * 72 / axes.get_figure().dpi
        assert within((*points.min(0), *points.max(0)), page)
        assert line.get_marker() == ("^" if points[-1][1] > points[-2][1] else "v")
        assert list(line.get_markevery()) == [len(points) - 1]
        look = (
            line.get_color(),
            line.get_linestyle() == "-",
            line.get_markerfacecolor() == line.get_color(),
            line.get_linewidth(),
        )
        looks.setdefault(edge.kind, set()).add(look)
        legend = lines[edge.kind.value]
        assert (legend.get_color(), legend.get_linewidth()) == (look[0], look[3])
    assert len(lines) == len(view.edges) + len(looks)
    found = {kind: only for kind, (only,) in looks.items()}
    assert len({colour for colour, *_ in found.values()}) == len(found)
    for kind, (_, is_solid, is_filled, width) in found.items():
        assert is_solid == (kind is UP)
        assert is_filled == (kind in (UP, SIDE))
        assert (width > 1) == (kind in (UP, DOWN))


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_cut_off_or_on_top_of_another(view):
    check_figure(VIEWS[view]())


@settings(derandomize=True, deadline=None, max_examples=12)
@given(graphs())
def test_figures_of_any_graph(graph):
    methods = {(e.target, e.source): f"{e.source}{e.target}" for e in graph.edges}
    check_figure(GraphView(graph, methods))


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font:UserWarning")
def test_names_are_shown_as_they_are():
    for name in [*NAMES, "$x", "a_b^c"]:
        other = "other"
        view = GraphView(
            Graph({name: (), other: (name,)}, {name: (other,), other: (name,)}),
            {(other, name): name},
        )
        check_figure(view)
        texts = {found.text for found in svg(view).iter("{http://www.w3.org/2000/svg}text")}
        if name.strip():
            assert shown(name) in texts


def svg(view):
    return ElementTree.fromstring(view._repr_svg_())


def test_svg_holds_its_texts_as_texts():
    texts = {found.text for found in svg(plain_names()).iter("{http://www.w3.org/2000/svg}text")}
    assert {*plain_names().levels, "$a$x$$", "depth 0"} <= texts


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_graph_gives_the_same_file(form, tmp_path):
    one, other = (
        two_uppers().save(tmp_path / f"{name}.{form.upper()}").read_bytes() for name in "ab"
    )
    assert one == other
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form]
    assert one.startswith(start)


def test_edges_are_told_apart_in_greys():
    """Along its line in the legend a solid edge is dark throughout, a dashed one is not."""
    figure = two_uppers().draw()
    (axes,) = figure.axes
    file = io.BytesIO()
    figure.savefig(file, dpi=144)
    dark = np.asarray(Image.open(file).convert("L")) < 140
    shares = {}
    for line in axes.lines[-2:]:
        (x, y), (end, _) = axes.transData.transform(line.get_xydata()) * 144 / figure.dpi
        row = round(dark.shape[0] - y)
        # without the arrowhead
        shares[line.get_label()] = dark[row - 2 : row + 2, round(x) : round(end) - 12].any(0).mean()
    assert shares["lower-to-upper"] == 1
    assert 0.5 < shares["upper-to-lower"] < 0.8


def test_a_dark_style_leaves_the_picture_as_it_is(tmp_path):
    wanted = two_uppers().save(tmp_path / "a.svg").read_bytes()
    with matplotlib.style.context("dark_background"):
        assert two_uppers().save(tmp_path / "b.svg").read_bytes() == wanted


def test_files_that_cannot_be_written(tmp_path):
    for path in (tmp_path / "a.jpg", tmp_path / "a", tmp_path / "none" / "a.png"):
        with pytest.raises(RunError, match="no picture can be written"):
            two_uppers().save(path)


def test_a_picture_too_large_for_its_pixels_has_fewer(tmp_path):
    with styled():
        figure = make_figure(1, 400)
    save_figure(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert max(picture.size) < 2**16


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"pip install 'mlodeco\[plots\]'"):
        two_uppers().draw()
    assert two_uppers()._repr_svg_() is None
    assert "classifier" in repr(two_uppers())


def test_notebooks_show_the_picture():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(declare_figure_one().graph())
    assert shown.keys() == {"image/svg+xml", "text/plain"}
    assert "^ one  (lower-to-upper, Identity)" in shown["text/plain"]
    ElementTree.fromstring(shown["image/svg+xml"])


EFFECTS = """
import sys
import mlodeco
assert "matplotlib" not in sys.modules
import matplotlib
def options():  # to look at the backend is to choose one
    return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"}
before = options()
from mlodeco.graph import Graph
from mlodeco.show import GraphView
GraphView(Graph({"a": (), "b": ("a",)}, {"b": ("a",)}), {("b", "a"): "CG"})._repr_svg_()
assert options() == before
assert "matplotlib.pyplot" not in sys.modules
"""


def test_drawing_leaves_settings_alone_and_needs_no_window():
    done = subprocess.run(
        [sys.executable, "-c", EFFECTS], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
