"""The records of a run, read back from its folder."""

from __future__ import annotations

import os
from numbers import Real
from pathlib import Path

from mlodeco.errors import RunError
from mlodeco.runtime.checkpoint.journal import Record, read_records
from mlodeco.runtime.checkpoint.output import METRICS
from mlodeco.runtime.history import History, StepRecord, ValidationRecord


def read_history(folder: str | os.PathLike[str]) -> History:
    """The history that a run has written to its folder, ``run(out=folder)``.

    The run may still be on, or have been killed: a last line that is cut off is left out. Tensors
    among metrics come back as nested lists, and a run that has not written yet as no records.

    Args:
        folder: the folder.

    Raises:
        RunError: it is no folder of a run, or its ``metrics.jsonl`` is damaged.
    """
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RunError(
            f"{str(folder)!r} holds no {METRICS} that can be read: {error.strerror}.",
            expected="the folder of a run, run(out=...).",
            remedy="give another folder.",
        ) from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            records += _records(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise RunError(
                f"line {number} of {str(path)!r} is damaged.",
                expected="a record of a step or of a validation.",
                remedy="go on with the run, resume='auto', which writes the file anew from its "
                "checkpoint; or delete the line.",
            ) from error
    steps = [record for record in records if isinstance(record, StepRecord)]
    history = History(dict.fromkeys(record.level for record in steps), is_validated=True)
    history.steps = steps
    history.validations = [r for r in records if isinstance(r, ValidationRecord)]
    return history


def _records(line: bytes) -> list[Record]:
    found = read_records(line.decode())
    if not found or not all(map(_is_sound, found)):
        raise ValueError("no record")
    return found


def _is_sound(record: Record) -> bool:
    if isinstance(record, StepRecord):
        numbers, is_named = [record.tick, record.loss], isinstance(record.level, str)
    else:
        numbers, is_named = [record.tick, *record.metrics.values()], True
    return is_named and all(isinstance(number, Real) for number in numbers)
