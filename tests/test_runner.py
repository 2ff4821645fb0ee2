"""Runs against plain torch loops written by hand, and what a run leaves alone."""

from __future__ import annotations

import copy
import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import NonFiniteError, OptimizerError, RunError
from mlodeco.hypergrad import Dense, Identity, Neumann
from tests import reference
from tests.problems import generator, network, randn


def low_loss(model, batch, hyper):
    x, y = batch
    decay = sum(
        h.exp() * (p**2).sum() for h, p in zip(hyper.decay, model.parameters(), strict=True)
    )
    return F.cross_entropy(model(x), y) + 0.1 * decay


def top_loss(hyper, batch, model):
    x, y = batch
    return F.cross_entropy(model(x), y) + 0.01 * (hyper.decay**2).sum()


def low_model():
    return network(3, 4, 2, seed=1)


def hyper_module():
    return nn.ParameterDict({"decay": nn.Parameter(randn(4, seed=2))})


def batches(count, size=6, seed=0):
    return [
        (
            randn(size, 3, seed=100 * seed + i),
            torch.randint(0, 2, (size,), generator=generator(100 * seed + i)),
        )
        for i in range(count)
    ]


def cat(*parts):
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


class Twin:
    """A bilevel program in plain torch: each method is one step, its order is the test's."""

    def __init__(self, solve, *, low=None, top=None, low_opt=None, top_opt=None):
        self.model, self.hyper = low or low_model(), top or hyper_module()
        self.low_loss, self.top_loss = low_loss, top_loss
        self.solve = solve
        self.low_opt = (low_opt or partial(SGD, lr=0.1, momentum=0.9))(self.model.parameters())
        self.top_opt = (top_opt or partial(Adam, lr=0.05))(self.hyper.parameters())
        self.last = ()
        self.low_losses, self.top_losses = [], []

    def low_step(self, *micro, clip=None):
        self.last = micro
        loss = self._low()
        self.low_losses.append(loss.item())
        params = list(self.model.parameters())
        self._apply(params, torch.autograd.grad(loss, params), self.low_opt, clip)

    def top_step(self, *micro, clip=None):
        params = list(self.hyper.parameters())

        def top():
            return sum(self.top_loss(self.hyper, b, self.model) for b in micro) / len(micro)

        self.top_losses.append(top().item())
        low = list(self.model.parameters())
        flat = reference.bilevel(top, self._low, params, low, self.solve)
        parts = flat.split([p.numel() for p in params])
        grads = [g.reshape(p.shape) for g, p in zip(parts, params, strict=True)]
        self._apply(params, grads, self.top_opt, clip)

    def _low(self):
        losses = [self.low_loss(self.model, b, self.hyper) for b in self.last]
        return sum(losses) / len(losses)

    @staticmethod
    def _apply(params, grads, optimizer, clip):
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()


def bilevel(low_data, top_data, *, low=None, top=None, method=None, **options):
    """The same program, declared; options as low_*= and top_*=."""
    program = Program()
    lows = {k.removeprefix("low_"): v for k, v in options.items() if k.startswith("low_")}
    tops = {k.removeprefix("top_"): v for k, v in options.items() if k.startswith("top_")}
    program.level(
        "low",
        **{
            "module": low or low_model(),
            "optimizer": partial(SGD, lr=0.1, momentum=0.9),
            "data": low_data,
            "reads": {"hyper": "top"},
            **lows,
        },
    )(low_loss)
    program.level(
        "top",
        **{
            "lower": ["low"],
            "module": top or hyper_module(),
            "optimizer": partial(Adam, lr=0.05),
            "data": top_data,
            "reads": {"model": "low"},
            "hypergrad": method or Neumann(num_terms=3, step_size=0.2),
            **tops,
        },
    )(top_loss)
    return program


NEUMANN = reference.neumann(3, 0.2)


def run(program, steps, **options):
    return mlodeco.run(steps, program=program, progress="off", **options)


def same(twin, program, tolerance=1e-12):
    for mine, other in ((program.module("low"), twin.model), (program.module("top"), twin.hyper)):
        for (name, p), q in zip(mine.named_parameters(), other.parameters(), strict=True):
            assert (p - q).abs().max() <= tolerance, name


def state(program):
    """Every tensor of a program's modules."""
    found = {}
    for name in program.levels:
        for key, value in program.module(name).state_dict().items():
            found[f"{name}.{key}"] = value.clone()
    return found


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize(
    ("method", "solve"),
    [
        (Dense(), reference.exact),
        (Neumann(num_terms=3, step_size=0.2), NEUMANN),
        (Identity(scale=0.1), reference.scaled(0.1)),
    ],
    ids=["dense", "neumann", "identity"],
)
def test_run_equals_a_loop_by_hand(method, solve):
    low, top = batches(7, seed=1), batches(3, seed=2)
    program = bilevel(low, top, method=method)
    result = run(program, 20)
    twin = Twin(solve)
    for i in range(20):
        twin.low_step(low[i % 7])
        twin.top_step(top[i % 3])
    same(twin, program)
    assert result.history.losses("low") == pytest.approx(twin.low_losses, rel=1e-12)
    assert result.history.losses("top") == pytest.approx(twin.top_losses, rel=1e-12)
    assert result.ticks == 20
    assert result.stop_reason == "all 20 steps were run"
    assert result.best is None


def test_method_matters_to_the_run():
    ends = []
    for method in (Dense(), Neumann(num_terms=3, step_size=0.2), Identity(), None):
        program = bilevel(batches(2, seed=1), batches(2, seed=2), method=method)
        if method is None:
            program = bilevel(batches(2, seed=1), batches(2, seed=2), top_hypergrad=None)
        run(program, 5)
        ends.append(program.module("top").decay.detach().clone())
    for i, end in enumerate(ends):
        assert all(not torch.allclose(end, other) for other in ends[:i])


def scalar(value):
    return {"x": torch.tensor([value], dtype=torch.float64)}


def test_order_within_a_tick_is_leaves_as_declared_then_uppers():
    """Each step sees the parameters as the earlier ones left them."""
    program = Program()
    sgd = partial(SGD, lr=0.5)

    @program.level("top", lower=["second"], hypergrad=None, module=scalar(1.0), optimizer=sgd)
    def top(m, mid, second):
        return (m.x * (mid.x + second.x)).sum()

    @program.level("mid", lower=["first"], hypergrad=None, module=scalar(2.0), optimizer=sgd)
    def mid(m, first, second, top):
        return (m.x * (first.x + 2 * second.x + 3 * top.x)).sum()

    @program.level("second", module=scalar(3.0), optimizer=sgd)
    def second(m, first, top):
        return (m.x * (first.x + top.x)).sum()

    @program.level("first", module=scalar(4.0), optimizer=sgd)
    def first(m, second, mid):
        return (m.x * (second.x + mid.x)).sum()

    result = run(program, 3)
    t, m, s, f = 1.0, 2.0, 3.0, 4.0
    for _ in range(3):
        s -= 0.5 * (f + t)  # declared before first
        f -= 0.5 * (s + m)
        t -= 0.5 * (m + s)  # declared before mid, and both are ready
        m -= 0.5 * (f + 2 * s + 3 * t)
    found = [program.module(n).x.item() for n in ("top", "mid", "second", "first")]
    assert found == pytest.approx([t, m, s, f], abs=1e-12)
    assert [r.level for r in result.history.steps[:4]] == ["second", "first", "top", "mid"]


def test_three_levels_against_dense_algebra():
    program, sgd = Program(), partial(SGD, lr=0.1)
    data = [randn(4, seed=i) for i in range(3)]
    modules = {n: {"x": randn(4, seed=10 + i)} for i, n in enumerate(("low", "mid", "top"))}
    twins = {n: nn.Parameter(m["x"].clone()) for n, m in modules.items()}

    def c1(w, h, u, b):
        return ((w - h.tanh() * u) ** 2).sum() + (w**4).sum() / 4 + (w * b).sum()

    def c2(w, h, u):
        return ((w + h - 1) ** 2).sum() + (w.sigmoid() * h**2).sum() + (u.exp() * h**2).sum()

    def c3(w, h, u):
        return ((w - 0.5) ** 2).sum() + (h * u).sum() + (u**2).sum()

    @program.level("low", module=modules["low"], optimizer=sgd, data=data)
    def low(m, batch, mid, top):
        return c1(m.x, mid.x, top.x, batch)

    @program.level(
        "mid",
        lower=["low"],
        hypergrad="dense",
        module=modules["mid"],
        optimizer=sgd,
    )
    def mid(m, low, top):
        return c2(low.x, m.x, top.x)

    @program.level(
        "top",
        lower=["mid"],
        hypergrad="dense",
        module=modules["top"],
        optimizer=sgd,
    )
    def top(m, mid, low):
        return c3(low.x, mid.x, m.x)

    run(program, 10)
    w, h, u = twins.values()
    optimizers = [SGD([p], lr=0.1) for p in twins.values()]
    grad, jac = reference.gradients, reference.jacobian
    for i in range(10):
        b = data[i % 3]
        w.grad = grad(c1(w, h, u, b), [w])
        optimizers[0].step()
        g1 = grad(c1(w, h, u, b), [w], create_graph=True)
        v1 = torch.linalg.solve(jac(g1, [w]), grad(c2(w, h, u), [w]))
        h.grad = grad(c2(w, h, u), [h]) - jac(g1, [h]).T @ v1
        optimizers[1].step()
        g2 = grad(c2(w, h, u), [h], create_graph=True)
        v2 = torch.linalg.solve(jac(g2, [h]), grad(c3(w, h, u), [h]))
        g1 = grad(c1(w, h, u, b), [w], create_graph=True)
        v1 = torch.linalg.solve(jac(g1, [w]), grad(c3(w, h, u), [w]) - jac(g2, [w]).T @ v2)
        u.grad = grad(c3(w, h, u), [u]) - jac(g2, [u]).T @ v2 - jac(g1, [u]).T @ v1
        optimizers[2].step()
    for name, twin in twins.items():
        assert (program.module(name).x - twin).abs().max() < 1e-12, name


# optimizers


def test_function_of_module_keeps_groups_by_name():
    seen = {}

    def grouped(module):
        named = dict(module.named_parameters())
        groups = [
            {"params": [named["0.weight"], named["2.weight"]], "lr": 0.3},
            {"params": [named["0.bias"], named["2.bias"]], "lr": 0.01},
        ]
        return SGD(groups, lr=1.0)

    low, top = batches(2, seed=1), batches(2, seed=2)
    program = bilevel(low, top, low_optimizer=grouped)

    @program.on("after_step", level="low")
    def look(optimizer):
        seen["lrs"] = [group["lr"] for group in optimizer.param_groups]

    result = run(program, 4)
    twin = Twin(NEUMANN)
    twin.low_opt = grouped(twin.model)
    for i in range(4):
        twin.low_step(low[i % 2])
        twin.top_step(top[i % 2])
    same(twin, program)
    assert seen["lrs"] == [0.3, 0.01]
    assert result.history.of("low")[0].learning_rate == 0.3


def test_an_optimizer_without_learning_rate():
    class Halve(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.5)

    program = Program()
    program.level("low", module={"x": torch.ones(1)}, optimizer=Halve)(lambda m: m.x.sum())
    (record,) = mlodeco.run(1, program=program, progress="off").history.steps
    assert math.isnan(record.learning_rate)
    assert program.module("low").x.item() == 0.5


def test_optimizer_instance_keeps_its_groups():
    low, top = batches(2, seed=1), batches(2, seed=2)

    def grouped(model):
        first, *rest = model.parameters()
        return SGD([{"params": [first], "lr": 0.3}, {"params": rest}], lr=0.02, momentum=0.5)

    model = low_model()
    optimizer = grouped(model)
    program = bilevel(low, top, low=model, low_optimizer=optimizer)
    run(program, 4)
    twin = Twin(NEUMANN)
    twin.low_opt = grouped(twin.model)
    for i in range(4):
        twin.low_step(low[i % 2])
        twin.top_step(top[i % 2])
    same(twin, program)
    assert "momentum_buffer" in optimizer.state[next(model.parameters())]


@pytest.mark.parametrize("fault", ["missing", "left_out", "foreign", "other"])
def test_optimizer_that_does_not_fit_is_refused(fault):
    model = low_model()
    optimizers = {
        "missing": None,
        "left_out": lambda params: SGD(list(params)[1:], lr=0.1),
        "foreign": lambda params: SGD([*params, nn.Parameter(torch.zeros(1))], lr=0.1),
        "other": lambda params: "sgd",
    }
    program = bilevel(batches(1), batches(1), low=model, low_optimizer=optimizers[fault])
    before = state(program)
    with pytest.raises(OptimizerError, match="low"):
        run(program, 1)
    assert_same_bits(before, state(program))


# going on


def noisy(**options):
    """Shuffled data, momentum, dropout, BatchNorm, schedulers; modules made by factories."""
    program = Program()
    x, y = randn(24, 3, seed=1).float(), torch.randint(0, 2, (24,), generator=generator(1))

    def loader(size):
        return lambda: DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True)

    @program.level(
        "low",
        module=lambda: nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 2)
        ),
        optimizer=partial(SGD, lr=0.05, momentum=0.9),
        scheduler=partial(StepLR, step_size=2, gamma=0.8),
        data=loader(5),
        **options,
    )
    def low(model, batch, top, ctx):
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        weights = top(losses.detach()[:, None])[:, 0].sigmoid()
        noise = torch.rand((), generator=ctx.generator)
        return (weights * losses).mean() + 0.01 * noise * (model[0].weight ** 2).sum()

    @program.level(
        "top",
        lower=["low"],
        module=lambda: nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 1)),
        optimizer=partial(Adam, lr=0.01),
        data=loader(7),
        hypergrad=Neumann(num_terms=3, step_size=0.1, damping=2.0),
    )
    def top(net, batch, low):
        x, y = batch
        return F.cross_entropy(low(x), y)

    return program


def test_second_run_has_the_modules_as_they_are_and_fresh_optimizers():
    low, top = batches(3, seed=1), batches(3, seed=2)
    program = bilevel(low, top)
    model = program.module("low")
    run(program, 4)
    run(program, 3)
    assert program.module("low") is model
    twin = Twin(NEUMANN)
    for i in range(4):
        twin.low_step(low[i % 3])
        twin.top_step(top[i % 3])
    again = Twin(NEUMANN, low=twin.model, top=twin.hyper)
    for i in range(3):
        again.low_step(low[i])
        again.top_step(top[i])
    same(again, program)


def test_runner_goes_on_with_everything():
    whole, parts = noisy(), noisy()
    Runner(whole, seed=5).run(10)
    runner = Runner(parts, seed=5)
    first = runner.run(5)
    second = runner.run(5)
    assert_same_bits(state(whole), state(parts))
    assert (first.ticks, second.ticks) == (5, 10)
    assert [r.step for r in second.history.of("low")] == list(range(1, 11))


def test_iteration_and_step_equal_run():
    whole, stepped, iterated = noisy(), noisy(), noisy()
    Runner(whole, seed=5).run(6)
    runner = Runner(stepped, seed=5)
    ticks = [runner.step() for _ in range(6)]
    assert [t.tick for t in ticks] == [1, 2, 3, 4, 5, 6]
    assert [s.level for s in ticks[0].steps] == ["low", "top"]
    assert runner.history.steps == [s for t in ticks for s in t.steps]
    for tick in Runner(iterated, seed=5):
        if tick.tick == 6:
            break
    assert_same_bits(state(whole), state(stepped))
    assert_same_bits(state(whole), state(iterated))


def test_iteration_ends_when_something_stops_the_run():
    program = noisy()

    @program.on("after_step", level="top")
    def stop(ctx):
        if ctx.tick == 3:
            ctx.stop()

    assert [tick.tick for tick in Runner(program, seed=1)] == [1, 2, 3]


# seeds


def ended(change=None, *, seed=3, steps=8, **options):
    program = noisy()
    if change is not None:
        change(program)
    mlodeco.run(steps, program=program, seed=seed, **{"progress": "off", **options})
    return {**state(program), "rng": torch.get_rng_state()}


def validated(every):
    def change(program):
        @program.validate(every=every)
        def measure(low):
            torch.rand(7)
            return {"m": low(torch.rand(5, 3)).mean()}

    return change


def hooked(program):
    for event in mlodeco.declare.registry.EVENTS:
        program.on(event)(lambda: None)

    @program.on("after_backward")
    def look(grads, loss, metrics, batch, low, top):
        assert grads


def test_same_seed_same_bits_and_another_seed_other_ones():
    left, right, other = ended(), ended(), ended(seed=4)
    assert_same_bits(left, right)
    assert not torch.equal(left["low.0.weight"], other["low.0.weight"])


@pytest.mark.parametrize("change", [validated(1), validated(3), hooked], ids=["v1", "v3", "hooks"])
def test_validations_and_hooks_change_no_bit(change):
    assert_same_bits(ended(), ended(change))


@pytest.mark.parametrize("form", ["plain", "live", "auto"])
def test_progress_changes_no_bit(form, capsys):
    assert_same_bits(ended(), ended(progress=form))


def test_hypergradients_between_ticks_change_no_bit():
    program = noisy()
    runner = Runner(program, seed=3)
    mlodeco.hypergradient("top", program=program)
    for _ in range(8):
        found = mlodeco.hypergradient("top", program=program)
        mlodeco.hypergradient("low", program=program)
        assert any(g.any() for g in found.values())
        runner.step()
    mlodeco.hypergradient("top", program=program, hypergrad="identity")
    assert_same_bits(ended(), {**state(program), "rng": torch.get_rng_state()})


def test_each_own_step_of_a_turn_draws_other_random_numbers():
    seen = []
    program = Program()

    @program.level("low", module=scalar(1.0), optimizer=partial(SGD, lr=0.1))
    def low(m, top):
        return ((m.x - top.x) ** 2).sum()

    @program.level(
        "top", lower=["low"], module=scalar(1.0), optimizer=partial(SGD, lr=0.1), repeat=2
    )
    def top(m, low):
        seen.append(torch.rand(()).item())
        return (low.x**2).sum()

    runner = Runner(program, seed=1)
    runner.step()
    seen.clear()
    runner.step()
    assert len(set(seen)) == len(seen) == 2
    first = seen.copy()
    seen.clear()
    runner = Runner(program, seed=2)
    runner.step()
    seen.clear()
    runner.step()
    assert len(set(seen + first)) == 4


# buffers


def tracked(module):
    return next(m for m in module.modules() if isinstance(m, nn.BatchNorm1d)).num_batches_tracked


def with_batchnorm():
    """Two leaves and an upper that all read each other, each with a BatchNorm."""
    program = Program()
    sgd = partial(SGD, lr=0.01)
    x = randn(9, 3, seed=3)

    def net():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()

    @program.level("a", module=net, optimizer=sgd, data=[x, x + 1], repeat=2)
    def a(m, batch, b, top):
        return (m(batch) * top(batch) - b(batch)).square().mean()

    @program.level("b", module=net, optimizer=sgd, data=[x - 1, 2 * x])
    def b(m, batch, a, top):
        return (m(batch) * top(batch) + a(batch) - 1).square().mean()

    @program.level(
        "top",
        lower=["a", "b"],
        module=net,
        optimizer=sgd,
        data=[x * x],
        hypergrad=Neumann(num_terms=3, step_size=0.02, damping=20.0),
    )
    def top(m, batch, a, b):
        return (a(batch) + b(batch) + m(batch)).square().mean()

    return program


def test_buffers_change_once_per_own_step_only():
    program = with_batchnorm()
    runner = Runner(program, seed=1)
    for tick in range(1, 4):
        runner.step()
        mlodeco.hypergradient("top", program=program)
        assert [int(tracked(program.module(n))) for n in ("a", "b", "top")] == [
            2 * tick,
            tick,
            tick,
        ]


def test_buffers_of_each_level_are_those_of_its_own_steps():
    program = with_batchnorm()
    runner = Runner(program, seed=1)
    wanted = {n: copy.deepcopy(program.module(n)[1]) for n in ("a", "b", "top")}
    inputs = {"a": [], "b": [], "top": []}

    @program.on("before_step")
    def keep(ctx, batch, a, b, top):
        linear = {"a": a, "b": b, "top": top}[ctx.level][0]
        inputs[ctx.level].append(linear(batch).detach())

    runner = Runner(program, seed=1)
    for _ in range(3):
        runner.step()
    for name, norm in wanted.items():
        for value in inputs[name]:
            norm(value)
        real = program.module(name)[1]
        assert torch.equal(norm.running_mean, real.running_mean), name
        assert torch.equal(norm.running_var, real.running_var), name


class Counts(nn.Module):
    """Assigns a new tensor to its buffer in each pass."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(()))

    def forward(self):
        self.count = self.count + 1
        return self.x


def test_buffers_that_are_assigned_anew_follow_the_same_rule():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=Counts(), optimizer=sgd, repeat=2)
    def low(m, top):
        return ((m() - top()) ** 2).sum()

    @program.level("top", lower=["low"], module=Counts(), optimizer=sgd)
    def top(m, low):
        return (low() ** 2).sum() + m().sum()

    run(program, 3)
    assert program.module("low").count == 6
    assert program.module("top").count == 3


def test_eval_mode_stays():
    program = with_batchnorm()
    for name in ("a", "top"):
        program.module(name)[1].eval()
    run(program, 3)
    assert [int(tracked(program.module(n))) for n in ("a", "b", "top")] == [0, 3, 0]
    assert not program.module("a")[1].training
    assert program.module("a")[0].training


# gradients


def test_grad_is_the_hypergradient_of_the_step():
    low, top = batches(2, seed=1), batches(2, seed=2)
    program = bilevel(low, top)
    wanted = {}

    @program.on("before_step", level="top")
    def compute(batch):
        found = mlodeco.hypergradient("top", batches={"top": batch}, program=program)
        wanted["top"] = found["decay"]

    @program.on("before_step", level="low")
    def ordinary(batch, low, top):
        loss = low_loss(low, batch, top)
        wanted["low"] = torch.autograd.grad(loss, list(low.parameters()))

    runner = Runner(program)
    for _ in range(3):
        tick = runner.step()
        assert torch.equal(program.module("top").decay.grad, wanted["top"])
        grads = [p.grad for p in program.module("low").parameters()]
        assert all(torch.equal(g, v) for g, v in zip(grads, wanted["low"], strict=True))
        norms = [reference.flat(grads).norm().item(), wanted["top"].norm().item()]
        assert [s.grad_norm for s in tick.steps] == pytest.approx(norms, rel=1e-12)


@pytest.mark.parametrize("hypergrad", ["neumann", "identity", "dense", "cg", "darts", None])
def test_frozen_and_unused_parameters_are_untouched(hypergrad):
    program = Program()
    sgd = partial(SGD, lr=0.1, weight_decay=0.5)

    def module():
        parameters = {k: nn.Parameter(randn(3, seed=i)) for i, k in enumerate("abc")}
        parameters["a"].requires_grad_(False)
        return nn.ParameterDict(parameters)

    @program.level("low", module=module(), optimizer=sgd)
    def low(m, top):
        return ((m.c - top.c) ** 2).sum() + (m.a * m.c * top.a).sum()

    @program.level("top", lower=["low"], module=module(), optimizer=sgd, hypergrad=hypergrad)
    def top(m, low):
        return (low.c**2).sum() + (m.c * low.a).sum()

    before = state(program)
    run(program, 3)
    after = state(program)
    for name in ("low", "top"):
        assert torch.equal(before[f"{name}.a"], after[f"{name}.a"])
        assert torch.equal(before[f"{name}.b"], after[f"{name}.b"])
        assert not torch.equal(before[f"{name}.c"], after[f"{name}.c"])
        module_ = program.module(name)
        assert module_.a.grad is None
        assert module_.b.grad is None
        assert module_.c.grad is not None


def test_params_leaves_the_rest_of_the_module_alone():
    model = low_model()
    low, top = batches(2, seed=1), batches(2, seed=2)
    program = bilevel(
        low,
        top,
        low=model,
        low_params=lambda name: name.startswith("2."),
        low_optimizer=partial(SGD, lr=0.1, weight_decay=0.1),
    )
    before = state(program)
    run(program, 3)
    after = state(program)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved == ["low.2.weight", "low.2.bias", "top.decay"]
    assert model[0].weight.grad is None


def test_gradients_that_autograd_shares_are_clipped_once():
    """autograd gives one tensor for both, and an expanded one for a sum."""
    program = Program()
    sgd = partial(SGD, lr=1.0)

    @program.level("low", module=scalar(1.0), optimizer=sgd)
    def low(m, top):
        return 0.0 * (m.x * top.c.sum()).sum()

    zeros = {k: torch.zeros(2, dtype=torch.float64) for k in "abc"}

    @program.level("top", lower=["low"], module=zeros, optimizer=sgd, clip_norm=3.0, hypergrad=None)
    def top(m, low):
        return ((m.a + m.b - 3.0) ** 2).sum() + m.c.sum()

    result = run(program, 1)
    norm = (4 * 36.0 + 2.0) ** 0.5
    assert result.history.of("top")[0].grad_norm == pytest.approx(norm)
    module = program.module("top")
    for key, grad in (("a", -6.0), ("b", -6.0), ("c", 1.0)):
        assert module[key].tolist() == pytest.approx([-3.0 / norm * grad] * 2, rel=1e-6)
    found = mlodeco.hypergradient("top", program=program, hypergrad=None)
    assert found["a"].data_ptr() != found["b"].data_ptr()
    found["c"].mul_(2.0)


# reads


def test_closure_over_a_global_module_needs_only_reads():
    low, top = batches(2, seed=1), batches(2, seed=2)
    plain = bilevel(low, top)
    run(plain, 5)
    model, hyper = low_model(), hyper_module()
    closed = Program()
    closed.level(
        "low",
        module=model,
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        data=low,
        reads=["top"],
    )(lambda m, batch: low_loss(m, batch, hyper))
    closed.level(
        "top",
        lower=["low"],
        module=hyper,
        optimizer=partial(Adam, lr=0.05),
        data=top,
        reads=["low"],
        hypergrad=Neumann(num_terms=3, step_size=0.2),
    )(lambda m, batch: top_loss(m, batch, model))
    run(closed, 5)
    assert_same_bits(state(plain), state(closed))


def test_two_levels_share_one_module():
    """Weights and architecture of one network, as in DARTS."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(3, 4, 2, seed=1)
            self.skip = nn.Parameter(randn(2, 3, seed=5))
            self.alpha = nn.Parameter(randn(2, seed=6))

        def forward(self, x):
            a = self.alpha.softmax(0)
            return a[0] * self.net(x) + a[1] * x @ self.skip.T

    low_data, top_data = batches(2, seed=1), batches(2, seed=2)
    model = Mixed()
    twin = copy.deepcopy(model)
    program = Program()

    @program.level(
        "weights",
        module=model,
        params=lambda name: name != "alpha",
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        data=low_data,
    )
    def weights(m, batch):
        x, y = batch
        return F.cross_entropy(m(x), y) + 0.05 * sum((p**2).sum() for p in m.net.parameters())

    @program.level(
        "arch",
        lower=["weights"],
        module="weights",
        params=lambda name: name == "alpha",
        optimizer=partial(Adam, lr=0.05),
        data=top_data,
        hypergrad=Neumann(num_terms=3, step_size=0.2),
    )
    def arch(m, batch):
        x, y = batch
        return F.cross_entropy(m(x), y)

    run(program, 6)
    assert program.module("arch") is program.module("weights") is model
    low = [p for name, p in twin.named_parameters() if name != "alpha"]
    optimizers = SGD(low, lr=0.1, momentum=0.9), Adam([twin.alpha], lr=0.05)
    for i in range(6):
        for p, g in zip(low, torch.autograd.grad(weights(twin, low_data[i % 2]), low), strict=True):
            p.grad = g
        optimizers[0].step()
        twin.alpha.grad = reference.bilevel(
            lambda i=i: arch(twin, top_data[i % 2]),
            lambda i=i: weights(twin, low_data[i % 2]),
            [twin.alpha],
            low,
            NEUMANN,
        )
        optimizers[1].step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-12


# metrics and history


def test_metrics_of_a_loss_are_in_the_history():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=scalar(1.0), optimizer=sgd)
    def low(m, top):
        return ((m.x - top.x) ** 2).sum(), {"x": m.x, "word": "a"}

    @program.level("top", lower=["low"], module=scalar(2.0), optimizer=sgd, hypergrad="identity")
    def top(m, low):
        return {"loss": (low.x**2).sum(), "double": 2 * low.x.detach(), "many": torch.ones(3)}

    @program.validate(every=2)
    def measure(low):
        return {"x": low.x}

    history = run(program, 4).history
    assert len(history) == 8
    assert history.of("low")[0].metrics == {"x": 1.0, "word": "a"}
    assert history.of("top")[0].metrics["double"] == pytest.approx(2.4)
    assert "loss" not in history.of("top")[0].metrics
    rows = list(history.rows())
    assert [(r["tick"], r["level"], r["step"]) for r in rows[:4]] == [
        (1, "low", 1),
        (1, "top", 1),
        (2, "low", 2),
        (2, "top", 2),
    ]
    assert rows[0]["loss"] == 1.0
    assert rows[0]["learning_rate"] == 0.1
    assert rows[0]["grad_norm"] == 2.0
    assert rows[0]["word"] == "a"
    assert history.losses("low") == [r["loss"] for r in rows if r["level"] == "low"]
    assert len(history.metric("x")) == 2
    assert history.metric("x")[-1] == program.module("low").x.item()
    (solve,) = history.of("top")[0].solves
    assert (solve.level, solve.method, solve.steps) == tuple(solve)[:3]
    assert solve[:3] == ("low", "Identity", 0)
    assert history.of("low")[0].solves == ()


# what goes wrong


def test_nonfinite_gradient_with_finite_loss_raises_before_the_step():
    program = Program()

    @program.level(
        "low",
        module={"x": torch.zeros(2, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1),
    )
    def low(m):
        return m.x.abs().sqrt().sum()

    runner = Runner(program)
    with pytest.raises(NonFiniteError, match="gradient") as caught:
        runner.step()
    assert caught.value.level == "low"
    assert program.module("low").x.tolist() == [0.0, 0.0]
    assert program.module("low").x.grad is None


def test_nonfinite_hypergradient_raises_before_the_step():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=scalar(1.0), optimizer=sgd)
    def low(m, top):
        return ((m.x - top.x) ** 2).sum()

    @program.level("top", lower=["low"], module=scalar(0.0), optimizer=sgd, hypergrad=None)
    def top(m, low):
        return (low.x**2).sum() + m.x.abs().sqrt().sum()

    with pytest.raises(NonFiniteError) as caught:
        run(program, 1)
    assert caught.value.level == "top"
    assert program.module("top").x.item() == 0.0
    assert program.module("low").x.item() == pytest.approx(0.8)


def test_nonfinite_loss_raises_before_the_step():
    program = bilevel(
        [batches(1)[0]], [(torch.full((2, 3), torch.nan).double(), batches(1, 2)[0][1])]
    )
    with pytest.raises(NonFiniteError) as caught:
        run(program, 1)
    assert caught.value.level == "top"
    assert torch.equal(program.module("top").decay, hyper_module().decay)


@pytest.mark.parametrize("where", ["low", "top"])
def test_an_exception_leaves_the_level_as_before_its_step(where):
    program = with_batchnorm()
    level = {"low": "b", "top": "top"}[where]
    runner = Runner(program, seed=1)
    runner.step()
    fault = ValueError("mine")

    @program.on("after_backward", level=level)
    def fail():
        raise fault

    runner = Runner(program, seed=2)
    names = [n for n in program.levels if n != "a"] if where == "low" else ["top"]
    grads = {n: [p.grad for p in program.module(n).parameters()] for n in names}
    before = {k: v for k, v in state(program).items() if k.split(".")[0] in names}
    with pytest.raises(ValueError, match="mine") as caught:
        runner.step()
    after = {k: v for k, v in state(program).items() if k.split(".")[0] in names}
    assert_same_bits(before, after)
    for name in names:
        now = [p.grad for p in program.module(name).parameters()]
        assert all(g is h for g, h in zip(now, grads[name], strict=True))
    notes = "\n".join(caught.value.__notes__)
    assert f"level {level!r}" in notes
    assert "tick 1" in notes
    assert "test_runner.py" in notes


def test_an_exception_leaves_the_random_numbers_as_before_the_step():
    program = Program()

    @program.level(
        "low",
        module=scalar(1.0),
        optimizer=partial(SGD, lr=0.1),
        data=lambda: DataLoader(TensorDataset(randn(4)), shuffle=True),
    )
    def low(m, batch, ctx):
        if torch.rand(()) >= 0 and ctx.tick == 2:
            raise ValueError("mine")
        return (m.x * batch[0]).sum()

    runner = Runner(program, seed=1)
    runner.step()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="mine"):
        runner.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_next_step_goes_on_where_an_exception_left_the_tick():
    low, top = batches(3, seed=1), batches(3, seed=2)
    whole, broken = bilevel(low, top), bilevel(low, top)
    run(whole, 4)
    faults = [ValueError("mine")]

    @broken.on("after_step", level="low")
    def keep(ctx):
        steps.append((ctx.tick, ctx.step))

    @broken.on("loop_start", level="top")
    def fail(ctx):
        if faults:
            raise faults.pop()

    steps = []
    runner = Runner(broken)
    with pytest.raises(ValueError, match="mine"):
        runner.step()
    assert runner.tick == 0
    assert len(runner.history.of("low")) == 1
    tick = runner.step()
    assert [(r.tick, r.level) for r in tick.steps] == [(1, "low"), (1, "top")]
    runner.run(3)
    assert steps == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert_same_bits(state(whole), state(broken))


def test_a_level_that_never_had_its_turn_is_named_at_the_end():
    result = run(bilevel(batches(1), batches(1), low_inner_steps=5), 4)
    assert "'top' never" in result.stop_reason


def test_processes_that_the_accelerator_does_not_see_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    program = bilevel(batches(1), batches(1))
    with pytest.raises(RunError, match="processes"):
        run(program, 1)


def test_a_given_accelerator_is_used():
    given = mlodeco.runtime.Accelerator(cpu=True)
    program = bilevel(batches(1), batches(1))
    seen = []

    @program.on("run_start")
    def look(ctx):
        seen.append((ctx.accelerator, ctx.is_main, ctx.device.type))

    run(program, 1, accelerator=given)
    assert seen == [(given, True, "cpu")]


@pytest.mark.parametrize("steps", [0, -1, 1.0, True, "5", None])
def test_steps_that_are_not_a_positive_integer_are_refused(steps):
    program = bilevel(batches(1), batches(1))
    with pytest.raises(RunError, match="steps="):
        run(program, steps)
    with pytest.raises(RunError, match="steps="):
        Runner(program).run(steps)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, True, "1"])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(RunError, match="seed="):
        run(bilevel(batches(1), batches(1)), 1, seed=seed)


def test_a_program_without_levels_is_refused():
    with pytest.raises(RunError, match="no levels"):
        run(Program(), 1)


def test_a_refused_run_leaves_the_random_streams_alone():
    program = Program()
    program.level("low", module={"x": torch.zeros(1)})(lambda m: (m.x**2).sum())
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(mlodeco.errors.OptimizerError):
        mlodeco.run(1, program=program, seed=3, progress="off")
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def test_gather_of_one_process_is_the_tensor_itself():
    assert torch.equal(mlodeco.Context().gather(torch.arange(3)), torch.arange(3))
    seen = []
    program = Program()
    sgd = partial(torch.optim.SGD, lr=0.1)

    @program.level("low", module={"x": torch.zeros(2)}, optimizer=sgd)
    def low(m, ctx):
        seen.append(ctx.gather(torch.arange(3)))
        return (m.x**2).sum()

    mlodeco.run(1, program=program, progress="off")
    assert all(torch.equal(one, torch.arange(3)) for one in seen)


def test_a_loss_may_take_its_batch_apart_in_every_pass_of_a_run():
    def build(*, pops):
        program = Program()
        sgd = partial(SGD, lr=0.1)
        data = [{"x": randn(4, 2, seed=1), "y": randn(4, seed=2)}]
        take = dict.pop if pops else dict.__getitem__

        @program.level("low", module={"w": randn(2, seed=3)}, optimizer=sgd, data=data)
        def low(m, batch, top):
            y = take(batch, "y")
            return ((batch["x"] @ m.w - y) ** 2).mean() + (top.l.exp() * m.w**2).sum()

        @program.level(
            "top", lower=["low"], module={"l": randn(2, seed=4)}, optimizer=sgd, data=data
        )
        def top(m, batch, low):
            return ((batch["x"] @ low.w - take(batch, "y")) ** 2).mean()

        mlodeco.run(3, program=program, seed=0, progress="off")
        assert set(data[0]) == {"x", "y"}
        return program.module("top").l

    assert torch.equal(build(pops=True), build(pops=False))


def test_a_trained_module_can_be_frozen_and_the_others_looked_at():
    program = Program()
    for name in ("a", "b"):
        program.level(name, module=nn.Linear(1, 1))(lambda m: m.weight.sum())
    program.module("a").requires_grad_(False)
    assert program.module("b") is program.module("b")
    with pytest.raises(mlodeco.errors.GraphError, match="'c'"):
        program.module("c")


def two_levels():
    program = Program()
    sgd = partial(SGD, lr=0.1)
    program.level("low", module={"x": torch.ones(2)}, optimizer=sgd, inner_steps=3)(
        lambda m, top: ((m.x - top.x) ** 2).sum()
    )
    program.level("top", lower=["low"], module={"x": torch.zeros(2)}, optimizer=sgd)(
        lambda m, low: (low.x**2).sum()
    )
    program.validate(every=5)(lambda: {"accuracy": 0.5})
    return program


def test_a_history_knows_the_names_of_levels_and_metrics():
    runner = Runner(two_levels())
    assert runner.history.metric("accuracy") == []
    runner.step()
    history = runner.history
    assert history.of("top") == history.losses("top") == []
    for look in (history.of, history.losses):
        with pytest.raises(RunError, match="no level 'tpo'") as caught:
            look("tpo")
        assert "Did you mean 'top'?" in caught.value.remedy
        assert "'low', 'top'" in caught.value.expected
    runner.run(4)
    assert history.metric("accuracy") == [0.5]
    with pytest.raises(RunError, match="no validation metric 'acuracy'") as caught:
        history.metric("acuracy")
    assert "Did you mean 'accuracy'?" in caught.value.remedy


def test_a_history_without_validations_has_no_metrics():
    program = Program()
    program.level("low", module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.1))(
        lambda m: m.x.sum()
    )
    with pytest.raises(RunError, match="'accuracy'") as caught:
        run(program, 1).history.metric("accuracy")
    assert "@validate" in caught.value.expected


def test_short_texts_of_program_runner_and_history():
    program = two_levels()
    assert repr(program) == "<Program: levels 'low', 'top'; 1 validation>"
    assert repr(Program()) == "<Program: levels none>"
    runner = Runner(program)
    assert repr(runner) == "<Runner: levels 'low', 'top'; 0 ticks run>"
    assert repr(runner.history).startswith("<History: 0 ticks, 0 level steps, 0 validations;")
    runner.run(3)
    assert repr(runner) == "<Runner: levels 'low', 'top'; 3 ticks run>"
    assert repr(runner.history).startswith("<History: 3 ticks, 4 level steps, 1 validation; ")
