"""A bilevel case whose lower level takes K steps between two of the upper: by each side.

The hypergradient is that of the K steps, from where they started.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

import mlodeco
from tests.benchmarks.case import Case, Side
from tests.benchmarks.peers import Pure

Tensors = list[Tensor]
RATE, MOMENTUM = 0.01, 0.9
"""Of ``Case.lower_optimizer``."""


class Graph:
    """Hand-written: K differentiable steps, one graph through all of them.

    Args:
        case: the problem.
        steps: K.
    """

    def __init__(self, case: Case, steps: int) -> None:
        self.case, self.steps = case, steps
        self.own, self.hyper = list(case.lower.parameters()), list(case.upper.parameters())
        self._optimizer = case.upper_optimizer(self.hyper)
        self._momentum = [torch.zeros_like(p) for p in self.own]
        self._lower, self._upper = (
            Pure(case.lower_loss, case, own_first=True),
            Pure(case.upper_loss, case, own_first=False),
        )
        self._batches, self._upper_batches = cycle(case.lower_batches), cycle(case.upper_batches)

    def tick(self) -> None:
        """K lower steps and an upper one; the hypergradient stays in ``.grad``."""
        own, momentum = [p.detach().requires_grad_() for p in self.own], self._momentum
        for _ in range(self.steps):
            loss = self._lower.at(own, self.hyper, next(self._batches))
            grads = torch.autograd.grad(loss, own, create_graph=True)
            momentum = list(torch._foreach_add(torch._foreach_mul(momentum, MOMENTUM), grads))
            own = list(torch._foreach_add(own, momentum, alpha=-RATE))
        loss = self._upper.at(own, self.hyper, next(self._upper_batches))
        gradient = torch.autograd.grad(loss, self.hyper)
        self._momentum = [m.detach() for m in momentum]
        with torch.no_grad():
            torch._foreach_copy_(self.own, own)
        for parameter, grad in zip(self.hyper, gradient, strict=True):
            parameter.grad = grad
        self._optimizer.step()


class Higher:
    """higher: the same graph by its differentiable SGD, whose momentum starts anew at each tick."""

    def __init__(self, case: Case, steps: int) -> None:
        import higher

        self.case, self.steps = case, steps
        self.own, self.hyper = list(case.lower.parameters()), list(case.upper.parameters())
        self._lower_optimizer = case.lower_optimizer(self.own)
        self._optimizer = case.upper_optimizer(self.hyper)
        self._batches, self._upper_batches = cycle(case.lower_batches), cycle(case.upper_batches)
        self._loop = higher.innerloop_ctx

    def tick(self) -> None:
        """K lower steps and an upper one."""
        case = self.case
        with self._loop(case.lower, self._lower_optimizer) as (model, optimizer):
            for _ in range(self.steps):
                optimizer.step(case.lower_loss(model, next(self._batches), case.upper))
            loss = case.upper_loss(case.upper, next(self._upper_batches), model)
            gradient = torch.autograd.grad(loss, self.hyper)
            with torch.no_grad():
                torch._foreach_copy_(self.own, list(model.fast_params))
        for parameter, grad in zip(self.hyper, gradient, strict=True):
            parameter.grad = grad
        self._optimizer.step()


class Library:
    """mlodeco.

    Args:
        case: the problem.
        steps: K.
        options: of ``Unroll``.
    """

    def __init__(self, case: Case, steps: int, **options: object) -> None:
        from mlodeco.hypergrad import Unroll

        self.hyper, self.steps = list(case.upper.parameters()), steps
        program = mlodeco.Program()
        program.level(
            "lower",
            module=case.lower,
            optimizer=case.lower_optimizer,
            data=case.lower_batches,
            inner_steps=steps,
        )(case.lower_loss)
        program.level(
            "upper",
            lower=["lower"],
            hypergrad=Unroll(**options),
            module=case.upper,
            optimizer=case.upper_optimizer,
            data=case.upper_batches,
        )(case.upper_loss)
        self._runner = mlodeco.Runner(program)

    def tick(self) -> None:
        """K lower steps and an upper one."""
        for _ in range(self.steps):
            self._runner.step()


SIDES: dict[str, Callable[[Case, int], Side]] = {
    "loop": Graph,
    "mlodeco": Library,
    "keep_graph": partial(Library, keep_graph=True),
    "higher": Higher,
}


def stored(case: Case, steps: int) -> float:
    """Megabytes of the parameters and momenta before each of the steps."""
    return 2 * steps * sum(4 * p.numel() for p in case.lower.parameters()) / 2**20
