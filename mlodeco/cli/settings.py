"""Options of levels on the command line: ``--set LEVEL.OPTION=VALUE``."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from mlodeco.declare.records import LevelDeclaration
from mlodeco.declare.registry import LEVEL_OPTIONS, Registry
from mlodeco.errors import MlodecoError, RunError, did_you_mean, quoted
from mlodeco.hypergrad import UNREADABLE, read_method
from mlodeco.runtime.amend import amend, with_options

_OBJECTS: Final = ("module", "optimizer", "scheduler", "data", "tune")
"""Options whose values are objects of the script: a command line can but leave them out."""

_SET_BY: Final = "  Set by: "


@dataclass(frozen=True)
class Setting:
    """One option of a level, read.

    Attributes:
        text: as written.
        level: the level's name.
        option: the level's option, or with ``of_optimizer`` one of its optimizer.
        value: the value.
        of_optimizer: whose option it is.
    """

    text: str
    level: str
    option: str
    value: Any
    of_optimizer: bool


def read_setting(text: str) -> Setting:
    """``LEVEL.OPTION=VALUE`` or ``LEVEL.optimizer.OPTION=VALUE``.

    Values are literals of Python; for ``hypergrad`` what :func:`read_method` takes. Any other
    text is itself.

    Raises:
        MlodecoError: it is not of this form, there is no such option, or its value cannot be
            written on a command line.
    """
    path, equals, value = text.partition("=")
    owner, _, option = path.strip().rpartition(".")
    if not equals or not owner or not option:
        raise RunError(
            f"--set {text} is not of the form LEVEL.OPTION=VALUE.",
            remedy="write --set weights.inner_steps=5, for instance.",
        )
    level, _, last = owner.rpartition(".")
    if level and last == "optimizer" and option not in LEVEL_OPTIONS:
        return Setting(text, level, option, _literal(value), of_optimizer=True)
    if option not in LEVEL_OPTIONS:
        raise RunError(
            f"--set {text}: a level has no option {option!r}.",
            expected=f"one of {quoted(LEVEL_OPTIONS)}, or optimizer.OPTION.",
            remedy=f"correct the name.{did_you_mean(option, LEVEL_OPTIONS)}",
        )
    found = read_method(value) if option == "hypergrad" else _literal(value)
    if option in _OBJECTS and found is not None:
        instead = (
            f"set one of its options, as in {owner}.optimizer.lr=0.1"
            if option == "optimizer"
            else "change it in the script, or let the script read it from its arguments"
        )
        raise RunError(
            f"--set {text}: {option} is an object of the script, which a command line cannot name.",
            remedy=f"{instead}.",
        )
    return Setting(text, owner, option, found, of_optimizer=False)


def apply_settings(settings: Sequence[Setting], program: Registry) -> None:
    """Declares the levels of a program again with these options, those of a level together.

    Raises:
        MlodecoError: there is no such level, or the value cannot be right.
    """
    for setting in settings:
        if setting.level not in program.levels:
            raise RunError(
                f"--set {setting.text}: there is no level {setting.level!r}.",
                expected=f"one of {quoted(program.levels)}.",
                remedy=f"correct the name.{did_you_mean(setting.level, program.levels)}",
            )
    for level in dict.fromkeys(setting.level for setting in settings):
        made = [setting for setting in settings if setting.level == level]
        with _attributed(made):
            amend(program, level, _options(made, program.levels[level]))


@contextmanager
def _attributed(settings: Sequence[Setting]) -> Iterator[None]:
    """Adds to an error which settings it comes from."""
    try:
        yield
    except MlodecoError as error:
        error.add_note(f"{_SET_BY}{_written(settings)}")
        raise


@contextmanager
def settings_told(settings: Sequence[Setting]) -> Iterator[None]:
    """Adds to an error of a level which settings that level has."""
    try:
        yield
    except MlodecoError as error:
        made = [setting for setting in settings if setting.level == error.level]
        told = getattr(error, "__notes__", ())
        if made and not any(note.startswith(_SET_BY) for note in told):
            error.add_note(f"{_SET_BY}{_written(made)}")
        raise


def _written(settings: Sequence[Setting]) -> str:
    return ", ".join(f"--set {one.text}" for one in settings)


def _options(settings: Sequence[Setting], declaration: LevelDeclaration) -> dict[str, Any]:
    """The options of one level; those of its optimizer are one option.

    Raises:
        MlodecoError: the optimizer is left out and has options, or cannot have these.
    """
    options = {one.option: one.value for one in settings if not one.of_optimizer}
    inner = [one for one in settings if one.of_optimizer]
    if not inner:
        return options
    if "optimizer" in options:
        raise RunError(
            f"the optimizer is left out, and its {quoted(one.option for one in inner)} set.",
            remedy=f"leave {declaration.name}.optimizer=None out, or the options.",
            level=declaration.name,
            site=str(declaration.site),
        )
    made = with_options(declaration, {one.option: one.value for one in inner})
    # a factory has its options only once it is called
    options["optimizer"] = _attributed(inner)(made) if callable(made) else made
    return options


def _literal(text: str) -> Any:
    """The value of a literal; other text as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's reader, about odd escapes
            return ast.literal_eval(text.strip())
    except UNREADABLE:
        return text.strip()
