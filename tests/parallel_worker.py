"""Programs that run in one process and in several, and what is left of them.

As a script: one of several processes, which runs the cases named and writes what it finds.
"""

from __future__ import annotations

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
CASES["kept graphs"] = partial(bilevel, Unroll(keep_graph=True), low_options={"inner_steps": 3})
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


def state(program):
    return {
        f"{name}.{key}": t.detach().clone()
        for name in program.levels
        for key, t in program.module(name).state_dict().items()
    }


def train(case, parts, **options):
    """The parameters and losses behind a run of a case."""
    program = CASES[case](parts)
    is_nested = case == "nested"
    runner = Runner(program, seed=3, nested=is_nested, **options)
    runner.run(3 if is_nested else STEPS)
    losses = {name: runner.history.losses(name) for name in program.levels}
    norms = [record.grad_norm for record in runner.history.steps]
    return {"state": state(program), "losses": losses, "norms": norms}


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
        "drop_last": DataLoader(numbers, batch_size=4, drop_last=True),
        "single": DataLoader(dataset, batch_size=None),
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
    return {name: _seen(value) for name, value in kinds.items() if value != []}


def _seen(batches):
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

    mlodeco.run(5, program=program, progress="off", seed=int(os.environ.get("RANK", "0")) and 7)
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


def refused():
    """The message of an error that all processes meet alike."""
    try:
        mlodeco.run(1, program=bilevel("identity", 2), reduce="onse")
    except mlodeco.MlodecoError as error:
        return str(error)
    return ""


def healthy():
    """Everything that goes well, in one launch."""
    found = {case: train(case, 2) for case in CASES}
    for name in ("neumann", "sama", "unroll", "cg"):
        found[f"once {name}"] = count_collectives(METHODS[name], reduce="once")
    found["exact"] = count_collectives("neumann")
    extra = (samples, stops, buffers, told, drifts, refused)
    found |= {f.__name__: f() for f in extra}
    return found | {"validated": validated(2), "differs": failing("differs")}


def failing(what):
    """Ends by an error in one process, or by its death."""
    program = bilevel("neumann", 2)
    rank = int(os.environ["RANK"])

    @program.on("before_step", level="top")
    def fail(ctx):
        if ctx.tick == 3 and rank == 1:
            if what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "raises":
                raise ValueError("words of my own")

    @program.level("third", module=lambda: vector(3 + rank * (what == "differs")))
    def third(m):
        return (m.x**2).sum()

    program.update("third")(lambda params, grads: (params, {}))
    begin = time.monotonic()
    try:
        mlodeco.run(9, program=program, progress="off")
        return {"message": ""}
    except Exception as error:
        return {"message": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    torch.set_num_threads(1)
    out, what = Path(sys.argv[1]), sys.argv[2]
    found = healthy() if what == "healthy" else failing(what)
    torch.save(found, out / f"{os.environ['RANK']}.pt")
