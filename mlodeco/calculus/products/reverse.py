"""Reverse over reverse: one graph of the gradient, then one vjp a direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

from mlodeco.calculus.autograd_graph import walk_graph
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.stateless import frozen, gradient, live
from mlodeco.calculus.untouched import warn_of_untouched
from mlodeco.tree import Tree, add, fill

K = TypeVar("K")


class Reverse:
    """Keeps the graph of the gradient, so that many directions cost one vjp each.

    Args:
        problem: the loss, its point and the targets.
        with_targets: whether :meth:`cross` will be asked for; without it the graph
            is that of the level's own parameters alone.

    Attributes:
        state: the tensors of the loss's slots; after a pass updated buffers are among them.
        outcomes: the losses of the micro-batches and what came with them, after a pass.
        is_spent: whether the graph has been freed.
    """

    def __init__(self, problem: LowerProblem, *, with_targets: bool = True) -> None:
        self._problem = problem
        self._own = live(problem.parameters)
        values = problem.point.values
        targets = problem.targets if with_targets else ()
        self._targets = {level: live(values[level]) for level in targets}
        self.state = problem.point.state({**values, **self._targets, problem.level: self._own})

        self.outcomes: list[tuple[Tensor, dict[str, Any]]] = []
        self.is_spent = False

    @cached_property
    def _gradients(self) -> list[Tree]:
        gradients = self._build()
        self._refuse_dead_ends(gradients)
        copies = self._problem.point.copies
        if copies is not None and self._problem.level in copies.levels and not copies.is_vmapped:
            each = [gradients[r :: copies.count] for r in range(copies.count)]
            warn_of_untouched(self._problem, [set().union(*trees) for trees in each])
        return gradients

    def _build(self) -> list[Tree]:
        """The gradient of each micro-batch, with its graph."""

        def differentiate() -> list[Tree]:
            found: list[Tree] = []
            self.outcomes = []
            for loss, metrics in self._problem.point.losses():
                self.outcomes.append((self._problem.point.unscaled(loss), metrics))
                is_live = loss.requires_grad
                found.append(gradient(loss, self._own, create_graph=True) if is_live else {})
            return found

        return self._problem.point.loss.within(self.state, differentiate)

    def _refuse_dead_ends(self, gradients: list[Tree]) -> None:
        """Looks for nodes that autograd would pass over in silence, giving zero.

        Each graph is walked: a function may take another branch than before.
        """
        roots = [g.grad_fn for tree in gradients for g in tree.values()]
        if any(type(node).__name__ == "Error" for node in walk_graph(roots)):
            raise RuntimeError(
                "a custom autograd function marked @once_differentiable has no second derivative"
            )

    @cached_property
    def _touched(self) -> Tree:
        gradients = self._gradients
        return {key: t for key, t in self._own.items() if any(key in g for g in gradients)}

    def touched(self) -> tuple[str, ...]:
        """The own parameters with a gradient in some micro-batch."""
        return tuple(self._touched)

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """One vjp through the graph of the gradient."""
        found = self._pull_back(v, self._touched, keep=True)
        return fill(found, v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """One vjp through the graph of the gradient, then freed; another has its own."""
        inputs = {(lv, key): t for lv, tree in self._targets.items() for key, t in tree.items()}
        return self._into_trees(self._pull_back_and_free(v, inputs), self._targets)

    def gradient(self) -> Tree:
        """The mean of the graph's gradients over micro-batches, those of the losses as they are."""
        share = 1.0 / (len(self._gradients) * self._problem.point.scale)
        found: Tree = {}
        for tree in self._gradients:
            found = add(found, frozen(tree), share)
        return found

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """One vjp through the graph of the gradient for both, then it is freed."""
        level = self._problem.level
        trees = {level: self._touched if own else {}, **self._targets}
        inputs = {(lv, key): t for lv, tree in trees.items() for key, t in tree.items()}
        found = self._into_trees(self._pull_back_and_free(v, inputs), trees)
        return found.pop(level), found

    def _pull_back_and_free(
        self, v: Mapping[str, Tensor], inputs: Mapping[K, Tensor]
    ) -> dict[K, Tensor]:
        found = self._pull_back(v, inputs, keep=False)
        vars(self).pop("_gradients", None)
        self.is_spent = True
        return found

    @staticmethod
    def _into_trees(found: Mapping[tuple[str, str], Tensor], levels: Iterable[str]) -> Cross:
        result: Cross = {level: {} for level in levels}
        for (level, key), value in found.items():
            result[level][key] = value
        return result

    def _pull_back(
        self, v: Mapping[str, Tensor], inputs: Mapping[K, Tensor], *, keep: bool
    ) -> dict[K, Tensor]:
        share = 1.0 / len(self._gradients)
        pairs = [
            (g[key], v[key] * share if share != 1.0 else v[key])
            for g in self._gradients
            for key in g
            if key in v and g[key].requires_grad
        ]
        if not pairs:
            return {}
        outputs = [output for output, _ in pairs]
        weights = [weight for _, weight in pairs]

        def pull() -> dict[K, Tensor]:
            return gradient(outputs, inputs, weights, retain_graph=keep)

        return self._problem.point.loss.within(self.state, pull)
