"""What a loss depends on, read off its autograd graph, and whether it keeps to its task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mlodeco.calculus.autograd_graph import walk_graph
from mlodeco.calculus.interception import Interception
from mlodeco.calculus.point import Point
from mlodeco.calculus.randomness import preserved_randomness
from mlodeco.calculus.stateless import live
from mlodeco.errors import LossError


@dataclass(frozen=True)
class Dependence:
    """The levels whose parameters a loss depends on.

    Attributes:
        declared: those whose values the loss was given.
        captured: those of them whose real parameters it reached past its modules, such as
            by a list of tensors made outside the function.
        undeclared: others, whose real parameters it reached by a closure or a global.
        touched: the level's own parameters that it depends on.
    """

    declared: frozenset[str]
    captured: frozenset[str]
    undeclared: frozenset[str]
    touched: frozenset[str]


def find_dependence(point: Point, parameters: Mapping[str, Sequence[Tensor]]) -> Dependence:
    """Evaluates a loss once and walks its graph down to the leaves.

    Args:
        point: the loss and where to evaluate it.
        parameters: the real parameters of every level of the program.

    Raises:
        LossError: the function calls ``.backward()``, steps an optimizer, or changes its
            batch or parameters in place.
    """
    values = {level: live(tree) for level, tree in point.values.items()}
    copies = {id(t): level for level, tree in values.items() for t in tree.values()}
    real = {id(t): level for level, tensors in parameters.items() for t in tensors}
    loss = point.loss
    watched = (
        ("its batch", "use x = x * 0.5, not x.mul_(0.5).", _Watch(_tensors_in(point.batches[0]))),
        (
            "the parameters of its modules",
            "return a loss alone; change parameters in a hook, such as @on('after_step').",
            _Watch(loss.tensors()),
        ),
    )

    def evaluate() -> set[int]:
        with _KeepsToItsTask(loss.level, loss.site):
            value, _ = next(point.losses())
        found = _leaves(value.grad_fn)
        return found if loss.shards is None else loss.shards.reached(value, found)

    with preserved_randomness():
        reached = loss.within(point.state(values), evaluate)
    for what, remedy, watch in watched:
        if watch.has_changed():
            raise _refusal(loss.level, loss.site, f"changes {what} in place", remedy)
    declared = frozenset(copies[leaf] for leaf in reached if leaf in copies)
    others = frozenset(real[leaf] for leaf in reached if leaf in real)
    own = values.get(loss.level, {})
    touched = frozenset(key for key, tensor in own.items() if id(tensor) in reached)
    return Dependence(declared, others & set(values), others - set(values), touched)


class _Watch:
    """Notices writes to tensors, by their version counters."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._versions = [(t, t._version) for t in tensors if not t.is_inference()]

    def has_changed(self) -> bool:
        return any(t._version != version for t, version in self._versions)


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(part, depth - 1)


def _leaves(root: Any) -> set[int]:
    variables = (getattr(node, "variable", None) for node in walk_graph([root]))
    return {id(variable) for variable in variables if variable is not None}


class _KeepsToItsTask(Interception):
    """Refuses ``.backward()`` and optimizer steps inside a loss function."""

    def __init__(self, level: str, site: str) -> None:
        super().__init__()
        self._level = level
        self._site = site

    def __enter__(self) -> _KeepsToItsTask:
        self._hook = register_optimizer_step_pre_hook(self._refuse_step)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def intercept(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in (torch.Tensor.backward, torch.autograd.backward):
            raise self._error("calls .backward()")
        return func(*args, **kwargs)

    def _refuse_step(self, *_: Any) -> None:
        raise self._error("steps an optimizer")

    def _error(self, what: str) -> LossError:
        remedy = "return the loss; gradients and optimizer steps are the library's part."
        return _refusal(self._level, self._site, what, remedy)


def _refusal(level: str, site: str, what: str, remedy: str) -> LossError:
    return LossError(
        f"the function {what}.",
        expected="a function that computes a loss and returns it.",
        remedy=remedy,
        level=level,
        site=site,
    )
