"""A run's progress: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Literal, TextIO, get_args

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mlodeco.errors import RunError, did_you_mean, quoted
from mlodeco.runtime import Listener, Result, Runner, StepRecord, Tick

Form = Literal["auto", "live", "plain", "off"]
"""What ``progress=`` may be."""

FORMS = get_args(Form)
"""The same at run time."""

_PLAIN_LINES = 10


def make_display(form: str, stream: TextIO | None = None) -> Listener | None:
    """The display for ``progress=``; ``auto`` is live on a terminal and in notebooks.

    Raises:
        RunError: ``form`` is not one of :data:`FORMS`.
    """
    if form not in FORMS:
        raise RunError(
            f"progress={form!r}.",
            expected=f"one of {quoted(FORMS)}.",
            remedy=f"choose one of them.{did_you_mean(str(form), FORMS)}",
        )
    if form == "off":
        return None
    console = Console(file=stream or sys.stderr)
    is_live = form == "live" or (form == "auto" and (console.is_terminal or console.is_jupyter))
    return LiveDisplay(console) if is_live else PlainDisplay(stream or sys.stderr)


class _Latest:
    """The newest record of each level and the newest value of each validation metric."""

    def __init__(self) -> None:
        self.records: dict[str, StepRecord] = {}
        self.values: dict[str, tuple[float, int]] = {}

    def update(self, tick: Tick) -> None:
        for record in tick.steps:
            self.records[record.level] = record
        for validation in tick.validations:
            for name, value in validation.metrics.items():
                self.values[name] = (value, validation.tick)

    def metrics(self) -> str:
        return "  ".join(
            f"{name} {value:.4g} (at {tick})" for name, (value, tick) in self.values.items()
        )


class PlainDisplay:
    """About ten lines a run, and one at its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._latest = _Latest()
        self._every = 1
        self._first = 0
        self._steps = 0
        self._started = 0.0
        self._last = ""

    def on_start(self, runner: Runner, steps: int) -> None:
        """Notes the start."""
        self._first, self._steps = runner.tick, steps
        self._every = -(-steps // _PLAIN_LINES)
        self._started = time.monotonic()

    def on_tick(self, tick: Tick) -> None:
        """Prints a line at every tenth of the run; the last waits for the validations."""
        self._latest.update(tick)
        done = tick.tick - self._first
        line = self._line(done)
        if tick.steps and done % self._every == 0 and done < self._steps:
            self._print(line)
            self._last = line

    def on_end(self, result: Result) -> None:
        """Prints the last state, if it is news, and says why the run ended."""
        seconds = time.monotonic() - self._started
        line = self._line(result.ticks - self._first)
        if line != self._last:
            self._print(line)
        self._print(f"{result.stop_reason}, {seconds:.1f} s")

    def on_error(self) -> None:
        """Nothing is open."""

    def _line(self, done: int) -> str:
        losses = "  ".join(f"{k} {r.loss:.4g}" for k, r in self._latest.records.items())
        metrics = self._latest.metrics()
        return f"step {done}/{self._steps}  {losses}" + (f"  |  {metrics}" if metrics else "")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class LiveDisplay:
    """A bar with the time left, and a row a level."""

    def __init__(self, console: Console) -> None:
        self._latest = _Latest()
        self._bar = Progress(
            TextColumn("[bold]step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("run")
        self._live = Live(
            console=console,
            refresh_per_second=4,
            get_renderable=self._render,
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
            vertical_overflow="visible",
        )
        self._first = 0

    def on_start(self, runner: Runner, steps: int) -> None:
        """Opens the display."""
        self._first = runner.tick
        self._bar.reset(self._task, total=steps)
        self._live.start()

    def on_tick(self, tick: Tick) -> None:
        """Keeps the newest records; they are drawn four times a second."""
        self._latest.update(tick)
        self._bar.update(self._task, completed=tick.tick - self._first)

    def on_end(self, result: Result) -> None:
        """Draws the last state and says why the run ended."""
        self._live.stop()
        self._live.console.print(result.stop_reason, markup=False, highlight=False)

    def on_error(self) -> None:
        """Closes the display, so that the traceback stands below it."""
        self._live.stop()

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for title in ("level", "step", "loss", "gradient", "cosine", "rate", "solve"):
            table.add_column(title, justify="left" if title == "level" else "right")
        for name, record in list(self._latest.records.items()):
            cells = _cells(name, record)
            table.add_row(*(Text(cell) for cell in cells))
        parts: list[Any] = [self._bar, table]
        if self._latest.values:
            parts.append(Text(f"validation: {self._latest.metrics()}"))
        return Group(*parts)


def _cells(name: str, record: StepRecord) -> tuple[str, ...]:
    solve = ""
    if record.solves:
        last = record.solves[-1]
        size = "" if last.residual is None else f" {last.residual:.1e}"
        solve = f"{last.method} {last.steps}{size}"
    return (
        name,
        str(record.step),
        f"{record.loss:.4g}",
        f"{record.grad_norm:.2e}",
        "" if record.cosine is None else f"{record.cosine:.2f}",
        f"{record.learning_rate:.2g}",
        solve,
    )
