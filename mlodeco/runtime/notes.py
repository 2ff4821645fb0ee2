"""Calling a user's factory: whether it can be, and which option an exception came from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlodeco.errors import MlodecoError


@contextmanager
def noted(option: str, where: object) -> Iterator[None]:
    """Adds to an exception from a user's function which option of which level gave it."""
    try:
        yield
    except MlodecoError:
        raise
    except Exception as error:
        error.add_note(f"raised by {option} of {where}")
        raise


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
