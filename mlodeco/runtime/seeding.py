"""Where the random numbers of a run start."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate.utils import set_seed

from mlodeco.errors import RunError


def seed_all(seed: int, *, by_process: bool = False) -> None:
    """Seeds torch, ``random`` and NumPy, in each process otherwise if asked for.

    Raises:
        RunError: it is no seed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise RunError(
            f"seed={seed!r}.", expected="an integer from 0 to 2**32 - 1.", remedy="run(seed=0)."
        )
    set_seed(seed, device_specific=by_process)


def seed_generators(generators: Iterable[torch.Generator], seed: int, rank: int) -> None:
    """Seeds the levels' own generators, each otherwise and in each process otherwise."""
    for number, generator in enumerate(generators):
        # small numbers: a stream on a CPU is seeded by the lowest 32 bits
        own = seed + number + 1_000_003 * rank
        generator.manual_seed(own % 2**63)
