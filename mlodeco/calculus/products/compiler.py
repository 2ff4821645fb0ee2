"""The compiled functions of a level: made once, compared at their first use, given up if wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mlodeco.calculus.point import Point
from mlodeco.calculus.products.automatic import is_out_of_memory
from mlodeco.calculus.stateless import StatelessLoss
from mlodeco.errors import FallbackWarning

_OPTIONS = {"fallback_random": True, "emulate_precision_casts": True}
"""Inductor's: the random numbers and the roundings of half precision that there are without it."""

_PATIENCE = 3
"""At so many points the products of a graph may be wrong until it is given up."""

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
        with many_directions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates some of what its compiler uses
            if self._backend == "inductor":
                compiled = torch._inductor.compile(graph, inputs, options=_OPTIONS)
            else:
                compiled = torch._dynamo.lookup_backend(self._backend)(graph, inputs)

        def run(*args: Any) -> Any:
            self.latest = number
            return compiled(*args)

        return run


def many_directions() -> AbstractContextManager[None]:
    """Keeps a compiled vjp from reusing, at the first direction, the memory that all need."""
    patch: AbstractContextManager[None] = torch._functorch.config.patch(donated_buffer=False)
    return patch


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
