"""Inner loops taken functionally, for hypergradients that are differentiated step by step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mlodeco.calculus.copies import Copies
from mlodeco.calculus.point import Batches, Point
from mlodeco.calculus.randomness import make_seed
from mlodeco.calculus.roll import Buffers, Start, roll
from mlodeco.calculus.slots import Place
from mlodeco.calculus.stateless import frozen
from mlodeco.calculus.tape import Recording, Tape
from mlodeco.calculus.update import Iterate, Update
from mlodeco.runtime.build import Build, BuiltLevel, Methods
from mlodeco.runtime.context import Context
from mlodeco.runtime.data import items_for
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.optimizers import (
    fresh_state,
    make_optimizer,
    make_scheduler,
    read_state,
    read_step,
    warn_if_flat,
)
from mlodeco.runtime.replicas import entries_of
from mlodeco.runtime.sharding import refuse_unrolled
from mlodeco.runtime.stacking import spread
from mlodeco.tree import Tree


def recordings(built: Build, methods: Methods, top: str | None = None) -> dict[str, Recording]:
    """For each level that some method differentiates step by step, what its tape must hold.

    Args:
        built: the program.
        methods: the methods of the edges.
        top: the level whose sweep is meant; None for those of all levels.
    """
    found: dict[str, Recording] = {}
    for upper, low in unrolled_edges(built, methods, top):
        refuse_unrolled(built.levels[low], built, upper)
        recording: Recording = getattr(methods[upper, low], "recording")  # noqa: B009
        found[low] = found[low].join(recording) if low in found else recording
    return found


def unrolled_edges(built: Build, methods: Methods, top: str | None = None) -> list[tuple[str, str]]:
    """The edges (upper, lower) of a sweep, or of all, with a method that needs a tape."""
    edges = _edges(built, methods, top)
    return [edge for edge in edges if hasattr(methods[edge], "recording")]


def _edges(built: Build, methods: Methods, top: str | None) -> list[tuple[str, str]]:
    if top is None:
        return list(methods)
    # the program's own plan is kept, and this is asked for at every turn
    return list(built.plan(top, None if methods is built.methods else methods).edges)


def start_of(built: Build, name: str, buffers: Buffers) -> Start:
    """Where the next loop of a level starts: at its present iterate, or at ``init_from``."""
    level = built.levels[name]
    own = {slot.place: slot for slot in level.loss.buffers if slot.child in level.own_children}
    present = {place: buffers.get(place, slot.tensor) for place, slot in own.items()}
    if level.init_from is None:
        return Start(Iterate(frozen(level.parameters), _present_state(level)), present)
    initial = built.levels[level.init_from]
    source = dict(initial.module.named_parameters(remove_duplicate=False))
    parameters = {key: source[key].detach() for key in level.parameters}
    if level.replicas is not None:
        parameters = spread(parameters, level.replicas)
    present |= _buffers_from(level, initial)
    return Start(Iterate(parameters, _fresh_state(level)), present, level.origins)


def _buffers_from(level: BuiltLevel, initial: BuiltLevel) -> dict[Place, Tensor]:
    """The buffers of the initial level's module, at their places in the level's own."""
    source = dict(initial.module.named_buffers(remove_duplicate=False))
    return {
        (id(child), name): source[f"{prefix}.{name}" if prefix else name].detach()
        for prefix, child in level.module.named_modules(remove_duplicate=False)
        for name, buffer in child._buffers.items()
        if buffer is not None
    }


def _present_state(level: BuiltLevel) -> Mapping[str, Any]:
    if level.rule is not None:
        return level.rule_state
    return read_state(level, _optimizer(level))


def _fresh_state(level: BuiltLevel) -> Mapping[str, Any]:
    return {} if level.rule is not None else fresh_state(level, _optimizer(level))


def _optimizer(level: BuiltLevel) -> Optimizer:
    wanted_by = "a method that differentiates its steps"
    return level.optimizer or make_optimizer(level, wanted_by)


def updates_of(built: Build, name: str, count: int) -> list[Update]:
    """The level's next updates, with the options that its scheduler would give each."""
    level = built.levels[name]
    if (rule := level.rule) is not None:
        return [rule] * count
    optimizer = _optimizer(level)
    warn_if_flat(level, optimizer)
    if level.declaration.scheduler is None:
        return [read_step(level, optimizer)] * count
    ahead, stepping = _ahead(level, optimizer)
    found: list[Update] = []
    for _ in range(count):
        found.append(read_step(level, ahead))
        if stepping is not None:
            stepping.step()
    return found


def _ahead(level: BuiltLevel, optimizer: Optimizer) -> tuple[Optimizer, LRScheduler | None]:
    """A copy of the optimizer with options of its own, and its scheduler: the run's, else new."""
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    present = level.scheduler if level.optimizer else None
    ahead, stepping = copy.deepcopy((optimizer, present), {id(t): t for t in tensors})
    stepping = stepping or make_scheduler(level, ahead)
    # what the scheduler would else warn of: that nobody calls the copy's step
    vars(ahead).update(step=_never_called, _opt_called=True)
    return ahead, stepping


def _never_called() -> None:
    """Stands for the step of an optimizer that is looked at alone."""


vars(_never_called)["_wrapped_by_lr_sched"] = True


def items_of(
    level: BuiltLevel, drawn: tuple[Drawn, ...], ctx: Context, copies: Copies | None = None
) -> tuple[dict[str, Any], ...]:
    """The items of a level's function for each micro-batch of a step, and chunk of replicas."""
    found = tuple(items_for(level, one, ctx) for one in drawn)
    if copies is None:
        return found
    return tuple(entry for items in found for entry in entries_of(level, items, copies))


def require_differentiable(level: BuiltLevel, optimizer: Optimizer | None = None) -> None:
    """Refuses an optimizer whose steps cannot be differentiated, before any is taken.

    Raises:
        OptimizerError: it is one.
    """
    if level.rule is None:
        read_step(level, optimizer or _optimizer(level)).require_differentiable()


def take_loops(
    built: Build,
    loops: Mapping[str, Sequence[Batches]],
    wanted: Mapping[str, Recording],
    points: Mapping[str, Point],
) -> tuple[dict[str, Tape], Buffers]:
    """Takes the inner loops, those of lower levels first, each with the others as they are then.

    Args:
        built: the program.
        loops: for each level what its steps are computed on.
        wanted: what the tapes must hold; for a level without an entry only the end is wanted.
        points: the losses at the present parameters.

    Returns:
        The tapes with their ends, and the buffers behind the last steps.
    """
    tapes: dict[str, Tape] = {}
    buffers: dict[Place, Tensor] = {}
    ends: dict[str, Tree] = {}
    for name in (name for name in built.graph.order if name in loops):
        point, loop = points[name], loops[name]
        values = {seen: tree for seen, tree in {**point.values, **ends}.items() if seen != name}
        steps = (
            replace(
                point,
                values=values,
                batches=batches,
                seed=make_seed(point.seed, "roll", number),
                buffers=dict(buffers),
            )
            for number, batches in enumerate(loop)
        )
        updates = updates_of(built, name, len(loop))
        recording = wanted.get(name, Recording(every=None))
        start = start_of(built, name, buffers)
        moves = list(zip(steps, updates, strict=True))
        tapes[name], changed = roll(name, start, moves, recording)
        buffers.update(changed)
        end = tapes[name].end
        if end is not None:
            ends[name] = end.parameters
    return tapes, buffers
