"""Learns from rules that guess labels: one level learns whom to trust, another what they meant.

Nobody has labelled the training set. A few rules guess: each abstains on some samples, is wrong
on others, and the majority vote of those that speak is the *weak label*. A small set has clean
labels. Two upper levels use it, above one and the same classifier:

    classifier   a network with one hidden layer, trained on the weak labels
    reweight     a network from a sample's loss, weak label and the rules' agreement to its weight
    correct      a network from a sample and its weak label to the soft label that is trained on

Without `--data` these are handwritten digits, with five simulated rules. In three of the ten
classes, chosen at random and the same for all rules, a rule that speaks is right in 30 % of the
cases and says the next class otherwise; in the other seven it is right in 70 %, and else says any
class. Which of the training labels are wrong is shown to nobody.

    python examples/weak_supervision.py --seeds 10

With `--data DIR` they are texts with the votes of rules that people wrote (WRENCH). DIR is the
folder that holds the sets, `--set` names one of them: `DIR/youtube.json.gz`.

    python examples/weak_supervision.py --data DIR --set youtube

The table compares the accuracy on a test set after the same number of steps of the same classifier
from the same initial weights: trained on the weak labels as they are, on the clean set only, on
both pooled, with either upper level alone, and with the two. The seed decides on initial weights,
order of batches, ties of the vote and, for digits, the split and the rules.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterable
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
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import mlodeco

FIRST_SEED = 100
COLUMNS = (
    "plain",
    "clean set only",
    "both pooled",
    "reweighted",
    "corrected",
    "two uppers",
)

sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=3e-3)
adam = partial(Adam, lr=3e-3)


class Task(NamedTuple):
    """The data of one seed. Items of the sets are (features, label, agreement of the rules)."""

    weak: TensorDataset
    clean: TensorDataset
    test: TensorDataset
    classes: int
    right: float  # part of the weak labels that are right; shown, not used

    @property
    def features(self) -> int:
        return self.test.tensors[0].shape[1]


class Weight(nn.Module):
    """A sample's loss, weak label and agreement -> its weight, between 0 and 1."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.net = network(classes + 2, 32, 1)

    def forward(self, loss: Tensor, label: Tensor, agreement: Tensor) -> Tensor:
        known = torch.stack([loss, agreement], dim=1)
        both = torch.cat([known, F.one_hot(label, self.classes)], dim=1)
        return self.net(both).squeeze(1).sigmoid()


class Corrector(nn.Module):
    """A sample and its weak label -> a mixture of that label and a soft label of its own."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.own = network(features + classes, 64, classes)
        self.share = nn.Linear(features + classes, 1)
        nn.init.zeros_(self.share.weight)
        nn.init.constant_(self.share.bias, -2.0)  # to begin with, 12 % of its own

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        weak = F.one_hot(label, self.classes).to(x.dtype)
        both = torch.cat([x, weak], dim=1)
        return torch.lerp(weak, self.own(both).softmax(dim=1), self.share(both).sigmoid())


def train(model, batch, reweight=None, correct=None):
    """The loss of the classifier: with either upper level, with both, or with none."""
    x, label, agreement = batch
    target = label if correct is None else correct(x, label)
    losses = F.cross_entropy(model(x), target, reduction="none")
    if reweight is None:
        return losses.mean()
    return (reweight(losses.detach(), label, agreement) * losses).mean()


def meta(net, batch, classifier):
    """The loss of both upper levels: how well the classifier does on the clean set."""
    x, y, _ = batch
    return F.cross_entropy(classifier(x), y)


def declare(task: Task, seed: int, uppers: Iterable[str]) -> mlodeco.Program:
    """The program with these upper levels."""
    program = mlodeco.Program()
    program.level(
        "classifier",
        module=partial(classifier, task, seed),
        optimizer=sgd,
        data=batches(task.weak, seed),
    )(train)

    modules: dict[str, Callable[[], nn.Module]] = {
        "reweight": partial(Weight, task.classes),
        "correct": partial(Corrector, task.features, task.classes),
    }
    for number, name in enumerate(modules):
        if name in uppers:
            program.level(
                name,
                lower=["classifier"],
                hypergrad="identity",
                module=partial(seeded, seed, modules[name]),
                optimizer=adam,
                data=batches(task.clean, seed + number),
            )(meta)
    return program


def experiment(task: Task, seed: int, steps: int) -> list[float]:
    """One row of the table: accuracies in %."""

    def fit(data: Dataset) -> nn.Module:
        """Ordinary training, without mlodeco."""
        model = classifier(task, seed)
        optimizer = sgd(model.parameters())
        stream = endless(batches(data, seed))
        for _ in range(steps):
            optimizer.zero_grad()
            train(model, next(stream)).backward()
            optimizer.step()
        return model

    def solve(*uppers: str) -> nn.Module:
        program = declare(task, seed, uppers)
        mlodeco.run(steps=steps, program=program, seed=seed, progress="off")
        return program.module("classifier")

    models = [
        fit(task.weak),
        fit(task.clean),
        fit(ConcatDataset([task.weak, task.clean])),
        solve("reweight"),
        solve("correct"),
        solve("reweight", "correct"),
    ]
    return [accuracy(model, task.test) for model in models]


def digits(seed: int) -> Task:
    """Handwritten digits with simulated rules; five clean labels a class."""
    images, y = load_digits(return_X_y=True)
    x = images / 16
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(y))
    test, rest = order[:500], order[500:]
    clean = np.concatenate([rest[y[rest] == digit][:5] for digit in range(10)])
    weak = np.setdiff1d(rest, clean)
    votes = simulated_votes(y[weak], generator)
    return task_of(
        10, (x[weak], y[weak]), votes, (x[clean], y[clean]), (x[test], y[test]), generator
    )


def simulated_votes(y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The votes of five rules, a column each; -1 abstains."""
    is_hard = np.isin(y, generator.permutation(10)[:3])
    columns = []
    for _ in range(5):
        abstains = generator.random(len(y)) < generator.uniform(0.3, 0.8, 10)[y]
        is_right = generator.random(len(y)) < np.where(is_hard, 0.3, 0.7)
        wrong = np.where(is_hard, y + 1, y + generator.integers(1, 10, len(y))) % 10
        columns.append(np.where(abstains, -1, np.where(is_right, y, wrong)))
    return np.stack(columns, axis=1)


class DataError(Exception):
    """A data set that is not there or cannot be read."""


def texts(path: Path, seed: int) -> Task:
    """A WRENCH set, `{"classes", "train": {"text", "y", "L"}, "valid", "test"}` as gzipped JSON.

    L are the votes, a row for each text; -1 abstains. Texts become tf-idf of words and pairs of
    words. `train.n_unlabeled`: rows from there on are not part of the set.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            data = json.load(file)
        size = data["train"].get("n_unlabeled", len(data["train"]["text"]))
        votes = np.array(data["train"]["L"][:size])
        parts = [(data[part]["text"], np.array(data[part]["y"])) for part in PARTS]
        classes = len(data["classes"])
    except FileNotFoundError:
        raise DataError(f"there is no file {path}") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a data set: {type(error).__name__}: {error}") from error
    if votes.ndim != 2 or not all(len(part) and len(part) == len(y) for part, y in parts):
        raise DataError(f"{path} is not a data set: texts, labels and votes do not match")

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), max_features=1000, sublinear_tf=True)
    vectorizer.fit(parts[0][0][:size])
    # Rows have length 1; that of digits is about 4.
    train_set, clean, test = ((5 * vectorizer.transform(part).toarray(), y) for part, y in parts)
    train_set = (train_set[0][:size], train_set[1][:size])
    return task_of(classes, train_set, votes, clean, test, np.random.default_rng(seed))


PARTS = ("train", "valid", "test")

Labelled = tuple[np.ndarray, np.ndarray]


def task_of(
    classes: int,
    train_set: Labelled,
    votes: np.ndarray,
    clean: Labelled,
    test: Labelled,
    generator: np.random.Generator,
) -> Task:
    """Majority votes, ties broken at random; without the rows at which all rules abstain."""
    counts = np.stack([(votes == label).sum(axis=1) for label in range(classes)], axis=1)
    labels = (counts + 0.5 * generator.random(counts.shape)).argmax(axis=1)
    is_covered = counts.sum(axis=1) > 0
    x, y = (part[is_covered] for part in train_set)
    agreement = (counts.max(axis=1) / counts.sum(axis=1).clip(min=1))[is_covered]
    labels = labels[is_covered]

    def dataset(x: np.ndarray, y: np.ndarray, agreement: np.ndarray) -> TensorDataset:
        return TensorDataset(
            torch.tensor(x, dtype=torch.float32),
            torch.tensor(y),
            torch.tensor(agreement, dtype=torch.float32),
        )

    return Task(
        weak=dataset(x, labels, agreement),
        clean=dataset(*clean, np.ones(len(clean[1]))),
        test=dataset(*test, np.ones(len(test[1]))),
        classes=classes,
        right=float((labels == y).mean()),
    )


def network(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def classifier(task: Task, seed: int) -> nn.Module:
    return seeded(seed, partial(network, task.features, 64, task.classes))


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def batches(data: Dataset, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    size = min(128, len(data))
    return DataLoader(data, size, shuffle=True, drop_last=True, generator=generator)


def endless(loader: DataLoader) -> Iterable[list[Tensor]]:
    while True:
        yield from loader


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    x, y, _ = data.tensors
    return 100 * (model.cpu()(x).argmax(1) == y).float().mean().item()


def show(rows: dict[int, list[float]], right: list[float], steps: int) -> None:
    table = Table()
    for column in ("seed", *COLUMNS):
        table.add_column(column, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(f"{value:.1f}" for value in row))
    table.add_section()
    means = [mean(column) for column in zip(*rows.values(), strict=True)]
    table.add_row("mean", *(f"{value:.1f}" for value in means))
    console = Console(width=100, highlight=False)
    console.print(f"Test accuracy in % after {steps} steps.")
    console.print(f"{100 * mean(right):.0f} % of the weak labels are right.")
    console.print(table)

    *others, _ = means
    best = others.index(max(others))
    gains = [row[-1] - row[best] for row in rows.values()]
    error = f" +- {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
    console.print(
        f"Two uppers minus {COLUMNS[best]}, the best other column: {mean(gains):.2f}{error} points"
    )
    console.print("(mean of the differences, seed by seed, +- its standard error)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the WRENCH sets")
    parser.add_argument("--set", default="youtube", help="which of them (default: youtube)")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    torch.set_num_threads(1)  # the tensors are too small to share
    make = digits
    if arguments.data is not None:
        if not arguments.data.is_dir():
            parser.error(f"--data {arguments.data}: there is no such folder")
        make = partial(texts, arguments.data / f"{arguments.set}.json.gz")
    rows, right = {}, []
    try:
        for seed in range(FIRST_SEED, FIRST_SEED + arguments.seeds):
            task = make(seed)
            right.append(task.right)
            rows[seed] = experiment(task, seed, arguments.steps)
    except DataError as error:
        sys.exit(f"error: {error}")
    show(rows, right, arguments.steps)


if __name__ == "__main__":
    main()
