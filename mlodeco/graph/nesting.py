"""Which best responses enter each level's total loss, for the true derivative."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mlodeco.errors import GraphError
from mlodeco.graph.structure import Graph


@dataclass(frozen=True)
class NestPlan:
    """The total losses of a level and of those below it.

    Attributes:
        top: the level whose hypergradient is wanted.
        responses: for each level, those below whose best responses enter its total loss,
            uppers first.
        inputs: for each level, those above on which its best response depends, through its
            own loss or through the levels below it.
        via: for each level and each of its responses, the edge whose method differentiates it.
    """

    top: str
    responses: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, frozenset[str]]
    via: Mapping[tuple[str, str], tuple[str, str]]

    @property
    def levels(self) -> tuple[str, ...]:
        """The top level and all whose losses are needed."""
        found: dict[str, None] = {}
        pending = [self.top]
        while pending:
            name = pending.pop()
            found[name] = None
            pending += [low for low in self.responses[name] if low not in found]
        return tuple(found)


def plan_nest(graph: Graph, top: str, is_open: Callable[[str, str], bool]) -> NestPlan:
    """The nest for ``top``.

    Args:
        graph: the dataflow graph.
        top: the level whose hypergradient is wanted.
        is_open: whether the edge (upper, lower) is differentiated through.

    Raises:
        GraphError: two levels respond to each other through a level below both.
    """
    below = graph.below(top)
    responses: dict[str, tuple[str, ...]] = {}
    inputs: dict[str, frozenset[str]] = {}
    via: dict[tuple[str, str], tuple[str, str]] = {}
    for name in (n for n in graph.order if n == top or n in below):
        edges = _edges_needed(graph, name, is_open)
        responses[name] = tuple(low for low in reversed(graph.order) if low in edges)
        via.update({(name, low): edge for low, edge in edges.items()})
        reads = {u for u in graph.reads[name] if name in graph.below(u)}
        through = {u for low in edges for u in inputs[low]}
        inputs[name] = frozenset(reads | through) - graph.below(name) - {name}
    plan = NestPlan(top, responses, inputs, via)
    _refuse_coupled(graph, plan)
    return plan


def _edges_needed(
    graph: Graph, name: str, is_open: Callable[[str, str], bool]
) -> dict[str, tuple[str, str]]:
    """The levels below whose responses enter the total loss of ``name``.

    Those that its loss reads, and those between that these read in turn. The latter are
    differentiated by the method of the edge to the level that reads them, unless ``name``
    reads them itself.
    """
    found = {low: (name, low) for low in graph.best_responses(name) if is_open(name, low)}
    pending = list(found)
    while pending:
        low = pending.pop()
        for between in graph.reads[low]:
            is_between = between in graph.below(name) and low in graph.below(between)
            if is_between and between not in found and _stays_open(graph, name, between, is_open):
                found[between] = found[low]
                pending.append(between)
    return found


def _stays_open(graph: Graph, name: str, low: str, is_open: Callable[[str, str], bool]) -> bool:
    """Whether an edge is not closed by its method; one that is no read has none."""
    return low not in graph.best_responses(name) or is_open(name, low)


def _refuse_coupled(graph: Graph, plan: NestPlan) -> None:
    for name in plan.levels:
        for other in plan.inputs[name]:
            if other in graph.below(plan.top) and name not in graph.below(other):
                raise GraphError(
                    f"the levels {name!r} and {other!r} respond to each other through a level "
                    "below both, so that nested=True would need their joint response, whose "
                    "Jacobian is not symmetric.",
                    expected="of two levels with a common level below, one above the other, or "
                    "one that the common level does not read.",
                    remedy="leave nested out, which holds each constant for the other (Eq. 2), or "
                    f"make one level of both: one module, one loss, in place of {name!r} and "
                    f"{other!r}.",
                )
