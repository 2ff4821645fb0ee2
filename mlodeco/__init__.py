"""Multilevel optimization on PyTorch: decorate the training functions that you have, and run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlodeco import errors, hypergrad, tree
    from mlodeco.api import (
        Program,
        check,
        current_program,
        hypergradient,
        level,
        method,
        on,
        run,
        solve,
        source,
        track,
        update,
        validate,
    )
    from mlodeco.declare.replicas import Replicas
    from mlodeco.errors import MlodecoError, MlodecoWarning
    from mlodeco.runtime import Context, History, Result, Runner, read_history
    from mlodeco.show import Report

__version__ = "0.1.0"

__all__ = [
    "Context",
    "History",
    "MlodecoError",
    "MlodecoWarning",
    "Program",
    "Replicas",
    "Report",
    "Result",
    "Runner",
    "__version__",
    "check",
    "current_program",
    "errors",
    "hypergrad",
    "hypergradient",
    "level",
    "method",
    "on",
    "read_history",
    "run",
    "solve",
    "source",
    "track",
    "tree",
    "update",
    "validate",
]

_MODULES = (
    "api",
    "calculus",
    "cli",
    "declare",
    "errors",
    "graph",
    "hypergrad",
    "runtime",
    "show",
    "tree",
)
_HOMES = ("api", "declare.replicas", "errors", "runtime", "show")


def __getattr__(name: str) -> Any:
    """Loads the library, and torch with it, when something of it is first asked for.

    The command line says what it can do without waiting for that.
    """
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = (vars(import_module(f"{__name__}.{home}")) for home in _HOMES)
    return globals().setdefault(name, next(home[name] for home in homes if name in home))


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
