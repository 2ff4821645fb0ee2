"""A low-rank approximation of the Hessian, inverted with damping."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.randomness import make_seed
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.hypergrad.implicit import Implicit, MatVec
from mlodeco.hypergrad.options import Guide, check_count, check_number
from mlodeco.tree import Tree, flatten, norm, unflatten


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

    guide = Guide(
        solves="(H_r + damping I) v = b, H_r of rank rank",
        cost="rank Hessian products and 1 cross product",
        when="few large curvatures; nothing may diverge",
    )

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
        image = torch.empty_like(sketch)
        for row, column in zip(image, sketch, strict=True):
            row.copy_(flatten(matvec(unflatten(column, b)))).sub_(column, alpha=self.damping)
        if not bool(torch.isfinite(image.sum(dim=1)).all()):
            return Solution.lost(b, len(sketch))
        rounding = len(sketch) * max(torch.finfo(part.dtype).eps for part in b.values())
        core = (sketch @ image.T).double()
        del sketch
        basis, inner = _orthonormalize(image)
        values, vectors = torch.linalg.eigh(_core(core, inner.double(), rounding))
        noise = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
        values = values + self.damping
        along = basis @ vector
        within = vectors @ (_inverse(values) * (vectors.T @ along.double()))
        off = vector - along @ basis
        off = off - (basis @ off) @ basis
        x = within.to(vector.dtype) @ basis + off / self.damping
        status = Status.TRUNCATED if float(values[0]) > noise else Status.INDEFINITE
        return Solution(unflatten(x, b), len(basis), None, status)

    def _sketch(self, like: Tensor, b: Tree) -> Tensor:
        """The columns of S, as rows, rounded to the dtypes in which products are taken."""
        generator = torch.Generator().manual_seed(self.seed or 0)
        drawn = like.new_empty(min(self.rank, like.numel()), like.numel())
        for row in drawn:
            row.copy_(torch.randn(like.numel(), dtype=like.dtype, generator=generator))
        sketch, _ = _orthonormalize(drawn)
        for row in sketch:
            row.copy_(flatten(unflatten(row, b)))
        return sketch


def _orthonormalize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The Q of ``rows = R^T Q``, written over the rows, and R; rows of zeros stay.

    Gram and Schmidt's, three times, so that Q is orthonormal to rounding where rows depend on
    each other as well; no memory but one row.
    """
    factor = rows.new_zeros(len(rows), len(rows))
    for count, row in enumerate(rows):
        size = 1.0
        for _ in range(3):
            along = rows[:count] @ row
            row.sub_(along @ rows[:count])
            factor[:count, count] += size * along
            length = norm({"": row})
            if length == 0.0:
                size = 0.0
                break
            row.div_(length)
            size *= length
        factor[count, count] = size
    return rows, factor


def _at_least_single(vector: Tensor) -> Tensor:
    """Half precision has no factorizations."""
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


def _core(core: Tensor, inner: Tensor, rounding: float) -> Tensor:
    """``(Q^T H S) (S^T H S)^+ (Q^T H S)^T``."""
    inverse = torch.linalg.pinv((core + core.T) / 2, rtol=rounding, hermitian=True)
    product: Tensor = inner @ inverse @ inner.T
    return (product + product.T) / 2


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values == 0.0, 0.0, 1.0 / values)
