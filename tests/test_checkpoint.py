"""Killed and resumed equals never killed; whatever is damaged is told, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Adam, AdamW, lr_scheduler
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import (
    CheckpointError,
    CheckpointWarning,
    DeclarationError,
    RunError,
)
from mlodeco.hypergrad import CG, Neumann, Unroll
from mlodeco.runtime.checkpoint import folder
from tests.checkpoint_worker import (
    EVERY,
    Curriculum,
    bits,
    data,
    everything,
    loader,
    network,
    run,
    trained,
)
from tests.parallel_worker import tasks

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("MLODECO_KILLS", "4"))
FUZZED = int(os.environ.get("MLODECO_FUZZED", "150"))
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings(
    "ignore::mlodeco.errors.SolverWarning",
    "ignore:'set_vital':UserWarning",
    "ignore:Sparse CSR:UserWarning",
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(folder, "_sync", lambda path: None)


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
        **{"data": loader(2), **(top_options or {})},
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


class Drawing(TensorDataset):
    """Samples with numbers of its own generators."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.rng = np.random.default_rng(4)
        self.transform = partial(jittered, random.Random(4))

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return self.transform(x) + self.rng.random(), y


def jittered(rng, x):
    return x * rng.random()


class Permuted(IterableDataset):
    def __init__(self):
        self.g = torch.Generator().manual_seed(4)

    def __iter__(self):
        x, y = data(1)
        for n in torch.randperm(len(x), generator=self.g):
            yield x[n], y[n]


def drawing():
    both = ConcatDataset([Drawing(*data(1, 24)), Subset(Drawing(*data(2)), range(24))])
    return DataLoader(both, 8, shuffle=True)


def collated():
    rng = random.Random(4)

    def collate(samples):
        x, y = default_collate(samples)
        return x * rng.random(), y

    return loader(1, collate_fn=collate)


class Shaken(nn.Module):
    """A module that has a generator."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 1, dtype=torch.float64)
        self.g = torch.Generator().manual_seed(4)

    def forward(self, x):
        return self.inner(x + torch.rand(3, generator=self.g, dtype=torch.float64))


def with_generators():
    """A level, a hook and a validation that close over generators."""
    program = Program()
    numpy, python, torchs = np.random.default_rng(4), random.Random(4), torch.Generator()

    @program.level("low", module=Shaken, optimizer=partial(SGD, lr=0.05), data=loader(1))
    def low(model, batch):
        x, y = batch
        return ((model(x)[:, 0] - y - float(numpy.random())) ** 2).mean()

    @program.on("before_step", level="low")
    def shake(low):
        with torch.no_grad():
            low.inner.bias.add_(0.01 * python.random())

    @program.validate(every=2)
    def noise(low):
        return {"noise": torch.rand((), generator=torchs)}

    return program


def with_epochs():
    """A sampler whose epoch a hook sets."""
    low_data = TensorDataset(*data(1))
    sampler = DistributedSampler(low_data, num_replicas=1, rank=0)
    program = bilevel(low_data=DataLoader(low_data, 8, sampler=sampler))

    @program.on("epoch_end", level="low")
    def turn(ctx):
        sampler.set_epoch(ctx.epoch + 1)

    return program


def with_one_loader(make):
    """Two levels that read one loader."""
    one = make()
    return bilevel(low_data=one, top_options={"data": one})


def stateful(dataset=None, **options):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(dataset or TensorDataset(*data(1)), 8, **options)


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


class Changing(nn.Module):
    """Buffers that come and go while it runs, of layouts and dtypes that files lack."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=torch.float64)
        self.register_buffer("shift", torch.ones(3, dtype=torch.float64))
        self.register_buffer("late", None)
        self.register_buffer("wide", torch.full((3,), 1j, dtype=torch.complex128))
        self.register_buffer("sparse", torch.eye(3, dtype=torch.float64).to_sparse())
        own = torch.eye(3, dtype=torch.float64).to_sparse_csr()
        self.register_buffer("rows", own, persistent=False)
        self.frozen = nn.Parameter(torch.full((3,), 0.5j, dtype=torch.complex128), False)

    def forward(self, x):
        mean = x.detach().mean(0)
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros_like(mean))
            self.register_buffer("own", torch.zeros_like(mean), persistent=False)
        self.seen.mul_(0.5).add_(mean)
        self.own.add_(mean.abs())
        self.late = mean.clone()
        x = x + self.seen + 0.1 * self.own + self.wide.abs() + self.frozen.imag
        if self.shift is not None:
            x = x + self.shift
        self.shift = None
        self.sparse = (self.sparse * 0.9).coalesce()
        return self.linear((self.rows @ (self.sparse @ x.T)).T)


def scripted():
    return torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double())


def changing(module=Changing):
    """A level whose buffers change what they are; one step of it is one pass."""
    program = Program()

    @program.level("low", module=module, optimizer=partial(SGD, lr=0.01), data=loader(1))
    def low(model, batch):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2).mean()

    return program


Pair = namedtuple("Pair", "x y")


def of_pairs():
    return bilevel(
        "unroll",
        low_data=[Pair(*data(n, 8)) for n in range(3)],
        low_options={"inner_steps": 4},
    )


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


def in_half():
    """Losses in float16, whose scale moves and whose first steps are skipped."""
    program = Program()

    @program.level(
        "low",
        module=partial(nn.Linear, 3, 1),
        optimizer=partial(Adam, lr=0.05),
        data=[torch.randn(8, 3, generator=torch.Generator().manual_seed(n)) for n in range(3)],
        precision="fp16",
        inner_steps=4,
    )
    def low(model, batch, top):
        return 30.0 * (model(batch) - top.x.sum()).square().mean()

    @program.level(
        "top", lower=["low"], hypergrad="unroll", module={"x": torch.ones(3)}, optimizer=Adam
    )
    def top(hyper, low):
        return sum((p**2).sum() for p in low.parameters())

    return program


PROGRAMS = {
    "half": in_half,
    "everything": everything,
    "ladder": ladder,
    "rule": with_rule,
    "sources": with_sources,
    "hook": with_hook,
    "tasks": partial(tasks, 1),
    "module": partial(bilevel, module=Memory),
    "changing": changing,
    "scripted": partial(changing, scripted),
    "pairs": of_pairs,
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
    "persistent": partial(
        bilevel, low_data=lambda: loader(1, num_workers=1, persistent_workers=True)
    ),
    "drawing": partial(bilevel, low_data=drawing),
    "permuted": partial(bilevel, low_data=lambda: DataLoader(Permuted(), 8)),
    "collated": partial(bilevel, low_data=collated),
    "generators": with_generators,
    "epochs": with_epochs,
    "one loader": partial(with_one_loader, partial(loader, 1)),
    "one stateful": partial(with_one_loader, partial(stateful, shuffle=True)),
    "one persistent": partial(
        with_one_loader, partial(loader, 1, num_workers=1, persistent_workers=True)
    ),
    "stateful": partial(bilevel, low_data=Stateful),
    "closure": lambda: bilevel(low_data=batches_of_a_closure()),
}


def steps_of(runner, count):
    for _ in range(count):
        runner.step()


def left_by(runner):
    """Everything that a person sees of a run, and the random numbers that come next."""
    runner._journal.update(runner.tick)
    draws = torch.rand(2).tolist(), random.random(), float(np.random.rand())
    return bits(state_of(runner)), runner._journal.text(), draws


def state_of(runner):
    return {
        f"{name}.{key}": tensor
        for name, level in runner.built.levels.items()
        for key, tensor in (*level.parameters.items(), *level.module.named_buffers())
    }


def check_that_it_goes_on(make, save_at, more, path):
    """Compares a run that goes on in another runner with the one that was not interrupted."""
    whole = Runner(make(), seed=3)
    steps_of(whole, save_at)
    whole.save(path)
    steps_of(whole, more)
    expected = left_by(whole)
    torch.manual_seed(77)
    resumed = Runner(make(), seed=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", mlodeco.errors.SolverWarning)
        warnings.filterwarnings("ignore", "'set_vital'")
        resumed.load(path)
        assert resumed.tick == save_at
        steps_of(resumed, more)
    assert left_by(resumed) == expected


@pytest.mark.filterwarnings("ignore::mlodeco.errors.CheckpointWarning")
@pytest.mark.parametrize("save_at", [2, 7])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_run_that_is_saved_and_loaded_goes_on_to_the_bit(name, save_at, tmp_path):
    check_that_it_goes_on(PROGRAMS[name], save_at, 11 - save_at, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore:.*in between:mlodeco.errors.CheckpointWarning")
def test_all_random_numbers_go_on(tmp_path):
    first, second = random.Random(3), np.random.default_rng(3)

    def batches():
        while True:
            x, y = data(1, 8)
            yield x + first.random() + second.random(), y + torch.rand(()) + np.random.rand()

    runner = Runner(bilevel(low_data=batches), seed=1)
    steps_of(runner, 3)
    np.random.randn()  # half a pair is left
    runner.save(tmp_path / "saved")
    expected = [left_by(runner) for _ in range(3) if runner.step()]
    runner.load(tmp_path / "saved")
    assert runner.tick == 3
    assert [left_by(runner) for _ in range(3) if runner.step()] == expected


def test_samples_that_were_seen_are_not_loaded_again(tmp_path):
    make = PROGRAMS["noisy"]
    runner = Runner(make(), seed=3)
    steps_of(runner, 5)
    runner.save(tmp_path / "saved")
    resumed = Runner(make(), seed=3)
    Noisy.loaded = 0
    resumed.load(tmp_path / "saved")
    assert Noisy.loaded == 0
    resumed.step()
    assert Noisy.loaded == 8


SCHEDULERS = {
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "LambdaLR": {"lr_lambda": lambda n: 0.9**n},
    "MultiplicativeLR": {"lr_lambda": lambda n: 0.9},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
}


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.ChainedScheduler(parts)


FACTORIES = {n: partial(getattr(lr_scheduler, n), **options) for n, options in SCHEDULERS.items()}
FACTORIES |= {"SequentialLR": sequential, "ChainedScheduler": chained}


@pytest.mark.parametrize("name", FACTORIES)
def test_schedulers_go_on(name, tmp_path):
    make = partial(bilevel, "identity", low_options={"scheduler": FACTORIES[name]})
    check_that_it_goes_on(make, 4, 5, tmp_path / "saved")


OPTIMIZERS = [
    *("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "SGD", "Adafactor"),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::mlodeco.MlodecoWarning")
def test_optimizers_go_on(name, tmp_path):
    kind = getattr(torch.optim, name)
    make = partial(bilevel, "identity", low_options={"optimizer": partial(kind, lr=0.01)})
    check_that_it_goes_on(make, 3, 3, tmp_path / "saved")


class Wide(torch.optim.Optimizer):
    """Keeps float32 beside bfloat16 parameters, deep down too."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                zeros = torch.zeros_like(p, dtype=torch.float32)
                state = self.state[p]
                state.setdefault("kind", "sum")
                parts = state["parts"] = state.get("parts") or {"x": [zeros.clone(), (zeros, 0)]}
                known = state.setdefault("sum", zeros.clone())
                for part in (known, parts["x"][0], parts["x"][1][0]):
                    part.add_(p.grad.float(), alpha=1.0001)
                assert (state["kind"], type(parts["x"][1])) == ("sum", tuple)
                total = known + parts["x"][0] + parts["x"][1][0]
                p.sub_(0.003 * total.to(p.dtype))


def test_a_state_keeps_its_dtype(tmp_path):
    def make():
        program = Program()

        @program.level("w", module=partial(nn.Linear, 3, 1, dtype=torch.bfloat16), optimizer=Wide)
        def w(m):
            return (m.weight**2).sum() + (m.bias**2).sum()

        return program

    check_that_it_goes_on(make, 3, 5, tmp_path / "saved")


# What a run writes.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that ends by early stopping, and what it leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "_sync", lambda path: None)
        out = tmp_path_factory.mktemp("run") / "out"
        return out, trained(out, program=everything())


def names(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def test_the_newest_and_the_best_are_kept(finished):
    out, left = finished
    tick, value, path = left["best"]
    ends = [left["ticks"] - left["ticks"] % EVERY, left["ticks"]]
    assert left["ticks"] < 200
    assert names(out)[-2:] == [f"{ends[-1]:09d}", f"best-{tick:09d}"]
    assert len(names(out)) == 4
    assert path == out / "checkpoints" / f"best-{tick:09d}"
    best = Runner(everything(), seed=3)
    best.load(path)
    assert best.tick == tick
    assert best.history.metric("error")[-1] == value


def test_a_finished_run_stays_as_it_is(finished):
    out, left = finished
    again = trained(out)
    assert (again["metrics"], again["reason"]) == (left["metrics"], left["reason"])
    assert bits(again["state"]) == bits(left["state"])


def test_metrics_are_lines_of_json_without_times(finished):
    out, left = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [s["loss"] for s in steps if s["level"] == "low"] == left["losses"]["low"]
    assert {line["kind"] for line in lines} == {"step", "validation"}
    assert set(steps[0]) == {
        *("kind", "tick", "level", "step", "loss", "grad_norm", "learning_rate"),
        *("metrics", "cosine", "solves", "skipped"),
    }


def test_weights_are_plain_safetensors(tmp_path):
    runner = Runner(bilevel(module=Memory), seed=3)
    steps_of(runner, 2)
    runner.save(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "levels" / "low.safetensors")
    low = runner.built.levels["low"].module
    assert saved.keys() == {"first.weight", "first.bias", "second.bias", "frozen", "seen"}
    for name, tensor in saved.items():
        assert torch.equal(tensor, low.state_dict()[name])
    assert load_file(tmp_path / "saved" / "levels" / "top.safetensors").keys() == {"x"}


def test_weights_that_safetensors_lacks(tmp_path):
    runner = Runner(changing(), seed=3)
    runner.step()
    runner.save(tmp_path / "saved")
    low = runner.built.levels["low"].module
    saved = load_file(tmp_path / "saved" / "levels" / "low.safetensors")
    assert saved.keys() == low.state_dict().keys() - {"sparse"}
    assert torch.equal(torch.view_as_complex(saved["wide"]), low.wide)


def test_buffers_go_back_to_what_they_were(tmp_path):
    program = changing()
    runner = Runner(program, seed=3)
    low = program.module("low")
    runner.save(tmp_path / "before")
    before = low.state_dict().keys()
    runner.step()
    runner.save(tmp_path / "behind")
    behind = low.state_dict().keys()
    runner.load(tmp_path / "before")
    assert low.state_dict().keys() == before
    assert low.shift.tolist() == [1.0, 1.0, 1.0]
    assert not hasattr(low, "seen")
    runner.load(tmp_path / "behind")
    assert low.state_dict().keys() == behind
    assert low.shift is None
    Runner(program).load(tmp_path / "behind")  # of a module that has been used


# Programs that differ.


class Tracked:
    """A state that a later class may not take."""

    def __init__(self, names=("a",)):
        self.known = dict.fromkeys(names, 1)

    def state_dict(self):
        return dict(self.known)

    def load_state_dict(self, state):
        self.known = {name: state[name] for name in self.known}


def varied(*, buffer=True, source=False, validations=1, tracked=None):
    program = Program()

    def make():
        module = nn.Linear(3, 1, dtype=torch.float64)
        if buffer:
            module.register_buffer("b", torch.zeros(3, dtype=torch.float64))
        return module

    @program.level("low", module=make, optimizer=partial(SGD, lr=0.01), data=loader(1))
    def low(model, batch):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2).mean()

    for name, value in (tracked or {}).items():
        program.track(name, value)
    if source:
        program.source("task")([1.0, 2.0])
    for number in range(validations):

        @program.validate(every=1, monitor=None if number else "loss", mode="min")
        def check(low):
            return {"loss": low.weight.sum()}

    return program


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({}, {"buffer": False}, "buffer 'b' was there and is not there"),
        ({"buffer": False}, {}, "buffer 'b' was not there and is there"),
        ({}, {"source": True}, "the list of the program's sources was none and is 'task'"),
        ({"source": True}, {}, "the list of the program's sources was 'task' and is none"),
        (
            {"tracked": {"mine": Tracked()}},
            {"tracked": {"mine": Tracked(["b"])}},
            "the tracked 'mine' does not take the state that it had: KeyError: 'b'",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::mlodeco.errors.GraphWarning")
def test_what_differs_is_named(then, now, message, tmp_path):
    runner = Runner(varied(**then), seed=3)
    steps_of(runner, 2)
    runner.save(tmp_path / "saved")
    with pytest.raises(CheckpointError) as caught:
        Runner(varied(**now)).load(tmp_path / "saved")
    assert message in caught.value.found
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        ({"validations": 2}, {}, "with 2 validations, and there are 1: each begins anew"),
        ({"validations": 0}, {}, "with 0 validations, and there are 1: each begins anew"),
        ({}, {"tracked": {"mine": Tracked()}}, "the tracked 'mine' .* begin anew"),
        ({"tracked": {"mine": Tracked()}}, {}, "holds a state of the tracked 'mine'"),
    ],
)
def test_what_begins_anew_is_told(then, now, message, tmp_path):
    runner = Runner(varied(**then), seed=3)
    steps_of(runner, 2)
    runner.save(tmp_path / "saved")
    resumed = Runner(varied(**now))
    with pytest.warns(CheckpointWarning, match=message) as caught:
        resumed.load(tmp_path / "saved")
    assert len(caught) == 1
    assert resumed.step().tick == 3
    assert {one.last_tick for one in resumed._parts.validations} <= {3}


def test_files_wait_for_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(folder, "_sync", lambda path: seen.append((path.name, path.exists())))
    monkeypatch.setattr(Path, "rename", lambda *a: seen.append("rename") or os.rename(*a))
    Runner(everything(), seed=3).save(tmp_path / "saved")
    before = {name for name, _ in seen[: seen.index("rename")]}
    files = {path.name for path in (tmp_path / "saved").rglob("*")} - {"saved"}
    assert files | {".saved.writing"} == before
    assert seen[-1] == (tmp_path.name, True)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("pickle")

    runner = Runner(everything(), seed=3)
    steps_of(runner, 4)
    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    runner.save(tmp_path / "saved")
    runner.load(tmp_path / "saved")


def test_an_earlier_checkpoint_is_replaced(tmp_path):
    runner = Runner(bilevel("identity"), seed=3)
    for _ in range(3):
        runner.step()
        runner.save(tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    runner.load(tmp_path / "saved")
    assert runner.tick == 3


def test_one_that_was_being_replaced_is_found(tmp_path):
    runner = Runner(bilevel("identity"), seed=3)
    runner.step()
    runner.save(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / ".saved.old")  # killed between the two
    runner.load(tmp_path / "saved")


def test_a_checkpoint_is_announced(tmp_path):
    program, seen = bilevel("identity"), []

    @program.on("checkpoint")
    def tell(ctx, path, low):
        seen.append((ctx.tick, path.name))
        if ctx.tick == 6:
            ctx.stop("enough")

    result = run(tmp_path, program, steps=9, checkpoint_every=3)
    assert seen == [(3, "000000003"), (6, "000000006")]
    assert (result.stop_reason, result.directory) == ("enough", tmp_path)


def test_hooks_cannot_save_in_the_middle_of_a_tick(tmp_path):
    program = bilevel("identity")

    @program.on("after_step")
    def save():
        runner.save(tmp_path / "saved")

    runner = Runner(program, seed=3)
    with pytest.raises(RunError, match="in the middle of a tick"):
        runner.step()


# Options.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint_every": 5}, "checkpoint_every= is given and out= is not"),
        ({"resume": "auto"}, "resume= is given and out= is not"),
        ({"out": "o", "checkpoint_every": 0}, "checkpoint_every=0"),
        ({"out": "o", "keep": 0}, "keep=0"),
        ({"out": 3}, "out=3"),
        ({"out": "o", "resume": True}, "resume=True"),
        ({"out": "o", "checkpoint_errors": "ignore"}, "checkpoint_errors='ignore'"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    with pytest.raises(RunError, match=message):
        mlodeco.run(3, program=bilevel(), progress="off", **options)


def test_a_folder_with_another_run_is_not_overwritten(tmp_path):
    run(tmp_path, bilevel("identity"), steps=3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="holds a run") as caught:
        run(tmp_path, bilevel("identity"), steps=3, resume=None)
    assert "resume='auto'" in caught.value.remedy
    later = tmp_path / "checkpoints" / "000000003"
    run(tmp_path, bilevel("identity"), steps=5)
    with pytest.raises(RunError, match="further than the checkpoint"):
        run(tmp_path, bilevel("identity"), steps=9, resume=later)
    for path, content in before.items():
        if path.name != "metrics.jsonl":
            assert path.read_bytes() == content


def test_a_run_goes_on_from_a_path_in_another_folder(tmp_path):
    whole = trained(tmp_path / "whole", program=bilevel("identity"), steps=8)
    run(tmp_path / "one", bilevel("identity"), steps=5)
    path = tmp_path / "one" / "checkpoints" / "000000005"
    found = trained(tmp_path / "two", program=bilevel("identity"), steps=8, resume=path)
    assert bits(found["state"]) == bits(whole["state"])
    assert found["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    ("value", "message"), [(object(), "is a object"), (Curriculum, "is a type")]
)
def test_what_is_tracked_has_a_state(value, message):
    with pytest.raises(DeclarationError, match=message):
        Program().track("mine", value)


def test_a_name_is_tracked_once():
    program, mine = Program(), Curriculum()
    assert program.track("mine", mine) is mine
    program.track("mine", mine)
    with pytest.raises(DeclarationError, match="another object under the name 'mine'"):
        program.track("mine", Curriculum())
    with pytest.raises(DeclarationError, match="the name of a tracked object is ''"):
        program.track("", mine)


def test_a_state_that_cannot_be_saved_is_found_before_the_run(tmp_path):
    program = bilevel()
    mine = Curriculum()
    mine.seen = {"deep": [1, object()]}
    program.track("mine", mine)
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, program, steps=3)
    assert "the tracked 'mine'['seen']['deep'][1] is a builtins.object" in caught.value.found
    assert "track" in caught.value.remedy


@pytest.mark.parametrize(
    ("dtype", "found"),
    [(torch.bits8, "tensor of torch.bits8"), (torch.uint4, "tensor of torch.uint4")],
)
def test_a_buffer_that_cannot_be_saved_is_found_before_the_run(dtype, found, tmp_path):
    def make():
        module = nn.Linear(3, 1, dtype=torch.float64)
        odd = torch.zeros(3, dtype=torch.uint8).view(dtype)
        module.register_buffer("odd", odd, persistent=False)
        return module

    program, steps = bilevel("identity", module=make), []
    program.on("after_step")(lambda ctx: steps.append(ctx.tick))
    with pytest.raises(CheckpointError, match=found) as caught:
        run(tmp_path, program, steps=3)
    assert "['buffers']['low']['odd']" in caught.value.found
    assert steps == []


def test_a_look_at_the_state_changes_nothing(tmp_path):
    found = []
    for options in ({}, {"out": tmp_path}):
        runner = Runner(everything(), seed=3, **options)
        steps_of(runner, 4)
        found.append(left_by(runner))
    assert found[0] == found[1]


def test_sources_that_begin_anew_are_named_once(tmp_path):
    program = bilevel("identity")

    @program.source
    def noise():
        while True:
            yield torch.rand(3)

    program.levels.pop("top")

    @program.level("top", lower=["low"], hypergrad="identity", module=vector(), optimizer=Adam)
    def top(hyper, low, noise):
        return sum((p**2).sum() for p in low.parameters()) * noise.sum()

    with pytest.warns(CheckpointWarning, match="'noise' begin anew") as caught:
        run(tmp_path, program, steps=5, checkpoint_every=1)
    assert len([w for w in caught if w.category is CheckpointWarning]) == 1
