"""The forms in which ``mlodeco graph`` shows a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, get_args

import typer
from rich.console import Console

from mlodeco.errors import RunError, quoted
from mlodeco.show import FORMATS, GraphView

GraphForm = Literal["text", "mermaid", "dot", "svg", "png", "pdf"]
"""What ``--format`` may be."""

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
    if form is None and meant not in get_args(GraphForm):
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
        form: a :data:`GraphForm`.
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
