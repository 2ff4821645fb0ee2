"""From what ``optimizer=`` and ``scheduler=`` say to real ones."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, distributed, nn
from torch.distributed.algorithms.join import Joinable
from torch.optim import LBFGS, SGD, Adam, Optimizer, Rprop, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mlodeco.calculus.optimizer_step import Group, OptimizerStep
from mlodeco.calculus.update import Update
from mlodeco.declare.calls import call, misfit
from mlodeco.errors import OptimizerError, SolverWarning, did_you_mean, quoted
from mlodeco.runtime.build import BuiltLevel
from mlodeco.runtime.fsdp import shard_of, whole_tree
from mlodeco.runtime.replicas import check_entrywise, shown_stacked

_TUNABLE_OF_SGD = ("lr", "momentum", "weight_decay")
_TUNABLE_OF_ADAM = ("lr", "betas", "eps", "weight_decay")
"""The options that these take as tensors and differentiate; others they use as numbers."""


def make_optimizer(level: BuiltLevel, wanted_by: str = "a run") -> Optimizer:
    """The level's optimizer; an instance is used as it is, a factory makes a new one.

    Raises:
        OptimizerError: there is none, it is not one, or it steps other parameters.
    """
    given = level.declaration.optimizer
    if given is None:
        raise _error(
            level,
            f"the level has no optimizer, which {wanted_by} needs.",
            "give optimizer=functools.partial(torch.optim.SGD, lr=0.1).",
        )
    if isinstance(given, Optimizer):
        optimizer = given
    elif callable(given) and not isinstance(given, nn.Module):
        made = _call(level, given)
        if not isinstance(made, Optimizer):
            raise _error(
                level,
                f"optimizer= returned {type(made).__name__}, which is not a torch optimizer.",
                "return a torch.optim.Optimizer from it.",
            )
        optimizer = made
    else:
        raise _error(
            level,
            f"optimizer={given!r} is not an optimizer.",
            "give functools.partial(torch.optim.SGD, lr=0.1) or an optimizer.",
        )
    if isinstance(optimizer, LBFGS):
        raise _error(
            level, "LBFGS evaluates the loss several times a step.", "use SGD, Adam or the like."
        )
    if isinstance(optimizer, SparseAdam):
        raise _error(
            level,
            "SparseAdam takes sparse gradients, which a run makes dense.",
            "use Adam, or SGD.",
        )
    check_entrywise(level, optimizer)
    _check_parameters(level, optimizer)
    _check_divided(level, optimizer)
    return optimizer


def _call(level: BuiltLevel, factory: Callable[..., Any]) -> Any:
    """What a factory of optimizers returns.

    Raises:
        OptimizerError: it cannot be called with what it is given, or needs several processes.
    """
    parameters = list(level.parameters.values())
    takes_module = _takes_module(factory)
    why = misfit(factory, module=level.module) if takes_module else misfit(factory, parameters)
    if why:
        raise _error(
            level,
            f"optimizer= cannot be called with the parameters: {why}.",
            "give optimizer=functools.partial(torch.optim.SGD, lr=0.1), or a function of one "
            "argument, the parameters or module.",
        )
    where = f"level {level.name!r} ({level.site})"
    try:
        if not takes_module:
            return call("optimizer=", where, factory, parameters)
        with shown_stacked(level):
            return call("optimizer=", where, factory, module=level.module)
    except (RuntimeError, ValueError) as error:
        if distributed.is_initialized() or "process group" not in str(error):
            raise
        raise _error(
            level,
            "optimizer= makes one that divides its work among processes, and there is one process.",
            "start the script with torchrun or accelerate launch, or give the plain optimizer: "
            "partial(Adam, lr=...).",
        ) from error


def is_divided(optimizer: Optimizer | None) -> bool:
    """Whether each process holds a part of the state alone, as in ZeroRedundancyOptimizer."""
    return isinstance(optimizer, Joinable)


def _check_divided(level: BuiltLevel, optimizer: Optimizer) -> None:
    """Refuses what needs the whole state of an optimizer in one process."""
    if not is_divided(optimizer):
        return
    if getattr(optimizer, "_overlap_with_ddp", False):
        raise _error(
            level,
            f"{type(optimizer).__name__}(overlap_with_ddp=True), whose step does nothing.",
            "leave overlap_with_ddp out.",
        )
    declaration = level.declaration
    for option, is_given in (
        ("rollback", declaration.rollback),
        ("init_from", declaration.init_from is not None),
    ):
        if is_given:
            raise _refusal_of_parts(level, optimizer, f"{option}=", f"leave {option}= out")
    if level.is_sharded:
        raise _error(
            level,
            f"its module is sharded, and its optimizer is a {type(optimizer).__name__}.",
            "give the level the plain optimizer: that of a sharded module keeps parts already.",
        )


def _refusal_of_parts(
    level: BuiltLevel,
    optimizer: Optimizer,
    what: str,
    instead: str = "the levels above a method that does not differentiate its steps, such as "
    "hypergrad='neumann'",
) -> OptimizerError:
    kind = type(optimizer).__name__
    return _error(
        level,
        f"{what} needs the state of the optimizer, of which {kind} keeps a part in each process.",
        f"give the level the plain optimizer, such as partial(Adam, lr=...), or {instead}.",
    )


def next_update(level: BuiltLevel) -> tuple[Update, Mapping[str, Any]]:
    """The next update of a level and its state: those of the last run, else fresh ones.

    Raises:
        OptimizerError: the level has no optimizer.
    """
    wanted_by = "a method that differentiates its step, such as Sama,"
    if level.rule is not None:
        return level.rule, level.rule_state
    optimizer = level.optimizer or make_optimizer(level, wanted_by)
    warn_if_flat(level, optimizer)
    state = read_state(level, optimizer)
    return read_step(level, optimizer), {key: whole_tree(known) for key, known in state.items()}


def warn_if_flat(level: BuiltLevel, optimizer: Optimizer | None) -> None:
    """Warns of an optimizer whose step has the derivative zero."""
    if isinstance(optimizer, Rprop):
        warnings.warn(
            f"level {level.name!r} ({level.site}): Rprop steps by the sign of the gradient, so "
            "that the derivative of its step is zero. Remedy: use another optimizer, or a "
            "method that does not differentiate the step.",
            SolverWarning,
            stacklevel=3,
        )


def read_step(level: BuiltLevel, optimizer: Optimizer) -> OptimizerStep:
    """The step of an optimizer with its present options.

    Raises:
        OptimizerError: ``tune=`` names an option that it does not take as a tensor, or its state
            is divided among processes.
    """
    if is_divided(optimizer):
        raise _refusal_of_parts(level, optimizer, "a method that differentiates steps")
    if level.tuning is not None:
        _check_tunable(level, optimizer)
    names = {id(parameter): name for name, parameter in level.parameters.items()}
    groups = tuple(
        Group(
            tuple(names[id(parameter)] for parameter in group["params"]),
            {name: _kept(value) for name, value in group.items() if name != "params"},
        )
        for group in optimizer.param_groups
    )
    return OptimizerStep(
        level=level.name,
        site=level.site,
        kind=type(optimizer),
        groups=groups,
        clip_norm=level.declaration.clip_norm,
        tuning=level.tuning,
        replicas=level.replicas,
    )


def _kept(value: Any) -> Any:
    """An option as it is now: schedulers write into a learning rate that is a tensor."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def read_state(level: BuiltLevel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What an optimizer keeps for each parameter, by name; the tensors are its own."""
    names = {id(parameter): name for name, parameter in level.parameters.items()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def save_optimizer(optimizer: Optimizer, rank: int) -> dict[str, Any]:
    """The whole state of an optimizer, of one that is divided in the first process alone."""
    divided: Any = optimizer
    if is_divided(optimizer):
        divided.consolidate_state_dict(to=0)
    return optimizer.state_dict() if rank == 0 or not is_divided(optimizer) else {}


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Gives an optimizer a whole state; tensors keep the dtypes that they had.

    ``load_state_dict`` alone converts them to those of the parameters, and takes strings apart.
    """
    ids = [one for group in state["param_groups"] for one in group["params"]]
    members = [p for group in optimizer.param_groups for p in group["params"]]
    known = {
        number: {
            name: _with_shards(value, parameter) for name, value in state["state"][number].items()
        }
        for number, parameter in zip(ids, members, strict=True)
        if number in state["state"]
    }
    # a copy: a divided one takes its part, and forgets the rest of what it is given
    optimizer.load_state_dict({**state, "state": dict(known)})
    for number, parameter in zip(ids, members, strict=True):
        present = optimizer.state.get(parameter) or {}
        for name, value in known.get(number, {}).items():
            if name in present and _is_changed(present[name], value):
                present[name] = value


def _with_shards(value: Any, parameter: Tensor) -> Any:
    """:func:`shard_of` of all tensors in a value."""
    if isinstance(value, Tensor):
        return shard_of(value, parameter)
    if isinstance(value, dict):
        return {key: _with_shards(part, parameter) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_with_shards(part, parameter) for part in value)
    return value


def _is_changed(loaded: Any, value: Any) -> bool:
    """Whether ``load_state_dict`` may have made something else of a value."""
    if isinstance(value, Tensor):
        return isinstance(loaded, Tensor) and loaded.dtype != value.dtype
    return isinstance(value, Collection)


def fresh_state(level: BuiltLevel, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """What such an optimizer keeps before its first step: nothing, for most."""
    make: Any = type(optimizer)
    try:
        known = inspect.signature(make).parameters
        options = {name: v for name, v in optimizer.defaults.items() if name in known}
        fresh = make([dict(group) for group in optimizer.param_groups], **options)
    except (TypeError, ValueError):  # a class of a user's own, made in another way
        return {}
    return read_state(level, fresh)


def make_scheduler(level: BuiltLevel, optimizer: Optimizer) -> LRScheduler | None:
    """The level's scheduler, or None.

    Raises:
        OptimizerError: it is not a scheduler that steps without a metric.
    """
    factory = level.declaration.scheduler
    if factory is None:
        return None
    if why := misfit(factory, optimizer):
        raise _error(
            level,
            f"scheduler= cannot be called with the optimizer: {why}.",
            "give a function of the optimizer: "
            "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10).",
        )
    where = f"level {level.name!r} ({level.site})"
    scheduler: Any = call("scheduler=", where, factory, optimizer)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise _error(
            level,
            "ReduceLROnPlateau steps by a metric, and a scheduler here steps once per own "
            "optimizer step.",
            "use another scheduler, or step it yourself in a hook: "
            f"@on('loop_end', level={level.name!r}) is offered the optimizer.",
        )
    if not isinstance(scheduler, LRScheduler):
        raise _error(
            level,
            f"scheduler= returned {type(scheduler).__name__}, which is not a scheduler.",
            "return a torch.optim.lr_scheduler scheduler from it.",
        )
    return scheduler


def _takes_module(factory: Any) -> bool:
    try:
        first = next(iter(inspect.signature(factory).parameters), None)
    except (TypeError, ValueError):
        return False
    return first == "module"


def _check_parameters(level: BuiltLevel, optimizer: Optimizer) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owned = {id(p): name for name, p in level.parameters.items()}
    if stepped - set(owned):
        raise _error(
            level,
            f"the optimizer steps {len(stepped - set(owned))} tensors that the level does not own.",
            "give a factory, such as functools.partial(SGD, lr=0.1): those of replicas are stacked."
            if level.is_replicated
            else f"let it step the level's own parameters: {quoted(owned.values())}.",
        )
    missing = [name for key, name in owned.items() if key not in stepped]
    if missing:
        raise _error(
            level,
            f"the optimizer leaves out {quoted(missing)}.",
            "give it all parameters of the level, or select fewer by params=.",
        )


def _check_tunable(level: BuiltLevel, optimizer: Optimizer) -> None:
    if not isinstance(optimizer, SGD | Adam):  # AdamW is an Adam
        raise _error(
            level,
            f"tune= on {type(optimizer).__name__}, whose options cannot be tensors.",
            "use SGD, Adam or AdamW, or an @update rule.",
        )
    known = _TUNABLE_OF_SGD if isinstance(optimizer, SGD) else _TUNABLE_OF_ADAM
    for option in level.declaration.tune:
        if option not in known:
            raise _error(
                level,
                f"tune= names {option!r}, no option that {type(optimizer).__name__} takes as a "
                "tensor.",
                f"name one of {quoted(known)}, or write an @update rule."
                f"{did_you_mean(option, known)}",
            )
    if "momentum" in level.declaration.tune and optimizer.defaults.get("nesterov"):
        raise _error(
            level,
            "tune= names 'momentum' of SGD(nesterov=True), which torch does not differentiate.",
            "leave nesterov out, or write an @update rule.",
        )


def _error(level: BuiltLevel, found: str, remedy: str) -> OptimizerError:
    return OptimizerError(found, remedy=remedy, level=level.name, site=level.site)
