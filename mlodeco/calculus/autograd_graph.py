"""Walking autograd's graph: what a tensor was computed from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def walk_graph(roots: Iterable[Any]) -> Iterator[Any]:
    """Every node that can be reached from the roots, once; a root may be None."""
    stack = [root for root in roots if root is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def is_used(root: Any, tensors: Iterable[Tensor]) -> list[bool]:
    """For tensors that are not leaves whether the root was computed from them."""
    edges = {edge for node in walk_graph([root]) for edge in node.next_functions}
    return [(tensor.grad_fn, tensor.output_nr) in edges for tensor in tensors]


def count_nodes(root: Any, leaves: set[int]) -> tuple[int, int]:
    """The nodes that can be reached, and those from which one of the leaves can be.

    Args:
        root: the node to start from, or None.
        leaves: identities of leaf tensors.
    """
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
            depends[node] = own or any(depends[child] for child in children)
        elif node not in depends:
            depends[node] = False
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in depends)
    return len(depends), sum(depends.values())
