"""Why a run ends, the same in all processes."""

from __future__ import annotations

from collections.abc import Mapping
from signal import Signals as Signal

from mlodeco.errors import counted, quoted
from mlodeco.runtime.context import Context
from mlodeco.runtime.processes import Processes


class Ending:
    """What asks a run to end: something in it, for a reason, or a signal.

    Attributes:
        reason: the first that was given; None if there is none.
        signum: the number of the signal; None if there is none.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.signum: int | None = None

    @property
    def is_near(self) -> bool:
        """Whether the run goes no further than the present tick."""
        return self.reason is not None or self.signum is not None

    def hear(self, ctx: Context) -> None:
        """Takes the reason that a function told ``ctx``, unless there is an earlier one."""
        self.reason = self.reason or ctx.stop_reason

    def agree(self, processes: Processes, received: int | None) -> None:
        """Stops all processes where one has a reason to, for that of the first that has.

        Args:
            processes: those of the run.
            received: the signal that this one has received.
        """
        own = self.reason, received
        if processes.first_with(own != (None, None)) is not None:
            found = processes.exchange(own)
            self.reason = next((reason for reason, _ in found if reason is not None), None)
            self.signum = next((number for _, number in found if number is not None), None)

    def tell(self, steps: int, taken: Mapping[str, int], skipped: Mapping[str, int]) -> str:
        """Why the run ended, for a person.

        Args:
            steps: the ticks that were asked for.
            taken: how many steps each level has taken.
            skipped: how many of them were skipped, since their numbers were not finite.
        """
        if self.signum is not None:
            return f"{Signal(self.signum).name} was received"
        told = f"{_tell_idle(taken)}{_tell_lost(skipped)}"
        return self.reason or f"all {steps} steps were run{told}"


def _tell_idle(taken: Mapping[str, int]) -> str:
    idle = [name for name, count in taken.items() if not count]
    if not idle:
        return ""
    return f"; {quoted(idle)} never had a turn: its lower levels' inner loops are longer"


def _tell_lost(skipped: Mapping[str, int]) -> str:
    told = [f"{counted(count, 'step')} of {name!r}" for name, count in skipped.items()]
    return f"; skipped, since not finite: {', '.join(told)}" if told else ""
