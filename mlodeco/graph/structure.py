"""The dataflow graph of a program: levels, edges of four kinds, order and paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from mlodeco.errors import GraphError, did_you_mean, quoted


class EdgeKind(Enum):
    """How the parameters of one level enter the loss of another."""

    LOWER_TO_UPPER = "lower-to-upper"
    UPPER_TO_LOWER = "upper-to-lower"
    SIDEWAYS = "sideways"
    ORDERING = "ordering only"


@dataclass(frozen=True)
class Edge:
    """Parameters of ``source`` enter the loss of ``target`` (for ORDERING: only its turn)."""

    source: str
    target: str
    kind: EdgeKind


class Graph:
    """The levels of a program and how they depend on each other.

    Args:
        lower: for each level, in the order of declaration, the names in its ``lower``.
        reads: for each level, the other levels whose parameters its loss sees.
    """

    def __init__(
        self, lower: Mapping[str, Iterable[str]], reads: Mapping[str, Iterable[str]]
    ) -> None:
        self.levels: tuple[str, ...] = tuple(lower)
        self.lower: dict[str, tuple[str, ...]] = {k: tuple(v) for k, v in lower.items()}
        self.reads: dict[str, tuple[str, ...]] = {k: tuple(reads.get(k, ())) for k in lower}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The order of turns: levels without lower levels, then each after all its own.

        Otherwise as declared.
        """
        done = dict.fromkeys(name for name in self.levels if not self.lower[name])
        pending = [name for name in self.levels if name not in done]
        while pending:
            ready = next(n for n in pending if all(low in done for low in self.lower[n]))
            done[ready] = None
            pending.remove(ready)
        return tuple(done)

    @cached_property
    def _below(self) -> dict[str, frozenset[str]]:
        below: dict[str, frozenset[str]] = {}
        for name in self.order:
            below[name] = frozenset(self.lower[name]).union(
                *(below[low] for low in self.lower[name])
            )
        return below

    def below(self, level: str) -> frozenset[str]:
        """The levels below, directly or through others."""
        return self._below[self.known(level)]

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many levels stand under each in the longest chain: 0 for one without lower levels."""
        found: dict[str, int] = {}
        for name in self.order:
            found[name] = 1 + max((found[low] for low in self.lower[name]), default=-1)
        return found

    def uppers(self, level: str) -> tuple[str, ...]:
        """The levels that have this one in their ``lower``."""
        return tuple(name for name in self.levels if level in self.lower[name])

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """All edges, by target in the order of declaration."""
        found: list[Edge] = []
        for target in self.levels:
            for source in self.reads[target]:
                if source in self._below[target]:
                    kind = EdgeKind.LOWER_TO_UPPER
                elif target in self._below[source]:
                    kind = EdgeKind.UPPER_TO_LOWER
                else:
                    kind = EdgeKind.SIDEWAYS
                found.append(Edge(source, target, kind))
            for source in self.lower[target]:
                if source not in self.reads[target]:
                    found.append(Edge(source, target, EdgeKind.ORDERING))
        return tuple(found)

    @cached_property
    def _best_responses(self) -> dict[str, tuple[str, ...]]:
        return {
            name: tuple(read for read in self.reads[name] if read in self._below[name])
            for name in self.levels
        }

    def best_responses(self, level: str) -> tuple[str, ...]:
        """The levels below that this level's loss reads: sources of its lower-to-upper edges."""
        return self._best_responses[level]

    def paths(self, level: str) -> tuple[tuple[str, ...], ...]:
        """Every path of Eq. (2): from the level down one upper-to-lower edge and back up.

        Each is a tuple of names that begins and ends with ``level``. Their number may
        grow exponentially with the size of the graph.
        """
        return tuple(self.walk_paths(level))

    def walk_paths(self, level: str) -> Iterator[tuple[str, ...]]:
        """The paths of :meth:`paths`, one at a time."""
        useful = self._levels_on_paths(self.known(level))
        stack: list[tuple[str, ...]] = [(level,)]
        while stack:
            path = stack.pop()
            if len(path) > 1 and level in self.reads[path[0]]:
                yield (level, *path)
            lowers = [low for low in self.best_responses(path[0]) if low in useful]
            stack.extend((low, *path) for low in reversed(lowers))

    def _levels_on_paths(self, level: str) -> set[str]:
        """The levels below from which a read of ``level`` is reached: no walk there is in vain."""
        useful: set[str] = set()
        for name in self.order:
            reads_on = any(low in useful for low in self.best_responses(name))
            if name in self._below[level] and (level in self.reads[name] or reads_on):
                useful.add(name)
        return useful

    def known(self, level: str) -> str:
        """The name itself.

        Raises:
            GraphError: no level has it.
        """
        if not isinstance(level, str) or level not in self.lower:
            raise GraphError(
                f"there is no level {level!r}.",
                expected=f"one of {quoted(self.levels)}.",
                remedy=f"correct the name, or declare the level."
                f"{did_you_mean(str(level), self.levels)}",
            )
        return level
