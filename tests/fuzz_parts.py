"""Parts of programs that are in order, by option and name; see fuzz_declarations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    RAdam,
    RMSprop,
)
from torch.optim import lr_scheduler as lr
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mlodeco import Context, Replicas
from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    NAMES,
    Dense,
    Identity,
    Neumann,
    Nystrom,
    Sama,
    Unroll,
    UnrollForward,
    spell,
)

Makers = dict[str, Callable[[], Any]]

BATCH = torch.arange(8.0).view(2, 2, 2) / 8
"""The first dimension for replicas, the second for a batch in each."""

SHAPES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "leaf": {"low": ([], [])},
    "upper": {"low": ([], ["top"]), "top": (["low"], ["low"])},
    "mid": {
        "low": ([], ["mid"]),
        "mid": (["low"], ["low", "top"]),
        "top": (["mid"], ["mid", "low"]),
    },
    "feedback": {
        "low": ([], ["mid", "top"]),
        "mid": (["low"], ["low", "top"]),
        "top": (["mid"], ["mid"]),
    },
    "two uppers": {
        "low": ([], ["top", "mid"]),
        "mid": (["low"], ["low"]),
        "top": (["low"], ["low"]),
    },
    "four": {
        "low": ([], ["mid"]),
        "mid": (["low"], ["low", "high"]),
        "high": (["mid"], ["mid", "top"]),
        "top": (["high"], ["high"]),
    },
}  # fmt: skip
"""For each level, those below it and those that it reads."""


def total(value: Any) -> Any:
    """The sum of what is a module, a tensor or a container of these."""
    if isinstance(value, nn.Module):
        kept = [p for p in value.parameters() if p.is_floating_point() and not p.is_meta]
        return sum(p.to_dense().double().sum() for p in kept)
    if isinstance(value, torch.Tensor):
        return value.double().mean()
    if isinstance(value, list | tuple):
        return sum(map(total, value))
    return sum(map(total, value.values())) if isinstance(value, dict) else 0.0


def loss_of(own: Any = None, *others: Any) -> Any:
    """Convex in its own parameters, and coupled with whatever else it is given."""
    if not isinstance(own, nn.Module):
        return total(own)
    loss = torch.zeros((), dtype=torch.double)
    for p in own.parameters():
        if p.is_floating_point() and not p.is_meta:
            loss = loss + ((p.to_dense().double() - 0.1) ** 2).sum() / 2
    loss = loss + total(own) ** 2 / 50
    for other in others:
        if isinstance(other, Context):
            other.log(logged=loss)
        else:
            loss = loss + (total(own) + 1) * total(other) / 10
    if isinstance(own, nn.Sequential):
        loss = loss + own(BATCH[0]).double().square().mean() / 10
    return loss


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight


class Cursor:
    """Items with a place in them."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> torch.Tensor:
        self.at += 1
        return BATCH + self.at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "text": "é", "some": [torch.ones(2), (1, 2.0), {3}, b"x"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([BATCH, BATCH + 1])


def items() -> Any:
    yield BATCH
    yield BATCH + 1


def items_of(low: nn.Module) -> Any:
    while True:
        yield total(low).detach() + BATCH


def loader(**options: Any) -> Any:
    return DataLoader(TensorDataset(BATCH.view(4, 2), torch.ones(4)), **options)


def sequence(optimizer: Any) -> Any:
    parts = [lr.ConstantLR(optimizer), lr.ExponentialLR(optimizer, 0.9)]
    return lr.SequentialLR(optimizer, parts, milestones=[1])


OPTIONS: dict[str, Makers] = {
    "module": {
        "mapping": lambda: {"x": torch.ones(2)},
        "double": lambda: {"x": torch.ones(2, dtype=torch.double), "y": torch.tensor(0.5)},
        "layer": lambda: partial(nn.Linear, 2, 1),
        "dropout": lambda: lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)),
        "norm": lambda: lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
        "tied": lambda: Tied,
        "half frozen": lambda: (
            lambda: nn.ModuleList([nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1)])
        ),
        "bfloat16": lambda: {"x": torch.ones(2, dtype=torch.bfloat16)},
    },
    "optimizer": {
        "sgd": lambda: partial(SGD, lr=0.1),
        "momentum": lambda: partial(SGD, lr=0.05, momentum=0.9, nesterov=True),
        **{
            kind.__name__: partial(partial, kind, lr=0.01)
            for kind in (Adam, AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax, ASGD)
        },
        "of module": lambda: lambda module: SGD([{"params": module.parameters()}], lr=0.1),
    },
    "scheduler": {
        "step": lambda: partial(lr.StepLR, step_size=1),
        "exponential": lambda: partial(lr.ExponentialLR, gamma=0.9),
        "cosine": lambda: partial(lr.CosineAnnealingLR, T_max=4),
        "restarts": lambda: partial(lr.CosineAnnealingWarmRestarts, T_0=2),
        "lambda": lambda: lambda optimizer: lr.LambdaLR(optimizer, lambda n: 1 / (1 + n)),
        "one cycle": lambda: partial(
            lr.OneCycleLR, max_lr=0.1, total_steps=100, cycle_momentum=False
        ),
        "sequence": lambda: sequence,
    },
    "data": {
        "list": lambda: [BATCH, BATCH + 1],
        "loader": lambda: loader(batch_size=2),
        "shuffled": lambda: loader(batch_size=2, shuffle=True, drop_last=True),
        "generator": lambda: items,
        "iterable": lambda: DataLoader(Stream(), batch_size=None),
        "cursor": lambda: lambda: Cursor(),
        "fields": lambda: [(BATCH, BATCH)],
        "two": lambda: {"u": [BATCH], "v": [(BATCH, BATCH + 1)]},
    },
    "hypergrad": {
        **{name: partial(str, name) for name in NAMES},
        **{
            spell(method): partial(lambda method: method, method)
            for method in (
                Neumann(num_terms=3, warm_start=True, damping=0.1),
                Neumann(product="difference", step_size=0.1),
                CG(max_steps=2, warm_start=True, product="forward"),
                CG(max_steps=3, product="difference", rtol=1e-3),
                MINRES(max_steps=2, warm_start=True, curvature_batch=0.5),
                GMRES(max_steps=4, restart=2, warm_start=True),
                GMRES(max_steps=4, restart=2, damping=0.1),
                Nystrom(rank=2, seed=1, product="reverse"),
                Identity(scale=0.1, product="reverse_over_forward"),
                Identity(product="difference"),
                Dense(damping=0.1),
                Sama(scale=0.5, product="difference"),
                Unroll(truncate=1, checkpoint_every=2),
                Unroll(keep_graph=True),
                Unroll(first_order=True, product="forward"),
                UnrollForward(truncate=1),
            )
        },
        "None": lambda: None,
        "mine": lambda: "mine",
    },
    "clip_norm": {"clip_norm": lambda: 1.0},
    "inner_steps": {"inner_steps": lambda: 2},
    "repeat": {"repeat": lambda: 2},
    "warmup": {"warmup": lambda: 2},
    "accumulate": {"accumulate": lambda: 2},
    "rollback": {"rollback": lambda: True},
    "precision": {"fp32": lambda: "fp32", "bf16": lambda: "bf16"},
    "params": {
        "predicate": lambda: lambda name: not name.endswith("bias"),
        "all": lambda: lambda name: True,
    },
    "replicas": {
        "count": lambda: 2,
        "vmap": lambda: Replicas(2, way="vmap"),
        "chunks": lambda: Replicas(2, way="vmap", chunk=1),
    },
}
"""By option of a level and by name: what makes a value for it."""

ARGUMENTS = {"fields": ["x", "y"], "two": ["u", "v"]}
"""How a level names its batch, where not as ``batch``, by the name of its data."""

SOURCES: Makers = {
    "generator": lambda: items,
    "reader": lambda: items_of,
    "list": lambda: [BATCH, BATCH + 1],
    "loader": lambda: loader(batch_size=2, shuffle=True),
    "cursor": Cursor,
}


def descend(params: Any, grads: Any) -> Any:
    return {k: p - 0.1 * grads[k] for k, p in params.items()}, {}


def heavy(params: Any, grads: Any, state: Any) -> Any:
    means = {k: g + 0.5 * state["a"][k] if "a" in state else g for k, g in grads.items()}
    return {k: p - 0.1 * means[k] for k, p in params.items()}, {
        "a": means,
        "n": state.get("n", 0) + 1,
    }


def define(arguments: str, result: str, **known: Any) -> Any:
    """A function of these arguments, as one that is written here."""
    text = f"def made({arguments}): return {result}"
    made: dict[str, Any] = {}
    exec(compile(text, __file__, "exec"), known, made)
    return made["made"]


def learned_by(name: str) -> Any:
    """A rule whose rate is the level above."""

    def step(params: Any, grads: Any, upper: Any) -> Any:
        rate = total(upper).sigmoid() / 10
        return {k: p - (rate * grads[k]).to(p.dtype) for k, p in params.items()}, {}

    return define(f"params, grads, {name}", f"step(params, grads, {name})", step=step)


def rate_of(name: str) -> Any:
    """A learning rate computed from the level above."""
    return define(name, f"total({name}).sigmoid() / 10", total=total)


RULES: dict[str, Callable[[str], Any]] = {
    "descend": lambda above: descend,
    "heavy": lambda above: heavy,
    "learned": learned_by,
}
"""By name: from the name of a level above, the rule."""

VALIDATIONS: dict[str, dict[str, Any]] = {
    "plain": {"every": 2},
    "monitored": {"monitor": "own", "mode": "min", "patience": 3},
    "with data": {"data": [BATCH], "every": 2},
}


def measure(low: Any) -> Any:
    return {"own": total(low)}


def measure_batch(low: Any, batch: Any) -> Any:
    return {"own": total(low) + total(batch)}


def solve(matvec: Any, b: Any) -> Any:
    return {k: v / 2 for k, v in b.items()}


RUNS: dict[str, Makers] = {
    "seed": {"seed": lambda: 1},
    "nested": {"nested": lambda: True},
    "nonfinite": {kind: partial(str, kind) for kind in ("raise", "skip", "warn")},
    "reduce": {"exact": lambda: "exact", "once": lambda: "once"},
    "tails": {"drop": lambda: "drop", "pad": lambda: "pad"},
    "mixed_precision": {"no": lambda: "no", "bf16": lambda: "bf16"},
    "keep": {"keep": lambda: 1},
    "checkpoint_every": {"checkpoint_every": lambda: 2},
    "checkpoint_errors": {"raise": lambda: "raise"},
    "resume": {"auto": lambda: "auto"},
}
"""By option of a run and by name: what makes a value for it."""
