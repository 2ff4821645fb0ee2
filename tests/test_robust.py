"""What may surprise a hypergradient: interrupts, edits, captured tensors, odd modules."""

import sys
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import mlodeco
from mlodeco import Program
from mlodeco.calculus.response import Solution, Status
from mlodeco.errors import (
    BindingError,
    FallbackWarning,
    GraphWarning,
    LossError,
    MethodError,
    ModuleError,
    NonFiniteError,
)
from mlodeco.hypergrad import CG, Dense, FiniteDifference, Identity, Neumann, describe
from mlodeco.runtime.build import build
from mlodeco.runtime.drawn import Drawn
from mlodeco.tree import dot, norm
from tests import reference
from tests.problems import bilevel, network, quadratic, randn
from tests.test_facts import XV, YV, X, Y, decay, sample_weighted, validation, weights
from tests.test_hypergrad_exact import computed, expected, relative

IDENTITIES = [Identity(product=p) for p in ("auto", "reverse", "reverse_over_forward")]


def weighted(model=None, low=sample_weighted, top=validation, **options):
    return bilevel(low, top, model or network(3, 3, 1), weights(), (X, Y), (XV, YV), **options)


def agrees(problem, method=None, solve=reference.exact, tolerance=1e-9):
    return relative(computed(problem, method or Dense()), expected(problem, solve)) < tolerance


# interrupts


class _Interrupt:
    """Raises KeyboardInterrupt at the n-th line that runs while the tensors are swapped."""

    def __init__(self, after):
        self.left = after

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith("calculus/slots.py"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_interrupt_at_any_moment_leaves_the_modules_whole():
    problem = weighted()
    loss = build(problem.program).levels["low"].loss
    slots = [(slot, slot.tensor) for slot in loss._slots]
    values = build(problem.program).values(loss.sees)
    interrupted = 0
    for after in range(1, 2000):
        trace, previous = _Interrupt(after), sys.gettrace()
        sys.settrace(trace)
        try:
            loss.within(loss.state(values), lambda: None)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(previous)
        assert all(slot.tensor is tensor for slot, tensor in slots)
        if trace.left > 0:
            break
    assert interrupted > 3 * len(slots)


# compiled modules


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_keep_their_derivative(in_place):
    def low(m, batch, h):
        return (h.s * (m(batch[0])[:, 0] - batch[1]) ** 2).mean()

    model = network(3, 3, 3, 3, 1)
    if in_place:
        model.compile(backend="aot_eager")
    problem = weighted(model if in_place else torch.compile(model, backend="aot_eager"), low=low)
    wanted = computed(weighted(network(3, 3, 3, 3, 1), low=low), Identity(product="reverse"))
    for method in IDENTITIES:
        assert relative(computed(problem, method), wanted) < 1e-12


# captured tensors


def test_list_of_parameters_made_outside_is_refused():
    model = network(3, 3, 1)
    captured = list(model.parameters())

    def low(m, batch, h):
        return sample_weighted(m, batch, h) + sum((p**2).sum() for p in captured)

    with pytest.raises(BindingError, match=r"'low'.*tensors taken outside") as error:
        computed(weighted(model, low=low), "identity")
    assert "model.parameters() inside" in error.value.remedy


def test_captured_parameter_of_a_read_level_is_refused():
    hyper = nn.ParameterDict(weights())
    captured = hyper["s"]

    def low(m, batch, h):
        return sample_weighted(m, batch, h) + captured.sum() * decay(m)

    problem = bilevel(low, validation, network(3, 3, 1), hyper, (X, Y), (XV, YV))
    with pytest.raises(BindingError, match="'top'"):
        computed(problem, "identity")


def test_captured_and_detached_is_fine():
    model = network(3, 3, 1)
    start = [p.detach().clone() for p in model.parameters()]

    def low(m, batch, h):
        pull = sum(((p - q) ** 2).sum() for p, q in zip(m.parameters(), start, strict=True))
        return sample_weighted(m, batch, h) + pull

    assert agrees(weighted(model, low=low))


# idle edges, closed edges


def test_read_without_dependence_is_warned_of_once():
    def low(m, batch, h):
        return mse(m, batch) + 0.0 * h.s.detach().sum()

    def mse(m, batch):
        return ((m(batch[0])[:, 0] - batch[1]) ** 2).mean()

    problem = weighted(low=low)
    with pytest.warns(GraphWarning, match="'low' reads 'top' but its loss does not depend on it"):
        found = computed(problem, "identity")
    assert not found.any()
    computed(problem, "identity")


def closed():
    program = Program()
    program.level("low", module=network(3, 3, 1), data=[(X, Y)], reads={"h": "top"})(
        lambda low, batch, h: sample_weighted(low, batch, h)
    )
    program.level(
        "top", module=weights(), lower=["low"], data=[(XV, YV)], reads={"m": "low"}, hypergrad=None
    )(lambda top, batch, m: validation(top, batch, m))
    return program


def test_closed_edges_give_zeros_and_can_be_opened():
    program = closed()
    assert not mlodeco.hypergradient("top", program=program)["s"].any()
    opened = mlodeco.hypergradient("top", program=program, hypergrad="dense")["s"]
    assert relative(opened, computed(weighted(), Dense())) < 1e-12
    assert not computed(weighted(), None).any()


# modules changed after the build


def _assign(model):
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)


def _replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def _replace_layer(model):
    model[0] = network(3, 3, seed=9)[0]


def _append(model):
    model.append(nn.Tanh())
    model.append(nn.Linear(1, 1, dtype=torch.float64))


def _parametrize(model):
    parametrizations.orthogonal(model[0])


def _freeze(model):
    model[0].requires_grad_(False)


@pytest.mark.parametrize(
    "change", [_assign, _replace_parameter, _replace_layer, _append, _parametrize, _freeze]
)
def test_modules_may_change_after_the_build(change):
    problem = weighted()
    computed(problem, "identity")
    model = problem.program.module("low")
    change(model)
    assert problem.program.module("low") is model
    problem.low_parameters = [p for p in model.parameters() if p.requires_grad]
    assert agrees(problem)


def test_unchanged_modules_are_built_once_and_factories_never_again():
    made = []

    def factory():
        made.append(network(3, 3, 1))
        return made[-1]

    problem = weighted(factory)
    first = build(problem.program)
    assert build(problem.program) is first
    first.tick, first.run_seed, first.levels["low"].last_batches = 3, 5, (Drawn((X, Y)),)
    made[0][0].requires_grad_(False)
    second = build(problem.program)
    assert second is not first
    assert len(made) == 1
    assert (second.tick, second.run_seed) == (3, 5)
    assert second.levels["low"].last_batches == first.levels["low"].last_batches
    assert set(second.levels["low"].parameters) == {"2.weight", "2.bias"}


# batches


@pytest.mark.parametrize("method", ["dense", "identity", "finite_difference", "neumann", "cg"])
def test_batches_may_be_taken_apart(method):
    def low(m, batch, h):
        y = batch.pop("y")
        x = batch["nested"].pop()
        return sample_weighted(m, (x, y), h)

    options = ((XV, YV),)
    batch = {"nested": [X], "y": Y}
    problem = bilevel(low, validation, network(3, 3, 1), weights(), batch, *options)
    assert relative(computed(problem, method), computed(weighted(), method)) < 1e-12
    assert set(batch) == {"nested", "y"}
    assert len(batch["nested"]) == 1


def test_batches_changed_in_place_are_refused():
    def low(m, batch, h):
        batch[0].mul_(0.5)
        return sample_weighted(m, batch, h)

    problem = bilevel(low, validation, network(3, 3, 1), weights(), (X.clone(), Y), (XV, YV))
    with pytest.raises(LossError, match="changes its batch in place") as error:
        computed(problem, "identity")
    assert "x = x * 0.5" in error.value.remedy


# purity


def test_modes_are_restored():
    model = nn.Sequential(network(3, 3), nn.Dropout(0.5), network(3, 1))

    def top(h, batch, m):
        m.eval()
        return validation(h, batch, m)

    problem = weighted(model, top=top)
    first = computed(problem, "identity")
    assert all(child.training for child in model.modules())
    assert torch.equal(computed(problem, "identity"), first)
    model.eval()
    assert relative(computed(problem, "identity"), first) > 1e-3


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = network(3, 1)
        self.register_buffer("center", None)

    def forward(self, x):
        if self.center is None:
            self.center = x.mean(0) * self.layer[0].weight.sum()
        return self.layer(x - self.center.detach())


def test_empty_buffers_are_empty_afterwards():
    model = Lazy()
    problem = weighted(model)
    found = computed(problem, "dense")
    assert model.center is None
    assert torch.isfinite(found).all()


def test_buffer_filled_after_the_build_is_copied():
    model = Lazy()
    loss = build(weighted(model).program).levels["low"].loss
    assert not loss.buffers
    model.center = torch.ones(3, dtype=torch.float64)
    (slot,) = loss.buffers
    state = loss.state({})
    assert torch.equal(state[slot.key], model.center)
    kept = model.center
    loss.within(state, lambda: model.center.mul_(2.0))
    assert model.center is kept
    assert torch.equal(kept, torch.ones(3, dtype=torch.float64))
    assert torch.equal(state[slot.key], 2.0 * kept)


def test_buffer_with_two_names_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network(3, 1)
            self.register_buffer("one", torch.ones(1, dtype=torch.float64))
            self.register_buffer("two", self.one)

        def forward(self, x):
            self.one.mul_(2.0)
            return self.layer(x) * self.two

    model = Twice()
    problem = weighted(model)
    loss = build(problem.program).levels["low"].loss
    state = loss.state({})
    copies = [state[slot.key] for slot in loss.buffers]
    assert copies[0] is copies[1]
    assert copies[0] is not model.one
    computed(problem, "identity")
    assert model.one == 1.0
    assert model.one is model.two


def test_parameters_changed_in_place_are_refused():
    def low(m, batch, h):
        with torch.no_grad():
            for p in m.parameters():
                p.clamp_(-1.0, 1.0)
        return sample_weighted(m, batch, h)

    with pytest.raises(LossError, match="changes the parameters of its modules in place"):
        computed(weighted(low=low), "identity")


# operations


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def test_branch_without_second_derivative_is_found_when_it_is_taken():
    takes = []

    def low(m, batch, h):
        out = batch[0] @ m.w
        cubed = Once.apply(out) if takes else out**3
        return (h.s.sigmoid() * (cubed - batch[1]) ** 2).mean() + decay(m, 2.0)

    def top(h, batch, m):
        return ((batch[0] @ m.w - batch[1]) ** 2).mean()

    problem = weighted({"w": 0.3 * randn(3, seed=1)}, low=low, top=top)
    wanted = computed(problem, "dense")
    takes.append(True)
    with pytest.warns(FallbackWarning, match="difference"):
        assert relative(computed(problem, "dense"), wanted) < 1e-6


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, nn.utils.weight_norm])
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_has_the_right_second_derivative(kind, dim):
    class Normed(nn.Module):
        def __init__(self, g, v):
            super().__init__()
            self.g, self.v = nn.Parameter(g.clone()), nn.Parameter(v.clone())

        def forward(self, x):
            kept = tuple(d for d in range(2) if d != dim) if dim is not None else (0, 1)
            length = (self.v**2).sum(kept, keepdim=True).sqrt()
            return x @ (self.v * self.g / length).T

    def low(m, batch, h):
        return (h.s.sigmoid() * (m(batch[0])[:, 0] - batch[1]) ** 2).mean() + decay(m)

    def top(h, batch, m):
        return ((m(batch[0])[:, 0] - batch[1]) ** 2).mean()

    torch.manual_seed(0)
    fused = kind(nn.Linear(3, 1, bias=False, dtype=torch.float64), dim=dim)
    g, v = (p.detach() for p in fused.parameters())
    written = weighted(Normed(g, v), low=low, top=top)
    problem = weighted(fused, low=low, top=top)
    for method in (Dense(), *IDENTITIES):
        assert relative(computed(problem, method), computed(written, method)) < 1e-9


def test_complex_parameters_are_refused():
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex128))])
    with pytest.raises(ModuleError, match="complex"):
        computed(weighted(model), "identity")


def test_sparse_embeddings():
    def low(m, batch, h):
        out = m(torch.arange(8) % 3).sum(1)
        return (h.s.sigmoid() * (out - batch[1]) ** 2).mean()

    def top(h, batch, m):
        return (m(torch.arange(3)) ** 2).sum() + m.weight.sum()

    torch.manual_seed(0)
    dense = nn.Embedding(4, 2, dtype=torch.float64)
    sparse = nn.Embedding(4, 2, sparse=True, dtype=torch.float64)
    sparse.load_state_dict(dense.state_dict())
    for method in (Identity(), FiniteDifference()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            found = computed(weighted(sparse, low=low, top=top), method)
        assert relative(found, computed(weighted(dense, low=low, top=top), method)) < 1e-6


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.1),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse_embeddings_train_as_dense_ones(optimizer, accumulate):
    def trained(*, sparse):
        torch.manual_seed(0)
        module = nn.Embedding(5, 2, sparse=sparse, dtype=torch.float64)
        program = Program()
        batches = [torch.tensor([0, 1, 1]), torch.tensor([3, 0, 0])]

        @program.level(
            "words",
            module=module,
            optimizer=OPTIMIZERS[optimizer],
            data=batches,
            accumulate=accumulate,
            clip_norm=0.5,
        )
        def words(model, batch):
            return (model(batch) ** 2).sum()

        run = mlodeco.run(4, program=program, seed=0, progress="off")
        return module.weight.detach(), [step.grad_norm for step in run.history.steps]

    found, norms = trained(sparse=True)
    wanted, expected_norms = trained(sparse=False)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert norms == pytest.approx(expected_norms, rel=1e-12)
    assert max(norms) > 0.5  # clipped


@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_modules_act_in_every_automatic_product(kind):
    def low(m, batch, h):
        return (h.s * (m(batch[0])[:, 0] - batch[1]) ** 2).mean()

    def double(module, grad, *rest):
        return tuple(None if g is None else 2.0 * g for g in grad)

    model = network(3, 3, 3, 3, 1)
    getattr(model[2], kind)(double)
    problem = weighted(model, low=low)
    wanted = computed(problem, Identity(product="reverse"))
    assert torch.equal(computed(problem, Identity()), wanted)


def test_hooks_of_tensors_act_in_every_automatic_product():
    def low(m, batch, h):
        out = m(batch[0])[:, 0]
        if out.requires_grad:
            out.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        return (h.s * (out - batch[1]) ** 2).mean()

    problem = weighted(network(3, 3, 3, 3, 1), low=low)
    wanted = computed(problem, Identity(product="reverse"))
    assert torch.equal(computed(problem, Identity()), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules():
    model = torch.jit.script(network(3, 3, 1))
    for method in ("dense", "identity", "finite_difference"):
        assert relative(computed(weighted(model), method), computed(weighted(), method)) < 1e-9


def test_hooks_of_parameters_are_warned_of():
    model = network(3, 3, 1)
    model[0].weight.register_hook(lambda grad: 2.0 * grad)
    with pytest.warns(GraphWarning, match=r"hooks of '0\.weight' do not act"):
        computed(weighted(model), "identity")


# solvers


def ill(eigenvalues, dtype, b=None):
    """A quadratic whose Hessian has the eigenvalues; the answer for b in float64."""
    size = len(eigenvalues)
    q, _ = torch.linalg.qr(randn(size, size, seed=1))
    h = (q * torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    b = randn(size, seed=2) if b is None else q @ b
    tree = {"x": b.to(dtype)}
    narrow = h.to(dtype)
    return h, b, tree, lambda v: {"x": narrow @ v["x"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_solves_in_double_precision(dtype):
    h, _, tree, matvec = ill([0.5, 1.0, 1.5, 2.0], dtype)
    found = Dense().solve(matvec, tree)
    wanted = torch.linalg.solve(h.to(dtype).double(), tree["x"].double())
    assert found.status is Status.CONVERGED
    assert found.value["x"].dtype == dtype
    assert relative(found.value["x"].double(), wanted) < 4 * torch.finfo(dtype).eps
    assert found.residual < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_finds_singular_systems_by_rank(dtype):
    h, b, tree, matvec = ill([0.0, 1.0, 1.0, 2.0], dtype)
    found = Dense().solve(matvec, tree)
    assert found.status is Status.SINGULAR
    wanted = torch.linalg.pinv(h, rtol=1e-5) @ b
    assert relative(found.value["x"].double(), wanted) < 1e-5


def test_dense_names_what_is_not_finite():
    def low(m, batch, h):
        return (m.w.abs().sqrt() * h.x).sum()

    def top(h, batch, m):
        return m.w.sum()

    module = {"w": torch.zeros(2, dtype=torch.float64)}
    problem = bilevel(low, top, module, {"x": randn(2)}, randn(1), randn(1))
    with pytest.raises(NonFiniteError, match="Dense"):
        computed(problem, "dense")


def test_automatic_step_recovers_from_an_estimate_that_is_too_small():
    size = 50
    eigenvalues = [1.0] * (size - 1) + [40.0]
    b = torch.ones(size, dtype=torch.float64)
    b[-1] = 1e-6
    h, b, tree, matvec = ill(eigenvalues, torch.float64, b)
    found = Neumann(num_terms=3000, power_steps=1).solve(matvec, tree)
    assert found.status is Status.TRUNCATED
    assert relative(found.value["x"], torch.linalg.solve(h, b)) < 1e-6


def test_negative_curvature_does_not_shrink_the_automatic_step():
    _, _, tree, matvec = ill([-0.1, 1.0, 2.0], torch.float64)
    calls = []

    def counted(v):
        calls.append(1)
        return matvec(v)

    Neumann(num_terms=20).solve(counted, tree)
    assert len(calls) == 5 + 19


def test_untouched_parameters_do_not_eat_the_radius():
    def build_one(size):
        model = network(3, 3, 1)
        model.register_parameter("unused", nn.Parameter(1e6 * randn(size)))

        def low(m, batch, h):
            kept = sum((p**2).sum() for n, p in m.named_parameters() if n != "unused")
            return (h.s.sigmoid() * (m(batch[0])[:, 0] - batch[1]) ** 2).mean() + 0.3 * kept

        def top(h, batch, m):
            return validation(h, batch, m) + 1e6 * m.unused.sum()

        return weighted(model, low=low, top=top)

    for method in (FiniteDifference(), Identity(product="difference")):
        wanted = computed(build_one(1), Identity(product="reverse"))
        assert relative(computed(build_one(1000), method), wanted) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("factor", [1.0, 1e-30, 1e30])
def test_norms_and_products_neither_overflow_nor_vanish(dtype, factor):
    if dtype is torch.float16:
        factor = {1.0: 1.0, 1e-30: 1e-7, 1e30: 1e4}[factor]
    tree = {"x": torch.full((70_000,), factor, dtype=dtype), "y": torch.ones(3, dtype=dtype) * 0}
    wanted = float(tree["x"][0].double()) * 70_000**0.5
    assert norm(tree) == pytest.approx(wanted, rel=1e-4)
    assert dot(tree, tree) == pytest.approx(wanted**2, rel=2e-4)
    large = {"x": torch.ones(1_100_000, dtype=dtype)}
    assert dot(large, large) == pytest.approx(1_100_000, rel=1e-5)


def test_zero_cotangent_costs_no_pass_of_the_lower_loss():
    calls = []

    def low(m, batch, h):
        calls.append(1)
        return sample_weighted(m, batch, h)

    def top(h, batch, m):
        return (h.s**2).sum() + 0.0 * validation(h, batch, m)

    problem = weighted(low=low, top=top)
    computed(problem, "cg")
    for method in ("cg", "neumann", "dense", "identity"):
        calls.clear()
        computed(problem, method)
        assert not calls


def test_users_methods_are_not_compared_by_their_contents():
    @dataclass
    class Mine:
        data: torch.Tensor

        def solve(self, matvec, b):
            return Solution(dict(b), 1, None, Status.TRUNCATED)

        def respond(self, problem, cotangent):
            return Identity().respond(problem, cotangent)

    program = Program()
    shared = {"x": randn(3, seed=1)}
    program.level("low", module={"w": randn(3)})(lambda low, top: ((low.w - top.x) ** 2).sum())
    program.level("mid", module={"w": randn(3)}, lower=["low"], hypergrad=Mine(randn(2)))(
        lambda mid, low, top: ((mid.w - low.w * top.x) ** 2).sum()
    )
    program.level("top", module=shared, lower=["mid"], hypergrad=Mine(randn(2)))(
        lambda top, mid, low: ((mid.w + low.w) ** 2).sum()
    )
    found = mlodeco.hypergradient("top", program=program)["x"]
    wanted = mlodeco.hypergradient("top", program=program, hypergrad="identity")["x"]
    assert torch.allclose(found, wanted)


# methods by name


def test_methods_by_a_mapping():
    problem = quadratic()
    wanted = computed(problem, "dense")
    assert torch.equal(computed(problem, {"low": "dense"}), wanted)
    assert torch.equal(computed(problem, {"low": None}), computed(problem, None))
    assert torch.equal(computed(problem, {}), computed(problem, "neumann"))
    with pytest.raises(MethodError, match="'lwo'"):
        computed(problem, {"lwo": "cg"})


def test_method_with_the_name_of_a_built_in_one_is_refused():
    problem = quadratic()
    problem.program.method("neumann")(lambda matvec, b: b)
    with pytest.raises(MethodError, match=r"test_robust\.py.*'neumann'"):
        computed(problem, "identity")


def test_methods_have_names():
    problem = quadratic()
    problem.program.method("mine")(lambda matvec, b: b)
    built = build(problem.program)
    assert describe(built.methods_for("mine")["top", "low"]) == "mine"
    assert describe(CG()) == "CG"
