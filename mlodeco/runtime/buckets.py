"""Trees as one flat vector and back, so that one collective carries all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from mlodeco.calculus.mean import Trees
from mlodeco.tree import Tree, dense


def pack(trees: Trees, like: Trees) -> Tensor:
    """All entries, zeros for those that are missing, then for each key whether it is there.

    In the widest of their dtypes, and at least in single precision.
    """
    pairs = [
        (tree.get(key), t) for tree, one in zip(trees, like, strict=True) for key, t in one.items()
    ]
    dtype = _dtype(like)
    parts = [_flat(t.new_zeros(t.shape) if v is None else _dense(v)) for v, t in pairs]
    device = parts[0].device if parts else None
    present = torch.tensor([value is not None for value, _ in pairs], dtype=dtype, device=device)
    return torch.cat([*(part.to(dtype) for part in parts), present])


def unpack(vector: Tensor, like: Trees) -> list[Tree]:
    """The trees of a mean of such vectors, without the keys that were nowhere."""
    entries = [t for one in like for t in one.values()]
    sizes = [_flat(t).numel() for t in entries]
    *parts, present = vector.split([*sizes, len(sizes)])
    found = iter(zip(parts, present.tolist(), strict=True))
    return [_tree(one, found) for one in like]


def _tree(like: Mapping[str, Tensor], found: Iterator[tuple[Tensor, float]]) -> Tree:
    result: Tree = {}
    for key, t in like.items():
        part, present = next(found)
        if present:
            whole = part.to(t.real.dtype).clone() if t.is_complex() else part.to(t.dtype)
            shaped = torch.view_as_complex(whole.view(*t.shape, 2)) if t.is_complex() else whole
            result[key] = shaped.view(t.shape)
    return result


def _dense(tensor: Tensor) -> Tensor:
    return dense(tensor.detach())


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _dtype(like: Trees) -> torch.dtype:
    kinds = {t.real.dtype if t.is_complex() else t.dtype for tree in like for t in tree.values()}
    return torch.float64 if torch.float64 in kinds else torch.float32


def pack_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of tensors of any dtypes, one after another."""
    return torch.cat([_bytes(tensor) for tensor in tensors])


def unpack_bytes(vector: Tensor, into: Sequence[Tensor]) -> None:
    """Writes the bytes back into tensors."""
    parts = vector.split([tensor.numel() * tensor.element_size() for tensor in into])
    with torch.no_grad():
        for tensor, part in zip(into, parts, strict=True):
            # a copy: the part may not begin where a number may
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
