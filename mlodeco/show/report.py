"""The table of a hypergradient's check."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mlodeco.runtime.checking import Agreement, EdgeCheck, Findings

_WIDTH = 110


class Report:
    """A check that can be looked at: ``print(mlodeco.check("level"))``, or shown by rich.

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
        console = Console(width=_WIDTH, no_color=True, highlight=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def __repr__(self) -> str:
        return str(self)

    def __rich__(self) -> RenderableType:
        title = f"hypergradient of {self.findings.level!r} against the converged one"
        table = Table(title=title, title_justify="left")
        table.add_column("edge")
        table.add_column("method", overflow="fold")
        for name in ("steps", "residual", "relative error", "cosine", "length"):
            table.add_column(name, justify="right")
        for edge in self.edges:
            table.add_row(edge.name, edge.method, *_solve(edge), *_figures(edge.agreement))
        table.add_section()
        table.add_row("all, indirect", "", "", "", *_figures(self.findings.indirect))
        table.add_row("all, with the direct", "", "", "", *_figures(self.findings.overall))
        if self.findings.nested is not None:
            table.add_section()
            figures = _figures(self.findings.nested)
            table.add_row("Eq. (2) against nested", "", "", "", *figures)
        parts: list[RenderableType] = [table]
        for edge in self.edges:
            if edge.solve is not None and edge.solve.solution.status.is_trouble:
                parts.append(Text(f"{edge.name}: {edge.solve.solution.status.value}."))
        return Group(*parts, Text(self.advice))


def _solve(edge: EdgeCheck) -> tuple[str, str]:
    if edge.solve is None:
        return "", ""
    solution = edge.solve.solution
    return str(solution.steps), "" if solution.residual is None else f"{solution.residual:.1e}"


def _figures(agreement: Agreement) -> tuple[str, str, str]:
    error, cosine, length = agreement.error, agreement.cosine, agreement.length
    return (
        "-" if error is None else f"{error:.2g}",
        "-" if cosine is None else f"{cosine:.3f}",
        "-" if length is None else f"{length:.2g}",
    )
