"""Hooks: when they are called, with what, and what they may do."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import BindingError, DeclarationError, GraphError
from tests.problems import randn

EVENTS = mlodeco.declare.registry.EVENTS
LEVEL_EVENTS = [e for e in EVENTS if e not in mlodeco.declare.registry.RUN_EVENTS]


def one(value=1.0):
    return {"x": torch.full((2,), value, dtype=torch.float64)}


def make(low=None, top=None, *, low_function=None, top_function=None):
    program = Program()

    def low_loss(m, batch, top):
        return ((m.x - top.x - batch) ** 2).sum(), {"size": batch.norm()}

    def top_loss(m, batch, low):
        return ((low.x - batch) ** 2).sum()

    program.level(
        "low",
        module=one(),
        optimizer=partial(SGD, lr=0.1),
        **{"data": [randn(2, seed=i) for i in range(3)], **(low or {})},
    )(low_function or low_loss)
    program.level(
        "top",
        lower=["low"],
        module=one(2.0),
        optimizer=partial(Adam, lr=0.1),
        scheduler=partial(StepLR, step_size=1, gamma=0.5),
        data=[randn(2, seed=9)],
        hypergrad="identity",
        **(top or {}),
    )(top_function or top_loss)
    return program


def run(program, steps, **options):
    return mlodeco.run(steps, program=program, progress="off", **options)


def recorded(program):
    seen = []
    for event in EVENTS:

        @program.on(event)
        def hook(ctx, event=event):
            seen.append((event, ctx.level))

    program.validate(every=2)(lambda low: {"x": low.x.sum()})
    return seen


def test_order_of_events():
    program = make({"inner_steps": 2})
    seen = recorded(program)
    run(program, 3)
    step = ["before_step", "after_backward", "after_step"]
    upper = ["loop_start", "before_step", "hypergradient", "after_backward", "after_step"]
    wanted = [
        ("run_start", None),
        *[(e, "low") for e in ("loop_start", *step)],
        *[(e, "low") for e in (*step, "loop_end")],
        *[(e, "top") for e in (*upper, "epoch_end")],
        ("validate", None),
        *[(e, "low") for e in ("loop_start", *step, "epoch_end")],
        ("validate", None),
        ("run_end", None),
    ]
    assert seen == wanted


@pytest.mark.parametrize("sized", [True, False])
def test_epoch_end_with_the_last_batch_where_there_is_a_length(sized):
    """Else with the first batch of the next pass."""
    items = [randn(2, seed=i) for i in range(3)]
    program = make({"data": items if sized else lambda: iter(items)})
    seen = []

    @program.on("epoch_end", level="low")
    def end(ctx):
        seen.append((ctx.step, ctx.epoch))

    run(program, 10)
    assert seen == [(s if sized else s + 1, e) for s, e in ((3, 1), (6, 2), (9, 3))]


@pytest.mark.parametrize("sized", [True, False])
def test_epoch_of_the_context_is_that_of_the_batch_and_then_counts_finished_passes(sized):
    items = [randn(2, seed=i) for i in range(3)]
    inside, before, after = [], [], []

    def low(m, batch, top, ctx):
        inside.append(ctx.epoch)
        return ((m.x - top.x - batch) ** 2).sum()

    program = make({"data": items if sized else lambda: iter(items)}, low_function=low)

    @program.on("before_step", level="low")
    def look(ctx):
        before.append(ctx.epoch)
        inside.clear()

    @program.on("after_backward", level="low")
    def check(ctx):
        assert inside[-1] == before[-1]

    program.on("after_step", level="low")(lambda ctx: after.append(ctx.epoch))
    run(program, 7)
    assert before == [0, 0, 0, 1, 1, 1, 2]
    assert after == ([0, 0, 1, 1, 1, 2, 2] if sized else before)


def test_loop_events_follow_inner_steps():
    program = make({"inner_steps": 3})
    starts, ends = [], []
    program.on("loop_start", level="low")(lambda ctx: starts.append((ctx.tick, ctx.step)))
    program.on("loop_end", level="low")(lambda ctx: ends.append((ctx.tick, ctx.step)))
    run(program, 9)
    assert starts == [(1, 0), (4, 3), (7, 6)]
    assert ends == [(3, 3), (6, 6), (9, 9)]


OFFERS = {
    "run_start": {"ctx"},
    "loop_start": {"ctx", "optimizer", "scheduler"},
    "before_step": {"ctx", "optimizer", "scheduler", "batch"},
    "epoch_end": {"ctx", "optimizer", "scheduler"},
    "loop_end": {"ctx", "optimizer", "scheduler"},
    "validate": {"ctx", "metrics"},
    "checkpoint": {"ctx", "path"},
    "run_end": {"ctx", "history"},
    **{
        event: {"ctx", "optimizer", "scheduler", "batch", "grads", "loss", "metrics"}
        for event in ("hypergradient", "after_backward", "after_step")
    },
}
NAMES = ("ctx", "optimizer", "scheduler", "batch", "grads", "loss", "metrics", "history", "path")


def taking(*names):
    """A hook with these arguments, that hands them on."""
    scope = {}
    items = ", ".join(f"{n!r}: {n}" for n in names)
    exec(f"def hook({', '.join(names)}): seen.append({{{items}}})", scope)
    seen = scope["seen"] = []
    return scope["hook"], seen


@pytest.mark.parametrize("event", EVENTS)
def test_each_event_offers_its_arguments(event, tmp_path):
    program = make()
    program.validate(lambda low: {"m": low.x.sum()})
    hook, seen = taking("low", "top", *sorted(OFFERS[event]))
    program.on(event)(hook)
    result = run(program, 4, out=tmp_path)
    assert seen
    for offered in seen:
        assert offered["low"] is program.module("low")
        assert offered["top"] is program.module("top")
    last = seen[-1]
    if event == "run_end":
        assert last["history"] is result.history
    if event == "checkpoint":
        assert last["path"] == tmp_path / "checkpoints" / "000000004"
    if event == "validate":
        assert last["metrics"] == result.history.validations[-1].metrics
    if event in LEVEL_EVENTS:
        level = last["ctx"].level
        params = last["optimizer"].param_groups[0]["params"]
        assert params[0] is program.module(level).x
        assert isinstance(last["scheduler"], StepLR) == (level == "top")
    if "grads" in OFFERS[event]:
        record = [r for r in result.history.steps if r.level == last["ctx"].level][-1]
        assert last["grads"]["x"] is program.module(last["ctx"].level).x.grad
        assert last["loss"] == record.loss
        assert isinstance(last["batch"], torch.Tensor)


@pytest.mark.parametrize("event", EVENTS)
def test_what_an_event_does_not_offer_is_refused_before_the_run(event):
    for name in set(NAMES) - OFFERS[event]:
        program = make()
        hook, seen = taking(name)
        program.on(event)(hook)
        with pytest.raises(BindingError, match=name):
            run(program, 1)
        assert seen == []
        assert program.module("low").x.tolist() == [1.0, 1.0]


def test_an_unknown_level_is_refused():
    program = make()
    program.on("after_step", level="lwo")(lambda: None)
    with pytest.raises(GraphError, match="'low'"):
        run(program, 1)


def test_values_at_the_moment_of_the_event():
    program = make()
    seen = {}

    @program.on("before_step", level="low")
    def before(low, batch, ctx):
        seen["before"] = low.x.detach().clone()
        seen["batch"], seen["step"] = batch, ctx.step

    @program.on("after_backward", level="low")
    def backward(low, grads, loss, metrics):
        assert torch.equal(low.x, seen["before"])
        seen["grad"], seen["loss"] = grads["x"].clone(), loss
        assert metrics["size"] == seen["batch"].norm()

    @program.on("after_step", level="low")
    def after(low, top, loss, ctx, batch):
        gap = seen["before"] - top.x - seen["batch"]
        assert torch.allclose(seen["grad"], 2 * gap)
        assert loss == seen["loss"] == pytest.approx((gap**2).sum().item())
        assert torch.allclose(low.x, seen["before"] - 0.1 * seen["grad"])
        assert ctx.step == seen["step"] + 1
        assert batch is seen["batch"]

    run(program, 3)


def test_level_and_every():
    program = make({"inner_steps": 2})
    seen = {"all": [], "low": [], "every": [], "top": []}
    program.on("after_step")(lambda ctx: seen["all"].append(ctx.level))
    program.on("after_step", level="low")(lambda ctx: seen["low"].append(ctx.step))
    program.on("after_step", every=2)(lambda ctx: seen["every"].append((ctx.level, ctx.step)))
    program.on("after_step", level="top", every=3)(lambda ctx: seen["top"].append(ctx.step))
    run(program, 6)
    assert seen["all"] == ["low", "low", "top"] * 3
    assert seen["low"] == [1, 2, 3, 4, 5, 6]
    assert seen["every"] == [("low", 2), ("low", 4), ("top", 2), ("low", 6)]
    assert seen["top"] == [3]


def test_hooks_of_one_event_are_called_as_declared():
    program, seen = make(), []
    for number in range(4):
        program.on("run_start")(lambda number=number: seen.append(number))
    run(program, 1)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("event", EVENTS)
def test_an_exception_says_where_it_was_raised(event, tmp_path):
    program = make()
    program.validate(lambda low: {"m": low.x.sum()})

    @program.on(event)
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        run(program, 4, out=tmp_path)
    (note,) = [n for n in caught.value.__notes__ if "raised in the hook" in n]
    level = {"hypergradient": "top", "checkpoint": None}.get(event, "low")
    where = "" if event in mlodeco.declare.registry.RUN_EVENTS else f"level {level!r}, step 1, "
    line = fail.__code__.co_firstlineno
    tick = {"run_start": 0, "run_end": 4, "checkpoint": 4, "epoch_end": 1}.get(event, 1)
    wanted = f"the hook 'fail' on {event!r} (test_hooks.py:{line}), {where}tick {tick}"
    if event == "epoch_end":
        wanted = wanted.replace("'low', step 1", "'top', step 1")
    assert note == f"raised in {wanted}"


def test_an_exception_in_a_loss_names_the_level():
    def low(m, batch, top):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        run(make(low_function=low), 1)
    assert "level 'low' (test_hooks.py" in caught.value.__notes__[0]


# ctx.log


def test_logged_metrics_are_in_the_records():
    """Those of a leaf, of an upper level, and of hooks; tensors as they were."""

    def low(m, batch, top, ctx):
        ctx.log(low_x=m.x.sum(), vector=m.x)
        return ((m.x - top.x) ** 2).sum()

    def top(m, batch, low, ctx):
        ctx.log(top_x=m.x.sum(), seen=low.x.sum().detach())
        return ((low.x - batch) ** 2).sum(), {"returned": 1}

    program = make(low_function=low, top_function=top)

    @program.on("after_step")
    def after(ctx, metrics):
        ctx.log(**{"after": ctx.step, f"had_{ctx.level}": float(f"{ctx.level}_x" in metrics)})

    history = run(program, 3).history
    first_low, first_top = history.of("low")[0].metrics, history.of("top")[0].metrics
    assert first_low["low_x"] == 2.0
    assert first_low["vector"].tolist() == [1.0, 1.0]
    assert not first_low["vector"].requires_grad
    assert first_low["after"] == 1
    assert first_low["had_low"] == 1.0
    assert first_top["top_x"] == 4.0
    assert first_top["seen"] == pytest.approx(2 - 2 * 0.1 * (-2.0), abs=1e-12)
    assert first_top["returned"] == 1
    assert first_top["had_top"] == 1.0
    assert [r.metrics["after"] for r in history.of("top")] == [1, 2, 3]
    assert "low_x" not in first_top
    assert "top_x" not in first_low


def test_log_is_mute_in_second_order_passes():
    """The lower level is called again by the upper one's hypergradient: its records stay."""
    calls = []

    def low(m, batch, top, ctx):
        calls.append(ctx)
        ctx.log(calls=len(calls))
        return ((m.x - top.x - batch) ** 2).sum()

    program = make(low_function=low)
    runner = Runner(program)
    runner.step()
    calls.clear()
    tick = runner.step()
    assert tick.steps[0].metrics["calls"] == 1
    assert len(calls) > 1
    assert all(ctx.logged == {} for ctx in calls[1:])
    assert "calls" not in tick.steps[1].metrics
    mlodeco.hypergradient("top", program=program)


# ctx.stop


@pytest.mark.parametrize("event", ["before_step", "after_step", "hypergradient", "validate"])
def test_stop_ends_the_run_after_the_tick(event):
    program = make()
    program.validate(lambda low: {"m": low.x.sum()})

    @program.on(event)
    def stop(ctx):
        if ctx.tick == 2:
            ctx.stop("enough")

    result = run(program, 10)
    assert result.ticks == 2
    assert result.stop_reason == "enough"
    assert [r.level for r in result.history.steps] == ["low", "top"] * 2


@pytest.mark.parametrize("level", ["low", "top"])
def test_a_loss_may_stop_the_run(level):
    def function(m, batch, ctx, **_):
        if ctx.tick == 3 and ctx.level == level:
            ctx.stop()
        return ((m.x - batch) ** 2).sum()

    def low(m, batch, top, ctx):
        return function(m, batch, ctx) + 0 * top.x.sum()

    def top(m, batch, low, ctx):
        return function(m, batch, ctx) + 0 * low.x.sum()

    result = run(make(low_function=low, top_function=top), 10)
    assert result.ticks == 3
    assert "stop" in result.stop_reason


def test_stop_at_the_start_runs_nothing():
    program = make()
    program.on("run_start")(lambda ctx: ctx.stop("never"))
    result = run(program, 5)
    assert (result.ticks, result.stop_reason, len(result.history)) == (0, "never", 0)


def test_a_run_that_was_stopped_can_go_on():
    program = make()
    program.on("after_step", level="top", every=3)(lambda ctx: ctx.stop())
    runner = Runner(program)
    assert runner.run(10).ticks == 3
    assert runner.run(1).ticks == 4


# gradients


@pytest.mark.parametrize("level", ["low", "top"])
def test_a_hook_may_change_gradients_before_they_are_clipped(level):
    """The step is made with the changed gradient, whose norm is recorded and clipped."""
    changed = make({"clip_norm": 0.5}, {"clip_norm": 0.5})
    clipped = {}

    @changed.on("after_backward", level=level)
    def double(grads):
        grads["x"].mul_(0).add_(3.0)

    @changed.on("after_step", level=level)
    def look(low, top):
        clipped["x"] = {"low": low, "top": top}[level].x.grad.clone()

    record = next(r for r in run(changed, 1).history.steps if r.level == level)
    assert record.grad_norm == pytest.approx(18**0.5)
    assert clipped["x"].tolist() == pytest.approx([0.5 / 2**0.5] * 2, rel=1e-6)
    if level == "low":
        x = changed.module("low").x.tolist()
        assert x == pytest.approx([1 - 0.1 * 0.5 / 2**0.5] * 2, rel=1e-6)


def test_the_hypergradient_hook_comes_before_after_backward():
    program, order = make(), []

    @program.on("hypergradient")
    def first(grads):
        order.append(grads["x"].clone())
        grads["x"].add_(1.0)

    @program.on("after_backward", level="top")
    def second(grads):
        order.append(grads["x"].clone())

    run(program, 1)
    assert torch.equal(order[0] + 1.0, order[1])


def test_a_hypergradient_changed_by_a_hook_is_the_one_that_is_stepped():
    """By hand: the low level at w = lam, L = |w - b|^2, dw/dlam = 1, and the hook halves it."""
    program = Program()
    b = torch.tensor([3.0, -1.0], dtype=torch.float64)

    @program.level("low", module=one(1.0), optimizer=partial(SGD, lr=0.5))
    def low(m, top):
        return ((m.x - top.x) ** 2).sum()

    @program.level(
        "top", lower=["low"], module=one(2.0), optimizer=partial(SGD, lr=0.1), hypergrad="dense"
    )
    def top(m, low):
        return ((low.x - b) ** 2).sum()

    @program.on("hypergradient", level="top")
    def halve(grads):
        grads["x"].mul_(0.5)

    @program.on("after_backward", level="top")
    def shift(grads):
        grads["x"].add_(1.0)

    run(program, 1)
    lam = torch.full((2,), 2.0, dtype=torch.float64)  # the low level's step has led it there
    wanted = lam - 0.1 * (0.5 * 2 * (lam - b) + 1.0)
    assert torch.allclose(program.module("top").x.detach(), wanted, rtol=1e-12)


def three(**low):
    """Three levels that all have inner loops, turns of several steps, micro-batches and data."""
    program = make(
        {
            "inner_steps": 2,
            "accumulate": 2,
            "warmup": 1,
            "data": [randn(2, seed=i) for i in range(5)],
            **low,
        },
        {"repeat": 2, "inner_steps": 2},
    )

    @program.level(
        "crown",
        lower=["top"],
        hypergrad="identity",
        module=one(),
        optimizer=partial(SGD, lr=0.1),
        data=[randn(2, seed=8)] * 2,
    )
    def crown(m, batch, top):
        return ((top.x - m.x - batch) ** 2).sum()

    return program


STEP = ("before_step", "after_backward", "after_step")
UPPER = ("before_step", "hypergradient", "after_backward", "after_step")


def test_the_whole_sequence_of_three_levels():
    """Written by hand; a warmup step belongs to no loop, a pass may end inside one."""
    program = three()
    seen = recorded(program)
    with pytest.warns(mlodeco.errors.GraphWarning, match="'crown'"):
        run(program, 4)
    top = [
        ("loop_start", "top"),
        *[(e, "top") for e in (*UPPER, "epoch_end")],
        *[(e, "top") for e in (*UPPER, "epoch_end", "loop_end")],
    ]
    crown = [(e, "crown") for e in ("loop_start", *UPPER)]
    assert seen == [
        ("run_start", None),
        # tick 1: warmup, batches 1 and 2
        *[(e, "low") for e in STEP],
        # tick 2: 3 and 4
        *[(e, "low") for e in ("loop_start", *STEP)],
        ("validate", None),
        # tick 3: 5, which ends the pass, and 1
        *[(e, "low") for e in (*STEP, "epoch_end", "loop_end")],
        *top,
        *crown,
        # tick 4: 2 and 3
        *[(e, "low") for e in ("loop_start", *STEP)],
        ("validate", None),
        ("run_end", None),
    ]


def test_of_the_step_that_rollback_repeats_hooks_hear_when_its_gradients_are_there():
    """Else they could not act on it: changed gradients are those of the step that stays."""
    program = make({"rollback": True, "inner_steps": 2})
    seen = recorded(program)
    calls = []

    @program.on("after_backward", level="low")
    def zero(low, grads, ctx):
        calls.append((ctx.tick, ctx.step))
        grads["x"].zero_()

    run(program, 2)
    ended = seen.index(("loop_end", "low"))
    behind = [event for event in seen[ended:] if event[1] == "low"]
    assert behind == [("loop_end", "low"), ("after_backward", "low")]
    assert calls == [(1, 0), (2, 1), (2, 1)]
    assert program.module("low").x.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("where", ["loss", "hook"])
def test_a_skipped_step_has_no_gradients(where):
    def low(m, batch, top, ctx):
        factor = float("inf") if where == "loss" and ctx.tick == 2 else 1.0
        return ((m.x - top.x - batch) ** 2).sum() * factor

    program, seen = make(low_function=low), []
    program.on("before_step", level="low")(lambda ctx: seen.append(("before", ctx.tick)))

    @program.on("after_backward", level="low")
    def spoil(ctx, grads):
        seen.append(("backward", ctx.tick))
        if where == "hook" and ctx.tick == 2:
            grads["x"].fill_(float("nan"))

    @program.on("after_step", level="low")
    def after(ctx, grads):
        seen.append(("after", ctx.tick, ctx.skipped, sorted(grads)))

    with pytest.warns(mlodeco.errors.NonFiniteWarning):
        run(program, 3, nonfinite="skip")
    second = [] if where == "loss" else [("backward", 2)]
    assert seen == [
        *[("before", 1), ("backward", 1), ("after", 1, False, ["x"])],
        *[("before", 2), *second, ("after", 2, True, [])],
        *[("before", 3), ("backward", 3), ("after", 3, False, ["x"])],
    ]


# sources


def test_a_hook_of_a_level_takes_the_items_of_the_sources_that_it_reads():
    program, seen = make(low_function=lambda m, top, task: ((m.x - top.x - task) ** 2).sum()), []
    program.source("task")([1.0, 2.0, 3.0])
    for event in ("before_step", "after_backward", "after_step"):
        program.on(event, level="low")(lambda task, event=event: seen.append((event, task)))
    with pytest.warns(mlodeco.errors.GraphWarning, match="takes nothing of it"):
        run(program, 2)
    assert seen == [(event, item) for item in (1.0, 2.0) for event in STEP]


@pytest.mark.parametrize(
    ("event", "level"), [("after_step", None), ("after_step", "top"), ("loop_end", "low")]
)
def test_a_source_that_a_hook_has_no_item_of_is_refused(event, level):
    program = make(low_function=lambda m, top, task, batch: (m.x - top.x - task - batch).norm())
    program.source("task")([1.0, 2.0])
    program.on(event, level)(lambda task: None)
    with pytest.raises(BindingError, match="name one level that reads the source"):
        run(program, 1)


# what may be a hook


class Counter:
    """Hooks as methods, and as an object that is called."""

    def __init__(self):
        self.seen = []

    def count(self, ctx):
        self.seen.append(ctx.step)

    def __call__(self, ctx):
        self.seen.append(-ctx.step)

    @staticmethod
    def free(ctx, seen):
        seen.append(10 * ctx.step)


def test_methods_partials_lambdas_and_callable_objects_are_hooks():
    program, counter = make(), Counter()
    hooks = (
        counter.count,
        counter,
        partial(Counter.free, seen=counter.seen),
        lambda ctx: counter.seen.append(100 * ctx.step),
    )
    for hook in hooks:
        assert program.on("after_step", level="low")(hook) is hook
    run(program, 2)
    assert counter.seen == [1, -1, 10, 100, 2, -2, 20, 200]


async def later(ctx):
    """A coroutine, which nobody would await."""


def one_by_one(ctx):
    yield ctx


def by_position(ctx, /):
    """What is given by name."""


class Holder:
    def method(self, ctx):
        """A method without its object."""


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        (later, "an async function"),
        (one_by_one, "a generator function"),
        (by_position, "positional-only"),
        (Holder.method, "decorate the bound method"),
        (Holder, "decorates the class"),
        (classmethod(len), "not a function"),
        (torch.nn.Linear(1, 1), "decorates a module"),
        (3, "not a function"),
    ],
)
def test_what_cannot_be_a_hook_is_refused_at_once(hook, text):
    program = Program()
    with pytest.raises(DeclarationError, match=text):
        program.on("after_step")(hook)
    assert program.hooks == []
