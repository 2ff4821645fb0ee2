"""``python -m tests.benchmarks.compiled``: hypergradients with ``compile=True`` over those without.

Both sides take the same hypergradients at the same point, in float32, on one thread and in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mlodeco.calculus.products import Compiler
from mlodeco.calculus.sweep import Hypergradient
from mlodeco.hypergrad import CG, Identity, Neumann
from mlodeco.runtime.build import build
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import compute_hypergradient, muted_context
from mlodeco.tree import add, norm
from tests.benchmarks.case import Batch, Case
from tests.benchmarks.library import declare
from tests.benchmarks.timing import interleave
from tests.benchmarks.workloads import Block, WeightNet, clean, weighted

METHODS = {"identity": Identity(), "neumann": Neumann(step_size=0.01), "cg": CG(max_steps=10)}


class Numbers(nn.Module):
    """One tensor of parameters."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(*shape))


def decay() -> Case:
    """A weight decay for each of the 10^4 parameters of a linear classifier."""

    def lower(model: nn.Module, batch: Batch, upper: nn.Module) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y) + (upper.values.exp() * model.weight**2).sum()

    return _case(nn.Linear(1000, 10, bias=False), Numbers(10, 1000), lower, 64, 1000)


def quickstart() -> Case:
    """The linear classifier of the first page of the documentation, with a logit an annotator."""

    def lower(model: nn.Module, batch: Batch, upper: nn.Module) -> Tensor:
        x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (upper.values[y].sigmoid() * losses).mean()

    return _case(nn.Linear(20, 10), Numbers(10), lower, 100, 20)


def resnet() -> Case:
    """Two blocks of convolutions with BatchNorm, and a network that weights samples."""
    stem = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]
    model = nn.Sequential(*stem, Block(8, 8), Block(8, 16), *head)
    return _case(model, WeightNet(), weighted, 32, 3, 16, 16)


def transformer() -> Case:
    """A layer of a transformer without dropout, and a network that weights samples."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 32, 10))
    return _case(model, WeightNet(), weighted, 16, 16, 32)


CASES: dict[str, Callable[[], Case]] = {
    "decay": decay,
    "quickstart": quickstart,
    "resnet": resnet,
    "transformer": transformer,
}


def _case(model: nn.Module, upper: nn.Module, lower_loss: object, *shape: int) -> Case:
    batches = [[(torch.randn(shape), torch.randint(10, shape[:1]))] for _ in range(2)]
    return Case(model, upper, lower_loss, clean, *batches, damping=0.0)


def hypergradients(
    case: Case, method: object, compilers: dict[str, Compiler]
) -> Callable[[], Hypergradient]:
    """A call for the hypergradient of the upper level."""
    built = build(declare(case, method))
    batches = {"lower": (Drawn(case.lower_batches[0]),), "upper": (Drawn(case.upper_batches[0]),)}
    make_context = partial(muted_context, built)
    return lambda: compute_hypergradient(built, "upper", batches, make_context, compilers=compilers)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compiled", description=__doc__
    )
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    heads = ("case", "method", "compiled / not", "ms", "ms without", "difference", "compiling, s")
    table = Table(*heads)
    for name in arguments.cases:
        for method in arguments.methods:
            torch.manual_seed(1)
            case, compiler = CASES[name](), Compiler()
            plain = hypergradients(case, METHODS[method], {})
            compiled = hypergradients(case, METHODS[method], {"lower": compiler})
            wanted, start = plain().gradient, time.perf_counter()
            compiled()
            spent = time.perf_counter() - start
            error = norm(add(compiled().gradient, wanted, -1.0)) / norm(wanted)
            times = interleave({"compiled": compiled, "plain": plain}, arguments.rounds)
            table.add_row(
                name,
                method,
                str(times.ratio("compiled", "plain")),
                f"{times.milliseconds('compiled'):.2f}",
                f"{times.milliseconds('plain'):.2f}",
                f"{error:.0e}" if compiler.refusal is None else compiler.refusal,
                f"{spent:.0f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
