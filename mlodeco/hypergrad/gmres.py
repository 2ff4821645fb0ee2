"""The generalized minimal residual method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlodeco.calculus.response import Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.krylov import ROUNDING, Krylov
from mlodeco.hypergrad.options import check_count
from mlodeco.tree import Tree, add, dot, epsilon, norm, scale, zeros_like


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

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        super().__post_init__()
        check_count(self, "restart", self.restart)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """Cycles of at most ``restart`` steps, each from the residual of the last."""
        start = remaining = norm(b)
        x, residual = zeros_like(b), b
        steps, status = 0, Status.MAX_STEPS
        while steps < self.max_steps:
            most = min(self.restart, self.max_steps - steps)
            cycle = _cycle(matvec, residual, most, self.rtol * start)
            if not cycle.correction:
                return Solution.lost(b, steps + cycle.steps)
            x, residual = add(x, cycle.correction), cycle.residual
            steps += cycle.steps
            remaining = norm(residual)
            if remaining <= max(self.rtol * start, ROUNDING * epsilon(b) * start):
                status = Status.CONVERGED
                break
            if cycle.is_exhausted:
                status = Status.SINGULAR
                break
        return Solution(x, steps, remaining / start, status)


@dataclass(frozen=True)
class _Cycle:
    """What one Krylov space gave; ``is_exhausted`` if it cannot grow.

    Empty where a product was not finite.
    """

    correction: Tree
    residual: Tree
    steps: int
    is_exhausted: bool


def _cycle(matvec: MatVec, b: Tree, most: int, goal: float) -> _Cycle:
    """Arnoldi's recurrence until the residual is at most ``goal``."""
    size, rounding = norm(b), ROUNDING * epsilon(b)
    basis = [scale(b, 1.0 / size)]
    matrix = torch.zeros(most + 1, most, dtype=torch.float64)
    for step in range(1, most + 1):
        product = matvec(basis[-1])
        length = norm(product)
        product, column = _orthogonalize(product, basis)
        following = norm(product)
        if not math.isfinite(following):
            return _Cycle({}, b, step, True)
        is_exhausted = following <= rounding * length
        matrix[:step, step - 1] = torch.tensor(column, dtype=torch.float64)
        if not is_exhausted:
            matrix[step, step - 1] = following
            basis.append(scale(product, 1.0 / following))
        weights, miss = _least_squares(matrix[: step + 1, :step], size, rounding)
        if is_exhausted or float(torch.linalg.vector_norm(miss)) <= goal:
            break
    return _Cycle(_combine(basis, weights), _combine(basis, miss), step, is_exhausted)


def _orthogonalize(vector: Tree, basis: list[Tree]) -> tuple[Tree, list[float]]:
    """The part of ``vector`` orthogonal to the basis, and its components along it.

    Done twice, which keeps the basis orthogonal to rounding.
    """
    components = [0.0] * len(basis)
    for _ in range(2):
        for number, known in enumerate(basis):
            part = dot(known, vector)
            vector = add(vector, known, -part)
            components[number] += part
    return vector, components


def _least_squares(matrix: Tensor, size: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Y of smallest ``|size e_1 - matrix y|``, and that difference.

    Singular values below ``rounding`` of the largest are noise and count as zero.
    """
    wanted = torch.zeros(len(matrix), 1, dtype=matrix.dtype)
    wanted[0] = size
    found = torch.linalg.lstsq(matrix, wanted, rcond=rounding, driver="gelsd").solution
    return found[:, 0], (wanted - matrix @ found)[:, 0]


def _combine(basis: list[Tree], weights: Tensor) -> Tree:
    total: Tree = {}
    for vector, weight in zip(basis, weights.tolist(), strict=False):
        total = add(total, vector, weight)
    return total
