"""A pass over some data, which another process can take up where it stands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Self

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.dataloader import (
    _BaseDataLoaderIter,
    _DatasetKind,
    _SingleProcessDataLoaderIter,
)

from mlodeco.calculus.randomness import SavedRandomness
from mlodeco.errors import CheckpointWarning, DataError, MlodecoError
from mlodeco.runtime.generators import find_generators, read_generators, restore_generators
from mlodeco.runtime.lasting_workers import lasting_workers, signals_are_noted
from mlodeco.runtime.lazy_draws import LazyDraws

_DRAW_AT_ONCE = (
    *(SequentialSampler, RandomSampler, SubsetRandomSampler),
    *(WeightedRandomSampler, DistributedSampler),
)
"""Samplers that draw at the beginning of a pass, or from a generator that they are given."""

Failure = Callable[[str, str], DataError]
"""Makes an error of what was found and the remedy."""


def keeps_its_state(value: Any) -> bool:
    """Whether an object can say where it stands, and go on from there."""
    # loaders of accelerate have the methods in any case, and say whether they serve
    serves = getattr(value, "use_stateful_dataloader", True)
    return serves and hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def loader_of(source: Any) -> DataLoader[Any] | None:
    """The DataLoader that gives the items, to all processes perhaps; None if there is none."""
    whole = getattr(source, "whole", source)
    return whole if isinstance(whole, DataLoader) else None


def guarded_workers(source: Any) -> AbstractContextManager[None]:
    """Workers that are started inside outlast signals that the run notes."""
    return lasting_workers(loader_of(source)) if signals_are_noted() else nullcontext()


class Pass:
    """One pass over an iterable.

    A list is gone through again to where it stood. So is anything else, from the random numbers
    with which its pass began; of a DataLoader without workers the sampler alone, so that no
    sample is loaded. An object that keeps its own state is given that.

    Args:
        source: the iterable.
        origin: what it was made from, whose generators of random numbers it draws from.

    Attributes:
        drawn: items that were drawn.
    """

    def __init__(self, source: Iterable[Any], origin: Any) -> None:
        self._source = source
        self._begin = None if isinstance(source, list | tuple) else _Streams(origin)
        self._is_reset = _goes_on(loader_of(source))
        self.drawn = 0
        with guarded_workers(source):
            self._iterator, self._draws = _watched(source, iter(source), origin)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        # the first one may be what starts the workers
        with guarded_workers(self._source) if not self.drawn else nullcontext():
            item = next(self._iterator)
        self.drawn += 1
        return item

    def tell_doubt(self, where: object, told: set[str]) -> None:
        """Warns, once, if another process might not get the same items."""
        doubt = self._doubt()
        if doubt is not None and doubt not in told:
            told.add(doubt)
            warnings.warn(f"{where}: {doubt}", CheckpointWarning, stacklevel=3)

    def _doubt(self) -> str | None:
        if self._draws is not None and self._draws.are_mixed:
            return (
                "a pass draws random numbers as it goes on, from a stream that others move in "
                "between: where the order of its items depends on them, it cannot be drawn "
                "again. Remedy: give the data a generator of their own, or state_dict and "
                "load_state_dict."
            )
        if self._is_reset:
            return (
                "workers with persistent_workers=True go on with their random numbers from pass "
                "to pass, and new ones draw others. Remedy: leave persistent_workers=True out if "
                "the samples are random."
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        source: Any = self._source
        return {
            "drawn": self.drawn,
            "begin": self._begin and self._begin.state_dict(),
            "is_reset": self._is_reset,
            "kept": source.state_dict() if keeps_its_state(source) else None,
        }

    @classmethod
    def resumed(
        cls,
        source: Iterable[Any],
        origin: Any,
        state: Mapping[str, Any],
        drawn: int,
        failure: Failure,
    ) -> Self:
        """The pass of that state, behind so many items; random numbers are moved.

        Raises:
            DataError: the data have fewer items, or fail.
        """
        loader, kept = loader_of(source), state["kept"]
        with _of_the_data(failure, drawn), lasting_workers(loader):
            if kept is not None:
                holder: Any = source
                holder.load_state_dict(kept)
            elif loader is not None and loader.persistent_workers:
                loader._iterator = None
                if state["is_reset"]:
                    next(iter(source), None)
            if state["begin"] is not None:
                _Streams(origin).load_state_dict(state["begin"]).restore()
            found = cls(source, origin)
            if kept is None:
                found._skip(drawn)
        found.drawn = drawn
        return found

    def _skip(self, count: int) -> None:
        iterator: Any = self._iterator
        step = iterator._next_index if _looks_up(iterator) else partial(next, iterator)
        for _ in range(count):
            step()


@contextmanager
def _of_the_data(failure: Failure, count: int) -> Iterator[None]:
    """Tells an error of the data from a checkpoint that is damaged."""
    try:
        yield
    except MlodecoError:
        raise
    except StopIteration:
        raise failure(
            f"the data have fewer than the {count} batches of a pass that had been drawn when "
            "the checkpoint was written.",
            "resume with the data that the run was begun with.",
        ) from None
    except Exception as error:
        raise failure(
            f"the data failed where a pass over them is taken up again: "
            f"{type(error).__name__}: {error}",
            "correct the data; the checkpoint is not at fault.",
        ) from error


def _goes_on(loader: DataLoader[Any] | None) -> bool:
    """Whether a pass over it takes workers that an earlier one has started."""
    if loader is None or not loader.num_workers:
        return False
    return loader.persistent_workers and loader._iterator is not None


def _looks_up(iterator: Any) -> bool:
    """Whether it is that of a DataLoader, which looks indices up here and one at a time."""
    is_single = isinstance(iterator, _SingleProcessDataLoaderIter)
    return is_single and iterator._dataset_kind == _DatasetKind.Map


def _watched(
    source: Any, iterator: Iterator[Any], origin: Any
) -> tuple[Iterator[Any], LazyDraws | None]:
    """The iterator, and a look at what it draws from where it might not draw the same again."""
    loader: Any = loader_of(source)
    if loader is None:
        is_safe = isinstance(source, list | tuple) or keeps_its_state(source)
    elif isinstance(loader.dataset, IterableDataset):
        is_safe = loader.num_workers > 0 or keeps_its_state(loader.dataset)
    else:
        if not isinstance(iterator, _BaseDataLoaderIter) or keeps_its_state(loader):
            return iterator, None
        return iterator, _watched_sampler(iterator)
    if is_safe:
        return iterator, None
    draws = LazyDraws(iterator, find_generators(origin), with_global=True)
    return draws, draws


def _watched_sampler(iterator: Any) -> LazyDraws | None:
    """The same for indices; what loads the samples may draw what it likes."""
    sampler = getattr(iterator._index_sampler, "whole", iterator._index_sampler)
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    is_standard = type(inner) in _DRAW_AT_ONCE
    generators = find_generators(inner)
    if is_standard and not (generators and isinstance(inner, RandomSampler)):
        return None
    draws = LazyDraws(iterator._sampler_iter, generators, with_global=not is_standard)
    iterator._sampler_iter = draws
    return draws


class _Streams:
    """The random numbers with which a pass begins: the global ones, and those of its data."""

    def __init__(self, origin: Any) -> None:
        self._global = SavedRandomness()
        self._found = find_generators(origin)
        self._states = read_generators(self._found)

    def state_dict(self) -> dict[str, Any]:
        return {"global": self._global.state_dict(), "own": self._states}

    def load_state_dict(self, state: Mapping[str, Any]) -> _Streams:
        self._global.load_state_dict(state["global"])
        self._states = state["own"]
        return self

    def restore(self) -> None:
        self._global.restore()
        restore_generators(self._found, self._states)
