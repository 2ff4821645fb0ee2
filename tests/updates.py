"""Update rules and tuned options with the loops that they make, written out for autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from tests.handwritten import clipped
from tests.problems import network, randn, spd
from tests.unrolling import Swapped, Tree, gradients, leaves_of, values_of

SIZES = {"w": 4, "b": 2}
CURVATURE = spd(6, 1)
DATA = [randn(6, seed=100 + t) for t in range(7)]
TOP_BATCH = randn(6, seed=50)
RATE = 1e-3

Rule = Callable[..., tuple[Mapping[str, Any], Mapping[str, Any]]]


def vector(model: Any) -> Tensor:
    return torch.cat([model.w, model.b])


def plain(low: Any, batch: Any) -> Tensor:
    """Does not read the upper level; its third parameter has no gradient."""
    moved = vector(low) - batch
    moved = torch.cat([moved[:2], moved[3:]])
    curvature = CURVATURE[[0, 1, 3, 4, 5]][:, [0, 1, 3, 4, 5]]
    return moved @ curvature @ moved / 2 + 0.1 * (moved**4).sum()


def judged(top: Any, batch: Any, low: Any) -> Tensor:
    own = sum((p**2).sum() for p in top.parameters())
    return ((vector(low) - batch) ** 2).sum() + 1e-2 * own


# rules; each reads the level "top"


def sgd(params, grads, state, top):
    return {k: p - top.log_lr.exp() * grads[k] for k, p in params.items()}, {}


def momentum(params, grads, state, top):
    rate, beta = top.log_lr.exp(), top.logit.sigmoid()
    moved, kept = {}, {}
    for k, p in params.items():
        kept[k] = beta * state[k] + grads[k] if k in state else grads[k]
        moved[k] = p - rate * kept[k]
    return moved, kept


def counted(params, grads, state, top):
    """A nested state with a number in it, and corrected means as in Adam."""
    n, means = state.get("n", 0) + 1, state.get("a", {})
    beta = top.logit.sigmoid()
    means = {k: beta * means.get(k, torch.zeros_like(g)) + (1 - beta) * g for k, g in grads.items()}
    rate = top.log_lr.exp() / (1 - beta**n)
    return {k: p - rate * means[k] for k, p in params.items()}, {"a": means, "n": n}


def preconditioned(params, grads, state, top):
    g = torch.cat([grads["w"], grads["b"]])
    step = 0.05 * g + top.factor * (top.factor @ g)
    return {"w": params["w"] - step[:4], "b": params["b"] - step[4:]}, {}


def learned(params, grads, state, top):
    """A small network that reads gradients and their mean."""
    moved, kept = {}, {}
    for k, p in params.items():
        kept[k] = 0.5 * state.get(k, torch.zeros_like(p)) + grads[k]
        moved[k] = p - 0.1 * top(torch.stack([grads[k], kept[k]], 1))[:, 0]
    return moved, kept


def in_place(params, grads, state, top):
    for k in params:
        state.setdefault(k, torch.zeros_like(params[k]))
        state[k].mul_(0.5).add_(grads[k].mul_(top.log_lr.exp()))
        params[k].sub_(state[k])
        grads[k].zero_()
    return params, state


def scalars() -> dict[str, Tensor]:
    return {"log_lr": torch.tensor(-2.0), "logit": torch.tensor(0.3)}


RULES: dict[str, tuple[Rule, Callable[[], Any]]] = {
    "sgd": (sgd, scalars),
    "momentum": (momentum, scalars),
    "counted": (counted, scalars),
    "preconditioned": (preconditioned, lambda: {"factor": 0.1 * randn(6, seed=4)}),
    "learned": (learned, lambda: network(2, 3, 1, seed=5)),
    "in_place": (in_place, scalars),
}


def dense(grads: Mapping[str, Tensor | None], like: Tree) -> Tree:
    return {k: torch.zeros_like(like[k]) if g is None else g for k, g in grads.items()}


class Ruled:
    """A level of two vectors that steps by a rule of the level above."""

    def __init__(
        self,
        name: str | None = None,
        steps: int = 5,
        *,
        rule: Rule | None = None,
        module: Any = None,
        low: Callable[..., Tensor] = plain,
        hypergrad: Any = "unroll",
        reads: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        known, make = RULES[name] if name else (rule, scalars)
        self.rule: Any = known
        self.low, self.steps = low, steps
        self.clip_norm = options.get("clip_norm")
        self.first = {k: randn(size, seed=20 + size) for k, size in SIZES.items()}
        self.program = Program()
        self.program.level(
            "low", module=self.first, data=DATA, inner_steps=steps, reads=reads or {}, **options
        )(low)
        self.program.update("low")(self.rule)
        self.program.level(
            "top",
            lower=["low"],
            module=make() if module is None else module,
            optimizer=partial(SGD, lr=RATE),
            hypergrad=hypergrad,
            data=[TOP_BATCH],
        )(judged)
        self.model, self.hyper = self.program.module("low"), self.program.module("top")

    def found(self, method: Any, **options: Any) -> Tree:
        batches = {"low": (3 * DATA)[: self.steps], "top": TOP_BATCH}
        return mlodeco.hypergradient(
            "top",
            **{"batches": batches, "program": self.program, "hypergrad": method, **options},
        )

    def loss(self, w: Tree, batch: Any, h: Tree) -> Tensor:
        top = () if self.low is plain else (Swapped(self.hyper, h),)
        return self.low(Swapped(self.model, w), batch, *top)

    def rolled(
        self,
        h: Tree,
        start: Tree,
        batches: Sequence[Any],
        state: Any = None,
        *,
        first_order: bool = False,
        truncate: int | None = None,
    ) -> tuple[Tree, Any]:
        """The loop with autograd through everything."""
        w, state = dict(start), {} if state is None else state
        for t, batch in enumerate(batches):
            w = {k: p.clone() if p.requires_grad else p.requires_grad_() for k, p in w.items()}
            found = torch.autograd.grad(
                self.loss(w, batch, h), list(w.values()), create_graph=True, allow_unused=True
            )
            grads = clipped(dense(dict(zip(w, found, strict=True)), w), self.clip_norm)
            if first_order:
                grads = {k: g.detach() for k, g in grads.items()}
            copies = {k: p.clone() for k, p in w.items()}
            clones = {k: g.clone() for k, g in grads.items()}
            w, state = self.rule(copies, clones, state, Swapped(self.hyper, h))
            if truncate is not None and t < len(batches) - truncate:
                w, state = cut(w), cut(state)
        return w, state

    def value(self, h: Tree, w: Tree) -> Tensor:
        return judged(Swapped(self.hyper, h), TOP_BATCH, Swapped(self.model, w))

    def wanted(self, state: Any = None, batches: Any = None, **options: Any) -> Tree:
        h = leaves_of(self.hyper)
        batches = DATA[: self.steps] if batches is None else batches
        w, _ = self.rolled(h, values_of(self.model), batches, state, **options)
        return gradients(self.value(h, w), h)

    def simulated(self, turns: int, **options: Any) -> tuple[list[Tree], Tree, Tree, Any]:
        """Hypergradients of a run, the parameters of both levels, and the state of the rule."""
        h, w, state, found = values_of(self.hyper), values_of(self.model), {}, []
        for turn in range(turns):
            h = {k: p.detach().requires_grad_() for k, p in h.items()}
            batches = [DATA[t % 7] for t in range(turn * self.steps, (turn + 1) * self.steps)]
            w, state = self.rolled(h, cut(w), batches, cut(state), **options)
            found.append(gradients(self.value(h, w), h))
            h = {k: (p - RATE * found[-1][k]).detach() for k, p in h.items()}
        return found, h, cut(w), cut(state)


def numbers(value: Any) -> Any:
    """Tensors of one number as numbers, in tuples."""
    if isinstance(value, tuple | list):
        return tuple(map(numbers, value))
    return float(value)


def cut(tree: Any) -> Any:
    """Constants in the same containers."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: cut(part) for key, part in tree.items()}
    return tree


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance=1e-9) -> bool:
    assert set(found) == set(wanted)
    return all(
        torch.allclose(found[k], value.detach(), rtol=tolerance, atol=tolerance)
        for k, value in wanted.items()
    )


def captured(program: Program, ticks: int, level: str = "top", **options: Any) -> list[Tree]:
    """The hypergradients of a run."""
    found: list[Tree] = []

    @program.on("hypergradient", level=level)
    def capture(grads):
        found.append({k: g.clone() for k, g in grads.items()})

    mlodeco.run(ticks, program=program, progress="off", **{"seed": 0, **options})
    return found


def parameters(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]
