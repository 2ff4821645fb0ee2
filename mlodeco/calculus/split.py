"""A point, an update and an iterate of stacked replicas, taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from mlodeco.calculus.copies import row, sliced
from mlodeco.calculus.optimizer_step import OptimizerStep
from mlodeco.calculus.point import Batches, Point
from mlodeco.calculus.rest import Rest
from mlodeco.calculus.rule import RuleOfEach
from mlodeco.calculus.update import Iterate, Update


def split_point(point: Point, replica: int) -> Point:
    """The ordinary point of one replica: its values, its slices of the items."""
    copies = point.copies
    if copies is None:
        return point
    size = len(copies.chunks)
    place = next(n for n, chunk in enumerate(copies.chunks) if replica in chunk)
    offset = replica - copies.chunks[place].start

    def own(batches: Batches) -> Batches:
        entries = batches[place::size]
        if not copies.is_vmapped:
            return entries
        return tuple(
            {name: sliced(value, offset) for name, value in items.items()} for items in entries
        )

    def part(fraction: float) -> Batches | None:
        found = point.part_of_batches(fraction) if point.part_of_batches else None
        return None if found is None else own(found)

    def next_update() -> tuple[Update, Mapping[str, Any]]:
        if point.next_update is None:
            raise RuntimeError("the level has no update")
        update, state = point.next_update()
        whole = Iterate(point.values[point.loss.level], state)
        return split_update(update), split_iterate(update, whole, replica).state

    return replace(
        point,
        values={
            level: row(tree, replica) if level in copies.levels else tree
            for level, tree in point.values.items()
        },
        batches=own(point.batches),
        part_of_batches=None if point.part_of_batches is None else part,
        next_update=None if point.next_update is None else next_update,
        copies=None,
        numbers=tuple(range(replica, copies.count * len(point.batches) // size, copies.count)),
    )


def split_update(update: Update) -> Update:
    """The update of one replica."""
    if isinstance(update, Rest):
        return Rest(split_update(update.update))
    if isinstance(update, OptimizerStep):
        return replace(update, replicas=None)
    return update.rule if isinstance(update, RuleOfEach) else update


def split_iterate(update: Update, iterate: Iterate, replica: int) -> Iterate:
    """Where one replica stands; counts of an optimizer are the same for all."""
    if isinstance(update, Rest):
        return split_iterate(update.update, iterate, replica)
    parameters = row(iterate.parameters, replica)
    if isinstance(update, RuleOfEach):
        return Iterate(parameters, update.state_of(iterate.state, replica))
    state = {
        key: {name: _row_of(v, iterate.parameters[key], replica) for name, v in known.items()}
        for key, known in iterate.state.items()
    }
    return Iterate(parameters, state)


def _row_of(value: Any, parameter: Tensor, replica: int) -> Any:
    is_stacked = isinstance(value, Tensor) and value.shape == parameter.shape
    return value[replica] if is_stacked else value
