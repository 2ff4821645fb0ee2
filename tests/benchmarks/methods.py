"""The methods that are measured: one entry each, as mlodeco's record and as a hand-written tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlodeco.hypergrad import CG, FiniteDifference, Identity, Neumann
from tests.benchmarks import loop
from tests.benchmarks.case import Case

TERMS, STEP = 5, 0.05
CG_STEPS = 5


@dataclass(frozen=True)
class Method:
    """The same algorithm twice."""

    library: Callable[[Case], Any]
    tail: loop.Tail


METHODS: dict[str, Method] = {
    "identity": Method(lambda _: Identity(), loop.identity),
    "finite_difference": Method(lambda _: FiniteDifference(), loop.finite_difference),
    "neumann": Method(
        lambda _: Neumann(num_terms=TERMS, step_size=STEP),
        partial(loop.neumann, terms=TERMS, step=STEP),
    ),
    "cg": Method(
        lambda case: CG(max_steps=CG_STEPS, rtol=0.0, damping=case.damping),
        partial(loop.cg, steps=CG_STEPS),
    ),
}
