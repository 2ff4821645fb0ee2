"""The table of the methods: what each solves, costs and is for."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from mlodeco.hypergrad import NAMES


def method_table() -> Table:
    """A row for each method of the library, with all its names."""
    names: dict[Any, list[str]] = {}
    for name, method in NAMES.items():
        names.setdefault(method, []).append(name)
    table = Table(
        caption="H: the Hessian of the lower level's loss; b: the derivative of the upper loss in "
        "the lower parameters; v: near H^-1 b.",
        caption_justify="left",
    )
    table.add_column("hypergrad=", no_wrap=True)
    for title in ("solves", "cost", "use it for"):
        table.add_column(title)
    for method, known in names.items():
        guide = method.guide
        table.add_row(*map(Text, ("\n".join(known), guide.solves, guide.cost, guide.when)))
    return table
