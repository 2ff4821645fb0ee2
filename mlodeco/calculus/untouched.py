"""Parameters that the losses of some replicas touch, and those of others do not."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

from mlodeco.calculus.point import LowerProblem
from mlodeco.errors import GraphWarning, quoted


def warn_of_untouched(problem: LowerProblem, touched: Sequence[Collection[str]]) -> None:
    """Warns once of a gradient of zero that stands for none and moves a replica nevertheless.

    Args:
        problem: the loss of all replicas.
        touched: for each replica the parameters with a gradient.
    """
    keys = [key for key in problem.parameters if any(key in one for one in touched)]
    told = problem.point.decisions.partly_touched
    partly = [key for key in keys if key not in told and not all(key in one for one in touched)]
    if not partly or _rests_at_zero(problem):
        return
    told.update(partly)
    key = partly[0]
    absent = [number for number, one in enumerate(touched) if key not in one]
    loss = problem.point.loss
    warnings.warn(
        f"level {loss.level!r} ({loss.site}): the loss of some replicas does not depend on "
        f"{quoted(partly)} (on {key!r}: replica {', '.join(map(str, absent))}). One optimizer "
        "steps all of them, and their gradient there is zero: momentum, weight decay and moments "
        "still move it, as they would not in programs of one replica each. Remedy: let every "
        f"replica depend on it, such as by adding 0 * (a sum of {key!r}), so that this is meant; "
        "or use SGD without momentum and weight decay, or an @update rule.",
        GraphWarning,
        stacklevel=2,
    )


def _rests_at_zero(problem: LowerProblem) -> bool:
    """Whether the level's update does the same with a gradient of zero as without one."""
    make = problem.point.next_update
    return make is not None and make()[0].rests_at_zero
