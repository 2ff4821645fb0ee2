"""Programs that are ended and go on, and what is left of them.

As a script: ``python -m tests.checkpoint_worker OUT KILLS`` kills runs at random moments and lets
them go on; with RANK and WORLD_SIZE it is one of several processes, which runs what OUT/plan.json
says.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program
from mlodeco.hypergrad import CG
from mlodeco.runtime.checkpoint import folder, output
from mlodeco.runtime.fsdp import whole

STEPS = 200
EVERY = 20


def data(seed, count=48):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=g), torch.randn(
        count, dtype=torch.float64, generator=g
    )


def loader(seed, parts=1, count=48, **options):
    options = {"shuffle": True, **options}
    return DataLoader(TensorDataset(*data(seed, count)), batch_size=8 // parts, **options)


def network():
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1)
    ).double()


DIVIDED = partial(ZeroRedundancyOptimizer, optimizer_class=Adam, lr=0.02)


class Curriculum:
    """A state of the user's that decides how the run goes on."""

    def __init__(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def everything(parts=1, data_of=loader, optimizer=None):
    """Dropout, BatchNorm, momentum, Adam, a scheduler, CG with warm start, early stopping."""
    program = Program()
    curriculum = program.track("curriculum", Curriculum())

    @program.level(
        "low",
        module=network,
        optimizer=optimizer or partial(SGD, lr=0.05, momentum=0.9),
        scheduler=partial(StepLR, step_size=30, gamma=0.9),
        data=data_of(1, parts),
        inner_steps=3,
    )
    def low(model, batch, top, ctx):
        x, y = batch
        curriculum.seen += 1
        ctx.log(drawn=torch.rand((), generator=ctx.generator), seen=curriculum.seen)
        noise = 1e-3 * random.random()
        weights = (x @ top.x).sigmoid() + noise
        decay = sum((p**2).sum() for p in model.parameters())
        return (weights * (model(x)[:, 0] - y) ** 2).mean() + 0.05 * decay

    @program.level(
        "top",
        lower=["low"],
        hypergrad=CG(max_steps=3, damping=1.0, warm_start=True),
        module={"x": torch.full((3,), 0.1, dtype=torch.float64)},
        optimizer=partial(Adam, lr=0.02),
        data=data_of(2, parts),
    )
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    @program.validate(every=15, data=data_of(3, parts), monitor="error", mode="min", patience=9)
    def error(low, batch):
        x, y = batch
        return {"error": ((low(x)[:, 0] - y) ** 2).mean()}

    return program


def run(out, program=None, steps=STEPS, **options):
    options = {"checkpoint_every": EVERY, "resume": "auto", "seed": 3, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mlodeco.errors.SolverWarning)
        return mlodeco.run(
            steps, program=program or everything(), out=out, progress="off", **options
        )


def state(program):
    return {
        f"{name}.{key}": whole(t).detach().clone()
        for name in program.levels
        for key, t in program.module(name).state_dict().items()
    }


def trained(out, **options):
    """What a run leaves: parameters, the metrics file, why it ended."""
    program = options.pop("program", None) or everything()
    result = run(out, program, **options)
    best = result.best and (result.best.tick, result.best.value, result.best.path)
    return {
        "state": state(program),
        "metrics": (Path(out) / "metrics.jsonl").read_bytes(),
        "reason": result.stop_reason,
        "ticks": result.ticks,
        "losses": {name: result.history.losses(name) for name in program.levels},
        "best": best,
    }


def bits(state):
    """The bytes of every tensor."""
    plain = {key: t.to_dense().contiguous().reshape(-1) for key, t in state.items()}
    return {key: t.view(torch.uint8).tolist() for key, t in plain.items()}


def in_child(action):
    """Runs something in a forked process; its number."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return child


def finish(out):
    found = trained(out)
    left = {"bits": bits(found["state"]), "ticks": found["ticks"], "reason": found["reason"]}
    left["metrics"] = found["metrics"].decode()
    (out / "left.json").write_text(json.dumps(left))


def killed_at(number):
    """Ends the process by SIGKILL at the n-th operation on a file of a checkpoint."""
    count = 0

    def hook(event, args):
        nonlocal count
        if event not in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"):
            return
        if args and isinstance(args[0], str | os.PathLike) and "checkpoints" in str(args[0]):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_runs(out, count):
    """Kills so many runs at random moments; which did not end like the one never killed."""
    draw = random.Random(0)
    os.waitpid(in_child(partial(finish, _made(out / "whole"))), 0)
    left = (out / "whole" / "left.json").read_text()
    expected = json.loads(left)["metrics"]
    report = {"differ": [], "killed": 0, "resumed_from": []}
    for number in range(count):
        here = _made(out / str(number))
        if number % 2:
            moment = draw.randrange(1, 120)

            def act(here=here, moment=moment):
                killed_at(moment)
                finish(here)

            child = in_child(act)
        else:
            child = in_child(partial(finish, here))
            wait_for(here / "metrics.jsonl", draw.uniform(0.0, 0.95) * len(expected))
            os.kill(child, signal.SIGKILL)
        report["killed"] += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = sorted(p.name for p in (here / "checkpoints").glob("*"))
        report["resumed_from"].append(found[-1] if found else None)
        os.waitpid(in_child(partial(finish, here)), 0)
        found = here / "left.json"
        if not found.exists() or found.read_text() != left:
            report["differ"].append(number)
        if list((here / "checkpoints").glob(".*")):
            report["differ"].append(f"stray {number}")
    (out / "report.json").write_text(json.dumps(report))


def sharded(parts):
    from tests.sharded_worker import bilevel

    return bilevel(CG(max_steps=3, damping=1.0, warm_start=True), parts, "sharded")


def of_several(out, plan):
    """What one of several processes does, and leaves in OUT/RANK.json."""
    rank, parts = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for name, what in plan.items():
        divided = {"optimizer": DIVIDED} if what.get("divided") else {}
        program = sharded(parts) if what.get("sharded") else everything(parts, **divided)
        if what.get("term"):
            at = what["term"]

            @program.on("after_step", level="low")
            def end(ctx, at=at):
                if ctx.tick == at and rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)

        if what.get("kill", [None])[0] == rank:
            killed_at(what["kill"][1])
        if what.get("full") and rank == 1:

            def full(path, text):
                raise OSError(28, "No space left on device")

            folder._write_text, before = full, folder._write_text
        options = {k: v for k, v in what.items() if k in ("steps", "resume", "checkpoint_every")}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                left = trained(out / what["out"], program=program, **options)
                found[name] = {
                    "bits": bits(left["state"]),
                    "metrics": left["metrics"].decode(),
                    "losses": left["losses"],
                    "ticks": left["ticks"],
                }
            except SystemExit as error:
                found[name] = {"code": error.code, "message": str(error)}
        kinds = (mlodeco.errors.CheckpointWarning,)
        found[name]["warned"] = [str(w.message) for w in caught if w.category in kinds]
        if what.get("full") and rank == 1:
            folder._write_text = before
    (out / f"{rank}.json").write_text(json.dumps(found))


def wait_for(path, size):
    """Waits until a file has grown to a size."""
    while not path.exists() or path.stat().st_size < size:
        time.sleep(0.001)


def _made(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder._sync = lambda path: None  # what a process has written outlives it
    output.INTERVAL = 0.0  # the metrics tell where a run is
    place = Path(sys.argv[1])
    if "RANK" in os.environ:
        of_several(place, json.loads((place / "plan.json").read_text()))
    else:
        kill_runs(place, int(sys.argv[2]))
