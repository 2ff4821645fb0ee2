"""The time and the memory of a run's ticks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from mlodeco.runtime.history import Tick
from mlodeco.runtime.memory import peak_of_process
from mlodeco.runtime.result import Result
from mlodeco.runtime.runner import Runner

_WARM_UP = 3
"""Steps that are left out: they allocate, compile and load code."""

_RESET = Path("/proc/self/clear_refs")


class Meter:
    """A listener that times the ticks of a run and looks at its memory.

    Attributes:
        ends: the seconds from the start to the end of each tick.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._started = 0.0
        self._is_cuda = False
        self._before: int | None = None

    @property
    def what(self) -> str:
        """What the memory is of, in words."""
        return "CUDA tensors" if self._is_cuda else "the process"

    @property
    def memory(self) -> int | None:
        """The peak in bytes above what there was before the first tick; None if not known."""
        peak = self._peak()
        return None if peak is None or self._before is None else peak - self._before

    def on_start(self, runner: Runner, steps: int) -> None:
        """Starts the clock."""
        levels = runner.built.levels.values()
        self._is_cuda = any(p.is_cuda for level in levels for p in level.parameters.values())
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak()
        self._before = self._peak()
        self._started = self._now()

    def on_tick(self, tick: Tick) -> None:
        """Notes the time; validations behind the last tick are none."""
        if tick.steps:
            self.ends.append(self._now() - self._started)

    def on_end(self, result: Result) -> None:
        """Nothing is open."""

    def on_error(self) -> None:
        """Nothing is open."""

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._is_cuda else peak_of_process()


def seconds_per_step(ends: Sequence[float], ticks: Iterable[int]) -> float | None:
    """The median time from one step of a level to the next, the first few left out.

    Args:
        ends: the seconds from the start to the end of each tick.
        ticks: those at which the level steps, from 1.
    """
    times = [ends[tick - 1] for tick in dict.fromkeys(ticks) if tick <= len(ends)]
    spans = [end - start for start, end in pairwise([0.0, *times])]
    return median(spans[min(_WARM_UP, len(spans) // 2) :]) if spans else None


def _reset_peak() -> None:
    """Makes the present resident memory the largest, where the system can."""
    with suppress(OSError):
        _RESET.write_text("5")
