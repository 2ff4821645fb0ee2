"""The derivatives of one update, in reverse and in forward mode: elementwise for optimizers.

Those of an optimizer's step on parameters in half precision are taken in single precision: a
cotangent that goes back over many steps would else lose what each of them adds.

Where a gradient is exactly zero, or its square is, a root in an update may have no derivative, and
autograd gives NaN or infinity: there derivatives in gradient and state are zero, and those in the
parameter one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlodeco.calculus.clipping import clip_rows_differentiably
from mlodeco.calculus.stateless import gradient, live
from mlodeco.calculus.update import SEPARATOR, Cotangent, Iterate, Pulled, Tangent, Update, Values
from mlodeco.tree import Tree, norm, widen

Entry = tuple[str, str]
"""The name of a tree, and that of a tensor in it."""

_READ = "read "


@dataclass(frozen=True)
class _Arguments:
    """The arguments of an update, the gradient clipped."""

    parameters: Tree
    gradients: Tree
    state: Tree
    reads: dict[str, Tree]

    def entries(self) -> dict[Entry, Tensor]:
        """Their tensors by tree and name."""
        trees = {"w": self.parameters, "g": self.gradients, "s": self.state}
        trees |= {_READ + level: tree for level, tree in self.reads.items()}
        return {(name, key): t for name, tree in trees.items() for key, t in tree.items()}


def _outputs(
    update: Update, before: Iterate, arguments: _Arguments, values: Values
) -> dict[Entry, Tensor]:
    """W' and s' under ("w", key) and ("s", key)."""
    start = Iterate(arguments.parameters, update.with_carried(before.state, arguments.state))
    after = update.apply(start, arguments.gradients, {**values, **arguments.reads})
    outputs = {("w", key): t for key, t in after.parameters.items()}
    return outputs | {("s", key): t for key, t in update.carried(after.state).items()}


def pull_back(
    update: Update,
    before: Iterate,
    gradients: Tree,
    values: Values,
    cotangent: Cotangent,
    reads: tuple[str, ...] = (),
) -> Pulled:
    """The cotangent before an update, from that behind it: one vjp.

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
        wide = widen if update.is_wide else dict
        leaves = live(wide(gradients))
        clipped = clip_rows_differentiably(leaves, update.clip_norm, update.replicas)
        arguments = _Arguments(
            live(wide(before.parameters)),
            live(clipped),
            live(wide(update.carried(before.state))),
            {level: live(values[level]) for level in reads},
        )
        outputs = _outputs(update, before, arguments, values)
        trees = _in_trees(
            _vjp(arguments.entries(), outputs, cotangent), gradients, cotangent.parameters
        )
        pulled = trees.get("g", {})
        if pulled and clipped is not leaves:
            pulled = gradient([clipped[key] for key in pulled], leaves, list(pulled.values()))
    return Pulled(
        Cotangent(widen(trees.get("w", {})), widen(trees.get("s", {}))),
        widen(pulled),
        {level: widen(trees.get(_READ + level, {})) for level in reads},
    )


def push_forward(
    update: Update,
    before: Iterate,
    gradients: Tree,
    values: Values,
    tangent: Tangent,
) -> Cotangent:
    """The tangent of the iterate behind an update, from that before it: by dual numbers.

    Args:
        update: the update.
        before: the iterate that it started from.
        gradients: its gradient.
        values: the parameters of the levels that the update reads.
        tangent: the direction in which all of these move.

    Raises:
        OptimizerError: the update cannot be differentiated.
    """
    wide = widen if update.is_wide else dict
    with torch.enable_grad(), forward_ad.dual_level():
        # live as well: optimizers take another way for options that require gradients
        arguments = _Arguments(
            _duals(wide(before.parameters), tangent.parameters),
            clip_rows_differentiably(
                _duals(wide(gradients), tangent.gradients), update.clip_norm, update.replicas
            ),
            _duals(wide(update.carried(before.state)), tangent.state),
            {level: _duals(values[level], tree) for level, tree in tangent.reads.items()},
        )
        outputs = _outputs(update, before, arguments, values)
        pushed = {name: forward_ad.unpack_dual(value).tangent for name, value in outputs.items()}
        found = {name: value.detach() for name, value in pushed.items() if value is not None}
        trees = _in_trees(found, gradients, tangent.parameters)
    return Cotangent(widen(trees.get("w", {})), widen(trees.get("s", {})))


def _duals(tree: Tree, tangent: Tree) -> Tree:
    return {
        key: forward_ad.make_dual(value, tangent[key].to(value.dtype)) if key in tangent else value
        for key, value in live(tree).items()
    }


def _vjp(
    inputs: Mapping[Entry, Tensor], outputs: Mapping[Entry, Tensor], cotangent: Cotangent
) -> dict[Entry, Tensor]:
    weights = {("w", key): t for key, t in cotangent.parameters.items()}
    weights |= {("s", key): t for key, t in cotangent.state.items()}
    moved = [name for name in outputs if name in weights and outputs[name].requires_grad]
    if not moved:
        return {}
    cotangents = [weights[name].to(outputs[name].dtype) for name in moved]
    return gradient([outputs[name] for name in moved], inputs, cotangents)


def _in_trees(found: Mapping[Entry, Tensor], gradients: Tree, through: Tree) -> dict[str, Tree]:
    """The entries by the names of their trees, without the NaN of roots at zero."""
    is_finite = isfinite(norm({str(entry): value for entry, value in found.items()}))
    trees: dict[str, Tree] = {}
    for entry, value in found.items():
        name, key = entry
        mended = value if is_finite else _mended(value, entry, gradients, through)
        trees.setdefault(name, {})[key] = mended
    return trees


def _gradient_of(entry: Entry, gradients: Tree, value: Tensor) -> Tensor | None:
    """The gradient of the parameter to which an entry belongs."""
    name, key = entry
    if name.startswith(_READ):
        return None
    g = gradients.get(key.partition(SEPARATOR)[0] if name == "s" else key)
    return g if g is not None and g.shape == value.shape else None


def _mended(value: Tensor, entry: Entry, gradients: Tree, through: Tree) -> Tensor:
    """An entry without the NaN of roots at zero; ``through`` passes the parameters by."""
    g = _gradient_of(entry, gradients, value)
    if g is None:
        return value
    # also where its square, a thousandth of which Adam keeps, underflows to zero
    lost = ~value.isfinite() & (g * g * 1e-6 == 0)
    name, key = entry
    if name == "w" and key in through:
        return torch.where(lost, through[key], value)
    return value.masked_fill(lost, 0.0)
