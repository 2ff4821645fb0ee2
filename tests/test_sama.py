"""Sama against the one-step unroll written out, and every stock optimizer's step by differences."""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

import mlodeco
from mlodeco import Program, Runner
from mlodeco.calculus.products import open_curvature
from mlodeco.calculus.update import Cotangent, Iterate
from mlodeco.calculus.update_derivatives import pull_back
from mlodeco.errors import MethodError, OptimizerError, SolverWarning
from mlodeco.hypergrad import Identity, Sama, sama
from mlodeco.runtime.optimizers import next_update
from tests import reference
from tests.handwritten import adam, adamw, rmsprop, sgd
from tests.problems import bilevel, classification, network, randn

WRITTEN_OUT = {
    "sgd": (SGD, sgd, {"lr": 0.3}),
    "sgd_decay": (SGD, sgd, {"lr": 0.3, "weight_decay": 0.2}),
    "momentum": (SGD, sgd, {"lr": 0.3, "momentum": 0.9}),
    "dampened": (SGD, sgd, {"lr": 0.3, "momentum": 0.9, "dampening": 0.4}),
    "nesterov": (
        SGD,
        sgd,
        {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ),
    "adam": (Adam, adam, {"lr": 0.01}),
    "adam_options": (
        Adam,
        adam,
        {"lr": 0.01, "betas": (0.6, 0.8), "eps": 1e-3, "weight_decay": 0.3},
    ),
    "amsgrad": (Adam, adam, {"lr": 0.01, "betas": (0.6, 0.8), "amsgrad": True}),
    "adamw": (AdamW, adamw, {"lr": 0.01, "weight_decay": 0.3}),
    "rmsprop": (RMSprop, rmsprop, {"lr": 0.01}),
    "rmsprop_options": (
        RMSprop,
        rmsprop,
        {"lr": 0.01, "alpha": 0.7, "eps": 1e-3, "momentum": 0.5, "centered": True},
    ),
}


def one_step_unroll(case, optimizer, rule, clip_norm=None):
    """``direct + d/dlambda <c, U(w, g(w, lambda))>``, c the cotangent at w, by plain autograd."""
    top = reference.gradients(case.top(), [*case.top_parameters, *case.low_parameters])
    size = sum(p.numel() for p in case.top_parameters)
    direct, cotangent = top[:size], top[size:]
    grads = torch.autograd.grad(case.low(), case.low_parameters, create_graph=True)
    if clip_norm is not None:
        total = torch.linalg.vector_norm(reference.flat(grads))
        assert total > clip_norm
        grads = [g * clip_norm / (total + 1e-6) for g in grads]
    after = [
        rule(w.detach(), g, optimizer.state.get(w, {}) if optimizer else {})[0]
        for w, g in zip(case.low_parameters, grads, strict=True)
    ]
    moved = torch.autograd.grad(
        reference.flat(after) @ cotangent, case.top_parameters, materialize_grads=True
    )
    return direct + reference.flat(moved)


def relative(found, wanted):
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def indirect(case, found):
    return reference.flat(list(found.values())) - reference.gradients(
        case.top(), case.top_parameters
    )


@pytest.mark.parametrize("product", ["auto", "reverse", "reverse_over_forward", "forward"])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_equals_the_one_step_unroll(name, steps, product):
    kind, rule, options = WRITTEN_OUT[name]
    case = classification(optimizer=partial(kind, **options))
    optimizer = None
    if steps:
        runner = Runner(case.program, seed=0)
        for _ in range(steps):
            runner.step()
        optimizer = case.program.built.levels["low"].optimizer
        assert optimizer.state or name in ("sgd", "sgd_decay")
    found = mlodeco.hypergradient("top", program=case.program, hypergrad=Sama(product=product))
    wanted = one_step_unroll(case, optimizer, partial(rule, **options))
    assert relative(reference.flat(list(found.values())), wanted) < 1e-9
    if not (steps == 0 and "adam" in name):  # Adam's first step hardly depends on the gradient
        assert relative(indirect(case, found), wanted - _direct(case)) < 1e-7


def _direct(case):
    return reference.gradients(case.top(), case.top_parameters)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "rmsprop"])
def test_clipping_is_part_of_the_step(name):
    kind, rule, options = WRITTEN_OUT[name]
    case = classification(optimizer=partial(kind, **options), clip_norm=0.05)
    found = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    wanted = one_step_unroll(case, None, partial(rule, **options), clip_norm=0.05)
    assert relative(reference.flat(list(found.values())), wanted) < 1e-7


def test_sgd_is_the_identity_scaled_by_its_rate():
    case = classification(optimizer=partial(SGD, lr=0.3))
    sama = mlodeco.hypergradient("top", program=case.program, hypergrad=Sama(scale=2.0))
    scaled = mlodeco.hypergradient("top", program=case.program, hypergrad=Identity(scale=0.6))
    for key in sama:
        assert torch.allclose(sama[key], scaled[key], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("make", [partial(SGD, lr=0.1, momentum=0.9), Adam])
def test_what_v_was_made_from_is_freed_before_the_cross_product(make, monkeypatch):
    made = []

    def watched(*arguments, **options):
        found = pull_back(*arguments, **options)
        assert not found.before.parameters
        gradients = arguments[2]
        made.extend(map(weakref.ref, (*gradients.values(), *found.gradients.values())))
        return found

    def opened(*arguments):
        assert made
        assert all(ref() is None for ref in made)
        return open_curvature(*arguments)

    monkeypatch.setattr(sama, "pull_back", watched)
    monkeypatch.setattr(sama, "open_curvature", opened)
    program = Program()

    @program.level("low", module=network(3, 2, 1), optimizer=make, data=[randn(4, 3)])
    def low(model, batch, up):
        return (model(batch) ** 2).mean() * up.weight.exp()

    @program.level("up", lower=["low"], hypergrad=Sama(), module={"weight": randn(1)[0]})
    def up(model, low):
        return sum((p**2).sum() for p in low.parameters())

    assert mlodeco.hypergradient("up", program=program)["weight"] != 0.0


def test_groups_and_schedulers_are_those_of_the_run():
    def groups(module):
        first, last = module[0], module[2]
        return SGD([{"params": first.parameters(), "lr": 0.5}, {"params": last.parameters()}], 0.1)

    case = classification(
        optimizer=groups,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
    )
    Runner(case.program, seed=0).step()
    found = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    rates = iter([0.25, 0.25, 0.05, 0.05])

    wanted = one_step_unroll(case, None, lambda w, g, _: (w - next(rates) * g, {}))
    assert relative(reference.flat(list(found.values())), wanted) < 1e-9


STOCK = {
    "asgd": partial(ASGD, lr=0.1, weight_decay=0.1),
    "adadelta": partial(Adadelta, lr=0.5, rho=0.7, weight_decay=0.1),
    "adagrad": partial(Adagrad, lr=0.1, lr_decay=0.1),
    "adam": partial(Adam, lr=0.1, maximize=True),
    "adamax": partial(Adamax, lr=0.1, betas=(0.6, 0.7)),
    "adamw": partial(AdamW, lr=0.1, amsgrad=True),
    "foreach": partial(AdamW, lr=0.1, foreach=True),
    "fused": partial(Adam, lr=0.1, fused=True),
    "nadam": partial(NAdam, lr=0.1, decoupled_weight_decay=True, weight_decay=0.1),
    "radam": partial(RAdam, lr=0.1, betas=(0.6, 0.7)),
    "rmsprop": partial(RMSprop, lr=0.1, centered=True, momentum=0.5),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "tensor_rate": partial(Adam, lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("name", STOCK)
def test_the_derivative_of_every_stock_step_is_that_of_the_real_step(name, steps):
    program = Program()
    start = randn(5, seed=1) + 0.1

    @program.level("low", module={"w": start}, optimizer=STOCK[name], data=[randn(5, seed=2)])
    def low(m, batch):
        return ((m.w - batch) ** 4).sum() / 20

    runner = Runner(program, seed=0)
    for _ in range(steps):
        runner.step()
    level = program.built.levels["low"]
    w, optimizer = level.parameters["w"], level.optimizer
    step, held = next_update(level)
    g, c = randn(5, seed=3), randn(5, seed=4)
    saved, state = w.detach().clone(), copy.deepcopy(optimizer.state_dict())

    def real(gradient):
        with torch.no_grad():
            w.copy_(saved)
        optimizer.load_state_dict(copy.deepcopy(state))
        if not steps:
            optimizer.state.clear()
        w.grad = gradient
        optimizer.step()
        return w.detach().clone()

    at_g = real(g)
    h = 1e-6
    numeric = torch.stack(
        [(real(g + h * e) - real(g - h * e)) / (2 * h) for e in torch.eye(5).double()]
    )
    real(g)
    with torch.no_grad():
        w.copy_(saved)
    before = Iterate({"w": saved}, held)
    again = step.apply(before, {"w": g}, {}).parameters["w"]
    assert torch.allclose(again, at_g, rtol=1e-6)  # some keep a scalar in single precision
    advanced = step.advance(before, {"w": g}, {}).parameters["w"]
    assert torch.allclose(advanced, at_g, rtol=1e-7)  # load_state_dict changes the dtype of some
    pulled = pull_back(step, before, {"w": g}, {}, Cotangent({"w": c})).gradients["w"]
    assert torch.allclose(pulled, numeric @ c, rtol=1e-5, atol=1e-8)


def test_single_precision_steps_have_exact_bias_corrections():
    program = Program()

    @program.level("low", module={"w": torch.ones(3)}, optimizer=partial(Adam, lr=0.1), data=[0])
    def low(m, batch):
        return (m.w**2).sum()

    mlodeco.run(1, program=program, progress="off")
    level = program.built.levels["low"]
    level.optimizer = None
    step, held = next_update(level)
    w, g = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1e-9, 3e-8, 1e-7])
    ones = Cotangent({"w": torch.ones(3)})
    found = pull_back(step, Iterate({"w": w}, held), {"w": g}, {}, ones).gradients["w"]
    exact = -0.1 * 1e-8 / (g.double() + 1e-8) ** 2
    assert torch.allclose(found.double(), exact, rtol=3e-6)


def test_gradients_of_zero_give_zero_and_not_nan():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

    program = Program()

    @program.level("low", module=Dead, optimizer=partial(Adam, lr=0.1), data=[0])
    def low(m, batch, top):
        return m.w[0] ** 2 * top.x.exp().sum() + 0.0 * m.w[1]

    @program.level("top", lower=["low"], module={"x": torch.ones(1).double()}, data=[0])
    def top(h, batch, low):
        return low.w.sum() + (h.x**2).sum()

    found = mlodeco.hypergradient("top", program=program, hypergrad="sama")
    assert torch.isfinite(found["x"]).all()


def test_purity_of_a_run_under_sama():
    def trajectory(peek):
        case = classification(optimizer=partial(Adam, lr=0.1))
        runner = Runner(case.program, seed=0)
        for _ in range(4):
            runner.step()
            if peek:
                mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
        return [p.detach().clone() for p in case.low_parameters]

    for a, b in zip(trajectory(False), trajectory(True), strict=True):
        assert torch.equal(a, b)


class Homemade(Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("kind", [Adafactor, Homemade], ids=lambda kind: kind.__name__)
def test_optimizers_without_a_derivative_are_refused(kind):
    case = classification(optimizer=kind)
    with pytest.raises(OptimizerError, match=rf"{kind.__name__} cannot be differentiated") as error:
        mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    assert "'low'" in str(error.value)
    assert "problems.py" in str(error.value)
    assert "neumann" in str(error.value)


def test_lbfgs_is_refused():
    case = classification(optimizer=LBFGS)
    with pytest.raises(OptimizerError, match="LBFGS"):
        mlodeco.hypergradient("top", program=case.program, hypergrad="sama")


def test_rprop_warns_that_its_derivative_is_zero():
    case = classification(optimizer=Rprop)
    with pytest.warns(SolverWarning, match="sign of the gradient"):
        found = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    assert torch.equal(reference.flat(list(found.values())), _direct(case))


def test_a_level_without_an_optimizer_is_told_so():
    case = classification()
    with pytest.raises(OptimizerError, match="Sama"):
        mlodeco.hypergradient("top", program=case.program, hypergrad="sama")


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"scale": math.nan}, {"product": "x"}])
def test_options_are_checked(options):
    with pytest.raises(MethodError, match="Sama"):
        Sama(**options)


def test_untouched_parameters_stay_out():
    model = network(2, 3, 3, seed=1)
    model.register_parameter("unused", nn.Parameter(randn(5)))
    case = classification(model, optimizer=partial(Adam, lr=0.1))
    plain = classification(optimizer=partial(Adam, lr=0.1))
    with_decay = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    without = mlodeco.hypergradient("top", program=plain.program, hypergrad="sama")
    for key in with_decay:
        assert torch.allclose(with_decay[key], without[key], rtol=1e-12)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_parameters_that_the_upper_loss_does_not_read_count_in_the_clipping(clip_norm):
    def low(m, batch, h):
        return ((m.read - h.x) ** 2).sum() + ((m.read * m.unread - h.x) ** 2).sum()

    def top(h, batch, m):
        return (m.read**3).sum()

    modules = {"read": randn(3), "unread": randn(3, seed=1)}, {"x": randn(3, seed=2)}
    options = {"optimizer": partial(Adam, lr=0.1), "clip_norm": clip_norm}
    case = bilevel(low, top, *modules, randn(1), randn(1), **options)
    found = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")["x"]
    w, x = case.low_parameters, case.top_parameters[0]
    g = torch.autograd.grad(case.low(), w, create_graph=True)
    if clip_norm:
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p) for p in g]))
        g = [p * clip_norm / (total + 1e-6) for p in g]
    after = w[0].detach() - 0.1 * g[0] / (g[0].abs() + 1e-8)
    (wanted,) = torch.autograd.grad(after @ (3 * w[0].detach() ** 2), x)
    assert torch.allclose(found, wanted, rtol=1e-6)


class Undifferentiable(SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)


def test_a_step_without_gradients_is_refused_and_not_taken_as_zero():
    case = classification(optimizer=partial(Undifferentiable, lr=0.1))
    with pytest.raises(OptimizerError, match="does not depend on the gradients"):
        mlodeco.hypergradient("top", program=case.program, hypergrad="sama")


def test_parameters_replaced_after_a_run_make_a_fresh_optimizer():
    case = classification(optimizer=partial(Adam, lr=0.1))
    mlodeco.run(3, program=case.program, progress="off")
    module = case.program.module("low")
    module[0].bias = nn.Parameter(module[0].bias.detach().clone())
    found = mlodeco.hypergradient("top", program=case.program, hypergrad="sama")
    assert all(torch.isfinite(value).all() for value in found.values())


def test_two_runs_of_one_program_keep_their_own_optimizers():
    def alone(disturbed):
        case = classification(optimizer=partial(Adam, lr=0.1))
        runner = Runner(case.program, seed=0)
        case.program.built.methods = {("top", "low"): Sama()}
        for _ in range(3):
            runner.step()
        if disturbed:
            Runner(case.program, seed=5)
        for _ in range(3):
            runner.step()
        return reference.flat([p.detach() for p in case.top_parameters])

    assert torch.equal(alone(False), alone(True))
