"""The product modes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
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


class _Insisting:
    """A mode asked for by name: where it does not run, it says so and what does."""

    def __init__(self, curvature: Curvature, problem: LowerProblem, product: str) -> None:
        self._curvature = curvature
        self._problem = problem
        self._product = product

    def touched(self) -> tuple[str, ...]:
        with self._noted():
            return self._curvature.touched()

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        with self._noted():
            return self._curvature.hvp(v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        with self._noted():
            return self._curvature.cross(v)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error.add_note(
                f"in product={self._product!r} of level {self._problem.level!r} "
                f"({self._problem.point.loss.site}); where an operation has no rule for that, "
                "product='auto' takes another"
            )
            raise


def open_curvature(problem: LowerProblem, product: str) -> Curvature:
    """The products of ``problem`` in the mode named, one of :data:`PRODUCTS`."""
    modes: dict[str, Callable[[LowerProblem], Curvature]] = {
        "reverse": Reverse,
        "reverse_over_forward": _ReverseWithDuals,
        "forward": Forward,
        "difference": Difference,
    }
    if product not in modes:
        return Automatic(problem)
    return _Insisting(modes[product](problem), problem, product)
