"""The options that say when and how often a level steps, against loops by hand."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR

import mlodeco
from mlodeco import Program
from mlodeco.hypergrad import Neumann
from tests import reference
from tests.problems import randn
from tests.test_runner import NEUMANN, Twin, batches, bilevel, cat, run, same, state

LOW, TOP = batches(7, seed=1), batches(5, seed=2)


class Draws:
    """Batches one after another, round and round."""

    def __init__(self, data):
        self.data, self.next = data, 0

    def __call__(self, count=1):
        found = [self.data[(self.next + i) % len(self.data)] for i in range(count)]
        self.next += count
        return found


def pair(**options):
    """The declared program, its twin, and the twin's batches."""
    return bilevel(LOW, TOP, **options), Twin(NEUMANN), Draws(LOW), Draws(TOP)


def test_inner_steps():
    program, twin, low, top = pair(low_inner_steps=3)
    result = run(program, 10)
    for tick in range(1, 11):
        twin.low_step(*low())
        if tick % 3 == 0:
            twin.top_step(*top())
    same(twin, program)
    assert [r.tick for r in result.history.of("top")] == [3, 6, 9]
    assert len(result.history.of("low")) == 10


def test_repeat_of_an_upper_level():
    program, twin, low, top = pair(top_repeat=3, low_inner_steps=2)
    result = run(program, 6)
    for tick in range(1, 7):
        twin.low_step(*low())
        if tick % 2 == 0:
            for _ in range(3):
                twin.top_step(*top())
    same(twin, program)
    assert [r.step for r in result.history.of("top")] == list(range(1, 10))


def test_repeat_of_a_leaf():
    program, twin, low, top = pair(low_repeat=3)
    run(program, 5)
    for _ in range(5):
        for _ in range(3):
            twin.low_step(*low())
        twin.top_step(*top())
    same(twin, program)


def test_warmup():
    program, twin, low, top = pair(low_warmup=4, low_inner_steps=2)
    result = run(program, 11)
    for tick in range(1, 12):
        twin.low_step(*low())
        if tick > 4 and (tick - 4) % 2 == 0:
            twin.top_step(*top())
    same(twin, program)
    assert [r.tick for r in result.history.of("top")] == [6, 8, 10]


def test_an_upper_waits_for_the_slowest_of_its_lower_levels():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    def one():
        return {"x": torch.ones(1, dtype=torch.float64)}

    @program.level("fast", module=one(), optimizer=sgd, inner_steps=2)
    def fast(m, top):
        return ((m.x - top.x) ** 2).sum()

    @program.level("slow", module=one(), optimizer=sgd, inner_steps=3, warmup=1)
    def slow(m, top):
        return ((m.x + top.x) ** 2).sum()

    @program.level("mid", lower=["fast"], module=one(), optimizer=sgd, inner_steps=2)
    def mid(m, fast, top):
        return ((m.x - fast.x - top.x) ** 2).sum()

    @program.level("top", lower=["mid", "slow"], module=one(), optimizer=sgd, hypergrad="identity")
    def top(m, mid, slow):
        return ((m.x + mid.x * slow.x) ** 2).sum()

    history = run(program, 16).history
    assert [r.tick for r in history.of("mid")] == [2, 4, 6, 8, 10, 12, 14, 16]
    # mid is ready at 4 and slow too (1 + 3); then mid at 8 and slow at 7; and so on
    assert [r.tick for r in history.of("top")] == [4, 8, 12, 16]


def test_accumulate_is_one_step_on_all_micro_batches():
    program, twin, low, top = pair(low_accumulate=3, top_accumulate=2)
    result = run(program, 8)
    for _ in range(8):
        twin.low_step(*low(3))
        twin.top_step(*top(2))
    same(twin, program)
    assert result.history.losses("low") == pytest.approx(twin.low_losses, rel=1e-12)
    assert result.history.losses("top") == pytest.approx(twin.top_losses, rel=1e-12)


def test_accumulate_equals_one_big_batch():
    many, one = pair(low_accumulate=7, top_accumulate=5), bilevel([cat(*LOW)], [cat(*TOP)])
    run(many[0], 6)
    run(one, 6)
    left, right = state(many[0]), state(one)
    for key in left:
        assert (left[key] - right[key]).abs().max() < 1e-12, key


@pytest.mark.parametrize("low_clip", [None, 0.05])
@pytest.mark.parametrize("top_clip", [None, 0.01])
def test_clip_norm(low_clip, top_clip):
    sgd = partial(SGD, lr=0.5)
    program, twin, low, top = pair(
        low_clip_norm=low_clip, top_clip_norm=top_clip, top_optimizer=sgd
    )
    twin.top_opt = sgd(twin.hyper.parameters())
    result = run(program, 8)
    for _ in range(8):
        twin.low_step(*low(), clip=low_clip)
        twin.top_step(*top(), clip=top_clip)
    for mine, other in (("low", twin.model), ("top", twin.hyper)):
        for p, q in zip(program.module(mine).parameters(), other.parameters(), strict=True):
            # torch's clip_grad_norm_ adds 1e-6 to the norm
            assert (p - q).abs().max() < (1e-12 if low_clip is top_clip is None else 1e-4)
    for name, clip in (("low", low_clip), ("top", top_clip)):
        norms = [r.grad_norm for r in result.history.of(name)]
        last = reference.flat([p.grad for p in program.module(name).parameters()]).norm()
        if clip is None:
            assert last.item() == pytest.approx(norms[-1])
        else:
            assert min(norms) > clip
            assert last.item() == pytest.approx(clip, rel=1e-4)


def test_a_norm_below_the_bound_is_not_touched():
    clipped, free = pair(low_clip_norm=1e3, top_clip_norm=1e3)[0], pair()[0]
    run(clipped, 4)
    run(free, 4)
    for left, right in zip(state(clipped).values(), state(free).values(), strict=True):
        assert torch.equal(left, right)


def test_schedulers_step_once_per_own_step():
    program, twin, low, top = pair(
        low_scheduler=partial(StepLR, step_size=4, gamma=0.5),
        top_scheduler=partial(ExponentialLR, gamma=0.9),
        low_inner_steps=2,
        low_accumulate=2,
    )
    result = run(program, 10)
    schedulers = StepLR(twin.low_opt, 4, gamma=0.5), ExponentialLR(twin.top_opt, gamma=0.9)
    for tick in range(1, 11):
        twin.low_step(*low(2))
        schedulers[0].step()
        if tick % 2 == 0:
            twin.top_step(*top())
            schedulers[1].step()
    same(twin, program)
    rates = [r.learning_rate for r in result.history.of("low")]
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025] * 2)
    rates = [r.learning_rate for r in result.history.of("top")]
    assert rates == pytest.approx([0.05 * 0.9**i for i in range(5)])


# rollback


class Low(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64, momentum=0.3)
        with torch.no_grad():
            self.linear.weight.copy_(randn(3, 3, seed=8))
            self.linear.bias.zero_()

    def forward(self, x):
        return self.norm(self.linear(x))


def low_loss(model, x, hyper):
    return (hyper.x.exp() * (model(x) - x) ** 2).mean() + 0.05 * (model.linear.weight**2).sum()


def top_loss(hyper, x, model):
    return ((model.linear(x) - 1) ** 2).mean() + 0.1 * (hyper.x**2).sum()


XS = [randn(8, 3, seed=20 + i) for i in range(5)]
HYPER = randn(3, seed=30)


class RollbackTwin:
    """Low: BatchNorm, SGD with momentum, a scheduler. Top: identity."""

    def __init__(self, make_low):
        self.low, self.x = make_low(), nn.Parameter(HYPER.clone())
        self.low_opt = SGD(self.low.parameters(), lr=0.1, momentum=0.9)
        self.schedule = StepLR(self.low_opt, 2, gamma=0.5)
        self.top_opt = Adam([self.x], lr=0.1)
        self.hyper = type("Hyper", (), {"x": self.x})
        self.losses = []

    def save(self):
        parts = (self.low, self.low_opt, self.schedule)
        self.saved = [copy.deepcopy(part.state_dict()) for part in parts]

    def restore(self):
        for part, saved in zip((self.low, self.low_opt, self.schedule), self.saved, strict=True):
            part.load_state_dict(saved)

    def low_step(self, x):
        self.last = x
        params = list(self.low.parameters())
        for p, g in zip(
            params, torch.autograd.grad(low_loss(self.low, x, self.hyper), params), strict=True
        ):
            p.grad = g
        self.low_opt.step()
        self.schedule.step()

    def top_step(self, x):
        buffers = copy.deepcopy(dict(self.low.named_buffers()))
        self.x.grad = reference.bilevel(
            lambda: top_loss(self.hyper, x, self.low),
            lambda: low_loss(self.low, self.last, self.hyper),
            [self.x],
            list(self.low.parameters()),
            reference.scaled(0.5),
        )
        for name, buffer in self.low.named_buffers():
            buffer.copy_(buffers[name])
        self.top_opt.step()


def rolled(make_low, *, rollback=True, **options):
    program = Program()
    program.level(
        "low",
        module=make_low(),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        scheduler=partial(StepLR, step_size=2, gamma=0.5),
        data=XS,
        reads={"hyper": "top"},
        rollback=rollback,
        **options,
    )(lambda model, batch, hyper: low_loss(model, batch, hyper))
    program.level(
        "top",
        lower=["low"],
        module={"x": HYPER},
        optimizer=partial(Adam, lr=0.1),
        data=XS[::-1],
        reads={"model": "low"},
        hypergrad=mlodeco.hypergrad.Identity(scale=0.5),
    )(lambda hyper, batch, model: top_loss(hyper, batch, model))
    return program


@pytest.mark.parametrize("inner", [1, 3])
def test_rollback_repeats_the_last_step_from_the_start_of_the_loop(inner):
    program = rolled(Low, inner_steps=inner)
    result = run(program, 9)
    twin = RollbackTwin(Low)
    low, top = Draws(XS), Draws(XS[::-1])
    for tick in range(9):
        if tick % inner == 0:
            twin.save()
        twin.low_step(*low())
        if tick % inner == inner - 1:
            twin.top_step(*top())
            twin.restore()
            twin.low_step(twin.last)
    assert (program.module("top").x - twin.x).abs().max() < 1e-12
    for (name, value), other in zip(
        program.module("low").state_dict().items(), twin.low.state_dict().values(), strict=True
    ):
        assert (value - other).abs().max() < 1e-12, name
    assert program.module("low").norm.num_batches_tracked == 9 // inner
    assert len(result.history.of("low")) == 9


def test_rollback_matters():
    ends = []
    for rollback in (True, False):
        program = rolled(Low, rollback=rollback, inner_steps=3)
        run(program, 6)
        ends.append(program.module("low").linear.weight.detach())
    assert not torch.allclose(*ends)


@pytest.mark.parametrize("inner", [1, 2])
def test_rollback_repeats_the_step_as_it_was_drawn(inner):
    """The same batch, random numbers, step counter and generator; later draws are not moved."""
    seen = []

    def program_with(rollback):
        program = Program()

        @program.level(
            "low",
            module={"x": torch.ones(2, dtype=torch.float64)},
            optimizer=partial(SGD, lr=0.1),
            data=[randn(2, seed=i) for i in range(3)],
            rollback=rollback,
            inner_steps=inner,
        )
        def low(m, batch, top, ctx):
            drawn = torch.rand(()).item(), torch.rand((), generator=ctx.generator).item()
            if not ctx._muted:
                seen.append((*drawn, ctx.step, ctx.tick, ctx.epoch, batch[0].item()))
            return ((m.x - top.x) ** 2).sum()

        @program.level(
            "top",
            lower=["low"],
            module={"x": torch.zeros(2, dtype=torch.float64)},
            optimizer=partial(SGD, lr=0.1),
            hypergrad="identity",
        )
        def top(m, low):
            return (low.x**2).sum()

        program.on("after_step", level="top")(lambda: torch.rand(()))
        return program

    run(program_with(False), 6, seed=1)
    plain = seen.copy()
    seen.clear()
    run(program_with(True), 6, seed=1)
    expected = []
    for number, one in enumerate(plain):
        expected += [one] * (2 if number % inner == inner - 1 else 1)
    assert seen == expected


def test_rollback_applies_a_hook_that_changes_gradients_to_the_repeated_step():
    program = Program()

    @program.level(
        "low",
        module={"x": torch.ones(1, dtype=torch.float64)},
        optimizer=partial(SGD, lr=1.0),
        rollback=True,
    )
    def low(m, top):
        return (m.x * top.x.exp()).sum()

    @program.level(
        "top",
        lower=["low"],
        module={"x": torch.zeros(1, dtype=torch.float64)},
        optimizer=partial(SGD, lr=1.0),
        hypergrad=None,
    )
    def top(m, low):
        return (m.x + low.x).sum()

    @program.on("after_backward", level="low")
    def halve(grads):
        grads["x"].mul_(0.5)

    run(program, 1)
    wanted = 1.0 - 0.5 * torch.tensor(-1.0).double().exp()
    assert program.module("low").x.item() == pytest.approx(wanted.item(), abs=1e-12)


def test_rollback_keeps_the_warmup():
    program = rolled(Low, inner_steps=1, warmup=3)
    run(program, 4)
    twin = RollbackTwin(Low)
    for x in XS[:3]:
        twin.low_step(x)
    twin.save()
    twin.low_step(XS[3])
    twin.top_step(XS[-1])
    twin.restore()
    twin.low_step(XS[3])
    assert (program.module("low").linear.weight - twin.low.linear.weight).abs().max() < 1e-12


# three levels


def c1(w, h, b):
    return ((w - h.tanh()) ** 2).sum() + (w**4).sum() / 4 + (w * b).sum()


def c2(w, h, u, b):
    return ((w + h - b) ** 2).sum() + (u.exp() * h**2).sum()


def c3(h, u, b):
    return ((h - b) ** 2).sum() + (u**2).sum()


DATA = [randn(4, seed=40 + i) for i in range(5)]


def trilevel(low=None, mid=None, top=None):
    program = Program()
    sgd = partial(SGD, lr=0.1, momentum=0.8)
    made = {n: {"x": randn(4, seed=50 + i)} for i, n in enumerate(("low", "mid", "top"))}
    neumann = Neumann(num_terms=3, step_size=0.1)

    def declare(name, function, **options):
        program.level(name, module=made[name], optimizer=sgd, data=DATA, **options)(function)

    declare("low", lambda m, batch, mid: c1(m.x, mid.x, batch), **(low or {}))
    declare(
        "mid",
        lambda m, batch, low, top: c2(low.x, m.x, top.x, batch),
        **{"lower": ["low"], "hypergrad": neumann, **(mid or {})},
    )
    declare(
        "top",
        lambda m, batch, mid: c3(mid.x, m.x, batch),
        **{"lower": ["mid"], "hypergrad": neumann, **(top or {})},
    )
    return program


class Trio:
    """The same three levels in plain torch, each with its own batches and optimizer."""

    def __init__(self):
        self.w, self.h, self.u = (nn.Parameter(randn(4, seed=50 + i)) for i in range(3))
        self.opts = [SGD([p], lr=0.1, momentum=0.8) for p in (self.w, self.h, self.u)]
        self.draws = [Draws(DATA) for _ in range(3)]
        self.b = [None, None, None]

    def mean(self, function, batches_):
        return sum(function(b) for b in batches_) / len(batches_)

    def low(self, count=1, clip=None, draw=True):
        if draw:
            self.b[0] = self.draws[0](count)
        loss = self.mean(lambda b: c1(self.w, self.h, b), self.b[0])
        self.apply(0, self.w, reference.gradients(loss, [self.w]), clip)

    def mid(self, count=1, clip=None, draw=True):
        if draw:
            self.b[1] = self.draws[1](count)
        grad = reference.bilevel(
            lambda: self.mean(lambda b: c2(self.w, self.h, self.u, b), self.b[1]),
            lambda: self.mean(lambda b: c1(self.w, self.h, b), self.b[0]),
            [self.h],
            [self.w],
            reference.neumann(3, 0.1),
        )
        self.apply(1, self.h, grad, clip)

    def top(self, count=1, clip=None):
        self.b[2] = self.draws[2](count)
        grad = reference.bilevel(
            lambda: self.mean(lambda b: c3(self.h, self.u, b), self.b[2]),
            lambda: self.mean(lambda b: c2(self.w, self.h, self.u, b), self.b[1]),
            [self.u],
            [self.h],
            reference.neumann(3, 0.1),
        )
        self.apply(2, self.u, grad, clip)

    def apply(self, number, parameter, grad, clip):
        parameter.grad = grad.clone()
        if clip is not None:
            parameter.grad.mul_(min(1.0, clip / grad.norm().item()))
        self.opts[number].step()

    def equals(self, program):
        for name, value in (("low", self.w), ("mid", self.h), ("top", self.u)):
            assert (program.module(name).x - value).abs().max() < 1e-10, name


def test_trilevel_plain():
    program, trio = trilevel(), Trio()
    run(program, 8)
    for _ in range(8):
        trio.low()
        trio.mid()
        trio.top()
    trio.equals(program)


def test_trilevel_inner_steps_count_each_levels_own_steps():
    program, trio = trilevel({"inner_steps": 2}, {"inner_steps": 3}), Trio()
    history = run(program, 14).history
    for tick in range(1, 15):
        trio.low()
        if tick % 2 == 0:
            trio.mid()
        if tick % 6 == 0:
            trio.top()
    trio.equals(program)
    assert [r.tick for r in history.of("top")] == [6, 12]


def test_trilevel_repeat_and_warmup_at_the_middle():
    program, trio = trilevel({"warmup": 1}, {"repeat": 2, "warmup": 3}), Trio()
    history = run(program, 8).history
    own = 0
    for tick in range(1, 9):
        trio.low()
        if tick > 1:
            trio.mid()
            trio.mid()
            own += 2
            if own > 3:
                trio.top()
    trio.equals(program)
    assert [r.tick for r in history.of("top")] == [3, 4, 5, 6, 7, 8]


def test_trilevel_accumulate_clip_and_schedule_at_every_level():
    def options(count, clip):
        return {
            "accumulate": count,
            "clip_norm": clip,
            "scheduler": partial(StepLR, step_size=2, gamma=0.7),
        }

    program, trio = trilevel(options(2, 0.5), options(3, 0.2), options(2, 0.1)), Trio()
    history = run(program, 6).history
    schedulers = [StepLR(opt, 2, gamma=0.7) for opt in trio.opts]
    for _ in range(6):
        trio.low(2, 0.5)
        trio.mid(3, 0.2)
        trio.top(2, 0.1)
        for scheduler in schedulers:
            scheduler.step()
    for name, value in (("low", trio.w), ("mid", trio.h), ("top", trio.u)):
        assert (program.module(name).x - value).abs().max() < 1e-5, name
    for name, clip in (("low", 0.5), ("mid", 0.2), ("top", 0.1)):
        assert all(r.grad_norm > clip for r in history.of(name)), name
        rates = [r.learning_rate for r in history.of(name)]
        assert rates == pytest.approx([0.1, 0.1, 0.07, 0.07, 0.049, 0.049])


@pytest.mark.parametrize("where", ["low", "mid", "both"])
def test_trilevel_rollback(where):
    low = {"rollback": where != "mid"}
    mid = {"rollback": where != "low", "inner_steps": 2}
    program, trio = trilevel(low, mid), Trio()
    run(program, 8)
    saved = {}

    def save(number, parameter):
        saved[number] = parameter.detach().clone(), copy.deepcopy(trio.opts[number].state_dict())

    def restore(number, parameter):
        with torch.no_grad():
            parameter.copy_(saved[number][0])
        trio.opts[number].load_state_dict(copy.deepcopy(saved[number][1]))

    for tick in range(8):
        save(0, trio.w)
        trio.low()
        if tick % 2 == 0:
            save(1, trio.h)
        trio.mid()
        if tick % 2 == 1:
            trio.top()
        if low["rollback"]:
            restore(0, trio.w)
            trio.low(draw=False)
        if tick % 2 == 1 and mid["rollback"]:
            restore(1, trio.h)
            trio.mid(draw=False)
    trio.equals(program)


def test_a_rolled_back_step_that_raises_leaves_the_level_as_it_was():
    calls = []
    program = Program()

    @program.level(
        "low",
        module={"x": torch.ones(1, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        rollback=True,
    )
    def low(m, top):
        calls.append(m.x.item())
        if len(calls) == fail_at:
            raise ValueError("in the repeated step")
        return ((m.x - top.x) ** 2).sum()

    @program.level(
        "top",
        lower=["low"],
        module={"x": torch.zeros(1, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1),
        hypergrad=Neumann(num_terms=1, step_size=0.1),
    )
    def top(m, low):
        return (low.x**2).sum()

    fail_at = 0
    runner = mlodeco.Runner(program, seed=0)
    runner.step()
    calls.clear()
    runner.step()
    fail_at = len(calls)  # the last call of a tick is the repeated step
    calls.clear()
    with pytest.raises(ValueError, match="repeated step"):
        runner.step()
    assert program.module("low").x.item() != calls[0]
    momentum = runner._trainers["low"].optimizer.state_dict()["state"][0]["momentum_buffer"]
    moved = calls[0] - program.module("low").x.item()
    assert moved == pytest.approx(0.1 * momentum.item(), abs=1e-12)
