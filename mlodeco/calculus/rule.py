"""A user's own update rule in place of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlodeco.calculus.clipping import clip
from mlodeco.calculus.copies import row
from mlodeco.calculus.randomness import RecordedStreams
from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.calculus.update import Iterate, Values
from mlodeco.errors import OptimizerError, quoted
from mlodeco.tree import Tree, fill


@dataclass(frozen=True)
class Rule:
    """``(w', s') = rule(w, g, s)``, with the modules of the levels that it reads.

    Attributes:
        function: the rule, at its own place; its items are those of "params", "grads" and
            "state" that it takes.
        takes: these.
        clip_norm: the largest norm of the gradient; None for no clipping.
        streams: the random numbers that it draws from; None for those at hand.
    """

    function: StatelessLoss
    takes: tuple[str, ...]
    clip_norm: float | None = None
    streams: RecordedStreams | None = None
    replicas: None = None
    rests_at_zero: ClassVar[bool] = True
    """It is given zeros for gradients that there are not."""
    is_wide: ClassVar[bool] = False
    """It may mix what it is given with modules, of one dtype."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels whose parameters the rule sees."""
        return tuple(level for level in self.function.sees if level != self.function.level)

    @property
    def unclipped(self) -> Rule:
        """The rule for gradients that are clipped already."""
        return replace(self, clip_norm=None)

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The rule without a graph, on copies.

        Raises:
            OptimizerError: it returned something else than parameters and a state.
        """
        with torch.no_grad():
            found = self._call(before, clip(gradients, self.clip_norm), values)
        # copies: a state may be made of the parameters that the rule reads, which will move
        state: Any = _mapped(found.state, "", lambda _, tensor: tensor.detach().clone())
        return Iterate({key: t.detach() for key, t in found.parameters.items()}, state)

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The rule with its graph.

        Raises:
            OptimizerError: it returned something else than parameters and a state.
        """
        found = self._call(before, gradients, values)
        inputs = before.parameters.values()
        if any(t.requires_grad for t in inputs) and not any(
            t.requires_grad for t in found.parameters.values()
        ):
            raise self._refusal(
                "returned parameters without a graph, as under torch.no_grad() or by .detach()"
            )
        return found

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The floating point tensors in the state, by their paths."""
        found: Tree = {}

        def keep(path: str, tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                found[path] = tensor
            return tensor

        _mapped(state, "", keep)
        return found

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The state with other tensors at these paths."""
        result: Any = _mapped(state, "", lambda path, tensor: carried.get(path, tensor))
        return dict(result)

    def _call(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        grads = fill(gradients, before.parameters)
        offered: dict[str, Any] = {
            "params": {key: t.clone() for key, t in before.parameters.items()},
            "grads": {key: t.clone() for key, t in grads.items()},
            "state": _mapped(before.state, "", lambda _, tensor: tensor.clone()),
        }
        items = {name: offered[name] for name in self.takes}
        state = self.function.state({level: values[level] for level in self.reads})
        if self.streams is not None:
            self.streams.restore()
        try:
            returned = self.function.within(state, lambda: self.function.module.forward(items))
        except Exception as error:
            where = f"level {self.function.level!r} ({self.function.site})"
            error.add_note(f"raised in the update rule of {where}")
            raise
        return self._checked(returned, before)

    def _checked(self, returned: Any, before: Iterate) -> Iterate:
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise self._refusal(f"returned {type(returned).__name__}")
        parameters, state = returned
        if not isinstance(parameters, Mapping) or not isinstance(state, Mapping):
            kinds = f"({type(parameters).__name__}, {type(state).__name__})"
            raise self._refusal(f"returned {kinds}")
        for key, value in before.parameters.items():
            found = parameters.get(key)
            if not isinstance(found, Tensor):
                raise self._refusal(f"returned {type(found).__name__} for {key!r}")
            if not found.is_floating_point():
                raise self._refusal(f"returned {found.dtype} for {key!r}, of {value.dtype}")
            if found.shape != value.shape:
                shapes = f"{tuple(found.shape)} for {key!r}, of shape {tuple(value.shape)}"
                raise self._refusal(f"returned {shapes}")
        unknown = [key for key in parameters if key not in before.parameters]
        if unknown:
            raise self._refusal(f"returned parameters {quoted(map(str, unknown))}")
        moved = {key: parameters[key].to(value) for key, value in before.parameters.items()}
        return Iterate(moved, dict(state))

    def _refusal(self, what: str) -> OptimizerError:
        return OptimizerError(
            f"the update rule {what}.",
            expected="(params, state): a dictionary with a tensor for each parameter, and a "
            "dictionary for the next step, such as {}.",
            remedy="return new_params, state from the function.",
            level=self.function.level,
            site=self.function.site,
        )


def _mapped(value: Any, path: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    """The same containers with other tensors."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, f"{path}[{key!r}]", change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [_mapped(part, f"{path}[{n}]", change) for n, part in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


@dataclass(frozen=True)
class RuleOfEach:
    """A rule for each replica by itself.

    For a replicated level each of its replicas has a state of its own. For one that reads a
    replicated level the rule is called with each replica's parameters, and what it returns is
    averaged.

    Attributes:
        rule: the rule.
        count: how many replicas there are.
        levels: those whose parameters are stacked.
    """

    rule: Rule
    count: int
    levels: frozenset[str]
    rests_at_zero: ClassVar[bool] = True
    is_wide: ClassVar[bool] = False

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels whose parameters the rule sees."""
        return self.rule.reads

    @property
    def clip_norm(self) -> float | None:
        """The largest norm of the gradient, of each replica's by itself."""
        return self.rule.clip_norm

    @property
    def unclipped(self) -> RuleOfEach:
        """The rule for gradients that are clipped already."""
        return replace(self, rule=self.rule.unclipped)

    @property
    def replicas(self) -> int | None:
        """Of how many replicas the level's own parameters are stacked."""
        return self.count if self.is_own else None

    @property
    def is_own(self) -> bool:
        """Whether the level itself is replicated."""
        return self.rule.function.level in self.levels

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The rule without a graph, on copies."""
        return self._joined(
            [
                self.rule.advance(*self._arguments(before, gradients, values, r))
                for r in range(self.count)
            ],
            before,
        )

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The rule with its graph."""
        return self._joined(
            [
                self.rule.apply(*self._arguments(before, gradients, values, r))
                for r in range(self.count)
            ],
            before,
        )

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The floating point tensors in the states, by their paths."""
        return self.rule.carried(state)

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The states with other tensors at these paths."""
        return self.rule.with_carried(state, carried)

    def state_of(self, state: Mapping[str, Any], replica: int) -> Mapping[str, Any]:
        """The state of one replica."""
        found: Mapping[str, Any] = state.get(str(replica), {}) if self.is_own else state
        return found

    def _arguments(
        self, before: Iterate, gradients: Tree, values: Values, replica: int
    ) -> tuple[Iterate, Tree, Values]:
        rows = {
            level: row(tree, replica) if level in self.levels else tree
            for level, tree in values.items()
        }
        if not self.is_own:
            return before, gradients, rows
        state = self.state_of(before.state, replica)
        return Iterate(row(before.parameters, replica), state), row(gradients, replica), rows

    def _joined(self, found: list[Iterate], before: Iterate) -> Iterate:
        parameters = {
            key: torch.stack([one.parameters[key] for one in found]) for key in before.parameters
        }
        if self.is_own:
            return Iterate(parameters, {str(r): one.state for r, one in enumerate(found)})
        carried = [self.rule.carried(one.state) for one in found]
        means = {
            path: torch.stack([tree[path] for tree in carried]).mean(0)
            for path in carried[-1]
            if all(path in tree for tree in carried)
        }
        state = self.rule.with_carried(found[-1].state, means)
        return Iterate({key: value.mean(0) for key, value in parameters.items()}, state)
