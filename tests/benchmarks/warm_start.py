"""Warm starts on the quickstart: errors of truncated solves against converged ones.

One run of the example is stepped; at each tick every method takes the hypergradient at the same
point, with a memory of its own, and every tenth is compared with a converged one.

    python -m tests.benchmarks.warm_start --damping 0.1
"""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from statistics import mean, median

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.optim import Adam

from examples import quickstart
from mlodeco import Program, Runner
from mlodeco.hypergrad import CG, MINRES, Converged, Method, Neumann
from mlodeco.runtime.engine import compute_hypergradient, muted_context
from mlodeco.tree import add, dot, norm

EDGE = ("reweight", "weights")


def methods(damping: float) -> dict[str, Method]:
    """The methods compared, by what the table calls them."""
    found: dict[str, Method] = {}
    for kind in (CG, MINRES):
        for steps in (1, 5):
            for warm in (False, True):
                name = f"{kind.__name__}, {steps} steps, {'warm' if warm else 'cold'}"
                found[name] = kind(max_steps=steps, rtol=0.0, damping=damping, warm_start=warm)
    for warm in (False, True):
        name = f"Neumann, 5 terms, {'warm' if warm else 'cold'}"
        found[name] = Neumann(damping=damping, warm_start=warm)
    return found


def program(seed: int) -> Program:
    """The example's program."""
    digits = quickstart.load(seed)
    found = Program()

    @found.level(
        "weights",
        module=partial(quickstart.network, seed),
        optimizer=quickstart.sgd,
        data=quickstart.batches(digits.noisy, seed),
    )
    def train(model, batch, reweight):
        index, x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (reweight.logits[index].sigmoid() * losses).mean()

    @found.level(
        "reweight",
        lower=["weights"],
        hypergrad=Neumann(num_terms=5, damping=quickstart.WEIGHT_DECAY),
        module={"logits": torch.zeros(len(digits.noisy))},
        optimizer=partial(Adam, lr=0.03),
        data=quickstart.batches(digits.clean, seed),
    )
    def meta(net, batch, weights):
        _, x, y = batch
        return F.cross_entropy(weights(x), y)

    return found


def measure(seed: int, damping: float, ticks: int) -> dict[str, list[tuple[float, float]]]:
    """For each method (relative error, cosine) at every tenth tick after the fiftieth."""
    runner = Runner(program(seed), seed=seed)
    built = runner.built
    compared = methods(damping)
    memories = {name: {} for name in compared}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for tick in range(ticks):
        runner.step()
        batches = {name: level.last_batches for name, level in built.levels.items()}

        def at_this_point(method, memory=None, batches=batches):
            return compute_hypergradient(
                built,
                "reweight",
                batches,
                partial(muted_context, built),
                methods={EDGE: method},
                memories=memory,
            )

        is_compared = tick >= 50 and tick % 10 == 0
        exact = at_this_point(Converged(damping=damping)).gradient if is_compared else {}
        for name, method in compared.items():
            result = at_this_point(method, memories[name])
            memories[name] = result.memories
            if is_compared:
                found[name].append(_compare(result.gradient, exact))
    return found


def _compare(gradient, exact):
    size, wanted = norm(gradient), norm(exact)
    cosine = dot(gradient, exact) / size / wanted if size else 0.0
    return norm(add(gradient, exact, -1.0)) / wanted, cosine


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damping", type=float, default=quickstart.WEIGHT_DECAY)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--ticks", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = measure(options.seed, options.damping, options.ticks)
    table = Table(title=f"damping {options.damping:g}", title_justify="left")
    for name in ("method", "mean error", "median error", "mean cosine"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, figures in found.items():
        errors = [error for error, _ in figures]
        cosine = mean(cosine for _, cosine in figures)
        table.add_row(name, f"{mean(errors):.3f}", f"{median(errors):.3f}", f"{cosine:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
