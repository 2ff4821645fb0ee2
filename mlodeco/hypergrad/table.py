"""The names of the methods, and how what a person wrote becomes a method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from torch import nn

from mlodeco.calculus.response import Method
from mlodeco.declare.site import locate
from mlodeco.errors import MethodError, did_you_mean, quoted
from mlodeco.hypergrad.cg import CG
from mlodeco.hypergrad.converged import Converged
from mlodeco.hypergrad.custom import Custom
from mlodeco.hypergrad.dense import Dense
from mlodeco.hypergrad.finite_difference import FiniteDifference
from mlodeco.hypergrad.gmres import GMRES
from mlodeco.hypergrad.identity import Identity
from mlodeco.hypergrad.minres import MINRES
from mlodeco.hypergrad.neumann import Neumann
from mlodeco.hypergrad.nystrom import Nystrom
from mlodeco.hypergrad.sama import Sama
from mlodeco.hypergrad.unroll import Unroll
from mlodeco.hypergrad.unroll_forward import UnrollForward

NAMES: Final[Mapping[str, Callable[[], Method]]] = {
    "identity": Identity,
    "t1t2": Identity,
    "finite_difference": FiniteDifference,
    "darts": FiniteDifference,
    "neumann": Neumann,
    "cg": CG,
    "minres": MINRES,
    "gmres": GMRES,
    "nystrom": Nystrom,
    "sama": Sama,
    "unroll": Unroll,
    "unroll_forward": UnrollForward,
    "dense": Dense,
    "converged": Converged,
}


def describe(method: Method) -> str:
    """The method's name for people: the one it was registered under, else its class's."""
    return method.name if isinstance(method, Custom) else type(method).__name__


def spell(method: Method) -> str:
    """The method as it would be written, with the options that are not the default."""
    record: Any = method
    if isinstance(record, Custom) or not is_dataclass(record):
        return describe(method)
    options = [
        f"{field.name}={getattr(record, field.name)!r}"
        for field in fields(record)
        if getattr(record, field.name) != field.default
    ]
    return f"{type(method).__name__}({', '.join(options)})"


def resolve(
    spec: Any,
    custom: Mapping[str, Any],
    *,
    level: str | None = None,
    site: str | None = None,
) -> Method | None:
    """The method for a name, a method object, a solver or None (the direct gradient alone).

    Args:
        spec: what was given as ``hypergrad=``.
        custom: methods registered by the program, by name.
        level: the level, for messages.
        site: the place of its function, for messages.

    Raises:
        MethodError: it is none of these.
    """
    if spec is None:
        return None
    if isinstance(spec, str):
        if spec in custom:
            return _from_object(spec, custom[spec], level, site)
        if spec in NAMES:
            return NAMES[spec]()
        known = [*NAMES, *custom]
        raise MethodError(
            f"there is no method {spec!r}.",
            expected=f"one of {quoted(known)}.",
            remedy=f"correct the name, or register it by @method({spec!r})."
            f"{did_you_mean(spec, known)}",
            level=level,
            site=site,
        )
    name = getattr(spec, "__name__", type(spec).__name__)
    return _from_object(name, spec, level, site)


def _from_object(name: str, value: Any, level: str | None, site: str | None) -> Method:
    if inspect.isclass(value):
        try:
            value = value()
        except TypeError as error:
            raise MethodError(
                f"the method {name!r} cannot be made without arguments: {error}.",
                remedy="give the class defaults, or pass an object: hypergrad=Method(...).",
                level=level,
                site=site,
            ) from error
    if hasattr(value, "respond"):
        method: Method = value
        return method
    solver = getattr(value, "solve", value)
    if callable(solver) and not isinstance(solver, nn.Module):
        _check_signature(name, solver, level, site)
        return Custom(name=name, solver=solver)
    raise MethodError(
        f"hypergrad={value!r} is not a method.",
        expected="a name, a method object such as Neumann(num_terms=10), a function "
        "solve(matvec, b), or None.",
        remedy=f"write one of {quoted(NAMES)}.",
        level=level,
        site=site,
    )


def _check_signature(name: str, solver: Any, level: str | None, site: str | None) -> None:
    try:
        signature = inspect.signature(solver)
    except (TypeError, ValueError):  # it has none to look at
        return
    try:
        signature.bind("matvec", "b")
    except TypeError as error:
        raise MethodError(
            f"the method {name!r} ({locate(solver)}) has the arguments {signature}.",
            expected="solve(matvec, b) -> x.",
            remedy="take the product with the Hessian and the right-hand side, in this order.",
            level=level,
            site=site,
        ) from error
