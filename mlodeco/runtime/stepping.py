"""The turns of levels in a tick, and one level's step from its batch to its record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from mlodeco.calculus.randomness import RecordedStreams
from mlodeco.errors import MlodecoError, NonFiniteError
from mlodeco.hypergrad import describe
from mlodeco.runtime.assembly import Options, Parts
from mlodeco.runtime.context import Context
from mlodeco.runtime.differentiation import Differentiation
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.ending import Ending
from mlodeco.runtime.engine import seed_of
from mlodeco.runtime.events import Events
from mlodeco.runtime.history import History, SolveRecord, StepRecord, as_numbers
from mlodeco.runtime.judging import Judge
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.recorder import Recorder
from mlodeco.runtime.trainer import Gradients, Trainer


class Stepping:
    """Takes the levels' turns of one tick, which an exception may break off and go on with.

    Args:
        parts: what steps.
        options: how.
        processes: those of the run.
        events: what functions and hooks are given.
        history: is given the records.
        ending: is told of functions that stop the run.
        held: blocks that an interrupt waits for.
    """

    def __init__(
        self,
        parts: Parts,
        options: Options,
        processes: Processes,
        events: Events,
        history: History,
        ending: Ending,
        held: AbstractContextManager[None],
    ) -> None:
        self._built = parts.built
        self._trainers = parts.trainers
        self._recorders = parts.recorders
        self._sources = parts.sources
        self._hooks = parts.hooks
        self._schedule = parts.schedule
        self._generators = parts.generators
        self._processes = processes
        self._events = events
        self._history = history
        self._ending = ending
        self._held = held
        self._judge = Judge(parts, processes)
        self._gradients = Differentiation(parts, options, processes, events)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forgets a tick that was begun."""
        self._steps: list[StepRecord] = []
        self._asked: dict[str, bool] = {}
        self._taken = 0
        self._drawn: _Draw | None = None

    def take_turns(self) -> None:
        """Lets each level take its turn if it is due; goes on where the last call was left.

        Then rolls back the levels below those that have stepped.
        """
        for name in self._built.graph.order:
            if name not in self._asked:
                self._take_turn(name)
        with self._broken_off():
            self._roll_back_below([name for name, turned in self._asked.items() if turned])

    def finish_tick(self) -> tuple[StepRecord, ...]:
        """The records of the steps of the tick, which is over with this."""
        steps, self._steps, self._asked = tuple(self._steps), [], {}
        return steps

    def _take_turn(self, name: str) -> None:
        """The level's turn, if it is due; goes on with one that an exception has broken off."""
        is_due = self._schedule.is_due(name)
        while is_due and self._taken < self._built.levels[name].declaration.repeat:
            with self._broken_off():
                self._take_step(name)
        with self._held:
            if is_due:
                self._finish_turn(name)
            self._asked[name], self._taken = is_due, 0

    @contextmanager
    def _broken_off(self) -> Iterator[None]:
        """Lets the hooks of a step that is broken off, and comes again, count it once.

        It is given the same batch again, unless an error has ended it: that may be the reason.
        """
        counts, taken = self._hooks.state_dict(), self._taken
        try:
            yield
        except BaseException as error:
            if self._taken == taken:
                self._hooks.load_state_dict(counts)
            if isinstance(error, Exception):
                self._drawn = None
            raise

    def _finish_turn(self, name: str) -> None:
        self._schedule.finish_turn(name)
        self._sources.finish_turn(name)
        for low in self._built.graph.lower[name]:
            if low in self._recorders:
                self._recorders[low].finish_turn(name)

    def _take_step(self, name: str) -> None:
        trainer, recorder = self._trainers[name], self._recorder(name)
        starts_loop = self._schedule.is_loop_start(name)
        ctx = self._events.of_level(name)
        if starts_loop:
            self._events.fire("loop_start", name, ctx)
        with (
            ExitStack() as behind,
            trainer.undone_on_error(ctx.generator),
            _located(trainer, self._built.tick),
        ):
            if starts_loop:
                trainer.begin_loop()
            if starts_loop and recorder is not None:
                recorder.begin_loop()
            batches, ended = self._draw(trainer, ctx.generator)
            ctx.epoch = trainer.epoch
            trainer.begin_step(ctx.generator)
            items = batches[-1].sources
            self._events.fire("before_step", name, ctx, batch=batches[-1].batch, **items)
            trainer.tune()
            if trainer.level.copied:
                self._gradients.probe(name, batches)
            if recorder is not None:
                seed = self._seed_of_step(name)
                recorder.begin_step(batches, self._events.muted(name), ctx.generator, seed)
            with self._judge.explained(name, batches):
                found = self._gradients.differentiate(name, batches, ctx, recorder)
                metrics = as_numbers(found.metrics)  # which may be made of the parameters
                ctx.skipped = self._judge.is_lost(name, found, batches)
                extras = self._events.offers(trainer, found, batches, ctx)
                norm, rate = self._prepare_update(name, ctx, recorder, extras, batches)
            # an interrupt waits until nothing is put back any more, and hooks have heard of it
            behind.enter_context(self._held)
            trainer.update(skipped=ctx.skipped)
            if recorder is not None:
                recorder.finish_step()
            self._built.remember(name, batches)
            metrics.update(ctx.logged)
            record = self._finish_step(name, ctx, found, metrics, norm, rate)
            behind.callback(self._finish_step_events, name, ctx, extras, ended, record)

    def _draw(self, trainer: Trainer, generator: torch.Generator) -> tuple[tuple[Drawn, ...], bool]:
        """The micro-batches of a step, and whether a pass over the data ends with them.

        A step that Ctrl-C has broken off is given the same again, and the same random numbers.
        """
        if self._drawn is not None:
            self._drawn.streams.restore()
        else:
            with self._held:
                with self._sources.drawn(trainer.level) as items:
                    found = trainer.draw(items)
                self._drawn = _Draw(*found, RecordedStreams(((generator, generator),)))
        return self._drawn.batches, self._drawn.ended

    def _finish_step(
        self,
        name: str,
        ctx: Context,
        found: Gradients,
        metrics: dict[str, Any],
        norm: float,
        rate: float,
    ) -> StepRecord:
        """Counts and records a step that was taken."""
        self._schedule.finish_step(name)
        self._taken, self._drawn = self._taken + 1, None
        record = StepRecord(
            tick=self._built.tick,
            level=name,
            step=self._schedule.steps[name],
            loss=found.loss,
            grad_norm=norm,
            learning_rate=rate,
            metrics=metrics,
            solves=tuple(
                SolveRecord(
                    s.level,
                    describe(s.method),
                    s.solution.steps,
                    s.solution.residual,
                    s.solution.status.value,
                )
                for s in found.solves
            ),
            cosine=found.cosine,
            skipped=ctx.skipped,
        )
        self._steps.append(record)
        self._history.steps.append(record)
        return record

    def _prepare_update(
        self,
        name: str,
        ctx: Context,
        recorder: Recorder | None,
        extras: dict[str, Any],
        batches: tuple[Drawn, ...],
    ) -> tuple[float, float]:
        """Shows hooks the gradients that are there and clips them, unless the step is skipped.

        Returns:
            Their norm, which is no number for a step skipped, and the learning rate.
        """
        trainer = self._trainers[name]
        norm, rate = math.nan, trainer.learning_rate
        if not ctx.skipped:
            self._events.fire("after_backward", name, ctx, **extras)
            if recorder is not None:
                is_other = self._has_other_gradient(name)
                recorder.begin_update(trainer.gradients() if is_other else None)
            rate = trainer.learning_rate
            norm = self._clip(name, ctx, batches)
        if ctx.skipped:
            extras["grads"] = {}
            if recorder is not None:
                recorder.skip_update()
            return math.nan, rate
        return norm, rate

    def _clip(self, name: str, ctx: Context, batches: tuple[Drawn, ...]) -> float:
        """The norm of the gradients before they are clipped, which hooks have seen by now."""
        error, norm = None, math.nan
        try:
            norm = self._trainers[name].clip()
        except NonFiniteError as found:
            error = found
        ctx.skipped = self._judge.judge(name, error, batches)
        return norm

    def _has_other_gradient(self, name: str) -> bool:
        """Whether the gradient of a step may be another than that of its loss here."""
        is_mean = self._processes.count > 1
        return is_mean or bool(self._built.graph.lower[name]) or self._hooks.wants("after_backward")

    def _finish_step_events(
        self, name: str, ctx: Context, extras: dict[str, Any], ended: bool, record: StepRecord
    ) -> None:
        ctx.step, ctx.epoch = self._schedule.steps[name], self._trainers[name].finished_epochs
        self._events.fire("after_step", name, ctx, **extras)
        if ended:
            self._events.fire("epoch_end", name, ctx)
        if self._schedule.is_loop_end(name):
            self._events.fire("loop_end", name, ctx)
        self._ending.hear(ctx)
        record.metrics.update(ctx.logged)

    def _recorder(self, name: str) -> Recorder | None:
        """The level's, once it is warm."""
        is_warm = self._schedule.steps[name] >= self._built.levels[name].declaration.warmup
        return self._recorders.get(name) if is_warm else None

    def _seed_of_step(self, name: str) -> int | None:
        """Of a step's random numbers; None where they are those of the global streams."""
        if self._built.graph.lower[name]:
            rank = self._processes.rank
            return seed_of(self._built, name, (rank, name, self._schedule.steps[name], ""))
        return self._trainers[name].step_seed if self._built.levels[name].copied else None

    def _roll_back_below(self, stepped: list[str]) -> None:
        graph = self._built.graph
        for name in graph.order:
            if not self._built.levels[name].declaration.rollback:
                continue
            if any(upper in stepped for upper in graph.uppers(name)):
                self._trainers[name].roll_back(
                    self._generators[name],
                    lambda name=name: self._repeat_step(name),  # type: ignore[misc]
                )
                if name in self._recorders:
                    self._recorders[name].restart()

    def _repeat_step(self, name: str) -> None:
        trainer = self._trainers[name]
        batches = trainer.level.last_batches
        if batches is None:
            return
        ctx = self._events.of_level(name)
        ctx.step -= 1
        ctx.epoch = trainer.epoch
        located = _located(trainer, self._built.tick)
        with (
            ExitStack() as behind,
            trainer.undone_on_error(ctx.generator),
            located,
            self._judge.explained(name, batches),
        ):
            found = self._gradients.differentiate(name, batches, ctx)
            ctx.skipped = self._judge.is_lost(name, found, batches)
            trainer.tune()
            extras = self._events.offers(trainer, found, batches, ctx)
            self._prepare_update(name, ctx, None, extras, batches)
            behind.enter_context(self._held)
            trainer.update(skipped=ctx.skipped)
        self._ending.hear(ctx)


class _Draw(NamedTuple):
    """What a step was given: micro-batches, whether a pass ended, the random numbers behind."""

    batches: tuple[Drawn, ...]
    ended: bool
    streams: RecordedStreams


@contextmanager
def _located(trainer: Trainer, tick: int) -> Iterator[None]:
    """Adds level and tick to an exception from a user's function."""
    try:
        yield
    except Exception as error:
        level = trainer.level
        where = "" if isinstance(error, MlodecoError) else f"level {level.name!r} ({level.site}), "
        error.add_note(f"in {where}tick {tick}")
        raise
