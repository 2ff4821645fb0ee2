"""Programs whose lower levels are sharded, in two processes, and what is left of them.

As a script: one of the processes, which runs every case and writes what it finds.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Adam

import mlodeco
from mlodeco import Program, Runner
from mlodeco.hypergrad import CG, Identity, Neumann
from tests.parallel_worker import loader, net, vector

STEPS = 12


def sharded(module, *, layers=True):
    """The module with its first layer and the rest as two units."""
    if layers:
        fully_shard(module[0])
    return fully_shard(module)


def net_of(kind):
    return sharded(net()) if kind == "sharded" else net()


def bilevel(method, parts, kind="whole", make=net_of, **low_options):
    program = Program()

    @program.level(
        "low",
        module=lambda: make(kind),
        optimizer=partial(Adam, lr=0.02),
        data=loader(1, parts),
        **{"clip_norm": 0.5, **low_options},
    )
    def low(model, batch, top):
        x, y = batch
        losses = (model(x * top.y.exp())[:, 0] - y) ** 2
        return ((x @ top.x).sigmoid() * losses).mean()

    @program.level(
        "top",
        lower=["low"],
        hypergrad=method,
        module={**vector(), "y": torch.zeros((), dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1),
        data=loader(2, parts),
    )
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean() + 0.01 * hyper.y**2

    return program


METHODS = {
    "identity": "identity",
    "neumann": "neumann",
    "warm": Neumann(warm_start=True),
    "cg": CG(max_steps=5, damping=0.5),
    "sama": "sama",
    "finite_difference": "finite_difference",
    "identity by differences": Identity(product="difference"),
    "neumann by differences": Neumann(product="difference", warm_start=True),
    "cg by differences": CG(max_steps=5, damping=0.5, product="difference"),
}
CASES = {f"bilevel {name}": partial(bilevel, method) for name, method in METHODS.items()}


def state(program):
    found = {
        f"{name}.{key}": t.detach().clone()
        for name in program.levels
        for key, t in program.module(name).state_dict().items()
    }
    return {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in found.items()}


def train(case, parts, kind="whole", **options):
    program = CASES[case](parts, kind)
    runner = Runner(program, seed=3, **options)
    runner.run(STEPS)
    losses = {name: runner.history.losses(name) for name in program.levels}
    norms = [record.grad_norm for record in runner.history.steps]
    return {"state": state(program), "losses": losses, "norms": norms}


def everything():
    found = {}
    for case in CASES:
        found[case] = {kind: train(case, 2, kind) for kind in ("whole", "sharded")}
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    torch.set_num_threads(1)
    found = everything()
    torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
