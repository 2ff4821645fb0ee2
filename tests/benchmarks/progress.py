"""What the display of a run costs: its processor time, beside that of the ticks.

A run has a clock around every call of its display, and around the drawings among them. So the
share of the display is measured in the run itself, where other work on the machine meets both.
Whole runs with a display and without, in turn, give the ratio of their processor times beside it,
which on a busy machine is noisier than the share is large.

    python -m tests.benchmarks.progress --rounds 9
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from functools import partial
from statistics import median

import torch
from rich.console import Console
from torch.optim import SGD

import mlodeco
from mlodeco import Program, Runner
from mlodeco.runtime import Listener
from mlodeco.show.progress import LiveDisplay, make_display
from tests.benchmarks.warm_start import program as quickstart


class Clock:
    """Adds up the processor time of calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function):
        def call(*args, **options):
            began = time.thread_time()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.thread_time() - began

        return call


def tiny(levels: int = 2) -> Program:
    """A chain of levels of two numbers each."""
    program = Program()
    program.level("level0", module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.01))(
        lambda m: (m.x**2).sum()
    )
    for number in range(1, levels):
        below = f"level{number - 1}"
        program.level(
            f"level{number}",
            lower=[below],
            reads={"low": below},
            module={"x": torch.ones(2)},
            optimizer=partial(SGD, lr=0.01),
        )(lambda m, low: ((m.x - low.x) ** 2).sum())
    return program


PROGRAMS = {
    "quickstart": partial(quickstart, 100),
    "tiny": tiny,
    "tiny, 12 levels": partial(tiny, 12),
}
FORMS = ("live", "plain")


def clocked(form: str, calls: Clock, drawings: Clock) -> Listener:
    """A display on a terminal of 100 columns that nobody sees."""
    if form == "plain":
        found = make_display(form, io.StringIO())
    else:
        found = LiveDisplay(Console(file=io.StringIO(), force_terminal=True, width=100))
        found._draw = drawings.timed(found._draw)
    found.on_tick = calls.timed(found.on_tick)
    return found


def run(make, steps: int, shown: Listener | None = None) -> float:
    """The processor time of a run, in seconds."""
    runner = Runner(make(), seed=0)
    runner.run(3)
    if shown is not None:
        runner.listeners.append(shown)
    began = time.process_time()
    runner.run(steps)
    return time.process_time() - began


def measure(make, form: str, steps: int, rounds: int) -> tuple[float, float, float, float]:
    """Milliseconds a tick; the shares of calls and drawings; the ratio of whole runs."""
    plain, shown, shares = [], [], []
    for number in range(rounds):
        calls, drawings = Clock(), Clock()
        order = [(plain, None), (shown, clocked(form, calls, drawings))]
        for found, display in order if number % 2 else reversed(order):
            found.append(run(make, steps, display))
        shares.append((calls.seconds / shown[-1], drawings.seconds / shown[-1]))
    ratio = median(b / a for a, b in zip(plain, shown, strict=True))
    share_of_calls, share_of_drawings = map(median, zip(*shares, strict=True))
    return 1e3 * median(plain) / steps, share_of_calls, share_of_drawings, ratio


def main() -> None:
    """Prints a line for each program and form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long a run takes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", mlodeco.MlodecoWarning)
    for name, make in PROGRAMS.items():
        steps = max(10, round(arguments.seconds / (run(make, 50) / 50)))
        for form in FORMS:
            tick, calls, drawings, ratio = measure(make, form, steps, arguments.rounds)
            print(
                f"{name}, {form}: {tick:.2f} ms a tick; display {calls:.2%} of the time, "
                f"of which drawing {drawings:.2%}; with / without {ratio:.3f}"
            )


if __name__ == "__main__":
    main()
