"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from mlodeco.calculus.point import Memory
from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import ROUNDING, Krylov
from mlodeco.hypergrad.warm_start import fits
from mlodeco.tree import Tree, add, dot, epsilon, norm, scale, zeros_like


@dataclass(frozen=True, kw_only=True)
class CG(Krylov):
    """Conjugate gradients on ``(H + damping I) x = b`` from ``x = 0``.

    Converges if H is symmetric positive definite, in at most as many steps as H has distinct
    eigenvalues. Detached values are constants to exact products, so that H is symmetric there
    too. Cost: one Hessian product a step and one cross product.

    Attributes:
        max_steps: the largest number of steps.
        rtol: stops once ``|b - H x| <= rtol * |b|``, or at rounding.
        warm_start: in a run, take the last hypergradient's solution as the first direction and
            keep the others conjugate to it, where a step along it lowers the residual. Costs
            one Hessian product more, which is not counted as a step.

    Stops with what it has, and says so, at a direction without positive curvature.

    Reference:
        Hestenes & Stiefel 1952; for hypergradients Rajeswaran et al. 2019, arXiv:1909.04630.
    """

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Iterates; an exact hit ends it before a division by zero."""
        return self._iterate(matvec, b, None)

    def proceed(self, matvec: MatVec, b: Tree, memory: Memory) -> tuple[Solution, Memory]:
        """Solves with the last solution as the first direction, where that helps."""
        if not self.warm_start:
            return self.solve(matvec, b), {}
        line = _Line.along(matvec, memory.get("solution"), b)
        solution = self._iterate(matvec, b, line)
        return solution, {"solution": solution.value}

    def _iterate(self, matvec: MatVec, b: Tree, line: _Line | None) -> Solution:
        x, residual = (zeros_like(b), b) if line is None else line.search(b)
        start, squared = dot(b, b), dot(residual, residual)
        direction = residual if line is None else line.conjugate(residual)
        goal = max(self.rtol, ROUNDING * epsilon(b)) ** 2 * start
        steps, status = 0, Status.MAX_STEPS
        while steps < self.max_steps:
            if squared <= goal:
                status = Status.CONVERGED
                break
            product = matvec(direction)
            curvature = dot(direction, product)
            if not isfinite(curvature):
                return Solution.lost(b, steps)
            if curvature <= 0.0:
                status = Status.INDEFINITE
                break
            length = squared / curvature
            x = add(x, direction, length)
            residual = add(residual, product, -length)
            previous, squared = squared, dot(residual, residual)
            steps += 1
            fresh = residual if line is None else line.conjugate(residual)
            direction = add(fresh, direction, squared / previous)
        else:
            status = Status.CONVERGED if squared <= goal else status
        return Solution(x, steps, (squared / start) ** 0.5, status)


@dataclass(frozen=True)
class _Line:
    """A direction d with ``H d``: all others are kept conjugate to it, at no more products.

    Saad, Yeung, Erhel & Guyomarc'h 2000, doi:10.1137/S1064829598339761.
    """

    direction: Tree
    product: Tree
    curvature: float

    @staticmethod
    def along(matvec: MatVec, previous: Tree | None, b: Tree) -> _Line | None:
        """None where it does not help: the smallest energy along it has a larger residual."""
        if previous is None or not fits(previous, b):
            return None
        direction = {key: previous[key].to(value) for key, value in b.items()}
        product = matvec(direction)
        curvature = dot(direction, product)
        if curvature <= 0.0:
            return None
        line = _Line(direction, product, curvature)
        return line if norm(line.search(b)[1]) < norm(b) else None

    def search(self, b: Tree) -> tuple[Tree, Tree]:
        """The x on the line of smallest ``x^T H x / 2 - b^T x``, and ``b - H x``."""
        length = dot(self.direction, b) / self.curvature
        return scale(self.direction, length), add(b, self.product, -length)

    def conjugate(self, vector: Tree) -> Tree:
        """The vector less its part along the line, in the inner product of H."""
        return add(vector, self.direction, -dot(vector, self.product) / self.curvature)
