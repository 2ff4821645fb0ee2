"""The first-order gradient of a level's loss at a point."""

from __future__ import annotations

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import gradient, live
from mlodeco.tree import Tree, add


def first_gradient(problem: LowerProblem) -> Tree:
    """``dC/dw``, averaged over micro-batches; parameters that no loss touches are left out."""
    return gradient_and_state(problem)[0]


def gradient_and_state(problem: LowerProblem) -> tuple[Tree, State]:
    """The same, and the tensors of the loss's slots behind it, updated buffers included."""
    point = problem.point
    own = live(problem.parameters)
    state = point.state({**point.values, problem.level: own})
    share = 1.0 / len(point.batches)

    def differentiate() -> Tree:
        result: Tree = {}
        for loss, _ in point.losses():
            if loss.requires_grad:
                # the loss is scaled and not its gradient, as in an ordinary step: bit for bit
                result = add(result, gradient(loss if share == 1.0 else loss * share, own))
        return result

    return point.loss.within(state, differentiate), state
