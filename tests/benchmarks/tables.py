"""The results as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from tests.benchmarks.results import Peer, Product, Result, Step
from tests.benchmarks.timing import Ratio

WIDTH = 120
"""What the tables need."""


def show(results: Sequence[Result], console: Console) -> None:
    """Prints a table for each kind of result that there is."""
    for make in (steps, products, peers):
        table = make(results)
        if table.row_count:
            console.print(table)


def steps(results: Iterable[Result]) -> Table:
    """Ticks of mlodeco beside the hand-written loop."""
    table = begin(
        "steps: one tick of mlodeco / one of the hand-written loop",
        ("workload", "method", "loop ms", "time", "target", "met", "memory", "error", "passes"),
    )
    for row in results:
        if isinstance(row, Step):
            agreement = row.agreement
            same = agreement.library == agreement.loop
            passes = str(agreement.loop) if same else f"{agreement.library}, {agreement.loop}"
            table.add_row(
                row.workload,
                row.method,
                f"{row.loop_ms:.2f}",
                str(row.time),
                *_judged(row.time, row.target),
                str(row.memory),
                f"{agreement.error:.0e}",
                passes,
            )
    table.caption = (
        "median (quartiles) of the rounds' ratios; peak memory above setup, ratio; relative "
        "difference of the hypergradients; forward passes lower+upper / backward passes a tick"
    )
    return table


def products(results: Iterable[Result]) -> Table:
    """Cross products by the one mode beside the other."""
    table = begin(
        "products: the cross product alone, one mode / another",
        ("workload", "mode", "over", "over ms", "time", "target", "met", "memory", "target"),
    )
    for row in results:
        if isinstance(row, Product):
            table.add_row(
                row.workload,
                row.mode,
                row.base,
                f"{row.base_ms:.1f}",
                str(row.time),
                *_judged(row.time, row.target),
                str(row.memory),
                number(row.memory_target),
            )
    return table


def peers(results: Iterable[Result]) -> Table:
    """Other libraries beside the hand-written loop."""
    table = begin(
        "peers: one tick of a library / one of the hand-written loop",
        ("workload", "method", "library", "time", "error", "note"),
    )
    for row in results:
        if isinstance(row, Peer):
            error = "-" if row.error is None else f"{row.error:.0e}"
            time = "-" if row.time is None else str(row.time)
            table.add_row(row.workload, row.method, row.peer, time, error, row.note)
    return table


def begin(title: str, columns: Iterable[str]) -> Table:
    """An empty table; numbers stand to the right."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    words = {"workload", "model", "precision", "method", "mode", "over", "library", "side", "note"}
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right")
    return table


def number(value: float | None) -> str:
    """Two digits behind the point, or a dash."""
    return "-" if value is None else f"{value:.2f}"


def _judged(ratio: Ratio, target: float | None) -> tuple[str, str]:
    """The target, and whether the median meets it, or at least the lower quartile."""
    if target is None:
        return "-", "-"
    if ratio.median <= target:
        return number(target), "yes"
    return number(target), "within noise" if ratio.low <= target else "no"
