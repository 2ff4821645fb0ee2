"""Means over processes, as a function that comes from outside: nothing here communicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mlodeco.calculus.autograd_graph import is_used
from mlodeco.tree import Tree

Trees = Sequence[Mapping[str, Tensor]]


class Mean(Protocol):
    """The mean of trees over the processes of a run, the same on all of them.

    Every process must ask for the same means in the same order: a mean is one collective.
    """

    def __call__(self, trees: Trees, like: Trees) -> list[Tree]:
        """One collective for all the trees.

        Args:
            trees: a missing key stands for zero; one that no process has stays missing.
            like: for each tree one with all the keys that it may have, and their shapes.
        """


def mean_of(mean: Mean | None, tree: Tree, like: Mapping[str, Tensor]) -> Tree:
    """The mean of one tree; the tree itself where there is one process."""
    return tree if mean is None else mean([tree], [like])[0]


def mean_by_name(
    mean: Mean | None, trees: dict[str, Tree], like: Mapping[str, Tree]
) -> dict[str, Tree]:
    """The means of several trees by one collective."""
    if mean is None:
        return trees
    found = mean([trees[name] for name in trees], [like[name] for name in trees])
    return dict(zip(trees, found, strict=True))


def shared(values: Mapping[str, Tree], mean: Mean | None) -> dict[str, Tree]:
    """The same values, whose cotangents are averaged on their way back.

    With them the derivatives of a local loss are those of its mean over processes, to any order:
    the derivative of a mean of cotangents gives each process its own use of what all hold alike,
    whose derivative is a mean again.
    """
    entries = [(n, key) for n, tree in values.items() for key in tree if tree[key].requires_grad]
    if mean is None or not entries:
        return dict(values)
    tensors = [values[name][key] for name, key in entries]
    passed: tuple[Tensor, ...] = _Shared.apply(mean, *tensors)  # type: ignore[no-untyped-call]
    result = {name: dict(tree) for name, tree in values.items()}
    for (name, key), tensor in zip(entries, passed, strict=True):
        result[name][key] = tensor
    return result


def tied(loss: Tensor, values: Mapping[str, Tree], mean: Mean | None) -> Tensor:
    """The same loss, that depends on whatever the loss of some process does.

    A loss that is constant or linear in a parameter, on one process's data alone, would leave out
    means that the others wait for; so would mixed derivatives, where it adds one parameter to
    another. The zero added has derivatives of every order in all of them together.

    Args:
        loss: the loss.
        values: what :func:`shared` gave.
        mean: over processes.
    """
    given = {
        f"{name}.{key}": tensor
        for name, tree in values.items()
        for key, tensor in tree.items()
        if tensor.requires_grad
    }
    if mean is None or not given:
        return loss
    flags = {key: tensor.detach().new_zeros((), dtype=loss.dtype) for key, tensor in given.items()}
    used = is_used(loss.grad_fn, given.values())
    own = {key: flags[key] for key, flag in zip(flags, used, strict=True) if flag}
    sums = [_real(given[key]).sum().to(loss) for key in mean([own], [flags])[0]]
    return loss + 0.0 * torch.stack(sums).sum().cos() if sums else loss


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class _Shared(torch.autograd.Function):
    """The identity; backward the mean."""

    @staticmethod
    def forward(ctx: Any, mean: Mean, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.mean = mean
        ctx.like = {str(n): t.detach() for n, t in enumerate(tensors) if t is not None}
        ctx.set_materialize_grads(False)
        return tuple(None if tensor is None else tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        means = _Averaged.apply(ctx.mean, ctx.like, *cotangents)  # type: ignore[no-untyped-call]
        return None, *means


class _Averaged(torch.autograd.Function):
    """The mean; backward the identity, which is that of what all processes hold alike."""

    @staticmethod
    def forward(
        ctx: Any, mean: Mean, like: Tree, *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.mean = mean
        ctx.set_materialize_grads(False)
        given = {str(number): c for number, c in enumerate(cotangents) if c is not None}
        (found,) = mean([given], [like])
        return tuple(found.get(str(number)) for number in range(len(cotangents)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        return None, None, *_Shared.apply(ctx.mean, *cotangents)  # type: ignore[no-untyped-call]
