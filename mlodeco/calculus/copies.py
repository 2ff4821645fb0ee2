"""Levels of which several independent copies are solved together, seen one at a time.

The values of such a level are stacked: replicas along the first dimension of every parameter,
and of every tensor in the items. A function sees one replica at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mlodeco.calculus.slots import Slot
from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.tree import Tree


@dataclass(frozen=True)
class Copies:
    """``count`` replicas of the levels named, of which a call of a loss takes ``chunk``.

    A loss has an entry for each micro-batch and chunk, in this order. The mean over entries is
    the mean over replicas for a level that reads them, and their sum for a replicated level
    itself, each copy of which follows its own gradient.
    """

    count: int
    levels: frozenset[str]
    chunk: int = 1
    is_vmapped: bool = False

    @cached_property
    def chunks(self) -> tuple[range, ...]:
        """The replicas of each call."""
        starts = range(0, self.count, self.chunk)
        return tuple(range(start, min(start + self.chunk, self.count)) for start in starts)

    def entries(self, items: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each chunk sees of the items of a micro-batch."""
        return [
            {name: self._part(value, chunk) for name, value in items.items()}
            for chunk in self.chunks
        ]

    def _part(self, value: Any, chunk: range) -> Any:
        if not self.is_vmapped:
            return sliced(value, chunk.start)
        return value if len(chunk) == self.count else sliced(value, slice(chunk.start, chunk.stop))

    def reported(self, level: str, loss: float) -> float:
        """The mean over replicas, from the mean over entries."""
        return loss / self.count if level in self.levels else loss

    @contextmanager
    def evaluated(
        self, loss: StatelessLoss, items: Mapping[str, Any], number: int
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The loss of one entry with its metrics; meanwhile its slots hold what it saw."""
        chunk = self.chunks[number % len(self.chunks)]
        weight = len(self.chunks) / (1 if loss.level in self.levels else self.count)
        slots = loss.slots_of(self.levels)
        with _same_buffers(loss, is_on=loss.level in self.levels and chunk.start > 0):
            if self.is_vmapped:
                value, metrics = _call_vmapped(loss, slots, items, chunk)
                yield value * weight, metrics
                return
            with _holding(_rows(slots, chunk.start)):
                value, metrics = loss.call(items)
                yield value * weight, metrics


def sliced(value: Any, index: int | slice) -> Any:
    """The slices of all tensors with dimensions in dictionaries, lists and tuples."""
    return map_tensors(value, lambda tensor: tensor[index])


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same containers with other tensors for those that have dimensions."""
    if isinstance(value, Tensor):
        return change(value) if value.dim() else value
    if isinstance(value, Mapping):
        parts = {key: map_tensors(part, change) for key, part in value.items()}
        if type(value) is dict:
            return parts
        try:
            return type(value)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    if isinstance(value, list | tuple):
        entries = [map_tensors(part, change) for part in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def row(tree: Mapping[str, Tensor], replica: int) -> Tree:
    """The tree of one replica."""
    return {key: value[replica] for key, value in tree.items()}


def stacked(trees: list[Tree], like: Mapping[str, Tensor]) -> Tree:
    """One tree of all replicas, zero where some have nothing; keys that none has are left out."""
    keys = [key for key in like if any(key in tree for tree in trees)]
    zeros = {key: torch.zeros_like(like[key][0]) for key in keys}
    return {key: torch.stack([tree.get(key, zeros[key]) for tree in trees]) for key in keys}


def mean_metrics(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers averaged over replicas; of anything else that of the last."""
    if not found:
        return {}
    return {key: _mean([one[key] for one in found if key in one]) for key in found[-1]}


def _mean(values: list[Any]) -> Any:
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return sum(values) / len(values)
    if all(isinstance(v, Tensor) and v.numel() == 1 and v.is_floating_point() for v in values):
        return torch.stack([v.detach().reshape(()) for v in values]).mean()
    return values[-1]


_Held = list[tuple[Slot, Tensor]]


def _rows(slots: list[Slot], replica: int) -> _Held:
    """What the slots hold of one replica; tied slots hold one tensor."""
    known: dict[int, Tensor] = {}
    return [
        (slot, known.setdefault(id(whole), whole[replica]))
        for slot in slots
        for whole in (slot.tensor,)
    ]


@contextmanager
def _holding(held: _Held) -> Iterator[None]:
    """Other tensors in slots; on leaving, only those still there are taken out again."""
    before = [slot.tensor for slot, _ in held]
    for slot, tensor in held:
        slot.holder[slot.name] = tensor
    try:
        yield
    finally:
        # after an error the swap around the pass may have been undone already
        for (slot, tensor), earlier in zip(held, before, strict=True):
            if slot.current is tensor:
                slot.holder[slot.name] = earlier


@contextmanager
def _same_buffers(loss: StatelessLoss, *, is_on: bool) -> Iterator[None]:
    """Lets a call change copies of the buffers: those of a module are its first replica's."""
    if not is_on:
        yield
        return
    clones: dict[int, Tensor] = {}
    for slot in loss.buffers:
        clones.setdefault(id(slot.tensor), slot.tensor.clone())
    with _holding([(slot, clones[id(slot.tensor)]) for slot in loss.buffers]):
        yield


def _call_vmapped(
    loss: StatelessLoss, slots: list[Slot], items: Mapping[str, Any], chunk: range
) -> tuple[Tensor, dict[str, Any]]:
    """The sum of the losses of a chunk by one call of ``torch.func.vmap``."""
    whole = {id(slot.tensor): slot.tensor for slot in slots}
    rows = {
        key: t if len(chunk) == len(t) else t[chunk.start : chunk.stop] for key, t in whole.items()
    }
    places = [(slot, id(slot.tensor)) for slot in slots]
    leaves: list[Tensor] = []
    map_tensors(items, leaves.append)
    rest: dict[str, Any] = {}

    def one(parameters: dict[int, Tensor], tensors: list[Tensor]) -> tuple[Tensor, dict[str, Any]]:
        left = iter(tensors)
        seen = map_tensors(dict(items), lambda _: next(left))
        with _holding([(slot, parameters[key]) for slot, key in places]):
            value, metrics = loss.call(seen)
        rest.update({k: v for k, v in metrics.items() if not isinstance(v, Tensor)})
        return value, {k: v.detach() for k, v in metrics.items() if isinstance(v, Tensor)}

    values, metrics = torch.func.vmap(one, in_dims=(0, 0), randomness="different")(rows, leaves)
    means = {k: v.mean(0) if v.is_floating_point() else v for k, v in metrics.items()}
    return values.sum(), {**rest, **means}
