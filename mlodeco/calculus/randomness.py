"""The random numbers of a pass: drawn from a seed, and the streams left as they were."""

from __future__ import annotations

import hashlib
import importlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch

from mlodeco.calculus import numpy_stream


def make_seed(*parts: object) -> int:
    """A 63-bit seed that depends on nothing but the parts."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Restores the streams of torch (CPU and CUDA), ``random`` and NumPy on leaving."""
    saved = SavedRandomness()
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def randomness_set_aside() -> Iterator[None]:
    """The same at less cost, for passes that seed every stream: NumPy's is another one inside."""
    saved = _SavedStreams()
    with numpy_stream.lent():
        try:
            yield
        finally:
            saved.restore()


class _SavedStreams:
    """The state of torch's and Python's streams at one moment."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self._python = random.getstate()

    def restore(self) -> None:
        """Puts them back."""
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)


class SavedRandomness(_SavedStreams):
    """The state of every stream at one moment."""

    def __init__(self) -> None:
        super().__init__()
        self._numpy = numpy_stream.state()

    def restore(self) -> None:
        """Puts every stream back."""
        super().restore()
        if self._numpy is not None:
            numpy_stream.restore(self._numpy)

    def state_dict(self) -> dict[str, Any]:
        """The states in tensors and plain values."""
        version, words, half = self._python
        python = [version, torch.tensor(words), half]
        return {
            "torch": self._torch,
            "cuda": self._cuda,
            "python": python,
            "numpy": self._numpy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Takes the states of another moment, of another process perhaps.

        Of CUDA those of the devices that there are here.
        """
        version, words, half = state["python"]
        cuda, here = state["cuda"], torch.cuda.device_count() if state["cuda"] else 0
        self._torch = state["torch"]
        self._cuda = cuda[:here] if cuda and here else None
        self._python = (version, tuple(words.tolist()), half)
        self._numpy = state["numpy"]
        if self._numpy is not None:
            importlib.import_module("numpy")
        return self


class RecordedStreams(SavedRandomness):
    """The state of every stream, and of a function's own generators, before a step.

    Args:
        generators: for each generator that the function will be given, the one whose state it
            is to begin with.
    """

    def __init__(self, generators: Sequence[tuple[torch.Generator, torch.Generator]] = ()) -> None:
        super().__init__()
        self._states = [(given, live.get_state()) for given, live in generators]

    def restore(self) -> None:
        """Puts all of them back."""
        super().restore()
        for generator, state in self._states:
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The states in tensors and plain values."""
        return {**super().state_dict(), "own": [state for _, state in self._states]}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Takes the states of another moment; the generators stay those that were given."""
        super().load_state_dict(state)
        pairs = zip(self._states, state["own"], strict=True)
        self._states = [(given, own) for (given, _), own in pairs]
        return self


def seed_streams(seed: int, generators: Sequence[torch.Generator] = ()) -> None:
    """Seeds every global stream and the generators given."""
    # torch.manual_seed formats a traceback at each call while CUDA is not initialized.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    numpy_stream.seed(seed & 0xFFFFFFFF)
    for generator in generators:
        generator.manual_seed(seed)
