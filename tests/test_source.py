"""Sources: which item each level's step sees, looks that use nothing up, and every mistake."""

from __future__ import annotations

import functools
import inspect
import itertools
import random
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import (
    BindingError,
    DataError,
    DeclarationError,
    GraphWarning,
    RunError,
)
from tests.problems import generator, randn


def one(value=0.0):
    return {"x": torch.tensor(value, dtype=torch.float64)}


def run(program, steps=1, **options):
    return mlodeco.run(steps, program=program, progress="off", **options)


def counting():
    """1.0, 2.0, ..."""
    yield from map(float, itertools.count(1))


def linear(own, task):
    """Its gradient is the item, so that a record's gradient norm says which one was seen."""
    return own.x * task


def program_of(refresh, levels, value=counting):
    """Levels that all read the source ``task``, but those with ``idle=True``."""
    program = Program()
    program.source("task", refresh)(value)
    for name, options in levels.items():
        chosen = {"module": one(), "optimizer": partial(SGD, lr=1.0), **options}
        if chosen.get("lower"):
            chosen["hypergrad"] = None
        idle = chosen.pop("idle", False)
        program.level(name, **chosen)((lambda own: own.x * 1.0) if idle else linear)
    return program


def seen(program, ticks):
    history = run(program, ticks).history
    return {
        name: [record.grad_norm for record in history.of(name)] for name in program.graph().levels
    }


TOP = {"lower": ["low"]}
SEQUENCES = {
    "one_level": ("step", {"low": {}}, 3, {"low": [1, 2, 3]}),
    "one_level_loop": ("loop", {"low": {}}, 3, {"low": [1, 2, 3]}),
    "step": ("step", {"low": {}, "top": TOP}, 3, {"low": [1, 3, 5], "top": [2, 4, 6]}),
    "loop": ("loop", {"low": {}, "top": TOP}, 3, {"low": [1, 2, 3], "top": [1, 2, 3]}),
    "step_inner": (
        "step",
        {"low": {"inner_steps": 2}, "top": TOP},
        5,
        {"low": [1, 2, 4, 5, 7], "top": [3, 6]},
    ),
    "loop_inner": (
        "loop",
        {"low": {"inner_steps": 2}, "top": TOP},
        5,
        {"low": [1, 1, 2, 2, 3], "top": [1, 2]},
    ),
    "step_accumulate": (
        "step",
        {"low": {"accumulate": 2}, "top": {**TOP, "accumulate": 3}},
        2,
        {"low": [1.5, 6.5], "top": [4, 9]},
    ),
    "loop_accumulate": (
        "loop",
        {"low": {"accumulate": 2}, "top": {**TOP, "accumulate": 3}},
        2,
        {"low": [1, 2], "top": [1, 2]},
    ),
    "step_warmup": (
        "step",
        {"low": {"warmup": 2}, "top": TOP},
        4,
        {"low": [1, 2, 3, 5], "top": [4, 6]},
    ),
    "loop_warmup": (
        "loop",
        {"low": {"warmup": 2}, "top": TOP},
        4,
        {"low": [1, 1, 1, 2], "top": [1, 2]},
    ),
    "step_repeat": (
        "step",
        {"low": {}, "top": {**TOP, "repeat": 2}},
        2,
        {"low": [1, 4], "top": [2, 3, 5, 6]},
    ),
    "loop_repeat": (
        "loop",
        {"low": {}, "top": {**TOP, "repeat": 2}},
        2,
        {"low": [1, 2], "top": [1, 1, 2, 2]},
    ),
    "loop_read_by_the_top_alone": (
        "loop",
        {"low": {"idle": True, "inner_steps": 2}, "top": TOP},
        4,
        {"low": [1, 1, 1, 1], "top": [1, 2]},
    ),
    "step_three_levels": (
        "step",
        {"low": {}, "mid": {**TOP, "inner_steps": 2}, "top": {"lower": ["mid"]}},
        4,
        {"low": [1, 3, 6, 8], "mid": [2, 4, 7, 9], "top": [5, 10]},
    ),
    "loop_three_levels": (
        "loop",
        {"low": {}, "mid": {**TOP, "inner_steps": 2}, "top": {"lower": ["mid"]}},
        5,
        {"low": [1, 1, 2, 2, 3], "mid": [1, 1, 2, 2, 3], "top": [1, 2]},
    ),
    "loop_of_the_two_lower_ones": (
        "loop",
        {"low": {}, "mid": {**TOP, "inner_steps": 2}, "top": {"lower": ["mid"], "idle": True}},
        3,
        {"low": [1, 2, 3], "mid": [1, 2, 3], "top": [1]},
    ),
    "loop_past_a_level_that_does_not_read": (
        "loop",
        {"low": {}, "mid": {**TOP, "inner_steps": 2, "idle": True}, "top": {"lower": ["mid"]}},
        4,
        {"low": [1, 1, 2, 2], "mid": [1, 1, 1, 1], "top": [1, 2]},
    ),
    "loop_until_all_of_several_uppers": (
        "loop",
        {
            "low": {},
            "slow": {"inner_steps": 3},
            "left": {"lower": ["low"]},
            "right": {"lower": ["slow"]},
        },
        4,
        {"low": [1, 1, 1, 2], "slow": [1, 1, 1, 2], "left": [1, 1, 1, 2], "right": [1]},
    ),
    "loop_two_uppers_of_one_level": (
        "loop",
        {"low": {}, "left": {"lower": ["low"]}, "right": {"lower": ["low"]}},
        2,
        {"low": [1, 2], "left": [1, 2], "right": [1, 2]},
    ),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_items_that_each_step_sees(case):
    refresh, levels, ticks, expected = SEQUENCES[case]
    found = seen(program_of(refresh, levels), ticks)
    assert list(found) == list(expected)
    for name, items in expected.items():
        assert found[name] == pytest.approx(items), name


@pytest.mark.parametrize(
    ("refresh", "sums"), [("step", (-2.0, -7.0)), ("loop", (-1.0, -3.0))], ids=["step", "loop"]
)
def test_rollback_repeats_the_step_on_the_same_item(refresh, sums):
    """Of the steps of each loop only the last remains."""
    low = {"inner_steps": 2, "rollback": True}
    program = program_of(refresh, {"low": low, "top": TOP})
    runner = Runner(program)
    for total in sums:
        runner.run(2)
        assert program.module("low").x.item() == total


def test_rollback_draws_nothing():
    low = {"inner_steps": 2, "rollback": True}
    found = seen(program_of("step", {"low": low, "top": TOP}), 4)
    assert found == {"low": [1, 2, 4, 5], "top": [3, 6]}


# what a source may be


class Counter:
    """An iterator that can say where it is."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return float(self.at)

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class NextOnly:
    def __init__(self, items):
        self.items = list(items)

    def __next__(self):
        if not self.items:
            raise StopIteration
        return self.items.pop(0)


class ByIndex:
    def __getitem__(self, index):
        return [1.0, 2.0][index]


class Callable:
    def __call__(self):
        yield from (1.0, 2.0)


def two():
    yield 1.0
    yield 2.0


def upto(number):
    yield from map(float, range(1, number + 1))


RESTARTING = {
    "generator_function": two,
    "function_of_an_iterator": lambda: iter([1.0, 2.0]),
    "partial": partial(upto, 2),
    "callable_object": Callable(),
    "list": [1.0, 2.0],
    "by_index": ByIndex(),
    "loader": DataLoader([1.0, 2.0], batch_size=None),
}


@pytest.mark.parametrize("form", RESTARTING)
def test_a_source_that_ends_begins_again(form):
    program = program_of("step", {"low": {}}, RESTARTING[form])
    assert seen(program, 5)["low"] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize("value", [counting(), Counter(), NextOnly([1.0, 2.0, 3.0])])
def test_an_iterator_goes_on_in_the_next_run(value):
    program = program_of("step", {"low": {}}, value)
    assert seen(program, 2)["low"] == [1, 2]
    assert seen(program, 1)["low"] == [3]


def test_a_generator_function_begins_again_in_the_next_run_and_goes_on_in_the_same():
    program = program_of("step", {"low": {}})
    runner = Runner(program)
    runner.run(2)
    runner.run(1)
    assert [record.grad_norm for record in runner.history.steps] == [1, 2, 3]
    assert seen(program, 1)["low"] == [1]


def test_an_iterator_at_its_end_is_refused():
    program = program_of("step", {"low": {}}, iter([1.0, 2.0]))
    runner = Runner(program)
    runner.run(2)
    for _ in range(2):
        with pytest.raises(DataError, match="at its end") as caught:
            runner.step()
        assert caught.value.source == "task"
        assert "function that makes a new iterator" in caught.value.remedy
    assert program.module("low").x.item() == -3.0


def empty():
    return
    yield


@pytest.mark.parametrize("value", [empty, [], lambda: iter(())])
def test_a_source_without_items_is_refused(value):
    with pytest.raises(DataError, match="empty") as caught:
        run(program_of("step", {"low": {}}, value))
    assert caught.value.source == "task"
    assert "test_source.py:" in caught.value.site


def test_a_pass_that_is_empty_later_is_refused():
    passes = iter([[1.0, 2.0], []])
    program = program_of("step", {"low": {}}, lambda: iter(next(passes)))
    with pytest.raises(DataError, match="pass over it gave no item"):
        run(program, 3)


@pytest.mark.parametrize("made", [1.0, None, [1.0], torch.ones(3)])
def test_a_function_that_returns_no_iterator_is_refused(made):
    def task():
        return made

    with pytest.raises(DataError, match=type(made).__name__) as caught:
        run(program_of("step", {"low": {}}, task))
    assert "yield the items" in caught.value.remedy


# decorating


def test_returns_what_it_was_given():
    def task():
        yield 1.0

    items, iterator = [1.0], iter([1.0])
    program = Program()
    assert program.source(task) is task
    assert program.source()(two) is two
    assert program.source("other")(task) is task
    assert program.source("items", refresh="loop")(items) is items
    assert program.source("iterator")(iterator) is iterator
    assert program.source(counting, refresh="loop") is counting
    assert program.source()(partial(upto, 3)).func is upto
    names = ["task", "two", "other", "items", "iterator", "counting", "upto"]
    assert list(program.sources) == names
    assert program.sources["counting"].refresh == "loop"


def test_belongs_to_the_current_program():
    with Program() as program:

        @mlodeco.source
        def first():
            yield 1.0

        @mlodeco.source(refresh="loop")
        def second():
            yield 1.0

    assert list(program.sources) == ["first", "second"]
    shown = inspect.signature(mlodeco.source).parameters
    assert list(shown) == ["name", "refresh", "unknown"]


def test_an_argument_by_another_name():
    program = Program()
    program.source("task")(counting)

    @program.level(
        "low", module=one(), optimizer=partial(SGD, lr=1.0), reads={"number": "task", "up": "top"}
    )
    def low(own, number, up):
        return own.x * number + 0 * up.x

    @program.level("top", lower=["low"], module=one(), optimizer=partial(SGD, lr=1.0))
    def top(own, low):
        return (own.x - low.x) ** 2

    assert seen(program, 2)["low"] == [1, 2]
    assert program.graph().reads == {"low": ("top",), "top": ("low",)}


def test_with_batch_data_fields_context_and_several_sources():
    program, records = Program(), []
    program.source("task")(counting)
    program.source("noise", "loop")(counting)

    @program.level(
        "low",
        module=one(),
        optimizer=partial(SGD, lr=1.0),
        data=[(10.0, 20.0), (30.0, 40.0)],
        fields=("a", "b"),
        accumulate=2,
    )
    def low(noise, low, b, task, ctx, a, plain=0.5):
        ctx.log(last=task)
        records.append((a, b, task, noise, plain))
        return low.x * task

    runner = Runner(program)
    runner.step()
    records.clear()
    runner.step()
    assert records == [(10.0, 20.0, 3.0, 2.0, 0.5), (30.0, 40.0, 4.0, 2.0, 0.5)]
    assert runner.history.steps[-1].metrics == {"last": 4.0}


def test_hooks_get_the_batch_as_it_was():
    program, batches = Program(), []
    program.source("task")(counting)
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), data=[5.0])(
        lambda own, task, batch: own.x * task * batch
    )
    for event in ("before_step", "after_backward", "after_step"):
        program.on(event)(lambda batch: batches.append(batch))
    run(program)
    assert batches == [5.0] * 3


def test_a_loss_may_take_an_item_apart():
    program = Program()
    program.source("task", "loop")([{"x": torch.ones(()), "y": torch.ones(())}])

    @program.level("low", module=one(), optimizer=partial(SGD, lr=0.1), inner_steps=2)
    def low(own, task):
        return (own.x * task.pop("x") - task.pop("y")) ** 2

    @program.level("top", lower=["low"], module=one(), optimizer=partial(SGD, lr=0.1))
    def top(own, low, task):
        return (own.x - low.x * task.pop("x")) ** 2

    with pytest.warns(GraphWarning, match="by no path"):
        run(program, 4)


# sources that read levels


def rollout(module=None):
    """A policy and a source that runs it."""
    program, log = Program(), []

    @program.source
    def states(policy, ctx_free=True):
        while True:
            log.append((torch.is_grad_enabled(), policy.training))
            policy.eval()
            yield policy(torch.ones(1, 1, dtype=torch.float64))

    @program.level("policy", module=module or policy_module(), optimizer=partial(SGD, lr=0.1))
    def loss(policy, states):
        return ((policy[0].weight - 1) ** 2).sum() + 0 * states.sum()

    return program, log


def policy_module():
    linear = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(linear.weight, 3.0)
    return nn.Sequential(linear)


def test_a_source_sees_levels_at_their_current_values():
    program, log = rollout()
    runner = Runner(program)
    value = 3.0
    for _ in range(4):
        runner.step()
        (drawn,) = program.built.levels["policy"].last_batches
        assert drawn.sources["states"].item() == pytest.approx(value)
        assert not drawn.sources["states"].requires_grad
        assert program.module("policy").training
        value -= 0.1 * 2 * (value - 1)
    assert log == [(False, True)] * 4


def test_reads_of_a_source_make_no_edges():
    program = Program()

    @program.source
    def task(top):
        while True:
            yield top.x.clone()

    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0))(
        lambda own, task: (own.x - task) ** 2
    )
    program.level("top", lower=["low"], module=one(2.0), optimizer=partial(SGD, lr=1.0))(
        lambda own, low: (low.x - own.x) ** 2
    )
    graph = program.graph
    with pytest.warns(GraphWarning, match="by no path"):
        edges = [(edge.source, edge.target) for edge in graph().edges]
    assert edges == [("low", "top")]
    run(program)
    (drawn,) = program.built.levels["low"].last_batches
    assert drawn.sources["task"].item() == 2.0
    assert drawn.sources["task"].grad_fn is None


# few-shot tasks


def few_shot(tasks, inner_steps=1):
    program = Program()
    program.source("task", refresh="loop")(tasks)

    @program.level("adapted", module=one(), optimizer=partial(SGD, lr=0.5), inner_steps=inner_steps)
    def adapt(adapted, task, start):
        s = task["support"]
        return (adapted.x - start.x * s) ** 2 / 2

    @program.level(
        "start",
        lower=["adapted"],
        module=one(1.0),
        optimizer=partial(SGD, lr=0.1),
        hypergrad="dense",
    )
    def meta(start, task, adapted):
        return (adapted.x - task["query"]) ** 2 / 2

    return program


def tasks():
    for number in itertools.count(1):
        yield {"support": torch.tensor(float(number)), "query": torch.tensor(10.0 * number)}


def test_support_and_query_belong_to_one_task():
    """The response of w = s * start to start is s, so the hypergradient is (w - q) * s."""
    program = few_shot(tasks, inner_steps=3)
    runner = Runner(program)
    start, w = 1.0, 0.0
    for number in (1, 2, 3):
        for _ in range(3):
            runner.step()
            w -= 0.5 * (w - start * number)
        start -= 0.1 * (w - 10.0 * number) * number
        assert program.module("adapted").x.item() == pytest.approx(w)
        assert program.module("start").x.item() == pytest.approx(start)


def hyper(program, level="start", **options):
    return mlodeco.hypergradient(level, program=program, **options)["x"].item()


def test_hypergradient_takes_the_item_given_for_all_levels():
    program = few_shot(tasks)
    item = {"support": torch.tensor(3.0), "query": torch.tensor(7.0)}
    assert hyper(program, batches={"task": item}) == pytest.approx(-7 * 3)
    run(program, 2)
    w = program.module("adapted").x.item()
    assert hyper(program, batches={"task": item}) == pytest.approx((w - 7) * 3)


def test_hypergradient_takes_a_fresh_item_before_and_the_last_after_a_step():
    program = few_shot(tasks, inner_steps=2)
    assert hyper(program) == pytest.approx(-10)
    assert hyper(program) == pytest.approx(-10)
    runner = Runner(program)
    for number in (1, 1, 2, 2, 3):
        runner.step()
        w = program.module("adapted").x.item()
        assert hyper(program) == pytest.approx((w - 10 * number) * number)
    program.reset()
    w = program.module("adapted").x.item()
    assert hyper(program) == pytest.approx((w - 10) * 1)


def stepwise(value=counting, **low):
    """The hypergradient of the upper level is its item minus twice that of the lower one."""
    program = Program()
    program.source("task")(value)

    @program.level("low", module=one(), optimizer=partial(SGD, lr=0.0), **low)
    def lower(own, task, top):
        return own.x**2 / 2 + own.x * top.x * task

    @program.level(
        "top",
        lower=["low"],
        module=one(),
        optimizer=partial(SGD, lr=0.0),
        hypergrad="dense",
    )
    def upper(own, task, low):
        return own.x * task + 2 * low.x

    return program


def test_hypergradient_takes_the_items_of_each_levels_last_step():
    program = stepwise()
    assert hyper(program, "top") == 2 - 2 * 1
    runner = Runner(program)
    for tick in range(3):
        runner.step()
        assert hyper(program, "top") == (2 * tick + 2) - 2 * (2 * tick + 1)
    assert runner.history.of("top")[-1].grad_norm == abs(6 - 2 * 5)
    assert hyper(program, "top", batches={"task": 7.0}) == 7 - 2 * 7
    assert hyper(program, "top", hypergrad=None) == 6


def test_hypergradient_takes_all_micro_batches():
    program = stepwise(accumulate=2)
    assert hyper(program, "top") == 3 - 2 * 1.5
    run(program, 2)
    assert hyper(program, "top") == 6 - 2 * 4.5
    assert hyper(program, "top", batches={"task": 7.0}) == 7 - 2 * 7


def test_a_level_that_has_not_stepped_takes_a_fresh_item():
    program = stepwise(warmup=5)
    run(program, 3)
    assert hyper(program, "top") == 1 - 2 * 3


def test_batches_for_levels_and_sources_together():
    program = Program()
    program.source("task")(counting)
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), data=[2.0])(
        lambda own, batch, task: own.x * batch * task
    )
    assert hyper(program, "low") == 2
    assert hyper(program, "low", batches={"low": 5.0}) == 5
    assert hyper(program, "low", batches={"task": 7.0}) == 14
    assert hyper(program, "low", batches={"low": 5.0, "task": 7.0}) == 35


def test_three_levels():
    """One item through a chain; hypergradients with and without it given."""
    program = Program()
    program.source("task", "loop")(counting)
    options = {"optimizer": partial(SGD, lr=0.0)}
    program.level("low", module=one(), **options)(
        lambda own, task, top: own.x**2 / 2 - own.x * top.x * task
    )
    program.level("mid", lower=["low"], module=one(), hypergrad="dense", **options)(
        lambda own, task, low: own.x**2 / 2 - own.x * low.x * task
    )
    program.level("top", lower=["mid"], module=one(), hypergrad="dense", **options)(
        lambda own, task, mid: task * mid.x + 0 * own.x
    )
    for item in (1.0, 2.0, 3.0):
        assert hyper(program, "top", batches={"task": item}) == pytest.approx(item**3)
    runner = Runner(program)
    for tick in (1, 2, 3):
        runner.step()
        assert hyper(program, "top") == pytest.approx(tick**3)


# nothing changes by a look


def streams():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(numpy.random.get_state()),
    )


GENERATOR, NUMPY, PYTHON = generator(3), numpy.random.default_rng(3), random.Random(3)
LEGACY = numpy.random.RandomState(3)


def own_states():
    return (
        GENERATOR.get_state().tolist(),
        str(NUMPY.bit_generator.state),
        PYTHON.getstate(),
        str(LEGACY.get_state()),
    )


def draw_from_globals():
    total = torch.rand((), generator=GENERATOR).item() + NUMPY.random()
    return total + PYTHON.random() + LEGACY.rand()


def noisy():
    while True:
        yield draw_from_globals() + torch.rand(()).item() + random.random() + numpy.random.rand()


def closure():
    own, other = GENERATOR, {"numpy": NUMPY, "legacy": LEGACY}
    given = PYTHON

    def task(rng=given):
        while True:
            drawn = other["numpy"].random() + other["legacy"].rand() + rng.random()
            yield torch.rand((), generator=own).item() + drawn

    return task


class Tasks:
    def __init__(self):
        self.generator, self.rng, self.python = GENERATOR, NUMPY, PYTHON

    def __iter__(self):
        while True:
            drawn = torch.rand((), generator=self.generator).item() + self.rng.random()
            yield drawn + self.python.random()

    def tasks(self):
        yield from self


def looped_loader():
    data = TensorDataset(torch.arange(6.0))
    loader = DataLoader(data, batch_size=2, shuffle=True, generator=GENERATOR)

    def task():
        for (batch,) in loader:
            yield batch.sum().item()

    return task


PURE = {
    "globals": lambda: noisy,
    "closure": closure,
    "partial": lambda: partial(closure(), rng=PYTHON),
    "object": Tasks,
    "method": lambda: Tasks().tasks,
    "loader_in_a_closure": looped_loader,
    "counter": Counter,
}


@pytest.mark.parametrize("kind", PURE)
@pytest.mark.parametrize("refresh", ["step", "loop"])
def test_a_look_uses_nothing_up(kind, refresh):
    value = PURE[kind]()
    program = Program()
    program.source("task", refresh)(value)
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0))(linear)
    program.module("low")
    before, own = streams(), own_states()
    first = hyper(program, "low")
    assert first == hyper(program, "low")
    assert streams() == before
    assert own_states() == own
    assert run(program).history.steps[0].grad_norm == pytest.approx(first)


def test_a_look_keeps_modules_and_closes_the_generator():
    program, log = Program(), []

    @program.source
    def task(policy):
        try:
            while True:
                log.append("drawn")
                policy.eval()
                policy.train()
                yield policy(torch.ones(4, 1, dtype=torch.float64) * len(log)).sum()
        finally:
            log.append("closed")
            torch.rand(3)

    module = nn.Sequential(nn.BatchNorm1d(1, dtype=torch.float64), *policy_module()).eval()
    program.level("policy", module=module)(
        lambda policy, task: policy(torch.ones(2, 1).double()).sum() * (1 + task)
    )
    state = {name: value.clone() for name, value in module.state_dict().items()}
    before = streams()
    for _ in range(2):
        mlodeco.hypergradient("policy", program=program)
    assert log == ["drawn", "closed"] * 2
    assert streams() == before
    assert not any(child.training for child in module.modules())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_look_changes_nothing_when_it_raises():
    class Broken(Counter):
        def __next__(self):
            torch.rand(3), GENERATOR.get_state(), super().__next__()
            raise ValueError("mine")

    value = Broken()
    program = program_of("step", {"low": {}}, value)
    program.module("low")
    before = streams()
    with pytest.raises(ValueError, match="mine") as caught:
        hyper(program, "low")
    assert any("source 'task' (test_source.py:" in note for note in caught.value.__notes__)
    assert streams() == before
    assert value.at == 0


def test_an_iterator_with_state_is_put_back_to_where_it_was():
    value = Counter()
    program = program_of("step", {"low": {}, "top": {**TOP, "accumulate": 2}}, value)
    value.at = 4
    assert hyper(program, "low") == 5
    assert hyper(program, "top") == 5.5
    assert value.at == 4
    assert seen(program, 1) == {"low": [5], "top": [6.5]}
    assert value.at == 7


@pytest.mark.parametrize("value", [iter([1.0, 2.0]), counting(), NextOnly([1.0, 2.0])])
def test_a_bare_iterator_cannot_be_looked_at(value):
    program = program_of("step", {"low": {}}, value)
    with pytest.raises(RunError, match="items come once") as caught:
        hyper(program, "low")
    assert caught.value.source == "task"
    assert "batches={'task': item}" in caught.value.remedy
    assert "test_source.py:" in caught.value.site
    assert hyper(program, "low", batches={"task": 3.0}) == 3
    assert seen(program, 1)["low"] == [1]
    assert hyper(program, "low") == 1


def test_a_source_that_no_visited_level_reads_is_not_looked_at():
    program = Program()
    program.source("task")(iter([1.0]))
    program.level("low", module=one())(lambda own, top, task: (own.x - top.x) ** 2 * task)
    program.level("top", lower=["low"], module=one())(lambda own, low: (low.x - 1) ** 2 + own.x)
    assert hyper(program, "top", hypergrad=None) == 1


# a source that raises


def failing(at):
    def task():
        for number in itertools.count(1):
            if number == at[0]:
                at[0] = 0
                torch.rand(1)
                raise ValueError("mine")
            yield float(number)

    return task


def test_a_source_that_raises_leaves_the_step_as_it_was():
    program = Program()
    program.source("first")(counting)
    program.source("task")(failing([3]))
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), data=[10.0, 20.0, 30.0])(
        lambda own, first, batch, task: own.x * (100 * task + batch + first)
    )
    runner = Runner(program)
    runner.run(2)
    x, before = program.module("low").x, streams()
    value, grad = x.item(), x.grad.clone()
    with pytest.raises(ValueError, match="mine") as caught:
        runner.step()
    notes = "\n".join(caught.value.__notes__)
    assert "raised in the source 'task' (test_source.py:" in notes
    assert "level 'low' (test_source.py:" in notes
    assert "tick 3" in notes
    assert streams() == before
    assert (x.item(), torch.equal(x.grad, grad), runner.tick) == (value, True, 2)
    assert hyper(program, "low") == 222
    runner.step()
    assert runner.history.steps[-1].grad_norm == 100 * 1 + 30 + 3


def test_items_drawn_before_a_source_raises_are_kept():
    program = program_of("step", {"low": {"accumulate": 3}}, failing([6]))
    runner = Runner(program)
    runner.step()
    with pytest.raises(ValueError, match="mine"):
        runner.step()
    runner.step()
    means = [record.grad_norm for record in runner.history.steps]
    assert means == pytest.approx([2, (4 + 5 + 1) / 3])


@pytest.mark.parametrize("refresh", ["step", "loop"])
def test_items_are_kept_when_the_data_raise(refresh):
    calls = []

    class Broken:
        def __len__(self):
            return 9

        def __getitem__(self, index):
            calls.append(index)
            if len(calls) == 2:
                raise ValueError("mine")
            return 0.0

    program = Program()
    program.source("task", refresh)(counting)
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), data=Broken())(
        lambda own, batch, task: own.x * (task + batch)
    )
    runner = Runner(program)
    runner.step()
    with pytest.raises(ValueError, match="mine"):
        runner.step()
    runner.step()
    assert [record.grad_norm for record in runner.history.steps] == [1, 2]


def test_an_item_of_a_loop_survives_a_step_that_raises():
    program = program_of("loop", {"low": {}, "top": TOP})
    steps = []

    @program.on("before_step", level="top")
    def fail_once():
        steps.append(0)
        if len(steps) == 2:
            raise ValueError("mine")

    runner = Runner(program)
    runner.step()
    with pytest.raises(ValueError, match="mine"):
        runner.step()
    runner.step()
    assert [r.grad_norm for r in runner.history.of("low")] == [1, 2]
    assert [r.grad_norm for r in runner.history.of("top")] == [1, 2]


# reproducible runs


@pytest.mark.parametrize("refresh", ["step", "loop"])
def test_the_seed_determines_the_items(refresh):
    def task():
        while True:
            yield torch.rand(()).item() + random.random() + numpy.random.rand()

    def items(seed):
        program = program_of(refresh, {"low": {"inner_steps": 2}, "top": TOP}, task)
        return [r.grad_norm for r in run(program, 4, seed=seed).history.steps]

    assert items(1) == items(1)
    assert items(1) != items(2)
    assert len(set(items(1))) == {"step": 6, "loop": 2}[refresh]


def test_items_are_placed_as_batches_are():
    from mlodeco.runtime.build import build
    from mlodeco.runtime.sources import Sources

    program = program_of("loop", {"low": {}, "top": TOP})
    program.source("other")(counting)
    program.level("third", module=one())(lambda own, other: own.x * other)
    built = build(program)
    sources = Sources(built, lambda item: ("placed", item))
    for _ in range(2):
        with sources.drawn(built.levels["low"]) as items:
            assert items == ({"task": ("placed", 1.0)},)
    with sources.drawn(built.levels["third"]) as items:
        assert items == ({"other": ("placed", 1.0)},)


# declarations that change


CELL = """
@program.source(refresh={refresh!r})
def task():
    while True:
        yield {value}
"""


def enter(code, **names):
    exec(compile(code, "<stdin>", "exec"), {"__name__": "__main__", **names})


@pytest.mark.parametrize("refresh", ["step", "loop"])
def test_at_a_prompt_a_source_replaces_its_earlier_declaration(refresh):
    program = Program()
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), data=[3.0, 4.0])(
        lambda own, task, batch: own.x * (task + batch)
    )
    enter(CELL.format(value=10.0, refresh=refresh), program=program)
    run(program, 2)
    assert hyper(program, "low") == 14
    enter(CELL.format(value=20.0, refresh=refresh), program=program)
    assert hyper(program, "low") == 24
    enter("program.source('task')([30.0])", program=program)
    assert hyper(program, "low") == 34


def test_in_a_module_a_second_declaration_is_an_error():
    program = Program()
    program.source("task")(counting)
    for value in (two, [1.0]):
        with pytest.raises(DeclarationError, match=r"declared twice, first at test_source\.py:"):
            program.source("task")(value)
    assert program.sources["task"].value is counting


def test_a_source_that_no_level_reads_is_warned_of_once():
    program = program_of("step", {"low": {}})
    program.source("idle")(two)
    with pytest.warns(GraphWarning, match="'idle'.*no level reads it.*Remedy: take 'idle'") as seen:
        program.graph()
    assert len(seen) == 1
    assert "test_source.py:" in str(seen[0].message)
    run(program, 2)
    mlodeco.hypergradient("low", program=program)


# mistakes


def plain(own):
    return own.x


async def asynchronous():
    yield 1.0


class WithMethod:
    def task(self):
        yield 1.0


def declare(name=None, refresh="step", value=counting, **options):
    return lambda: Program().source(name, refresh, **options)(value)


def bare(value, **options):
    return lambda: Program().source(value, **options)


DECLARATIONS = {
    "unknown_refresh": (declare(refresh="epoch"), "refresh='epoch'", "choose one of"),
    "misspelt_refresh": (declare(refresh="lop"), "refresh='lop'", "Did you mean 'loop'"),
    "refresh_that_is_no_word": (declare(refresh=3), "refresh=3", "choose one of"),
    "unknown_option": (declare(every=3), "no option 'every'", "correct or remove"),
    "misspelt_option": (declare(refesh="loop"), "no option 'refesh'", "Did you mean 'refresh'"),
    "no_identifier": (declare("a.b"), "name is 'a.b'", "like a variable"),
    "no_name": (declare(""), "name is ''", "like a variable"),
    "keyword": (declare("class"), "name is 'class'", "like a variable"),
    "reserved": (declare("batch"), "'batch' is reserved", "choose another name"),
    "reserved_too": (declare("ctx"), "'ctx' is reserved", "choose another name"),
    "lambda": (declare(value=lambda: iter([1])), "'<lambda>'", "like a variable"),
    "object_without_name": (declare(value=[1.0]), "no name", "source('name')(object)"),
    "generator_without_name": (declare(value=counting()), "no name", "source('name')(object)"),
    "bare_object_without_name": (bare([1.0]), "no name", "source('name')(object)"),
    "number": (declare("task", value=3), "given 3", "source('name')(list_of_items)"),
    "bare_number": (bare(3), "given 3", "source('name')(list_of_items)"),
    "none": (declare("task", value=None), "given None", "source('name')(list_of_items)"),
    "string": (declare("task", value="abc"), "'abc'", "source('name')(list_of_items)"),
    "mapping": (declare("task", value={"a": 1}), "{'a': 1}", "source('name')(list_of_items)"),
    "tensor": (declare("task", value=torch.ones(2)), "one Tensor", "source('name')([item])"),
    "pair": (
        declare("task", value=(torch.ones(2), torch.ones(2))),
        "one tuple of data",
        "source('name')([item])",
    ),
    "class": (declare(value=Counter), "the class 'Counter'", "source('name')(Counter(...))"),
    "async": (declare(value=asynchronous), "async", "plain function"),
    "method": (declare(value=WithMethod.task), "inside its class", "the bound method"),
    "positional_only": (declare("task", value=lambda low, /: iter([1])), "'low'", "remove the '/'"),
    "unreadable": (declare("task", value=functools.partial(next)), "cannot be found", "lambda"),
}


@pytest.mark.parametrize("case", DECLARATIONS)
def test_a_declaration_that_cannot_be_right(case):
    make, found, remedy = DECLARATIONS[case]
    with pytest.raises(DeclarationError) as caught:
        make()
    assert found in caught.value.found
    assert remedy in caught.value.remedy
    if case not in ("unreadable",):
        assert caught.value.site.startswith("test_source.py:")
        assert not caught.value.site.endswith(":0")


def test_a_level_and_a_source_of_one_name():
    program = program_of("step", {"low": {}})
    with pytest.raises(DeclarationError, match="name of the level 'low'") as caught:
        program.source("low")(two)
    assert (caught.value.source, caught.value.level) == ("low", None)
    with pytest.raises(DeclarationError, match="name of the source 'task'") as caught:
        program.level("task", module=one())(plain)
    assert (caught.value.source, caught.value.level) == (None, "task")
    assert "rename one of them" in caught.value.remedy
    assert list(program.levels) == ["low"]
    assert list(program.sources) == ["task"]


def level_with(function, source=counting, **options):
    program = Program()
    program.source("task")(source)
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0), **options)(function)
    return program


BINDINGS = {
    "field": (
        lambda: level_with(lambda own, task: own.x, fields=("task", "y")),
        "field 'task' is a source",
        "rename the field",
        "low",
    ),
    "loader": (
        lambda: level_with(lambda own, task: own.x, data={"task": [1.0]}),
        "loader 'task' is a source",
        "rename the loader",
        "low",
    ),
    "misspelt": (
        lambda: level_with(lambda own, tsak: own.x),
        "'tsak' names no level, source, field or loader",
        "Did you mean 'task'?",
        "low",
    ),
    "misspelt_with_default": (
        lambda: level_with(lambda own, tasks=None: own.x),
        "resembles 'task'",
        "Did you mean 'task'?",
        "low",
    ),
    "reads": (
        lambda: level_with(lambda own: own.x, reads=["task"]),
        "names the source 'task'",
        "take 'task' as an argument",
        "low",
    ),
    "unknown_level": (
        lambda: level_with(linear, lambda policy: iter([1.0])),
        "asks for 'policy'",
        "rename or remove",
        None,
    ),
    "misspelt_level": (
        lambda: level_with(linear, lambda lwo: iter([1.0])),
        "asks for 'lwo'",
        "Did you mean 'low'?",
        None,
    ),
    "misspelt_level_with_default": (
        lambda: level_with(linear, lambda lows=1: iter([1.0])),
        "asks for 'lows'",
        "Did you mean 'low'?",
        None,
    ),
    "context": (
        lambda: level_with(linear, lambda ctx: iter([1.0])),
        "asks for 'ctx'",
        "rename or remove",
        None,
    ),
    "source": (
        lambda: level_with(linear, lambda task: iter([1.0])),
        "asks for 'task'",
        "rename or remove",
        None,
    ),
}


@pytest.mark.parametrize("case", BINDINGS)
def test_an_argument_that_fits_nothing(case):
    make, found, remedy, level = BINDINGS[case]
    with pytest.raises(BindingError) as caught:
        run(make())
    assert found in caught.value.found
    assert remedy in caught.value.remedy
    assert caught.value.level == level
    assert caught.value.source == (None if level else "task")
    assert caught.value.site.startswith("test_source.py:")
    assert str(caught.value).startswith(f"level {level!r} (" if level else "source 'task' (")


def test_an_unknown_key_of_batches():
    program = program_of("step", {"low": {}})
    with pytest.raises(RunError, match="no level or source") as caught:
        hyper(program, "low", batches={"tsak": 1.0})
    assert "'low', 'task'" in caught.value.expected
    assert "Did you mean 'task'?" in caught.value.remedy


def test_a_loss_that_changes_an_item_in_place_is_refused():
    program = Program()
    program.source("task", "loop")(lambda: iter([torch.ones(2, dtype=torch.float64)]))
    program.level("low", module=one(), optimizer=partial(SGD, lr=1.0))(
        lambda own, task: own.x * task.mul_(2).sum()
    )
    with pytest.raises(mlodeco.errors.LossError, match="in place"):
        run(program)


def test_tensor_items_of_a_run_match_a_loop_by_hand():
    """An environment and two levels, step by step on plain tensors."""
    program = Program()

    @program.source
    def states(policy):
        while True:
            yield torch.tanh(policy.x) * randn(3, seed=1)

    @program.level("policy", module=one(0.5), optimizer=partial(SGD, lr=0.1), accumulate=2)
    def act(policy, states, reward):
        return ((policy.x * states - reward.x) ** 2).mean()

    @program.level(
        "reward",
        lower=["policy"],
        module=one(1.0),
        optimizer=partial(SGD, lr=0.1),
        hypergrad="dense",
    )
    def judge(reward, policy, states):
        return (policy.x - 2) ** 2 * states.square().sum()

    run(program, 3)
    x, r, noise = 0.5, 1.0, randn(3, seed=1)
    for _ in range(3):
        s = noise * torch.tanh(torch.tensor(x, dtype=torch.float64))
        x -= 0.1 * (2 * s * (x * s - r)).mean().item()
        new = noise * torch.tanh(torch.tensor(x, dtype=torch.float64))
        response = (s.mean() / s.square().mean()).item()
        r -= 0.1 * response * 2 * (x - 2) * new.square().sum().item()
    assert program.module("policy").x.item() == pytest.approx(x)
    assert program.module("reward").x.item() == pytest.approx(r)


def test_a_live_parameter_as_an_item_is_refused():
    def task(top):
        while True:
            yield top.x

    program = level_with(lambda own, task: (own.x - task) ** 2, task)
    program.level("top", module=one(), optimizer=partial(SGD, lr=1.0))(plain)
    with pytest.raises(BindingError, match="'top'") as caught:
        run(program)
    assert "detach()" in caught.value.remedy


# random programs


@st.composite
def programs(draw):
    """Options of levels, each above some of those before it, and the names of the readers."""
    levels = {}
    for number in range(draw(st.integers(1, 5))):
        lower = [name for name in levels if draw(st.booleans())]
        levels[f"level{number}"] = {
            "lower": lower,
            "inner_steps": draw(st.integers(1, 3)),
            "repeat": draw(st.integers(1, 2)),
            "warmup": draw(st.integers(0, 2)),
            "accumulate": draw(st.integers(1, 2)),
        }
    readers = [name for name in levels if draw(st.booleans())] or ["level0"]
    return levels, readers


def below(levels, name):
    direct = levels[name]["lower"]
    return {*direct, *(deep for low in direct for deep in below(levels, low))}


@pytest.mark.filterwarnings("ignore:.* no level has:mlodeco.errors.GraphWarning")
@settings(max_examples=40, deadline=None)
@given(programs(), st.sampled_from(["step", "loop"]))
def test_any_program_against_the_words_of_the_documentation(case, refresh):
    levels, readers = case
    options = {n: {**o, "idle": n not in readers} for n, o in levels.items()}
    steps = run(program_of(refresh, options), 12).history.steps
    highest = {n for n in readers if not any(n in below(levels, other) for other in readers)}
    numbers, current, waits_for = itertools.count(1), None, set()
    for count, record in enumerate(steps, start=1):
        name, chosen = record.level, levels[record.level]
        if name not in readers:
            continue
        if refresh == "step":
            items = [next(numbers) for _ in range(chosen["accumulate"])]
            assert record.grad_norm == pytest.approx(sum(items) / len(items))
            continue
        if not waits_for:
            current, waits_for = next(numbers), set(highest)
        assert record.grad_norm == current
        own = [r for r in steps[:count] if r.level == name]
        if len(own) % chosen["repeat"] == 0:
            waits_for.discard(name)
