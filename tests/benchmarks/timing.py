"""Time per tick: interleaved blocks, and the ratios of their rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

BLOCK_S = 0.4
"""About how long a block of the slowest side lasts; it has two ticks at least."""


@dataclass(frozen=True)
class Times:
    """The time of one call of each side in each round, in seconds of processor time.

    Processor time leaves out the time in which other processes had the processor.
    """

    seconds: dict[str, list[float]]

    def milliseconds(self, name: str) -> float:
        """The median over rounds."""
        return 1e3 * median(self.seconds[name])

    def ratio(self, name: str, base: str) -> Ratio:
        """Round by round, the one over the other."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        low, middle, high = quantiles([a / b for a, b in pairs], n=4, method="inclusive")
        return Ratio(low, middle, high)


@dataclass(frozen=True)
class Ratio:
    """The quartiles of the ratios of the rounds."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Times every call in every round, one block each, in alternating order."""
    repeats = max(2, round(BLOCK_S / max(_warm_up(call) for call in calls.values())))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            seconds[name].append(_block(calls[name], repeats))
        order.reverse()
    return Times(seconds)


def _warm_up(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    return _block(call, 2)


def _block(call: Callable[[], object], repeats: int) -> float:
    gc.collect()
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats
