"""Checkpoints of a run: made from what its owners give, and given back to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mlodeco.errors import CheckpointError, CheckpointWarning, MlodecoError
from mlodeco.runtime.checkpoint.encoding import decode, encode
from mlodeco.runtime.checkpoint.folder import (
    BROKEN,
    Contents,
    Found,
    Part,
    compare_programs,
    damaged,
    is_count,
    read,
)
from mlodeco.runtime.checkpoint.journal import Journal, Record, read_records
from mlodeco.runtime.checkpoint.state import Owners


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        tick: ticks run.
        run_seed: what random numbers of hypergradients start from.
        stop_reason: why the run has ended; None if nothing has stopped it.
        best: the best validation.
    """

    tick: int
    run_seed: int
    stop_reason: str | None
    best: Mapping[str, Any] | None

    def check(self, tick: int) -> None:
        """Refuses what no run has written.

        Args:
            tick: what the manifest says.

        Raises:
            ValueError: an entry is of another kind.
        """
        best = {"tick": 0} if self.best is None else self.best
        are_right = (
            self.tick == tick and is_count(self.tick),
            type(self.run_seed) is int,
            isinstance(self.stop_reason, str | None),
            isinstance(best, Mapping) and is_count(best["tick"], most=tick),
        )
        if not all(are_right):
            raise ValueError("where the run stood is not what it should be")


_Looked = tuple[Found, Any, Any, Progress, list[Record]]
"""Files, the trees in them, where the run stood, and its records."""


def collect(owners: Owners, progress: Progress, history: str) -> Contents:
    """What a checkpoint holds; all processes must call this.

    Raises:
        CheckpointError: the state holds what a checkpoint cannot.
    """
    common = encode({**owners.common(), "progress": asdict(progress)}, "the state")
    own = encode({**owners.own(), "run_seed": progress.run_seed}, "the state")
    head = {
        "mlodeco": _version(),
        "torch": torch.__version__,
        "tick": progress.tick,
        "processes": owners.processes.count,
        "program": owners.program(),
    }
    return Contents(head, Part(*common), Part(*own), owners.weights(), history)


def load(owners: Owners, journal: Journal, path: Path, device: torch.device) -> Progress:
    """Gives the owners their state back, and the journal its lines; where the run stood.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another program or version.
    """
    processes = owners.processes

    def look() -> _Looked:
        found = read(path, processes.rank, all_files=processes.is_main)
        compare_programs(found.head["program"], owners.program(), path)
        common, own = (decode(p.tree, p.tensors, device) for p in (found.common, found.own))
        compare_programs(*owners.buffers_of(common, own), path)
        progress = Progress(**{**common["progress"], "run_seed": own["run_seed"]})
        progress.check(found.head["tick"])
        return found, common, own, progress, read_records(found.history)

    found, common, own, progress, records = _agreed(owners, path, look)
    with refused(path):
        owners.built.tick = progress.tick
        owners.restore(common, own, found.weights, found.head["processes"])
        if not found.has_own:
            owners.part_ways(progress.run_seed)
    journal.load(found.history, records)
    return progress


def load_newest(candidates: list[Path], load: Callable[[Path], None]) -> Path | None:
    """Loads the first of the checkpoints that is good, and warns of those that are not.

    Returns:
        That one; None if there are none.

    Raises:
        CheckpointError: none of them is good.
    """
    failures: list[CheckpointError] = []
    for path in candidates:
        try:
            load(path)
        except CheckpointError as error:
            failures.append(error)
            continue
        for failure in failures:
            warnings.warn(
                f"{failure.found} resume='auto' goes on from {path} instead.",
                CheckpointWarning,
                stacklevel=2,
            )
        return path
    if failures:
        raise failures[0]
    return None


def _agreed(owners: Owners, path: Path, look: Callable[[], _Looked]) -> _Looked:
    """What the action gives, if it fails in no process.

    Raises:
        CheckpointError: it does in one.
    """
    error: CheckpointError | None = None
    try:
        found = look()
    except CheckpointError as one:
        error = one
    except BROKEN as one:
        error = damaged(path, one)
    messages = owners.processes.exchange(error and error.found)
    if error is not None:
        raise error
    for message in filter(None, messages):
        raise CheckpointError(message, remedy="resume from another one.")
    return found


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Says which checkpoint it was that does not fit."""
    try:
        yield
    except MlodecoError:
        raise
    except BROKEN as error:
        raise damaged(path, error) from error


@cache
def _version() -> str:
    try:
        return metadata.version("mlodeco")
    except metadata.PackageNotFoundError:
        return "unknown"
