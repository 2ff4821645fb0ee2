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
from mlodeco.errors import CheckpointError, CheckpointWarning, counted, quoted
from mlodeco.graph import Schedule
from mlodeco.runtime.build import Build, BuiltLevel
from mlodeco.runtime.checkpoint.encoding import distinct, encode, storable
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
    given when a step is looked at again; ``declared`` are the buffers that there are for each
    level before its first step.
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
    declared: Mapping[str, list[str]]

    def program(self) -> dict[str, Any]:
        """What tells one program from another, in values that JSON can hold."""
        sources = quoted(sorted(self.built.sources))
        return {name: _described(trainer, sources) for name, trainer in self.trainers.items()}

    def check(self) -> None:
        """Looks at the state before a run begins, and not at its first checkpoint.

        All processes must call this.

        Raises:
            CheckpointError: it holds what a checkpoint cannot.
        """
        for name, state in self._tracked_states().items():
            encode(state, f"the state of the tracked {name!r}")
        encode(self.common(), "the state")
        encode(self.own(), "the state")
        self.weights()
        anew = self.sources.without_position
        if anew:
            _warn(
                f"the sources {quoted(anew)} begin anew where a run goes on from a checkpoint: "
                "a generator cannot be continued in another process. Remedy: give an object to "
                "iterate over again and again, or an iterator with state_dict and "
                "load_state_dict."
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
            "declared": self.declared,
        }

    def own(self) -> dict[str, Any]:
        """What is this process's own."""
        levels = self.built.levels
        return {
            "buffers": {name: read_buffers(level.module) for name, level in levels.items()},
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

        Warns of what the program and the checkpoint do not both have.

        Args:
            common: what :meth:`common` gave.
            own: what :meth:`own` gave.
            weights: for each level the tensors of its module.
            then: how many processes there were.

        Raises:
            CheckpointError: an object that is tracked does not take its state.
        """
        for name, level in self.built.levels.items():
            _write_parameters(level.module, weights[name])
            _write_buffers(level.module, own["buffers"][name])
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
        self._restore_validations(common["validations"])
        self.hooks.load_state_dict(common["hooks"])
        self._restore_tracked(own["tracked"])
        for name, generator in self.generators.items():
            generator.set_state(own["generators"][name])
        if not restore_generators(self._held(), own["held"]):
            warn_of_others("the program")
        SavedRandomness().load_state_dict(own["streams"]).restore()

    def buffers_of(
        self, common: Mapping[str, Any], own: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The buffers then and now that tell programs apart, as of :meth:`program`.

        Not those that a forward pass registers.
        """
        then: dict[str, Any] = {}
        now: dict[str, Any] = {}
        for name, level in self.built.levels.items():
            present = read_buffers(level.module)
            declared = dict.fromkeys((*common["declared"][name], *self.declared[name]))
            for found, known in ((then, own["buffers"][name]), (now, present)):
                found[name] = {f"buffer {key!r}": "there" for key in declared if key in known}
        return then, now

    def _restore_validations(self, states: list[Any]) -> None:
        if len(states) == len(self.validations):
            for validation, state in zip(self.validations, states, strict=True):
                validation.load_state_dict(state)
            return
        _warn(
            f"the checkpoint is of a program with {counted(len(states), 'validation')}, and there "
            f"are {len(self.validations)}: each begins anew to look for its best value and to "
            "count its patience."
        )

    def _restore_tracked(self, states: Mapping[str, Any]) -> None:
        for name, value in self.tracked.items():
            if name not in states:
                continue
            try:
                value.load_state_dict(states[name])
            except Exception as error:
                raise CheckpointError(
                    f"the tracked {name!r} does not take the state that it had: "
                    f"{type(error).__name__}: {error}.",
                    expected=f"{type(value).__name__}.load_state_dict to take what state_dict "
                    "gave when the checkpoint was written.",
                    remedy="let it do so, or track the object under another name, by which it "
                    "begins anew.",
                ) from error
        anew = [name for name in self.tracked if name not in states]
        if anew:
            _warn(f"the tracked {quoted(anew)} have no state in the checkpoint and begin anew.")
        gone = [name for name in states if name not in self.tracked]
        if gone:
            _warn(
                f"the checkpoint holds a state of the tracked {quoted(gone)}, which the program "
                "does not track: it is not used, and not in later checkpoints."
            )

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


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=4)


def _described(trainer: Trainer, sources: str) -> dict[str, Any]:
    level = trainer.level
    tensors = {
        f"parameter {key!r}": f"{tuple(p.shape)} {p.dtype}" for key, p in level.parameters.items()
    }
    return {
        "lower levels": ", ".join(level.declaration.lower) or "none",
        "optimizer": type(trainer.optimizer or level.rule).__name__,
        "scheduler": type(trainer.scheduler).__name__,
        "the list of the program's sources": sources,
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
        elif name in named or tensor.layout == torch.strided:  # sparse buffers are elsewhere
            value = storable(whole(tensor).detach(), f"the tensor {name!r} of a module")
            found[name] = distinct(value, storages)
    return found, aliases


def _write_parameters(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = saved[name]
            if parameter.is_complex() and not value.is_complex():
                # a copy: the file is mapped to memory, where complex numbers may stand askew
                value = torch.view_as_complex(value.clone())
            parameter.copy_(shard_of(value, parameter))


def read_buffers(module: nn.Module) -> dict[str, list[Any]]:
    """All buffers by name, those that are None too, and whether each is persistent."""
    return {
        f"{path}.{key}" if path else key: [value, key not in child._non_persistent_buffers_set]
        for path, child in module.named_modules(remove_duplicate=False)
        for key, value in child._buffers.items()
    }


def _write_buffers(module: nn.Module, saved: Mapping[str, list[Any]]) -> None:
    """Gives a module these buffers, and takes those away that it has beside."""
    children = dict(module.named_modules(remove_duplicate=False))
    for name in read_buffers(module).keys() | saved.keys():
        path, _, key = name.rpartition(".")
        child = children[path]
        if name not in saved:
            child._buffers.pop(key, None)  # one module may have two names
        elif key not in child._buffers:
            value, is_persistent = saved[name]
            child.register_buffer(key, value, persistent=is_persistent)
        else:
            _write_buffer(child, key, saved[name][0])


def _write_buffer(child: nn.Module, key: str, value: Tensor | None) -> None:
    present = child._buffers[key]
    if present is not None and value is not None and _is_alike(present, value):
        present.copy_(value)
    else:
        child._buffers[key] = value


def _is_alike(present: Tensor, value: Tensor) -> bool:
    """Whether a buffer can take a value and stay the tensor that it is."""
    is_plain = present.layout == value.layout == torch.strided
    return is_plain and present.shape == value.shape and present.dtype == value.dtype


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
