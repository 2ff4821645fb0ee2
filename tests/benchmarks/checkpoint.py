"""Checkpoints on the quickstart: the time of a run with one every 100 ticks beside one with none.

The two are run in turn, and the ratio of each pair of neighbours is taken: other work on the
machine meets both.

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
from tests.benchmarks.warm_start import program


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
    plain, kept = [], []
    for _ in range(arguments.rounds):
        out = Path(tempfile.mkdtemp(dir=arguments.out))
        plain.append(seconds(arguments.steps, None, None))
        kept.append(seconds(arguments.steps, out / "run", arguments.every))
        shutil.rmtree(out)
    ratio = median(b / a for a, b in zip(plain, kept, strict=True))
    print(f"{arguments.steps} ticks: {median(plain):.3f} s without, {median(kept):.3f} s with")
    print(f"smallest: {min(plain):.3f} s and {min(kept):.3f} s, {min(kept) / min(plain):.3f}")
    print(f"median of the ratios: {ratio:.3f}")


if __name__ == "__main__":
    main()
