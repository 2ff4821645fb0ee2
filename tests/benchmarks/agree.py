"""Whether two sides do the same: hypergradients, and how many passes each makes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.benchmarks.case import Case
from tests.benchmarks.sides import LIBRARY, LOOP, make_side
from tests.benchmarks.workloads import make

TOLERANCE = 1e-5


@dataclass
class Passes:
    """How often each happens in one tick."""

    lower: int = 0
    upper: int = 0
    backward: int = 0

    def __str__(self) -> str:
        return f"{self.lower}+{self.upper} / {self.backward}"


@dataclass(frozen=True)
class Agreement:
    """mlodeco beside the loop.

    Attributes:
        error: of mlodeco's hypergradient at the same point in float64, relative to the loop's.
        library: the passes of a tick of mlodeco.
        loop: the passes of a tick of the loop.
    """

    error: float
    library: Passes
    loop: Passes

    def require(self) -> None:
        """Fails unless both sides do the same.

        Raises:
            AssertionError: they do not.
        """
        assert self.error <= TOLERANCE, f"hypergradients differ by {self.error:.1e}"
        assert self.library == self.loop, f"passes: mlodeco {self.library}, loop {self.loop}"


def compare(workload: str, method: str) -> Agreement:
    """Compares the first tick's hypergradient and counts the second tick's passes."""
    library, library_passes = observe(LIBRARY, workload, method)
    loop, loop_passes = observe(LOOP, workload, method)
    return Agreement(difference(library, loop), library_passes, loop_passes)


def difference(found: Tensor, reference: Tensor) -> float:
    """The distance relative to the reference."""
    return float((found - reference).norm() / reference.norm())


def observe(name: str, workload: str, method: str) -> tuple[Tensor, Passes]:
    """A side's first hypergradient, in float64, and the passes of its second tick, in float32."""
    double = make(workload, double=True)
    make_side(name, workload, method, double).tick()
    found = [p.grad.flatten() for p in double.upper.parameters() if p.grad is not None]
    case = make(workload)
    side = make_side(name, workload, method, case)
    side.tick()
    with counted(case) as passes:
        side.tick()
    return torch.cat(found), passes


@contextmanager
def counted(case: Case) -> Iterator[Passes]:
    """Counts forward passes of both modules and calls into autograd."""
    passes = Passes()

    def note(field: str) -> None:
        setattr(passes, field, getattr(passes, field) + 1)

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            note("backward")
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for field, module in (("lower", case.lower), ("upper", case.upper)):
            handle = module.register_forward_pre_hook(lambda *_, field=field: note(field))
            stack.callback(handle.remove)
        for function in ("grad", "backward"):
            patched = watched(getattr(torch.autograd, function))
            stack.enter_context(mock.patch.object(torch.autograd, function, patched))
        yield passes
