"""Clipping of gradients by their norm, as ``torch.nn.utils.clip_grad_norm_`` does it."""

from __future__ import annotations

import torch

from mlodeco.tree import Tree, norm, scale

_EPS = 1e-6


def clip_factor(size: float, bound: float | None) -> float:
    """What a gradient of that norm is multiplied by; 1 for no bound or one not reached."""
    return 1.0 if bound is None or size <= bound else min(1.0, bound / (size + _EPS))


def clip(gradients: Tree, bound: float | None) -> Tree:
    """The gradients, no longer than the bound."""
    if bound is None:
        return gradients
    return scale(gradients, clip_factor(norm(gradients), bound))


def clip_differentiably(gradients: Tree, bound: float | None) -> Tree:
    """The same as a function of the gradients that autograd can follow."""
    if bound is None or not gradients:
        return gradients
    sizes = [torch.linalg.vector_norm(value) for value in gradients.values()]
    size = torch.linalg.vector_norm(torch.stack(sizes))
    if float(size.detach()) <= bound:
        return gradients
    factor = bound / (size + _EPS)
    # without dimensions both, the wider dtype of the two would win
    return {key: value * factor.to(value.dtype) for key, value in gradients.items()}


def clip_rows(gradients: Tree, bound: float | None, replicas: int | None) -> Tree:
    """:func:`clip`, for stacked gradients of each replica by itself."""
    if bound is None or replicas is None or not gradients:
        return clip(gradients, bound)
    sizes = row_norms(gradients)
    factors = [clip_factor(size, bound) for size in sizes]
    return {key: value * _along(factors, value) for key, value in gradients.items()}


def clip_rows_differentiably(gradients: Tree, bound: float | None, replicas: int | None) -> Tree:
    """:func:`clip_differentiably`, for stacked gradients of each replica by itself."""
    if bound is None or replicas is None or not gradients:
        return clip_differentiably(gradients, bound)
    is_short = [
        size <= bound
        for size in row_norms({key: value.detach() for key, value in gradients.items()})
    ]
    if all(is_short):
        return gradients
    squares = [value.reshape(replicas, -1).square().sum(1) for value in gradients.values()]
    # one where it is not clipped, and where the root would have no derivative
    short = torch.tensor(is_short, device=squares[0].device)
    size = torch.stack(squares).sum(0).masked_fill(short, 1.0).sqrt()
    factors = (bound / (size + _EPS)).masked_fill(short, 1.0)
    return {
        key: value * factors.to(value.dtype).reshape(-1, *[1] * (value.dim() - 1))
        for key, value in gradients.items()
    }


def row_norms(gradients: Tree) -> list[float]:
    """The norm of each replica's gradient."""
    count = len(next(iter(gradients.values())))
    return [norm({key: value[r] for key, value in gradients.items()}) for r in range(count)]


def _along(factors: list[float], like: torch.Tensor) -> torch.Tensor:
    return like.new_tensor(factors).reshape(-1, *[1] * (like.dim() - 1))
