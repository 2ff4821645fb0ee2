"""What every side is given: one bilevel problem, written once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch, nn.Module], Tensor]


@dataclass(frozen=True)
class Case:
    """Two levels at their start.

    Attributes:
        lower: the module with the lower parameters w.
        upper: the module with the upper parameters, lambda.
        lower_loss: of (lower, batch, upper).
        upper_loss: of (upper, batch, lower).
        lower_batches: used in turn, without end.
        upper_batches: likewise.
        damping: for conjugate gradients: large enough against negative curvature, and small
            enough that they use all their steps.
    """

    lower: nn.Module
    upper: nn.Module
    lower_loss: Loss
    upper_loss: Loss
    lower_batches: list[Batch]
    upper_batches: list[Batch]
    damping: float

    def to(self, where: torch.device | torch.dtype) -> None:
        """Moves all of it to a device, or its floating point numbers to a dtype; in place."""
        self.lower.to(where)
        self.upper.to(where)
        for batches in (self.lower_batches, self.upper_batches):
            batches[:] = [(_moved(x, where), _moved(y, where)) for x, y in batches]

    def lower_optimizer(self, parameters: Any) -> Optimizer:
        """The same on every side."""
        return SGD(parameters, lr=0.01, momentum=0.9)

    def upper_optimizer(self, parameters: Any) -> Optimizer:
        """The same on every side."""
        return Adam(parameters, lr=1e-4)


def _moved(tensor: Tensor, where: torch.device | torch.dtype) -> Tensor:
    stays = isinstance(where, torch.dtype) and not tensor.is_floating_point()
    return tensor if stays else tensor.to(where)


class Side(Protocol):
    """One way to run a case."""

    def tick(self) -> None:
        """A lower step, then an upper step; the hypergradient stays in ``.grad``."""


class Ticks:
    """Base of the sides that are loops of their own: draws batches and steps optimizers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.own = list(case.lower.parameters())
        self.hyper = list(case.upper.parameters())
        self.lower_optimizer = case.lower_optimizer(self.own)
        self.upper_optimizer = case.upper_optimizer(self.hyper)
        self._lower_batches = cycle(case.lower_batches)
        self._upper_batches = cycle(case.upper_batches)

    def tick(self) -> None:
        """A lower step, then an upper step at the lower level's new parameters."""
        self.lower_batch = next(self._lower_batches)
        for parameter, grad in zip(self.own, self.lower_gradient(), strict=True):
            parameter.grad = grad
        self.lower_optimizer.step()
        self.upper_batch = next(self._upper_batches)
        for parameter, grad in zip(self.hyper, self.hypergradient(), strict=True):
            parameter.grad = grad
        self.upper_optimizer.step()

    def lower_gradient(self) -> list[Tensor]:
        """The gradient of the lower loss in its own parameters."""
        raise NotImplementedError

    def hypergradient(self) -> list[Tensor]:
        """The total derivative of the upper loss in lambda."""
        raise NotImplementedError
