"""Parts of programs that are in order, by option and name; see fuzz_declarations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.optim import SGD
from torch.optim import lr_scheduler as lr
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from mlodeco import Context, Replicas
from mlodeco import hypergrad as h

Makers = dict[str, Callable[[], Any]]

BATCH = torch.arange(8.0).view(2, 2, 2) / 8
"""The first dimension for replicas, the second for a batch in each."""

SHAPES: dict[str, dict[str, tuple[list[str], list[str]]]] = {
    "leaf": {"low": ([], [])},
    "upper": {"low": ([], ["top"]), "top": (["low"], ["low"])},
    "mid": {
        "low": ([], ["mid"]), "mid": (["low"], ["low", "top"]), "top": (["mid"], ["mid", "low"]),
    },
    "feedback": {
        "low": ([], ["mid", "top"]), "mid": (["low"], ["low", "top"]), "top": (["mid"], ["mid"]),
    },
    "two uppers": {
        "low": ([], ["top", "mid"]), "mid": (["low"], ["low"]), "top": (["low"], ["low"]),
    },
    "four": {
        "low": ([], ["mid"]), "mid": (["low"], ["low", "high"]),
        "high": (["mid"], ["mid", "top"]), "top": (["high"], ["high"]),
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


def always(value: Any) -> Callable[[], Any]:
    """A maker of a value that may be used more than once."""
    return lambda: value


METHODS = (
    h.Neumann(num_terms=3, warm_start=True, damping=0.1), h.CG(max_steps=2, product="forward"),
    h.CG(max_steps=3, product="difference", warm_start=True), h.Identity(product="difference"),
    h.MINRES(max_steps=2, warm_start=True, curvature_batch=0.5), h.Dense(damping=0.1),
    h.GMRES(max_steps=4, restart=2, warm_start=True, damping=0.1), h.Unroll(keep_graph=True),
    h.Nystrom(rank=2, seed=1, product="reverse"), h.Sama(scale=0.5, product="difference"),
    h.Identity(scale=0.1, product="reverse_over_forward"), h.UnrollForward(truncate=1),
    h.Unroll(truncate=1, checkpoint_every=2), h.Unroll(first_order=True, product="forward"),
)  # fmt: skip

OPTIMIZERS = (
    *(optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.RAdam),
    *(optim.Adadelta, optim.Adamax, optim.ASGD),
)

OPTIONS: dict[str, Makers] = {
    "module": {
        "mapping": lambda: {"x": torch.ones(2)},
        "double": lambda: {"x": torch.ones(2, dtype=torch.double), "y": torch.tensor(0.5)},
        "layer": always(partial(nn.Linear, 2, 1)),
        "dropout": always(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))),
        "norm": always(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
        "tied": always(Tied),
        "half frozen": always(
            lambda: nn.ModuleList([nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1)])
        ),
        "bfloat16": lambda: {"x": torch.ones(2, dtype=torch.bfloat16)},
    },
    "optimizer": {
        "sgd": always(partial(SGD, lr=0.1)),
        "momentum": always(partial(SGD, lr=0.05, momentum=0.9, nesterov=True)),
        "of module": always(lambda module: SGD([{"params": module.parameters()}], lr=0.1)),
    }
    | {kind.__name__: always(partial(kind, lr=0.01)) for kind in OPTIMIZERS},
    "scheduler": {
        "step": always(partial(lr.StepLR, step_size=1)),
        "exponential": always(partial(lr.ExponentialLR, gamma=0.9)),
        "cosine": always(partial(lr.CosineAnnealingLR, T_max=4)),
        "restarts": always(partial(lr.CosineAnnealingWarmRestarts, T_0=2)),
        "lambda": always(lambda optimizer: lr.LambdaLR(optimizer, lambda n: 1 / (1 + n))),
        "one cycle": always(
            partial(lr.OneCycleLR, max_lr=0.1, total_steps=100, cycle_momentum=False)
        ),
        "sequence": always(sequence),
    },
    "data": {
        "list": lambda: [BATCH, BATCH + 1],
        "loader": lambda: loader(batch_size=2),
        "shuffled": lambda: loader(batch_size=2, shuffle=True, drop_last=True),
        "generator": always(items),
        "iterable": lambda: DataLoader(Stream(), batch_size=None),
        "cursor": always(lambda: Cursor()),
        "fields": lambda: [(BATCH, BATCH)],
        "two": lambda: {"u": [BATCH], "v": [(BATCH, BATCH + 1)]},
    },
    "hypergrad": {name: always(name) for name in (*h.NAMES, "mine", None)}  # type: ignore[misc]
    | {h.spell(method): always(method) for method in METHODS},
    "params": {"predicate": always(lambda name: not name.endswith("bias"))},
    "precision": {"fp32": always("fp32"), "bf16": always("bf16")},
    "replicas": {
        "count": always(2), "vmap": always(Replicas(2, way="vmap")),
        "chunks": always(Replicas(2, way="vmap", chunk=1)),
    },
    "clip_norm": {"1": always(1.0)},
    "rollback": {"on": always(True)},
    **{name: {"2": always(2)} for name in ("inner_steps", "repeat", "warmup", "accumulate")},
}  # fmt: skip
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
    count = state.get("n", 0) + 1
    return {k: p - 0.1 * means[k] for k, p in params.items()}, {"a": means, "n": count}


def define(arguments: str, result: str, **known: Any) -> Any:
    """A function of these arguments, as one that is written here."""
    made: dict[str, Any] = {}
    text = f"def made({arguments}): return {result}"
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
    option: {str(value): always(value) for value in values}
    for option, values in {
        "seed": [1], "nested": [True], "nonfinite": ["raise", "skip", "warn"], "keep": [1],
        "reduce": ["exact", "once"], "tails": ["drop", "pad"], "mixed_precision": ["no", "bf16"],
        "checkpoint_every": [2], "checkpoint_errors": ["raise"], "resume": ["auto"],
    }.items()
}  # fmt: skip
"""By option of a run and by name: what makes a value for it."""
