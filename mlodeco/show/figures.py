"""Figures by matplotlib in one style, and their files."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlodeco.errors import RunError, quoted

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure as Figure

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
    "savefig.facecolor": "auto",
    "svg.hashsalt": "mlodeco",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "text.usetex": False,
}

_METADATA: Final[Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
"""No time of day, so that a picture that is drawn again is the same file."""

_LARGEST: Final = 2**15
"""Pixels on a side: half of what can be drawn, and more than people look at."""


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


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
        _write(figure, found, found.suffix[1:].lower())
    except OSError as error:
        raise RunError(
            f"no picture can be written to {str(path)!r}: {error}.", remedy="give another path."
        ) from error
    return found


def to_svg(figure: Figure) -> str:
    """A figure as SVG, with its texts as texts."""
    text = io.StringIO()
    _write(figure, text, "svg")
    return text.getvalue()


def _write(figure: Figure, file: Path | io.StringIO, form: str) -> None:
    with styled():
        longest = max(figure.get_size_inches())
        dpi = min(_STYLE["savefig.dpi"], _LARGEST / longest)
        figure.savefig(file, format=form, dpi=dpi, metadata=_METADATA[form])


def line_look(number: int) -> dict[str, Any]:
    """The colour and dashes of a line by its number, of which 36 are told apart."""
    turns, place = divmod(number, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "linestyle": _DASHES[(place + turns) % len(_DASHES)],
    }


@functools.cache
def _shown_figure() -> type[Figure]:
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows, which pyplot would see to otherwise."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            with styled():
                self.savefig(file, format="png", dpi="figure")
            return file.getvalue()

    return ShownFigure


def make_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; to be called in :func:`styled`, as what follows."""
    return _shown_figure()(figsize=(width, height))


def add_legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """A legend below the frames, with the names as they are."""
    # names that begin with an underscore would be left out
    legend = figure.legend(handles, ["-"] * len(names), loc="outside lower center", ncols=columns)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


def make_page() -> tuple[Figure, Axes]:
    """A white figure without frames, to draw on in points; :func:`fit_page` gives it its size."""
    figure = make_figure(1, 1)
    figure.set_facecolor("white")
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    return figure, axes


def fit_page(axes: Axes, left: float, bottom: float, right: float, top: float) -> None:
    """Makes the figure just large enough for what is between, in points."""
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    figure = axes.get_figure(root=True)
    if figure is not None:
        figure.set_size_inches((right - left) / 72, (top - bottom) / 72)


def measure(axes: Axes, text: str, **options: Any) -> tuple[float, float]:
    """The width and height of a text in points."""
    artist = axes.text(0, 0, text, parse_math=False, **options)
    extent = artist.get_window_extent()
    artist.remove()
    figure = axes.get_figure(root=True)
    scale = 72 / figure.dpi if figure is not None else 1.0
    return extent.width * scale, extent.height * scale


def add_box(axes: Axes, x: float, y: float, width: float, height: float, **options: Any) -> None:
    """Draws a rectangle with round corners around a middle."""
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    style = f"round,pad=0,rounding_size={height / 4}"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, **options))
