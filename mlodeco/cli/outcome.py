"""How a command ends: its exit code, and what is said of an error."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import typer

from mlodeco.errors import MlodecoError
from mlodeco.runtime.launch import launched_rank

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


@contextmanager
def outcome(*, with_traceback: bool) -> Iterator[None]:
    """Ends the process with code 1 on an error, and with 130 on Ctrl-C.

    A mistake in a program is told by its message, anything else by the traceback from the
    script on.

    Args:
        with_traceback: the whole traceback, of both.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    except Exception as error:
        if with_traceback:
            traceback.print_exception(error)
        elif isinstance(error, MlodecoError):
            print(_message(error), file=sys.stderr)
        else:
            traceback.print_exception(type(error), error, _of_script(error.__traceback__))
        raise typer.Exit(1) from None


def _message(error: MlodecoError) -> str:
    """The message, in full from the main process, and in one line from others."""
    text = "\n".join((str(error), *getattr(error, "__notes__", ())))
    rank = launched_rank()
    return f"error: {text}" if rank == 0 else f"process {rank}: {text.partition(chr(10))[0]}"


def _of_script(found: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of the command line above the script."""
    while found is not None and found.tb_frame.f_globals.get("__package__") == __package__:
        found = found.tb_next
    return found
