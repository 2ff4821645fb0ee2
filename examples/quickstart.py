"""Learns which labels to trust: handwritten digits, 40 % of the training labels wrong.

A network is trained on 1247 images. In 40 % of them, chosen at random, the label y was replaced
by y + 1 (mod 10), and nothing says in which. Another 50 images, five a class, have clean labels.
Two levels use both sets at once:

    weights    trains the network on the noisy set, each sample's loss multiplied by its weight
    reweight   learns the 1247 weights, so that the network trained with them fits the clean set

The table compares the accuracy on 500 other images with what can be done without a second level:
train on the noisy set as it is, on the clean set only, or on both pooled. All four start from the
same initial weights and take the same number of steps with the same optimizer. AUC says how well
the learned weights tell right labels from wrong ones: 1 is perfect, 0.5 is chance.

    python examples/quickstart.py --seeds 10
"""

import argparse
from collections.abc import Iterable
from functools import partial
from statistics import mean, stdev
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import mlodeco
from mlodeco.hypergrad import Neumann

FIRST_SEED = 100
WEIGHT_DECAY = 3e-3
COLUMNS = ("plain", "clean set only", "both pooled", "reweighted", "AUC")

sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)


class Digits(NamedTuple):
    """The images of one seed, split. Items of the sets are (index, image, label)."""

    noisy: TensorDataset
    clean: TensorDataset
    test: TensorDataset
    wrong: Tensor  # for each noisy label, whether it was changed; used for the AUC only


def experiment(seed: int, steps: int) -> list[float]:
    """One row of the table: four accuracies in % and the AUC."""
    digits = load(seed)
    program = mlodeco.Program()

    @program.level(
        "weights",
        module=partial(network, seed),
        optimizer=sgd,
        data=batches(digits.noisy, seed),
    )
    def train(model, batch, reweight=None):
        index, x, y = batch
        losses = F.cross_entropy(model(x), y, reduction="none")
        if reweight is None:  # the plain function, called without the other level
            return losses.mean()
        return (reweight.logits[index].sigmoid() * losses).mean()

    # The optimizer's weight decay is part of what the lower level minimizes, but not of `train`:
    # as damping it is added to the Hessian of `train`.
    @program.level(
        "reweight",
        lower=["weights"],
        hypergrad=Neumann(num_terms=5, damping=WEIGHT_DECAY),
        module={"logits": torch.zeros(len(digits.noisy))},
        optimizer=partial(Adam, lr=0.03),
        data=batches(digits.clean, seed),
    )
    def meta(net, batch, weights):
        _, x, y = batch
        return F.cross_entropy(weights(x), y)

    def fit(data: Dataset) -> nn.Module:
        """Ordinary training, without mlodeco."""
        model = network(seed)
        optimizer = sgd(model.parameters())
        stream = endless(batches(data, seed))
        for _ in range(steps):
            optimizer.zero_grad()
            train(model, next(stream)).backward()
            optimizer.step()
        return model

    baselines = [fit(digits.noisy), fit(digits.clean), fit(ConcatDataset(digits[:2]))]
    mlodeco.run(steps=steps, program=program, seed=seed, progress="off")

    models = [*baselines, program.module("weights")]
    logits = program.module("reweight").logits.detach().cpu()
    auc = float(roc_auc_score(~digits.wrong, logits))
    return [accuracy(model, digits.test) for model in models] + [auc]


def load(seed: int) -> Digits:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    y = torch.tensor(labels)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    test, rest = order[:500], order[500:]
    clean = torch.cat([rest[y[rest] == digit][:5] for digit in range(10)])
    noisy = rest[~torch.isin(rest, clean)]

    wrong = torch.zeros(len(noisy), dtype=torch.bool)
    wrong[torch.randperm(len(noisy), generator=generator)[: round(0.4 * len(noisy))]] = True
    noisy_labels = torch.where(wrong, (y[noisy] + 1) % 10, y[noisy])

    def dataset(index: Tensor, labels: Tensor) -> TensorDataset:
        return TensorDataset(torch.arange(len(index)), x[index], labels)

    return Digits(
        noisy=dataset(noisy, noisy_labels),
        clean=dataset(clean, y[clean]),
        test=dataset(test, y[test]),
        wrong=wrong,
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def batches(data: Dataset, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    size = min(128, len(data))
    return DataLoader(data, size, shuffle=True, drop_last=True, generator=generator)


def endless(loader: DataLoader) -> Iterable[list[Tensor]]:
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    _, x, y = data.tensors
    return 100 * (model.cpu()(x).argmax(1) == y).float().mean().item()


def show(rows: dict[int, list[float]], steps: int) -> None:
    table = Table()
    for column in ("seed", *COLUMNS):
        table.add_column(column, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *formatted(row))
    table.add_section()
    means = [mean(column) for column in zip(*rows.values(), strict=True)]
    table.add_row("mean", *formatted(means))
    console = Console(width=100, highlight=False)
    console.print(f"Test accuracy in % after {steps} steps.")
    console.print("Wrong labels: the class y became y + 1 (mod 10) in 40 % of the training set.")
    console.print(table)

    best = max(range(3), key=lambda column: means[column])
    gains = [row[3] - row[best] for row in rows.values()]
    error = f" +- {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    console.print(
        f"Reweighted minus {COLUMNS[best]}, the best other column: {mean(gains):.2f}{error} points"
    )
    if len(gains) > 1:
        console.print("(mean of the differences, seed by seed, +- its standard error)")


def formatted(row: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in row[:4]] + [f"{row[4]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    torch.set_num_threads(1)  # the tensors are too small to share
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    show({seed: experiment(seed, arguments.steps) for seed in seeds}, arguments.steps)


if __name__ == "__main__":
    main()
