"""A run's progress: a live table on a terminal and in notebooks, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any, Literal, TextIO, cast, get_args

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.jupyter import JupyterMixin
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlodeco.runtime import Listener, Result, Runner, Tick
from mlodeco.runtime.processes import check_choice
from mlodeco.show.readings import LevelReading, Readings, spell_time
from mlodeco.show.words import printable

Form = Literal["auto", "live", "plain", "off"]
"""What ``progress=`` may be."""

FORMS = get_args(Form)
"""The same at run time."""

_PLAIN_LINES = 10
_INTERVAL = 0.25
"""Seconds between two drawings."""

_SHARE = 0.005
"""Of the time, the most that goes into drawings."""


def make_display(form: str, stream: TextIO | None = None) -> Listener | None:
    """The display for ``progress=``; ``auto`` is live on a terminal and in notebooks.

    None for ``off``, and where there is no stream. A stream whose reader goes away ends no run.

    Raises:
        RunError: ``form`` is not one of :data:`FORMS`.
    """
    check_choice("progress", form, FORMS)
    found = stream or sys.stderr
    if form == "off" or found is None:
        return None
    lasting = cast(TextIO, _Lasting(found))
    console = Console(file=lasting)
    if form == "plain" or (form == "auto" and not (console.is_terminal or console.is_jupyter)):
        return PlainDisplay(lasting)
    return NotebookDisplay() if console.is_jupyter else LiveDisplay(console)


class _Lasting:
    """A stream on which nothing fails: what cannot be written is left out."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PlainDisplay:
    """About ten lines a run, and one at its end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._readings = Readings()
        self._every = 1
        self._last: tuple[int, str] | None = None

    def on_start(self, runner: Runner, steps: int) -> None:
        """Notes the start."""
        self._readings.start(runner, steps)
        self._every = -(-steps // _PLAIN_LINES)
        self._last = None

    def on_tick(self, tick: Tick) -> None:
        """Prints a line at every tenth of the run; the last waits for the validations."""
        readings = self._readings
        readings.update(tick)
        if tick.steps and readings.done % self._every == 0 and readings.done < readings.wanted:
            self._print_state()

    def on_end(self, result: Result) -> None:
        """Prints the last state, if it is news, and says why the run ended."""
        self._readings.finish(result)
        if self._last != (self._readings.done, self._state()):
            self._print_state()
        self._print(f"{printable(result.stop_reason)}, {self._readings.elapsed:.1f} s")

    def on_error(self) -> None:
        """Nothing is open."""

    def _state(self) -> str:
        levels = self._readings.levels.items()
        losses = (f"{printable(name)} {level.loss.value:.4g}" for name, level in levels)
        skipped = sum(level.skipped for _, level in levels)
        told = f"{skipped} skipped" if skipped else ""
        return _joined(
            "  |  ", _joined("  ", *losses), told, _joined("  ", *self._readings.metrics())
        )

    def _print_state(self) -> None:
        readings, state = self._readings, self._state()
        self._last = readings.done, state
        line = f"step {readings.done}/{readings.wanted}  {state}"
        self._print(_joined("  |  ", line, _joined(", ", _left(readings), readings.memory())))

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _left(readings: Readings) -> str:
    seconds = readings.remaining
    return "" if seconds is None else f"{spell_time(seconds)} left"


def _joined(between: str, *parts: str) -> str:
    """Those of the parts that are not empty."""
    return between.join(filter(None, parts))


class View(JupyterMixin):
    """What is drawn of the readings: a bar with the time left, a row a level, validations.

    At the end of a run also why it ended.
    """

    def __init__(self, readings: Readings, reason: str = "") -> None:
        self._readings = readings
        self._reason = reason

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        readings = self._readings
        yield self._bar()
        yield _table(readings, options.max_width)
        metrics = _joined("  ", *readings.metrics())
        if metrics:
            yield Text(f"validation: {metrics}")
        if self._reason:
            yield Text(self._reason)

    def _bar(self) -> Table:
        readings = self._readings
        told = (spell_time(readings.elapsed), _left(readings), readings.memory())
        bar = ProgressBar(max(readings.wanted, 1), readings.done, width=None)
        done = _joined("  ", f"{readings.done}/{readings.wanted}", *told)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True)
        line.add_row(Text("step", style="bold"), bar, Text(done))
        return line


_COLUMNS = ("level", "step", "loss", "gradient", "steps/s", "lr", "cosine", "solve", "skipped")
_SPARED = ("lr", "cosine", "gradient", "steps/s", "solve")
"""Columns that a narrow terminal does without, those to go first in front."""

_GAP = 2


def _table(readings: Readings, width: int) -> Table:
    """A row a level; of the columns those that tell something and find room."""
    rates = readings.rates()
    rows = [
        _cells(_cut(printable(name), width), level, rates.get(name, 0.0))
        for name, level in readings.levels.items()
    ]
    cells = {title: [row[title] for row in rows] for title in _COLUMNS}
    shown = [title for title in _COLUMNS if any(cells[title])]
    widths = {title: max(map(cell_len, [title, *cells[title]])) for title in shown}
    for title in _SPARED:
        if sum(widths[one] + _GAP for one in shown) - _GAP > width and title in shown:
            shown.remove(title)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0))
    for title in shown:
        table.add_column(title, justify="left" if title == "level" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(row[title]) for title in shown))
    return table


def _cut(name: str, width: int) -> str:
    """The name, at most a third of the width of it."""
    text = Text(name)
    text.truncate(max(width // 3, 10), overflow="ellipsis")
    return text.plain


def _cells(name: str, level: LevelReading, rate: float) -> dict[str, str]:
    record = level.record
    found = (
        name,
        str(record.step),
        f"{level.loss.value:.4g}",
        f"{record.grad_norm:.2e}",
        f"{rate:.3g}",
        f"{record.learning_rate:.2g}",
        "" if record.cosine is None else f"{record.cosine:.2f}",
        level.solve,
        str(level.skipped) if level.skipped else "",
    )
    return dict(zip(_COLUMNS, found, strict=True))


class _Drawn(ABC):
    """A display that draws the view between two ticks, so often that it costs next to nothing."""

    def __init__(self) -> None:
        self._readings = Readings()
        self._due = 0.0

    def on_start(self, runner: Runner, steps: int) -> None:
        """Opens the display."""
        self._readings.start(runner, steps)
        self._open()
        self._draw()

    def on_tick(self, tick: Tick) -> None:
        """Keeps the newest records, and draws them if it is time to."""
        self._readings.update(tick)
        if time.monotonic() >= self._due:
            self._draw()

    def on_end(self, result: Result) -> None:
        """Draws the last state and says why the run ended."""
        self._readings.finish(result)
        self._close(printable(result.stop_reason))

    def on_error(self) -> None:
        """Draws what was reached; the traceback stands below it."""
        self._close("")

    def _draw(self) -> None:
        began = time.monotonic()
        self._refresh()
        now = time.monotonic()
        self._due = now + max(_INTERVAL, (now - began) / _SHARE)

    @abstractmethod
    def _open(self) -> None:
        """Takes the place."""

    @abstractmethod
    def _refresh(self) -> None:
        """Draws the view."""

    @abstractmethod
    def _close(self, reason: str) -> None:
        """Draws the last state in full, and the reason below."""


class LiveDisplay(_Drawn):
    """The view on a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._live = Live(
            console=console,
            auto_refresh=False,
            get_renderable=lambda: View(self._readings),
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def _open(self) -> None:
        self._live.vertical_overflow = "ellipsis"
        self._live.start()

    def _refresh(self) -> None:
        self._live.refresh()

    def _close(self, reason: str) -> None:
        self._live.stop()
        if reason:
            self._live.console.print(reason, markup=False, highlight=False)


class NotebookDisplay(_Drawn):
    """The view as the output of a notebook's cell."""

    def __init__(self) -> None:
        from IPython.display import DisplayHandle

        super().__init__()
        self._output = DisplayHandle()  # type: ignore[no-untyped-call]

    def _open(self) -> None:
        self._output.display(View(self._readings))  # type: ignore[no-untyped-call]

    def _refresh(self) -> None:
        self._output.update(View(self._readings))  # type: ignore[no-untyped-call]

    def _close(self, reason: str) -> None:
        self._output.update(View(self._readings, reason))  # type: ignore[no-untyped-call]
