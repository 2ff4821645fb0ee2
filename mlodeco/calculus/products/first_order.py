"""The first-order gradient of a level's loss at a point."""

from __future__ import annotations

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.stateless import gradient, live
from mlodeco.tree import Tree, add


def first_gradient(problem: LowerProblem) -> Tree:
    """``dC/dw``, averaged over micro-batches; parameters that no loss touches are left out."""
    point = problem.point
    own = live(problem.parameters)
    state = point.loss.state({**point.values, problem.level: own})
    share = 1.0 / len(point.batches)

    def differentiate() -> Tree:
        result: Tree = {}
        for loss, _ in point.losses():
            if loss.requires_grad:
                result = add(result, gradient(loss, own), share)
        return result

    return point.loss.within(state, differentiate)
