"""What becomes of a level's steps whose numbers are not finite."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from mlodeco.errors import NonFiniteError, NonFiniteWarning
from mlodeco.runtime.build import BuiltLevel
from mlodeco.runtime.causes import Cause
from mlodeco.runtime.processes import Processes

POLICIES = ("raise", "skip", "warn")
"""What ``nonfinite=`` may be."""

LONGEST = 100
"""After so many skipped steps of a level in a row nothing is learned any more."""

_NUMBERS = re.compile(r"\b(nan|inf|\d[\d.e+-]*)\b")
"""What differs between two errors of one term."""


class Watch:
    """Decides on the steps of one level that have come to nothing.

    Args:
        level: the level that steps.
        policy: one of :data:`POLICIES`.
    """

    def __init__(self, level: BuiltLevel, policy: str) -> None:
        self._level = level
        self._policy = policy
        self._in_a_row = 0
        self._said: list[tuple[str | None, str]] = []

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped in a row, and what was warned of."""
        return {"in_a_row": self._in_a_row, "said": self._said}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from that state."""
        self._in_a_row, self._said = state["in_a_row"], list(state["said"])

    @property
    def is_strict(self) -> bool:
        """Whether what is not finite ends the run."""
        return self._policy == "raise"

    @property
    def skips(self) -> bool:
        """Whether what is not finite skips its step."""
        return self._policy == "skip"

    def passed(self) -> None:
        """Notes that a step was taken."""
        self._in_a_row = 0

    def judge(self, error: NonFiniteError, where: str) -> bool:
        """Whether a step is skipped; warns once a cause.

        Args:
            error: what was found in it.
            where: what holds the numbers that caused it.

        Raises:
            NonFiniteError: the run is to end by it, now or after so many steps.
        """
        if self.is_strict:
            raise error
        cause = error.level, where or _NUMBERS.sub("", error.found)
        if cause not in self._said:
            self._said.append(cause)
            warnings.warn(f"{error}\n  {self._said_of_more}", NonFiniteWarning, stacklevel=3)
        if not self.skips:
            return False
        self._in_a_row += 1
        if self._in_a_row == LONGEST:
            raise NonFiniteError(
                f"{LONGEST} steps in a row were skipped, so that nothing is learned any more; in "
                f"the last one: {error.found}",
                cause=error.cause,
                when=error.when,
                remedy=error.remedy,
                level=self._level.name,
                site=self._level.site,
            )
        return True

    @property
    def _said_of_more(self) -> str:
        done = "is skipped" if self.skips else "is taken all the same"
        return f"The step {done}, and so are later ones of the same cause, without a word."


def agree(
    processes: Processes,
    error: NonFiniteError | None,
    cause: Cause | None,
    *,
    is_own: bool = False,
) -> tuple[NonFiniteError, str] | None:
    """What all processes take for a step's error, and where it comes from; None for no error.

    That of a process which has found where it comes from, if there is one; else of one whose own
    loss it is.
    """
    if processes.first_with(error is not None) is None:
        return None
    own: dict[str, Any] | None = None
    if error is not None and cause is not None:
        own = {**error.parts(), "where": cause.where, "is_own": is_own}
    found = processes.exchange(own)
    known = [(rank, one) for rank, one in enumerate(found) if one is not None]
    rank, chosen = max(known, key=lambda pair: (bool(pair[1]["where"]), pair[1]["is_own"]))
    where, is_known = chosen.pop("where"), chosen.pop("is_own")
    if processes.count > 1 and (where or is_known):
        chosen["cause"] += f" (In process {rank}.)"
    return NonFiniteError(**chosen), where
