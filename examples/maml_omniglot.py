"""Learns an initialization from which five steps of SGD solve a task never seen: MAML.

Two levels:

    weights    a network that starts from `init` and takes five steps on the support set of a task
    init       the initialization, so that the network after these steps fits the query set

Each turn has `--tasks` tasks, a copy of the network for each (`replicas`), and `init` sees the
mean. Beside MAML (Finn et al. 2017) `--method` names first-order MAML; iMAML (Rajeswaran et al.
2019), where the steps are held near the initialization by a quadratic term, and the response is
that of the solution, not of the steps; and Reptile (Nichol et al. 2018), where the initialization
moves towards the networks and nothing is differentiated twice.

Without `--data` a task is a question about handwritten digits. The ten are divided into two groups
of five, and a network gets one image of each, ten in all, with the group that it belongs to. There
are 126 divisions: 80 to learn from and 40 to test with, on other images. Which group is which is
decided anew in each task, so that a network which does not adapt is right in half of the cases.
The table has its accuracy, and that after steps on the support set from: fresh weights; a network
trained on the pool of all tasks; the initialization learned. Nobody tells which digit is which; a
network trained with one output for each of the 80 divisions has to be told which division a task
has, and does as well after 20 steps and more.

    python examples/maml_omniglot.py

With `--data DIR` the tasks are Omniglot's: `--ways` characters, `--shots` drawings of each. DIR
holds omniglot_28_u8.npz, with arrays x_bg and x_ev of 28 x 28 images, twenty of each character
together. 1200 characters of both are for learning, the other 423 for testing; each is four
classes, one a quarter turn. The network is the usual one of four convolutions.

    python examples/maml_omniglot.py --data DIR --ways 5 --steps 2000 --seeds 1
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol
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
INNER, MORE = 5, 20  # steps of the network in training, and more for the baselines
SHAPE = (28, 28)
PULL = 2.0  # of iMAML, towards the initialization
REPTILE = 0.1  # of the way to the networks, in a turn
METHODS = ("maml", "fomaml", "imaml", "reptile")

Task = dict[str, Tensor]
"""x and y, the support set, query_x and query_y; in training with a leading dimension of tasks."""


class Tasks(Protocol):
    """Where tasks come from."""

    def draw(self, part: str, generator: torch.Generator) -> Task: ...


class Setting(NamedTuple):
    """What the two kinds of data differ in."""

    tasks: Tasks
    network: Callable[[], nn.Module]
    rate: float  # of the network's steps
    meta_rate: float  # of the initialization's


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


def stream(tasks: Tasks, part: str, seed: int) -> Iterator[Task]:
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
    widths = ((64, 64), (64, 64))
    layers = [part for a, b in widths for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(64, 2))


def conv4(seed: int, ways: int, width: int = 64) -> nn.Module:
    """Four blocks of convolution, BatchNorm by the batch at hand, ReLU and pooling."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before in (1, width, width, width):
        norm = nn.BatchNorm2d(width, track_running_stats=False)
        layers += [nn.Conv2d(before, width, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, ways))


def squared_distance(one: nn.Module, other: nn.Module) -> Tensor:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum((a - b).square().sum() for a, b in pairs)


def declare(
    setting: Setting, method: str, seed: int, count: int, start: nn.Module | None = None
) -> mlodeco.Program:
    """The two levels, from `start` or from fresh weights."""
    program = mlodeco.Program()

    @program.source("task", refresh="loop")
    def task():
        tasks = stream(setting.tasks, "learn", seed)
        while True:
            yield stacked(tasks, count)

    def adapt(model, task):
        return F.cross_entropy(model(task["x"]), task["y"])

    def adapt_nearby(model, init, task):
        return adapt(model, task) + PULL / 2 * squared_distance(model, init)

    def meta(model, weights, task):
        return F.cross_entropy(weights(task["query_x"]), task["query_y"])

    hypergrad = {
        "maml": Unroll(),
        "fomaml": Unroll(first_order=True),
        "imaml": CG(max_steps=5),
        "reptile": None,  # it steps by a rule of its own
    }[method]
    program.level(
        "weights",
        module=setting.network,
        init_from="init",
        optimizer=partial(SGD, lr=setting.rate),
        inner_steps=INNER,
        replicas=count,
    )(adapt_nearby if method == "imaml" else adapt)
    program.level(
        "init",
        lower=["weights"],
        hypergrad=hypergrad,
        module=setting.network if start is None else start,
        optimizer=None if method == "reptile" else partial(Adam, lr=setting.meta_rate),
    )(meta)
    if method == "reptile":

        @program.update("init")
        def approach(params, weights):
            solved = dict(weights.named_parameters())
            return {name: w.lerp(solved[name], REPTILE) for name, w in params.items()}, {}

    return program


def accuracy(program: mlodeco.Program, tasks: list[Task], steps: int) -> float:
    """In %, on the query sets after so many steps on the support sets."""
    found = []
    for task in tasks:
        model = (
            mlodeco.solve("weights", batches={"task": task}, steps=steps, program=program)
            if steps
            else program.module("init")
        )
        with torch.no_grad():
            right = model(task["query_x"]).argmax(1) == task["query_y"]
        found.append(right.float().mean().item())
    return 100 * float(np.mean(found))


def trained_on_all(setting: Setting, seed: int, steps: int, count: int) -> nn.Module:
    """A network trained on the pool of all tasks by ordinary steps; it sees as many of them."""
    model = setting.network()
    optimizer = Adam(model.parameters(), lr=setting.meta_rate)
    tasks = stream(setting.tasks, "learn", seed)
    for _ in range(steps):
        batch = stacked(tasks, count)
        x = torch.cat([batch["x"], batch["query_x"]], dim=1).flatten(0, 1)
        y = torch.cat([batch["y"], batch["query_y"]], dim=1).flatten()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def experiment(setting: Setting, given: argparse.Namespace, seed: int) -> dict[str, float]:
    """One row of the table."""
    held_out = list(itertools.islice(stream(setting.tasks, "test", seed + 1), given.test_tasks))
    program = declare(setting, given.method, seed, given.tasks)
    joint = trained_on_all(setting, seed, given.steps, given.tasks)
    from_joint = declare(setting, given.method, seed, given.tasks, joint)
    row = {}
    for name, start in (("fresh", program), ("all tasks", from_joint)):
        for steps in (INNER, MORE):
            row[f"{name}\n{steps} steps"] = accuracy(start, held_out, steps)
    mlodeco.run(given.steps * INNER, program=program, seed=seed, progress="off")
    for steps in (0, INNER):
        row[f"{given.method}\n{steps} steps"] = accuracy(program, held_out, steps)
    return row


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
    parser.add_argument("--steps", type=int, default=300, help="turns of init (default: 300)")
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
            setting = Setting(Divisions(seed), partial(small, seed), 0.4, 1e-2)
        else:
            network = partial(conv4, seed, given.ways, given.width)
            setting = Setting(Omniglot(images, given.ways, given.shots), network, 0.4, 1e-3)
        rows[seed] = row = experiment(setting, given, seed)
        print(f"seed {seed}: {list(row.values())[-1]:.1f} after {INNER} steps", flush=True)
    what = "two groups of digits" if images is None else f"{given.ways} ways, {given.shots} shots"
    show(rows, f"Accuracy in % on tasks held out ({what}), {given.steps} turns of {given.method}")


if __name__ == "__main__":
    main()
