"""The runner: ticks of a program, level by level."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from signal import Signals as Signal
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from mlodeco.calculus.randomness import SavedRandomness
from mlodeco.declare.checks import as_integer
from mlodeco.declare.records import describe_validation
from mlodeco.declare.registry import Registry, current_registry
from mlodeco.errors import Preempted, RedeclarationWarning, RunError, counted, quoted
from mlodeco.runtime.alike import compare_notes
from mlodeco.runtime.assembly import Options, assemble
from mlodeco.runtime.build import Build
from mlodeco.runtime.checkpoint.folder import write
from mlodeco.runtime.checkpoint.journal import Journal
from mlodeco.runtime.checkpoint.keeping import Keeper, Standing
from mlodeco.runtime.checkpoint.output import Output, Saving
from mlodeco.runtime.checkpoint.signals import Interrupts
from mlodeco.runtime.checkpoint.state import Owners, read_buffers
from mlodeco.runtime.compiling import backend_of
from mlodeco.runtime.ending import Ending
from mlodeco.runtime.events import Events
from mlodeco.runtime.functional import check_nested
from mlodeco.runtime.history import History, StepRecord, Tick, ValidationRecord, as_numbers
from mlodeco.runtime.memory import peak_memory
from mlodeco.runtime.nonfinite import POLICIES
from mlodeco.runtime.precision import choose_precision, set_precision
from mlodeco.runtime.processes import REDUCTIONS, check_choice, processes_of, quiet
from mlodeco.runtime.result import Best, Result
from mlodeco.runtime.seeding import seed_all, seed_generators
from mlodeco.runtime.shares import TAILS
from mlodeco.runtime.stepping import Stepping
from mlodeco.runtime.trackers import Trackers, tracking_accelerator


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
        self.built: Build
        self.history: History
        self.listeners: list[Listener] = []
        check_nested(nested)
        check_choice("reduce", reduce, REDUCTIONS)
        check_choice("tails", tails, TAILS)
        check_choice("nonfinite", nonfinite, POLICIES)
        backend = backend_of(compile, nested=nested)
        self._standing = Standing()
        self._ending = Ending()
        self._interrupts = Interrupts()
        self._last_tick: int | None = None
        self._open: tuple[tuple[StepRecord, ...], list[ValidationRecord]] | None = None
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
            self._set_up(registry, seed, saving)
            self._keeper.resume(saving)
        except BaseException:
            before.restore()
            raise

    def _set_up(self, registry: Registry, seed: int | None, saving: Saving) -> None:
        """Builds the program and everything that steps it."""
        parts = assemble(registry, self._options, self._accelerator, self._processes)
        self._program, self._version = registry, registry.version
        self._parts, self.built, self._trainers = parts, parts.built, parts.trainers
        self.history = History(self.built.levels, is_validated=bool(parts.validations))
        self._standing.run_seed = torch.initial_seed() if seed is None else seed
        self._take_over()
        seed_generators(parts.generators.values(), self._standing.run_seed, self._processes.rank)
        self._events = Events(parts, self._accelerator, self._processes)
        self._stepping = Stepping(
            parts,
            self._options,
            self._processes,
            self._events,
            self.history,
            self._ending,
            self._interrupts.held,
        )
        self._journal = Journal(self.history)
        owners = Owners(
            built=parts.built,
            trainers=parts.trainers,
            recorders=parts.recorders,
            sources=parts.sources,
            validations=parts.validations,
            hooks=parts.hooks,
            schedule=parts.schedule,
            generators=parts.generators,
            tracked=registry.tracked,
            make_context=self._events.muted,
            processes=self._processes,
            declared={n: list(read_buffers(one.module)) for n, one in self.built.levels.items()},
        )
        self._output = None if saving.out is None else Output(saving, self._processes)
        self._keeper = Keeper(
            self._standing,
            self._ending,
            owners,
            self._journal,
            self._output,
            self._accelerator.device,
        )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints."""
        return self._processes.is_main

    @property
    def tick(self) -> int:
        """Ticks run, those before a checkpoint included."""
        return self._standing.tick

    @property
    def best(self) -> Best | None:
        """The best validation so far; None if nothing is monitored."""
        return self._standing.best

    @property
    def peak_memory(self) -> int | None:
        """The most bytes of memory taken: by tensors on a GPU, else by the process."""
        return peak_memory(self._accelerator.device)

    def __iter__(self) -> Iterator[Tick]:
        """Ticks without end, until something stops the run."""
        while self._ending.reason is None:
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
        if self._ending.reason is not None:
            self._standing.is_resumed = False
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
        if not self._standing.is_resumed and self._open is None:
            self._ending.reason = None
            for validation in self._parts.validations:
                validation.without_best = 0
        self._standing.is_resumed, self._ending.signum = False, None
        self._last_tick = last
        try:
            for listener in self.listeners:
                listener.on_start(self, max(last - self.tick, 0))
            self._fire_run("run_start")
            self._agree_on_end()
            while self._open is not None or (self.tick < last and not self._ending.is_near):
                self.step()
            if self._ending.signum is None:
                self._finish()
            self._announce(self._keeper.save())
            taken, skipped = self._parts.schedule.steps, self.history.skipped
            result = Result(
                self.history,
                self._standing.best,
                self._ending.tell(steps, taken, skipped),
                self.tick,
                None if self._output is None else self._output.path,
            )
            if self._ending.signum is None:
                self._fire_run("run_end", history=self.history)
                self._agree_on_end()
            self._keeper.record(at_once=True)
        except BaseException as error:
            self._standing.is_resumed = True  # the next run goes on with this one
            for listener in self.listeners:
                with _noted_on(error):
                    listener.on_error()
            with _noted_on(error):
                self._keeper.record(at_once=True)
            raise
        finally:
            self._last_tick = None
        for listener in self.listeners:
            listener.on_end(result)
        return result

    def _finish(self) -> None:
        """What comes behind the last tick."""
        final: list[ValidationRecord] = []
        self._validate(final, is_last=True)
        compare_notes(self.built, self._processes)
        if final:
            self._tell(Tick(self.tick, (), tuple(final)))

    def _leave_if_asked(self, result: Result) -> None:
        """Leaves the process if a signal has ended the run, or has come too late for that.

        Raises:
            Preempted: one has.
        """
        if self._output is None:
            return
        signum = self._ending.signum or self._output.signals.received
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
        if self._open is None:
            self._warn_of_changes()
            self._take_over()
            self._standing.is_between_ticks = False
            self._stepping.take_turns()
            with self._interrupts.held:
                self._standing.tick += 1
                self._open = self._stepping.finish_tick(), []
        steps, validations = self._open
        self._validate(validations)
        self._agree_on_end()
        tick, self._open = Tick(self.tick, steps, tuple(validations)), None
        self._standing.is_between_ticks = True
        self._tell(tick)
        # a run writes the checkpoint of its last tick at its end
        is_last = self._last_tick is not None and (
            self.tick >= self._last_tick or self._ending.is_near
        )
        if not is_last:
            self._announce(self._keeper.save_if_due())
        return tick

    def _announce(self, written: list[Path]) -> None:
        """Fires the event of each checkpoint that was written."""
        for path in written:
            if self._parts.hooks.wants("checkpoint"):
                self._fire_run("checkpoint", path=path)
                self._agree_on_end()

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
        received = None if self._output is None else self._output.signals.received
        self._ending.agree(self._processes, received)

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
            write(folder, self._keeper.contents(), self._processes)
        return folder

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint of the same program, of any number of processes.

        Args:
            path: its folder.

        Raises:
            CheckpointError: it is damaged, or belongs to another program or version.
        """
        with self._processes.ended_together(), quiet(self._processes):
            self._keeper.load(Path(path).absolute())
            self._stepping.begin_anew()
            self._open = None

    def _take_over(self) -> None:
        """Makes the program's tick, seed, precision and optimizers those of this run."""
        self.built.tick, self.built.run_seed = self.tick + 1, self._standing.run_seed
        set_precision(self.built.levels.values(), self._options.precision)
        for trainer in self._trainers.values():
            level = trainer.level
            level.optimizer, level.scheduler = trainer.optimizer, trainer.scheduler
            level.rule_state = trainer.rule_state

    def _tell(self, tick: Tick) -> None:
        self._keeper.record(at_once=self._last_tick is None)
        for listener in self.listeners:
            listener.on_tick(tick)

    def _validate(self, found: list[ValidationRecord], *, is_last: bool = False) -> None:
        """Adds the records of the validations that are due; one that an exception ends comes again.

        Args:
            found: the records.
            is_last: whether all are due that were not made at this tick.
        """
        for validation in self._parts.validations:
            is_due = is_last or self.tick % validation.declaration.every == 0
            if not is_due or validation.last_tick == self.tick:
                continue
            compare_notes(self.built, self._processes)
            ctx = self._events.of_run(self.tick)
            try:
                metrics = validation.run(ctx)
            except Exception as error:
                what = describe_validation(validation.declaration)
                error.add_note(f"raised in {what} ({validation.declaration.site})")
                raise
            with self._parts.hooks.counted_once():
                self._parts.hooks.fire("validate", ctx=ctx, metrics=metrics)
            record = ValidationRecord(self.tick, {**metrics, **as_numbers(ctx.logged)})
            with self._interrupts.held:
                validation.last_tick = self.tick
                if validation.judge(metrics):
                    name = validation.declaration.monitor or ""
                    self._standing.best = Best(self.tick, name, metrics[name], metrics)
                if validation.is_exhausted:
                    self._ending.reason = validation.why_exhausted
                self._ending.hear(ctx)
                self.history.validations.append(record)
                found.append(record)

    def _fire_run(self, event: str, **offered: Any) -> None:
        ctx = self._events.of_run(self.tick)
        self._parts.hooks.fire(event, ctx=ctx, **offered)
        self._ending.hear(ctx)


@contextmanager
def _noted_on(error: BaseException) -> Iterator[None]:
    """Lets an error stand that others come behind, with a note on each of them."""
    try:
        yield
    except Exception as other:
        error.add_note(f"behind it came {type(other).__name__}: {other}")


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
