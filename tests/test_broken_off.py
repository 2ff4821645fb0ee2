"""Runs that Ctrl-C breaks off, and that go on as if nothing had been."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

from mlodeco import Program, Runner
from mlodeco.declare.registry import EVENTS, RUN_EVENTS
from mlodeco.hypergrad import Neumann
from mlodeco.runtime.checkpoint.signals import Interrupts, Signals

TICKS = 7
LEVEL_EVENTS = [event for event in EVENTS if event not in RUN_EVENTS]
LEVELS = ("low", "mid", "top")


def loader(seed):
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1)), 4, shuffle=True)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))


def make(method, low_options, watch=lambda level: None):
    """Three levels with all that a step may change, or draw at random."""
    program = Program()

    @program.source
    def noise(low):
        while True:
            yield torch.rand(3, dtype=torch.float64)

    @program.level(
        "low",
        module=lambda: network().double(),
        optimizer=partial(Adam, lr=0.05),
        data=loader(1),
        inner_steps=2,
        accumulate=2,
        **low_options,
    )
    def low(model, batch, mid, noise, ctx):
        watch("low")
        x, y = batch
        x = x + 0.1 * noise + 0.1 * torch.rand(3, generator=ctx.generator, dtype=torch.float64)
        penalty = sum((p**2).sum() for p in model.parameters())
        return ((model(x)[:, 0] - y) ** 2).mean() + mid.log.exp() * penalty

    @program.level(
        "mid",
        lower=["low"],
        hypergrad=method,
        module={"log": torch.tensor(-2.0, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        data=loader(2),
        repeat=2,
        inner_steps=2,
    )
    def mid(m, batch, low, top):
        watch("mid")
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean() + top.shift * m.log**2

    @program.level(
        "top",
        lower=["mid"],
        hypergrad="identity",
        module={"shift": torch.tensor(0.1, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.01),
        data=loader(3),
    )
    def top(m, batch, mid):
        watch("top")
        return (mid.log + 1) ** 2 + 0.01 * m.shift**2 + 0 * batch[0].sum()

    return program


def outcome(program, runner):
    """Everything that a run has moved."""
    tensors = {
        f"{name}.{key}": value.clone()
        for name in LEVELS
        for key, value in program.module(name).state_dict().items()
    }
    records = [(r.tick, r.level, r.step, r.loss, r.grad_norm) for r in runner.history.steps]
    return tensors, records, torch.rand(4)


def assert_same(found, wanted):
    (tensors, records, drawn), (others, other_records, other_drawn) = found, wanted
    assert records == other_records
    assert all(torch.equal(tensors[key], others[key]) for key in others)
    assert torch.equal(drawn, other_drawn)


PROGRAMS = {
    "neumann": (Neumann(num_terms=2, damping=50.0), {}),
    "unroll": ("unroll", {}),
    "rollback": ("identity", {"rollback": True}),
}
STRAIGHT = {}


def straight(case):
    """The run that nothing breaks off, once."""
    if case not in STRAIGHT:
        program = make(*PROGRAMS[case])
        runner = Runner(program, seed=0)
        runner.run(TICKS)
        STRAIGHT[case] = outcome(program, runner)
    return STRAIGHT[case]


def go_on(runner):
    """Steps until the ticks are run; how often something broke it off."""
    broken = 0
    while runner.tick < TICKS:
        try:
            runner.run(TICKS - runner.tick)
        except KeyboardInterrupt:
            broken += 1
    return broken


@pytest.mark.parametrize("case", PROGRAMS)
def test_a_run_broken_off_at_any_event_goes_on_to_the_same_bits(case):
    """Each event of each level raises at its first and fourth occurrence."""
    program, raised, counts = make(*PROGRAMS[case]), set(), {}
    for event in LEVEL_EVENTS:

        @program.on(event)
        def fail(ctx, event=event):
            key = event, ctx.level
            counts[key] = counts.get(key, 0) + 1
            if counts[key] in (1, 4):
                raised.add(key)
                raise KeyboardInterrupt

    due = {}
    for event in ("before_step", "after_backward"):

        @program.on(event, every=3)
        def third(ctx, event=event):
            due.setdefault((event, ctx.level), []).append(ctx.step)

    runner = Runner(program, seed=0)
    broken = go_on(runner)
    steps = {level: len(runner.history.of(level)) for level in LEVELS}
    for (event, level), found in due.items():
        if case != "rollback" or event == "before_step":
            assert list(dict.fromkeys(found)) == list(range(2, steps[level], 3))
    assert_same(outcome(program, runner), straight(case))
    behind_another = {("loop_end", "low"), ("epoch_end", "top")}
    never = {("hypergradient", "low"), ("loop_end", "top")}
    possible = {(event, level) for event in LEVEL_EVENTS for level in LEVELS} - never
    assert raised >= possible - behind_another
    assert broken >= len(raised)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_run_broken_off_in_a_loss_goes_on_to_the_same_bits(level, call):
    calls = dict.fromkeys(LEVELS, 0)

    def watch(name):
        calls[name] += 1
        if name == level and calls[name] == call:
            raise KeyboardInterrupt

    program = make(*PROGRAMS["neumann"], watch)
    runner = Runner(program, seed=0)
    assert go_on(runner) == 1
    assert_same(outcome(program, runner), straight("neumann"))


@pytest.mark.parametrize("event", ["before_step", "after_backward", "after_step"])
def test_behind_an_error_of_a_hook_a_step_is_taken_once(event):
    """Before the update on the next batch, since this one may be the reason; else it is done."""
    program, batches = Program(), []

    @program.level(
        "low",
        module={"x": torch.tensor(0.0, dtype=torch.float64)},
        optimizer=partial(SGD, lr=1.0),
        data=[1.0, 10.0, 100.0, 1000.0],
    )
    def low(m, batch):
        return -m.x * batch

    program.on("after_step")(lambda batch: batches.append(batch))

    @program.on(event)
    def fail(ctx):
        if ctx.tick == 2 and not failed:
            failed.append(event)
            raise ValueError(event)

    failed: list[str] = []
    runner = Runner(program)
    runner.step()
    with pytest.raises(ValueError, match=event):
        runner.step()
    assert program.module("low").x.item() == (11.0 if event == "after_step" else 1.0)
    assert runner.step().tick == 2
    assert runner.step().tick == 3
    assert batches == ([1.0, 10.0, 100.0] if event == "after_step" else [1.0, 100.0, 1000.0])
    assert program.module("low").x.item() == sum(batches)
    assert [record.step for record in runner.history.steps] == [1, 2, 3]


def test_a_signal_in_the_update_waits_for_its_end():
    """Ctrl-C between two parameters of an optimizer's step would leave half a step."""

    class Interrupted(SGD):
        def step(self, closure=None):
            super().step()
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            seen.append(self)  # is reached: the interrupt waits

    seen = []
    program = Program()
    program.level(
        "low",
        module={"x": torch.tensor(1.0, dtype=torch.float64)},
        optimizer=lambda parameters: Interrupted(parameters, lr=0.25),
    )(lambda m: (m.x**2).sum())
    runner = Runner(program)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        runner.run(5)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(seen) == len(runner.history) == 3
    assert program.module("low").x.item() == 0.5**3
    assert runner.run(2).ticks == 4  # the third tick was left behind its step, and is ended first
    assert len(runner.history) == 4
    assert program.module("low").x.item() == 0.5**4


class Signalling:
    """Raises SIGINT at the n-th call, as a terminal's Ctrl-C does."""

    def __init__(self):
        self.at = None
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)


def run_through(where, at):
    """What a run leaves that a signal breaks off somewhere, and that goes on."""
    calls, told = Signalling(), []
    torch.manual_seed(0)

    def tell(place):
        if place == where:
            calls()

    class Told(SGD):
        def step(self, closure=None):
            super().step()
            tell("update")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            tell("data")
            return torch.linspace(-1.0, 1.0, 36, dtype=torch.float64).view(12, 3)[index]

    program = Program()

    @program.source
    def noise():
        while True:
            for number in range(3):
                tell("source")
                yield number

    @program.level(
        "low",
        module=lambda: network().double(),
        optimizer=partial(Told, lr=0.1),
        data=DataLoader(Rows(), 4, shuffle=True),
    )
    def low(model, batch, noise, ctx):
        ctx.log(noise=noise)
        return (model(batch) ** 2).mean() * (1 + noise)

    @program.on("after_step")
    def after(ctx):
        tell("after_step")
        ctx.log(drawn=torch.rand(()).item())

    @program.validate(every=2, monitor="error", mode="max", patience=3)
    def error(low, ctx):
        tell("validation")
        return {"error": -abs(ctx.tick - 4.0)}

    @program.on("validate", every=2)
    def seen(ctx):
        tell("validate")
        told.append(ctx.tick)

    runner = Runner(program, seed=0)
    calls.at, calls.calls = at, 0
    broken = 0
    while runner.tick < 20 and runner._ending.reason is None:
        try:
            runner.run_to(20)
        except KeyboardInterrupt:
            broken += 1
    history = runner.history
    return broken, {
        "steps": [(r.tick, r.loss, r.metrics) for r in history.steps],
        "validations": [(r.tick, r.metrics) for r in history.validations],
        "best": runner.best,
        "reason": runner._ending.reason,
        "told": told,
        "state": [t.tolist() for t in program.module("low").state_dict().values()],
        "drawn": torch.rand(3).tolist(),
    }


@pytest.mark.parametrize(
    "where", ["update", "data", "source", "after_step", "validation", "validate"]
)
def test_a_signal_anywhere_leaves_the_same_bits_behind(where):
    _, wanted = run_through(where, None)
    for at in (1, 2) if where.startswith("valid") else (3, 9):
        broken, found = run_through(where, at)
        assert broken == 1
        assert found == wanted
    assert wanted["validations"][-1][0] == 10
    assert wanted["best"].tick == 4


def test_a_tick_whose_validation_failed_is_ended_by_the_next_call():
    program, failing, ticks = Program(), [4], []
    program.level("low", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1))(
        lambda m: (m.x**2).sum()
    )

    @program.validate(every=2)
    def norm(low, ctx):
        if ctx.tick in failing:
            failing.remove(ctx.tick)
            raise ValueError("words of my own")
        return {"norm": low.x.norm()}

    runner = Runner(program)
    with pytest.raises(ValueError, match="words of my own"):
        runner.run(6)
    for tick in (runner.step(), runner.step(), runner.step()):
        ticks.append((tick.tick, len(tick.steps), [r.tick for r in tick.validations]))
    assert ticks == [(4, 1, [4]), (5, 1, []), (6, 1, [6])]


def test_a_second_signal_does_not_wait():
    program = Program()

    def hang():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("is not reached")

    program.level(
        "low",
        module={"x": torch.ones(1)},
        optimizer=partial(SGD, lr=0.1),
        data=lambda: iter([hang()]),
    )(lambda m, batch: (m.x**2).sum())
    with pytest.raises(KeyboardInterrupt):
        Runner(program).run(2)


class Failing:
    def on_start(self, runner, steps): ...

    def on_tick(self, tick):
        raise ValueError("first")

    def on_end(self, result): ...

    def on_error(self):
        raise OSError("second")


def test_an_error_of_a_listener_stands_before_those_behind_it():
    program, told = Program(), []
    program.level("low", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1))(
        lambda m: (m.x**2).sum()
    )
    runner = Runner(program)
    other = Failing()
    other.on_tick, other.on_error = (lambda tick: None), (lambda: told.append("other"))
    runner.listeners += [Failing(), other]
    with pytest.raises(ValueError, match="first") as caught:
        runner.run(2)
    assert caught.value.__notes__ == ["behind it came OSError: second"]
    assert told == ["other"]


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize(
    ("holder", "number"),
    [(Signals, signal.SIGTERM), (Signals, signal.SIGINT), (Interrupts, signal.SIGINT)],
)
def test_an_interrupt_as_handlers_are_set_leaves_those_of_before(holder, when, number, monkeypatch):
    handlers = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    install = signal.signal

    def interrupted(which, handler):
        if handler is handlers[which]:
            return install(which, handler)
        if when == "behind":
            install(which, handler)
        if which == number:
            raise KeyboardInterrupt
        return install(which, handler)

    held = holder()
    with monkeypatch.context() as patch:
        patch.setattr(signal, "signal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            held.__enter__()
    assert {one: signal.getsignal(one) for one in handlers} == handlers
    with held:
        assert signal.getsignal(signal.SIGINT) == held._note
    assert {one: signal.getsignal(one) for one in handlers} == handlers
