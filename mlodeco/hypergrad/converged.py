"""The reference: whatever solver reaches the solution."""

from __future__ import annotations

from dataclasses import dataclass

from mlodeco.calculus.response import Solution
from mlodeco.hypergrad.dense import Dense
from mlodeco.hypergrad.gmres import GMRES
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.minres import MINRES
from mlodeco.hypergrad.options import Guide, check_count
from mlodeco.tree import Tree, epsilon

_MEMORY = 50_000_000
"""Numbers that the vectors of GMRES may take."""

_LEAST_RESTART = 100
"""Below this many vectors GMRES is no match for MINRES, which keeps five."""


@dataclass(frozen=True, kw_only=True)
class Converged(Implicit):
    """``v = (H + damping I)^-1 b`` to a tight tolerance, to compare other methods with.

    Dense for d up to ``dense_size`` touched parameters; beyond, GMRES without restarts where
    its vectors fit into 5e7 numbers, else MINRES, which takes H as symmetric. Stops at a
    residual of 100 epsilons of the dtype, at best 1e-10, or at ``max_steps``.

    Attributes:
        max_steps: the largest number of Hessian products beyond ``dense_size``.
        dense_size: the largest d that is solved as a matrix.
    """

    max_steps: int = 1500
    dense_size: int = 1024

    guide = Guide(
        solves="H v = b, to rounding, by dense, gmres or minres",
        cost="up to 1500 Hessian products and 1 cross product",
        when="to compare others with",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "max_steps", self.max_steps)
        check_count(self, "dense_size", self.dense_size)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Chooses by the size and solves."""
        size = sum(value.numel() for value in b.values())
        if size <= self.dense_size:
            return Dense(max_size=self.dense_size).solve(matvec, b)
        rtol = max(1e-10, 100.0 * epsilon(b))
        restart = min(self.max_steps, _MEMORY // size)
        if restart >= _LEAST_RESTART:
            return GMRES(max_steps=self.max_steps, restart=restart, rtol=rtol).solve(matvec, b)
        return MINRES(max_steps=self.max_steps, rtol=rtol).solve(matvec, b)
