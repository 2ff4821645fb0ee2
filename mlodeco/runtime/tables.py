"""A history as tables: two frames of pandas, or a few rows of HTML."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mlodeco.errors import RunError, counted

if TYPE_CHECKING:
    from mlodeco.runtime.history import History, StepRecord

_DTYPES: Final = {
    "tick": "int64",
    "level": "str",
    "step": "int64",
    "loss": "float64",
    "grad_norm": "float64",
    "learning_rate": "float64",
    "cosine": "float64",
    "skipped": "bool",
    "solver_steps": "int64",
    "residual": "float64",
}
"""The columns of the steps, before the metrics of one's own."""


class Frames(NamedTuple):
    """A history in two ``pandas.DataFrame``.

    Attributes:
        steps: a row a step of a level.
        validations: a row a validation.
    """

    steps: Any
    validations: Any


def to_frames(history: History) -> Frames:
    """The steps and the validations as frames of pandas.

    Raises:
        RunError: pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError as error:
        raise RunError(
            "a frame of the history was asked for, and pandas cannot be imported.",
            remedy="pip install pandas; history.rows() gives the same rows as dictionaries.",
        ) from error
    steps = _frame(pandas, history.rows(), _DTYPES)
    rows = (beside({"tick": r.tick}, r.metrics) for r in history.validations)
    return Frames(steps, _frame(pandas, rows, {"tick": "int64"}))


def beside(columns: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A row with metrics of one's own; under ``metric_`` and its name one with that of a column."""
    own = {f"metric_{name}" if name in columns else name: v for name, v in metrics.items()}
    return {**own, **columns}


def _frame(pandas: Any, rows: Iterable[Mapping[str, Any]], dtypes: Mapping[str, str]) -> Any:
    """The columns with a dtype first; the others as they come."""
    found = list(rows)
    columns = list(dict.fromkeys([*dtypes, *(key for row in found for key in row)]))
    data = {key: [row.get(key) for row in found] for key in columns}
    frame = pandas.DataFrame(data, columns=columns)
    return frame.astype(dict(dtypes))


def to_html(history: History) -> str:
    """The newest step of each level, and the newest value of each validation metric."""
    newest = {record.level: record for record in history.steps}
    values = {key: (r.tick, v) for r in history.validations for key, v in r.metrics.items()}
    ticks = history.steps[-1].tick if history.steps else 0
    parts = [f"<p>{counted(ticks, 'tick')}; the newest step of each level:</p>"]
    titles = ("level", "step", "loss", "gradient", "cosine", "rate", "skipped")
    skipped = history.skipped
    rows = [(name, *_cells(r), str(skipped.get(name, 0))) for name, r in newest.items()]
    parts.append(_table(titles, rows))
    if values:
        rows = [(key, f"{value:.4g}", str(tick)) for key, (tick, value) in values.items()]
        parts.append(_table(("validation", "value", "tick"), rows))
    return "".join(parts)


def _cells(record: StepRecord) -> tuple[str, ...]:
    numbers = (record.loss, record.grad_norm, record.cosine, record.learning_rate)
    shown = ("" if n is None or math.isnan(n) else f"{n:.4g}" for n in numbers)
    return (str(record.step), *shown)


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
