"""The places in modules that hold tensors, and other tensors in them while a call lasts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One place that holds a tensor.

    Attributes:
        key: its name, unique in the level module.
        holder: the ``_parameters`` or ``_buffers`` of the module that has it.
        name: its name there.
        owner: the level that optimizes it and its name there; None for a constant.
        child: the identity of the module that has it.
    """

    key: str
    holder: dict[str, Tensor | None]
    name: str
    owner: tuple[str, str] | None
    child: int

    @property
    def place(self) -> Place:
        """Where it is, whatever it holds."""
        return self.child, self.name

    @property
    def current(self) -> Tensor | None:
        """What stands there; the holder of a scripted module is no full mapping."""
        try:
            return self.holder[self.name]
        except KeyError:
            return None

    @property
    def tensor(self) -> Tensor:
        """The tensor that it holds now."""
        value = self.holder[self.name]
        if value is None:
            raise KeyError(self.key)
        return value


Place = tuple[int, str]
"""Where a buffer stands: the identity of its module, and its name there."""

State = dict[str, Tensor]
"""Tensors for the slots of one level module, by slot key."""


def call_swapped(
    slots: Sequence[Slot], modules: Sequence[nn.Module], state: State, function: Callable[[], T]
) -> T:
    """Calls ``function`` while the slots hold their tensors of ``state``.

    What ``torch.func.functional_call`` does, without looking every slot up by its name at
    each call. Tensors that ``function`` puts in their place are found in ``state``. On
    leaving, also by an interrupt, the slots and the modules' train/eval modes are as before.
    """
    before = [(slot, slot.current) for slot in slots]
    modes = [(module, module.training) for module in modules]
    swapped = [slot for slot in slots if slot.key in state]

    def restore() -> None:
        for slot, tensor in before:
            if slot.current is not tensor:
                slot.holder[slot.name] = tensor
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode

    try:
        try:
            for slot in swapped:
                slot.holder[slot.name] = state[slot.key]
            result = function()
            for slot in swapped:
                present = slot.current
                if present is not None:
                    state[slot.key] = present
            return result
        finally:
            restore()
    except BaseException:
        restore()  # once more: an interrupt may have met the first
        raise
