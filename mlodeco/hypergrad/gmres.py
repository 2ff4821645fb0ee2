"""The generalized minimal residual method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import hypot, isfinite

import torch
from torch import Tensor

from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import ROUNDING, Krylov
from mlodeco.hypergrad.options import Guide, check_count
from mlodeco.tree import Tree, epsilon, flatten, norm, scale, unflatten


@dataclass(frozen=True, kw_only=True)
class GMRES(Krylov):
    """The x of smallest residual ``|b - (J^T + damping I) x|`` in the Krylov space of b.

    Converges, without restarts, for any J that is not singular, symmetric or not: the gradient
    field of a loss whose backward pass was changed by custom functions has a
    Jacobian J that is not symmetric, for which ``product`` must not be ``"forward"`` or
    ``"difference"``: these would solve with J in place of ``J^T``. (Hooks act again in the
    second backward pass, so that products in reverse are those of another matrix.) Cost: one
    product a step and one cross product; ``restart`` vectors of memory.

    Attributes:
        max_steps: the largest number of steps, over all restarts.
        rtol: stops once ``|b - J^T x| <= rtol * |b|``, or at rounding.
        restart: steps after which the Krylov space is built anew from the residual; bounds
            the memory, and may slow or stall convergence.
        warm_start: start from the last solution of a run; see ``Krylov``.

    Reference:
        Saad & Schultz 1986, doi:10.1137/0907058.
    """

    restart: int = 20

    guide = Guide(
        solves="J^T v = b, smallest residual",
        cost="1 product a step and 1 cross product; restart vectors",
        when="J not symmetric: custom backward passes",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "restart", self.restart)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Cycles of at most ``restart`` steps, each from the residual of the last."""

        def flat_matvec(vector: Tensor) -> Tensor:
            return flatten(matvec(unflatten(vector, b))).to(vector)

        start = norm(b)
        residual = flatten(scale(b, 1.0 / start))
        residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        x = torch.zeros_like(residual)
        rounding = ROUNDING * epsilon(b)
        remaining, steps, status = 1.0, 0, Status.MAX_STEPS
        while steps < self.max_steps:
            most = min(self.restart, self.max_steps - steps)
            cycle = _cycle(flat_matvec, residual, most, self.rtol, rounding)
            if cycle is None:
                return Solution.lost(b, steps)
            x, residual = x + cycle.correction, cycle.residual
            steps += cycle.steps
            remaining = _length(residual)
            if remaining <= max(self.rtol, rounding):
                status = Status.CONVERGED
                break
            if cycle.is_exhausted:
                # what the space lacks is rounding, which grows with the steps and with |H| |x|
                is_solved = remaining <= rounding * (ROUNDING + steps)
                status = Status.CONVERGED if is_solved else Status.SINGULAR
                break
        return Solution(scale(unflatten(x, b), start), steps, remaining, status)


@dataclass(frozen=True)
class _Cycle:
    """What one Krylov space gave; ``is_exhausted`` if it cannot grow."""

    correction: Tensor
    residual: Tensor
    steps: int
    is_exhausted: bool


def _cycle(
    matvec: Callable[[Tensor], Tensor], b: Tensor, most: int, goal: float, rounding: float
) -> _Cycle | None:
    """Arnoldi's recurrence until the residual is at most ``goal``.

    None where a product is not finite.
    """
    most = min(most, b.numel())
    size = _length(b)
    basis = b.new_zeros(most + 1, b.numel())
    basis[0] = b / size
    matrix = torch.zeros(most + 1, most, dtype=torch.float64)
    rotations: list[tuple[float, float]] = []
    remaining = size
    for step in range(1, most + 1):
        product = matvec(basis[step - 1])
        length = _length(product)
        product, column = _orthogonalize(product, basis[:step])
        following = _length(product)
        if not isfinite(following):
            return None
        is_exhausted = following <= rounding * length
        if not is_exhausted:
            basis[step] = product / following
        column.append(0.0 if is_exhausted else following)
        matrix[: step + 1, step - 1] = torch.tensor(column, dtype=torch.float64)
        remaining *= _rotate(column, rotations)
        if is_exhausted or remaining <= goal:
            break
    weights, miss = _least_squares(matrix[: step + 1, :step], size, rounding)
    vectors = basis[: step + 1]
    return _Cycle(weights.to(b) @ vectors[:-1], miss.to(b) @ vectors, step, is_exhausted)


def _orthogonalize(vector: Tensor, basis: Tensor) -> tuple[Tensor, list[float]]:
    """The part of ``vector`` orthogonal to the rows of ``basis``, and its components along them.

    Done twice, which keeps the basis orthogonal to rounding.
    """
    once = basis @ vector
    vector = vector - once @ basis
    again = basis @ vector
    components: list[float] = (once + again).tolist()
    return vector - again @ basis, components


def _rotate(column: list[float], rotations: list[tuple[float, float]]) -> float:
    """Adds the rotation that makes the last entry of a Hessenberg column zero.

    Returns the factor by which the residual becomes smaller.
    """
    entry = column[0]
    for (cosine, sine), below in zip(rotations, column[1:], strict=False):
        entry = cosine * below - sine * entry
    pivot = hypot(entry, column[-1])
    rotations.append((entry / pivot, column[-1] / pivot) if pivot > 0.0 else (1.0, 0.0))
    return abs(rotations[-1][1])


def _least_squares(matrix: Tensor, size: float, rounding: float) -> tuple[Tensor, Tensor]:
    """The y of smallest ``|size e_1 - matrix y|``, and that difference.

    Singular values below ``rounding`` of the largest are noise and count as zero.
    """
    wanted = torch.zeros(len(matrix), 1, dtype=matrix.dtype)
    wanted[0] = size
    found = torch.linalg.lstsq(matrix, wanted, rcond=rounding, driver="gelsd").solution
    return found[:, 0], (wanted - matrix @ found)[:, 0]


def _length(vector: Tensor) -> float:
    return norm({"": vector})
