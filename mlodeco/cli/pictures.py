"""Pictures: the forms in which a graph is shown, and the curves of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import typer
from rich.console import Console

from mlodeco.errors import RunError, quoted
from mlodeco.runtime import read_history
from mlodeco.show import FORMATS, GraphView, plot_histories, save_figure

_TEXTS: Final[Mapping[str, Callable[[GraphView], str]]] = {
    "text": str,
    "mermaid": GraphView.to_mermaid,
    "dot": GraphView.to_dot,
}
_ENDINGS: Final = {"txt": "text", "mmd": "mermaid"}
"""Those of files that are not named as their form."""


def graph_form(form: str | None, out: Path | None) -> str:
    """The form that is asked for: by its name, or by the ending of the file.

    Raises:
        BadParameter: the ending names none, or another than the picture that is asked for.
    """
    if out is None:
        return form or "text"
    ending = out.suffix[1:].lower()
    meant = _ENDINGS.get(ending, ending)
    if form is None and meant not in (*FORMATS, *_TEXTS):
        known = [*FORMATS, "dot", *_ENDINGS]
        raise typer.BadParameter(
            f"{str(out)!r} ends in none of {quoted('.' + each for each in known)}; "
            "name the format by --format.",
            param_hint="--out",
        )
    if form in FORMATS and meant != form:
        raise typer.BadParameter(
            f"{str(out)!r} does not end in '.{form}', the --format.", param_hint="--out"
        )
    return form or meant


def show_graph(view: GraphView, form: str, out: Path | None, script: Path) -> None:
    """Prints a text, or writes a file and prints its path.

    Args:
        view: the graph.
        form: what :func:`graph_form` gives.
        out: the file; by default a picture is named as the script, in the working folder.
        script: the script.

    Raises:
        RunError: the file cannot be written, or matplotlib, for a picture, is not installed.
    """
    if form in FORMATS:
        print(view.save(out or Path(f"{script.stem}.{form}")))
    elif out is not None:
        _write(_TEXTS[form](view), out)
        print(out)
    elif form == "text" and (console := Console()).is_terminal:
        console.print(view)
    else:
        print(_TEXTS[form](view))


def _write(text: str, out: Path) -> None:
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"the graph cannot be written to {str(out)!r}: {error}.", remedy="give another path."
        ) from error


def draw_curves(
    folders: Sequence[Path],
    out: Path,
    levels: Sequence[str],
    metrics: Sequence[str],
    smooth: int | None,
) -> Path:
    """Draws the runs of folders over each other, into a file.

    Args:
        folders: what the runs wrote by ``out=``.
        out: the file.
        levels: those to show.
        metrics: those to show.
        smooth: how many steps a smoothed line averages.

    Raises:
        RunError: a folder holds no run, or the file cannot be written.
    """
    runs = {name: read_history(folder) for name, folder in named(folders).items()}
    return save_figure(plot_histories(runs, level=levels, metric=metrics, smooth=smooth), out)


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, or by their paths where two have the same name."""
    unique = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in unique]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, unique, strict=True)
    }
