"""Products averaged over processes: those of the mean of all processes' losses.

A product is linear in the loss. So the mean of the products in one direction is the product of
the mean loss, whatever the mode; a process that falls back to another one changes nothing for
the others. One collective a product, and one for the names of the parameters touched.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlodeco.calculus.mean import Mean, mean_by_name, mean_of
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import first_order, forward
from mlodeco.calculus.products.protocol import Cross, Curvature, Linearization
from mlodeco.tree import Tree, fill, widen


def share_curvature(curvature: Curvature, problem: LowerProblem) -> Curvature:
    """The same products, averaged where the point says how."""
    mean = problem.point.mean
    return curvature if mean is None else _SharedCurvature(curvature, problem, mean)


def share_linearization(opened: Linearization, problem: LowerProblem) -> Linearization:
    """The same gradient and products, averaged where the point says how."""
    mean = problem.point.mean
    return opened if mean is None else _SharedLinearization(opened, problem, mean)


def first_gradient(problem: LowerProblem) -> Tree:
    """``dC/dw``, averaged over micro-batches and processes; see :func:`differentiate_once`."""
    found = first_order.first_gradient(problem)
    return mean_of(problem.point.mean, found, problem.parameters)


def push_gradient(problem: LowerProblem, along: Mapping[str, Tree]) -> Tree:
    """The derivative of that gradient along a direction in the parameters of several levels.

    Args:
        problem: the loss and its point.
        along: for each level, its own perhaps, a part of the direction.
    """
    found = forward.push_gradient(problem, along)
    return mean_of(problem.point.mean, found, widen(problem.parameters))


class _Shared:
    def __init__(self, problem: LowerProblem, mean: Mean) -> None:
        self._problem = problem
        self._mean = mean

    def _mean_cross(self, found: Cross) -> Cross:
        """With a tree for every target, so that all processes average the same ones."""
        trees = {target: found.get(target, {}) for target in self._problem.targets}
        return mean_by_name(self._mean, trees, self._problem.point.values) if trees else {}


class _SharedCurvature(_Shared):
    def __init__(self, curvature: Curvature, problem: LowerProblem, mean: Mean) -> None:
        super().__init__(problem, mean)
        self._curvature = curvature

    def touched(self) -> tuple[str, ...]:
        """Those that the loss of some process depends on."""
        some = next(iter(self._problem.parameters.values()))
        flags = dict.fromkeys(self._problem.parameters, torch.zeros((), device=some.device))
        own = {key: flags[key] for key in self._curvature.touched()}
        return tuple(mean_of(self._mean, own, flags))

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        return fill(mean_of(self._mean, self._curvature.hvp(v), v), v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        return self._mean_cross(self._curvature.cross(v))


class _SharedLinearization(_Shared):
    def __init__(self, opened: Linearization, problem: LowerProblem, mean: Mean) -> None:
        super().__init__(problem, mean)
        self._opened = opened

    def gradient(self) -> Tree:
        return mean_of(self._mean, self._opened.gradient(), self._problem.parameters)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        curved, cross = self._opened.pull_back(v, own=own)
        problem = self._problem
        trees = {target: cross.get(target, {}) for target in problem.targets}
        like = {target: problem.point.values[target] for target in problem.targets}
        found = self._mean([curved, *trees.values()], [problem.parameters, *like.values()])
        return found[0], dict(zip(trees, found[1:], strict=True))
