"""Options of a level set anew after its declaration, by a command line for instance."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from mlodeco.declare.records import LevelDeclaration
from mlodeco.declare.registry import LEVEL_OPTIONS, Registry
from mlodeco.errors import ModuleWarning, OptimizerError, did_you_mean, quoted


def amend(registry: Registry, level: str, options: Mapping[str, Any]) -> None:
    """Declares a level again with some options changed; the others and its function stay.

    A module that is built stays the level's: somebody may have loaded parameters into it.

    Args:
        registry: the program, which has the level.
        level: its name.
        options: those of :meth:`Registry.level`.

    Raises:
        DeclarationError, GraphError: as for a declaration; the level is then as before.
    """
    old = registry.levels[level]
    trial = Registry()
    trial.levels = {name: d for name, d in registry.levels.items() if name != level}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModuleWarning)  # the declaration has given it
        trial.level(level, **{**_given(registry, old, options), **options})(old.function)
    registry.levels[level] = trial.levels[level]
    registry.version += 1


def _given(registry: Registry, old: LevelDeclaration, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the level was declared with."""
    given = {name: getattr(old, name) for name in LEVEL_OPTIONS if hasattr(old, name)}
    given["reads"] = old.argument_reads or old.extra_reads
    if not changes.get("lower", old.lower):
        del given["hypergrad"]
    if registry.built is not None and not isinstance(old.module, str):
        built = registry.built.levels.get(old.name)
        if built is not None and built.declaration is old:
            given["module"] = built.module
    return given


def with_options(declaration: LevelDeclaration, options: Mapping[str, Any]) -> Any:
    """A level's ``optimizer=`` with options of its own in all its parameter groups.

    An instance is changed at once, and what a factory makes at each call.

    Raises:
        OptimizerError: the level has no optimizer; or, perhaps at a call, the optimizer has no
            such option or the value is not of its kind.
    """
    given = declaration.optimizer
    if given is None:
        raise OptimizerError(
            f"the level has no optimizer whose {quoted(options)} could be set.",
            remedy="give the level an optimizer=.",
            level=declaration.name,
            site=str(declaration.site),
        )
    if isinstance(given, Optimizer):
        _set(given, options, declaration)
        return given

    @functools.wraps(given)
    def make(*args: Any, **kwargs: Any) -> Any:
        optimizer = given(*args, **kwargs)
        if isinstance(optimizer, Optimizer):
            _set(optimizer, options, declaration)
        return optimizer

    return make


def _set(optimizer: Optimizer, options: Mapping[str, Any], declaration: LevelDeclaration) -> None:
    for option, value in options.items():
        for group in optimizer.param_groups:
            group[option] = _fitting(value, option, group, declaration)


def _fitting(value: Any, option: str, group: Mapping[str, Any], level: LevelDeclaration) -> Any:
    """The value as the group holds it.

    Raises:
        OptimizerError: the group has no such option, or one of another kind.
    """
    known = [name for name in group if name not in ("params", "param_names")]
    if option not in known:
        raise OptimizerError(
            f"the optimizer has no option {option!r}.",
            expected=f"options are {quoted(known)}.",
            remedy=f"correct or remove it.{did_you_mean(option, known)}",
            level=level.name,
            site=str(level.site),
        )
    present = group[option]
    if isinstance(present, tuple) and isinstance(value, list):
        value = tuple(value)
    if value is not None and present is not None and _kind(value) is not _kind(present):
        raise OptimizerError(
            f"the optimizer's {option} is set to {value!r}.",
            expected=f"a value like {present!r}.",
            remedy="set one of that kind, or leave it out.",
            level=level.name,
            site=str(level.site),
        )
    return value


def _kind(value: Any) -> type:
    if isinstance(value, Tensor | float) or (
        isinstance(value, int) and not isinstance(value, bool)
    ):
        return float
    return type(value)
