"""The product modes by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.automatic import Automatic
from mlodeco.calculus.products.compiled import COMPILED_PRODUCTS, CompiledProducts
from mlodeco.calculus.products.difference import Difference
from mlodeco.calculus.products.fitted import fit_curvature, fit_linearization
from mlodeco.calculus.products.forward import Forward
from mlodeco.calculus.products.protocol import Cross, Curvature, Linearization
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.products.reverse_over_forward import cross_by_duals
from mlodeco.calculus.products.shared import share_curvature, share_linearization
from mlodeco.tree import Tree

PRODUCTS: Final = ("auto", "reverse", "reverse_over_forward", "forward", "difference")
"""The modes of a product."""

LINEARIZATIONS: Final = ("auto", "reverse", "forward", "difference")
"""Those that give the gradient and both products in one pass."""


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


class _Named:
    """A mode asked for by name: where it does not run, it says so and what does."""

    def __init__(self, problem: LowerProblem, product: str) -> None:
        self._problem = problem
        self._product = product

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Adds to an error what would run."""
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


class _NamedCurvature(_Named):
    def __init__(self, curvature: Curvature, problem: LowerProblem, product: str) -> None:
        super().__init__(problem, product)
        self._curvature = curvature

    def touched(self) -> tuple[str, ...]:
        with self.noted():
            return self._curvature.touched()

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        with self.noted():
            return self._curvature.hvp(v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        with self.noted():
            return self._curvature.cross(v)


class _NamedLinearization(_Named):
    def __init__(self, opened: Linearization, problem: LowerProblem, product: str) -> None:
        super().__init__(problem, product)
        self._opened = opened

    def gradient(self) -> Tree:
        with self.noted():
            return self._opened.gradient()

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        with self.noted():
            return self._opened.pull_back(v, own=own)


def open_curvature(problem: LowerProblem, product: str) -> Curvature:
    """The products of ``problem`` in the mode named, one of :data:`PRODUCTS`."""
    modes: dict[str, Callable[[LowerProblem], Curvature]] = {
        "reverse": Reverse,
        "reverse_over_forward": _ReverseWithDuals,
        "forward": Forward,
        "difference": Difference,
    }
    found: Curvature
    if problem.opened is not None:
        found = problem.opened(problem, product)
        return found
    if product in modes:
        found = _NamedCurvature(modes[product](problem), problem, product)
    else:
        found = Automatic(problem)
    if problem.point.compiler is not None and product in COMPILED_PRODUCTS:
        found = CompiledProducts(problem, problem.point.compiler, found)
    return fit_curvature(share_curvature(found, problem), problem)


def open_linearization(problem: LowerProblem, product: str) -> Linearization:
    """The gradient of ``problem`` and its products, in a mode of :data:`LINEARIZATIONS`."""
    modes: dict[str, Callable[[LowerProblem], Linearization]] = {
        "reverse": Reverse,
        "forward": Forward,
        "difference": Difference,
    }
    found: Linearization
    if product in modes:
        found = _NamedLinearization(modes[product](problem), problem, product)
    else:
        found = Automatic(problem)
    if problem.point.compiler is not None and product in COMPILED_PRODUCTS:
        found = CompiledProducts(problem, problem.point.compiler, found)
    return fit_linearization(share_linearization(found, problem), problem)
