"""What user's functions do in practice: each against plain autograd on the real modules."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import mlodeco
from mlodeco import Program
from mlodeco.calculus.products import open_curvature
from mlodeco.errors import FallbackWarning
from mlodeco.hypergrad import CG, Dense, FiniteDifference, Identity
from tests import reference
from tests.problems import PROBLEMS, bilevel, network, randn
from tests.test_hypergrad_exact import computed, expected, relative

X, Y = randn(8, 3, seed=11), randn(8, seed=12)
XV, YV = randn(6, 3, seed=13), randn(6, seed=14)
EXACT = ("auto", "reverse", "reverse_over_forward", "forward")


def decay(module, factor=0.3):
    return factor * sum((p**2).sum() for p in module.parameters())


def mse(module, batch):
    x, y = batch
    return ((module(x)[:, 0] - y) ** 2).mean()


def validation(h, batch, m):
    return mse(m, batch)


def weights(size=8, seed=5):
    return {"s": randn(size, seed=seed)}


def sample_weighted(m, batch, h):
    x, y = batch
    return (h.s.sigmoid() * (m(x)[:, 0] - y) ** 2).mean() + decay(m)


def case_no_grad():
    def low(m, batch, h):
        x, y = batch
        prediction = m(x)[:, 0]
        with torch.no_grad():
            scale = m(x)[:, 0].abs() + 1.0
        return (h.s.sigmoid() * scale * (prediction - y) ** 2).mean() + decay(m)

    return bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))


def case_requires_grad_and_autograd_grad():
    def low(m, batch, h):
        x = batch[0].clone().requires_grad_()
        out = m(x)[:, 0]
        slope = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
        penalty = (slope**2).sum(1)
        return (h.s.sigmoid() * ((out - batch[1]) ** 2 + 0.1 * penalty)).mean() + decay(m)

    return bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))


def case_adversarial_step():
    def low(m, batch, h):
        x = batch[0].clone().requires_grad_()
        slope = torch.autograd.grad(mse(m, (x, batch[1])), x)[0]
        moved = (x + 0.1 * slope).detach()
        return sample_weighted(m, (moved, batch[1]), h)

    return bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))


def case_item():
    def low(m, batch, h):
        x, y = batch
        losses = (m(x)[:, 0] - y) ** 2
        return (h.s.sigmoid() * losses).mean() / (1.0 + losses.mean().item()) + decay(m)

    return bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))


def case_module_reused_twice():
    shared = nn.Linear(3, 3, dtype=torch.float64)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), network(3, 1, seed=3))
    return bilevel(sample_weighted, validation, model, weights(), (X, Y), (XV, YV))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 1, dtype=torch.float64)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def case_tied_weights():
    torch.manual_seed(3)
    return bilevel(sample_weighted, validation, Tied(), weights(), (X, Y), (XV, YV))


def case_two_names_for_one_module():
    torch.manual_seed(4)
    model = Tied()
    model.alias = model.first
    return bilevel(sample_weighted, validation, model, weights(), (X, Y), (XV, YV))


def case_batch_norm():
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.BatchNorm1d(3), nn.Linear(3, 1)
    ).double()
    return bilevel(sample_weighted, validation, model, weights(), (X, Y), (XV, YV))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(4, 1, dtype=torch.float64)

    def forward(self, x):
        x = F.pad(x, (0, 1))[:, None, :].expand(-1, 3, -1) * torch.arange(1.0, 4.0)[:, None]
        mixed, _ = self.mix(x, x, x, need_weights=False)
        return self.out(mixed.mean(1))


def case_attention():
    torch.manual_seed(6)
    return bilevel(sample_weighted, validation, Attention(), weights(), (X, Y), (XV, YV))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 2, batch_first=True, dtype=torch.float64)
        self.out = nn.Linear(2, 1, dtype=torch.float64)

    def forward(self, x):
        return self.out(self.rnn(x[..., None])[0][:, -1])


def case_lstm():
    def low(m, batch, h):
        x, y = batch
        return (h.s.sigmoid() * (m(x * h.s.cos().mean())[:, 0] - y) ** 2).mean() + decay(m)

    torch.manual_seed(7)
    return bilevel(low, validation, Recurrent(), weights(), (X, Y), (XV, YV))


class Checkpointed(nn.Module):
    def __init__(self, *, is_on=True):
        super().__init__()
        self.first = network(3, 4, 3, seed=1)
        self.second = network(3, 3, 1, seed=2)
        self.is_on = is_on

    def forward(self, x):
        def block(z):
            return torch.tanh(self.first(z))

        h = checkpoint(block, x, use_reentrant=False) if self.is_on else block(x)
        return self.second(h)


def case_checkpointing():
    return bilevel(sample_weighted, validation, Checkpointed(), weights(), (X, Y), (XV, YV))


def case_penalty_on_parameters():
    def low(m, batch, h):
        names = [name for name, _ in m.named_parameters()]
        norms = torch.stack([(p**2).sum() for p in m.parameters()])
        return mse(m, batch) + (h.s[: len(names)].exp() * norms).sum()

    return bilevel(low, validation, network(3, 3, 1), weights(4), (X, Y), (XV, YV))


CASES = {
    name.removeprefix("case_"): value
    for name, value in dict(globals()).items()
    if name.startswith("case_")
}

METHODS = {
    "dense": (Dense(), reference.exact),
    "dense_by_reverse": (Dense(product="reverse"), reference.exact),
    "identity": (Identity(), reference.scaled(1.0)),
    "identity_by_duals": (Identity(product="reverse_over_forward"), reference.scaled(1.0)),
    "dense_forward": (Dense(product="forward"), reference.exact),
    "identity_forward": (Identity(product="forward"), reference.scaled(1.0)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_plain_autograd(case, method):
    problem = CASES[case]()
    chosen, solve = METHODS[method]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = expected(problem, solve)
    assert relative(computed(problem, chosen), wanted) < 1e-9


@pytest.mark.parametrize("case", sorted(set(CASES) - {"no_grad", "item", "adversarial_step"}))
def test_difference_agrees_where_nothing_is_detached(case):
    problem = CASES[case]()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = expected(problem, reference.scaled(1.0))
    assert relative(computed(problem, "finite_difference"), wanted) < 1e-6


def test_checkpointing_changes_nothing():
    on, off = (
        bilevel(sample_weighted, validation, Checkpointed(is_on=flag), weights(), (X, Y), (XV, YV))
        for flag in (True, False)
    )
    for method in ("dense", "identity", "finite_difference", "cg", "neumann"):
        assert relative(computed(on, method), computed(off, method)) < 1e-9


def gradient_penalty(*, of_regularizer):
    """A loss that takes gradients in its own parameters."""

    def low(m, batch, h):
        x, y = batch
        plain = (h.s.sigmoid() * (x @ m.w - y) ** 2).mean() + decay(m)
        of = (m.w**4).sum() if of_regularizer else plain
        (inner,) = torch.autograd.grad(of, m.w, create_graph=True)
        return plain + 0.1 * (h.s[0].exp() * inner**2).sum()

    def top(h, batch, m):
        return ((batch[0] @ m.w - batch[1]) ** 2).mean()

    return bilevel(low, top, {"w": 0.3 * randn(3, seed=1)}, weights(), (X, Y), (XV, YV))


@pytest.mark.parametrize("of_regularizer", [True, False])
@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        (FiniteDifference(), 1e-6),
        (Identity(product="difference"), 1e-6),
        (Dense(product="difference"), 1e-6),
        *((kind(product=p), 1e-10) for kind in (Identity, Dense) for p in EXACT),
    ],
    ids=repr,
)
def test_a_loss_that_takes_gradients_itself(method, tolerance, of_regularizer):
    problem = gradient_penalty(of_regularizer=of_regularizer)
    exact = Dense if isinstance(method, Dense) else Identity
    wanted = computed(problem, exact(product="reverse"))
    solve = reference.exact if exact is Dense else reference.scaled(1.0)
    assert relative(wanted, expected(problem, solve)) < 1e-10
    problem = gradient_penalty(of_regularizer=of_regularizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        for _ in range(2):
            assert relative(computed(problem, method), wanted) < tolerance


class NoForwardRule(torch.autograd.Function):
    """Can be differentiated backward as often as one likes, and not forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


class Cubed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network(3, 3, 3, 3, 3, 1, seed=1)

    def forward(self, x):
        return self.layers(NoForwardRule.apply(self.layers[0](x)))


@pytest.mark.parametrize("product", ["auto", "reverse"])
def test_operation_without_a_forward_rule_falls_back_once_and_says_so(product):
    problem = bilevel(sample_weighted, validation, Cubed(), weights(), (X, Y), (XV, YV))
    wanted = expected(problem, reference.scaled(1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        found = [computed(problem, Identity(product=product)) for _ in range(2)]
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == (1 if product == "auto" else 0)
    assert all("reverse_over_forward" in m and "'reverse'" in m for m in messages)
    for one in found:
        assert relative(one, wanted) < 1e-9


@pytest.mark.parametrize("product", ["forward", "reverse_over_forward"])
@pytest.mark.parametrize("method", [Identity(), CG(), Dense()], ids=repr)
def test_a_mode_asked_for_by_name_says_which_it_is_and_what_else_there_is(method, product):
    problem = bilevel(sample_weighted, validation, Cubed(), weights(), (X, Y), (XV, YV))
    with pytest.raises(NotImplementedError) as caught:
        computed(problem, replace(method, product=product))
    notes = " ".join(caught.value.__notes__)
    assert f"in product='{product}' of level 'low' (test_facts.py:" in notes
    assert "product='auto' takes another" in notes


@pytest.mark.parametrize("product", ["reverse", "forward"])
def test_a_missing_second_derivative_is_located(product):
    def low(m, batch, h):
        x, y = batch
        return (h.s.sigmoid() * (Once.apply(x @ m.w) - y) ** 2).mean() + decay(m, 2.0)

    def top(h, batch, m):
        return ((batch[0] @ m.w - batch[1]) ** 2).mean()

    problem = bilevel(low, top, {"w": 0.3 * randn(3, seed=1)}, weights(), (X, Y), (XV, YV))
    with pytest.raises(RuntimeError) as caught:
        computed(problem, CG(product=product))
    assert f"in product='{product}' of level 'low'" in " ".join(caught.value.__notes__)


class Once(torch.autograd.Function):
    """An operation whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


@pytest.mark.parametrize("method", [Identity(), CG(max_steps=200, rtol=1e-9), Dense()])
def test_operation_without_a_second_derivative_falls_back_to_differences(method):
    def build(cube):
        def low(m, batch, h):
            x, y = batch
            return (h.s.sigmoid() * (cube(x @ m.w) - y) ** 2).mean() + decay(m, 2.0)

        def top(h, batch, m):
            return ((batch[0] @ m.w - batch[1]) ** 2).mean()

        module = {"w": 0.3 * randn(3, seed=1)}
        return bilevel(low, top, module, weights(), (X, Y), (XV, YV))

    wanted = computed(build(lambda z: z**3), method)
    with pytest.warns(FallbackWarning, match="difference"):
        found = computed(build(Once.apply), method)
    assert relative(found, wanted) < 1e-6


def test_error_of_the_user_is_raised_and_not_the_fallbacks():
    calls = []

    def low(m, batch, h):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("this is the user's own mistake")
        return sample_weighted(m, batch, h)

    problem = bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))
    with pytest.raises(RuntimeError, match="user's own mistake"):
        computed(problem, "dense")


FULL = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"
TRANSIENT = (FULL, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "a passing mistake")


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("text", TRANSIENT)
@pytest.mark.parametrize("number", range(2, 6))
def test_an_error_that_passes_changes_no_later_hypergradient(text, number, late):
    calls = []

    def low(m, batch, h):
        calls.append(1)
        if len(calls) == number:
            raise RuntimeError(text)
        x, y = batch
        scale = h.s.sigmoid()
        return (
            (scale * (m(x)[:, 0] - y) ** 2).mean() + decay(m)
            if late
            else mse(m, (x * scale[:, None], y)) + decay(m)
        )

    problem = bilevel(low, validation, network(3, 3, 1), weights(), (X, Y), (XV, YV))
    seen, raised = [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        for _ in range(3):
            try:
                seen.append(computed(problem, Identity()))
            except RuntimeError as error:
                raised.append(str(error))
    told = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert not any("'difference' is used" in one for one in told)
    assert len(raised) + len(told) <= 1
    if text is not TRANSIENT[-1]:
        assert not told
    wanted = expected(problem, reference.scaled(1.0))
    for one in seen:
        assert relative(one, wanted) < 1e-10
    assert raised in ([], [text])


class Searched(nn.Module):
    """One network with weights and architecture parameters."""

    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(randn(2, seed=9))
        self.one = network(3, 3, 1, seed=1)
        self.two = network(3, 1, seed=2)

    def forward(self, x):
        mix = self.alpha.softmax(0)
        return mix[0] * self.one(x) + mix[1] * self.two(x)


@pytest.mark.parametrize("method", METHODS)
def test_network_shared_by_weights_and_architecture(method):
    program = Program()
    program.level("weights", module=Searched, params=lambda name: name != "alpha", data=[(X, Y)])(
        lambda model, batch: mse(model, batch) + decay(model)
    )
    program.level(
        "arch",
        lower=["weights"],
        module="weights",
        params=lambda name: name == "alpha",
        data=[(XV, YV)],
    )(lambda model, batch: mse(model, batch))
    net = program.module("arch")
    assert net is program.module("weights")
    edges = {(e.source, e.target, e.kind.value) for e in program.graph().edges}
    assert edges == {
        ("weights", "arch", "lower-to-upper"),
        ("arch", "weights", "upper-to-lower"),
    }
    chosen, solve = METHODS[method]
    found = mlodeco.hypergradient("arch", program=program, hypergrad=chosen)["alpha"]
    low = [p for n, p in net.named_parameters() if n != "alpha"]
    wanted = reference.bilevel(
        lambda: mse(net, (XV, YV)), lambda: mse(net, (X, Y)) + decay(net), [net.alpha], low, solve
    )
    assert relative(found, wanted) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_closure_over_a_global_module(method):
    model = network(3, 3, 1, seed=1)
    hyper = nn.ParameterDict({"s": nn.Parameter(randn(8, seed=5))})

    def low(batch):
        return sample_weighted(model, batch, hyper)

    def top(batch):
        return mse(model, batch)

    program = Program()
    program.level("low", module=model, reads=["top"], data=[(X, Y)])(low)
    program.level("top", module=hyper, lower=["low"], reads=["low"], data=[(XV, YV)])(top)
    chosen, solve = METHODS[method]
    found = mlodeco.hypergradient("top", program=program, hypergrad=chosen)["s"]
    wanted = reference.bilevel(
        lambda: top((XV, YV)), lambda: low((X, Y)), [hyper["s"]], list(model.parameters()), solve
    )
    assert relative(found, wanted) < 1e-9


def test_second_derivatives_leave_the_kernels_as_they_were():
    before = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
    )
    computed(CASES["attention"](), "dense")
    computed(CASES["lstm"](), "dense")
    after = (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
    )
    assert before == after


def test_hypergradient_works_under_no_grad():
    problem = CASES["no_grad"]()
    wanted = computed(problem, "dense")
    with torch.no_grad():
        assert torch.equal(computed(problem, "dense"), wanted)


def test_modules_are_the_users_own_afterwards():
    problem = CASES["two_names_for_one_module"]()
    model = problem.program.module("low")
    before = [(n, id(p), p.detach().clone()) for n, p in model.named_parameters()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    computed(problem, "dense")
    assert [(n, id(p)) for n, p in model.named_parameters()] == [(n, i) for n, i, _ in before]
    assert all(
        torch.equal(p, old) for p, (_, _, old) in zip(model.parameters(), before, strict=True)
    )
    assert buffers.keys() == dict(model.named_buffers()).keys()


def test_a_cross_product_frees_its_graph_and_a_next_product_builds_another():
    case, asked = PROBLEMS["live_weights"](), []

    class Asks:
        def respond(self, problem, cotangent):
            asked[:] = [problem, cotangent]
            return Identity().respond(problem, cotangent)

    mlodeco.hypergradient("top", program=case.program, hypergrad=Asks())
    problem, v = asked
    curvature = open_curvature(problem, "reverse")
    before = curvature.hvp(v), curvature.cross(v)
    after = curvature.cross(v), curvature.hvp(v)
    for left, right in ((before[0], after[1]), (before[1]["top"], after[0]["top"])):
        assert all(torch.equal(left[key], right[key]) for key in left)
