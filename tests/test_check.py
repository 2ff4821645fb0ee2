"""mlodeco.check against dense algebra, its table and its advice."""

from functools import partial

import pytest
import torch
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from mlodeco.errors import GraphError, RunError
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Converged,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    Sama,
    spell,
    turned,
)
from tests import reference
from tests.problems import PROBLEMS, bilevel, network, quadratic, randn, spd


def dense(case, solve):
    return reference.bilevel(case.top, case.low, case.top_parameters, case.low_parameters, solve)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    "method", [Identity(), Neumann(num_terms=3, step_size=0.1), CG(max_steps=2)]
)
def test_figures_are_those_of_dense_algebra(problem, method):
    case = PROBLEMS[problem]()
    report = mlodeco.check("top", program=case.program, hypergrad=method)
    found = mlodeco.hypergradient("top", program=case.program, hypergrad=method)
    actual = reference.flat(list(found.values()))
    exact = dense(case, reference.exact)
    assert report.error == pytest.approx(float((actual - exact).norm() / exact.norm()), rel=1e-6)
    assert report.cosine == pytest.approx(
        float(actual @ exact / actual.norm() / exact.norm()), rel=1e-6
    )
    direct = reference.gradients(case.top(), case.top_parameters)
    (edge,) = report.edges
    assert (edge.upper, edge.lower) == ("top", "low")
    error = float((actual - exact).norm() / (exact - direct).norm())
    assert edge.agreement.error == pytest.approx(error, rel=1e-6)
    assert report.findings.indirect == edge.agreement
    assert edge.agreement.length == pytest.approx(
        float((actual - direct).norm() / (exact - direct).norm()), rel=1e-6
    )


def test_the_reference_has_the_methods_damping_unless_another_is_asked_for():
    case = quadratic()
    method = CG(max_steps=100, rtol=1e-12, damping=0.7)
    assert mlodeco.check("top", program=case.program, hypergrad=method).error < 1e-8
    far = mlodeco.check("top", program=case.program, hypergrad=method, damping=0.0)
    assert far.error > 0.1
    damped = dense(case, lambda h, b: torch.linalg.solve(h + 0.7 * torch.eye(20).double(), b))
    exact = dense(case, reference.exact)
    assert far.error == pytest.approx(float((damped - exact).norm() / exact.norm()), rel=1e-6)


def test_a_right_method_needs_no_turn():
    case = quadratic()
    report = mlodeco.check("top", program=case.program, hypergrad=CG(max_steps=50))
    assert report.advice == "Every edge agrees with its reference: no knob needs a turn."


def test_advice_names_the_turn_and_what_it_gains():
    case = quadratic()
    short = Neumann(num_terms=2)
    report = mlodeco.check("top", program=case.program, hypergrad=short)
    assert "use Neumann(num_terms=8) in place of Neumann(num_terms=2)" in report.advice
    better = mlodeco.check("top", program=case.program, hypergrad=Neumann(num_terms=8))
    gained = better.edges[0].agreement
    assert f"to {gained.cosine:.3f}, the relative error" in report.advice
    assert f"to {gained.error:.2g}." in report.advice
    assert gained.cosine > report.edges[0].agreement.cosine


def test_a_wrong_length_alone_is_told_apart():
    def low(m, batch, h):
        return 50.0 * (m.w**2).sum() / 2 - (m.w * h.x).sum()

    def top(h, batch, m):
        return ((m.w - batch) ** 2).sum() / 2

    case = bilevel(low, top, {"w": randn(4)}, {"x": randn(4, seed=2)}, randn(1), randn(4, seed=3))
    report = mlodeco.check("top", program=case.program, hypergrad="identity")
    assert "right direction and 50 times the right length" in report.advice
    assert report.cosine == pytest.approx(1.0)


def test_a_nearly_singular_system_gets_damping_as_advice():
    curvature = torch.diag(torch.logspace(-6, 0, 8, dtype=torch.float64))

    def low(m, batch, h):
        return m.w @ curvature @ m.w / 2 - (m.w * h.x).sum()

    def top(h, batch, m):
        return m.w.sum()

    case = bilevel(low, top, {"w": randn(8)}, {"x": randn(8, seed=2)}, randn(1), randn(1))
    report = mlodeco.check("top", program=case.program, hypergrad=Neumann(num_terms=2))
    assert "Neumann(damping=" in report.advice
    assert "solves a smoother one" in report.advice


def chain():
    """top -> mid -> low, with top reading both."""
    program = Program()
    a, b = spd(4, 1), spd(5, 2, 0.1, 3.0)
    c = randn(4, 5, seed=3)

    @program.level("low", module={"w": randn(4)}, data=[0])
    def low(m, batch, mid, top):
        return m.w @ a @ m.w / 2 + m.w @ (c @ mid.v) + (m.w * top.x).sum()

    @program.level("mid", lower=["low"], module={"v": randn(5, seed=4)}, data=[0], hypergrad="cg")
    def mid(m, batch, low, top):
        return m.v @ b @ m.v / 2 + (low.w @ c @ m.v) / 3 + (m.v[:4] * top.x**2).sum()

    @program.level(
        "top",
        lower=["mid", "low"],
        module={"x": randn(4, seed=5)},
        data=[0],
        hypergrad={"mid": "identity", "low": "cg"},
    )
    def top(m, batch, mid, low):
        return (mid.v**2).sum() + (low.w**3).sum()

    return program


def test_edges_are_checked_by_themselves():
    program = chain()
    report = mlodeco.check("top", program=program)
    by_name = {edge.name: edge for edge in report.edges}
    assert set(by_name) == {"top -> mid", "top -> low", "mid -> low"}
    assert by_name["top -> low"].agreement.error < 1e-5
    assert by_name["mid -> low"].agreement.error < 1e-5
    assert by_name["top -> mid"].agreement.error > 0.1
    assert report.findings.indirect.error == pytest.approx(
        by_name["top -> mid"].agreement.error, rel=1e-4
    )
    assert report.advice.startswith("top -> mid: use ")


def test_closed_edges_count_as_errors():
    case = quadratic()
    report = mlodeco.check("top", program=case.program, hypergrad=None)
    (edge,) = report.edges
    assert edge.solve is None
    assert edge.method == "none (direct gradient only)"
    assert edge.agreement.error == pytest.approx(1.0)
    assert "the edge is closed" in report.advice
    assert "none (direct gradient only)" in str(report)


def test_nothing_is_changed():
    case = PROBLEMS["detached_weights"]()
    mlodeco.run(3, program=_with_optimizers(case), progress="off")
    before = [p.detach().clone() for p in (*case.top_parameters, *case.low_parameters)]
    state = torch.get_rng_state()
    mlodeco.check("top", program=case.program, hypergrad=Nystrom(damping=0.1))
    after = [*case.top_parameters, *case.low_parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def _with_optimizers(case):
    low = case.program.levels["low"]
    other = Program()
    assert low.optimizer is None
    for name, declaration in case.program.levels.items():
        other.level(
            name,
            lower=declaration.lower,
            module=declaration.module,
            data=declaration.data,
            reads=declaration.argument_reads,
            optimizer=partial(SGD, lr=0.1),
        )(declaration.function)
    case.program = other
    return other


def test_batches_are_those_given():
    case = quadratic()
    other = randn(20, seed=9)
    here = mlodeco.check("top", program=case.program, hypergrad="identity")
    there = mlodeco.check("top", program=case.program, hypergrad="identity", batches={"top": other})
    assert here.error != there.error


def test_the_table_shows_every_column():
    text = str(mlodeco.check("top", program=quadratic().program, hypergrad=CG(max_steps=2)))
    for word in ("edge", "method", "steps", "residual", " error ", "cosine", "length"):
        assert word in text
    assert "top -> low" in text
    assert "CG(max_steps=2)" in text
    assert "all, with the direct" in text


def test_trouble_is_told_below_the_table():
    a = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))

    def low(m, batch, h):
        return m.w @ a @ m.w / 2 - (m.w * h.x).sum()

    def top(h, batch, m):
        return m.w.sum()

    case = bilevel(low, top, {"w": randn(2)}, {"x": randn(2, seed=2)}, randn(1), randn(1))
    report = mlodeco.check("top", program=case.program, hypergrad="cg")
    assert "met a direction without positive curvature" in str(report)
    assert "use MINRES(max_steps=20) in place of CG()" in report.advice.replace(
        "MINRES()", "MINRES(max_steps=20)"
    )


def test_wrong_calls_are_told_so():
    case = quadratic()
    with pytest.raises(GraphError, match="tap"):
        mlodeco.check("tap", program=case.program)
    with pytest.raises(RunError, match="no lower level to differentiate through"):
        mlodeco.check("low", program=case.program)
    with pytest.raises(RunError, match=r"^damping=-1\.0"):
        mlodeco.check("top", program=case.program, damping=-1.0)
    with pytest.raises(RunError, match="no level or source"):
        mlodeco.check("top", program=case.program, batches={"tap": 1})


@pytest.mark.parametrize("size", [4, 40])
def test_converged_is_exact_by_every_route(size):
    a = spd(size, 1, 0.01, 2.0) - 0.5 * torch.eye(size).double()
    b = {"w": randn(size, seed=2)}

    def matvec(x):
        return {"w": a @ x["w"]}

    exact = torch.linalg.solve(a, b["w"])
    for method in (Converged(), Converged(dense_size=1)):
        found = method.solve(matvec, b)
        assert torch.allclose(found.value["w"], exact, rtol=1e-7)


def test_converged_takes_minres_where_vectors_do_not_fit(monkeypatch):
    monkeypatch.setattr("mlodeco.hypergrad.converged._MEMORY", 100)
    called = []
    solve = MINRES.solve
    monkeypatch.setattr(MINRES, "solve", lambda *args: called.append(1) or solve(*args))
    a = spd(20, 1)
    found = Converged(dense_size=1).solve(lambda x: {"w": a @ x["w"]}, {"w": randn(20)})
    assert called
    assert torch.allclose(found.value["w"], torch.linalg.solve(a, randn(20)), rtol=1e-7)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Identity(), {Neumann(), CG(max_steps=5), MINRES(max_steps=10)}),
        (FiniteDifference(), {Identity(), Neumann(), CG(max_steps=5), MINRES(max_steps=10)}),
        (Sama(), {Identity(), Neumann(), CG(max_steps=5), MINRES(max_steps=10)}),
        (
            Neumann(num_terms=3, step_size=0.1, damping=0.2),
            {
                Neumann(num_terms=3, damping=0.2),
                Neumann(num_terms=12, step_size=0.1, damping=0.2),
            },
        ),
        (
            CG(max_steps=3, damping=0.1),
            {CG(max_steps=12, damping=0.1), MINRES(max_steps=3, damping=0.1)},
        ),
        (GMRES(restart=5), {GMRES(), GMRES(restart=5, max_steps=80)}),
        (Nystrom(rank=3), {Nystrom(rank=12)}),
        (
            CG(product="difference", curvature_batch=0.5),
            {
                CG(curvature_batch=0.5),
                CG(product="difference"),
                CG(product="difference", curvature_batch=0.5, max_steps=80),
                MINRES(product="difference", curvature_batch=0.5),
            },
        ),
        (Dense(), set()),
    ],
)
def test_turns_of_a_knob(method, expected):
    assert set(turned(method)) == expected


def test_methods_are_spelled_as_they_are_written():
    assert spell(Neumann()) == "Neumann()"
    assert spell(CG(max_steps=3, damping=0.1)) == "CG(damping=0.1, max_steps=3)"
    assert eval(spell(CG(max_steps=3, damping=0.1))) == CG(max_steps=3, damping=0.1)


def test_single_precision_networks_are_compared_too():
    torch.manual_seed(0)
    model = network(4, 8, 3, seed=1).float()

    def low(m, batch, h):
        x, y = batch
        losses = torch.nn.functional.cross_entropy(m(x), y, reduction="none")
        return (h.s.sigmoid() * losses).mean() + sum((p**2).sum() for p in m.parameters())

    def top(h, batch, m):
        x, y = batch
        return torch.nn.functional.cross_entropy(m(x), y)

    batch = randn(16, 4).float(), torch.arange(16) % 3
    case = bilevel(low, top, model, {"s": torch.zeros(16)}, batch, batch)
    report = mlodeco.check("top", program=case.program, hypergrad=CG(max_steps=60))
    assert report.error < 1e-3


def test_nested_tells_how_far_eq_2_itself_is():
    program = chain()
    report = mlodeco.check("top", program=program, nested=True)
    two = mlodeco.hypergradient("top", program=program, hypergrad="dense")["x"]
    true = mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)["x"]
    gap = report.findings.nested
    assert gap.error == pytest.approx(float((two - true).norm() / true.norm()), rel=1e-6)
    assert gap.error > 0.01
    assert "Eq. (2) against nested" in str(report)
    assert "use nested=True" in report.advice
    assert mlodeco.check("top", program=program).findings.nested is None


def test_nested_adds_nothing_where_eq_2_is_exact():
    report = mlodeco.check("top", program=quadratic().program, nested=True)
    assert report.findings.nested.error < 1e-9
    assert "Eq. (2) itself" not in report.advice


def test_edges_that_share_the_references_method_show_their_solves():
    report = mlodeco.check("top", program=chain(), hypergrad="converged")
    assert all(edge.solve is not None for edge in report.edges)


def test_warm_starts_are_said_to_be_left_out():
    case = quadratic()
    report = mlodeco.check("top", program=case.program, hypergrad=CG(max_steps=2, warm_start=True))
    assert "cold here" in report.advice
    cold = mlodeco.check("top", program=case.program, hypergrad=CG(max_steps=2))
    assert "cold here" not in cold.advice


@pytest.mark.parametrize("wrong", ["x", 3, ["top"]])
def test_wrong_programs_and_levels_are_named(wrong):
    case = quadratic()
    with pytest.raises(RunError, match="is not a Program"):
        mlodeco.hypergradient("top", program=wrong)
    with pytest.raises(RunError, match="is not a Program"):
        mlodeco.check("top", program=wrong)
    with pytest.raises(GraphError, match="there is no level"):
        mlodeco.hypergradient(wrong, program=case.program)


def singular(curvature, dtype=torch.float32):
    """A quadratic with the given curvatures, whose cotangent lies in its range."""
    a = torch.diag(torch.tensor(curvature)).to(dtype)

    def low(m, batch, h):
        return m.w @ a @ m.w / 2 - m.w @ a @ h.x

    def top(h, batch, m):
        return (m.w @ a).sum()

    size = len(curvature)
    w, x = randn(size).to(dtype), randn(size, seed=2).to(dtype)
    return bilevel(low, top, {"w": w}, {"x": x}, torch.zeros(1), torch.zeros(1)).program


def test_a_reference_at_rounding_is_not_doubted():
    report = mlodeco.check("top", program=singular([1.0, 2.0, 0.0]))
    assert "rough" not in report.advice
    assert "At 'low' the system is singular: solved in the least-squares sense." in report.advice
    assert "least-squares" not in mlodeco.check("top", program=singular([1.0, 2.0, 3.0])).advice


def test_a_rough_reference_is_doubted_and_says_whose_damping(monkeypatch):
    rough = partial(Converged, max_steps=2, dense_size=1)
    monkeypatch.setattr("mlodeco.runtime.checking.Converged", rough)
    report = mlodeco.check("top", program=singular([1.0, 2.0, 5.0, 9.0], torch.float64))
    assert "is itself rough" in report.advice
    assert "check(..., damping=...)" in report.advice


def through_low_alone():
    """top acts on mid, mid on low, which top reads: no path of Eq. (2) for top."""
    program = Program()
    options = {"hypergrad": "cg", "data": [0]}
    program.level("low", module={"x": randn(3)}, data=[0])(
        lambda own, batch, mid: ((own.x - mid.x) ** 2).sum()
    )
    program.level("mid", lower=["low"], module={"x": randn(3, seed=2)}, **options)(
        lambda own, batch, low, top: ((own.x - top.x) ** 2).sum() + (low.x**2).sum()
    )
    program.level("top", lower=["mid"], module={"x": randn(3, seed=3)}, **options)(
        lambda own, batch, low: ((low.x - 1) ** 2).sum() + 0.1 * (own.x**2).sum()
    )
    return program


def test_a_path_of_nested_alone_is_compared():
    program = through_low_alone()
    with pytest.raises(RunError, match=r"no path by Eq. \(2\); nested=True sees more"):
        mlodeco.check("top", program=program)
    report = mlodeco.check("top", program=program, nested=True)
    assert report.edges == ()
    two = mlodeco.hypergradient("top", program=program, hypergrad=None)["x"]
    true = mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)["x"]
    wanted = float((two - true).norm() / true.norm())
    assert report.findings.nested.error == pytest.approx(wanted, rel=1e-6)
    text = str(report)
    assert "Eq. (2) against nested" in text
    assert "all, indirect" not in text
    assert "use nested=True" in report.advice


def test_two_zeros_do_not_count_as_agreement():
    program = Program()
    program.level("low", module={"x": randn(3)}, data=[0])(
        lambda own, batch, top: ((own.x - top.x) ** 2).sum()
    )
    program.level("top", lower=["low"], module={"x": randn(3, seed=3)}, data=[0])(
        lambda own, batch, low: (own.x**2).sum() + 0.0 * low.x.sum()
    )
    advice = mlodeco.check("top", program=program).advice
    assert "both are zero: no path carries anything" in advice
    assert "no knob" not in advice


def test_the_length_names_the_level_whose_learning_rate_is_meant():
    program = singular([50.0, 50.0])
    advice = mlodeco.check("top", program=program, hypergrad="identity").advice
    assert "for SGD divide the learning rate of 'top' by that, or set scale." in advice


def test_methods_that_were_tried_in_vain_are_listed():
    torch.manual_seed(0)  # the method draws its columns
    method = Nystrom(rank=1, damping=1e-9)
    advice = mlodeco.check("top", program=quadratic().program, hypergrad=method).advice
    tried = "Nystrom(damping=1e-09, rank=4)"
    assert f"is far off, and none of the methods tried comes near ({tried})" in advice


def test_of_an_unrolled_loop_its_steps_are_what_can_be_turned():
    """On 1, 2, 4, 8 two steps at 0.05 leave the indirect gradient far from the solution's."""
    program, curvature = Program(), torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    ones = torch.ones(4, dtype=torch.float64)

    @program.level("w", module={"w": ones.clone()}, optimizer=partial(SGD, lr=0.05), inner_steps=2)
    def fit(m, a):
        return (0.5 * curvature * m.w**2 - m.w * a.x).sum()

    @program.level("a", lower=["w"], module={"x": ones.clone()}, hypergrad="unroll")
    def judge(m, w):
        return 0.5 * (w.w - 2).square().sum() + 0.1 * m.x.square().sum()

    advice = mlodeco.check("a", program=program).advice
    assert "raise inner_steps of 'w' (2 now)" in advice
    assert "singular" not in advice


def test_turns_have_the_damping_of_the_reference():
    case = quadratic()
    report = mlodeco.check("top", program=case.program, hypergrad=Dense(), damping=5.0)
    assert "use Dense(damping=5.0) in place of Dense()" in report.advice
    biased = CG(damping=5.0, max_steps=50)
    report = mlodeco.check("top", program=case.program, hypergrad=biased, damping=0.0)
    assert "in place of CG(damping=5.0, max_steps=50)" in report.advice
    assert "use CG(damping" not in report.advice


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_the_table_fits_the_terminal(monkeypatch, columns):
    report = mlodeco.check("top", program=chain(), nested=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(report).split("\n")
    assert max(map(len, lines)) <= max(60, columns)
    assert all(line == line.rstrip() for line in lines)
    assert any("cosine" in line and "length" in line and "residual" in line for line in lines)


def test_without_a_terminal_the_table_is_as_wide_as_it_needs(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    report = mlodeco.check("top", program=chain(), nested=True)
    lines = str(report).split("\n")
    assert 60 < max(map(len, lines)) <= 110
    assert all(line == line.rstrip() for line in lines)


def test_figures_have_one_format():
    report = mlodeco.check("top", program=quadratic().program, hypergrad=Identity())
    (row,) = [line for line in str(report).split("\n") if "all, indirect" in line]
    for figure in row.replace("│", " ").split()[2:]:
        _, _, decimals = figure.partition(".")
        assert len(decimals) == 3 or "e" in decimals, row


def test_the_damping_of_the_reference_is_said():
    program = quadratic().program
    method = CG(max_steps=100, damping=0.01)
    text = str(mlodeco.check("top", program=program, hypergrad=method))
    assert "against the system with damping 0.01" in text
    assert "damping" not in str(mlodeco.check("top", program=program, hypergrad="cg"))
    text = str(mlodeco.check("top", program=chain(), hypergrad={"mid": CG(damping=0.2)}))
    assert "damping 0.2 at 'mid', 0 at 'low'" in text.replace("\n", " ")
