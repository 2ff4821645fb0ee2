"""Unrolled inner loops against autograd through the loops written out."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adafactor,
    Adam,
    AdamW,
    NAdam,
    Optimizer,
    RMSprop,
    Rprop,
)
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import MethodError, MlodecoError, OptimizerError, SolverWarning
from mlodeco.hypergrad import CG, Dense, Unroll, UnrollForward
from tests import reference
from tests.handwritten import OPTIONS
from tests.problems import network, randn, spd
from tests.test_purity import same
from tests.unrolling import (
    FEATURES,
    Reweighting,
    Swapped,
    fit,
    gradients,
    leaves_of,
    minibatch,
    plan,
    relative,
    roll,
    samples,
    values_of,
    weighted,
    weighted_by_detached_losses,
)

CLOSE = 1e-8
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)
ADAM = partial(Adam, lr=0.02, betas=(0.6, 0.8), eps=1e-3)
SOME = ["sgd_nesterov", "adam_options", "adam_amsgrad", "rmsprop_centered", "radam", "asgd"]


@pytest.fixture(autouse=True)
def _double():
    """Some optimizers keep scalars in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(name):
    kind, options = OPTIONS[name]
    return partial(kind, **options)


def is_finite(tree):
    return all(value.isfinite().all() for value in tree.values())


# every optimizer


@pytest.mark.parametrize("steps", [1, 7, 50])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_autograd_through_the_loop(name, steps):
    case = Reweighting(made(name), steps)
    found = case.hypergradient(Unroll())
    assert is_finite(found)
    assert relative(found, case.wanted()) < CLOSE


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_forward_equals_autograd_through_the_loop(name, steps):
    case = Reweighting(made(name), steps)
    found = case.hypergradient(UnrollForward())
    assert is_finite(found)
    assert relative(found, case.wanted()) < CLOSE


@pytest.mark.parametrize("name", OPTIONS)
def test_the_loop_written_out_is_that_of_torch(name):
    """By differences of the loop run with torch's own optimizer."""
    case = Reweighting(made(name), 7, hypergrad=None)
    shift = {n: randn(*p.shape, seed=9) for n, p in values_of(case.hyper).items()}

    def end(amount):
        h = {n: p + amount * shift[n] for n, p in values_of(case.hyper).items()}
        model = copy.deepcopy(case.model)
        optimizer = made(name)(model.parameters())
        for batch in case.batches:
            optimizer.zero_grad()
            weighted(model, batch, Swapped(case.hyper, h)).backward()
            optimizer.step()
        return float(fit(Swapped(case.hyper, h), case.top_batch, model).detach())

    size = 1e-5
    numeric = (end(size) - end(-size)) / (2 * size)
    wanted = case.wanted()
    slope = float(sum((wanted[n] * shift[n]).sum() for n in wanted))
    assert slope == pytest.approx(numeric, rel=1e-5, abs=1e-8)


VARIANTS = {
    "fused": partial(Adam, lr=0.02, eps=1e-3, fused=True),
    "foreach": partial(AdamW, lr=0.02, eps=1e-3, foreach=True),
    "tensor_rate": lambda params: Adam(params, lr=torch.tensor(0.02), eps=1e-3),
    "differentiable": partial(RMSprop, lr=0.01, eps=1e-3, momentum=0.4, differentiable=True),
}


@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_other_forms_of_an_optimizer(name, method):
    case = Reweighting(VARIANTS[name], 7)
    assert relative(case.hypergradient(method), case.wanted()) < CLOSE


@pytest.mark.parametrize("kind", [NAdam, ASGD], ids=lambda kind: kind.__name__)
def test_scalars_of_the_state_in_single_precision(kind):
    torch.set_default_dtype(torch.float32)
    case = Reweighting(partial(kind, lr=0.02), 7)
    found = case.hypergradient(Unroll())
    assert all(value.dtype == torch.float64 for value in found.values())
    assert relative(found, case.wanted()) < 1e-5


# options of the level


@pytest.mark.slow
@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
@pytest.mark.parametrize("bound", [0.02, 0.3, 100.0])
@pytest.mark.parametrize("name", SOME)
def test_with_clipping(name, bound, method):
    """At every step, at some, at none."""
    case = Reweighting(made(name), 7, clip_norm=bound)
    found = case.hypergradient(method)
    assert relative(found, case.wanted()) < CLOSE
    free = Reweighting(made(name), 7)
    assert (relative(found, free.wanted()) < CLOSE) == (bound == 100.0)


SCHEDULERS = {
    "step": (partial(StepLR, step_size=2, gamma=0.5), SOME),
    "one_cycle": (
        partial(OneCycleLR, max_lr=0.1, total_steps=60, pct_start=0.1, cycle_momentum=True),
        ["sgd_momentum", "adam_options", "adamw_amsgrad", "rmsprop_momentum"],
    ),
    "lambda": (partial(LambdaLR, lr_lambda=lambda step: 1 / (1 + step)), SOME),
    "warm_up_from_zero": (partial(LambdaLR, lr_lambda=lambda step: min(1.0, step / 3)), SOME),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
@pytest.mark.parametrize(
    ("schedule", "name"),
    [(schedule, name) for schedule, (_, names) in SCHEDULERS.items() for name in names],
)
def test_with_a_scheduler(schedule, name, method):
    scheduler, _ = SCHEDULERS[schedule]
    case = Reweighting(made(name), 7, scheduler=scheduler)
    found = case.hypergradient(method)
    assert relative(found, case.wanted()) < CLOSE
    constant = Reweighting(made(name), 7)
    assert relative(found, constant.wanted()) > 1e-3


def groups_of_sgd(module):
    first, last = module[0], module[2]
    return SGD(
        [
            {"params": first.parameters(), "lr": 0.3, "momentum": 0.5, "weight_decay": 0.1},
            {"params": [last.weight], "nesterov": True},
            {"params": [last.bias], "momentum": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
    )


def groups_of_adam(module):
    first, last = module[0], module[2]
    return Adam(
        [
            {"params": last.parameters(), "lr": 0.03, "betas": (0.5, 0.7), "amsgrad": True},
            {"params": [first.bias], "weight_decay": 0.3},
            {"params": [first.weight], "eps": 1e-2},
        ],
        lr=0.01,
        eps=1e-3,
    )


@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
@pytest.mark.parametrize("scheduler", [None, partial(StepLR, step_size=2, gamma=0.5)])
@pytest.mark.parametrize("groups", [groups_of_sgd, groups_of_adam])
def test_with_groups_of_parameters(groups, scheduler, method):
    case = Reweighting(groups, 7, scheduler=scheduler)
    assert relative(case.hypergradient(method), case.wanted()) < CLOSE


@pytest.mark.parametrize("method", [Unroll(), Unroll(keep_graph=True), UnrollForward()], ids=str)
@pytest.mark.parametrize("bound", [None, 0.05])
@pytest.mark.parametrize("name", ["sgd_nesterov", "adam_options"])
def test_a_parameter_that_the_loss_does_not_touch(name, bound, method):
    """Torch does not step it, and so neither decays it."""
    model = network(FEATURES, 5, 1, seed=1)
    model.register_parameter("unused", nn.Parameter(randn(3, seed=8)))
    case = Reweighting(made(name), 7, model=model, clip_norm=bound)
    found = case.hypergradient(method)
    assert relative(found, case.wanted()) < CLOSE


@pytest.mark.parametrize("method", [Unroll(), Unroll(keep_graph=True), UnrollForward()], ids=str)
@pytest.mark.parametrize("bound", [None, 0.05])
def test_with_micro_batches(bound, method):
    case = Reweighting(ADAM, 5, accumulate=2, clip_norm=bound)
    assert relative(case.hypergradient(method), case.wanted()) < CLOSE


@pytest.mark.parametrize("method", [Unroll(), Unroll(keep_graph=True)], ids=str)
def test_where_the_derivative_of_the_gradient_is_not_symmetric(method):
    case = Reweighting(MOMENTUM, 7, low=weighted_by_detached_losses)
    assert relative(case.hypergradient(method), case.wanted()) < CLOSE


def test_batch_norm_in_training_mode():
    def model():
        net = network(FEATURES, 5, 1, seed=1)
        return nn.Sequential(net[0], nn.BatchNorm1d(5), net[1], net[2])

    case = Reweighting(ADAM, 7, model=model())
    found = case.hypergradient(Unroll())
    assert relative(found, case.wanted()) < CLOSE
    assert relative(case.hypergradient(UnrollForward()), found) < CLOSE


# options of the methods


@pytest.mark.slow
@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("truncate", [1, 3, 7, 20])
@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "adam_options", "rmsprop_centered"])
def test_truncation(name, truncate, make):
    case = Reweighting(made(name), 7)
    found = case.hypergradient(make(truncate=truncate))
    assert relative(found, case.wanted(truncate=truncate)) < CLOSE
    is_whole = relative(found, case.wanted()) < CLOSE
    assert is_whole == (truncate >= 7)


@pytest.mark.parametrize("truncate", [None, 1, 4])
@pytest.mark.parametrize("every", [1, 3, 7, 20])
@pytest.mark.parametrize("name", ["sgd_momentum", "adam_options", "nadam"])
def test_checkpoints_change_nothing(name, every, truncate):
    case = Reweighting(
        made(name), 10, clip_norm=0.2, scheduler=partial(StepLR, step_size=3, gamma=0.5)
    )
    method = Unroll(checkpoint_every=every, truncate=truncate)
    assert relative(case.hypergradient(method), case.wanted(truncate=truncate)) < CLOSE


@pytest.mark.parametrize("name", OPTIONS)
def test_kept_graphs(name):
    case = Reweighting(made(name), 7)
    found = case.hypergradient(Unroll(keep_graph=True))
    assert is_finite(found)
    assert relative(found, case.wanted()) < CLOSE
    truncated = case.hypergradient(Unroll(keep_graph=True, truncate=3))
    assert relative(truncated, case.wanted(truncate=3)) < CLOSE


@pytest.mark.parametrize(
    ("product", "tolerance"),
    [
        ("auto", CLOSE),
        ("reverse", CLOSE),
        ("forward", CLOSE),
        ("difference", 1e-4),
    ],
)
@pytest.mark.parametrize("name", ["sgd_momentum", "adam_options"])
def test_products(name, product, tolerance):
    case = Reweighting(made(name), 7)
    assert relative(case.hypergradient(Unroll(product=product)), case.wanted()) < tolerance


@pytest.mark.parametrize("name", SOME)
def test_first_order_leaves_the_direct_gradient(name):
    """Unless the loop starts from an upper level: the inner gradients are constants."""
    case = Reweighting(made(name), 7)
    found = case.hypergradient(Unroll(first_order=True))
    h = leaves_of(case.hyper)
    w, _ = case.rolled(h, values_of(case.model), case.batches)
    direct = gradients(case.value(h, {n: p.detach() for n, p in w.items()}), h)
    assert relative(found, direct) < 1e-12


@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
def test_of_one_level_named_and_declared(method):
    name = "unroll" if isinstance(method, Unroll) else "unroll_forward"
    found = [
        Reweighting(ADAM, 4, hypergrad="identity").hypergradient(method),
        Reweighting(ADAM, 4, hypergrad="identity").hypergradient(name),
        Reweighting(ADAM, 4, hypergrad="identity").hypergradient({"low": name}),
    ]
    for declared in (method, name, {"low": method}):
        case = Reweighting(ADAM, 4, hypergrad=declared)
        batches = {"low": case.batches, "top": case.top_batch}
        found.append(mlodeco.hypergradient("top", batches=batches, program=case.program))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], value) for name, value in other.items())


def test_missing_batches_are_the_first_of_a_fresh_iterator():
    case = Reweighting(ADAM, 4)
    found = mlodeco.hypergradient("top", program=case.program)
    first = {"low": case.stream(0, 4), "top": case.top_batch}
    wanted = mlodeco.hypergradient("top", program=case.program, batches=first)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("truncate", [0, -1, 1.5, "all"])
def test_truncation_is_checked(make, truncate):
    with pytest.raises(MethodError, match="truncate"):
        make(truncate=truncate)


def test_forward_mode_has_a_limit_of_hyperparameters():
    case = Reweighting(ADAM, 3)
    with pytest.raises(MethodError, match="limit=10"):
        case.hypergradient(UnrollForward(limit=10))
    assert relative(case.hypergradient(UnrollForward(limit=24)), case.wanted()) < CLOSE


@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_every": 0},
        {"checkpoint_every": 1.5},
        {"keep_graph": "yes"},
        {"first_order": 2},
        {"product": "x"},
        {"keep_graph": True, "checkpoint_every": 3},
        {"keep_graph": True, "first_order": True},
    ],
    ids=str,
)
def test_options_are_checked(options):
    with pytest.raises(MethodError, match=next(iter(options))):
        Unroll(**options)


# levels above and below


def vector(m, batch):
    return ((m.x - batch) ** 2).sum() / 2 + 0.1 * (m.x**4).sum()


class Chain:
    """Three levels of small vectors; ``feedback``: the lowest reads the one between."""

    def __init__(self, top_methods, mid_method, *, feedback=False, low_steps=4, mid_steps=3):
        self.feedback = feedback
        self.low_steps, self.mid_steps = low_steps, mid_steps
        self.curvature, self.mixed = spd(5, 1), randn(5, 5, seed=2)
        self.batches = {
            "low": [randn(5, seed=10 + t) for t in range(low_steps)],
            "mid": [randn(5, seed=20 + t) for t in range(mid_steps)],
            "top": randn(5, seed=30),
        }
        self.program = Program()

        def low(m, batch, top):
            return self.low(m, batch, top, None)

        def low_fed_back(m, batch, top, mid):
            return self.low(m, batch, top, mid)

        def mid(m, batch, low, top):
            return self.mid(m, batch, low, top)

        def top(h, batch, mid, low):
            return self.top(h, batch, mid, low)

        self.program.level(
            "low",
            module={"x": randn(5, seed=3)},
            inner_steps=low_steps,
            optimizer=MOMENTUM,
        )(low_fed_back if feedback else low)
        self.program.level(
            "mid",
            lower=["low"],
            module={"x": randn(5, seed=4)},
            inner_steps=mid_steps,
            optimizer=ADAM,
            hypergrad=mid_method,
        )(mid)
        self.program.level(
            "top",
            lower=["mid"],
            module={"x": randn(5, seed=5)},
            optimizer=partial(SGD, lr=0.1),
            hypergrad=top_methods,
        )(top)

    def low(self, m, batch, top, mid):
        value = vector(m, batch) + 0.3 * ((m.x * top.x) ** 2).sum() + m.x @ self.curvature @ m.x
        return value if mid is None else value + 0.5 * (m.x @ self.mixed @ mid.x.sin())

    def mid(self, m, batch, low, top):
        coupled = (m.x @ self.mixed @ low.x.sin()) + 0.3 * (m.x * low.x * top.x).sin().sum()
        return vector(m, batch) + coupled + m.x @ self.curvature @ m.x

    def top(self, h, batch, mid, low):
        read = ((mid.x - batch) ** 2).sum() + 0.3 * (low.x * mid.x).sum()
        return read + 0.1 * (h.x**2).sum() + 0.1 * (h.x * mid.x).sum()

    def found(self, **batches):
        return mlodeco.hypergradient(
            "top", program=self.program, batches={**self.batches, **batches}
        )["x"]

    def starts(self):
        modules = [self.program.module(name) for name in ("low", "mid", "top")]
        return [values_of(module)["x"].requires_grad_() for module in modules]

    def rolled_low(self, start, mid, top):
        optimized = plan(self.program.module("low"), MOMENTUM, self.low_steps)
        mid = View(mid) if self.feedback else None
        loss = lambda w, batch: self.low(View(w["x"]), batch, View(top), mid)  # noqa: E731
        return roll(loss, {"x": start}, self.batches["low"], optimized)[0]["x"]

    def rolled_mid(self, start, low, top):
        optimized = plan(self.program.module("mid"), ADAM, self.mid_steps)
        loss = lambda w, batch: self.mid(View(w["x"]), batch, View(low), View(top))  # noqa: E731
        return roll(loss, {"x": start}, self.batches["mid"], optimized)[0]["x"]


class View:
    def __init__(self, x):
        self.x = x


def error(found, wanted):
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def grad(value, *inputs):
    return torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True)


@pytest.mark.parametrize("method", [Unroll(), Unroll(keep_graph=True)], ids=str)
@pytest.mark.parametrize("feedback", [False, True])
def test_two_levels_unrolled_one_above_the_other(feedback, method):
    """The lower one is rolled at the mid level's start, and held while that one is rolled."""
    case = Chain(method, method, feedback=feedback)
    low, mid, top = case.starts()
    rolled_low = case.rolled_low(low.detach(), mid.detach(), top)
    rolled_mid = case.rolled_mid(mid.detach(), rolled_low, top)
    value = case.top(View(top), case.batches["top"], View(rolled_mid), View(rolled_low))
    (wanted,) = grad(value, top)
    assert error(case.found(), wanted) < CLOSE


@pytest.mark.parametrize("feedback", [False, True])
def test_an_unrolled_level_above_an_implicit_one(feedback):
    case = Chain({"mid": Unroll(), "low": Dense()}, Dense(), feedback=feedback)
    low, mid, top = case.starts()
    batch = case.batches["low"][0]
    rolled = case.rolled_mid(mid.detach(), low, top)
    value = case.top(View(top), case.batches["top"], View(rolled), View(low))
    total, cotangent = grad(value, top, low)
    held = View(mid.detach()) if feedback else None
    (g,) = torch.autograd.grad(case.low(View(low), batch, View(top), held), low, create_graph=True)
    v = torch.linalg.solve(reference.jacobian(g, [low]).T, cotangent)
    wanted = total - reference.jacobian(g, [top]).T @ v
    found = case.found(low=batch)
    assert error(found, wanted) < CLOSE
    assert error(total, wanted) > 1e-3


@pytest.mark.parametrize("feedback", [False, True])
def test_an_implicit_level_above_an_unrolled_one(feedback):
    case = Chain({"mid": Dense(), "low": Unroll()}, Unroll(), feedback=feedback, mid_steps=1)
    low, mid, top = case.starts()
    batch = case.batches["mid"][0]
    rolled = case.rolled_low(low.detach(), mid.detach(), top)
    at = rolled.detach().requires_grad_()
    value = case.top(View(top), case.batches["top"], View(mid), View(at))
    total, for_mid, for_low = grad(value, top, mid, at)
    (g,) = torch.autograd.grad(
        case.mid(View(mid), batch, View(at), View(top)), mid, create_graph=True
    )
    v = torch.linalg.solve(reference.jacobian(g, [mid]).T, for_mid)
    for_low = for_low - reference.jacobian(g, [at]).T @ v
    through_low = torch.autograd.grad(rolled, top, for_low)[0]
    wanted = total - reference.jacobian(g, [top]).T @ v + through_low
    assert error(case.found(mid=batch), wanted) < CLOSE


def test_of_the_level_between():
    case = Chain("dense", Unroll(), feedback=True)
    low, mid, top = case.starts()
    rolled = case.rolled_low(low.detach(), mid, top.detach())
    batch = case.batches["mid"][0]
    (wanted,) = grad(case.mid(View(mid), batch, View(rolled), View(top)), mid)
    found = mlodeco.hypergradient(
        "mid", program=case.program, batches={"low": case.batches["low"], "mid": batch}
    )["x"]
    assert error(found, wanted) < CLOSE


def test_two_lower_levels_one_unrolled_and_one_solved():
    curvature, batches = spd(4, 1), [randn(4, seed=20 + t) for t in range(5)]
    program = Program()

    def loss(m, batch, h):
        return vector(m, batch) + m.x @ curvature @ m.x + 0.3 * ((m.x * h.x) ** 2).sum()

    def top(h, batch, one, two):
        return ((one.x + two.x - batch) ** 2).sum() + (one.x * two.x * h.x).sum()

    modules = {"one": {"x": randn(4, seed=2)}, "two": {"x": randn(4, seed=3)}}
    for name, steps in (("one", 5), ("two", 1)):
        program.level(
            name, module=modules[name], optimizer=ADAM, inner_steps=steps, reads={"h": "top"}
        )(loss)
    methods = {"one": Unroll(), "two": CG(max_steps=50, rtol=1e-13)}
    program.level("top", lower=["one", "two"], module={"x": randn(4, seed=4)}, hypergrad=methods)(
        top
    )
    found = mlodeco.hypergradient(
        "top", program=program, batches={"one": batches, "two": batches[0], "top": randn(4, seed=5)}
    )["x"]
    x, two = randn(4, seed=4).requires_grad_(), randn(4, seed=3).requires_grad_()
    rolled, _ = roll(
        lambda w, batch: loss(View(w["x"]), batch, View(x)),
        {"x": randn(4, seed=2)},
        batches,
        plan(program.module("one"), ADAM, 5),
    )
    value = top(View(x), randn(4, seed=5), View(rolled["x"]), View(two))
    total, b = grad(value, x, two)
    (g,) = torch.autograd.grad(loss(View(two), batches[0], View(x)), two, create_graph=True)
    v = torch.linalg.solve(reference.jacobian(g, [two]), b)
    assert error(found, total - reference.jacobian(g, [x]).T @ v) < CLOSE


def test_forward_mode_at_a_level_between_equals_reverse_mode():
    found = Chain({"mid": UnrollForward(limit=1000), "low": Unroll()}, Unroll()).found()
    wanted = Chain({"mid": Unroll(), "low": Unroll()}, Unroll()).found()
    assert error(found, wanted) < CLOSE


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
def test_nested_is_refused(method):
    case = Chain("unroll", "unroll")
    with pytest.raises(MethodError, match="nested"):
        mlodeco.hypergradient(
            "top", program=case.program, batches=case.batches, hypergrad=method, nested=True
        )
    two = Reweighting(ADAM, 3)
    with pytest.raises(MethodError, match="nested"):
        two.hypergradient(method, nested=True)


# starting from an upper level


class Adaptation:
    """A task learnt from an initialization, which is judged by where the loop ends."""

    def __init__(
        self, optimizer, steps, *, select=None, near=0.0, norm=False, scheduler=None, hypergrad=None
    ):
        self.optimizer, self.steps, self.near, self.scheduler = optimizer, steps, near, scheduler
        self.select = select or (lambda name: True)
        self.batches = [samples(40 + t, 8) for t in range(steps)]
        self.query = samples(60, 10)
        self.init, self.model = (self.network(seed, norm) for seed in (1, 2))
        self.program = Program()

        def task(model, batch):
            return self.task_loss(model, batch, None)

        def task_near(model, batch, init):
            return self.task_loss(model, batch, init)

        self.program.level(
            "task",
            module=self.model,
            params=select,
            init_from="init",
            inner_steps=steps,
            optimizer=optimizer,
            scheduler=scheduler,
            data=[samples(80 + t, 8) for t in range(5)],
        )(task_near if near else task)
        self.program.level(
            "init",
            lower=["task"],
            module=self.init,
            optimizer=partial(SGD, lr=0.1),
            data=[self.query],
            hypergrad="unroll" if hypergrad is None else hypergrad,
        )(lambda init, batch, task: self.init_loss(init, batch, task))

    @staticmethod
    def network(seed, norm):
        net = network(FEATURES, 5, 1, seed=seed)
        if norm:
            layer = nn.BatchNorm1d(5)
            with torch.no_grad():
                layer.running_mean.copy_(randn(5, seed=seed))
                layer.running_var.copy_(randn(5, seed=seed).exp())
            net = nn.Sequential(net[0], layer, net[1], net[2]).eval()
        return net

    def task_loss(self, model, batch, init):
        x, y = batch
        loss = ((model(x)[:, 0] - y) ** 2).mean()
        if self.near:
            pairs = zip(model.parameters(), init.parameters(), strict=True)
            loss = loss + self.near * sum(((p - q) ** 2).sum() for p, q in pairs)
        return loss

    def init_loss(self, init, batch, task):
        x, y = batch
        own = sum((p**2).sum() for p in init.parameters())
        return ((task(x)[:, 0] - y) ** 2).mean() + 1e-3 * own

    def found(self, method):
        batches = {"task": self.batches, "init": self.query}
        return mlodeco.hypergradient(
            "init", program=self.program, batches=batches, hypergrad=method
        )

    def wanted(self, start=None, batches=None, **options):
        leaves = leaves_of(self.init) if start is None else start
        end = self.adapted(leaves, self.batches if batches is None else batches, **options)
        init, task = Swapped(self.init, leaves), Swapped(self.init, end)
        return gradients(self.init_loss(init, self.query, task), leaves)

    def adapted(self, leaves, batches, **options):
        body = {n: p for n, p in leaves.items() if not self.select(n)}
        start = {n: p for n, p in leaves.items() if self.select(n)}
        steps = plan(self.init, self.optimizer, len(batches), self.scheduler, self.select)

        def loss(w, batch):
            # in the order of the module's parameters, and with the buffers of the upper level
            values = {n: {**w, **body}[n] for n in leaves}
            return self.task_loss(Swapped(self.init, values), batch, Swapped(self.init, leaves))

        end, _ = roll(loss, start, batches, steps, **options)
        return {n: {**end, **body}[n] for n in leaves}


METHODS = {
    "plain": Unroll(),
    "checkpoints": Unroll(checkpoint_every=3),
    "graphs": Unroll(keep_graph=True),
    "forward": UnrollForward(),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("name", [*SOME, "sgd", "adamw", "adagrad_options", "adadelta"])
def test_an_initialization_learnt_through_the_loop(name, steps, method):
    case = Adaptation(made(name), steps)
    found = case.found(METHODS[method])
    assert is_finite(found)
    assert relative(found, case.wanted()) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_an_initialization_that_the_task_reads_as_well(method):
    case = Adaptation(made("sgd_nesterov"), 5, near=0.2)
    assert relative(case.found(METHODS[method]), case.wanted()) < CLOSE


def test_an_initialization_with_a_scheduler():
    case = Adaptation(MOMENTUM, 5, scheduler=partial(StepLR, step_size=2, gamma=0.3))
    assert relative(case.found(Unroll()), case.wanted()) < CLOSE


def test_an_initialization_gives_its_buffers_too():
    case = Adaptation(MOMENTUM, 5, norm=True)
    assert relative(case.found(Unroll()), case.wanted()) < CLOSE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sgd_nesterov", "adam_options"])
def test_a_head_is_adapted_and_the_body_learnt(name, method):
    """The body is that of the upper level all along, and has a gradient from every step."""
    case = Adaptation(made(name), 5, select=lambda name: name.startswith("2."))
    found = case.found(METHODS[method])
    wanted = case.wanted()
    assert relative(found, wanted) < CLOSE
    body = {n: g for n, g in wanted.items() if n.startswith("0.")}
    assert relative({n: found[n] for n in body}, body) < CLOSE
    assert all(float(g.norm()) > 1e-4 for g in body.values())


@pytest.mark.parametrize("select", [None, lambda name: name.startswith("2.")], ids=["all", "head"])
@pytest.mark.parametrize("name", SOME)
def test_first_order_passes_through_the_steps_to_the_initialization(name, select):
    """The decay of weights goes with it, the inner gradients do not."""
    case = Adaptation(made(name), 5, select=select)
    found = case.found(Unroll(first_order=True))
    assert relative(found, case.wanted(first_order=True)) < CLOSE


@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("select", [None, lambda name: name.startswith("2.")], ids=["all", "head"])
def test_truncation_must_not_cut_the_initialization_off(select, make):
    case = Adaptation(ADAM, 5, select=select)
    assert relative(case.found(make(truncate=5)), case.wanted()) < CLOSE
    with pytest.raises(MethodError, match="init_from"):
        case.found(make(truncate=4))


@pytest.mark.parametrize("name", ["sgd_momentum", "adam_options"])
def test_runs_from_an_initialization_start_every_loop_afresh(name):
    case = Adaptation(made(name), 3)
    found = []

    @case.program.on("hypergradient", level="init")
    def capture(grads):
        found.append({n: g.clone() for n, g in grads.items()})

    h = values_of(case.init)
    data = [samples(80 + t % 5, 8) for t in range(9)]
    mlodeco.run(9, program=case.program, progress="off", seed=0)
    assert len(found) == 3
    for turn, one in enumerate(found):
        h = {n: p.detach().requires_grad_() for n, p in h.items()}
        wanted = case.wanted(h, data[3 * turn : 3 * turn + 3])
        assert relative(one, wanted) < CLOSE
        h = {n: p - 0.1 * wanted[n] for n, p in h.items()}
    assert relative(values_of(case.init), {n: p.detach() for n, p in h.items()}) < CLOSE
    # and outside the run the start and the state are fresh again
    assert relative(case.found(Unroll()), case.wanted()) < CLOSE


# nothing is changed


def everything(program):
    modules = [program.module(name) for name in program.levels]
    optimizers = [level.optimizer for level in program.built.levels.values()]
    tensors = [t for m in modules for t in m.state_dict().values()]
    return copy.deepcopy(
        [
            [t.clone() for t in tensors],
            [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()],
            [c.training for m in modules for c in m.modules()],
            [p.requires_grad for m in modules for p in m.parameters()],
            torch.get_rng_state(),
            [None if o is None else flattened(o.state_dict()) for o in optimizers],
        ]
    )


def flattened(value):
    if isinstance(value, dict):
        return [part for key, one in value.items() for part in (key, flattened(one))]
    if isinstance(value, list | tuple):
        return [flattened(one) for one in value]
    return value


def noisy():
    net = network(FEATURES, 5, 1, seed=1)
    return nn.Sequential(net[0], nn.BatchNorm1d(5), net[1], nn.Dropout(0.3), net[2])


PURE = {
    "plain": Unroll(),
    "checkpoints": Unroll(checkpoint_every=2, truncate=3),
    "graphs": Unroll(keep_graph=True),
    "first_order": Unroll(first_order=True),
    "forward": UnrollForward(),
}


@pytest.mark.parametrize("after_run", [False, True])
@pytest.mark.parametrize("method", PURE)
def test_nothing_is_changed(method, after_run):
    case = Reweighting(
        ADAM, 4, model=noisy(), clip_norm=0.2, scheduler=partial(StepLR, step_size=2, gamma=0.5)
    )
    if after_run:
        mlodeco.run(9, program=case.program, progress="off", seed=0)
    before = everything(case.program)
    first = case.hypergradient(PURE[method])
    assert same(before, everything(case.program))
    second = case.hypergradient(PURE[method])
    assert same(list(first.values()), list(second.values()))
    assert same(before, everything(case.program))


@pytest.mark.parametrize("method", PURE)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_nothing_is_changed_by_a_loss_that_raises(at, method):
    calls = None

    def low(model, batch, top):
        nonlocal calls
        if calls is not None:
            calls += 1
            if calls == at:
                raise ZeroDivisionError("of the loss")
        return weighted(model, batch, top)

    case = Reweighting(ADAM, 4, model=noisy(), low=low)
    mlodeco.run(5, program=case.program, progress="off", seed=0)
    before = everything(case.program)
    calls = 0
    with pytest.raises(ZeroDivisionError):
        case.hypergradient(PURE[method])
    assert same(before, everything(case.program))
    calls = None
    assert is_finite(case.hypergradient(PURE[method]))


def test_a_run_is_not_disturbed():
    def end(peek):
        case = Reweighting(
            ADAM, 3, model=noisy(), scheduler=partial(StepLR, step_size=2, gamma=0.8)
        )
        runner = Runner(case.program, seed=0)
        for _ in range(8):
            runner.step()
            if peek:
                case.hypergradient(Unroll())
        return [*values_of(case.model).values(), *values_of(case.hyper).values()]

    assert same(end(False), end(True))


# random numbers


@pytest.mark.parametrize("method", ["plain", "checkpoints", "graphs", "forward"])
def test_dropout_is_the_same_for_the_same_seed(method):
    case = Reweighting(ADAM, 4, model=noisy())
    torch.manual_seed(3)
    first = case.hypergradient(PURE[method])
    torch.manual_seed(3)
    second = case.hypergradient(PURE[method])
    torch.manual_seed(4)
    other = case.hypergradient(PURE[method])
    assert same(list(first.values()), list(second.values()))
    assert not same(list(first.values()), list(other.values()))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plain", "graphs", "forward"])
def test_masks_of_the_roll_are_those_of_its_derivative(method):
    """By differences of the rolled loss, whose masks the seed decides."""
    values = []

    def top(h, batch, low):
        value = fit(h, batch, low)
        values.append(float(value.detach()))
        return value

    net = network(FEATURES, 5, 1, seed=1)
    model = nn.Sequential(net[0], net[1], nn.Dropout(0.3), net[2])
    case = Reweighting(MOMENTUM, 5, model=model, top=top)
    torch.manual_seed(3)
    found = case.hypergradient(PURE[method])

    def rolled(name, k, size):
        parameter = dict(case.hyper.named_parameters())[name]
        saved = parameter.detach().clone()
        values.clear()
        with torch.no_grad():
            parameter[k] += size
        case.hypergradient(PURE[method])
        with torch.no_grad():
            parameter.copy_(saved)
        return values[-1]

    size = 1e-5
    for name, k in [("s", 0), ("s", 7), ("s", 14), ("a", 0), ("a", 1), ("a", 3)]:
        numeric = (rolled(name, k, size) - rolled(name, k, -size)) / (2 * size)
        assert float(found[name][k]) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        net = network(FEATURES, 5, 1, seed=1)
        self.first, self.last = net[0], net[2]

    def forward(self, x, mask):
        return self.last(self.first(x).tanh() * mask)


class Masks:
    """Draws a mask at each call of a loss, remembers them by what they are for, or gives one."""

    def __init__(self):
        self.drawn, self.fixed = {}, None

    def __call__(self, key, count):
        if self.fixed is not None:
            return self.fixed[key]
        mask = (torch.rand(count, 5) > 0.3).double()
        self.drawn.setdefault(key, []).append(mask)
        return mask


def masked_case(optimizer, steps, **options):
    masks = Masks()

    def low(model, batch, top):
        index, x, y = batch
        mask = masks(tuple(index.tolist()), len(x))
        losses = (model(x * top.a.exp(), mask)[:, 0] - y) ** 2
        return (top.s[index].sigmoid() * losses).mean()

    def top(h, batch, low):
        x, y = batch
        own = sum((p**2).sum() for p in h.parameters())
        return ((low(x, masks("top", len(x)))[:, 0] - y) ** 2).mean() + 1e-3 * own

    return Reweighting(optimizer, steps, model=Masked(), low=low, top=top, **options), masks


def one_of(masks):
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])
    return masks[0]


@pytest.mark.parametrize("method", ["plain", "checkpoints", "graphs", "forward"])
def test_random_numbers_differ_from_step_to_step_and_not_from_pass_to_pass(method):
    case, masks = masked_case(ADAM, 4)
    case.hypergradient(PURE[method])  # which looks at the losses once
    masks.drawn.clear()
    found = case.hypergradient(PURE[method])
    masks.fixed = {key: one_of(drawn) for key, drawn in masks.drawn.items()}
    steps = [mask for key, mask in masks.fixed.items() if key != "top"]
    assert len(steps) == 4
    assert not any(torch.equal(steps[0], mask) for mask in steps[1:])
    assert relative(found, case.wanted(truncate=PURE[method].truncate)) < CLOSE


# in a run


def captured(case, ticks, seed=0):
    found = []

    @case.program.on("hypergradient", level="top")
    def capture(grads):
        found.append({n: g.clone() for n, g in grads.items()})

    mlodeco.run(ticks, program=case.program, progress="off", seed=seed)
    return found


RUNS = {
    "momentum": (MOMENTUM, {}),
    "nesterov": (made("sgd_nesterov"), {}),
    "adam": (ADAM, {}),
    "amsgrad": (made("adam_amsgrad"), {}),
    "rmsprop": (made("rmsprop_centered"), {}),
    "nadam": (made("nadam"), {}),
    "radam": (made("radam"), {}),
    "adagrad": (made("adagrad_options"), {}),
    "adadelta": (made("adadelta"), {}),
    "asgd": (made("asgd"), {}),
    "warmup": (MOMENTUM, {"warmup": 3}),
    "warmup_adam": (ADAM, {"warmup": 2, "clip_norm": 0.2}),
    "clip": (MOMENTUM, {"clip_norm": 0.1}),
    "step": (ADAM, {"scheduler": partial(StepLR, step_size=2, gamma=0.6)}),
    "one_cycle": (
        MOMENTUM,
        {"scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=60, pct_start=0.1), "warmup": 2},
    ),
    "groups": (groups_of_adam, {}),
    "micro_batches": (ADAM, {"accumulate": 2, "clip_norm": 0.2}),
}


FEW = ("momentum", "adam", "asgd", "warmup_adam", "one_cycle", "micro_batches")
RUNS_BY_METHOD = [
    (name, method) for name in RUNS for method in METHODS if method == "plain" or name in FEW
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), RUNS_BY_METHOD)
def test_in_a_run_the_steps_that_were_made(name, method):
    optimizer, options = RUNS[name]
    case = Reweighting(optimizer, 4, hypergrad=METHODS[method], **options)
    wanted, h, w = case.simulated(3)
    found = captured(case, case.warmup + 12)
    assert len(found) == 3
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < CLOSE
    assert relative(values_of(case.hyper), {n: p.detach() for n, p in h.items()}) < CLOSE
    assert relative(values_of(case.model), {n: p.detach() for n, p in w.items()}) < CLOSE


@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("truncate", [1, 2, 9])
def test_in_a_run_truncated(truncate, make):
    case = Reweighting(MOMENTUM, 4, hypergrad=make(truncate=truncate))
    wanted, *_ = case.simulated(2, truncate=truncate)
    for one, other in zip(captured(case, 8), wanted, strict=True):
        assert relative(one, other) < CLOSE


def test_in_a_run_first_order_is_the_direct_gradient():
    case = Reweighting(MOMENTUM, 4, hypergrad=Unroll(first_order=True))
    wanted, *_ = case.simulated(2, first_order=True)
    for one, other in zip(captured(case, 8), wanted, strict=True):
        assert relative(one, other) < CLOSE


@pytest.mark.parametrize("method", METHODS)
def test_in_a_run_with_batch_norm_in_training_mode(method):
    net = network(FEATURES, 5, 1, seed=1)
    model = nn.Sequential(net[0], nn.BatchNorm1d(5), net[1], net[2])
    case = Reweighting(ADAM, 4, model=model, hypergrad=METHODS[method])
    wanted, *_ = case.simulated(2)
    for one, other in zip(captured(case, 8), wanted, strict=True):
        assert relative(one, other) < CLOSE
    # once by each of its own steps and never by a hypergradient
    assert int(model[1].num_batches_tracked) == 8


@pytest.mark.parametrize("method", METHODS)
def test_in_a_run_the_random_numbers_of_the_steps_are_drawn_again(method):
    case, masks = masked_case(MOMENTUM, 3, hypergrad=METHODS[method], warmup=1)
    executed, turns, tops = {}, [], []

    @case.program.on("after_backward", level="low")
    def step(batch):
        key = tuple(batch[0].tolist())
        executed[key] = masks.drawn.pop(key)[-1]

    @case.program.on("hypergradient", level="top")
    def turn(grads):
        turns.append({n: g.clone() for n, g in grads.items()})
        tops.append(masks.drawn.pop("top")[-1])
        for key, drawn in masks.drawn.items():
            assert torch.equal(one_of(drawn), executed[key]), "another mask than that of the step"
        masks.drawn.clear()

    h, w = values_of(case.hyper), values_of(case.model)
    mlodeco.run(7, program=case.program, progress="off", seed=0)
    assert len(turns) == 2
    masks.fixed = dict(executed)
    w, states = case.rolled(h, w, case.stream(0, 1))
    for number, (found, top) in enumerate(zip(turns, tops, strict=True)):
        masks.fixed["top"], taken = top, 1 + 3 * number
        h = {n: p.detach().requires_grad_() for n, p in h.items()}
        w = {n: p.detach() for n, p in w.items()}
        w, states = case.rolled(h, w, case.stream(taken, 3), taken=taken, states=states)
        wanted = gradients(case.value(h, w), h)
        assert relative(found, wanted) < CLOSE
        h = {n: p - case.rate * wanted[n] for n, p in h.items()}


@pytest.mark.parametrize(("name", "method"), RUNS_BY_METHOD)
def test_after_a_run_its_parameters_and_its_state_are_the_start(name, method):
    optimizer, options = RUNS[name]
    case = Reweighting(optimizer, 4, **options)
    ticks = case.warmup + 6
    mlodeco.run(ticks, program=case.program, progress="off", seed=0)
    made_ = case.program.built.levels["low"].optimizer
    states = {n: made_.state[p] for n, p in case.model.named_parameters() if p in made_.state}
    found = case.hypergradient(METHODS[method])
    assert relative(found, case.wanted(states=states, taken=ticks)) < CLOSE
    if name in ("momentum", "adam"):
        assert relative(found, case.wanted()) > 1e-3


def test_three_levels_in_a_run():
    case = Chain(Unroll(), Unroll(), low_steps=2, mid_steps=2)
    found, names = {}, ("low", "mid", "top")
    program, data = Program(), {n: [randn(5, seed=70 + i) for i in range(9)] for n in names}
    lower = {"low": [], "mid": ["low"], "top": ["mid"]}
    functions = {
        "low": lambda m, batch, top: case.low(m, batch, top, None),
        "mid": lambda m, batch, low, top: case.mid(m, batch, low, top),
        "top": lambda m, batch, mid, low: case.top(m, batch, mid, low),
    }
    optimizers = {"low": MOMENTUM, "mid": ADAM, "top": partial(SGD, lr=0.1)}
    for name in names:
        program.level(
            name,
            lower=lower[name],
            module={"x": randn(5, seed=3 + names.index(name))},
            inner_steps=1 if name == "top" else 2,
            optimizer=optimizers[name],
            data=data[name],
            **({"hypergrad": Unroll()} if lower[name] else {}),
        )(functions[name])
        program.on("hypergradient", level=name)(
            lambda grads, name=name: found.setdefault(name, []).append(grads["x"].clone())
        )
    mlodeco.run(4, program=program, progress="off", seed=0)
    assert len(found["mid"]) == 2
    assert len(found["top"]) == 1

    low, mid, top = (randn(5, seed=seed) for seed in (3, 4, 5))
    steps = {n: plan(program.module(n), optimizers[n], 4) for n in ("low", "mid")}
    states, batches, mid_state = {}, data["low"], {}
    for turn in range(2):
        at = mid.detach().requires_grad_()
        loss = lambda w, batch: case.low(View(w["x"]), batch, View(top), None)  # noqa: E731
        end, states = roll(
            loss,
            {"x": low.detach()},
            batches[2 * turn : 2 * turn + 2],
            steps["low"].after(2 * turn),
            states=states,
        )
        low = end["x"].detach()
        (wanted,) = grad(case.mid(View(at), data["mid"][turn], View(low), View(top)), at)
        assert error(found["mid"][turn], wanted) < CLOSE
        mid, mid_state = steps["mid"].rule(
            at.detach(), wanted, mid_state, **steps["mid"].steps[turn]["x"]
        )


# what is refused


class Homemade(Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
@pytest.mark.parametrize("kind", [Adafactor, Homemade, LBFGS], ids=lambda kind: kind.__name__)
def test_optimizers_without_a_derivative_are_refused(kind, method):
    case = Reweighting(kind, 3)
    with pytest.raises(OptimizerError, match=kind.__name__) as found:
        case.hypergradient(method)
    assert "'low'" in str(found.value)
    with pytest.raises(OptimizerError, match=kind.__name__):
        mlodeco.run(3, program=case.program, progress="off")


class Undifferentiable(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
def test_a_step_without_gradients_is_refused_and_not_taken_as_constant(method):
    case = Reweighting(partial(Undifferentiable, lr=0.1), 3)
    with pytest.raises(OptimizerError, match="does not depend on the gradients"):
        case.hypergradient(method)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
def test_muon_is_refused(method):
    program = Program()

    @program.level("low", module={"w": randn(3, 3)}, optimizer=torch.optim.Muon, data=[0])
    def low(m, batch, top):
        return (m.w**2 * top.x).sum()

    @program.level("top", lower=["low"], module={"x": randn(3)}, data=[0], hypergrad=method)
    def top(h, batch, low):
        return low.w.sum() + h.x.sum()

    with pytest.raises(OptimizerError, match="Muon") as found:
        mlodeco.hypergradient("top", program=program)
    assert "'low'" in str(found.value)


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
def test_rprop_warns_that_its_derivative_is_zero(method):
    case = Reweighting(partial(Rprop, lr=0.01), 3)
    with pytest.warns(SolverWarning, match="sign of the gradient"):
        found = case.hypergradient(method)
    direct = {n: 2e-3 * p for n, p in values_of(case.hyper).items()}
    assert relative(found, direct) < 1e-12


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
def test_a_level_without_an_optimizer_is_told_so(method):
    case = Reweighting(None, 3)
    with pytest.raises(OptimizerError, match="no optimizer") as found:
        case.hypergradient(method)
    assert found.value.level == "low"


@pytest.mark.parametrize("method", ["unroll", "unroll_forward"])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_as_many_batches_as_inner_steps(count, method):
    case = Reweighting(ADAM, 3)
    batches = {"low": [minibatch(n) for n in range(count)], "top": case.top_batch}
    with pytest.raises(MlodecoError, match="inner_steps") as found:
        case.hypergradient(method, batches=batches)
    assert found.value.level == "low"


@pytest.mark.parametrize(
    "batch", [minibatch(0), torch.zeros(3, FEATURES), None], ids=["tuple", "tensor", "none"]
)
def test_one_batch_is_no_list_of_batches(batch):
    """Not even a tuple of as many parts as there are steps."""
    case = Reweighting(ADAM, 3)
    with pytest.raises(MlodecoError, match="inner_steps"):
        case.hypergradient(Unroll(), batches={"low": batch, "top": case.top_batch})


def test_micro_batches_of_every_step_are_counted():
    case = Reweighting(ADAM, 3, accumulate=2)
    short = [*case.batches[:2], case.batches[2][:1]]
    with pytest.raises(MlodecoError, match="accumulate"):
        case.hypergradient(Unroll(), batches={"low": short, "top": case.top_batch})


class Pair(nn.Module):
    """Two vectors, or one in both places."""

    def __init__(self, tied=False):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([1.0, 0.5, -1.0]))
        self.b = self.a if tied else nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))

    def forward(self, x):
        return 2 * (x * self.a).sum() + (x * x * self.b).sum()


def started(copies=None):
    """A level of two vectors; its loss, that of the levels above, and its derivative."""
    program, x = Program(), torch.tensor([0.1, -0.2, 0.3])
    options = {"init_from": "init", "inner_steps": 2, "optimizer": partial(SGD, lr=0.1)}

    @program.level("low", module=Pair, replicas=copies, **options)
    def low(low):
        return (low(x) - 1) ** 2

    def outer(low):
        return (low(x) + 3) ** 2

    def expected(a, b):
        first, second = a.clone().requires_grad_(), b.clone().requires_grad_()
        w = [first, second]
        for _ in range(2):
            loss = (2 * (x * w[0]).sum() + (x * x * w[1]).sum() - 1) ** 2
            found = torch.autograd.grad(loss, w, create_graph=True)
            w = [t - 0.1 * g for t, g in zip(w, found, strict=True)]
        loss = (2 * (x * w[0]).sum() + (x * x * w[1]).sum() + 3) ** 2
        return torch.autograd.grad(loss, [first, second])

    return program, outer, expected


STARTS = pytest.mark.parametrize("method", [Unroll(), UnrollForward()])


@STARTS
@pytest.mark.parametrize("copies", [None, 2])
def test_a_tied_start_hears_of_both_its_copies(method, copies):
    program, outer, expected = started(copies)

    @program.level("init", lower=["low"], module=lambda: Pair(tied=True), hypergrad=method)
    def init(low):
        return outer(low)

    found = mlodeco.hypergradient("init", program=program)
    a = program.module("init").a.detach()
    assert relative(found, {"a": sum(expected(a, a))}) < CLOSE


@STARTS
@pytest.mark.parametrize("copies", [None, 2])
def test_both_owners_of_a_start_learn(method, copies):
    program, outer, expected = started(copies)

    @program.level("init", lower=["low"], module=Pair, params=["a"], hypergrad=method)
    def init(low):
        return outer(low)

    @program.level("other", lower=["low"], module="init", params=["b"], hypergrad=method)
    def other(low):
        return outer(low)

    start = program.module("init")
    a, b = expected(start.a.detach(), start.b.detach())
    assert relative(mlodeco.hypergradient("init", program=program), {"a": a}) < CLOSE
    assert relative(mlodeco.hypergradient("other", program=program), {"b": b}) < CLOSE


@STARTS
def test_a_start_hears_of_its_own_parameters_alone(method):
    program, outer, expected = started()

    @program.level(
        "init",
        lower=["low"],
        module=Pair,
        params=["a"],
        hypergrad=method,
        optimizer=partial(SGD, lr=0.0),
    )
    def init(low):
        return outer(low)

    start = program.module("init")
    a, _ = expected(start.a.detach(), start.b.detach())
    found = mlodeco.hypergradient("init", program=program)
    assert list(found) == ["a"]
    runner = Runner(program, seed=0)
    steps = [step for _ in range(2) for step in runner.step().steps if step.level == "init"]
    assert [step.grad_norm for step in steps] == [pytest.approx(float(a.norm()))]


def test_one_copy_of_two_originals_is_refused():
    program = Program()
    tied = partial(Pair, tied=True)
    program.level("low", module=tied, init_from="init")(lambda low: low.a.sum())
    program.level("init", lower=["low"], module=Pair)(lambda low: low.a.sum())
    with pytest.raises(MlodecoError, match="'a', 'b' are one") as found:
        mlodeco.hypergradient("init", program=program)
    assert found.value.level == "low"
