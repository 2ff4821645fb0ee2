"""The functional entry points: for a loop of one's own, and for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlodeco.declare.records import UNSET, Unset
from mlodeco.declare.registry import Registry
from mlodeco.errors import RunError, did_you_mean, quoted
from mlodeco.runtime.build import Build, BuiltLevel, Methods, build
from mlodeco.runtime.data import peek
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import (
    Loop,
    compute_hypergradient,
    levels_involved,
    muted_context,
    warn_of_nested_paths,
)
from mlodeco.runtime.looks import find_items
from mlodeco.runtime.loops import recordings
from mlodeco.runtime.report import warn_of_trouble
from mlodeco.runtime.sources import Items
from mlodeco.tree import fill


def compute(
    level: str,
    *,
    batches: Mapping[str, Any] | None,
    program: Registry,
    hypergrad: Any | Unset,
    nested: bool,
) -> dict[str, Tensor]:
    """What the public ``hypergradient`` computes, for a given program."""
    built, methods, given = prepare(level, batches, program, hypergrad)
    top = built.levels[level]
    check_nested(nested)
    involved = levels_involved(built, level, methods, nested=nested)
    items, loops = find_batches(built, involved, given, rolled_levels(built, methods, level))
    result = compute_hypergradient(
        built,
        level,
        items,
        lambda name: muted_context(built, name),
        methods=methods,
        nested=nested,
        entropy=present_entropy(),
        loops=loops,
    )
    if not nested:
        warn_of_nested_paths(built, level, methods)
    warn_of_trouble(built, result.solves)
    filled = fill(result.gradient, {k: p.detach() for k, p in top.parameters.items()})
    # copies: autograd may give one tensor for two parameters, or an expanded one
    return {key: torch.empty_like(value).copy_(value) for key, value in filled.items()}


def present_entropy() -> str:
    """Where torch's global stream stands, so that masks change from call to call as it moves."""
    return bytes(torch.get_rng_state().tolist()).hex()


def check_nested(nested: object) -> None:
    """Refuses what is not True or False.

    Raises:
        RunError: it is not.
    """
    if not isinstance(nested, bool):
        raise RunError(
            f"nested={nested!r}.", expected="True or False.", remedy="set nested=True, or leave it."
        )


def prepare(
    level: str,
    batches: Mapping[str, Any] | None,
    program: Registry,
    hypergrad: Any | Unset,
) -> tuple[Build, Methods, dict[str, Any]]:
    """The program built, the methods of its edges, and the batches given, all checked.

    Raises:
        MlodecoError: one of them does not fit.
    """
    built = build(program)
    built.graph.known(level)
    for other in built.levels.values():
        other.follow_module()
    methods = built.methods if hypergrad is UNSET else built.methods_for(hypergrad)
    if batches is not None and not isinstance(batches, Mapping):
        raise RunError(
            f"batches= is a {type(batches).__name__}.",
            expected="a mapping from levels to batches and from sources to items.",
            remedy=f"write batches={{{level!r}: batch}}.",
        )
    given = dict(batches or {})
    for name in given:
        known = (*built.levels, *built.sources)
        if name not in known:
            raise RunError(
                f"batches= has the key {name!r}, which is no level or source.",
                expected=f"some of {quoted(known)}.",
                remedy=f"correct the key.{did_you_mean(str(name), known)}",
            )
    return built, methods, given


def rolled_levels(built: Build, methods: Methods, top: str) -> dict[str, int]:
    """The levels whose inner loops a hypergradient takes, and the steps of each."""
    wanted = recordings(built, methods, top)
    return {name: built.levels[name].declaration.inner_steps for name in wanted}


def find_batches(
    built: Build,
    involved: tuple[str, ...],
    given: Mapping[str, Any],
    steps: Mapping[str, int] | None = None,
) -> tuple[dict[str, tuple[Drawn, ...]], dict[str, Loop]]:
    """What every level of a hypergradient is evaluated on, and each rolled level's steps.

    A rolled level is evaluated on the batches of its last step.

    Args:
        built: the program.
        involved: the levels.
        given: what a person gave.
        steps: for each rolled level the steps of its loop.
    """
    steps = steps or {}
    sizes = {name: built.levels[name].declaration.accumulate for name in involved}
    counts = {name: size * steps.get(name, 1) for name, size in sizes.items()}
    sources = find_items(built, counts, given)
    found = {
        name: _batches_of(built.levels[name], given, sources[name], steps.get(name))
        for name in involved
    }
    loops: dict[str, Loop] = {}
    for name in steps:
        size = sizes[name]
        loops[name] = [found[name][i : i + size] for i in range(0, counts[name], size)]
    return {name: drawn[-sizes[name] :] for name, drawn in found.items()}, loops


def _batches_of(
    level: BuiltLevel, given: Mapping[str, Any], items: Items, steps: int | None
) -> tuple[Drawn, ...]:
    """What the level is evaluated on: batches with the items of the sources that it reads."""
    batches = _own_batches(level, given, steps)
    return tuple(Drawn(batch, one) for batch, one in zip(batches, items, strict=True))


def _own_batches(level: BuiltLevel, given: Mapping[str, Any], steps: int | None) -> tuple[Any, ...]:
    """The given batches, else those of the last steps, else the first of a fresh iterator.

    Args:
        level: the level.
        given: what a person gave, for each step of a rolled level.
        steps: of the inner loop, where it is rolled.
    """
    size = level.declaration.accumulate
    if level.name in given:
        batch = given[level.name]
        if steps is None:
            return _micro_batches(level, batch)
        what = f"{steps} batches, one a step (its inner_steps, or steps=)"
        _require_list(level, batch, steps, what)
        return tuple(micro for one in batch for micro in _micro_batches(level, one))
    count = size * (steps or 1)
    last = level.last_micro_batches(count)
    return tuple(one.batch for one in last) if last else peek(level.declaration, count)


def _micro_batches(level: BuiltLevel, batch: Any) -> tuple[Any, ...]:
    """The micro-batches of one step."""
    count = level.declaration.accumulate
    if count == 1:
        return (batch,)
    _require_list(level, batch, count, f"accumulate={count} micro-batches")
    return tuple(batch)


def _require_list(level: BuiltLevel, batch: Any, count: int, what: str) -> None:
    if not isinstance(batch, list) or len(batch) != count:
        found = f"of length {len(batch)}" if isinstance(batch, list) else type(batch).__name__
        raise RunError(
            f"batches[{level.name!r}] is not a list of {what}: it is {found}.",
            remedy=f"pass a list of {count} batches for the level.",
            level=level.name,
            site=level.site,
        )
