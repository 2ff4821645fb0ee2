"""Products of losses in half precision, for solvers that work in single precision.

A direction comes in single precision, whatever the parameters are in, and a product goes out in
it. Where the loss is in float16, its products are those of the scaled loss in a direction of
convenient size: both are undone behind them, in single precision. A scale that is too large
shows as a number that is not finite, and ends the solve: its solver might hide it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mlodeco.calculus.finite import require_finite_tree
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.precision import into_range
from mlodeco.calculus.products.protocol import Cross, Curvature, Linearization
from mlodeco.tree import Tree, scale, widen


def fit_curvature(curvature: Curvature, problem: LowerProblem) -> Curvature:
    """The same products, in and out in single precision, of the loss as it is."""
    return _FittedCurvature(curvature, problem) if _needs_fitting(problem) else curvature


def fit_linearization(
    opened: Linearization, problem: LowerProblem, graph_scale: float | None = None
) -> Linearization:
    """The same gradient and products, in and out in single precision, of the loss as it is.

    Args:
        opened: the products, of the scaled loss.
        problem: the loss and its point, with the scale that is wanted.
        graph_scale: the one that the graph was made with, where it was kept from a step.
    """
    if not _needs_fitting(problem):
        return opened
    return _FittedLinearization(opened, problem, graph_scale or problem.point.scale)


def _needs_fitting(problem: LowerProblem) -> bool:
    trees = (problem.parameters, *(problem.point.values[name] for name in problem.targets))
    is_narrow = any(t.itemsize < 4 for tree in trees for t in tree.values())
    return is_narrow or problem.point.loss.is_half


class _Fitted:
    """What both have in common.

    Args:
        problem: the loss and its point.
        graph_scale: the scale of the losses whose products these are; what it lacks of the one
            that is wanted, the direction gets.
    """

    def __init__(self, problem: LowerProblem, graph_scale: float) -> None:
        self._problem = problem
        self._lacking = problem.point.scale / graph_scale

    def _into(self, v: Mapping[str, Tensor]) -> tuple[Tree, float]:
        """The direction for a pass, and the factor that undoes unit and scale behind it."""
        point = self._problem.point
        into, unit = into_range(v, self._problem.parameters, is_scaled=point.loss.is_half)
        return scale(into, self._lacking), unit / point.scale

    def _out_of(self, found: Tree, factor: float) -> Tree:
        wide = widen(found)
        if self._problem.point.loss.is_half:
            require_finite_tree(wide, self._problem.point, "a product in float16")
        return scale(wide, factor)

    def _all_out_of(self, found: Cross, factor: float) -> Cross:
        return {target: self._out_of(tree, factor) for target, tree in found.items()}


class _FittedCurvature(_Fitted):
    def __init__(self, curvature: Curvature, problem: LowerProblem) -> None:
        super().__init__(problem, problem.point.scale)
        self._curvature = curvature

    def touched(self) -> tuple[str, ...]:
        return self._curvature.touched()

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        into, factor = self._into(v)
        return self._out_of(self._curvature.hvp(into), factor)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        into, factor = self._into(v)
        return self._all_out_of(self._curvature.cross(into), factor)


class _FittedLinearization(_Fitted):
    def __init__(self, opened: Linearization, problem: LowerProblem, graph_scale: float) -> None:
        super().__init__(problem, graph_scale)
        self._opened = opened

    def gradient(self) -> Tree:
        return self._opened.gradient()

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        into, factor = self._into(v)
        curved, cross = self._opened.pull_back(into, own=own)
        return self._out_of(curved, factor), self._all_out_of(cross, factor)
