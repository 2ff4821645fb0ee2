"""What all implicit methods share: a linear solve, then the cross products."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import frexp, isfinite, ldexp
from typing import ClassVar

from mlodeco.calculus.point import LowerProblem, Memory
from mlodeco.calculus.products import open_curvature
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.calculus.subbatch import take_part
from mlodeco.hypergrad.options import Options, check_fraction, check_number, check_product
from mlodeco.tree import Tree, add, fill, is_zero, norm, restrict, scale, widen, zeros_like

_LEAST = 1e-100
"""The solvers' products of numbers below it, or above its inverse, may vanish or overflow."""

_EXPONENT = 1000
"""Larger powers of two may have no inverse."""

MatVec = Callable[[Tree], Tree]
"""The product with the (damped) Hessian; takes and returns a tree shaped like b."""


@dataclass(frozen=True, kw_only=True)
class Implicit(Options, ABC):
    """An implicit method: ``v`` near ``(H + damping I)^-1 b``, then ``cross^T v``.

    Parameters that the lower loss does not touch get ``v = 0`` and do not enter the solve.

    Attributes:
        product: how second derivatives are taken: ``"auto"``, ``"reverse"``,
            ``"reverse_over_forward"`` (cross products; Hessian products in reverse),
            ``"forward"`` or ``"difference"``. The last two give ``J v`` for ``J^T v``: another
            thing where custom functions or hooks change the backward pass.
        damping: added to the diagonal of H, in units of loss per squared parameter. Weight
            decay that the optimizer applies is not in the loss: give it here.
        curvature_batch: the fraction of each batch, its first samples, on which Hessian products
            are taken, for speed and memory; cross products take the whole. Cut is every tensor
            or NumPy array of the level's own batch, in dictionaries, lists, tuples and data
            classes, whose first dimension is that of the first; where ``data=`` is a mapping, each
            loader's item by its own size. Items of sources, lists of other things and parameters
            stay whole.
    """

    product: str = "auto"
    damping: float = 0.0
    curvature_batch: float = 1.0
    is_iterative: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        check_product(self, self.product)
        check_number(self, "damping", self.damping, positive=False)
        check_fraction(self, "curvature_batch", self.curvature_batch)

    @abstractmethod
    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """An approximate solution of ``matvec(x) = b`` for b that is not zero."""

    def proceed(self, matvec: MatVec, b: Tree, memory: Memory) -> tuple[Solution, Memory]:
        """The solution, with the use of what was kept last time, and what to keep of it."""
        return self.solve(matvec, b), {}

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Solves for v and returns it with its cross products.

        Costs the products of the solver and one cross product; nothing for b = 0.
        """
        if is_zero(cotangent):
            return Response({}, Solution(zeros_like(cotangent), 0, 0.0, Status.CONVERGED))
        whole = part = open_curvature(problem, self.product)
        if self.curvature_batch < 1.0:
            point = take_part(problem.point, self.curvature_batch)
            part = open_curvature(replace(problem, point=point, targets=()), self.product)

        def matvec(x: Tree) -> Tree:
            product = part.hvp(x)
            return add(product, x, self.damping) if self.damping else product

        # zeros where only the lower loss reaches: the inverse fills them
        b = fill(cotangent, widen(restrict(problem.parameters, part.touched())))
        if is_zero(b):
            return Response({}, Solution(zeros_like(b), 0, 0.0, Status.CONVERGED))
        unit = _unit(norm(b))
        solution, memory = self.proceed(matvec, scale(b, 1.0 / unit), problem.memory)
        solution = replace(solution, value=scale(solution.value, unit))
        return Response(whole.cross(solution.value), solution, memory)


def _unit(size: float) -> float:
    """A power of two, so that rounding stays as it is; one unless products of b would vanish.

    What a solver remembers is in this unit, of which warm starts are independent.
    """
    if _LEAST < size < 1.0 / _LEAST or not isfinite(size):
        return 1.0
    return ldexp(1.0, max(-_EXPONENT, min(frexp(size)[1], _EXPONENT)))
