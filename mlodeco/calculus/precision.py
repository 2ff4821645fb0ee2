"""Half precision inside a pass, single precision outside."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mlodeco.tree import Tree, largest, match, scale


def autocasting(dtype: torch.dtype | None, device: str) -> AbstractContextManager[object]:
    """Autocast to a dtype; float32 for none; None for things as they are.

    Without autocast's cache of casts: parameters are other tensors in every pass, and a cast that
    was made under ``no_grad`` has no gradient. A parameter that is used twice is cast twice, and
    the parts of its gradient are added in its own dtype.
    """
    if dtype is None:
        return nullcontext()
    if dtype is torch.float32:
        return torch.autocast(device, enabled=False)
    return torch.autocast(device, dtype=dtype, cache_enabled=False)


def into_range(
    tree: Mapping[str, Tensor], like: Mapping[str, Tensor], *, is_scaled: bool
) -> tuple[Tree, float]:
    """A direction as a pass in half precision can carry it, and the unit that it is then in.

    In the dtypes of ``like``. A product is linear in its direction, so that where losses are
    scaled the direction may be too: its largest entry is brought into [0.5, 1). The unit is a
    power of two, so that nothing is rounded by it.
    """
    size = largest(tree) if is_scaled else 0.0
    unit = 2.0 ** math.frexp(size)[1] if 0.0 < size < math.inf else 1.0
    return match(scale(tree, 1.0 / unit), like), unit
