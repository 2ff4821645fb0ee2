"""The explicit solve, for small levels and as the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mlodeco.calculus.response import Solution, Status
from mlodeco.errors import MethodError
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import check_count
from mlodeco.tree import Tree, flatten, unflatten

_SINGULAR_RESIDUAL = 1e-6


@dataclass(frozen=True, kw_only=True)
class Dense(Implicit):
    """Builds H column by column and solves ``(H + damping I) x = b`` by LU.

    Exact to rounding, for any regular H, symmetric or not; a singular one is solved in the
    least-squares sense with the smallest norm. Cost for d touched parameters: d Hessian
    products, one cross product, d^2 numbers of memory and d^3 operations.

    Attributes:
        max_size: the largest d that is accepted.
    """

    max_size: int = 4096

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "max_size", self.max_size)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Solves, by least squares where the matrix is singular.

        Raises:
            MethodError: the level has more than ``max_size`` parameters.
        """
        vector = flatten(b)
        size = vector.numel()
        if size > self.max_size:
            raise MethodError(
                f"Dense would build a {size} x {size} matrix.",
                expected=f"at most max_size={self.max_size} parameters.",
                remedy="use CG or Neumann, or raise max_size.",
            )
        basis = torch.eye(size, dtype=vector.dtype, device=vector.device)
        matrix = torch.stack([flatten(matvec(unflatten(e, b))) for e in basis], dim=1)
        x, info = torch.linalg.solve_ex(matrix, vector)
        residual = _residual(matrix, x, vector)
        status = Status.CONVERGED
        if int(info) != 0 or not residual <= _SINGULAR_RESIDUAL:
            x = torch.linalg.pinv(matrix) @ vector
            residual = _residual(matrix, x, vector)
            status = Status.SINGULAR
        return Solution(unflatten(x, b), size, residual, status)


def _residual(matrix: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(b - matrix @ x) / torch.linalg.vector_norm(b))
