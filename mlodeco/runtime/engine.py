"""One hypergradient of a built program: points made from batches, then the pure sweep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mlodeco.calculus.copies import Copies
from mlodeco.calculus.mean import Mean
from mlodeco.calculus.nested import differentiate_nested
from mlodeco.calculus.point import Point
from mlodeco.calculus.probe import find_dependence
from mlodeco.calculus.products import Compiler
from mlodeco.calculus.randomness import make_seed, preserved_randomness, randomness_set_aside
from mlodeco.calculus.response import Method
from mlodeco.calculus.roll import Buffers
from mlodeco.calculus.sweep import Hypergradient, Memories, sweep
from mlodeco.calculus.tape import Tape
from mlodeco.errors import BindingError, GraphError, GraphWarning, LossError, MethodError, quoted
from mlodeco.graph import NestPlan
from mlodeco.runtime.build import Build, BuiltLevel, Methods
from mlodeco.runtime.context import Context
from mlodeco.runtime.data import items_for
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.fsdp import shard_like, whole_tree
from mlodeco.runtime.in_place import beside_shards, must_gather
from mlodeco.runtime.loops import items_of, recordings, require_differentiable, take_loops
from mlodeco.runtime.modules import device_of
from mlodeco.runtime.optimizers import next_update
from mlodeco.runtime.replicas import copies_of, part_of_each, settle_way
from mlodeco.runtime.scaling import at_some_scale, scale_for
from mlodeco.tree import Tree

Batches = Mapping[str, tuple[Drawn, ...]]
"""For each level its micro-batches."""

Loop = Sequence[tuple[Drawn, ...]]
"""For each step of an inner loop its micro-batches."""

ContextMaker = Callable[[str], Context]


def compute_hypergradient(
    built: Build,
    top: str,
    batches: Batches,
    make_context: ContextMaker,
    *,
    rank: int = 0,
    methods: Methods | None = None,
    memories: Memories | None = None,
    nested: bool = False,
    entropy: str = "",
    tapes: Mapping[str, Tape] | None = None,
    loops: Mapping[str, Loop] | None = None,
    mean: Mean | None = None,
    compilers: Mapping[str, Compiler] | None = None,
    scale: float | None = None,
) -> Hypergradient:
    """The hypergradient of ``top`` at the current parameters; changes nothing.

    Sharded levels are gathered for its duration, unless all methods of the sweep can do with
    FSDP's own passes; all processes must ask for it then.

    Parameters, buffers, ``.grad``, train/eval modes, loaders and the global random streams are
    as before. Tensors, generators and modules that a loss captures by a closure and that belong
    to no level are outside this promise: take random numbers from ``ctx.generator``, and make
    such modules part of a level's module.

    Args:
        built: the program.
        top: the level whose hypergradient is wanted.
        batches: micro-batches for ``top`` and every level that its sweep visits.
        make_context: a muted context for a level.
        rank: the process, for its random numbers.
        methods: methods in place of the program's own.
        memories: what the methods kept at the last hypergradient of this level.
        nested: the true derivative through nested best responses in place of Eq. (2).
        entropy: makes the random numbers of the passes others than those of the same tick.
        tapes: the steps of the levels that a method differentiates step by step.
        loops: in their place, inner loops to take functionally first: for each level the
            micro-batches of its steps. The levels are then seen at the ends.
        mean: over processes, to which the hypergradient of their mean losses is common.
        compilers: of the levels whose products are compiled.
        scale: of the losses in float16; None looks for the first at which nothing overflows.
    """
    chosen = built.methods if methods is None else methods
    visited = levels_involved(built, top, methods, nested=nested)
    involved = tuple(dict.fromkeys((*visited, *(loops or ()))))
    if nested:
        _refuse_copies(built, involved)
        _refuse_half(built, involved)
        _refuse_steps_in(built, built.nest(top, methods))
    seen = dict.fromkeys(name for lv in involved for name in built.levels[lv].seen)
    used = [None] if nested else _methods_of(built, top, methods)
    sharded = [built.levels[name] for name in seen if built.levels[name].is_sharded]
    whole = must_gather(sharded, used)
    with randomness_set_aside(), torch.enable_grad(), built.opened(seen, whole=whole) as values:
        contexts = {name: make_context(name) for name in involved}
        draw = (rank, top, contexts[top].step, entropy)
        points = {
            name: make_point(built, name, batches[name], contexts[name], values, draw)
            for name in involved
        }
        for name in involved:
            probe(built, built.levels[name], points[name], nested=nested)
        if mean is not None and sharded and not whole:
            mean = beside_shards(mean)
        known = compilers or {}
        open_edges = {edge: method for edge, method in chosen.items() if method is not None}

        def find(scale: float) -> Hypergradient:
            scaled = {
                name: replace(
                    point,
                    mean=mean,
                    scale=scale_for(built.levels[name], scale),
                    compiler=known.get(name),
                )
                for name, point in points.items()
            }
            made = tapes
            if loops:
                made, scaled = _roll(built, top, chosen, scaled, loops, contexts)
            if nested:
                found = differentiate_nested(built.nest(top, methods), scaled, open_edges)
            else:
                kept = _gathered(memories or {}) if whole else memories
                found = sweep(built.plan(top, methods), scaled, open_edges, kept, made)
            return _in_parts(built, found) if whole else found

        if scale is not None:
            return find(scale)
        return at_some_scale(find, is_scaled=any(p.loss.is_half for p in points.values()))


def _roll(
    built: Build,
    top: str,
    methods: Methods,
    points: dict[str, Point],
    loops: Mapping[str, Loop],
    contexts: Mapping[str, Context],
) -> tuple[Mapping[str, Tape], dict[str, Point]]:
    """Takes the inner loops; their tapes, and the points with their levels at the ends."""
    wanted = recordings(built, methods, top)
    for name in wanted:
        require_differentiable(built.levels[name])
    items = {
        name: [
            items_of(built.levels[name], drawn, contexts[name], points[name].copies)
            for drawn in loop
        ]
        for name, loop in loops.items()
    }
    tapes, buffers = take_loops(built, items, wanted, points)
    return tapes, {name: _moved(point, tapes, buffers) for name, point in points.items()}


def _methods_of(built: Build, top: str, methods: Methods | None) -> list[Method | None]:
    """Those of the edges of a sweep."""
    chosen = built.methods if methods is None else methods
    return [chosen[edge] for edge in built.plan(top, methods).edges]


def _gathered(memories: Memories) -> Memories:
    return {
        key: {what: whole_tree(tree) for what, tree in memory.items()}
        for key, memory in memories.items()
    }


def _in_parts(built: Build, found: Hypergradient) -> Hypergradient:
    """What solvers found and methods keep of sharded levels, each process its part."""

    def part(level: str, tree: Tree) -> Tree:
        return shard_like(tree, built.levels[level].parameters)

    solves = [
        replace(s, solution=replace(s.solution, value=part(s.level, s.solution.value)))
        for s in found.solves
    ]
    memories = {
        (level, number): {what: part(level, tree) for what, tree in memory.items()}
        for (level, number), memory in found.memories.items()
    }
    return replace(found, solves=tuple(solves), memories=memories)


def _refuse_copies(built: Build, involved: tuple[str, ...]) -> None:
    """Refuses replicas under nested best responses.

    Raises:
        GraphError: there are some.
    """
    for name in involved:
        level = built.levels[name]
        if level.is_replicated:
            raise GraphError(
                "replicas= and nested=True.",
                expected="one of them: nested best responses are taken for one copy of a level.",
                remedy="leave nested out.",
                level=name,
                site=level.site,
            )


def _refuse_half(built: Build, involved: tuple[str, ...]) -> None:
    """Refuses float16 under nested best responses.

    Raises:
        MethodError: a level is in it.
    """
    for name in involved:
        if built.levels[name].loss.is_half:
            raise MethodError(
                "the level runs in fp16, and nested=True: its products are taken inside one graph "
                "of all levels, where none of them can be brought into the range of float16.",
                expected="bf16, whose range is that of float32, or fp32.",
                remedy="set precision='bf16' for the level, or leave nested out.",
                level=name,
                site=built.levels[name].site,
            )


def _refuse_steps_in(built: Build, plan: NestPlan) -> None:
    """Refuses levels on which another acts through their steps: a nest solves, and takes none.

    Raises:
        MethodError: there is one.
    """
    for name in plan.levels:
        level = built.levels[name]
        for read in level.step_reads:
            if read in plan.inputs[name] and read not in level.loss.sees:
                raise MethodError(
                    f"nested=True differentiates what the loss of this level is stationary in, "
                    f"and {read!r} acts on it through its steps alone (init_from=, tune= or an "
                    "@update rule).",
                    expected=f"a loss that reads {read!r}.",
                    remedy=f"leave nested out and set hypergrad='unroll' at {plan.top!r}.",
                    level=name,
                    site=level.site,
                )


def _moved(point: Point, tapes: Mapping[str, Tape], buffers: Buffers) -> Point:
    """The point with the levels that took a loop at its end."""
    ends = {name: tape.end.parameters for name, tape in tapes.items() if tape.end is not None}
    values = {name: ends.get(name, tree) for name, tree in point.values.items()}
    return replace(point, values=values, buffers={**point.buffers, **buffers})


def levels_involved(
    built: Build, top: str, methods: Methods | None, *, nested: bool
) -> tuple[str, ...]:
    """The levels whose losses a hypergradient needs, its own first."""
    if nested:
        return built.nest(top, methods).levels
    return (top, *(visit.level for visit in built.plan(top, methods).visits))


def probe_level(built: Build, name: str, batch: Drawn, ctx: Context, rank: int) -> None:
    """Looks at a level's loss before its first ordinary step."""
    level = built.levels[name]
    if level.is_probed:
        return
    whole = must_gather([built.levels[n] for n in level.seen if built.levels[n].is_sharded])
    opened = built.opened(level.seen, whole=whole)
    with preserved_randomness(), torch.enable_grad(), opened as values:
        point = make_point(built, name, (batch,), ctx, values, (rank, name, ctx.step, ""))
        probe(built, level, point)


def probe(built: Build, level: BuiltLevel, point: Point, *, nested: bool = False) -> None:
    """Checks once what a level's loss depends on.

    Args:
        built: the program.
        level: the level to look at.
        point: where to evaluate it.
        nested: whether levels may act by nested best responses.

    Raises:
        BindingError: it depends on a level that it does not declare, or on captured tensors.
        LossError: it depends on none of its parameters, directly or through lower levels.
    """
    if level.is_probed:
        return
    real = {name: tuple(other.template.values()) for name, other in built.levels.items()}
    found = find_dependence(point, real)
    if found.undeclared:
        names = sorted(found.undeclared)
        raise BindingError(
            f"the loss depends on the parameters of {quoted(names)}, which it does not declare.",
            expected="every level that a loss sees among its arguments or in reads=.",
            remedy=f"add reads={names} to @level, or use .detach() on what comes from there.",
            level=level.name,
            site=level.site,
        )
    if found.captured:
        raise BindingError(
            f"the loss reaches parameters of {quoted(sorted(found.captured))} by tensors taken "
            "outside the function, so that their part of the derivative would be lost.",
            remedy="use model.parameters() inside the function, not tensors taken outside it.",
            level=level.name,
            site=level.site,
        )
    lowers = built.graph.best_responses(level.name)
    if level.name not in found.declared and not found.declared.intersection(lowers):
        raise LossError(
            "the loss depends on none of the level's parameters, directly or through lower levels.",
            expected=f"a loss computed from {quoted(level.parameters)}"
            + (f" or from {quoted(lowers)}." if lowers else "."),
            remedy="use the level's module in the function, and neither .detach(), .item() nor "
            "torch.no_grad() on the way to the loss.",
            level=level.name,
            site=level.site,
        )
    _warn_of_idle_reads(built, level, found.declared, nested=nested)
    level.decisions.touched = found.touched
    level.is_probed = True


def _warn_of_idle_reads(
    built: Build, level: BuiltLevel, declared: frozenset[str], *, nested: bool
) -> None:
    """Warns of reads on some hypergradient's path that carry nothing."""
    for name in built.reads_on_paths(level.name):
        if name in declared or name in level.step_reads:
            continue
        through = [low for low in built.responds_below(level.name, name) if low in declared]
        if through and nested:
            continue
        more = f", or set nested=True, if it acts through {quoted(through)}" if through else ""
        warnings.warn(
            f"level {level.name!r} ({level.site}): {level.name!r} reads {name!r} but its loss "
            f"does not depend on it, so that the path carries nothing. Remedy: use "
            f"{name!r} in the function, without .detach(), or take it out of the "
            f"arguments{more}.",
            GraphWarning,
            stacklevel=3,
        )


def warn_of_nested_paths(built: Build, top: str, methods: Methods | None = None) -> None:
    """Warns where Eq. (2) has no path, and the responses of levels between are all there is."""
    if built.needs_nesting(top, methods):
        level = built.levels[top]
        warnings.warn(
            f"level {top!r} ({level.site}) acts on the levels that it reads by way of others that "
            "it does not read, and by Eq. (2) its hypergradient is the direct gradient. Remedy: "
            "set nested=True, or hypergrad=None.",
            GraphWarning,
            stacklevel=3,
        )


def seed_of(built: Build, name: str, draw: tuple[int, str, int, str]) -> int:
    """The seed of a level's passes in one hypergradient.

    Args:
        built: the program.
        name: the level whose loss is passed through.
        draw: the process, the level whose hypergradient it is, its steps, and what else makes
            the random numbers others.
    """
    return make_seed(built.run_seed, built.tick, name, *draw)


def make_point(
    built: Build,
    name: str,
    batches: tuple[Drawn, ...],
    ctx: Context,
    values: Mapping[str, Any],
    draw: tuple[int, str, int, str],
) -> Point:
    """The loss of a level on the batches given, at the values given.

    Args:
        built: the program.
        name: the level.
        batches: its micro-batches.
        ctx: what its function is given.
        values: the parameters of the levels that it sees.
        draw: what its random numbers depend on beside run, tick and level.
    """
    level = built.levels[name]

    def make(ctx: Context, copies: Copies | None) -> Point:
        return Point(
            loss=level.loss,
            values={seen: values[seen] for seen in level.seen},
            batches=items_of(level, batches, ctx, copies),
            part_of_batches=partial(_part_of_batches, level, batches, ctx, copies),
            seed=seed_of(built, name, draw),
            generators=(ctx.generator,),
            decisions=level.decisions,
            next_update=partial(next_update, level),
            copies=copies,
        )

    if level.copied and not level.is_settled:
        # not mute: what a function tells ctx may not be batched either
        settle_way(built, level, partial(make, ctx.with_own_generator()))
    return make(ctx, copies_of(built, level))


def step_point(
    built: Build, name: str, batches: tuple[Drawn, ...], ctx: Context, seed: int, scale: float
) -> Point:
    """Where an ordinary step of a level that sees replicas takes its gradient."""
    values = built.values(built.levels[name].seen)
    point = make_point(built, name, batches, ctx, values, (0, name, 0, ""))
    return replace(point, seed=seed, scale=scale)


def _part_of_batches(
    level: BuiltLevel,
    batches: tuple[Drawn, ...],
    ctx: Context,
    copies: Copies | None,
    fraction: float,
) -> tuple[dict[str, Any], ...] | None:
    keys = level.declaration.data_keys
    if copies is not None:
        found = [
            part_of_each(one, fraction, keys, copies, lambda row: items_for(level, row, ctx))
            for one in batches
        ]
        entries = [part for part in found if part is not None]
        return None if len(entries) < len(found) else tuple(e for part in entries for e in part)
    parts = [part for batch in batches if (part := batch.part(fraction, keys)) is not None]
    if len(parts) < len(batches):
        return None
    return items_of(level, tuple(parts), ctx)


def muted_context(built: Build, name: str, **known: Any) -> Context:
    """A context for second-order passes."""
    first = next(iter(built.levels[name].parameters.values()), None)
    device = device_of(built.levels[name].module) if first is None else first.device
    return Context(level=name, tick=built.tick, device=device, muted=True, **known)
