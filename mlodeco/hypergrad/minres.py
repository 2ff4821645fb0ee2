"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, inf, isfinite

from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import ROUNDING, Krylov
from mlodeco.hypergrad.options import Guide
from mlodeco.tree import Tree, add, dot, epsilon, norm, scale, zeros_like

_LOST = 1024.0
"""Multiples of the dtype's epsilon: x is lost where these parts of ``|H| |x|`` exceed ``|b|``."""


@dataclass(frozen=True, kw_only=True)
class MINRES(Krylov):
    """The x of smallest residual ``|b - (H + damping I) x|`` in the Krylov space of b.

    Converges if H is symmetric and not singular, positive definite or not: for the curvature
    of networks, which has negative directions, where CG stops. Cost: one Hessian product a
    step and one cross product; five vectors of memory, however many the steps.

    Attributes:
        max_steps: the largest number of steps.
        rtol: stops once ``|b - H x| <= rtol * |b|``, or at rounding.
        warm_start: start from the last solution of a run; see ``Krylov``.

    Of a singular system that has no solution it gives the iterate nearest to a least-squares
    solution. The residual is that of the recurrence, which rounding leaves behind in long runs.

    Reference:
        Paige & Saunders 1975, doi:10.1137/0712047.
    """

    guide = Guide(
        solves="H v = b, smallest residual",
        cost="1 Hessian product a step and 1 cross product",
        when="H symmetric with curvature of both signs: networks",
    )

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Lanczos' recurrence with one Givens rotation a step.

        The pivot is ``|H r| / |r|``, r the residual of the step before: near zero at a
        least-squares solution of a singular system, after which x grows without bound.
        """
        size = norm(b)
        x, before, vector = zeros_like(b), zeros_like(b), scale(b, 1.0 / size)
        older, old = zeros_like(b), zeros_like(b)
        cosines, sines = (1.0, 1.0), (0.0, 0.0)
        beta, remaining, largest, length = 0.0, 1.0, 0.0, 0.0
        steps, status, rounding = 0, Status.MAX_STEPS, ROUNDING * epsilon(b)
        flattest = inf, Solution(x, 0, 1.0, Status.SINGULAR)
        for steps in range(1, self.max_steps + 1):
            product = matvec(vector)
            alpha = dot(vector, product)
            product = add(add(product, vector, -alpha), before, -beta)
            following = norm(product)
            column = hypot(alpha, beta, following)
            if not isfinite(column):
                return Solution.lost(b, steps)
            largest = max(largest, column)
            if following <= epsilon(b) * largest:
                following = 0.0
            diagonal = cosines[1] * alpha - cosines[0] * sines[1] * beta
            upper = sines[1] * alpha + cosines[0] * cosines[1] * beta
            corner = sines[0] * beta
            pivot = hypot(diagonal, following)
            if pivot <= flattest[0] * largest:
                flattest = pivot / largest, Solution(x, steps - 1, abs(remaining), Status.SINGULAR)
            is_lost = _LOST * epsilon(b) * largest * length >= size
            if pivot <= rounding * largest or is_lost:
                return flattest[1]
            cosines, sines = (cosines[1], diagonal / pivot), (sines[1], following / pivot)
            direction = scale(add(add(vector, older, -corner), old, -upper), 1.0 / pivot)
            x = add(x, direction, cosines[1] * remaining * size)
            length = norm(x)
            if rounding * largest * length >= size:
                return flattest[1]
            remaining *= -sines[1]
            if abs(remaining) <= max(self.rtol, rounding) or following == 0.0:
                status = Status.CONVERGED
                break
            older, old = old, direction
            before, vector, beta = vector, scale(product, 1.0 / following), following
        return Solution(x, steps, abs(remaining), status)
