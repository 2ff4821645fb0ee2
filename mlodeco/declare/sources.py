"""What ``source`` was given, checked and made a record."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Mapping
from typing import Any, Final, cast, get_args

from mlodeco.declare.checks import Checker
from mlodeco.declare.records import RESERVED, Refresh, SourceDeclaration
from mlodeco.declare.site import locate, locate_call, underlying
from mlodeco.errors import quoted

SOURCE_OPTIONS: Final = ("name", "refresh")


def declare_source(
    value: Any, name: str | None, refresh: Any, unknown: Mapping[str, Any]
) -> tuple[SourceDeclaration, Checker]:
    """The record of a source, and a checker for what the program has to say about it.

    Raises:
        DeclarationError: something about it cannot be right.
    """
    plain = underlying(value) if callable(value) else None
    called = getattr(plain, "__name__", None) if name is None else name
    site = locate(value) if hasattr(plain, "__code__") else locate_call(str(called))
    check = Checker("@source", None, site, source=called)
    check.unknown(unknown, SOURCE_OPTIONS)
    check.choice("refresh", refresh, get_args(Refresh))
    declaration = SourceDeclaration(str(called), value, site, cast(Refresh, refresh))
    if declaration.is_function:
        _check_function(check, value)
    else:
        _check_object(check, value)
    _check_name(check, called)
    return declaration, check


def _check_name(check: Checker, name: object) -> None:
    if name is None:
        raise check.error(
            "the source has no name.",
            expected="a name for an object, which has none of its own.",
            remedy="write source('name')(object).",
        )
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise check.error(
            f"the source's name is {name!r}.",
            expected="an identifier: levels read the source by an argument of that name.",
            remedy="name it like a variable: @source('task').",
        )
    if name in RESERVED:
        raise check.error(
            f"the source's name {name!r} is reserved.",
            remedy=f"choose another name; {quoted(RESERVED)} are arguments with a meaning.",
        )


def _check_function(check: Checker, function: Any) -> None:
    plain = underlying(function)
    if inspect.isclass(plain):
        raise check.error(
            f"@source decorates the class {plain.__name__!r}.",
            expected="a generator function, or an object to iterate over.",
            remedy=f"give an object, source('name')({plain.__name__}(...)), or a function that "
            "makes one and returns its iterator.",
        )
    check.function(function, may_yield=True)
    check.names_taken(function, "a source")


def _check_object(check: Checker, value: Any) -> None:
    kind = type(value).__name__
    parts = value if isinstance(value, tuple) else ()
    if hasattr(value, "shape") or (parts and all(hasattr(part, "shape") for part in parts)):
        raise check.error(
            f"@source was given one {kind} of data, which would be iterated over its parts.",
            remedy="for one item that never changes write source('name')([item]).",
        )
    known = ("__next__", "__iter__", "__getitem__")
    iterable = any(hasattr(type(value), attribute) for attribute in known)
    if not iterable or isinstance(value, str | bytes | Mapping):
        raise check.error(
            f"@source was given {value!r:.60}.",
            expected="a generator function, a function that returns an iterator, an iterator, or "
            "an object that can be iterated over again and again.",
            remedy="put it above a generator function, or write source('name')(list_of_items).",
        )
