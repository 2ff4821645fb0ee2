"""Programs that run in one process and in several, and what is left of them.

As a script: one of several processes, which runs the cases named and writes what it finds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.hypergrad import CG, Neumann, Unroll

STEPS = 12
SIZE = 8


def data(seed, count=32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=g), torch.randn(
        count, dtype=torch.float64, generator=g
    )


def loader(seed, parts, count=32, **options):
    """Batches of ``SIZE`` samples over all processes together."""
    options = {"shuffle": True, **options}
    return DataLoader(TensorDataset(*data(seed, count)), batch_size=SIZE // parts, **options)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def vector(size=3, value=0.1):
    return {"x": torch.full((size,), value, dtype=torch.float64)}


def bilevel(method, parts, low_options=None, **options):
    program = Program()

    @program.level(
        "low",
        module=lambda: net(),
        optimizer=partial(Adam, lr=0.02),
        data=loader(1, parts),
        clip_norm=0.5,
        **(low_options or {}),
    )
    def low(model, batch, top):
        x, y = batch
        losses = (model(x)[:, 0] - y) ** 2
        return ((x @ top.x).sigmoid() * losses).mean() + 0.05 * sum(
            (p**2).sum() for p in model.parameters()
        )

    @program.level(
        "top",
        lower=["low"],
        hypergrad=method,
        module=vector(),
        optimizer=partial(SGD, lr=0.1),
        data=loader(2, parts),
        inner_steps=1,
        **options,
    )
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return program


def chain(method, parts):
    """Three levels, two of them leaves that share one network."""
    program = Program()

    @program.level(
        "head",
        module=lambda: net(),
        params=lambda name: name.startswith("2"),
        optimizer=partial(SGD, lr=0.1, momentum=0.9),
        data=loader(1, parts),
    )
    def head(model, batch, mid):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2 * (x @ mid.x).sigmoid()).mean() + 0.1 * sum(
            (p**2).sum() for p in model.parameters()
        )

    @program.level(
        "body",
        module="head",
        params=lambda name: name.startswith("0"),
        optimizer=partial(SGD, lr=0.05),
        data=loader(2, parts),
    )
    def body(model, batch, mid):
        x, y = batch
        return ((model(x)[:, 0] - y).abs() * (x @ mid.x).sigmoid()).mean() + 0.1 * sum(
            (p**2).sum() for p in model.parameters()
        )

    @program.level(
        "mid",
        lower=["head", "body"],
        hypergrad=method,
        module=vector(),
        optimizer=partial(SGD, lr=0.1),
        data=loader(3, parts),
    )
    def mid(m, batch, head, top):
        x, y = batch
        return (
            ((head(x)[:, 0] - y) ** 2 * (x @ top.x).sigmoid()).mean()
            + ((m.x - top.x) ** 2).sum()
            + (m.x**2).sum()
        )

    @program.level(
        "top",
        lower=["mid"],
        hypergrad=method,
        module=vector(value=0.3),
        optimizer=partial(SGD, lr=0.1),
        data=loader(4, parts),
    )
    def top(hyper, batch, mid, head):
        x, y = batch
        return ((head(x)[:, 0] + x @ mid.x - y) ** 2).mean()

    return program


METHODS = {
    "identity": "identity",
    "finite_difference": "finite_difference",
    "neumann": "neumann",
    "cg": CG(max_steps=5, damping=0.5),
    "sama": "sama",
    "unroll": "unroll",
}

CASES = {f"bilevel {name}": partial(bilevel, method) for name, method in METHODS.items()}
CASES |= {f"chain {name}": partial(chain, method) for name, method in METHODS.items()}
CASES["kept graphs"] = partial(
    bilevel, Unroll(keep_graph=True), low_options={"inner_steps": 3}
)
CASES["kept seldom"] = partial(
    bilevel, Unroll(checkpoint_every=2, product="difference"), low_options={"inner_steps": 3}
)
CASES["forward"] = partial(bilevel, "unroll_forward", low_options={"inner_steps": 2})
CASES["warm"] = partial(bilevel, Neumann(warm_start=True, product="forward"))
CASES["micro-batches"] = partial(bilevel, "neumann", low_options={"accumulate": 2})


def feedback(parts):
    """A mid-level that feeds back into its lower level, for nested responses."""
    program = Program()
    sgd = partial(SGD, lr=0.05)

    @program.level("low", module=vector(), optimizer=sgd, data=loader(1, parts))
    def low(m, batch, mid):
        x, y = batch
        return ((x @ m.x - y) ** 2 * (x @ mid.x).sigmoid()).mean() + (m.x**2).sum()

    @program.level(
        "mid", lower=["low"], hypergrad=CG(), module=vector(), optimizer=sgd, data=loader(2, parts)
    )
    def mid(m, batch, low, top):
        x, y = batch
        return ((x @ low.x - y) ** 2).mean() + ((m.x - top.x) ** 2).sum()

    @program.level(
        "top", lower=["mid"], hypergrad=CG(), module=vector(), optimizer=sgd, data=loader(3, parts)
    )
    def top(m, batch, mid):
        x, y = batch
        return ((x @ mid.x - y) ** 2).mean() + (m.x**2).sum()

    return program


CASES["nested"] = feedback


def state(program):
    return {
        f"{name}.{key}": t.detach().clone()
        for name in program.levels
        for key, t in program.module(name).state_dict().items()
    }


def train(case, parts, **options):
    """The parameters and losses behind a run of a case."""
    program = CASES[case](parts)
    options.setdefault("nested", case == "nested")
    runner = Runner(program, seed=3, **options)
    runner.run(STEPS)
    losses = {name: runner.history.losses(name) for name in program.levels}
    norms = [record.grad_norm for record in runner.history.steps]
    return {"state": state(program), "losses": losses, "norms": norms}
