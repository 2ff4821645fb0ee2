"""Inner loops written out for autograd, and small problems to unroll."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from tests import reference
from tests.handwritten import RULES, Rule, State, clipped, known
from tests.problems import network, randn

Tree = dict[str, Tensor]


class Swapped:
    """A module with other values of parameters, for a level's function."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        self._module, self._values = module, dict(values)

    def __call__(self, *args: Any) -> Any:
        buffers = {name: b.detach().clone() for name, b in self._module.named_buffers()}
        return functional_call(self._module, {**buffers, **self._values}, args)

    def __getattr__(self, name: str) -> Tensor:
        return self._values[name]

    def parameters(self) -> Iterator[Tensor]:
        return iter(self._values.values())


def values_of(module: nn.Module) -> Tree:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def leaves_of(module: nn.Module) -> Tree:
    return {name: p.requires_grad_() for name, p in values_of(module).items()}


@dataclass(frozen=True)
class Plan:
    """The formula of a step, and for each step the options of every parameter's group."""

    rule: Rule
    steps: list[dict[str, dict[str, Any]]]

    def after(self, steps: int) -> Plan:
        return Plan(self.rule, self.steps[steps:])


def plan(
    module: nn.Module,
    optimizer: Callable[..., Any],
    steps: int,
    scheduler: Callable[..., Any] | None = None,
    select: Callable[[str], bool] = lambda name: True,
) -> Plan:
    """What torch's own optimizer and scheduler say on a copy of the module."""
    module = copy.deepcopy(module)
    names = {id(p): name for name, p in module.named_parameters()}
    if "module" in inspect.signature(optimizer).parameters:
        made = optimizer(module=module)
    else:
        made = optimizer([p for name, p in module.named_parameters() if select(name)])
    scheduled = scheduler(made) if scheduler else None
    rule, found = RULES[type(made)], []
    for _ in range(steps):
        found.append(
            {
                names[id(p)]: known(rule, group)
                for group in made.param_groups
                for p in group["params"]
            }
        )
        made.step()
        if scheduled is not None:
            scheduled.step()
    return Plan(rule, found)


def constant(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def roll(
    loss: Callable[[Tree, Any], Tensor],
    start: Mapping[str, Tensor],
    batches: Sequence[Any],
    plan: Plan,
    *,
    clip_norm: float | None = None,
    truncate: int | None = None,
    first_order: bool = False,
    states: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Tree, dict[str, State]]:
    """The parameters after a step on each batch, as a function of what the loss reads.

    Also of the start, if it requires grad. The states at the start are constants.
    """
    free = 0 if truncate is None else max(0, len(batches) - truncate)
    w = dict(start)
    state = {n: {k: constant(v) for k, v in (states or {}).get(n, {}).items()} for n in w}
    for t, batch in enumerate(batches):
        # a clone: the loss may read the start by another way as well
        w = {n: p.clone() if p.requires_grad else p.clone().requires_grad_() for n, p in w.items()}
        found = torch.autograd.grad(
            loss(w, batch), list(w.values()), create_graph=True, allow_unused=True
        )
        grads = {n: g for n, g in zip(w, found, strict=True) if g is not None}
        if first_order:
            grads = {n: g.detach() for n, g in grads.items()}
        for n, g in clipped(grads, clip_norm).items():
            w[n], state[n] = plan.rule(w[n], g, state[n], **plan.steps[t][n])
        if t < free:
            w = {n: constant(p) for n, p in w.items()}
            state = {n: {k: constant(v) for k, v in s.items()} for n, s in state.items()}
    return w, state


def relative(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    assert set(found) == set(wanted)
    one, other = (reference.flat([tree[name] for name in wanted]) for tree in (found, wanted))
    return float((one - other).norm() / other.norm())


def gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> Tree:
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


SAMPLES, FEATURES = 20, 4


def samples(seed: int, count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """Inputs, one of which is always zero, and targets."""
    x = randn(count, FEATURES, seed=seed)
    x[:, 2] = 0.0
    return x, randn(count, seed=seed + 1)


X, Y = samples(1)


def minibatch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    index = (3 * torch.arange(8) + 7 * number) % SAMPLES
    return index, X[index], Y[index]


def weighted(model: Any, batch: Any, top: Any) -> Tensor:
    index, x, y = batch
    losses = (model(x * top.a.exp())[:, 0] - y) ** 2
    return (top.s[index].sigmoid() * losses).mean()


def weighted_by_detached_losses(model: Any, batch: Any, top: Any) -> Tensor:
    """The derivative of its gradient is not symmetric."""
    index, x, y = batch
    losses = (model(x * top.a.exp())[:, 0] - y) ** 2
    return ((top.s[index] + losses.detach()).sigmoid() * losses).mean()


def fit(h: Any, batch: Any, low: Any) -> Tensor:
    x, y = batch
    # unread inputs count as well: their parameters have gradients here and none below
    size = sum((p**2).sum() for p in low.parameters())
    own = sum((p**2).sum() for p in h.parameters())
    return ((low(x)[:, 0] - y) ** 2).mean() + 0.05 * size + 1e-3 * own


class Reweighting:
    """A tanh network trained on samples with learnt weights and on inputs with learnt scales."""

    def __init__(
        self,
        optimizer: Callable[..., Any] | None,
        steps: int,
        *,
        model: nn.Module | None = None,
        low: Callable[..., Tensor] = weighted,
        top: Callable[..., Tensor] = fit,
        scheduler: Callable[..., Any] | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        warmup: int = 0,
        hypergrad: Any = "unroll",
        rate: float = 0.5,
    ) -> None:
        self.low, self.top, self.rate = low, top, rate
        self.optimizer, self.scheduler, self.clip_norm = optimizer, scheduler, clip_norm
        self.steps, self.accumulate, self.warmup = steps, accumulate, warmup
        self.model = network(FEATURES, 5, 1, seed=1) if model is None else model
        self.data = [minibatch(number) for number in range(7)]
        self.top_batch = samples(5, 12)
        self.program = Program()
        self.program.level(
            "low",
            module=self.model,
            optimizer=optimizer,
            scheduler=scheduler,
            clip_norm=clip_norm,
            accumulate=accumulate,
            inner_steps=steps,
            warmup=warmup,
            data=self.data,
            reads={"top": "top"},
        )(low)
        self.program.level(
            "top",
            lower=["low"],
            module={"s": randn(SAMPLES, seed=3), "a": 0.3 * randn(FEATURES, seed=4)},
            optimizer=partial(SGD, lr=rate),
            hypergrad=hypergrad,
            data=[self.top_batch],
            reads={"low": "low"},
        )(top)
        self.hyper = self.program.module("top")

    def stream(self, first: int, count: int) -> list[Any]:
        """What steps ``first`` and on of a run are given."""
        size = self.accumulate
        drawn = [
            [self.data[(size * step + micro) % len(self.data)] for micro in range(size)]
            for step in range(first, first + count)
        ]
        return drawn if size > 1 else [micro for (micro,) in drawn]

    @property
    def batches(self) -> list[Any]:
        """Minibatches for one inner loop, other than those of the data."""
        numbers = range(100, 100 + self.steps * self.accumulate)
        if self.accumulate == 1:
            return [minibatch(n) for n in numbers]
        return [
            [minibatch(n + i) for i in range(self.accumulate)] for n in numbers[:: self.accumulate]
        ]

    def hypergradient(self, hypergrad: Any, **options: Any) -> Tree:
        batches = {"low": self.batches, "top": self.top_batch}
        return mlodeco.hypergradient(
            "top",
            **{"batches": batches, "program": self.program, "hypergrad": hypergrad, **options},
        )

    def loss(self, w: Tree, batch: Any, h: Tree) -> Tensor:
        """The lower level's, with its micro-batches."""
        micros = batch if self.accumulate > 1 else [batch]
        model, hyper = Swapped(self.model, w), Swapped(self.hyper, h)
        return sum(self.low(model, micro, hyper) for micro in micros) / len(micros)

    def value(self, h: Tree, w: Tree) -> Tensor:
        return self.top(Swapped(self.hyper, h), self.top_batch, Swapped(self.model, w))

    def rolled(
        self,
        h: Tree,
        start: Tree,
        batches: Sequence[Any],
        *,
        taken: int = 0,
        **options: Any,
    ) -> tuple[Tree, dict[str, State]]:
        steps = plan(self.model, self.optimizer, taken + len(batches), self.scheduler)
        return roll(
            lambda w, batch: self.loss(w, batch, h),
            start,
            batches,
            steps.after(taken),
            clip_norm=self.clip_norm,
            **options,
        )

    def wanted(self, **options: Any) -> Tree:
        """The hypergradient at the present parameters by autograd through the loop.

        Args:
            **options: ``truncate``, ``first_order``, ``states``, ``taken``.
        """
        h = leaves_of(self.hyper)
        w, _ = self.rolled(h, values_of(self.model), self.batches, **options)
        return gradients(self.value(h, w), h)

    def simulated(self, turns: int, **options: Any) -> tuple[list[Tree], Tree, Tree]:
        """A run from the present parameters: hypergradients, and parameters of both levels."""
        h, w, taken = values_of(self.hyper), values_of(self.model), self.warmup
        w, states = self.rolled(h, w, self.stream(0, taken))
        found = []
        for _ in range(turns):
            h = {n: p.detach().requires_grad_() for n, p in h.items()}
            start = {n: p.detach() for n, p in w.items()}
            w, states = self.rolled(
                h, start, self.stream(taken, self.steps), taken=taken, states=states, **options
            )
            found.append(gradients(self.value(h, w), h))
            h = {n: p - self.rate * found[-1][n] for n, p in h.items()}
            taken += self.steps
        return found, h, w
