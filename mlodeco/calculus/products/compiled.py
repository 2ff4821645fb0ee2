"""The exact products by whole compiled functions.

A compiled function can be differentiated once, and so one derivative at least is taken inside of
what is compiled. For products in many directions that is the gradient, as a function of w and
lambda; its vjp is compiled with it, and what that needs is kept. A cross product alone is one
function of the direction too: of it the compiler drops all that lambda does not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from mlodeco.calculus.point import LowerProblem, Point
from mlodeco.calculus.products.compiler import Compiler, Numbers, many_directions
from mlodeco.calculus.products.first_order import first_gradient
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import StatelessLoss, frozen
from mlodeco.tree import Tree, add, fill, norm

COMPILED_PRODUCTS = ("auto", "reverse", "reverse_over_forward")
"""The modes that give ``(dg/dw)^T v`` exactly, which compiled products are."""

_HALF = {torch.float16, torch.bfloat16}

K = TypeVar("K")


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
        self._graph: _CompiledReverse | None = None

    def touched(self) -> tuple[str, ...]:
        """Known from an earlier run of the same graph, else found by one gradient."""
        return self._touched(with_targets=False)

    def hvp(self, v: Mapping[str, Tensor]) -> Tree:
        """One vjp of the compiled gradient in w."""
        level = self._problem.level

        def compiled() -> tuple[Numbers, Cross]:
            graph = self._opened(with_targets=False)
            return graph.numbers, {level: graph.hvp(v)}

        return self._products("hvp", compiled, lambda: {level: self._plain.hvp(v)})[level]

    def cross(self, v: Mapping[str, Tensor]) -> Cross:
        """One call of the compiled product; what Hessian products keep is freed first."""
        self._graph = None
        if not self._problem.targets:
            return {}
        return self._products(
            "cross",
            lambda: _cross(self._problem, self._compiler, v),
            lambda: self._plain.cross(v),
        )

    def gradient(self) -> Tree:
        """The compiled gradient in w."""
        level = self._problem.level

        def compiled() -> tuple[Numbers, Cross]:
            graph = self._opened(with_targets=True)
            return graph.numbers, {level: graph.gradient()}

        plain: Callable[[], Cross] = lambda: {level: first_gradient(self._problem)}  # noqa: E731
        found = self._products("gradient", compiled, plain)[level]
        return {key: found[key] for key in self._touched(with_targets=True)}

    def pull_back(self, v: Mapping[str, Tensor], *, own: bool = True) -> tuple[Tree, Cross]:
        """One vjp of the compiled gradient in w and lambda."""
        level = self._problem.level

        def compiled() -> tuple[Numbers, Cross]:
            graph = self._opened(with_targets=True)
            numbers = graph.numbers
            curved, cross = graph.pull_back(v, own=own)
            return numbers, {**cross, level: curved}

        def plain() -> Cross:
            curved, cross = self._plain.pull_back(v, own=own)
            return {**cross, level: curved}

        found = self._products(f"pull_back {own}", compiled, plain)
        return found.pop(level), found

    def _products(
        self, kind: str, compiled: Callable[[], tuple[Numbers, Cross]], plain: Callable[[], Cross]
    ) -> Cross:
        differ = partial(_difference, tolerance=_tolerance(self._problem))
        return self._compiler.answer(kind, self._problem.point, compiled, plain, differ)

    def _touched(self, *, with_targets: bool) -> tuple[str, ...]:
        known = self._compiler.touched

        def compiled() -> tuple[Numbers, tuple[str, ...]]:
            numbers = self._opened(with_targets=with_targets).numbers
            return numbers, known.get(numbers, ())

        def keep(_: tuple[str, ...], expected: tuple[str, ...]) -> str:
            known[compiled()[0]] = expected
            return ""

        return self._compiler.answer(
            "touched",
            self._problem.point,
            compiled,
            lambda: tuple(first_gradient(self._problem)),
            keep,
        )

    def _opened(self, *, with_targets: bool) -> _CompiledReverse:
        if self._graph is None:
            self._graph = _CompiledReverse(self._problem, self._compiler, with_targets=with_targets)
        return self._graph


class _CompiledReverse(Reverse):
    """The gradient by a compiled function, whose vjp is compiled too."""

    def __init__(self, problem: LowerProblem, compiler: Compiler, *, with_targets: bool) -> None:
        super().__init__(problem, with_targets=with_targets)
        self._compiler = compiler
        self._ran: Numbers = ()

    @cached_property
    def numbers(self) -> Numbers:
        """Those of the graphs of the gradient."""
        return self._ran if self._gradients else ()

    def _build(self) -> list[Tree]:
        moved = {self._problem.level: self._own, **self._targets}
        self._ran, found = _run(self._problem, self._compiler, _gradient_of, moved)
        return found

    def _pull_back(
        self, v: Mapping[str, Tensor], inputs: Mapping[K, Tensor], *, keep: bool
    ) -> dict[K, Tensor]:
        with many_directions():
            return super()._pull_back(v, inputs, keep=keep)


def _cross(
    problem: LowerProblem, compiler: Compiler, v: Mapping[str, Tensor]
) -> tuple[Numbers, Cross]:
    """``(dg/dlambda)^T v``, averaged over micro-batches."""
    moved = {name: frozen(problem.point.values[name]) for name in problem.targets}
    direction = fill(frozen(v), problem.parameters)
    numbers, found = _run(problem, compiler, _pull_of, moved, direction)
    result: Cross = {name: {} for name in moved}
    for cross in found:
        for name, tree in cross.items():
            result[name] = add(result[name], tree, 1.0 / len(found))
    return numbers, result


def _run(
    problem: LowerProblem,
    compiler: Compiler,
    make: Callable[[Point], Callable[..., Any]],
    moved: Cross,
    *more: Tree,
) -> tuple[Numbers, list[Any]]:
    """What the function gives for each micro-batch, with the numbers of the graphs that ran.

    Args:
        problem: the loss and its point.
        compiler: that of its level.
        make: makes the function.
        moved: the trees in which it takes derivatives.
        more: its further arguments.
    """
    point = problem.point
    function = compiler.function(make, point, tuple(moved))
    held = {name: frozen(tree) for name, tree in point.values.items() if name not in moved}
    places = _places(point)
    rest = {key: tensor for key, tensor in point.state({}).items() if key not in places}
    scale = torch.tensor(point.scale)

    def run() -> tuple[Numbers, list[Any]]:
        numbers: list[int] = []
        found: list[Any] = []
        with _compiling():
            for number, items in enumerate(point.batches):
                point.begin_streams(number)
                found.append(function(moved, held, rest, items, scale, *more))
                numbers.append(compiler.latest)
        return tuple(numbers), found

    return point.loss.within({}, run)


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


def _gradient_of(
    point: Point,
) -> Callable[[Cross, Cross, State, Mapping[str, Any], Tensor], Tree]:
    """The gradient in w, as a function of parameters, the slots of none, items and the scale."""
    loss = point.loss
    called, level, places = _Called(loss), loss.level, _places(point)
    buffers = frozenset(slot.key for slot in loss.buffers)

    def gradient(
        moved: Cross, held: Cross, rest: State, items: Mapping[str, Any], scale: Tensor
    ) -> Tree:
        values = {**held, **moved}

        def scalar(own: Tree) -> Tensor:
            trees = {**values, level: own}
            state = {f"slots.{slot}": trees[name][key] for slot, (name, key) in places.items()}
            for slot, tensor in rest.items():
                # a copy inside of the derivatives, which a pass may update
                state[f"slots.{slot}"] = tensor.clone() if slot in buffers else tensor
            value: Tensor = functional_call(called, state, (items,), tie_weights=False)
            return value * scale

        found: Tree = grad(scalar)(values[level])
        return found

    return gradient


def _pull_of(
    point: Point,
) -> Callable[[Cross, Cross, State, Mapping[str, Any], Tensor, Tree], Cross]:
    """The vjp of that gradient in the trees moved, as a function of the direction too."""
    gradient = _gradient_of(point)

    def pull(
        moved: Cross,
        held: Cross,
        rest: State,
        items: Mapping[str, Any],
        scale: Tensor,
        v: Tree,
    ) -> Cross:
        found: Cross = vjp(lambda trees: gradient(trees, held, rest, items, scale), moved)[1](v)[0]
        return found

    return pull


class _Called(nn.Module):
    """A level's loss as a module, with the slots of its own."""

    def __init__(self, loss: StatelessLoss) -> None:
        super().__init__()
        self.slots = loss.module
        self._loss = loss

    def forward(self, items: Mapping[str, Any]) -> Tensor:
        return self._loss.call(items)[0]


def _places(point: Point) -> dict[str, tuple[str, str]]:
    """For each slot that holds a parameter of a level, the level and its name there."""
    return {
        slot.key: slot.owner
        for slot in point.loss.slots_of(frozenset(point.values))
        if slot.owner is not None and slot.owner[1] in point.values[slot.owner[0]]
    }


def _tolerance(problem: LowerProblem) -> float:
    """How far products may be off, relative to their size: the rounding of their dtype."""
    dtypes = {tensor.dtype for tensor in problem.parameters.values()}
    return 2e-2 if dtypes & _HALF or problem.point.loss.dtype in _HALF else 1e-5


def _difference(found: Cross, expected: Cross, *, tolerance: float) -> str | None:
    """In what the products are not those expected; zeros and infinities tell nothing."""
    sizes = [norm(tree) for tree in expected.values()]
    if not any(sizes) or not all(map(isfinite, sizes)):
        return None
    for (name, tree), size in zip(expected.items(), sizes, strict=True):
        error = norm(add(found[name], tree, -1.0))
        if not error <= tolerance * size:
            return (
                f"its products in {name!r} are {error:.1e} off, of {size:.1e}, perhaps by other "
                "random numbers"
            )
    return ""
