"""Unrolled differentiation: mlodeco beside a hand-written loop and beside other libraries.

    python -m tests.benchmarks.unroll                     # few-shot learning, and a ResNet
    python -m tests.benchmarks.unroll --parts maml,imaml
    python -m tests.benchmarks.unroll --curve --data DIR  # training curves, of two precisions

``maml`` and ``imaml``: 5 ways, 1 shot, 5 inner steps, four convolutions of 64 filters, 4 tasks at
a time, as noise of Omniglot's shape, with as many queries, or in ``maml15`` 15 a class: there the
queries' own gradient needs more memory than the graph of the steps. The hand-written loop takes one
task after the other.
``resnet``: per-sample weights through K steps of a ResNet-20. The hand-written loop keeps one graph
through all of them. Time and memory are measured as in ``python -m tests.benchmarks``, except that
with K = 50 a round has one tick of each side, and the peak is that of one tick. Before the timing
the gradients are compared; the exit status is 1 if one is not the same. What is not installed is
left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import maml, whole_loop, workloads
from tests.benchmarks.agree import difference
from tests.benchmarks.case import Side
from tests.benchmarks.memory import measure_memory, report
from tests.benchmarks.timing import Ratio, Times, interleave

PARTS = ("maml", "maml15", "imaml", "resnet1", "resnet50")
SIDES = ("loop", "mlodeco", "keep_graph", "higher", "torchopt")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
WIDTH = 120


@dataclass(frozen=True)
class Row:
    """One side of one part.

    Attributes:
        milliseconds: of a tick.
        time: of a tick, over one of the loop.
        peak: megabytes above setup.
        errors: of the first gradient, relative to the loop's, in float32 and in float64.
        note: why there is nothing else.
    """

    part: str
    side: str
    milliseconds: float | None = None
    time: Ratio | None = None
    peak: float | None = None
    errors: tuple[float, float] | None = None
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the side computes something else."""
        return self.errors is not None and any(
            not error <= limit for error, limit in zip(self.errors, TOLERANCE.values(), strict=True)
        )


def make(part: str, side: str, *, tiny: bool = False, double: bool = False) -> Side:
    """A side of a part, ready for its first tick.

    Raises:
        NotImplementedError: it has no such method.
        ImportError: it is not installed.
    """
    if "maml" in part:
        if part == "imaml" and side == "keep_graph":
            raise NotImplementedError
        return maml.SIDES[side](maml.few(part, tiny=tiny, double=double))
    if side not in whole_loop.SIDES:
        raise NotImplementedError
    steps = 2 if tiny and part != "resnet1" else int(part.removeprefix("resnet"))
    return whole_loop.SIDES[side](workloads.make("resnet", tiny=tiny, double=double), steps)


def gradient(part: str, side: str, *, double: bool) -> torch.Tensor:
    """The first one. Of 50 steps only the two first, on two samples: more of them are chaos."""
    made: Any = make(part, side, tiny=part == "resnet50", double=double)
    made.tick()
    return torch.cat([p.grad.flatten() for p in getattr(made, "hyper", None) or made.init])


def measure(part: str, rounds: int) -> list[Row]:
    """Every side of a part."""
    reference = [gradient(part, "loop", double=double) for double in (False, True)]
    rows: dict[str, Row] = {}
    for side in SIDES:
        try:
            found = [gradient(part, side, double=double) for double in (False, True)]
        except NotImplementedError:
            continue
        except Exception as error:  # whatever a library raises, the others go on
            note = f"{type(error).__name__}: {error}".strip().splitlines()[0][:60]
            rows[side] = Row(part, side, note=note)
            continue
        single, double = (difference(g, reference[d]) for d, g in enumerate(found))
        rows[side] = Row(part, side, errors=(single, double))
    runs = [side for side, row in rows.items() if not row.note]
    calls = {side: make(part, side).tick for side in runs}
    times = once_each(calls, rounds) if part == "resnet50" else interleave(calls, rounds)
    del calls
    for side in runs:
        peak = measure_memory(part, side, program="tests.benchmarks.unroll")
        rows[side] = Row(
            part, side, times.milliseconds(side), times.ratio(side, "loop"), peak, rows[side].errors
        )
    return list(rows.values())


def once_each(calls: dict[str, Callable[[], object]], rounds: int) -> Times:
    """As ``interleave``, with one call in a round, and one of each before, which is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for name in order:
        calls[name]()
    for _ in range(rounds):
        for name in order:
            gc.collect()
            start = time.process_time()
            calls[name]()
            seconds[name].append(time.process_time() - start)
        order.reverse()
    return Times(seconds)


def targets(rows: Iterable[Row]) -> list[tuple[str, float | None, float]]:
    """What was set as the goal, found and wanted: ratios, each at most as large."""
    by = {(row.part, row.side): row for row in rows}

    def over(what: str, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        pair = [getattr(by[key], what) if key in by else None for key in (one, other)]
        return pair[0] / pair[1] if None not in pair and pair[1] else None

    found: list[tuple[str, float | None, float]] = []
    for peer in ("higher", "torchopt"):
        one, other = ("maml", "mlodeco"), ("maml", peer)
        found.append((f"maml: time over {peer}", over("milliseconds", one, other), 1.2))
        found.append((f"maml: memory over {peer}", over("peak", one, other), 0.6))
    for part in ("maml", "resnet50"):
        kept, loop = (part, "keep_graph"), (part, "loop")
        ratio = over("milliseconds", kept, loop)
        found.append((f"{part}: keep_graph, time over the loop", ratio, 1.05))
    long, short = ("resnet50", "mlodeco"), ("resnet1", "mlodeco")
    without = [_without_stored(by.get(key)) for key in (long, short)]
    ratio = without[0] / without[1] if without[0] is not None and without[1] else None
    found.append(("resnet: memory of 50 steps over 1, without stored states", ratio, 1.3))
    loop = ("resnet50", "loop")
    found.append(("resnet50: memory over the loop", over("peak", long, loop), 0.2))
    found.append(("resnet50: time over the loop", over("milliseconds", long, loop), 1.3))
    return found


def _without_stored(row: Row | None) -> float | None:
    if row is None or row.peak is None:
        return None
    steps = int(row.part.removeprefix("resnet"))
    return row.peak - whole_loop.stored(workloads.make("resnet", tiny=True), steps)


def show(rows: list[Row], console: Console) -> None:
    """Prints what was found, and beside it what was wanted."""
    table = Table(title="one tick, over one of the hand-written loop", title_justify="left")
    for column in ("part", "side", "ms", "time", "peak MB", "memory", "error", "float64", "note"):
        words = column in ("part", "side", "note")
        table.add_column(column, justify="left" if words else "right")
    peaks = {row.part: row.peak for row in rows if row.side == "loop"}
    for row in rows:
        base = peaks.get(row.part)
        table.add_row(
            row.part,
            row.side,
            _text("{:.0f}", row.milliseconds),
            "-" if row.time is None else str(row.time),
            _text("{:.0f}", row.peak),
            _text("{:.2f}", row.peak / base if row.peak is not None and base else None),
            *(_text("{:.0e}", error) for error in row.errors or (None, None)),
            row.note,
        )
    console.print(table)
    goals = Table(title="targets", title_justify="left")
    for column in ("what", "found", "at most", "met"):
        goals.add_column(column, justify="left" if column == "what" else "right")
    for what, found, wanted in targets(rows):
        met = "-" if found is None else "yes" if found <= wanted else "no"
        goals.add_row(what, _text("{:.2f}", found), f"{wanted:.2f}", met)
    console.print(goals)


def _text(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)


def curve(data: Path | None, steps: int, console: Console) -> None:
    """Query losses of mlodeco and of the loop, from one seed on the same tasks."""
    from examples import maml_omniglot as example

    table = Table(title=f"query loss over {steps} steps of the initialization: largest difference")
    for column in ("tasks", "precision", "first", "last", "largest difference"):
        table.add_column(column, justify="left" if column == "tasks" else "right")
    if data is None:
        source, network = example.Divisions(0), lambda: example.small(0)
    else:
        source = example.Omniglot(example.read(data), ways=5, shots=1)
        network = lambda: example.conv4(0, 5)  # noqa: E731
    for dtype in (torch.float32, torch.float64):
        stream = example.stream(source, "learn", 0)
        tasks = [_as(example.stacked(stream, 4), dtype) for _ in range(steps)]
        case = maml.Few(lambda dtype=dtype: network().to(dtype), tasks, implicit=False)
        losses = []
        for side in ("loop", "mlodeco"):
            made: Any = maml.SIDES[side](case)
            found = []
            for _ in range(steps):
                made.tick()
                found.append(made.loss)
            losses.append(found)
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
        ends = (f"{median(part):.4f}" for part in (losses[0][:5], losses[0][-5:]))
        name = "digits" if data is None else "Omniglot"
        table.add_row(name, str(dtype).removeprefix("torch."), *ends, f"{apart:.1e}")
    console.print(table)


def _as(task: maml.Task, dtype: torch.dtype) -> maml.Task:
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in task.items()}


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.unroll")
    some = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--parts", default=list(PARTS), help=", ".join(PARTS), **some)
    parser.add_argument("--rounds", type=int, default=9, help="at least 2 (default: 9)")
    parser.add_argument("--long-rounds", type=int, default=3, help="of resnet50 (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--curve", action="store_true", help="training curves instead")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Omniglot, for the curves")
    parser.add_argument("--steps", type=int, default=50, help="of the curves (default: 50)")
    given = parser.parse_args()
    unknown = [part for part in given.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if min(given.rounds, given.long_rounds) < 2:
        parser.error("there must be at least 2 rounds")
    _quiet()
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    if given.curve:
        curve(given.data, given.steps, console)
        return
    rows: list[Row] = []
    for part in given.parts:
        print(part, file=sys.stderr, flush=True)
        rows += measure(part, given.long_rounds if part == "resnet50" else given.rounds)
    show(rows, console)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.is_wrong for row in rows):
        raise SystemExit(1)


def _quiet() -> None:
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # other libraries introduce themselves
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def peak(part: str, side: str) -> None:
    """In a fresh process: prints the megabytes."""
    _quiet()
    small = make(part, side, tiny=True)
    for _ in range(3):
        small.tick()
    report(make(part, side).tick, 1 if part == "resnet50" else 3)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        peak(*sys.argv[1:])
    else:
        main()
