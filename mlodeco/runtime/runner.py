"""The runner: ticks of a program, level by level."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from signal import Signals as Signal
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator

from mlodeco.calculus.randomness import RecordedStreams, SavedRandomness, randomness_set_aside
from mlodeco.calculus.stateless import frozen
from mlodeco.calculus.sweep import Hypergradient
from mlodeco.calculus.tape import Tape
from mlodeco.declare.checks import as_integer
from mlodeco.declare.records import describe_validation
from mlodeco.declare.registry import Registry, current_registry
from mlodeco.errors import (
    MlodecoError,
    NonFiniteError,
    Preempted,
    RedeclarationWarning,
    RunError,
    counted,
    quoted,
)
from mlodeco.hypergrad import describe
from mlodeco.runtime.alike import compare_notes
from mlodeco.runtime.assembly import Options, assemble
from mlodeco.runtime.build import Build
from mlodeco.runtime.causes import Cause, find_cause
from mlodeco.runtime.checkpoint.folder import Contents, write
from mlodeco.runtime.checkpoint.journal import Journal
from mlodeco.runtime.checkpoint.output import Output, Saving
from mlodeco.runtime.checkpoint.signals import Interrupts
from mlodeco.runtime.checkpoint.state import Owners
from mlodeco.runtime.checkpoint.store import Progress, collect, load, load_newest, refused
from mlodeco.runtime.compiling import backend_of
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import (
    compute_hypergradient,
    muted_context,
    probe_level,
    seed_of,
    step_point,
    warn_of_nested_paths,
)
from mlodeco.runtime.functional import check_nested
from mlodeco.runtime.history import (
    History,
    SolveRecord,
    StepRecord,
    Tick,
    ValidationRecord,
    as_number,
)
from mlodeco.runtime.loops import items_of, unrolled_edges
from mlodeco.runtime.memory import peak_memory
from mlodeco.runtime.nonfinite import POLICIES, agree
from mlodeco.runtime.precision import choose_precision, set_precision
from mlodeco.runtime.processes import (
    REDUCTIONS,
    check_choice,
    processes_of,
    quiet,
)
from mlodeco.runtime.recorder import Recorder
from mlodeco.runtime.report import warn_of_trouble
from mlodeco.runtime.result import Best, Result
from mlodeco.runtime.seeding import seed_all, seed_generators
from mlodeco.runtime.shares import TAILS
from mlodeco.runtime.trackers import Trackers, tracking_accelerator
from mlodeco.runtime.trainer import Gradients, Trainer


class Listener(Protocol):
    """Is told what happens in a run; a display, for instance."""

    def on_start(self, runner: Runner, steps: int) -> None:
        """Before the first tick."""

    def on_tick(self, tick: Tick) -> None:
        """After each tick."""

    def on_end(self, result: Result) -> None:
        """After the last tick."""

    def on_error(self) -> None:
        """When the run is left by an exception."""


class Runner:
    """Steps the levels of a program in the right order.

    Args:
        program: the program; default: the current one.
        seed: seeds torch, ``random`` and NumPy, before modules are built. Without it
            their streams go on from where they are.
        accelerator: an Accelerator to use; default: a new one.
        nested: hypergradients are the true derivatives through nested best responses, in place
            of Eq. (2), which takes the levels below a mid-level as constants.
        reduce: in several processes, ``"exact"`` averages every product of a hypergradient over
            them; ``"once"`` averages finished hypergradients.
        tails: what becomes in several processes of the end of a pass over a DataLoader, where
            there is no full batch for each: ``"drop"`` leaves it out, ``"pad"`` fills it up with
            samples from the beginning of the pass.
        compile: whether the exact products are compiled: True, or the name of a backend of
            ``torch.compile``. A level for which this cannot be done is named in a warning.
        mixed_precision: ``"bf16"`` or ``"fp16"`` runs the functions of levels without a
            ``precision`` of their own, and validations, under autocast, ``"no"`` does not;
            default: that of the Accelerator, or of ``accelerate launch``.
        out: a folder for metrics and checkpoints.
        checkpoint_every: ticks between two checkpoints.
        keep: how many of the newest are kept.
        resume: ``"auto"`` to go on from the newest good checkpoint in ``out``, or the folder of
            one to go on from.
        checkpoint_errors: ``"warn"`` to go on where a checkpoint cannot be written, or
            ``"raise"``.
        nonfinite: what becomes of a step whose loss, cotangent, solve or gradient is not finite:
            ``"raise"`` ends the run before it, ``"skip"`` leaves it out, up to 100 in a row,
            ``"warn"`` takes it. Overflows in float16 are skipped in any case.
        log_with: the names of Accelerate's trackers, or objects of one's own, to which each tick
            is logged; default: those of the Accelerator given.
        project: what the trackers call the run.

    Raises:
        MlodecoError: the program cannot be run.
    """

    def __init__(
        self,
        program: Registry | None = None,
        *,
        seed: int | None = None,
        accelerator: Accelerator | None = None,
        nested: bool = False,
        reduce: str = "exact",
        tails: str = "drop",
        compile: bool | str = False,  # noqa: A002 (as torch names it)
        mixed_precision: str | None = None,
        out: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        keep: int = 3,
        resume: str | os.PathLike[str] | None = None,
        checkpoint_errors: str = "warn",
        nonfinite: str = "raise",
        log_with: Any = None,
        project: str = "mlodeco",
    ) -> None:
        saving = Saving(out, checkpoint_every, keep, resume, checkpoint_errors)
        saving.check()
        registry = program if program is not None else current_registry()
        if not isinstance(registry, Registry):
            raise RunError(f"program={program!r} is not a Program.", remedy="pass a Program.")
        self.history: History
        self.listeners: list[Listener] = []
        self.tick = 0
        check_nested(nested)
        check_choice("reduce", reduce, REDUCTIONS)
        check_choice("tails", tails, TAILS)
        check_choice("nonfinite", nonfinite, POLICIES)
        backend = backend_of(compile, nested=nested)
        self._best: Best | None = None
        self._stop_reason: str | None = None
        self._steps: list[StepRecord] = []
        self._asked: dict[str, bool] = {}
        self._taken = 0
        self._interrupts = Interrupts()
        self._drawn: _Draw | None = None
        self._is_between_ticks = True
        self._is_resumed = False
        self._last_tick: int | None = None
        self._signum: int | None = None
        self._saved_at: tuple[int, int] | None = None
        self._accelerator = tracking_accelerator(accelerator, log_with, project, out)
        precision = choose_precision(
            mixed_precision, self._accelerator, is_own=accelerator is not None
        )
        self._options = Options(nested, reduce, tails, nonfinite, backend, precision)
        self._processes = processes_of(
            self._accelerator.process_index,
            self._accelerator.num_processes,
            self._accelerator.device,
        )
        with self._processes.ended_together(), quiet(self._processes):
            self._begin(registry, seed, saving)
        tracked = self._accelerator.log_with or self._accelerator.trackers
        if self.is_main and tracked:
            self.listeners.append(Trackers(self._accelerator, project, self.built))

    def _begin(self, registry: Registry, seed: int | None, saving: Saving) -> None:
        """Seeds, builds and resumes; if that fails, random numbers are as before."""
        before = SavedRandomness()
        try:
            if seed is not None:
                # processes differ, in dropout for instance; what must not is taken from the first
                seed_all(seed, by_process=self._processes.count > 1)
            self._set_up(registry, seed)
            self._output = None if saving.out is None else Output(saving, self._processes)
            self._resume(saving)
        except BaseException:
            before.restore()
            raise

    def _set_up(self, registry: Registry, seed: int | None) -> None:
        """Builds the program and everything that steps it."""
        parts = assemble(registry, self._options, self._accelerator, self._processes)
        self._program, self._version = registry, registry.version
        self.built: Build = parts.built
        self._trainers = parts.trainers
        self._sources = parts.sources
        self._hooks = parts.hooks
        self._compilers = parts.compilers
        self._recorders = parts.recorders
        self._validations = parts.validations
        self._schedule = parts.schedule
        self._generators = parts.generators
        self.history = History(self.built.levels, is_validated=bool(parts.validations))
        self._run_seed = torch.initial_seed() if seed is None else seed
        self._take_over()
        seed_generators(self._generators.values(), self._run_seed, self._processes.rank)
        self._journal = Journal(self.history)
        self._owners = Owners(
            built=self.built,
            trainers=self._trainers,
            recorders=self._recorders,
            sources=self._sources,
            validations=self._validations,
            hooks=self._hooks,
            schedule=self._schedule,
            generators=self._generators,
            tracked=registry.tracked,
            make_context=self._muted,
            processes=self._processes,
        )

    def _seed_of_step(self, name: str) -> int | None:
        """Of a step's random numbers; None where they are those of the global streams."""
        if self.built.graph.lower[name]:
            rank = self._processes.rank
            return seed_of(self.built, name, (rank, name, self._schedule.steps[name], ""))
        return self._trainers[name].step_seed if self.built.levels[name].copied else None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self._processes.is_main

    @property
    def best(self) -> Best | None:
        """The best validation so far; None if nothing is monitored."""
        return self._best

    @property
    def peak_memory(self) -> int | None:
        """The most bytes of memory taken: by tensors on a GPU, else by the process."""
        return peak_memory(self._accelerator.device)

    def __iter__(self) -> Iterator[Tick]:
        """Ticks without end, until something stops the run."""
        while self._stop_reason is None:
            yield self.step()

    def __repr__(self) -> str:
        return f"<Runner: levels {quoted(self.built.levels)}; {counted(self.tick, 'tick')} run>"

    def run(self, steps: int) -> Result:
        """Runs ``steps`` ticks more, or until something stops the run.

        Raises:
            RunError: ``steps`` is not a positive integer.
            Preempted: SIGTERM or SIGINT ended a run that has a folder, behind a checkpoint.
        """
        check_steps(steps)
        if self._stop_reason is not None:
            self._is_resumed = False
        return self._run_to(self.tick + steps, steps)

    def run_to(self, tick: int) -> Result:
        """Runs until so many ticks have been run in all, those before a checkpoint included.

        A run that was resumed where it had come to an end stays there.

        Raises:
            RunError: ``tick`` is not a positive integer.
            Preempted: as for :meth:`run`.
        """
        check_steps(tick)
        return self._run_to(tick, tick)

    def _run_to(self, last: int, steps: int) -> Result:
        with ExitStack() as stack:
            if self._output is not None:
                stack.enter_context(self._output.signals)
            stack.enter_context(self._interrupts)
            stack.enter_context(self._processes.ended_together())
            stack.enter_context(quiet(self._processes))
            if self._output is not None:
                stack.enter_context(self._output.locked())
            result = self._run(last, steps)
        self._leave_if_asked(result)
        return result

    def _run(self, last: int, steps: int) -> Result:
        if not self._is_resumed:
            self._stop_reason = None
            for validation in self._validations:
                validation.without_best = 0
        self._is_resumed, self._signum = False, None
        self._last_tick = last
        try:
            for listener in self.listeners:
                listener.on_start(self, max(last - self.tick, 0))
            self._fire_run("run_start")
            self._agree_on_end()
            while self.tick < last and not self._is_ending:
                self.step()
            if self._signum is None:
                self._finish()
            if self._output is not None:
                self._save(self._output)
            result = Result(
                self.history,
                self._best,
                self._reason(steps),
                self.tick,
                None if self._output is None else self._output.path,
            )
            if self._signum is None:
                self._fire_run("run_end", history=self.history)
                self._agree_on_end()
            self._record(at_once=True)
        except BaseException as error:
            for listener in self.listeners:
                listener.on_error()
            try:
                self._record(at_once=True)
            except RunError as other:
                error.add_note(str(other))
            raise
        finally:
            self._last_tick = None
        for listener in self.listeners:
            listener.on_end(result)
        return result

    def _record(self, *, at_once: bool) -> None:
        """Adds the records of ticks that are over to the run's folder."""
        if self._output is not None:
            self._output.record(self._journal, self.tick, at_once=at_once)

    def _finish(self) -> None:
        """What comes behind the last tick."""
        final = tuple(self._validate(final=True))
        compare_notes(self.built, self._processes)
        if final:
            self._tell(Tick(self.tick, (), final))

    def _reason(self, steps: int) -> str:
        """Why the run ended."""
        if self._signum is not None:
            return f"{Signal(self._signum).name} was received"
        told = f"{self._never_stepped()}{self._lost_steps()}"
        return self._stop_reason or f"all {steps} steps were run{told}"

    @property
    def _is_ending(self) -> bool:
        return self._stop_reason is not None or self._signum is not None

    def _leave_if_asked(self, result: Result) -> None:
        """Leaves the process if a signal has ended the run, or has come too late for that.

        Raises:
            Preempted: one has.
        """
        if self._output is None:
            return
        signum = self._signum or self._output.signals.received
        if signum is not None:
            message = (
                f"mlodeco: {Signal(signum).name} ended the run at tick {result.ticks}; go on with "
                f"run(..., out={str(self._output.path)!r}, resume='auto') "
                f"(checkpoint: {self._output.newest or 'none could be written'})"
            )
            if self.is_main:
                print(message, file=sys.stderr, flush=True)
            raise Preempted(message, signum)

    def step(self) -> Tick:
        """One tick: levels without lower levels step, then those whose turn has come.

        If a user's function raises, or Ctrl-C breaks a tick off, the level that was at it is as
        before its step, and the next call, or ``run``, goes on with the same tick from there:
        behind an error with the next batch, behind Ctrl-C with the same batch and random numbers.
        Behind its optimizer's step, at ``after_step`` and later, a step counts.

        Fires neither ``run_start`` nor ``run_end``, which belong to :meth:`run`. In several
        processes all end by an error of one, and none goes on.

        Raises:
            RunError: another process has failed.
        """
        with self._interrupts, self._processes.ended_together(), quiet(self._processes):
            return self._step()

    def _step(self) -> Tick:
        self._warn_of_changes()
        self._take_over()
        self._is_between_ticks = False
        for name in self.built.graph.order:
            if name not in self._asked:
                self._take_turn(name)
        with self._broken_off():
            self._roll_back_below([name for name, turned in self._asked.items() if turned])
        with self._interrupts.held:
            self.tick += 1
            steps, self._steps, self._asked = tuple(self._steps), [], {}
        tick = Tick(self.tick, steps, tuple(self._validate()))
        self._agree_on_end()
        self._is_between_ticks = True
        self._tell(tick)
        self._save_if_due()
        return tick

    def _warn_of_changes(self) -> None:
        if self._program.version != self._version:
            self._version = self._program.version
            warnings.warn(
                "the program has other declarations than when this Runner was made, which goes on "
                "with those. Remedy: make a new one, runner = Runner(program, ...).",
                RedeclarationWarning,
                stacklevel=4,
            )

    def _agree_on_end(self) -> None:
        """Stops all processes where one has a reason to, for that of the first that has."""
        signum = None if self._output is None else self._output.signals.received
        own = self._stop_reason, signum
        if self._processes.first_with(own != (None, None)) is not None:
            found = self._processes.exchange(own)
            self._stop_reason = next((reason for reason, _ in found if reason is not None), None)
            self._signum = next((number for _, number in found if number is not None), None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a checkpoint, from which :meth:`load` goes on to the bit.

        Of several processes all must call it. A checkpoint that is there is replaced.

        Args:
            path: a folder for it.

        Returns:
            The folder.

        Raises:
            RunError: a tick is not finished: a hook has called this, or a step has failed.
            CheckpointError: it cannot be written, or the state holds what it cannot hold.
        """
        folder = Path(path).absolute()
        with self._processes.ended_together(), quiet(self._processes):
            write(folder, self._contents(), self._processes)
        return folder

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint of the same program, of any number of processes.

        Args:
            path: its folder.

        Raises:
            CheckpointError: it is damaged, or belongs to another program or version.
        """
        with self._processes.ended_together(), quiet(self._processes):
            self._load(Path(path).absolute())

    def _load(self, path: Path) -> None:
        progress = load(self._owners, self._journal, path, self._accelerator.device)
        with refused(path):
            self._best = None if progress.best is None else Best(**progress.best)
        self.tick, self._run_seed = progress.tick, progress.run_seed
        self._stop_reason, self._is_resumed = progress.stop_reason, True
        self._steps, self._asked, self._taken, self._drawn = [], {}, 0, None
        self._is_between_ticks = True
        self._saved_at = None
        if self._output is not None:
            self._output.begin_anew()
        if self._best is not None and self._output is not None:
            self._best = replace(self._best, path=self._output.best(self._best.tick))

    def _resume(self, saving: Saving) -> None:
        """Goes on from a checkpoint if that was asked for, and makes the run's folder ready."""
        resumed = None
        if saving.resume is not None and saving.resume != "auto":
            resumed = Path(saving.resume).absolute()
            self._load(resumed)
        if self._output is None:
            return
        with self._output.locked():
            if saving.resume == "auto":
                resumed = load_newest(self._output.candidates(), self._load)
            best = None if self._best is None else self._best.path
            self._output.begin(self._journal, resumed, best)
        if resumed is not None and resumed == self._output.own(self.tick):
            self._saved_at = self._stands
        self._owners.check()

    def _contents(self) -> Contents:
        """Everything that decides how the run goes on.

        Raises:
            RunError: a tick is not finished.
            CheckpointError: it holds what a checkpoint cannot.
        """
        if not self._is_between_ticks:
            raise RunError(
                "a checkpoint was asked for in the middle of a tick.",
                remedy="save between two calls of step(), or run(out=..., checkpoint_every=...).",
            )
        self._journal.update(self.tick)
        best = None if self._best is None else asdict(replace(self._best, path=None))
        progress = Progress(self.tick, self._run_seed, self._stop_reason, best)
        return collect(self._owners, progress, self._journal.text())

    def _save_if_due(self) -> None:
        """Writes the checkpoint of a tick; a run writes that of its last tick at its end."""
        is_last = self._last_tick is not None and (self.tick >= self._last_tick or self._is_ending)
        if self._output is not None and not is_last:
            self._save(self._output, is_due=self._output.is_due(self.tick))

    def _save(self, output: Output, *, is_due: bool = True) -> None:
        """Writes the checkpoints that are due, those that are there already left out."""
        written: list[Path | None] = []
        if self._best is not None and self._best.tick == self.tick and self._best.path is None:
            written.append(output.save_best(self.tick, self._contents))
            self._best = replace(self._best, path=written[0])
        self._journal.update(self.tick)
        stands = self._stands
        if is_due and stands != self._saved_at:
            self._record(at_once=True)
            written.append(output.save(self.tick, self._contents))
            self._saved_at = None if written[-1] is None else stands
        for path in written:
            self._announce(path)

    @property
    def _stands(self) -> tuple[int, int]:
        """The tick and the records, by which a checkpoint is known to be there already."""
        return self.tick, len(self._journal)

    def _announce(self, path: Path | None) -> None:
        if path is not None and self._hooks.wants("checkpoint"):
            self._fire_run("checkpoint", path=path)
            self._agree_on_end()

    def _take_over(self) -> None:
        """Makes the program's tick, seed, precision and optimizers those of this run."""
        self.built.tick, self.built.run_seed = self.tick + 1, self._run_seed
        set_precision(self.built.levels.values(), self._options.precision)
        for trainer in self._trainers.values():
            level = trainer.level
            level.optimizer, level.scheduler = trainer.optimizer, trainer.scheduler
            level.rule_state = trainer.rule_state

    def _tell(self, tick: Tick) -> None:
        self._record(at_once=self._last_tick is None)
        for listener in self.listeners:
            listener.on_tick(tick)

    def _never_stepped(self) -> str:
        idle = [name for name, count in self._schedule.steps.items() if not count]
        if not idle:
            return ""
        return f"; {quoted(idle)} never had a turn: its lower levels' inner loops are longer"

    def _lost_steps(self) -> str:
        lost = {name: trainer.watch.skipped for name, trainer in self._trainers.items()}
        told = [f"{counted(count, 'step')} of {name!r}" for name, count in lost.items() if count]
        return f"; skipped, since not finite: {', '.join(told)}" if told else ""

    def _take_turn(self, name: str) -> None:
        """The level's turn, if it is due; goes on with one that an exception has broken off."""
        is_due = self._schedule.is_due(name)
        while is_due and self._taken < self.built.levels[name].declaration.repeat:
            with self._broken_off():
                self._take_step(name)
        with self._interrupts.held:
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
        for low in self.built.graph.lower[name]:
            if low in self._recorders:
                self._recorders[low].finish_turn(name)

    def _take_step(self, name: str) -> None:
        trainer, recorder = self._trainers[name], self._recorder(name)
        starts_loop = self._schedule.is_loop_start(name)
        ctx = self._context(name)
        if starts_loop:
            self._fire("loop_start", name, ctx)
        with trainer.undone_on_error(ctx.generator), _located(trainer, self.built.tick):
            if starts_loop:
                trainer.begin_loop()
            if starts_loop and recorder is not None:
                recorder.begin_loop()
            batches, ended = self._draw(trainer, ctx.generator)
            ctx.epoch = trainer.epoch
            trainer.begin_step(ctx.generator)
            items = batches[-1].sources
            self._fire("before_step", name, ctx, batch=batches[-1].batch, **items)
            trainer.tune()
            if trainer.level.copied:
                self._probe(name, batches)
            if recorder is not None:
                seed = self._seed_of_step(name)
                recorder.begin_step(batches, self._muted(name), ctx.generator, seed)
            with self._explained(name, batches):
                found = self._differentiate(name, batches, ctx, recorder)
                metrics = _numbers(found.metrics)  # which may be made of the parameters
                ctx.skipped = self._is_lost(name, found, batches)
                extras = self._extras(trainer, found, batches, ctx)
                norm, rate = self._prepare_update(name, ctx, recorder, extras, batches)
            with self._interrupts.held:
                trainer.update(skipped=ctx.skipped)
                if recorder is not None:
                    recorder.finish_step()
                self.built.remember(name, batches)
                record = self._finish_step(name, ctx, found, metrics, norm, rate)
        self._finish_step_events(name, ctx, extras, ended)
        record.metrics.update(ctx.logged)

    def _draw(self, trainer: Trainer, generator: torch.Generator) -> tuple[tuple[Drawn, ...], bool]:
        """The micro-batches of a step, and whether a pass over the data ends with them.

        A step that Ctrl-C has broken off is given the same again, and the same random numbers.
        """
        if self._drawn is not None:
            self._drawn.streams.restore()
        else:
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
            tick=self.built.tick,
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
        self.history.steps.append(record)
        return record

    @contextmanager
    def _explained(self, name: str, batches: tuple[Drawn, ...]) -> Iterator[None]:
        """Adds the step and the likely cause to an error that says what is not finite."""
        try:
            yield
        except NonFiniteError as error:
            if not error.when:
                self._explain(error, name, batches)
            raise

    def _explain(self, error: NonFiniteError, name: str, batches: tuple[Drawn, ...]) -> Cause:
        cause = find_cause(self.built, name, batches, error)
        when = f"step {self._schedule.steps[name] + 1} of level {name!r}, tick {self.built.tick}."
        error.explain(when=when, cause=cause.text, remedy=cause.remedy or error.remedy)
        return cause

    def _is_lost(self, name: str, found: Gradients, batches: tuple[Drawn, ...]) -> bool:
        """Whether a step is skipped, with all as before it; the same in all processes."""
        trainer = self._trainers[name]
        if trainer.scale is not None:
            return trainer.overflowed(found)
        return self._judge(name, trainer.trouble(found), batches)

    def _judge(self, name: str, error: NonFiniteError | None, batches: tuple[Drawn, ...]) -> bool:
        """Whether a step is skipped for what a process has found; if so all is as before it.

        Raises:
            NonFiniteError: the run ends by it.
        """
        trainer = self._trainers[name]
        if trainer.watch.is_strict:
            if error is not None:
                raise error
            return False
        cause = None if error is None else self._explain(error, name, batches)
        agreed = agree(self._processes, error, cause)
        if agreed is None or not trainer.watch.judge(*agreed):
            return False
        trainer.undo_step()
        return True

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
            self._fire("after_backward", name, ctx, **extras)
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
        ctx.skipped = self._judge(name, error, batches)
        return norm

    def _has_other_gradient(self, name: str) -> bool:
        """Whether the gradient of a step may be another than that of its loss here."""
        is_mean = self._processes.count > 1
        return is_mean or bool(self.built.graph.lower[name]) or self._hooks.wants("after_backward")

    def _finish_step_events(
        self, name: str, ctx: Context, extras: dict[str, Any], ended: bool
    ) -> None:
        ctx.step, ctx.epoch = self._schedule.steps[name], self._trainers[name].finished_epochs
        self._fire("after_step", name, ctx, **extras)
        if ended:
            self._fire("epoch_end", name, ctx)
        if self._schedule.is_loop_end(name):
            self._fire("loop_end", name, ctx)
        self._stop_reason = self._stop_reason or ctx.stop_reason

    def _recorder(self, name: str) -> Recorder | None:
        """The level's, once it is warm."""
        is_warm = self._schedule.steps[name] >= self.built.levels[name].declaration.warmup
        return self._recorders.get(name) if is_warm else None

    def _tapes(self, top: str) -> dict[str, Tape]:
        """The executed inner loops that the hypergradient of a level goes back over."""
        edges = unrolled_edges(self.built, self.built.methods, top)
        return {
            low: self._recorders[low].tape([u for u, other in edges if other == low])
            for low in dict.fromkeys(low for _, low in edges)
        }

    def _differentiate(
        self,
        name: str,
        batches: tuple[Drawn, ...],
        ctx: Context,
        recorder: Recorder | None = None,
    ) -> Gradients:
        """Leaves ``.grad`` at the (hyper)gradient of the level at its current parameters."""
        if self.built.graph.lower[name]:
            return self._differentiate_responses(name, batches, ctx)
        self._probe(name, batches)
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
        known = {n: level.last_batches for n, level in self.built.levels.items()}
        items = {n: b for n, b in known.items() if b is not None}
        own = ctx.with_own_generator()
        trouble: NonFiniteError | None = None
        try:
            hyper = compute_hypergradient(
                self.built,
                name,
                {**items, name: batches},
                lambda n: own if n == name else self._muted(n),
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
            warn_of_nested_paths(self.built, name)
        warn_of_trouble(self.built, hyper.solves)
        trainer.adopt(hyper.gradient, hyper.state)
        trainer.memories = hyper.memories
        cosine = trainer.turn_of(hyper)
        found = Gradients(hyper.loss, hyper.metrics, hyper.solves, cosine, trouble)
        self._fire("hypergradient", name, ctx, **self._extras(trainer, found, batches, ctx))
        return found

    def _probe(self, name: str, batches: tuple[Drawn, ...]) -> None:
        if not self.built.levels[name].is_probed:
            rank = self._processes.rank
            probe_level(self.built, name, batches[0], self._muted(name), rank)

    def _differentiate_replicas(
        self, name: str, batches: tuple[Drawn, ...], ctx: Context, recorder: Recorder | None
    ) -> Gradients:
        """The gradients of a level's replicas, whose random numbers come from the step's seed."""
        trainer, own = self._trainers[name], ctx.with_own_generator()
        with randomness_set_aside(), torch.enable_grad():
            scale = trainer.own_scale
            point = step_point(self.built, name, batches, own, trainer.step_seed, scale)
            if recorder is not None and recorder.recording.keep_graph:
                graph = recorder.differentiate(point.batches, own.generator)
                found = trainer.adopt_graph(graph, point)
            else:
                found = trainer.differentiate(point)
        ctx.adopt(own)
        return found

    def _extras(
        self, trainer: Trainer, found: Gradients, batches: tuple[Drawn, ...], ctx: Context
    ) -> dict[str, Any]:
        return {
            "batch": batches[-1].batch,
            "grads": trainer.gradients() if self._wants_gradients(ctx) else {},
            "loss": found.loss,
            "metrics": {**found.metrics, **ctx.logged},
            **batches[-1].sources,
        }

    def _wants_gradients(self, ctx: Context) -> bool:
        """Whether some hook takes gradients, and there are some."""
        return self._hooks.listens_to_gradients and not ctx.skipped

    def _roll_back_below(self, stepped: list[str]) -> None:
        graph = self.built.graph
        for name in graph.order:
            if not self.built.levels[name].declaration.rollback:
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
        ctx = self._context(name)
        ctx.step -= 1
        ctx.epoch = trainer.epoch
        located = _located(trainer, self.built.tick)
        with (
            trainer.undone_on_error(ctx.generator),
            located,
            self._explained(name, batches),
        ):
            found = self._differentiate(name, batches, ctx)
            ctx.skipped = self._is_lost(name, found, batches)
            trainer.tune()
            extras = self._extras(trainer, found, batches, ctx)
            self._prepare_update(name, ctx, None, extras, batches)
            with self._interrupts.held:
                trainer.update(skipped=ctx.skipped)
        self._stop_reason = self._stop_reason or ctx.stop_reason

    def _validate(self, *, final: bool = False) -> Iterator[ValidationRecord]:
        for validation in self._validations:
            is_due = final or self.tick % validation.declaration.every == 0
            if not is_due or validation.last_tick == self.tick:
                continue
            compare_notes(self.built, self._processes)
            ctx = self._context(None)
            try:
                metrics = validation.run(ctx)
            except Exception as error:
                what = describe_validation(validation.declaration)
                error.add_note(f"raised in {what} ({validation.declaration.site})")
                raise
            validation.last_tick = self.tick
            if validation.judge(metrics):
                name = validation.declaration.monitor or ""
                self._best = Best(self.tick, name, metrics[name], metrics)
            if validation.is_exhausted:
                self._stop_reason = validation.why_exhausted
            self._hooks.fire("validate", ctx=ctx, metrics=metrics)
            self._stop_reason = self._stop_reason or ctx.stop_reason
            record = ValidationRecord(self.tick, {**metrics, **_numbers(ctx.logged)})
            self.history.validations.append(record)
            yield record

    def _context(self, name: str | None) -> Context:
        if name is None:
            return Context(
                tick=self.tick,
                device=self._accelerator.device,
                accelerator=self._accelerator,
                processes=self._processes,
            )
        return Context(
            level=name,
            tick=self.built.tick,
            step=self._schedule.steps[name],
            epoch=self._trainers[name].finished_epochs,
            device=self._accelerator.device,
            generator=self._generators[name],
            accelerator=self._accelerator,
            processes=self._processes,
        )

    def _muted(self, name: str) -> Context:
        return muted_context(
            self.built,
            name,
            step=self._schedule.steps[name],
            epoch=self._trainers[name].epoch,
            accelerator=self._accelerator,
            processes=self._processes,
        )

    def _fire(self, event: str, name: str, ctx: Context, **offered: Any) -> None:
        if self._hooks.wants(event):
            trainer = self._trainers[name]
            self._hooks.fire(
                event,
                name,
                ctx=ctx,
                optimizer=trainer.optimizer,
                scheduler=trainer.scheduler,
                **offered,
            )

    def _fire_run(self, event: str, **offered: Any) -> None:
        ctx = self._context(None)
        self._hooks.fire(event, ctx=ctx, **offered)
        self._stop_reason = self._stop_reason or ctx.stop_reason


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


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: as_number(value) for key, value in metrics.items()}


def check_steps(steps: object) -> None:
    """Refuses a number of steps that is not a positive integer.

    Raises:
        RunError: it is not.
    """
    number = as_integer(steps)
    if number is None or number < 1:
        raise RunError(
            f"steps={steps!r}.",
            expected="a positive integer, the number of ticks.",
            remedy="run(steps=1000), for instance.",
        )
