"""Arithmetic on trees: ``dict[str, Tensor]`` with one entry a parameter.

A key that is missing stands for zero where two trees are added or multiplied.
No function writes to its arguments. Multi-tensor kernels do the work: one call
an operation, not one a parameter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

Tree = dict[str, Tensor]

_SINGLE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtype in which half precision is accumulated."""

_SMALL = 1e-15
"""The squares of smaller numbers may vanish in single precision."""

_TINY = 1e-150
"""The squares of smaller numbers may vanish in double precision."""


def scale(tree: Mapping[str, Tensor], factor: float) -> Tree:
    """``factor * tree``."""
    if not tree or factor == 1.0:
        return dict(tree)
    return dict(zip(tree, torch._foreach_mul(list(tree.values()), factor), strict=True))


def add(left: Mapping[str, Tensor], right: Mapping[str, Tensor], factor: float = 1.0) -> Tree:
    """``left + factor * right``, over the union of the keys."""
    if not left:
        return scale(right, factor)
    both = [key for key in left if key in right]
    result = dict(left)
    if both:
        summed = torch._foreach_add(
            [left[key] for key in both], [right[key] for key in both], alpha=factor
        )
        result.update(zip(both, summed, strict=True))
    rest = {key: value for key, value in right.items() if key not in left}
    result.update(rest if factor == 1.0 else scale(rest, factor))
    return result


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """The inner product over the common keys, free of overflow and underflow like :func:`norm`."""
    if shards := [key for key in left if key in right and is_shard(left[key])]:
        rest = {key: value for key, value in left.items() if key not in shards}
        return dot(rest, right) + _dot_of_shards([(left[key], right[key]) for key in shards])
    pairs = [(left[key].reshape(-1), right[key].reshape(-1)) for key in left if key in right]
    if not pairs:
        return 0.0
    kinds = {part.dtype for pair in pairs for part in pair}
    first = pairs[0][0]
    wide = _wide(first)
    product = _dot(pairs, wide if len(kinds) > 1 else _SINGLE.get(first.dtype, first.dtype))
    if _SMALL**2 < abs(product) < math.inf or kinds == {torch.float64}:
        return product
    return _dot(pairs, wide)


def _dot(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> float:
    parts = [torch.dot(_as(a, dtype), _as(b, dtype)) for a, b in pairs]
    return float(sum(torch.stack(parts).tolist()))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    """A dtype in which squares of the entries neither overflow nor vanish."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def norm(tree: Mapping[str, Tensor]) -> float:
    """The Euclidean norm of all the entries together, free of overflow and underflow.

    Accumulated at least in single precision; again in double where that does not suffice.
    Tensors of which each process holds a part count whole, by one collective for all.
    """
    if not tree:
        return 0.0
    if shards := {key: value for key, value in tree.items() if is_shard(value)}:
        rest = {key: value for key, value in tree.items() if key not in shards}
        return math.hypot(norm(rest), math.sqrt(_dot_of_shards([(v, v) for v in shards.values()])))
    values = list(tree.values())
    kinds = {value.dtype for value in values}
    size = _norm(values, _wide(values[0]) if len(kinds) > 1 else _SINGLE.get(values[0].dtype))
    if _SMALL < size < math.inf:
        return size
    if kinds != {torch.float64}:
        size = _norm(values, _wide(values[0]))
    return size if _TINY < size < math.inf else _scaled_norm(values)


def _scaled_norm(values: list[Tensor]) -> float:
    """In units of the largest entry, the square of which neither overflows nor vanishes."""
    values = [value.detach() for value in values if value.numel()]
    sizes = [float(value.abs().max()) for value in values]
    # max passes a NaN over that is not the first
    largest = math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)
    if largest == 0.0 or not math.isfinite(largest):
        return largest
    return largest * _norm([value.to(_wide(value)) / largest for value in values], None)


def _norm(values: list[Tensor], dtype: torch.dtype | None) -> float:
    parts = torch.stack(torch._foreach_norm(values, 2, dtype=dtype))
    return math.hypot(*parts.tolist())


def largest(tree: Mapping[str, Tensor]) -> float:
    """The largest absolute value of an entry; not a number where one is none."""
    values = [value.detach() for value in tree.values() if value.numel()]
    if not values:
        return 0.0
    return float(torch.stack([v.float() for v in torch._foreach_norm(values, math.inf)]).max())


def widen(tree: Mapping[str, Tensor]) -> Tree:
    """Entries in half precision as single precision, in which sums are made; others as they are."""
    return {key: value.to(_SINGLE.get(value.dtype, value.dtype)) for key, value in tree.items()}


def match(tree: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tree:
    """The entries in the dtypes of those of ``like``, which has all their keys."""
    return {key: value.to(like[key].dtype) for key, value in tree.items()}


def is_shard(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a process holds a part of it alone: a ``DTensor``, known by its way to the whole."""
    return type(tensor) not in (Tensor, Parameter) and hasattr(tensor, "full_tensor")


def _dot_of_shards(pairs: list[tuple[Any, Any]]) -> float:
    """In double precision, in which squares of single one neither overflow nor vanish.

    The parts of a sum are added up in each process before they are over processes.
    """
    wide = _wide(pairs[0][0])
    parts = ((left.to(wide) * right.to(wide)).sum() for left, right in pairs)
    return float(reduce(operator.add, parts).full_tensor())


def is_zero(tree: Mapping[str, Tensor]) -> bool:
    """Whether all entries are zero; one that is not, among the last, settles it at once."""
    for value in reversed(list(tree.values())):
        if is_shard(value):
            break
        if value.numel() and value[(-1,) * value.dim()] != 0.0:
            return False
    return norm(tree) == 0.0


def epsilon(tree: Mapping[str, Tensor]) -> float:
    """The relative rounding of sums over the entries: that of their coarsest dtype."""
    return max(torch.finfo(_SINGLE.get(t.dtype, t.dtype)).eps for t in tree.values())


def zeros_like(tree: Mapping[str, Tensor]) -> Tree:
    """Zeros of the same keys, shapes and dtypes."""
    return {key: torch.zeros_like(value) for key, value in tree.items()}


def fill(tree: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> Tree:
    """``tree`` with zeros for the keys of ``like`` that it lacks, in the order of ``like``."""
    return {key: tree[key] if key in tree else torch.zeros_like(like[key]) for key in like}


def restrict(tree: Mapping[str, Tensor], keys: Iterable[str]) -> Tree:
    """The entries of ``tree`` under those ``keys`` that it has."""
    return {key: tree[key] for key in keys if key in tree}


def flatten(tree: Mapping[str, Tensor]) -> Tensor:
    """One vector of all the entries, in the order of the keys."""
    return torch.cat([value.reshape(-1) for value in tree.values()])


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Tree:
    """The tree shaped like ``like`` that :func:`flatten` turns into ``vector``."""
    sizes = [value.numel() for value in like.values()]
    parts = vector.split(sizes)
    return {
        key: part.reshape(value.shape).to(value.dtype)
        for (key, value), part in zip(like.items(), parts, strict=True)
    }
