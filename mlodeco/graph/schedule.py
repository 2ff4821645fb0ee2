"""Whose turn it is: leaves each tick, uppers when all their lower levels are ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlodeco.graph.structure import Graph


@dataclass(frozen=True)
class Timing:
    """Own optimizer steps: per turn of the levels above, per own turn, before they start."""

    inner_steps: int = 1
    repeat: int = 1
    warmup: int = 0


class Schedule:
    """Counts own optimizer steps and says which levels are due.

    Within a tick ask :meth:`is_due` for each level of ``graph.order`` and report each
    turn by :meth:`finish_turn`. A level without lower levels is due each tick; another
    once each of its lower levels has taken ``inner_steps`` steps beyond its ``warmup``
    since the level's last turn.
    """

    def __init__(self, graph: Graph, timings: Mapping[str, Timing]) -> None:
        self._graph = graph
        self._timings = dict(timings)
        self.steps: dict[str, int] = dict.fromkeys(graph.levels, 0)
        self._since: dict[tuple[str, str], int] = {
            (upper, low): 0 for upper in graph.levels for low in graph.lower[upper]
        }
        self._at_loop_start: set[str] = set(graph.levels)

    def is_due(self, level: str) -> bool:
        """Whether it is the level's turn at this tick."""
        return all(
            self._since[level, low] >= self._timings[low].inner_steps
            for low in self._graph.lower[level]
        )

    def is_loop_start(self, level: str) -> bool:
        """Whether the level's next turn is the first of its inner loop; warmup comes before."""
        return level in self._at_loop_start and self.steps[level] >= self._timings[level].warmup

    def finish_step(self, level: str) -> None:
        """Counts one own optimizer step."""
        self.steps[level] += 1
        if self.steps[level] > self._timings[level].warmup:
            self._at_loop_start.discard(level)
            for upper in self._graph.uppers(level):
                self._since[upper, level] += 1

    def finish_turn(self, level: str) -> None:
        """Ends a turn: the inner loops of the level's lower levels start anew."""
        for low in self._graph.lower[level]:
            self._since[level, low] = 0
            self._at_loop_start.add(low)

    def is_loop_end(self, level: str) -> bool:
        """Whether the level has finished an inner loop for some level above with this step."""
        inner = self._timings[level].inner_steps
        return any(self._since[u, level] == inner for u in self._graph.uppers(level))

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"steps": self.steps, "since": self._since, "at_loop_start": self._at_loop_start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the counts of another schedule of the same program."""
        self.steps, self._since = dict(state["steps"]), dict(state["since"])
        self._at_loop_start = set(state["at_loop_start"])
