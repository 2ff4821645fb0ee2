"""Kernels that have second derivatives, chosen for the duration of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_kernels(has_rnn: bool) -> Iterator[None]:
    """Attention by the MATH backend, no fused encoder layer, RNNs without cuDNN.

    The flash and fused kernels have no derivative of their backward pass.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    cudnn = torch.backends.cudnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    if has_rnn and cudnn:
        torch.backends.cudnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if has_rnn and cudnn:
            torch.backends.cudnn.enabled = cudnn


def contains_rnn(module: nn.Module) -> bool:
    """Whether a recurrent layer is among the submodules."""
    return any(isinstance(child, nn.RNNBase) for child in module.modules())
