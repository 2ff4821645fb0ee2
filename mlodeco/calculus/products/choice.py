"""The product modes by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.automatic import Automatic
from mlodeco.calculus.products.difference import Difference
from mlodeco.calculus.products.forward import Forward
from mlodeco.calculus.products.protocol import Cross, Curvature
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.products.reverse_over_forward import cross_by_duals
from mlodeco.tree import Tree

PRODUCTS: Final = ("auto", "reverse", "reverse_over_forward", "forward", "difference")
"""The modes of a product."""


class _ReverseWithDuals:
    """Hessian products in reverse, cross products by duals; no fallback."""

    def __init__(self, problem: LowerProblem) -> None:
        self._problem = problem
        self._reverse = Reverse(problem, with_targets=False)

    def touched(self) -> tuple[str, ...]:
        return self._reverse.touched()

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        return self._reverse.hvp(v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        return cross_by_duals(self._problem, v)


def open_curvature(problem: LowerProblem, product: str) -> Curvature:
    """The products of ``problem`` in the mode named, one of :data:`PRODUCTS`."""
    if product == "reverse":
        return Reverse(problem)
    if product == "reverse_over_forward":
        return _ReverseWithDuals(problem)
    if product == "forward":
        return Forward(problem)
    if product == "difference":
        return Difference(problem)
    return Automatic(problem)
