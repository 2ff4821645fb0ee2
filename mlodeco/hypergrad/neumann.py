"""A truncated Neumann series."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Literal

from mlodeco.calculus.point import Memory
from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import Guide, check_count, check_flag, check_number
from mlodeco.hypergrad.warm_start import begin, recall
from mlodeco.tree import Tree, add, dot, norm, scale

_HALVINGS = 10
"""How often an estimated step may be halved."""

_TOLERANCE = 1.01
"""How much larger than the smallest so far a term may be before the step is halved."""

_GROWTH = 10.0
"""How much larger the last term may be than the first before the series counts as diverging."""


@dataclass(frozen=True, kw_only=True)
class Neumann(Implicit):
    """``v = a * sum_{k=0}^{num_terms-1} (I - a H)^k b``.

    Converges to ``H^-1 b`` as terms are added if ``0 < a * eig(H) < 2``; for a fixed number
    of terms it damps directions whose curvature is below ``1 / (a * num_terms)``. H need not
    be symmetric. Cost: ``num_terms - 1`` Hessian products and one cross product; with
    ``step_size="auto"`` also ``power_steps`` Hessian products, in a run at the first
    hypergradient only and one at each later one, and if a term overshoots the series begins
    anew with half the step, at most ten times: rarely, since the estimate is seldom too small
    by half.

    Attributes:
        num_terms: how many terms are summed; 1 is ``v = a b``.
        step_size: a, in squared parameter per loss; ``"auto"`` takes one over the largest
            curvature that power iteration started at b finds, halved while terms overshoot;
            in a run the iteration goes on where the last hypergradient left it.
        power_steps: Hessian products spent on ``step_size="auto"`` at first.
        warm_start: in a run, sum the series for what the last solution leaves of b, and add
            it to that: with ``x`` the multiple of the last solution of smallest residual,
            ``v = x + a * sum_k (I - a H)^k (b - H x)``, where that residual is below ``|b|``.
            Costs one Hessian product more.

    The solution's residual is the size of the last term relative to the first.

    Reference:
        Lorraine et al. 2020, arXiv:1911.02590.
    """

    num_terms: int = 5
    step_size: float | Literal["auto"] = "auto"
    power_steps: int = 5
    warm_start: bool = False

    guide = Guide(
        solves="a sum of num_terms powers of (I - a H)",
        cost='num_terms - 1 Hessian products and 1 cross product; "auto" a few more',
        when="the default: any H of positive curvature, few products",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "num_terms", self.num_terms)
        check_count(self, "power_steps", self.power_steps)
        check_flag(self, "warm_start", self.warm_start)
        if self.step_size != "auto":
            check_number(self, "step_size", self.step_size, positive=True)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Sums the series."""
        return self.proceed(matvec, b, {})[0]

    def proceed(self, matvec: MatVec, b: Tree, memory: Memory) -> tuple[Solution, Memory]:
        """Sums the series with the step, and for what the solution, of ``memory`` leaves."""
        kept: dict[str, Tree] = {}
        curvature = 0.0
        if self.step_size == "auto":
            curvature, kept["direction"] = self._power(matvec, b, memory.get("direction"))
        start = begin(matvec, b, memory.get("solution")) if self.warm_start else None
        if start is None:
            solution = self._series(matvec, b, curvature)
        elif start.remaining == 0.0:
            solution = Solution(start.value, 0, 0.0, Status.CONVERGED)
        else:
            solution = start.finish(self._series(matvec, start.rest, curvature))
        if self.warm_start:
            kept["solution"] = solution.value
        return solution, kept

    def _series(self, matvec: MatVec, b: Tree, curvature: float) -> Solution:
        """With the step set, else one over the curvature, halved while terms overshoot."""
        if self.step_size != "auto":
            return self._sum(_terms(matvec, b, self.step_size), self.step_size)
        if not isfinite(curvature):
            return Solution.lost(b, 0)
        step = 1.0 / curvature if curvature > 0.0 else 1.0
        for _ in range(_HALVINGS):
            try:
                return self._sum(_refuse_overshoot(_terms(matvec, b, step)), step)
            except _OvershootError:
                step /= 2.0
        return self._sum(_terms(matvec, b, step), step)

    def _sum(self, terms: Iterator[Tree], step: float) -> Solution:
        first = term = total = next(terms)
        for term in islice(terms, self.num_terms - 1):
            total = add(total, term)
        last = norm(term) / norm(first)
        status = Status.TRUNCATED if last <= _GROWTH else Status.DIVERGING
        return Solution(scale(total, step), self.num_terms, last, status)

    def _power(self, matvec: MatVec, b: Tree, previous: Tree | None) -> tuple[float, Tree]:
        """The largest curvature met, and the direction reached.

        Begun in the Krylov space of b, the only one that counts.
        """
        known = recall(previous, b)
        direction = b if known is None else known
        size = norm(direction)
        curvature = 0.0
        for _ in range(self.power_steps if known is None else 1):
            if size == 0.0:
                break
            direction = matvec(scale(direction, 1.0 / size))
            size = norm(direction)
            if not isfinite(size):
                return size, b
            curvature = max(curvature, size)
        return curvature, direction if size > 0.0 else b


def _terms(matvec: MatVec, b: Tree, step: float) -> Iterator[Tree]:
    """``(I - step * H)^k b`` for k = 0, 1, ..."""
    term = b
    while True:
        yield term
        term = add(term, matvec(term), -step)


class _OvershootError(Exception):
    """The step is too long for the largest curvature."""


def _refuse_overshoot(terms: Iterator[Tree]) -> Iterator[Tree]:
    """The terms, up to one that grows and turns round: ``step * eig(H) > 2``.

    Terms that grow by negative curvature keep their direction, and pass.
    """
    before = next(terms)
    yield before
    smallest = norm(before)
    for term in terms:
        size = norm(term)
        if size > _TOLERANCE * smallest and dot(before, term) < 0.0:
            raise _OvershootError
        smallest = min(smallest, size)
        yield term
        before = term
