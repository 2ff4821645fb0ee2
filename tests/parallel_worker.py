"""Programs that run in one process and in several, and what is left of them.

As a script: one of several processes, which runs the cases named and writes what it finds.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import warnings
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    DataLoaderConfiguration,
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
)
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.hypergrad import CG, Neumann, Unroll
from mlodeco.runtime.overlap import Overlap

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
        **{
            "module": net,
            "optimizer": partial(Adam, lr=0.02),
            "data": loader(1, parts),
            "clip_norm": 0.5,
            **(low_options or {}),
        },
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


def diamond(method, parts):
    """Two levels in the middle that share a lower and an upper one."""
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=net, optimizer=partial(Adam, lr=0.02), data=loader(1, parts))
    def low(model, batch, left, right):
        x, y = batch
        weights = (x @ left.x).sigmoid() * (x @ right.x).sigmoid()
        return (weights * (model(x)[:, 0] - y) ** 2).mean() + 0.05 * sum(
            (p**2).sum() for p in model.parameters()
        )

    def middle(m, batch, low, top):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean() + ((m.x - top.x) ** 2).sum()

    for seed, name in enumerate(("left", "right"), 2):
        program.level(
            name,
            lower=["low"],
            hypergrad=method,
            module=vector(value=0.1 * seed),
            optimizer=sgd,
            data=loader(seed, parts),
        )(middle)

    @program.level(
        "top",
        lower=["left", "right"],
        hypergrad=method,
        module=vector(value=0.3),
        optimizer=sgd,
        data=loader(4, parts),
    )
    def top(m, batch, left, right, low):
        x, y = batch
        return ((low(x)[:, 0] + x @ (left.x - right.x) - y) ** 2).mean()

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
CASES |= {f"diamond {name}": partial(diamond, method) for name, method in METHODS.items()}
CASES["kept graphs"] = partial(bilevel, Unroll(keep_graph=True), low_options={"inner_steps": 3})
CASES["kept seldom"] = partial(
    bilevel, Unroll(checkpoint_every=2, product="difference"), low_options={"inner_steps": 3}
)
CASES["forward"] = partial(bilevel, "unroll_forward", low_options={"inner_steps": 2})
CASES["warm"] = partial(bilevel, Neumann(warm_start=True, product="forward"))
CASES["micro-batches"] = partial(bilevel, "neumann", low_options={"accumulate": 2})
CASES["micro-batches above"] = partial(
    bilevel, "neumann", accumulate=2, clip_norm=0.01, low_options={"accumulate": 2}
)
CASES["rollback"] = partial(
    bilevel, "identity", repeat=2, low_options={"rollback": True, "inner_steps": 2}
)
CASES["schedule"] = partial(
    bilevel,
    "sama",
    scheduler=partial(StepLR, step_size=4),
    low_options={"scheduler": partial(StepLR, step_size=3, gamma=0.7), "inner_steps": 2},
)


def feedback(parts, threshold=-torch.inf):
    """A mid-level that feeds back into its lower level, for nested responses.

    With a threshold a loss depends on the levels that it reads in some processes alone.
    """
    program = Program()
    sgd = partial(SGD, lr=0.05)

    @program.level("low", module=vector(), optimizer=sgd, data=loader(1, parts))
    def low(m, batch, mid):
        x, y = batch
        loss = (m.x**2).sum()
        mask = x[:, 0] > threshold
        if mask.any():
            x, y = x[mask], y[mask]
            loss = loss + ((x @ m.x - y) ** 2 * (x @ mid.x).sigmoid()).sum() / len(mask)
        return loss

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
CASES["nested branches"] = partial(feedback, threshold=0.8)


def tasks(parts):
    """Two replicas that start from the level above, on data that are no DataLoader."""
    program = Program()
    sgd = partial(SGD, lr=0.1)
    x, y = data(5, 16)
    batch = x.view(2, 8, 3), y.view(2, 8)

    @program.level(
        "task",
        module=net,
        optimizer=sgd,
        data=[batch],
        init_from="start",
        inner_steps=2,
        replicas=2,
    )
    def task(model, batch):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2).mean()

    @program.level(
        "start", lower=["task"], hypergrad="unroll", module=net, optimizer=sgd, data=[batch]
    )
    def start(model, batch, task):
        x, y = batch
        return ((task(x)[:, 0] - y) ** 2).mean()

    return program


CASES["tasks"] = tasks


def divided(parts):
    """An optimizer whose state is divided among the processes."""
    adam = {
        1: partial(Adam, lr=0.02),
        2: partial(ZeroRedundancyOptimizer, optimizer_class=Adam, lr=0.02),
    }[parts]
    scheduler = partial(StepLR, step_size=3, gamma=0.7)
    return bilevel("neumann", parts, {"optimizer": adam, "scheduler": scheduler})


CASES["divided"] = divided


def tuned(parts):
    """A learning rate from above, a task from a source, and a level that steps by a rule."""
    program = Program()
    numbers = data(6, 64)

    @program.source("task", refresh="loop")
    def task():
        rank = int(os.environ.get("RANK", "0")) if parts == 2 else 0
        for at in itertools.cycle(range(0, 64, SIZE)):
            size = SIZE // parts
            yield tuple(part[at + rank * size :][:size] for part in numbers)

    @program.level(
        "low",
        module=net,
        optimizer=partial(SGD, lr=0.1),
        tune={"lr": lambda top: top.rate.exp()},
        inner_steps=2,
    )
    def low(model, task, ruled):
        x, y = task
        return ((x @ ruled.x).sigmoid() * (model(x)[:, 0] - y) ** 2).mean()

    @program.level("ruled", module=vector(), data=loader(1, parts))
    def ruled(m, batch):
        x, y = batch
        return ((x @ m.x - y) ** 2).mean()

    @program.update("ruled")
    def step(params, grads):
        return {key: params[key] - 0.1 * grads[key] for key in grads}, {}

    @program.level(
        "top",
        lower=["low"],
        hypergrad="unroll",
        module={"rate": torch.tensor(-2.0, dtype=torch.float64)},
        optimizer=partial(SGD, lr=0.1),
    )
    def top(m, task, low):
        x, y = task
        return ((low(x)[:, 0] - y) ** 2).mean()

    return program


CASES["tuned"] = tuned


class Experts(nn.Module):
    """Two networks for some samples each, and one that is for none."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = net(0), net(1), net(2)

    def errors(self, x, y):
        for expert, mask in ((self.first, x[:, 0] > 0.4), (self.second, x[:, 0] < -0.4)):
            if mask.any():
                yield ((expert(x[mask])[:, 0] - y[mask]) ** 2).sum() / len(x)


def experts(parts):
    """Which parameters a loss touches differs from batch to batch and between processes."""
    program = Program()

    @program.level(
        "low",
        module=Experts,
        optimizer=partial(Adam, lr=0.1),
        data=loader(8, parts, shuffle=False),
        accumulate=2,
    )
    def low(model, batch):
        return sum(model.errors(*batch), 0.0 * model.first[0].bias.sum())

    return program


CASES["experts"] = experts


class Odd(nn.Module):
    """Recurrent, recomputed and tied parts, and methods of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = nn.LSTM(1, 3, batch_first=True).double()
        self.tied = nn.Linear(3, 3).double()
        self.tied_too = nn.Linear(3, 3).double()
        self.tied_too.weight = self.tied.weight

    def encode(self, x):
        return self.recurrent(x[:, :, None])[0][:, -1]

    def decode(self, code):
        return checkpoint(self.tied_too, self.tied(code).tanh(), use_reentrant=False)


def odd(parts):
    """Modules that are called by their methods; metrics with graphs of their own."""
    program = Program()

    @program.level("low", module=Odd, optimizer=partial(SGD, lr=0.1), data=loader(1, parts))
    def low(model, batch, other):
        x, y = batch
        code = model.encode(x)
        size = sum((p**2).sum() for p in model.parameters())
        return ((model.decode(code)[:, 0] - y) ** 2).mean(), {"size": size}

    @program.level("other", module=vector(), optimizer=partial(SGD, lr=0.1), data=loader(2, parts))
    def other(m, batch):
        x, y = batch
        return ((x @ m.x - y) ** 2).mean()

    return program


CASES["odd modules"] = odd


def sparse(parts):
    """Gradients that DDP is not given."""
    program = Program()

    @program.level(
        "low",
        module=lambda: nn.Embedding.from_pretrained(data(7)[0], freeze=False, sparse=parts == 2),
        optimizer=partial(SGD, lr=0.1),
        data=loader(1, parts),
    )
    def low(table, batch):
        x, y = batch
        return ((table((x[:, 0].abs() * 5).long()).sum(1) - y) ** 2).mean()

    return program


CASES["sparse"] = sparse


def hooked(parts):
    """Gradients that hooks change, by functions that are not linear: those of the mean."""
    program = bilevel("neumann", parts)

    @program.on("hypergradient", level="top")
    @program.on("after_backward", level="low")
    def squash(grads):
        for grad in grads.values():
            grad.tanh_()

    return program


CASES["hooks"] = hooked

EXPLICIT = {"kept graphs", "tasks", "sparse"}
"""The cases in which no level's steps go through DDP."""


def state(program):
    return {
        f"{name}.{key}": t.detach().clone()
        for name in program.levels
        for key, t in program.module(name).state_dict().items()
    }


def train(case, parts, **options):
    """The parameters and losses behind a run of a case."""
    program = CASES[case](parts)
    is_nested = case.startswith("nested")
    runner = Runner(program, seed=3, nested=is_nested, **options)
    processes, exchanges = runner._processes, []
    exchange = processes.exchange
    processes.exchange = lambda value: exchanges.append(value) or exchange(value)
    runner.run(3 if is_nested else STEPS)
    losses = {name: runner.history.losses(name) for name in program.levels}
    steps = runner.history.steps
    return {
        "state": state(program),
        "losses": losses,
        "numbers": [number for r in steps for number in (r.grad_norm, r.learning_rate)],
        "overlapped": [n for n, t in runner._trainers.items() if isinstance(t._passes, Overlap)],
        "collectives": processes.collectives - 2 * len(exchanges),
    }


def count_collectives(method, **options):
    """The collectives of each hypergradient of the upper level."""
    program = bilevel(method, 2)
    seen = []

    @program.on("before_step", level="top")
    def before(ctx):
        seen.append(ctx.processes.collectives)

    @program.on("hypergradient", level="top")
    def after(ctx):
        seen[-1] = ctx.processes.collectives - seen[-1]

    Runner(program, seed=3, **options).run(3)
    return {"seen": seen, "state": state(program)}


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(22))


class Permuted(torch.utils.data.Sampler):
    """A permutation drawn from NumPy's global stream."""

    def __iter__(self):
        return iter(numpy.random.permutation(22).tolist())

    def __len__(self):
        return 22


def samples():
    """The sample numbers of every batch that a level sees, for several kinds of data."""
    numbers = TensorDataset(torch.arange(22))
    dataset = torch.utils.data.StackDataset(torch.arange(22))
    kinds = {
        "in order": DataLoader(numbers, batch_size=4),
        "shuffled": DataLoader(numbers, batch_size=4, shuffle=True),
        "own generator": DataLoader(
            numbers, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5)
        ),
        "numpy sampler": DataLoader(numbers, batch_size=4, sampler=Permuted()),
        "drop_last": DataLoader(numbers, batch_size=4, drop_last=True),
        "single": DataLoader(dataset, batch_size=None),
        "single, odd": DataLoader(torch.utils.data.StackDataset(torch.arange(3)), batch_size=None),
        "stream": DataLoader(Numbers(), batch_size=4),
        "list": [torch.arange(22)],
        "distributed": DataLoader(
            numbers,
            batch_size=4,
            sampler=torch.utils.data.DistributedSampler(numbers, shuffle=False),
        )
        if torch.distributed.is_initialized()
        else [],
    }
    found = {name: _seen(value) for name, value in kinds.items() if value != []}
    return found | {f"{name}, padded": _seen(kinds[name], tails="pad") for name in PADDED}


PADDED = ("in order", "shuffled", "drop_last", "single, odd", "stream")
"""The data of which the ends are padded as well."""


def _seen(batches, **options):
    program = Program()
    seen, ends = [], []

    @program.level("one", module=vector(), optimizer=partial(SGD, lr=0.1), data=batches)
    def one(m, batch):
        first = batch[0] if isinstance(batch, tuple | list) else batch
        seen.append(first.reshape(-1).tolist())
        return (m.x**2).sum()

    @program.on("epoch_end")
    def end(ctx):
        ends.append(ctx.step)

    seed = int(os.environ.get("RANK", "0")) and 7
    mlodeco.run(5, program=program, progress="off", seed=seed, **options)
    return {"seen": seen[1:], "ends": ends}  # the first call is a probe


def stops():
    program = bilevel("identity", 2)

    @program.on("after_step", level="top")
    def stop(ctx):
        if ctx.processes.rank == 1 and ctx.tick == 4:
            ctx.stop("enough of it")

    result = mlodeco.run(9, program=program, progress="off")
    return {"reason": result.stop_reason, "ticks": result.ticks}


def validated(parts):
    """Metrics over data whose batches no number of processes divides."""
    program = bilevel("identity", parts)
    calls = []

    @program.validate(every=2, data=loader(9, 2, count=27))
    def error(low, batch, ctx):
        x, y = batch
        calls.append(len(x))
        return {"error": ((low(x)[:, 0] - y) ** 2).mean(), "rises": float(ctx.tick)}

    @program.validate(every=2, monitor="rises", mode="min", patience=2)
    def other(low, ctx):
        own = {"own": 1.0} if ctx.processes.rank == 0 else {}
        return {"rises": float(ctx.tick + ctx.processes.rank), **own}

    result = mlodeco.run(20, program=program, progress="off", seed=3)
    return {
        "metrics": [record.metrics for record in result.history.validations],
        "reason": result.stop_reason,
        "calls": calls,
    }


def buffers():
    """A network whose buffers and random numbers follow each process's own data."""
    program = Program()

    @program.level(
        "low",
        module=lambda: nn.Sequential(net(), nn.BatchNorm1d(1).double(), nn.Dropout(0.5)),
        optimizer=partial(SGD, lr=0.1),
        data=loader(1, 2),
    )
    def low(model, batch, ctx):
        x, y = batch
        ctx.log(drawn=torch.rand((), generator=ctx.generator))
        return ((model(x)[:, 0] - y) ** 2).mean()

    result = mlodeco.run(3, program=program, progress="off", seed=3)
    return {"state": state(program), "drawn": [r.metrics["drawn"] for r in result.history.steps]}


def told():
    program = bilevel("identity", 2)
    seen = []

    @program.on("after_step", level="top")
    def look(ctx):
        own = torch.tensor(float(ctx.processes.rank))
        seen.append((ctx.is_main, ctx.gather(own), ctx.gather(own.expand(2, 2))))

    mlodeco.run(1, program=program, progress="plain")
    return seen


class Counting(GeneralTracker):
    """Notes the ticks that it is told of."""

    name = "counting"
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.ticks = []

    def log(self, values, step=None, **kwargs):
        self.ticks.append(step)


def tracked():
    """What a tracker is told of in each process."""
    tracker = Counting()
    mlodeco.run(2, program=bilevel("identity", 2), progress="off", log_with=tracker)
    return tracker.ticks


def drifts():
    """A hook that moves parameters by random numbers of each process."""
    program = bilevel("identity", 2)

    @program.on("after_step", level="low")
    def shake(low, ctx):
        with torch.no_grad():
            low[0].bias.add_(torch.rand((), dtype=torch.float64, generator=ctx.generator))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mlodeco.run(2, program=program, progress="off")
    return [str(w.message) for w in caught if w.category is mlodeco.errors.DriftWarning]


def accelerators():
    """Runs by a person's own Accelerators, with options that act and options that do not."""
    kind = DistributedDataParallelKwargs
    given = {
        "plain": {"step_scheduler_with_optimizer": False},
        "buckets": {
            "kwargs_handlers": [
                kind(bucket_cap_mb=0.00005, gradient_as_bucket_view=True, broadcast_buffers=False)
            ]
        },
        "hook": {"kwargs_handlers": [kind(comm_hook=DDPCommunicationHookType.BF16)]},
    }
    return {
        name: train("schedule", 2, accelerator=Accelerator(cpu=True, **options))
        for name, options in given.items()
    }


def gathering():
    """A validation over data that waits for the other processes at each batch."""
    program = bilevel("identity", 2)

    @program.validate(every=1, data=loader(9, 2))
    def error(low, batch, ctx):
        return {"error": ctx.gather(low(batch[0])).mean()}

    return program


def refused():
    """The messages of errors that all processes meet alike."""
    split = DataLoaderConfiguration(split_batches=True)
    divided = {"optimizer": partial(ZeroRedundancyOptimizer, optimizer_class=Adam, lr=0.1)}
    asked = {
        "reduce": (bilevel("identity", 2), {"reduce": "onse"}),
        "tails": (bilevel("identity", 2), {"tails": "pda"}),
        "split": (
            bilevel("identity", 2),
            {"accelerator": Accelerator(cpu=True, dataloader_config=split)},
        ),
        "gather": (gathering(), {}),
        "divided sama": (bilevel("sama", 2, divided), {}),
        "divided unroll": (bilevel("unroll", 2, divided), {}),
        "divided rollback": (bilevel("neumann", 2, divided | {"rollback": True}), {}),
    }
    found = {}
    for what, (program, options) in asked.items():
        with pytest.raises(mlodeco.MlodecoError) as caught:
            mlodeco.run(1, program=program, progress="off", **options)
        found[what] = str(caught.value)
    return found


def healthy():
    """Everything that goes well, in one launch."""
    found = {case: train(case, 2) for case in CASES}
    for name in ("neumann", "sama", "unroll", "cg"):
        found[f"once {name}"] = count_collectives(METHODS[name], reduce="once")
    found["exact"] = count_collectives("neumann")
    extra = (samples, stops, buffers, told, tracked, drifts, accelerators, refused)
    found |= {f.__name__: f() for f in extra}
    return found | {"validated": validated(2), "differs": differs()}


FAILURES = (
    "raises in loss",
    "raises in product",
    "killed in backward",
    "killed in product",
    "killed in data",
)
"""What the second of two processes does, and where."""


def failing(what, out):
    """A run that ends at its third tick by an error in one process, or by its death."""
    rank, drawn, passes = int(os.environ["RANK"]), [], Counter()

    def fail(tick, where):
        if rank == 1 and tick == 3 and what.endswith(where):
            (out / "failed").write_text(str(time.monotonic()))
            if what.startswith("killed"):
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("words of my own")

    def collate(samples):
        drawn.append(samples)
        fail(len(drawn), "data")
        return torch.utils.data.default_collate(samples)

    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=net, optimizer=sgd, data=loader(1, 2, collate_fn=collate))
    def low(model, batch, top, ctx):
        x, y = batch
        loss = ((x @ top.x).sigmoid() * (model(x)[:, 0] - y) ** 2).mean()
        passes[ctx.tick] += 1
        fail(ctx.tick, "loss")
        # the first pass of a tick is that of the step
        where = "backward" if passes[ctx.tick] == 1 else "product"
        loss.register_hook(lambda grad: fail(ctx.tick, where))
        return loss

    @program.level(
        "top", lower=["low"], hypergrad="neumann", module=vector(), optimizer=sgd, data=loader(2, 2)
    )
    def top(m, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return ending(program)


def differs():
    """Modules that are not the same in both processes."""
    program = Program()

    @program.level(
        "low",
        module=lambda: vector(3 + int(os.environ["RANK"])),
        optimizer=partial(SGD, lr=0.1),
    )
    def low(m):
        return (m.x**2).sum()

    return ending(program)


def ending(program):
    """The error that a run ends by, and when."""
    try:
        mlodeco.run(9, program=program, progress="off")
        return {"message": ""}
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "ended": time.monotonic()}


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def place(rank, count, port):
    """What a launcher tells the process of a number."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def fail(what, out, rank, port):
    os.environ.update(place(rank, 2, port))
    torch.save(failing(what, out), out / f"{rank}.pt")


def failures(out):
    """All failures at once, in two processes each, which have imported everything already."""
    import_module("torch._dynamo")  # DDP asks for it
    context = multiprocessing.get_context("fork")
    started = []
    for what in FAILURES:
        (out / what).mkdir()
        port = free_port()
        started += [
            context.Process(target=fail, args=(what, out / what, rank, port)) for rank in range(2)
        ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    (out / "exits").write_text(json.dumps([process.exitcode for process in started]))


if __name__ == "__main__":
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2]
    if what == "healthy":
        torch.save(healthy(), out / f"{os.environ['RANK']}.pt")
    else:
        failures(out)
