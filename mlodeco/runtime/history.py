"""What a run leaves to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mlodeco.errors import RunError, counted, did_you_mean, quoted
from mlodeco.runtime.tables import Frames, beside, to_frames, to_html

if TYPE_CHECKING:
    from mlodeco.show.figures import Figure


class SolveRecord(NamedTuple):
    """One linear solve of a step.

    Attributes:
        level: the level that was differentiated through.
        method: the method's name.
        steps: how many steps or terms it took.
        residual: relative to the right-hand side; None if not computed.
        status: how it ended, in words.
    """

    level: str
    method: str
    steps: int
    residual: float | None
    status: str


@dataclass(frozen=True)
class StepRecord:
    """One own optimizer step of a level.

    Attributes:
        tick: the tick, from 1.
        level: the level's name.
        step: its own step, from 1.
        loss: its loss before the step, averaged over micro-batches.
        grad_norm: the norm of its (hyper)gradient before clipping.
        learning_rate: that of the optimizer's first group, at this step; not a number for an
            optimizer without one.
        metrics: what its function returned or logged beside the loss.
        solves: its linear solves.
        skipped: whether nothing was changed, since its numbers were not finite. The norm of the
            gradient is then no number, and nor is the loss of a level with lower levels.
        cosine: of the angle between the hypergradient and that of the level's last step; near
            one for a steady direction, near zero or below for noise. None for levels without
            lower levels and at the first step.
    """

    tick: int
    level: str
    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    metrics: dict[str, Any] = field(default_factory=dict)
    solves: tuple[SolveRecord, ...] = ()
    cosine: float | None = None
    skipped: bool = False

    def __repr__(self) -> str:
        what = "skipped" if self.skipped else f"loss {self.loss:.4g}"
        told = "".join(f", {key} {_shown(value)}" for key, value in self.metrics.items())
        return f"<step {self.step} of {self.level!r} at tick {self.tick}: {what}{told}>"


@dataclass(frozen=True)
class ValidationRecord:
    """The metrics of one validation."""

    tick: int
    metrics: dict[str, float]

    def __repr__(self) -> str:
        told = ", ".join(f"{key} {value:.4g}" for key, value in self.metrics.items())
        return f"<validation at tick {self.tick}: {told}>"


@dataclass(frozen=True)
class Tick:
    """The steps and validations of one tick."""

    tick: int
    steps: tuple[StepRecord, ...]
    validations: tuple[ValidationRecord, ...] = ()

    def __repr__(self) -> str:
        losses = [f"{record.level} {record.loss:.4g}" for record in self.steps]
        told = [f"{k} {v:.4g}" for r in self.validations for k, v in r.metrics.items()]
        parts = "; ".join(", ".join(part) for part in (losses, told) if part)
        return f"<Tick {self.tick}: {parts}>"


class History:
    """All records of a run, in their order.

    Args:
        levels: the names of the levels that may step.
        is_validated: whether validations are to come, whose metrics are not known before.
    """

    def __init__(self, levels: Iterable[str] = (), *, is_validated: bool = False) -> None:
        self._levels = tuple(levels)
        self._is_validated = is_validated
        self.steps: list[StepRecord] = []
        self.validations: list[ValidationRecord] = []

    def of(self, level: str) -> list[StepRecord]:
        """The steps of one level.

        Raises:
            RunError: there is no such level.
        """
        found = [record for record in self.steps if record.level == level]
        if not found and level not in self._levels:
            raise RunError(
                f"the history has no level {level!r}.",
                expected=f"one of {quoted(self._levels)}.",
                remedy=f"correct the name.{did_you_mean(str(level), self._levels)}",
            )
        return found

    def losses(self, level: str) -> list[float]:
        """The losses of one level.

        Raises:
            RunError: there is no such level.
        """
        return [record.loss for record in self.of(level)]

    @property
    def skipped(self) -> dict[str, int]:
        """How many steps of each level were skipped, of those that have skipped some."""
        return dict(Counter(record.level for record in self.steps if record.skipped))

    def metric(self, name: str) -> list[float]:
        """The values of one validation metric; none before the first validation.

        Raises:
            RunError: no validation has it.
        """
        found = [r.metrics[name] for r in self.validations if name in r.metrics]
        if not found and (self.validations or not self._is_validated):
            known = dict.fromkeys(key for r in self.validations for key in r.metrics)
            raise RunError(
                f"the history has no validation metric {name!r}.",
                expected=f"one of {quoted(known)}."
                if known
                else "a metric that an @validate function returns; the program has none.",
                remedy="correct the name, or return it from a validation; what a level's function "
                "returns beside its loss is in the metrics of its steps, history.of(level)."
                f"{did_you_mean(str(name), known)}",
            )
        return found

    def plot(
        self,
        *,
        level: str | Iterable[str] = (),
        metric: str | Iterable[str] = (),
        smooth: int | None = None,
    ) -> Figure:
        """The losses and validation metrics as a figure of matplotlib.

        Args:
            level: the levels to show; default: all, or none if ``metric`` is given.
            metric: the metrics to show; default: all, or none if ``level`` is given.
            smooth: about how many steps the thick line averages; 1 for none. Default: a fortieth
                of them.

        Raises:
            RunError: there is no such level or metric, or nothing to show; or matplotlib is not
                installed.
        """
        # the one import upwards: a history is asked for its picture, and does not draw it
        from mlodeco.show.curves import plot_histories

        return plot_histories({"": self}, level=level, metric=metric, smooth=smooth)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The steps as flat dictionaries, for a table: :func:`columns` of each."""
        return map(columns, self.steps)

    def to_pandas(self) -> Frames:
        """Two frames of pandas, ``steps`` with the columns of :meth:`rows`, and ``validations``.

        What a record does not have is NaN. A validation metric called ``tick`` is the column
        ``metric_tick``.

        Raises:
            RunError: pandas is not installed.
        """
        return to_frames(self)

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        last = {record.level: f"{record.loss:.4g}" for record in self.steps}
        ticks = self.steps[-1].tick if self.steps else 0
        losses = ", ".join(f"{level} {loss}" for level, loss in last.items())
        return (
            f"<History: {counted(ticks, 'tick')}, {counted(len(self.steps), 'level step')}, "
            f"{counted(len(self.validations), 'validation')}; "
            f"last losses: {losses or 'none'}>"
        )

    def _repr_html_(self) -> str:
        return to_html(self)


def _shown(value: Any) -> str:
    """A metric in a few characters."""
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!r:.40}"


def columns(record: StepRecord) -> dict[str, Any]:
    """A step as a flat dictionary.

    ``solver_steps`` is the sum over the solves of the step, ``residual`` the largest. A metric of
    one's own that has the name of a column stands under ``metric_`` and its name.
    """
    found = {
        "tick": record.tick,
        "level": record.level,
        "step": record.step,
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
        "cosine": record.cosine,
        "skipped": record.skipped,
        "solver_steps": sum(solve.steps for solve in record.solves),
        "residual": max(
            (s.residual for s in record.solves if s.residual is not None), default=None
        ),
    }
    return beside(found, record.metrics)


def as_number(value: Any) -> Any:
    """A tensor of one element as a number, another as a copy; anything else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 and not value.is_meta else value.detach().clone()
    return value


def as_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, each as :func:`as_number` gives it."""
    return {key: as_number(value) for key, value in metrics.items()}
