"""mlodeco's side."""

from __future__ import annotations

from typing import Any

import mlodeco
from tests.benchmarks.case import Case


class Library:
    """The case as a program, stepped by its runner, which takes the options."""

    def __init__(self, case: Case, method: Any, **options: Any) -> None:
        self.program = declare(case, method)
        self._runner = mlodeco.Runner(self.program, **options)

    def tick(self) -> None:
        """One tick."""
        self._runner.step()


def declare(case: Case, method: Any) -> mlodeco.Program:
    """The case as a program."""
    program = mlodeco.Program()
    program.level(
        "lower", module=case.lower, optimizer=case.lower_optimizer, data=case.lower_batches
    )(case.lower_loss)
    program.level(
        "upper",
        lower=["lower"],
        hypergrad=method,
        module=case.upper,
        optimizer=case.upper_optimizer,
        data=case.upper_batches,
    )(case.upper_loss)
    return program
