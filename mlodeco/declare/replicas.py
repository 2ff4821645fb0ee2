"""How many copies of a level are solved together, and how."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex, get_args

from mlodeco.declare.site import locate_call
from mlodeco.errors import DeclarationError, did_you_mean, quoted

MOST = 2**31 - 1
"""How many copies there may be; the sizes of tensors are bounded."""

Way = Literal["auto", "loop", "vmap"]
"""One replica after another, or all in one call of ``torch.vmap``."""


@dataclass(frozen=True)
class Replicas:
    """T independent copies of a level, solved together: the tasks of a meta-batch.

    Every tensor of the level's items has leading dimension T, one slice a copy; numbers without
    dimensions and everything else go to all. Each call of its function sees one copy. A level
    above that reads it is evaluated once for each copy, on that slice of its own items, and its
    loss is the mean. Each copy follows its own gradient, with its own optimizer state, clipping
    and random numbers, and is differentiated by itself.

    The level's module shows the first copy, in hooks and validations too, and keeps its buffers;
    gradients that hooks are given are stacked. What a run has not stepped yet starts from the
    module. An optimizer must step each entry by itself, as those of torch with a
    ``differentiable`` option do. Where the loss of some copies alone depends on a parameter, its
    gradient in the others is zero and not missing, so that momentum and weight decay move it there
    too; a warning says so.

    Args:
        count: T, how many there are.
        way: ``"loop"`` solves one after another, ``"vmap"`` all in one call; ``"auto"`` is the
            loop on a CPU and vmap on a GPU.
        chunk: how many one call of vmap takes, where all at once need too much memory.

    Raises:
        DeclarationError: an argument cannot be right.
    """

    count: int
    way: Way = "auto"
    chunk: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", _number("count", self.count))
        if self.chunk is not None:
            object.__setattr__(self, "chunk", _number("chunk", self.chunk))
        ways = get_args(Way)
        if self.way not in ways:
            hint = did_you_mean(self.way, ways) if isinstance(self.way, str) else ""
            raise _error(
                f"way={self.way!r}.",
                expected=f"one of {quoted(ways)}.",
                remedy=f"choose one of them.{hint}",
            )


def _number(option: str, value: Any) -> int:
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        number = operator.index(value)
        if 1 <= number <= MOST:
            return number
    raise _error(
        f"{option}={value!r}.",
        expected=f"an integer from 1 to {MOST}.",
        remedy=f"set {option} to how many there are, such as {option}=8.",
    )


def _error(found: str, *, expected: str, remedy: str) -> DeclarationError:
    site = locate_call("Replicas")
    return DeclarationError(f"Replicas: {found}", expected=expected, remedy=remedy, site=str(site))
