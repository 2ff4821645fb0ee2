"""Methods as text, ``neumann(num_terms=10)``, read without evaluating anything."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final

from mlodeco.errors import MethodError, did_you_mean, quoted
from mlodeco.hypergrad.table import NAMES

UNREADABLE: Final = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
"""What Python's own reader raises for text that it cannot read."""

_CLASSES: Final[Mapping[str, Callable[..., Any]]] = {
    getattr(make, "__name__", name): make for name, make in NAMES.items()
}
"""The methods by the names of their classes, as their ``repr`` has them."""

_KNOWN: Final[Mapping[str, Callable[..., Any]]] = {**NAMES, **_CLASSES}


def read_method(text: str) -> Any:
    """What ``hypergrad=`` takes, from its text.

    ``cg``; ``neumann(num_terms=10, step_size="auto")``; ``None``;
    ``{"weights": cg(damping=0.1)}``. The text is parsed and never evaluated: it is a name, a
    call of a method of the library with literals for options, or a mapping of these.

    Returns:
        None, a method, or a name, perhaps that of a method of the program's own; or a mapping
        from lower levels to these.

    Raises:
        MethodError: it is not of this form, or a method or option is unknown.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's reader, about odd escapes
            return _read(ast.parse(text.strip(), mode="eval").body, text)
    except UNREADABLE:
        raise _unreadable(text) from None


def _read(node: ast.expr, text: str) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str(inner)):
            return read_method(inner)
        case ast.Name(id=name):
            return _CLASSES[name]() if name in _CLASSES else name
        case ast.Call(func=ast.Name(id=name), args=values, keywords=keywords):
            options = _options(name, keywords, text)
            return _known(name)(*map(ast.literal_eval, values), **options)
        case ast.Dict(keys=keys, values=values):
            return {
                _level(key, text): _read(one, text) for key, one in zip(keys, values, strict=True)
            }
    raise _unreadable(text)


def _known(name: str) -> Callable[..., Any]:
    if name in _KNOWN:
        return _KNOWN[name]
    raise MethodError(
        f"{name}(...) is not a method of the library.",
        expected=f"one of {quoted(NAMES)}.",
        remedy=f"correct the name; a method of the program's own is named without options."
        f"{did_you_mean(name, _KNOWN)}",
    )


def _options(name: str, keywords: list[ast.keyword], text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for keyword in keywords:
        if keyword.arg is None:
            raise _unreadable(text)
        if keyword.arg in options:
            raise MethodError(
                f"{name}(...) has the option {keyword.arg!r} twice.", remedy="give it once."
            )
        options[keyword.arg] = ast.literal_eval(keyword.value)
    return options


def _level(key: ast.expr | None, text: str) -> str:
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        return key.value
    raise _unreadable(text)


def _unreadable(text: str) -> MethodError:
    return MethodError(
        f"{text!r} is not a method.",
        expected='a name; options, as in neumann(num_terms=10, step_size="auto"); None; or '
        '{"lower level": cg(damping=0.1)}.',
        remedy="write numbers, True, False, None and quoted strings for options.",
    )
