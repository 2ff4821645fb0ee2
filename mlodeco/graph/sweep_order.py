"""Which levels one hypergradient visits, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mlodeco.graph.structure import Graph


@dataclass(frozen=True)
class Visit:
    """One linear solve: the level, where its response goes on to, whether it reads the top."""

    level: str
    lowers: tuple[str, ...]
    feeds_top: bool


@dataclass(frozen=True)
class SweepPlan:
    """The top level, the lower levels that need a cotangent from it, and the visits."""

    top: str
    lowers: tuple[str, ...]
    visits: tuple[Visit, ...]

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """The edges (upper, lower) along which cotangents run down."""
        first = [(self.top, low) for low in self.lowers]
        return (*first, *((visit.level, low) for visit in self.visits for low in visit.lowers))


def plan_sweep(graph: Graph, top: str, is_open: Callable[[str, str], bool]) -> SweepPlan:
    """The sweep for ``top``: each level that lies on a path of Eq. (2), once, uppers first.

    Args:
        graph: the dataflow graph.
        top: the level whose hypergradient is wanted.
        is_open: whether the edge (upper, lower) is differentiated through.
    """
    open_lowers = {
        name: tuple(low for low in graph.best_responses(name) if is_open(name, low))
        for name in graph.levels
    }
    below = graph.below(top)
    useful: set[str] = set()
    for name in graph.order:
        reaches = top in graph.reads[name] or any(low in useful for low in open_lowers[name])
        if name in below and reaches:
            useful.add(name)
    cotangents = {top: tuple(low for low in open_lowers[top] if low in useful)}
    reached = set(cotangents[top])
    visits: list[Visit] = []
    for name in reversed(graph.order):
        if name not in reached:
            continue
        lowers = tuple(low for low in open_lowers[name] if low in useful)
        reached.update(lowers)
        visits.append(Visit(name, lowers, top in graph.reads[name]))
    return SweepPlan(top, cotangents[top], tuple(visits))
