"""Steps of an inner loop, taken as a function of where it starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mlodeco.calculus.point import Point
from mlodeco.calculus.products import Reverse, differentiate_once
from mlodeco.calculus.slots import Place
from mlodeco.calculus.tape import Recording, Tape, TapeStep
from mlodeco.calculus.update import Iterate, Update

Buffers = Mapping[Place, Tensor]
"""Buffers that are not as in the modules, by their places."""


@dataclass(frozen=True)
class Start:
    """Where a loop starts.

    Attributes:
        iterate: the level's parameters and the state of its update.
        buffers: the buffers that the level's steps change.
        initial: the level whose parameters these are; None for the level's own.
    """

    iterate: Iterate
    buffers: Buffers
    initial: str | None = None


def roll(
    level: str,
    start: Start,
    steps: Iterable[tuple[Point, Update]],
    recording: Recording,
) -> tuple[Tape, Buffers]:
    """Takes the steps in turn, at points without the level's own values, and keeps a tape.

    Bit for bit the steps of a run, as far as kernels with second derivatives give the same
    numbers as others. Returns the tape with its end, and the buffers behind the last step.
    """
    iterate, buffers = start.iterate, dict(start.buffers)
    taken: list[TapeStep] = []
    for number, (point, update) in enumerate(steps):
        is_kept = number % recording.every == 0 if recording.every else number == 0
        here = replace(point, buffers={**point.buffers, **buffers})
        step = TapeStep(here, update, iterate if is_kept else None)
        others = tuple(seen for seen in point.loss.sees if seen != level)
        problem = step.problem(level, iterate.parameters, others)
        graph = Reverse(problem) if recording.keep_graph else None
        if graph is not None:
            gradient, state = graph.gradient(), graph.state
        else:
            found = differentiate_once(problem)
            gradient, state = found.gradient, found.state
        taken.append(replace(step, graph=graph))
        iterate = update.advance(iterate, gradient, point.values)
        changed = {slot.place: state[slot.key] for slot in point.loss.buffers}
        buffers = {place: changed[place] for place in buffers if place in changed}
    return Tape(level, tuple(taken), start.initial, iterate), buffers
