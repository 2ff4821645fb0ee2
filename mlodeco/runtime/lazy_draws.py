"""Passes that draw random numbers as they go on, from streams that others move in between."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Self

import torch

from mlodeco.calculus import numpy_stream
from mlodeco.runtime.generators import spot

_LOOKS = 64
"""Items of a pass that are looked at: each takes 25 microseconds with the global streams."""


class LazyDraws:
    """Gives an iterator's items, and notes from which streams it draws them.

    Args:
        iterator: the iterator.
        generators: those of its streams that are not global.
        with_global: whether it may draw from the global streams too.

    Attributes:
        are_mixed: whether an item behind the first was drawn from a stream that somebody else
            had moved since the item before, so that the same items cannot be drawn again.
    """

    def __init__(
        self, iterator: Iterator[Any], generators: Sequence[Any], *, with_global: bool
    ) -> None:
        self._iterator = iterator
        streams = _GLOBAL if with_global else ()
        own = (partial(spot, generator) for generator in generators)
        self._streams: tuple[Callable[[], Any], ...] = (*streams, *own)
        self._looks = 0
        self._latest: list[Any] = []
        self._foreign: set[int] = set()
        self.are_mixed = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        if self._looks == _LOOKS or self.are_mixed:
            return next(self._iterator)
        before = self._look()
        self._foreign |= _moved(self._latest, before)
        item = next(self._iterator)
        self._latest = self._look()
        self.are_mixed = bool(self._foreign & _moved(before, self._latest))
        self._looks += 1
        return item

    def _look(self) -> list[Any]:
        return [stream() for stream in self._streams]


def _moved(before: list[Any], after: list[Any]) -> set[int]:
    """The streams that stand elsewhere."""
    pairs = enumerate(zip(before, after, strict=False))
    return {number for number, (one, other) in pairs if one != other}


def _python() -> Any:
    _, words, half = random.getstate()
    return words[0], words[-1], half  # the last is the place among the words


_GLOBAL = (lambda: spot(torch.default_generator), _python, numpy_stream.twister)
