"""Checks of methods' options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from mlodeco.calculus.products import PRODUCTS
from mlodeco.declare.checks import as_integer
from mlodeco.errors import MethodError, did_you_mean, quoted


@dataclass(frozen=True)
class Guide:
    """A method in three short sentences, for people who choose one.

    Attributes:
        solves: what it takes for ``H^-1 b``, or for the derivative.
        cost: for one lower level and one hypergradient.
        when: when to use it.
    """

    solves: str
    cost: str
    when: str


class Options:
    """Base of the methods' records: refuses options that a method does not have, by name.

    Attributes:
        guide: the method in short.
    """

    guide: ClassVar[Guide]

    def __new__(cls, *values: object, **options: object) -> Self:
        """Checks the names; the record's own ``__init__`` takes the values.

        Raises:
            MethodError: an option is unknown or given by position.
        """
        record: Any = cls
        known = [field.name for field in fields(record) if field.init]
        wrong = next((name for name in options if name not in known), None)
        if wrong is not None or values:
            if values:
                given = ", ".join(map(repr, values))
                found = f"{cls.__name__}({given}) does not name its options."
                remedy = f"write {_spelt(record, values[0])}."
            else:
                found = f"{cls.__name__} has no option {wrong!r}."
                hint = did_you_mean(str(wrong), known)
                remedy = f"correct or remove it.{hint or _instead(record, options[str(wrong)])}"
            raise MethodError(found, expected=f"options by name: {quoted(known)}.", remedy=remedy)
        return super().__new__(cls)


def _spelt(record: Any, value: object) -> str:
    """How a value would be given, to the first option whose default is of its kind."""
    options = [field for field in fields(record) if field.init]
    for kinds in (type(value),), (float if isinstance(value, int) else type(value),):
        for option in options:
            if isinstance(option.default, kinds) and not isinstance(option.default, bool):
                return f"{record.__name__}({option.name}={value!r})"
    return f"{record.__name__}({options[0].name}=...)"


def _instead(record: Any, value: object) -> str:
    """The option that an integer was perhaps meant for: a number of steps, terms or columns."""
    is_count = as_integer(value) is not None and any(
        as_integer(field.default) is not None for field in fields(record)
    )
    return f" Perhaps {_spelt(record, value)} is meant." if is_count else ""


def check_count(method: object, option: str, value: object, least: int = 1) -> None:
    """Refuses what is not an integer of at least ``least``."""
    number = as_integer(value)
    if number is None or not least <= number < 2**63:
        raise MethodError(
            f"{type(method).__name__}({option}={value!r}).",
            expected=f"an integer of at least {least}.",
            remedy=f"set {option}={least} or more.",
        )


def check_number(method: object, option: str, value: object, *, positive: bool) -> None:
    """Refuses what is not a finite number, positive or at least zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # not isfinite, which has no answer for integers beyond the floats
    if number and 0 <= value <= sys.float_info.max and (value > 0 or not positive):  # type: ignore[operator]
        return
    bound = "above zero" if positive else "of at least zero"
    raise MethodError(
        f"{type(method).__name__}({option}={value!r}).",
        expected=f"a finite number {bound}.",
        remedy=f"set {option} to a number {bound}.",
    )


def check_flag(method: object, option: str, value: object) -> None:
    """Refuses what is not True or False."""
    if not isinstance(value, bool):
        raise MethodError(
            f"{type(method).__name__}({option}={value!r}).",
            expected="True or False.",
            remedy=f"set {option}=True or {option}=False.",
        )


def check_fraction(method: object, option: str, value: object) -> None:
    """Refuses what is not a number above zero and at most one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= 1:  # type: ignore[operator]
        raise MethodError(
            f"{type(method).__name__}({option}={value!r}).",
            expected="a number above zero and at most one.",
            remedy=f"set {option}=1.0 for the whole, or less for a part.",
        )


def check_product(method: object, value: object, known: tuple[str, ...] = PRODUCTS) -> None:
    """Refuses what is not the name of a product mode."""
    if value not in known:
        hint = did_you_mean(value, known) if isinstance(value, str) else ""
        raise MethodError(
            f"{type(method).__name__}(product={value!r}).",
            expected=f"one of {quoted(known)}.",
            remedy=f"choose one of them; 'auto' suits most programs.{hint}",
        )
