"""Where a user's function stands, for messages."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FrameType, MethodType
from typing import Any

_PROMPTS = ("<stdin>", "<python-input")

_COMPARABLE = (bool, int, float, str, MethodType)


@dataclass(frozen=True)
class Entry:
    """An input at a prompt, or a run of a notebook's cell: ``number`` tells it from all others.

    ``code`` is its statement that is being run, or all of it.
    """

    number: int
    code: CodeType | None = field(compare=False, repr=False)

    def reads_as(self, other: Entry) -> bool:
        """Whether both statements are the same text, wherever they stand."""
        if self.code is None or other.code is None:
            return False
        return _text(self.code) == _text(other.code)


def _text(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, code.co_consts, code.co_names


@dataclass(frozen=True)
class Site:
    """The place and name of a user's function.

    ``entry`` is the input in which it was declared; None for what a script or module declares.
    """

    file: str
    line: int
    module: str
    qualname: str
    entry: Entry | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"

    @property
    def name(self) -> str:
        """The function's own name, without those of what it is defined in."""
        return self.qualname.rpartition(".")[2]

    @property
    def interactive(self) -> bool:
        """Whether it was declared at a prompt or in a notebook cell."""
        return self.entry is not None

    def names_as(self, other: Site) -> bool:
        """Whether both are functions of one name in one module."""
        return (self.module, self.qualname) == (other.module, other.qualname)


def underlying(function: Callable[..., Any]) -> Any:
    """The plain function inside partials, bound methods, wrappers and callable objects."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif not inspect.isfunction(function) and not inspect.isclass(function):
            call = inspect.getattr_static(type(function), "__call__", None)
            if not inspect.isfunction(call):
                return function
            function = call
        else:
            return function


def locate_call(name: str) -> Site:
    """The place outside the library from which it was called, for what has no code of its own."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and _is_ours(frame.f_globals):
        frame = frame.f_back
    if frame is None:
        return Site("?", 0, "?", name)
    module = str(frame.f_globals.get("__name__", "?"))
    return Site(frame.f_code.co_filename, frame.f_lineno, module, name, _entry())


def _is_ours(namespace: dict[str, Any]) -> bool:
    return str(namespace.get("__name__")).partition(".")[0] == __name__.partition(".")[0]


def is_one_callable(one: Any, other: Any) -> bool:
    """Whether both are the same function, method of one object, or partial of equal arguments.

    Arguments are equal if they are one object, or numbers, strings or methods that are equal.
    """
    if isinstance(one, functools.partial) and isinstance(other, functools.partial):
        parts, others = ([each.func, *each.args, *each.keywords.values()] for each in (one, other))
        alike = len(parts) == len(others) and all(map(is_one_callable, parts, others))
        return alike and list(one.keywords) == list(other.keywords)
    return one is other or (
        isinstance(one, _COMPARABLE) and type(one) is type(other) and one == other
    )


def locate(function: Callable[..., Any]) -> Site:
    """The site of ``function``; unknown parts are ``?`` and 0."""
    plain = underlying(function)
    code = getattr(plain, "__code__", None)
    return Site(
        file=code.co_filename if code else "?",
        line=code.co_firstlineno if code else 0,
        module=getattr(plain, "__module__", None) or "?",
        qualname=getattr(plain, "__qualname__", type(plain).__qualname__),
        entry=_entry(),
    )


def _entry() -> Entry | None:
    """The input that is being run; None in scripts and modules."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        inside = [frame for frame in _frames() if frame.f_globals is shell.user_ns]
        return Entry(shell.execution_count, inside[-1].f_code if inside else None)
    for frame in _frames():
        code = frame.f_code
        if code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            # each input at a prompt is compiled by itself; equal ones are told apart by their
            # identity, which stays their own while they are kept
            return Entry(id(code), code) if code.co_filename.startswith(_PROMPTS) else None
    return None


def _frames() -> Iterator[FrameType]:
    """Those of the calls that are under way, the innermost first."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
