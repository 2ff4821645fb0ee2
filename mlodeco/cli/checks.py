"""Checks of the hypergradients of a script's program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import mlodeco
from mlodeco.errors import RunError, counted
from mlodeco.runtime import build, seed_all
from mlodeco.runtime.launch import launched_rank

_OF_TRAINING: Final = (
    "program",
    "accelerator",
    "reduce",
    "tails",
    "compile",
    "mixed_precision",
    "nonfinite",
)
"""Arguments of a run that training before a check has too; nothing is written."""


def check_levels(
    given: Mapping[str, Any],
    levels: Sequence[str],
    *,
    seed: int | None,
    nested: bool,
    at: int | None,
) -> None:
    """Prints the checks of levels.

    Args:
        given: the arguments of the script's run.
        levels: those; none for all that have a path to compare on.
        seed: of the run.
        nested: also against the true derivative.
        at: ticks to train before.

    Raises:
        MlodecoError: there is nothing to compare, or the program does not fit.
    """
    program = given["program"]
    own = program.built.tick if program.built is not None else 0
    if at is not None:
        options = {name: given[name] for name in _OF_TRAINING if name in given}
        mlodeco.run(at, seed=seed, nested=nested, progress="off", **options)
    elif seed is not None:
        seed_all(seed)
    # shards are made, and made whole, by all processes together
    built = build(program)
    is_main = launched_rank() == 0
    if not is_main and not any(one.is_sharded for one in built.levels.values()):
        return
    found = levels or [
        name
        for name in built.levels
        if built.plan(name).visits or (nested and built.needs_nesting(name))
    ]
    if not found:
        raise RunError(
            "no level has a path through lower levels: every hypergradient is the direct gradient.",
            remedy="see what reads what: mlodeco graph.",
        )
    for name in found:
        report = mlodeco.check(name, program=program, nested=nested)
        if is_main:
            print(report)
    if is_main and own:
        print(f"measured after the script's own {counted(own, 'tick')}")
