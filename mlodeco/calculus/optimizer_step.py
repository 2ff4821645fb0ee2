"""One step of a torch optimizer as a differentiable function of the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer, Rprop

from mlodeco.calculus.interception import Interception
from mlodeco.calculus.stateless import gradient, live
from mlodeco.errors import OptimizerError, SolverWarning
from mlodeco.tree import Tree

_PLAIN = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}
"""The form of a step that autograd can follow."""

_CLIP_EPS = 1e-6
"""As in ``torch.nn.utils.clip_grad_norm_``."""


@dataclass(frozen=True)
class OptimizerStep:
    """The next step of an optimizer, read off it: ``w' = U(w, g)`` at its present state.

    The optimizer's own class makes the step, differentiably and on copies: every optimizer
    with a ``differentiable`` option works, with its groups, state, clipping and learning rate
    as they are.

    Attributes:
        level: the level that it steps.
        site: where the level's function stands.
        kind: the optimizer's class.
        options: for each parameter's name the options of its group.
        state: for each parameter's name its state, where there is some.
        clip_norm: the largest norm of the gradient; None for no clipping.
    """

    level: str
    site: str
    kind: type[Optimizer]
    options: Mapping[str, Mapping[str, Any]]
    state: Mapping[str, Mapping[str, Any]]
    clip_norm: float | None = None

    def apply(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tree:
        """``U(w, g)`` for the parameters that have a gradient.

        Raises:
            OptimizerError: the optimizer's step cannot be differentiated.
        """
        self._require_differentiable()
        clipped = self._clip(gradients)
        copies = {key: parameters[key].detach().clone() for key in self.options if key in clipped}
        groups: list[dict[str, Any]] = []
        state: dict[Tensor, dict[str, Any]] = {}
        for key, copy in copies.items():
            copy.grad = clipped[key]
            group = {**self.options[key], "params": [copy]}
            group.update({name: value for name, value in _PLAIN.items() if name in group})
            known = {name: _copied(value) for name, value in self.state.get(key, {}).items()}
            if issubclass(self.kind, SGD) and known.get("momentum_buffer") is None:
                # torch takes the first gradient as the buffer, detached: the same from zeros
                known["momentum_buffer"] = torch.zeros_like(copy)
                group["dampening"] = 0
            if known:
                state[copy] = known
            groups.append(group)
        if groups:
            self._step(groups, state)
        return copies

    def pull_back(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        cotangent: Mapping[str, Tensor],
    ) -> Tree:
        """``(dU/dg)^T cotangent`` at the gradients given.

        Zero where a gradient is exactly zero and the step has no derivative there, as
        Adam's square root.

        Raises:
            OptimizerError: the optimizer's step cannot be differentiated.
        """
        if issubclass(self.kind, Rprop):
            warnings.warn(
                f"level {self.level!r} ({self.site}): Rprop steps by the sign of the gradient, so "
                "that the derivative of its step is zero. Remedy: use another optimizer, or a "
                "method that does not differentiate the step.",
                SolverWarning,
                stacklevel=2,
            )
        leaves = live(gradients)
        with torch.enable_grad():
            after = self.apply(parameters, leaves)
            if after and not any(value.requires_grad for value in after.values()):
                raise self._refusal("its step does not depend on the gradients, as under no_grad")
            moved = [key for key in after if key in cotangent and after[key].requires_grad]
            if not moved:
                return {}
            found = gradient([after[k] for k in moved], leaves, [cotangent[k] for k in moved])
        return {
            key: value.masked_fill(value.isnan() & (leaves[key] == 0), 0.0)
            for key, value in found.items()
        }

    def _clip(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.clip_norm is None or not gradients:
            return gradients
        sizes = [torch.linalg.vector_norm(value) for value in gradients.values()]
        size = torch.linalg.vector_norm(torch.stack(sizes))
        if float(size.detach()) <= self.clip_norm:
            return gradients
        return {
            key: value * (self.clip_norm / (size + _CLIP_EPS)) for key, value in gradients.items()
        }

    def _step(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Steps a fresh optimizer; one copied whole may be bound to the real parameters."""
        fresh: Any = self.kind.__new__(self.kind)
        defaults = {**groups[0], "differentiable": True}
        fresh.__setstate__({"defaults": defaults, "param_groups": groups, "state": _State(state)})
        try:
            with _WideScalars():
                self.kind.step(fresh)
        except Exception as error:
            raise self._refusal(f"its step fails on copies: {error}") from error

    def _require_differentiable(self) -> None:
        options = next(iter(self.options.values()), {"differentiable": False})
        if "differentiable" not in options:
            raise self._refusal("it has no differentiable form")

    def _refusal(self, why: str) -> OptimizerError:
        return OptimizerError(
            f"the step of {self.kind.__name__} cannot be differentiated: {why}.",
            expected="an optimizer of torch with a differentiable option, such as SGD, Adam, "
            "AdamW, RMSprop, Adagrad, NAdam, RAdam, Adadelta, Adamax or ASGD.",
            remedy="use one of these for the level, or a method that does not ask for the "
            "optimizer, such as hypergrad='neumann' or 'identity'.",
            level=self.level,
            site=self.site,
        )


class _State(dict[Tensor, dict[str, Any]]):
    """The state of an optimizer: empty for a parameter that has none."""

    def __missing__(self, parameter: Tensor) -> dict[str, Any]:
        self[parameter] = {}
        return self[parameter]


class _WideScalars(Interception):
    """Makes the scalars of a fresh state in double precision.

    The undifferentiated step computes with Python's numbers; ``1 - 0.999 ** step`` in single
    precision is wrong by 1e-5.
    """

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        result = func(*args, **kwargs)
        is_new = not any(isinstance(arg, Tensor) for arg in args)
        if is_new and isinstance(result, Tensor) and result.dim() == 0:
            return result.double() if result.is_floating_point() else result
        return result


def _copied(value: Any) -> Any:
    """A copy of a state's entry, scalars in double precision."""
    if not isinstance(value, Tensor):
        return value
    copy = value.detach().clone()
    return copy.double() if copy.dim() == 0 and copy.is_floating_point() else copy
