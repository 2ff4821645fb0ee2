"""One update of a level's parameters as a differentiable function, and its derivatives.

``(w', s') = U(w, g, s; mu)``: parameters w, gradient g, state s (moments), and parameters mu of
other levels where the update itself reads them (tuned or learned updates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlodeco.tree import Tree

Values = Mapping[str, Tree]
"""The parameters of levels, by their names."""


@dataclass(frozen=True)
class Iterate:
    """Where a level stands between two updates: its parameters and what its update carries on."""

    parameters: Tree
    state: Mapping[str, Any]


class Update(Protocol):
    """How a level's parameters follow from its gradient."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels whose parameters enter the update itself."""

    @property
    def clip_norm(self) -> float | None:
        """The largest norm of the gradient; None for no clipping."""

    @property
    def replicas(self) -> int | None:
        """Of how many replicas iterates are stacked, each clipped by itself; None for none."""

    @property
    def rests_at_zero(self) -> bool:
        """Whether a gradient of zero is to it the same as none."""

    @property
    def is_wide(self) -> bool:
        """Whether it may be given numbers in single precision where parameters are in half."""

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The update as a run makes it, clipping included, on copies and without a graph."""

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The update behind clipping, as a differentiable function of all its arguments."""

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The tensors of a state through which derivatives run, under names of its own."""

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The state with other tensors in their places."""


@dataclass(frozen=True)
class Cotangent:
    """The derivative of the upper loss in an iterate: in w, and in the carried state."""

    parameters: Tree
    state: Tree = field(default_factory=dict)


SEPARATOR = "\n"
"""Between a parameter's name and that of a part of its state; no name has one."""


@dataclass(frozen=True)
class Pulled:
    """A cotangent before an update: that of its iterate, of its gradient and of what it reads."""

    before: Cotangent
    gradients: Tree
    reads: dict[str, Tree]


@dataclass(frozen=True)
class Tangent:
    """A direction before an update: of its iterate, of its gradient and of what it reads."""

    parameters: Tree
    state: Tree
    gradients: Tree
    reads: dict[str, Tree]
