"""A pass over some data, which another process can take up where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Self

from torch.utils.data.dataloader import _DatasetKind, _SingleProcessDataLoaderIter

from mlodeco.calculus.randomness import SavedRandomness
from mlodeco.runtime.generators import find_generators, read_generators, write_generators


def keeps_its_state(value: Any) -> bool:
    """Whether an object can say where it stands, and go on from there."""
    # loaders of accelerate have the methods in any case, and say whether they serve
    serves = getattr(value, "use_stateful_dataloader", True)
    return serves and hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


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
        is_plain = isinstance(source, list | tuple) or keeps_its_state(source)
        self._begin = None if is_plain else _Streams(origin)
        self._iterator = iter(source)
        self.drawn = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = next(self._iterator)
        self.drawn += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        source: Any = self._source
        return {
            "drawn": self.drawn,
            "begin": self._begin and self._begin.state_dict(),
            "kept": source.state_dict() if keeps_its_state(source) else None,
        }

    @classmethod
    def resumed(
        cls, source: Iterable[Any], origin: Any, state: Mapping[str, Any], drawn: int
    ) -> Self:
        """The pass of that state, behind so many items; random numbers are moved.

        Raises:
            StopIteration: the data have fewer items.
        """
        if state["kept"] is not None:
            holder: Any = source
            holder.load_state_dict(state["kept"])
        if state["begin"] is not None:
            _Streams(origin).load_state_dict(state["begin"]).restore()
        found = cls(source, origin)
        if state["kept"] is None:
            found._skip(drawn)
        found.drawn = drawn
        return found

    def _skip(self, count: int) -> None:
        iterator: Any = self._iterator
        step = iterator._next_index if _looks_up(iterator) else partial(next, iterator)
        for _ in range(count):
            step()


def _looks_up(iterator: Any) -> bool:
    """Whether it is that of a DataLoader, which looks indices up here and one at a time."""
    is_single = isinstance(iterator, _SingleProcessDataLoaderIter)
    return is_single and iterator._dataset_kind == _DatasetKind.Map


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
        write_generators(self._found, self._states)
