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
    compute_hypergradient,
    levels_involved,
    muted_context,
    warn_of_nested_paths,
)
from mlodeco.runtime.looks import find_items
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
    items = find_batches(built, involved, given)
    result = compute_hypergradient(
        built,
        level,
        items,
        lambda name: muted_context(built, name),
        methods=methods,
        nested=nested,
        entropy=present_entropy(),
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


def find_batches(
    built: Build, involved: tuple[str, ...], given: Mapping[str, Any]
) -> dict[str, tuple[Drawn, ...]]:
    """What every level of a hypergradient is evaluated on."""
    sources = find_items(built, involved, given)
    return {name: _batches_of(built.levels[name], given, sources[name]) for name in involved}


def _batches_of(level: BuiltLevel, given: Mapping[str, Any], items: Items) -> tuple[Drawn, ...]:
    """What the level is evaluated on: batches with the items of the sources that it reads."""
    batches = _own_batches(level, given)
    return tuple(Drawn(batch, one) for batch, one in zip(batches, items, strict=True))


def _own_batches(level: BuiltLevel, given: Mapping[str, Any]) -> tuple[Any, ...]:
    """The given batch, else the last step's, else the first of a fresh iterator."""
    count = level.declaration.accumulate
    if level.name in given:
        batch = given[level.name]
        if count == 1:
            return (batch,)
        if not isinstance(batch, list) or len(batch) != count:
            raise RunError(
                f"batches[{level.name!r}] is not a list of accumulate={count} micro-batches.",
                remedy=f"pass a list of {count} batches for the level.",
                level=level.name,
                site=level.site,
            )
        return tuple(batch)
    if level.last_batches is not None:
        return tuple(drawn.batch for drawn in level.last_batches)
    return peek(level.declaration, count)
