"""Whether lambda enters a loss late, read off the structure of its graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlodeco.calculus.autograd_graph import count_nodes
from mlodeco.calculus.interception import Interception
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.stateless import live

LATE_FRACTION = 0.25
"""Late: less than this share of the graph's nodes depends on lambda."""


class _SeesHooks(Interception):
    """Notices calls of ``tensor.register_hook``."""

    is_hooked = False

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        self.is_hooked = self.is_hooked or func is torch.Tensor.register_hook
        return func(*args, **kwargs)


def enters_late(problem: LowerProblem) -> bool:
    """Whether under a quarter of the nodes of the loss's graph depend on the targets.

    False if the loss puts hooks on tensors, since these act in reverse mode alone.
    Costs one forward pass. A decision by structure is the same on every process and
    in a resumed run, where one by timing is not.
    """
    point = problem.point
    targets = {level: live(point.values[level]) for level in problem.targets}
    values = {**point.values, **targets, problem.level: live(problem.parameters)}

    def count() -> bool:
        with _SeesHooks() as seen:
            loss, _ = next(point.losses())
        if seen.is_hooked:
            return False
        leaves = {id(t) for tree in targets.values() for t in tree.values()}
        nodes, dependent = count_nodes(loss.grad_fn, leaves)
        return dependent < LATE_FRACTION * nodes

    return point.loss.within(point.state(values), count)
