"""Everything that decides how a run goes on, collected from its owners and given back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlodeco.calculus.randomness import SavedRandomness, make_seed, seed_streams
from mlodeco.calculus.response import Status
from mlodeco.declare.calls import noted
from mlodeco.errors import CheckpointWarning, quoted
from mlodeco.graph import Schedule
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.checkpoint.encoding import distinct, encode
from mlodeco.runtime.context import Context
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.fsdp import shard_of, whole
from mlodeco.runtime.generators import (
    generators_of_program,
    read_generators,
    restore_generators,
    warn_of_others,
)
from mlodeco.runtime.hooks import Hooks
from mlodeco.runtime.processes import Processes
from mlodeco.runtime.recorder import Recorder
from mlodeco.runtime.sources import Sources
from mlodeco.runtime.trainer import Trainer
from mlodeco.runtime.validation import Validation

Weights = Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]]


@dataclass(frozen=True)
class Owners:
    """The parts of a run that have a state.

    ``tracked`` are objects of the user's; ``make_context`` gives a level's function what it is
    given when a step is looked at again.
    """

    built: Build
    trainers: Mapping[str, Trainer]
    recorders: Mapping[str, Recorder]
    sources: Sources
    validations: list[Validation]
    hooks: Hooks
    schedule: Schedule
    generators: Mapping[str, torch.Generator]
    tracked: Mapping[str, Any]
    make_context: Callable[[str], Context]
    processes: Processes

    def program(self) -> dict[str, Any]:
        """What tells one program from another, in values that JSON can hold."""
        return {name: _described(trainer) for name, trainer in self.trainers.items()}

    def check(self) -> None:
        """Looks at what is the user's before a run begins, and not at its first checkpoint.

        Raises:
            CheckpointError: the state of an object that is tracked cannot be saved.
        """
        for name, state in self._tracked_states().items():
            encode(state, f"the state of the tracked {name!r}")
        anew = self.sources.without_position
        if anew:
            warnings.warn(
                f"the sources {quoted(anew)} begin anew where a run goes on from a checkpoint: "
                "a generator cannot be continued in another process. Remedy: give an object to "
                "iterate over again and again, or an iterator with state_dict and "
                "load_state_dict.",
                CheckpointWarning,
                stacklevel=3,
            )

    def weights(self) -> Weights:
        """For each level the tensors of its module."""
        return {name: _weights(level.module) for name, level in self.built.levels.items()}

    def common(self) -> dict[str, Any]:
        """What is the same in all processes."""
        return {
            "levels": {name: _read_level(level) for name, level in self.built.levels.items()},
            "trainers": {name: one.state_dict() for name, one in self.trainers.items()},
            "schedule": self.schedule.state_dict(),
            "validations": [one.state_dict() for one in self.validations],
            "hooks": self.hooks.state_dict(),
        }

    def own(self) -> dict[str, Any]:
        """What is this process's own."""
        levels = self.built.levels
        return {
            "buffers": {name: dict(_buffers(level.module)) for name, level in levels.items()},
            "last": {name: self._last(level) for name, level in levels.items()},
            "trainers": {name: one.own_state_dict() for name, one in self.trainers.items()},
            "recorders": {name: one.state_dict() for name, one in self.recorders.items()},
            "sources": self.sources.state_dict(),
            "tracked": self._tracked_states(),
            "generators": {name: g.get_state() for name, g in self.generators.items()},
            "held": read_generators(self._held()),
            "streams": SavedRandomness().state_dict(),
        }

    def restore(
        self,
        common: Mapping[str, Any],
        own: Mapping[str, Any],
        weights: Mapping[str, Mapping[str, Tensor]],
        then: int,
    ) -> None:
        """Gives everything back; random numbers come last, since data move them.

        Args:
            common: what :meth:`common` gave.
            own: what :meth:`own` gave.
            weights: for each level the tensors of its module.
            then: how many processes there were.
        """
        for name, level in self.built.levels.items():
            _write_weights(level.module, weights[name], own["buffers"][name])
            _write_level(level, common["levels"][name])
            last = own["last"][name]
            level.last_batches = None if last is None else tuple(Drawn(*one) for one in last)
        for name, trainer in self.trainers.items():
            trainer.load_state_dict(common["trainers"][name])
            trainer.load_own_state_dict(own["trainers"][name], then)
        for name, recorder in self.recorders.items():
            recorder.load_state_dict(own["recorders"][name], self.make_context(name))
        self.sources.load_state_dict(own["sources"])
        self.schedule.load_state_dict(common["schedule"])
        for validation, state in zip(self.validations, common["validations"], strict=False):
            validation.load_state_dict(state)
        self.hooks.load_state_dict(common["hooks"])
        for name, value in self.tracked.items():
            if name in own["tracked"]:
                value.load_state_dict(own["tracked"][name])
        for name, generator in self.generators.items():
            generator.set_state(own["generators"][name])
        if not restore_generators(self._held(), own["held"]):
            warn_of_others("the program")
        SavedRandomness().load_state_dict(own["streams"]).restore()

    def _held(self) -> list[Any]:
        """The generators that the program's functions and modules hold."""
        levels = self.built.levels.values()
        functions = (
            *(f for level in levels for f in _functions(level)),
            *(one.declaration.function for one in self.validations),
            *self.hooks.functions,
            *self.built.custom.values(),
        )
        return generators_of_program(functions, (level.module for level in levels))

    def _tracked_states(self) -> dict[str, Any]:
        """The states of the user's objects; an exception from one says from which."""
        found = {}
        for name, value in self.tracked.items():
            with noted("state_dict()", f"the tracked {name!r}"):
                found[name] = value.state_dict()
        return found

    def _last(self, level: BuiltLevel) -> list[Any] | None:
        """The last batches of a level that levels above may see again before its next step.

        Empty where it steps before they do.
        """
        if level.last_batches is None:
            return None
        graph = self.built.graph
        is_between = graph.lower[level.name] and graph.uppers(level.name)
        return [[d.batch, dict(d.sources)] for d in level.last_batches] if is_between else []

    def part_ways(self, run_seed: int) -> None:
        """Random numbers for a process that there was not, beside those that there were."""
        rank, tick = self.processes.rank, self.built.tick
        for name, generator in self.generators.items():
            generator.manual_seed(make_seed(run_seed, tick, rank, name))
        seed_streams(make_seed(run_seed, tick, rank))


def _functions(level: BuiltLevel) -> list[Any]:
    rule = [] if level.update is None else [level.update.declaration.function]
    return [level.declaration.function, *level.declaration.tune.values(), *rule]


def _described(trainer: Trainer) -> dict[str, Any]:
    level = trainer.level
    tensors = {
        f"parameter {key!r}": f"{tuple(p.shape)} {p.dtype}" for key, p in level.parameters.items()
    }
    return {
        "lower levels": ", ".join(level.declaration.lower) or "none",
        "optimizer": type(trainer.optimizer or level.rule).__name__,
        "scheduler": type(trainer.scheduler).__name__,
        **tensors,
    }


def _weights(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct parameters, and what else there is in the state of the module; their other names."""
    named = dict(module.named_parameters())
    state = {k: t for k, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    first: dict[int, str] = {}
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    storages: set[int] = set()
    for name, tensor in (*named.items(), *state.items()):
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
        elif name not in found:
            found[name] = distinct(whole(tensor).detach(), storages)
    return found, aliases


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(remove_duplicate=False))


def _write_weights(
    module: nn.Module, saved: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(shard_of(saved[name], parameter))
    for name, value in buffers.items():
        path, _, key = name.rpartition(".")
        holder = module.get_submodule(path)._buffers
        present = holder[key]
        if present is not None and present.shape == value.shape and present.dtype == value.dtype:
            present.copy_(value)
        else:
            holder[key] = value


def _read_level(level: BuiltLevel) -> dict[str, Any]:
    """What a level knows beside the tensors of its module."""
    children = dict(level.module.named_modules())
    return {
        "stacked": level.parameters if level.is_replicated else {},
        "training": [name for name, child in children.items() if child.training],
        "extra": {name: child.get_extra_state() for name, child in _with_extra(children)},
        "decisions": dict(vars(level.decisions)),
        "reported": [status.name for status in level.reported],
        "is_probed": level.is_probed,
        "is_looped": level.is_looped,
        "is_settled": level.is_settled,
    }


def _write_level(level: BuiltLevel, state: Mapping[str, Any]) -> None:
    children = dict(level.module.named_modules())
    with torch.no_grad():
        for key, value in state["stacked"].items():
            level.parameters[key].copy_(value)
    for name, child in children.items():
        child.training = name in state["training"]
    for name, child in _with_extra(children):
        child.set_extra_state(state["extra"][name])
    vars(level.decisions).update(state["decisions"])
    level.reported = {Status[name] for name in state["reported"]}
    level.is_probed = state["is_probed"]
    level.is_looped, level.is_settled = state["is_looped"], state["is_settled"]


def _with_extra(children: Mapping[str, nn.Module]) -> list[tuple[str, Any]]:
    plain = nn.Module.get_extra_state
    return [(n, child) for n, child in children.items() if type(child).get_extra_state != plain]
