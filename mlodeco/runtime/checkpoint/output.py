"""The folder of a run: its metrics and its checkpoints."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from filelock import FileLock, Timeout

from mlodeco.declare.checks import as_integer
from mlodeco.errors import CheckpointWarning, RunError
from mlodeco.runtime.checkpoint import folder
from mlodeco.runtime.checkpoint.folder import Contents, WriteError
from mlodeco.runtime.checkpoint.journal import Journal
from mlodeco.runtime.checkpoint.shelf import Shelf
from mlodeco.runtime.checkpoint.signals import Signals
from mlodeco.runtime.processes import Processes, check_choice

INTERVAL = 1.0
"""Seconds between two writes of metrics while a run is on."""

METRICS = "metrics.jsonl"
"""The file of the records in a run's folder."""

ERRORS = ("warn", "raise")
"""What ``checkpoint_errors=`` may be."""


@dataclass(frozen=True)
class Saving:
    """What a run keeps on disk, as it was asked for.

    Attributes:
        out: the folder; None for nothing.
        every: ticks between two checkpoints; None for one at the end.
        keep: how many are kept.
        resume: "auto", the folder of a checkpoint, or None.
        errors: whether a checkpoint that cannot be written ends the run.
    """

    out: str | os.PathLike[str] | None = None
    every: int | None = None
    keep: int = 3
    resume: str | os.PathLike[str] | None = None
    errors: str = "warn"

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            RunError: an option is of another kind, or needs ``out``.
        """
        for option, value in (("checkpoint_every", self.every), ("keep", self.keep)):
            number = as_integer(value)
            if value is not None and (number is None or number < 1):
                raise RunError(
                    f"{option}={value!r}.",
                    expected="a positive integer.",
                    remedy=f"run(out='runs/one', {option}=3), for instance.",
                )
        for option, path in (("out", self.out), ("resume", self.resume)):
            if path is not None and not isinstance(path, str | os.PathLike):
                raise RunError(
                    f"{option}={path!r}.",
                    expected="a path" + (" or 'auto'." if option == "resume" else "."),
                    remedy="run(out='runs/one', resume='auto'), for instance.",
                )
        check_choice("checkpoint_errors", self.errors, ERRORS)
        needing = {"checkpoint_every": self.every is not None, "resume": self.resume == "auto"}
        for option in (option for option, given in needing.items() if given and self.out is None):
            raise RunError(
                f"{option}= is given and out= is not.",
                expected="a folder for the checkpoints.",
                remedy="add out='runs/one', for instance.",
            )


class Output:
    """What a run keeps in its folder.

    Args:
        saving: what was asked for; ``out`` is given.
        processes: those of the run, of which the main one keeps order.
    """

    def __init__(self, saving: Saving, processes: Processes) -> None:
        self.path = Path(saving.out or ".").absolute()
        self.signals = Signals()
        self._saving = saving
        self._processes = processes
        # in a thread of its own a run may end in another one than it began in
        self._lock = FileLock(self.path / ".lock", timeout=0, thread_local=False)
        self._shelf = Shelf(self.path / "checkpoints", saving.keep)
        self._newest: Path | None = None
        self._best: Path | None = None
        self._known_best: Path | None = None
        self._is_behind = False
        self._recorded = 0
        self._recorded_at = -INTERVAL

    @property
    def metrics(self) -> Path:
        """The file of the records."""
        return self.path / METRICS

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint of this run."""
        return self._newest

    def own(self, tick: int) -> Path:
        """Where the checkpoint of a tick is, or would be."""
        return self._shelf.newest(tick)

    def best(self, tick: int) -> Path | None:
        """The checkpoint of the best validation, if it is there."""
        path = self._shelf.best(tick)
        return path if path.exists() else None

    def candidates(self) -> list[Path]:
        """The checkpoints to go on from, the newest first; the same in all processes.

        Raises:
            RunError: the folder cannot be changed.
        """
        found: list[Path] = []
        if self._processes.is_main:
            with self._changed():
                self._shelf.tidy()
            found = self._shelf.found()
        return [Path(path) for path in self._processes.exchange(list(map(str, found)))[0]]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs from the folder.

        Raises:
            RunError: another one is at work there, or the folder cannot be made.
        """
        if not self._processes.is_main:
            yield
            return
        with self._changed():
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise RunError(
                f"another run is writing to out={str(self.path)!r}.",
                remedy="wait for its end, or give another folder.",
            ) from error
        except (OSError, NotImplementedError):  # a file system that knows no locks
            yield
            return
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _changed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"out={str(self.path)!r} cannot be written to: {error}.",
                remedy="give another folder.",
            ) from error

    def begin(self, journal: Journal, resumed: Path | None, best: Path | None) -> None:
        """Makes the folder ready for a run.

        Args:
            journal: the records of the checkpoint that it goes on from, if it does.
            resumed: that checkpoint.
            best: where that of the best validation is.

        Raises:
            RunError: the folder holds another run, or cannot be written to.
        """
        self._newest, self._best, self._known_best = resumed, best, best
        if not self._processes.is_main:
            return
        present = self._shelf.found()
        newer = [path for path in present if resumed and path.name[-9:] > resumed.name[-9:]]
        is_auto = self._saving.resume == "auto"
        if not is_auto and (newer if resumed else present or self.metrics.exists()):
            raise RunError(
                f"out={str(self.path)!r} holds a run"
                + (" that is further than the checkpoint." if resumed else "."),
                expected="a folder without metrics.jsonl and later checkpoints.",
                remedy="go on with that run, resume='auto', or give another folder.",
            )
        with self._changed():
            self._shelf.tidy()
            if is_auto:
                self._shelf.set_aside([*takewhile(lambda path: path != resumed, present)])
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._write_metrics(journal.text())
            self._recorded = len(journal)

    def begin_anew(self) -> None:
        """Takes the records that come for those of another run, behind the ones that it loaded."""
        self._is_behind = True

    def _write_metrics(self, history: str) -> None:
        temporary = self.metrics.with_name(f".{self.metrics.name}.writing")
        temporary.write_text(history, encoding="utf-8", newline="")
        temporary.replace(self.metrics)

    def record(self, journal: Journal, tick: int, *, at_once: bool) -> None:
        """Adds the new records up to a tick to the metrics, once in a while or at once.

        Raises:
            RunError: they cannot be written, and ``checkpoint_errors`` is ``"raise"``.
        """
        is_early = not at_once and time.monotonic() < self._recorded_at + INTERVAL
        if not self._processes.is_main or is_early:
            return
        journal.update(tick)
        self._recorded_at = time.monotonic()
        start = 0 if self._is_behind else self._recorded
        if start == len(journal):
            return
        try:
            if self._is_behind:
                self._write_metrics(journal.text())
            else:
                self._is_behind = True
                with self.metrics.open("a", encoding="utf-8", newline="") as file:
                    file.write(journal.text(start))
            self._recorded, self._is_behind = len(journal), False
        except OSError as error:
            found = f"{self.metrics} cannot be written to: {error}"
            if self._saving.errors == "raise":
                raise RunError(f"{found}.", remedy="free space on the disk.") from error
            warnings.warn(
                f"{found}. Its lines are kept until it can.", CheckpointWarning, stacklevel=2
            )

    def is_due(self, tick: int) -> bool:
        """Whether a checkpoint is wanted behind a tick."""
        every = self._saving.every
        return every is not None and tick % every == 0

    def save(self, tick: int, make: Callable[[], Contents]) -> Path | None:
        """Writes the checkpoint of a tick, and deletes those that are no longer wanted.

        Args:
            tick: the tick.
            make: gives what it holds.

        Returns:
            Its folder; None if it could not be written, of which a warning tells.

        Raises:
            CheckpointError: it could not, and ``checkpoint_errors`` is ``"raise"``; or the state
                holds what a checkpoint cannot.
        """
        path, same = self._shelf.newest(tick), self._shelf.best(tick)

        def write() -> None:
            if self._best == same:
                folder.copy(same, path, self._processes)
            else:
                folder.write(path, make(), self._processes)

        if not self._is_done(write):
            return None
        self._newest, self._known_best = path, self._best
        self._prune()
        return path

    def save_best(self, tick: int, make: Callable[[], Contents]) -> Path | None:
        """The same for the best validation, before :meth:`save` at the same tick.

        That of the one before is deleted once no other checkpoint refers to it.
        """
        path = self._shelf.best(tick)
        if not self._is_done(lambda: folder.write(path, make(), self._processes)):
            return None
        self._best, self._newest = path, path
        self._prune()
        return path

    def _prune(self) -> None:
        if self._processes.is_main:
            self._shelf.prune((self._best, self._known_best))

    def _is_done(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except WriteError as error:
            if self._saving.errors == "raise":
                raise
            warnings.warn(
                f"{error.found} The last good one is {self._newest or 'none'}.",
                CheckpointWarning,
                stacklevel=2,
            )
            return False
        return True
