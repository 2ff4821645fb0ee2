"""The ordinary passes of a level that sees sharded modules: FSDP averages gradients itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlodeco.runtime.fsdp import explained, leaves, rest
from mlodeco.runtime.overlap import Passes
from mlodeco.runtime.sharding import plain_part, require_plain


class ShardedPasses(Passes):
    """Passes through FSDP's own forward and backward, which leave all modules at rest."""

    def call(self, items: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The loss and its metrics."""
        rest(self._level.loss.module)
        with explained():
            return super().call(items)

    def backward(self, loss: Tensor) -> None:
        """Adds to ``.grad``; FSDP takes what reaches whole parameters to the shards, averaged."""
        level = self._level
        require_plain(loss, level.loss)
        inputs = [*plain_part(level.parameters).values()]
        torch.autograd.backward(loss, inputs=[*inputs, *leaves(level.module)])
        rest(level.loss.module)
