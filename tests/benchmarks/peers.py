"""Other libraries, one small adapter each; whichever cannot be imported is left out.

An adapter takes a case and the name of a method, and is a side. One that has no such method
raises ``UnsupportedError``. All have the constants of ``methods.py`` where their options allow it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.benchmarks.case import Batch, Case, Loss, Side, Ticks
from tests.benchmarks.loop import radius
from tests.benchmarks.methods import CG_STEPS, STEP, TERMS

Tensors = list[Tensor]


class UnsupportedError(Exception):
    """The library has no such method."""


class Pure(nn.Module):
    """A loss as a function of lists of parameters."""

    def __init__(self, loss: Loss, case: Case, *, own_first: bool) -> None:
        super().__init__()
        self.lower, self.upper = case.lower, case.upper
        self._loss, self._own_first = loss, own_first
        self._names = [f"lower.{name}" for name, _ in case.lower.named_parameters()]
        self._names += [f"upper.{name}" for name, _ in case.upper.named_parameters()]

    def forward(self, batch: Batch) -> Tensor:
        first, second = (self.lower, self.upper) if self._own_first else (self.upper, self.lower)
        return self._loss(first, batch, second)

    def at(self, own: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        """The loss at given parameters."""
        values = dict(zip(self._names, [*own, *hyper], strict=True))
        return functional_call(self, values, (batch,))


class _Functional(Ticks):
    """Base of the libraries whose losses are functions of parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.lower_loss = Pure(case.lower_loss, case, own_first=True)
        self.upper_loss = Pure(case.upper_loss, case, own_first=False)

    def lower_gradient(self) -> Tensors:
        loss = self.case.lower_loss(self.case.lower, self.lower_batch, self.case.upper)
        return list(torch.autograd.grad(loss, self.own))


class Betty(Ticks):
    """betty-ml (Choe et al. 2023); its CG has no damping."""

    def __init__(self, case: Case, method: str) -> None:
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.problems import ImplicitProblem

        super().__init__(case)
        options = {
            "finite_difference": {"type": "darts", "darts_alpha": radius(self.own)},
            "neumann": {
                "type": "neumann",
                "neumann_iterations": TERMS - 1,
                "neumann_alpha": STEP,
            },
            "cg": {"type": "cg", "cg_iterations": CG_STEPS},
        }.get(method)
        if options is None:
            raise UnsupportedError

        class Lower(ImplicitProblem):
            def training_step(self, batch: Batch) -> Tensor:
                return case.lower_loss(self.module, batch, self.upper.module)

        class Upper(ImplicitProblem):
            def training_step(self, batch: Batch) -> Tensor:
                return case.upper_loss(self.module, batch, self.lower.module)

            def zero_grad(self) -> None:
                self.last = [p.grad for p in self.module.parameters()]
                super().zero_grad()

        lower = Lower(
            "lower",
            Config(**options, retain_graph=True),
            case.lower,
            self.lower_optimizer,
            train_data_loader=case.lower_batches,
        )
        self._upper = upper = Upper(
            "upper",
            Config(retain_graph=True),
            case.upper,
            self.upper_optimizer,
            train_data_loader=case.upper_batches,
        )
        edges = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
        self._engine = Engine([upper, lower], EngineConfig(), edges)
        self._engine.train()

    def tick(self) -> None:
        for parameter in self.hyper:
            parameter.grad = None
        self._engine.global_step += 1
        self._engine.train_step()
        for parameter, grad in zip(self.hyper, self._upper.last, strict=True):
            parameter.grad = grad


class Hypertorch(_Functional):
    """hypertorch (Grazzi et al. 2020), imported as ``hypergrad``."""

    def __init__(self, case: Case, method: str) -> None:
        import hypergrad

        super().__init__(case)
        self._step, self._damping = STEP, 0.0
        if method == "identity":  # the first term of the series
            self._solve, self._count, self._step = hypergrad.neumann, 0, 1.0
        elif method == "neumann":
            self._solve, self._count = hypergrad.neumann, TERMS - 1
        elif method == "cg":
            self._solve, self._count, self._damping = hypergrad.CG, CG_STEPS, case.damping
        else:
            raise UnsupportedError

    def _map(self, own: Tensors, hyper: Tensors) -> Tensors:
        """One step of gradient descent, whose fixed point is the lower solution."""
        loss = self.lower_loss.at(own, hyper, self.lower_batch)
        grads = torch.autograd.grad(loss, own, create_graph=True)
        if self._damping:
            grads = [g + self._damping * w for g, w in zip(grads, own, strict=True)]
        return [w - self._step * g for w, g in zip(own, grads, strict=True)]

    def hypergradient(self) -> Tensors:
        return self._solve(
            self.own,
            self.hyper,
            self._count,
            self._map,
            lambda own, hyper: self.upper_loss.at(own, hyper, self.upper_batch),
            set_grad=False,
        )


class TorchOpt(_Functional):
    """TorchOpt's ``custom_root``."""

    def __init__(self, case: Case, method: str) -> None:
        import torchopt

        super().__init__(case)
        solvers = {
            "identity": lambda: lambda _, b: b,
            "neumann": lambda: torchopt.linear_solve.solve_inv(
                ns=True, maxiter=TERMS - 1, alpha=STEP
            ),
            "cg": lambda: torchopt.linear_solve.solve_cg(
                maxiter=CG_STEPS, rtol=0.0, atol=0.0, ridge=case.damping
            ),
        }
        if method not in solvers:
            raise UnsupportedError

        def stationarity(own: Any, hyper: Any, batch: Batch) -> Any:
            def loss(own: Any) -> Tensor:
                return self.lower_loss.at(list(own), list(hyper), batch)

            return torch.func.grad(loss)(own)

        root = torchopt.diff.implicit.custom_root(stationarity, 1, solve=solvers[method]())
        self._solution = root(lambda own, hyper, batch: own)

    def hypergradient(self) -> Tensors:
        own = self._solution(
            tuple(p.detach() for p in self.own), tuple(self.hyper), self.lower_batch
        )
        loss = self.upper_loss.at(list(own), self.hyper, self.upper_batch)
        return list(torch.autograd.grad(loss, self.hyper))


class Higher(Ticks):
    """higher: the lower step is unrolled, so this is the derivative through one SGD step."""

    def __init__(self, case: Case, method: str) -> None:
        import higher

        super().__init__(case)
        if method != "identity":
            raise UnsupportedError
        self._loop = higher.innerloop_ctx

    def tick(self) -> None:
        case = self.case
        self.lower_batch, self.upper_batch = next(self._lower_batches), next(self._upper_batches)
        with self._loop(case.lower, self.lower_optimizer) as (model, optimizer):
            optimizer.step(case.lower_loss(model, self.lower_batch, case.upper))
            loss = case.upper_loss(case.upper, self.upper_batch, model)
            found = torch.autograd.grad(loss, self.hyper)
            with torch.no_grad():
                for parameter, value in zip(self.own, model.fast_params, strict=True):
                    parameter.copy_(value)
        for parameter, grad in zip(self.hyper, found, strict=True):
            parameter.grad = grad
        self.upper_optimizer.step()


PEERS: dict[str, Callable[[Case, str], Side]] = {
    "betty": Betty,
    "hypertorch": Hypertorch,
    "torchopt": TorchOpt,
    "higher": Higher,
}
