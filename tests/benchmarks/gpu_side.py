"""One cell of the figures on a GPU: a side, measured in the process that calls."""

from __future__ import annotations

import gc
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.metadata import version

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlodeco.calculus.products.automatic import is_out_of_memory
from mlodeco.errors import MlodecoWarning
from mlodeco.hypergrad import Sama
from tests.benchmarks import loop
from tests.benchmarks.case import Case, Loss, Side
from tests.benchmarks.gpu_models import MODELS
from tests.benchmarks.library import Library
from tests.benchmarks.methods import METHODS as CPU_METHODS
from tests.benchmarks.methods import Method
from tests.benchmarks.peers import Betty, UnsupportedError
from tests.benchmarks.sides import LIBRARY, LOOP

BETTY = "betty"
SIDES = (LOOP, LIBRARY, BETTY)
METHODS: dict[str, Method] = {
    "finite_difference": CPU_METHODS["finite_difference"],
    "sama": Method(lambda _: Sama(), loop.sama),
    "neumann": CPU_METHODS["neumann"],
    "cg": CPU_METHODS["cg"],
}
PRECISIONS: dict[str, dict[str, str]] = {"fp32": {}, "bf16": {"mixed_precision": "bf16"}}
"""The options of mlodeco's runner."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    model: str
    method: str
    precision: str
    side: str


@dataclass(frozen=True)
class Way:
    """How every cell is measured."""

    device: str
    tiny: bool
    warmup: int
    steps: int


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        milliseconds: of each timed outer step.
        peak_mib: the most that tensors took in them, parameters included; None on a CPU.
        hypergradient: the first.
        note: what went wrong, or was warned of.
        machine: what it was measured on.
    """

    milliseconds: tuple[float, ...] = ()
    peak_mib: float | None = None
    hypergradient: tuple[float, ...] = ()
    note: str = ""
    machine: dict[str, object] = field(default_factory=dict)


def prepare_process(device: str) -> None:
    """What holds for all of a process."""
    logging.disable(logging.INFO)  # Betty introduces itself
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the libraries that choose by themselves
        torch.set_num_threads(1)


def measure(cell: Cell, way: Way) -> Measured:
    """Measures a side; whatever goes wrong becomes a note."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = _measure(cell, way)
        except UnsupportedError:
            return Measured(note="no such method", machine=_machine(way.device))
        except Exception as error:  # other sides' cells are measured whatever this one raises
            is_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            note = "out of memory" if is_memory else _line(error)
            return Measured(note=note, machine=_machine(way.device))
    said = dict.fromkeys(_line(w.message) for w in heard if issubclass(w.category, MlodecoWarning))
    return replace(found, note="; ".join(said), machine=_machine(way.device))


def _measure(cell: Cell, way: Way) -> Measured:
    case = MODELS[cell.model](tiny=way.tiny)
    case.to(torch.device(way.device))
    side = make_side(cell, case)
    side.tick()
    first = torch.cat([p.grad.flatten() for p in case.upper.parameters() if p.grad is not None])
    hypergradient = tuple(first.tolist())
    for _ in range(way.warmup):
        side.tick()
    gc.collect()
    if way.device == "cpu":
        return Measured(_times(side, way.steps, lambda: None), None, hypergradient)
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    milliseconds = _times(side, way.steps, torch.cuda.synchronize)
    return Measured(milliseconds, torch.cuda.max_memory_allocated() / 2**20, hypergradient)


def _times(side: Side, steps: int, synchronize: Callable[[], object]) -> tuple[float, ...]:
    """The milliseconds of each tick on the clock, until the device has done its work."""
    found = []
    for _ in range(steps):
        synchronize()
        start = time.perf_counter()
        side.tick()
        synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return tuple(found)


def make_side(cell: Cell, case: Case) -> Side:
    """A side that is ready for its first tick, on the device of the case."""
    method = METHODS[cell.method]
    if cell.side == LIBRARY:
        return Library(case, method.library(case), **PRECISIONS[cell.precision])
    if cell.precision == "bf16":
        case = _autocast(case)
    if cell.side == LOOP:
        return _Loop(case, method.tail, late=True)
    side = Betty(case, cell.method)
    return side if cell.method == "finite_difference" else _InMath(side)


def _autocast(case: Case) -> Case:
    """The losses in bf16, of parameters in float32."""

    def cast(loss: Loss) -> Loss:
        def compute(own, batch, other):  # type: ignore[no-untyped-def]
            with torch.autocast(batch[0].device.type, torch.bfloat16):
                return loss(own, batch, other)

        return compute

    return replace(case, lower_loss=cast(case.lower_loss), upper_loss=cast(case.upper_loss))


class _Loop(loop.Loop):
    """The MATH backend where second derivatives are taken, and nowhere else."""

    def gradient_graph(self) -> loop.Tensors:
        with sdpa_kernel(SDPBackend.MATH):
            return super().gradient_graph()

    def cross_by_duals(self, v: loop.Tensors) -> loop.Tensors:
        with sdpa_kernel(SDPBackend.MATH):
            return super().cross_by_duals(v)


class _InMath:
    """A side whose lower steps, too, are under the MATH backend: it has no place for less."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def tick(self) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            self._side.tick()


def _line(what: object) -> str:
    text = str(what).strip().splitlines() or [""]
    return f"{type(what).__name__}: {text[0]}"[:160]


def _machine(device: str) -> dict[str, object]:
    found: dict[str, object] = {
        "device": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "accelerate": version("accelerate"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory_mib": properties.total_memory // 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "tf32_in_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_in_convolutions": torch.backends.cudnn.allow_tf32,
        }
    return found
