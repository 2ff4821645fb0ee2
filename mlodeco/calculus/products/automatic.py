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
    and named once in a warning. Other errors are raised and change nothing for later; if every
    mode fails, the first error is.
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
        if self._cross_mode != "reverse":
            # other modes have no use for the graph of Hessian products
            vars(self).pop("_hessian_graph", None)
        modes: dict[str, Callable[[], Cross]] = {
            "reverse_over_forward": lambda: cross_by_duals(self._problem, v),
            "reverse": lambda: self._full_graph.cross(v),
            "difference": lambda: self._difference.cross(v),
        }

        def keep(mode: str) -> None:
            self._decisions.cross[self._problem.targets] = mode

        return self._first_that_runs(modes, self._cross_mode, keep)

    def gradient(self) -> Tree:
        """``reverse``, else ``difference``."""
        modes: dict[str, Callable[[], Tree]] = {
            "reverse": lambda: self._full_graph.gradient(),
            "difference": lambda: self._difference.gradient(),
        }
        return self._hessian_by(modes)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """``reverse``, else ``difference``."""
        modes: dict[str, Callable[[], tuple[Tree, Cross]]] = {
            "reverse": lambda: self._full_graph.pull_back(v, own=own),
            "difference": lambda: self._difference.pull_back(v, own=own),
        }
        return self._hessian_by(modes)

    def _hessian_by(self, modes: Mapping[str, Callable[[], T]]) -> T:
        def keep(mode: str) -> None:
            self._decisions.hessian = mode

        return self._first_that_runs(modes, self._decisions.hessian or "reverse", keep)

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

    def _first_that_runs(
        self, modes: Mapping[str, Callable[[], T]], start: str, keep: Callable[[str], None]
    ) -> T:
        """The product in the first mode from ``start`` on that runs.

        Any error in ``reverse_over_forward`` leads to ``reverse``, which is as exact; only a
        missing derivative rule leads on from there, and only that is kept.
        """
        names = list(modes)
        errors: list[RuntimeError] = []
        for name in names[names.index(start) :]:
            try:
                result = modes[name]()
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                errors.append(error)
                if name == "reverse_over_forward" or lacks_rule(error):
                    continue
                break
            if errors:
                self._say(start, name, errors[0])
                if all(map(lacks_rule, errors)):
                    keep(name)
            return result
        raise errors[0]

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


_NO_RULE = re.compile(
    r"is not implemented|not been implemented|forward AD\b|forward[- ]mode\b|forward gradient|jvp"
    r"|double backward|once_differentiable|differentiable twice|second derivative",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE
)


def lacks_rule(error: RuntimeError) -> bool:
    """Whether autograd says that an operation cannot be differentiated in this way."""
    return isinstance(error, NotImplementedError) or _NO_RULE.search(str(error)) is not None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory ran out, which another mode would hardly mend."""
    return isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)) is not None


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
