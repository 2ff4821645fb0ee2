"""What a run keeps of itself in its folder, when, and how it goes on from there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mlodeco.errors import RunError
from mlodeco.runtime.checkpoint.folder import Contents
from mlodeco.runtime.checkpoint.journal import Journal
from mlodeco.runtime.checkpoint.output import Output, Saving
from mlodeco.runtime.checkpoint.state import Owners
from mlodeco.runtime.checkpoint.store import Progress, collect, load, load_newest, refused
from mlodeco.runtime.ending import Ending
from mlodeco.runtime.result import Best


@dataclass
class Standing:
    """Where a run stands, beside the parts that step.

    Attributes:
        tick: ticks run.
        run_seed: what random numbers of hypergradients start from.
        best: the best validation so far.
        is_between_ticks: whether no tick is begun and not finished.
        is_resumed: whether the next run goes on with one, from a checkpoint or one broken off.
    """

    tick: int = 0
    run_seed: int = 0
    best: Best | None = None
    is_between_ticks: bool = True
    is_resumed: bool = False


class Keeper:
    """Writes checkpoints and records of a run that are due, and takes checkpoints up.

    Args:
        standing: where the run stands.
        ending: why it ends.
        owners: the parts that have a state.
        journal: its records.
        output: its folder; None for a run without.
        device: where its tensors are.
    """

    def __init__(
        self,
        standing: Standing,
        ending: Ending,
        owners: Owners,
        journal: Journal,
        output: Output | None,
        device: torch.device,
    ) -> None:
        self._standing = standing
        self._ending = ending
        self._owners = owners
        self._journal = journal
        self._output = output
        self._device = device
        self._saved_at: tuple[int, int] | None = None

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: it is damaged, or belongs to another program or version.
        """
        progress = load(self._owners, self._journal, path, self._device)
        standing = self._standing
        with refused(path):
            standing.best = None if progress.best is None else Best(**progress.best)
        standing.tick, standing.run_seed = progress.tick, progress.run_seed
        self._ending.reason, standing.is_resumed = progress.stop_reason, True
        standing.is_between_ticks = True
        self._saved_at = None
        if self._output is not None:
            self._output.begin_anew()
        if standing.best is not None and self._output is not None:
            standing.best = replace(standing.best, path=self._output.best(standing.best.tick))

    def resume(self, saving: Saving) -> None:
        """Goes on from a checkpoint if that was asked for, and makes the run's folder ready."""
        resumed = None
        if saving.resume is not None and saving.resume != "auto":
            resumed = Path(saving.resume).absolute()
            self.load(resumed)
        if self._output is None:
            return
        with self._output.locked():
            if saving.resume == "auto":
                resumed = load_newest(self._output.candidates(), self.load)
            best = None if self._standing.best is None else self._standing.best.path
            self._output.begin(self._journal, resumed, best)
        if resumed is not None and resumed == self._output.own(self._standing.tick):
            self._saved_at = self._stands
        self._owners.check()

    def contents(self) -> Contents:
        """Everything that decides how the run goes on.

        Raises:
            RunError: a tick is not finished.
            CheckpointError: it holds what a checkpoint cannot.
        """
        standing = self._standing
        if not standing.is_between_ticks:
            raise RunError(
                "a checkpoint was asked for in the middle of a tick.",
                remedy="save between two calls of step(), or run(out=..., checkpoint_every=...).",
            )
        self._journal.update(standing.tick)
        best = None if standing.best is None else asdict(replace(standing.best, path=None))
        progress = Progress(standing.tick, standing.run_seed, self._ending.reason, best)
        return collect(self._owners, progress, self._journal.text())

    def save_if_due(self) -> list[Path]:
        """Writes the checkpoints of a tick behind which one is wanted; :meth:`save` gives them."""
        is_due = self._output is not None and self._output.is_due(self._standing.tick)
        return self.save(is_due=is_due)

    def save(self, *, is_due: bool = True) -> list[Path]:
        """Writes the checkpoints that are due, those that are there already left out.

        Args:
            is_due: whether that of the tick is; that of the best validation is in any case.

        Returns:
            The folders that were written.
        """
        output, standing = self._output, self._standing
        if output is None:
            return []
        written: list[Path | None] = []
        best = standing.best
        if best is not None and best.tick == standing.tick and best.path is None:
            written.append(output.save_best(standing.tick, self.contents))
            standing.best = replace(best, path=written[0])
        self._journal.update(standing.tick)
        stands = self._stands
        if is_due and stands != self._saved_at:
            self.record(at_once=True)
            written.append(output.save(standing.tick, self.contents))
            self._saved_at = None if written[-1] is None else stands
        return [path for path in written if path is not None]

    def record(self, *, at_once: bool) -> None:
        """Adds the records of ticks that are over to the run's folder."""
        if self._output is not None:
            self._output.record(self._journal, self._standing.tick, at_once=at_once)

    @property
    def _stands(self) -> tuple[int, int]:
        """The tick and the records, by which a checkpoint is known to be there already."""
        return self._standing.tick, len(self._journal)
