"""The exact products as whole compiled functions: (values, batch, direction) -> products.

A compiled function has no second derivative, so both derivatives are taken inside of what is
compiled: ``vjp(grad(C))``, whose value the compiler drops, with all that the wanted parameters
do not touch. No graph is kept between products; each one begins with the loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from mlodeco.calculus.point import LowerProblem, Point
from mlodeco.calculus.products.automatic import is_out_of_memory
from mlodeco.calculus.products.first_order import first_gradient
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import StatelessLoss, frozen
from mlodeco.errors import FallbackWarning
from mlodeco.tree import Tree, add, fill, norm

COMPILED_PRODUCTS = ("auto", "reverse", "reverse_over_forward")
"""The modes that give ``(dg/dw)^T v`` exactly, which compiled products are."""

_OPTIONS = {"fallback_random": True, "emulate_precision_casts": True}
"""Inductor's: the random numbers and the roundings of half precision that there are without it."""

_HALF = (torch.float16, torch.bfloat16)


class _Pull(Protocol):
    def __call__(
        self, wanted: Cross, held: Cross, rest: State, items: Mapping[str, Any], v: Tree
    ) -> Cross:
        """``(dg/dwanted)^T v`` for one micro-batch.

        Args:
            wanted: for each level whose products are wanted, its parameters.
            held: those of the other levels.
            rest: tensors for the slots that belong to none of these levels.
            items: the arguments of the level's function that are not modules.
            v: the direction, with all the level's own parameters.
        """


class Compiler:
    """The compiled functions of one level, for all hypergradients of a run.

    Each graph that is compiled gives its first products beside those it stands for. If it cannot
    be compiled whole or these differ, a warning says so once and the level is not compiled.

    Args:
        backend: the name of one of ``torch.compile``.

    Attributes:
        graphs: how many graphs were compiled.
        refusal: why the level is not compiled; None as long as it is.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._functions: dict[Any, _Pull] = {}
        self._checked = 0
        self.graphs = 0
        self.refusal: str | None = None

    def function(self, point: Point, wanted: tuple[str, ...]) -> _Pull:
        """The products of the loss of ``point`` in the levels wanted, compiled at its first call.

        A part of a batch has a function of its own: one of both would take its size as a variable.
        """
        key = wanted, point.fraction
        if key not in self._functions:
            # torch's overloads lack isolate_recompiles: without it levels share one limit
            self._functions[key] = torch.compile(  # type: ignore[call-overload]
                _pull_of(point), fullgraph=True, backend=self._compile, isolate_recompiles=True
            )
        return self._functions[key]

    def checked(
        self, point: Point, compiled: Callable[[], Cross], plain: Callable[[], Cross]
    ) -> Cross:
        """The compiled products where they can be had, else the plain ones.

        A user's own error is raised by the plain ones, as it would be without compiling.
        """
        refusal = self.refusal or _obstacle(point)
        found: Cross = {}
        if refusal is None:
            try:
                found = compiled()
            except Exception as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                refusal = _in_short(error)
        if refusal is None and self._checked == self.graphs:
            return found
        expected = plain()
        if refusal is None:
            refusal = self._compare(found, expected)
        if refusal is not None and self.refusal is None:
            self._refuse(point.loss, refusal)
        return expected

    def _compare(self, found: Cross, expected: Cross) -> str | None:
        """Why the products found are not those expected; zeros and infinities show nothing."""
        sizes = [norm(tree) for tree in expected.values()]
        if not any(sizes) or not all(map(isfinite, sizes)):
            return None
        for (name, tree), size in zip(expected.items(), sizes, strict=True):
            error = norm(add(found[name], tree, -1.0))
            is_half = any(t.dtype in _HALF for t in tree.values())
            if not error <= (2e-2 if is_half else 1e-5) * size:
                return f"its products in {name!r} differ by {error / size if size else error:.1e}"
        self._checked = self.graphs
        return None

    def _refuse(self, loss: StatelessLoss, refusal: str) -> None:
        self.refusal = refusal
        self._functions.clear()
        warnings.warn(
            f"level {loss.level!r} ({loss.site}): its products are not compiled: {refusal}.",
            FallbackWarning,
            stacklevel=2,
        )

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        compiled: Callable[..., Any]
        if self._backend == "inductor":
            compiled = torch._inductor.compile(graph, inputs, options=_OPTIONS)
            return compiled
        return torch._dynamo.lookup_backend(self._backend)(graph, inputs)


class CompiledProducts:
    """Compiled products in place of others; both signatures, as those have them.

    Args:
        problem: the loss, its point and the targets.
        compiler: that of its level.
        plain: what gives the products where these cannot be compiled.
    """

    def __init__(self, problem: LowerProblem, compiler: Compiler, plain: Any) -> None:
        self._problem = problem
        self._compiler = compiler
        self._plain: Any = plain

    def touched(self) -> tuple[str, ...]:
        """Found by one gradient: a loss may take another branch than at another point."""
        return tuple(first_gradient(self._problem))

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """One call of the function for w."""
        level = self._problem.level
        found = self._products((level,), v, lambda: {level: self._plain.hvp(v)})
        return fill(found[level], v)

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """One call of the function for lambda."""
        return self._products(self._problem.targets, v, lambda: self._plain.cross(v))

    def gradient(self) -> Tree:
        """One gradient in w."""
        return first_gradient(self._problem)

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """One call of the function for both."""
        level = self._problem.level

        def plain() -> Cross:
            curved, cross = self._plain.pull_back(v, own=own)
            return {**cross, level: curved} if own else cross

        targets = self._problem.targets
        found = self._products((*targets, level) if own else targets, v, plain)
        return found.pop(level, {}), found

    def _products(
        self, wanted: tuple[str, ...], v: Mapping[str, Tensor], plain: Callable[[], Cross]
    ) -> Cross:
        if not wanted:
            return {}
        problem, point = self._problem, self._problem.point
        share = 1.0 / len(point.batches)

        def differentiate() -> Cross:
            function = self._compiler.function(point, wanted)
            moved = {name: self._values[name] for name in wanted}
            held = {name: tree for name, tree in self._values.items() if name not in moved}
            direction = fill(frozen(v), problem.parameters)
            result: Cross = {name: {} for name in wanted}
            with _compiling():
                for number, items in enumerate(point.batches):
                    point.begin_streams(number)
                    for name, tree in function(moved, held, self._rest, items, direction).items():
                        result[name] = add(result[name], tree, share)
            return result

        return self._compiler.checked(point, lambda: point.loss.within({}, differentiate), plain)

    @cached_property
    def _values(self) -> Cross:
        return {name: frozen(tree) for name, tree in self._problem.point.values.items()}

    @cached_property
    def _rest(self) -> State:
        places = _places(self._problem.point)
        state = self._problem.point.state({})
        return {key: tensor for key, tensor in state.items() if key not in places}


@contextmanager
def _compiling() -> Iterator[None]:
    """Undoes that the sweep has compiled modules run as written.

    Saved-tensor hooks are off under ``torch.func`` in any case, and a trace that fails would leave
    them so.
    """
    with (
        torch.compiler.set_stance("default"),
        torch.autograd.graph.disable_saved_tensors_hooks("torch.func does not see them"),
    ):
        yield


class _Called(nn.Module):
    """A level's loss as a module, with the slots of its own."""

    def __init__(self, loss: StatelessLoss) -> None:
        super().__init__()
        self.slots = loss.module
        self._loss = loss

    def forward(self, items: Mapping[str, Any]) -> Tensor:
        return self._loss.call(items)[0]


def _pull_of(point: Point) -> _Pull:
    loss = point.loss
    called, level, places = _Called(loss), loss.level, _places(point)
    buffers = frozenset(slot.key for slot in loss.buffers)

    def pull(wanted: Cross, held: Cross, rest: State, items: Mapping[str, Any], v: Tree) -> Cross:
        def slope(wanted: Cross) -> Tree:
            values = {**held, **wanted}

            def scalar(own: Tree) -> Tensor:
                trees = {**values, level: own}
                state = {f"slots.{key}": trees[name][own_] for key, (name, own_) in places.items()}
                for key, tensor in rest.items():
                    # a copy inside of the derivatives, which a pass may update
                    state[f"slots.{key}"] = tensor.clone() if key in buffers else tensor
                result: Tensor = functional_call(called, state, (items,), tie_weights=False)
                return result

            gradient: Tree = grad(scalar)(values[level])
            return gradient

        found: Cross = vjp(slope, wanted)[1](v)[0]
        return found

    return pull


def _places(point: Point) -> dict[str, tuple[str, str]]:
    """For each slot that holds a parameter of a level, the level and its name there."""
    return {
        slot.key: slot.owner
        for slot in point.loss.slots_of(frozenset(point.values))
        if slot.owner is not None and slot.owner[1] in point.values[slot.owner[0]]
    }


def _obstacle(point: Point) -> str | None:
    """What is known to be in the way of compiling, before it is tried."""
    if point.copies is not None:
        return "it sees replicas"
    if point.loss.has_backward_hooks:
        return "a module has backward hooks"
    for name, value in (pair for items in point.batches for pair in items.items()):
        kind = _foreign(value)
        if kind is not None:
            return f"{name!r} holds {kind}, which is neither a tensor nor a number"
    return None


def _foreign(value: Any) -> str | None:
    """The name of a type that may change in ways that a compiler does not see."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return None
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(value):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        return type(value).__name__
    return next((kind for kind in map(_foreign, parts) if kind is not None), None)


def _in_short(error: Exception) -> str:
    """What an error of the compiler says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("raised:"):  # the name of the backend, and then the error
        lines = lines[1:]
    text = lines[0].rstrip(".") if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:160]}..."
