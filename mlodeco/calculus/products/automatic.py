"""The product mode ``auto``: exact and fast where it can be, and what runs elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products.difference import Difference
from mlodeco.calculus.products.lateness import enters_late
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.products.reverse_over_forward import cross_by_duals
from mlodeco.errors import FallbackWarning
from mlodeco.tree import Tree

T = TypeVar("T")


class Automatic:
    """Hessian products in reverse; cross products by duals if lambda enters late.

    Where an operation has no rule for a mode, the next one is tried, kept for the level
    and named once in a warning. If every mode fails, the first error is raised.
    """

    def __init__(self, problem: LowerProblem) -> None:
        self._problem = problem
        self._decisions = problem.point.decisions

    def touched(self) -> tuple[str, ...]:
        """The own parameters that the loss depends on."""
        modes: dict[str, Callable[[], tuple[str, ...]]] = {
            "reverse": lambda: self._hessian_graph.touched(),
            "difference": lambda: self._difference.touched(),
        }
        return self._hessian_by(modes)

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """``reverse``, else ``difference``."""
        modes: dict[str, Callable[[], Tree]] = {
            "reverse": lambda: self._hessian_graph.hvp(v),
            "difference": lambda: self._difference.hvp(v),
        }
        return self._hessian_by(modes)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """``reverse_over_forward`` where lambda enters late, else ``reverse``, ``difference``.

        Backward hooks of modules act in ``reverse`` alone.
        """
        modes: dict[str, Callable[[], Cross]] = {
            "reverse_over_forward": lambda: cross_by_duals(self._problem, v),
            "reverse": lambda: self._full_graph.cross(v),
            "difference": lambda: self._difference.cross(v),
        }
        start = self._cross_mode
        used, result = self._first_that_runs(modes, start)
        if used != start:
            self._decisions.cross[self._problem.targets] = used
        return result

    def _hessian_by(self, modes: Mapping[str, Callable[[], T]]) -> T:
        start = self._decisions.hessian or "reverse"
        used, result = self._first_that_runs(modes, start)
        if used != start:
            self._decisions.hessian = used
        return result

    @property
    def _cross_mode(self) -> str:
        targets = self._problem.targets
        if targets in self._decisions.cross:
            return self._decisions.cross[targets]
        if self._decisions.hessian == "difference":
            return "difference"
        if self._problem.point.loss.has_backward_hooks:
            return "reverse"
        if targets not in self._decisions.late:
            self._decisions.late[targets] = enters_late(self._problem)
        return "reverse_over_forward" if self._decisions.late[targets] else "reverse"

    @cached_property
    def _full_graph(self) -> Reverse:
        return Reverse(self._problem)

    @cached_property
    def _hessian_graph(self) -> Reverse:
        if self._cross_mode == "reverse":
            return self._full_graph
        return Reverse(self._problem, with_targets=False)

    @cached_property
    def _difference(self) -> Difference:
        return Difference(self._problem)

    def _first_that_runs(self, modes: Mapping[str, Callable[[], T]], start: str) -> tuple[str, T]:
        names = list(modes)
        first: RuntimeError | None = None
        for name in names[names.index(start) :]:
            try:
                result = modes[name]()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                first = first or error
                if name == "reverse_over_forward":
                    self._decisions.cross[self._problem.targets] = "reverse"
                continue
            if first is not None:
                self._say(start, name, first)
            return name, result
        self._decisions.cross.pop(self._problem.targets, None)
        raise first if first is not None else RuntimeError("no product mode")

    def _say(self, wanted: str, used: str, error: RuntimeError) -> None:
        loss = self._problem.point.loss
        note = (
            " A difference sees through detach() and no_grad(), and its error grows in low "
            "precision."
            if used == "difference"
            else ""
        )
        warnings.warn(
            f"level {loss.level!r} ({loss.site}): the product {wanted!r} has no rule for "
            f"{_operation(error)}; {used!r} is used instead.{note}",
            FallbackWarning,
            stacklevel=2,
        )


_PATTERNS = (
    r"derivative for (\S+) is not implemented",
    r"forward AD with (\S+) that does not support",
    r"jvp for (\S+)",
)


def _operation(error: RuntimeError) -> str:
    """The operation that an autograd error names, else the first line of the error."""
    text = str(error)
    for pattern in _PATTERNS:
        match = re.search(pattern, text)
        if match:
            return match.group(1).strip("'\",.")
    return f"an operation ({text.splitlines()[0][:120]})" if text else "an operation"
