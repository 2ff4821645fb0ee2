"""The dataflow graph: edges, order, paths, schedule and sweeps, without a tensor."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlodeco import Program
from mlodeco.errors import GraphError
from mlodeco.graph import Edge, EdgeKind, Graph, Schedule, Timing, plan_sweep

UP, DOWN = EdgeKind.LOWER_TO_UPPER, EdgeKind.UPPER_TO_LOWER
SIDE, TURN = EdgeKind.SIDEWAYS, EdgeKind.ORDERING


def figure_one() -> Graph:
    """The four levels of Figure 1 of Choe et al. 2023."""
    return Graph(
        {"one": (), "two": (), "three": ("one", "two"), "four": ("three",)},
        {"one": ("three", "four"), "three": ("one", "two", "four"), "four": ("three",)},
    )


def ladder(rungs: int) -> Graph:
    """Diamonds on top of each other: twice as many paths with each."""
    lower: dict[str, tuple[str, ...]] = {"0": ()}
    reads: dict[str, tuple[str, ...]] = {}
    for rung in range(rungs):
        below, above = str(rung), str(rung + 1)
        for side in ("left", "right"):
            lower[side + above] = (below,)
            reads[side + above] = (below,)
        lower[above] = ("left" + above, "right" + above)
        reads[above] = ("left" + above, "right" + above)
    reads["0"] = (str(rungs),)
    return Graph(lower, reads)


def everything(upper: str, low: str) -> bool:
    return True


class TestEdges:
    def test_of_figure_one(self):
        assert set(figure_one().edges) == {
            Edge("one", "three", UP),
            Edge("two", "three", UP),
            Edge("three", "four", UP),
            Edge("four", "one", DOWN),
            Edge("four", "three", DOWN),
            Edge("three", "one", DOWN),
        }

    def test_to_a_level_further_below_are_lower_to_upper(self):
        graph = Graph({"a": (), "b": ("a",), "c": ("b",)}, {"c": ("a",), "a": ("c",)})
        assert Edge("a", "c", UP) in graph.edges
        assert Edge("c", "a", DOWN) in graph.edges
        assert Edge("b", "c", TURN) in graph.edges
        assert Edge("a", "b", TURN) in graph.edges

    def test_between_levels_side_by_side_are_sideways(self):
        graph = Graph({"a": (), "b": (), "c": ("a", "b")}, {"a": ("b",), "c": ("a",)})
        assert graph.edges == (Edge("b", "a", SIDE), Edge("a", "c", UP), Edge("b", "c", TURN))

    def test_are_listed_by_target_as_declared(self):
        targets = [edge.target for edge in figure_one().edges]
        assert targets == sorted(targets, key=figure_one().levels.index)

    def test_to_uppers_and_below(self):
        graph = figure_one()
        assert graph.uppers("one") == ("three",)
        assert graph.uppers("four") == ()
        assert graph.below("four") == {"one", "two", "three"}
        assert graph.below("one") == frozenset()
        assert graph.best_responses("three") == ("one", "two")


class TestOrder:
    def test_puts_lower_levels_first(self):
        assert figure_one().order == ("one", "two", "three", "four")

    def test_keeps_the_order_of_declaration_where_it_may(self):
        graph = Graph({"c": ("b",), "z": (), "b": ("a",), "a": ()}, {})
        assert graph.order == ("z", "a", "b", "c")

    def test_has_levels_without_lower_ones_first_as_they_step_first(self):
        graph = Graph({"one": ("z",), "two": ("a",), "a": (), "top": ("two",), "z": ()}, {})
        assert graph.order == ("a", "z", "one", "two", "top")

    def test_of_unknown_levels_names_the_closest(self):
        with pytest.raises(GraphError, match="Did you mean 'three'"):
            figure_one().below("thre")


class TestPaths:
    def test_of_the_top_of_figure_one(self):
        assert set(figure_one().paths("four")) == {
            ("four", "three", "four"),
            ("four", "one", "three", "four"),
        }

    def test_of_the_middle_of_figure_one(self):
        assert figure_one().paths("three") == (("three", "one", "three"),)

    def test_of_a_leaf_do_not_exist(self):
        assert figure_one().paths("one") == ()

    def test_double_with_each_diamond(self):
        assert [len(ladder(n).paths(str(n))) for n in range(1, 6)] == [2, 4, 8, 16, 32]

    def test_are_walked_lazily(self):
        walk = ladder(60).walk_paths("60")
        assert next(walk)[0] == "60"

    def test_of_an_unknown_level_are_refused(self):
        with pytest.raises(GraphError, match="'five'"):
            figure_one().paths("five")


class TestSweeps:
    def test_of_figure_one_visit_what_lies_on_paths(self):
        plan = plan_sweep(figure_one(), "four", everything)
        assert plan.top == "four"
        assert plan.lowers == ("three",)
        assert [(v.level, v.lowers, v.feeds_top) for v in plan.visits] == [
            ("three", ("one",), True),
            ("one", (), True),
        ]

    def test_leave_out_levels_behind_closed_edges(self):
        graph = figure_one()
        plan = plan_sweep(graph, "four", lambda upper, low: (upper, low) != ("three", "one"))
        assert [visit.level for visit in plan.visits] == ["three"]
        assert plan.visits[0].lowers == ()
        closed = plan_sweep(graph, "four", lambda upper, low: upper != "four")
        assert closed.lowers == ()
        assert closed.visits == ()

    def test_visit_each_level_of_a_ladder_once(self):
        plan = plan_sweep(ladder(30), "30", everything)
        counts = Counter(visit.level for visit in plan.visits)
        assert set(counts.values()) == {1}
        assert len(counts) == 90

    def test_of_leaves_are_empty(self):
        assert plan_sweep(figure_one(), "one", everything).visits == ()

    def test_do_not_follow_sideways_reads(self):
        graph = Graph(
            {"a": (), "b": (), "c": ("a",)}, {"a": ("c", "b"), "b": ("c",), "c": ("a", "b")}
        )
        plan = plan_sweep(graph, "c", everything)
        assert [visit.level for visit in plan.visits] == ["a"]


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    size = draw(st.integers(1, 7))
    order = draw(st.permutations([f"level{n}" for n in range(size)]))
    chance = st.booleans()
    lower = {
        name: tuple(other for other in order[:place] if draw(chance))
        for place, name in enumerate(order)
    }
    reads = {
        name: tuple(other for other in order if other != name and draw(chance)) for name in order
    }
    declared = draw(st.permutations(order))
    return Graph({name: lower[name] for name in declared}, reads)


def reachable(graph: Graph, level: str) -> set[str]:
    found = set(graph.lower[level])
    for low in graph.lower[level]:
        found |= reachable(graph, low)
    return found


def brute_force(graph: Graph, top: str) -> set[tuple[str, ...]]:
    """All simple walks down to a level that reads ``top``, each step a read from below."""
    found: set[tuple[str, ...]] = set()

    def climb(level: str, path: tuple[str, ...]) -> None:
        if level == top:
            found.add(path)
            return
        for above in graph.levels:
            if level in graph.reads[above] and level in reachable(graph, above):
                climb(above, (*path, above))

    for start in reachable(graph, top):
        if top in graph.reads[start]:
            climb(start, (top, start))
    return found


@settings(derandomize=True, deadline=None, max_examples=150)
@given(graphs())
def test_any_graph_agrees_with_a_brute_force(graph):
    place = {name: number for number, name in enumerate(graph.order)}
    assert sorted(place) == sorted(graph.levels)
    for name in graph.levels:
        assert all(place[low] < place[name] for low in graph.lower[name])
        assert graph.below(name) == reachable(graph, name)
    kinds = {(edge.source, edge.target): edge.kind for edge in graph.edges}
    assert len(kinds) == len(graph.edges)
    for target in graph.levels:
        for source in {*graph.reads[target], *graph.lower[target]}:
            is_read = source in graph.reads[target]
            if not is_read:
                wanted = TURN
            elif source in reachable(graph, target):
                wanted = UP
            elif target in reachable(graph, source):
                wanted = DOWN
            else:
                wanted = SIDE
            assert kinds.pop((source, target)) is wanted
    assert kinds == {}
    for top in graph.levels:
        paths = graph.paths(top)
        assert len(set(paths)) == len(paths)
        assert set(paths) == brute_force(graph, top)
        plan = plan_sweep(graph, top, everything)
        visited = [visit.level for visit in plan.visits]
        assert len(set(visited)) == len(visited)
        assert set(visited) == {level for path in paths for level in path[1:-1]}
        assert visited == sorted(visited, key=lambda name: -place[name])
        steps = {step for path in paths for step in itertools.pairwise(path[1:])}
        taken = {(low, visit.level) for visit in plan.visits for low in visit.lowers}
        assert taken | {(low, top) for low in plan.lowers} == steps
        feeding = {visit.level for visit in plan.visits if visit.feeds_top}
        assert feeding == {path[1] for path in paths}


def simulate(graph: Graph, ticks: int, **timings: Timing) -> dict[str, list[int]]:
    """The ticks, from 1, at which each level took its steps."""
    repeat = {name: timings.get(name, Timing()).repeat for name in graph.levels}
    schedule = Schedule(graph, {name: timings.get(name, Timing()) for name in graph.levels})
    taken: dict[str, list[int]] = {name: [] for name in graph.levels}
    for tick in range(1, ticks + 1):
        for name in graph.order:
            if schedule.is_due(name):
                for _ in range(repeat[name]):
                    taken[name].append(tick)
                    schedule.finish_step(name)
                schedule.finish_turn(name)
    assert schedule.steps == {name: len(found) for name, found in taken.items()}
    return taken


PAIR = Graph({"low": (), "top": ("low",)}, {})
CHAIN = Graph({"low": (), "mid": ("low",), "top": ("mid",)}, {})
FORK = Graph({"a": (), "b": (), "top": ("a", "b")}, {})


class TestSchedule:
    def test_steps_every_level_at_each_tick_by_default(self):
        assert simulate(CHAIN, 3) == {name: [1, 2, 3] for name in CHAIN.levels}

    def test_lets_an_upper_wait_for_the_inner_steps(self):
        taken = simulate(PAIR, 10, low=Timing(inner_steps=3))
        assert taken["low"] == list(range(1, 11))
        assert taken["top"] == [3, 6, 9]

    def test_multiplies_inner_steps_along_a_chain(self):
        taken = simulate(CHAIN, 12, low=Timing(inner_steps=2), mid=Timing(inner_steps=3))
        assert taken["mid"] == [2, 4, 6, 8, 10, 12]
        assert taken["top"] == [6, 12]

    def test_lets_an_upper_wait_for_the_slowest_of_its_lowers(self):
        taken = simulate(FORK, 8, a=Timing(inner_steps=2), b=Timing(inner_steps=3))
        assert taken["top"] == [3, 6]
        assert len(taken["a"]) == len(taken["b"]) == 8

    def test_counts_inner_steps_after_the_warmup(self):
        taken = simulate(PAIR, 10, low=Timing(inner_steps=2, warmup=4))
        assert taken["top"] == [6, 8, 10]

    def test_warms_each_of_several_lowers_up_by_itself(self):
        taken = simulate(FORK, 9, a=Timing(warmup=2), b=Timing(inner_steps=2, warmup=3))
        assert taken["top"] == [5, 7, 9]

    def test_warms_a_middle_level_up_for_the_levels_above_it(self):
        taken = simulate(CHAIN, 6, mid=Timing(warmup=3))
        assert taken["mid"] == [1, 2, 3, 4, 5, 6]
        assert taken["top"] == [4, 5, 6]

    def test_repeats_the_steps_of_a_turn(self):
        taken = simulate(PAIR, 4, low=Timing(inner_steps=2), top=Timing(repeat=3))
        assert taken["top"] == [2, 2, 2, 4, 4, 4]

    def test_counts_repeated_steps_of_a_lower_level(self):
        taken = simulate(PAIR, 4, low=Timing(inner_steps=4, repeat=2))
        assert taken["low"] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert taken["top"] == [2, 4]
        taken = simulate(CHAIN, 4, mid=Timing(inner_steps=2, repeat=2))
        assert taken["top"] == [1, 2, 3, 4]

    def test_says_where_inner_loops_begin_and_end(self):
        schedule = Schedule(PAIR, {"low": Timing(inner_steps=2), "top": Timing()})
        assert schedule.is_loop_start("low")
        schedule.finish_step("low")
        assert not schedule.is_loop_start("low")
        assert not schedule.is_loop_end("low")
        assert not schedule.is_due("top")
        schedule.finish_step("low")
        assert schedule.is_loop_end("low")
        assert schedule.is_due("top")
        schedule.finish_step("top")
        schedule.finish_turn("top")
        assert schedule.is_loop_start("low")
        assert not schedule.is_loop_end("low")
        assert not schedule.is_loop_start("top")

    def test_ends_one_loop_while_the_slowest_lower_goes_on(self):
        schedule = Schedule(FORK, {"a": Timing(), "b": Timing(inner_steps=2), "top": Timing()})
        ends = []
        for _ in range(4):
            for name in ("a", "b"):
                schedule.finish_step(name)
                ends.append(schedule.is_loop_end(name))
            if schedule.is_due("top"):
                schedule.finish_turn("top")
        assert ends == [True, False, False, True, True, False, False, True]


def declare_figure_one() -> Program:
    program = Program()
    common = {"module": {"x": torch.ones(2)}}

    @program.level("four", lower=["three"], hypergrad="cg", **common)
    def fourth(own, three):
        return ((own.x - three.x) ** 2).sum()

    @program.level("one", **common)
    def first(own, three, four):
        return ((own.x - three.x * four.x) ** 2).sum()

    @program.level("three", lower=["one", "two"], hypergrad={"one": "identity"}, **common)
    def third(own, one, two, four):
        return ((own.x - one.x - two.x + four.x) ** 2).sum()

    @program.level("two", **common)
    def second(own):
        return (own.x**2).sum()

    return program


class TestDrawing:
    def test_holds_each_level_edge_method_and_path(self):
        graph = declare_figure_one().graph()
        text = str(graph)
        assert set(graph.edges) == set(figure_one().edges)
        assert [line for line in text.splitlines() if line and line[0] != " "] == [
            "four",
            "three",
            "two",
            "one",
            "paths of four:",
            "paths of three:",
        ]
        for line in (
            "  ^ three  (lower-to-upper, CG)",
            "  ^ one  (lower-to-upper, Identity)",
            "  ^ two  (lower-to-upper, Neumann)",
            "  v four  (upper-to-lower)",
            "  v three  (upper-to-lower)",
        ):
            assert line in text.splitlines()
        for path in (*graph.paths("four"), *graph.paths("three")):
            assert "  " + " -> ".join(path) in text.splitlines()

    def test_shows_sideways_reads_ordering_and_missing_paths(self):
        program = Program()
        common = {"module": {"x": torch.ones(2)}}
        program.level("a", **common)(lambda own, b: (own.x * b.x).sum())
        program.level("b", **common)(lambda own: (own.x**2).sum())
        program.level("top", lower=["a", "b"], hypergrad=None, **common)(
            lambda own, a: (own.x * a.x).sum()
        )
        lines = str(program.graph()).splitlines()
        assert "  ~ b  (sideways)" in lines
        assert "  . b  (ordering only)" in lines
        assert "  ^ a  (lower-to-upper, direct gradient only)" in lines
        assert "paths of top: none, its hypergradient is the direct gradient" in lines

    def test_abbreviates_many_paths(self):
        from mlodeco.show import GraphView

        text = str(GraphView(ladder(30), {}))
        assert text.splitlines()[-1] != ""
        assert "  ..." in text.splitlines()
        assert len(text.splitlines()) < 1000
