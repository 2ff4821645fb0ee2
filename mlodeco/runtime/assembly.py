"""A program put together for a run: built the same in all processes, with all that steps it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from mlodeco.calculus.mean import Mean
from mlodeco.calculus.products import Compiler
from mlodeco.declare.registry import Registry
from mlodeco.graph import Schedule, Timing
from mlodeco.runtime.alike import start_alike
from mlodeco.runtime.build import Build, build
from mlodeco.runtime.data import Placer
from mlodeco.runtime.engine import levels_involved, refuse_half
from mlodeco.runtime.hooks import Hooks
from mlodeco.runtime.loops import recordings, require_differentiable
from mlodeco.runtime.nonfinite import Watch
from mlodeco.runtime.optimizers import make_optimizer, warn_if_flat
from mlodeco.runtime.overlap import passes_of
from mlodeco.runtime.precision import dtype_of, set_precision
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.recorder import Recorder, Values
from mlodeco.runtime.replicas import place as place_level
from mlodeco.runtime.scaling import make_scale
from mlodeco.runtime.sharding import levels_to_shard, shard_level
from mlodeco.runtime.shares import drawn_alike, share
from mlodeco.runtime.sources import Sources
from mlodeco.runtime.trainer import Trainer
from mlodeco.runtime.validation import Validation


@dataclass(frozen=True)
class Options:
    """How a program is stepped, as :class:`mlodeco.Runner` was asked for it.

    Attributes:
        nested: whether hypergradients are the true derivatives through nested best responses.
        reduce: ``"exact"`` or ``"once"``: what is averaged over processes.
        tails: ``"drop"`` or ``"pad"``: what becomes of the end of a pass over the data.
        nonfinite: what becomes of a step whose numbers are not finite.
        backend: what compiles the exact products; None for nothing.
        precision: that of the levels without one of their own.
    """

    nested: bool
    reduce: str
    tails: str
    nonfinite: str
    backend: str | None
    precision: str

    def mean_of(self, processes: Processes) -> Mean | None:
        """That of the products in a hypergradient."""
        return processes.mean if self.reduce == "exact" else None


@dataclass(frozen=True)
class Parts:
    """What steps a program: what a run consists of, beside its history and its files.

    ``recorders`` are those of the levels that some method differentiates through; ``compilers``
    are empty where nothing is compiled; ``generators`` are the levels' own random numbers.
    """

    built: Build
    trainers: Mapping[str, Trainer]
    recorders: Mapping[str, Recorder]
    compilers: Mapping[str, Compiler]
    sources: Sources
    hooks: Hooks
    validations: list[Validation]
    schedule: Schedule
    generators: Mapping[str, torch.Generator]


def assemble(
    registry: Registry, options: Options, accelerator: Accelerator, processes: Processes
) -> Parts:
    """Builds a program and everything that steps it.

    Raises:
        MlodecoError: the program cannot be run.
    """
    built = _build_alike(registry, accelerator, processes)
    place = _Placer(accelerator.device)
    hooks = Hooks(registry, built)
    dtype = dtype_of(options.precision)
    validations = [Validation(d, built, place, processes, dtype) for d in registry.validations]
    trainers = _make_trainers(built, options, accelerator, processes, place)
    sources = Sources(built, place)
    compilers = {n: Compiler(options.backend) for n in built.levels if options.backend}
    return Parts(
        built=built,
        trainers=trainers,
        recorders=_make_recorders(built, trainers, hooks, compilers, options.mean_of(processes)),
        compilers=compilers,
        sources=sources,
        hooks=hooks,
        validations=validations,
        schedule=Schedule(built.graph, _timings(built)),
        generators={name: torch.Generator(device=accelerator.device) for name in trainers},
    )


def _build_alike(registry: Registry, accelerator: Accelerator, processes: Processes) -> Build:
    """Builds the program, the same in all processes, placed and sharded."""
    # a module that is sharded as it is made keeps of each process's numbers a part
    with drawn_alike(processes) if processes.count > 1 else nullcontext():
        built = build(registry)
    to_shard = levels_to_shard(built, accelerator)
    for level in built.levels.values():
        if all(level.module is not other.module for other in to_shard):
            place_level(level, accelerator.device)
    start_alike(built, to_shard, processes)
    for level in to_shard:
        shard_level(level, make_optimizer(level), accelerator)
    return build(registry) if to_shard else built


def _make_trainers(
    built: Build,
    options: Options,
    accelerator: Accelerator,
    processes: Processes,
    place: Placer,
) -> dict[str, Trainer]:
    """The state of each level in the run, in the precision asked for."""
    levels = built.levels
    cut = partial(share, processes=processes, tails=options.tails)
    passes = partial(passes_of, processes=processes, given=accelerator.ddp_handler)
    trainers = {
        n: Trainer(built, level, place, processes, cut, passes) for n, level in levels.items()
    }
    set_precision(levels.values(), options.precision)
    if options.nested:
        refuse_half(built, levels)
    for name, trainer in trainers.items():
        trainer.level.reported.clear()
        trainer.watch = Watch(trainer.level, options.nonfinite)
        if _has_half(built, name):
            trainer.scale = make_scale(trainer.level, accelerator)
    return trainers


def _has_half(built: Build, name: str) -> bool:
    """Whether a pass of a level's own steps is in float16."""
    involved = levels_involved(built, name, None, nested=False)
    return any(built.levels[other].loss.is_half for other in involved)


def _make_recorders(
    built: Build,
    trainers: Mapping[str, Trainer],
    hooks: Hooks,
    compilers: Mapping[str, Compiler],
    mean: Mean | None,
) -> dict[str, Recorder]:
    """What records the steps of the levels that some method differentiates through."""
    values = Values(built)
    found: dict[str, Recorder] = {}
    for name, recording in recordings(built, built.methods).items():
        level = built.levels[name]
        require_differentiable(level, trainers[name].optimizer)
        warn_if_flat(level, trainers[name].optimizer)
        level.recent = deque(level.recent, maxlen=level.declaration.inner_steps)
        found[name] = Recorder(
            built,
            trainers[name],
            recording,
            values,
            is_watched=hooks.come_between(name),
            mean=mean,
            compiler=compilers.get(name),
        )
    return found


def _timings(built: Build) -> dict[str, Timing]:
    return {
        name: Timing(d.inner_steps, d.repeat, d.warmup)
        for name, d in ((n, level.declaration) for n, level in built.levels.items())
    }


class _Placer:
    """Moves batches to a device; those already there are passed on as they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, batch: Any) -> Any:
        return batch if self._device.type == "cpu" else send_to_device(batch, self._device)
