"""The exact products by whole compiled functions.

A compiled function can be differentiated once, and so one derivative at least is taken inside of
what is compiled. For products in many directions that is the gradient, as a function of w and
lambda; its vjp is compiled with it, and what that needs is kept. A cross product alone is one
function of the direction too: of it the compiler drops all that lambda does not touch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from mlodeco.calculus.point import LowerProblem, Point
from mlodeco.calculus.products.automatic import is_out_of_memory
from mlodeco.calculus.products.first_order import first_gradient
from mlodeco.calculus.products.protocol import Cross
from mlodeco.calculus.products.reverse import Reverse
from mlodeco.calculus.slots import State
from mlodeco.calculus.stateless import StatelessLoss, frozen
from mlodeco.errors import FallbackWarning
from mlodeco.tree import Tree, add, fill, norm

COMPILED_PRODUCTS = ("auto", "reverse", "reverse_over_forward")
"""The modes that give ``(dg/dw)^T v`` exactly, which compiled products are."""

_OPTIONS = {"fallback_random": True, "emulate_precision_casts": True}
"""Inductor's: the random numbers and the roundings of half precision that there are without it."""

_HALF = {torch.float16, torch.bfloat16}

_PATIENCE = 3
"""At so many points the products of a graph may be wrong until it is given up."""

K = TypeVar("K")
T = TypeVar("T")

Numbers = tuple[int, ...]
"""By their numbers the graphs that ran, one a micro-batch."""


class Compiler:
    """The compiled functions of one level, for all hypergradients of a run.

    What a graph gives first is compared with what it stands for. Where a loss cannot be compiled
    whole or these differ, a warning says so once, and the level is not compiled.

    Args:
        backend: the name of one of ``torch.compile``.

    Attributes:
        graphs: how many graphs were compiled.
        latest: the number of the one that ran last.
        touched: for graphs that ran, the own parameters that the loss depends on.
        refusal: why the level is not compiled; None as long as it is.
    """

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend
        self._functions: dict[Any, Callable[..., Any]] = {}
        self._compared: set[tuple[str, Numbers]] = set()
        self._doubts: dict[tuple[str, Numbers], set[tuple[int, int]]] = {}
        self.graphs = 0
        self.latest = 0
        self.touched: dict[Numbers, tuple[str, ...]] = {}
        self.refusal: str | None = None

    def function(
        self, make: Callable[[Point], Callable[..., Any]], point: Point, wanted: tuple[str, ...]
    ) -> Callable[..., Any]:
        """What ``make`` makes for the levels wanted, compiled at its first call for each size."""
        key = make, wanted, point.fraction
        if key not in self._functions:
            # torch's overloads lack isolate_recompiles, without which levels share one limit
            self._functions[key] = torch.compile(  # type: ignore[call-overload]
                make(point),
                fullgraph=True,
                dynamic=False,
                backend=self._compile,
                isolate_recompiles=True,
            )
        return self._functions[key]

    def answer(
        self,
        kind: str,
        point: Point,
        compiled: Callable[[], tuple[Numbers, T]],
        plain: Callable[[], T],
        differ: Callable[[T, T], str | None],
    ) -> T:
        """What is asked for by compiled graphs where that can be had, else by the plain way.

        A user's own error is raised by the plain way, as it would be without compiling.

        Args:
            kind: what is asked for.
            point: the loss.
            compiled: gives it with the numbers of the graphs that ran.
            plain: what it stands for.
            differ: why the one is not the other; None if that cannot be told, empty if it is.
        """
        reason, key = self.refusal or _obstacle(point), None
        if reason is None:
            try:
                numbers, found = compiled()
            except Exception as error:
                if isinstance(error, RuntimeError) and is_out_of_memory(error):
                    raise
                reason = _in_short(error)
            else:
                key = kind, numbers
                if key in self._compared:
                    return found
        expected = plain()
        if key is not None:
            reason = differ(found, expected)
            if reason == "":
                self._compared.add(key)
            elif reason and not self._is_final(key, point):
                return expected
        if reason and self.refusal is None:
            self._refuse(point.loss, reason)
        return expected

    def _is_final(self, key: tuple[str, Numbers], point: Point) -> bool:
        """Whether a graph was wrong often enough: at a kink of the loss rounding can make it so."""
        seen = self._doubts.setdefault(key, set())
        seen.add((point.seed, id(point.streams)))
        return len(seen) >= _PATIENCE

    def _refuse(self, loss: StatelessLoss, reason: str) -> None:
        self.refusal = reason
        self._functions.clear()
        warnings.warn(
            f"level {loss.level!r} ({loss.site}): its products are not compiled: {reason}.",
            FallbackWarning,
            stacklevel=2,
        )

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        number = self.graphs
        with _many_directions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates some of what its compiler uses
            if self._backend == "inductor":
                compiled = torch._inductor.compile(graph, inputs, options=_OPTIONS)
            else:
                compiled = torch._dynamo.lookup_backend(self._backend)(graph, inputs)

        def run(*args: Any) -> Any:
            self.latest = number
            return compiled(*args)

        return run


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
        with _many_directions():
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


def _many_directions() -> AbstractContextManager[None]:
    """Keeps a compiled vjp from reusing, at the first direction, the memory that all need."""
    patch: AbstractContextManager[None] = torch._functorch.config.patch(donated_buffer=False)
    return patch


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


def _obstacle(point: Point) -> str | None:
    """What is known to be in the way of compiling, before it is tried."""
    if point.copies is not None:
        return "it sees replicas"
    if point.loss.has_backward_hooks:
        return "a module has backward hooks"
    for name, value in (pair for items in point.batches for pair in items.items()):
        kind = _foreign(value)
        if kind is not None:
            return f"{name!r} is or holds a {kind}, neither a tensor nor a number"
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
