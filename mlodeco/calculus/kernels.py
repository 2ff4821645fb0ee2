"""Kernels that have second derivatives, chosen for the duration of a pass."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from mlodeco.calculus.interception import Interception

_is_on = False
"""Whether :func:`second_derivatives` is in force; the switches behind it are global too."""


@contextmanager
def second_derivatives() -> Iterator[None]:
    """Attention by the MATH backend, no fused encoder layer, compiled modules as written.

    The flash and fused kernels have no derivative of their backward pass, and compiled graphs
    would drop tangents without a word. Costs 20 microseconds, but nothing where it is in force
    already: so a whole sweep enters it once.
    """
    global _is_on
    if _is_on:
        yield
        return
    fastpath = torch.backends.mha.get_fastpath_enabled()
    _is_on = True
    try:
        with ExitStack() as stack:
            torch.backends.mha.set_fastpath_enabled(False)
            stack.callback(_choose_attention, _choose_attention((False, False, False, True)))
            if "torch._dynamo" in sys.modules:  # nothing is compiled without it
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        _is_on = False
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _choose_attention(backends: tuple[bool, ...]) -> tuple[bool, ...]:
    """Allows flash, memory-efficient, cuDNN and MATH attention or not, and says what was allowed.

    ``torch.nn.attention.sdpa_kernel`` does the same at ten times the cost.
    """
    cuda = torch.backends.cuda
    before = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )
    cuda.enable_flash_sdp(backends[0])
    cuda.enable_mem_efficient_sdp(backends[1])
    cuda.enable_cudnn_sdp(backends[2])
    cuda.enable_math_sdp(backends[3])
    return before


class Kernels:
    """What the modules of a loss need in place of their usual kernels.

    Args:
        module: the modules that the loss may call.
    """

    def __init__(self, module: nn.Module) -> None:
        self._has_rnn = any(isinstance(child, nn.RNNBase) for child in module.modules())
        self._has_weight_norm = any(map(_is_weight_normed, module.modules()))

    def differentiable(self) -> AbstractContextManager[None]:
        """:func:`second_derivatives`, and RNNs without cuDNN, whose kernels have none."""
        if _is_on and not self._has_rnn and not self._has_weight_norm:
            return nullcontext()
        return self._all()

    @contextmanager
    def _all(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(second_derivatives())
            if self._has_rnn:
                stack.enter_context(_without_cudnn())
            if self._has_weight_norm:
                stack.enter_context(_ExactWeightNorm())
            yield


@contextmanager
def _without_cudnn() -> Iterator[None]:
    cudnn = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = cudnn


def _is_weight_normed(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _WeightNorm) or any(isinstance(h, WeightNorm) for h in hooks)


class _ExactWeightNorm(Interception):
    """Writes weight normalization out: torch's fused one has a wrong second derivative."""

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    # torch's norm over all dimensions, dim=-1, has a tangent of another shape
    size = torch.linalg.vector_norm(v) if dim == -1 else torch.norm_except_dim(v, 2, dim)
    return v * (g / size)
