"""Learns an initialization from which few steps of SGD solve a task never seen: MAML.

Two levels:

    weights    a network that starts from `init` and takes steps on the support set of a task
    init       the initialization, so that the network after these steps fits the query set

Each turn has `--tasks` tasks, a copy of the network for each (`replicas`), and `init` sees the
mean. `--method` names

    maml       the derivative through the steps (Finn et al. 2017)
    fomaml     the same without second derivatives
    anil       the steps move the last layer alone, by `params` (Raghu et al. 2020)
    imaml      the steps are held near the initialization by a quadratic term, and the response is
               that of the solution, not of the steps (Rajeswaran et al. 2019)
    reptile    the initialization moves towards the networks, by `update` (Nichol et al. 2018)

Without `--data` a task is a question about handwritten digits: the ten are divided into two groups
of five, and a network gets one image of each, ten in all, with the group that it belongs to. There
are 126 divisions: 80 to learn from and 40 to test with, on other images. Which group is which is
decided anew in each task, so that a network which does not adapt is right in half of the cases.

The table has the accuracy on query sets: of the nearest image in the support set, by pixels; after
5 and 20 steps from fresh weights; and from the initialization learned, without a step and after the
method's steps: ten for iMAML, which needs the solution, five for the others.
For fresh weights the learning rate is the best of seven, found for each column and seed with 20
tasks of the images to learn from; for a method it is the same with all seeds.

    python examples/maml_omniglot.py

With `--data DIR` the tasks are Omniglot's: `--ways` characters, `--shots` drawings of each. DIR
holds omniglot_28_u8.npz, with arrays x_bg and x_ev of 28 x 28 images, twenty of each character
together. 1200 characters of both are for learning, the other 423 for testing; each is four
classes, one a quarter turn. The network is the usual one of four convolutions.

    python examples/maml_omniglot.py --data DIR --ways 5 --steps 400 --seeds 1
"""

import argparse
import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Adam

import mlodeco
from mlodeco.hypergrad import CG, Unroll

FIRST_SEED = 100
SHAPE = (28, 28)
FEW, MORE = 5, 20  # steps from fresh weights
GRID = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)  # learning rates of the baselines
CHOOSING = 20  # tasks that they are chosen with
PULL = 0.05  # of iMAML, towards the initialization
REPTILE = 0.4  # of the way to the networks, in a turn
Task = dict[str, Tensor]
"""x and y, the support set, query_x and query_y; in training with a leading dimension of tasks."""


class Method(NamedTuple):
    """How the initialization is learned."""

    hypergrad: Unroll | CG | None
    steps: int  # of the network
    rate: float  # of these steps


METHODS = {
    "maml": Method(Unroll(), 5, 0.4),
    "fomaml": Method(Unroll(first_order=True), 5, 0.2),
    "anil": Method(Unroll(), 5, 0.4),
    "imaml": Method(CG(max_steps=5, damping=3.0), 10, 0.2),
    "reptile": Method(None, 5, 0.4),  # it steps by a rule of its own
}


class Setting(NamedTuple):
    """What the two kinds of data differ in."""

    tasks: "Divisions | Omniglot"
    network: Callable[[], nn.Module]
    meta_rate: float  # of the initialization


class Divisions:
    """Digits divided into two groups of five."""

    def __init__(self, seed: int, queries: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.queries = queries
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images / 16 - 0.3, dtype=torch.float32)
        order = torch.randperm(len(labels), generator=generator)
        with_zero = [(0, *rest) for rest in itertools.combinations(range(1, 10), 4)]
        divisions = torch.stack([torch.isin(torch.arange(10), torch.tensor(d)) for d in with_zero])
        divisions = divisions[torch.randperm(len(divisions), generator=generator)].long()
        self.parts = {"learn": divisions[:80], "test": divisions[80:120]}
        self.of_digit = {}
        for part, index in (("learn", order[:1000]), ("test", order[1000:])):
            here = torch.tensor(labels)[index]
            self.of_digit[part] = [index[here == digit] for digit in range(10)]

    def draw(self, part: str, generator: torch.Generator) -> Task:
        divisions = self.parts[part]
        groups = divisions[torch.randint(len(divisions), (), generator=generator)]
        groups = groups ^ torch.randint(2, (), generator=generator)  # which is which
        chosen = [
            index[torch.randperm(len(index), generator=generator)[: 1 + self.queries]]
            for index in self.of_digit[part]
        ]
        x = self.images[torch.stack(chosen)]
        return {
            "x": x[:, 0],
            "y": groups,
            "query_x": x[:, 1:].flatten(0, 1),
            "query_y": groups.repeat_interleave(self.queries),
        }


class Omniglot:
    """Characters, each in four orientations that count as classes of their own."""

    def __init__(self, images: Tensor, ways: int, shots: int, queries: int = 15) -> None:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.parts = {"learn": images[order[:1200]], "test": images[order[1200:]]}
        self.ways, self.shots, self.queries = ways, shots, queries

    def draw(self, part: str, generator: torch.Generator) -> Task:
        images = self.parts[part]
        support, query = [], []
        for label in torch.randperm(4 * len(images), generator=generator)[: self.ways].tolist():
            character, turns = divmod(label, 4)
            drawer = torch.randperm(20, generator=generator)[: self.shots + self.queries]
            x = torch.rot90(images[character, drawer], turns, (1, 2))[:, None] / 255
            support.append(x[: self.shots])
            query.append(x[self.shots :])
        y = torch.arange(self.ways)
        return {
            "x": torch.cat(support),
            "y": y.repeat_interleave(self.shots),
            "query_x": torch.cat(query),
            "query_y": y.repeat_interleave(len(query[0])),
        }


def stream(tasks: "Divisions | Omniglot", part: str, seed: int) -> Iterator[Task]:
    """Tasks without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield tasks.draw(part, generator)


def stacked(tasks: Iterator[Task], count: int) -> Task:
    """The next tasks as one."""
    drawn = list(itertools.islice(tasks, count))
    return {key: torch.stack([task[key] for task in drawn]) for key in drawn[0]}


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def conv4(seed: int, ways: int, width: int = 64) -> nn.Module:
    """Four blocks of convolution, BatchNorm by the batch at hand, ReLU and pooling."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before in (1, width, width, width):
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        layers += [nn.Conv2d(before, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, ways))


def declare(setting: Setting, method: str, seed: int, count: int) -> mlodeco.Program:
    """The two levels, from fresh weights."""
    program = mlodeco.Program()
    hypergrad, steps, rate = METHODS[method]

    @program.source("task", refresh="loop")
    def task():
        tasks = stream(setting.tasks, "learn", seed)
        while True:
            yield stacked(tasks, count)

    def adapt(model, task):
        return F.cross_entropy(model(task["x"]), task["y"])

    def adapt_nearby(model, init, task):
        pairs = zip(model.parameters(), init.parameters(), strict=True)
        return adapt(model, task) + PULL / 2 * sum((w - v).square().sum() for w, v in pairs)

    def meta(model, weights, task):
        return F.cross_entropy(weights(task["query_x"]), task["query_y"])

    last = [name for name, _ in setting.network().named_parameters()][-2:]
    program.level(
        "weights",
        module=setting.network,
        params=last if method == "anil" else None,
        init_from="init",
        optimizer=partial(SGD, lr=rate),
        inner_steps=steps,
        replicas=count,
    )(adapt_nearby if method == "imaml" else adapt)
    program.level(
        "init",
        lower=["weights"],
        hypergrad=hypergrad,
        module=setting.network,
        optimizer=None if method == "reptile" else partial(Adam, lr=setting.meta_rate),
    )(meta)
    if method == "reptile":

        @program.update("init")
        def approach(params, weights):
            solved = dict(weights.named_parameters())
            return {name: w.lerp(solved[name], REPTILE) for name, w in params.items()}, {}

    return program


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """In %, on the query set."""
    right = model(task["query_x"]).argmax(1) == task["query_y"]
    return 100 * right.float().mean().item()


def learned(program: mlodeco.Program, tasks: list[Task], steps: int) -> list[float]:
    """The mean accuracy of the initialization, and after steps on the support sets."""
    found = []
    for task in tasks:
        model = mlodeco.solve("weights", batches={"task": task}, steps=steps, program=program)
        found.append([accuracy(program.module("init"), task), accuracy(model, task)])
    return np.mean(found, axis=0).tolist()


def adapted(start: nn.Module, tasks: list[Task], rate: float) -> list[float]:
    """The same after fewer and after more steps of ordinary SGD, without mlodeco."""
    found = []
    for task in tasks:
        model, row = copy.deepcopy(start), []
        optimizer = SGD(model.parameters(), lr=rate)
        for step in range(1, MORE + 1):
            optimizer.zero_grad()
            F.cross_entropy(model(task["x"]), task["y"]).backward()
            optimizer.step()
            if step in (FEW, MORE):
                row.append(accuracy(model, task))
        found.append(row)
    return np.mean(found, axis=0).tolist()


def best_adapted(start: nn.Module, choosing: list[Task], tasks: list[Task]) -> list[float]:
    """As `adapted`, each with the learning rate that is best for `choosing`."""
    scores = [adapted(start, choosing, rate) for rate in GRID]
    rates = [GRID[index] for index in np.argmax(scores, axis=0)]
    return [adapted(start, tasks, rate)[column] for column, rate in enumerate(rates)]


@torch.no_grad()
def nearest(task: Task) -> float:
    """The accuracy of the class of the image nearest in the support set, pixel by pixel."""
    distances = torch.cdist(task["query_x"].flatten(1), task["x"].flatten(1))
    right = task["y"][distances.argmin(1)] == task["query_y"]
    return 100 * right.float().mean().item()


def experiment(setting: Setting, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """One row of the table."""
    held_out = list(itertools.islice(stream(setting.tasks, "test", seed + 1), given.test_tasks))
    choosing = list(itertools.islice(stream(setting.tasks, "learn", seed + 2), CHOOSING))
    program = declare(setting, given.method, seed, given.tasks)
    few, more = best_adapted(setting.network(), choosing, held_out)
    steps = METHODS[given.method].steps
    mlodeco.run(given.steps * steps, program=program, seed=seed, progress="off")
    without, found = learned(program, held_out, steps)
    return {
        "nearest\nimage": float(np.mean([nearest(task) for task in held_out])),
        f"fresh\n{FEW} steps": few,
        f"fresh\n{MORE} steps": more,
        f"{given.method}\n0 steps": without,
        f"{given.method}\n{steps} steps": found,
    }


def read(folder: Path) -> Tensor:
    """Images of both sets, [character, drawer, 28, 28]."""
    with np.load(folder / "omniglot_28_u8.npz") as file:
        return torch.tensor(np.concatenate([file["x_bg"], file["x_ev"]])).view(-1, 20, *SHAPE)


def show(rows: dict[int, dict[str, float]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("seed", justify="right", vertical="bottom")
    names = list(next(iter(rows.values())))
    for name in names:
        table.add_column(name, justify="right")
    for seed, row in rows.items():
        table.add_row(str(seed), *(f"{value:.1f}" for value in row.values()))
    if len(rows) > 1:
        values = np.array([list(row.values()) for row in rows.values()])
        error = values.std(axis=0, ddof=1) / len(rows) ** 0.5
        table.add_section()
        table.add_row("mean", *(f"{value:.1f}" for value in values.mean(axis=0)))
        table.add_row("std. error", *(f"{value:.1f}" for value in error))
    Console(width=100, highlight=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="maml")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where omniglot_28_u8.npz is")
    parser.add_argument("--ways", type=int, help="classes of a task (default: 5), with --data")
    parser.add_argument("--shots", type=int, help="images of each (default: 1), with --data")
    parser.add_argument("--width", type=int, help="filters (default: 64), with --data")
    parser.add_argument("--tasks", type=int, default=4, help="a turn (default: 4)")
    parser.add_argument("--steps", type=int, default=200, help="turns of init (default: 200)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--test-tasks", type=int, default=100, help="held out (default: 100)")
    given = parser.parse_args()
    sizes = {"ways": 5, "shots": 1, "width": 64}
    if not given.data and any(getattr(given, name) is not None for name in sizes):
        parser.error("--ways, --shots and --width go with --data DIR")
    for name, value in sizes.items():
        setattr(given, name, value if getattr(given, name) is None else getattr(given, name))
    counts = ("ways", "shots", "width", "tasks", "steps", "seeds", "test_tasks")
    if min(getattr(given, name) for name in counts) < 1:
        parser.error("numbers must be at least 1")
    if given.shots > 19:
        parser.error("--shots must be at most 19: there are 20 drawings of a character")
    images = None
    if given.data:
        try:
            images = read(given.data)
        except FileNotFoundError:
            parser.error(f"no omniglot_28_u8.npz in {given.data}")
        except (OSError, ValueError, KeyError, RuntimeError, BadZipFile):
            parser.error(f"omniglot_28_u8.npz in {given.data} does not hold the arrays expected")
    torch.set_num_threads(1)  # the rest is for other programs
    rows = {}
    for seed in range(FIRST_SEED, FIRST_SEED + given.seeds):
        if images is None:
            setting = Setting(Divisions(seed), partial(small, seed), 1e-2)
        else:
            network = partial(conv4, seed, given.ways, given.width)
            setting = Setting(Omniglot(images, given.ways, given.shots), network, 1e-3)
        rows[seed] = row = experiment(setting, given, seed)
        print(f"seed {seed}: {list(row.values())[-1]:.1f} %", flush=True)
    what = "two groups of digits" if images is None else f"{given.ways} ways, {given.shots} shots"
    show(rows, f"Accuracy in %: {what}, {given.steps} turns of {given.method}")


if __name__ == "__main__":
    main()
