"""Every method on every problem against its own dense formula, in float64."""

import pytest
import torch
from torch import Tensor

import mlodeco
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    Solution,
    Status,
)
from tests import reference
from tests.methods import METHODS
from tests.problems import PROBLEMS, bilevel, network, quadratic, randn, spd


def computed(problem, method, **options) -> Tensor:
    found = mlodeco.hypergradient("top", program=problem.program, hypergrad=method, **options)
    return reference.flat(list(found.values()))


def expected(problem, solve) -> Tensor:
    return reference.bilevel(
        problem.top, problem.low, problem.top_parameters, problem.low_parameters, solve
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (method, problem)
        for method in METHODS
        for problem in PROBLEMS
        if not (METHODS[method].by_difference and problem == "detached_weights")
    ],
)
def test_equals_its_dense_formula(method, problem):
    row, case = METHODS[method], PROBLEMS[problem]()
    assert relative(computed(case, row.method), expected(case, row.solve)) < row.tolerance


def test_finite_difference_sees_through_detach():
    live, detached = PROBLEMS["live_weights"](), PROBLEMS["detached_weights"]()
    through = computed(detached, FiniteDifference())
    assert relative(through, expected(live, reference.scaled(1.0))) < 1e-6
    assert relative(through, expected(detached, reference.scaled(1.0))) > 0.1


@pytest.mark.parametrize("problem", PROBLEMS)
def test_none_is_the_direct_gradient(problem):
    case = PROBLEMS[problem]()
    wanted = reference.gradients(case.top(), case.top_parameters)
    assert torch.equal(computed(case, None), wanted)


def test_neumann_improves_with_terms():
    case = quadratic()
    wanted = expected(case, reference.exact)
    errors = [relative(computed(case, Neumann(num_terms=n)), wanted) for n in (1, 5, 20, 100)]
    assert errors == sorted(errors, reverse=True)


def test_automatic_step_converges_where_a_step_of_one_diverges():
    steep = spd(8, 1, 0.5, 50.0)

    def low(m, batch, h):
        return m.w @ steep @ m.w / 2 - m.w @ h.x

    def top(h, batch, m):
        return ((m.w - batch) ** 2).sum()

    case = bilevel(low, top, {"w": randn(8)}, {"x": randn(8, seed=2)}, randn(1), randn(8, seed=3))
    wanted = expected(case, reference.exact)
    assert relative(computed(case, Neumann(num_terms=2000)), wanted) < 1e-6
    with pytest.warns(mlodeco.errors.SolverWarning, match="step_size"):
        assert relative(computed(case, Neumann(num_terms=20, step_size=1.0)), wanted) > 1e3


ROBUST = [
    Identity(),
    FiniteDifference(),
    Neumann(),
    Neumann(num_terms=4, step_size=1.0),
    CG(max_steps=4, rtol=0.0),
    CG(),
    MINRES(),
    GMRES(),
    Nystrom(rank=9),
    Dense(),
]


@pytest.mark.parametrize("method", ROBUST, ids=repr)
def test_zero_right_hand_side_gives_the_direct_gradient(method):
    def low(m, batch, h):
        return (m.w**2).sum() + (m.w * h.x).sum()

    def top(h, batch, m):
        return 0.0 * m.w.sum() + (h.x**2).sum()

    case = bilevel(low, top, {"w": randn(4)}, {"x": randn(4, seed=2)}, randn(1), randn(1))
    assert torch.equal(computed(case, method), 2 * case.top_parameters[0].detach())


@pytest.mark.parametrize("method", ROBUST, ids=repr)
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_multiples_of_the_identity_are_hit_exactly_and_early(method, factor):
    def low(m, batch, h):
        return factor * (m.w**2).sum() / 2 - (m.w * h.x).sum()

    def top(h, batch, m):
        return ((m.w - batch) ** 2).sum() / 2

    case = bilevel(low, top, {"w": randn(4)}, {"x": randn(4, seed=2)}, randn(1), randn(4, seed=3))
    found = computed(case, method)
    wanted = expected(case, reference.exact)
    assert torch.isfinite(found).all()
    exact = isinstance(method, CG | MINRES | GMRES | Dense) or (
        isinstance(method, Neumann) and factor == 1.0
    )
    if exact or (isinstance(method, Neumann) and method.step_size == "auto"):
        assert relative(found, wanted) < 1e-12


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize("method", ROBUST, ids=repr)
def test_unused_and_frozen_parameters_change_nothing(method):
    def build(*, extra):
        model = network(3, 4, 1, seed=1)
        if extra:
            model.register_parameter("unused", torch.nn.Parameter(randn(5)))
            model.register_parameter("fixed", torch.nn.Parameter(randn(5), requires_grad=False))

        def low(m, batch, h):
            decay = sum((p**2).sum() for n, p in m.named_parameters() if n[0].isdigit())
            return (h.s.exp() * (m(batch) ** 2)[:, 0]).mean() + 3.0 * decay

        def top(h, batch, m):
            penalty = (m.unused**2).sum() * 3 if extra else 0.0
            return ((m(batch) - 1) ** 2).mean() + penalty

        return bilevel(
            low, top, model, {"s": randn(9, seed=2)}, randn(9, 3, seed=3), randn(7, 3, seed=4)
        )

    assert torch.allclose(
        computed(build(extra=True), method),
        computed(build(extra=False), method),
        rtol=1e-6 if isinstance(method, FiniteDifference) else 1e-12,
        atol=0,
    )


def test_indefinite_curvature_is_reported():
    a = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))

    def low(m, batch, h):
        return m.w @ a @ m.w / 2 - (m.w * h.x).sum()

    def top(h, batch, m):
        return m.w.sum()

    case = bilevel(low, top, {"w": randn(2)}, {"x": randn(2, seed=2)}, randn(1), randn(1))
    with pytest.warns(mlodeco.errors.SolverWarning, match="damping"):
        computed(case, CG())
    assert relative(computed(case, Dense()), expected(case, reference.exact)) < 1e-12


def test_singular_curvature_is_solved_in_the_least_squares_sense():
    def low(m, batch, h):
        return m.w[0] ** 2 / 2 + 0.0 * m.w[1] - m.w[0] * h.x[0]

    def top(h, batch, m):
        return (m.w**2).sum() / 2

    case = bilevel(low, top, {"w": randn(2)}, {"x": randn(1, seed=2)}, randn(1), randn(1))
    with pytest.warns(mlodeco.errors.SolverWarning, match="singular"):
        found = computed(case, Dense())
    assert torch.allclose(found, case.low_parameters[0][:1].detach())


def test_registered_solvers_are_used_by_name_and_as_functions():
    case = quadratic()

    @case.program.method("direct_solver")
    def solve(matvec, b):
        size = sum(v.numel() for v in b.values())
        eye = torch.eye(size, dtype=torch.float64)
        rows = [mlodeco.tree.flatten(matvec(mlodeco.tree.unflatten(e, b))) for e in eye]
        x = torch.linalg.solve(torch.stack(rows, dim=1), mlodeco.tree.flatten(b))
        return mlodeco.tree.unflatten(x, b)

    wanted = expected(case, reference.exact)
    assert relative(computed(case, "direct_solver"), wanted) < 1e-10
    assert relative(computed(case, solve), wanted) < 1e-10


def test_registered_solver_with_a_wrong_result_is_named():
    case = quadratic()
    case.program.method("broken")(lambda matvec, b: {})
    with pytest.raises(mlodeco.errors.MethodError, match=r"'broken'.*'w'"):
        computed(case, "broken")


@pytest.mark.parametrize("method", [Identity(), FiniteDifference(), Neumann(), CG(), Dense()])
def test_is_linear_in_the_upper_loss(method):
    def build(factor):
        case_low = PROBLEMS["ridge_samples"]()
        return case_low, factor

    case, _ = build(1.0)
    once = computed(case, method)
    top = case.program.levels["top"].function
    program = mlodeco.Program()
    low = case.program.levels["low"]
    program.level("low", module=low.module, data=low.data, reads={"h": "top"})(low.function)
    up = case.program.levels["top"]
    program.level("top", lower=["low"], module=up.module, data=up.data, reads={"m": "low"})(
        lambda h, batch, m: 3.0 * top(h, batch, m)
    )
    thrice = mlodeco.hypergradient("top", program=program, hypergrad=method)["s"]
    assert torch.allclose(thrice, 3.0 * once, rtol=1e-7, atol=1e-12)


def test_solution_without_a_residual_can_be_reported():
    case = quadratic()

    @case.program.method("troubled")
    def solve(matvec, b):
        return Solution(b, 1, None, Status.DIVERGING)

    with pytest.warns(mlodeco.errors.SolverWarning, match="troubled after 1 steps: the terms"):
        computed(case, "troubled")


def test_detached_values_leave_the_hessian_symmetric():
    case = PROBLEMS["detached_weights"]()
    g = reference.gradients(case.low(), case.low_parameters, create_graph=True)
    h = reference.jacobian(g, case.low_parameters)
    assert relative(h, h.T) < 1e-14
