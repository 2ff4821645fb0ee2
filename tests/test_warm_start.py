"""What a solver takes from one hypergradient of a run to the next, and parts of batches."""

from __future__ import annotations

import collections
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import LossError
from mlodeco.hypergrad import CG, GMRES, MINRES, Dense, Neumann, Nystrom, Solution, Status
from tests import reference
from tests.problems import bilevel, randn, spd
from tests.test_hypergrad_exact import computed, expected, relative
from tests.test_solvers import EYE, Product, joined, left_over, split, symmetric, unrestarted

KRYLOV = [CG, MINRES, GMRES]
WARM = [
    CG(max_steps=3, rtol=0.0, warm_start=True),
    MINRES(max_steps=3, rtol=0.0, warm_start=True),
    GMRES(max_steps=3, rtol=0.0, warm_start=True),
    Neumann(num_terms=3, warm_start=True),
]
MATRIX, B = spd(12, 1, 0.05, 2.0), randn(12, seed=2)


def memory(previous: Tensor) -> dict:
    return {"solution": split(previous)}


def proceed(method, matrix: Tensor, b: Tensor, previous: Tensor | None) -> tuple[Tensor, Solution]:
    kept = {} if previous is None else memory(previous)
    found, after = method.proceed(Product(matrix), split(b), kept)
    if method.warm_start:
        assert joined(after["solution"]).equal(joined(found.value))
    else:
        assert "solution" not in after
    return joined(found.value), found


# ---- one warm solve, by dense algebra


@pytest.mark.parametrize("kind", [MINRES, GMRES])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_warm_start_solves_for_what_the_best_multiple_leaves(kind, steps):
    previous = torch.linalg.solve(MATRIX, B) + 0.3 * randn(12, seed=3)
    image = MATRIX @ previous
    start = previous * (image @ B) / (image @ image)
    rest = B - MATRIX @ start
    wanted = start + reference.minimal_residual(steps)(MATRIX, rest)
    x, found = proceed(kind(max_steps=steps, rtol=0.0, warm_start=True), MATRIX, B, 7.0 * previous)
    assert relative(x, wanted) < 1e-9
    assert found.steps == steps
    assert abs(found.residual - left_over(MATRIX, x, B)) < 1e-9


def test_a_warm_series_is_that_of_what_the_best_multiple_leaves():
    previous = torch.linalg.solve(MATRIX, B) + 0.3 * randn(12, seed=3)
    image = MATRIX @ previous
    start = previous * (image @ B) / (image @ image)
    wanted = start + reference.neumann(4, 0.2)(MATRIX, B - MATRIX @ start)
    method = Neumann(num_terms=4, step_size=0.2, warm_start=True)
    x, found = proceed(method, MATRIX, B, previous)
    assert relative(x, wanted) < 1e-12
    assert found.status is Status.TRUNCATED


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_cg_takes_the_smallest_energy_over_the_old_direction_and_the_krylov_space(steps):
    previous = torch.linalg.solve(MATRIX, B) + 0.3 * randn(12, seed=3)
    start = previous * (previous @ B) / (previous @ MATRIX @ previous)
    q, _ = torch.linalg.qr(deflated_space(previous, B - MATRIX @ start, steps))
    wanted = q @ torch.linalg.solve(q.T @ MATRIX @ q, q.T @ B)
    x, found = proceed(CG(max_steps=steps, rtol=0.0, warm_start=True), MATRIX, B, previous)
    assert relative(x, wanted) < 1e-9
    assert abs(found.residual - left_over(MATRIX, x, B)) < 1e-9


def deflated_space(previous: Tensor, residual: Tensor, steps: int) -> Tensor:
    """span{d, P r, P H P r, ...} for P the projection whose image is conjugate to d."""
    image = MATRIX @ previous
    project = EYE(12) - torch.outer(previous, image) / (previous @ image)
    vectors, direction = [previous], project @ residual
    for _ in range(steps):
        vectors.append(direction / direction.norm())
        direction = project @ MATRIX @ vectors[-1]
    return torch.stack(vectors, dim=1)


def is_line(previous: Tensor | None) -> bool:
    return previous is not None and len(previous) == 12 and bool(previous @ B < 0)


@pytest.mark.parametrize("method", WARM, ids=repr)
@pytest.mark.parametrize(
    "previous",
    [
        -torch.linalg.solve(MATRIX, B),
        torch.zeros(12, dtype=torch.float64),
        torch.full((12,), torch.nan, dtype=torch.float64),
        torch.full((12,), torch.inf, dtype=torch.float64),
        randn(14, seed=3),
        None,
    ],
    ids=["opposite", "zero", "nan", "inf", "other_shapes", "none"],
)
def test_a_previous_solution_that_does_not_help_is_not_used(method, previous):
    cold, _ = proceed(replace(method, warm_start=False), MATRIX, B, None)
    x, _ = proceed(method, MATRIX, B, previous)
    if isinstance(method, CG) and is_line(previous):  # the line through it is taken
        assert relative(x, cold) > 0.1
    else:
        assert torch.equal(x, cold)


def test_cg_takes_the_line_in_both_directions():
    solution = torch.linalg.solve(MATRIX, B)
    method = CG(max_steps=3, rtol=1e-9, warm_start=True)
    for sign in (1.0, -1.0):
        x, found = proceed(method, MATRIX, B, sign * solution)
        assert relative(x, solution) < 1e-12
        assert (found.steps, found.status) == (0, Status.CONVERGED)


@pytest.mark.parametrize("method", WARM, ids=repr)
def test_a_previous_solution_orthogonal_to_the_new_one_is_not_used(method):
    matrix = torch.diag(torch.linspace(0.5, 2.0, 12, dtype=torch.float64))
    b, previous = torch.zeros_like(B), torch.zeros_like(B)
    b[:6], previous[6:] = B[:6], B[6:]
    cold, _ = proceed(replace(method, warm_start=False), matrix, b, None)
    x, _ = proceed(method, matrix, b, previous)
    assert torch.equal(x, cold)


@pytest.mark.parametrize("kind", [*KRYLOV, Neumann])
def test_an_exact_previous_solution_needs_no_step(kind):
    matrix = 2.0 * torch.eye(12, dtype=torch.float64)
    b = torch.arange(1.0, 13.0, dtype=torch.float64)
    method = kind(warm_start=True)
    x, found = proceed(method, matrix, b, b / 2.0)
    assert torch.equal(x, b / 2.0)
    assert (found.steps, found.residual, found.status) == (0, 0.0, Status.CONVERGED)


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("distance", [1e-1, 1e-4, 1e-7])
def test_the_tolerance_is_relative_to_the_whole_right_hand_side(kind, distance):
    solution = torch.linalg.solve(MATRIX, B)
    previous = solution + distance * randn(12, seed=5)
    method = unrestarted(kind, max_steps=50, rtol=1e-5, warm_start=True)
    x, found = proceed(method, MATRIX, B, previous)
    assert found.status is Status.CONVERGED
    assert left_over(MATRIX, x, B) <= 1e-5 * (1 + 1e-6)
    assert abs(found.residual - left_over(MATRIX, x, B)) < 1e-10
    if distance == 1e-7:
        assert found.steps == 0
    elif found.steps > 1:
        fewer, _ = proceed(replace(method, max_steps=found.steps - 1), MATRIX, B, previous)
        assert left_over(MATRIX, fewer, B) > 1e-5


@pytest.mark.parametrize("kind", [*KRYLOV, Neumann])
def test_a_warm_start_costs_one_product(kind):
    options = {"step_size": 0.3, "num_terms": 4} if kind is Neumann else {"max_steps": 4}
    counts = []
    for warm in (False, True):
        product = Product(MATRIX)
        method = kind(warm_start=warm, **options)
        method.proceed(product, split(B), memory(torch.linalg.solve(MATRIX, B + 0.1)))
        counts.append(product.calls)
    assert counts[1] == counts[0] + 1


def test_a_line_of_negative_curvature_is_not_used():
    matrix = symmetric([-1.0, 0.5, 1.0, 2.0])
    b, previous = matrix @ torch.ones(4, dtype=torch.float64), torch.linalg.eigh(matrix)[1][:, 0]
    cold, _ = proceed(CG(max_steps=2), matrix, b, None)
    x, _ = proceed(CG(max_steps=2, warm_start=True), matrix, b, previous)
    assert torch.equal(x, cold)


# ---- in a run


def still(method, *, lower_rate=0.0, upper_rate=0.0, matrix=MATRIX, top=None, **options):
    """A quadratic program whose levels hardly move."""
    program = Program()

    @program.level(
        "low",
        module={"w": randn(12, seed=4)},
        data=[randn(1)],
        optimizer=partial(SGD, lr=lower_rate),
        reads={"h": "top"},
        **options,
    )
    def low(m, batch, h):
        return m.w @ matrix @ m.w / 2 - (m.w * h.x).sum()

    @program.level(
        "top",
        lower=["low"],
        module={"x": randn(12, seed=5)},
        data=[randn(12, seed=6)],
        optimizer=partial(SGD, lr=upper_rate),
        reads={"m": "low"},
        hypergrad=method,
    )
    def upper(h, batch, m):
        return top(h, batch, m) if top is not None else ((m.w - batch) ** 2).sum() / 2

    return program


def residuals(runner: Runner) -> list[float]:
    return [record.solves[0][3] for record in runner.history.of("top")]


@pytest.mark.parametrize("method", WARM[:3], ids=repr)
def test_later_hypergradients_of_a_run_go_on_from_the_first(method):
    runner = Runner(still(method))
    runner.run(6)
    found = residuals(runner)
    assert all(later < 0.9 * earlier for earlier, later in pairwise(found[:4]))
    cold = Runner(still(replace(method, warm_start=False)))
    cold.run(6)
    assert residuals(cold) == [found[0]] * 6
    assert [row["residual"] for row in runner.history.rows() if row["level"] == "top"] == found


def test_a_warm_series_comes_nearer_at_each_hypergradient():
    program = still(Neumann(num_terms=3, warm_start=True))
    runner, errors = Runner(program), []
    wanted = None
    for _ in range(6):
        runner.step()
        found = program.module("top")["x"].grad
        if wanted is None:
            wanted = mlodeco.hypergradient("top", program=program, hypergrad=Dense())["x"]
        errors.append(relative(found, wanted))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("method", WARM, ids=repr)
def test_a_second_run_starts_cold(method):
    program = still(method)
    grads = []
    for _ in range(2):
        Runner(program).step()
        grads.append(program.module("top")["x"].grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", WARM, ids=repr)
def test_a_hypergradient_of_ones_own_is_cold_and_leaves_the_run_alone(method):
    program = still(method, lower_rate=0.01, upper_rate=0.01)
    before = mlodeco.hypergradient("top", program=program)["x"]
    grads = {}
    for interrupts in (False, True):
        program = still(method, lower_rate=0.01, upper_rate=0.01)
        runner = Runner(program)
        for _ in range(4):
            runner.step()
            if interrupts:
                mlodeco.hypergradient("top", program=program)
        grads[interrupts] = program.module("top")["x"].grad.clone()
    assert torch.equal(grads[False], grads[True])
    Runner(still(method)).run(3)
    assert torch.equal(mlodeco.hypergradient("top", program=still(method))["x"], before)


def test_the_cosine_is_that_with_the_last_hypergradient():
    program = still(Dense(), lower_rate=0.3)
    runner, grads = Runner(program), []
    for _ in range(4):
        runner.step()
        grads.append(program.module("top")["x"].grad.clone())
    cosines = [record.cosine for record in runner.history.of("top")]
    assert cosines[0] is None
    for cosine, left, right in zip(cosines[1:], grads, grads[1:], strict=False):
        assert abs(cosine - float(torch.cosine_similarity(left, right, dim=0))) < 1e-12
    assert all(record.cosine is None for record in runner.history.of("low"))
    rows = list(runner.history.rows())
    assert [row["cosine"] for row in rows if row["level"] == "top"] == cosines
    assert {row["solver_steps"] for row in rows if row["level"] == "top"} == {12}
    assert {(r["solver_steps"], r["residual"]) for r in rows if r["level"] == "low"} == {(0, None)}


@pytest.mark.parametrize("method", WARM, ids=repr)
@pytest.mark.parametrize("event", ["after_backward", "hypergradient"])
def test_a_step_that_raises_leaves_the_memory_as_it_was(method, event):
    def finished(*, raises):
        program = still(method, lower_rate=0.01, upper_rate=0.01)
        ticks = iter(range(100))

        @program.on(event, level="top")
        def maybe(ctx):
            if next(ticks) == 1 and raises:
                raise KeyError("once")

        runner = Runner(program)
        runner.step()
        if raises:
            with pytest.raises(KeyError):
                runner.step()
        runner.step()
        runner.step()
        return program.module("top")["x"].detach().clone(), runner.history.of("top")

    plain, broken = finished(raises=False), finished(raises=True)
    assert torch.equal(plain[0], broken[0])
    assert plain[1] == broken[1]


def two_uppers(methods: Mapping[str, object], order=("left", "right")) -> Program:
    """Two upper levels over one lower level, with cotangents that have nothing in common."""
    program = Program()

    @program.level(
        "low", module={"w": randn(12, seed=4)}, data=[randn(1)], optimizer=partial(SGD, lr=0.0)
    )
    def low(low, batch, left, right):
        return low.w @ MATRIX @ low.w / 2 - (low.w * (left.x + right.x)).sum()

    for number, name in enumerate(order):

        def upper(own, batch, low, seed=number):
            return (low.w * randn(12, seed=20 + seed)).sum()

        program.level(
            name,
            lower=["low"],
            module={"x": randn(12, seed=5)},
            data=[randn(1)],
            optimizer=partial(SGD, lr=0.0),
            hypergrad=methods[name],
        )(upper)
    return program


@pytest.mark.parametrize("method", WARM, ids=repr)
def test_each_upper_level_has_a_memory_of_its_own(method):
    both = two_uppers({"left": method, "right": method})
    alone = two_uppers({"left": method, "right": None})
    Runner(both).run(4)
    Runner(alone).run(4)
    for program in (both, alone):
        assert program.module("left")["x"].grad.abs().sum() > 0
    assert torch.equal(both.module("left")["x"].grad, alone.module("left")["x"].grad)


def test_each_method_of_one_sweep_has_a_memory_of_its_own():
    """A diamond: two middle levels reach the lowest by different methods."""

    def build(first, second):
        program = Program()

        @program.level(
            "low", module={"w": randn(12, seed=4)}, data=[0], optimizer=partial(SGD, lr=0.0)
        )
        def low(low, batch, a, b, top):
            return low.w @ MATRIX @ low.w / 2 - (low.w * (a.x + 2 * b.x + top.y)).sum()

        for number, (name, method) in enumerate((("a", first), ("b", second))):

            def middle(own, batch, low, top, seed=number):
                return ((low.w - randn(12, seed=30 + seed)) * own.x * top.y).sum() + (
                    own.x**2
                ).sum()

            program.level(
                name,
                lower=["low"],
                module={"x": randn(12, seed=5 + number)},
                data=[0],
                optimizer=partial(SGD, lr=0.0),
                hypergrad=method,
            )(middle)

        @program.level(
            "top",
            lower=["a", "b"],
            module={"y": randn(12, seed=8)},
            data=[0],
            optimizer=partial(SGD, lr=0.0),
            hypergrad=Dense(),
        )
        def top(top, batch, a, b):
            return (a.x * randn(12, seed=40)).sum() + (b.x**2).sum()

        return program

    first = CG(max_steps=2, rtol=0.0, warm_start=True)
    second = MINRES(max_steps=3, rtol=0.0, warm_start=True)
    program = build(first, second)
    runner = Runner(program)
    runner.run(5)
    solves = [record.solves for record in runner.history.of("top")]
    assert all({s[1] for s in solve if s[0] == "low"} == {"CG", "MINRES"} for solve in solves)
    for name in ("CG", "MINRES"):
        found = [s[3] for solve in solves for s in solve if s[:2] == ("low", name)]
        assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("method", WARM, ids=repr)
def test_rollback_of_a_level_in_the_middle_keeps_running(method):
    program = Program()

    @program.level("low", module={"w": randn(12)}, data=[0], optimizer=partial(SGD, lr=0.1))
    def low(low, batch, mid):
        return low.w @ MATRIX @ low.w / 2 - (low.w * mid.x).sum()

    @program.level(
        "mid",
        lower=["low"],
        module={"x": randn(12, seed=1)},
        data=[0],
        hypergrad=method,
        optimizer=partial(SGD, lr=0.1),
        rollback=True,
    )
    def mid(mid, batch, low, top):
        return (low.w**2).sum() + ((mid.x - top.y) ** 2).sum()

    @program.level(
        "top",
        lower=["mid"],
        module={"y": randn(12, seed=2)},
        data=[0],
        hypergrad="identity",
        optimizer=partial(SGD, lr=0.1),
    )
    def top(top, batch, mid):
        return (mid.x**2).sum()

    runner = Runner(program)
    runner.run(5)
    found = [record.solves[0][3] for record in runner.history.of("mid")]
    if not isinstance(method, Neumann):
        assert found[-1] < found[0]


# ---- the power iteration of Neumann


class Counted(Neumann):
    """Counts the products of each solve."""

    def proceed(self, matvec, b, memory):
        counts = []

        def counting(x):
            counts.append(1)
            return matvec(x)

        found = super().proceed(counting, b, memory)
        CALLS.append(len(counts))
        return found


CALLS: list[int] = []


def assert_calls(*counts: int) -> None:
    assert tuple(CALLS) == counts


@pytest.mark.parametrize("power_steps", [5, 8])
def test_the_power_iteration_costs_one_product_from_the_second_hypergradient_on(power_steps):
    CALLS.clear()
    program = still(Counted(num_terms=4, power_steps=power_steps), lower_rate=0.01)
    Runner(program).run(4)
    assert_calls(power_steps + 3, 4, 4, 4)
    CALLS.clear()
    mlodeco.hypergradient("top", program=program)
    assert_calls(power_steps + 3)


def test_the_series_survives_a_sudden_rise_of_the_curvature():
    factor = [1.0]
    program = Program()

    @program.level("low", module={"w": randn(12)}, data=[0], optimizer=partial(SGD, lr=0.0))
    def low(low, batch, top):
        return factor[0] * (low.w @ MATRIX @ low.w / 2 - (low.w * top.x).sum())

    @program.level(
        "top",
        lower=["low"],
        module={"x": randn(12)},
        data=[0],
        optimizer=partial(SGD, lr=0.0),
        hypergrad=Neumann(num_terms=400),
    )
    def top(top, batch, low):
        return (low.w * B).sum()

    runner = Runner(program)
    runner.run(2)
    factor[0] = 100.0
    runner.run(1)
    assert runner.history.of("top")[-1].solves[0][4] == Status.TRUNCATED.value
    wanted = torch.linalg.solve(MATRIX, B)
    assert relative(program.module("top")["x"].grad, wanted) < 1e-4
    for _ in range(3):
        factor[0] /= 1000.0
        runner.run(1)
        assert torch.isfinite(program.module("top")["x"].grad).all()


# ---- Nystrom's sketch


def test_the_sketch_changes_in_a_run_and_repeats_in_the_next():
    def grads(run_seed, **options):
        program = still(Nystrom(rank=3, damping=0.1, **options))
        runner, found = Runner(program, seed=run_seed), []
        for _ in range(3):
            runner.step()
            found.append(program.module("top")["x"].grad.clone())
        return torch.stack(found)

    first, again, other = grads(1), grads(1), grads(2)
    assert torch.equal(first, again)
    assert not torch.allclose(first[0], first[1])
    assert not torch.allclose(first, other)
    fixed = grads(1, seed=7)
    assert torch.equal(fixed, fixed[:1].expand_as(fixed))
    assert torch.equal(fixed, grads(2, seed=7))
    program = still(Nystrom(rank=3, damping=0.1))
    assert torch.equal(
        mlodeco.hypergradient("top", program=program)["x"],
        mlodeco.hypergradient("top", program=program)["x"],
    )


# ---- curvature on a part of the batch

X, Y = randn(10, 6, seed=1), randn(10, seed=2)
Pair = collections.namedtuple("Pair", ["x", "y", "note"])


def as_tuple(x, y):
    return (x, y)


def as_dict(x, y):
    return {"x": x, "y": y, "note": "kept", "temperature": torch.tensor(2.0)}


def as_nested(x, y):
    return {"inputs": [x, {"more": 2 * x}], "y": y, "sizes": torch.ones(3)}


def as_named(x, y):
    return Pair(x, y, "kept")


def unpack(batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Pair):
        assert batch.note == "kept"
        return batch.x, batch.y
    if isinstance(batch, tuple):
        return batch
    if "inputs" in batch:
        assert batch["sizes"].shape == (3,)
        assert batch["inputs"][1]["more"].equal(2 * batch["inputs"][0])
        return batch["inputs"][0], batch["y"]
    assert batch["note"] == "kept"
    assert batch["temperature"].shape == ()
    return batch["x"], batch["y"]


SEEN: list[int] = []


def ridge(m, batch, h):
    x, y = unpack(batch)
    SEEN.append(len(y))
    return ((h.s.exp() * (x @ m.w - y)) ** 2).mean() + (m.w**2).sum()


def validation(h, batch, m):
    return ((batch[0] @ m.w - batch[1]) ** 2).mean()


def ridge_problem(batches, **options):
    return bilevel(
        ridge,
        validation,
        {"w": randn(6, seed=3)},
        {"s": randn(1, seed=4)},
        batches[0],
        (randn(20, 6, seed=5), randn(20, seed=6)),
        **options,
    )


def partly(whole_batches, cut_batches):
    """The dense answer with the Hessian of some batches and the cross product of others."""
    case = ridge_problem(whole_batches)
    w, h = case.program.module("low"), case.program.module("top")

    def mean(batches):
        return sum(ridge(w, batch, h) for batch in batches) / len(batches)

    both = reference.gradients(case.top(), [*case.top_parameters, *case.low_parameters])
    direct, b = both[:1], both[1:]
    field = reference.gradients(mean(cut_batches), case.low_parameters, create_graph=True)
    hessian = reference.jacobian(field, case.low_parameters)
    field = reference.gradients(mean(whole_batches), case.low_parameters, create_graph=True)
    cross = reference.jacobian(field, case.top_parameters)
    return direct - cross.T @ torch.linalg.solve(hessian.T, b)


FORMS = [as_tuple, as_dict, as_nested, as_named]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("fraction", "count"), [(0.3, 3), (0.31, 4), (0.7, 7), (1e-9, 1), (1.0, 10)]
)
@pytest.mark.parametrize("product", ["auto", "reverse", "forward"])
def test_the_hessian_is_of_the_first_samples_and_the_cross_product_of_all(
    form, fraction, count, product
):
    whole, part = form(X, Y), form(X[:count], Y[:count])
    wanted = partly([whole], [part])
    method = Dense(curvature_batch=fraction, product=product)
    assert relative(computed(ridge_problem([whole]), method), wanted) < 1e-10
    if count < 10:
        assert relative(wanted, partly([whole], [whole])) > 1e-3


@pytest.mark.parametrize(
    "method",
    [
        CG(max_steps=50, rtol=1e-13),
        MINRES(max_steps=50, rtol=1e-13),
        GMRES(max_steps=50, rtol=1e-13),
        Neumann(num_terms=900),
    ],
    ids=repr,
)
def test_all_solvers_take_a_part_of_the_batch(method):
    wanted = partly([(X, Y)], [(X[:5], Y[:5])])
    found = computed(ridge_problem([(X, Y)]), replace(method, curvature_batch=0.5))
    assert relative(found, wanted) < 1e-8


def test_each_micro_batch_is_cut():
    batches = [(X, Y), (randn(8, 6, seed=7), randn(8, seed=8))]
    cut = [(X[:5], Y[:5]), (batches[1][0][:4], batches[1][1][:4])]
    case = ridge_problem(batches, accumulate=2)
    found = mlodeco.hypergradient(
        "top", program=case.program, hypergrad=Dense(curvature_batch=0.5), batches={"low": batches}
    )["s"]
    assert relative(found, partly(batches, cut)) < 1e-10


def test_fields_and_keys_of_data_are_cut():
    def build(**options):
        program = Program()

        @program.level("top", lower=["low"], module={"s": randn(1, seed=4)}, data=[0])
        def top(top, batch, low):
            return validation(top, (randn(20, 6, seed=5), randn(20, seed=6)), low)

        return program

    by_fields, by_keys = build(), build()

    @by_fields.level("low", module={"w": randn(6, seed=3)}, data=[(X, Y)], fields=("x", "y"))
    def low(low, x, y, top):
        return ridge(low, (x, y), top)

    @by_keys.level("low", module={"w": randn(6, seed=3)}, data={"x": [X], "y": [Y]})
    def low_of_keys(low, x, y, top):
        return ridge(low, (x, y), top)

    wanted = partly([(X, Y)], [(X[:5], Y[:5])])
    for program in (by_fields, by_keys):
        method = Dense(curvature_batch=0.5)
        found = mlodeco.hypergradient("top", program=program, hypergrad=method)["s"]
        assert relative(found, wanted) < 1e-10


def test_a_part_of_the_batch_saves_samples():
    case = ridge_problem([(X, Y)])
    computed(case, Dense(curvature_batch=0.2))  # what is found out once
    seen = {}
    for fraction in (0.2, 1.0):
        SEEN.clear()
        computed(case, CG(max_steps=4, rtol=0.0, curvature_batch=fraction, product="difference"))
        seen[fraction] = list(SEEN)
    assert seen[1.0].count(2) == 0
    assert seen[0.2].count(2) >= 8  # two gradients a step
    assert seen[0.2].count(10) == 2  # those of the cross product
    assert sum(seen[0.2]) < 0.5 * sum(seen[1.0])


def test_a_fraction_is_rounded_up_but_not_by_rounding():
    x, y = randn(100, 6, seed=1), randn(100, seed=2)  # 0.07 * 100 > 7 in floating point
    case = ridge_problem([(x, y)])
    SEEN.clear()
    computed(case, Dense(curvature_batch=0.07, product="reverse"))
    assert set(SEEN) == {100, 7}


class Encoding(collections.UserDict):
    """A batch with attributes, as tokenizers give it."""

    def __getattr__(self, name):
        if name != "data" and name in self.data:
            return self.data[name]
        raise AttributeError(name)


def test_mappings_keep_their_class():
    def low(m, batch, h):
        return ridge(m, (batch.x, batch.y), h)

    case = bilevel(
        low,
        validation,
        {"w": randn(6, seed=3)},
        {"s": randn(1, seed=4)},
        Encoding(x=X, y=Y),
        (randn(20, 6, seed=5), randn(20, seed=6)),
    )
    wanted = partly([(X, Y)], [(X[:5], Y[:5])])
    assert relative(computed(case, Dense(curvature_batch=0.5)), wanted) < 1e-10


@pytest.mark.parametrize("batch", [0, "text", {"a": [1, 2]}, torch.tensor(1.0)])
def test_a_batch_without_samples_is_refused(batch):
    def low(m, batch, h):
        return ((m.w - h.s) ** 2).sum()

    case = bilevel(low, validation, {"w": randn(6, seed=3)}, {"s": randn(1, seed=4)}, batch, (X, Y))
    with pytest.raises(LossError, match=r"'low'.*curvature_batch=0.5"):
        computed(case, CG(curvature_batch=0.5))
    assert relative(computed(case, CG()), expected(case, reference.exact)) < 1e-9


def test_what_the_part_does_not_touch_gets_no_response():
    """Of a mixture of experts, the first samples may use some alone."""

    def low(m, batch, h):
        x, y = batch
        first = ((x[:2] @ m.one - y[:2]) ** 2).sum()
        rest = ((x[2:] @ m.two - y[2:]) ** 2).sum() if len(y) > 2 else 0.0
        return h.s.exp() * (first + rest) + (m.one**2).sum()

    def top(h, batch, m):
        return (m.one**2).sum() + (m.two**2).sum()

    modules = nn.ParameterDict({"one": randn(6, seed=1), "two": randn(6, seed=2)})
    case = bilevel(low, top, modules, {"s": randn(1)[0]}, (X, Y), randn(1))
    found = computed(case, Dense(curvature_batch=0.2))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("rows", [6, 10, 15])
def test_items_of_sources_stay_whole(rows):
    centers, top_batch = randn(rows, 6, seed=9), (randn(20, 6, seed=5), randn(20, seed=6))

    def pulled(m, batch, h):
        return ridge(m, batch, h) + h.s.exp()[0] * ((centers @ m.w) ** 2).mean()

    modules = {"w": randn(6, seed=3)}, {"s": randn(1, seed=4)}
    program, seen = Program(), []
    program.source("noise")([centers])

    @program.level("low", module=modules[0], data=[(X, Y)])
    def low(low, noise, batch, top):
        seen.append((len(noise), len(batch[0])))
        return ridge(low, batch, top) + top.s.exp()[0] * ((noise @ low.w) ** 2).mean()

    @program.level("top", lower=["low"], module=modules[1], data=[top_batch])
    def top(top, batch, low):
        return validation(top, batch, low)

    method = Dense(curvature_batch=0.5)
    found = mlodeco.hypergradient("top", program=program, hypergrad=method)["s"]
    assert set(seen) == {(rows, 10), (rows, 5)}
    case = bilevel(pulled, validation, *modules, (X, Y), top_batch)
    w, h = case.program.module("low"), case.program.module("top")
    own, reads = case.low_parameters, case.top_parameters
    both = reference.gradients(case.top(), [*reads, *own])
    half = reference.gradients(pulled(w, (X[:5], Y[:5]), h), own, create_graph=True)
    whole = reference.gradients(pulled(w, (X, Y), h), own, create_graph=True)
    hessian, cross = reference.jacobian(half, own), reference.jacobian(whole, reads)
    assert relative(found, both[:1] - cross.T @ torch.linalg.solve(hessian.T, both[1:])) < 1e-10


@pytest.mark.parametrize("by_name", [True, False])
def test_each_loader_is_cut_by_its_own_size(by_name):
    program, seen = Program(), set()
    data = {"labelled": [(X, Y)], "more": [randn(64, 6, seed=1)], "names": [["a", "b"]]}

    def loss(m, labelled, more, names, h):
        seen.add((len(labelled[0]), len(labelled[1]), len(more), len(names)))
        return ridge(m, labelled, h) + ((more @ m.w) ** 2).mean()

    def of_names(low, labelled, more, names, top):
        return loss(low, labelled, more, names, top)

    def of_batch(low, batch, top):
        return loss(low, batch["labelled"], batch["more"], batch["names"], top)

    program.level("low", module={"w": randn(6, seed=3)}, data=data)(
        of_names if by_name else of_batch
    )

    @program.level("top", lower=["low"], module={"s": randn(1, seed=4)}, data=[(X, Y)])
    def top(top, batch, low):
        return validation(top, batch, low)

    mlodeco.hypergradient("top", program=program, hypergrad=Dense(curvature_batch=0.5))
    assert seen == {(10, 10, 64, 2), (5, 5, 32, 2)}


class Kept(MutableMapping):
    """A mapping whose shallow copies share their entries."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


@pytest.mark.parametrize("kind", [Kept, dict, collections.OrderedDict, Encoding])
def test_the_users_batch_stays_whole(kind):
    batch = kind(x=X, y=Y)

    def low(m, batch, h):
        return ridge(m, (batch["x"], batch["y"]), h)

    modules = {"w": randn(6, seed=3)}, {"s": randn(1, seed=4)}
    top_batch = (randn(20, 6, seed=5), randn(20, seed=6))
    case = bilevel(low, validation, *modules, batch, top_batch)
    wanted = partly([(X, Y)], [(X[:5], Y[:5])])
    for _ in range(2):
        assert relative(computed(case, Dense(curvature_batch=0.5)), wanted) < 1e-10
        assert batch["x"] is X
        assert batch["y"] is Y
        assert len(batch) == 2


@pytest.mark.parametrize("product", ["auto", "reverse", "forward", "difference"])
@pytest.mark.parametrize("which", ["weights", "texts"])
def test_an_error_on_a_part_of_the_batch_names_the_option(which, product):
    def low(m, batch, h):
        texts, x, y = batch
        if which == "texts" and len(texts) != len(x):
            raise ValueError("a label for each text, please")
        weights = h.s.sigmoid() if which == "weights" else 1.0
        return (weights * (x @ m.w - y) ** 2).mean() + (h.s[0].exp() * m.w**2).sum()

    modules = {"w": randn(6, seed=3)}, {"s": randn(10, seed=4)}
    case = bilevel(low, validation, *modules, (["a"] * 10, X, Y), (X, Y))
    with pytest.raises((RuntimeError, ValueError)) as caught:
        computed(case, CG(curvature_batch=0.5, product=product))
    notes = " ".join(caught.value.__notes__)
    assert "curvature_batch=0.5" in notes
    assert "level 'low' (test_warm_start.py:" in notes
    assert notes.count("curvature_batch=1.0") == 1
    computed(case, CG(product=product))
