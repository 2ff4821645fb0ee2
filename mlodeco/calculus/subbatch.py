"""A part of a batch: the first samples of every tensor in it."""

from __future__ import annotations

import copy
import math
import sys
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
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

    n is the first dimension of the first tensor or NumPy array; each of these whose first
    dimension is n is cut, in dictionaries, lists, tuples and data classes. The batch itself stays
    as it is.
    """
    size = _count(batch)
    return None if size is None else _first(batch, size, math.ceil(round(fraction * size, 9)))


def _count(value: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    if _is_array(value):
        return len(value) if value.ndim else None
    if isinstance(value, Mapping):
        parts: Iterable[Any] = value.values()
    elif isinstance(value, list | tuple):
        parts = value
    else:
        parts = _fields(value).values()
    return next((size for size in map(_count, parts) if size is not None), None)


def _first(value: Any, size: int, count: int) -> Any:
    if _is_array(value):
        return value[:count] if value.ndim and len(value) == size else value
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
    same_kind = copy.copy(value) if _fields(value) else value
    for name, part in _fields(value).items():
        # past the class's own __setattr__, which a frozen one refuses
        object.__setattr__(same_kind, name, _first(part, size, count))
    return same_kind


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or (numpy is not None and isinstance(value, numpy.ndarray))


def _fields(value: Any) -> dict[str, Any]:
    """The fields of an instance of a data class; none of anything else."""
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    return {field.name: getattr(value, field.name) for field in fields(value)}
