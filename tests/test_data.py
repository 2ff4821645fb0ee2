"""Data in every form: which batch each step gets, epochs, and looks that take nothing."""

from __future__ import annotations

import random
from functools import partial

import numpy
import pytest
import torch
from torch.optim import SGD
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
)

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import DataError, RunError
from mlodeco.hypergrad import Identity
from tests.problems import generator, randn

ITEMS = [randn(2, seed=i) for i in range(3)]


def one(value=1.0):
    return {"x": torch.full((2,), value, dtype=torch.float64)}


def leaf(data, function=None, **options):
    """One level; the list of the batches of its steps, as (tick, batch)."""
    program, seen = Program(), []

    def loss(m, batch):
        return ((m.x - torch.as_tensor(batch).mean()) ** 2).sum()

    program.level("low", module=one(), optimizer=partial(SGD, lr=0.1), data=data, **options)(
        function or loss
    )
    program.on("before_step")(lambda batch: seen.append(batch))
    return program, seen


def run(program, steps, **options):
    return mlodeco.run(steps, program=program, progress="off", **options)


class ByIndex:
    """Only __getitem__, as old sequences have."""

    def __getitem__(self, index):
        return ITEMS[index]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ITEMS)


class Stored(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index >= 3:
            raise IndexError
        return ITEMS[index]


def generating():
    yield from ITEMS


FORMS = {
    "list": lambda: ITEMS,
    "tuple": lambda: (*ITEMS[:2], ITEMS[2].tolist()),
    "loader": lambda: DataLoader(Stored(), batch_size=None),
    "iterable_loader": lambda: DataLoader(Stream(), batch_size=None),
    "dataset": Stored,
    "by_index": ByIndex,
    "factory_of_a_list": lambda: lambda: ITEMS,
    "factory_of_a_loader": lambda: lambda: DataLoader(Stored(), batch_size=None),
    "factory_of_an_iterator": lambda: lambda: iter(ITEMS),
    "generator_function": lambda: generating,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_gone_through_round_and_round(form):
    program, seen = leaf(FORMS[form]())
    epochs = []
    program.on("epoch_end")(lambda ctx: epochs.append(ctx.epoch))
    run(program, 8)
    for number, batch in enumerate(seen):
        assert torch.equal(torch.as_tensor(batch, dtype=torch.float64), ITEMS[number % 3])
    assert len(seen) == 8
    assert epochs == [1, 2]


def test_mapping_of_names():
    program, items = Program(), []

    @program.level(
        "low",
        module=one(),
        optimizer=partial(SGD, lr=0.1),
        data={"clean": ITEMS[:2], "noisy": lambda: DataLoader(Stored(), batch_size=None)},
    )
    def low(m, noisy, clean):
        items.append((clean[0].item(), noisy[0].item()))
        return ((m.x - noisy - clean) ** 2).sum()

    runner = Runner(program)
    runner.step()
    items.clear()
    for _ in range(6):
        runner.step()
    first = [i[0].item() for i in ITEMS]
    assert items == [(first[n % 2], first[n % 3]) for n in range(1, 7)]
    given = {"low": {"clean": ITEMS[0], "noisy": ITEMS[1]}}
    found = mlodeco.hypergradient("low", batches=given, program=program)["x"]
    x = program.module("low").x.detach()
    assert torch.allclose(found, 2 * (x - ITEMS[0] - ITEMS[1]))
    for wrong in ({"clean": ITEMS[0]}, ITEMS[0]):
        with pytest.raises(DataError, match="noisy"):
            mlodeco.hypergradient("low", batches={"low": wrong}, program=program)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_fields(as_mapping):
    def loss(m, y, x):
        assert (x.shape, y.shape) == ((2,), ())
        return ((m.x * x).sum() - y) ** 2

    pairs = [(ITEMS[i], torch.tensor(float(i))) for i in range(2)]
    data = [{"x": x, "y": y, "z": 0} for x, y in pairs] if as_mapping else pairs
    program, _ = leaf(data, loss, fields=("x", "y"))
    run(program, 1)
    x, y = pairs[0]
    start = torch.ones(2, dtype=torch.float64)
    wanted = start - 0.1 * 2 * ((start * x).sum() - y) * x
    assert torch.allclose(program.module("low").x, wanted)


def test_fields_that_do_not_fit_the_batch_are_refused():
    program, _ = leaf([(ITEMS[0], ITEMS[1], 3)], lambda m, x, y: m.x.sum(), fields=("x", "y"))
    with pytest.raises(DataError, match="3 parts"):
        run(program, 1)


def test_a_level_without_data():
    program, _ = leaf(None, lambda m: (m.x**2).sum())
    run(program, 2)
    assert program.module("low").x.tolist() == pytest.approx([0.64, 0.64])
    program, _ = leaf(None)
    with pytest.raises(DataError, match="'batch'"):
        run(program, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (randn(3, 2), "one batch"),
        ((randn(3, 2), randn(3)), "one batch"),
        (iter(ITEMS), "only once"),
        (3, "not iterable"),
        (lambda: 3, "not iterable"),
        ([], "empty"),
        (lambda: iter([]), "empty"),
        (DataLoader(Stored(), batch_size=8, drop_last=True), "empty"),
    ],
)
def test_data_that_cannot_be_used_are_refused(data, message):
    program, _ = leaf(data)
    with pytest.raises(DataError, match=message) as caught:
        run(program, 1)
    assert caught.value.level == "low"
    assert program.module("low").x.tolist() == [1.0, 1.0]


def test_message_names_the_loader_of_a_mapping():
    program, _ = leaf({"clean": ITEMS, "noisy": []}, lambda m, clean, noisy: m.x.sum())
    with pytest.raises(DataError, match=r"data\['noisy'\]"):
        run(program, 1)


def shuffled(**options):
    data = TensorDataset(torch.arange(7))
    return DataLoader(data, batch_size=2, shuffle=True, **options)


@pytest.mark.parametrize("own", [False, True])
def test_shuffled_loaders_are_reproducible(own):
    def order(seed):
        loader = shuffled(generator=generator(seed)) if own else shuffled()
        program, seen = leaf(loader, lambda m, batch: (m.x**2).sum() * batch[0].double().mean())
        run(program, 12, seed=None if own else seed)
        return [tuple(batch[0].tolist()) for batch in seen]

    assert order(1) == order(1)
    assert order(1) != order(2)
    epoch = order(1)[:4]
    assert sorted(i for batch in epoch for i in batch) == list(range(7))
    assert epoch != order(1)[4:8]


# which batch hypergradient() takes


class Noisy(Dataset):
    """Draws from every stream of random numbers."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        noise = torch.rand(()).item() + random.random() + numpy.random.rand()
        return index + torch.full((2,), noise, dtype=torch.float64)


def pair(low_data, top_data, **options):
    program = Program()

    @program.level("low", module=one(), optimizer=partial(SGD, lr=0.1), data=low_data, **options)
    def low(m, batch, top):
        return (top.x * batch.mean(0) * m.x).sum() + (m.x**2).sum()

    @program.level(
        "top",
        lower=["low"],
        module=one(2.0),
        optimizer=partial(SGD, lr=0.1),
        data=top_data,
        hypergrad=Identity(scale=0.5),
    )
    def top(m, batch, low):
        return (m.x * batch.mean(0)).sum() + (low.x**2).sum()

    return program


def expected(program, low, top):
    return top.mean(0) - 0.5 * 2 * program.module("low").x.detach() * low.mean(0)


def hyper(program, **options):
    return mlodeco.hypergradient("top", program=program, **options)["x"]


LOWS, TOPS = [randn(4, 2, seed=i) for i in range(3)], [randn(4, 2, seed=9 + i) for i in range(2)]


def test_the_first_batch_before_a_run_and_the_last_steps_after():
    program = pair(LOWS, TOPS)
    assert torch.allclose(hyper(program), expected(program, LOWS[0], TOPS[0]))
    run(program, 5)
    assert torch.allclose(hyper(program), expected(program, LOWS[4 % 3], TOPS[4 % 2]))
    given = hyper(program, batches={"low": LOWS[0]})
    assert torch.allclose(given, expected(program, LOWS[0], TOPS[0]))
    given = hyper(program, batches={"top": TOPS[1], "low": LOWS[2]})
    assert torch.allclose(given, expected(program, LOWS[2], TOPS[1]))
    program.reset()
    assert torch.allclose(hyper(program), expected(program, LOWS[0], TOPS[0]))


def test_all_micro_batches_are_taken():
    program = pair(LOWS, TOPS, accumulate=2)
    mean = (LOWS[0] + LOWS[1]) / 2
    assert torch.allclose(hyper(program), expected(program, mean, TOPS[0]))
    run(program, 2)
    mean = (LOWS[2] + LOWS[0]) / 2
    assert torch.allclose(hyper(program), expected(program, mean, TOPS[1]))
    mean = (LOWS[1] + LOWS[2]) / 2
    found = hyper(program, batches={"low": [LOWS[1], LOWS[2]]})
    assert torch.allclose(found, expected(program, mean, TOPS[1]))
    for wrong in (LOWS[:1], LOWS, LOWS[0]):
        with pytest.raises(RunError, match="accumulate=2"):
            hyper(program, batches={"low": wrong})


def test_unknown_key_of_batches_is_refused():
    with pytest.raises(RunError, match="'low'"):
        hyper(pair(LOWS, TOPS), batches={"lwo": LOWS[0]})


def streams():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
    )


@pytest.mark.parametrize("kind", ["global", "own", "sampler", "batch_sampler", "mapping"])
def test_a_look_restores_loaders_and_random_numbers(kind):
    """The next iteration of the loader gives what it would have given."""
    own = generator(5)
    loader = {
        "global": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
        "own": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, generator=own),
        "sampler": lambda: DataLoader(
            Noisy(), batch_size=2, sampler=RandomSampler(range(4), generator=own)
        ),
        "batch_sampler": lambda: DataLoader(
            Noisy(), batch_sampler=BatchSampler(RandomSampler(range(4), generator=own), 2, False)
        ),
        "mapping": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, generator=own),
    }[kind]()
    program = pair(loader, TOPS)
    if kind == "mapping":
        program = Program()
        program.level("top", module=one(), data={"a": loader, "b": LOWS})(
            lambda m, a, b: (m.x * a.mean(0)).sum()
        )
    before, state = streams(), own.get_state()
    first = hyper(program)
    assert torch.equal(first, hyper(program))
    assert streams() == before
    assert torch.equal(own.get_state(), state)
    plain = next(iter(loader))
    if kind == "mapping":
        assert torch.allclose(first, plain.mean(0))
    else:
        assert torch.allclose(first, expected(program, plain, TOPS[0]))


def test_a_look_restores_when_it_raises():
    class Broken(Noisy):
        def __getitem__(self, index):
            super().__getitem__(index)
            raise ValueError("mine")

    own = generator(5)
    program = pair(DataLoader(Broken(), batch_size=2, shuffle=True, generator=own), TOPS)
    before, state = streams(), own.get_state()
    with pytest.raises(ValueError, match="mine"):
        hyper(program)
    assert streams() == before
    assert torch.equal(own.get_state(), state)


def test_a_given_batch_needs_no_data():
    program = pair(None, None)
    found = hyper(program, batches={"low": LOWS[0], "top": TOPS[0]})
    assert torch.allclose(found, expected(program, LOWS[0], TOPS[0]))
    with pytest.raises(DataError, match="no data"):
        hyper(program, batches={"low": LOWS[0]})


def test_levels_that_are_not_visited_need_no_batch():
    program = pair(None, TOPS)
    assert torch.allclose(hyper(program, hypergrad=None), TOPS[0].mean(0))
