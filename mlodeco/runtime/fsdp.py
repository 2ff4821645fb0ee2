"""What the library has to know of torch's FSDP2: shards, units, and how they are put to rest.

A *shard* is the part that a process holds of a parameter, a ``DTensor``. A *unit* is a module on
which ``fully_shard`` was called: it shows whole parameters inside its own forward and backward
alone. torch's package for it is imported by those who shard: it takes half a second.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from mlodeco.tree import Tree, is_shard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup


def whole(tensor: Tensor) -> Tensor:
    """The whole of a shard, which all processes must ask for; other tensors as they are."""
    return tensor.full_tensor().detach() if is_shard(tensor) else tensor


def whole_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`whole` of all tensors among some values."""
    return {key: whole(v) if isinstance(v, Tensor) else v for key, v in tree.items()}


def shard_like(tree: Tree, parameters: Mapping[str, Tensor]) -> Tree:
    """The own part of each whole tensor of a sharded parameter; copies, that free the rest."""
    return {key: _shard(value, parameters.get(key)) for key, value in tree.items()}


def _shard(value: Tensor, like: Any) -> Tensor:
    if like is not None and is_shard(like) and not is_shard(value) and value.shape == like.shape:
        from torch.distributed.tensor import DTensor

        made = DTensor.from_local(value, like.device_mesh, run_check=False)
        return made.redistribute(placements=like.placements).clone()
    return value


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as a sharded one of its shape is; another one as it is."""
    is_one = is_shard(like) and value.shape == like.shape
    return shard_like({"": value.to(like.device)}, {"": like})[""] if is_one else value


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module."""
    known = sys.modules.get("torch.distributed.fsdp")
    return known is not None and isinstance(module, known.FSDPModule)


def units(module: nn.Module) -> list[FSDPModule]:
    """The units in a module."""
    return [cast("FSDPModule", child) for child in module.modules() if is_unit(child)]


def roots(module: nn.Module) -> list[FSDPModule]:
    """The units in a module that are in no other one."""
    if is_unit(module):
        return [cast("FSDPModule", module)]
    return [root for child in module.children() for root in roots(child)]


def rest(module: nn.Module) -> None:
    """Lets every unit show its shards, and forget passes that were not gone back over."""
    for root in roots(module):
        if root._get_fsdp_state()._is_root:
            root.reset_iter_state()
        else:  # not called yet, or a part of another module, by which its passes begin
            for unit in units(cast(nn.Module, root)):
                unit.reshard()


def leaves(module: nn.Module) -> list[nn.Parameter]:
    """The whole parameters of the units, at which a backward pass ends; known behind a forward."""
    found = [one for group in groups(module) for one in group.fsdp_params]
    held = [one.unsharded_param for one in found if hasattr(one, "_unsharded_param")]
    return [parameter for parameter in held if parameter.requires_grad]


def groups(module: nn.Module) -> list[FSDPParamGroup]:
    """What the units communicate together."""
    states = dict.fromkeys(unit._get_fsdp_state() for unit in units(module))
    return [group for state in states for group in state._fsdp_param_groups]


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Lets modules show whole parameters, without anything that FSDP does in their calls.

    So they are their own skeletons: a stateless call swaps tensors in and out of their slots as
    in any module. All processes must enter it. On leaving, the shards are back in their places.

    Yields:
        For the identity of a parameter that is sharded, the whole.
    """
    given = list(modules)
    distinct = {id(child): child for module in given for child in module.modules()}
    known: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for module in given:
            rest(module)
        for child in distinct.values():
            if is_unit(child):
                stack.enter_context(_without_hooks(child))
            holder: Any = child._parameters
            for name, parameter in child._parameters.items():
                if parameter is not None and is_shard(parameter):
                    if id(parameter) not in known:
                        known[id(parameter)] = whole(parameter)
                    stack.callback(holder.__setitem__, name, parameter)
                    holder[name] = known[id(parameter)]
        try:
            yield known
        finally:
            known.clear()


@contextmanager
def _without_hooks(unit: Any) -> Iterator[None]:
    """Takes out what FSDP does before and behind the forward of a unit, and its other methods."""
    before = unit._forward_pre_hooks, unit._forward_hooks
    state = unit._get_fsdp_state()
    unit._forward_pre_hooks, unit._forward_hooks = map(_others, before)
    # methods given to register_fsdp_forward_method ask the state
    vars(state).update(_pre_forward=_same_inputs, _post_forward=_same_output)
    try:
        yield
    finally:
        unit._forward_pre_hooks, unit._forward_hooks = before
        for name in ("_pre_forward", "_post_forward"):
            vars(state).pop(name, None)


def _others(hooks: Any) -> Any:
    """The hooks that are not FSDP's."""
    kept = ((n, h) for n, h in hooks.items() if not _is_of_fsdp(h))
    return type(hooks)(kept)


def _is_of_fsdp(hook: Any) -> bool:
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    bound = inspect.unwrap(hook, stop=lambda found: hasattr(found, "__self__"))
    return isinstance(getattr(bound, "__self__", None), FSDPState)


def _same_inputs(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def _same_output(_: nn.Module, inputs: Any, output: Any) -> Any:
    del inputs
    return output


@contextmanager
def explained() -> Iterator[None]:
    """Says, with an error about a shard, where a unit shows whole parameters."""
    try:
        yield
    except RuntimeError as error:
        if "DTensor" in str(error):
            error.add_note(
                "a module sharded by fully_shard shows whole parameters inside its own forward: "
                "call the module itself, or first give the method called to "
                "torch.distributed.fsdp.register_fsdp_forward_method"
            )
        raise
