"""A part of a batch: the first samples of every tensor in it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mlodeco.calculus.point import Point
from mlodeco.errors import LossError


def take_part(point: Point, fraction: float) -> Point:
    """The same point with the first ``ceil(fraction * n)`` samples of each micro-batch.

    n is the first dimension of the first tensor among the items; every tensor in dictionaries,
    lists and tuples whose first dimension is n is cut.

    Raises:
        LossError: a micro-batch has no tensor with samples.
    """
    return replace(point, batches=tuple(_cut(point, items, fraction) for items in point.batches))


def _cut(point: Point, items: Mapping[str, Any], fraction: float) -> Mapping[str, Any]:
    size = _count(items)
    if size is None:
        raise LossError(
            f"curvature_batch={fraction} asks for a part of the batch, which has no samples: there "
            f"is no tensor with a first dimension in {sorted(items)}.",
            remedy="set curvature_batch=1.0, or give the level batches of tensors.",
            level=point.loss.level,
            site=point.loss.site,
        )
    cut: Mapping[str, Any] = _first(items, size, math.ceil(round(fraction * size, 9)))
    return cut


def _count(value: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    if isinstance(value, Tensor):
        return len(value) if value.dim() else None
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | list | tuple):
        return None
    return next((size for size in map(_count, parts) if size is not None), None)


def _first(value: Any, size: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        parts = {key: _first(part, size, count) for key, part in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return parts
        same_kind = copy.copy(value)
        same_kind.update(parts)
        return same_kind
    if isinstance(value, list | tuple):
        entries = [_first(part, size, count) for part in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
