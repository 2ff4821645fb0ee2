"""The records of a run as lines of JSON, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import takewhile
from typing import Any, TypeVar

from torch import Tensor

from mlodeco.runtime.history import History, SolveRecord, StepRecord, ValidationRecord

Record = StepRecord | ValidationRecord

_to_json = json.JSONEncoder(allow_nan=False).encode

_NUMBERS = ("NaN", "Infinity", "-Infinity")

_OF_NUMBERS = ("loss", "grad_norm", "learning_rate", "cosine", "metrics", "residual")
"""The fields in which these are numbers, not names or words."""


class Journal:
    """The lines of a history, made as records come.

    A line is a step (``"kind": "step"``, with the fields of its record) or a validation
    (``"kind": "validation"``), those of a tick in this order. Numbers that JSON does not have are
    the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; tensors are nested lists; anything
    else that JSON does not have is as ``str`` gives it. No time of day is in it, so that a run
    that is repeated gives the same lines.
    Texts among the metrics that are these strings come back as numbers.

    Args:
        history: the records.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self._lines: list[str] = []
        self._steps = self._validations = 0

    def update(self, tick: int) -> None:
        """Makes the lines of new records of ticks that are over.

        Args:
            tick: the last of these.
        """
        steps = _until(tick, self._history.steps[self._steps :])
        validations = _until(tick, self._history.validations[self._validations :])
        self._steps += len(steps)
        self._validations += len(validations)
        # sorting keeps the order of equals: steps before validations
        records: list[Record] = [*steps, *validations]
        records.sort(key=lambda record: record.tick)
        self._lines += [_to_json(_line(record)) + "\n" for record in records]

    def text(self, start: int = 0) -> str:
        """The lines from a number on."""
        return "".join(self._lines[start:])

    def load(self, text: str, records: list[Record]) -> None:
        """Begins with these lines, which are those of the records; the history gets these."""
        self._lines = text.splitlines(keepends=True)
        self._history.steps[:] = [r for r in records if isinstance(r, StepRecord)]
        self._history.validations[:] = [r for r in records if isinstance(r, ValidationRecord)]
        self._steps, self._validations = len(self._history.steps), len(self._history.validations)

    def __len__(self) -> int:
        return len(self._lines)


_Kind = TypeVar("_Kind", StepRecord, ValidationRecord)


def _until(tick: int, records: list[_Kind]) -> list[_Kind]:
    return list(takewhile(lambda record: record.tick <= tick, records))


def read_records(text: str) -> list[Record]:
    """The records of some lines."""
    return [_record(json.loads(line)) for line in text.splitlines()]


def _line(record: Record) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name != "solves"}
    if isinstance(record, ValidationRecord):
        return {"kind": "validation", **plain(fields)}
    solves = [plain(solve._asdict()) for solve in record.solves]
    return {"kind": "step", **plain(fields), "solves": solves}


def plain(value: Any) -> Any:
    """What JSON can hold of a value, as the lines of a journal do."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else json.dumps(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def _record(line: dict[str, Any]) -> Record:
    if line.pop("kind") == "validation":
        return ValidationRecord(**_fields(line))
    solves = tuple(SolveRecord(**_fields(solve)) for solve in line.pop("solves"))
    return StepRecord(**_fields(line), solves=solves)


def _fields(line: dict[str, Any]) -> dict[str, Any]:
    return {key: _numbers(part) if key in _OF_NUMBERS else part for key, part in line.items()}


def _numbers(value: Any) -> Any:
    """The same with numbers for the strings that stand for some."""
    if isinstance(value, dict):
        return {key: _numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if value in _NUMBERS else value
