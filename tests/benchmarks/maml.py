"""Few-shot learning: an initialization learned through five steps, by each side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam

import mlodeco
from mlodeco.hypergrad import CG
from tests.benchmarks.case import Side
from tests.benchmarks.loop import dot

Task = dict[str, Tensor]
Tensors = list[Tensor]

STEPS, RATE, META_RATE = 5, 0.1, 1e-3
"""At greater rates float32 sides drift apart on noise."""
PULL, CG_STEPS = 2.0, 5
"""iMAML: the coefficient of the distance from the initialization, and steps of the solver."""


@dataclass(frozen=True)
class Few:
    """The problem at its start.

    Attributes:
        network: a factory; each call gives the same weights.
        tasks: used in turn, without end; every tensor's first dimension is that of the tasks.
        implicit: iMAML in place of MAML.
    """

    network: Callable[[], nn.Module]
    tasks: list[Task]
    implicit: bool

    @property
    def count(self) -> int:
        """Of tasks at a time."""
        return len(self.tasks[0]["x"])


def conv4(ways: int = 5, width: int = 64, *, double: bool = False) -> nn.Module:
    """Four blocks of convolution, BatchNorm by the batch at hand, ReLU and pooling."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before in (1, width, width, width):
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        layers += [nn.Conv2d(before, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, ways))
    return model.double() if double else model


def few(method: str, *, tiny: bool = False, double: bool = False) -> Few:
    """5 ways, 1 shot, 4 tasks at a time, as noise of Omniglot's shape.

    Args:
        method: ``"maml"`` or ``"imaml"``, with one query a class as in Finn's code for Omniglot, or
            ``"maml15"`` with 15 as is usual elsewhere.
        tiny: two queries in all, and two tasks.
        double: in float64.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if double else torch.float32
    count, queries = (2, 2) if tiny else (4, 75 if method == "maml15" else 5)

    def task() -> Task:
        return {
            "x": torch.randn(count, 5, 1, 28, 28, generator=generator, dtype=dtype),
            "y": torch.arange(5).expand(count, 5).contiguous(),
            "query_x": torch.randn(count, queries, 1, 28, 28, generator=generator, dtype=dtype),
            "query_y": (torch.arange(queries) % 5).expand(count, queries).contiguous(),
        }

    return Few(partial(conv4, double=double), [task() for _ in range(4)], method == "imaml")


def support_loss(model: nn.Module, task: Task) -> Tensor:
    """What the inner steps minimize, without the quadratic term."""
    return F.cross_entropy(model(task["x"]), task["y"])


def query_loss(model: nn.Module, task: Task) -> Tensor:
    """What the initialization minimizes."""
    return F.cross_entropy(model(task["query_x"]), task["query_y"])


def slices(task: Task, count: int) -> list[Task]:
    """The single tasks."""
    return [{key: value[index] for key, value in task.items()} for index in range(count)]


class Steps:
    """Base of the sides that are loops of their own, one task after the other.

    Attributes:
        loss: of the queries at the last tick, before the initialization's step.
    """

    def __init__(self, case: Few) -> None:
        self.case = case
        self.model = case.network()
        self.init = list(self.model.parameters())
        self.optimizer = Adam(self.init, lr=META_RATE)
        self.loss = 0.0
        self._tasks = cycle(case.tasks)

    def tick(self) -> None:
        """A step of the initialization; its gradient stays in ``.grad``."""
        self.optimizer.zero_grad()
        self.loss = 0.0
        for task in slices(next(self._tasks), self.case.count):
            loss, gradient = self.one(task)
            self.loss += loss / self.case.count
            for parameter, part in zip(self.init, gradient, strict=True):
                part = part / self.case.count
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)
        self.optimizer.step()

    def one(self, task: Task) -> tuple[float, Tensors]:
        """The loss of one task and its derivative in the initialization."""
        raise NotImplementedError


class _Call(nn.Module):
    """A loss of a network at given parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._names = [f"model.{name}" for name, _ in model.named_parameters()]

    def forward(self, loss: Callable[[nn.Module, Task], Tensor], task: Task) -> Tensor:
        return loss(self.model, task)

    def at(self, parameters: Any, loss: Callable[[nn.Module, Task], Tensor], task: Task) -> Tensor:
        values = dict(zip(self._names, parameters, strict=True))
        return functional_call(self, values, (loss, task))


class Loop(Steps):
    """Hand-written: ``create_graph`` through five steps, or CG on one graph of the gradient."""

    def __init__(self, case: Few) -> None:
        super().__init__(case)
        self._call = _Call(self.model)

    def one(self, task: Task) -> tuple[float, Tensors]:
        return self._implicit(task) if self.case.implicit else self._explicit(task)

    def _explicit(self, task: Task) -> tuple[float, Tensors]:
        own: Tensors = self.init
        for _ in range(STEPS):
            loss = self._call.at(own, support_loss, task)
            grads = torch.autograd.grad(loss, own, create_graph=True)
            own = list(torch._foreach_add(own, grads, alpha=-RATE))
        loss = self._call.at(own, query_loss, task)
        return loss.item(), list(torch.autograd.grad(loss, self.init))

    def _implicit(self, task: Task) -> tuple[float, Tensors]:
        start = [p.detach() for p in self.init]
        own = [p.clone().requires_grad_() for p in start]
        for _ in range(STEPS):
            grads = self._gradient(own, start, task, create_graph=False)
            own = [w.requires_grad_() for w in torch._foreach_add(_plain(own), grads, alpha=-RATE)]
        loss = self._call.at(own, query_loss, task)
        b = list(torch.autograd.grad(loss, own))
        graph = self._gradient(own, start, task, create_graph=True)
        v = [torch.zeros_like(part) for part in b]
        residual = direction = b
        squared = dot(b, b)
        for _ in range(CG_STEPS):
            product = torch.autograd.grad(graph, own, direction, retain_graph=True)
            curvature = dot(direction, list(product))
            if curvature <= 0.0:
                break
            length = squared / curvature
            v = torch._foreach_add(v, direction, alpha=length)
            residual = torch._foreach_add(residual, product, alpha=-length)
            previous, squared = squared, dot(residual, residual)
            direction = torch._foreach_add(residual, direction, alpha=squared / previous)
        return loss.item(), list(torch._foreach_mul(v, PULL))  # the cross product is -PULL

    def _gradient(self, own: Tensors, start: Tensors, task: Task, *, create_graph: bool) -> Tensors:
        loss = self._call.at(own, support_loss, task) + pull(own, start)
        return list(torch.autograd.grad(loss, own, create_graph=create_graph))


def _plain(tensors: Tensors) -> Tensors:
    return [tensor.detach() for tensor in tensors]


def pull(own: Any, start: Any) -> Tensor:
    """The quadratic term of iMAML."""
    return PULL / 2 * sum((w - w0).square().sum() for w, w0 in zip(own, start, strict=True))


class Higher(Steps):
    """higher's differentiable SGD; it has no implicit derivatives."""

    def __init__(self, case: Few) -> None:
        import higher

        super().__init__(case)
        if case.implicit:
            raise NotImplementedError
        self._loop = higher.innerloop_ctx

    def one(self, task: Task) -> tuple[float, Tensors]:
        inner = SGD(self.init, lr=RATE)
        with self._loop(self.model, inner, copy_initial_weights=False) as (model, optimizer):
            for _ in range(STEPS):
                optimizer.step(support_loss(model, task))
            loss = query_loss(model, task)
            return loss.item(), list(torch.autograd.grad(loss, self.init))


class TorchOpt(Steps):
    """TorchOpt's ``MetaSGD``, and its ``custom_root`` with ``solve_cg``."""

    def __init__(self, case: Few) -> None:
        import torchopt

        super().__init__(case)
        self._torchopt = torchopt
        self._call = _Call(self.model)
        solve = torchopt.linear_solve.solve_cg(maxiter=CG_STEPS, rtol=0.0, atol=0.0)
        root = torchopt.diff.implicit.custom_root(self._stationarity, 1, solve=solve)
        self._solved = root(self._inner)

    def one(self, task: Task) -> tuple[float, Tensors]:
        if self.case.implicit:
            start = tuple(p.detach() for p in self.init)
            own = self._solved(start, tuple(self.init), task)
            loss = self._call.at(own, query_loss, task)
            return loss.item(), list(torch.autograd.grad(loss, self.init))
        start = self._torchopt.extract_state_dict(self.model, by="reference")
        optimizer = self._torchopt.MetaSGD(self.model, lr=RATE)
        for _ in range(STEPS):
            optimizer.step(support_loss(self.model, task))
        loss = query_loss(self.model, task)
        gradient = list(torch.autograd.grad(loss, self.init))
        self._torchopt.recover_state_dict(self.model, start)
        return loss.item(), gradient

    def _objective(self, own: Any, start: Any, task: Task) -> Tensor:
        return self._call.at(own, support_loss, task) + pull(own, start)

    def _stationarity(self, own: Any, start: Any, task: Task) -> Any:
        return torch.func.grad(self._objective)(own, start, task)

    def _inner(self, own: Any, start: Any, task: Task) -> Any:
        start = tuple(p.detach() for p in start)
        for _ in range(STEPS):
            own = tuple(p.detach().requires_grad_() for p in own)
            with torch.enable_grad():
                grads = torch.autograd.grad(self._objective(own, start, task), own)
            own = tuple(torch._foreach_add(_plain(list(own)), grads, alpha=-RATE))
        return own


class Library:
    """mlodeco.

    Args:
        case: the problem.
        keep_graph: the option of ``Unroll``.
    """

    def __init__(self, case: Few, *, keep_graph: bool = False) -> None:
        self.program = declare(case, case.tasks, keep_graph=keep_graph)
        self._runner = mlodeco.Runner(self.program)
        self.init = list(self.program.module("init").parameters())

    def tick(self) -> None:
        """A step of the initialization."""
        for _ in range(STEPS):
            self._runner.step()

    @property
    def loss(self) -> float:
        """Of the queries at the last step."""
        steps = self._runner.history.steps
        return float(next(step.loss for step in reversed(steps) if step.level == "init"))


def declare(case: Few, tasks: list[Task], *, keep_graph: bool = False) -> mlodeco.Program:
    """The problem as a program."""
    from mlodeco.hypergrad import Unroll

    program = mlodeco.Program()

    @program.source("task", refresh="loop")
    def task() -> Iterator[Task]:
        yield from cycle(tasks)

    def adapt(model: nn.Module, task: Task) -> Tensor:
        return support_loss(model, task)

    def adapt_nearby(model: nn.Module, init: nn.Module, task: Task) -> Tensor:
        return support_loss(model, task) + pull(model.parameters(), init.parameters())

    program.level(
        "weights",
        module=case.network,
        init_from="init",
        optimizer=partial(SGD, lr=RATE),
        inner_steps=STEPS,
        replicas=case.count,
    )(adapt_nearby if case.implicit else adapt)

    @program.level(
        "init",
        lower=["weights"],
        hypergrad=CG(max_steps=CG_STEPS, rtol=0.0)
        if case.implicit
        else Unroll(keep_graph=keep_graph),
        module=case.network,
        optimizer=partial(Adam, lr=META_RATE),
    )
    def meta(model: nn.Module, weights: nn.Module, task: Task) -> Tensor:
        return query_loss(weights, task)

    return program


SIDES: dict[str, Callable[[Few], Side]] = {
    "loop": Loop,
    "mlodeco": Library,
    "keep_graph": partial(Library, keep_graph=True),
    "higher": Higher,
    "torchopt": TorchOpt,
}
