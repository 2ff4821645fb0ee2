"""The cross product alone, as ``identity`` needs it: one direction v at a given point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlodeco
from mlodeco.calculus.products import open_curvature
from mlodeco.hypergrad import Identity
from tests.benchmarks import loop, workloads
from tests.benchmarks.library import declare

MODES = ("auto", "reverse_over_forward", "reverse", "difference")
HAND_WRITTEN = "difference by hand"
"""On weights that need no gradient, in place."""


@dataclass
class _Capture:
    """A method that remembers what it was asked, and answers like ``identity``."""

    asked: list[Any] = field(default_factory=list)

    def respond(self, problem: Any, cotangent: Any) -> Any:
        self.asked[:] = [problem, cotangent]
        return Identity().respond(problem, cotangent)


def prepare(workload: str, *, tiny: bool = False) -> dict[str, Callable[[], object]]:
    """A call for each mode and for the hand-written difference.

    What mlodeco decides once for a level is decided here, on two samples.
    """
    small = workloads.make(workload, tiny=True)
    case = small if tiny else workloads.make(workload)
    capture = _Capture()
    mlodeco.hypergradient(
        "upper",
        program=declare(case, capture),
        batches={"lower": small.lower_batches[0], "upper": small.upper_batches[0]},
    )
    problem, v = capture.asked
    point = replace(problem.point, batches=({"batch": case.lower_batches[0]},))
    problem = replace(problem, point=point)

    def by(mode: str) -> Callable[[], object]:
        return lambda: open_curvature(problem, mode).cross(v)

    modes = [m for m in MODES if m != "reverse_over_forward" or workload in workloads.LATE]
    hand = loop.Loop(case, loop.finite_difference, late=False)
    hand.lower_batch = case.lower_batches[0]
    direction = list(v.values())
    return {m: by(m) for m in modes} | {
        HAND_WRITTEN: lambda: loop.finite_difference(hand, direction)
    }


COMPARED: dict[str, tuple[tuple[str, str, float | None, float | None], ...]] = {
    "resnet": (
        ("auto", "reverse", 0.4, 0.4),
        ("reverse_over_forward", "reverse", 0.4, 0.4),
        ("auto", "difference", 1.8, None),
        ("auto", HAND_WRITTEN, 1.8, None),
    ),
    "early": (("auto", "reverse", 1.0, 1.0), ("auto", "difference", None, None)),
    "mlp": (("auto", "reverse", None, None), ("auto", "difference", None, None)),
}
"""For each workload (mode, over, target of the time, target of the memory)."""
