"""Peak memory: each side alone in a fresh process (this module run as a program).

The figure is the largest resident set (VmHWM of Linux) while the side ticks three times, less the
resident set after setup. Setup is all imports, the case at full size with its optimizers, and
a few ticks of the same side at two samples a batch, so that kernels are loaded. glibc is told to
give freed blocks back at once, so that the figure is what is in use; what it would keep for later
depends on the order of events, and scatters.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import products
from tests.benchmarks.sides import make_side
from tests.benchmarks.workloads import make

ROOT = Path(__file__).parents[2]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TICKS = 3
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384"}


def measure_memory(*arguments: str, program: str = "tests.benchmarks.memory") -> float | None:
    """Megabytes above setup, or None where the system does not tell.

    Args:
        arguments: ``side workload method``, or ``product workload mode``.
        program: another module that ends with ``report``, with arguments of its own.
    """
    if not STATUS.exists():
        return None
    command = [sys.executable, "-W", "ignore", "-m", program, *arguments]
    environment = os.environ | GIVE_BACK
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def main(kind: str, workload: str, what: str) -> None:
    """Prints the megabytes of one side."""
    torch.set_num_threads(1)
    prepare = _product if kind == "product" else _side
    report(prepare(kind, workload, what), TICKS)


def report(call: Callable[[], object], count: int) -> None:
    """Prints the megabytes that so many calls need above what there is now."""
    CLEAR.write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    for _ in range(count):
        call()
    print((_status("VmHWM") - before) / 1024)


def _side(name: str, workload: str, method: str) -> Callable[[], object]:
    tiny = make_side(name, workload, method, make(workload, tiny=True))
    for _ in range(TICKS):
        tiny.tick()
    return make_side(name, workload, method, make(workload)).tick


def _product(_: str, workload: str, mode: str) -> Callable[[], object]:
    tiny = products.prepare(workload, tiny=True)[mode]
    for _ in range(TICKS):
        tiny()
    return products.prepare(workload)[mode]


def _status(field: str) -> int:
    """Kilobytes of a line of the process's status."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


if __name__ == "__main__":
    main(*sys.argv[1:])
