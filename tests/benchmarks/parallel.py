"""Steps of two processes: gradients averaged during the backward pass, or behind it.

    python -m tests.benchmarks.parallel

Starts two processes on this machine that talk by gloo, with one thread each. Both sides are the
library: with DDP, and with one bucket that is averaged once the backward pass is over. A tick is
one ordinary step; its time is what a clock on the wall shows, since overlap is to save waiting.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD

from mlodeco import Program, Runner
from mlodeco.runtime.overlap import Passes
from tests.benchmarks.timing import Times
from tests.benchmarks.workloads import residual

ROUNDS, TICKS = 9, 6


def small() -> nn.Module:
    """A few thousand parameters: what a step costs beside its arithmetic."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))


def wide() -> nn.Module:
    """Seven million parameters for little arithmetic: what an average costs."""
    layers = [part for _ in range(4) for part in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 1024), nn.ReLU(), *layers, nn.Linear(1024, 10)
    )


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (partial(residual, blocks=3, width=8), 32),
    "small": (small, 32),
    "wide": (wide, 32),
}


def prepare(module: Callable[[], nn.Module], batch: int, *, is_overlapped: bool) -> Runner:
    """A program of one level behind its first steps."""
    program = Program()
    data = [(torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,)))]

    @program.level("net", module=module, optimizer=partial(SGD, lr=0.01), data=data)
    def net(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    runner = Runner(program, seed=0)
    if not is_overlapped:
        vars(runner._trainers["net"])["_choose_passes"] = Passes
    runner.run(3)
    return runner


def measure(module: Callable[[], nn.Module], batch: int) -> Times:
    """The time of a tick of each side."""
    runners = {
        "behind": prepare(module, batch, is_overlapped=False),
        "during": prepare(module, batch, is_overlapped=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(ROUNDS):
        for name, runner in runners.items():
            start = time.perf_counter()
            for _ in range(TICKS):
                runner.step()
            seconds[name].append((time.perf_counter() - start) / TICKS)
    return Times(seconds)


def work() -> None:
    """What each process does; the first one prints."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = Table("workload", "behind, ms", "during, ms", "during / behind")
    for name, (module, batch) in WORKLOADS.items():
        times = measure(module, batch)
        columns = [f"{times.milliseconds(side):.1f}" for side in times.seconds]
        table.add_row(name, *columns, str(times.ratio("during", "behind")))
    if os.environ["RANK"] == "0":
        Console().print(table)


def main() -> None:
    """Starts the processes and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "tests.benchmarks.parallel"]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **known, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
        )
        for rank in ("0", "1")
    ]
    sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    if "RANK" in os.environ:
        work()
    else:
        main()
