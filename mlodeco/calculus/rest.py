"""A step that was skipped, as an update that moves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mlodeco.calculus.update import Iterate, Update, Values
from mlodeco.tree import Tree


@dataclass(frozen=True)
class Rest:
    """``(w', s') = (w, s)``, whatever the gradient.

    Attributes:
        update: the one that was not made, which knows what is carried in its state.
    """

    update: Update
    reads: ClassVar[tuple[str, ...]] = ()
    clip_norm: ClassVar[None] = None
    rests_at_zero: ClassVar[bool] = True

    @property
    def replicas(self) -> int | None:
        """Of how many replicas iterates are stacked."""
        return self.update.replicas

    @property
    def is_wide(self) -> bool:
        """Whether it may be given numbers in single precision."""
        return self.update.is_wide

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The iterate itself."""
        return before

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The iterate itself, with its graph."""
        return before

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The tensors of a state through which derivatives run."""
        return self.update.carried(state)

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The state with other tensors in their places."""
        return self.update.with_carried(state, carried)
