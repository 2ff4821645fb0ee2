"""Whether a step counts: what is not finite in it, explained and agreed upon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlodeco.errors import NonFiniteError
from mlodeco.runtime.assembly import Parts
from mlodeco.runtime.causes import Cause, find_cause
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.nonfinite import agree
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.trainer import Gradients


class Judge:
    """Decides on steps whose numbers are not finite, by the policies of their levels.

    Args:
        parts: what steps.
        processes: those of the run, which decide alike.
    """

    def __init__(self, parts: Parts, processes: Processes) -> None:
        self._built = parts.built
        self._trainers = parts.trainers
        self._schedule = parts.schedule
        self._processes = processes

    @contextmanager
    def explained(self, name: str, batches: tuple[Drawn, ...]) -> Iterator[None]:
        """Adds the step and the likely cause to an error that says what is not finite."""
        try:
            yield
        except NonFiniteError as error:
            if not error.when:
                self._explain(error, name, batches)
            raise

    def _explain(self, error: NonFiniteError, name: str, batches: tuple[Drawn, ...]) -> Cause:
        cause = find_cause(self._built, name, batches, error)
        when = f"step {self._schedule.steps[name] + 1} of level {name!r}, tick {self._built.tick}."
        error.explain(when=when, cause=cause.text, remedy=cause.remedy or error.remedy)
        return cause

    def is_lost(self, name: str, found: Gradients, batches: tuple[Drawn, ...]) -> bool:
        """Whether a step is skipped, with all as before it; the same in all processes."""
        trainer = self._trainers[name]
        if trainer.scale is not None:
            return trainer.overflowed(found)
        return self.judge(name, trainer.trouble(found), batches)

    def judge(self, name: str, error: NonFiniteError | None, batches: tuple[Drawn, ...]) -> bool:
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
