"""What a user's function receives as ``ctx``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlodeco.errors import RunError
from mlodeco.runtime.history import as_number
from mlodeco.runtime.processes import Processes


class Context:
    """Where a run stands, and what a function may tell it.

    Attributes:
        level: the level whose function is called; None in run-wide hooks.
        tick: ticks begun, 1 during the first; 0 outside a run.
        step: the level's own optimizer steps finished.
        epoch: the level's finished passes over its data.
        device: where the level's parameters are.
        generator: random numbers of that device; the same in every pass of one hypergradient.
        is_main: whether this is the main process.
        skipped: whether the step was skipped, since its numbers were not finite.
        accelerator: the run's Accelerator; None outside a run.
        processes: those of the run, of which ``rank`` and ``count`` tell this one's number and
            how many there are.
    """

    def __init__(
        self,
        *,
        level: str | None = None,
        tick: int = 0,
        step: int = 0,
        epoch: int = 0,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
        accelerator: Any = None,
        processes: Processes | None = None,
        muted: bool = False,
    ) -> None:
        self.level = level
        self.tick = tick
        self.step = step
        self.epoch = epoch
        self.device = device or torch.device("cpu")
        self.generator = generator or torch.Generator(device=self.device)
        self.accelerator = accelerator
        self.processes = processes or Processes()
        self.skipped = False
        self.logged: dict[str, Any] = {}
        self.stop_reason: str | None = None
        self._muted = muted

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.processes.is_main

    def log(self, **metrics: Any) -> None:
        """Adds metrics to the step's record. Does nothing in second-order passes."""
        if not self._muted:
            self.logged.update({key: as_number(value) for key, value in metrics.items()})

    def stop(self, reason: str = "ctx.stop() was called") -> None:
        """Ends the run after this tick, in all processes if one of them asks for it.

        Does nothing in second-order passes.

        Raises:
            RunError: the reason is no text.
        """
        if not isinstance(reason, str) or not reason:
            raise RunError(
                f"ctx.stop({reason!r}).",
                expected="a text that says why, for a person.",
                remedy="ctx.stop('good enough'), for instance.",
            )
        if not self._muted:
            self.stop_reason = reason

    def with_own_generator(self) -> Context:
        """The same moment, with a generator that a pass may seed."""
        return Context(
            level=self.level,
            tick=self.tick,
            step=self.step,
            epoch=self.epoch,
            device=self.device,
            accelerator=self.accelerator,
            processes=self.processes,
        )

    def adopt(self, other: Context) -> None:
        """Takes over what a function told another context."""
        self.logged.update(other.logged)
        self.stop_reason = self.stop_reason or other.stop_reason

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, along the first dimension; they have no gradient.

        All processes must call it, with tensors of one shape.
        """
        return self.processes.gather(tensor)
