"""A script run as ``python script.py`` runs it, up to its first ``mlodeco.run()``."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import mlodeco
from mlodeco.api import Takeover, current_program, first_run_to
from mlodeco.cli.settings import Setting, apply_settings
from mlodeco.errors import RunError


class Shown(SystemExit):
    """Ends a script whose program was wanted and not its training."""


def execute(
    script: Path, arguments: Sequence[str], settings: Sequence[Setting], act: Takeover
) -> None:
    """Runs a script; its first ``mlodeco.run()`` is ``act``'s, with the settings made.

    A script that does not call it is run as if it did at its end.

    Args:
        script: the file.
        arguments: what ``sys.argv`` has behind the file.
        settings: options of the levels of the first run's program.
        act: is given ``run`` and the arguments of the call.

    Raises:
        RunError: the script neither calls ``mlodeco.run()`` nor declares levels.
    """
    calls: list[dict[str, Any]] = []

    def take_over(run: Callable[..., mlodeco.Result], given: dict[str, Any]) -> mlodeco.Result:
        calls.append(given)
        apply_settings(settings, given["program"])
        return act(run, given)

    with _main_module(script, arguments) as main, first_run_to(take_over):
        try:
            exec(_compiled(script), vars(main))
            if not calls:
                _require_program(script)
                mlodeco.run()  # type: ignore[call-arg]
        except Shown:
            pass


def _compiled(script: Path) -> CodeType:
    return compile(script.read_bytes(), script.absolute(), "exec", dont_inherit=True)


def _require_program(script: Path) -> None:
    if not current_program().levels:
        raise RunError(
            f"{script.name} neither calls mlodeco.run() nor declares levels.",
            expected="@level('name', module=..., ...) above a loss function, in the default "
            "program; levels declared inside 'with Program() as p' belong to p.",
            remedy="call mlodeco.run(steps, program=p) at the script's end.",
        )


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
