"""One step of a torch optimizer as a function: the optimizer's own class makes it, on copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from mlodeco.calculus.clipping import clip_rows
from mlodeco.calculus.interception import Interception
from mlodeco.calculus.tuning import Tuning
from mlodeco.calculus.update import SEPARATOR, Iterate, Values
from mlodeco.errors import OptimizerError
from mlodeco.tree import Tree

_PLAIN = {"differentiable": True, "foreach": False, "fused": None, "capturable": False}
"""The form of a step that autograd can follow."""

_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})
"""What optimizers keep beside moments: numbers that depend on the count of steps alone."""

_LEFT_OUT_AT_ZERO = frozenset({"momentum", "weight_decay"})
"""Options that a step does not look at where they are zero."""


@dataclass(frozen=True)
class Group:
    """Parameters with the same options, by their names."""

    keys: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class OptimizerStep:
    """A step of an optimizer, read off it: ``(w', s') = U(w, g, s)``.

    Every optimizer with a ``differentiable`` option can be differentiated, with its groups,
    state, clipping and learning rate as they are. The state is, for each parameter's name,
    what the optimizer keeps for it.

    Attributes:
        level: the level that it steps.
        site: where the level's function stands.
        kind: the optimizer's class.
        groups: its groups.
        clip_norm: the largest norm of the gradient; None for no clipping.
        tuning: options computed from levels above; None for none.
        replicas: of how many replicas the parameters are stacked; None if they are not. Each is
            stepped as by an optimizer of its own, since every entry is.
    """

    level: str
    site: str
    kind: type[Optimizer]
    groups: tuple[Group, ...]
    clip_norm: float | None = None
    tuning: Tuning | None = None
    replicas: int | None = None
    is_wide: ClassVar[bool] = True

    @property
    def reads(self) -> tuple[str, ...]:
        """The levels from which its options are computed."""
        return self.tuning.reads if self.tuning else ()

    @property
    def rests_at_zero(self) -> bool:
        """Whether it is SGD with neither momentum nor weight decay."""
        options = [group.options for group in self.groups]
        is_plain = all(not o.get("momentum") and not o.get("weight_decay") for o in options)
        return self.kind is SGD and is_plain and self.tuning is None

    def advance(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The step as a run makes it, bit for bit; parameters without a gradient stay."""
        clipped = clip_rows(gradients, self.clip_norm, self.replicas)
        with torch.no_grad():
            tuned = self.tuning.numbers(values) if self.tuning else {}
        copies = {key: before.parameters[key].detach().clone() for key in self._stepped(clipped)}
        state = {key: _cloned(before.state.get(key, {})) for key in copies}
        groups: list[dict[str, Any]] = []
        for group in self.groups:
            members = [copies[key] for key in group.keys if key in copies]
            if members:
                groups.append({**group.options, **tuned, "params": members})
        for key, copy in copies.items():
            copy.grad = clipped[key]
        after = self._step(groups, {copies[key]: known for key, known in state.items() if known})
        moved = {key: after[copy] for key, copy in copies.items() if copy in after}
        return Iterate({**before.parameters, **copies}, {**before.state, **moved})

    def apply(self, before: Iterate, gradients: Tree, values: Values) -> Iterate:
        """The step with its graph, in parameters, gradients, moments and tuned options.

        Raises:
            OptimizerError: the optimizer's step cannot be differentiated.
        """
        self.require_differentiable()
        tuned = self._tuned(values)
        copies = {key: before.parameters[key].clone() for key in self._stepped(gradients)}
        resting = frozenset[str]() if "lr" in tuned else self._at_rest
        clones = {key: copy.grad_fn for key, copy in copies.items()}
        groups: list[dict[str, Any]] = []
        state: dict[Tensor, dict[str, Any]] = {}
        for group in self.groups:
            plain = {name: value for name, value in _PLAIN.items() if name in group.options}
            members = [key for key in group.keys if key in copies]
            for key in members:
                copy, g = copies[key], gradients[key]
                copy.grad = g.clone() if tuned else g  # a tuned weight decay is added in place
                if key in before.state:
                    state[copy] = _widened(before.state[key])
            options = {**group.options, **tuned, **plain}
            if not resting.isdisjoint(members):
                options["lr"] = 1.0  # for the state; the parameters stay
            new = self._without_momentum(options, members, before.state)
            for key in new:
                # torch takes the first gradient as the buffer, detached: the same from zeros
                state[copies[key]] = {"momentum_buffer": torch.zeros_like(copies[key])}
            groups.append({**options, "dampening": 0.0, "params": [copies[key] for key in new]})
            known = [copies[key] for key in members if key not in new]
            groups.append({**options, "params": known})
        groups = [group for group in groups if group["params"]]
        after = self._step(groups, state)
        if any(clones.values()) and all(copies[key].grad_fn is f for key, f in clones.items()):
            raise self._refusal("its step does not depend on the gradients, as under no_grad")
        moved = {key: after[copy] for key, copy in copies.items() if copy in after}
        stayed = {key: before.parameters[key] for key in resting}
        return Iterate({**before.parameters, **copies, **stayed}, {**before.state, **moved})

    def carried(self, state: Mapping[str, Any]) -> Tree:
        """The moments: floating point tensors other than counts of steps."""
        return {
            f"{key}{SEPARATOR}{name}": value
            for key, known in state.items()
            for name, value in known.items()
            if isinstance(value, Tensor) and value.is_floating_point() and name not in _COUNTERS
        }

    def with_carried(self, state: Mapping[str, Any], carried: Tree) -> Mapping[str, Any]:
        """The state with other moments."""
        return {
            key: {name: carried.get(f"{key}{SEPARATOR}{name}", v) for name, v in known.items()}
            for key, known in state.items()
        }

    def _tuned(self, values: Values) -> dict[str, Any]:
        """The tuned options as tensors.

        Raises:
            OptimizerError: one is where torch leaves it out, so that it would have no derivative.
        """
        tuned = self.tuning.tensors(values) if self.tuning else {}
        for name, value in tuned.items():
            is_lost = name in _LEFT_OUT_AT_ZERO or (name == "lr" and issubclass(self.kind, Adam))
            if is_lost and isinstance(value, Tensor) and float(value.detach()) == 0.0:
                raise OptimizerError(
                    f"tune={{{name!r}: ...}} is 0, where {self.kind.__name__} has no derivative "
                    "in it.",
                    expected="a number above 0.",
                    remedy=f"start from a small number: lambda hyper: hyper.log_{name}.exp().",
                    level=self.level,
                    site=self.site,
                )
        return tuned

    def _stepped(self, gradients: Tree) -> Iterable[str]:
        return [key for group in self.groups for key in group.keys if key in gradients]

    def _without_momentum(
        self, options: Mapping[str, Any], keys: list[str], state: Mapping[str, Any]
    ) -> list[str]:
        """The parameters of a group of SGD whose momentum begins with this step."""
        if not issubclass(self.kind, SGD) or not options["momentum"]:
            return []
        return [key for key in keys if state.get(key, {}).get("momentum_buffer") is None]

    @property
    def _at_rest(self) -> frozenset[str]:
        """Parameters at a learning rate of zero, where an optimizer divides by it."""
        rates = self.groups if issubclass(self.kind, Adam) else ()
        return frozenset(
            key
            for group in rates
            if not isinstance(group.options["lr"], Tensor) and group.options["lr"] == 0.0
            for key in group.keys
        )

    def _step(
        self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]
    ) -> Mapping[Tensor, dict[str, Any]]:
        """Steps a fresh optimizer; one copied whole may be bound to the real parameters."""
        known = _State(state)
        if not groups:
            return known
        fresh: Any = self.kind.__new__(self.kind)
        # the gradient mode of the step is read from the defaults
        fresh.__setstate__({"defaults": dict(groups[0]), "param_groups": groups, "state": known})
        is_differentiable = bool(groups[0].get("differentiable"))
        is_new = any(not known.get(p) for group in groups for p in group["params"])
        try:
            with ExitStack() as stack:
                if is_differentiable and is_new and not issubclass(self.kind, SGD):
                    stack.enter_context(_WideScalars())
                if is_differentiable and self.tuning and not issubclass(self.kind, SGD):
                    stack.enter_context(_SafeRoots())
                self.kind.step(fresh)
        except Exception as error:
            if is_differentiable:
                raise self._refusal(f"its step fails on copies: {error}") from error
            raise
        return known

    def require_differentiable(self) -> None:
        """Refuses an optimizer whose step autograd cannot follow.

        Raises:
            OptimizerError: it is one.
        """
        options = self.groups[0].options if self.groups else {}
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


class _SafeRoots(Interception):
    """Square roots with derivative 0 at 0.

    Where a gradient has always been zero, so is the mean of its squares in Adam and its kin, whose
    root has no derivative there: autograd makes NaN of it, and so of a tuned option, into which
    all entries are summed.
    """

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func is not Tensor.sqrt:
            return func(*args, **kwargs)
        zero = args[0] == 0.0
        return args[0].masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def _cloned(known: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state in tensors of its own."""
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in known.items()
    }


def _widened(known: Mapping[str, Any]) -> dict[str, Any]:
    """The same with its graph, counts in double precision."""
    return {
        name: _widened_value(value, name) if isinstance(value, Tensor) else value
        for name, value in known.items()
    }


def _widened_value(value: Tensor, name: str) -> Tensor:
    copy = value.clone()
    return copy.double() if name in _COUNTERS and copy.is_floating_point() else copy
