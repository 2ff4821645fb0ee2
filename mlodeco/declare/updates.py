"""What ``update`` was given, checked and made a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlodeco.declare.checks import Checker
from mlodeco.declare.records import RULE_ARGUMENTS, UpdateDeclaration
from mlodeco.declare.site import locate
from mlodeco.errors import quoted


def declare_update(
    level: Any, function: Any, unknown: Mapping[str, Any]
) -> tuple[UpdateDeclaration, Checker]:
    """The record of an update rule, and a checker for what the program has to say about it.

    Raises:
        DeclarationError: something about it cannot be right.
    """
    site = locate(function)
    check = Checker("@update", level if isinstance(level, str) and level else None, site)
    check.unknown(unknown, ("level",))
    check.level_name(level)
    check.function(function)
    names = check.names_taken(function, "an update rule")
    if "params" not in names and "grads" not in names:
        raise check.error(
            f"the update rule takes neither 'params' nor 'grads', but {quoted(names)}.",
            expected=f"some of {quoted(RULE_ARGUMENTS)}, and levels by their names.",
            remedy="write def rule(params, grads, state): ... return params, state.",
        )
    return UpdateDeclaration(level, function, site), check
