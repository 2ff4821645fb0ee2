"""Steps of an inner loop, taken as a function of where it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from mlodeco.calculus.point import Point
from mlodeco.calculus.products import Reverse, differentiate_once
from mlodeco.calculus.randomness import RecordedStreams
from mlodeco.calculus.rule import Rule
from mlodeco.calculus.slots import Place
from mlodeco.calculus.tape import Origins, Recording, Tape, TapeStep
from mlodeco.calculus.update import Iterate, Update

Buffers = Mapping[Place, Tensor]
"""Buffers that are not as in the modules, by their places."""


@dataclass(frozen=True)
class Start:
    """Where a loop starts.

    Attributes:
        iterate: the level's parameters and the state of its update.
        buffers: the buffers that the level's steps change.
        initial: where parameters that were copied in come from.
    """

    iterate: Iterate
    buffers: Buffers
    initial: Origins = field(default_factory=dict)


def roll(
    level: str,
    start: Start,
    steps: Sequence[tuple[Point, Update]],
    recording: Recording,
) -> tuple[Tape, Buffers]:
    """Takes the steps in turn, at points without the level's own values, and keeps a tape.

    Bit for bit the steps of a run, as far as kernels with second derivatives give the same
    numbers as others. Returns the tape with its end, and the buffers behind the last step.
    A loop that starts above is kept whole: where it is cut off, the method must see it.
    """
    iterate, buffers = start.iterate, dict(start.buffers)
    wanted = None if start.initial else recording.steps
    begin = 0 if wanted is None else max(0, len(steps) - wanted)
    taken: list[TapeStep] = []
    for number, (point, update) in enumerate(steps, -begin):
        is_kept = number % recording.every == 0 if recording.every else number == 0
        if isinstance(update, Rule):
            update = replace(update, streams=RecordedStreams())
        here = replace(point, buffers={**point.buffers, **buffers})
        step = TapeStep(here, update, iterate if is_kept else None)
        others = tuple(seen for seen in point.loss.sees if seen != level)
        problem = step.problem(level, iterate.parameters, others)
        graph = Reverse(problem) if recording.keep_graph and number >= 0 else None
        if graph is not None:
            gradient, state = graph.gradient(), graph.state
        else:
            found = differentiate_once(problem)
            gradient, state = found.gradient, found.state
        if number >= 0:
            taken.append(replace(step, graph=graph))
        iterate = update.advance(iterate, gradient, point.values)
        changed = {slot.place: state[slot.key] for slot in point.loss.buffers}
        buffers = {place: changed[place] for place in buffers if place in changed}
    return Tape(level, tuple(taken), start.initial, iterate), buffers
