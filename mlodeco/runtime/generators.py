"""Generators of random numbers that data hold on to: found, read, and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from mlodeco.runtime.captured import captured_by


@contextmanager
def preserved_generators(data: Any) -> Iterator[None]:
    """Restores the generators of loaders, of their samplers and of functions on leaving."""
    found = find_generators(data)
    states = read_generators(found)
    try:
        yield
    finally:
        write_generators(found, states)


def find_generators(data: Any) -> list[Any]:
    """The generators of loaders, of their samplers and of functions, in an order of their own."""
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
        elif isinstance(value, dict) or (value is data and isinstance(value, Mapping)):
            pending.extend(value.values())
        elif isinstance(value, partial | FunctionType | MethodType):
            pending.extend(captured_by(value))
        elif not isinstance(value, ModuleType | type):
            pending.extend(_generators_of(value))
    return found


def read_generators(generators: list[Any]) -> list[Any]:
    """Their states."""
    return [_read(generator) for generator in generators]


def write_generators(generators: list[Any], states: list[Any]) -> None:
    """Puts states back."""
    for generator, state in zip(generators, states, strict=True):
        _write(generator, state)


def _is_generator(value: Any) -> bool:
    if isinstance(value, random.Random):
        return not isinstance(value, random.SystemRandom)
    return isinstance(value, torch.Generator) or _bits(value) is not None


def _bits(value: Any) -> Any:
    """What holds the state of one of NumPy's; None if it is none."""
    if not type(value).__module__.startswith("numpy.random"):
        return None
    bits = getattr(value, "bit_generator", getattr(value, "_bit_generator", value))
    return bits if hasattr(bits, "random_raw") else None


def _read(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else _bits(generator).state


def _write(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        _bits(generator).state = state


def _generators_of(value: Any) -> list[Any]:
    """Generators and samplers among the attributes; properties are not looked into."""
    names = ("sampler", "batch_sampler")
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    return [v for n, v in attributes.items() if n in names or _is_generator(v)]
