"""Central differences of the first-order gradient, on copies of the parameters.

Needs no double backward. It differentiates through ``detach()`` and ``no_grad()``, which
the exact modes respect: a difference sees the values move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.first_order import first_gradient
from mlodeco.calculus.products.own import live_if_needed
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.stateless import live
from mlodeco.tree import Tree, add, fill, norm, restrict, scale


class Difference:
    """``(f(w + h v) - f(w - h v)) / 2h`` for f the gradient in w or in lambda.

    Args:
        problem: the loss, its point and the targets.
        radius: the length of ``h v``. Default: the cube root of the coarsest dtype's epsilon
            times ``1 + |w|``, which balances rounding against the third derivative.
            Parameters that the loss does not touch count neither in v nor in w.
    """

    def __init__(self, problem: LowerProblem, *, radius: float | None = None) -> None:
        self._problem = problem
        self._radius = radius

    @cached_property
    def _touched(self) -> tuple[str, ...]:
        own = live(self._problem.parameters)
        return tuple(self._gradient(own, {self._problem.level: own})[self._problem.level])

    def touched(self) -> tuple[str, ...]:
        """Found by one gradient."""
        return self._touched

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """Two gradients in w."""
        level = self._problem.level

        def at(shifted: Tree) -> Cross:
            own = live(shifted)
            return self._gradient(own, {level: own})

        return fill(self._central(v, at).get(level, {}), v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """Two gradients in lambda; the copies of w require none unless the loss asks."""
        values = self._problem.point.values

        def at(shifted: Tree) -> Cross:
            targets = {level: live(values[level]) for level in self._problem.targets}
            return live_if_needed(
                self._problem,
                lambda is_live: self._gradient(live(shifted) if is_live else shifted, targets),
            )

        return self._central(v, at)

    def gradient(self) -> Tree:
        """One gradient in w."""
        return first_gradient(self._problem)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """Two gradients in w and in lambda."""
        values, level = self._problem.point.values, self._problem.level

        def at(shifted: Tree) -> Cross:
            parameters = live(shifted)
            trees = {name: live(values[name]) for name in self._problem.targets}
            return self._gradient(parameters, trees | ({level: parameters} if own else {}))

        found = self._central(v, at)
        return found.pop(level, {}), found

    def _central(self, v: Mapping[str, Tensor], at: Callable[[Tree], Cross]) -> Cross:
        own = self._problem.parameters
        h = self._step(v)
        if h == 0.0:
            return {}
        moves = {key: v[key] for key in own if key in v}
        ahead = at(add(own, moves, h))
        behind = at(add(own, moves, -h))
        return {
            level: scale(add(ahead.get(level, {}), behind.get(level, {}), -1.0), 0.5 / h)
            for level in {**ahead, **behind}
        }

    def _step(self, v: Mapping[str, Tensor]) -> float:
        """h; parameters that the loss does not touch take no part of the radius."""
        own = self._problem.parameters
        known = self._problem.point.decisions.touched
        moved = v if known is None else restrict(v, known)
        length = norm(moved)
        if length == 0.0:
            moved, length = v, norm(v)
        if length == 0.0:
            return 0.0
        eps = max(torch.finfo(tensor.dtype).eps for tensor in moved.values())
        radius = self._radius or eps ** (1 / 3) * (1.0 + norm(restrict(own, moved)))
        return radius / length

    def _gradient(self, own: Tree, targets: Cross) -> Cross:
        point = self._problem.point
        state = point.state({**point.values, self._problem.level: own, **targets})
        share = 1.0 / len(point.batches)

        def differentiate() -> Cross:
            result: Cross = {level: {} for level in targets}
            for loss, _ in point.losses():
                if not loss.requires_grad:
                    continue
                for level, tree in point.loss.gradients(loss, targets).items():
                    result[level] = add(result[level], tree, share)
            return result

        return point.loss.within(state, differentiate)
