"""The parts of the data that each of several processes sees."""

from __future__ import annotations

import base64
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle, islice
from operator import getitem
from typing import Any

import torch
from accelerate.utils import concatenate, slice_tensors
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from mlodeco.calculus import numpy_stream
from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.errors import DataError
from mlodeco.runtime.data import count_samples
from mlodeco.runtime.processes import Processes

_SAMPLERS = ("sampler", "batch_sampler")


TAILS = ("drop", "pad")
"""What ``tails=`` may be."""


def share(source: Iterable[Any], processes: Processes, tails: str) -> Iterable[Any]:
    """This process's batches of a DataLoader; other iterables are replicated.

    Of each N batches in turn every one of N processes takes one, so that together they see what
    one process sees in a batch of N times the size. What is left at the end of a pass, fewer
    batches than processes or a smaller one among them, is dropped on all of them, or filled up
    with samples from the beginning of the pass.
    """
    return _cut(source, processes, tails) if isinstance(source, DataLoader) else source


def share_all(source: Iterable[Any], processes: Processes) -> Iterable[Any]:
    """The same for validations: any iterable, nothing dropped, nothing twice."""
    return _cut(source, processes, "keep")


def _cut(source: Iterable[Any], processes: Processes, tails: str) -> Iterable[Any]:
    if processes.count == 1 or _is_distributed(source):
        return source
    name = _index_name(source)
    if name is None:
        return _Share(source, processes, _BATCHES, tails)
    loader = copy.copy(source)
    own = _Share(getattr(source, name), processes, _INDICES, tails, is_common=True)
    # past __setattr__, which refuses; a new DataLoader would lose what a subclass adds
    vars(loader).update({name: own, "_iterator": None})
    return loader


@dataclass(frozen=True)
class _Kind:
    """How entries are measured, put together and cut, in samples."""

    measure: Callable[[Any], int]
    join: Callable[[list[Any]], Any]
    cut: Callable[[Any, slice], Any]


_INDICES = _Kind(len, lambda lists: list(chain.from_iterable(lists)), getitem)
_BATCHES = _Kind(count_samples, concatenate, slice_tensors)


def _is_distributed(source: Any) -> bool:
    """Whether somebody has distributed a loader's samples already."""
    samplers = (getattr(source, name, None) for name in _SAMPLERS)
    inner = (getattr(sampler, "sampler", sampler) for sampler in samplers)
    return any(isinstance(sampler, DistributedSampler) for sampler in inner)


def _index_name(source: Any) -> str | None:
    """Which of a loader's samplers gives the indices of its batches; None without indices."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return None
    return "sampler" if source.batch_sampler is None else "batch_sampler"


class _Share:
    """Every N-th entry of an iterable, begun at that of this process.

    Args:
        source: the iterable, the same in all processes.
        processes: these.
        kind: what its entries are.
        tails: what becomes of entries that have no equals in all processes.
        is_common: whether the random numbers of its passes are to be those of the main process.
    """

    def __init__(
        self,
        source: Any,
        processes: Processes,
        kind: _Kind,
        tails: str,
        *,
        is_common: bool = False,
    ) -> None:
        self._source = source
        self._processes = processes
        self._kind = kind
        self._tails = tails
        self._is_common = is_common

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_source":
            raise AttributeError(name)
        return getattr(self._source, name)

    @property
    def whole(self) -> Any:
        """What it is a share of."""
        return self._source

    def __iter__(self) -> Iterator[Any]:
        entries = self._pass()
        if self._tails == "keep":
            yield from (e for n, e in enumerate(entries) if self._is_own(n))
            return
        first: list[Any] = []
        while group := list(islice(entries, self._processes.count)):
            first = first or group
            whole = self._pad(group, first) if self._tails == "pad" else group
            if self._is_full(whole):
                yield whole[self._processes.rank]

    def __len__(self) -> int:
        count, rank = self._processes.count, self._processes.rank
        source = self._source
        if self._tails == "keep":
            return (len(source) - rank + count - 1) // count
        if self._tails == "pad":
            return (len(source) + count - 1) // count
        if type(source) is BatchSampler:
            return len(source.sampler) // (count * source.batch_size)  # type: ignore[arg-type]
        return len(source) // count

    @property
    def _size(self) -> int | None:
        """The samples of an entry, if the source promises some."""
        size: int | None = getattr(self._source, "batch_size", None)
        return size

    def _is_full(self, group: list[Any]) -> bool:
        """Whether each process has an entry, of the size promised."""
        is_even = self._size is None or all(self._kind.measure(e) == self._size for e in group)
        return is_even and len(group) == self._processes.count

    def _pad(self, group: list[Any], first: list[Any]) -> list[Any]:
        """The group filled up from the first one of the pass, with samples or else entries.

        Raises:
            DataError: batches of what is no tensors, which cannot be put together.
        """
        count, size = self._processes.count, self._size
        if self._is_full(group):
            return group
        if size is None:
            return list(islice(chain(group, cycle(first)), count))
        join, cut, measure = self._kind.join, self._kind.cut, self._kind.measure
        try:
            whole, beginning = join(group), join(first)
        except TypeError as error:
            raise DataError(
                f"the end of a pass cannot be padded: {error}",
                expected="batches of tensors from an iterable data set.",
                remedy='leave tails="pad" out, or give a data set with indices.',
            ) from error
        while (missing := count * size - measure(whole)) > 0:
            whole = join([whole, cut(beginning, slice(missing))])
        return [cut(whole, slice(n * size, (n + 1) * size)) for n in range(count)]

    def _is_own(self, number: int) -> bool:
        return number % self._processes.count == self._processes.rank

    def _pass(self) -> Iterator[Any]:
        """One pass, whose samplers draw what they do at its beginning."""
        if not self._is_common:
            yield from self._source
            return
        with _streams_of_main(self._source, self._processes):
            iterator = iter(self._source)
            first = list(_take_one(iterator))
        yield from first
        yield from iterator


def _take_one(iterator: Iterator[Any]) -> Iterator[Any]:
    for entry in iterator:
        yield entry
        return


@contextmanager
def drawn_alike(processes: Processes) -> Iterator[None]:
    """Draws from the streams of the main process; the others' stay where they were."""
    with _streams_of_main(None, processes):
        yield


@contextmanager
def _streams_of_main(sampler: Any, processes: Processes) -> Iterator[None]:
    """Draws from the streams of the main process.

    Its own go on as if it were alone; those of the others stay where they were, except for
    generators that the sampler has, which are the same everywhere behind it.
    """
    held = (getattr(s, "generator", None) for s in (sampler, getattr(sampler, "sampler", None)))
    own = [generator for generator in held if isinstance(generator, torch.Generator)]
    found = processes.exchange(_spell(own) if processes.is_main else None)[0]
    if processes.is_main:
        yield
        return
    with preserved_randomness():
        torch_state, python_state, numpy_state, *states = found
        torch.set_rng_state(_tensor(torch_state))
        random.setstate((python_state[0], tuple(python_state[1]), python_state[2]))
        numpy_stream.restore_spelled(numpy_state)
        for generator, state in zip(own, states, strict=True):
            generator.set_state(_tensor(state))
        yield


def _spell(generators: list[torch.Generator]) -> list[Any]:
    states = [g.get_state() for g in generators]
    return [
        _text(torch.get_rng_state()),
        random.getstate(),
        numpy_stream.spelled(),
        *map(_text, states),
    ]


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
