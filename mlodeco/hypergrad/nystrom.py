"""A low-rank approximation of the Hessian, inverted with damping."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.randomness import make_seed
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import check_count, check_number
from mlodeco.tree import Tree, flatten, unflatten


@dataclass(frozen=True, kw_only=True)
class Nystrom(Implicit):
    """``v = (H_r + damping I)^-1 b`` with H_r the Nystrom approximation of rank ``rank``.

    ``H_r = (H S) (S^T H S)^+ (H S)^T`` for a random d x rank matrix S with orthonormal
    columns, exact once ``rank`` reaches the rank of H. Directions outside its range are
    divided by ``damping`` alone. No iteration, so nothing can diverge; one set of products
    serves any b. Cost: ``rank`` Hessian products, one cross product, ``2 * rank`` vectors of
    memory and ``d * rank^2`` operations.

    Attributes:
        rank: columns of S; at most the number of touched parameters d is used.
        damping: above zero here.
        seed: of S; default: another S at each hypergradient, from the run's seed.

    Reference:
        Hataya & Yamada 2023, arXiv:2302.09726, where S picks single parameters; Frangella et
        al. 2021, arXiv:2110.02820, for random directions, which here see every parameter.
    """

    rank: int = 10
    damping: float = 0.01
    seed: int | None = None

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "rank", self.rank)
        check_number(self, "damping", self.damping, positive=True)
        if self.seed is not None:
            check_count(self, "seed", self.seed, least=0)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Draws S from the seed of the hypergradient where none is set, then solves."""
        if self.seed is None:
            seed = make_seed(problem.point.seed, "nystrom")
            return replace(self, seed=seed).respond(problem, cotangent)
        return super().respond(problem, cotangent)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Solves on the range of H S exactly, and off it with the damping alone."""
        vector = _at_least_single(flatten(b))
        sketch = self._sketch(vector, b)

        def undamped(column: Tensor) -> Tensor:
            product = flatten(matvec(unflatten(column, b)))
            return product.to(column.dtype) - self.damping * column

        image = torch.stack([undamped(column) for column in sketch.T], dim=1)
        if not bool(torch.isfinite(image).all()):
            return Solution.lost(b, sketch.shape[1])
        basis, _ = torch.linalg.qr(image)
        rounding = len(sketch.T) * max(torch.finfo(part.dtype).eps for part in b.values())
        values, vectors = torch.linalg.eigh(_core(sketch, image, basis, rounding))
        values = values + self.damping
        along = basis.T @ vector
        within = vectors @ (_inverse(values) * (vectors.T @ along.double()))
        off = vector - basis @ along
        off = off - basis @ (basis.T @ off)
        x = basis @ within.to(vector.dtype) + off / self.damping
        status = Status.TRUNCATED if float(values[0]) > 0.0 else Status.INDEFINITE
        return Solution(unflatten(x, b), sketch.shape[1], None, status)

    def _sketch(self, like: Tensor, b: Tree) -> Tensor:
        """S, rounded to the dtypes in which products are taken."""
        generator = torch.Generator().manual_seed(self.seed or 0)
        rank = min(self.rank, like.numel())
        drawn = torch.randn(like.numel(), rank, dtype=torch.float64, generator=generator)
        orthonormal: Tensor = torch.linalg.qr(drawn.to(like))[0]
        rounded = [flatten(unflatten(column, b)).to(like) for column in orthonormal.T]
        return torch.stack(rounded, dim=1)


def _at_least_single(vector: Tensor) -> Tensor:
    """Half precision has no factorizations."""
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _core(sketch: Tensor, image: Tensor, basis: Tensor, rounding: float) -> Tensor:
    """``Q^T (H S) (S^T H S)^+ (H S)^T Q``, in double precision."""
    inner = (basis.T @ image).double()
    core = (sketch.T @ image).double()
    inverse = torch.linalg.pinv((core + core.T) / 2, rtol=rounding, hermitian=True)
    product: Tensor = inner @ inverse @ inner.T
    return (product + product.T) / 2


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0.0, 0.0, 1.0 / values)
