"""Replicated levels in a program: stacked parameters, slices of items, and the way of calls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, optim

from mlodeco.calculus.copies import Copies, map_tensors, sliced
from mlodeco.calculus.point import Point
from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.calculus.rule import RuleOfEach
from mlodeco.declare.replicas import Replicas
from mlodeco.errors import DataError, FallbackWarning, MethodError, OptimizerError
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.drawn import Drawn

_NOT_ENTRYWISE = tuple(
    getattr(optim, name) for name in ("Adafactor", "Muon") if hasattr(optim, name)
)


def place(level: BuiltLevel, device: torch.device) -> None:
    """Moves a level to a device; its module goes on showing its first replica."""
    level.module.to(device)
    if level.is_replicated:
        for parameter in level.parameters.values():
            parameter.data = parameter.data.to(device)
        level.follow_module()
        level.tie()


def copies_of(built: Build, level: BuiltLevel) -> Copies | None:
    """The replicas that a level's loss sees, its own or those of levels that it reads."""
    if not level.copied:
        return None
    spec = _spec(built, level)
    tensors = built.levels[next(iter(level.copied))].parameters.values()
    is_wanted = spec.way == "vmap" or (spec.way == "auto" and prefers_vmap(next(iter(tensors))))
    if not is_wanted or level.is_looped:
        return Copies(spec.count, level.copied)
    return Copies(spec.count, level.copied, min(spec.chunk or spec.count, spec.count), True)


def prefers_vmap(tensor: Tensor) -> bool:
    """Whether all replicas at once are faster: small calls leave a GPU idle."""
    return tensor.is_cuda


def _spec(built: Build, level: BuiltLevel) -> Replicas:
    found = (built.levels[name].declaration.replicas for name in sorted(level.copied))
    return next(spec for spec in found if spec is not None)


def entries_of(level: BuiltLevel, items: Mapping[str, Any], copies: Copies) -> list[dict[str, Any]]:
    """The items of one micro-batch, for each chunk of replicas.

    Raises:
        DataError: a tensor has not one slice for each replica.
    """
    for name, value in items.items():
        _check_leading(level, name, value, copies)
    return copies.entries(items)


def _check_leading(level: BuiltLevel, name: str, value: Any, copies: Copies) -> None:
    def check(tensor: Tensor) -> Tensor:
        if len(tensor) != copies.count:
            levels = " and ".join(map(repr, sorted(copies.levels)))
            raise DataError(
                f"{name!r} has a tensor of shape {tuple(tensor.shape)}.",
                expected=f"first dimension {copies.count}: one slice for each replica of {levels}.",
                remedy=f"stack the items of {copies.count} tasks: torch.stack(items); a number for "
                "all of them may have no dimensions.",
                level=level.name,
                site=level.site,
            )
        return tensor

    map_tensors(value, check)


def part_of_each(
    drawn: Drawn,
    fraction: float,
    keys: tuple[str, ...],
    copies: Copies,
    items_for: Callable[[Drawn], dict[str, Any]],
) -> list[dict[str, Any]] | None:
    """The first samples of each replica's batch; None if they have none."""
    rows = [
        Drawn(sliced(drawn.batch, r), sliced(dict(drawn.sources), r)) for r in range(copies.count)
    ]
    parts = [part for row in rows if (part := row.part(fraction, keys)) is not None]
    if len(parts) < len(rows):
        return None
    items = [items_for(part) for part in parts]
    if not copies.is_vmapped:
        return items
    return [_restacked([items[r] for r in chunk]) for chunk in copies.chunks]


def _restacked(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items of several replicas as one; what is no tensor is that of the first."""
    leaves: list[list[Tensor]] = [[] for _ in items]
    for one, found in zip(items, leaves, strict=True):
        map_tensors(one, found.append)
    together = iter([torch.stack(column) for column in zip(*leaves, strict=True)])
    result: dict[str, Any] = map_tensors(items[0], lambda _: next(together))
    return result


def settle_way(built: Build, level: BuiltLevel, make: Callable[[Copies], Point]) -> None:
    """Finds out once whether a level's loss can be vmapped, where that is wanted.

    Raises:
        MethodError: it cannot, and ``way="vmap"`` asks for it.
    """
    copies = copies_of(built, level)
    if copies is None or level.is_settled:
        return
    if copies.is_vmapped:
        error = _error_of(make(copies))
        if error is not None:
            level.is_looped = True
            alone = _error_of(make(Copies(copies.count, copies.levels)))
            level.is_looped = False
            if alone is not None:
                raise alone  # the function itself is at fault
            _fall_back(built, level, error)
    level.is_settled = True


def _error_of(point: Point) -> Exception | None:
    def evaluate() -> None:
        next(point.losses())

    try:
        with preserved_randomness():
            point.loss.within(point.state(point.values), evaluate)
    except Exception as error:
        return error
    return None


def _fall_back(built: Build, level: BuiltLevel, error: Exception) -> None:
    why = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    remedy = (
        "set replicas=Replicas(..., way='loop'), or change the operation; BatchNorm needs "
        "track_running_stats=False"
    )
    if _spec(built, level).way == "vmap":
        raise MethodError(
            f"the loss cannot be vmapped over replicas: {why}",
            expected="operations that torch.vmap can batch: no .item(), no branches on the values "
            "of tensors, no RNNs, no BatchNorm that tracks statistics.",
            remedy=f"{remedy}.",
            level=level.name,
            site=level.site,
        ) from error
    level.is_looped = True
    warnings.warn(
        f"level {level.name!r} ({level.site}): the loss cannot be vmapped over replicas ({why}); "
        f"one is evaluated after another instead. Remedy: {remedy}.",
        FallbackWarning,
        stacklevel=3,
    )


@contextmanager
def shown_stacked(level: BuiltLevel) -> Iterator[None]:
    """Puts the stacked parameters into the module, for what looks for them there."""
    stacked = {id(level.template[key]): p for key, p in level.parameters.items()}
    places = [
        (child._parameters, name, parameter)
        for child in level.module.modules()
        for name, parameter in child._parameters.items()
        if id(parameter) in stacked
    ]
    try:
        for holder, name, parameter in places:
            holder[name] = stacked[id(parameter)]
        yield
    finally:
        for holder, name, parameter in places:
            holder[name] = parameter


def check_entrywise(level: BuiltLevel, optimizer: optim.Optimizer) -> None:
    """Refuses optimizers that would mix replicas.

    Raises:
        OptimizerError: it is one.
    """
    if level.is_replicated and isinstance(optimizer, _NOT_ENTRYWISE):
        raise OptimizerError(
            f"{type(optimizer).__name__} on replicas: its step of an entry depends on others, and "
            "the replicas are stacked.",
            expected="an optimizer that steps each entry by itself, such as SGD or Adam.",
            remedy="use one of these, or an @update rule, which is called for each replica.",
            level=level.name,
            site=level.site,
        )


def single(built: Build, name: str) -> Build:
    """The program with one copy of a level, its first, for looks at one task."""
    level = built.levels[name]
    if not level.copied:
        return built
    alone = replace(
        level,
        parameters=level.template,
        copied=frozenset(),
        optimizer=None,
        scheduler=None,
        rule=level.rule.rule if isinstance(level.rule, RuleOfEach) else level.rule,
        rule_state={},
    )
    return replace(built, levels={**built.levels, name: alone})
