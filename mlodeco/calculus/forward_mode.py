"""Forward-mode differentiation that is off wherever gradients are off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from mlodeco.calculus.interception import Interception


class NoGradStopsTangents(Interception):
    """Makes tangents stop at ``torch.no_grad()``, as gradients do.

    Forward mode by itself ignores ``no_grad`` (it respects ``detach``), so that a
    user's function would silently get another derivative than in reverse mode.
    """

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Calls the function, without tangents where gradients are off."""
        if torch.is_grad_enabled():
            return func(*args, **kwargs)
        with forward_ad._set_fwd_grad_enabled(False):
            return func(*args, **kwargs)
