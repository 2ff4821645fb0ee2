"""One update of a level's parameters as a differentiable function, and its derivatives.

``(w', s') = U(w, g, s; mu)``: parameters w, gradient g, state s (moments), and parameters mu of
other levels where the update itself reads them (tuned or learned updates).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mlodeco.calculus.stateless import gradient, live
from mlodeco.tree import Tree

Values = Mapping[str, Tree]
"""The parameters of levels, by their names."""


@dataclass(frozen=True)
class Iterate:
    """Where a level stands between two updates: its parameters and what its update carries on."""

    parameters: Tree
    state: Mapping[str, Any]


class Update(Protocol):
    """How a level's parameters follow from its gradient."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels whose parameters enter the update itself."""

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The update as a run makes it, on copies and without a graph."""

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The same as a differentiable function of all its arguments."""

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The tensors of a state through which derivatives run, under names of its own."""

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The state with other tensors in their places."""


@dataclass(frozen=True)
class Cotangent:
    """The derivative of the upper loss in an iterate: in w, and in the carried state."""

    parameters: Tree
    state: Tree = field(default_factory=dict)


SEPARATOR = "\n"
"""Between a parameter's name and that of a part of its state; no name has one."""

_READ = "read "


@dataclass(frozen=True)
class Pulled:
    """A cotangent before an update: that of its iterate, of its gradient and of what it reads."""

    before: Cotangent
    gradients: Tree
    reads: dict[str, Tree]


@dataclass(frozen=True)
class _Leaves:
    """The arguments of an update as leaves, and the carried tensors that came out."""

    parameters: Tree
    gradients: Tree
    state: Tree
    reads: dict[str, Tree]

    @property
    def inputs(self) -> dict[tuple[str, str], Tensor]:
        trees = {"w": self.parameters, "g": self.gradients, "s": self.state}
        trees |= {_READ + level: tree for level, tree in self.reads.items()}
        return {(name, key): t for name, tree in trees.items() for key, t in tree.items()}


@dataclass(frozen=True)
class Tangent:
    """A direction before an update: of its iterate, of its gradient and of what it reads."""

    parameters: Tree
    state: Tree
    gradients: Tree
    reads: dict[str, Tree]

    def entries(self) -> dict[tuple[str, str], Tensor]:
        """Its tensors, by the names of the leaves."""
        trees = {"w": self.parameters, "s": self.state, "g": self.gradients}
        trees |= {_READ + level: tree for level, tree in self.reads.items()}
        return {(name, key): t for name, tree in trees.items() for key, t in tree.items()}


def _follow(
    update: Update, before: Iterate, gradients: Tree, values: Values, reads: tuple[str, ...]
) -> tuple[_Leaves, dict[tuple[str, str], Tensor]]:
    """The update with its graph: the leaves, and w' and s' under ("w", key) and ("s", key)."""
    leaves = _Leaves(
        live(before.parameters),
        live(gradients),
        live(update.carried(before.state)),
        {level: live(values[level]) for level in reads},
    )
    start = Iterate(leaves.parameters, update.with_carried(before.state, leaves.state))
    after = update.apply(start, leaves.gradients, {**values, **leaves.reads})
    outputs = {("w", key): t for key, t in after.parameters.items()}
    outputs |= {("s", key): t for key, t in update.carried(after.state).items()}
    return leaves, outputs


def pull_back(
    update: Update,
    before: Iterate,
    gradients: Tree,
    values: Values,
    cotangent: Cotangent,
    reads: tuple[str, ...] = (),
) -> Pulled:
    """The cotangent before an update, from that behind it: one vjp, elementwise for optimizers.

    Where a gradient is exactly zero the root in Adam and its kin has no derivative: there the
    cotangents of gradient and state are zero, and that of the parameter passes through.

    Args:
        update: the update.
        before: the iterate that it started from.
        gradients: its gradient; without a key for parameters that no loss touched.
        values: the parameters of the levels that the update reads.
        cotangent: that of the iterate behind it.
        reads: those of ``update.reads`` whose cotangents are wanted.

    Raises:
        OptimizerError: the update cannot be differentiated.
    """
    with torch.enable_grad():
        leaves, outputs = _follow(update, before, gradients, values, reads)
        found = _vjp(leaves.inputs, outputs, cotangent)
        if any(bool(t.isnan().any()) for (name, _), t in found.items() if name.startswith(_READ)):
            # a root at zero makes a sum over all entries NaN: those entries are left out
            leaves, outputs = _follow(update, before, gradients, values, reads)
            inputs = {key: t for key, t in leaves.inputs.items() if key[0].startswith(_READ)}
            found |= _vjp(inputs, outputs, _without_idle(cotangent, gradients))
    trees: dict[str, Tree] = {}
    for (name, key), value in found.items():
        trees.setdefault(name, {})[key] = _mended(value, name, key, gradients, cotangent)
    return Pulled(
        Cotangent(trees.get("w", {}), trees.get("s", {})),
        trees.get("g", {}),
        {level: trees.get(_READ + level, {}) for level in reads},
    )


def _vjp(
    inputs: dict[tuple[str, str], Tensor],
    outputs: dict[tuple[str, str], Tensor],
    cotangent: Cotangent,
) -> dict[tuple[str, str], Tensor]:
    weights = {("w", key): t for key, t in cotangent.parameters.items()}
    weights |= {("s", key): t for key, t in cotangent.state.items()}
    moved = [name for name in outputs if name in weights and outputs[name].requires_grad]
    if not moved:
        return {}
    return gradient([outputs[n] for n in moved], inputs, [weights[n] for n in moved])


def _parameter_of(name: str, key: str) -> str:
    """The parameter to which an entry belongs."""
    return key.partition(SEPARATOR)[0] if name == "s" else key


def _mended(value: Tensor, name: str, key: str, gradients: Tree, cotangent: Cotangent) -> Tensor:
    """An entry of a cotangent without the NaN of roots at zero."""
    g = gradients.get(_parameter_of(name, key))
    if name.startswith(_READ) or g is None or g.shape != value.shape:
        return value
    lost = value.isnan() & (g == 0)
    through = cotangent.parameters.get(key) if name == "w" else None
    if through is None:
        return value.masked_fill(lost, 0.0)
    return torch.where(lost, through, value)


def _without_idle(cotangent: Cotangent, gradients: Tree) -> Cotangent:
    """Zeros where the gradient is exactly zero."""

    def cut(name: str, tree: Tree) -> Tree:
        pairs = {
            key: (value, gradients.get(_parameter_of(name, key))) for key, value in tree.items()
        }
        return {
            key: value if g is None or g.shape != value.shape else value.masked_fill(g == 0, 0.0)
            for key, (value, g) in pairs.items()
        }

    return Cotangent(cut("w", cotangent.parameters), cut("s", cotangent.state))


def push_forward(
    update: Update,
    before: Iterate,
    gradients: Tree,
    values: Values,
    reads: tuple[str, ...],
    tangents: list[Tangent],
) -> list[Cotangent]:
    """The tangents behind an update, from those before it and of its gradient.

    By the vjp of the vjp, which is linear in its cotangent, so that one graph serves every
    tangent. Entries that are not finite at a gradient of exactly zero are zero.
    """
    with torch.enable_grad():
        leaves, outputs = _follow(update, before, gradients, values, reads)
        moved = {name: t for name, t in outputs.items() if t.requires_grad}
        duals = {name: torch.zeros_like(t, requires_grad=True) for name, t in moved.items()}
        pulled = gradient(
            list(moved.values()), leaves.inputs, list(duals.values()), create_graph=True
        )
        found: list[Cotangent] = []
        for tangent in tangents:
            along = tangent.entries()
            pairs = [(t, along[name]) for name, t in pulled.items() if name in along]
            pairs = [(t, a) for t, a in pairs if t.requires_grad]
            pushed = (
                gradient([t for t, _ in pairs], duals, [a for _, a in pairs], retain_graph=True)
                if pairs
                else {}
            )
            trees: dict[str, Tree] = {"w": {}, "s": {}}
            for (name, key), value in pushed.items():
                incoming = Cotangent(tangent.parameters)
                trees[name][key] = _mended(value, name, key, gradients, incoming)
            found.append(Cotangent(trees["w"], trees["s"]))
    return found
