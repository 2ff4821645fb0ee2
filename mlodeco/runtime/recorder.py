"""The executed steps of a level, recorded for methods that differentiate through them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlodeco.calculus.mean import Mean
from mlodeco.calculus.optimizer_step import Group, OptimizerStep
from mlodeco.calculus.point import Point
from mlodeco.calculus.products import Compiler, Reverse
from mlodeco.calculus.randomness import RecordedStreams
from mlodeco.calculus.rest import Rest
from mlodeco.calculus.rule import Rule
from mlodeco.calculus.slots import Place
from mlodeco.calculus.tape import Recording, Tape, TapeStep
from mlodeco.calculus.update import Iterate
from mlodeco.declare.binding import Role
from mlodeco.runtime.build import Build
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.loops import items_of
from mlodeco.runtime.replicas import copies_of
from mlodeco.runtime.trainer import Trainer
from mlodeco.tree import Tree


class Values:
    """Copies of levels' parameters, made anew only where they have changed."""

    def __init__(self, built: Build) -> None:
        self._built = built
        self._known: dict[str, Tree] = {}

    def of(self, level: str) -> Tree:
        """The parameters of a level as they are now, in tensors that nobody changes.

        Compared by their entries: writes through ``.data`` leave no other trace.
        """
        parameters = self._built.levels[level].parameters
        known = self._known.get(level)
        if known is None or not all(torch.equal(known[key], p) for key, p in parameters.items()):
            known = self._known[level] = {key: p.detach().clone() for key, p in parameters.items()}
        return known


class Recorder:
    """Keeps the tape of one level for the levels above it.

    Steps are numbered from the start of the run. For each level above a mark tells where its
    present inner loop began; it moves at the level's own next step and not at the turn above, so
    that levels further above still find the loop that came to an end.

    Args:
        built: the program.
        trainer: the level's.
        recording: what the tape must hold.
        values: of the levels that its steps see.
        is_watched: whether hooks may change parameters between steps, so that no iterate
            follows from the one before.
        mean: over processes, for the products of its steps.
        compiler: of these products.
    """

    def __init__(
        self,
        built: Build,
        trainer: Trainer,
        recording: Recording,
        values: Values,
        *,
        is_watched: bool,
        mean: Mean | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self._built = built
        self._trainer = trainer
        self._level = trainer.level
        # a loop that starts above is kept whole: where it is cut off, the method must see it
        steps = None if self._level.init_from else recording.steps
        every = 1 if is_watched else recording.every
        self.recording = replace(recording, steps=steps, every=every)
        self._values = values
        self._mean = mean
        self._compiler = compiler
        self._steps: list[TapeStep] = []
        self._count = 0
        self._marks = dict.fromkeys(built.graph.uppers(self._level.name), 0)
        self._ended: set[str] = set()
        self._started_at: int | None = None
        self._pending: TapeStep | None = None

    def begin_loop(self) -> None:
        """Notes that the parameters of ``init_from`` have been copied in."""
        if self._level.init_from is not None:
            self.restart()

    def restart(self) -> None:
        """Notes that the level has gone back, so that the steps before do not lead to it."""
        self._started_at = self._count

    def begin_step(
        self,
        batches: tuple[Drawn, ...],
        muted: Context,
        generator: torch.Generator,
        seed: int | None,
    ) -> None:
        """Notes everything that the gradient of the next step depends on.

        Args:
            batches: its micro-batches.
            muted: what its function is given when the step is looked at again.
            generator: the one that its function is given now.
            seed: of its random numbers; None where they are those of the global streams.
        """
        for upper in self._ended:
            self._marks[upper] = self._count
        self._ended.clear()
        self._forget()
        level = self._level
        others = {seen: self._values.of(seen) for seen in level.seen if seen != level.name}
        copies = copies_of(self._built, level)
        streams = RecordedStreams(((muted.generator, generator),)) if seed is None else None
        point = self._point(
            values=others,
            batches=items_of(level, batches, muted, copies),
            seed=seed or 0,
            muted=muted,
            streams=streams,
            buffers=self._buffers(),
        )
        before = self._trainer.iterate() if self._keeps_iterate else None
        self._pending = TapeStep(point, self._trainer.read_update(), before)

    def differentiate(
        self, items: Iterable[Mapping[str, object]], generator: torch.Generator
    ) -> Reverse:
        """The step's gradient with its graph, which is kept.

        Args:
            items: for each micro-batch what its function is given now.
            generator: the one among them, seeded where the step's random numbers have a seed.
        """
        pending = self._step
        name = self._level.name
        live = replace(
            pending,
            point=replace(pending.point, batches=tuple(items), generators=(generator,)),
        )
        parameters = {key: p.detach().clone() for key, p in self._level.parameters.items()}
        others = tuple(seen for seen in self._level.loss.sees if seen != name)
        graph = Reverse(live.problem(name, parameters, others))
        self._pending = replace(pending, graph=graph)
        return graph

    def begin_update(self, gradient: Tree | None) -> None:
        """Notes everything that the update depends on.

        Args:
            gradient: the one that it starts from, where it is not that of the loss alone.
        """
        update = self._trainer.read_update()
        if isinstance(update, Rule):
            update = replace(update, streams=RecordedStreams())
        copied = gradient and {key: value.detach().clone() for key, value in gradient.items()}
        self._pending = replace(self._step, update=update, gradient=copied)

    def skip_update(self) -> None:
        """Notes that the step moves nothing."""
        rest = Rest(self._step.update)
        self._pending = replace(self._step, update=rest, gradient={}, graph=None)

    def finish_step(self) -> None:
        """Puts the step on the tape."""
        self._steps.append(self._step)
        self._count += 1
        self._pending = None

    def finish_turn(self, upper: str) -> None:
        """Notes that a level above has had its turn."""
        if upper in self._marks:
            self._ended.add(upper)

    def tape(self, uppers: Iterable[str]) -> Tape:
        """The present loop of these levels, the longest of them."""
        marks = [self._marks[upper] for upper in uppers if upper in self._marks]
        begin = min(marks or self._marks.values())
        is_whole = self._started_at is not None and self._started_at >= begin
        first = self._count - len(self._steps)
        start = max(begin, first, self._started_at or 0)
        initial = self._level.origins if is_whole and start == self._started_at else {}
        return Tape(self._level.name, tuple(self._steps[start - first :]), initial)

    def state_dict(self) -> dict[str, Any]:
        """The steps that a tape may still hold, and where the loops of the levels above stand.

        Graphs of gradients are left out, which are made anew where they are wanted.
        """
        is_over = (
            self._ended == self._marks.keys() and not self._built.graph.lower[self._level.name]
        )
        return {
            "steps": [] if is_over else [self._saved(step) for step in self._steps],
            "count": self._count,
            "marks": self._marks,
            "ended": self._ended,
            "started_at": self._started_at,
        }

    def load_state_dict(self, state: Mapping[str, Any], muted: Context) -> None:
        """Goes on from that state.

        Args:
            state: the state.
            muted: what the level's function is given when its steps are looked at again.
        """
        self._steps = [self._loaded(step, muted) for step in state["steps"]]
        self._count, self._started_at = state["count"], state["started_at"]
        self._marks, self._ended = dict(state["marks"]), set(state["ended"])

    def _saved(self, step: TapeStep) -> dict[str, Any]:
        point, before = step.point, step.before
        is_skipped = isinstance(step.update, Rest)
        update = step.update.update if isinstance(step.update, Rest) else step.update
        contexts = {a.name for a in self._level.binding.of(Role.CONTEXT)}
        given = [value for items in point.batches for n, value in items.items() if n in contexts]
        batches = [
            {n: value for n, value in items.items() if n not in contexts} for items in point.batches
        ]
        drawn = update.streams if isinstance(update, Rule) else None
        return {
            "moment": [given[0].tick, given[0].step, given[0].epoch] if given else None,
            "values": {level: dict(tree) for level, tree in point.values.items()},
            "batches": batches,
            "seed": point.seed,
            "scale": point.scale,
            "is_skipped": is_skipped,
            "streams": point.streams and point.streams.state_dict(),
            "buffers": list(point.buffers.values()),
            "groups": [[g.keys, dict(g.options)] for g in getattr(update, "groups", ())],
            "rule_streams": drawn and drawn.state_dict(),
            "before": before and [before.parameters, dict(before.state)],
            "gradient": step.gradient,
        }

    def _loaded(self, state: Mapping[str, Any], muted: Context) -> TapeStep:
        ctx = copy.copy(muted)
        ctx.generator = torch.Generator(device=ctx.device)
        ctx.tick, ctx.step, ctx.epoch = state["moment"] or (muted.tick, muted.step, muted.epoch)
        contexts = {a.name: ctx for a in self._level.binding.of(Role.CONTEXT)}
        streams = state["streams"] and RecordedStreams(((ctx.generator, ctx.generator),))
        point = self._point(
            values=state["values"],
            batches=tuple({**items, **contexts} for items in state["batches"]),
            seed=state["seed"],
            muted=ctx,
            streams=streams and streams.load_state_dict(state["streams"]),
            buffers=dict(zip(self._buffers(), state["buffers"], strict=True)),
        )
        update = self._trainer.read_update()
        point = replace(point, scale=state["scale"])
        if isinstance(update, OptimizerStep):
            groups = tuple(Group(keys, options) for keys, options in state["groups"])
            update = replace(update, groups=groups)
        elif isinstance(update, Rule) and state["rule_streams"] is not None:
            drawn = RecordedStreams().load_state_dict(state["rule_streams"])
            update = replace(update, streams=drawn)
        update = Rest(update) if state["is_skipped"] else update
        before = state["before"] and Iterate(*state["before"])
        return TapeStep(point, update, before, state["gradient"])

    def _point(
        self,
        *,
        values: Mapping[str, Tree],
        batches: tuple[Mapping[str, Any], ...],
        seed: int,
        muted: Context,
        streams: RecordedStreams | None,
        buffers: Mapping[Place, Tensor],
    ) -> Point:
        return Point(
            loss=self._level.loss,
            values=values,
            batches=batches,
            seed=seed,
            generators=(muted.generator,),
            decisions=self._level.decisions,
            next_update=lambda: (self._trainer.read_update(), {}),
            streams=streams,
            buffers=buffers,
            copies=copies_of(self._built, self._level),
            mean=self._mean,
            compiler=self._compiler,
            scale=self._trainer.own_scale,
        )

    @property
    def point(self) -> Point:
        """Where the step that was begun takes its gradient."""
        return self._step.point

    @property
    def _step(self) -> TapeStep:
        if self._pending is None:
            raise RuntimeError("no step of the level was begun")
        return self._pending

    @property
    def _keeps_iterate(self) -> bool:
        """Whether the next step is one that keeps its iterate."""
        if not self._steps or self._count in (*self._marks.values(), self._started_at):
            return True
        every = self.recording.every
        since = next(
            n for n, step in enumerate(reversed(self._steps), 1) if step.before is not None
        )
        return every is not None and since >= every

    def _forget(self) -> None:
        """Drops the steps that no tape will hold, up to one that keeps its iterate."""
        first = self._count - len(self._steps)
        begin = min(self._marks.values(), default=self._count)
        if self.recording.steps is not None:
            begin = max(begin, self._count + 1 - self.recording.steps)
        kept = [n for n, step in enumerate(self._steps) if step.before is not None]
        kept.append(len(self._steps))
        drop = max((n for n in kept if n <= begin - first), default=0)
        del self._steps[:drop]

    def _buffers(self) -> dict[Place, Tensor]:
        copies: dict[int, Tensor] = {}
        for slot in self._level.loss.buffers:
            copies.setdefault(id(slot.tensor), slot.tensor.detach().clone())
        return {slot.place: copies[id(slot.tensor)] for slot in self._level.loss.buffers}
