"""Time and memory on a GPU: mlodeco beside a hand-written loop and, if installed, Betty.

    python -m tests.benchmarks.gpu --out figures
    python -m tests.benchmarks.gpu --models resnet32 --methods cg --precisions bf16
    python -m tests.benchmarks.gpu --tiny --device cpu     # whether it runs at all

Each cell (model, precision, method and side) has a process of its own; those whose ratios are taken
follow each other. After each, ``gpu.json`` and ``gpu.txt`` are written anew.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks import gpu_side, tables
from tests.benchmarks.agree import difference
from tests.benchmarks.gpu_models import MODELS
from tests.benchmarks.gpu_side import BETTY, METHODS, PRECISIONS, SIDES, Cell, Measured, Way
from tests.benchmarks.sides import LOOP

OUT_OF_TIME = "out of time"
WIDTH = 150
"""What the table needs."""


@dataclass(frozen=True)
class Row:
    """A cell and its figures; None for what there is not.

    Attributes:
        milliseconds: the lower quartile, median and upper quartile of an outer step's.
        peak_mib: the most that tensors took.
        time: the median over that of the loop.
        memory: likewise.
        error: of the first hypergradient, relative to the loop's.
        note: what went wrong, or was warned of.
    """

    cell: Cell
    milliseconds: tuple[float, ...] | None
    peak_mib: float | None
    time: float | None
    memory: float | None
    error: float | None
    note: str


def main(words: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    arguments = _arguments(words)
    arguments.out.mkdir(parents=True, exist_ok=True)
    way = Way(arguments.device, arguments.tiny, arguments.warmup, arguments.steps)
    end = None if arguments.budget is None else time.monotonic() + arguments.budget
    machine: dict[str, Any] = {}
    rows: list[Row] = []
    base = Measured()
    for cell in _cells(arguments):
        print(*astuple(cell), file=sys.stderr, flush=True)
        found = _apart(cell, way, end)
        machine |= found.machine
        if cell.side == LOOP:  # the first of the sides
            base = found
        rows.append(_row(cell, found, base))
        _write(arguments.out, {"machine": machine, "way": asdict(way)}, rows)
    _show(rows, Console(highlight=False))


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """In the order in which they are measured."""
    sides = [side for side in SIDES if side in arguments.sides]
    if BETTY in sides and importlib.util.find_spec(BETTY) is None:
        print("betty cannot be imported and is left out", file=sys.stderr)
        sides.remove(BETTY)
    return [
        Cell(model, method, precision, side)
        for model, precision, method, side in product(
            arguments.models, arguments.precisions, arguments.methods, sides
        )
    ]


def _apart(cell: Cell, way: Way, end: float | None) -> Measured:
    """Measures in a process of its own, which is ended when the time is up."""
    left = None if end is None else end - time.monotonic()
    if left is not None and left <= 0.0:
        return Measured(note=OUT_OF_TIME)
    context = _processes(way.device)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, cell, way))
    process.start()
    sender.close()  # then nothing more can come once the process has ended
    try:
        return receiver.recv() if receiver.poll(left) else Measured(note=OUT_OF_TIME)
    except EOFError:
        process.join()
        return Measured(note=f"the process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        receiver.close()


def _processes(device: str) -> Any:
    """Fresh interpreters for CUDA, which does not outlive a fork; else the imports are shared."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # every optimizer imports torch._dynamo, for seconds
    context.set_forkserver_preload([gpu_side.__name__, "torch._dynamo"])
    return context


def _answer(sender: Connection, cell: Cell, way: Way) -> None:
    gpu_side.prepare_process(way.device)
    sender.send(gpu_side.measure(cell, way))
    sender.close()


def _row(cell: Cell, found: Measured, base: Measured) -> Row:
    """A cell beside the loop's."""
    spread, base_spread = _quartiles(found.milliseconds), _quartiles(base.milliseconds)
    error = None
    if found.hypergradient and base.hypergradient:
        error = difference(torch.tensor(found.hypergradient), torch.tensor(base.hypergradient))
    return Row(
        cell,
        spread,
        found.peak_mib,
        spread[1] / base_spread[1] if spread and base_spread else None,
        found.peak_mib / base.peak_mib if found.peak_mib and base.peak_mib else None,
        error,
        found.note,
    )


def _quartiles(milliseconds: Sequence[float]) -> tuple[float, ...] | None:
    return tuple(quantiles(milliseconds, n=4, method="inclusive")) if milliseconds else None


def _write(out: Path, known: dict[str, Any], rows: list[Row]) -> None:
    """Both files; the figures are moved into place, so that there are always whole ones."""
    cells = [asdict(row) for row in rows]
    figures = known | {"rows": [cell.pop("cell") | cell for cell in cells]}
    part = out / "gpu.json.part"
    part.write_text(json.dumps(figures, indent=1) + "\n")
    part.replace(out / "gpu.json")
    with (out / "gpu.txt").open("w") as file:
        _show(rows, Console(file=file, highlight=False))


def _show(rows: Sequence[Row], console: Console) -> None:
    table = tables.begin(
        "outer steps, each after one lower step",
        ("model", "precision", "method", "side", "ms", "time", "MiB", "memory", "error", "note"),
    )
    for row in rows:
        table.add_row(
            *(row.cell.model, row.cell.precision, row.cell.method, row.cell.side),
            "{1:.1f} ({0:.1f}-{2:.1f})".format(*row.milliseconds) if row.milliseconds else "-",
            tables.number(row.time),
            "-" if row.peak_mib is None else f"{row.peak_mib:.0f}",
            tables.number(row.memory),
            "-" if row.error is None else f"{row.error:.0e}",
            row.note,
        )
    table.caption = (
        "median (quartiles); time and memory over the loop's; peak of what tensors took, parameters"
        " included; relative difference of the first hypergradient from the loop's"
    )
    console.width = max(console.width, WIDTH)
    console.print(table)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    has_cuda = torch.cuda.is_available()
    for name, known in {
        "models": MODELS,
        "methods": METHODS,
        "precisions": PRECISIONS,
        "sides": SIDES,
    }.items():
        parser.add_argument(f"--{name}", nargs="+", choices=list(known), default=list(known))
    parser.add_argument("--out", type=Path, default=Path("gpu-figures"), metavar="DIR")
    parser.add_argument("--tiny", action="store_true", help="small models: whether it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--warmup", type=int, default=3, help="steps before (default: 3)")
    parser.add_argument("--steps", type=int, default=20, help="steps timed (default: 20)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="then stop, with a table")
    arguments = parser.parse_args(words)
    if arguments.device == "cuda" and not has_cuda:
        parser.error("--device cuda: torch finds no GPU")
    if arguments.steps < 2 or arguments.warmup < 0:
        parser.error("--steps must be at least 2, and --warmup 0")
    return arguments


if __name__ == "__main__":
    main()
