"""Methods side by side: a table, and a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Final

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mlodeco.errors import counted, quoted
from mlodeco.runtime.checking import Agreement
from mlodeco.show.figures import add_legend, make_figure, styled
from mlodeco.show.report import figures_of
from mlodeco.show.words import printable

if TYPE_CHECKING:
    from mlodeco.show.figures import Axes, Figure

_METRICS = 2
"""Columns of metrics, one less beside that of levels; the file of the comparison has them all."""

_METRIC = 10
"""The width to which the name of a metric is folded."""

_NAME = 20
"""The width that the name of a method or level has at least, if it is as long."""

_BLANKS = 2
"""Those of a column: its padding and its line, which is not drawn."""

_ALIKE = 1e-6
"""The relative difference up to which two first losses are the same."""


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        method: as written.
        start: for each level its whole hypergradient against the reference, where all methods
            are at the same parameters.
        end: the same where the method's own run has come to.
        seconds: the median of a step of the outer level and all below it.
        memory: bytes, the peak above what there was before the first tick.
        ticks: those that were run.
        first_loss: that of the very first step.
        curves: for each metric of the validations, and for the outer level's loss, the tick, the
            seconds from the start and the value.
        stop_reason: why the run ended.
        error: why it failed; None if it did not.
        notes: warnings, and what could not be measured.
    """

    method: str
    start: Mapping[str, Agreement] = field(default_factory=dict)
    end: Mapping[str, Agreement] = field(default_factory=dict)
    seconds: float | None = None
    memory: int | None = None
    ticks: int = 0
    first_loss: float | None = None
    curves: Mapping[str, Sequence[tuple[int, float, float]]] = field(default_factory=dict)
    stop_reason: str = ""
    error: str | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Comparison:
    """Runs of one script that differ in a method alone.

    Attributes:
        script: the file.
        seed: of all runs.
        steps: ticks that were asked for.
        at: the tick at which all methods are measured at the same parameters.
        levels: those that have the method.
        outer: the one whose steps are timed, the last of them in the order of a tick.
        dampings: of the reference, for each edge ``upper -> lower``.
        is_own_damping: whether they are those of the script's own methods.
        memory_of: what the memory is of, in words.
        rows: the methods, in the order asked for.
    """

    script: str
    seed: int
    steps: int
    at: int
    levels: Sequence[str]
    outer: str
    dampings: Mapping[str, float]
    is_own_damping: bool
    memory_of: str
    rows: Sequence[Row]

    @property
    def loss(self) -> str:
        """The name of the curve of the outer level's loss."""
        return loss_of(self.outer)

    @property
    def metrics(self) -> list[str]:
        """The metrics of the validations; the outer level's loss where there are none."""
        found = dict.fromkeys(name for row in self.rows for name in row.curves)
        return [name for name in found if name != self.loss] or [self.loss]


def loss_of(level: str) -> str:
    """The name of the curve of a level's loss."""
    return f"loss of {level}"


def comparison_table(found: Comparison, width: int) -> Group:
    """The table, what its columns are, and what is to be said of single methods.

    Args:
        found: the comparison.
        width: that of the terminal; where the columns do not fit, there are several tables.
    """
    names = _name_columns(found)
    tables = map(
        _table, *zip(*((names, part) for part in _parts(found, names, width)), strict=True)
    )
    return Group(Text(_title(found)), *tables, Text(_caption(found)), *map(Text, _remarks(found)))


@dataclass(frozen=True)
class _Column:
    title: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        """With the blanks around it."""
        lines = (line for cell in (self.title, *self.cells) for line in cell.split("\n"))
        return _BLANKS + max(map(cell_len, lines))


def _name_columns(found: Comparison) -> list[_Column]:
    """The method, and the level where there are several: a row for each."""
    count = len(found.levels)
    methods = [name for row in found.rows for name in (row.method, *[""] * (count - 1))]
    levels = _Column("level", [*found.levels] * len(found.rows))
    return [_Column("method", methods), *([levels] if count > 1 else [])]


def _parts(found: Comparison, names: Sequence[_Column], width: int) -> list[list[_Column]]:
    """The columns of figures, those of each table together: as many as have room."""
    room = width - sum(min(one.width, _NAME + _BLANKS) for one in names)
    parts: list[list[_Column]] = []
    for block in _blocks(found):
        if parts and sum(one.width for one in (*parts[-1], *block)) <= room:
            parts[-1] += block
        else:
            parts.append(block)
    return parts


def _blocks(found: Comparison) -> Iterator[list[_Column]]:
    """Accuracy at the start, at the end, then cost and metrics."""
    for when, moment in zip(_moments(found), ("start", "end"), strict=True):
        figures = [
            _agreement(getattr(row, moment).get(level))
            for row in found.rows
            for level in found.levels
        ]
        titles = [f"{when}\n{what}" for what in ("error", "cosine", "length")]
        yield list(map(_Column, titles, zip(*figures, strict=True)))
    metrics = found.metrics[: _METRICS + 1 - len(found.levels[:2])]
    fastest = min((row.seconds for row in found.rows if row.seconds), default=None)
    figures = []
    for row in found.rows:
        own = (*_cost(row, fastest), *(_last(row, name) for name in metrics))
        figures += [own, *[("",) * len(own)] * (len(found.levels) - 1)]
    titles = ["step\nms", "\nx", "memory\nMiB", *("\n".join(wrap(m, _METRIC)) for m in metrics)]
    yield list(map(_Column, titles, zip(*figures, strict=True)))


def _table(names: Sequence[_Column], figures: Sequence[_Column]) -> Table:
    """Names are folded where there is no room, figures never."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for one in names:
        table.add_column(one.title, overflow="fold")
    for one in figures:
        table.add_column(Text(one.title), justify="right", no_wrap=True)
    for cells in zip(*(one.cells for one in (*names, *figures)), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _title(found: Comparison) -> str:
    levels = quoted(found.levels)
    return f"{found.script}: hypergradient of {levels}, {counted(found.steps, 'tick')}"


def _moments(found: Comparison) -> tuple[str, str]:
    return ("start" if found.at == 0 else f"at {found.at}"), "end"


def _agreement(found: Agreement | None) -> tuple[str, ...]:
    return ("-", "-", "-") if found is None else figures_of(found)


def _cost(row: Row, fastest: float | None) -> tuple[str, ...]:
    """Milliseconds, times the fastest, and mebibytes."""
    known = row.seconds is not None and fastest is not None
    return (
        _three_digits(1e3 * row.seconds) if row.seconds is not None else "-",
        _three_digits(row.seconds / fastest) if known else "-",  # type: ignore[operator]
        _three_digits(row.memory / 2**20) if row.memory is not None else "-",
    )


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _last(row: Row, metric: str) -> str:
    """The value at the end; of a run that has failed there is none."""
    if row.error is not None:
        return "failed"
    curve = row.curves.get(metric)
    return f"{curve[-1][2]:.4g}" if curve else "-"


def _caption(found: Comparison) -> str:
    place = "at the parameters where training starts"
    if found.at:
        place = f"at the parameters of tick {found.at} of the script with its own methods"
    dampings = sorted(set(found.dampings.values()))
    damping = ", ".join(f"{value:g}" for value in dampings) if len(dampings) < 2 else "of each edge"
    whose = ", as the script declares" if found.is_own_damping else ""
    return (
        f"{_moments(found)[0]}: all methods {place}; end: each where its own run has come to. "
        f"Seed {found.seed}.\n"
        "error, cosine, length: of the whole hypergradient against the converged solution of "
        f"(H + damping I) v = b, damping {damping or '0'}{whose}.\n"
        f"step: median from one step of {found.outer!r} to the next; x: times the fastest; memory: "
        f"peak of {found.memory_of} above that before the first tick."
    )


def _remarks(found: Comparison) -> Iterator[str]:
    """Each remark once, with the methods that it is about."""
    about: dict[str, list[str]] = {}
    for row in found.rows:
        stopped = f"stopped at tick {row.ticks}: {row.stop_reason}"
        is_early = row.error is None and row.ticks < found.steps
        ends = [f"failed: {row.error}"] if row.error else [stopped] if is_early else []
        for text in (*ends, *row.notes):
            about.setdefault(text, []).append(row.method)
    for text, methods in about.items():
        yield f"{', '.join(methods)}: {text}"
    first = [row.first_loss for row in found.rows if row.first_loss is not None]
    if first and not all(math.isclose(one, first[0], rel_tol=_ALIKE) for one in first):
        yield (
            "The runs do not start alike: their first losses differ. Let the script draw its data "
            "and parameters from torch, random or NumPy, or from generators with seeds."
        )


_MARKERS: Final = "os^DvPX*"

_PLACES: Final = [
    (dx, dy, ha)
    for dy in (0, *(sign * size for size in range(10, 100, 9) for sign in (1, -1)))
    for dx, ha in ((6, "left"), (-6, "right"), *([(0, "center")] if dy else []))
]
"""Where a name may stand, in points from its own: beside, then above and below."""

_FOLDED = 24
"""The letters of a line of a name."""

_FAR = 12
"""Points from which on a line leads to a name."""

_LEAST_ERROR = 1e-8
"""Smaller errors, zero too, are drawn there: they are rounding, and would stretch the axis."""

_WIDE = 10
"""How far apart times are on a logarithmic axis."""


def comparison_figure(found: Comparison) -> Figure:
    """Error against time, and the metric over ticks and over time.

    Raises:
        RunError: matplotlib is not installed.
    """
    with styled():
        from matplotlib.ticker import LogLocator, NullFormatter

        figure = make_figure(11, 4)
        trade, ticks, seconds = figure.subplots(1, 3)
        metric = found.metrics[0]
        points: list[tuple[Any, ...]] = []
        lines = []
        for number, row in enumerate(found.rows):
            look: dict[str, Any] = {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}
            point = _point(row)
            points += [(*point, printable(row.method))] if point else []
            trade.plot(*([[value] for value in point] or [[], []]), linestyle="none", **look)
            curve = row.curves.get(metric, ())
            look |= {"markevery": max(1, len(curve) // 6), "markersize": 4}
            lines += ticks.plot([t for t, _, _ in curve], [v for _, _, v in curve], **look)
            seconds.plot([s for _, s, _ in curve], [v for _, _, v in curve], **look)
        when = "where training starts" if found.at == 0 else f"at tick {found.at}"
        times, sizes = [x for x, _, _ in points], [y for _, y, _ in points]
        floor = "\n(at 1e-8: that or less)" if _LEAST_ERROR in sizes else ""
        trade.set(xlabel="ms a step", ylabel=f"relative error of the hypergradient{floor}")
        trade.set_title(f"error {when}", fontsize=9)
        ticks.locator_params(axis="x", integer=True)
        for axes, what in ((ticks, "ticks"), (seconds, "seconds")):
            axes.set_xlabel(what)
            axes.set_ylabel(printable(metric), parse_math=False)
        names = [printable(row.method) + " (failed)" * bool(row.error) for row in found.rows]
        add_legend(figure, lines, names, min(len(names), 4))
        script = printable(PurePath(found.script).name)
        figure.suptitle(f"{script}, seed {found.seed}", fontsize=10, parse_math=False)
        if points:
            trade.set(yscale="log")
            if max(times) > _WIDE * min(times):
                trade.set(xscale="log")
                trade.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                trade.xaxis.set_major_formatter("{x:g}")
                trade.xaxis.set_minor_formatter(NullFormatter())
            trade.margins(0.25)
            _name(figure, trade, points)
        return figure


def _point(row: Row) -> tuple[float, ...]:
    """Milliseconds and the error of the level where it is largest; nothing where not known."""
    errors = [one.error for one in row.start.values() if one.error is not None]
    worst = max(errors, default=math.nan)
    if row.seconds is None or not math.isfinite(worst):
        return ()
    return 1e3 * row.seconds, max(worst, _LEAST_ERROR)


def _name(figure: Figure, axes: Axes, points: Sequence[tuple[Any, ...]]) -> None:
    """Writes names beside points where there is room; the legend has all of them."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    radius = 5 * figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    for x, y, name in points:
        for dx, dy, ha in _PLACES:
            text = axes.annotate(
                "\n".join(wrap(name, _FOLDED)),
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va="center",
                fontsize=8,
                parse_math=False,
            )
            text.set_in_layout(False)
            extent = text.get_window_extent()
            is_inside = all(axes.bbox.contains(*corner) for corner in extent.corners())
            if is_inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                if abs(dy) > _FAR:
                    line = {"arrowstyle": "-", "linewidth": 0.5}
                    axes.annotate("", (x, y), (dx, dy), textcoords="offset points", arrowprops=line)
                break
            text.remove()
