"""What the Krylov solvers share: a tolerance, a limit of steps, and warm starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlodeco.calculus.point import Memory
from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import check_count, check_flag, check_number
from mlodeco.hypergrad.warm_start import begin
from mlodeco.tree import Tree

ROUNDING = 16.0
"""Multiples of the dtype's epsilon that a residual may have from rounding alone."""


@dataclass(frozen=True, kw_only=True)
class Krylov(Implicit):
    """A solver that looks for x in the span of ``b, H b, H^2 b, ...``.

    Attributes:
        max_steps: the largest number of steps.
        rtol: stops once ``|b - H x| <= rtol * |b|``, or at rounding.
        warm_start: in a run, start from the multiple of the last hypergradient's solution that
            leaves the smallest residual, where that is smaller than ``|b|``. Costs one Hessian
            product more, which is not counted as a step.
    """

    max_steps: int = 20
    rtol: float = 1e-6
    warm_start: bool = False

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "max_steps", self.max_steps)
        check_number(self, "rtol", self.rtol, positive=False)
        check_flag(self, "warm_start", self.warm_start)

    def proceed(self, matvec: MatVec, b: Tree, memory: Memory) -> tuple[Solution, Memory]:
        """Solves from the solution in ``memory``, where that helps, and keeps the new one."""
        if not self.warm_start:
            return self.solve(matvec, b), {}
        start = begin(matvec, b, memory.get("solution"))
        if start is None:
            solution = self.solve(matvec, b)
        elif start.remaining <= self.rtol:
            solution = Solution(start.value, 0, start.remaining, Status.CONVERGED)
        else:
            solver = replace(self, rtol=self.rtol / start.remaining)
            solution = start.finish(solver.solve(matvec, start.rest))
        return solution, {"solution": solution.value}
