"""Scales of losses in float16, whose small numbers would else be lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs

from mlodeco.errors import NonFiniteError
from mlodeco.runtime.build import BuiltLevel

T = TypeVar("T")

LEAST = 1e-4
"""A scale below it helps nobody: what still overflows is not the gradient."""

_BACKOFF = 1.0 / 16.0
"""The factor by which a single hypergradient looks for its scale."""


class LossScale:
    """The scale of the losses in one level's steps, as ``torch.amp.GradScaler`` moves it.

    It shrinks at a step whose numbers overflowed, which is skipped, and grows after so many steps
    in a row that did not.

    Args:
        level: the level that steps.
        options: where it starts and how it moves.
    """

    def __init__(self, level: BuiltLevel, options: GradScalerKwargs) -> None:
        self._level = level
        self._growth_factor = options.growth_factor
        self._backoff_factor = options.backoff_factor
        self._growth_interval = options.growth_interval
        self._good = 0
        self.value = float(options.init_scale)

    def shrink(self) -> None:
        """Notes that a step overflowed.

        Raises:
            NonFiniteError: there is no smaller scale that would help.
        """
        self._good = 0
        self.value *= self._backoff_factor
        if self.value < LEAST:
            raise NonFiniteError(
                f"the numbers of its steps overflow in fp16 at every scale down to {LEAST}, so "
                "that none is taken any more.",
                expected="losses and derivatives within the range of float16, up to 65504.",
                remedy="look for large numbers or a division by zero in this function, in those "
                "of its lower levels and in their batches; or set precision='bf16'.",
                level=self._level.name,
                site=self._level.site,
            )

    def grow(self) -> None:
        """Notes that a step did not overflow."""
        self._good += 1
        if self._good == self._growth_interval:
            self._good = 0
            larger = self.value * self._growth_factor
            self.value = larger if math.isfinite(larger) else self.value

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: numbers, such as JSON can hold."""
        return {"scale": self.value, "good_steps": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.value, self._good = float(state["scale"]), int(state["good_steps"])


def make_scale(level: BuiltLevel, accelerator: Accelerator) -> LossScale | None:
    """A level's scale by the Accelerator's options; None where they turn it off."""
    given = getattr(accelerator, "scaler_handler", None)
    options = given if given is not None else GradScalerKwargs()
    return LossScale(level, options) if options.enabled else None


def scale_for(level: BuiltLevel, scale: float) -> float:
    """The scale of a level's own loss among others: one unless it is in float16."""
    return scale if level.loss.is_half else 1.0


def at_some_scale(find: Callable[[float], T], *, is_scaled: bool) -> T:
    """What is found at the first scale at which nothing overflows, the largest first.

    Raises:
        NonFiniteError: there is none.
    """
    scale = GradScalerKwargs().init_scale if is_scaled else 1.0
    while True:
        try:
            return find(scale)
        except NonFiniteError:
            scale *= _BACKOFF
            if not is_scaled or scale < LEAST:
                raise
