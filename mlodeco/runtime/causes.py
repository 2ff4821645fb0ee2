"""Where numbers that are not finite came from: found by looking at what went into a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlodeco.errors import NonFiniteError
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.drawn import Drawn
from mlodeco.tree import is_shard


@dataclass(frozen=True)
class Cause:
    """What was found.

    Attributes:
        where: what holds the numbers; empty where it is the function itself.
        text: a sentence on it.
        remedy: what to do about it; empty where the error says it.
    """

    where: str
    text: str
    remedy: str = ""


_NOTHING_FOUND = Cause(
    "", "the parameters, buffers and batches that went in are finite: it arises in the functions."
)


def find_cause(built: Build, top: str, batches: tuple[Drawn, ...], error: NonFiniteError) -> Cause:
    """The likely cause of an error in a step of ``top``; costs a look at its inputs.

    Batches come first, since they spoil the rest; the level that the error names comes before the
    others.
    """
    levels = _levels(built, top, error)
    if bad := find_in_batches(built, top, batches, error):
        return bad
    for level in levels:
        for where, tensor in _tensors(level):
            if found := _count(tensor):
                where = f"{where} of level {level.name!r}"
                text = f"{where} has {found} since an earlier step, or from the start."
                remedy = "use a smaller learning rate or clip_norm=, or start from other numbers."
                return Cause(where, text, remedy)
    return Cause("", error.cause) if error.cause else _NOTHING_FOUND


def find_in_batches(
    built: Build, top: str, batches: tuple[Drawn, ...], error: NonFiniteError
) -> Cause | None:
    """The same in the batches alone; None if all numbers in them are finite."""
    for level in _levels(built, top, error):
        drawn = batches if level.name == top else level.last_batches or ()
        for where, tensor in _items(level, drawn):
            if found := _count(tensor):
                text = f"{where} of level {level.name!r} has {found}."
                return Cause(f"{where} of {level.name!r}", text, "look into the data.")
    return None


def _levels(built: Build, top: str, error: NonFiniteError) -> list[BuiltLevel]:
    """Those that took part, the one at fault first."""
    below = built.graph.below(top)
    names = dict.fromkeys((error.level or top, top, *below, *built.levels[top].seen))
    return [built.levels[name] for name in names if name in built.levels]


def _tensors(level: BuiltLevel) -> Iterator[tuple[str, Tensor]]:
    """Parameters before buffers, into which a pass may have written."""
    for key, parameter in level.parameters.items():
        yield f"parameter {key!r}", parameter
    for key, buffer in level.module.named_buffers():
        yield f"buffer {key!r}", buffer


def _items(level: BuiltLevel, drawn: Iterable[Drawn]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of micro-batches, with what a person would call them."""
    for one in drawn:
        fields = level.declaration.fields
        if fields and isinstance(one.batch, list | tuple):
            for name, part in zip(fields, one.batch, strict=False):
                yield from _leaves(name, part)
        else:
            yield from _leaves("batch", one.batch)
        for name, item in one.sources.items():
            yield from _leaves(name, item)


def _leaves(path: str, item: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(item, Tensor):
        yield path, item
    elif getattr(getattr(item, "dtype", None), "kind", "") == "f":  # of NumPy
        yield path, torch.as_tensor(item)
    elif isinstance(item, Mapping):
        for key, part in item.items():
            yield from _leaves(f"{path}[{key!r}]", part)
    elif isinstance(item, list | tuple):
        for number, part in enumerate(item):
            yield from _leaves(f"{path}[{number}]", part)


def _count(tensor: Tensor) -> str:
    """How many of its entries are not finite; empty for none, and where nobody can tell."""
    own = tensor.detach()
    own = own.to_local() if is_shard(own) else own
    if own.layout is not torch.strided or own.is_meta or not own.is_floating_point():
        return ""
    nan = int(own.isnan().sum())
    inf = int(own.isinf().sum())
    return " and ".join(f"{n} {what}" for n, what in ((nan, "NaN"), (inf, "inf")) if n)
