"""Stateless passes over sharded modules, by FSDP's own forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mlodeco.calculus import stateless
from mlodeco.calculus.mean import Mean, Trees
from mlodeco.calculus.response import Method
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.hypergrad import CG, FiniteDifference, Identity, Neumann
from mlodeco.runtime.fsdp import explained, groups, leaves, rest
from mlodeco.runtime.sharding import plain_part, require_plain
from mlodeco.tree import Tree, is_shard

if TYPE_CHECKING:
    from mlodeco.runtime.build import BuiltLevel

K = TypeVar("K")
T = TypeVar("T")


class ShardsInPlace:
    """Writes shards over those of the real parameters for the time of a pass.

    Costs a copy of the shards that differ; the modules are called as in a training step, layer by
    layer whole, and backward reduces gradients to shards.

    Args:
        loss: the loss that passes go over.
    """

    def __init__(self, loss: StatelessLoss) -> None:
        self._loss = loss
        self._real: dict[int, Tensor] = {}

    def within(self, state: State, call: Callable[[State], T]) -> T:
        """Calls while the shards of ``state`` stand in their places."""
        plain = plain_part(state)
        if len(plain) == len(state):
            return call(state)
        with explained(), self._placed(state):
            result = call(plain)
        state.update(plain)
        return result

    @contextmanager
    def _placed(self, state: State) -> Iterator[None]:
        module = self._loss.module
        rest(module)
        slots = [slot for slot in self._loss.parameters if is_shard(state[slot.key])]
        real = {id(state[slot.key]): slot.tensor for slot in slots}
        moved = {
            id(slot.tensor): (_local(slot.tensor), _local(state[slot.key]))
            for slot in slots
            if _local(slot.tensor).data_ptr() != _local(state[slot.key]).data_ptr()
        }
        before = [(place, place.clone()) for place, _ in moved.values()]
        grads = [(parameter, parameter.grad) for parameter in real.values()]
        self._real = real
        try:
            for place, value in moved.values():
                place.copy_(value)
            yield
        finally:
            self._real = {}
            rest(module)
            for place, value in before:
                place.copy_(value)
            for parameter, grad in grads:
                parameter.grad = grad

    def gradient(self, output: Tensor, inputs: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """By ``backward`` where some inputs are shards: FSDP leaves gradients in ``.grad``."""
        require_plain(output, self._loss)
        if not any(map(is_shard, inputs.values())):
            return stateless.gradient(output, inputs)
        plain = plain_part({id(t): t for t in inputs.values()})
        held = {key: self._real.get(id(tensor), tensor) for key, tensor in inputs.items()}
        for tensor in held.values():
            tensor.grad = None
        torch.autograd.backward(output, inputs=[*plain.values(), *leaves(self._loss.module)])
        grads = {key: t.grad for key, t in held.items() if t.grad is not None}
        for tensor in held.values():
            tensor.grad = None
        return {key: g.to_dense() if g.is_sparse else g for key, g in grads.items()}

    def reached(self, output: Tensor, leaves: set[int]) -> set[int]:
        """With the shards whose whole parameters are among the leaves."""
        require_plain(output, self._loss)
        found = {
            id(one.sharded_param)
            for group in groups(self._loss.module)
            for one in group.fsdp_params
            if id(getattr(one, "_unsharded_param", None)) in leaves
        }
        return leaves | {key for key, real in self._real.items() if id(real) in found}


def _local(shard: Tensor) -> Tensor:
    """The part of this process, in the storage of the shard."""
    return shard.to_local().detach() if is_shard(shard) else shard


def must_gather(sharded: list[BuiltLevel], methods: Iterable[Method | None] = ()) -> bool:
    """Whether some of these levels must be whole for stateless passes, as the methods take them."""
    return bool(sharded) and not (all(map(_can_stay, sharded)) and all(map(_can_use, methods)))


def _can_stay(level: BuiltLevel) -> bool:
    """Whether FSDP computes in the level's dtype, and no parameter is whole beside its shards."""
    has_own_dtype = all(g.mp_policy.param_dtype is None for g in groups(level.module))
    return has_own_dtype and not plain_part(level.parameters)


def _can_use(method: Method | None) -> bool:
    """Whether a method takes gradients alone, and sums of trees."""
    by_differences = getattr(method, "product", "difference") == "difference"
    return isinstance(method, FiniteDifference | Identity | Neumann | CG) and by_differences


def beside_shards(mean: Mean) -> Mean:
    """The same mean for what every process holds whole; shards are means already."""

    def of_the_rest(trees: Trees, like: Trees) -> list[Tree]:
        shards = [{k: v for k, v in tree.items() if is_shard(v)} for tree in trees]
        known = [plain_part(one) for one in like]
        found = mean([plain_part(tree) for tree in trees], known)
        return [plain | part for plain, part in zip(found, shards, strict=True)]

    return of_the_rest
