"""Random programs, step by step, against a simulator that shares nothing with the library.

Each level is one number x_i with the loss, for a batch b,

    (a_i + b^2) x_i^2 / 2 + b x_i + sum over reads j of (m_ij + b) x_i x_j + c_ij (x_j - b)^2 / 2

so that every derivative is a formula, and curvature, cross terms and cotangents show at which
batches they were taken.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from mlodeco.hypergrad import Dense, Identity

pytestmark = pytest.mark.filterwarnings("ignore:.* no level has:mlodeco.errors.GraphWarning")

RATE, MOMENTUM = 0.05, 0.6
METHODS = {"dense": Dense(), "identity": Identity(scale=0.3), "none": None}


@dataclass
class Level:
    """What is declared of one level."""

    lower: list[str]
    reads: list[str]
    number: int
    method: str = "dense"
    inner_steps: int = 1
    repeat: int = 1
    warmup: int = 0
    accumulate: int = 1
    rollback: bool = False

    @property
    def start(self):
        return 1.0 - 0.3 * self.number

    @property
    def curvature(self):
        return 1.2 + 0.2 * self.number

    @property
    def batches(self):
        return [0.1 * (self.number + 1) - 0.25 * k for k in range(2 + self.number % 3)]

    def mixed(self, other):
        return 0.35 - 0.11 * self.number + 0.17 * other.number

    def pull(self, other):
        return 0.4 + 0.1 * self.number - 0.05 * other.number


def loss(levels, name, b, x):
    """On floats and on tensors alike; ``x`` maps names to values."""
    me = levels[name]
    value = (me.curvature + b**2) * x[name] ** 2 / 2 + b * x[name]
    for read in me.reads:
        other = levels[read]
        value = value + (me.mixed(other) + b) * x[name] * x[read]
        value = value + me.pull(other) * (x[read] - b) ** 2 / 2
    return value


def declare(levels):
    program = Program()
    for name, level in levels.items():
        arguments = {f"a{i}": read for i, read in enumerate(level.reads)}

        def compute(own, batch, *others, name=name, level=level):
            x = {name: own.x, **{r: o.x for r, o in zip(level.reads, others, strict=True)}}
            return loss(levels, name, batch, x)

        scope = {"compute": compute}
        exec(
            f"def function({', '.join(['own', 'batch', *arguments])}):"
            f" return compute({', '.join(['own', 'batch', *arguments])})",
            scope,
        )
        program.level(
            name,
            lower=level.lower,
            reads=arguments,
            module={"x": torch.tensor(level.start, dtype=torch.float64)},
            optimizer=partial(SGD, lr=RATE, momentum=MOMENTUM),
            data=level.batches,
            inner_steps=level.inner_steps,
            repeat=level.repeat,
            warmup=level.warmup,
            accumulate=level.accumulate,
            rollback=level.rollback,
            **({"hypergrad": METHODS[level.method]} if level.lower else {}),
        )(scope["function"])
    return program


@dataclass
class State:
    """What one level has: its number and momentum, what it drew last, its counters."""

    x: float
    velocity: float | None = None
    steps: int = 0
    next_batch: int = 0
    drawn: list[float] = field(default_factory=list)
    kept: tuple[float, float | None] | None = None
    begins: bool = True


class Simulator:
    """The words of the documentation, on floats."""

    def __init__(self, levels):
        self.levels = levels
        self.state = {name: State(level.start) for name, level in levels.items()}
        self.ready = {(up, low): 0 for up in levels for low in levels[up].lower}
        self.steps = []
        self.under = {name: self.all_below(name) for name in levels}

    def all_below(self, name):
        direct = self.levels[name].lower
        return {*direct, *(deep for low in direct for deep in self.all_below(low))}

    def turns(self):
        """Leaves as declared; then uppers as declared, as soon as those below have been asked."""
        asked = [name for name, level in self.levels.items() if not level.lower]
        while len(asked) < len(self.levels):
            asked.append(
                next(
                    name
                    for name, level in self.levels.items()
                    if name not in asked and set(level.lower) <= set(asked)
                )
            )
        return asked

    def tick(self, number):
        stepped = set()
        order = self.turns()
        for name in order:
            level = self.levels[name]
            if any(self.ready[name, low] < self.levels[low].inner_steps for low in level.lower):
                continue
            for _ in range(level.repeat):
                self.step(name, number)
            stepped.add(name)
            for low in level.lower:
                self.ready[name, low] = 0
                self.state[low].begins = True
        for name in order:
            uppers = {up for up, level in self.levels.items() if name in level.lower}
            if self.levels[name].rollback and uppers & stepped:
                state = self.state[name]
                state.x, state.velocity = state.kept
                self.move(name)

    def step(self, name, tick):
        level, state = self.levels[name], self.state[name]
        if state.begins and state.steps >= level.warmup:
            state.kept, state.begins = (state.x, state.velocity), False
        data = level.batches
        state.drawn = [data[(state.next_batch + k) % len(data)] for k in range(level.accumulate)]
        state.next_batch += level.accumulate
        x = {other: one.x for other, one in self.state.items()}
        value = sum(loss(self.levels, name, b, x) for b in state.drawn) / len(state.drawn)
        self.move(name)
        state.steps += 1
        self.steps.append((tick, name, state.steps, value))
        if state.steps > level.warmup:
            for up in self.levels:
                if name in self.levels[up].lower:
                    self.ready[up, name] += 1

    def move(self, name):
        state = self.state[name]
        gradient = self.hypergradient(name)
        first = state.velocity is None
        state.velocity = gradient if first else MOMENTUM * state.velocity + gradient
        state.x -= RATE * state.velocity

    def mean(self, name, function):
        drawn = self.state[name].drawn
        return sum(function(b) for b in drawn) / len(drawn)

    def slope(self, name, of):
        """d loss of ``name`` / d ``of``."""
        me, x = self.levels[name], {n: one.x for n, one in self.state.items()}
        if of != name:
            other = self.levels[of]
            return self.mean(
                name,
                lambda b: (me.mixed(other) + b) * x[name] + me.pull(other) * (x[of] - b),
            )
        return self.mean(
            name,
            lambda b: (
                (me.curvature + b**2) * x[name]
                + b
                + sum((me.mixed(self.levels[r]) + b) * x[r] for r in me.reads)
            ),
        )

    def hypergradient(self, top):
        return self.slope(top, top) + self.descend(top, top, lambda low: self.slope(top, low))

    def descend(self, top, name, cotangent):
        """The sum over paths of what goes from ``name`` down to reads of ``top``."""
        total, method = 0.0, self.levels[name].method
        for low in self.levels[name].reads:
            if low not in self.under[name] or method == "none":
                continue
            curvature = self.mean(low, lambda b, low=low: self.levels[low].curvature + b**2)
            v = cotangent(low) * (0.3 if method == "identity" else 1 / curvature)

            def cross(read, low=low, v=v):
                other = self.levels[read]
                return -v * self.mean(low, lambda b: self.levels[low].mixed(other) + b)

            total += self.descend(top, low, cross)
            if top in self.levels[low].reads:
                total += cross(top)
        return total


def compare(levels, ticks):
    program, simulator = declare(levels), Simulator(copy.deepcopy(levels))
    runner = mlodeco.Runner(program, seed=0)
    for number in range(1, ticks + 1):
        runner.step()
        simulator.tick(number)
        for name, state in simulator.state.items():
            found = program.module(name).x.item()
            assert found == pytest.approx(state.x, rel=1e-10, abs=1e-11), (number, name)
    found = [(r.tick, r.level, r.step) for r in runner.history.steps]
    assert found == [step[:3] for step in simulator.steps]
    losses = [r.loss for r in runner.history.steps]
    assert losses == pytest.approx([step[3] for step in simulator.steps], rel=1e-9, abs=1e-10)
    return simulator


@st.composite
def programs(draw):
    """Up to six levels, declared in any order, reading each other in any way."""
    count = draw(st.integers(1, 6))
    names = [f"level{number}" for number in range(count)]
    levels = {}
    for number, name in enumerate(names):
        candidates = names[:number]
        lower = [low for low in candidates if draw(st.booleans())]
        if number == count - 1 and candidates and not lower:
            lower = [candidates[-1]]
        reads = [other for other in names if other != name and draw(st.booleans())]
        levels[name] = Level(
            lower,
            reads,
            number,
            method=draw(st.sampled_from(sorted(METHODS))),
            inner_steps=draw(st.integers(1, 3)),
            repeat=draw(st.integers(1, 3)),
            warmup=draw(st.integers(0, 3)),
            accumulate=draw(st.integers(1, 3)),
            rollback=draw(st.booleans()),
        )
    return {name: levels[name] for name in draw(st.permutations(names))}


@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(programs())
def test_random_programs_take_the_steps_of_the_simulator(levels):
    compare(levels, 9)


def tower(**options):
    """Two leaves, two levels on them, a top; everything reads everything, in odd order."""
    lower = {
        "top": ["mid", "side"],
        "low": [],
        "mid": ["low"],
        "other": [],
        "side": ["low", "other"],
    }
    levels = {
        name: Level(below, [n for n in lower if n != name], number)
        for number, (name, below) in enumerate(lower.items())
    }
    for place, chosen in options.items():
        for option, value in chosen.items():
            setattr(levels[place], option, value)
    return levels


OPTIONS = {
    "inner_steps": 3,
    "repeat": 3,
    "warmup": 4,
    "accumulate": 2,
    "rollback": True,
}


@pytest.mark.parametrize("place", ["low", "other", "mid", "side", "top"])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_at_each_level(option, place):
    chosen = {option: OPTIONS[option]}
    with_it = compare(tower(**{place: chosen}), 10)
    without = compare(tower(), 10)
    is_idle = place == "top" and option in ("inner_steps", "warmup", "rollback")
    same = with_it.steps == without.steps and with_it.state["top"].x == without.state["top"].x
    assert same == is_idle


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_at_all_levels_with_each_of_the_others_below(option):
    for other, value in OPTIONS.items():
        both = {option: OPTIONS[option], other: value}
        above = {place: {option: OPTIONS[option]} for place in ("mid", "side", "top")}
        compare(tower(**above, low=both, other=both), 13)


def test_an_upper_steps_more_often_than_its_lower_level():
    levels = tower(mid={"repeat": 5}, low={"inner_steps": 2})
    steps = compare(levels, 8).steps
    for tick in range(1, 9):
        now = [name for when, name, *_ in steps if when == tick]
        assert now.count("low") == 1
        assert now.count("mid") == (5 if tick % 2 == 0 else 0)


def test_leaves_step_as_declared_and_each_sees_what_the_earlier_ones_did():
    levels = {
        "c": Level([], ["a", "b"], 2),
        "top": Level(["b", "c"], ["b"], 3, method="none"),
        "a": Level([], ["b", "c"], 0),
        "above": Level(["a"], ["a", "top"], 4, method="none"),
        "b": Level([], ["c", "a"], 1),
    }
    steps = compare(levels, 3).steps
    assert [name for tick, name, *_ in steps if tick == 2] == ["c", "a", "b", "top", "above"]
