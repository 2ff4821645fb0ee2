"""Whether a user's factory can be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def misfit(factory: Callable[..., Any], *given: object, **named: object) -> str:
    """Why a factory cannot be called with these; empty where it can, or nobody can tell."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*given, **named)
    except TypeError as error:
        return str(error)
    return ""
