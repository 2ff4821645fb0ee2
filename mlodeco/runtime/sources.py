"""Sources in a run: streams of items, and which of them each level's step sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from mlodeco.declare.binding import BoundSource
from mlodeco.declare.records import SourceDeclaration
from mlodeco.errors import DataError, MlodecoError
from mlodeco.graph import Graph
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.data import Placer
from mlodeco.runtime.generators import (
    find_generators,
    read_generators,
    restore_generators,
    warn_of_others,
)
from mlodeco.runtime.modules import preserved_modes
from mlodeco.runtime.position import Pass, keeps_its_state

_END = object()

Items = tuple[dict[str, Any], ...]
"""For each micro-batch of a step, the items of the sources that its level reads."""


class Stream:
    """The items of one source, pass upon pass.

    Args:
        source: the source.
        modules: those of the levels, by name.
    """

    def __init__(self, source: BoundSource, modules: Mapping[str, nn.Module]) -> None:
        self._declaration = source.declaration
        self._modules = {name: modules[name] for name in source.levels}
        self._iterator: Iterator[Any] | None = None
        self._returned: list[Any] = []
        self._told: set[str] = set()

    def draw(self) -> Any:
        """The next item; the function's modules keep their train/eval modes.

        Raises:
            DataError: there is none, or the function returned no iterator.
        """
        if self._returned:
            return self._returned.pop()
        with (
            named_source(self._declaration),
            torch.no_grad(),
            preserved_modes(self._modules.values()),
        ):
            return self._advance()

    def put_back(self, item: Any) -> None:
        """Makes an item the next one again."""
        self._returned.append(item)

    def close(self) -> None:
        """Ends a generator that the stream has begun."""
        close = getattr(self._iterator, "close", None)
        if self._declaration.is_function and close is not None:
            with torch.no_grad(), preserved_modes(self._modules.values()):
                close()

    def _advance(self) -> Any:
        if self._iterator is not None:
            item = next(self._iterator, _END)
            if item is not _END:
                return item
        self._iterator = self._begin()
        item = next(self._iterator, _END)
        if item is _END:
            self._iterator = None
            raise _has_no_item(self._declaration)
        return item

    def _begin(self) -> Iterator[Any]:
        value = self._declaration.value
        if self._declaration.is_function:
            made = value(**self._modules)
            if not hasattr(type(made), "__next__"):
                raise _made_no_iterator(self._declaration, made)
        else:
            made = value if self._declaration.is_one_shot else Pass(value, value)
        iterator: Iterator[Any] = made
        return iterator

    @property
    def _where(self) -> str:
        return f"source {self._declaration.name!r} ({self._declaration.site})"

    @property
    def can_resume(self) -> bool:
        """Whether another process can go on with its items where this one stands."""
        if self._declaration.is_one_shot:
            return keeps_its_state(self._declaration.value)
        return not self._declaration.is_function

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; nothing of a stream that cannot resume."""
        value, is_one_shot = self._declaration.value, self._declaration.is_one_shot
        a_pass = self._iterator if isinstance(self._iterator, Pass) else None
        if a_pass is not None:
            a_pass.tell_doubt(self._where, self._told)
        with named_source(self._declaration):
            return {
                "returned": self._returned,
                "pass": a_pass and a_pass.state_dict(),
                "kept": value.state_dict() if self.can_resume and is_one_shot else None,
                "generators": read_generators(find_generators(value)),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from that state; the global random numbers are moved."""
        value, found = self._declaration.value, state["pass"]
        self._returned = list(state["returned"])
        self._iterator = None
        if found is not None:
            failure = partial(_error, self._declaration)
            self._iterator = Pass.resumed(value, value, found, found["drawn"], failure)
        if state["kept"] is not None:
            value.load_state_dict(state["kept"])
        if not restore_generators(find_generators(value), state["generators"]):
            warn_of_others(self._where)


class Sources:
    """The streams of a run, shared by the levels that read them.

    Args:
        built: the program.
        place: moves items to the device of the run.
    """

    def __init__(self, built: Build, place: Placer) -> None:
        modules = {name: level.module for name, level in built.levels.items()}
        self._streams = {name: Stream(source, modules) for name, source in built.sources.items()}
        self._highest = {
            name: highest_of(built.graph, built.readers(name))
            for name in built.sources
            if built.is_kept(name)
        }
        self._place = place
        self._current: dict[str, Any] = {}
        self._waits_for: dict[str, set[str]] = {}

    @contextmanager
    def drawn(self, level: BuiltLevel) -> Iterator[Items]:
        """The items of one step; if drawing them or the block raises, none is used up."""
        taken: list[tuple[Stream, Any]] = []
        try:
            yield tuple(
                {name: self._item(name, taken) for name in level.binding.sources}
                for _ in range(level.declaration.accumulate)
            )
        except BaseException:
            for stream, item in reversed(taken):
                stream.put_back(item)
            raise

    def _item(self, name: str, taken: list[tuple[Stream, Any]]) -> Any:
        if name in self._current:
            return self._current[name]
        stream = self._streams[name]
        item = stream.draw()
        if name in self._highest:
            self._current[name] = self._place(item)
            self._waits_for[name] = set(self._highest[name])
            return self._current[name]
        taken.append((stream, item))
        return self._place(item)

    def finish_turn(self, level: str) -> None:
        """Lets go of the items that have been kept for this level's turn, and no other's."""
        for name, waits_for in self._waits_for.items():
            waits_for.discard(level)
            if not waits_for:
                self._current.pop(name, None)

    @property
    def without_position(self) -> tuple[str, ...]:
        """The sources that another process begins anew."""
        return tuple(name for name, stream in self._streams.items() if not stream.can_resume)

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand, and the items that are kept."""
        return {
            "streams": {name: stream.state_dict() for name, stream in self._streams.items()},
            "current": self._current,
            "waits_for": self._waits_for,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from that state; the global random numbers are moved."""
        for name, stream in self._streams.items():
            stream.load_state_dict(state["streams"][name])
        self._current, self._waits_for = dict(state["current"]), dict(state["waits_for"])


def highest_of(graph: Graph, levels: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the levels that no other of them is above."""
    return tuple(name for name in levels if not any(name in graph.below(other) for other in levels))


@contextmanager
def named_source(declaration: SourceDeclaration) -> Iterator[None]:
    """Adds to an exception from a source which one it was."""
    try:
        yield
    except MlodecoError:
        raise
    except Exception as error:
        error.add_note(f"raised in the source {declaration.name!r} ({declaration.site})")
        raise


def _has_no_item(declaration: SourceDeclaration) -> DataError:
    if declaration.is_one_shot:
        found = "the iterator is at its end: it gives no more items."
        remedy = (
            "give what can begin again: a function that makes a new iterator, or an object to "
            "iterate over; or an iterator without end."
        )
    else:
        found = "the source is empty: a pass over it gave no item."
        remedy = "let each pass give at least one item; 'while True:' around the yield has no end."
    return _error(declaration, found, remedy)


def _made_no_iterator(declaration: SourceDeclaration, made: Any) -> DataError:
    return _error(
        declaration,
        f"the function returned {type(made).__name__}, which is not an iterator.",
        "yield the items instead of returning one, or return iter(...) of what holds them.",
    )


def _error(declaration: SourceDeclaration, found: str, remedy: str) -> DataError:
    return DataError(found, remedy=remedy, source=declaration.name, site=str(declaration.site))
