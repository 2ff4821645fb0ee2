"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from mlodeco.calculus.point import Memory
from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import ROUNDING, Krylov
from mlodeco.hypergrad.options import Guide
from mlodeco.hypergrad.warm_start import recall
from mlodeco.tree import Tree, add, dot, epsilon, norm, scale, zeros_like

_GROWTH = 10.0
"""The residual, in units of ``|b|``, above which CG has gone astray at ``max_steps``.

Not one: the residuals of good systems rise above ``|b|`` on their way, while the energy falls.
"""


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

    Says so where it stops at a direction without positive curvature, with x too long for the
    dtype, or at ``max_steps`` with a residual of more than ten times ``|b|``: the system is
    indefinite or singular, and CG's x may be of any length. What it gives then is the mean of
    its iterates of smallest residual, which is what MINRES gives after as many steps.

    Reference:
        Hestenes & Stiefel 1952; for hypergradients Rajeswaran et al. 2019, arXiv:1909.04630;
        the mean: Zhou & Walker 1994, doi:10.1137/0915021.
    """

    guide = Guide(
        solves="H v = b, to rtol",
        cost="1 Hessian product a step and 1 cross product",
        when="H symmetric, of positive curvature: near a minimum, or with damping",
    )

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
        x, residual = (zeros_like(b), _copied(b)) if line is None else line.search(b)
        start, squared = dot(b, b), dot(residual, residual)
        direction = _copied(residual) if line is None else line.conjugate(residual)
        rounding = ROUNDING * epsilon(b)
        goal = max(self.rtol, rounding) ** 2 * start
        mean = _Mean(x, squared)
        steps, largest = 0, 0.0 if line is None else line.stretch()
        size = norm(direction)
        longest = 0.0 if line is None else norm(x)
        while squared > goal and steps < self.max_steps:
            product = matvec(direction)
            curvature = dot(direction, product)
            if not isfinite(curvature):
                return Solution.lost(b, steps)
            stretch = norm(product) / size
            largest = max(largest, stretch)
            flat = rounding * largest * size**2
            if curvature <= flat:
                # without negative curvature |H d|^2 <= |H| d^T H d: small, but for rounding
                is_singular = curvature > -flat and stretch <= 0.1 * largest
                status = Status.SINGULAR if is_singular else Status.INDEFINITE
                return mean.solution(matvec, b, steps, status)
            length = squared / curvature
            _add_to(x, direction, length)
            steps += 1
            longest += length * size
            if rounding * largest * longest >= start**0.5:
                longest = norm(x)
                if rounding * largest * longest >= start**0.5:
                    return mean.solution(matvec, b, steps, Status.SINGULAR)
            _add_to(residual, product, -length)
            previous, squared = squared, dot(residual, residual)
            if squared <= goal or steps == self.max_steps:
                break
            mean.include(x, squared)
            fresh = residual if line is None else line.conjugate(residual)
            _scale_and_add(direction, squared / previous, fresh)
            size = norm(direction)
        if squared > _GROWTH**2 * start:
            mean.include(x, squared)
            return mean.solution(matvec, b, steps, Status.GROWN)
        status = Status.CONVERGED if squared <= goal else Status.MAX_STEPS
        return Solution(x, steps, (squared / start) ** 0.5, status)


def _copied(tree: Tree) -> Tree:
    return {key: value.clone() for key, value in tree.items()}


def _add_to(total: Tree, tree: Tree, factor: float) -> None:
    """In place, on what belongs to one solve alone: new vectors at every step cost more."""
    torch._foreach_add_(list(total.values()), [tree[key] for key in total], alpha=factor)


def _scale_and_add(total: Tree, factor: float, tree: Tree) -> None:
    torch._foreach_mul_(list(total.values()), factor)
    _add_to(total, tree, 1.0)


class _Mean:
    """The mean of the iterates of smallest residual.

    CG's residuals are orthogonal: the weights are the inverse squares of their lengths.
    """

    def __init__(self, x: Tree, squared: float) -> None:
        self._squared = squared
        self._value = _copied(x)

    def include(self, x: Tree, squared: float) -> None:
        """One iterate more, whose residual has this squared length."""
        weight = self._squared / (self._squared + squared)
        self._squared = weight * squared
        # in place: the mean is no one else's, and this is done at every step
        torch._foreach_lerp_(list(self._value.values()), list(x.values()), weight)

    def solution(self, matvec: MatVec, b: Tree, steps: int, status: Status) -> Solution:
        """As what is left after these steps; costs one product, for the residual."""
        rest = add(b, matvec(self._value), -1.0)
        return Solution(self._value, steps, norm(rest) / norm(b), status)


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
        direction = recall(previous, b)
        if direction is None:
            return None
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

    def stretch(self) -> float:
        """How much longer H makes the direction."""
        return norm(self.product) / norm(self.direction)

    def conjugate(self, vector: Tree) -> Tree:
        """The vector less its part along the line, in the inner product of H."""
        return add(vector, self.direction, -dot(vector, self.product) / self.curvature)
