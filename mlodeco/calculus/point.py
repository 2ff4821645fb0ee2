"""Where a loss is differentiated: parameters, batches and random numbers, all fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlodeco.calculus.copies import Copies, mean_metrics
from mlodeco.calculus.mean import Mean
from mlodeco.calculus.randomness import RecordedStreams, make_seed, seed_streams
from mlodeco.calculus.slots import Place, State
from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.calculus.update import Update
from mlodeco.tree import Tree

if TYPE_CHECKING:
    from mlodeco.calculus.products.compiled import Compiler
    from mlodeco.calculus.tape import Tape

Batches = tuple[Mapping[str, Any], ...]
"""For each micro-batch the values of the function's arguments that are not modules."""

Memory = Mapping[str, Tree]
"""What a method keeps from one hypergradient of a run for the next, by names of its own."""


@dataclass
class Decisions:
    """How products of one level are taken, found out at first use and then kept.

    ``late`` says, for a set of reads, whether they enter the loss late;
    ``touched`` names the own parameters that the loss depended on when it was first looked at:
    enough for the scale of a step, and not for what a solve is about; ``partly_touched`` names
    those of which it was told that some replicas alone touch them. ``hessian`` and ``cross``
    name the mode that worked after one without a rule for some operation. ``needs_live_own``:
    the loss itself takes gradients in the own parameters.
    """

    late: dict[tuple[str, ...], bool] = field(default_factory=dict)
    touched: frozenset[str] | None = None
    partly_touched: set[str] = field(default_factory=set)
    hessian: str | None = None
    cross: dict[tuple[str, ...], str] = field(default_factory=dict)
    needs_live_own: bool = False


@dataclass(frozen=True)
class Point:
    """A level's loss at given parameters of all levels that it sees.

    The loss is the mean over the micro-batches in ``batches``. Every pass at one
    point sees the same random numbers: those of ``seed``, or those that a step which was
    executed saw, in ``streams``. ``buffers`` holds those that are not as in the modules now.
    With ``copies`` some levels' values are stacked, and ``batches`` has an entry for each
    micro-batch and chunk of replicas; ``numbers`` says by which number each entry's random
    numbers are drawn, where it is not its own.
    ``next_update`` gives the level's next update and the state that it starts from, for the
    methods that ask. ``part_of_batches`` gives the
    micro-batches with a fraction of the samples of the level's own data, None where these have
    no samples; ``fraction`` is that of the batches here. With ``mean`` the loss meant is the mean
    over processes, whose derivatives are the means of those here. With ``compiler`` exact products
    are compiled. ``scale`` multiplies the losses that passes see, so that their derivatives are
    not lost in float16.
    """

    loss: StatelessLoss
    values: Mapping[str, Tree]
    batches: Batches
    seed: int
    generators: tuple[torch.Generator, ...] = ()
    decisions: Decisions = field(default_factory=Decisions)
    next_update: Callable[[], tuple[Update, Mapping[str, Any]]] | None = None
    part_of_batches: Callable[[float], Batches | None] | None = None
    fraction: float = 1.0
    streams: RecordedStreams | None = None
    buffers: Mapping[Place, Tensor] = field(default_factory=dict)
    copies: Copies | None = None
    numbers: tuple[int, ...] = ()
    mean: Mean | None = None
    compiler: Compiler | None = None
    scale: float = 1.0

    def state(self, values: Mapping[str, Tree]) -> State:
        """A tensor for every slot of the loss: these values, buffers as they are here."""
        return self.loss.state(values, self.buffers)

    def reported(self, loss: float, metrics: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
        """What a person sees of the mean loss and of all entries' metrics."""
        if self.copies is None:
            return loss, metrics[-1]
        last = metrics[-len(self.copies.chunks) :]
        return self.copies.reported(self.loss.level, loss), mean_metrics(last)

    def losses(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The loss of each micro-batch in turn, times ``scale``, with its metrics.

        To be used inside :meth:`StatelessLoss.within`.
        """
        for number, items in enumerate(self.batches):
            self.begin_streams(number)
            with ExitStack() as stack:
                try:
                    if self.copies is None:
                        result = self.loss.call(items)
                    else:
                        entry = self.copies.evaluated(self.loss, items, number)
                        result = stack.enter_context(entry)
                except Exception as error:
                    if self.fraction < 1.0:
                        error.add_note(self._note_of_the_cut())
                    raise
                loss, metrics = result
                yield (loss if self.scale == 1.0 else loss * self.scale), metrics

    def unscaled(self, loss: Tensor) -> Tensor:
        """One of the losses as it is, without its graph."""
        return loss.detach() if self.scale == 1.0 else loss.detach() / self.scale

    def begin_streams(self, number: int) -> None:
        """Random numbers as the pass over a micro-batch sees them, those before it gone over."""
        if self.streams is None:
            drawn = self.numbers[number] if self.numbers else number
            seed_streams(make_seed(self.seed, drawn), self.generators)
        elif number == 0:
            self.streams.restore()

    def _note_of_the_cut(self) -> str:
        return (
            f"with curvature_batch={self.fraction} the loss of level {self.loss.level!r} "
            f"({self.loss.site}) sees the first samples of each tensor of its batch alone, with "
            "every parameter, list and source whole; where it needs them to match, set "
            "curvature_batch=1.0"
        )


@dataclass(frozen=True)
class LowerProblem:
    """The second derivatives of ``point`` that a method may ask for.

    ``level`` owns the parameters w of the solve; ``targets`` are the levels whose
    parameters receive cross products of the loss, ``wanted`` these and the others on whose
    parameters a step may depend; ``memory`` is what the method kept last time; ``tape`` holds the
    steps by which the level came to where it is, for the methods that ask. ``opened`` gives the
    products in place of those of the point.
    """

    point: Point
    level: str
    targets: tuple[str, ...]
    memory: Memory = field(default_factory=dict)
    tape: Tape | None = None
    wanted: tuple[str, ...] = ()
    opened: Callable[[LowerProblem, str], Any] | None = None

    @property
    def parameters(self) -> Tree:
        """The level's own parameters w."""
        return self.point.values[self.level]

    def at(self, scale: float) -> LowerProblem:
        """The same of losses multiplied by another scale."""
        if scale == self.point.scale:
            return self
        return replace(self, point=replace(self.point, scale=scale))
