"""Exceptions, warnings and the way their messages are built.

Every message says where the mistake is, what was found, what was expected and
what to do about it. The parts are attributes, so that tests and tools need not
parse the text.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` most resembles, or None."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def quoted(names: Iterable[str]) -> str:
    """``'a', 'b'`` for a message; ``none`` for an empty list."""
    return ", ".join(repr(name) for name in names) or "none"


def counted(number: int, what: str) -> str:
    """``1 step``, ``2 steps``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading space, or an empty string."""
    match = closest(name, known)
    return f" Did you mean {match!r}?" if match else ""


class MlodecoError(Exception):
    """Base of everything that mlodeco raises for a mistake in a program.

    Args:
        found: what was found.
        remedy: what to do about it.
        expected: what was expected, where ``found`` does not say it.
        level: the name of the level at fault.
        source: the name of the source at fault.
        site: ``file:line`` of the function at fault.
    """

    def __init__(
        self,
        found: str,
        *,
        remedy: str,
        expected: str = "",
        level: str | None = None,
        source: str | None = None,
        site: str | None = None,
    ) -> None:
        self.found = found
        self.expected = expected
        self.remedy = remedy
        self.level = level
        self.source = source
        self.site = site
        super().__init__(self._message())

    def _message(self) -> str:
        where = f"source {self.source!r}" if self.source is not None else ""
        where = f"level {self.level!r}" if self.level is not None else where
        if self.site:
            where = f"{where} ({self.site})" if where else self.site
        lines = [f"{where}: {self.found}" if where else self.found, *self._more()]
        if self.expected:
            lines.append(f"  Expected: {self.expected}")
        lines.append(f"  Remedy: {self.remedy}")
        return "\n".join(lines)

    def _more(self) -> list[str]:
        """What a kind of error says beside."""
        return []


class DeclarationError(MlodecoError):
    """A decorator was given something that cannot be right."""


class BindingError(MlodecoError):
    """An argument of a user's function names nothing that the program knows."""


class GraphError(MlodecoError):
    """The levels do not form a dataflow graph: an unknown level, a cycle."""


class ModuleError(MlodecoError):
    """A level's module or its selection of parameters cannot be used."""


class OptimizerError(MlodecoError):
    """A level's optimizer or scheduler cannot be used."""


class DataError(MlodecoError):
    """A level's data are missing, empty or not re-iterable."""


class MethodError(MlodecoError):
    """A hypergradient method is unknown, misused or failed."""


class LossError(MlodecoError):
    """A level function returned something that is not its loss."""


class NonFiniteError(MlodecoError):
    """A loss, cotangent, solution or gradient is infinite or not a number.

    Args:
        found: which of them.
        remedy: what to do about it.
        expected: what was expected.
        level: the name of the level at fault.
        site: ``file:line`` of its function.
        when: the step in which it was found.
        cause: where the numbers likely came from.
    """

    def __init__(
        self,
        found: str,
        *,
        remedy: str,
        expected: str = "",
        level: str | None = None,
        site: str | None = None,
        when: str = "",
        cause: str = "",
    ) -> None:
        self.when = when
        self.cause = cause
        super().__init__(found, remedy=remedy, expected=expected, level=level, site=site)

    def explain(self, *, when: str, cause: str, remedy: str) -> None:
        """Adds what is known of the step in which it was found."""
        self.when, self.cause, self.remedy = when, cause, remedy
        self.args = (self._message(),)

    def parts(self) -> dict[str, str | None]:
        """The arguments of its constructor."""
        names = ("found", "remedy", "expected", "level", "site", "when", "cause")
        return {name: getattr(self, name) for name in names}

    def _more(self) -> list[str]:
        more = (("At", self.when), ("Likely cause", self.cause))
        return [f"  {title}: {text}" for title, text in more if text]


class RunError(MlodecoError):
    """A run was asked for that cannot be done."""


class CheckpointError(MlodecoError):
    """A checkpoint cannot be written, or cannot be used."""


class Preempted(SystemExit):
    """A run ended by SIGTERM or SIGINT, behind a last checkpoint; it leaves the process.

    Args:
        message: how to go on.
        signum: the signal; the exit status is 128 more.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(128 + signum)
        self.message = message
        self.signum = signum

    def __str__(self) -> str:
        return self.message


class MlodecoWarning(UserWarning):
    """Base of mlodeco's warnings."""


class GraphWarning(MlodecoWarning):
    """The graph is legal and probably not what was meant."""


class ModuleWarning(MlodecoWarning):
    """A factory of a module holds on to layers that it does not make anew."""


class FallbackWarning(MlodecoWarning):
    """A product fell back to a slower or less exact mode."""


class SolverWarning(MlodecoWarning):
    """A linear solve ended in trouble; its solution is used as it is."""


class NonFiniteWarning(MlodecoWarning):
    """Numbers of a step are not finite; it is skipped, or taken all the same, as asked."""


class DriftWarning(MlodecoWarning):
    """The processes of a run no longer have the same parameters."""


class CheckpointWarning(MlodecoWarning):
    """A checkpoint was not written, or was passed over, or does not hold everything."""


class RedeclarationWarning(MlodecoWarning):
    """A declaration replaced one of another function, or came too late for a Runner."""
