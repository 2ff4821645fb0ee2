"""Killed and resumed equals never killed; whatever is damaged is told, and nothing is lost."""

from __future__ import annotations

import collections
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, WeightedRandomSampler

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import (
    CheckpointError,
    CheckpointWarning,
    DataError,
    DeclarationError,
    Preempted,
    RunError,
)
from mlodeco.hypergrad import CG, Neumann, Unroll
from mlodeco.runtime.checkpoint import folder
from mlodeco.runtime.checkpoint.encoding import decode, encode
from tests.checkpoint_worker import (
    EVERY,
    Curriculum,
    bits,
    data,
    everything,
    loader,
    network,
    run,
    state,
    trained,
)
from tests.parallel_worker import tasks

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("MLODECO_KILLS", "4"))
FUZZED = int(os.environ.get("MLODECO_FUZZED", "150"))
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")


def vector(size=3, value=0.1):
    return {"x": torch.full((size,), value, dtype=torch.float64)}


def bilevel(method="neumann", *, low_options=None, top_options=None, low_data=None, module=None):
    program = Program()
    low_options = {"optimizer": partial(SGD, lr=0.05, momentum=0.9), **(low_options or {})}

    @program.level(
        "low",
        module=module or network,
        data=loader(1) if low_data is None else low_data,
        **low_options,
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
        optimizer=partial(Adam, lr=0.05),
        data=loader(2),
        **(top_options or {}),
    )
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return program


def ladder():
    """A mid-level that steps seldom and is looked at again before its next step."""
    program = Program()
    sgd = partial(SGD, lr=0.05)

    @program.level("fast", module=vector(), optimizer=sgd, data=loader(1), inner_steps=2)
    def fast(m, batch, mid):
        x, y = batch
        return ((x @ m.x - y) ** 2 * (x @ mid.x).sigmoid()).mean() + (m.x**2).sum()

    @program.level("slow", module=vector(), optimizer=sgd, data=loader(2), inner_steps=5)
    def slow(m, batch, mid):
        x, y = batch
        return ((x @ m.x - y).abs() * (x @ mid.x).sigmoid()).mean() + (m.x**2).sum()

    @program.level(
        "mid", lower=["fast"], module=vector(), optimizer=sgd, data=loader(3), hypergrad="unroll"
    )
    def mid(m, batch, fast, top):
        x, y = batch
        return ((x @ fast.x - y) ** 2).mean() + ((m.x - top.x) ** 2).sum() + (m.x**2).sum()

    @program.level(
        "top",
        lower=["mid", "slow"],
        hypergrad={"mid": "unroll", "slow": "neumann", "fast": "neumann"},
        module=vector(),
        optimizer=sgd,
        data=loader(4),
    )
    def top(m, batch, mid, slow):
        x, y = batch
        return ((x @ mid.x - y) ** 2).mean() + ((x @ slow.x) ** 2).mean()

    return program


def with_rule():
    """An update rule with a state of its own and random numbers."""
    program = bilevel("unroll", low_options={"optimizer": None, "inner_steps": 4})

    @program.update("low")
    def rule(params, grads, state):
        moved = {k: 0.9 * state.get(k, torch.zeros_like(g)) + g for k, g in grads.items()}
        noise = 1.0 + 0.1 * torch.rand(())
        return {k: p - 0.05 * noise * moved[k] for k, p in params.items()}, moved

    return program


class Stateful:
    """Batches that say where they stand."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        while self.number < 5:
            self.number += 1
            yield tuple(t[self.number : self.number + 8] for t in data(1))
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Rows(IterableDataset):
    def __iter__(self):
        x, y = data(1)
        for n in torch.randperm(len(x), generator=torch.Generator().manual_seed(1)):
            yield x[n], y[n] + torch.rand((), dtype=torch.float64)


class Noisy(TensorDataset):
    """Samples with random numbers, and a count of how often one is loaded."""

    loaded = 0

    def __getitem__(self, index):
        type(self).loaded += 1
        x, y = super().__getitem__(index)
        return x + random.random() + float(np.random.rand()), y + torch.rand_like(y)


def weighted():
    sampler = WeightedRandomSampler([1.0] * 24 + [2.0] * 24, 48)
    return DataLoader(TensorDataset(*data(1)), batch_size=8, sampler=sampler)


def batches_of_a_closure():
    source = np.random.default_rng(5)

    def batches():
        for _ in range(4):
            yield tuple(t[source.permutation(48)[:8]] for t in data(1))

    return batches


class Tasks:
    """An iterator with a state of its own."""

    def __init__(self):
        self.number = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.number += 1
        return torch.full((3,), float(self.number), dtype=torch.float64)

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def with_sources():
    program = bilevel("neumann", low_options={"inner_steps": 3})
    program.source("task")([torch.full((3,), float(n), dtype=torch.float64) for n in range(7)])
    program.source("counted")(Tasks())
    program.source("kept", refresh="loop")(DataLoader(TensorDataset(data(6)[0]), shuffle=True))
    seen = program.levels.pop("low")

    @program.level("low", module=network, optimizer=seen.optimizer, data=loader(1), inner_steps=3)
    def low(model, batch, top, task, counted, kept):
        x, y = batch
        shift = task.sum() + counted.sum() + kept[0].sum()
        return ((x @ top.x).sigmoid() * (model(x)[:, 0] - y - 0.01 * shift) ** 2).mean()

    return program


class Memory(nn.Module):
    """A buffer that is not persistent, one that grows, a tied weight and a state of its own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=torch.float64)
        self.second = nn.Linear(3, 3, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.rand(3, dtype=torch.float64), requires_grad=False)
        self.register_buffer("fading", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.register_buffer("seen", torch.zeros(0, dtype=torch.float64))
        self.calls = 0

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]

    def forward(self, x):
        self.calls += 1
        self.fading.mul_(0.5).add_(x.detach().mean(0))
        return (self.second(self.first(x)) + self.fading + self.frozen + 1e-3 * self.calls)[:, :1]


def with_hook():
    """A hook that stops BatchNorm, and one that acts at each third step."""
    program = bilevel()

    @program.on("after_step", level="low")
    def stop(low, ctx):
        if ctx.step == 2:
            low[1].eval()

    @program.on("before_step", level="low", every=3)
    def shake(low, ctx):
        with torch.no_grad():
            low[0].bias.add_(0.01 * torch.rand((), generator=ctx.generator))

    return program


PROGRAMS = {
    "everything": everything,
    "ladder": ladder,
    "rule": with_rule,
    "sources": with_sources,
    "hook": with_hook,
    "tasks": partial(tasks, 1),
    "module": partial(bilevel, module=Memory),
    "unroll": partial(bilevel, "unroll", low_options={"inner_steps": 4}),
    "kept graphs": partial(bilevel, Unroll(keep_graph=True), low_options={"inner_steps": 4}),
    "sparse tape": partial(bilevel, Unroll(checkpoint_every=2), low_options={"inner_steps": 5}),
    "forward": partial(bilevel, "unroll_forward", low_options={"inner_steps": 3}),
    "sama": partial(bilevel, "sama", low_options={"optimizer": partial(AdamW, lr=0.01)}),
    "warm": partial(bilevel, Neumann(warm_start=True)),
    "rollback": partial(
        bilevel, low_options={"inner_steps": 3, "rollback": True}, top_options={"repeat": 2}
    ),
    "micro-batches": partial(bilevel, CG(), low_options={"accumulate": 3, "warmup": 2}),
    "list": partial(bilevel, low_data=[data(1, 8), data(2, 8), data(3, 8)]),
    "in order": partial(bilevel, low_data=loader(1, shuffle=False)),
    "own generator": partial(
        bilevel, low_data=lambda: loader(1, generator=torch.Generator().manual_seed(9))
    ),
    "weighted": partial(bilevel, low_data=weighted),
    "noisy": partial(bilevel, low_data=lambda: DataLoader(Noisy(*data(1)), 8, shuffle=True)),
    "rows": partial(bilevel, low_data=lambda: DataLoader(Rows(), 8)),
    "workers": partial(bilevel, low_data=lambda: loader(1, num_workers=1)),
    "stateful": partial(bilevel, low_data=Stateful),
    "closure": lambda: bilevel(low_data=batches_of_a_closure()),
}


def steps_of(runner, count):
    for _ in range(count):
        runner.step()


def left_by(runner):
    """Everything that a person sees of a run, and the random numbers that come next."""
    runner._journal.new()
    draws = torch.rand(2).tolist(), random.random(), float(np.random.rand())
    return bits(state_of(runner)), runner._journal.text, draws


def state_of(runner):
    return {
        f"{name}.{key}": tensor
        for name, level in runner.built.levels.items()
        for key, tensor in (*level.parameters.items(), *level.module.named_buffers())
    }


@pytest.mark.parametrize("save_at", [2, 7])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit(name, save_at, tmp_path):
    make = PROGRAMS[name]
    whole = Runner(make(), seed=3)
    steps_of(whole, save_at)
    whole.save(tmp_path / "saved")
    steps_of(whole, 11 - save_at)
    expected = left_by(whole)
    torch.manual_seed(77)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", mlodeco.errors.SolverWarning)
        resumed = Runner(make(), seed=5)
        resumed.load(tmp_path / "saved")
        assert resumed.tick == save_at
        steps_of(resumed, 11 - save_at)
    assert left_by(resumed) == expected
