"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import Krylov
from mlodeco.tree import Tree, add, dot, zeros_like


@dataclass(frozen=True, kw_only=True)
class CG(Krylov):
    """Conjugate gradients on ``(H + damping I) x = b`` from ``x = 0``.

    Converges if H is symmetric positive definite, in at most as many steps as H has distinct
    eigenvalues. Detached values are constants to exact products, so that H is symmetric there
    too. Cost: one Hessian product a step and one cross product.

    Attributes:
        max_steps: the largest number of steps.
        rtol: stops once ``|b - H x| <= rtol * |b|``; 0 stops at an exact zero alone.
        warm_start: start from the last solution of a run; see ``Krylov``.

    Stops with what it has, and says so, at a direction without positive curvature.

    Reference:
        Hestenes & Stiefel 1952; for hypergradients Rajeswaran et al. 2019, arXiv:1909.04630.
    """

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Iterates; an exact hit ends it before a division by zero."""
        x, residual, direction = zeros_like(b), b, b
        squared = start = dot(b, b)
        steps, status = 0, Status.MAX_STEPS
        for steps in range(1, self.max_steps + 1):
            product = matvec(direction)
            curvature = dot(direction, product)
            if curvature <= 0.0:
                steps, status = steps - 1, Status.INDEFINITE
                break
            length = squared / curvature
            x = add(x, direction, length)
            residual = add(residual, product, -length)
            previous, squared = squared, dot(residual, residual)
            if squared <= self.rtol**2 * start:
                status = Status.CONVERGED
                break
            direction = add(residual, direction, squared / previous)
        return Solution(x, steps, (squared / start) ** 0.5, status)
