"""Whether a step counts: what is not finite in it, explained and agreed upon."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from mlodeco.errors import NonFiniteError
from mlodeco.runtime.assembly import Parts
from mlodeco.runtime.causes import Cause, find_cause, find_in_batches
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
            is_spoilt = self._judge_data(name, trainer.bad_loss(found), batches)
            return trainer.overflowed(found) if is_spoilt is None else is_spoilt
        is_own = not math.isfinite(found.own_loss)
        return self.judge(name, trainer.trouble(found), batches, is_own=is_own)

    def _judge_data(
        self, name: str, error: NonFiniteError | None, batches: tuple[Drawn, ...]
    ) -> bool | None:
        """Whether a step is skipped whose loss bad numbers in its data have spoilt.

        No scale mends that. None where there are none: so it may be an overflow.

        Raises:
            NonFiniteError: the run ends by it.
        """
        if error is None:
            return None
        is_bad = find_in_batches(self._built, name, batches, error) is not None
        if self._processes.first_with(is_bad) is None:
            return None
        return self._follow(
            name, agree(self._processes, error, self._explain(error, name, batches))
        )

    def judge(
        self,
        name: str,
        error: NonFiniteError | None,
        batches: tuple[Drawn, ...],
        *,
        is_own: bool = False,
    ) -> bool:
        """Whether a step is skipped for what a process has found; if so all is as before it.

        Raises:
            NonFiniteError: the run ends by it.
        """
        if self._trainers[name].watch.is_strict:
            if error is not None:
                raise error
            return False
        cause = None if error is None else self._explain(error, name, batches)
        return self._follow(name, agree(self._processes, error, cause, is_own=is_own))

    def _follow(self, name: str, agreed: tuple[NonFiniteError, str] | None) -> bool:
        """Whether a step is skipped for what all have agreed upon; if so all is as before it."""
        trainer = self._trainers[name]
        if agreed is None or not trainer.watch.judge(*agreed):
            return False
        trainer.undo_step()
        return True
