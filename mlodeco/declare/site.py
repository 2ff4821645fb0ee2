"""Where a user's function stands, for messages."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_PROMPTS = ("<stdin>", "<python-input")


@dataclass(frozen=True)
class Site:
    """The place and name of a user's function.

    ``entry`` tells the cell of a notebook, or the input at a prompt, in which it was declared from
    all others and from other runs of the same cell; None for what a script or module declares.
    """

    file: str
    line: int
    module: str
    qualname: str
    entry: object = field(default=None, compare=False, repr=False)

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


def _entry() -> object:
    """What tells the input that is being run from others; None in scripts and modules."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None:
        return shell.execution_count
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            # each input at a prompt is compiled by itself; equal ones are told apart by their
            # identity, which stays their own while they are kept
            return (id(code), code) if code.co_filename.startswith(_PROMPTS) else None
        frame = frame.f_back
    return None
