"""Programs whose lower levels are sharded, in two processes, and what is left of them.

As a script: one of the processes, which runs every case and writes what it finds.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adam

import mlodeco
from mlodeco import Program, Runner
from mlodeco.cli.commands import app
from mlodeco.hypergrad import CG, Identity, Neumann, Nystrom
from mlodeco.runtime import board, build, fsdp
from mlodeco.runtime.engine import compute_hypergradient, muted_context
from mlodeco.runtime.processes import processes_of
from tests.parallel_worker import data, loader, vector

STEPS = 12
FEW = 3
HIDDEN = 5


def net():
    """Whose hidden size two processes cannot halve; from the random numbers of the run."""
    return nn.Sequential(nn.Linear(3, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)).double()


def layers(module):
    """The first layer and the rest as two units."""
    fully_shard(module[0])
    return fully_shard(module)


class InFloat(nn.Sequential):
    def forward(self, x):
        return super().forward(x.float()).double()


def net_in_float():
    """Which autocast acts on."""
    return InFloat(nn.Linear(3, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))


def in_single_precision(module):
    return fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))


def frozen(module):
    module[0].requires_grad_(False)
    return module


class Encoder(nn.Module):
    """Called by another method than its forward."""

    def __init__(self):
        super().__init__()
        self.net, self.norm = net(), nn.BatchNorm1d(3).double()

    def __getitem__(self, number):
        return self.net[number]

    def forward(self, x):
        return self.net(self.norm(x))

    def encode(self, x):
        return self.forward(x)


def registered(module):
    register_fsdp_forward_method(fully_shard(module), "encode")
    return module


def made(kind, shard, make):
    return shard(make()) if kind == "sharded" else make()


def bilevel(
    method, parts, kind="whole", *, shard=layers, make=net, call=None, decay=0.0, **low_options
):
    program = Program()

    @program.level(
        "low",
        module=lambda: made(kind, shard, make),
        data=loader(1, parts),
        **{"clip_norm": 0.5, "optimizer": partial(Adam, lr=0.02), **low_options},
    )
    def low(model, batch, top):
        x, y = batch
        losses = (apply(model, x * top.y.exp())[:, 0] - y) ** 2
        loss = ((x @ top.x).sigmoid() * losses).mean()
        return loss + decay * sum((p**2).sum() for p in model.parameters()) if decay else loss

    def apply(model, x):
        return getattr(model, call)(x) if call else model(x)

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
        return ((apply(low, x)[:, 0] - y) ** 2).mean() + 0.01 * hyper.y**2

    return program


def chain(method, parts, kind="whole"):
    """Three levels over two leaves, one of them sharded, which the other reads as well."""
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level(
        "low", module=lambda: made(kind, layers, net), optimizer=sgd, data=loader(1, parts)
    )
    def low(model, batch, mid):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2 * (x @ mid.x).sigmoid()).mean()

    @program.level("side", module=vector(), optimizer=sgd, data=loader(5, parts))
    def side(m, batch, mid, low):
        x, y = batch
        return ((low(x * m.x)[:, 0] - y) ** 2).mean() + ((m.x - mid.x) ** 2).sum()

    @program.level(
        "mid",
        lower=["low", "side"],
        hypergrad=method,
        module=vector(),
        optimizer=sgd,
        data=loader(3, parts),
    )
    def mid(m, batch, low, side, top):
        x, y = batch
        return (
            ((low(x + side.x)[:, 0] - y) ** 2 * (x @ top.x).sigmoid()).mean()
            + ((m.x - top.x) ** 2).sum()
            + (m.x**2).sum()
        )

    @program.level(
        "top",
        lower=["mid"],
        hypergrad=method,
        module=vector(value=0.3),
        optimizer=sgd,
        data=loader(4, parts),
    )
    def top(hyper, batch, mid, low):
        x, y = batch
        return ((low(x)[:, 0] + x @ mid.x - y) ** 2).mean()

    return program


def feedback(parts, kind="whole"):
    """A mid-level that feeds back into its sharded lower level, for nested responses."""
    program = Program()
    sgd, method = partial(SGD, lr=0.05), CG(max_steps=3, damping=0.5)

    @program.level(
        "low", module=lambda: made(kind, layers, net), optimizer=sgd, data=loader(1, parts)
    )
    def low(model, batch, mid):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2 * (x @ mid.x).sigmoid()).mean()

    @program.level(
        "mid",
        lower=["low"],
        hypergrad=method,
        module=vector(),
        optimizer=sgd,
        data=loader(2, parts),
    )
    def mid(m, batch, low, top):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean() + ((m.x - top.x) ** 2).sum()

    @program.level(
        "top",
        lower=["mid"],
        hypergrad=method,
        module=vector(),
        optimizer=sgd,
        data=loader(3, parts),
    )
    def top(m, batch, mid):
        x, y = batch
        return ((x @ mid.x - y) ** 2).mean() + (m.x**2).sum()

    return program


def sourced(parts, kind="whole"):
    """A source that calls the sharded module."""
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.source("guess")
    def guess(low):
        while True:
            yield low(data(7)[0]).mean()

    @program.level(
        "low", module=lambda: made(kind, layers, net), optimizer=sgd, data=loader(1, parts)
    )
    def low(model, batch, guess, top):
        x, y = batch
        return ((model(x)[:, 0] - y - guess * top.x.sum()) ** 2).mean()

    @program.level(
        "top",
        lower=["low"],
        hypergrad="finite_difference",
        module=vector(),
        optimizer=sgd,
        data=loader(2, parts),
    )
    def top(m, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return program


METHODS = {
    "identity": "identity",
    "neumann": "neumann",
    "cg": CG(max_steps=5, damping=0.5, warm_start=True),
    "sama": "sama",
    "finite_difference": "finite_difference",
}
CASES = {f"bilevel {name}": partial(bilevel, method) for name, method in METHODS.items()}
CASES |= {
    f"chain {name}": partial(chain, METHODS[name]) for name in ("neumann", "finite_difference")
}
BRIEF = {
    "identity by differences": partial(bilevel, Identity(product="difference")),
    "neumann by differences": partial(bilevel, Neumann(product="difference", warm_start=True)),
    "cg by differences": partial(bilevel, CG(max_steps=3, damping=0.5, product="difference")),
    "nested": feedback,
    "source": sourced,
    "nystrom": partial(bilevel, Nystrom(rank=2)),
    "chain sama": partial(chain, "sama"),
    "frozen": partial(bilevel, "neumann", make=lambda: frozen(net())),
    "frozen, in place": partial(bilevel, "finite_difference", make=lambda: frozen(net())),
    "decay": partial(bilevel, "neumann", shard=fully_shard, decay=0.05),
    "single precision": partial(bilevel, "finite_difference", shard=in_single_precision),
    "in part": partial(
        bilevel,
        "finite_difference",
        shard=lambda module: module if fully_shard(module[0]) else None,
        optimizer=partial(SGD, lr=0.1, foreach=False),
    ),
    "micro-batches": partial(bilevel, "neumann", accumulate=2, inner_steps=2),
    "rollback": partial(bilevel, "finite_difference", rollback=True, inner_steps=2),
    "method": partial(bilevel, "neumann", shard=registered, make=Encoder, call="encode"),
    "method, in place": partial(
        bilevel, "finite_difference", shard=registered, make=Encoder, call="encode"
    ),
    "bf16": partial(bilevel, "neumann", make=net_in_float, precision="bf16"),
    "bf16, in place": partial(bilevel, "finite_difference", make=net_in_float, precision="bf16"),
}
CASES |= BRIEF

UNEQUAL = ("bf16", "bf16, in place", "method", "method, in place", "nystrom", "single precision")
"""Those that one process does not repeat: by BatchNorm, random numbers or rounding."""

BESIDE_WHOLE = [name for name in CASES if name not in BRIEF or name in UNEQUAL]
"""Those that two processes run with whole modules as well."""


def in_full(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def state(program):
    return {
        f"{name}.{key}": in_full(tensor)
        for name in program.levels
        for key, tensor in program.module(name).state_dict().items()
    }


def train(case, parts, kind="whole"):
    program = CASES[case](parts, kind)
    runner = Runner(program, seed=3, nested=case == "nested")
    with counted_gathers() as seen:
        runner.run(FEW if case in BRIEF else STEPS)
    losses = {name: runner.history.losses(name) for name in program.levels}
    norms = [record.grad_norm for record in runner.history.steps]
    return {"state": state(program), "losses": losses, "norms": norms, "gathers": len(seen)}


@contextmanager
def counted_gathers():
    """Every tensor that the library makes whole."""
    seen, whole = [], fsdp.whole

    def counting(tensor):
        found = whole(tensor)
        seen.extend([0] if found is not tensor else [])
        return found

    fsdp.whole = counting
    try:
        yield seen
    finally:
        fsdp.whole = whole


def apart(parts, kind="whole"):
    """Solves that take other numbers of products in each process, by its own data."""
    program = Program()
    sgd = partial(SGD, lr=0.05)

    @program.level(
        "low", module=lambda: made(kind, layers, net), optimizer=sgd, data=loader(1, parts)
    )
    def low(model, batch, mid):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2 * (x @ mid.x).sigmoid()).mean()

    @program.level(
        "mid",
        lower=["low"],
        hypergrad="finite_difference",
        module=vector(),
        optimizer=sgd,
        data=loader(2, parts),
    )
    def mid(m, batch, low, top):
        x, y = batch
        stretch = 0.0 if distributed.get_rank() == 0 else 1.0  # isotropic in the first process
        fit = (stretch * x @ m.x - y) ** 2
        return 1e-3 * (low(x)[:, 0] - y).mean() ** 2 + fit.mean() + ((m.x - top.x) ** 2).sum()

    @program.level(
        "top",
        lower=["mid", "low"],
        hypergrad=CG(product="difference", rtol=1e-4),
        module=vector(),
        optimizer=sgd,
        data=loader(3, parts),
    )
    def top(m, batch, low, mid):
        x, y = batch
        return ((low(x)[:, 0] + x @ mid.x - y) ** 2).mean() + 0.01 * (m.x**2).sum()

    return program


ONCE = {name: CASES[f"bilevel {name}"] for name in ("neumann", "cg", "finite_difference")}
ONCE |= {"apart": apart}


def once():
    """Trained with one mean a hypergradient, and the gathers."""
    found = {}
    for name, make in ONCE.items():
        for kind in ("whole", "sharded"):
            program = make(2, kind)
            with counted_gathers() as seen:
                Runner(program, seed=3, reduce="once").run(FEW)
            found[name, kind] = {"state": state(program), "gathers": len(seen)}
    return found


def compared(kind):
    """What is found where each process has a batch of its own, of which one needs no advice."""
    torch.manual_seed(3)
    program = bilevel("identity", 2, kind, shard=fully_shard, make=lambda: nn.Linear(3, 1).double())
    x, y = data(distributed.get_rank())
    if distributed.get_rank() == 0:
        x = torch.cat([torch.eye(3), -torch.eye(3)]).double() * 3**0.5
    batches = {"low": (x, y[: len(x)]), "top": data(5)}
    with counted_gathers() as seen:
        report = mlodeco.check("top", program=program, batches=batches)
    hypergradients = {
        f"{method}, {key}": tensor
        for method in ("neumann", "finite_difference")
        for key, tensor in mlodeco.hypergradient(
            "top", program=program, batches=batches, hypergrad=method
        ).items()
    }
    return {"report": str(report), "gathers": len(seen), "hypergradients": hypergradients}


SCRIPT = """
import mlodeco
from tests.sharded_worker import bilevel

mlodeco.run(3, program=bilevel("neumann", 2, "KIND"), seed=3)
"""


def command(kind):
    """What the command prints that compares hypergradients of a script."""
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()) as printed:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT.replace("KIND", kind))
        app(["check", str(script)], standalone_mode=False)
    return printed.getvalue()


def survivors():
    """Whole copies of the first layer's weight that are left between the steps."""
    program = bilevel(CG(max_steps=3, damping=0.5, warm_start=True), 2, "sharded")
    seen = []

    @program.on("after_step")
    def look():
        gc.collect()
        seen.append(
            [
                type(one).__name__
                for one in gc.get_objects()
                if type(one) in (Tensor, nn.Parameter)
                and one.shape == (HIDDEN, 3)
                and one.untyped_storage().nbytes()
            ]
        )

    Runner(program, seed=3).run(2)
    return seen


def bits(program):
    """Everything of the lower level that a hypergradient leaves as it is."""
    module = program.module("low")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors |= {f"{key}.grad": t.grad for key, t in module.named_parameters()}
    own = {k: t.to_local() if isinstance(t, DTensor) else t for k, t in tensors.items()}
    return {k: t.detach().clone() for k, t in own.items()} | {"random": torch.get_rng_state()}


def purity():
    """The lower level before and after hypergradients, one of which raises."""
    found = {}
    ways = {"gathered": ("neumann", None), "in place": ("finite_difference", mean_of_all())}
    for name, (method, mean) in ways.items():
        program = bilevel(method, 2, "sharded", shard=registered, make=Encoder, call="encode")
        Runner(program, seed=3).run(FEW)
        before = bits(program)
        gradient = differentiate(program, mean)
        after = bits(program)
        calls = []

        def fail(*_, calls=calls):
            calls.append(0)
            if len(calls) == 2:  # behind the direct pass, with the parameters moved to one side
                raise ValueError("words of my own")

        handle = program.module("low").net[2].register_forward_hook(fail)
        try:
            differentiate(program, mean, "finite_difference")
            message = ""
        except ValueError as error:
            message = str(error)
        handle.remove()
        found[name] = {
            "before": before,
            "after": after,
            "raised": bits(program),
            "message": message,
            "again": differentiate(program, mean),
            "gradient": gradient,
        }
    return found


def mean_of_all():
    """The mean over processes that a run has."""
    return processes_of(distributed.get_rank(), 2, torch.device("cpu")).mean


def differentiate(program, mean, method=None):
    """The hypergradient of a process by itself, or of the mean losses."""
    chosen = {} if method is None else {"hypergrad": method}
    if mean is None:
        return mlodeco.hypergradient("top", program=program, **chosen)
    built = build(program)
    return compute_hypergradient(
        built,
        "top",
        {name: level.last_batches for name, level in built.levels.items()},
        partial(muted_context, built),
        methods=built.methods_for(method) if method else None,
        mean=mean,
    ).gradient


def looks(kind):
    """What a validation, a hook and a source see of the lower level."""
    program = bilevel("finite_difference", 2, kind)
    seen = []

    @program.validate(every=2, data=loader(9, 2, count=27))
    def error(low, batch):
        x, y = batch
        return {"error": ((low(x)[:, 0] - y) ** 2).mean()}

    @program.validate(every=1)
    def size(low):
        return {"size": low(torch.ones(1, 3, dtype=torch.float64)).abs().sum()}

    @program.on("after_step", level="top")
    def look(low):
        with torch.no_grad():
            seen.append(float(low(torch.ones(1, 3, dtype=torch.float64))))

    result = mlodeco.run(4, program=program, progress="off", seed=3)
    return {"metrics": [r.metrics for r in result.history.validations], "seen": seen}


def prepared():
    """The way of an Accelerator with a plugin, which ignores it on CPUs: made to believe in it."""
    accelerator = Accelerator(cpu=True)
    before, plugin = (
        accelerator.distributed_type,
        FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
        ),
    )
    accelerator.state.fsdp_plugin = plugin
    set_kind(DistributedType.FSDP)
    found = {}
    try:
        for form, options in {"factory": {}, "instance": by_instance()}.items():
            program = bilevel("neumann", 2, **options)
            Runner(program, seed=3, accelerator=accelerator).run(FEW)
            low = program.module("low")
            found[form] = {
                "state": state(program),
                "kinds": {type(p).__name__ for p in low.parameters()},
                "units": len(fsdp.units(low)),
                "top": type(program.module("top").x).__name__,
            }
        module = net()
        named = bilevel("neumann", 2, params=list(module.parameters()), make=lambda: module)
        found["params"] = message_of(partial(Runner, named, accelerator=accelerator))
        for name, value in {
            "fsdp_version": 1,
            "activation_checkpointing": True,
            "cpu_offload": CPUOffloadPolicy(),
        }.items():
            with patch.object(plugin, name, value):
                program = bilevel("neumann", 2)
                found[name] = message_of(partial(Runner, program, accelerator=accelerator))
    finally:
        set_kind(before)
    for form, options in {"factory": {}, "instance": by_instance()}.items():
        program = bilevel("neumann", 2, **options)
        Runner(program, seed=3).run(FEW)
        found[form]["whole"] = state(program)
    return found


def by_instance():
    """An optimizer that was made of the parameters before they were sharded."""
    torch.manual_seed(3)
    module = net()
    return {"make": lambda: module, "optimizer": Adam(module.parameters(), lr=0.02)}


def set_kind(kind):
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = kind


def failing():
    """One process fails where the other has begun to gather."""
    program = bilevel("neumann", 2, "sharded")

    @program.on("before_step", level="top")
    def fail(ctx):
        if ctx.tick == 2 and ctx.processes.rank == 1:
            raise ValueError("words of my own")

    with patch.object(board, "_FAREWELL", 1.0):
        return message_of(partial(Runner(program).run, 3))


def message_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}" + "".join(getattr(error, "__notes__", []))
    return ""


def refused():
    """What cannot be sharded, and the messages."""
    shown = {
        "unroll": lambda: Runner(bilevel("unroll", 2, "sharded")),
        "replicas": lambda: Runner(bilevel("neumann", 2, "sharded", replicas=2)),
        "upper": lambda: Runner(upper_sharded()),
        "start": lambda: Runner(started()),
        "shared": lambda: Runner(shared()),
        "rule": lambda: Runner(ruled()),
        "decay": lambda: Runner(bilevel("neumann", 2, "sharded", decay=0.1)).run(1),
        "method": lambda: Runner(
            bilevel("neumann", 2, "sharded", shard=fully_shard, make=Encoder, call="encode")
        ).run(1),
        "half": lambda: Runner(bilevel("neumann", 2, "sharded", precision="fp16")),
        "offload": lambda: Runner(bilevel("neumann", 2, "sharded", shard=offloaded)),
        "divided": lambda: Runner(
            bilevel(
                "neumann",
                2,
                "sharded",
                optimizer=partial(ZeroRedundancyOptimizer, optimizer_class=Adam, lr=0.1),
            )
        ),
        "solve": lambda: mlodeco.solve("low", steps=1, program=bilevel("neumann", 2, "sharded")),
    }
    return {name: message_of(function) for name, function in shown.items()}


def offloaded(module):
    return fully_shard(module, offload_policy=CPUOffloadPolicy(pin_memory=False))


def upper_sharded():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=vector(), optimizer=sgd)
    def low(m, top):
        return (m.x**2).sum() * top(m.x).sum()

    @program.level("top", lower=["low"], module=lambda: fully_shard(net()), optimizer=sgd)
    def top(m, low):
        return m(low.x).sum()

    return program


def started():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module=lambda: fully_shard(net()), optimizer=sgd, init_from="top")
    def low(m):
        return m(torch.ones(1, 3).double()).sum()

    @program.level("top", lower=["low"], hypergrad=None, module=net)
    def top(m, low):
        return low(torch.ones(1, 3).double()).sum()

    program.update("top")(lambda params, grads: (params, {}))
    return program


def shared():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("a", module=lambda: layers(net()), params=lambda n: n[0] == "0", optimizer=sgd)
    def a(m):
        return m(torch.ones(1, 3).double()).sum()

    @program.level("b", module="a", params=lambda n: n[0] == "2", optimizer=sgd)
    def b(m):
        return m(torch.ones(1, 3).double()).sum()

    return program


def ruled():
    program = Program()

    @program.level("low", module=lambda: fully_shard(net()))
    def low(m):
        return m(torch.ones(1, 3).double()).sum()

    program.update("low")(lambda params, grads: (params, {}))
    return program


def everything():
    found = {"survivors": survivors()}
    found |= {case: {"sharded": train(case, 2, "sharded")} for case in CASES}
    for case in BESIDE_WHOLE:
        found[case]["whole"] = train(case, 2)
    found |= {f.__name__: f() for f in (once, purity, refused, prepared)}
    for f in (looks, compared, command):
        found[f.__name__] = {kind: f(kind) for kind in ("whole", "sharded")}
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    torch.set_num_threads(1)
    found = everything()
    found["failing"] = failing()
    torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
