"""The optimizer's own step in place of the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import first_gradient, open_curvature
from mlodeco.calculus.response import Response, Solution, Status
from mlodeco.calculus.update import Cotangent, Iterate
from mlodeco.calculus.update_derivatives import pull_back
from mlodeco.errors import OptimizerError
from mlodeco.hypergrad.options import Guide, Options, check_number, check_product
from mlodeco.tree import Tree, is_zero, scale, zeros_like


@dataclass(frozen=True, kw_only=True)
class Sama(Options):
    """``v = -scale * (dU/dg)^T b``, U the next step of the lower level's optimizer.

    ``w' = U(w, g)`` is taken at the optimizer's present state, groups, learning rate and
    clipping, with g the gradient on the hypergradient's batch. So this is the derivative
    through one step of the inner loop, for SGD with learning rate a: ``v = a b``. Works with
    every optimizer of torch that has a ``differentiable`` option. Cost: one first-order
    gradient, the derivative of the step (elementwise), and one cross product.

    Attributes:
        scale: a factor on v.
        product: how the cross product is taken: ``"auto"``, ``"reverse"``,
            ``"reverse_over_forward"``, ``"forward"`` or ``"difference"``.

    For a level that has lower levels itself, g is its direct gradient alone, where its own step
    takes the hypergradient: the same for SGD without clipping, whose step is linear in g, and an
    approximation for others. The level needs an optimizer. Outside a run its state is fresh;
    Adam's first step is nearly the sign of the gradient, whose derivative is nearly zero.

    Reference:
        Choe et al. 2023, arXiv:2310.05674. There the derivative is that of the last step and
        without bias correction and learning rate: late in training the same direction on
        another scale.
    """

    scale: float = 1.0
    product: str = "auto"
    is_entrywise: ClassVar[bool] = True

    guide = Guide(
        solves="one step of the lower level's optimizer",
        cost="1 gradient and 1 cross product",
        when="large models, Adam; several GPUs",
    )

    def __post_init__(self) -> None:
        """Checks the options.

        Raises:
            MethodError: one cannot be right.
        """
        check_number(self, "scale", self.scale, positive=True)
        check_product(self, self.product)

    def respond(self, problem: LowerProblem, cotangent: Tree) -> Response:
        """Pulls the cotangent back through the optimizer's step, then one cross product.

        Raises:
            OptimizerError: the level has no optimizer, or one that cannot be differentiated.
        """
        if is_zero(cotangent):
            return Response({}, Solution(zeros_like(cotangent), 0, None, Status.CONVERGED))
        point = problem.point
        if point.next_update is None:
            raise OptimizerError(
                "the level has no optimizer, whose step Sama differentiates.",
                remedy="give optimizer= to the level, or use another method.",
                level=problem.level,
                site=point.loss.site,
            )
        update, state = point.next_update()
        gradients = first_gradient(problem)
        pulled = pull_back(
            update,
            Iterate(problem.parameters, state),
            gradients,
            point.values,
            Cotangent(cotangent),
        )
        v = scale(pulled.gradients, -self.scale)
        if not v:
            return Response({}, Solution(zeros_like(cotangent), 0, None, Status.CONVERGED))
        cross = open_curvature(problem, self.product).cross(v)
        return Response(cross, Solution(v, 0, None, Status.TRUNCATED))
