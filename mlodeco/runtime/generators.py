"""Generators of random numbers that data and functions hold: found, read, and put back."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from mlodeco.errors import CheckpointWarning
from mlodeco.runtime.captured import captured_by

_HELD = ("sampler", "batch_sampler", "dataset", "collate_fn", "transform", "target_transform")
_HELD_LISTS = ("datasets", "transforms")


@contextmanager
def preserved_generators(data: Any) -> Iterator[None]:
    """Restores the generators of loaders, of what they are made of and of functions on leaving."""
    found = find_generators(data)
    states = read_generators(found)
    try:
        yield
    finally:
        write_generators(found, states)


def find_generators(data: Any) -> list[Any]:
    """The generators of loaders, of what they are made of and of functions, always in one order.

    An object with ``epoch`` and ``set_epoch``, as a DistributedSampler has, counts as one: it
    draws its order from that number.
    """
    found: list[Any] = []
    pending = [data]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if _is_generator(value):
            found.append(value)
        if isinstance(value, dict) or (value is data and isinstance(value, Mapping)):
            pending.extend(value.values())
        elif isinstance(value, partial | FunctionType | MethodType):
            pending.extend(captured_by(value))
        elif not isinstance(value, ModuleType | type):
            pending.extend(_generators_of(value))
    return found


def generators_of_program(functions: Iterable[Any], modules: Iterable[nn.Module]) -> list[Any]:
    """The generators that functions close over, and that modules and their children hold."""
    children = (child for module in modules for child in module.modules())
    return find_generators(dict(enumerate((*functions, *children))))


def read_generators(generators: list[Any]) -> list[Any]:
    """Their states."""
    return [_read(generator) for generator in generators]


def spot(generator: Any) -> Any:
    """Where a generator stands, to be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().numpy().tobytes()
    if (bits := _bits(generator)) is not None:
        parts = bits.state["state"]
        return [part.tolist() if hasattr(part, "tolist") else part for part in parts.values()]
    return _read(generator)


def write_generators(generators: list[Any], states: list[Any]) -> None:
    """Puts states back."""
    for generator, state in zip(generators, states, strict=True):
        _write(generator, state)


def restore_generators(generators: list[Any], states: list[Any]) -> bool:
    """Puts back states of another process; False, and nothing, where they are not as many."""
    if len(generators) != len(states):
        return False
    write_generators(generators, states)
    return True


def warn_of_others(where: object) -> None:
    """Warns of generators that cannot be told apart."""
    warnings.warn(
        f"{where} does not hold as many generators of random numbers as when the checkpoint was "
        "written: they begin anew. Remedy: make them where their owner is made, and not at its "
        "first use.",
        CheckpointWarning,
        stacklevel=3,
    )


def _is_generator(value: Any) -> bool:
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    return isinstance(value, torch.Generator) or _bits(value) is not None or _has_epoch(value)


def _has_epoch(value: Any) -> bool:
    # asked of the type, since an object may answer to any name
    return hasattr(type(value), "set_epoch") and isinstance(getattr(value, "epoch", None), int)


def _bits(value: Any) -> Any:
    """What holds the state of one of NumPy's; None if it is none."""
    if not type(value).__module__.startswith("numpy.random"):
        return None
    bits = getattr(value, "bit_generator", getattr(value, "_bit_generator", value))
    return bits if hasattr(bits, "random_raw") else None


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.epoch if _has_epoch(generator) else _bits(generator).state


def _write(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif _has_epoch(generator):
        generator.set_epoch(state)
    else:
        _bits(generator).state = state


def _generators_of(value: Any) -> list[Any]:
    """Generators and parts of data among the attributes; properties are not looked into."""
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    parts = (attributes.get(name) for name in _HELD_LISTS)
    lists = [part for part in parts if isinstance(part, list | tuple)]
    held = [v for n, v in attributes.items() if n in _HELD or _is_generator(v)]
    return [*held, *chain.from_iterable(lists)]
