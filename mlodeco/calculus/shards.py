"""Parameters of which each process holds a part, as something that comes from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor

from mlodeco.calculus.slots import State

K = TypeVar("K")
T = TypeVar("T")


class Shards(Protocol):
    """Passes over a loss at values that are shards, without any process holding the whole.

    Nothing here communicates; what implements this does, and every process must ask for the same.
    """

    def within(self, state: State, call: Callable[[State], T]) -> T:
        """Calls ``call`` with the rest of ``state`` while its shards stand in their places.

        On leaving, also by an error, the shards there before are back bit for bit.
        """

    def gradient(self, output: Tensor, inputs: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """The gradient of a loss that was computed there; that in shards is the processes' mean.

        Inputs that the loss does not depend on are left out.
        """

    def reached(self, output: Tensor, leaves: set[int]) -> set[int]:
        """The identities of leaves of a loss's graph, and of the shards that some stand for."""
