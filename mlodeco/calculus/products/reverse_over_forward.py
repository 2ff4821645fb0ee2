"""Reverse over forward, for cross products alone.

The own parameters carry v as a tangent; the tangent of the loss is ``<g, v>``, and its
gradient in lambda is the cross product. Where lambda enters late, almost nothing is left
for the reverse part.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd import forward_ad

from mlodeco.calculus.forward_mode import NoGradStopsTangents
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.own import live_if_needed
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.stateless import frozen, gradients, live
from mlodeco.tree import add


def cross_by_duals(problem: LowerProblem, v: Mapping[str, Tensor]) -> Cross:
    """``(dg/dlambda)^T v`` for each target: one dual forward pass, one gradient in lambda."""
    return live_if_needed(problem, lambda is_live: _cross(problem, v, is_live))


def _cross(problem: LowerProblem, v: Mapping[str, Tensor], is_live: bool) -> Cross:
    point = problem.point
    parameters = live(problem.parameters) if is_live else problem.parameters
    targets = {level: live(point.values[level]) for level in problem.targets}
    share = 1.0 / len(point.batches)
    with forward_ad.dual_level():
        own = {
            key: forward_ad.make_dual(value, v[key].detach()) if key in v else value
            for key, value in parameters.items()
        }
        state = point.state({**point.values, **targets, problem.level: own})

        def differentiate() -> Cross:
            result: Cross = {level: {} for level in targets}
            losses = point.losses()
            while True:
                with NoGradStopsTangents():
                    item = next(losses, None)
                if item is None:
                    return result
                tangent = forward_ad.unpack_dual(item[0]).tangent
                if tangent is None or not tangent.requires_grad:
                    continue
                for level, tree in gradients(tangent, targets).items():
                    result[level] = add(result[level], frozen(tree), share)

        return point.loss.within(state, differentiate)
