"""The linear solvers on matrices: against dense algebra, at the edges and with bad numbers."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mlodeco
from mlodeco.errors import MethodError, NonFiniteError, SolverWarning
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Dense,
    FiniteDifference,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Sama,
    Solution,
    Status,
)
from mlodeco.tree import Tree, flatten, is_zero, norm, unflatten
from tests import reference
from tests.problems import Problem, bilevel, classification, network, randn
from tests.test_hypergrad_exact import computed, expected, relative

EYE = partial(torch.eye, dtype=torch.float64)
KRYLOV = [CG, MINRES, GMRES]
MINIMAL = [MINRES, GMRES]


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q, _ = torch.linalg.qr(randn(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def spread(size: int, low: float, high: float) -> list[float]:
    return torch.linspace(low, high, size, dtype=torch.float64).tolist()


def split(vector: Tensor, dtypes: tuple[torch.dtype, torch.dtype] | None = None) -> Tree:
    """A tree of two parts, so that no solver may take its vectors for single tensors."""
    cut = (len(vector) + 1) // 2
    first, second = dtypes or (vector.dtype, vector.dtype)
    return {"a": vector[:cut].to(first), "b": vector[cut:].reshape(1, -1).to(second)}


def joined(tree: Tree) -> Tensor:
    return torch.cat([part.reshape(-1).double() for part in tree.values()])


class Product:
    """``x -> matrix x`` on trees, which counts its calls."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.calls = 0

    def __call__(self, tree: Tree) -> Tree:
        self.calls += 1
        vector = self.matrix @ joined(tree)
        cut = tree["a"].numel()
        return {
            "a": vector[:cut].reshape(tree["a"].shape).to(tree["a"].dtype),
            "b": vector[cut:].reshape(tree["b"].shape).to(tree["b"].dtype),
        }


def solve(method, matrix: Tensor, b: Tensor) -> tuple[Tensor, Solution]:
    found = method.solve(Product(matrix), split(b))
    return joined(found.value), found


def unrestarted(kind, **options):
    return kind(restart=500, **options) if kind is GMRES else kind(**options)


def left_over(matrix: Tensor, x: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(b - matrix @ x) / torch.linalg.vector_norm(b))


# ---- indefinite and singular systems


@pytest.mark.parametrize("kind", MINIMAL)
@pytest.mark.parametrize("size", [3, 12, 40])
def test_indefinite_systems_are_solved_where_cg_stops(kind, size):
    matrix, b = symmetric(spread(size, -1.0, 1.7)), randn(size, seed=2)
    x, found = solve(unrestarted(kind, max_steps=200, rtol=1e-12), matrix, b)
    assert found.status is Status.CONVERGED
    assert relative(x, torch.linalg.solve(matrix, b)) < 1e-9
    _, stopped = solve(CG(max_steps=200, rtol=1e-12), matrix, b)
    assert stopped.status is Status.INDEFINITE


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tolerance_is_reached_by_the_true_residual_and_not_before(kind, rtol, seed):
    low = 0.05 if kind is CG else -1.0
    matrix, b = symmetric(spread(30, low, 2.0), seed), randn(30, seed=seed + 10)
    method = unrestarted(kind, max_steps=200, rtol=rtol)
    x, found = solve(method, matrix, b)
    assert found.status is Status.CONVERGED
    assert left_over(matrix, x, b) <= rtol * (1 + 1e-4)
    assert math.isclose(found.residual, left_over(matrix, x, b), rel_tol=1e-3, abs_tol=1e-13)
    x, before = solve(replace(method, max_steps=found.steps - 1), matrix, b)
    assert before.status is Status.MAX_STEPS
    assert before.steps == found.steps - 1
    assert left_over(matrix, x, b) > rtol


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("factor", [1.0, 2.0, 1e-8, 1e8])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
def test_a_multiple_of_the_identity_is_hit_in_one_step(kind, factor, rtol):
    b = randn(7, seed=1)
    x, found = solve(kind(rtol=rtol), factor * torch.eye(7, dtype=torch.float64), b)
    assert relative(x, b / factor) < 1e-15
    assert found.steps == 1
    assert found.status is Status.CONVERGED


@pytest.mark.parametrize("kind", KRYLOV)
def test_as_many_steps_as_there_are_eigenvalues(kind):
    signs = [1.0, 1.0] if kind is CG else [1.0, -1.0]
    matrix = symmetric([signs[0]] * 5 + [2.0 * signs[1]] * 5 + [3.0] * 5)
    x, found = solve(kind(rtol=1e-12), matrix, randn(15, seed=3))
    assert found.steps == 3
    assert found.status is Status.CONVERGED
    assert relative(x, torch.linalg.solve(matrix, randn(15, seed=3))) < 1e-11


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("value", [3.0, -3.0])
def test_one_parameter(kind, value):
    b = {"a": torch.tensor([2.0], dtype=torch.float64)}
    found = kind().solve(lambda x: {"a": value * x["a"]}, b)
    if kind is CG and value < 0:
        assert found.status is Status.INDEFINITE
        return
    assert abs(float(found.value["a"]) - 2.0 / value) < 1e-15
    assert (found.steps, found.status) == (1, Status.CONVERGED)


@pytest.mark.parametrize("kind", MINIMAL)
def test_one_step_is_the_multiple_of_b_of_smallest_residual(kind):
    matrix, b = symmetric(spread(9, -1.0, 2.0)), randn(9, seed=4)
    x, found = solve(kind(max_steps=1), matrix, b)
    image = matrix @ b
    assert relative(x, b * (image @ b) / (image @ image)) < 1e-12
    assert (found.steps, found.status) == (1, Status.MAX_STEPS)
    assert math.isclose(found.residual, left_over(matrix, x, b), rel_tol=1e-12)


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("size", [4, 20, 60])
@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_singular_systems_with_a_solution_give_that_of_smallest_norm(kind, size, rtol):
    for seed in range(5):
        low = 0.1 if kind is CG else -1.0
        matrix = symmetric([0.0, *spread(size - 1, low, 2.0)], seed)
        b = matrix @ randn(size, seed=seed + 100)
        method = unrestarted(kind, max_steps=3 * size, rtol=rtol)
        x, found = solve(method, matrix, b)
        if rtol:
            assert found.status is Status.CONVERGED
        assert relative(x, torch.linalg.pinv(matrix, rtol=1e-9) @ b) < 1e-8


@pytest.mark.parametrize("kind", MINIMAL)
@pytest.mark.parametrize("size", [2, 4, 8, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_systems_without_a_solution_are_named_and_stay_bounded(kind, size, dtype):
    for seed in range(10):
        matrix = symmetric([0.0, *spread(size - 1, -1.0, 2.0)], seed)
        b = randn(size, seed=seed + 100)
        method = unrestarted(kind, max_steps=10 * size, rtol=1e-12)
        found = method.solve(Product(matrix), split(b.to(dtype)))
        smallest = torch.linalg.pinv(matrix, rtol=1e-9) @ b
        best = left_over(matrix, smallest, b)
        slack = 1e-5 if dtype is torch.float64 else 0.05
        assert found.status is Status.SINGULAR
        assert left_over(matrix, joined(found.value), b) < best + slack
        # the part along the null space is free, and of the size of that in the Krylov space
        assert joined(found.value).norm() < 50 * (smallest.norm() + b.norm())


def flat_curvature(size: int, count: int, seed: int) -> Tensor:
    """That of least squares with fewer samples than parameters: of rank ``count``."""
    return symmetric([0.0] * (size - count) + spread(count, 0.5, 2.0), seed)


@pytest.mark.parametrize(("size", "count"), [(2, 1), (12, 3), (20, 9), (40, 10), (60, 30)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("warm_start", [False, True])
def test_cg_names_flat_curvature_and_stays_bounded(size, count, dtype, warm_start):
    for seed in range(40):
        matrix, b = flat_curvature(size, count, seed), randn(size, seed=seed + 100)
        smallest = torch.linalg.pinv(matrix, rtol=1e-9) @ b
        method = CG(max_steps=10 * size, rtol=0.0, warm_start=warm_start)
        memory = {"solution": split((smallest + 0.1 * randn(size, seed=seed + 200)).to(dtype))}
        found, _ = method.proceed(Product(matrix), split(b.to(dtype)), memory)
        missed = left_over(matrix, joined(found.value), b)
        assert found.status is Status.SINGULAR
        # what a warm start adds along the null space is no step of least residual
        assert missed < left_over(matrix, smallest, b) + (0.15 if warm_start else 1e-4)
        assert found.residual == pytest.approx(missed, abs=1e-4)
        assert joined(found.value).norm() < 1000 * (smallest.norm() + b.norm())


@pytest.mark.parametrize("method", [CG(), CG(max_steps=300, rtol=0.0), MINRES()], ids=repr)
def test_a_flat_system_of_two_is_never_called_converged(method):
    for seed in range(400):
        matrix, b = symmetric([0.0, 3.0], seed), randn(2, seed=seed + 5)
        x, found = solve(method, matrix, b)
        missed = left_over(matrix, x, b)
        assert found.status is not Status.CONVERGED or missed < 1e-3
        assert found.residual == pytest.approx(missed, abs=0.02)
        assert missed < 1.01


def test_cg_that_goes_astray_within_its_steps_says_so_and_stays_bounded():
    values = torch.cat([torch.zeros(25), torch.logspace(-3, 0, 25)]).tolist()
    matrix, b = symmetric(values), randn(50, seed=5)
    x, found = solve(CG(max_steps=20), matrix, b)
    assert found.status is Status.GROWN
    assert found.status.is_trouble
    assert left_over(matrix, x, b) == pytest.approx(found.residual)
    _, least = solve(MINRES(max_steps=20), matrix, b)
    assert least.residual - 1e-6 < found.residual < 1.01 * least.residual


def test_cg_on_a_good_system_is_quiet_within_its_steps():
    for seed in range(20):
        matrix, b = symmetric(torch.logspace(-3, 0, 50).tolist(), seed), randn(50, seed=seed + 5)
        for steps in range(1, 40):
            _, found = solve(CG(max_steps=steps), matrix, b)
            assert found.status is Status.MAX_STEPS


@pytest.mark.parametrize("kind", KRYLOV)
def test_no_curvature_at_all(kind):
    x, found = solve(kind(), torch.zeros(5, 5, dtype=torch.float64), randn(5))
    assert torch.equal(x, torch.zeros(5, dtype=torch.float64))
    assert found.status is (Status.INDEFINITE if kind is CG else Status.SINGULAR)
    assert found.residual == pytest.approx(1.0)


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ((torch.float32, torch.float32), 1e-5),
        ((torch.float64, torch.float32), 1e-5),
        ((torch.bfloat16, torch.bfloat16), 0.05),
        ((torch.float32, torch.bfloat16), 0.05),
        ((torch.float16, torch.float16), 0.01),
    ],
)
def test_dtypes_of_the_parameters_are_kept(kind, dtypes, tolerance):
    matrix = symmetric(spread(12, 0.5 if kind is CG else -1.0, 2.0))
    b = split(randn(12, seed=1), dtypes)
    found = unrestarted(kind, max_steps=30, rtol=1e-6).solve(Product(matrix), b)
    assert {key: part.dtype for key, part in found.value.items()} == {
        key: part.dtype for key, part in b.items()
    }
    assert relative(joined(found.value), torch.linalg.solve(matrix, joined(b))) < tolerance


# ---- restarts


def test_a_restart_may_stall_and_says_so():
    size = 8
    shift = torch.roll(torch.eye(size, dtype=torch.float64), 1, dims=0)
    b = torch.eye(size, dtype=torch.float64)[0]
    x, stalled = solve(GMRES(max_steps=24, restart=size - 1), shift, b)
    assert torch.equal(x, torch.zeros(size, dtype=torch.float64))
    assert (stalled.steps, stalled.status, stalled.residual) == (24, Status.MAX_STEPS, 1.0)
    x, found = solve(GMRES(max_steps=24, restart=size), shift, b)
    assert relative(x, shift.T @ b) < 1e-14
    assert (found.steps, found.status) == (size, Status.CONVERGED)


@pytest.mark.parametrize("restart", [1, 2, 5, 7])
def test_restarts_equal_repeated_solves_of_what_is_left(restart):
    matrix = symmetric(spread(9, 0.3, 2.0)) + 0.4 * randn(9, 9, seed=5) / 9
    b, x = randn(9, seed=6), torch.zeros(9, dtype=torch.float64)
    for steps in (restart, restart, 1):
        x = x + reference.minimal_residual(steps)(matrix, b - matrix @ x)
    found, solution = solve(GMRES(max_steps=2 * restart + 1, restart=restart, rtol=0), matrix, b)
    assert relative(found, x) < 1e-9
    assert solution.steps == 2 * restart + 1
    assert math.isclose(solution.residual, left_over(matrix, x, b), rel_tol=1e-6)


def test_an_invariant_space_that_holds_no_solution_is_exhausted():
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    matrix[0, 1] = 1.0  # b = e_1: H b = 0
    x, found = solve(GMRES(), matrix, torch.eye(4, dtype=torch.float64)[0])
    assert (found.status, found.steps, found.residual) == (Status.SINGULAR, 1, 1.0)
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("size", [2, 8, 25, 60])
def test_an_exhausted_space_that_holds_the_solution_is_no_trouble(size):
    for seed in range(60):
        matrix, b = symmetric(spread(size, 0.1, 3.0), seed), randn(size, seed=seed + 5)
        x, found = solve(GMRES(max_steps=300, rtol=0.0, restart=300), matrix, b)
        assert found.status is Status.CONVERGED
        assert left_over(matrix, x, b) < 1e-13


# ---- Nystrom


def sketch_of(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, dtype=torch.float64, generator=generator) for _ in range(rank)]
    return torch.linalg.qr(torch.stack(drawn, dim=1))[0]


@pytest.mark.parametrize("rank", [1, 3, 8, 11])
@pytest.mark.parametrize("damping", [1.0, 1e-2])
@pytest.mark.parametrize("definite", [True, False])
def test_nystrom_inverts_its_approximation(rank, damping, definite):
    size = 12
    matrix = symmetric(spread(size, 0.2 if definite else -0.8, 3.0))
    b, s = randn(size, seed=1), sketch_of(size, rank, 7)
    image = matrix @ s
    low_rank = image @ torch.linalg.inv(s.T @ image) @ image.T
    damped = low_rank + damping * torch.eye(size, dtype=torch.float64)
    product = Product(matrix + damping * torch.eye(size, dtype=torch.float64))
    found = Nystrom(rank=rank, damping=damping, seed=7).solve(product, split(b))
    assert product.calls == found.steps == rank
    assert relative(joined(found.value), torch.linalg.solve(damped, b)) < 1e-9
    has_negative = bool(torch.linalg.eigvalsh(damped)[0] < 0)
    assert found.status is (Status.INDEFINITE if has_negative else Status.TRUNCATED)


def nystrom(matrix: Tensor, b: Tensor, damping: float, **options) -> tuple[Tensor, Solution]:
    whole = matrix + damping * torch.eye(len(matrix), dtype=torch.float64)
    return solve(Nystrom(damping=damping, **options), whole, b)


def test_nystrom_of_a_rank_above_the_size_takes_the_size():
    matrix, b = symmetric(spread(6, 0.2, 3.0)), randn(6)
    x, found = nystrom(matrix, b, 0.1, rank=100)
    assert found.steps == 6
    assert relative(x, torch.linalg.solve(matrix + 0.1 * EYE(6), b)) < 1e-12


@pytest.mark.parametrize("rank", [3, 5, 10])
def test_nystrom_is_exact_from_the_rank_of_the_hessian_on(rank):
    matrix, b = symmetric([0.0] * 7 + [1.0, 2.0, 3.0]), randn(10)
    x, found = nystrom(matrix, b, 0.1, rank=rank)
    assert relative(x, torch.linalg.solve(matrix + 0.1 * EYE(10), b)) < 1e-10
    assert found.status is Status.TRUNCATED


def test_nystrom_without_curvature_divides_by_the_damping():
    x, _ = nystrom(torch.zeros(5, 5, dtype=torch.float64), randn(5), 0.1, rank=3)
    assert relative(x, randn(5) / 0.1) < 1e-12


def test_nystrom_on_curvature_that_the_damping_cancels_stays_finite():
    matrix = torch.diag(torch.tensor([-0.5, 1.0], dtype=torch.float64))
    x, found = nystrom(matrix, randn(2), 0.5, rank=2)
    assert found.status is Status.INDEFINITE
    assert torch.isfinite(x).all()


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: set[int] = set()

    def free(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.held -= count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.untyped_storage()._cdata not in self.known:
                storage = part.untyped_storage()
                self.known.add(storage._cdata)
                self.held += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result


def test_nystrom_keeps_two_vectors_for_each_rank():
    size, rank = 50_000, 30
    b = {"a": randn(size).float()}
    with Peak() as mode:
        Nystrom(rank=rank, damping=1.0).solve(lambda x: {"a": 2.0 * x["a"]}, b)
    assert 2 * rank <= mode.peak / (size * 4) < 2 * rank + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_nystrom_in_half_precision(dtype):
    matrix, b = symmetric(spread(12, 0.2, 2.0)), split(randn(12, seed=1), (dtype, dtype))
    whole = matrix + 0.5 * torch.eye(12, dtype=torch.float64)
    found = Nystrom(rank=12, damping=0.5).solve(Product(whole), b)
    assert {part.dtype for part in found.value.values()} == {dtype}
    assert relative(joined(found.value), torch.linalg.solve(whole, joined(b))) < 0.05


# ---- numbers that are too large, too small or none


def scaled_problem(curvature: float, slope: float, dtype: torch.dtype) -> Problem:
    matrix = symmetric(spread(6, 0.5, 2.0)).to(dtype)

    def low(m, batch, h):
        return curvature * (m.w @ matrix @ m.w / 2 - (m.w * h.x).sum())

    def top(h, batch, m):
        return slope * (m.w * batch).sum()

    modules = {"w": randn(6).to(dtype)}, {"x": randn(6, seed=2).to(dtype)}
    return bilevel(low, top, *modules, randn(1), randn(6, seed=3).to(dtype))


SOLVERS = [
    CG(rtol=1e-7),
    MINRES(rtol=1e-7),
    GMRES(rtol=1e-7),
    Neumann(num_terms=200),
    Dense(),
]


@pytest.mark.parametrize("method", SOLVERS, ids=repr)
@pytest.mark.parametrize(
    ("curvature", "slope"), [(1.0, 1e-30), (1.0, 1e30), (1e-30, 1.0), (1e30, 1.0)]
)
def test_scales_cancel(method, curvature, slope):
    case = scaled_problem(curvature, slope, torch.float32)
    found = computed(case, method).double()
    wanted = torch.linalg.solve(symmetric(spread(6, 0.5, 2.0)), slope * randn(6, seed=3))
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("method", [*SOLVERS, Nystrom(rank=6, damping=1e-9, seed=0)], ids=repr)
@pytest.mark.parametrize("slope", [1e-300, 1e-170, 1e-155, 1e-101, 1e101, 1e160, 1e300])
@pytest.mark.parametrize("warm_start", [False, True])
def test_scales_beyond_the_square_root_of_the_range_cancel(method, slope, warm_start):
    if hasattr(method, "warm_start"):
        method = replace(method, warm_start=warm_start)
    found = computed(scaled_problem(1.0, slope, torch.float64), method) / slope
    wanted = torch.linalg.solve(symmetric(spread(6, 0.5, 2.0)), randn(6, seed=3))
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("value", [1e-320, 1e-170, 1e-155, 1e-20, 1.0, 1e155, 1e170, 1e300])
def test_norms_are_free_of_overflow_and_underflow_in_double_precision(value):
    tree = split(torch.tensor([3.0, 0.0, 4.0, 0.0], dtype=torch.float64) * value)
    assert norm(tree) == pytest.approx(5.0 * value, rel=1e-3 if value < 1e-300 else 1e-14)
    assert not is_zero(tree)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_the_norm_of_what_is_not_finite_is_not_finite(bad):
    assert not math.isfinite(norm(split(torch.tensor([1.0, bad, 0.0], dtype=torch.float64))))


ALL = [
    *SOLVERS,
    Nystrom(rank=3),
    Nystrom(rank=9),
    Neumann(),
    Neumann(num_terms=4, step_size=0.5),
    CG(warm_start=True),
    MINRES(warm_start=True),
    GMRES(restart=2),
]
FIRST_ORDER = [Identity(), FiniteDifference()]


@pytest.mark.parametrize("method", ALL + FIRST_ORDER, ids=repr)
def test_a_zero_cotangent_costs_nothing_and_gives_the_direct_gradient(method):
    case = scaled_problem(1.0, 0.0, torch.float64)
    assert torch.equal(computed(case, method), torch.zeros(6, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize("method", ALL + FIRST_ORDER, ids=repr)
@pytest.mark.parametrize("product", ["auto", "forward"])
def test_without_curvature_the_solution_is_finite(method, product):
    def low(m, batch, h):
        return (m.w * h.x).sum()

    def top(h, batch, m):
        return (m.w * batch).sum()

    case = bilevel(low, top, {"w": randn(4)}, {"x": randn(4)}, randn(1), randn(4, seed=3))
    if not isinstance(method, FiniteDifference):
        method = replace(method, product=product)
    found = computed(case, method)
    assert torch.isfinite(found).all()
    if isinstance(method, Nystrom):
        assert relative(found, -randn(4, seed=3) / method.damping) < 1e-12


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("method", ALL, ids=repr)
def test_curvature_that_is_not_finite_names_level_and_method(method, bad):
    def low(m, batch, h):
        return (m.w * h.x).sum() + BadCurvature.apply(m.w, bad)

    def top(h, batch, m):
        return (m.w * batch).sum()

    case = bilevel(low, top, {"w": randn(4)}, {"x": randn(4)}, randn(1), randn(4, seed=3))
    with pytest.raises(NonFiniteError, match=rf"'low'.*solution of {type(method).__name__} ") as e:
        computed(case, method)
    assert "singular" not in str(e.value)
    assert "max_steps" not in str(e.value)


class BadCurvature(torch.autograd.Function):
    """Zero with a zero gradient, the derivative of which is anything."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.save_for_backward(x)
        ctx.bad = bad
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return BadSlope.apply(x, ctx.bad) * grad, None


class BadSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, ctx.bad), None


@pytest.mark.parametrize("method", ALL + FIRST_ORDER, ids=repr)
def test_a_cotangent_that_is_not_finite_names_the_level(method):
    case = scaled_problem(1.0, math.inf, torch.float64)
    with pytest.raises(NonFiniteError, match=r"'(low|top)'"):
        computed(case, method)


def test_a_series_that_overflows_is_called_diverging():
    case = scaled_problem(1e30, 1.0, torch.float32)
    with pytest.raises(
        NonFiniteError, match=r"Neumann after 4 steps .the terms of the series grow"
    ):
        computed(case, Neumann(num_terms=4, step_size=1.0))


# ---- options


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *[
            (kind, options)
            for kind in KRYLOV
            for options in (
                {"max_steps": 0},
                {"max_steps": 2.0},
                {"max_steps": True},
                {"rtol": -1e-3},
                {"rtol": math.nan},
                {"warm_start": 1},
                {"warm_start": "yes"},
            )
        ],
        (GMRES, {"restart": 0}),
        (Neumann, {"warm_start": None}),
        (Neumann, {"power_steps": 0}),
        (Nystrom, {"rank": 0}),
        (Nystrom, {"rank": 1.5}),
        (Nystrom, {"damping": 0.0}),
        (Nystrom, {"seed": -1}),
        (Nystrom, {"seed": 1.0}),
        *[
            (kind, options)
            for kind in (*KRYLOV, Neumann, Nystrom, Dense)
            for options in (
                {"curvature_batch": 0.0},
                {"curvature_batch": 1.5},
                {"curvature_batch": math.inf},
                {"damping": -1.0},
                {"product": "backward"},
            )
        ],
    ],
)
def test_options_are_checked_with_the_methods_name(make, options):
    (option,) = options
    with pytest.raises(MethodError, match=rf"{make.__name__}\({option}="):
        make(**options)


@pytest.mark.parametrize(
    ("make", "wrong", "right"),
    [
        (CG, "max_step", "max_steps"),
        (MINRES, "warmstart", "warm_start"),
        (GMRES, "restarts", "restart"),
        (Nystrom, "ranks", "rank"),
        (Neumann, "power_step", "power_steps"),
        (Sama, "scales", "scale"),
        (Dense, "curvature_batches", "curvature_batch"),
    ],
)
def test_an_unknown_option_gets_a_hint(make, wrong, right):
    with pytest.raises(MethodError, match=rf"{make.__name__} has no option '{wrong}'") as caught:
        make(**{wrong: 1})
    assert f"Did you mean {right!r}?" in str(caught.value)


# ---- a gradient field whose Jacobian is not symmetric


class Skewed(torch.autograd.Function):
    """``x * y``, with a gradient towards x that is scaled by a function of y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y * (1 + 3 * y**2), grad * x

    @staticmethod
    def jvp(ctx, dx, dy):
        x, y = ctx.saved_tensors
        return dx * y + x * dy


def skewed(*, by_hook: bool = False) -> Problem:
    """A lower loss whose gradient field is that of no scalar."""

    def product(x, y):
        if not by_hook:
            return Skewed.apply(x, y)
        reached = x.view_as(x)
        if reached.requires_grad:  # not so in cross products by duals
            reached.register_hook(lambda grad: grad * (1 + 3 * y**2))
        return reached * y

    def low(m, batch, h):
        return (
            product(m.x, m.y + h.s / 2).sum()
            + 2.0 * (m.x**2).sum()
            + 2.5 * (m.y**2).sum()
            + (m.x.sum() * m.y).sum() / 5
        )

    def top(h, batch, m):
        return (m.x * batch).sum() + (m.y**2).sum() / 2

    modules = {"x": 0.7 * randn(4, seed=1), "y": 0.7 * randn(4, seed=2)}, {"s": randn(4, seed=3)}
    return bilevel(low, top, *modules, randn(1), randn(4, seed=4))


def field(case: Problem) -> Tensor:
    return reference.gradients(case.low(), case.low_parameters)


def numeric_jacobian(case: Problem, inputs: list[Tensor], step: float = 1e-5) -> Tensor:
    columns = []
    for tensor in inputs:
        for number in range(tensor.numel()):
            sides = []
            for sign in (1.0, -1.0):
                with torch.no_grad():
                    tensor.view(-1)[number] += sign * step
                sides.append(field(case))
                with torch.no_grad():
                    tensor.view(-1)[number] -= sign * step
            columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns, dim=1)


def dense_answer(case: Problem, transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """By numeric Jacobians of the gradient field in w and in lambda."""
    jacobian = numeric_jacobian(case, case.low_parameters)
    cross = numeric_jacobian(case, case.top_parameters)
    b = reference.gradients(case.top(), case.low_parameters)
    return -cross.T @ torch.linalg.solve(transpose(jacobian), b)


@pytest.mark.parametrize("product", ["auto", "reverse"])
def test_a_jacobian_that_is_not_symmetric_is_solved_transposed(product):
    case = skewed()
    jacobian = numeric_jacobian(case, case.low_parameters)
    assert relative(jacobian.T, jacobian) > 0.05
    wanted = dense_answer(case, torch.t)
    assert relative(dense_answer(case, lambda matrix: matrix), wanted) > 0.01
    dense = computed(case, Dense(product=product))
    gmres = computed(case, GMRES(max_steps=8, rtol=1e-13, product=product))
    assert relative(dense, wanted) < 1e-8
    assert relative(gmres, dense) < 1e-9
    assert relative(computed(case, Neumann(num_terms=800, product=product)), dense) < 1e-9
    for symmetric_only in (CG, MINRES):
        method = symmetric_only(max_steps=8, rtol=1e-13, product=product)
        assert relative(computed(case, method), wanted) > 1e-3


@dataclass(frozen=True, kw_only=True)
class Recorded(Implicit):
    """Notes the matrix of its products."""

    seen: list[Tensor]

    def solve(self, matvec, b):
        size = sum(part.numel() for part in b.values())
        units = [unflatten(e, b) for e in EYE(size)]
        self.seen.append(torch.stack([flatten(matvec(e)) for e in units], dim=1))
        return Solution(b, 1, None, Status.TRUNCATED)


def matrix_of(case: Problem, product: str) -> Tensor:
    seen: list[Tensor] = []
    computed(case, Recorded(product=product, seen=seen))
    return seen[0]


def test_forward_products_and_differences_take_the_jacobian_itself():
    case = skewed()
    jacobian = numeric_jacobian(case, case.low_parameters)
    assert relative(matrix_of(case, "reverse"), jacobian.T) < 1e-8
    assert relative(matrix_of(case, "forward"), jacobian) < 1e-8
    assert relative(matrix_of(case, "difference"), jacobian) < 1e-6


def test_forward_cross_products_are_along_w_as_well():
    """The tangent of dC/dlambda, where the transposed derivative of dC/dw was meant."""
    case = skewed()
    b = reference.gradients(case.top(), case.low_parameters)
    true = numeric_jacobian(case, case.top_parameters).T @ b
    slope = reference.gradients(case.low(), case.top_parameters, create_graph=True)
    along_w = reference.jacobian(slope, case.low_parameters) @ b
    assert relative(along_w, true) > 0.05
    assert relative(-computed(case, Identity(product="reverse")), true) < 1e-8
    assert relative(-computed(case, Identity(product="forward")), along_w) < 1e-8


def test_hooks_on_tensors_act_again_in_the_second_backward_pass():
    """A fact of autograd: forward products give J, those in reverse another matrix than J^T."""
    case = skewed(by_hook=True)
    jacobian = numeric_jacobian(case, case.low_parameters)
    assert relative(matrix_of(case, "forward"), jacobian) < 1e-8
    assert relative(matrix_of(case, "reverse"), jacobian.T) > 0.01


def test_trouble_is_told():
    case = scaled_problem(1.0, 1.0, torch.float64)
    assert relative(computed(case, MINRES()), expected(case, reference.exact)) < 1e-6

    def low(m, batch, h):
        return (m.w[0] - h.x) ** 2 / 2 + 0.0 * m.w[1]

    def top(h, batch, m):
        return m.w.sum()

    flat = bilevel(low, top, {"w": randn(2)}, {"x": randn(1)[0]}, randn(1), randn(1))
    with pytest.warns(SolverWarning, match="MINRES after .* singular"):
        computed(flat, MINRES())


@pytest.mark.parametrize("samples", [2, 3, 5, 9])
def test_cg_on_fewer_samples_than_parameters_warns_and_gives_the_least_squares_answer(samples):
    def low(m, batch, h):
        return h.s * ((batch[0] @ m.w - batch[1]) ** 2).mean()

    def top(h, batch, m):
        return ((batch[0] @ m.w - batch[1]) ** 2).mean()

    def single(*shape, seed):
        return randn(*shape, seed=seed).float()

    case = bilevel(
        low,
        top,
        {"w": single(20, seed=1)},
        {"s": torch.ones(1)},
        (single(samples, 20, seed=2), single(samples, seed=3)),
        (single(20, 20, seed=4), single(20, seed=5)),
    )
    with pytest.warns(SolverWarning, match="CG after .* singular"):
        found = computed(case, CG())
    assert relative(found, computed(case, Dense())) < 1e-2


# ---- the product "forward"


class Noisy(nn.Module):
    """Dropout, BatchNorm and a value that gradients do not pass."""

    def __init__(self):
        super().__init__()
        self.first = network(2, 4, seed=1)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.drop = nn.Dropout(0.4)
        self.last = network(4, 3, seed=2)

    def forward(self, x):
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        with torch.no_grad():
            size = hidden.norm(dim=1, keepdim=True) + 1.0
        return self.last(hidden / size)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("method", [Dense(damping=0.5), Identity()], ids=repr)
def test_forward_equals_reverse_and_leaves_nothing_behind(method, accumulate, detach):
    case = classification(Noisy(), detach=detach, accumulate=accumulate)
    labels = torch.randint(0, 3, (16,), generator=torch.Generator().manual_seed(1))
    batches = [(randn(16, 2, seed=n), labels.roll(n)) for n in range(accumulate)]
    model = case.program.module("low")
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    stream = torch.get_rng_state()
    found = {}
    for product in ("reverse", "forward", "forward"):
        given = {"low": batches if accumulate > 1 else batches[0]}
        chosen = replace(method, product=product)
        one = mlodeco.hypergradient("top", program=case.program, hypergrad=chosen, batches=given)
        if product in found:
            assert all(torch.equal(found[product][key], one[key]) for key in one)
        found[product] = one
    for key, value in found["reverse"].items():
        assert relative(found["forward"][key], value) < 1e-10
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.autograd.forward_ad._current_level == -1


def branching(accumulate: int) -> Problem:
    """A loss whose flagged batches alone touch one of two parameters."""

    def low(m, batch, h):
        x, y, flag = batch
        loss = (h.s.sigmoid() * (x @ m.w - y) ** 2).mean() + 0.2 * (m.w**2).sum()
        return loss + ((m.u - h.s[0]) ** 4).sum() + m.u @ m.w + (m.u**2).sum() if flag else loss

    def top(h, batch, m):
        return ((batch[0] @ (m.w + m.u) - batch[1]) ** 2).mean()

    modules = {"w": randn(3, seed=1), "u": randn(3, seed=2)}, {"s": randn(6, seed=3)}
    first = (randn(6, 3, seed=4), randn(6, seed=5), 0)
    last = (randn(5, 3, seed=6), randn(5, seed=7))
    return bilevel(low, top, *modules, first, last, accumulate=accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("product", ["auto", "forward", "difference", "reverse_over_forward"])
def test_parameters_that_only_a_later_batch_touches_enter_the_solve(product, accumulate):
    case = branching(accumulate)
    flagged = (randn(6, 3, seed=8), randn(6, seed=9), 1)
    plain = (randn(6, 3, seed=4), randn(6, seed=5), 0)
    if accumulate == 1:
        mlodeco.hypergradient("top", program=case.program, hypergrad=Dense(product=product))
    batches = {"low": flagged if accumulate == 1 else [plain, flagged]}
    found, wanted = (
        mlodeco.hypergradient("top", program=case.program, hypergrad=method, batches=batches)["s"]
        for method in (Dense(product=product), Dense(product="reverse"))
    )
    assert relative(found, wanted) < (1e-6 if product == "difference" else 1e-10)


@pytest.mark.parametrize("method", [CG(max_steps=6), Neumann(num_terms=6, step_size=0.01)])
def test_a_product_is_freed_before_the_next_one(method):
    matrix = symmetric(spread(12, 1.0, 20.0))
    last: list[weakref.ref[Tensor]] = []

    def matvec(x: Tree) -> Tree:
        assert all(ref() is None for ref in last)
        product = split(matrix @ joined(x))
        last[:] = [weakref.ref(part) for part in product.values()]
        return product

    assert method.solve(matvec, split(randn(12))).steps == 6
