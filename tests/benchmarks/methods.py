"""The methods that are measured: one line each, as mlodeco's record and as a hand-written tail."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from mlodeco.hypergrad import CG, FiniteDifference, Identity, Neumann
from tests.benchmarks import loop

TERMS, STEP = 5, 0.05
CG_STEPS = 5
DAMPING = 30.0  # at random weights the Hessian has large negative eigenvalues


@dataclass(frozen=True)
class Method:
    """The same algorithm twice."""

    library: Any
    tail: loop.Tail


METHODS: dict[str, Method] = {
    "identity": Method(Identity(), loop.identity),
    "finite_difference": Method(FiniteDifference(), loop.finite_difference),
    "neumann": Method(
        Neumann(num_terms=TERMS, step_size=STEP), partial(loop.neumann, terms=TERMS, step=STEP)
    ),
    "cg": Method(
        CG(max_steps=CG_STEPS, rtol=0.0, damping=DAMPING),
        partial(loop.cg, steps=CG_STEPS, damping=DAMPING),
    ),
}
