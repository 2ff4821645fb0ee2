"""Forward-mode differentiation that is off wherever gradients are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


class NoGradStopsTangents(TorchFunctionMode):
    """Makes tangents stop at ``torch.no_grad()``, as gradients do.

    Forward mode by itself ignores ``no_grad`` (it respects ``detach``), so that a
    user's function would silently get another derivative than in reverse mode.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **(kwargs or {}))
