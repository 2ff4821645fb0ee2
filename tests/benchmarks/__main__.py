"""``python -m tests.benchmarks``: measures, prints tables, and writes JSON if asked to."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from mlodeco.errors import SolverWarning
from tests.benchmarks import tables
from tests.benchmarks.measure import measure_products, measure_steps
from tests.benchmarks.methods import METHODS
from tests.benchmarks.results import Result, Step
from tests.benchmarks.workloads import WORKLOADS


def main() -> None:
    """Measures what the command line asks for; fails if two sides do not do the same."""
    arguments = _arguments()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # other libraries introduce themselves
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.simplefilter("error", SolverWarning)  # a solve that stops early does something else
    results = list(_measure(arguments))
    console = Console(highlight=False)
    console.width = max(console.width, tables.WIDTH)
    tables.show(results, console)
    if arguments.json:
        rows = [{"kind": type(row).__name__.lower(), **asdict(row)} for row in results]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in results:
        if isinstance(row, Step):
            row.agreement.require()


def _measure(arguments: argparse.Namespace) -> Iterator[Result]:
    for workload in arguments.workloads:
        for method in arguments.methods:
            _say(f"{workload}: {method}")
            yield from measure_steps(workload, method, arguments.rounds, peers=arguments.peers)
        _say(f"{workload}: products")
        yield from measure_products(workload, arguments.rounds)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    some = {"type": lambda text: text.split(","), "metavar": "A,B"}
    parser.add_argument("--workloads", default=list(WORKLOADS), help=", ".join(WORKLOADS), **some)
    parser.add_argument("--methods", default=list(METHODS), help=", ".join(METHODS), **some)
    parser.add_argument("--rounds", type=int, default=9, help="at least 2 (default: 9)")
    parser.add_argument("--peers", action="store_true", help="other libraries, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    for given, known in ((arguments.workloads, WORKLOADS), (arguments.methods, METHODS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    return arguments


if __name__ == "__main__":
    main()
