"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlodeco.errors import counted
from mlodeco.runtime.history import History

if TYPE_CHECKING:
    from mlodeco.show.figures import Figure


@dataclass(frozen=True)
class Best:
    """The best validation of the metric that is monitored.

    ``path`` is the folder of its checkpoint; None for a run without ``out``.
    """

    tick: int
    metric: str
    value: float
    metrics: dict[str, float]
    path: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        history: its records.
        best: the best validation; None if nothing is monitored.
        stop_reason: why it ended.
        ticks: ticks run, over all calls of ``run`` of this runner.
        directory: the folder of the run; None for one without ``out``.
    """

    history: History
    best: Best | None
    stop_reason: str
    ticks: int
    directory: Path | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """How many steps of each level were skipped, since their numbers were not finite."""
        return self.history.skipped

    def plot(self, **options: Any) -> Figure:
        """The losses and validation metrics as a figure: :meth:`History.plot`."""
        return self.history.plot(**options)

    def __repr__(self) -> str:
        found, told = self.best, ""
        if found is not None:
            told = f"; best {found.metric} {found.value:.4g} at tick {found.tick}"
        return f"<Result: {counted(self.ticks, 'tick')}; {self.stop_reason}{told}>"
