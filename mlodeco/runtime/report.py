"""Telling a person, once, that a linear solve went badly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from mlodeco.calculus.sweep import Solve
from mlodeco.errors import SolverWarning
from mlodeco.hypergrad import describe
from mlodeco.runtime.build import Build


def warn_of_trouble(built: Build, solves: Iterable[Solve]) -> None:
    """Warns at the first solve of a level that ends in each kind of trouble."""
    for solve in solves:
        status = solve.solution.status
        level = built.levels[solve.level]
        if status.is_trouble and status not in level.reported:
            level.reported.add(status)
            residual = solve.solution.residual
            size = "" if residual is None else f", residual {residual:.3g}"
            warnings.warn(
                f"level {solve.level!r} ({level.site}): {describe(solve.method)} after "
                f"{solve.solution.steps} steps{size}: {status.value}.",
                SolverWarning,
                stacklevel=3,
            )
