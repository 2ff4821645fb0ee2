"""The product modes by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, ParamSpec, Protocol, TypeVar

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

P = ParamSpec("P")
T = TypeVar("T")

PRODUCTS: Final = ("auto", "reverse", "reverse_over_forward", "forward", "difference")
"""The modes of a product."""

LINEARIZATIONS: Final = ("auto", "reverse", "forward", "difference")
"""Those that give the gradient and both products in one pass."""


class _Mode(Curvature, Linearization, Protocol):
    """Both signatures."""


class _ReverseWithDuals(Reverse):
    """Hessian products in reverse, cross products by duals; no fallback."""

    def __init__(self, problem: LowerProblem) -> None:
        super().__init__(problem, with_targets=False)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        return cross_by_duals(self._problem, v)


class _Named:
    """A mode asked for by name: where it does not run, it says so and what does."""

    def __init__(self, mode: _Mode, problem: LowerProblem, product: str) -> None:
        self._mode = mode
        self._problem = problem
        self._product = product

    def touched(self) -> tuple[str, ...]:
        return self._noted(self._mode.touched)

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        return self._noted(self._mode.hvp, v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        return self._noted(self._mode.cross, v)

    def gradient(self) -> Tree:
        return self._noted(self._mode.gradient)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        return self._noted(self._mode.pull_back, v, own=own)

    def _noted(self, product: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The product; to an error is added what would run."""
        try:
            return product(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            error.add_note(
                f"in product={self._product!r} of level {self._problem.level!r} "
                f"({self._problem.point.loss.site}); where an operation has no rule for that, "
                "product='auto' takes another"
            )
            raise


_MODES: Final[Mapping[str, Callable[[LowerProblem], _Mode]]] = {
    "reverse": Reverse,
    "forward": Forward,
    "difference": Difference,
}
_MODES_OF_PRODUCTS: Final = {**_MODES, "reverse_over_forward": _ReverseWithDuals}


def open_curvature(problem: LowerProblem, product: str) -> Curvature:
    """The products of ``problem`` in the mode named, one of :data:`PRODUCTS`."""
    if problem.opened is not None:
        found: Curvature = problem.opened(problem, product)
        return found
    own = _open(problem, product, _MODES_OF_PRODUCTS)
    return fit_curvature(share_curvature(own, problem), problem)


def open_linearization(problem: LowerProblem, product: str) -> Linearization:
    """The gradient of ``problem`` and its products, in a mode of :data:`LINEARIZATIONS`."""
    own = _open(problem, product, _MODES)
    return fit_linearization(share_linearization(own, problem), problem)


def _open(
    problem: LowerProblem, product: str, modes: Mapping[str, Callable[[LowerProblem], _Mode]]
) -> _Mode:
    """The products of this process's loss, compiled where the point says so."""
    found: _Mode
    if product in modes:
        found = _Named(modes[product](problem), problem, product)
    else:
        found = Automatic(problem)
    if problem.point.compiler is not None and product in COMPILED_PRODUCTS:
        found = CompiledProducts(problem, problem.point.compiler, found)
    return found
