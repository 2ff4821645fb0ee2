"""Programs of any depth against Eq. (2), path by path, with dense algebra."""

import time
from collections import Counter
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mlodeco
from mlodeco import Program
from mlodeco.graph import Graph
from mlodeco.hypergrad import CG, Dense, FiniteDifference, Identity, Neumann, Nystrom
from tests import reference
from tests.methods import damped
from tests.problems import randn, spd

SIZE = 3


def cube(values):
    return sum((v**3).sum() for v in values)


class Quadratics:
    """Levels with random losses; every product of Eq. (2) by plain autograd and dense algebra."""

    def __init__(self, lower, reads, seed=0, *, size=SIZE, methods=None, optimizer=None):
        self.lower, self.reads = lower, reads
        self.methods, self.optimizer = methods or {}, optimizer
        self.names = list(lower)
        self.curvature = {n: spd(size, seed + i) for i, n in enumerate(self.names)}
        self.mixed = {
            (i, j): 0.5 * randn(size, size, seed=seed + 100 + 10 * a + b)
            for a, i in enumerate(self.names)
            for b, j in enumerate(self.names)
        }
        self.start = {n: randn(size, seed=seed + 50 + i) for i, n in enumerate(self.names)}
        self.calls = Counter()
        self.program = Program()
        for name in reversed(self.names):
            self._declare(name)

    def _declare(self, name):
        arguments = {f"a{i}": read for i, read in enumerate(self.reads[name])}
        body = ", ".join(["own", *arguments])

        def loss(own, *others):
            self.calls[name] += 1
            return self.loss(name, own.x, [o.x for o in others])

        scope = {"loss": loss}
        exec(f"def level({body}): return loss({body})", scope)
        options = {"hypergrad": self.methods[name]} if name in self.methods else {}
        self.program.level(
            name,
            lower=self.lower[name],
            reads=arguments,
            module={"x": self.start[name]},
            optimizer=self.optimizer,
            **options,
        )(scope["level"])

    def loss(self, name, own, others):
        value = own @ self.curvature[name] @ own / 2 + 0.02 * (own**4).sum()
        for read, other in zip(self.reads[name], others, strict=True):
            value = value + own @ self.mixed[name, read] @ other + 0.05 * cube([other])
            value = value + 0.02 * ((own * other) ** 2).sum()
        return value

    @cache  # noqa: B019 - the cases live as long as their tests
    def second(self, name, read):
        """d2 C_name / d name d read, at the start."""
        leaves = {n: self.start[n].clone().requires_grad_() for n in (name, *self.reads[name])}
        value = self.loss(name, leaves[name], [leaves[r] for r in self.reads[name]])
        (first,) = torch.autograd.grad(value, leaves[name], create_graph=True)
        return reference.jacobian(first, [leaves[read]])

    @cache  # noqa: B019
    def first(self, name, of):
        leaves = {n: self.start[n].clone().requires_grad_() for n in (name, *self.reads[name])}
        value = self.loss(name, leaves[name], [leaves[r] for r in self.reads[name]])
        return torch.autograd.grad(value, leaves[of])[0]

    def by_paths(self, top, solve=reference.exact):
        """The sum over paths, every level of each solved by itself."""
        return self.by_edges(top, lambda above, low: partial(_without_name, solve))

    def by_edges(self, top, solver):
        """The same; ``solver(above, low)`` is the edge's ``solve(low, h, b)``, None if closed."""
        total = self.first(top, top)
        for path in self.program.graph().paths(top):
            cotangent = self.first(top, path[-2])
            # from the top down: each level, the one that the path came from, the next
            for above, low, up in zip(path[:1:-1], path[-2:0:-1], path[-3::-1], strict=True):
                solve = solver(above, low)
                if solve is None:
                    break
                cotangent = -self.second(low, up).T @ solve(low, self.second(low, low).T, cotangent)
            else:
                total = total + cotangent
        return total


def _without_name(solve, low, h, b):
    return solve(h, b)


def ladder(rungs):
    """Diamonds on top of each other: twice as many paths for each."""
    lower, reads = {"n0": []}, {"n0": ["top"]}
    for i in range(rungs):
        left, right, head = f"l{i}", f"r{i}", f"n{i + 1}"
        for side in (left, right):
            lower[side], reads[side] = [f"n{i}"], [f"n{i}"]
        lower[head], reads[head] = [left, right], [left, right]
    lower["top"], reads["top"] = [f"n{rungs}"], [f"n{rungs}"]
    return lower, reads


GRAPHS = {
    "bilevel": ({"low": [], "top": ["low"]}, {"low": ["top"], "top": ["low"]}),
    "chain": (
        {"low": [], "mid": ["low"], "top": ["mid"]},
        {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid"]},
    ),
    "chain_with_skip_edges": (
        {"low": [], "mid": ["low"], "top": ["mid"]},
        {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid", "low"]},
    ),
    "feed_forward_chain": (
        {"low": [], "mid": ["low"], "top": ["mid"]},
        {"low": ["top"], "mid": ["low"], "top": ["mid"]},
    ),
    "figure_1": (
        {"one": [], "two": [], "three": ["one", "two"], "four": ["three"]},
        {
            "one": ["four", "three"],
            "two": ["three"],
            "three": ["one", "two", "four"],
            "four": ["three"],
        },
    ),
    "figure_1_with_every_edge": (
        {"one": [], "two": [], "three": ["one", "two"], "four": ["three"]},
        {
            "one": ["two", "three", "four"],
            "two": ["one", "three", "four"],
            "three": ["one", "two", "four"],
            "four": ["one", "two", "three"],
        },
    ),
    "several_uppers": (
        {"low": [], "left": ["low"], "right": ["low"]},
        {"low": ["left", "right"], "left": ["low"], "right": ["low", "left"]},
    ),
    "ladder_of_3": ladder(3),
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("method", [Dense(), CG(max_steps=200, rtol=1e-14)], ids=["dense", "cg"])
def test_equals_the_sum_over_paths(graph, method):
    case = Quadratics(*GRAPHS[graph], seed=3)
    for top in case.names:
        found = mlodeco.hypergradient(top, program=case.program, hypergrad=method)["x"]
        assert torch.allclose(found, case.by_paths(top), rtol=1e-9, atol=1e-12)


TRUNCATED = {
    "identity": (Identity(scale=0.4), reference.scaled(0.4), 1e-11),
    "neumann": (Neumann(num_terms=4, step_size=0.3), reference.neumann(4, 0.3), 1e-11),
    "cg": (CG(max_steps=2, rtol=0.0), reference.krylov(2), 1e-9),
    "finite_difference": (FiniteDifference(scale=0.4), reference.scaled(0.4), 1e-6),
}


@pytest.mark.parametrize(
    ("graph", "method"),
    [
        (graph, method)
        for graph in ("chain", "chain_with_skip_edges", "feed_forward_chain")
        for method in TRUNCATED
        # CG is not linear: one solve of a sum of cotangents is not the sum of the solves.
        if method != "cg" or graph == "feed_forward_chain"
    ],
)
def test_truncated_methods_at_mid_levels_equal_their_formulas(graph, method):
    case = Quadratics(*GRAPHS[graph], seed=4)
    chosen, solve, tolerance = TRUNCATED[method]
    wanted = case.by_paths("top", solve)
    found = mlodeco.hypergradient("top", program=case.program, hypergrad=chosen)["x"]
    assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


class Counting:
    """A dense solve that counts how often each level is solved."""

    def __init__(self):
        self.solves = Counter()

    def respond(self, problem, cotangent):
        self.solves[problem.level] += 1
        return Dense().respond(problem, cotangent)


@pytest.mark.parametrize("rungs", [6, 20])
def test_each_level_is_solved_once_however_many_paths_there_are(rungs):
    case = Quadratics(*ladder(rungs), seed=5)
    method = Counting()
    mlodeco.hypergradient("top", program=case.program, hypergrad=method)
    below = [name for name in case.names if name != "top"]
    assert method.solves == dict.fromkeys(below, 1)
    assert len(below) == 3 * rungs + 1


@pytest.mark.parametrize("method", [Dense(), CG(max_steps=200, rtol=1e-14)], ids=["dense", "cg"])
def test_a_ladder_of_six_diamonds_path_by_path(method):
    case = Quadratics(*ladder(6), seed=5)
    assert len(case.program.graph().paths("top")) == 64
    found = mlodeco.hypergradient("top", program=case.program, hypergrad=method)["x"]
    wanted, direct = case.by_paths("top"), case.first("top", "top")
    # relative to what the paths bring alone, a hundredth of the direct gradient
    assert torch.linalg.vector_norm(found - wanted) < 1e-9 * torch.linalg.vector_norm(
        wanted - direct
    )


def test_a_million_paths_cost_four_times_what_32_do():
    """16 and 61 levels to solve; by paths it would be 32768 times as much."""
    cases = {rungs: Quadratics(*ladder(rungs), seed=5) for rungs in (5, 20)}
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(6):
        for rungs, case in cases.items():
            start = time.process_time()
            mlodeco.hypergradient("top", program=case.program, hypergrad="dense")
            best[rungs] = min(best[rungs], time.process_time() - start)
    assert best[20] < 6 * best[5]


def test_levels_on_no_path_are_not_evaluated():
    calls = {"aside": 0}
    program = Program()
    program.level("low", module={"x": randn(2)})(lambda m, top: ((m.x - top.x) ** 2).sum())

    @program.level("aside", module={"x": randn(2)})
    def aside(m):
        calls["aside"] += 1
        return (m.x**2).sum()

    @program.level("top", lower=["low", "aside"], module={"x": randn(2)})
    def top(m, low, aside):
        return (low.x**2).sum() + (aside.x * low.x).sum()

    mlodeco.hypergradient("top", program=program)
    assert calls["aside"] == 0


def test_methods_differ_per_edge_and_cotangents_are_solved_one_group_a_method():
    lower, reads = ladder(1)
    case = Quadratics(lower, reads, seed=6)
    for side, method in (("l0", Identity(scale=0.2)), ("r0", Identity(scale=0.7))):
        old = case.program.levels.pop(side)
        case.program.level(
            side,
            lower=old.lower,
            reads=old.argument_reads,
            module=old.module,
            hypergrad={"n0": method},
        )(old.function)
    for name in ("n1", "top"):
        old = case.program.levels.pop(name)
        case.program.level(
            name,
            lower=old.lower,
            reads=old.argument_reads,
            module=old.module,
            hypergrad=Dense(),
        )(old.function)
    found = mlodeco.hypergradient("top", program=case.program)["x"]
    solves = {"n1": reference.exact, "l0": reference.exact, "r0": reference.exact}
    wanted = case.first("top", "top")
    for side, scale in (("l0", 0.2), ("r0", 0.7)):
        cotangent = case.first("top", "n1")
        for low, up in (("n1", side), (side, "n0"), ("n0", "top")):
            solve = reference.scaled(scale) if low == "n0" else solves[low]
            cotangent = -case.second(low, up).T @ solve(case.second(low, low).T, cotangent)
        wanted = wanted + cotangent
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_closed_edge_carries_nothing():
    lower, reads = GRAPHS["chain"]
    case = Quadratics(lower, reads, seed=7)
    old = case.program.levels.pop("mid")
    case.program.level(
        "mid", lower=old.lower, reads=old.argument_reads, module=old.module, hypergrad=None
    )(old.function)
    old = case.program.levels.pop("top")
    case.program.level(
        "top", lower=old.lower, reads=old.argument_reads, module=old.module, hypergrad=Dense()
    )(old.function)
    found = mlodeco.hypergradient("top", program=case.program)["x"]
    v = torch.linalg.solve(case.second("mid", "mid").T, case.first("top", "mid"))
    wanted = case.first("top", "top") - case.second("mid", "top").T @ v
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


@st.composite
def programs(draw):
    count = draw(st.integers(2, 7))
    names = [f"level{i}" for i in range(count)]
    lower = {names[0]: []}
    for i in range(1, count):
        lower[names[i]] = draw(
            st.lists(st.sampled_from(names[:i]), unique=True, min_size=1, max_size=3)
        )
    reads = {
        name: draw(
            st.lists(
                st.sampled_from([n for n in names if n != name]), unique=True, max_size=count - 1
            )
        )
        for name in names
    }
    return lower, reads, draw(st.integers(0, 20))


@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(programs())
def test_random_graphs_equal_the_sum_over_paths(drawn):
    case = Quadratics(*drawn)
    for top in case.names:
        paths = case.program.graph().paths(top)
        case.calls.clear()
        found = mlodeco.hypergradient(top, program=case.program, hypergrad="dense")["x"]
        assert set(case.calls) == {top, *(name for path in paths for name in path)}
        assert torch.allclose(found, case.by_paths(top), rtol=1e-8, atol=1e-10)


# What each does with one cotangent; all are linear in it, so that paths can be added up.
MIXED = {
    "dense": (Dense(), reference.exact),
    "damped": (Dense(damping=0.6), damped(0.6)),
    "cg": (CG(max_steps=200, rtol=1e-14), reference.exact),
    "nystrom": (Nystrom(rank=SIZE, damping=0.6), damped(0.6)),
    "identity": (Identity(scale=0.4), reference.scaled(0.4)),
    "identity_again": (Identity(scale=0.7), reference.scaled(0.7)),
    "neumann": (Neumann(num_terms=4, step_size=0.3), reference.neumann(4, 0.3)),
    "none": (None, None),
}


@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(programs(), st.data())
def test_random_graphs_with_a_method_of_its_own_on_each_edge(drawn, data):
    lower, reads, seed = drawn
    graph = Graph(lower, reads)
    chosen = {
        (name, low): data.draw(st.sampled_from(sorted(MIXED)))
        for name in lower
        for low in graph.best_responses(name)
    }
    methods = {
        name: {low: MIXED[key][0] for (upper, low), key in chosen.items() if upper == name}
        for name in lower
    }
    case = Quadratics(lower, reads, seed, methods={n: m for n, m in methods.items() if m})

    def solver(above, low):
        solve = MIXED[chosen[above, low]][1]
        return None if solve is None else partial(_without_name, solve)

    for top in case.names:
        is_open = [
            path
            for path in case.program.graph().paths(top)
            if all(MIXED[chosen[edge]][1] for edge in pairwise(path[:0:-1]))
        ]
        case.calls.clear()
        found = mlodeco.hypergradient(top, program=case.program)["x"]
        assert set(case.calls) == {top, *(name for path in is_open for name in path)}
        wanted = case.by_edges(top, solver)
        assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)


def test_micro_batches_of_a_level_are_one_batch():
    data, more = randn(8, 3, seed=1), randn(8, 3, seed=2)
    modules = {"w": randn(3, seed=3)}, {"s": randn(3, seed=4)}

    def build(batches, tops, accumulate):
        program = Program()
        program.level("low", module=modules[0], data=batches, accumulate=accumulate)(
            lambda m, batch, top: ((batch @ m.w - 1) ** 2).mean() + (top.s.exp() * m.w**2).sum()
        )
        program.level("top", lower=["low"], module=modules[1], data=tops, accumulate=accumulate)(
            lambda h, batch, low: ((batch @ low.w) ** 2).mean()
        )
        return program

    whole = build([data], [more], 1)
    parts = build(list(data.split(2)), list(more.split(2)), 4)
    for method in ("dense", "cg", "neumann", "identity", "finite_difference"):
        a, b = (
            mlodeco.hypergradient("top", program=p, hypergrad=method)["s"] for p in (whole, parts)
        )
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert isinstance(whole.module("low"), nn.ParameterDict)
