"""Checkpoints on the quickstart: the time of a run with one every 100 ticks beside one with none.

The two are run in turn, and the ratio of each pair of neighbours is taken: other work on the
machine meets both. Where it makes these ratios noisy, the share of the time in which a run writes
metrics and checkpoints is the better measure.

    python -m tests.benchmarks.checkpoint --rounds 9 --out /tmp
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median

import torch

import mlodeco
from mlodeco.runtime.checkpoint.output import Output
from tests.benchmarks.warm_start import program


class Clock:
    """Adds up the time that methods of a run's output take."""

    def __init__(self) -> None:
        self.total = 0.0

    def timed(self, method):
        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.total += time.perf_counter() - began

        return call


def seconds(steps: int, out: Path | None, every: int | None) -> float:
    """How long a run of the quickstart takes, with checkpoints or without."""
    made = program(100)
    mlodeco.run(1, program=made, progress="off", seed=0)  # builds
    runner = mlodeco.Runner(made, seed=0, out=out, checkpoint_every=every)
    began = time.perf_counter()
    runner.run(steps)
    return time.perf_counter() - began


def main() -> None:
    """Prints the times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None, help="a folder on the disk to write to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    plain, kept, shares, clock = [], [], [], Clock()
    for name in ("record", "save"):
        setattr(Output, name, clock.timed(getattr(Output, name)))
    for _ in range(arguments.rounds):
        out = Path(tempfile.mkdtemp(dir=arguments.out))
        plain.append(seconds(arguments.steps, None, None))
        clock.total = 0.0
        kept.append(seconds(arguments.steps, out / "run", arguments.every))
        shares.append(clock.total / kept[-1])
        shutil.rmtree(out)
    ratio = median(b / a for a, b in zip(plain, kept, strict=True))
    print(f"{arguments.steps} ticks: {median(plain):.3f} s without, {median(kept):.3f} s with")
    print(f"smallest: {min(plain):.3f} s and {min(kept):.3f} s, {min(kept) / min(plain):.3f}")
    print(f"median of the ratios: {ratio:.3f}")
    print(f"share of writing: {median(shares):.2%}, smallest {min(shares):.2%}")


if __name__ == "__main__":
    main()
