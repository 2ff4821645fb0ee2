"""Accelerate's trackers, such as TensorBoard's: what is logged to them, and when."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from mlodeco.errors import RunError, did_you_mean, quoted
from mlodeco.hypergrad import spell
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.history import StepRecord, Tick, columns
from mlodeco.runtime.launch import make_accelerator

if TYPE_CHECKING:
    from mlodeco.runtime.result import Result
    from mlodeco.runtime.runner import Runner

_PLAIN = (bool, int, float, str)

_OPTIONS = ("inner_steps", "repeat", "warmup", "accumulate", "clip_norm", "rollback", "init_from")


def tracking_accelerator(
    given: Accelerator | None,
    log_with: Any,
    project: str,
    out: str | os.PathLike[str] | None,
) -> Accelerator:
    """The Accelerator of a run, with the trackers that were asked for.

    Raises:
        RunError: a tracker cannot be made, or they are asked for in two places.
    """
    if not isinstance(project, str):
        raise RunError(
            f"project={project!r}.", expected="a name.", remedy="project='first', for instance."
        )
    if log_with is None:
        return make_accelerator(given)
    if given is not None:
        raise RunError(
            "log_with= and accelerator= are both given.",
            expected="trackers in one place.",
            remedy="make the Accelerator with them: Accelerator(log_with=..., project_dir=...).",
        )
    trackers = check_trackers(log_with, out)
    return make_accelerator(None, log_with=trackers or None, project_dir=out)


def check_trackers(log_with: Any, out: str | os.PathLike[str] | None) -> list[Any]:
    """The trackers asked for, each of which can be made.

    Args:
        log_with: names and trackers.
        out: the folder of the run.

    Raises:
        RunError: one is none, is not installed, or needs a folder where there is none.
    """
    found: list[Any] = list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    for tracker in found:
        if isinstance(tracker, str):
            _check_name(tracker, out)
        elif not isinstance(tracker, GeneralTracker):
            raise RunError(
                f"log_with={tracker!r} is not a tracker.",
                expected=f"one of {quoted(LOGGER_TYPE_TO_CLASS)}, an accelerate.tracking."
                "GeneralTracker, or a list of these.",
                remedy="run(out='runs/one', log_with='tensorboard'), for instance.",
            )
    return found


def _check_name(name: str, out: str | os.PathLike[str] | None) -> None:
    known = LOGGER_TYPE_TO_CLASS
    if name not in known:
        raise RunError(
            f"there is no tracker {name!r}.",
            expected=f"one of {quoted(known)}.",
            remedy="correct the name, or pass an accelerate.tracking.GeneralTracker."
            f"{did_you_mean(name, known)}",
        )
    is_own = known[name].__module__ != GeneralTracker.__module__
    if not is_own and name not in [str(tracker) for tracker in get_available_trackers()]:
        raise RunError(
            f"the tracker {name!r} needs a package that is not installed.",
            remedy=f"pip install {name}.",
        )
    if known[name].requires_logging_directory and out is None:
        raise RunError(
            f"the tracker {name!r} writes to a folder, and out= is not given.",
            remedy="add out='runs/one', for instance.",
        )


class Trackers:
    """Logs a run to the trackers of its Accelerator; for the main process alone.

    Every tick at which levels have stepped is logged at its number, with ``LEVEL/`` before the
    names of :func:`columns`; a validation at that of its tick, with ``validation/``, or
    ``validation_/`` where this is a level's. What is no number is left out. Trackers that are not
    started yet are started before the first tick, with the options of the levels as their
    configuration, and finished at the end.

    Args:
        accelerator: whose they are.
        project: what they call the run.
        built: the program.
    """

    def __init__(self, accelerator: Accelerator, project: str, built: Build) -> None:
        self._accelerator = accelerator
        self._project = project
        self._built = built
        self._validation = _unlike("validation", built.levels)
        self._are_own = False

    def on_start(self, runner: Runner, steps: int) -> None:
        """Starts the trackers that are not."""
        self._start(runner.tick + 1)

    def on_tick(self, tick: Tick) -> None:
        """Logs the numbers of a tick."""
        self._start(tick.tick)
        steps = {name: value for record in tick.steps for name, value in _of_step(record)}
        if steps:
            self._log(steps, tick.tick)
        for validation in tick.validations:
            values = {f"{self._validation}/{name}": v for name, v in validation.metrics.items()}
            self._log(_numbers(values), validation.tick)

    def on_end(self, result: Result) -> None:
        """Finishes those that were started here, and raises the first error of one."""
        errors = self._finish()
        if errors:
            raise errors[0]

    def on_error(self) -> None:
        """The same; the error that ended the run is the one to see."""
        self._finish()

    def _start(self, first: int) -> None:
        """Starts the trackers, in whose folders a resumed run goes on at a tick."""
        accelerator = self._accelerator
        if accelerator.trackers:
            return
        self._are_own = True
        # what was logged beyond the checkpoint is hidden
        options = {"tensorboard": {"purge_step": first}} if first > 1 else {}
        with _attributed(
            f"as the trackers {quoted(map(_name, accelerator.log_with))} were started"
        ):
            accelerator.init_trackers(self._project, _configuration(self._built), options)

    def _log(self, values: Mapping[str, float], tick: int) -> None:
        for tracker in self._accelerator.trackers:
            with _attributed(f"in the tracker {tracker.name!r}"):
                tracker.log(values, step=tick)

    def _finish(self) -> list[Exception]:
        """Finishes all that were started here; what they raise."""
        errors = []
        for tracker in self._given_up():
            try:
                with _attributed(f"in the tracker {tracker.name!r}"):
                    tracker.finish()
            except Exception as error:
                errors.append(error)
        return errors

    def _given_up(self) -> list[GeneralTracker]:
        """The trackers that were started here, which the Accelerator then no longer has."""
        if not self._are_own:
            return []
        # not Accelerator.end_training, which ends the processes' group too
        found, self._accelerator.trackers = self._accelerator.trackers, []
        self._are_own = False
        return list(found)


def _unlike(name: str, others: Container[str]) -> str:
    """The name, with underscores behind it that tell it from the others."""
    while name in others:
        name += "_"
    return name


def _name(tracker: Any) -> str:
    """That of a tracker, which may be its name itself."""
    return tracker.name if isinstance(tracker, GeneralTracker) else str(tracker)


@contextmanager
def _attributed(where: str) -> Iterator[None]:
    """Adds to an exception where it was raised."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised {where}")
        raise


def _of_step(record: StepRecord) -> Iterator[tuple[str, float]]:
    found = columns(record)
    for name in ("tick", "level"):
        del found[name]
    return iter(_numbers({f"{record.level}/{n}": v for n, v in found.items()}).items())


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among them; True is 1."""
    return {name: float(value) for name, value in values.items() if isinstance(value, Real)}


def _configuration(built: Build) -> dict[str, Any]:
    """The levels' plain options, named as on the command line: ``weights.optimizer.lr``."""
    found: dict[str, Any] = {}
    for name, level in built.levels.items():
        options = {option: getattr(level.declaration, option) for option in _OPTIONS}
        options |= {f"hypergrad.{low}": m for low, m in _methods(built, name)}
        options |= _of_optimizer(level)
        found |= {f"{name}.{n}": v for n, v in options.items() if isinstance(v, _PLAIN)}
    return found


def _methods(built: Build, name: str) -> Iterator[tuple[str, str]]:
    for (upper, low), method in built.methods.items():
        if upper == name:
            yield low, "None" if method is None else spell(method)


def _of_optimizer(level: BuiltLevel) -> dict[str, Any]:
    """The class of a level's optimizer, and the options of its first group."""
    if level.optimizer is None:
        return {}
    group = level.optimizer.param_groups[0]
    options = {f"optimizer.{option}": value for option, value in group.items()}
    return {"optimizer": type(level.optimizer).__name__, **options}
