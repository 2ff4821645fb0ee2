"""Refusing numbers that are not finite."""

from __future__ import annotations

import math

import torch

from mlodeco.calculus.point import Point
from mlodeco.errors import NonFiniteError
from mlodeco.tree import Tree, norm


def require_finite_tree(tree: Tree, point: Point, what: str, cause: str = "") -> None:
    """Refuses numbers that are not finite, in what was found for the level of ``point``.

    Args:
        tree: the numbers.
        point: where they were found.
        what: their name.
        cause: where they come from, if what went in is finite.

    Raises:
        NonFiniteError: there are some.
    """
    size = norm(tree)
    if math.isfinite(size) or all(bool(torch.isfinite(t).all()) for t in tree.values()):
        return
    raise NonFiniteError(
        f"{what} is not finite (its norm is {size}).",
        expected="finite numbers.",
        remedy="look at this level's loss and at that of the level above for overflow, a division "
        "by zero or the logarithm of zero; for a solver, use a smaller step or more damping.",
        level=point.loss.level,
        site=point.loss.site,
        cause=cause,
    )
