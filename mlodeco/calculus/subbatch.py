"""A part of a batch: the first samples of every tensor in it."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mlodeco.calculus.point import Point
from mlodeco.errors import LossError


def take_part(point: Point, fraction: float) -> Point:
    """The same point with the first samples of each micro-batch, by :func:`first_samples`.

    Raises:
        LossError: a micro-batch has no tensor with samples.
    """
    batches = point.part_of_batches(fraction) if point.part_of_batches else None
    if batches is None:
        raise LossError(
            f"curvature_batch={fraction} asks for a part of the batch, which has no samples: there "
            "is no tensor with a first dimension in it.",
            remedy="set curvature_batch=1.0, or give the level batches of tensors.",
            level=point.loss.level,
            site=point.loss.site,
        )
    return replace(point, batches=batches, fraction=fraction)


def first_samples(batch: Any, fraction: float) -> Any | None:
    """The first ``ceil(fraction * n)`` samples of a batch; None if it has no samples.

    n is the first dimension of the first tensor; every tensor in dictionaries, lists and
    tuples whose first dimension is n is cut. The batch itself stays as it is.
    """
    size = _count(batch)
    return None if size is None else _first(batch, size, math.ceil(round(fraction * size, 9)))


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
        if type(value) is dict or not isinstance(value, dict | UserDict):
            return parts  # a copy of another mapping might share its entries
        same_kind = copy.copy(value)
        same_kind.update(parts)
        return same_kind
    if isinstance(value, list | tuple):
        entries = [_first(part, size, count) for part in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value
