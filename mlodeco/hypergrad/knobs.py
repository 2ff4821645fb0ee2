"""Which knob of a method to turn for a better hypergradient."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from mlodeco.calculus.response import Method
from mlodeco.hypergrad.cg import CG
from mlodeco.hypergrad.finite_difference import FiniteDifference
from mlodeco.hypergrad.gmres import GMRES
from mlodeco.hypergrad.identity import Identity
from mlodeco.hypergrad.implicit import Implicit
from mlodeco.hypergrad.krylov import Krylov
from mlodeco.hypergrad.minres import MINRES
from mlodeco.hypergrad.neumann import Neumann
from mlodeco.hypergrad.nystrom import Nystrom
from mlodeco.hypergrad.sama import Sama

_MORE = 4
"""By what a number of terms, steps or columns is multiplied."""


def turned(method: Method) -> tuple[Method, ...]:
    """Methods one turn of a knob away, each of them dearer or safer than this one.

    A turn keeps the damping, so that what is solved stays the same.
    """
    found: list[Any] = []
    if isinstance(method, Implicit):
        if method.product == "difference":
            found.append(replace(method, product="auto"))
        if method.curvature_batch < 1.0:
            found.append(replace(method, curvature_batch=1.0))
    if isinstance(method, Neumann):
        if method.step_size != "auto":
            found.append(replace(method, step_size="auto"))
        found.append(replace(method, num_terms=_MORE * method.num_terms))
    if isinstance(method, GMRES) and method.restart < method.max_steps:
        found.append(replace(method, restart=method.max_steps))
    if isinstance(method, Krylov):
        found.append(replace(method, max_steps=_MORE * method.max_steps))
    if isinstance(method, CG):
        found.append(MINRES(**{f.name: getattr(method, f.name) for f in fields(method)}))
    if isinstance(method, Nystrom):
        found.append(replace(method, rank=_MORE * method.rank))
    if isinstance(method, Identity | FiniteDifference | Sama):
        found += [Identity(), Neumann(), CG(max_steps=5), MINRES(max_steps=10)]
    return tuple(other for other in found if other != method)
