"""Forward over reverse: the gradient's own tangent, with no graph kept of it.

The own parameters carry v as a tangent through the loss and its backward pass; the tangents
of the gradients in w and lambda are the products. A pass a direction, and the memory of a
first-order gradient with tangents.

These are ``J v`` for J the Jacobian of the gradients in w, and in lambda, along w. They equal
the transposed products of the other modes where the gradients are those of a scalar; where a
hook or a custom function changes the backward pass they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor
from torch.autograd import forward_ad

from mlodeco.calculus.forward_mode import NoGradStopsTangents
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.precision import into_range
from mlodeco.calculus.products.first_order import first_gradient
from mlodeco.calculus.products.own import live_if_needed
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.stateless import gradient, live
from mlodeco.tree import Tree, add, fill, scale, widen


class Forward:
    """Products by dual numbers through the backward pass."""

    def __init__(self, problem: LowerProblem) -> None:
        self._problem = problem

    @cached_property
    def _touched(self) -> tuple[str, ...]:
        return tuple(first_gradient(self._problem))

    def touched(self) -> tuple[str, ...]:
        """Found by one gradient: a loss may take another branch than at another point."""
        return self._touched

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """One pass, with the gradient in w."""
        level = self._problem.level
        found = self._tangents(v, (level,))[level]
        return fill(found, v)

    def gradient(self) -> Tree:
        """One gradient in w."""
        return first_gradient(self._problem)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """One pass, with the gradients in w and in lambda."""
        level, targets = self._problem.level, self._problem.targets
        found = self._tangents(v, (*targets, level) if own else targets)
        return found.pop(level, {}), found

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """One pass, with the gradient in lambda."""
        return live_if_needed(
            self._problem, lambda is_live: self._tangents(v, self._problem.targets, is_live)
        )

    def _tangents(
        self, v: Mapping[str, Tensor], wanted: tuple[str, ...], is_live: bool = True
    ) -> Cross:
        """The tangents of the gradients in the parameters of the levels wanted."""
        problem, point = self._problem, self._problem.point
        values = {**point.values, problem.level: problem.parameters}
        leaves = {level: live(values[level]) for level in wanted}
        parameters = live(problem.parameters) if is_live else problem.parameters
        share = 1.0 / len(point.batches)
        with forward_ad.dual_level():
            own = leaves.get(problem.level, parameters)
            duals = {
                key: forward_ad.make_dual(value, v[key].detach()) if key in v else value
                for key, value in own.items()
            }
            values = {**values, **leaves, problem.level: duals}
            inputs = {(lv, key): t for lv in wanted for key, t in values[lv].items()}

            def differentiate() -> Cross:
                result: Cross = {level: {} for level in wanted}
                losses = point.losses()
                while True:
                    with NoGradStopsTangents():
                        item = next(losses, None)
                    if item is None:
                        return result
                    if not item[0].requires_grad:
                        continue
                    for (level, key), value in gradient(item[0], inputs).items():
                        tangent = forward_ad.unpack_dual(value).tangent
                        if tangent is not None:
                            result[level] = add(result[level], {key: tangent}, share)

            return point.loss.within(point.state(values), differentiate)


def push_gradient(problem: LowerProblem, along: Mapping[str, Tree]) -> Tree:
    """The derivative of the gradient in w along a direction in the parameters of several levels.

    In and out in single precision, as in :mod:`mlodeco.calculus.products.fitted`.

    Args:
        problem: the loss and its point.
        along: for each level, its own perhaps, a part of the direction.
    """
    point = problem.point
    values = {name: {**point.values, problem.level: problem.parameters}[name] for name in along}
    whole, unit = into_range(_joined(along), _joined(values), is_scaled=point.loss.is_half)
    into = {name: {key: whole[f"{name}/{key}"] for key in tree} for name, tree in along.items()}
    return scale(widen(_push(problem, into)), unit / point.scale)


def _joined(trees: Mapping[str, Tree]) -> Tree:
    return {f"{name}/{key}": t for name, tree in trees.items() for key, t in tree.items()}


def _push(problem: LowerProblem, along: Mapping[str, Tree]) -> Tree:
    point, level = problem.point, problem.level
    values = {**point.values, level: live(problem.parameters)}
    share = 1.0 / len(point.batches)
    with forward_ad.dual_level():
        for name, tree in along.items():
            moved = {key: forward_ad.make_dual(values[name][key], t) for key, t in tree.items()}
            values[name] = {**values[name], **moved}

        def differentiate() -> Tree:
            result: Tree = {}
            losses = point.losses()
            while True:
                with NoGradStopsTangents():
                    item = next(losses, None)
                if item is None:
                    return result
                if not item[0].requires_grad:
                    continue
                for key, value in gradient(item[0], values[level]).items():
                    tangent = forward_ad.unpack_dual(value).tangent
                    if tangent is not None:
                        result = add(result, {key: tangent}, share)

        return point.loss.within(point.state(values), differentiate)
