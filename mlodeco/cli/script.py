"""A script run as ``python script.py`` runs it, up to its first ``mlodeco.run()``."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import mlodeco
from mlodeco.api import Takeover, current_program, first_run_to
from mlodeco.cli.settings import Setting, apply_settings, settings_told
from mlodeco.errors import RunError


class Shown(SystemExit):
    """Ends a script whose program was wanted and not its training."""


def execute(
    script: Path,
    arguments: Sequence[str],
    settings: Sequence[Setting],
    act: Takeover,
    choose: Callable[[Path, Sequence[mlodeco.Program]], mlodeco.Program],
) -> None:
    """Runs a script; its first ``mlodeco.run()`` is ``act``'s, with the settings made.

    A script that does not call it is run as if it did at its end.

    Args:
        script: the file.
        arguments: what ``sys.argv`` has behind the file.
        settings: options of the levels of the first run's program.
        act: is given ``run`` and the arguments of the call.
        choose: the program of a script without the call, of the first that it has made.

    Raises:
        RunError: the script neither calls ``mlodeco.run()`` nor declares levels.
    """
    calls: list[dict[str, Any]] = []

    def take_over(run: Callable[..., mlodeco.Result], given: dict[str, Any]) -> mlodeco.Result:
        calls.append(given)
        apply_settings(settings, given["program"])
        with settings_told(settings):
            return act(run, given)

    with _main_module(script, arguments) as main, first_run_to(take_over) as made:
        try:
            exec(_compiled(script), vars(main))
            if not calls:
                mlodeco.run(program=choose(script, made))  # type: ignore[call-arg]
        except Shown:
            pass


def _compiled(script: Path) -> CodeType:
    return compile(script.read_bytes(), script.absolute(), "exec", dont_inherit=True)


def first_program(script: Path, made: Sequence[mlodeco.Program]) -> mlodeco.Program:
    """The current program if it has levels, else the first of the script's own that has.

    Raises:
        RunError: there is none.
    """
    found = [program for program in (current_program(), *made) if program.levels]
    if not found:
        raise RunError(
            f"{script.name} neither calls mlodeco.run() nor declares levels.",
            expected="@level('name', module=..., ...) above a loss function.",
            remedy="declare levels, or call mlodeco.run(steps, program=p) at the script's end.",
        )
    return found[0]


def only_program(script: Path, made: Sequence[mlodeco.Program]) -> mlodeco.Program:
    """The same where there is no choice.

    Raises:
        RunError: there is none, or the script has several of its own.
    """
    found = first_program(script, made)
    if found is not current_program() and sum(bool(one.levels) for one in made) > 1:
        raise RunError(
            f"{script.name} declares its levels in several Programs that no run() was given.",
            remedy="call mlodeco.run(steps, program=p) with the one that is meant.",
        )
    return found


@contextmanager
def _main_module(script: Path, arguments: Sequence[str]) -> Iterator[ModuleType]:
    """The module ``__main__``, ``sys.argv`` and ``sys.path`` of a script."""
    main = ModuleType("__main__")
    vars(main).update(__file__=str(script.absolute()), __builtins__=builtins)
    before = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"] = main
    sys.argv = [str(script), *arguments]
    if not sys.flags.safe_path:
        sys.path[0] = str(script.resolve().parent)
    try:
        yield main
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def no_steps(script: Path) -> RunError:
    """That nobody says how long a run is to be."""
    return RunError(
        f"{script.name} does not say how many steps to run.",
        remedy="add --steps 1000, for instance.",
    )


def end_of_own(script: Path, program: mlodeco.Program) -> BaseException:
    """What ends a script that calls no run() where no steps are asked for.

    One that has built a Program of its own has done with it what it wanted.
    """
    is_done = program is not current_program() and program.built is not None
    return Shown() if is_done else no_steps(script)


def refuse_second_training(script: Path, program: mlodeco.Program, *, asked: bool) -> None:
    """Ends a script that has stepped a Runner of its own, of which a command knows nothing.

    Raises:
        RunError: it was asked for something that does not reach it.
        Shown: nothing was.
    """
    built = program.built
    if built is None or not built.tick:
        return
    if asked:
        raise RunError(
            f"{script.name} trains by a Runner of its own, which options do not reach.",
            remedy="call mlodeco.run() in the script, or leave the options out.",
        )
    raise Shown


def require_folder(options: Mapping[str, Any], out: object) -> None:
    """Refuses options of the command line about checkpoints where there is no folder for them.

    Raises:
        RunError: there is none.
    """
    needing = ["checkpoint_every", "keep", *(["resume"] if options.get("resume") == "auto" else [])]
    for name in needing:
        if name in options and out is None:
            raise RunError(
                f"--{name.replace('_', '-')} is given and --out is not.",
                expected="a folder for the checkpoints.",
                remedy="on the command line: --out runs/one, for instance.",
            )
