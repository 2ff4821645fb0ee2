"""Half precision: where autocast is on, what sums are made in, and steps that overflow."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import GradScalerKwargs
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint

import mlodeco
from mlodeco import MlodecoError, Program, Runner
from mlodeco.errors import DeclarationError, MethodError, ModuleError, NonFiniteError, RunError
from mlodeco.hypergrad import CG, GMRES, MINRES, Dense, Identity, Neumann, Unroll
from mlodeco.hypergrad import UnrollForward as Forward
from mlodeco.runtime.scaling import LEAST, LossScale
from tests import precision_worker
from tests.benchmarks.precision import METHODS, cosines
from tests.parallel_worker import free_port, place
from tests.test_parallel import finish, left, start

BAD = 1e30
"""Of a batch whose numbers float16 does not have."""

EVERY = {
    "identity": "identity",
    "neumann": "neumann",
    "neumann, forward": Neumann(product="forward"),
    "cg, duals": CG(product="reverse_over_forward", damping=0.1),
    "cg, warm": CG(max_steps=3, damping=0.1, warm_start=True),
    "minres": MINRES(max_steps=3, damping=0.1),
    "gmres": GMRES(max_steps=3, damping=0.1),
    "dense": Dense(damping=0.1),
    "nystrom": "nystrom",
    "sama": "sama",
    "finite_difference": "finite_difference",
    "unroll": "unroll",
    "kept graphs": Unroll(keep_graph=True),
    "kept seldom": Unroll(checkpoint_every=2),
    "unroll_forward": "unroll_forward",
}


class Spy(nn.Module):
    """A layer that notes under which autocast it is called."""

    def __init__(self, seen=None):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(1)
        self.seen = [] if seen is None else seen

    def forward(self, x):
        is_on = torch.is_autocast_enabled("cpu")
        self.seen.append(torch.get_autocast_dtype("cpu") if is_on else None)
        return self.norm(self.layer(x))[:, 0]


def batches(*factors, seed=0):
    """A batch for each factor, by which the inputs are multiplied."""
    g = torch.Generator().manual_seed(seed)
    parts = [(torch.randn(8, 3, generator=g), torch.randn(8, generator=g)) for _ in factors]
    return [(factor * x, y) for factor, (x, y) in zip(factors, parts, strict=True)]


def bilevel(method="neumann", low=None, top=None, low_data=(1, 1), top_data=(1, 1), **options):
    """A small program whose networks note how they are called."""
    torch.manual_seed(0)
    program = Program()

    @program.level(
        "low",
        module=Spy(),
        optimizer=partial(Adam, lr=0.02),
        scheduler=partial(StepLR, step_size=2),
        data=batches(*low_data),
        **{"inner_steps": 2, **(low or {})},
    )
    def train(model, batch, top):
        x, y = batch
        losses = (model(x) - y) ** 2
        penalty = 0.1 * sum((p**2).sum() for p in model.parameters())
        return (top.x.sigmoid() * losses).mean() + penalty

    @program.level(
        "top",
        lower=["low"],
        hypergrad=method,
        module={"x": torch.zeros(8)},
        optimizer=partial(Adam, lr=0.1),
        scheduler=partial(StepLR, step_size=2),
        data=batches(*top_data, seed=1),
        **{**(top or {}), **options},
    )
    def meta(hyper, batch, low):
        x, y = batch
        return F.mse_loss(low(x), y)

    return program


def run(program, steps=4, **options):
    return mlodeco.run(steps, program=program, progress="off", seed=0, **options)


def half(program, steps=4):
    """A runner in fp16 with scales that are not too large from the beginning, and its result."""
    runner = Runner(program, seed=0, mixed_precision="fp16")
    for trainer in runner._trainers.values():
        trainer.scale.value = 2.0**9
    return runner, runner.run(steps)


def seen_by(program):
    return set(program.module("low").seen)


# Autocast in every pass


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_autocast_is_on_in_every_pass(name, precision, dtype):
    program = bilevel(EVERY[name])

    @program.validate
    def error(low):
        return {"error": low(torch.ones(4, 3)).mean()}

    result = run(program, mixed_precision="bf16") if precision == "bf16" else half(program)[1]
    assert seen_by(program) == {dtype}
    assert not any(r.skipped or not math.isfinite(r.loss) for r in result.history.steps)
    program.module("low").seen.clear()
    mlodeco.hypergradient("top", program=program, batches=given(name))
    assert seen_by(program) == {dtype}  # the run's, until another


def given(name):
    loop, last = batches(1, 1), batches(1, seed=1)[0]
    is_rolled = isinstance(EVERY[name], Unroll | Forward) or "unroll" in name
    return {"low": loop if is_rolled else loop[-1], "top": last}


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_a_level_has_a_precision_of_its_own():
    program = bilevel(CG(max_steps=2, damping=0.1), low={"precision": "bf16"})
    mlodeco.hypergradient("top", program=program)
    assert seen_by(program) == {torch.bfloat16, None}  # the upper level's pass is in float32
    mlodeco.check("top", program=program)
    mlodeco.solve("low", program=program, steps=2)
    program = bilevel("identity", low={"precision": "fp32"}, top={"precision": "bf16"})
    run(program, mixed_precision="fp16")
    assert seen_by(program) == {None, torch.bfloat16}


def test_fp32_of_a_level_turns_off_an_autocast_around_the_run():
    program = bilevel("identity", low={"precision": "fp32"}, top={"precision": "fp32"})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(program)
    assert seen_by(program) == {None}


def test_a_run_takes_the_precision_back():
    program = bilevel("identity")
    run(program, mixed_precision="bf16")
    program.module("low").seen.clear()
    run(program)
    assert seen_by(program) == {None}


def test_two_runners_of_one_program_keep_their_precisions():
    program = bilevel("identity")
    half, single = Runner(program, mixed_precision="bf16", seed=0), Runner(program, seed=0)
    seen = program.module("low").seen
    half.step(), single.step()
    seen.clear()
    half.step(), half.step()
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    single.step()
    assert set(seen) == {None}


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_nested_responses_are_in_bf16_and_not_in_fp16():
    program = bilevel(CG(damping=0.1), low={"inner_steps": 1})
    run(program, mixed_precision="bf16", nested=True)
    assert seen_by(program) == {torch.bfloat16}
    with pytest.raises(MethodError, match=r"nested=True(.|\n)*precision='bf16'"):
        run(program, mixed_precision="fp16", nested=True)


@pytest.mark.parametrize("inner", [torch.bfloat16, torch.float16])
def test_casts_made_elsewhere_are_not_used_again(inner):
    """Autocast's cache holds a cast that was made without gradients, and one of other values."""

    def loss_of(program, precision, *, is_nested):
        @program.level(
            "low",
            module=nn.Linear(4, 1),
            optimizer=partial(SGD, lr=0.1),
            data=[torch.ones(2, 4)],
            precision=precision,
            accumulate=2,
        )
        def low(model, batch, top):
            with torch.no_grad():
                model(batch)
            with torch.autocast("cpu", dtype=inner, enabled=is_nested):
                out = checkpoint(model, batch, use_reentrant=False)
            return (top.x * out.float() ** 2).mean() + (model.weight**2).sum()

        @program.level(
            "top",
            lower=["low"],
            hypergrad=Neumann(step_size=0.1),
            module={"x": torch.ones(())},
            optimizer=partial(SGD, lr=0.1),
        )
        def top(m, low):
            return (low.weight**3).sum()

        return program

    found = []
    for precision, is_nested in (("bf16", True), ("fp32", False)):
        torch.manual_seed(1)
        program = loss_of(Program(), precision, is_nested=is_nested)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_nested):
            run(program, 3)
            found.append(mlodeco.hypergradient("top", program=program)["x"])
            found.append(program.module("low").weight.detach().clone())
    assert torch.allclose(found[0], found[2], rtol=0.05)
    assert torch.allclose(found[1], found[3], rtol=0.05)


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_replicas(way):
    found = []
    for precision in ("fp32", "bf16", "fp16"):
        program = Program()
        x = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))

        @program.level(
            "task",
            module=partial(seeded, lambda: nn.Linear(2, 1)),
            optimizer=partial(SGD, lr=0.1),
            data=[x],
            init_from="start",
            inner_steps=2,
            replicas=mlodeco.Replicas(3, way=way),
            precision=precision,
        )
        def task(model, batch):
            return (model(batch)[:, 0] - batch.sum(1)).square().mean()

        @program.level(
            "start",
            lower=["task"],
            hypergrad="unroll",
            module=partial(seeded, lambda: nn.Linear(2, 1)),
            optimizer=partial(SGD, lr=0.1),
            data=[x + 1],
            precision=precision,
        )
        def start(model, batch, task):
            return (task(batch)[:, 0] - batch.sum(1)).square().mean()

        runner = Runner(program, seed=0)
        for trainer in runner._trainers.values():
            if trainer.scale is not None:
                trainer.scale.value = 2.0**9
        result = runner.run(6)
        assert not any(record.skipped for record in result.history.steps)
        found.append(program.module("start").weight.detach())
    assert torch.allclose(found[1], found[0], rtol=0.05)
    assert torch.allclose(found[2], found[0], rtol=0.01)


@pytest.mark.parametrize("step", ["optimizer", "rule"])
@pytest.mark.parametrize("name", ["neumann", "unroll", "kept graphs"])
def test_micro_batches_update_rules_and_tuned_rates(name, step):
    found = []
    for precision in ("no", "bf16", "fp16"):
        program, data = Program(), batches(1, 1, 1, 1)
        steps = {"optimizer": partial(SGD, lr=0.1), "tune": {"lr": lambda top: 0.1 * top.x.exp()}}

        @program.level(
            "low",
            module=partial(seeded, lambda: nn.Linear(3, 1)),
            data=data,
            accumulate=2,
            inner_steps=2,
            clip_norm=0.3,
            **(steps if step == "optimizer" else {}),
        )
        def low(model, batch, top):
            x, y = batch
            return F.mse_loss(model(x)[:, 0].float(), y) + top.x.exp() * model.weight.square().sum()

        if step == "rule":

            @program.update("low")
            def rule(params, grads, state, top):
                rate = 0.1 * top.x.exp()
                return {key: p - rate * grads[key] for key, p in params.items()}, state

        @program.level(
            "top",
            lower=["low"],
            hypergrad=EVERY[name],
            module={"x": torch.zeros(())},
            optimizer=partial(SGD, lr=0.1),
            data=data,
            accumulate=2,
        )
        def top(m, batch, low):
            x, y = batch
            return F.mse_loss(low(x)[:, 0].float(), y)

        runner = Runner(program, seed=0, mixed_precision=precision)
        for trainer in runner._trainers.values():
            if trainer.scale is not None:
                trainer.scale.value = 2.0**9
        assert not runner.run(8).skipped
        found.append([p.detach() for n in ("low", "top") for p in program.module(n).parameters()])
    for single, narrow, half_ in zip(*found, strict=True):
        assert torch.allclose(narrow, single, atol=0.02)
        assert torch.allclose(half_, single, atol=0.002)
    assert float(found[0][-1].abs()) > 0.01


def seeded(make):
    torch.manual_seed(0)
    return make()


# Agreement with float32


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize("network", ["the quickstart's network", "a transformer layer"])
def test_hypergradients_have_the_direction_of_float32(network):
    seen = []
    for method, precision, values in cosines(network, ticks=10, pairs=1):
        assert min(values) > 0.99, (method, precision)
        seen.append(method)
    assert set(seen) == set(METHODS)


# Models that are in half precision themselves


def shrinking(method, dtype, steps=1):
    """``C = h / 2 |w - x|^2``, whose Hessian is so small that sums need many digits."""
    program = Program()

    @program.level(
        "low",
        module={"w": torch.ones(4, dtype=dtype)},
        optimizer=partial(SGD, lr=1.0),
        inner_steps=steps,
    )
    def low(m, top):
        return 2.0**-11 * ((m.w - top.x) ** 2).sum()

    @program.level("top", lower=["low"], hypergrad=method, module={"x": torch.zeros(4).to(dtype)})
    def top(m, low):
        return low.w.sum()

    return program


@pytest.mark.parametrize(
    ("method", "steps", "count"),
    [
        (Neumann(num_terms=300, step_size=1.0), 1, 300),
        (Neumann(num_terms=300, step_size=1.0, product="forward"), 1, 300),
        (CG(max_steps=3), 1, math.inf),
        (Unroll(), 300, 300),
        (Forward(), 100, 100),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_solvers_add_up_in_single_precision(method, steps, count, dtype):
    found = mlodeco.hypergradient("top", program=shrinking(method, dtype, steps))["x"]
    exact = 1.0 - (1.0 - 2.0**-10) ** count
    assert found.dtype is dtype
    # a sum of 300 terms in bfloat16 stays at 256; rounded are the products, and the result
    assert torch.allclose(found.float(), torch.full((4,), exact), rtol=6e-3)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_a_model_in_bfloat16_runs_with_every_method(name):
    """What products and derivatives of updates are in does not clash anywhere."""
    program = bilevel(EVERY[name])
    program.module("low").bfloat16()
    for data in (program.levels["low"].data, program.levels["top"].data):
        data[:] = [(x.bfloat16(), y.bfloat16()) for x, y in data]
    result = run(program)
    assert program.module("low").layer.weight.dtype is torch.bfloat16
    assert all(math.isfinite(r.loss) for r in result.history.steps)
    assert mlodeco.hypergradient("top", program=program, batches=None)["x"].dtype is torch.float32


def test_nested_solves_of_a_model_in_bfloat16():
    method = Neumann(num_terms=300, step_size=1.0)
    found = mlodeco.hypergradient("top", program=shrinking(method, torch.bfloat16), nested=True)
    exact = 1.0 - (1.0 - 2.0**-10) ** 300
    assert torch.allclose(found["x"].float(), torch.full((4,), exact), rtol=6e-3)


# Numbers that float16 has not


TINY = 1e-9


def tiny(method, precision):
    """A ridge-less regression whose loss, gradients and Hessian are of the size 1e-9.

    The solution's derivative in the targets, ``(X^T X)^-1 X^T``, is of the size one.
    """
    g = torch.Generator().manual_seed(2)
    x = torch.randn(6, 3, generator=g)
    program = Program()

    @program.level(
        "low",
        module=lambda: nn.Linear(3, 1, bias=False),
        optimizer=partial(SGD, lr=0.1 / TINY),
        data=[x],
        precision=precision,
    )
    def low(model, batch, top):
        return 0.5 * TINY * (model(batch)[:, 0].float() - top.y).square().sum()

    @program.level(
        "top",
        lower=["low"],
        hypergrad=method,
        module={"y": torch.ones(6)},
        optimizer=partial(SGD, lr=0.1 / TINY),
        data=[x[:2]],
        precision=precision,
    )
    def top(m, batch, low):
        return TINY * low(batch).float().sum()

    exact = TINY * (torch.linalg.inv(x.T @ x) @ x[:2].sum(0)) @ x.T
    return program, exact


@pytest.mark.parametrize(
    "method",
    [CG(), CG(product="reverse_over_forward"), CG(product="forward"), Dense()],
)
def test_derivatives_that_float16_has_not_are_kept(method):
    program, exact = tiny(method, "fp16")
    found = mlodeco.hypergradient("top", program=program)["y"]
    assert torch.allclose(found, exact, rtol=5e-3, atol=1e-3 * float(exact.abs().max()))


def test_without_a_scale_they_are_lost():
    """The numbers of the tests above would not do without one."""
    program, _ = tiny("identity", "fp16")
    off = [GradScalerKwargs(enabled=False)]
    accelerator = mlodeco.runtime.Accelerator(cpu=True, kwargs_handlers=off)
    runner = Runner(program, seed=0, accelerator=accelerator)
    before = [p.detach().clone() for p in program.module("low").parameters()]
    runner.step()
    assert all(map(torch.equal, before, program.module("low").parameters()))


@pytest.mark.parametrize(
    "method",
    [CG(), Identity(scale=0.1 / TINY), "sama", "unroll", Unroll(keep_graph=True)],
)
def test_small_gradients_train_as_in_float32(method):
    ends = []
    for precision in ("fp32", "fp16"):
        program, _ = tiny(method, precision)
        torch.manual_seed(0)
        result = run(program, 5)
        assert not any(record.skipped for record in result.history.steps)
        ends.append({n: [*program.module(n).parameters()] for n in ("low", "top")})
    for level in ("low", "top"):
        (single,), (narrow,) = ends[0][level], ends[1][level]
        assert torch.allclose(narrow, single, rtol=0.01, atol=0.005)
    assert float((single - 1.0).detach().abs().max()) > 0.01


# Steps that overflow


def snapshot(runner, name):
    """Everything that a step may change."""
    trainer, module = runner._trainers[name], runner.built.levels[name].module
    return copy.deepcopy(
        {
            "module": module.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.scheduler.state_dict(),
            "memories": dict(trainer.memories),
            "grads": [p.grad for p in module.parameters()],
        }
    )


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("at", ["low", "top"])
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_an_overflow_skips_a_step_and_changes_nothing(name, at):
    data = {f"{at}_data": (1, 1, BAD, 1) if at == "low" else (1, BAD, 1)}
    program = bilevel(EVERY[name], clip_norm=1.0, **data)
    around, told = {}, []

    @program.on("before_step")
    def before(ctx):
        around[ctx.level] = snapshot(runner, ctx.level)

    @program.on("after_backward")
    def gradients(ctx, grads):
        assert all(bool(g.isfinite().all()) for g in grads.values())

    @program.on("after_step")
    def after(ctx, grads):
        assert bool(grads) is not ctx.skipped
        if ctx.skipped:
            told.append((ctx.level, ctx.tick))
            assert same(around[ctx.level], snapshot(runner, ctx.level))
        else:
            assert not same(around[ctx.level], snapshot(runner, ctx.level))

    runner = Runner(program, seed=0, mixed_precision="fp16")
    for trainer in runner._trainers.values():
        trainer.scale.value = 2.0**9
    result = runner.run(6)
    skipped = [(r.level, r.tick) for r in result.history.steps if r.skipped]
    assert skipped == told == [(at, 4 if at == "top" else 3)]
    assert result.skipped == {at: 1}
    assert runner._trainers[at].scale.value == 2.0**8
    state = program.module("top").state_dict() | program.module("low").state_dict()
    assert all(bool(t.isfinite().all()) for t in state.values())


def alone(factors, ticks, **options):
    program = Program()
    torch.manual_seed(0)

    @program.level(
        "low",
        module=Spy(),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        data=[(x, y) for x, y in batches(*factors)],
        **options,
    )
    def low(model, batch):
        x, y = batch
        return F.mse_loss(model(x), y)

    return program.module("low").state_dict(), half(program, ticks)[1]


def test_training_goes_on_as_if_the_step_had_not_been():
    with_it, result = alone((1, 1, BAD), 3)
    without, _ = alone((1, 1, 1), 2)
    assert same(with_it, without)
    assert [record.skipped for record in result.history.steps] == [False, False, True]
    assert result.history.of("low")[-1].learning_rate == pytest.approx(0.025)
    assert [row["skipped"] for row in result.history.rows()] == [False, False, True]


@pytest.mark.parametrize("name", ["unroll", "kept graphs", "kept seldom", "unroll_forward"])
def test_the_tape_of_a_loop_holds_what_was_executed(name):
    method = EVERY[name]
    program = bilevel(method, low_data=(1, BAD, 1), low={"inner_steps": 3, "clip_norm": 0.5})
    data = program.levels["low"].data
    found = []

    @program.on("hypergradient")
    def keep(grads):
        found.append(grads["x"].clone())

    assert half(program, 3)[1].history.skipped == {"low": 1}
    program = bilevel(method, low={"inner_steps": 2, "clip_norm": 0.5})
    program.levels["low"].data[:] = [data[0], data[2]]
    program.on("hypergradient")(lambda grads: found.append(grads["x"].clone()))
    half(program, 2)
    assert torch.allclose(found[0], found[1], rtol=1e-3)
    assert float(found[0].norm()) > 1e-4


def test_a_loop_of_skipped_steps_moves_nothing():
    program = bilevel("unroll", low_data=(BAD,), low={"inner_steps": 2})
    _, result = half(program)
    assert result.skipped == {"low": 4}
    steps = result.history.of("top")
    assert len(steps) == 2
    assert all(step.grad_norm == 0.0 and not step.skipped for step in steps)


def test_a_step_repeated_by_rollback_may_be_skipped():
    program = bilevel("identity", low={"rollback": True, "inner_steps": 1}, low_data=(1, BAD, 1))
    _, result = half(program, 3)
    assert result.skipped == {"low": 1, "top": 1}
    assert all(bool(t.isfinite().all()) for t in program.module("low").state_dict().values())


def test_a_scale_too_large_for_the_gradient_is_found():
    """The first steps are skipped until gradients of about 100 fit below 65504."""
    program, steps = Program(), 12

    @program.level("one", module=lambda: nn.Linear(3, 1), optimizer=partial(SGD, lr=1e-5))
    def one(model):
        return 100.0 * model(torch.ones(1, 3)).float().sum()

    result = run(program, steps, mixed_precision="fp16")
    skipped = [record.skipped for record in result.history.steps]
    assert skipped == sorted(skipped, reverse=True)
    assert 1 <= sum(skipped) <= 9


@pytest.mark.parametrize("name", ["unroll", "kept graphs", "neumann"])
def test_products_are_scaled_as_the_upper_level_needs_it(name):
    """The gradient is zero, whatever its scale, and the second derivatives are large."""
    program = Program()

    @program.level(
        "low",
        module=lambda: zeroed(nn.Linear(1, 1, bias=False)),
        optimizer=partial(SGD, lr=1e-3),
        inner_steps=2,
    )
    def low(model, top):
        return 60.0 * (model(torch.ones(1, 1)).float() * top.x).square().sum()

    @program.level(
        "top",
        lower=["low"],
        hypergrad=EVERY[name],
        module={"x": torch.ones(1)},
        optimizer=partial(SGD, lr=1e-3),
    )
    def top(m, low):
        return low.weight.sum()

    result = run(program, 32, mixed_precision="fp16")
    skipped = [record.skipped for record in result.history.of("top")]
    assert skipped == sorted(skipped, reverse=True)
    assert (skipped[0], skipped[-1]) == (True, False)
    assert result.skipped.get("low") is None


def zeroed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def test_nothing_but_overflows_ends_a_run():
    program = bilevel("identity", low_data=(BAD,))
    with pytest.raises(NonFiniteError, match=r"level 'low'(.|\n)*every scale(.|\n)*bf16"):
        run(program, 100, mixed_precision="fp16")


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_other_precisions_have_no_scale(precision):
    program = bilevel("identity")
    runner = Runner(program, mixed_precision=precision)
    assert all(trainer.scale is None for trainer in runner._trainers.values())
    program.levels["low"].data[:] = batches(math.inf)
    with pytest.raises(NonFiniteError, match="the loss is"):
        runner.run(2)


def test_an_upper_level_above_one_in_fp16_has_a_scale():
    runner = Runner(bilevel("identity", low={"precision": "fp16"}))
    assert all(trainer.scale is not None for trainer in runner._trainers.values())
    runner = Runner(bilevel("identity", top={"precision": "fp16"}))
    assert [trainer.scale is None for trainer in runner._trainers.values()] == [True, False]


def test_a_single_hypergradient_looks_for_its_scale():
    """Of about 5e4 in float16, which no scale above one leaves in its range."""
    program = Program()

    @program.level("one", module=lambda: nn.Linear(1, 1, bias=False), precision="fp16")
    def one(model):
        return 5e4 * model(torch.ones(1, 1)).float().sum()

    found = mlodeco.hypergradient("one", program=program)["weight"]
    assert float(found) == pytest.approx(5e4, rel=1e-3)


def test_scales_move_as_those_of_torch():
    level = SimpleNamespace(name="low", site="here")
    options = GradScalerKwargs(init_scale=8.0, growth_interval=3)
    ours, torchs = LossScale(level, options), torch.amp.GradScaler("cpu", 8.0, growth_interval=3)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = SGD([parameter], lr=0.1)
    for number in range(12):
        overflows = number in (2, 7)
        torchs.scale(parameter.sum())
        parameter.grad = torch.full((1,), math.inf if overflows else 1.0)
        torchs.step(optimizer)
        torchs.update()
        ours.shrink() if overflows else ours.grow()
        assert ours.value == torchs.get_scale()
    other = LossScale(level, options)
    other.load_state_dict(ours.state_dict())
    assert other.state_dict() == ours.state_dict()
    other.value = LEAST
    with pytest.raises(NonFiniteError):
        other.shrink()


def test_options_of_an_accelerator_are_taken():
    accelerator = mlodeco.runtime.Accelerator(
        cpu=True, kwargs_handlers=[GradScalerKwargs(init_scale=4.0, backoff_factor=0.25)]
    )
    program = bilevel("identity", low={"precision": "fp16"}, low_data=(BAD, 1))
    runner = Runner(program, accelerator=accelerator)
    runner.run(1)
    assert runner._trainers["low"].scale.value == 1.0


# Several processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    out, port, worker = tmp_path_factory.mktemp("half"), free_port(), "tests.precision_worker"
    printed = finish([start(out, "", worker, **place(rank, 2, port)) for rank in range(2)])
    found = left(out)
    assert None not in found, "\n".join(printed)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", precision_worker.CASES)
def test_an_overflow_in_one_process_skips_the_step_of_all(case, processes):
    first, second = (found[case] for found in processes)
    method, at, _ = case
    # the upper level looks at the lower one's bad batch too, but where it goes over its steps
    looks = [] if at == "top" or "unroll" in method or "kept" in method else [("top", 3)]
    assert first["skipped"] == second["skipped"] == [(at, 3), *looks]
    assert first["scales"] == second["scales"]
    assert same(first["state"], second["state"])
    assert all(bool(t.isfinite().all()) for t in first["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", precision_worker.NOT_FINITE)
def test_a_policy_is_that_of_all_processes(case, processes):
    method, at, _ = case
    first, second = (found["skip", *case] for found in processes)
    looks = [] if at == "top" or "kept" in method else [("top", 3)]
    assert first["skipped"] == second["skipped"] == [(at, 3), *looks]
    assert same(first["state"], second["state"])
    assert all(bool(t.isfinite().all()) for t in first["state"].values())
    first, second = (found["warn", *case] for found in processes)
    assert first["skipped"] == second["skipped"] == []
    for found in (first, second):
        assert not all(bool(t.isfinite().all()) for t in found["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "cause"),
    [("no", "arises in the functions. (In process 1.)"), ("fp16", "has 3 inf. (In process 1.)")],
)
def test_the_process_that_is_at_fault_is_named(precision, cause, processes):
    (warned, skipped), (silent, others) = (found["told"][precision] for found in processes)
    assert skipped == others == [("low", 3)]
    assert [cause in message for message in warned] == [True]
    assert silent == []


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.01), ("fp16", 0.001)])
@pytest.mark.parametrize("method", precision_worker.METHODS)
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_two_processes_are_one_to_rounding(method, precision, tolerance, processes):
    first, second = (found[method, precision] for found in processes)
    one = precision_worker.train(precision_worker.program(method, 1), 8, precision)
    assert same(first["state"], second["state"])
    assert first["skipped"] == one["skipped"] == []
    for key, value in one["state"].items():
        assert torch.allclose(first["state"][key], value, atol=tolerance), key


# Mistakes


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fp8", "fp8 is not available"),
        ("bf61", "Did you mean 'bf16'"),
        (16, "mixed_precision=16"),
    ],
)
def test_unknown_precisions_of_a_run_are_refused(given, words):
    with pytest.raises(RunError, match=words):
        run(bilevel(), mixed_precision=given)


@pytest.mark.parametrize("given", ["fp8", "no", 16])
def test_unknown_precisions_of_a_level_are_refused(given):
    with pytest.raises(DeclarationError, match="'fp32', 'bf16', 'fp16'"):
        bilevel(precision=given)


def test_precisions_that_contradict_each_other_are_refused():
    accelerator = mlodeco.runtime.Accelerator(cpu=True)
    with pytest.raises(RunError, match=r"'bf16'(.|\n)*'no'(.|\n)*leave mixed_precision out"):
        run(bilevel(), accelerator=accelerator, mixed_precision="bf16")
    run(bilevel(), accelerator=accelerator, mixed_precision="no")


def test_float16_parameters_in_fp16_are_refused():
    program = bilevel()
    program.module("low").half()
    with pytest.raises(ModuleError, match=r"in float16(.|\n)*\.half\(\)"):
        run(program, mixed_precision="fp16")
    assert issubclass(ModuleError, MlodecoError)


SCRIPT = """
import mlodeco, torch
from torch.optim import SGD

seen = []

@mlodeco.level("one", module={"x": torch.ones(1)}, optimizer=lambda p: SGD(p, lr=0.1))
def one(m):
    seen.append(torch.is_autocast_enabled("cpu"))
    return (m.x ** 2).sum()

mlodeco.run(1, progress="off")
assert seen[-1] is True
mlodeco.run(1, progress="off", mixed_precision="no")
assert seen[-1] is False
mlodeco.run(1, progress="off", accelerator=mlodeco.runtime.Accelerator())
assert seen[-1] is True
"""


def test_the_precision_of_a_launch_is_taken():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env={**os.environ, "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_sama_and_identity_are_the_same_for_sgd():
    """The derivative of an update is taken at the unscaled gradient."""
    found = []
    for method in ("sama", Identity(scale=0.1 / TINY)):
        program, _ = tiny(method, "fp16")
        torch.manual_seed(0)
        found.append(mlodeco.hypergradient("top", program=program)["y"])
    assert torch.allclose(found[0], found[1], rtol=1e-3)
