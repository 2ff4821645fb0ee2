"""Options of a level set anew after its declaration, by a command line for instance."""

from __future__ import annotations

import functools
import inspect
import math
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
            such option, the value is not of its kind, or its class refuses it.
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
    """Changes all groups, or none where the values cannot be right.

    Raises:
        OptimizerError: they cannot.
    """
    changes = [
        {option: _fitting(value, option, group, declaration) for option, value in options.items()}
        for group in optimizer.param_groups
    ]
    for group, changed in zip(optimizer.param_groups, changes, strict=True):
        _check_group(optimizer, group, changed, declaration)
    for group, changed in zip(optimizer.param_groups, changes, strict=True):
        group.update(changed)


def _check_group(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    changed: Mapping[str, Any],
    declaration: LevelDeclaration,
) -> None:
    """Has the optimizer's own class look at the options of a group.

    Raises:
        OptimizerError: it takes the group as it is, and not as changed.
    """
    if _refusal(type(optimizer), group) is not None:  # a class that is made in another way
        return
    refusal = _refusal(type(optimizer), {**group, **changed})
    if refusal is not None:
        given = ", ".join(f"{option}={value!r}" for option, value in changed.items())
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot take {given}: {refusal}.",
            remedy=f"correct {quoted(changed)}, or leave out what was set.",
            level=declaration.name,
            site=str(declaration.site),
        ) from refusal


def _refusal(kind: Any, group: Mapping[str, Any]) -> Exception | None:
    """What a class of optimizers says against the options of a group that it knows."""
    known = inspect.signature(kind).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    options = {k: v for k, v in group.items() if (is_open or k in known) and k != "params"}
    empty = [parameter.new_empty([0] * parameter.dim()) for parameter in group["params"]]
    try:
        kind(empty, **options)
    except Exception as error:  # a class of a user's own may raise any
        return error
    return None


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
    # torch looks neither at the kind of a flag nor for infinity
    like = True if present is None and option in _FLAGS else present
    is_other = value is not None and like is not None and _kind(value) is not _kind(like)
    if is_other or (isinstance(value, float) and not math.isfinite(value)):
        raise OptimizerError(
            f"the optimizer's {option} is set to {value!r}.",
            expected=f"a value like {like!r}.",
            remedy="set one of that kind, or leave it out.",
            level=level.name,
            site=str(level.site),
        )
    return value


_FLAGS = ("foreach", "fused")
"""Options of torch's optimizers that are None until somebody chooses."""


def _kind(value: Any) -> type:
    if isinstance(value, Tensor | float) or (
        isinstance(value, int) and not isinstance(value, bool)
    ):
        return float
    return type(value)
