"""What a run leaves to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """One own optimizer step of a level.

    Attributes:
        tick: the tick, from 1.
        level: the level's name.
        step: its own step, from 1.
        loss: its loss before the step, averaged over micro-batches.
        grad_norm: the norm of its (hyper)gradient before clipping.
        learning_rate: that of the optimizer's first group, at this step; not a number for an
            optimizer without one.
        metrics: what its function returned or logged beside the loss.
        solves: for each linear solve (level, method, steps, residual, status in words).
        cosine: of the angle between the hypergradient and that of the level's last step; near
            one for a steady direction, near zero or below for noise. None for levels without
            lower levels and at the first step.
    """

    tick: int
    level: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    metrics: dict[str, Any] = field(default_factory=dict)
    solves: tuple[tuple[str, str, int, float | None, str], ...] = ()
    cosine: float | None = None


@dataclass(frozen=True)
class ValidationRecord:
    """The metrics of one validation."""

    tick: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Tick:
    """The steps and validations of one tick."""

    tick: int
    steps: tuple[StepRecord, ...]
    validations: tuple[ValidationRecord, ...] = ()


class History:
    """All records of a run, in their order."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []

    def of(self, level: str) -> list[StepRecord]:
        """The steps of one level."""
        return [record for record in self.steps if record.level == level]

    def losses(self, level: str) -> list[float]:
        """The losses of one level."""
        return [record.loss for record in self.of(level)]

    def metric(self, name: str) -> list[float]:
        """The values of one validation metric."""
        return [r.metrics[name] for r in self.validations if name in r.metrics]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps as flat dictionaries, for a table.

        ``solver_steps`` is the sum over the solves of a step, ``residual`` the largest. A metric
        of one's own that has the name of a column stands under ``metric_`` and its name.
        """
        for record in self.steps:
            columns = {
                "tick": record.tick,
                "level": record.level,
                "step": record.step,
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "learning_rate": record.learning_rate,
                "cosine": record.cosine,
                "solver_steps": sum(solve[2] for solve in record.solves),
                "residual": max((s[3] for s in record.solves if s[3] is not None), default=None),
            }
            own = {f"metric_{k}" if k in columns else k: v for k, v in record.metrics.items()}
            yield {**own, **columns}

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        last = {record.level: f"{record.loss:.4g}" for record in self.steps}
        losses = ", ".join(f"{level} {loss}" for level, loss in last.items())
        return (
            f"<History: {len(self.steps)} steps, {len(self.validations)} validations; "
            f"last losses: {losses or 'none'}>"
        )


def as_number(value: Any) -> Any:
    """A tensor of one element as a number, another as a copy; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value.detach().clone()
    return value
