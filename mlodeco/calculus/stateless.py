"""A level's loss as a pure function of the parameters of every level that it sees."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mlodeco.calculus.kernels import Kernels
from mlodeco.calculus.precision import autocasting
from mlodeco.calculus.shards import Shards
from mlodeco.calculus.slots import Place, Slot, State, call_swapped
from mlodeco.errors import LossError, MlodecoError, NonFiniteError
from mlodeco.tree import Tree, dense

K = TypeVar("K")
T = TypeVar("T")


class LevelModule(nn.Module):
    """A level function as a module: ``forward(items)`` is the user's function.

    The modules that it names are submodules, under names that cannot clash with
    attributes of ``nn.Module``. ``items`` maps its other arguments to their values.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        modules: Mapping[str, nn.Module],
        arguments: tuple[str, ...],
        module_arguments: Mapping[str, str],
        positional: frozenset[str],
    ) -> None:
        super().__init__()
        self._function = function
        self._arguments = arguments
        self._positional = positional
        self._slot_of: dict[str, str] = {}
        for number, (level, module) in enumerate(modules.items()):
            self.add_module(f"level{number}", module)
            self._slot_of[level] = f"level{number}"
        self._module_arguments = {
            argument: self._slot_of[level] for argument, level in module_arguments.items()
        }

    def forward(self, items: Mapping[str, Any]) -> Any:
        """Calls the user's function with its modules and the items."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for name in self._arguments:
            slot = self._module_arguments.get(name)
            value = items[name] if slot is None else self._modules[slot]
            if name in self._positional:
                args.append(value)
            else:
                kwargs[name] = value
        return self._function(*args, **kwargs)


class StatelessLoss:
    """A level's loss ``C(values; items)`` with nothing hidden.

    One key per slot: a module reachable by two names is swapped once, and tied or
    shared tensors are found by identity, so that every slot that holds a parameter
    of a level gets that level's value.

    Args:
        level: the level's name.
        site: where its function stands.
        module: the level function with its modules.
        owners: for the identity of a parameter, its level and name there.

    Attributes:
        dtype: that of autocast in every call; float32 for none, None for things as they are.
        sees: the levels whose parameters are in its slots.
    """

    def __init__(
        self,
        level: str,
        site: str,
        module: LevelModule,
        owners: Mapping[int, tuple[str, str]],
    ) -> None:
        self.dtype: torch.dtype | None = None
        self.level = level
        self.site = site
        self.module = module
        self._kernels = Kernels(module)
        self._children = tuple(module.modules())
        self._parameters: list[Slot] = []
        self._buffers: list[Slot] = []
        for prefix, child in module.named_modules():
            dot = f"{prefix}." if prefix else ""
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    owner = owners.get(id(parameter))
                    holder: Any = child._parameters
                    self._parameters.append(Slot(dot + name, holder, name, owner, id(child)))
            for name, _ in child._buffers.items():
                slot = Slot(dot + name, child._buffers, name, None, id(child))
                self._buffers.append(slot)
        self._slots = (*self._parameters, *self._buffers)
        self.shards: Shards | None = None
        self.sees = tuple(dict.fromkeys(s.owner[0] for s in self._parameters if s.owner))

    @property
    def parameters(self) -> tuple[Slot, ...]:
        """The slots of parameters."""
        return tuple(self._parameters)

    @property
    def buffers(self) -> list[Slot]:
        """The slots of buffers that are not None."""
        return [slot for slot in self._buffers if slot.current is not None]

    @property
    def is_half(self) -> bool:
        """Whether its passes are in float16, whose range is so small that losses are scaled."""
        return self.dtype is torch.float16

    def slots_of(self, levels: frozenset[str]) -> list[Slot]:
        """The slots of the parameters of some levels."""
        return [slot for slot in self._parameters if slot.owner and slot.owner[0] in levels]

    @property
    def has_backward_hooks(self) -> bool:
        """Whether a module has hooks that act in backward passes, and not in forward mode."""
        return any(child._backward_hooks or child._backward_pre_hooks for child in self._children)

    def tensors(self) -> list[Tensor]:
        """The real parameters in the slots."""
        return [slot.tensor for slot in self._parameters]

    def state(
        self,
        values: Mapping[str, Mapping[str, Tensor]],
        buffers: Mapping[Place, Tensor] | None = None,
    ) -> State:
        """A tensor for every slot: the values of the levels given, else constants.

        Buffers are copies, of those given or of the modules' own, so that a pass that updates
        them changes nothing outside.
        """
        state: State = {}
        for slot in self._parameters:
            level, name = slot.owner or ("", "")
            value = values[level].get(name) if level in values else None
            state[slot.key] = slot.tensor.detach() if value is None else value
        copies: dict[int, Tensor] = {}
        for slot in self.buffers:
            buffer = slot.tensor if not buffers else buffers.get(slot.place, slot.tensor)
            if id(buffer) not in copies:
                copies[id(buffer)] = buffer.detach().clone()
            state[slot.key] = copies[id(buffer)]
        return state

    def within(self, state: State, function: Callable[[], T]) -> T:
        """Calls ``function`` while every slot holds its tensor of ``state``.

        Backward passes belong inside as well: activation checkpointing calls the
        user's modules again from there. Buffers of ``state`` may be updated by it.
        On leaving, slots and train/eval modes are as they were.
        """
        with self._kernels.differentiable():
            if self.shards is not None:
                return self.shards.within(state, lambda rest: self._swapped(rest, function))
            return self._swapped(state, function)

    def _swapped(self, state: State, function: Callable[[], T]) -> T:
        return call_swapped(self._slots, self._children, state, function)

    def gradient(self, output: Tensor, inputs: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """:func:`gradient` of a loss computed :meth:`within`, in shards as well."""
        found = gradient if self.shards is None else self.shards.gradient
        return found(output, inputs)

    def gradients(self, output: Tensor, trees: Mapping[K, Tree]) -> dict[K, Tree]:
        """The same in several trees at once; missing keys are zero."""
        return _by_tree(trees, lambda inputs: self.gradient(output, inputs))

    def call(self, items: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Calls the user's function as things are, and checks what it returns.

        Containers among the items are copied, so that a function may take its batch apart.

        Returns:
            The scalar loss, in single precision at least, and the metrics that came with it.

        Raises:
            LossError: it is not a scalar loss.
        """
        try:
            with autocasting(self.dtype, self._device):
                returned = self.module.forward({n: _fresh(value) for n, value in items.items()})
        except MlodecoError:
            raise
        except Exception as error:
            error.add_note(f"raised in the loss of level {self.level!r} ({self.site})")
            raise
        return read_loss(returned, self.level, self.site)

    @property
    def _device(self) -> str:
        """The kind of device that the first parameter is on."""
        return next((slot.tensor.device.type for slot in self._parameters), "cpu")


def _fresh(value: Any, depth: int = 2) -> Any:
    """The same tensors in containers of their own, so that ``batch.pop("y")`` hurts nobody."""
    kind = type(value)
    if not depth:
        return value
    if kind is dict:
        return {key: _fresh(part, depth - 1) for key, part in value.items()}
    if kind is list or kind is tuple:
        return kind(_fresh(part, depth - 1) for part in value)
    return copy.copy(value) if isinstance(value, MutableMapping | list) else value


def read_loss(returned: Any, level: str, site: str) -> tuple[Tensor, dict[str, Any]]:
    """Splits what a level function returned into its scalar loss and its metrics.

    Raises:
        LossError: it is not ``loss``, ``(loss, metrics)`` or ``{"loss": loss, ...}``.
    """

    def refuse(found: str, remedy: str) -> LossError:
        return LossError(
            found,
            expected="a scalar tensor, (scalar, metrics) or {'loss': scalar, ...}.",
            remedy=remedy,
            level=level,
            site=site,
        )

    metrics: dict[str, Any] = {}
    loss = returned
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        loss, metrics = returned[0], dict(returned[1])
    elif isinstance(returned, Mapping):
        if "loss" not in returned:
            raise refuse(
                f"the function returned a dictionary without 'loss': {sorted(map(str, returned))}.",
                "name the loss: return {'loss': loss, ...}.",
            )
        loss = returned["loss"]
        metrics = {key: value for key, value in returned.items() if key != "loss"}
    if isinstance(loss, tuple) and loss and isinstance(loss[0], Tensor):
        rest = ", ".join(type(part).__name__ for part in loss[1:])
        raise refuse(
            f"the function returned a loss and {rest or 'nothing else'} in a tuple.",
            "the second part must be a dictionary of metrics: return loss, {'name': value}.",
        )
    if loss is None:
        raise refuse(
            "the function returned None.",
            "return the loss; do not call .backward() or step an optimizer: the library does.",
        )
    if not isinstance(loss, Tensor):
        raise refuse(
            f"the function returned {type(loss).__name__} {loss!r:.60}.",
            "return the loss tensor itself, without .item() or float().",
        )
    if loss.numel() != 1:
        raise refuse(
            f"the loss has shape {tuple(loss.shape)}.",
            "reduce it to a scalar: return losses.mean().",
        )
    if loss.is_meta:
        raise refuse(
            "the loss is on the meta device, where tensors have no numbers.",
            "compute the loss from the level's modules and its batch.",
        )
    if not loss.is_floating_point():
        raise refuse(
            f"the loss has dtype {loss.dtype}.", "compute the loss in floating point numbers."
        )
    loss = loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
    return (loss.reshape(()) if loss.dim() else loss), metrics


def require_finite(loss: Tensor | float, level: str, site: str) -> float:
    """The loss as a number.

    Raises:
        NonFiniteError: it is infinite or not a number.
    """
    value = float(loss.detach()) if isinstance(loss, Tensor) else loss
    if not math.isfinite(value):
        raise NonFiniteError(
            f"the loss is {value}.",
            expected="a finite number.",
            remedy="look for a learning rate that is too large, a division by zero or the "
            "logarithm of zero in this function, or bad numbers in its batch.",
            level=level,
            site=site,
        )
    return value


def live(tree: Mapping[str, Tensor]) -> Tree:
    """Fresh leaves with the same storage that require gradients."""
    return {key: value.detach().requires_grad_() for key, value in tree.items()}


def frozen(tree: Mapping[str, Tensor]) -> Tree:
    """The same tensors without gradients."""
    return {key: value.detach() for key, value in tree.items()}


def gradients(output: Tensor, trees: Mapping[K, Tree]) -> dict[K, Tree]:
    """The gradient of one output in several trees at once; missing keys are zero."""
    return _by_tree(trees, lambda inputs: gradient(output, inputs))


def _by_tree(
    trees: Mapping[K, Tree],
    take: Callable[[dict[tuple[K, str], Tensor]], dict[tuple[K, str], Tensor]],
) -> dict[K, Tree]:
    inputs = {(name, key): tensor for name, tree in trees.items() for key, tensor in tree.items()}
    found: dict[K, Tree] = {name: {} for name in trees}
    for (name, key), value in take(inputs).items():
        found[name][key] = value
    return found


def gradient(
    outputs: Tensor | list[Tensor],
    inputs: Mapping[K, Tensor],
    weights: list[Tensor] | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> dict[K, Tensor]:
    """``autograd.grad`` on mappings; inputs that the outputs do not depend on are left out.

    Sparse gradients (``nn.Embedding(sparse=True)``) are made dense.
    """
    if not inputs:
        return {}
    found = torch.autograd.grad(
        outputs,
        list(inputs.values()),
        grad_outputs=weights,
        create_graph=create_graph,
        retain_graph=retain_graph,
        allow_unused=True,
    )
    return {
        key: dense(value) for key, value in zip(inputs, found, strict=True) if value is not None
    }
