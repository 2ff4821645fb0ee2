"""Programs in half precision, run by one of several processes, and what is left of them."""

from __future__ import annotations

import math
import os
import sys
import warnings
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.hypergrad import CG, Unroll

BAD = 1e30
METHODS = {
    "neumann": "neumann",
    "cg, warm": CG(max_steps=3, damping=0.1, warm_start=True),
    "sama": "sama",
    "unroll": "unroll",
    "kept graphs": Unroll(keep_graph=True),
}
CASES = [*product(METHODS, ("low", "top"), ("exact", "once"))]
NOT_FINITE = [*product(("neumann", "kept graphs"), ("low", "top"), ("exact", "once"))]


def loader(seed, parts, bad=None, value=BAD):
    """Batches of 8 samples over all processes together; the last sample of one may be bad."""
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 3, generator=g), torch.randn(32, generator=g)
    if bad is not None:
        x[8 * bad + 7] = value
    return DataLoader(TensorDataset(x, y), batch_size=8 // parts)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def program(method, parts, bad=None, at="low", value=BAD):
    found = Program()

    @found.level(
        "low",
        module=network,
        optimizer=partial(Adam, lr=0.02),
        data=loader(1, parts, bad if at == "low" else None, value),
    )
    def low(model, batch, top):
        x, y = batch
        losses = (model(x)[:, 0] - y) ** 2
        return (torch.tanh(x @ top.x).exp() * losses).mean()

    @found.level(
        "top",
        lower=["low"],
        hypergrad=METHODS[method],
        module={"x": torch.full((3,), 0.1)},
        optimizer=partial(SGD, lr=0.1),
        data=loader(2, parts, bad if at == "top" else None, value),
    )
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return found


def train(one, steps=4, precision="fp16", **options):
    """What is left of a run, with scales that are not too large from the beginning."""
    runner = Runner(one, seed=3, mixed_precision=precision, **options)
    trainers = runner._trainers.values()
    for trainer in trainers:
        if trainer.scale is not None:
            trainer.scale.value = 2.0**9
    runner.run(steps)
    return {
        "state": {
            f"{name}.{key}": t.detach().clone()
            for name in one.levels
            for key, t in one.module(name).state_dict().items()
        },
        "skipped": [(r.level, r.tick) for r in runner.history.steps if r.skipped],
        "scales": [trainer.scale and trainer.scale.value for trainer in trainers],
    }


def told_of_one():
    """What a run warns of whose function is bad in the second process alone, and in half."""
    found = {}
    for precision, value in (("no", None), ("fp16", math.inf)):
        one = Program()
        data = loader(1, 2, 2 if value else None, value)

        @one.level("low", module=network, optimizer=partial(SGD, lr=0.01), data=data)
        def low(model, batch, ctx, value=value):
            is_bad = value is None and ctx.tick == 3 and os.environ["RANK"] == "1"
            x, _ = batch
            return (model(x).float() ** 2).mean() * (math.nan if is_bad else 1.0)

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            left = train(one, precision=precision, nonfinite="skip")
        found[precision] = [str(w.message) for w in caught], left["skipped"]
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    torch.set_num_threads(1)
    found = {
        (method, at, reduce): train(program(method, 2, bad=2, at=at), reduce=reduce)
        for method, at, reduce in CASES
    }
    found |= {
        (method, precision): train(program(method, 2), 8, precision)
        for method in METHODS
        for precision in ("bf16", "fp16")
    }
    for policy in ("skip", "warn"):
        found |= {
            (policy, method, at, reduce): train(
                program(method, 2, bad=2, at=at, value=math.nan),
                precision="no",
                reduce=reduce,
                nonfinite=policy,
            )
            for method, at, reduce in NOT_FINITE
        }
    found["told"] = told_of_one()
    torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
