"""Calling what a user gave: whether it can be, and which option an exception came from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlodeco.errors import DeclarationError, MlodecoError


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


def call(
    option: str, where: object, function: Callable[..., Any], *given: object, **named: object
) -> Any:
    """What a user's function returns; a note on its exceptions says which option gave it.

    Raises:
        DeclarationError: it is a builtin, of which no line is known, and does not take these.
    """
    with noted(option, where):
        try:
            return function(*given, **named)
        except Exception as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise
            raise DeclarationError(
                f"{option} of {where}, {function!r}, cannot be called with what it is given: "
                f"{type(error).__name__}: {error}",
                remedy="give a function that takes it, such as one of your own.",
            ) from error


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
