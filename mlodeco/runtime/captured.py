"""What a function holds on to besides its arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from mlodeco.declare.site import underlying


def captured_by(function: Any) -> list[Any]:
    """The values in a function's closure, defaults and globals, and in a partial's arguments.

    Functions among them that were defined in the same module are looked into as well.
    """
    home = getattr(underlying(function), "__globals__", None)
    found: list[Any] = []
    seen: set[int] = set()
    pending = [function]
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            pending += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            pending += [value.__func__, value.__self__]
        elif isinstance(value, FunctionType):
            if value is function or value.__globals__ is home:
                pending += _held(value)
        else:
            found.append(value)
    return found


def _held(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in dict.fromkeys(_names(function.__code__)):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
