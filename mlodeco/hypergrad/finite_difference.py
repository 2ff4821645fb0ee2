"""The identity Hessian with a finite difference for the cross product."""

from __future__ import annotations

from dataclasses import dataclass

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import Difference, fit_curvature, share_curvature
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.hypergrad.options import Guide, Options, check_number
from mlodeco.tree import Tree, scale


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Options):
    """``v = scale * b`` and ``cross^T v`` by a central difference of first-order gradients.

    ``cross^T v ~ (dC/dlambda(w + h v) - dC/dlambda(w - h v)) / 2h`` on copies of w, with the
    same random numbers on both sides. Cost: two first-order gradients in lambda; needs no
    second derivatives. Differences see through ``detach()`` and ``no_grad()``, which exact
    products respect; where lambda is fed detached values of w, the two therefore differ.

    Attributes:
        scale: in squared parameter per loss.
        radius: the length of ``h v``, in units of the parameters. Default: the cube root of
            the dtype's epsilon times ``1 + |w|``.

    Reference:
        Liu et al. 2019 (DARTS), arXiv:1806.09055. Differs in the radius and in the random
        numbers, which there change between the two sides.
    """

    scale: float = 1.0
    radius: float | None = None

    guide = Guide(
        solves="as identity, the product by a difference",
        cost="2 gradients",
        when="where an operation has no second derivative",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        check_number(self, "scale", self.scale, positive=True)
        if self.radius is not None:
            check_number(self, "radius", self.radius, positive=True)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Scales the cotangent and takes one cross product by differences."""
        v = scale(cotangent, self.scale)
        difference = Difference(problem, radius=self.radius)
        shared = share_curvature(difference, problem)
        cross = fit_curvature(shared, problem).cross(v)
        return Response(cross, Solution(v, 0, None, Status.TRUNCATED))
