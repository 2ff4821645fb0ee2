"""The signature that all product modes share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mlodeco.tree import Tree

Cross = dict[str, Tree]
"""For each target level, a tree shaped like its parameters; missing keys are zero."""


class Curvature(Protocol):
    """Products with the second derivatives of one loss at one point."""

    def touched(self) -> tuple[str, ...]:
        """The level's own parameters that its loss depends on."""

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """``(dg/dw)^T v``, shaped like the touched parameters."""

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """``(dg/dlambda)^T v`` for each target."""


class Linearization(Protocol):
    """The gradient at one point, and its derivative in one direction."""

    def gradient(self) -> Tree:
        """``g``, without a graph; parameters that no loss touches are left out."""

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """``(dg/dw)^T v`` and ``(dg/dlambda)^T v`` for each target, in one pass; asked once.

        Args:
            v: the direction.
            own: whether the first is wanted; else it is empty.
        """
