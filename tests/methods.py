"""Every method with options that are not the default, its dense formula and its tolerance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mlodeco.hypergrad import (
    CG,
    GMRES,
    MINRES,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
)
from tests import reference


@dataclass(frozen=True)
class Row:
    method: Any
    solve: reference.Solve
    tolerance: float
    by_difference: bool = False


def damped(damping: float) -> reference.Solve:
    return lambda h, b: torch.linalg.solve(h + damping * torch.eye(len(h), dtype=h.dtype), b)


METHODS: dict[str, Row] = {
    "dense": Row(Dense(), reference.exact, 1e-10),
    "dense_damped": Row(Dense(damping=0.7), damped(0.7), 1e-10),
    "dense_by_reverse": Row(Dense(product="reverse"), reference.exact, 1e-10),
    "dense_by_duals": Row(Dense(product="reverse_over_forward"), reference.exact, 1e-10),
    "dense_by_difference": Row(Dense(product="difference"), reference.exact, 1e-6, True),
    "cg_converged": Row(CG(max_steps=200, rtol=1e-13), reference.exact, 1e-9),
    "cg_damped": Row(CG(max_steps=200, rtol=1e-13, damping=0.7), damped(0.7), 1e-9),
    **{f"cg_{n}": Row(CG(max_steps=n, rtol=0.0), reference.krylov(n), 1e-9) for n in (1, 2, 5)},
    "cg_forward": Row(
        CG(max_steps=200, rtol=1e-13, product="forward", damping=0.7), damped(0.7), 1e-9
    ),
    "cg_truncated_and_damped": Row(
        CG(max_steps=3, rtol=0.0, damping=0.7), reference.krylov(3, 0.7), 1e-9
    ),
    "minres_converged": Row(MINRES(max_steps=200, rtol=1e-13), reference.exact, 1e-9),
    "minres_damped": Row(MINRES(max_steps=200, rtol=1e-13, damping=0.7), damped(0.7), 1e-9),
    **{
        f"minres_{n}": Row(MINRES(max_steps=n, rtol=0.0), reference.minimal_residual(n), 1e-9)
        for n in (1, 2, 5)
    },
    "gmres_converged": Row(GMRES(max_steps=200, restart=40, rtol=1e-13), reference.exact, 1e-9),
    "gmres_damped": Row(
        GMRES(max_steps=200, restart=40, rtol=1e-13, damping=0.7), damped(0.7), 1e-9
    ),
    "gmres_restarted": Row(GMRES(max_steps=2000, restart=4, rtol=1e-13), reference.exact, 1e-9),
    "gmres_forward": Row(
        GMRES(max_steps=200, restart=40, rtol=1e-13, product="forward"), reference.exact, 1e-9
    ),
    **{
        f"gmres_{n}": Row(GMRES(max_steps=n, rtol=0.0), reference.minimal_residual(n), 1e-9)
        for n in (1, 2, 5)
    },
    "nystrom_full": Row(Nystrom(rank=100, damping=0.7), damped(0.7), 1e-6),
    "nystrom_full_lightly_damped": Row(Nystrom(rank=100, damping=1e-3), damped(1e-3), 1e-6),
    "nystrom_forward": Row(
        Nystrom(rank=100, damping=0.7, seed=5, product="forward"), damped(0.7), 1e-6
    ),
    **{
        f"neumann_{n}": Row(Neumann(num_terms=n, step_size=0.13), reference.neumann(n, 0.13), 1e-9)
        for n in (1, 2, 5)
    },
    "neumann_damped": Row(
        Neumann(num_terms=5, step_size=0.3, damping=0.7), reference.neumann(5, 0.3, 0.7), 1e-9
    ),
    "neumann_forward": Row(
        Neumann(num_terms=5, step_size=0.3, damping=0.7, product="forward"),
        reference.neumann(5, 0.3, 0.7),
        1e-9,
    ),
    "neumann_auto": Row(Neumann(num_terms=500), reference.exact, 1e-9),
    "identity": Row(Identity(), reference.scaled(1.0), 1e-12),
    "identity_scaled": Row(Identity(scale=0.37), reference.scaled(0.37), 1e-12),
    "identity_by_duals": Row(
        Identity(scale=0.37, product="reverse_over_forward"), reference.scaled(0.37), 1e-12
    ),
    "identity_forward": Row(Identity(scale=0.37, product="forward"), reference.scaled(0.37), 1e-12),
    "finite_difference": Row(FiniteDifference(), reference.scaled(1.0), 1e-6, True),
    "finite_difference_options": Row(
        FiniteDifference(scale=0.37, radius=1e-4), reference.scaled(0.37), 1e-6, True
    ),
}
