"""NumPy's global stream, if somebody has imported NumPy: mlodeco itself does not need it."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WORDS = 625
"""The length of a Mersenne twister, and its position in it."""

_spare: Any = None
"""The twister that is lent."""

_latest: tuple[bytes, Any] | None = None
"""The twister of the state that was read or restored last, and that state."""


def state() -> Any:
    """Its state, or None without NumPy.

    Reading it takes NumPy 30 microseconds, and a step asks three times. So the twister is
    compared with that of the latest state first: where it has not moved, that state stands.
    Half a pair of normal numbers, which NumPy keeps beside the twister, may be used up
    without moving it: states with such a half are never kept. (One that somebody puts there by
    ``set_state``, on the very same twister, goes unseen.)
    """
    global _latest
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    twister = _twister_of(numpy)
    if twister is not None and _latest is not None and _latest[0] == twister:
        return _latest[1]
    found = numpy.random.get_state(legacy=False)
    _keep(twister, found)
    return found


def restore(saved: Any) -> None:
    """Puts back a state."""
    numpy = sys.modules["numpy"]
    numpy.random.set_state(saved)
    _keep(_twister_of(numpy), saved)


def twister() -> bytes | None:
    """The bytes of its Mersenne twister; None without NumPy, or if it is of another kind."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else _twister_of(numpy)


def spelled() -> str:
    """Its state as JSON, ``null`` without NumPy."""
    return json.dumps(state(), default=lambda array: array.tolist())


def restore_spelled(text: str) -> None:
    """Puts back a state that another process has spelled; nothing where one lacks NumPy."""
    found = json.loads(text)
    if found is not None and "numpy" in sys.modules:
        restore(found)


@contextmanager
def lent() -> Iterator[None]:
    """Another twister in the place of NumPy's own, which then has not moved.

    Ten times cheaper than to restore a state. Half a pair beside the twister would be lost in
    the exchange: such a state, a stream of another kind, and a twister lent already, are restored.
    """
    global _spare
    found = state()
    numpy = sys.modules.get("numpy")
    own = None if numpy is None else numpy.random.get_bit_generator()
    is_exchanged = _latest is not None and found is _latest[1] and own is not _spare
    if numpy is not None and is_exchanged:
        _spare = _spare or numpy.random.MT19937(0)
        numpy.random.set_bit_generator(_spare)
    try:
        yield
    finally:
        if numpy is not None and is_exchanged:
            numpy.random.set_bit_generator(own)
        elif found is not None:
            restore(found)


def seed(number: int) -> None:
    """Seeds it, if there is NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(number)


def _keep(twister: bytes | None, found: Any) -> None:
    global _latest
    _latest = None if twister is None or found["has_gauss"] else (twister, found)


def _twister_of(numpy: Any) -> bytes | None:
    """The bytes of the Mersenne twister; None if the stream is of another kind."""
    generator = numpy.random.get_bit_generator()
    if type(generator) is not numpy.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 4 * _WORDS)
