"""Whether lambda enters a loss late, read off the structure of its graph."""

from __future__ import annotations

from typing import Any

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


def count_nodes(root: Any, leaves: set[int]) -> tuple[int, int]:
    """The nodes of an autograd graph, and those from which one of the leaves is reached."""
    if root is None:
        return 0, 0
    depends: dict[Any, bool] = {}
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        if expanded:
            variable = getattr(node, "variable", None)
            own = variable is not None and id(variable) in leaves
            depends[node] = own or any(depends.get(child, False) for child in children)
        elif node not in depends:
            depends[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in depends)
    return len(depends), sum(depends.values())
