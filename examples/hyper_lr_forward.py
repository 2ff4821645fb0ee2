"""Learns a learning rate and three penalties through thirty steps, by forward recursion.

The data are digits with columns that help less: 64 pixels, the same pixels with noise added, and
256 columns of noise alone. Logistic regression takes 30 steps of gradient descent on 200 images.

    weights    the regression, from zero; `start` holds the zeros
    hyper      four logarithms: the learning rate of the steps, and the coefficient of the squared
               weights for each of the three kinds of columns

So few numbers need no recursion backward through the steps. `UnrollForward` carries the derivative
of the weights in each along with the steps, so that none of them has to be remembered.

The table has the accuracy on images that neither level sees: with the best of 36 pairs of a rate
and one coefficient for all columns; with the best of as many random draws of the four numbers as
`hyper` has turns, and of ten times as many; and with what `hyper` finds. All are chosen by the loss
on the same 300 images, and the search ranges hold what `hyper` finds. A turn carries four
derivatives along and takes the time of thirty to forty plain trainings.

    python examples/hyper_lr_forward.py
"""

import argparse
import itertools
import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlodeco
from mlodeco.hypergrad import UnrollForward

FIRST_SEED = 100
STEPS = 30
NOISE = 256  # columns
KIND = torch.tensor([0] * 64 + [1] * 64 + [2] * NOISE)  # of each column
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
COEFFICIENTS = (1e-5, 1e-4, 0.001, 0.01, 0.1, 1.0)
COLUMNS = ("one\ncoefficient", "\nrandom", "random\nx 10", "\nlearned")
FOUND = ("learning\nrate", "l2:\npixels", "\nnoisy", "\nnoise")


class Data(NamedTuple):
    """The images of one seed, split; each a pair of x and y."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def train(model, batch, hyper):
    x, y = batch
    cost = (hyper.log_l2.exp()[KIND] * model.w.square().sum(dim=1)).sum() / 2
    return F.cross_entropy(x @ model.w, y) + cost


def check(net, batch, weights):
    x, y = batch
    return F.cross_entropy(x @ weights.w, y)


def learned(data: Data, turns: int, seed: int) -> np.ndarray:
    """The four logarithms with the smallest loss on the images held out."""
    program = mlodeco.Program()
    program.level(
        "weights",
        module={"w": zeros()},
        init_from="start",
        optimizer=partial(SGD, lr=0.03),
        tune={"lr": lambda hyper: hyper.log_lr.exp()},
        data=[data.train],
        inner_steps=STEPS,
    )(train)

    above = {"lower": ["weights"], "data": [data.held_out]}
    program.level("start", hypergrad=None, module={"w": zeros()}, **above)(check)

    @program.update("start")
    def stay(params):
        return params, {}

    program.level(
        "hyper",
        hypergrad=UnrollForward(),
        module={
            "log_lr": torch.tensor(math.log(0.03)),
            "log_l2": torch.full((3,), math.log(0.01)),
        },
        optimizer=partial(Adam, lr=0.4),
        **above,
    )(check)

    tried: list[tuple[float, np.ndarray]] = []

    @program.on("before_step", level="hyper")
    @torch.no_grad()
    def watch(hyper, weights):
        four = torch.cat([hyper.log_lr[None], hyper.log_l2])
        tried.append((check(None, data.held_out, weights).item(), four.numpy().copy()))

    mlodeco.run(turns * STEPS, program=program, seed=seed, progress="off")
    return min(tried, key=lambda item: item[0])[1]


def zeros() -> Tensor:
    return torch.zeros(len(KIND), 10)


def fit(data: Data, four: np.ndarray) -> nn.ParameterDict:
    """The same fifty steps without mlodeco."""
    values = torch.tensor(four, dtype=torch.float32)
    hyper = nn.ParameterDict({"log_lr": values[0], "log_l2": values[1:]})
    model = nn.ParameterDict({"w": zeros()})
    optimizer = SGD(model.parameters(), lr=math.exp(four[0]))
    for _ in range(STEPS):
        optimizer.zero_grad()
        train(model, data.train, hyper).backward()
        optimizer.step()
    return model


@torch.no_grad()
def loss(data: Data, four: np.ndarray) -> float:
    with torch.enable_grad():
        model = fit(data, four)
    found = check(None, data.held_out, model).item()
    return found if math.isfinite(found) else math.inf


@torch.no_grad()
def accuracy(data: Data, four: np.ndarray) -> float:
    with torch.enable_grad():
        model = fit(data, four)
    x, y = data.test
    return 100 * ((x @ model.w).argmax(1) == y).float().mean().item()


def experiment(seed: int, turns: int) -> list[float]:
    """One row of the table: four accuracies, then the numbers learned."""
    data = load(seed)
    pairs = itertools.product(RATES, COEFFICIENTS)
    grid = [np.log([rate, *[coefficient] * 3]) for rate, coefficient in pairs]
    generator = np.random.default_rng(seed)
    low, high = (np.log([RATES[end], *[COEFFICIENTS[end]] * 3]) for end in (0, -1))
    draws = list(generator.uniform(low, high, size=(10 * turns, 4)))
    best = [min(tried, key=partial(loss, data)) for tried in (grid, draws[:turns], draws)]
    best.append(learned(data, turns, seed))
    return [accuracy(data, four) for four in best] + np.exp(best[-1]).tolist()


def load(seed: int) -> Data:
    x, y = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    x = (x - x.mean(axis=0)) / (x.std(axis=0) + 0.5)
    noisy = x + generator.normal(scale=2.0, size=x.shape)
    x = np.concatenate([x, noisy, generator.normal(size=(len(x), NOISE))], axis=1)
    parts = np.split(generator.permutation(len(y)), [200, 500])
    return Data(*((torch.tensor(x[i], dtype=torch.float32), torch.tensor(y[i])) for i in parts))


def show(rows: dict[int, list[float]], turns: int) -> None:
    title = f"Test accuracy in % after {STEPS} steps, and what is learned in {turns} turns"
    table = Table(title=title, title_justify="left")
    for column in ("seed", *COLUMNS, *FOUND):
        table.add_column(column, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *formatted(row))
    if len(rows) > 1:
        values = np.array(list(rows.values()))[:, :4]
        error = values.std(axis=0, ddof=1) / len(rows) ** 0.5
        table.add_section()
        table.add_row("mean", *formatted(values.mean(axis=0)))
        table.add_row("std. error", *formatted(error))
    Console(width=100, highlight=False).print(table)


def formatted(row: "list[float] | np.ndarray") -> list[str]:
    return [f"{value:.1f}" for value in row[:4]] + [f"{value:.2g}" for value in row[4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--turns", type=int, default=16, help="of hyper (default: 16)")
    given = parser.parse_args()
    if given.seeds < 1 or given.turns < 1:
        parser.error("--seeds and --turns must be at least 1")
    torch.set_num_threads(1)  # the tensors are too small to share
    seeds = range(FIRST_SEED, FIRST_SEED + given.seeds)
    show({seed: experiment(seed, given.turns) for seed in seeds}, given.turns)


if __name__ == "__main__":
    main()
