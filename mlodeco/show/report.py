"""The table of a hypergradient's check."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from mlodeco.hypergrad import Implicit
from mlodeco.runtime.checking import Agreement, EdgeCheck, Findings

_WIDTH = 110
"""Of the text where it is not for a terminal."""

_LEAST_WIDTH = 60
_WIDE = 90
"""From here on the columns have blanks around them."""


class Report:
    """A check that can be looked at: ``print(mlodeco.check("level"))``, or shown by rich.

    The columns of the table: ``steps`` and ``residual`` are those of the method's own linear
    solve. With x the method's hypergradient and r the converged one, the reference,

    - ``error`` is ``|x - r| / |r|``: 0 is perfect, 1 is as far off as no gradient at all;
    - ``cosine`` is that of the angle between x and r: 1 is the right direction, 0 a right angle,
      below 0 the loss rises;
    - ``length`` is ``|x| / |r|``. With a cosine of 1 it is a learning rate by which x is off.

    ``-`` stands where r, or x, is zero. The row of an edge compares the indirect hypergradients
    with the method on this edge alone and the reference on all others. "all, indirect" compares
    them with all methods as they are, and "all, with the direct" the whole hypergradients, the
    direct gradient, which needs no method, included. "Eq. (2) against nested" compares Eq. (2)
    with the reference on every edge and the true derivative: what no method can mend.

    Attributes:
        findings: the numbers.
    """

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    @property
    def error(self) -> float | None:
        """The relative error of the whole hypergradient."""
        return self.findings.overall.error

    @property
    def cosine(self) -> float | None:
        """The cosine between the whole hypergradient and its reference."""
        return self.findings.overall.cosine

    @property
    def edges(self) -> tuple[EdgeCheck, ...]:
        """Each lower-to-upper edge by itself."""
        return self.findings.edges

    @property
    def advice(self) -> str:
        """Which knob to turn."""
        return self.findings.advice

    def __str__(self) -> str:
        console = Console(width=_width(), force_terminal=False, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().rstrip().split("\n"))

    def __repr__(self) -> str:
        return str(self)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        yield Text(self._title())
        yield self._table(padding=1 if options.max_width >= _WIDE else 0)
        for edge in self.edges:
            if edge.solve is not None and edge.solve.solution.status.is_trouble:
                yield Text(f"{edge.name}: {edge.solve.solution.status.value}.")
        yield Text(self.advice)

    def _title(self) -> str:
        """What is compared with what."""
        reference = {
            solve.level: solve.method.damping
            for solve in self.findings.references
            if isinstance(solve.method, Implicit)
        }
        dampings = set(reference.values())
        name = f"hypergradient of {self.findings.level!r}"
        if not any(dampings):
            return f"{name} against the converged one"
        if len(dampings) == 1:
            return f"{name} against the system with damping {dampings.pop():g}, converged"
        each = ", ".join(f"{damping:g} at {level!r}" for level, damping in reference.items())
        return f"{name} against the systems with damping {each}, converged"

    def _table(self, padding: int) -> Table:
        table = Table(padding=(0, padding))
        table.add_column("edge", overflow="fold")
        table.add_column("method", overflow="fold")
        for name in ("steps", "residual", "error", "cosine", "length"):
            table.add_column(name, justify="right", no_wrap=True)
        for edge in self.edges:
            table.add_row(edge.name, edge.method, *_solve(edge), *figures_of(edge.agreement))
        if self.edges:
            table.add_section()
            table.add_row("all, indirect", "", "", "", *figures_of(self.findings.indirect))
            table.add_row("all, with the direct", "", "", "", *figures_of(self.findings.overall))
        if self.findings.nested is not None:
            table.add_section()
            figures = figures_of(self.findings.nested)
            table.add_row("Eq. (2) against nested", "", "", "", *figures)
        return table


def _width() -> int:
    """The terminal's, if the text is likely to go to one."""
    if not sys.stdout.isatty():
        return _WIDTH
    return max(_LEAST_WIDTH, shutil.get_terminal_size((_WIDTH, 0)).columns)


def _solve(edge: EdgeCheck) -> tuple[str, str]:
    if edge.solve is None:
        return "", ""
    solution = edge.solve.solution
    return str(solution.steps), "" if solution.residual is None else short(solution.residual)


def figures_of(agreement: Agreement) -> tuple[str, str, str]:
    """Error, cosine and length."""
    cosine = "-" if agreement.cosine is None else f"{agreement.cosine:.3f}"
    return short(agreement.error), cosine, short(agreement.length)


def short(value: float | None) -> str:
    """Three decimals, or a power of ten where these do not say it."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value == 0.0 or 0.001 <= value < 1000 else f"{value:.1e}"
