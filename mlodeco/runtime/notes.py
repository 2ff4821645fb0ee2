"""Saying which option an exception from a user's factory came from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
