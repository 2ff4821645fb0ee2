"""Every method at a level that has lower levels of its own, against its dense formula."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import RMSprop

import mlodeco
from mlodeco import hypergrad
from mlodeco.hypergrad import Converged, Dense, Nystrom, Sama
from tests import reference
from tests.methods import METHODS, Row, damped
from tests.test_sweep import Quadratics

SIZE = 8

# RMSprop's first step is w - a g / (s + e) with s = |g| sqrt(1 - alpha)
RATE, ALPHA, EPS = 0.3, 0.6, 0.4
OPTIMIZER = partial(RMSprop, lr=RATE, alpha=ALPHA, eps=EPS)

GRAPH = (
    {"low": [], "aside": [], "mid": ["low", "aside"], "top": ["mid"]},
    {
        "low": ["mid", "top"],
        "aside": ["mid", "low"],
        "mid": ["low", "aside", "top"],
        "top": ["mid", "low"],
    },
)


def case_with(methods=None, graph=GRAPH, seed=11):
    return Quadratics(*graph, seed=seed, size=SIZE, methods=methods, optimizer=OPTIMIZER)


def sama(scale):
    """For the case of a level its ``solve(low, h, b)``."""

    def solve(case, low, h, b):
        size = (1 - ALPHA) ** 0.5 * case.first(low, low).abs()
        return scale * RATE * EPS / (size + EPS) ** 2 * b

    return solve


def sketched(rank, damping, seed):
    """Nystrom's formula with pseudo-inverses: H_r = H S (S^T H S)^+ S^T H."""

    def solve(h, b):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(len(h), dtype=torch.float64, generator=generator) for _ in range(rank)]
        s = torch.linalg.qr(torch.stack(drawn, dim=1))[0]
        small = h @ s @ torch.linalg.pinv(s.T @ h @ s) @ (h @ s).T
        return torch.linalg.solve(small + damping * torch.eye(len(h), dtype=h.dtype), b)

    return solve


def nameless(row):
    return lambda case, low, h, b: row.solve(h, b)


ROWS = {name: (row.method, nameless(row), row.tolerance) for name, row in METHODS.items()}
ROWS |= {
    name: (row.method, nameless(row), row.tolerance)
    for name, row in {
        "converged": Row(Converged(), reference.exact, 1e-10),
        "converged_damped": Row(Converged(damping=0.7), damped(0.7), 1e-10),
        "converged_by_gmres": Row(Converged(dense_size=1), reference.exact, 1e-9),
        "nystrom_sketched": Row(Nystrom(rank=3, damping=0.7, seed=5), sketched(3, 0.7, 5), 1e-9),
    }.items()
}
ROWS |= {
    "sama": (Sama(), sama(1.0), 1e-10),
    "sama_scaled": (Sama(scale=0.3, product="reverse"), sama(0.3), 1e-10),
    "sama_by_difference": (Sama(product="difference"), sama(1.0), 1e-6),
}
NAMES = {name: made for name, made in hypergrad.NAMES.items() if not hasattr(made, "recording")}
"""The methods that differentiate at a point; those that go over a tape are in test_unroll.py."""

KINDS = {
    name: next(key for key, row in ROWS.items() if type(row[0]) is made)
    for name, made in NAMES.items()
}
"""For each name of the table a row with a method of its kind."""


def error(found, wanted):
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def by_groups(case, top, chosen):
    """Eq. (2) with dense algebra, for solvers that are not linear in b.

    ``chosen(above, low)`` is a name of the rows; the cotangents that reach a level by one name
    are added up before they are solved.
    """
    graph = case.program.graph()
    total = case.first(top, top)
    pending = {low: {} for low in graph.levels}

    def pass_on(above, low, cotangent):
        groups = pending[low]
        key = chosen(above, low)
        groups[key] = groups.get(key, 0.0) + cotangent

    for low in graph.best_responses(top):
        pass_on(top, low, case.first(top, low))
    for level in reversed(graph.order):
        for key, cotangent in pending[level].items():
            v = ROWS[key][1](case, level, case.second(level, level).T, cotangent)
            for low in graph.best_responses(level):
                pass_on(level, low, -case.second(level, low).T @ v)
            if top in case.reads[level]:
                total = total - case.second(level, top).T @ v
    return total


def test_every_method_of_the_table_has_a_row():
    assert {type(row[0]) for row in ROWS.values()} == set(NAMES.values())


@pytest.mark.parametrize("name", ROWS)
def test_of_a_mid_level_alone(name):
    """Between the top and the mid level; below, where it must make no difference, dense."""
    method, solve, tolerance = ROWS[name]
    case = case_with({"top": {"mid": method, "low": Dense()}, "mid": Dense()})

    def solver(above, low):
        if low == "mid":
            return partial(solve, case)
        return lambda _, h, b: torch.linalg.solve(h, b)

    found = mlodeco.hypergradient("top", program=case.program)["x"]
    wanted = case.by_edges("top", solver)
    assert error(found, wanted) < 3 * tolerance
    without = case_with({"top": {"mid": None, "low": Dense()}, "mid": Dense()})
    closed = mlodeco.hypergradient("top", program=without.program)["x"]
    assert error(closed, wanted) > 0.05, "what goes by the mid level hardly matters"


@pytest.mark.parametrize("name", ROWS)
def test_at_every_level(name):
    method, _, tolerance = ROWS[name]
    case = case_with()
    for top in ("mid", "top"):
        found = mlodeco.hypergradient(top, program=case.program, hypergrad=method)["x"]
        wanted = by_groups(case, top, lambda above, low: name)
        assert error(found, wanted) < 10 * tolerance


def neumann_by_itself(h, b):
    """Five terms, the step from five power iterations begun at b."""
    direction, curvature = b, 0.0
    for _ in range(5):
        direction = h @ (direction / direction.norm())
        curvature = max(curvature, direction.norm().item())
    return reference.neumann(5, 1.0 / curvature)(h, b)


@pytest.mark.parametrize("name", NAMES)
def test_by_name_with_the_options_it_has_by_itself(name):
    """A mid level of two parameters, which Krylov methods solve in two steps."""
    methods = {"top": {"mid": name, "low": "dense"}, "mid": "dense"}
    case = Quadratics(*GRAPH, seed=11, size=2, methods=methods, optimizer=OPTIMIZER)
    solves = {
        **dict.fromkeys(("identity", "t1t2", "finite_difference", "darts"), reference.scaled(1.0)),
        "neumann": neumann_by_itself,
        "nystrom": damped(0.01),
        "sama": lambda h, b: sama(1.0)(case, "mid", h, b),
    }

    def solver(above, low):
        solve = solves.get(name, reference.exact) if low == "mid" else reference.exact
        return lambda _, h, b: solve(h, b)

    found = mlodeco.hypergradient("top", program=case.program)["x"]
    assert error(found, case.by_edges("top", solver)) < 1e-6


FAN = (
    {
        "lowest": [],
        "low": ["lowest"],
        **{name: ["low"] for name in "abcd"},
        "top": ["a", "b", "c", "d"],
    },
    {
        "lowest": ["low", "top"],
        "low": ["lowest", "a", "top"],
        "a": ["low", "top"],
        "b": ["low"],
        "c": ["low", "lowest", "a"],
        "d": ["low", "top"],
        "top": ["a", "b", "c", "d", "low"],
    },
)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_at_one_mid_level(name):
    """Five edges reach it by three methods: one solve a method, each of a sum."""
    names = list(NAMES)
    start = names.index(name)
    others = [n for n in names[start:] + names[:start] if KINDS[n] != KINDS[name]]
    first, second, third = KINDS[name], KINDS[others[0]], KINDS[others[-1]]
    at_low = {"a": first, "b": second, "c": first, "d": third, "top": first}
    dense = KINDS["dense"]
    methods = {upper: {"low": ROWS[row][0]} for upper, row in at_low.items()}
    methods["top"] |= dict.fromkeys("abcd", ROWS[dense][0])
    methods["c"]["lowest"] = methods["low"] = ROWS[dense][0]
    case = case_with(methods, FAN)

    def chosen(above, low):
        return at_low[above] if low == "low" else dense

    found = mlodeco.hypergradient("top", program=case.program)["x"]
    tolerance = max(ROWS[row][2] for row in at_low.values())
    assert error(found, by_groups(case, "top", chosen)) < 10 * tolerance
    history = mlodeco.run(1, program=case.program, progress="off").history
    (record,) = history.of("top")
    solved = [method for level, method, *_ in record.solves if level == "low"]
    assert solved == [type(ROWS[row][0]).__name__ for row in (first, second, third)]
    assert [level for level, *_ in record.solves].count("lowest") == 1
