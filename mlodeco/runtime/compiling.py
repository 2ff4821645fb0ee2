"""Which compiler a run asks for."""

from __future__ import annotations

import warnings

import torch

from mlodeco.errors import FallbackWarning, RunError, quoted


def backend_of(compile_: object, *, nested: bool) -> str | None:
    """The name of the backend that ``compile=`` asks for; None for none.

    Raises:
        RunError: there is no such backend.
    """
    if compile_ is False:
        return None
    known = torch._dynamo.list_backends(exclude_tags=())
    backend = "inductor" if compile_ is True else compile_
    if backend not in known:
        raise RunError(
            f"compile={compile_!r}.",
            expected=f"True, False or one of {quoted(known)}.",
            remedy="run(compile=True), for instance.",
        )
    if nested:
        warnings.warn(
            "the products of nested best responses are not compiled: compile= has no effect with "
            "nested=True. Remedy: leave one of them out.",
            FallbackWarning,
            stacklevel=3,
        )
        return None
    return str(backend)
