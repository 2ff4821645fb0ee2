"""What a display knows of a run: its newest records, smoothed losses, rates, time and memory."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlodeco.runtime import Result, Runner, StepRecord, Tick
from mlodeco.show.words import printable

DECAY = 0.9
"""How much of a smoothed loss is kept at each step of its level."""

_SAMPLES = 20
"""Looks back over which rates are taken."""


class Smoothed:
    """The exponential mean of a level's losses, which remembers about ten of them.

    With d = :data:`DECAY`, after n losses ``sum_i d^(n-i) x_i / sum_i d^(n-i)``: the division
    takes the weight of the start at zero away. Losses that are not finite are left out.
    """

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, loss: float) -> None:
        """Takes the next loss in."""
        if math.isfinite(loss):
            self._sum = DECAY * self._sum + loss
            self._weight = DECAY * self._weight + 1.0

    @property
    def value(self) -> float:
        """The mean; not a number before the first loss."""
        return self._sum / self._weight if self._weight else math.nan


class LevelReading:
    """What is known of one level: its newest record, its loss, its steps in this run."""

    def __init__(self) -> None:
        self.record: StepRecord
        self.loss = Smoothed()
        self.steps = 0
        self.skipped = 0

    def update(self, record: StepRecord) -> None:
        """Takes the record of its next step in."""
        self.record = record
        self.loss.add(record.loss)
        self.steps += 1
        self.skipped += record.skipped

    @property
    def solve(self) -> str:
        """The methods of the newest step's solves, their steps in all, the largest residual."""
        solves = self.record.solves
        if not solves:
            return ""
        methods = "+".join(dict.fromkeys(solve.method for solve in solves))
        residuals = [solve.residual for solve in solves if solve.residual is not None]
        size = f" {max(residuals):.1e}" if residuals else ""
        return f"{methods} {sum(solve.steps for solve in solves)}{size}"


@dataclass(frozen=True)
class _Sample:
    """How many steps there were at a time."""

    at: float
    steps: dict[str, int]


class Readings:
    """Kept up to date tick by tick, for the price of a few additions; read when drawn.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.levels: dict[str, LevelReading] = {}
        self.values: dict[str, tuple[float, int]] = {}
        self.wanted = 0
        self.done = 0
        self._first = 0
        self._clock = clock
        self._started = clock()
        self._runner: Runner | None = None
        self._samples: deque[_Sample] = deque(maxlen=_SAMPLES)

    def start(self, runner: Runner, steps: int) -> None:
        """Begins to count a run of so many ticks."""
        self._runner, self._first = runner, runner.tick
        self.wanted, self.done = steps, 0
        self._started = self._clock()
        self._samples.clear()
        self._samples.append(self._sample())

    def update(self, tick: Tick) -> None:
        """Takes a tick in."""
        self.done = tick.tick - self._first
        for record in tick.steps:
            level = self.levels.get(record.level)
            if level is None:
                level = self.levels[record.level] = LevelReading()
            level.update(record)
        for validation in tick.validations:
            for name, value in validation.metrics.items():
                self.values[name] = (value, validation.tick)

    def finish(self, result: Result) -> None:
        """Takes in how far the run came."""
        self.done = result.ticks - self._first

    def rates(self) -> dict[str, float]:
        """Steps per second of each level, over the last few looks."""
        now = self._sample()
        self._samples.append(now)
        before = self._samples[0]
        seconds = max(now.at - before.at, 1e-9)
        return {n: (count - before.steps.get(n, 0)) / seconds for n, count in now.steps.items()}

    def _sample(self) -> _Sample:
        steps = {name: level.steps for name, level in self.levels.items()}
        return _Sample(self._clock(), steps)

    @property
    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._clock() - self._started

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest takes if its ticks are like those before; None if not known."""
        if not 0 < self.done < self.wanted:
            return None
        return self.elapsed / self.done * (self.wanted - self.done)

    def metrics(self) -> Iterator[str]:
        """Each newest validation metric, and the best of that which is monitored."""
        for name, (value, tick) in self.values.items():
            yield f"{printable(name)} {value:.4g} (at {tick})"
        best = None if self._runner is None else self._runner.best
        if best is not None:
            yield f"best {printable(best.metric)} {best.value:.4g} (at {best.tick})"

    def memory(self) -> str:
        """The peak memory; nothing where it is not known."""
        peak = None if self._runner is None else self._runner.peak_memory
        return "" if peak is None else f"memory {peak / 2**20:.0f} MiB"


def spell_time(seconds: float) -> str:
    """``0:00:07`` for seven seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
