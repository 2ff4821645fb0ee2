"""A hypergradient changes nothing, and every pass of it sees the same random numbers."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program
from mlodeco.calculus.randomness import (
    SavedRandomness,
    preserved_randomness,
    randomness_set_aside,
)
from mlodeco.hypergrad import CG, FiniteDifference, Identity, Neumann
from tests.problems import randn
from tests.test_hypergrad_exact import relative

METHODS = [
    "identity",
    "finite_difference",
    "neumann",
    "cg",
    "minres",
    "gmres",
    "nystrom",
    "dense",
    CG(max_steps=3, product="forward", warm_start=True),
    Neumann(curvature_batch=0.5, warm_start=True),
    None,
]


def noisy_network(p=0.5):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(p), nn.Linear(8, 3)
    ).double()


def noisy_program(p=0.5):
    generator = torch.Generator().manual_seed(1)
    x, y = randn(32, 4, seed=1), torch.randint(0, 3, (32,), generator=generator)
    index = torch.arange(32)
    loader = DataLoader(
        TensorDataset(index, x, y), batch_size=16, shuffle=True, generator=generator
    )
    program = Program()

    @program.level(
        "model", module=noisy_network(p), data=loader, optimizer=lambda p: torch.optim.Adam(p, 0.01)
    )
    def train(model, batch, weights):
        number, x, y = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        decay = sum((q**2).sum() for q in model.parameters())
        return (weights.s[number].sigmoid() * losses).mean() + 0.5 * decay

    @program.level(
        "weights",
        lower=["model"],
        module={"s": randn(32, seed=2)},
        data=DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True),
        optimizer=lambda p: torch.optim.Adam(p, 0.01),
    )
    def meta(net, batch, model):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    return program, generator


def state(program, generator):
    modules = [program.module(name) for name in program.levels]
    tensors = [t for m in modules for t in m.state_dict().values()]
    grads = [p.grad for m in modules for p in m.parameters()]
    return copy.deepcopy(
        [
            [t.clone() for t in tensors],
            [None if g is None else g.clone() for g in grads],
            torch.get_rng_state(),
            generator.get_state(),
            random.getstate(),
            [str(part) for part in np.random.get_state()],
            [c.training for m in modules for c in m.modules()],
        ]
    )


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("after_run", [False, True])
def test_hypergradient_changes_nothing_and_repeats_itself(method, after_run):
    program, generator = noisy_program()
    if after_run:
        mlodeco.run(3, program=program, progress="off")
    program.module("model")
    before = state(program, generator)
    if method is None:
        expectation = {"s": torch.zeros(32, dtype=torch.float64)}
        found = mlodeco.hypergradient("weights", program=program, hypergrad=None)
        assert torch.equal(found["s"], expectation["s"])
        assert same(before, state(program, generator))
        return
    first = mlodeco.hypergradient("weights", program=program, hypergrad=method)
    assert same(before, state(program, generator))
    second = mlodeco.hypergradient("weights", program=program, hypergrad=method)
    assert torch.equal(first["s"], second["s"])
    stream = torch.get_rng_state()
    torch.rand(7)
    if after_run:
        moved = mlodeco.hypergradient("weights", program=program, hypergrad=method)
        assert not torch.equal(first["s"], moved["s"])
        torch.set_rng_state(stream)
        third = mlodeco.hypergradient("weights", program=program, hypergrad=method)
        assert torch.equal(first["s"], third["s"])
    assert first["s"].abs().sum() > 0


def test_dropout_adds_no_noise_to_the_finite_difference():
    program, _ = noisy_program()
    program.module("model")
    exact = mlodeco.hypergradient("weights", program=program, hypergrad=Identity())["s"]
    for product in ("reverse", "reverse_over_forward", "forward"):
        other = mlodeco.hypergradient(
            "weights", program=program, hypergrad=Identity(product=product)
        )["s"]
        assert relative(other, exact) < 1e-12
    found = mlodeco.hypergradient("weights", program=program, hypergrad=FiniteDifference())["s"]
    assert relative(found, exact) < 1e-6


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_dropout_is_on_and_differs_between_steps():
    program, _ = noisy_program()
    runner = mlodeco.Runner(program, seed=0)
    runner.step()
    batch = {name: level.last_batches[0].batch for name, level in runner.built.levels.items()}
    found = []
    for tick in (1, 2):
        runner.built.tick = tick
        found.append(mlodeco.hypergradient("weights", batches=batch, program=program)["s"])
    assert relative(found[0], found[1]) > 0.01


def test_generator_of_the_context_is_the_same_in_every_pass():
    program = Program()

    @program.level("low", module={"w": randn(3)})
    def low(m, top, ctx):
        noise = torch.randn(3, generator=ctx.generator, dtype=torch.float64)
        return ((m.w - noise * top.x) ** 2).sum() + (m.w**4).sum()

    @program.level("top", lower=["low"], module={"x": randn(3, seed=2)})
    def top(h, low):
        return (low.w**2).sum()

    exact = mlodeco.hypergradient("top", program=program, hypergrad=Identity())["x"]
    found = mlodeco.hypergradient("top", program=program, hypergrad=FiniteDifference())["x"]
    assert relative(found, exact) < 1e-6
    dense = [
        mlodeco.hypergradient("top", program=program, hypergrad="dense")["x"] for _ in range(2)
    ]
    assert torch.equal(*dense)


@pytest.mark.parametrize("draws", [0, 1, 2, 700])
@pytest.mark.parametrize("between", [0, 1, 2, 700])
def test_numpys_stream_is_restored_however_it_moved(draws, between):
    np.random.seed(0)
    np.random.randn(draws)
    for _ in range(2):
        saved, before = SavedRandomness(), np.random.get_state(legacy=False)
        np.random.randn(between)
        with preserved_randomness():
            np.random.randn(3)
        saved.restore()
        after = np.random.get_state(legacy=False)
        assert str(after) == str(before)
        assert np.array_equal(after["state"]["key"], before["state"]["key"])


@pytest.mark.parametrize("before", [0, 1, 2])
@pytest.mark.parametrize("inside", [1, 2, 700])
def test_numpys_stream_may_be_set_aside_twice(before, inside):
    np.random.seed(0)
    np.random.randn(before)
    state = np.random.get_state(legacy=False)
    with randomness_set_aside():
        np.random.randn(inside)
        between = np.random.get_state(legacy=False)
        with randomness_set_aside():
            np.random.randn(inside)
        assert str(np.random.get_state(legacy=False)) == str(between)
    assert str(np.random.get_state(legacy=False)) == str(state)


def test_numpys_stream_may_be_of_another_kind():
    own = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(0))
    try:
        saved = SavedRandomness()
        first = np.random.rand()
        saved.restore()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(own)


def test_masks_change_from_call_to_call_as_torchs_stream_moves():
    program = Program()

    @program.level("low", module=nn.Linear(4, 1), data=[torch.ones(8, 4)])
    def low(model, batch, top):
        return (nn.functional.dropout(model(batch), 0.5) * top.x).square().mean()

    @program.level("top", lower=["low"], module={"x": torch.ones(1)}, data=[torch.ones(8, 4)])
    def top(net, batch, low):
        return low(batch).square().mean()

    def at(seed):
        torch.manual_seed(seed)
        return mlodeco.hypergradient("top", program=program, hypergrad="identity")["x"]

    first = at(0)
    assert torch.equal(first, at(0))
    assert any(not torch.equal(first, at(seed)) for seed in range(1, 6))
