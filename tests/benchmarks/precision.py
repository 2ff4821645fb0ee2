"""Hypergradients in half precision beside those in float32, at the same points.

The quickstart's network, and a transformer layer that reads the same images as 8 tokens, are
trained in float32 for some ticks. Then each method takes the hypergradient of the weights of the
samples on several pairs of batches in float32, bf16 and fp16.

    python -m tests.benchmarks.precision
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import Adam

import mlodeco
from examples import quickstart
from mlodeco.hypergrad import CG, Neumann
from mlodeco.tree import dot, norm

DAMPING = quickstart.WEIGHT_DECAY
METHODS: dict[str, Any] = {
    "identity": "identity",
    "neumann, 5 terms": Neumann(num_terms=5, damping=DAMPING),
    "cg, 5 steps": CG(max_steps=5, damping=0.1),
    "sama": "sama",
    "finite_difference": "finite_difference",
    "unroll, 3 steps": "unroll",
}


class Transformer(nn.Module):
    """A transformer layer on the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x.view(-1, 8, 8))).mean(1))


def transformer(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer()


NETWORKS = {"the quickstart's network": quickstart.network, "a transformer layer": transformer}


def program(
    model: nn.Module, logits: nn.Module, digits: quickstart.Digits, precision: str
) -> mlodeco.Program:
    """The quickstart's program on given modules, in a precision."""
    found = mlodeco.Program()

    @found.level(
        "weights",
        module=model,
        optimizer=quickstart.sgd,
        data=quickstart.batches(digits.noisy, 0),
        inner_steps=3,
        precision=precision,
    )
    def train(model, batch, reweight):
        index, x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (reweight.logits[index].sigmoid() * losses).mean()

    @found.level(
        "reweight",
        lower=["weights"],
        module=logits,
        optimizer=partial(Adam, lr=0.03),
        data=quickstart.batches(digits.clean, 0),
        precision=precision,
    )
    def meta(net, batch, weights):
        _, x, y = batch
        return F.cross_entropy(weights(x), y)

    return found


def cosines(network: str, ticks: int, pairs: int) -> Iterator[tuple[str, str, list[float]]]:
    """For each method and precision the cosines with float32, one for each pair of batches."""
    seed = quickstart.FIRST_SEED
    digits = quickstart.load(seed)
    model = NETWORKS[network](seed)
    logits = nn.ParameterDict({"logits": nn.Parameter(torch.zeros(len(digits.noisy)))})
    programs = {name: program(model, logits, digits, name) for name in ("fp32", "bf16", "fp16")}
    # by a program of its own, so that all others have a fresh optimizer
    training = program(model, logits, digits, "fp32")
    mlodeco.run(ticks, program=training, progress="off", seed=seed)
    low = list(islice(quickstart.endless(quickstart.batches(digits.noisy, 1)), 3 * pairs))
    top = list(islice(quickstart.endless(quickstart.batches(digits.clean, 1)), pairs))
    for title, method in METHODS.items():
        found: dict[str, list[Any]] = {name: [] for name in programs}
        for name, one in programs.items():
            for n in range(pairs):
                loop = low[3 * n : 3 * n + 3]
                batches = {"weights": loop if "unroll" in title else loop[-1], "reweight": top[n]}
                found[name].append(
                    mlodeco.hypergradient(
                        "reweight", batches=batches, hypergrad=method, program=one
                    )
                )
        for name in ("bf16", "fp16"):
            pairs_of = zip(found["fp32"], found[name], strict=True)
            yield title, name, [dot(a, b) / norm(a) / norm(b) for a, b in pairs_of]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ticks", type=int, default=100, help="ticks of training before")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="Cosine with float32: the smallest over the pairs of batches")
    for column in ("network", "method", "bf16", "fp16"):
        table.add_column(column)
    for network in NETWORKS:
        rows: dict[str, dict[str, float]] = {}
        for title, name, values in cosines(network, arguments.ticks, arguments.pairs):
            rows.setdefault(title, {})[name] = min(values)
        for title, row in rows.items():
            table.add_row(network, title, f"{row['bf16']:.4f}", f"{row['fp16']:.4f}")
    Console(width=100, highlight=False).print(table)


if __name__ == "__main__":
    main()
