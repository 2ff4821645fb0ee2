"""The curves of runs: losses of levels and metrics of validations over ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import avg_pool1d

from mlodeco.declare.checks import as_integer
from mlodeco.errors import RunError, did_you_mean, quoted
from mlodeco.runtime import History
from mlodeco.show.figures import add_legend, line_look, make_figure, styled
from mlodeco.show.words import printable

if TYPE_CHECKING:
    from mlodeco.show.figures import Axes, Figure

_PANEL: Final = (4.2, 2.5)
"""The width and height of a frame, in inches."""
_COLUMNS: Final = 2
_LINE: Final = 0.19
"""The height of a line of the legend, in inches."""
_LETTER: Final = 0.085
"""The width of a letter there."""
_LONGEST: Final = 44
"""Letters of a text that fit into a frame."""
_RANGE: Final = 100
"""How far apart values are on a linear axis."""
_SHARE: Final = 40
"""One of how many values the smoothed line averages."""


@dataclass(frozen=True)
class Panel:
    """What is drawn into one frame.

    Attributes:
        title: what it shows.
        curves: for each run that has it the ticks and the values, where NaN is a gap.
        is_smoothed: whether there is a smoothed line.
    """

    title: str
    curves: dict[str, tuple[list[int], list[float]]]
    is_smoothed: bool


def plot_histories(
    runs: Mapping[str, History],
    *,
    level: str | Iterable[str] = (),
    metric: str | Iterable[str] = (),
    smooth: int | None = None,
) -> Figure:
    """Curves of one or several runs as a figure of matplotlib.

    A panel for the loss of each level, thin as it is and thick smoothed, and one for each metric
    of validations. Steps that were skipped and numbers that are not finite leave gaps. Positive
    values that span more than two decades have a logarithmic axis.

    Args:
        runs: histories by their names, which a legend shows if there are several.
        level: the levels to show; default: all, or none if ``metric`` is given.
        metric: the metrics to show; default: all, or none if ``level`` is given.
        smooth: about how many values the smoothed line averages, half of them on either side; 1
            for no such line. Default: a fortieth of the run's steps.

    Raises:
        RunError: no run has such a level or metric, none has anything to show, or matplotlib is
            not installed.
    """
    window = as_integer(smooth)
    if smooth is not None and (window is None or window < 1):
        raise RunError(
            f"smooth={smooth!r}.", expected="a positive integer.", remedy="smooth=20, for instance."
        )
    panels = find_panels(runs, _names(level), _names(metric))
    shown = [name for name in runs if any(name in panel.curves for panel in panels)]
    with styled():
        return _draw(panels, shown, window)


def find_panels(
    runs: Mapping[str, History], levels: Sequence[str] = (), metrics: Sequence[str] = ()
) -> list[Panel]:
    """A panel for each level, then one for each metric, of those asked for, else of all.

    Raises:
        RunError: no run has such a level or metric, or none has anything to show.
    """
    losses: dict[str, Panel] = {}
    values: dict[str, Panel] = {}
    for name, history in runs.items():
        for step in history.steps:
            panel = losses.setdefault(step.level, Panel(f"loss of {step.level}", {}, True))
            _add(panel, name, step.tick, math.nan if step.skipped else step.loss)
        for validation in history.validations:
            for metric, value in validation.metrics.items():
                panel = values.setdefault(metric, Panel(metric, {}, False))
                _add(panel, name, validation.tick, value)
    if not losses and not values:
        raise RunError(
            "there is nothing to show: no step and no validation.",
            expected="the history of a run that has made a step.",
            remedy="wait for the run's first step, or give another run.",
        )
    _require(levels, losses, "steps of a level")
    _require(metrics, values, "validation metric")
    whole = not levels and not metrics
    return [losses[name] for name in (losses if whole else levels)] + [
        values[name] for name in (values if whole else metrics)
    ]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean over the values around each that are no gaps; gaps stay gaps."""
    given = torch.tensor([values], dtype=torch.float64)
    is_there = given.isfinite().double()
    half = window // 2
    total, count = (
        avg_pool1d(part, 2 * half + 1, stride=1, padding=half)
        for part in (given.where(is_there > 0, 0.0), is_there)
    )
    mean: list[float] = (total / count).where(is_there > 0, math.nan)[0].tolist()
    return mean


def _names(given: str | Iterable[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _add(panel: Panel, run: str, tick: int, value: float) -> None:
    ticks, values = panel.curves.setdefault(run, ([], []))
    ticks.append(tick)
    values.append(value if math.isfinite(value) else math.nan)


def _require(names: Sequence[str], known: Mapping[str, Panel], what: str) -> None:
    for name in names:
        if name not in known:
            raise RunError(
                f"no run has the {what} {name!r}.",
                expected=f"one of {quoted(known)}." if known else "",
                remedy=f"correct the name.{did_you_mean(name, known)}"
                if known
                else f"leave {name!r} out: there is no {what} in any run.",
            )


def _draw(panels: Sequence[Panel], runs: Sequence[str], window: int | None) -> Figure:
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * rows
    names = _legend_names(runs) if len(runs) > 1 else []
    side_by_side = max(1, int(width / (_LETTER * max(map(len, names), default=0) + 0.7)))
    figure = make_figure(width, height + _LINE * -(-len(names) // side_by_side))
    looks = {name: line_look(number) for number, name in enumerate(runs)}
    frames = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip_longest(frames, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw_panel(axes, panel, looks, window)
    for axes in frames[max(len(panels) - columns, 0) : len(panels)]:
        axes.set_xlabel("tick")
    if names:
        handles = [frames[0].plot([], [], **looks[name])[0] for name in runs]
        add_legend(figure, handles, names, side_by_side)
    return figure


def _legend_names(runs: Sequence[str]) -> list[str]:
    short = [_shortened(name) for name in runs]
    return short if len(set(short)) == len(runs) else [printable(name) for name in runs]


def _draw_panel(
    axes: Axes, panel: Panel, looks: Mapping[str, dict[str, Any]], window: int | None
) -> None:
    axes.set_title(_shortened(panel.title), loc="left", fontsize=9, parse_math=False)
    found = [v for _, values in panel.curves.values() for v in values if not math.isnan(v)]
    if found and min(found) > 0 and max(found) > _RANGE * min(found):
        axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    for name, (ticks, values) in panel.curves.items():
        look = looks[name]
        size = window or max(1, len(values) // _SHARE)
        if panel.is_smoothed and size > 1:
            thin = {"color": look["color"], "linestyle": "-", "linewidth": 0.5, "alpha": 0.45}
            _add_line(axes, ticks, values, **thin)
            _add_line(axes, ticks, smoothed(values, size), linewidth=1.6, **look)
        else:
            _add_line(axes, ticks, values, linewidth=1.2, **look)


def _add_line(axes: Axes, ticks: Sequence[int], values: Sequence[float], **options: Any) -> None:
    """A line, with points where neighbours are missing, which a line alone would not show."""
    gaps = [True, *map(math.isnan, values), True]
    alone = [n for n in range(len(values)) if gaps[n] and gaps[n + 2]]
    axes.plot(ticks, values, marker=".", markevery=alone, **options)


def _shortened(text: str) -> str:
    """The text on one line, or its end where it is too long: runs often begin alike."""
    plain = printable(text)
    return plain if len(plain) <= _LONGEST else f"...{plain[3 - _LONGEST :]}"
