"""The items of sources for one hypergradient, and looks at sources that use nothing up."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.declare.binding import BoundSource
from mlodeco.declare.records import SourceDeclaration
from mlodeco.errors import RunError
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.generators import preserved_generators
from mlodeco.runtime.modules import preserved_buffers
from mlodeco.runtime.sources import Items, Stream, named_source


def find_items(
    built: Build, counts: Mapping[str, int], given: Mapping[str, Any]
) -> dict[str, Items]:
    """For each level the items that so many of its micro-batches see.

    Those given; else, of a source that keeps its item, the item of the newest step among its
    readers; else those of the level's own last step; else what fresh iterators give, in the
    order in which the levels would step.
    """
    found: dict[str, dict[str, tuple[Any, ...]]] = {name: {} for name in counts}
    for name in built.sources:
        readers = [n for n in built.graph.order if n in counts and n in built.readers(name)]
        for reader, items in _column(built, name, {n: counts[n] for n in readers}, given).items():
            found[reader][name] = items
    return {
        level: tuple(
            {name: items[number] for name, items in columns.items()}
            for number in range(counts[level])
        )
        for level, columns in found.items()
    }


def _column(
    built: Build, name: str, counts: Mapping[str, int], given: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    """The items of one source for each of its readers."""
    for known in (given, built.kept):
        if name in known:
            return {reader: (known[name],) * count for reader, count in counts.items()}
    last = {reader: _last_items(built.levels[reader], name, counts[reader]) for reader in counts}
    missing = {reader: count for reader, count in counts.items() if last[reader] is None}
    if not missing:
        looked: list[Any] = []
    elif built.is_kept(name):
        looked = look(built, built.sources[name], 1) * sum(missing.values())
    else:
        looked = look(built, built.sources[name], sum(missing.values()))
    rest = iter(looked)
    return {
        reader: tuple(islice(rest, counts[reader])) if items is None else items
        for reader, items in last.items()
    }


def _last_items(level: BuiltLevel, name: str, count: int) -> tuple[Any, ...] | None:
    drawn = level.last_micro_batches(count)
    if drawn is None or any(name not in one.sources for one in drawn):
        return None
    return tuple(one.sources[name] for one in drawn)


def look(built: Build, source: BoundSource, count: int) -> list[Any]:
    """The first items of a fresh pass; an iterator is put back to where it was.

    Random numbers, generators that the source holds on to and buffers of the modules that
    it reads are as before.

    Raises:
        RunError: it is an iterator that cannot be put back.
    """
    declaration = source.declaration
    value = declaration.value
    if declaration.is_one_shot and not _is_restorable(value):
        raise RunError(
            "no step has drawn from the source yet, and it is an iterator whose items come once.",
            expected="items that can be looked at without using them up.",
            remedy=f"pass batches={{{declaration.name!r}: item}}, or give the iterator state_dict "
            "and load_state_dict.",
            source=declaration.name,
            site=str(declaration.site),
        )
    modules = {name: built.levels[name].module for name in source.levels}
    stream = Stream(source, modules)
    with ExitStack() as stack:
        stack.enter_context(preserved_randomness())
        stack.enter_context(preserved_generators(value))
        stack.enter_context(preserved_buffers(modules.values()))
        stack.enter_context(_restored(declaration))
        stack.callback(stream.close)
        return [stream.draw() for _ in range(count)]


def _is_restorable(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


@contextmanager
def _restored(source: SourceDeclaration) -> Iterator[None]:
    """Puts an object that has ``state_dict`` and ``load_state_dict`` back on leaving."""
    value = source.value
    if not _is_restorable(value):
        yield
        return
    with named_source(source):
        state = copy.deepcopy(value.state_dict())
    try:
        yield
    finally:
        with named_source(source):
            value.load_state_dict(state)
