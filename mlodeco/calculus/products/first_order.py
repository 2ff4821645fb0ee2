"""The first-order gradient of a level's loss at a point."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mlodeco.calculus.copies import stacked
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.slots import State
from mlodeco.calculus.split import split_point
from mlodeco.calculus.stateless import live
from mlodeco.calculus.untouched import warn_of_untouched
from mlodeco.tree import Tree, add, scale


@dataclass(frozen=True)
class FirstOrder:
    """What one pass over the micro-batches found.

    Attributes:
        gradient: of the mean loss; parameters that no loss touches are left out.
        state: the tensors of the loss's slots behind it, updated buffers included.
        outcomes: the losses with what came with them.
    """

    gradient: Tree
    state: State
    outcomes: list[tuple[Tensor, dict[str, Any]]]


def first_gradient(problem: LowerProblem) -> Tree:
    """``dC/dw``, averaged over micro-batches; parameters that no loss touches are left out."""
    return differentiate_once(problem).gradient


def differentiate_once(problem: LowerProblem) -> FirstOrder:
    """The same, with what came with it; one replica after another where there are several."""
    point, copies = problem.point, problem.point.copies
    if copies is not None and problem.level in copies.levels and not copies.is_vmapped:
        return _of_each(problem, copies.count)
    own = live(problem.parameters)
    state = point.state({**point.values, problem.level: own})
    share = 1.0 / len(point.batches)
    outcomes: list[tuple[Tensor, dict[str, Any]]] = []

    def differentiate() -> Tree:
        result: Tree = {}
        for loss, metrics in point.losses():
            outcomes.append((point.unscaled(loss), metrics))
            if loss.requires_grad:
                # the loss is scaled and not its gradient, as in an ordinary step: bit for bit
                part = loss if share == 1.0 else loss * share
                result = add(result, point.loss.gradient(part, own))
        return result

    found = scale(point.loss.within(state, differentiate), 1.0 / point.scale)
    return FirstOrder(found, state, outcomes)


def _of_each(problem: LowerProblem, count: int) -> FirstOrder:
    """With the memory of one replica; buffers are those behind the first."""
    found = [
        differentiate_once(replace(problem, point=split_point(problem.point, r)))
        for r in range(count)
    ]
    outcomes = [
        (loss * count, metrics)
        for entries in zip(*(one.outcomes for one in found), strict=True)
        for loss, metrics in entries
    ]
    warn_of_untouched(problem, [one.gradient for one in found])
    gradients = stacked([one.gradient for one in found], problem.parameters)
    return FirstOrder(gradients, found[0].state, outcomes)
