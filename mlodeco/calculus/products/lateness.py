"""Whether lambda enters a loss late, read off the structure of its graph."""

from __future__ import annotations

from mlodeco.calculus.autograd_graph import count_nodes
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.stateless import live

LATE_FRACTION = 0.25
"""Late: less than this share of the graph's nodes depends on lambda."""


def enters_late(problem: LowerProblem) -> bool:
    """Whether under a quarter of the nodes of the loss's graph depend on the targets.

    Costs one forward pass. A decision by structure is the same on every process and
    in a resumed run, where one by timing is not.
    """
    point = problem.point
    targets = {level: live(point.values[level]) for level in problem.targets}
    values = {**point.values, **targets, problem.level: live(problem.parameters)}

    def count() -> bool:
        loss, _ = next(point.losses())
        leaves = {id(t) for tree in targets.values() for t in tree.values()}
        nodes, dependent = count_nodes(loss.grad_fn, leaves)
        return dependent < LATE_FRACTION * nodes

    return point.loss.within(point.loss.state(values), count)
