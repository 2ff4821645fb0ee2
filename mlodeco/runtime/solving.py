"""A level solved on given batches, with nothing changed: how a meta-learnt start is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mlodeco.calculus.finite import require_finite_tree
from mlodeco.calculus.randomness import randomness_set_aside
from mlodeco.calculus.roll import Buffers
from mlodeco.calculus.tape import Recording, Tape
from mlodeco.declare.checks import as_integer
from mlodeco.declare.records import UNSET
from mlodeco.declare.registry import Registry
from mlodeco.errors import RunError, quoted
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.engine import make_point, muted_context, probe
from mlodeco.runtime.functional import find_batches, prepare, present_entropy
from mlodeco.runtime.loops import items_of, take_loops
from mlodeco.runtime.modules import copy_into
from mlodeco.runtime.replicas import single
from mlodeco.runtime.scaling import at_some_scale


def solve(
    level: str, *, batches: Mapping[str, Any] | None, steps: int, program: Registry
) -> nn.Module:
    """What the public ``solve`` returns, for a given program.

    Raises:
        RunError: ``steps`` is no positive integer.
    """
    count = as_integer(steps)
    if count is None or count < 1:
        raise RunError(
            f"steps={steps!r}.",
            expected="a positive integer, the optimizer steps to take.",
            remedy="write solve(level, batches=..., steps=5).",
        )
    built, _, given = prepare(level, batches, program, UNSET)
    built = single(built, level)
    solved = built.levels[level]
    _refuse_shards(built, solved)
    _, loops = find_batches(built, (level,), given, {level: count})
    with randomness_set_aside(), torch.enable_grad():
        ctx = muted_context(built, level)
        loop = [items_of(solved, drawn, ctx) for drawn in loops[level]]
        values = built.values(solved.seen)
        draw = (0, level, ctx.step, present_entropy())
        point = make_point(built, level, loops[level][-1], ctx, values, draw)
        probe(built, solved, point)

        def take(scale: float) -> tuple[Mapping[str, Tape], Buffers]:
            scaled = replace(point, scale=scale)
            wanted = {level: Recording(every=None)}
            found = take_loops(built, {level: loop}, wanted, {level: scaled})
            end = found[0][level].end
            if point.loss.is_half and end is not None:
                require_finite_tree(end.parameters, point, "the end of the loop")
            return found

        tapes, buffers = at_some_scale(take, is_scaled=point.loss.is_half)
    initial = built.levels[solved.init_from].module if solved.init_from else None
    return _module_at(solved, tapes[level], buffers, initial)


def _refuse_shards(built: Build, level: BuiltLevel) -> None:
    names = dict.fromkeys((level.name, *level.seen))
    held = [name for name in names if built.levels[name].is_sharded]
    if held:
        raise RunError(
            f"solve takes the steps on whole parameters, and the module of {quoted(held)} is "
            "sharded.",
            expected="modules that every process holds whole.",
            remedy="solve with a program whose modules are not sharded.",
            level=level.name,
            site=level.site,
        )


def _module_at(
    level: BuiltLevel,
    tape: Tape,
    buffers: Mapping[tuple[int, str], Tensor],
    initial: nn.Module | None,
) -> nn.Module:
    """A copy of the level's module with the parameters and buffers behind a loop."""
    made: nn.Module = copy.deepcopy(level.module)
    if initial is not None:
        copy_into(made, initial)
    named = dict(made.named_parameters(remove_duplicate=False))
    pairs = zip(level.module.modules(), made.modules(), strict=True)
    twins = {id(child): twin for child, twin in pairs}
    with torch.no_grad():
        for key, value in (tape.end.parameters if tape.end else {}).items():
            named[key].copy_(value)
        for (child, name), value in buffers.items():
            buffer = twins[child]._buffers[name] if child in twins else None
            if buffer is not None:
                buffer.copy_(value)
    return made
