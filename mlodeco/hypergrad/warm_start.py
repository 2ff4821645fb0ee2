"""Starting a linear solve from the solution of the last hypergradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlodeco.calculus.response import Solution
from mlodeco.hypergrad.implicit import MatVec
from mlodeco.tree import Tree, add, dot, norm, scale


@dataclass(frozen=True)
class Start:
    """A first guess x for ``H x = b`` and what it leaves: ``rest = b - H x``.

    ``remaining`` is ``|rest| / |b|``, below one.
    """

    value: Tree
    rest: Tree
    remaining: float

    def finish(self, correction: Solution) -> Solution:
        """The solution of the whole from that of ``H y = rest``."""
        residual = correction.residual
        return replace(
            correction,
            value=add(self.value, correction.value),
            residual=None if residual is None else residual * self.remaining,
        )


def recall(previous: Tree | None, b: Tree) -> Tree | None:
    """A previous vector with the keys and dtypes of b; None if there is none of its shapes."""
    if previous is None or any(
        key not in previous or previous[key].shape != value.shape for key, value in b.items()
    ):
        return None
    return {key: previous[key].to(value) for key, value in b.items()}


def begin(matvec: MatVec, b: Tree, previous: Tree | None) -> Start | None:
    """The multiple of ``previous`` that leaves the smallest residual; costs one product.

    None where it does not help: there is no previous solution for these parameters, or it
    points away from the new one.
    """
    guess = recall(previous, b)
    if guess is None:
        return None
    product = matvec(guess)
    size = norm(product)
    factor = dot(product, b) / size**2 if size > 0.0 else 0.0
    if factor <= 0.0:
        return None
    rest = add(b, product, -factor)
    remaining = norm(rest) / norm(b)
    return Start(scale(guess, factor), rest, remaining) if remaining < 1.0 else None
