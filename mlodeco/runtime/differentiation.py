"""The gradients of one step: of a loss, of a loss of replicas, or a hypergradient."""

from __future__ import annotations

import math

import torch

from mlodeco.calculus.randomness import randomness_set_aside
from mlodeco.calculus.stateless import frozen
from mlodeco.calculus.sweep import Hypergradient
from mlodeco.calculus.tape import Tape
from mlodeco.errors import NonFiniteError
from mlodeco.runtime.assembly import Options, Parts
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import (
    compute_hypergradient,
    probe_level,
    step_point,
    warn_of_nested_paths,
)
from mlodeco.runtime.events import Events
from mlodeco.runtime.loops import items_of, unrolled_edges
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.recorder import Recorder
from mlodeco.runtime.report import warn_of_trouble
from mlodeco.runtime.trainer import Gradients


class Differentiation:
    """Leaves the gradients of levels in ``.grad``, averaged over processes.

    Args:
        parts: what steps.
        options: how.
        processes: those of the run.
        events: what functions and hooks are given.
    """

    def __init__(
        self, parts: Parts, options: Options, processes: Processes, events: Events
    ) -> None:
        self._built = parts.built
        self._trainers = parts.trainers
        self._recorders = parts.recorders
        self._compilers = parts.compilers
        self._options = options
        self._processes = processes
        self._events = events

    def differentiate(
        self,
        name: str,
        batches: tuple[Drawn, ...],
        ctx: Context,
        recorder: Recorder | None = None,
    ) -> Gradients:
        """Leaves ``.grad`` at the (hyper)gradient of the level at its current parameters."""
        if self._built.graph.lower[name]:
            return self._differentiate_responses(name, batches, ctx)
        self.probe(name, batches)
        return self._differentiate_loss(name, batches, ctx, recorder)

    def _differentiate_loss(
        self, name: str, batches: tuple[Drawn, ...], ctx: Context, recorder: Recorder | None
    ) -> Gradients:
        """The gradient of a level without lower levels, averaged over processes."""
        trainer = self._trainers[name]
        if trainer.level.copied:
            return trainer.average(self._differentiate_replicas(name, batches, ctx, recorder))
        if recorder is not None and recorder.recording.keep_graph:
            parts = items_of(trainer.level, batches, ctx)
            graph = recorder.differentiate(parts, ctx.generator)
            return trainer.average(trainer.adopt_graph(graph, recorder.point))
        return trainer.backward(batches, ctx)

    def _differentiate_responses(
        self, name: str, batches: tuple[Drawn, ...], ctx: Context
    ) -> Gradients:
        """The hypergradient of a level that has lower levels."""
        trainer = self._trainers[name]
        known = {n: level.last_batches for n, level in self._built.levels.items()}
        items = {n: b for n, b in known.items() if b is not None}
        own = ctx.with_own_generator()
        trouble: NonFiniteError | None = None
        try:
            hyper = compute_hypergradient(
                self._built,
                name,
                {**items, name: batches},
                lambda n: own if n == name else self._events.muted(n),
                rank=self._processes.rank,
                memories=trainer.memories,
                nested=self._options.nested,
                tapes=self._tapes(name) if self._recorders else None,
                mean=self._options.mean_of(self._processes),
                scale=trainer.scale.value if trainer.scale else 1.0,
                compilers=self._compilers,
            )
        except NonFiniteError as error:
            if not trainer.may_lose:
                raise
            trouble = error
            hyper = Hypergradient.lost(frozen(trainer.level.parameters))
        if self._options.reduce == "once":
            hyper = trainer.average_hypergradient(hyper)
        ctx.adopt(own)
        if trainer.skips_lost and not math.isfinite(hyper.size):
            return Gradients(math.nan, hyper.metrics, trouble=trouble)
        if not self._options.nested:
            warn_of_nested_paths(self._built, name)
        warn_of_trouble(self._built, hyper.solves)
        trainer.adopt(hyper.gradient, hyper.state)
        trainer.memories = hyper.memories
        cosine = trainer.turn_of(hyper)
        found = Gradients(hyper.loss, hyper.metrics, hyper.solves, cosine, trouble)
        self._events.fire(
            "hypergradient", name, ctx, **self._events.offers(trainer, found, batches, ctx)
        )
        return found

    def probe(self, name: str, batches: tuple[Drawn, ...]) -> None:
        """Looks at a level's loss before its first step."""
        if not self._built.levels[name].is_probed:
            rank = self._processes.rank
            probe_level(self._built, name, batches[0], self._events.muted(name), rank)

    def _differentiate_replicas(
        self, name: str, batches: tuple[Drawn, ...], ctx: Context, recorder: Recorder | None
    ) -> Gradients:
        """The gradients of a level's replicas, whose random numbers come from the step's seed."""
        trainer, own = self._trainers[name], ctx.with_own_generator()
        with randomness_set_aside(), torch.enable_grad():
            scale = trainer.own_scale
            point = step_point(self._built, name, batches, own, trainer.step_seed, scale)
            if recorder is not None and recorder.recording.keep_graph:
                graph = recorder.differentiate(point.batches, own.generator)
                found = trainer.adopt_graph(graph, point)
            else:
                found = trainer.differentiate(point)
        ctx.adopt(own)
        return found

    def _tapes(self, top: str) -> dict[str, Tape]:
        """The executed inner loops that the hypergradient of a level goes back over."""
        edges = unrolled_edges(self._built, self._built.methods, top)
        return {
            low: self._recorders[low].tape([u for u, other in edges if other == low])
            for low in dict.fromkeys(low for _, low in edges)
        }
