"""Learns whom to pre-train on: three levels, judged after fine-tuning.

A few images have the labels that matter: the target, 30 to fine-tune on and 50 to validate with.
Many more come from 20 contributors, and nothing says what their labels are worth. Six number the
classes in a code of their own, the same for all six, whose key is lost; fourteen filled in labels
at random. A network is pre-trained on these images, gets a new last layer and is fine-tuned on the
target. The other code does no harm then: who learns to tell the classes apart learns good features,
whatever the classes are called. Random labels spoil them. But what a contributor is worth shows in
the fine-tuned network only, two trainings further on:

    pretrained   trains a network on all contributors, each with a weight
    tuned        fine-tunes another on the target, kept near the pre-trained one
    trust        learns the 20 weights, so that the fine-tuned network does well on validation

The table compares test accuracies of networks with the same initial weights, optimizer and number
of steps. All but `target only` and `pooled` are pre-trained, then fine-tuned on all 80 target
images:

    target only   the 80 target images alone, from the start
    pooled        contributors and target together
    plain         pre-trained on all contributors alike
    two levels    weights learned as above, but judged by the pre-trained network's own loss on the
                  80 target images, without a level that fine-tunes
    three levels  the program

AUC says how well the weights of three levels tell who did not label at random: 1 is perfect, 0.5
is chance. By default the images are scikit-learn's handwritten digits, with `--data` Fashion-MNIST.

    python examples/pretraining.py --seeds 10
    python examples/pretraining.py --data folder/of/fashion_mnist
"""

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
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

FIRST_SEED = 300
WEIGHT_DECAY = 3e-3
PROXIMITY = 1.0
FINE_TUNING = 200
SOURCE, TUNE, VALIDATE = 1217, 30, 50
TEST = 5000  # or as many as there are: 500 digits
RECODED, CARELESS = 6, 14
CONTRIBUTORS = RECODED + CARELESS
COLUMNS = ("target only", "pooled", "plain", "two levels", "three levels", "AUC")

sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=WEIGHT_DECAY)
# More damping than the weight decay, which is part of what the lower levels minimize: networks in
# training have negative curvature, too.
neumann = Neumann(num_terms=5, damping=0.05)


class Split(NamedTuple):
    """The images of one seed. Items of the sets are (contributor, image, label)."""

    source: TensorDataset
    tune: TensorDataset
    validate: TensorDataset
    test: TensorDataset
    careful: Tensor  # for each contributor, whether the labels mean something; for the AUC only


class Network(nn.Module):
    def __init__(self, inputs: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def pretrain(model, batch, trust=None):
    contributor, x, y = batch
    losses = F.cross_entropy(model(x), y, reduction="none")
    if trust is None:  # the plain function, called without the other level
        return losses.mean()
    weights = trust.logits[contributor].sigmoid()
    return (weights * losses).sum() / weights.sum()


def tune(tuned, batch, pretrained):
    _, x, y = batch
    pairs = zip(tuned.body.parameters(), pretrained.body.parameters(), strict=True)
    distance = sum((ours - theirs).square().sum() for ours, theirs in pairs)
    return F.cross_entropy(tuned(x), y) + PROXIMITY / 2 * distance


def judge(trust, batch, judged):
    _, x, y = batch
    return F.cross_entropy(judged(x), y)


def experiment(images: Tensor, labels: Tensor, seed: int, steps: int) -> list[float]:
    """One row of the table: five accuracies in % and the AUC."""
    split = load(images, labels, seed)
    target = ConcatDataset([split.tune, split.validate])
    network = partial(Network, images.shape[1], seed)

    def fit(model: nn.Module, loss, data: Dataset, steps: int) -> nn.Module:
        """Ordinary training, without mlodeco."""
        optimizer = sgd(model.parameters())
        stream = endless(batches(data, seed))
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model, next(stream)).backward()
            optimizer.step()
        return model

    def fine_tuned(pretrained: nn.Module) -> nn.Module:
        model = network()
        model.body.load_state_dict(pretrained.body.state_dict())
        return fit(model, partial(tune, pretrained=pretrained), target, FINE_TUNING)

    def weighted(levels: int) -> mlodeco.Program:
        """The program of three levels, or of two, trained."""
        program = mlodeco.Program()
        program.level(
            "pretrained", module=network, optimizer=sgd, data=batches(split.source, seed)
        )(pretrain)
        judged, data = "pretrained", target
        if levels == 3:
            program.level(
                "tuned",
                lower=["pretrained"],
                hypergrad=neumann,
                module=network,
                optimizer=sgd,
                data=batches(split.tune, seed),
                warmup=100,  # the weights wait for a network that is worth judging
            )(tune)
            judged, data = "tuned", split.validate
        program.level(
            "trust",
            lower=[judged],
            reads={"judged": judged},
            hypergrad=neumann,
            module={"logits": torch.zeros(CONTRIBUTORS)},
            optimizer=partial(Adam, lr=0.05),
            data=batches(data, seed),
        )(judge)
        mlodeco.run(steps=steps, program=program, seed=seed, progress="off")
        return program

    programs = [weighted(2), weighted(3)]
    everything = ConcatDataset([split.source, target])
    models = [
        fit(network(), pretrain, target, steps + FINE_TUNING),
        fit(network(), pretrain, everything, steps + FINE_TUNING),
        fine_tuned(fit(network(), pretrain, split.source, steps)),
        *(fine_tuned(program.module("pretrained").cpu()) for program in programs),
    ]
    logits = programs[1].module("trust").logits.detach().cpu()
    auc = float(roc_auc_score(split.careful, logits))
    return [accuracy(model, split.test) for model in models] + [auc]


def load(images: Tensor, labels: Tensor, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = [order[labels[order] == label] for label in range(10)]
    few, more = TUNE // 10, (TUNE + VALIDATE) // 10
    tuning = torch.cat([index[:few] for index in by_class])
    validation = torch.cat([index[few:more] for index in by_class])
    rest = order[~torch.isin(order, torch.cat([tuning, validation]))]
    source, test = rest[:SOURCE], rest[SOURCE : SOURCE + TEST]

    contributor = torch.arange(len(source)) % CONTRIBUTORS
    careful = torch.randperm(CONTRIBUTORS, generator=generator) < RECODED
    code = torch.randperm(10, generator=generator)
    recoded = code[labels[source]]
    random = torch.randint(10, recoded.shape, generator=generator)
    given = torch.where(careful[contributor], recoded, random)

    def dataset(index: Tensor) -> TensorDataset:
        return TensorDataset(torch.full((len(index),), -1), images[index], labels[index])

    return Split(
        source=TensorDataset(contributor, images[source], given),
        tune=dataset(tuning),
        validate=dataset(validation),
        test=dataset(test),
        careful=careful,
    )


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


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def fashion(folder: Path) -> tuple[Tensor, Tensor]:
    """All 70,000 images, from the arrays x_train, y_train, x_test and y_test of one file."""
    if folder.is_file():
        raise FileNotFoundError(f"--data {folder}: {folder} is not a folder.")
    inside = folder / "fashion_mnist" / "fashion_mnist.npz"
    file = inside if inside.exists() else folder / "fashion_mnist.npz"
    if not file.exists():
        raise FileNotFoundError(
            f"--data {folder}: neither fashion_mnist.npz nor fashion_mnist/fashion_mnist.npz is "
            "there. Give the folder that holds the file, or leave --data out for the digits."
        )
    with np.load(file) as arrays:
        images = np.concatenate([arrays["x_train"], arrays["x_test"]])
        labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    x = torch.from_numpy(images).flatten(1).float()
    x = 3 * x / x.norm(dim=1).mean()  # about as large as the digits, for the same learning rate
    return x, torch.from_numpy(labels).long()


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
    console.print(f"Test accuracy in % after {steps} + {FINE_TUNING} steps.")
    console.print(
        f"{CONTRIBUTORS} contributors: {RECODED} label in another code, {CARELESS} at random."
    )
    console.print(table)

    best = max(range(4), key=lambda column: means[column])
    gains = [row[4] - row[best] for row in rows.values()]
    error = f" +- {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    console.print(
        f"Three levels minus {COLUMNS[best]}, the best other column: {mean(gains):.2f}{error} "
        "points"
    )
    if len(gains) > 1:
        console.print("(mean of the differences, seed by seed, +- its standard error)")


def formatted(row: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in row[:5]] + [f"{row[5]:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=600, help="pre-training steps (default: 600)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of Fashion-MNIST")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    torch.set_num_threads(1)  # the tensors are too small to share
    try:
        images, labels = digits() if arguments.data is None else fashion(arguments.data)
    except FileNotFoundError as error:
        sys.exit(str(error))
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.seeds)
    rows = {seed: experiment(images, labels, seed, arguments.steps) for seed in seeds}
    show(rows, arguments.steps)


if __name__ == "__main__":
    main()
