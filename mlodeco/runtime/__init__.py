"""The side effects: modules, optimizers, data, steps. The only importer of accelerate."""

from accelerate import Accelerator

from mlodeco.runtime.build import Build, build
from mlodeco.runtime.checkpoint.reading import read_history
from mlodeco.runtime.context import Context
from mlodeco.runtime.history import History, SolveRecord, StepRecord, Tick, ValidationRecord
from mlodeco.runtime.result import Best, Result
from mlodeco.runtime.runner import Listener, Runner
from mlodeco.runtime.seeding import seed_all

__all__ = [
    "Accelerator",
    "Best",
    "Build",
    "Context",
    "History",
    "Listener",
    "Result",
    "Runner",
    "SolveRecord",
    "StepRecord",
    "Tick",
    "ValidationRecord",
    "build",
    "read_history",
    "seed_all",
]
