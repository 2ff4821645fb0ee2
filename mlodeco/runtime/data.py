"""Loaders: endless iteration, items for a function's arguments, nothing lost by a look."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.declare.binding import Role
from mlodeco.declare.calls import call, misfit, noted
from mlodeco.declare.records import LevelDeclaration
from mlodeco.errors import DataError, did_you_mean, quoted
from mlodeco.runtime.build import BuiltLevel
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.generators import (
    find_generators,
    preserved_generators,
    read_generators,
    restore_generators,
    warn_of_others,
)
from mlodeco.runtime.position import Pass, keeps_its_state, loader_of


class Cursor:
    """Iterates over a re-iterable without end.

    Args:
        source: the re-iterable.
        where: names its place.
        origin: holds what it was made from, whose generators of random numbers it draws from.

    Attributes:
        epoch: passes that had ended when the newest item was drawn.
    """

    def __init__(self, source: Iterable[Any], where: Where, origin: Any = None) -> None:
        self._source = source
        self._where = where
        self._origin = origin
        self._pass: Pass | None = None
        self._told: set[str] = set()
        self.epoch = 0

    def advance(self) -> tuple[Any, bool]:
        """The next item, and whether a pass over the data ends with it.

        Where the data have no length, a pass is known to have ended only at the first
        item of the next one.

        Raises:
            DataError: there are no items.
        """
        with noted("data=", self._where):
            return self._advance()

    def _advance(self) -> tuple[Any, bool]:
        if self._pass is not None:
            for item in self._pass:
                return item, self._is_last
        unseen = self._pass is not None and not self._is_last
        self.epoch += int(self._pass is not None)
        self._pass = Pass(self._source, self._origin)
        for item in self._pass:
            return item, unseen or self._is_last
        self._pass = None
        raise self._where.error(
            "the data are empty: they gave no batch.",
            "check the data set's size; with drop_last=True a DataLoader smaller than one "
            "batch is empty, and in several processes one smaller than a batch for each.",
        )

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, and the generators that it draws from; a doubt is told once."""
        if self._pass is not None:
            self._pass.tell_doubt(self._where, self._told)
        with noted("data=", self._where):
            found = self._pass and self._pass.state_dict()
        return {
            "epoch": self.epoch,
            "pass": found,
            "batch_size": getattr(self._source, "batch_size", None),
            "generators": read_generators(find_generators(self._origin)),
        }

    def load_state_dict(self, state: Mapping[str, Any], then: int, now: int) -> None:
        """Takes up the pass of that state; the global random numbers are moved.

        Args:
            state: the state.
            then: how many processes there were.
            now: how many there are; each goes on where all of them together stood.

        Raises:
            DataError: the data have fewer items than were drawn, or fail.
        """
        self.epoch = state["epoch"]
        self._pass = None
        if (found := state["pass"]) is not None:
            drawn = found["drawn"]
            if then != now and loader_of(self._source) is not None:
                drawn = self._drawn_by_each(drawn * then, state["batch_size"], now)
                found = {**found, "kept": None}  # which counts the batches of one process
            self._pass = Pass.resumed(self._source, self._origin, found, drawn, self._where.error)
        if not restore_generators(find_generators(self._origin), state["generators"]):
            warn_of_others(self._where)

    def _drawn_by_each(self, drawn: int, batch_size: int | None, now: int) -> int:
        """The batches that are behind each process where so many are in all, rounded up."""
        present = getattr(self._source, "batch_size", None)
        sizes = (batch_size, present) if batch_size and present else (1, 1)
        return -(-drawn * sizes[0] // (now * sizes[1]))

    @property
    def finished(self) -> int:
        """Passes that have ended, that of the newest item included."""
        return self.epoch + int(self._is_last)

    @property
    def _is_last(self) -> bool:
        """Whether the newest item is known to be the last of its pass."""
        try:
            return self._pass is not None and self._pass.drawn == len(self._source)  # type: ignore[arg-type]
        except TypeError:
            return False


class Where:
    """Names the place of some data, for messages."""

    def __init__(self, declaration_site: str, level: str | None, key: str | None = None) -> None:
        self._site = declaration_site
        self._level = level
        self._key = f"data[{key!r}]: " if key is not None else ""

    def __str__(self) -> str:
        return f"level {self._level!r} ({self._site})" if self._level else self._site

    def error(self, found: str, remedy: str) -> DataError:
        """The error, located."""
        return DataError(f"{self._key}{found}", remedy=remedy, level=self._level, site=self._site)


def open_source(data: Any, where: Where) -> Iterable[Any]:
    """What ``data=`` gives batches from: itself, or what its factory returns.

    Raises:
        DataError: it cannot be iterated over more than once, or is one batch and not several.
    """
    is_factory = callable(data) and not isinstance(data, Iterable)
    if is_factory and (why := misfit(data)):
        raise where.error(
            f"data= cannot be called without arguments: {why}.",
            "give a function without arguments that returns what to iterate over.",
        )
    source = call("data=", where, data) if is_factory else data
    if is_factory and isinstance(source, Iterator):
        return _Remade(data)
    if isinstance(source, TensorDataset | Subset):
        raise where.error(
            f"data= is a {type(source).__name__}, which gives single samples and not batches.",
            "wrap it: data=DataLoader(dataset, batch_size=32, shuffle=True).",
        )
    if hasattr(source, "shape") or (
        isinstance(source, tuple) and source and all(hasattr(part, "shape") for part in source)
    ):
        raise where.error(
            "data= is one batch of tensors, which would be iterated over its parts.",
            "for one full batch at each step write data=[(x, y)]; for several give a DataLoader.",
        )
    if isinstance(source, Iterator):
        raise where.error(
            f"data= is a {type(source).__name__}, which can be iterated over only once.",
            "give a function that makes a new one: data=lambda: make_iterator().",
        )
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise where.error(
            f"data= is a {type(source).__name__}, which is not iterable.",
            "give a DataLoader, a list of batches, or a function that returns one.",
        )
    iterable: Iterable[Any] = source
    return iterable


def set_apart(source: Iterable[Any]) -> Iterable[Any]:
    """A copy of a loader that holds on to its iterator, so that each reader has its own."""
    if not isinstance(source, DataLoader):
        return source
    if not source.persistent_workers and not keeps_its_state(source):
        return source
    loader = copy.copy(source)
    vars(loader).update(_iterator=None, _initial_iter_for_state_dict=False)
    return loader


class _Remade:
    """An iterable whose passes each ask a factory for a new iterator."""

    def __init__(self, factory: Callable[[], Iterator[Any]]) -> None:
        self._factory = factory

    def __iter__(self) -> Iterator[Any]:
        return self._factory()


Share = Callable[[Iterable[Any]], Iterable[Any]]


class Feed:
    """The cursors of a level: one, or one for each name of a mapping.

    Args:
        declaration: the level's.
        share: makes of a source of batches the part that this process sees.
    """

    def __init__(self, declaration: LevelDeclaration, share: Share | None = None) -> None:
        data = declaration.data
        site, level = str(declaration.site), declaration.name
        self._keyed = isinstance(data, Mapping)
        sources: Mapping[str, Any]
        if data is None:
            sources = {}
        elif self._keyed:
            sources = data
        else:
            sources = {"": data}
        self.cursors = {
            key: Cursor(source if share is None else share(source), where, {0: value, 1: source})
            for key, value in sources.items()
            for where in (Where(site, level, key or None),)
            for source in (set_apart(open_source(value, where)),)
        }

    @property
    def epoch(self) -> int:
        """Passes ended before the newest batch; with several loaders those of the first."""
        first = next(iter(self.cursors.values()), None)
        return first.epoch if first is not None else 0

    @property
    def finished(self) -> int:
        """Passes that have ended, that of the newest batch included."""
        first = next(iter(self.cursors.values()), None)
        return first.finished if first is not None else 0

    def advance(self) -> tuple[Any, bool]:
        """The next batch (a mapping for several loaders, None without data), and epoch ends."""
        drawn = {key: cursor.advance() for key, cursor in self.cursors.items()}
        ended = any(end for _, end in drawn.values())
        if self._keyed:
            return {key: item for key, (item, _) in drawn.items()}, ended
        return (drawn[""][0] if drawn else None), ended

    def state_dict(self) -> dict[str, Any]:
        """Where the cursors stand."""
        return {key: cursor.state_dict() for key, cursor in self.cursors.items()}

    def load_state_dict(self, state: Mapping[str, Any], then: int, now: int) -> None:
        """Takes up the passes of that state, of ``then`` processes; random numbers are moved."""
        for key, cursor in self.cursors.items():
            cursor.load_state_dict(state[key], then, now)


def peek(declaration: LevelDeclaration, count: int) -> tuple[Any, ...]:
    """The first ``count`` batches of fresh iterators; loaders and random numbers are restored."""
    with preserved_randomness(), preserved_generators(declaration.data):
        feed = Feed(declaration)
        return tuple(feed.advance()[0] for _ in range(count))


def items_for(level: BuiltLevel, drawn: Drawn, ctx: Context) -> dict[str, Any]:
    """The values of a level function's arguments that are not modules.

    Raises:
        DataError: the function wants a batch, field or item that is not there.
    """
    declaration = level.declaration
    batch = drawn.batch
    items: dict[str, Any] = {a.name: drawn.sources[a.target] for a in level.binding.of(Role.SOURCE)}
    for argument in level.binding.of(Role.BATCH, Role.FIELD, Role.DATA, Role.CONTEXT):
        if argument.role is Role.CONTEXT:
            items[argument.name] = ctx
            continue
        if batch is None:
            raise DataError(
                f"the function takes {argument.name!r} and the level has no data.",
                remedy="give data= to @level, or a batch for it.",
                level=level.name,
                site=level.site,
            )
        if argument.role is Role.BATCH:
            items[argument.name] = batch
        elif argument.role is Role.DATA:
            items[argument.name] = _item(level, batch, argument.target)
        else:
            items[argument.name] = _part(level, batch, argument.target, declaration.fields)
    return items


def _item(level: BuiltLevel, batch: Any, key: str) -> Any:
    if not isinstance(batch, Mapping) or key not in batch:
        raise DataError(
            f"the batch has no entry {key!r}.",
            expected=f"a mapping with the keys of data=: {list(level.declaration.data_keys)}.",
            remedy=f"pass batches={{{level.name!r}: {{{key!r}: ...}}}}.",
            level=level.name,
            site=level.site,
        )
    return batch[key]


def _part(level: BuiltLevel, batch: Any, name: str, fields: Sequence[str]) -> Any:
    if isinstance(batch, Mapping):
        if name not in batch:
            raise DataError(
                f"the batch has no entry {name!r}, which fields= names.",
                expected=f"one of its keys: {quoted(map(str, batch))}.",
                remedy=f"name its keys in fields=.{did_you_mean(name, map(str, batch))}",
                level=level.name,
                site=level.site,
            )
        return batch[name]
    if not isinstance(batch, list | tuple) or len(batch) != len(fields):
        size = f"{len(batch)} parts" if isinstance(batch, list | tuple) else "no parts"
        raise DataError(
            f"the batch is a {type(batch).__name__} with {size}, fields= names {len(fields)}.",
            expected=f"one part for each of {list(fields)}.",
            remedy="name every part of the batch in fields=, in order.",
            level=level.name,
            site=level.site,
        )
    return batch[fields.index(name)]


def count_samples(batch: Any) -> int:
    """The first dimension of the first tensor in a batch; 1 if there is none."""
    first = _first_tensor(batch)
    return first.shape[0] if first is not None and first.dim() else 1


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, Mapping | list | tuple):
        return None
    found = (_first_tensor(part) for part in parts)
    return next((tensor for tensor in found if tensor is not None), None)


Placer = Callable[[Any], Any]
"""Moves a batch to the device of the run."""
