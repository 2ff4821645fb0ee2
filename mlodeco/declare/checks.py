"""Checks of what a decorator was given, made before anything is recorded."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

from mlodeco.declare.calls import noted
from mlodeco.declare.records import RESERVED
from mlodeco.declare.site import Site, underlying
from mlodeco.errors import DeclarationError, MlodecoWarning, did_you_mean, quoted


class Checker:
    """Checks the options of one declaration; every message names its place."""

    def __init__(
        self, what: str, level: str | None, site: Site, *, source: str | None = None
    ) -> None:
        self._what = what
        self._level = level
        self._source = source
        self._place = site
        self._site = str(site)

    def error(self, found: str, *, remedy: str, expected: str = "") -> DeclarationError:
        """The error, located."""
        return DeclarationError(
            found,
            remedy=remedy,
            expected=expected,
            level=self._level,
            source=self._source,
            site=self._site,
        )

    def warn(self, found: str, category: type[MlodecoWarning], *, remedy: str) -> None:
        """Warns, at the place of the declaration."""
        warnings.warn_explicit(
            str(self.error(found, remedy=remedy)).replace("\n  ", " "),
            category,
            self._place.file,
            self._place.line,
        )

    def count(self, option: str, value: object, *, least: int) -> int:
        """An integer of at least ``least``."""
        number = as_integer(value)
        if number is None or number < least:
            raise self.error(
                f"{option}={value!r}.",
                expected=f"an integer of at least {least}.",
                remedy=f"set {option}={least} or more, or leave it out.",
            )
        return number

    def flag(self, option: str, value: object) -> bool:
        """True or False."""
        if not isinstance(value, bool):
            raise self.error(
                f"{option}={value!r}.", expected="True or False.", remedy=f"set {option}=True."
            )
        return value

    def norm_bound(self, option: str, value: object) -> float | None:
        """A positive finite number or None."""
        if value is None:
            return None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
            raise self.error(
                f"{option}={value!r}.",
                expected="a positive number, the largest norm of the gradient.",
                remedy=f"set {option}=1.0, or leave it out for no clipping.",
            )
        return float(value)  # type: ignore[arg-type]

    def choice(self, option: str, value: object, choices: Iterable[str]) -> str:
        """One of a few words."""
        known = tuple(choices)
        if not isinstance(value, str) or value not in known:
            hint = did_you_mean(value, known) if isinstance(value, str) else ""
            raise self.error(
                f"{option}={value!r}.",
                expected=f"one of {quoted(known)}.",
                remedy=f"choose one of them.{hint}",
            )
        return value

    def callable_or_none(self, option: str, value: object, remedy: str) -> None:
        """A function or None."""
        if value is not None and not callable(value):
            raise self.error(f"{option}={value!r} is not callable.", remedy=remedy)

    def items(self, option: str, value: object) -> tuple[Any, ...] | None:
        """The items of an iterable; None for what is none, such as a tensor without dimensions."""
        with noted(f"{option}=", f"level {self._level!r} ({self._site})"):
            try:
                items = iter(value)  # type: ignore[call-overload]
            except TypeError:
                return None
            return tuple(items)

    def names(self, option: str, value: object) -> tuple[str, ...]:
        """A list of distinct names; a bare string is the mistake it looks like."""
        if isinstance(value, str):
            raise self.error(
                f"{option}={value!r} is a string.",
                expected="a list of names.",
                remedy=f"write {option}=[{value!r}].",
            )
        names = self.items(option, value)
        if names is None:
            raise self.error(
                f"{option}={value!r}.",
                expected="a list of names.",
                remedy=f"write {option}=['name', ...].",
            )
        for name in names:
            if not isinstance(name, str):
                raise self.error(
                    f"{option} contains {name!r}.",
                    expected="names, as strings.",
                    remedy="name the level by the string it was declared with.",
                )
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled is not None:
            raise self.error(f"{option} names {doubled!r} twice.", remedy="name each level once.")
        return names

    def unknown(self, options: Mapping[str, Any], known: Iterable[str]) -> None:
        """Refuses options that the decorator does not have."""
        if not options:
            return
        names = tuple(known)
        option = next(iter(options))
        raise self.error(
            f"{self._what} has no option {option!r}.",
            expected=f"options are {quoted(names)}.",
            remedy=f"correct or remove it.{did_you_mean(option, names)}",
        )

    def function(self, function: object, *, may_yield: bool = False) -> None:
        """Refuses what cannot be called as a plain function, or as one that yields."""
        if not callable(function):
            raise self.error(
                f"{self._what} decorates {function!r}, which is not a function.",
                remedy="put the decorator above a function.",
            )
        plain = underlying(function)
        if inspect.isclass(plain):
            raise self.error(
                f"{self._what} decorates the class {plain.__name__!r}.",
                remedy="decorate a function, or an object with __call__.",
            )
        self.not_module(function)
        if inspect.iscoroutinefunction(plain) or inspect.isasyncgenfunction(plain):
            raise self.error(
                f"{self._what} decorates an async function.",
                remedy="write it as a plain function (def, not async def).",
            )
        if inspect.isgeneratorfunction(plain) and not may_yield:
            raise self.error(
                f"{self._what} decorates a generator function.",
                remedy="return the result instead of yielding it.",
            )
        self._signature(function)
        if _lacks_self(function):
            raise self.error(
                f"{self._what} decorates the method {plain.__qualname__!r} inside its class, "
                "where it has no object to be bound to.",
                remedy=f"decorate the bound method: decorator(obj.{plain.__name__}).",
            )

    def not_module(self, function: Any) -> None:
        """Refuses an ``nn.Module``, whose call says nothing of its arguments."""
        if _is_module(function):
            raise self.error(
                f"{self._what} decorates a module, whose call takes no arguments by name.",
                remedy="decorate a function that calls it, or a method of it other than __call__.",
            )

    def names_taken(self, function: Callable[..., Any], what: str) -> tuple[str, ...]:
        """The names of a function's arguments, all of which can be given by name.

        Args:
            function: the function.
            what: it, in words.
        """
        parameters = self._signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise self.error(
                    f"the argument {parameter.name!r} is positional-only.",
                    remedy=f"remove the '/': levels are given to {what} by name.",
                )
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return tuple(p.name for p in parameters if p.kind not in variadic)

    def _signature(self, function: Callable[..., Any]) -> inspect.Signature:
        """The arguments that a function takes."""
        try:
            return inspect.signature(function)
        except (TypeError, ValueError):
            raise self.error(
                f"the arguments of {function!r:.200} cannot be found out.",
                expected="a function whose arguments Python knows, and a partial that fits it.",
                remedy="wrap it in a function: lambda: ...",
            ) from None

    def keys(self, option: str, value: object) -> None:
        """Refuses keys of a mapping that are not names."""
        for key in value if isinstance(value, Mapping) else ():
            if not isinstance(key, str):
                raise self.error(
                    f"{option} has the key {key!r:.60}.",
                    expected="names, as strings.",
                    remedy=f"write {option}={{'name': ...}}.",
                )

    def level_name(self, name: object) -> str:
        """A non-empty string that is not reserved."""
        if not isinstance(name, str) or not name.strip():
            raise self.error(
                f"the level's name is {name!r}.",
                expected="a non-empty string.",
                remedy="give the level a name, such as 'weights'.",
            )
        if name in RESERVED:
            raise self.error(
                f"the level's name {name!r} is reserved.",
                remedy=f"choose another name; {quoted(RESERVED)} are arguments with a meaning.",
            )
        return name


def as_integer(value: object) -> int | None:
    """The value as an ``int`` if it is an integer of any kind and not a truth value."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a class of integers, or an array of several
        return None


def _is_module(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return hasattr(function, "named_parameters") and not inspect.isclass(function)


def _lacks_self(function: Callable[..., Any]) -> bool:
    if not inspect.isfunction(function):
        return False
    first = next(iter(inspect.signature(function).parameters), None)
    return first == "self" and "." in function.__qualname__.rpartition("<locals>.")[2]


def find_cycle(lower: Mapping[str, Iterable[str]]) -> list[str] | None:
    """A cycle of the relation as a closed path of names, or None."""
    done: set[str] = set()
    for root in lower:
        if root in done:
            continue
        path: list[str] = [root]
        pending = [iter(lower.get(root, ()))]
        while pending:
            child = next(pending[-1], None)
            if child is None:
                done.add(path.pop())
                pending.pop()
            elif child in path:
                return [*path[path.index(child) :], child]
            elif child not in done:
                path.append(child)
                pending.append(iter(lower.get(child, ())))
    return None
