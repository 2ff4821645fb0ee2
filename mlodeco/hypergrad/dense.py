"""The explicit solve, for small levels and as the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlodeco.calculus.response import Solution, Status
from mlodeco.errors import MethodError
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import Guide, check_count
from mlodeco.tree import Tree, flatten, unflatten

_LARGEST_TOLERANCE = 1e-3
"""Of a singular value that counts as zero, relative to the largest, unless eps is larger."""


@dataclass(frozen=True, kw_only=True)
class Dense(Implicit):
    """Builds H column by column and solves ``(H + damping I) x = b`` by LU.

    Exact to rounding of the products, for any regular H, symmetric or not; the system is solved
    in double precision. A singular one is solved in the least-squares sense with the smallest
    norm: singular values below ``d * eps`` of the largest count as zero. Cost for d touched
    parameters: d Hessian products, one cross product, d^2 numbers of memory and d^3 operations.

    Attributes:
        max_size: the largest d that is accepted.
    """

    max_size: int = 4096

    guide = Guide(
        solves="H v = b, as a matrix",
        cost="d Hessian products and 1 cross product; d^2 numbers",
        when="levels of a few thousand parameters at most",
    )

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
        eps = torch.finfo(vector.dtype).eps
        tolerance = max(eps, min(size * eps, _LARGEST_TOLERANCE))
        if not bool(torch.isfinite(matrix).all()):
            return Solution.lost(b, size)
        wide_matrix, wide_vector = _widened(matrix), _widened(vector)
        x, status = _solve(wide_matrix, wide_vector, tolerance)
        miss = torch.linalg.vector_norm(wide_vector - wide_matrix @ x)
        residual = float(miss / torch.linalg.vector_norm(wide_vector))
        return Solution(unflatten(x.to(vector.device), b), size, residual, status)


def _widened(tensor: Tensor) -> Tensor:
    if tensor.device.type == "mps":
        tensor = tensor.cpu()
    return tensor.double()


def _solve(matrix: Tensor, b: Tensor, tolerance: float) -> tuple[Tensor, Status]:
    """By LU, or by least squares where singular values are below the tolerance."""
    sizes = torch.linalg.svdvals(matrix)
    if float(sizes[-1]) > tolerance * float(sizes[0]):
        return torch.linalg.solve(matrix, b), Status.CONVERGED
    return torch.linalg.pinv(matrix, rtol=tolerance) @ b, Status.SINGULAR
