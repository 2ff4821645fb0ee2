"""Figures by matplotlib in one style, and their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlodeco.errors import RunError, quoted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS: Final = ("png", "svg", "pdf")
"""The endings of files that figures can be saved to."""

_COLOURS: Final = ("#0b7285", "#a61e8c", "#9a6700", "#1b1f24", "#2b8a3e", "#c92a2a")
_DASHES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))

_STYLE: Final[Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "svg.hashsalt": "mlodeco",
}


@contextmanager
def styled() -> Iterator[None]:
    """The style of the library's figures, in which lines are told apart without their colours.

    Raises:
        RunError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from cycler import cycler
    except ImportError as error:
        raise RunError(
            "pictures need matplotlib, which is not installed.",
            remedy="pip install 'mlodeco[plots]'.",
        ) from error
    lines = cycler(color=_COLOURS) + cycler(linestyle=_DASHES)
    with mpl.rc_context({**_STYLE, "axes.prop_cycle": lines}):
        yield


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure in the format that the file's ending names.

    Raises:
        RunError: it is none of :data:`FORMATS`, or the file cannot be written.
    """
    found = Path(path)
    if found.suffix.removeprefix(".").lower() not in FORMATS:
        raise RunError(
            f"no picture can be written to {str(path)!r}.",
            expected=f"a file that ends in one of {quoted('.' + ending for ending in FORMATS)}.",
            remedy="give it another name.",
        )
    try:
        with styled():
            figure.savefig(found)
    except OSError as error:
        raise RunError(
            f"no picture can be written to {str(path)!r}: {error}.", remedy="give another path."
        ) from error
    return found
