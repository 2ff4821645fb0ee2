"""Multilevel optimization on PyTorch: decorate the training functions that you have, and run."""

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
