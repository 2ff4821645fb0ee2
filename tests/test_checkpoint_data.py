"""Data that go on: places of other numbers of processes, errors of the data, workers, doubts."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from mlodeco import Program, Runner
from mlodeco.errors import CheckpointError, CheckpointWarning, DataError
from mlodeco.runtime.data import Cursor, Where
from mlodeco.runtime.shares import _spell, share
from tests.checkpoint_worker import data, loader, run

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital':UserWarning")


class Counted(IterableDataset):
    def __iter__(self):
        yield from range(48)


def stateful():
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    return loaders.StatefulDataLoader(range(48), 2)


def cursor(make, rank, count):
    """That of one of several processes, which draw alike."""
    streams = _spell([])
    processes = SimpleNamespace(
        count=count, rank=rank, is_main=rank == 0, exchange=lambda value: [streams] * count
    )
    source = make()
    cut = share(source, processes, "drop")
    return Cursor(cut, Where("here", None), {0: source, 1: cut})


@pytest.mark.parametrize(
    "make",
    [lambda: DataLoader(range(48), 2), lambda: DataLoader(Counted(), 2), stateful],
    ids=["indices", "iterable", "stateful"],
)
@pytest.mark.parametrize(("then", "now", "first"), [(1, 2, 8), (2, 1, 12), (2, 3, 12), (2, 2, 12)])
def test_other_processes_go_on_where_all_stood(make, then, now, first):
    before = [cursor(make, rank, then) for rank in range(then)]
    for one in before:
        for _ in range(3):
            one.advance()
    states = [one.state_dict() for one in before]
    after = [cursor(make, rank, now) for rank in range(now)]
    for rank, one in enumerate(after):
        one.load_state_dict(states[min(rank, then - 1)], then, now)
    found = [one.advance()[0].tolist() for one in after]
    assert found == [[first + 2 * rank, first + 2 * rank + 1] for rank in range(now)]


# Errors of the data.


class Files(Dataset):
    is_gone = False

    def __len__(self):
        return 48

    def __getitem__(self, index):
        if self.is_gone:
            raise FileNotFoundError("images/7.png " + 300 * "x" + " end")
        return tuple(t[index] for t in data(1))


def fitted(low_data):
    program = Program()

    @program.level(
        "low",
        module=partial(nn.Linear, 3, 1, dtype=torch.float64),
        optimizer=partial(SGD, lr=0.05),
        data=low_data,
    )
    def low(model, batch):
        x, y = batch
        return ((model(x)[:, 0] - y) ** 2).mean() + 0.0 * torch.rand(())

    return program


def test_an_error_of_the_data_is_no_damage(tmp_path, monkeypatch):
    files = partial(DataLoader, Files(), 8, num_workers=1)
    run(tmp_path, fitted(files), steps=3, checkpoint_every=1)
    monkeypatch.setattr(Files, "is_gone", True)
    with pytest.raises(DataError, match=r"FileNotFoundError(.|\n)*images/7.png x+ end") as caught:
        run(tmp_path, fitted(files), steps=5)
    assert not isinstance(caught.value, CheckpointError)
    assert (caught.value.level, type(caught.value.__cause__)) == ("low", FileNotFoundError)


# What may not go on.


class Buffered(IterableDataset):
    """A buffer that is shuffled by the global stream."""

    def __iter__(self):
        held = []
        for sample in zip(*data(1), strict=True):
            held.append(sample)
            if len(held) > 8:
                yield held.pop(int(torch.randint(len(held), ())))
        yield from held


class Chunks(Sampler):
    def __len__(self):
        return 48

    def __iter__(self):
        for start in range(0, 48, 8):
            yield from (start + torch.randperm(8)).tolist()


class Jittered(Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        x, y = (t[index] for t in data(1))
        return x + random.random() + torch.rand(()), y


def shared_generator():
    g = torch.Generator().manual_seed(9)
    sampler = RandomSampler(range(480), replacement=True, num_samples=480, generator=g)
    program = fitted(
        DataLoader([(x, y) for x, y in zip(*data(1, 480), strict=True)], 8, sampler=sampler)
    )

    @program.on("before_step")
    def draw():
        torch.rand(2, generator=g)

    return program


DOUBTFUL = {
    "buffer": lambda: fitted(DataLoader(Buffered(), 8)),
    "chunks": lambda: fitted(DataLoader(Jittered(), 8, sampler=Chunks())),
    "shared": shared_generator,
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_passes_that_cannot_be_drawn_again_are_named_once(name, tmp_path):
    with pytest.warns(CheckpointWarning, match=r"level 'low' .* as it goes on") as caught:
        run(tmp_path, DOUBTFUL[name](), steps=12, checkpoint_every=1)
    assert len(caught) == 1


def test_samples_and_samplers_that_draw_at_once_are_in_no_doubt(tmp_path):
    run(tmp_path, fitted(DataLoader(Jittered(), 8, shuffle=True)), steps=8, checkpoint_every=1)


def test_random_numbers_of_workers_that_persist_are_named_once(tmp_path):
    persistent = partial(loader, 1, num_workers=1, persistent_workers=True)
    with pytest.warns(CheckpointWarning, match="persistent_workers=True") as caught:
        run(tmp_path, fitted(persistent), steps=9, checkpoint_every=1)
    assert len(caught) == 1


class Late(Dataset):
    """Makes its generator at its first use."""

    g = None

    def __len__(self):
        return 48

    def __getitem__(self, index):
        self.g = self.g or torch.Generator().manual_seed(1)
        return tuple(t[index] for t in data(1))


def test_generators_that_are_not_there_yet_are_named(tmp_path):
    runner = Runner(fitted(lambda: DataLoader(Late(), 8)), seed=3)
    runner.step()
    runner.save(tmp_path / "saved")
    other = Runner(fitted(lambda: DataLoader(Late(), 8)), seed=3)
    with pytest.warns(CheckpointWarning, match="level 'low' .* as many generators"):
        other.load(tmp_path / "saved")


# Signals to a whole group of processes.

SCRIPT = """
import os, signal, sys
from pathlib import Path
from functools import partial
import mlodeco
from mlodeco.runtime.checkpoint import folder
from tests.checkpoint_worker import loader
from tests.test_checkpoint_data import fitted
folder._sync = lambda path: None
out, number, at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
program = fitted(partial(loader, 1, num_workers=1))
@program.on("before_step")
def end(ctx):
    from multiprocessing import active_children
    if ctx.tick == at:
        (out.parent / "workers").write_text(" ".join(str(c.pid) for c in active_children()))
        os.killpg(0, number)
mlodeco.run(40, program=program, out=out, resume="auto", seed=3, progress="off")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_workers_outlast_a_signal_to_the_group(number, tmp_path):
    for at in (3, 5):  # of workers that a run has started, and that a pass taken up has
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT, tmp_path / "out", str(int(number)), str(at)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ended.returncode == 128 + number, ended.stderr
        assert f"ended the run at tick {at}" in ended.stderr
        assert (tmp_path / "out" / "checkpoints" / f"{at:09d}").exists()
        workers = (tmp_path / "workers").read_text().split()
        assert workers
        for worker in workers:
            with pytest.raises(ProcessLookupError):
                os.kill(int(worker), 0)
