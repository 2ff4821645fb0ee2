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
    return {key: value * (bound / (size + _EPS)) for key, value in gradients.items()}
