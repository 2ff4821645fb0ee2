"""The Hessian taken as the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import open_curvature
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.hypergrad.options import Guide, Options, check_number, check_product
from mlodeco.tree import Tree, is_zero, scale, zeros_like


@dataclass(frozen=True, kw_only=True)
class Identity(Options):
    """``v = scale * b``: the inverse Hessian taken as ``scale`` times the identity (T1-T2).

    Exact if ``H = I / scale``; otherwise the direction is biased towards directions of high
    curvature. Cost: one cross product and no Hessian product. With ``scale`` the lower
    level's learning rate it is the derivative through one SGD step.

    Attributes:
        scale: in squared parameter per loss.
        product: ``"auto"``, ``"reverse"``, ``"reverse_over_forward"``, ``"forward"`` or
            ``"difference"``.

    Reference:
        Luketina et al. 2016, arXiv:1511.06727.
    """

    scale: float = 1.0
    product: str = "auto"
    is_entrywise: ClassVar[bool] = True

    guide = Guide(
        solves="scale * b: H as the identity",
        cost="1 cross product",
        when="a first try; a short inner loop; the cheapest",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        check_number(self, "scale", self.scale, positive=True)
        check_product(self, self.product)

    def solve(self, matvec: MatVec, b: Tree) -> Solution:
        """``scale * b``, for nested responses."""
        return Solution(scale(b, self.scale), 0, None, Status.TRUNCATED)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Scales the cotangent and takes one cross product."""
        if is_zero(cotangent):
            return Response({}, Solution(zeros_like(cotangent), 0, None, Status.CONVERGED))
        v = scale(cotangent, self.scale)
        cross = open_curvature(problem, self.product).cross(v)
        return Response(cross, Solution(v, 0, None, Status.TRUNCATED))
