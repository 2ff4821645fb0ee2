"""Learns the learning rates of a network that has twenty steps to learn digits.

Three levels:

    weights    a network of four layers that starts from `start` and takes 20 steps of SGD
    start      its initial weights: nothing learns them, they are drawn anew at each turn
    rates      the logarithms of learning rates and of a weight decay, so that the network after
               its 20 steps fits images that it was not trained on

`rates` enters only in the steps, and its derivative goes back through all twenty. It is done
twice. `tune=` computes two options of torch's SGD, one rate and the decay. With `@update` the steps
are a function of the program's own, and there is a rate for each weight matrix and each bias.

Both begin with a rate of 0.02, far too small. What is learned is the mean of the logarithms over
those eight turns in a row whose losses have the smallest mean: single turns draw single networks,
and beyond the largest rate that works the losses leap.

The table compares the accuracy on 797 other images, the mean over ten networks from initial
weights that are new to all: with the rate and decay at the beginning; with the best of 18 pairs of
a fixed rate and decay, chosen on the images that `rates` sees, with ten networks trained for each
pair; and with what is learned.

    python examples/learned_learning_rate.py
"""

import argparse
import itertools
import math
from collections.abc import Mapping
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
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco.hypergrad import Unroll

FIRST_SEED = 100
STEPS = 20
WINDOW = 8
START, DECAY = 0.02, 1e-3
MOMENTUM = 0.9
GRID = list(itertools.product((0.02, 0.05, 0.1, 0.2, 0.3, 0.5), (0.0, 1e-3, 1e-2)))
LAYERS = (0, 2, 4, 6)  # where in the network the linear layers are
NAMES = [f"{layer}.{kind}" for layer in LAYERS for kind in ("weight", "bias")]
COLUMNS = ("at first", "best pair", "one learned", "one each")


class Digits(NamedTuple):
    """The images of one seed, split."""

    train: TensorDataset
    held_out: TensorDataset  # for rates, and to choose a fixed rate
    test: TensorDataset


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in LAYERS[:-1]:
        layers += [nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def train(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def check(net, batch, weights):
    x, y = batch
    return F.cross_entropy(weights(x), y)


def declare(digits: Digits, seed: int, *, each: bool) -> mlodeco.Program:
    """The program with one learning rate, or with one for each tensor."""
    program = mlodeco.Program()
    weights = program.level(
        "weights",
        module=partial(network, seed),
        init_from="start",
        data=batches(digits.train, seed),
        inner_steps=STEPS,
        **({} if each else tuned()),
    )
    weights(train)

    if each:

        @program.update("weights")
        def momentum(params, grads, state, rates):
            found = dict(zip(NAMES, rates.log_lr.exp(), strict=True))
            decay = rates.log_decay.exp()
            moved, velocity = {}, {}
            for name, value in params.items():
                gradient = grads[name] + decay * value
                before = state[name] if name in state else torch.zeros_like(value)
                velocity[name] = MOMENTUM * before + gradient
                moved[name] = value - found[name] * velocity[name]
            return moved, velocity

    start = {"lower": ["weights"], "hypergrad": None, "data": [digits.held_out.tensors]}
    program.level("start", module=partial(network, seed), **start)(check)
    seeds = itertools.count(1000 * seed)

    @program.update("start")
    def redraw(params):
        return dict(network(next(seeds)).named_parameters()), {}

    program.level(
        "rates",
        lower=["weights"],
        hypergrad=Unroll(),
        module={
            "log_lr": torch.full((len(NAMES) if each else 1,), math.log(START)),
            "log_decay": torch.tensor(math.log(DECAY)),
        },
        optimizer=partial(Adam, lr=0.12, betas=(0.5, 0.9)),
        clip_norm=1.0,  # a step too long for the network makes enormous derivatives
        data=[digits.held_out.tensors],
    )(check)
    return program


def tuned() -> Mapping[str, object]:
    """Options of `weights` with torch's own SGD."""
    return {
        "optimizer": partial(SGD, lr=0.05, momentum=MOMENTUM),
        "tune": {
            "lr": lambda rates: rates.log_lr.exp(),
            "weight_decay": lambda rates: rates.log_decay.exp(),
        },
    }


def fit(digits: Digits, seed: int, rates: Mapping[str, float], decay: float) -> nn.Module:
    """Ordinary training without mlodeco, with a rate for each tensor."""
    model = network(seed)
    groups = [{"params": [p], "lr": rates[name]} for name, p in model.named_parameters()]
    optimizer = SGD(groups, momentum=MOMENTUM, weight_decay=decay)
    steps = 0
    while steps < STEPS:
        for batch in batches(digits.train, seed):
            optimizer.zero_grad()
            train(model, batch).backward()
            optimizer.step()
            steps += 1
            if steps == STEPS:
                break
    return model


@torch.no_grad()
def accuracy(models: list[nn.Module], data: TensorDataset) -> float:
    x, y = data.tensors
    return 100 * float(np.mean([(m(x).argmax(1) == y).float().mean().item() for m in models]))


@torch.no_grad()
def loss(models: list[nn.Module], data: TensorDataset) -> float:
    return float(np.mean([train(model, data.tensors).item() for model in models]))


def experiment(seed: int, turns: int) -> tuple[list[float], dict[str, float]]:
    """One row of the table, and the rates learned."""
    digits = load(seed)
    first = 10**6 + 1000 * seed
    choosing, testing = range(first, first + 10), range(first + 100, first + 110)

    def models(rates: Mapping[str, float], decay: float, seeds: range) -> list[nn.Module]:
        return [fit(digits, s, rates, decay) for s in seeds]

    def fixed(rate: float, decay: float, seeds: range) -> list[nn.Module]:
        return models(dict.fromkeys(NAMES, rate), decay, seeds)

    losses = {pair: loss(fixed(*pair, choosing), digits.held_out) for pair in GRID}
    best = min(GRID, key=lambda pair: losses[pair] if math.isfinite(losses[pair]) else math.inf)
    row = [accuracy(fixed(*pair, testing), digits.test) for pair in ((START, DECAY), best)]
    for each in (False, True):
        program = declare(digits, seed, each=each)
        path: list[tuple[float, Tensor, Tensor]] = []

        @program.on("after_backward", level="rates")
        def watch(rates, loss, path=path):
            found = rates.log_lr.detach().clone(), rates.log_decay.detach().clone()
            path.append((float(loss), *found))

        mlodeco.run(turns * STEPS, program=program, seed=seed, progress="off")
        windows = [path[end - WINDOW : end] for end in range(WINDOW, turns + 1)] or [path]
        smallest = min(windows, key=lambda window: sum(item[0] for item in window))
        log_lr, log_decay = (
            torch.stack(part).mean(0) for part in list(zip(*smallest, strict=True))[1:]
        )
        values = log_lr.exp().expand(len(NAMES)).tolist()
        rates = dict(zip(NAMES, values, strict=True))
        row.append(accuracy(models(rates, log_decay.exp().item(), testing), digits.test))
    return row, rates


def load(seed: int) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return Digits(*(TensorDataset(x[i], y[i]) for i in order.split([600, 400, len(y) - 1000])))


def batches(data: TensorDataset, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, 64, shuffle=True, drop_last=True, generator=generator)


def show(rows: dict[int, list[float]], rates: dict[str, float], turns: int) -> None:
    title = f"Test accuracy in % after {STEPS} steps; learned in {turns} turns"
    table = Table(title=title, title_justify="left")
    for column in ("seed", *COLUMNS):
        table.add_column(column, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(f"{value:.1f}" for value in row))
    if len(rows) > 1:
        values = np.array(list(rows.values()))
        error = values.std(axis=0, ddof=1) / len(rows) ** 0.5
        table.add_section()
        table.add_row("mean", *(f"{value:.1f}" for value in values.mean(axis=0)))
        table.add_row("std. error", *(f"{value:.1f}" for value in error))
    console = Console(width=100, highlight=False)
    console.print(table)
    learned = ", ".join(f"{name} {rate:.2g}" for name, rate in rates.items())
    console.print(f"Rates of seed {max(rows)}: {learned}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--turns", type=int, default=40, help="of rates (default: 40)")
    given = parser.parse_args()
    if given.seeds < 1 or given.turns < 1:
        parser.error("--seeds and --turns must be at least 1")
    torch.set_num_threads(1)  # the tensors are too small to share
    rows, rates = {}, {}
    for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
        rows[seed], rates = experiment(seed, given.turns)
    show(rows, rates, given.turns)


if __name__ == "__main__":
    main()
