"""nested=True: the true derivative, against elimination and against programs solved again."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import mlodeco
from mlodeco import Program
from mlodeco.errors import (
    GraphError,
    GraphWarning,
    MethodError,
    NonFiniteError,
    RunError,
    SolverWarning,
)
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    Sama,
)
from tests import reference
from tests.problems import randn, spd
from tests.test_purity import same, state
from tests.test_sweep import GRAPHS, ladder
from tests.test_sweep import Quadratics as Polynomials

SIZE = 3


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def declare(program, name, loss, *, lower=(), reads=(), **options):
    """A level whose function takes the modules of what it reads under other names."""
    arguments = {f"a{i}": read for i, read in enumerate(reads)}
    body = ", ".join(["own", *arguments])
    scope = {"loss": loss}
    exec(f"def level({body}): return loss({body})", scope)
    program.level(name, lower=lower, reads=arguments, **options)(scope["level"])


def below(lower):
    """For each level all those below it; the keys in an order with lower levels first."""
    found = {}
    while len(found) < len(lower):
        name = next(n for n in lower if n not in found and all(low in found for low in lower[n]))
        found[name] = set(lower[name]).union(*(found[low] for low in lower[name]))
    return found


class Quadratics:
    """Levels with quadratic losses of all that they read; all responses are linear."""

    def __init__(self, lower, reads, seed=0, size=SIZE, damping=0.0):
        self.lower, self.reads, self.size = lower, reads, size
        self.below = below(lower)
        self.names = list(self.below)
        self.damping = damping
        self.at = {n: slice(i * size, (i + 1) * size) for i, n in enumerate(self.names)}
        self.start = {n: randn(size, seed=seed + 50 + i) for i, n in enumerate(self.names)}
        total = size * len(self.names)
        self.forms = {}
        for i, name in enumerate(self.names):
            seen = torch.zeros(total, dtype=torch.float64)
            for read in (name, *reads[name]):
                seen[self.at[read]] = 1.0
            q = 0.5 * randn(total, total, seed=seed + 100 + i)
            q = (q + q.T) / 2
            q[self.at[name], self.at[name]] = spd(size, seed + i, 1.5, 2.5)
            self.forms[name] = q * seen * seen[:, None], randn(total, seed=seed + 200 + i) * seen

    def form(self, name):
        """The loss as a form, with levels neither above nor below held constant."""
        q, c = (t.clone() for t in self.forms[name])
        for read in self.reads[name]:
            if read not in self.below[name] and name not in self.below[read]:
                q, c = self.substitute(q, c, read, {}, self.start[read])
        return q, c

    def substitute(self, q, c, name, maps, offset):
        """The form with ``z[name] = sum maps[u] z[u] + offset``, constants left out."""
        t = torch.eye(len(c), dtype=torch.float64)
        t[self.at[name], self.at[name]] = 0.0
        for other, matrix in maps.items():
            t[self.at[name], self.at[other]] = matrix
        shift = torch.zeros_like(c)
        shift[self.at[name]] = offset
        return t.T @ q @ t, t.T @ (c + q @ shift)

    def total(self, name, top):
        """The total loss as a form of the levels above alone, and of the level itself."""
        q, c = self.form(name)
        outside = [u for u in self.names if u not in self.below[top] and u not in (name, top)]
        for other in outside:
            q, c = self.substitute(q, c, other, {}, self.start[other])
        for low in (n for n in self.names if n in self.below[name]):
            if q[self.at[low]].any() or c[self.at[low]].any():
                q, c = self.substitute(q, c, low, *self.response(low, top))
        return q, c

    def response(self, name, top):
        q, c = self.total(name, top)
        own = self.at[name]
        h = q[own, own] + self.damping * torch.eye(self.size, dtype=torch.float64)
        maps = {}
        for other in self.names:
            block = q[own, self.at[other]]
            if other != name and block.any():
                maps[other] = -torch.linalg.solve(h, block)
        return maps, -torch.linalg.solve(h, c[own])

    def closed_form(self, top):
        """The gradient of the total loss with every lower level eliminated."""
        q, c = self.total(top, top)
        own = self.at[top]
        return q[own, own] @ self.start[top] + c[own]

    def solved(self, top):
        """The levels below at their responses, uppers first."""
        for name in reversed(self.names):
            if name in self.below[top]:
                maps, offset = self.response(name, top)
                values = (matrix @ self.start[u] for u, matrix in maps.items())
                self.start[name] = sum(values, offset)
        return self

    def program(self, **options):
        program = Program()
        for name in self.names:
            declare(
                program,
                name,
                partial(self.loss, name),
                lower=self.lower[name],
                reads=self.reads[name],
                module={"x": self.start[name].clone()},
                **options.get(name, {}),
            )
        return program

    def loss(self, name, own, *others):
        total = torch.zeros(self.size * len(self.names), dtype=torch.float64)
        z = dict(zip((name, *self.reads[name]), (own, *others), strict=True))
        z = torch.cat([z[n].x if n in z else total[self.at[n]] for n in self.names])
        q, c = self.forms[name]
        return z @ q @ z / 2 + c @ z


def chain(depth):
    """Each lower level reads all those above, each upper one all those below."""
    names = [f"n{i}" for i in range(depth)]
    lower = {name: names[i - 1 : i] if i else [] for i, name in enumerate(names)}
    reads = {name: [n for n in names if n != name] for name in names}
    return lower, reads


CONVERGED = {
    "dense": Dense(),
    "cg": CG(max_steps=50, rtol=1e-13),
    "minres": MINRES(max_steps=50, rtol=1e-13),
    "gmres": GMRES(max_steps=50, rtol=1e-13),
}


@pytest.mark.parametrize("method", CONVERGED)
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_quadratic_chains_equal_elimination(depth, method):
    lower, reads = chain(depth)
    case = Quadratics(lower, reads, seed=depth)
    top = case.names[-1]
    program = case.solved(top).program()
    wanted = case.closed_form(top)
    found = mlodeco.hypergradient(top, program=program, hypergrad=CONVERGED[method], nested=True)[
        "x"
    ]
    assert relative(found, wanted) < 1e-9
    if depth > 2:
        plain = mlodeco.hypergradient(top, program=program, hypergrad="dense")["x"]
        assert relative(plain, wanted) > 0.01


@pytest.mark.parametrize("graph", ["chain_with_skip_edges", "figure_1", "deep_skip"])
def test_graphs_equal_elimination_at_any_point(graph):
    case = Quadratics(*{**GRAPHS, "deep_skip": DEEP_SKIP}[graph], seed=5)
    program = case.program()
    for top in case.names:
        found = mlodeco.hypergradient(top, program=program, hypergrad="dense", nested=True)["x"]
        assert relative(found, gradient_at_start(case, top)) < 1e-9


DEEP_SKIP = (
    {"base": [], "low": ["base"], "mid": ["low"], "top": ["mid"]},
    # top -> mid -> base -> low -> top, where mid is read by base alone
    {"base": ["mid", "low"], "low": ["base"], "mid": ["base", "top"], "top": ["low"]},
)


def responses(case, top):
    return {name: case.response(name, top)[0] for name in case.names if name in case.below[top]}


def gradient_at_start(case, top):
    """The chain rule with the responses' constant derivatives, at values that solve nothing."""
    q, c = case.form(top)
    gradient = q @ torch.cat([case.start[n] for n in case.names]) + c
    system = torch.eye(len(c), dtype=torch.float64)
    for name, maps in responses(case, top).items():
        for other, matrix in maps.items():
            system[case.at[name], case.at[other]] -= matrix
    moves = torch.linalg.solve(system, torch.eye(len(c), dtype=torch.float64)[:, case.at[top]])
    return moves.T @ gradient


def is_coupled(case, top):
    """Whether a level responds to one that is not above it."""
    return any(
        name not in case.below[other]
        for name, maps in responses(case, top).items()
        for other in maps
    )


@st.composite
def graphs(draw):
    count = draw(st.integers(2, 5))
    names = [f"n{i}" for i in range(count)]
    lower = {names[0]: []}
    for i in range(1, count):
        lower[names[i]] = draw(
            st.lists(st.sampled_from(names[:i]), unique=True, min_size=1, max_size=2)
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
@settings(max_examples=80, deadline=None, derandomize=True)
@given(graphs())
def test_random_graphs_equal_elimination_or_are_coupled(drawn):
    case = Quadratics(*drawn)
    program = case.program()
    for top in case.names:
        try:
            found = mlodeco.hypergradient(top, program=program, hypergrad="dense", nested=True)["x"]
        except GraphError:
            assert is_coupled(case, top)
        else:
            wanted = gradient_at_start(case, top)
            assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)


class Quartics:
    """Nonlinear levels with feedback, at most one of them between the lowest and the top."""

    def __init__(self, lower, reads, seed=0, size=SIZE):
        self.lower, self.reads, self.size = lower, reads, size
        self.lows = [name for name in lower if not lower[name]]
        (self.mid,) = [n for n in lower if lower[n] and any(n in low for low in lower.values())]
        (self.top,) = [name for name in lower if name != self.mid and lower[name]]
        names = [*self.lows, self.mid, self.top]
        self.mixed = {
            (i, j): 0.8 * randn(self.size, self.size, seed=seed + 100 + 10 * a + b)
            for a, i in enumerate(names)
            for b, j in enumerate(names)
        }
        self.linear = {n: randn(self.size, seed=seed + 50 + i) for i, n in enumerate(names)}
        self.curvature = {n: spd(self.size, seed + i, 1.0, 2.0) for i, n in enumerate(names)}
        self.values = {n: torch.zeros(self.size, dtype=torch.float64) for n in names}
        self.values = self.solved(randn(self.size, seed=seed + 70))

    def loss(self, name, z):
        own = z[name]
        value = own @ self.curvature[name] @ own / 2 + (own**4).sum() / 4 + self.linear[name] @ own
        value = value * (0.1 if name == self.top else 1.0)
        for read in self.reads[name]:
            other = z[read]
            value = value + own @ self.mixed[name, read] @ other + (other**3).sum() / 6
            value = value + ((own * other) ** 2).sum() / 4 + (own * other**2).sum() / 5
        return value

    def lows_at(self, z):
        """Newton's method for the lowest levels, which do not read each other."""
        found = {}
        for low in self.lows:
            x = self.values[low]
            for _ in range(50):
                x = x.detach().requires_grad_()
                g = reference.gradients(self.loss(low, {**z, low: x}), [x], create_graph=True)
                if g.norm() < 1e-14:
                    break
                x = x - torch.linalg.solve(reference.jacobian(g, [x]), g)
            assert g.norm() < 1e-12
            found[low] = x.detach()
        return found

    def total_gradient(self, m, top):
        """Of the mid level, its lower levels solved; implicit differentiation by dense algebra."""
        z = {self.top: top, self.mid: m}
        z.update(self.lows_at(z))
        z = {name: value.detach().requires_grad_() for name, value in z.items()}
        order = [self.mid, *self.lows]
        found = reference.gradients(self.loss(self.mid, z), [z[name] for name in order])
        direct, *parts = found.split(self.size)
        for low, part in zip(self.lows, parts, strict=True):
            first = reference.gradients(self.loss(low, z), [z[low]], create_graph=True)
            h, cross = (reference.jacobian(first, [z[n]]) for n in (low, self.mid))
            direct = direct - cross.T @ torch.linalg.solve(h, part)
        return direct

    def slope(self, m, top):
        """The Jacobian of the mid level's total gradient, by differences."""
        eye = 1e-5 * torch.eye(self.size, dtype=torch.float64)
        ahead = [self.total_gradient(m + e, top) - self.total_gradient(m - e, top) for e in eye]
        return torch.stack(ahead, dim=1) / 2e-5

    def solved(self, top, slope=None):
        """The root of the mid level's total gradient, by Newton's method with differences."""
        m = self.values[self.mid]
        for _ in range(50):
            g = self.total_gradient(m, top)
            if g.norm() < 1e-13:
                break
            m = m - torch.linalg.solve(self.slope(m, top) if slope is None else slope, g)
        assert g.norm() < 1e-12
        z = {self.top: top, self.mid: m}
        return {**self.lows_at(z), **z}

    def differences(self):
        """Fourth order differences of the top loss of the program solved again."""
        start = self.values[self.top]
        slope = self.slope(self.values[self.mid], start)

        def at(x):
            return float(self.loss(self.top, self.solved(x, slope)))

        def along(e):
            near, far = at(start + e) - at(start - e), at(start + 2 * e) - at(start - 2 * e)
            return (8 * near - far) / 12

        h = 3e-3
        eye = h * torch.eye(self.size, dtype=torch.float64)
        return torch.tensor([along(e) for e in eye], dtype=torch.float64) / h

    def program(self, **hypergrad):
        program = Program()
        for name in self.lower:
            declare(
                program,
                name,
                lambda own, *others, name=name: self.loss(
                    name,
                    {
                        r: o.x
                        for r, o in zip((name, *self.reads[name]), (own, *others), strict=True)
                    },
                ),
                lower=self.lower[name],
                reads=self.reads[name],
                module={"x": self.values[name].clone()},
                **({"hypergrad": hypergrad[name]} if name in hypergrad else {}),
            )
        return program

    def by_paths(self, program):
        """Eq. (2), each curvature that of a level's own loss."""
        z = {name: value.clone().requires_grad_() for name, value in self.values.items()}

        def first(name, of):
            return reference.gradients(self.loss(name, z), [z[of]], create_graph=True)

        def second(name, of):
            return reference.jacobian(first(name, name), [z[of]])

        total = first(self.top, self.top).detach()
        for path in program.graph().paths(self.top):
            cotangent = first(self.top, path[-2]).detach()
            for low, up in zip(reversed(path[1:-1]), reversed(path[:-2]), strict=True):
                cotangent = -second(low, up).T @ torch.linalg.solve(second(low, low).T, cotangent)
            total = total + cotangent
        return total


CHAIN = {"low": [], "mid": ["low"], "top": ["mid"]}
NONLINEAR = {
    "feedback": (CHAIN, {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid"]}),
    "skip": (CHAIN, {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["mid", "low"]}),
    "skip_and_low_reads_mid_alone": (
        CHAIN,
        {"low": ["mid"], "mid": ["low", "top"], "top": ["mid", "low"]},
    ),
    "top_reads_low_alone": (CHAIN, {"low": ["mid", "top"], "mid": ["low", "top"], "top": ["low"]}),
    "through_low_alone": (CHAIN, {"low": ["mid"], "mid": ["low", "top"], "top": ["low"]}),
    "mid_does_not_read_low": (CHAIN, {"low": ["mid"], "mid": ["top"], "top": ["mid", "low"]}),
    "figure_1": GRAPHS["figure_1"],
}


@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
@pytest.mark.parametrize("graph", NONLINEAR)
def test_nonlinear_programs_equal_differences_of_the_program_solved_again(graph):
    case = Quartics(*NONLINEAR[graph], seed=1)
    program = case.program()
    wanted = case.differences()
    for method, tolerance in ((Dense(), 1e-6), (CG(max_steps=20, rtol=1e-8), 1e-6)):
        found = mlodeco.hypergradient(case.top, program=program, hypergrad=method, nested=True)
        assert relative(found["x"], wanted) < tolerance
    plain = mlodeco.hypergradient(case.top, program=program, hypergrad="dense")["x"]
    assert relative(plain, case.by_paths(program)) < 1e-9
    assert relative(plain, wanted) > 0.01


FEED_FORWARD = {
    **{name: GRAPHS[name] for name in ("bilevel", "feed_forward_chain", "several_uppers")},
    "chain_read_from_above": (
        CHAIN,
        {"low": ["top"], "mid": ["low", "top"], "top": ["mid", "low"]},
    ),
    "diamond": ladder(1),
    "ladder": ladder(3),
}


@pytest.mark.parametrize("graph", FEED_FORWARD)
def test_without_feedback_it_is_eq_2_where_nothing_is_solved(graph):
    case = Polynomials(*FEED_FORWARD[graph], seed=3)
    for top in case.names:
        found, wanted = (
            mlodeco.hypergradient(top, program=case.program, hypergrad="dense", nested=nested)["x"]
            for nested in (True, False)
        )
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "method",
    [Identity(scale=0.3), CG(max_steps=2), Neumann(num_terms=3, step_size=0.2)],
    ids=lambda m: type(m).__name__,
)
def test_without_feedback_truncated_solvers_give_what_they_give_by_eq_2(method):
    case = Polynomials(*FEED_FORWARD["chain_read_from_above"], seed=3)
    found, wanted = (
        mlodeco.hypergradient("top", program=case.program, hypergrad=method, nested=nested)["x"]
        for nested in (True, False)
    )
    assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-13)


def networks(*, low_network=None, **options):
    """A network on weighted samples, a middle level that decays towards it, and weights above."""
    x, y = randn(12, 2, seed=1), torch.arange(12) % 3
    program = Program()
    network = low_network or nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batches = [(x[:6], y[:6], slice(0, 6)), (x[6:], y[6:], slice(6, 12))]

    @program.level("low", module=network, data=batches, optimizer=partial(SGD, lr=0.1), **options)
    def low(model, batch, top):
        x, y, part = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        decay = sum((p**2).sum() for p in model.parameters())
        return (top.s[part].sigmoid() * losses).mean() + 0.1 * decay, {"accuracy": losses.mean()}

    @program.level(
        "mid",
        lower=["low"],
        module=copy.deepcopy(network),
        data=batches[::-1],
        optimizer=partial(SGD, lr=0.1),
    )
    def mid(model, batch, low):
        x, y, _ = batch
        distance = sum(
            ((p - q) ** 2).sum() for p, q in zip(model.parameters(), low.parameters(), strict=True)
        )
        return {"loss": nn.functional.cross_entropy(model(x), y) + distance, "distance": distance}

    @program.level(
        "top",
        lower=["mid"],
        module={"s": randn(12, seed=4)},
        data=[(x, y)],
        optimizer=partial(SGD, lr=0.1),
    )
    def top(net, batch, mid):
        x, y = batch
        loss = nn.functional.cross_entropy(mid(x), y)
        return loss, {"loss_of_top": loss.detach()}

    return program


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_feedback_networks_on_minibatches_give_eq_2(accumulate):
    torch.manual_seed(0)
    program = networks(accumulate=accumulate)
    found, wanted = (
        mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=nested)["s"]
        for nested in (True, False)
    )
    assert wanted.norm() > 1e-6
    assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-15)


TWO_MIDS = {"low": [], "left": ["low"], "right": ["low"], "top": ["left", "right"]}


def two_mids(low, top):
    reads = {"low": low, "left": ["low", "top"], "right": ["low", "top"], "top": top}
    return Quadratics(TWO_MIDS, reads, seed=2)


@pytest.mark.parametrize("top", [["left", "right"], ["left"]])
def test_levels_coupled_through_a_lower_one_are_refused(top):
    program = two_mids(["left", "right"], top).program()
    with pytest.raises(
        GraphError, match=r"'left' and 'right' respond|'right' and 'left' respond"
    ) as raised:
        mlodeco.hypergradient("top", program=program, nested=True)
    assert "leave nested out" in raised.value.remedy
    mlodeco.hypergradient("top", program=program)
    mlodeco.hypergradient("left", program=program, nested=True)


@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
def test_a_response_to_a_level_beside_is_refused_with_the_level_to_put_above():
    case = two_mids(["left"], ["left", "right"])
    with pytest.raises(GraphError, match="'right' responds to 'left'") as raised:
        mlodeco.hypergradient("top", program=case.program(), nested=True)
    assert "add 'right' to lower= of 'left'" in raised.value.remedy
    lower = {**TWO_MIDS, "left": ["low", "right"]}
    mended = Quadratics({n: lower[n] for n in ("low", "right", "left", "top")}, case.reads, seed=2)
    found = mlodeco.hypergradient("top", program=mended.program(), hypergrad="dense", nested=True)
    assert relative(found["x"], gradient_at_start(mended, "top")) < 1e-12


def test_two_levels_on_one_that_reads_neither_are_not_coupled():
    case = two_mids(["top"], ["left", "right"])
    found = mlodeco.hypergradient("top", program=case.program(), hypergrad="dense", nested=True)
    assert relative(found["x"], gradient_at_start(case, "top")) < 1e-12


@pytest.mark.parametrize("method", [FiniteDifference(), Sama(), "darts"])
def test_methods_that_are_no_linear_solvers_are_refused(method):
    program = Quadratics(*chain(3)).program()
    with pytest.raises(MethodError, match="is not a linear solver") as raised:
        mlodeco.hypergradient("n2", program=program, hypergrad=method, nested=True)
    assert raised.value.level in ("n1", "n2")
    assert raised.value.site
    assert "CG()" in raised.value.remedy


def test_a_method_that_is_no_linear_solver_is_refused_where_it_was_given():
    program = Quadratics(*chain(3)).program(n1={"hypergrad": Sama()}, n2={"hypergrad": "cg"})
    with pytest.raises(MethodError, match=r"Sama, by which .* through 'n0'") as raised:
        mlodeco.hypergradient("n2", program=program, nested=True)
    assert raised.value.level == "n1"
    assert raised.value.site == str(program.levels["n1"].site)


def test_none_closes_an_edge():
    case = Quadratics(*chain(3))
    program = case.program(n1={"hypergrad": None}, n2={"hypergrad": {"n0": None, "n1": "dense"}})
    q, c = case.form("n2")
    gradient = q @ torch.cat([case.start[n] for n in case.names]) + c
    form, _ = case.form("n1")
    own, top = case.at["n1"], case.at["n2"]
    move = -torch.linalg.solve(form[own, own], form[own, top])
    found = mlodeco.hypergradient("n2", program=program, nested=True)["x"]
    assert relative(found, gradient[top] + move.T @ gradient[own]) < 1e-12
    direct = mlodeco.hypergradient("n2", program=program, hypergrad=None, nested=True)["x"]
    assert relative(direct, gradient[top]) < 1e-12


def test_damping_is_a_decay_of_every_response():
    case = Quadratics(*chain(3), damping=0.3)
    for method in (Dense(damping=0.3), CG(damping=0.3, max_steps=30, rtol=1e-13)):
        found = mlodeco.hypergradient("n2", program=case.program(), hypergrad=method, nested=True)[
            "x"
        ]
        assert relative(found, gradient_at_start(case, "n2")) < 1e-9


def test_methods_by_edge():
    case = Quadratics(*chain(3))
    seen = []

    def recording(name):
        def solve(matvec, b):
            seen.append(name)
            return Dense().solve(matvec, b)

        return solve

    program = case.program(
        n1={"hypergrad": recording("n1->n0")},
        n2={"hypergrad": {"n0": recording("n2->n0"), "n1": recording("n2->n1")}},
    )
    found = mlodeco.hypergradient("n2", program=program, nested=True)["x"]
    assert relative(found, gradient_at_start(case, "n2")) < 1e-12
    assert seen.count("n2->n1") == 1
    assert seen.count("n2->n0") == 1
    assert seen.count("n1->n0") > 4


def test_two_solvers_of_ones_own_are_two_methods_by_eq_2_too():
    lower, reads = ladder(1)
    case = Quadratics(lower, reads)

    def scaling(factor):
        return lambda matvec, b: {key: factor * value for key, value in b.items()}

    def with_sides(left, right):
        edges = {"l0": {"hypergrad": left}, "r0": {"hypergrad": right}}
        return case.program(**edges, n1={"hypergrad": "dense"}, top={"hypergrad": "dense"})

    own = with_sides(scaling(0.2), scaling(0.7))
    wanted = mlodeco.hypergradient(
        "top", program=with_sides(Identity(scale=0.2), Identity(scale=0.7))
    )["x"]
    for nested in (False, True):
        found = mlodeco.hypergradient("top", program=own, nested=nested)["x"]
        assert relative(found, wanted) < 1e-12


def test_solvers_registered_by_name():
    case = Quadratics(*chain(3))
    program = case.program(n1={"hypergrad": "mine"}, n2={"hypergrad": "mine"})

    @program.method("mine")
    def mine(matvec, b):
        return CG(max_steps=50, rtol=1e-14).solve(matvec, b).value

    found = mlodeco.hypergradient("n2", program=program, nested=True)["x"]
    assert relative(found, gradient_at_start(case, "n2")) < 1e-9


def scaled_identities():
    """A chain whose total Hessians are the identity divided by 0.5, one loss after the other."""
    program = Program()
    a, b = 0.6, 0.5

    @program.level("low", module={"x": randn(2, seed=1)})
    def low(own, mid):
        return (own.x**2).sum() - 2 * a * (own.x * mid.x).sum()

    @program.level("mid", lower=["low"], module={"x": randn(2, seed=2)})
    def mid(own, low, top):
        return (1 - b * a**2) * (own.x**2).sum() + b * (low.x**2).sum() - (own.x * top.x).sum()

    @program.level("top", lower=["mid"], module={"x": randn(2, seed=3)})
    def top(own, mid):
        return ((mid.x - 1) ** 2).sum() / 2 + (own.x**2).sum()

    wanted = 2 * program.module("top").x + 0.5 * (program.module("mid").x - 1)
    return program, wanted.detach()


@pytest.mark.parametrize(
    "method",
    [Identity(scale=0.5), Neumann(num_terms=1, step_size=0.5), Nystrom(rank=2, damping=1e-10)],
    ids=lambda m: type(m).__name__,
)
def test_approximations_that_happen_to_be_exact(method):
    program, wanted = scaled_identities()
    found = mlodeco.hypergradient("top", program=program, hypergrad=method, nested=True)["x"]
    assert relative(found, wanted) < 1e-8
    plain = mlodeco.hypergradient("top", program=program, hypergrad="dense")["x"]
    assert relative(plain, wanted) > 0.01


class Parts(nn.Module):
    """Two tensors of use, one frozen and one that no loss of its own level touches."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(randn(2, 2, seed=seed))
        self.scale = nn.Parameter(randn(1, seed=seed + 1))
        self.frozen = nn.Parameter(randn(2, seed=seed + 2), requires_grad=False)
        self.idle = nn.Parameter(randn(2, seed=seed + 3))

    def forward(self, x):
        return x @ self.weight * self.scale + self.frozen


def parts_program(*, without_idle=False):
    """Feedback with several parameters; with ``without_idle`` the idle ones are left out."""
    program = Program()
    x = randn(5, 2, seed=9)

    @program.level("low", module=Parts(1))
    def low(model, mid):
        distance = ((model.weight - 0.5 * mid.weight) ** 2).sum() + (
            (model.scale - mid.scale) ** 2
        ).sum()
        return (model(x) * mid(x)).sin().mean() + distance

    @program.level("mid", lower=["low"], module=Parts(11))
    def mid(model, low, top):
        fit = ((low(x) + model(x) - top(x)) ** 2).mean()
        return fit + ((model.weight + low.weight) ** 2).sum() + 3 * (model.scale**2).sum()

    @program.level("top", lower=["mid"], module=Parts(21))
    def top(model, mid):
        idle = 0.0 if without_idle else (mid.idle * mid.frozen).sum()
        return (mid(x) ** 2).mean() + 0.1 * (model.weight**2).sum() + idle

    return program


def test_frozen_and_idle_parameters_take_no_part():
    program = parts_program()
    found = mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)
    assert sorted(found) == ["idle", "scale", "weight"]
    assert not found["idle"].any()
    without = mlodeco.hypergradient(
        "top", program=parts_program(without_idle=True), hypergrad="dense", nested=True
    )
    cg = mlodeco.hypergradient(
        "top", program=program, hypergrad=CG(max_steps=50, rtol=1e-13), nested=True
    )
    plain = mlodeco.hypergradient("top", program=program, hypergrad="dense")
    for key in ("scale", "weight"):
        assert relative(found[key], without[key]) < 1e-12
        assert relative(cg[key], found[key]) < 1e-8
        assert relative(plain[key], found[key]) > 0.01


def test_modules_in_single_precision():
    wide = parts_program()
    narrow = parts_program()
    for name in ("low", "mid", "top"):
        for module in (wide.module(name), narrow.module(name)):
            with torch.no_grad():
                for p in module.parameters():
                    p.copy_(p.float())
    narrow_x = {n: narrow.module(n) for n in ("low", "mid", "top")}
    for module in narrow_x.values():
        module.float()
        module.forward = partial(lambda self, x: Parts.forward(self, x.float()), module)
    found = mlodeco.hypergradient("top", program=narrow, hypergrad="cg", nested=True)
    wanted = mlodeco.hypergradient("top", program=wide, hypergrad="dense", nested=True)
    for key in ("scale", "weight"):
        assert found[key].dtype == torch.float32
        assert relative(found[key].double(), wanted[key]) < 1e-3


def feedback_on_data(accumulate, data, *, low_module=None, **options):
    """A network below, features' weights between, which it reads, and a decay on top."""
    program = Program()
    low_module = low_module or nn.Linear(3, 1, dtype=torch.float64)

    @program.level(
        "low",
        module=low_module,
        data=data,
        accumulate=accumulate,
        optimizer=partial(SGD, lr=0.1),
        **options,
    )
    def low(model, batch, mid):
        decay = sum((p**2).sum() for p in model.parameters())
        return ((model(batch) - 1) ** 2).mean() + (mid.s.exp() * decay).mean()

    @program.level(
        "mid",
        lower=["low"],
        module={"s": randn(2, seed=3)},
        data=data,
        accumulate=accumulate,
        optimizer=partial(SGD, lr=0.1),
    )
    def mid(m, batch, low, top):
        return {
            "loss": (low(batch) ** 2).mean() + ((m.s - top.t) ** 2).sum() + (m.s**4).sum(),
            "size": m.s.norm(),
        }

    @program.level(
        "top",
        lower=["mid"],
        module={"t": randn(2, seed=4)},
        data=data,
        accumulate=accumulate,
        optimizer=partial(SGD, lr=0.1),
    )
    def top(t, batch, mid, low):
        return (low(batch) ** 2).mean() + (mid.s**2).sum(), {"t": t.t.sum()}

    return program


def test_micro_batches_of_a_level_are_one_batch():
    x = randn(8, 3, seed=1)
    torch.manual_seed(0)
    module = nn.Linear(3, 1, dtype=torch.float64)
    found = [
        mlodeco.hypergradient(
            "top",
            program=feedback_on_data(n, list(x.split(8 // n)), low_module=module),
            hypergrad="dense",
            nested=True,
        )["t"]
        for n in (1, 4)
    ]
    assert relative(*found) < 1e-12


class Masked(nn.Module):
    """Dropout written out, to see its masks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = (
            nn.Linear(3, 6, dtype=torch.float64),
            nn.Linear(6, 1, dtype=torch.float64),
        )
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.masks = []

    def forward(self, x):
        h = self.norm(self.first(x)).tanh()
        mask = torch.nn.functional.dropout(torch.ones_like(h), 0.5, self.training)
        self.masks.append(mask.detach())
        return self.last(h * mask)


def test_random_masks_are_the_same_in_all_passes_and_nothing_changes():
    module = Masked()
    program = feedback_on_data(1, [randn(8, 3, seed=1)], low_module=module)
    generator = torch.Generator()
    before = state(program, generator)
    found = mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)["t"]
    assert len(module.masks) > 6
    per_level = {tuple(mask.flatten().tolist()) for mask in module.masks}
    assert len(per_level) <= 3
    again = mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)["t"]
    assert torch.equal(found, again)
    assert same(before, state(program, generator))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_activation_checkpointing_is_refused_where_it_stands():
    program = feedback_on_data(1, [randn(8, 3, seed=1)], low_module=Checkpointed())
    generator = torch.Generator()
    before = state(program, generator)
    with pytest.raises(MethodError, match="saved-tensor hooks") as raised:
        mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)
    assert raised.value.level in ("low", "mid", "top")
    assert "test_nested.py" in raised.value.site
    assert "without checkpointing" in raised.value.remedy
    assert same(before, state(program, generator))
    mlodeco.hypergradient("top", program=program, hypergrad="dense")


def test_other_errors_of_a_loss_come_through_as_they_are():
    program = Program()
    program.level("low", module={"x": randn(2)})(lambda m, top: ((m.x - top.x) ** 2).sum())
    calls = []

    @program.level("top", lower=["low"], module={"x": randn(2)})
    def top(m, low):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("my own")
        return (low.x**2).sum() + (m.x**2).sum()

    with pytest.raises(RuntimeError, match="my own"):
        mlodeco.hypergradient("top", program=program, nested=True)


@pytest.mark.parametrize("where", ["low", "mid", "top"])
def test_numbers_that_are_not_finite_are_located(where):
    def spoil(name, x):
        # a slope without a value: the square root at zero
        return (x - x.detach()).abs().sqrt().sum() if name == where else 0.0

    program = Program()

    @program.level("low", module={"x": randn(2, seed=1)})
    def low(m, mid):
        return ((m.x - mid.x) ** 2).sum() + spoil("low", m.x)

    @program.level("mid", lower=["low"], module={"x": randn(2, seed=2)})
    def mid(m, low, top):
        return ((m.x - low.x - top.x) ** 2).sum() + (m.x**2).sum() + spoil("mid", m.x)

    @program.level("top", lower=["mid"], module={"x": randn(2, seed=3)})
    def top(m, mid):
        return ((m.x - mid.x) ** 2).sum() + spoil("top", m.x)

    with pytest.raises(NonFiniteError) as raised:
        mlodeco.hypergradient("top", program=program, hypergrad="cg", nested=True)
    assert raised.value.level == where


@pytest.mark.parametrize("name", ["n0", "n1"])
def test_solutions_that_are_not_finite_are_located(name):
    case = Quadratics(*chain(3))

    def infinite(matvec, b):
        return {key: value / 0.0 for key, value in b.items()}

    program = case.program(
        n1={"hypergrad": infinite if name == "n0" else "dense"},
        n2={"hypergrad": {"n0": "dense", "n1": infinite if name == "n1" else "dense"}},
    )
    with pytest.raises(NonFiniteError, match="the solution of") as raised:
        mlodeco.hypergradient("n2", program=program, nested=True)
    assert raised.value.level == name


def test_trouble_of_a_solve_is_told_with_its_level():
    program = Program()
    program.level("low", module={"x": randn(2)})(lambda m, mid: ((m.x - mid.x) ** 2).sum())

    @program.level("mid", lower=["low"], module={"x": randn(2, seed=2)})
    def mid(m, low, top):
        return (m.x * top.x).sum() - (low.x**2).sum()  # its total Hessian is -2

    @program.level("top", lower=["mid"], module={"x": randn(2, seed=3)})
    def top(m, mid):
        return ((m.x - mid.x) ** 2).sum()

    with pytest.warns(SolverWarning, match="level 'mid'.*without positive curvature"):
        mlodeco.hypergradient("top", program=program, hypergrad="cg", nested=True)


@pytest.mark.parametrize("nested", [1, "yes", None])
def test_nested_is_true_or_false(nested):
    program = Quadratics(*chain(3)).program()
    for call in (
        lambda: mlodeco.hypergradient("n2", program=program, nested=nested),
        lambda: mlodeco.run(1, program=program, progress="off", nested=nested),
    ):
        with pytest.raises(RunError, match="nested="):
            call()


def optimized(case):
    sgd = {"optimizer": partial(SGD, lr=0.4)}
    return case.program(
        n0={**sgd, "inner_steps": 4},
        n1={**sgd, "inner_steps": 4, "hypergrad": "dense"},
        n2={**sgd, "hypergrad": "dense"},
    )


def test_a_run_converges_to_the_solution_of_the_nested_program():
    case = Quadratics(*chain(3), seed=1)
    q, c = case.total("n2", "n2")
    own = case.at["n2"]
    assert torch.linalg.eigvalsh(q[own, own])[0] > 0.5
    wanted = -torch.linalg.solve(q[own, own], c[own])
    found = {}
    for nested in (True, False):
        program = optimized(case)
        result = mlodeco.run(480, program=program, progress="off", nested=nested)
        found[nested] = program.module("n2").x.detach()
        last = list(result.history.of("n2"))[-1]
        assert sorted(solve[0] for solve in last.solves) == ["n0", "n1"]
        assert all(solve[4] == "converged to its tolerance" for solve in last.solves)
    assert relative(found[True], wanted) < 1e-6
    assert relative(found[False], wanted) > 0.01


def test_a_run_keeps_metrics_and_buffers():
    program = feedback_on_data(2, [randn(8, 3, seed=i) for i in range(4)], low_module=Masked())
    result = mlodeco.run(4, program=program, seed=0, progress="off", nested=True)
    (last,) = list(result.history.of("top"))[-1:]
    assert "t" in last.metrics
    assert last.loss > 0
    batches = int(program.module("low").norm.num_batches_tracked)
    assert batches == 4 * 2


def test_what_a_hypergradient_costs():
    """4 solves of the lowest level for each product of the middle one, and 8 more."""
    counts = []
    for size in (2, 4):
        case = Quartics(CHAIN, NONLINEAR["feedback"][1], seed=1, size=size)
        solved = []

        def counting(name, solved=solved):
            def solve(matvec, b):
                solved.append(name)
                return Dense().solve(matvec, b)

            return solve

        program = case.program(
            mid=counting("low"), top={"low": counting("low"), "mid": counting("mid")}
        )
        mlodeco.hypergradient("top", program=program, nested=True)
        counts.append((solved.count("low"), solved.count("mid")))
    assert all(mid == 1 for _, mid in counts)
    lows = [low for low, _ in counts]
    assert lows == [4 * size + 8 for size in (2, 4)]


def test_a_tall_ladder_costs_one_solve_a_level():
    case = Polynomials(*ladder(20), seed=5)
    solved = []

    @case.program.method("counting")
    def solve(matvec, b):
        solved.append(1)
        return CG(max_steps=20, rtol=1e-12).solve(matvec, b)

    found = mlodeco.hypergradient("top", program=case.program, hypergrad="counting", nested=True)
    assert len(solved) == 3 * 20 + 1
    plain = mlodeco.hypergradient("top", program=case.program, hypergrad="dense")["x"]
    assert torch.allclose(found["x"], plain, rtol=1e-9, atol=1e-12)


def test_levels_on_no_path_are_not_evaluated():
    calls = []
    program = Program()
    program.level("low", module={"x": randn(2)})(lambda m, top: ((m.x - top.x) ** 2).sum())

    @program.level("aside", module={"x": randn(2)})
    def aside(m):
        calls.append(1)
        return (m.x**2).sum()

    @program.level("top", lower=["low", "aside"], module={"x": randn(2)})
    def top(m, low, aside):
        return (low.x**2).sum() + (aside.x * low.x).sum()

    mlodeco.hypergradient("top", program=program, nested=True)
    assert not calls


def test_eq_2_says_where_nested_alone_follows():
    program = Quartics(CHAIN, NONLINEAR["through_low_alone"][1]).program()
    with pytest.warns(GraphWarning, match="set nested=True"):
        mlodeco.hypergradient("top", program=program, hypergrad="dense")
    mlodeco.hypergradient("top", program=program, hypergrad="dense", nested=True)


def test_the_text_of_a_graph_says_where_nested_alone_follows():
    program = Quartics(CHAIN, NONLINEAR["through_low_alone"][1]).program()
    lines = str(program.graph()).split("\n")
    assert (
        "paths of top: none, its hypergradient is the direct gradient; nested=True sees more"
        in lines
    )


def idle_read(*, through):
    """top reads mid in vain; low depends on mid, and top on low if ``through``."""
    program = Program()
    program.level("low", module={"x": randn(2)})(lambda m, mid: ((m.x - mid.x) ** 2).sum())

    @program.level("mid", lower=["low"], module={"x": randn(2, seed=2)})
    def mid(m, low, top):
        return ((m.x - top.x) ** 2).sum() + (low.x**2).sum()

    @program.level("top", lower=["mid"], module={"x": randn(2, seed=3)})
    def top(m, mid, low):
        return (m.x**2).sum() + ((low.x**2).sum() if through else 0.0)

    return program


@pytest.mark.parametrize("through", [True, False])
def test_a_read_in_vain_may_need_nested(through):
    with pytest.warns(GraphWarning, match="'top' reads 'mid' but its loss does not") as seen:
        mlodeco.hypergradient("top", program=idle_read(through=through), hypergrad="cg")
    remedy = "or set nested=True, if it acts through 'low'."
    of_mid = next(str(one.message) for one in seen if "reads 'mid'" in str(one.message))
    assert (remedy in of_mid) == through
    if through:
        nested = idle_read(through=True)
        mlodeco.hypergradient("top", program=nested, hypergrad="cg", nested=True)
