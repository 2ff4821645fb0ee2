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
from tests.test_purity import state
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
        except GraphError as error:
            assert "below both" in error.found
            assert is_coupled(case, top)
        else:
            wanted = gradient_at_start(case, top)
            assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10)


class Quartics:
    """Nonlinear levels with feedback, at most one of them between the lowest and the top."""

    def __init__(self, lower, reads, seed=0):
        self.lower, self.reads = lower, reads
        self.lows = [name for name in lower if not lower[name]]
        (self.mid,) = [n for n in lower if lower[n] and any(n in low for low in lower.values())]
        (self.top,) = [name for name in lower if name != self.mid and lower[name]]
        names = [*self.lows, self.mid, self.top]
        self.mixed = {
            (i, j): 0.8 * randn(SIZE, SIZE, seed=seed + 100 + 10 * a + b)
            for a, i in enumerate(names)
            for b, j in enumerate(names)
        }
        self.linear = {n: randn(SIZE, seed=seed + 50 + i) for i, n in enumerate(names)}
        self.curvature = {n: spd(SIZE, seed + i, 1.0, 2.0) for i, n in enumerate(names)}
        self.values = {n: torch.zeros(SIZE, dtype=torch.float64) for n in names}
        self.values = self.solved(randn(SIZE, seed=seed + 70))

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
        direct, *parts = found.split(SIZE)
        for low, part in zip(self.lows, parts, strict=True):
            first = reference.gradients(self.loss(low, z), [z[low]], create_graph=True)
            h, cross = (reference.jacobian(first, [z[n]]) for n in (low, self.mid))
            direct = direct - cross.T @ torch.linalg.solve(h, part)
        return direct

    def slope(self, m, top):
        """The Jacobian of the mid level's total gradient, by differences."""
        eye = 1e-5 * torch.eye(SIZE, dtype=torch.float64)
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
        eye = h * torch.eye(SIZE, dtype=torch.float64)
        return torch.tensor([along(e) for e in eye], dtype=torch.float64) / h

    def program(self):
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
        GraphError, match="'left' and 'right' respond|'right' and 'left' respond"
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
    assert raised.value.level in ("n0", "n1")
    assert raised.value.site
    assert "CG()" in raised.value.remedy


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
