"""Methods side by side: the same script for each, in processes one after another."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console

from mlodeco.cli.script import Shown, execute, no_steps, only_program, refuse_second_training
from mlodeco.cli.settings import apply_settings, read_setting
from mlodeco.errors import MethodError, MlodecoError, MlodecoWarning, RunError, quoted
from mlodeco.hypergrad import UNREADABLE, read_method, resolve
from mlodeco.runtime import Build, History, Result, Runner, seed_all
from mlodeco.runtime.checking import Agreement, Yardstick, check_damping, dampings_of
from mlodeco.runtime.checkpoint.journal import plain
from mlodeco.runtime.launch import launched_count
from mlodeco.runtime.measuring import Meter, seconds_per_step
from mlodeco.show import (
    Comparison,
    Row,
    comparison_figure,
    comparison_table,
    loss_of,
    save_figure,
)

_CHILD: Final = "compare-one"
"""The command of the processes that this one starts."""

_WIDTH: Final = 100
"""Of the table where it is not for a terminal."""

_OPTIONS: Final = (
    "accelerator",
    "nested",
    "reduce",
    "tails",
    "compile",
    "mixed_precision",
    "nonfinite",
)
"""What a run keeps of the script's call; nothing is shown, saved or resumed."""


class NoResult(Exception):  # noqa: N818 (it says how a process has ended)
    """A process has ended without a result.

    Args:
        code: its exit code.
        told: what it wrote to stderr.
    """

    def __init__(self, code: int, told: str) -> None:
        *_, last = told.strip().splitlines() or [""]
        super().__init__(f"the process ended with code {code}. {last}".strip())
        self.code = code
        self.told = told


@dataclass(frozen=True)
class Job:
    """What a process is to do.

    Attributes:
        script: the file.
        arguments: of the script.
        settings: options of its levels, as written.
        methods: all of them, to be measured at one point; or one, to train with.
        levels: those that have the method; none for all that can have one.
        steps: ticks; None for those of the script.
        seed: None for that of the script.
        at: the tick at which all methods are measured.
        damping: of the reference; None for that of the script's own methods.
        dampings: upper, lower and damping of each edge; none for the process that finds them.
        with_traceback: whether errors of the script are told whole.
    """

    script: str
    arguments: Sequence[str]
    settings: Sequence[str]
    methods: Sequence[str]
    levels: Sequence[str]
    steps: int | None
    seed: int | None
    at: int
    damping: float | None
    dampings: Sequence[tuple[str, str, float]] = ()
    with_traceback: bool = False

    @staticmethod
    def read(path: Path) -> Job:
        """The job of a file."""
        return Job(**json.loads(path.read_text(encoding="utf-8")))


def read_methods(text: str) -> list[str]:
    """The methods of a list, ``neumann(num_terms=10), cg, sama``, each as written.

    Raises:
        MethodError: one is none, or stands there twice, or there are none.
    """
    source = f"({text})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's reader, about odd escapes
            node = ast.parse(source, mode="eval").body
    except UNREADABLE:
        read_method(text)  # which says why
        raise _unreadable(text) from None
    nodes = node.elts if isinstance(node, ast.Tuple) else [node]
    found = [ast.get_source_segment(source, one) or "" for one in nodes]
    for one in found:
        read_method(one)
    if not found or len(set(found)) < len(found):
        raise _unreadable(text)
    return found


def _unreadable(text: str) -> MethodError:
    return MethodError(
        f"{text!r} is not a list of methods.",
        expected='different methods with commas between them, as in "neumann(num_terms=10),cg".',
        remedy="correct it.",
    )


def compare(job: Job, tell: Callable[[str], None]) -> Comparison:
    """Measures all methods at one point, then trains with each.

    Args:
        job: what to do.
        tell: is told what comes next.

    Raises:
        RunError: several processes were launched.
        NoResult: the script cannot be run.
    """
    if launched_count() > 1:
        raise RunError(
            f"compare was launched in {launched_count()} processes, and starts its own, one after "
            "another.",
            remedy="run it without a launcher: mlodeco compare SCRIPT --hypergrad neumann,cg.",
        )
    tell("hypergradients at one point")
    start = _result(job)
    known = replace(
        job,
        levels=start["levels"],
        dampings=[tuple(edge) for edge in start["dampings"]],
    )
    rows, memory_of = [], "the process"
    for number, method in enumerate(job.methods, 1):
        tell(f"{method} ({number} of {len(job.methods)})")
        measured = start["measured"][method]
        try:
            found = _result(replace(known, methods=[method]))
        except NoResult as error:
            found = {"error": str(error), "notes": []}
        memory_of = found.pop("memory_of", memory_of)
        if measured["agreements"] or not found["error"]:  # else said twice
            found["notes"] = list(dict.fromkeys([*measured["notes"], *found["notes"]]))
        ends = _agreements(found.pop("end", {}))
        rows.append(Row(method, _agreements(measured["agreements"]), ends, **found))
    return Comparison(
        script=job.script,
        seed=start["seed"],
        steps=start["steps"],
        at=job.at,
        levels=start["levels"],
        outer=start["levels"][-1],
        dampings={f"{upper} -> {lower}": size for upper, lower, size in known.dampings},
        is_own_damping=job.damping is None,
        memory_of=memory_of,
        rows=rows,
    )


def _agreements(found: Mapping[str, Any]) -> dict[str, Agreement]:
    return {level: Agreement(**one) for level, one in found.items()}


def _result(job: Job) -> dict[str, Any]:
    """What a process of its own gives back.

    Raises:
        NoResult: nothing.
    """
    with TemporaryDirectory(prefix="mlodeco-") as folder:
        told, result = Path(folder, "job.json"), Path(folder, "result.json")
        told.write_text(json.dumps(asdict(job)), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mlodeco", _CHILD, str(told), str(result)],
            # sets of strings have the same order in all
            env={"PYTHONHASHSEED": "0", **os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if not result.exists():
            raise NoResult(done.returncode, done.stderr)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def work(job: Job, result: Path) -> None:
    """Does a job, in a process of its own.

    Args:
        job: what to do.
        result: the file for what is found.

    Raises:
        MlodecoError: the script cannot be run so.
    """
    script = Path(job.script)
    # before the script draws its data
    seed_all(job.seed or 0)

    def act(run: Callable[..., Result], given: dict[str, Any]) -> Result:
        if "steps" not in given:
            refuse_second_training(script, given["program"], asked=True)
        steps = job.steps or given.get("steps")
        if steps is None:
            raise no_steps(script)
        seed = next(s for s in (job.seed, given.get("seed"), 0) if s is not None)
        do = _train if job.dampings else _measure_all
        found = do(replace(job, steps=steps, seed=seed), given)
        result.write_text(json.dumps(found), encoding="utf-8")
        raise Shown

    settings = [read_setting(text) for text in job.settings]
    execute(script, job.arguments, settings, act, only_program)


def _measure_all(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """All methods at one point, to which the script's own have led."""
    runner = _runner(job, given)
    levels = _levels(runner.built, job.levels)
    check_damping(job.damping)
    _check_names(job.methods, runner.built)
    own = dampings_of(runner.built)
    dampings = own if job.damping is None else dict.fromkeys(own, job.damping)
    if job.at:
        runner.run_to(job.at)
    sticks = _yardsticks(levels, dampings, given)
    measured = {}
    for method in job.methods:
        agreements, notes = _measured(method, sticks)
        measured[method] = {"agreements": agreements, "notes": notes}
    return {
        "levels": levels,
        "steps": job.steps,
        "seed": job.seed,
        "dampings": [[*edge, size] for edge, size in dampings.items()],
        "measured": measured,
    }


def _check_names(methods: Sequence[str], built: Build) -> None:
    """Refuses what is neither a method of the library nor one of the program.

    Raises:
        MethodError: one is.
    """
    for spec in map(read_method, methods):
        for one in spec.values() if isinstance(spec, Mapping) else (spec,):
            resolve(one, built.custom)


def _train(job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
    """One method, from the start."""
    (method,), meter, error, reason = job.methods, Meter(), None, ""
    runner: Runner | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MlodecoWarning)
        try:
            chosen = [read_setting(f"{level}.hypergrad={method}") for level in job.levels]
            apply_settings(chosen, given["program"])
            runner = _runner(job, given)
            runner.listeners.append(meter)
            reason = runner.run_to(job.steps or 0).stop_reason
        except Exception as found:  # a user's function may raise any
            error = _told(found)
    memory, history = meter.memory, History() if runner is None else runner.history
    notes = [str(one.message) for one in caught if issubclass(one.category, MlodecoWarning)]
    agreements: dict[str, Any] = {}
    if error is None:
        dampings = {(upper, lower): size for upper, lower, size in job.dampings}
        agreements, doubts = _measured(method, _yardsticks(job.levels, dampings, given))
        notes += doubts
    outer = job.levels[-1]
    steps = [record.tick for record in history.steps if record.level == outer]
    monitored = [one.monitor for one in given["program"].validations if one.monitor]
    return {
        "end": agreements,
        "seconds": seconds_per_step(meter.ends, steps),
        "memory": memory,
        "memory_of": meter.what,
        "ticks": len(meter.ends),
        "first_loss": history.steps[0].loss if history.steps else None,
        "curves": _curves(history, meter.ends, outer, monitored),
        "stop_reason": reason,
        "error": error,
        "notes": list(dict.fromkeys(notes)),
    }


def _runner(job: Job, given: Mapping[str, Any]) -> Runner:
    options = {name: given[name] for name in _OPTIONS if name in given}
    return Runner(given["program"], seed=job.seed, **options)


def _levels(built: Build, wanted: Sequence[str]) -> list[str]:
    """The levels that differentiate through others, in the order of a tick.

    Raises:
        MlodecoError: one that is wanted does not, or there are none.
    """
    uppers = {upper for upper, _ in built.methods}
    for level in wanted:
        if built.graph.known(level) not in uppers:
            raise RunError(
                f"--level {level}: it has no lower level to differentiate through.",
                expected=f"some of {quoted(sorted(uppers))}.",
                remedy="name a level above others, or leave --level out.",
            )
    found = [name for name in built.graph.order if name in (wanted or uppers)]
    if not found:
        raise RunError(
            "no level has a path through lower levels: there is no method to compare.",
            remedy="see what reads what: mlodeco graph.",
        )
    return found


def _yardsticks(
    levels: Sequence[str], dampings: Mapping[tuple[str, str], float], given: Mapping[str, Any]
) -> dict[str, Yardstick]:
    return {
        level: Yardstick(
            level,
            program=given["program"],
            uppers=levels,
            dampings=dampings,
            nested=given.get("nested", False),
        )
        for level in levels
    }


def _measured(method: str, sticks: Mapping[str, Yardstick]) -> tuple[dict[str, Any], list[str]]:
    """For each level the agreement of its hypergradient, and what could not be measured."""
    found, notes = {}, []
    for level, stick in sticks.items():
        try:
            agreement, doubts = stick.measure(read_method(method))
        except Exception as error:  # a user's function may raise any
            notes.append(f"not measured: {_told(error)}")
            continue
        found[level] = asdict(agreement)
        notes += doubts
    return found, notes


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, MlodecoError) else f"{type(error).__name__}: {error}"


def _curves(
    history: History, ends: Sequence[float], outer: str, monitored: Iterable[str]
) -> dict[str, list[tuple[int, float, float]]]:
    """Tick, seconds and value: of the metrics, those first that are monitored, and of a loss."""
    names = dict.fromkeys((*monitored, *(name for r in history.validations for name in r.metrics)))
    values = [
        *(
            (name, r.tick, r.metrics[name])
            for name in names
            for r in history.validations
            if name in r.metrics
        ),
        *((loss_of(outer), r.tick, r.loss) for r in history.steps if r.level == outer),
    ]
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for name, tick, value in values:
        # a hook may log anything
        if 0 < tick <= len(ends) and isinstance(value, int | float):
            curves.setdefault(name, []).append((tick, ends[tick - 1], value))
    return curves


def show_comparison(job: Job, out: Path | None) -> None:
    """Compares, prints the table, and writes the files.

    Args:
        job: what to do.
        out: a folder for the files; None for none.

    Raises:
        RunError: several processes were launched, or the folder cannot be made.
        SystemExit: the script cannot be run, or not with any of the methods.
    """
    if out is not None:
        _open_folder(out)
    progress = Console(stderr=True)
    try:
        with progress.status("") if progress.is_terminal else nullcontext() as status:
            found = compare(job, status.update if status else lambda text: None)
    except NoResult as error:
        print(error.told.rstrip() or error, file=sys.stderr)
        raise SystemExit(error.code if error.code > 0 else 1) from None
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(comparison_table(found, console.width))
    if out is not None:
        try:
            _write(found, out)
        except RunError as error:  # a picture that cannot be drawn is no failure
            print(error, file=sys.stderr)
    if all(row.error for row in found.rows):
        raise SystemExit(1)


def _open_folder(folder: Path) -> None:
    """Makes the folder for a comparison, before the long part.

    Raises:
        RunError: it cannot be made.
    """
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(found: Comparison, folder: Path) -> None:
    """Writes ``comparison.json``, then ``comparison.png``.

    Raises:
        RunError: a file cannot be written, or matplotlib is not installed.
    """
    text = json.dumps(plain(asdict(found)), indent=1, allow_nan=False)
    with _written(folder):
        (folder / "comparison.json").write_text(f"{text}\n", encoding="utf-8")
    save_figure(comparison_figure(found), folder / "comparison.png")


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{folder} cannot be written to: {error}.", remedy="give another --out."
        ) from error
