"""The options that shape a level's inner loop, checked: init_from, replicas and tune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from mlodeco.declare.checks import Checker
from mlodeco.declare.records import Function, LevelDeclaration
from mlodeco.declare.replicas import Replicas
from mlodeco.errors import quoted

_TUNE: Final = "tune={'lr': lambda hyper: hyper.log_lr.exp()}"


def read_init_from(check: Checker, name: str, init_from: Any) -> str | None:
    """The name of another level, or None."""
    if init_from is None:
        return None
    if not isinstance(init_from, str) or not init_from.strip():
        raise check.error(
            f"init_from={init_from!r}.",
            expected="the name of a level above.",
            remedy="name the level whose parameters each inner loop starts from: init_from='init'.",
        )
    if init_from == name:
        raise check.error(
            f"init_from={init_from!r} names the level itself.",
            remedy="name a level above, whose parameters each inner loop starts from; without "
            "init_from= a loop goes on where the last one ended.",
        )
    return init_from


def read_replicas(check: Checker, replicas: Any) -> Replicas | None:
    """A number of copies as a record."""
    if replicas is None or isinstance(replicas, Replicas):
        return replicas
    return Replicas(check.count("replicas", replicas, least=1))


def read_tune(check: Checker, tune: Any) -> dict[str, Function]:
    """For each option of the optimizer the function that computes it."""
    if tune is None:
        return {}
    if not isinstance(tune, Mapping):
        raise check.error(
            f"tune={tune!r}.",
            expected="a mapping from options of the optimizer to functions of levels.",
            remedy=f"write {_TUNE}.",
        )
    for option, function in tune.items():
        if not isinstance(option, str) or not option.isidentifier():
            raise check.error(
                f"tune= has the key {option!r}.",
                expected="the name of an option of the optimizer, such as 'lr'.",
                remedy=f"write {_TUNE}.",
            )
        if not callable(function):
            raise check.error(
                f"tune[{option!r}]={function!r} is not callable.",
                expected="a function of the levels that the option is computed from.",
                remedy=f"write {_TUNE}; a constant belongs into optimizer=.",
            )
        check.names_taken(function, f"tune[{option!r}]")
    return dict(tune)


def refuse_contradictions(check: Checker, declaration: LevelDeclaration) -> None:
    """Refuses options that these three cannot stand beside.

    Raises:
        DeclarationError: there is one.
    """
    if declaration.init_from is not None:
        _refuse_beside_init(check, declaration)
    if declaration.replicas is not None:
        _refuse_beside_replicas(check, declaration)
    if "lr" in declaration.tune and declaration.scheduler is not None:
        raise check.error(
            "tune= computes 'lr' and scheduler= sets it too.",
            expected="one of them.",
            remedy="leave scheduler out, or 'lr' out of tune.",
        )


def _refuse_beside_init(check: Checker, declaration: LevelDeclaration) -> None:
    start = declaration.init_from
    if declaration.rollback:
        raise check.error(
            f"init_from={start!r} and rollback=True.",
            expected=f"one of them: rollback makes the step that the next loop goes on from, and "
            f"the next loop starts from {start!r} anyway.",
            remedy="leave rollback out.",
        )
    if declaration.warmup:
        raise check.error(
            f"init_from={start!r} and warmup={declaration.warmup}.",
            expected=f"one of them: every inner loop starts from {start!r}, so that nothing is "
            "left of the steps before.",
            remedy="leave warmup out; warm up the level that it starts from, or raise inner_steps.",
        )


def _refuse_beside_replicas(check: Checker, declaration: LevelDeclaration) -> None:
    if declaration.lower:
        raise check.error(
            f"replicas= on a level with the lower levels {quoted(declaration.lower)}.",
            expected="a level without lower levels: each copy would have its own solution of them.",
            remedy="leave replicas out, or make the lowest level the one with replicas.",
        )
    if isinstance(declaration.module, str):
        raise check.error(
            f"replicas= on a level that shares the module of {declaration.module!r}.",
            expected="a module of its own: that level has one copy of the parameters.",
            remedy="give the level a module, or leave replicas out.",
        )
