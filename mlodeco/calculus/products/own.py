"""Own parameters in passes that take no gradient in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mlodeco.calculus.point import LowerProblem

T = TypeVar("T")


def live_if_needed(problem: LowerProblem, differentiate: Callable[[bool], T]) -> T:
    """``differentiate(False)``; ``differentiate(True)`` if the loss takes gradients itself.

    A gradient in lambda is cheaper where the own parameters require none. A loss with a
    penalty on its gradient needs them to; that is kept for the level.

    Args:
        problem: the loss and its point.
        differentiate: the pass, told whether the own parameters are to require gradients.
    """
    decisions = problem.point.decisions
    if not decisions.needs_live_own:
        try:
            return differentiate(False)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
    result = differentiate(True)
    decisions.needs_live_own = True
    return result
