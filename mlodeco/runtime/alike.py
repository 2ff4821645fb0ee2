"""What is the same in all processes of a run: made so at its start, and looked at later."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from mlodeco.errors import DriftWarning, quoted
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.processes import Processes, require_same
from mlodeco.runtime.sharding import plain_part
from mlodeco.tree import is_shard


def start_alike(built: Build, to_shard: Iterable[BuiltLevel], processes: Processes) -> None:
    """Gives all processes the parameters and buffers of the main one, but not its shards.

    Those of levels that will be sharded one after another: a device may not hold them all.
    """
    if processes.count == 1:
        return
    found: list[tuple[str, torch.Tensor]] = []
    for name, level in built.levels.items():
        module = level.module
        tensors = (*level.parameters.items(), *module.named_parameters())
        found += [(f"{name}: {key}", t) for key, t in (*tensors, *module.named_buffers())]
    shapes = [[name, list(t.shape), str(t.dtype)] for name, t in found]
    require_same(processes, "the names and shapes of parameters and buffers", shapes)
    modules = [level.module for level in to_shard]
    alone = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}
    rest = [t for _, t in found if not is_shard(t) and id(t) not in alone]
    for part in (rest, *([t] for t in alone.values())):
        processes.copy_from_main(part)


def compare_notes(built: Build, processes: Processes) -> None:
    """Gives all processes the buffers of the main one, which each process's own data moved.

    Warns of parameters that are no longer the same.
    """
    if processes.count == 1:
        return
    levels = built.levels
    modules = (level.module for level in levels.values())
    processes.copy_from_main([b for module in modules for b in module.buffers()])
    # a shard is in one process alone
    tensors = {name: plain_part(lv.parameters).values() for name, lv in levels.items()}
    sums = {name: [float(t.detach().sum()).hex() for t in ts] for name, ts in tensors.items()}
    found = processes.exchange(sums)
    drifted = [name for name in levels if any(one[name] != found[0][name] for one in found)]
    if drifted:
        warnings.warn(
            f"the parameters of {quoted(drifted)} are not the same in all processes. Remedy: "
            "let hooks and update rules change parameters alike in each; for random numbers "
            "give them a generator of their own, seeded alike.",
            DriftWarning,
            stacklevel=3,
        )
