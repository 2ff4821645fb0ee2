"""Levels whose modules FSDP2 shards: how a run shards them, and what they cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.errors import LossError, MethodError, ModuleError, RunError, quoted
from mlodeco.runtime.fsdp import groups, units
from mlodeco.tree import is_shard

K = TypeVar("K")

if TYPE_CHECKING:
    from mlodeco.runtime.build import Build, BuiltLevel


def check_plugin(accelerator: Accelerator) -> None:
    """Refuses an Accelerator that shards in a way that is not available.

    Raises:
        RunError: it does.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    plugin: Any = accelerator.state.fsdp_plugin
    dynamo: Any = accelerator.state.dynamo_plugin
    refused = {
        f"fsdp_version={plugin.fsdp_version}": not accelerator.is_fsdp2,
        "cpu_offload": _is_offload(plugin.cpu_offload),
        "activation_checkpointing": plugin.activation_checkpointing,
        f"a dynamo backend, {dynamo.backend.value},": dynamo.backend != DynamoBackend.NO,
    }
    for found, is_given in refused.items():
        if is_given:
            raise RunError(
                f"the Accelerator has an FSDP plugin with {found}, which is not available.",
                expected="FullyShardedDataParallelPlugin(fsdp_version=2) with the parameters on "
                "the device.",
                remedy="leave the option out; layers can call torch.utils.checkpoint themselves.",
            )


def _is_offload(policy: Any) -> bool:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return policy is True or isinstance(policy, CPUOffloadPolicy)


def levels_to_shard(built: Build, accelerator: Accelerator) -> list[BuiltLevel]:
    """The leaf levels that an Accelerator with an FSDP plugin shards.

    A module without a forward, such as a mapping of tensors, has no place where FSDP could show
    its whole parameters, and stays whole in every process.
    """
    if not accelerator.is_fsdp2:
        return []
    found: dict[int, BuiltLevel] = {}
    for level in built.levels.values():
        has_forward = type(level.module).forward is not nn.Module.forward
        if has_forward and not level.declaration.lower and not units(level.module):
            found.setdefault(id(level.module), level)
    return list(found.values())


def shard_level(level: BuiltLevel, optimizer: Optimizer, accelerator: Accelerator) -> None:
    """Shards a level's module by one ``prepare`` of it and its optimizer, as Accelerate asks.

    The parameters are other objects afterwards, so that the program is to be built again.

    Raises:
        ModuleError: ``params=`` holds parameters themselves.
    """
    params = level.declaration.params
    if not callable(params) and any(isinstance(one, Tensor) for one in params or ()):
        raise _error(
            level,
            "params= holds parameters, which sharding replaces by others.",
            "names, or a predicate on names.",
            "write params=lambda name: name.startswith('head'), for instance.",
        )
    # an instance is given the shards; what a factory made serves here alone
    accelerator.prepare(level.module, optimizer)


def check_sharded(built: Build) -> None:
    """Refuses programs in which a sharded level has a part that it cannot have.

    Raises:
        ModuleError: there is one.
    """
    for level in built.levels.values():
        if level.is_sharded:
            for found, expected, remedy in _troubles(level, built):
                raise _error(level, found, expected, remedy)
            _check_units(level)
    for level in built.levels.values():
        held = [name for name in level.seen if built.levels[name].is_sharded]
        by_rule = [name for name in level.update_reads if built.levels[name].is_sharded]
        if held and level.copied:
            raise _error(
                level,
                f"the level sees replicas, and {quoted(held)}, whose module is sharded.",
                "one of them.",
                "leave replicas= out, or leave the module whole.",
            )
        if by_rule:
            raise _error(
                level,
                f"its update rule reads {quoted(by_rule)}, whose module is sharded.",
                "levels whose modules are whole.",
                "leave the module whole, or take it out of the rule.",
            )


def _troubles(level: BuiltLevel, built: Build) -> Iterator[tuple[str, str, str]]:
    """What a sharded level has and cannot have; what is expected, and the remedy."""
    declaration = level.declaration
    others = {name: other for name, other in built.levels.items() if name != level.name}
    starting = [n for n, other in others.items() if other.init_from == level.name]
    sharing = [n for n, other in others.items() if other.is_sharded and _share(level, other)]
    given = {
        f"lower={list(declaration.lower)}": bool(declaration.lower),
        "replicas=": declaration.replicas is not None,
        "init_from=": level.init_from is not None,
        "an @update rule": level.update is not None,
        f"the loops of {quoted(starting)}, which start from it by init_from=": bool(starting),
    }
    for option in (option for option, is_given in given.items() if is_given):
        yield (
            f"its module is sharded, and the level has {option}.",
            "a leaf level that an optimizer steps.",
            "leave the module whole: no fully_shard, or no FSDP plugin; or leave the option out.",
        )
    if sharing:
        yield (
            f"its module is sharded, and {quoted(sharing)} optimizes a part of it.",
            "one level for all parameters of a sharded module.",
            "shard the layers of one level alone, and hold the others out by "
            "fully_shard(..., ignored_params=).",
        )


def _share(level: BuiltLevel, other: BuiltLevel) -> bool:
    """Whether another level optimizes shards of this one's module."""
    own = {id(p) for p in level.module.parameters() if is_shard(p)}
    return any(id(p) in own for p in other.parameters.values())


def _check_units(level: BuiltLevel) -> None:
    world = distributed.get_world_size()
    for group in groups(level.module):
        if _is_offload(group.offload_policy):
            raise _error(
                level,
                "its module is sharded with CPUOffloadPolicy.",
                "parameters on the device.",
                "call fully_shard without offload_policy=.",
            )
        size = group.mesh_info.mesh.size()
        if size != world:
            raise _error(
                level,
                f"its module is sharded over {size} of {world} processes.",
                "a mesh of all processes.",
                "call fully_shard without mesh=, or with one of all processes.",
            )


def refuse_unrolled(level: BuiltLevel, built: Build, upper: str) -> None:
    """Refuses to differentiate the steps of a level that is sharded, or that sees one that is.

    Raises:
        MethodError: it is, or sees one.
    """
    held = [name for name in (level.name, *level.seen) if built.levels[name].is_sharded]
    if held:
        raise MethodError(
            f"{upper!r} differentiates the steps of this level, and the module of "
            f"{quoted(dict.fromkeys(held))} is sharded: a tape would hold whole copies of it.",
            expected="an implicit method, such as 'neumann', 'cg', 'sama' or 'finite_difference'.",
            remedy=f"set hypergrad='sama' at {upper!r}, or leave the module whole.",
            level=level.name,
            site=level.site,
        )


def require_plain(loss: Tensor, level: StatelessLoss) -> None:
    """Refuses a loss that was computed from shards, which backward passes cannot take apart.

    Raises:
        LossError: it was.
    """
    if is_shard(loss):
        raise LossError(
            "the loss is computed from shards: from parameters of a sharded module outside its "
            "forward.",
            expected="parameters that are used by calls of the module.",
            remedy="decay weights by the optimizer (weight_decay=), or let a method compute it "
            "that is given to torch.distributed.fsdp.register_fsdp_forward_method.",
            level=level.level,
            site=level.site,
        )


def plain_part(tree: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """The entries that every process holds whole; FSDP averages the others itself."""
    return {key: value for key, value in tree.items() if not is_shard(value)}


def _error(level: BuiltLevel, found: str, expected: str, remedy: str) -> ModuleError:
    return ModuleError(found, expected=expected, remedy=remedy, level=level.name, site=level.site)
