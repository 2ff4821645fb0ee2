"""Which best responses enter each level's total loss, for the true derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mlodeco.errors import GraphError
from mlodeco.graph.structure import Graph


@dataclass(frozen=True)
class NestPlan:
    """The total losses of a level and of those below it.

    Attributes:
        top: the level whose hypergradient is wanted.
        responses: for each level, those below whose best responses enter its total loss and
            are no constants there, uppers first.
        inputs: for each level, those of ``top`` and below on which its best response depends,
            through its own loss or through the levels below it.
        via: for each level and each of its responses, the edge whose method differentiates it.
    """

    top: str
    responses: Mapping[str, tuple[str, ...]]
    inputs: Mapping[str, frozenset[str]]
    via: Mapping[tuple[str, str], tuple[str, str]]

    @property
    def levels(self) -> tuple[str, ...]:
        """The top level and all whose losses are needed, each once."""
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
        GraphError: a level responds to another that is not above it, through one below both.
    """
    within = graph.below(top) | {top}
    responses: dict[str, tuple[str, ...]] = {}
    inputs: dict[str, frozenset[str]] = {}
    via: dict[tuple[str, str], tuple[str, str]] = {}
    for name in (n for n in graph.order if n in within):
        edges = _edges_needed(graph, name, inputs, is_open)
        via.update({(name, low): edge for low, edge in edges.items()})
        reads = {u for u in graph.reads[name] if name in graph.below(u)}
        through = {u for low in edges for u in inputs[low]}
        inputs[name] = frozenset(reads | through) & within - graph.below(name) - {name}
        responses[name] = _those_that_move(graph, name, edges, inputs)
    plan = NestPlan(top, responses, inputs, via)
    _refuse_coupled(graph, plan)
    return plan


def sees_more(graph: Graph, top: str, is_open: Callable[[str, str], bool]) -> bool:
    """Whether nested best responses carry something to a level that has no path of Eq. (2)."""
    try:
        return bool(plan_nest(graph, top, is_open).responses[top])
    except GraphError:
        return False


def _edges_needed(
    graph: Graph,
    name: str,
    inputs: Mapping[str, frozenset[str]],
    is_open: Callable[[str, str], bool],
) -> dict[str, tuple[str, str]]:
    """The levels below whose responses enter the total loss of ``name``.

    Those that its loss reads, and those between on which these depend in turn. The latter are
    differentiated by the method of the edge to the level that depends on them, unless ``name``
    reads them itself.
    """
    found = {low: (name, low) for low in graph.best_responses(name) if is_open(name, low)}
    pending = list(found)
    while pending:
        low = pending.pop()
        for between in sorted(inputs[low] & graph.below(name)):
            if between not in found and _stays_open(graph, name, between, is_open):
                found[between] = found[low]
                pending.append(between)
    return found


def _those_that_move(
    graph: Graph, name: str, lows: Iterable[str], inputs: Mapping[str, frozenset[str]]
) -> tuple[str, ...]:
    """Those of the levels below that depend on ``name`` or on what it depends on, uppers first."""
    moving = {name, *inputs[name]}
    found = []
    for low in reversed(graph.order):
        if low in lows and not inputs[low].isdisjoint(moving):
            moving.add(low)
            found.append(low)
    return tuple(found)


def _stays_open(graph: Graph, name: str, low: str, is_open: Callable[[str, str], bool]) -> bool:
    """Whether an edge is not closed by its method; one that is no read has none."""
    return low not in graph.best_responses(name) or is_open(name, low)


def _refuse_coupled(graph: Graph, plan: NestPlan) -> None:
    for name in plan.levels:
        for other in sorted(plan.inputs[name]):
            if name in graph.below(other) or other not in plan.levels:
                continue
            if name in plan.inputs[other]:
                raise GraphError(
                    f"the levels {name!r} and {other!r} respond to each other through a level "
                    "below both, so that nested=True would need their joint response, whose "
                    "Jacobian is not symmetric.",
                    expected="of two levels with a common level below, one above the other, or "
                    "a common level that reads neither.",
                    remedy="leave nested out, which holds each constant for the other (Eq. 2), or "
                    f"make one level of both: one module, one loss, in place of {name!r} and "
                    f"{other!r}.",
                )
            raise GraphError(
                f"the level {name!r} responds to {other!r} through a level below both, and is not "
                "below it.",
                expected="with nested=True, a level that responds to those above it alone.",
                remedy=f"add {name!r} to lower= of {other!r}, or leave nested out.",
            )
