"""Replicas against programs of one task each, averaged."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import mlodeco
from mlodeco import Program, Replicas
from mlodeco.errors import DataError, FallbackWarning, GraphError, MethodError, OptimizerError
from mlodeco.hypergrad import (
    CG,
    GMRES,
    Dense,
    FiniteDifference,
    Identity,
    Neumann,
    Nystrom,
    Sama,
    Unroll,
    UnrollForward,
)
from tests.problems import network, randn
from tests.unrolling import relative

T = 3
WAYS = {
    "loop": Replicas(T, "loop"),
    "vmap": Replicas(T, "vmap"),
    "chunk": Replicas(T, "vmap", 2),
}
METHODS = {
    "unroll": Unroll(),
    "checkpoints": Unroll(checkpoint_every=2),
    "kept": Unroll(keep_graph=True),
    "first_order": Unroll(first_order=True),
    "forward": UnrollForward(),
    "cg": CG(max_steps=30, rtol=1e-12, damping=3.0),
    "gmres": GMRES(max_steps=30, rtol=1e-12, damping=3.0),
    "dense": Dense(damping=3.0),
    "neumann": Neumann(num_terms=5, step_size=0.1),
    "neumann_auto": Neumann(num_terms=5),
    "nystrom": Nystrom(rank=5, damping=3.0, seed=1),
    "forward_products": CG(max_steps=5, damping=3.0, product="forward"),
    "part": CG(max_steps=30, damping=3.0, curvature_batch=0.5),
    "identity": Identity(scale=0.1),
    "sama": Sama(),
    "difference": FiniteDifference(scale=0.1),
}
UNROLLED = ("unroll", "checkpoints", "kept", "first_order", "forward")
OPTIMIZERS = {
    "momentum": (partial(SGD, lr=0.1, momentum=0.9), {}),
    "adam": (partial(Adam, lr=0.05, eps=1e-3), {}),
    "clipped": (partial(Adam, lr=0.05, eps=1e-3), {"clip_norm": 0.4}),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def task(seed, count=6):
    return randn(count, 2, seed=seed), randn(count, seed=seed + 50)


def stack(batches):
    return tuple(torch.stack(parts) for parts in zip(*batches, strict=True))


SUPPORT = [[task(100 * r + s) for s in range(4)] for r in range(T)]
QUERY = [task(100 * r + 40, 5) for r in range(T)]


def maml(replicas, hypergrad="unroll", *, optimizer=OPTIMIZERS["momentum"], proximal=0.0, **more):
    """A start for networks of tasks; with replicas of T tasks at once."""
    program = Program()
    make, options = optimizer

    def low(model, batch, init):
        x, y = batch
        loss = ((model(x)[:, 0] - y) ** 2).mean()
        if proximal:
            pairs = zip(model.parameters(), init.parameters(), strict=True)
            loss = loss + proximal / 2 * sum(((p - q) ** 2).sum() for p, q in pairs)
        return loss

    def low_alone(model, batch):
        return low(model, batch, None)

    level = partial(
        program.level,
        "low",
        module=network(2, 3, 1, seed=2),
        optimizer=make,
        inner_steps=3,
        init_from="init",
        replicas=replicas,
        **{**options, **more},
    )
    level()(low if proximal else low_alone)

    @program.level(
        "init",
        lower=["low"],
        module=network(2, 3, 1, seed=1),
        hypergrad=hypergrad,
        optimizer=partial(SGD, lr=0.2),
    )
    def init(model, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean()

    return program


def reading(replicas, hypergrad, *, optimizer=OPTIMIZERS["momentum"], **more):
    """Upper weights of features and of the decay, read by every task."""
    program = Program()
    make, options = optimizer

    @program.level(
        "low",
        module=network(2, 3, 1, seed=2),
        optimizer=make,
        inner_steps=3,
        replicas=replicas,
        **{**options, **more},
    )
    def low(model, batch, top):
        x, y = batch
        decay = sum((p**2).sum() for p in model.parameters())
        return ((model(x * top.a.exp())[:, 0] - y) ** 2).mean() + top.d.exp() * decay

    @program.level(
        "top",
        lower=["low"],
        module={"a": 0.3 * randn(2, seed=4), "d": randn(1, seed=5)},
        hypergrad=hypergrad,
        optimizer=partial(SGD, lr=0.2),
    )
    def top(h, batch, low):
        x, y = batch
        size = sum((p**2).sum() for p in low.parameters())
        return ((low(x)[:, 0] - y) ** 2).mean() + 0.1 * size + (h.a**2).sum()

    return program


def hypergradients(make, top, name, way, *, rolled, **options):
    """That of all tasks together, and the mean of those of each."""

    def batches(support, query):
        return {"low": support if rolled else support[0], top: query}

    method = METHODS[name]
    steps = [stack([SUPPORT[r][s] for r in range(T)]) for s in range(3)]
    together = mlodeco.hypergradient(
        top,
        program=make(WAYS[way], method, **options),
        batches=batches(steps, stack(QUERY)),
    )
    alone = [
        mlodeco.hypergradient(
            top,
            program=make(None, method, **options),
            batches=batches(SUPPORT[r][:3], QUERY[r]),
        )
        for r in range(T)
    ]
    return together, {k: sum(tree[k] for tree in alone) / T for k in alone[0]}


def tolerance(name):
    return {"difference": 1e-6}.get(name, 1e-10)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UNROLLED)
def test_maml_is_the_mean_over_tasks(name, optimizer, way):
    options = {"optimizer": OPTIMIZERS[optimizer]}
    found, wanted = hypergradients(maml, "init", name, way, rolled=True, **options)
    assert relative(found, wanted) < 1e-10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in METHODS if name not in UNROLLED])
def test_imaml_is_the_mean_over_tasks(name, way):
    found, wanted = hypergradients(maml, "init", name, way, rolled=False, proximal=1.5)
    assert relative(found, wanted) < tolerance(name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_what_replicas_read_gets_the_mean_over_tasks(name, way):
    found, wanted = hypergradients(reading, "top", name, way, rolled=name in UNROLLED)
    assert relative(found, wanted) < tolerance(name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["unroll", "kept", "forward", "sama", "cg"])
def test_every_optimizer_where_replicas_read(name, optimizer, way):
    options = {"optimizer": OPTIMIZERS[optimizer]}
    rolled = name in UNROLLED
    found, wanted = hypergradients(reading, "top", name, way, rolled=rolled, **options)
    assert relative(found, wanted) < 1e-10


# runs


def stream(tasks):
    """Batches for six ticks: two loops of three steps, or one of each turn."""
    return [stack(batches) for batches in zip(*tasks, strict=True)]


LOOPS = [[task(1000 * r + 10 * s) for s in range(9)] for r in range(T)]
QUERIES = [[task(1000 * r + 10 * s + 500, 5) for s in range(3)] for r in range(T)]


def with_data(program, low, top, name="init"):
    """The program again with data at its levels."""
    for level, data in (("low", low), (name, top)):
        declaration = program.levels[level]
        object.__setattr__(declaration, "data", data)
    return program


def run_by_hand(make, top, method, optimizer, *, turns=3, init=True):
    """Each task by a program of its own, and the mean of the hypergradients between turns."""
    options = {"optimizer": OPTIMIZERS[optimizer]}
    programs = [make(None, METHODS[method], **options) for _ in range(T)]
    captured = [[] for _ in range(T)]
    made = [program.module(top) for program in programs]
    means = []
    runners = []
    for r, program in enumerate(programs):
        with_data(program, LOOPS[r], QUERIES[r], top)

        @program.on("hypergradient", level=top)
        def capture(grads, r=r):
            captured[r].append({n: g.clone() for n, g in grads.items()})

        runners.append(mlodeco.Runner(program, seed=0))
    for _ in range(turns):
        before = {n: p.detach().clone() for n, p in made[0].named_parameters()}
        for runner in runners:
            for _ in range(3):
                runner.step()
        means.append({n: sum(c[-1][n] for c in captured) / T for n in before})
        with torch.no_grad():
            for module in made:
                for n, p in module.named_parameters():
                    p.copy_(before[n] - 0.2 * means[-1][n])
    return means, {n: p.detach().clone() for n, p in made[0].named_parameters()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", ["unroll", "checkpoints", "kept", "forward", "cg", "sama"])
@pytest.mark.parametrize("make", [maml, reading])
def test_a_run_is_the_loop_over_tasks(make, method, optimizer, way):
    if make is maml and method in ("cg", "sama"):
        make = partial(maml, proximal=1.5)
    top = "top" if make is reading else "init"
    _, wanted = run_by_hand(make, top, method, optimizer)
    program = make(WAYS[way], METHODS[method], optimizer=OPTIMIZERS[optimizer])
    with_data(program, stream(LOOPS), stream(QUERIES), top)
    result = mlodeco.run(9, program=program, progress="off", seed=0)
    found = {n: p.detach() for n, p in program.module(top).named_parameters()}
    assert relative(found, wanted) < 1e-10
    assert len(result.history.steps) == 12


def test_losses_and_metrics_of_a_run_are_means():
    program = Program()

    @program.level("low", module={"w": torch.zeros(2)}, optimizer=partial(SGD, lr=0.1), replicas=T)
    def low(m, batch):
        return ((m.w - batch) ** 2).sum(), {"first": batch[0].detach(), "name": "x"}

    object.__setattr__(program.levels["low"], "data", [randn(T, 2, seed=1)])
    result = mlodeco.run(1, program=program, progress="off")
    batch = randn(T, 2, seed=1)
    (step,) = result.history.steps
    assert step.loss == pytest.approx(float((batch**2).sum(1).mean()))
    assert step.grad_norm == pytest.approx(float((2 * batch).norm(dim=1).mean()))
    assert step.metrics["first"] == pytest.approx(float(batch[:, 0].mean()))
    stacked = program.built.levels["low"].parameters["w"]
    assert torch.allclose(stacked, 0.2 * batch)


def test_hooks_and_validations_see_the_first_replica():
    program = maml(T)
    with_data(program, stream(LOOPS), stream(QUERIES), "init")
    seen = []

    @program.on("after_step", level="low")
    def look(low):
        stacked = program.built.levels["low"].parameters
        seen.append([torch.equal(p, stacked[n][0]) for n, p in low.named_parameters()])
        assert any(not torch.equal(p, stacked[n][1]) for n, p in low.named_parameters())

    @program.validate(every=1)
    def size(low):
        return {"size": float(sum((p**2).sum() for p in low.parameters()))}

    result = mlodeco.run(4, program=program, progress="off", seed=0)
    assert len(seen) == 4
    assert all(all(row) for row in seen)
    sizes = [record.metrics["size"] for record in result.history.validations]
    assert len(set(sizes)) == 4


def test_a_second_run_goes_on_with_every_replica():
    program = reading(T, "unroll")
    with_data(program, stream(LOOPS), stream(QUERIES), "top")
    mlodeco.run(3, program=program, progress="off")
    before = {n: p.detach().clone() for n, p in program.built.levels["low"].parameters.items()}
    program.on("run_start")(lambda: None)
    mlodeco.Runner(program)
    after = program.built.levels["low"].parameters
    assert all(torch.equal(before[n], p) for n, p in after.items())


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches(way):
    method = METHODS["unroll"]
    steps = [[stack([SUPPORT[r][s] for r in range(T)]) for s in (0, 1)] for _ in range(3)]
    query = stack(QUERY)
    program = maml(WAYS[way], method, accumulate=2)
    found = mlodeco.hypergradient("init", program=program, batches={"low": steps, "init": query})
    alone = [
        mlodeco.hypergradient(
            "init",
            program=maml(None, method, accumulate=2),
            batches={"low": [SUPPORT[r][:2]] * 3, "init": QUERY[r]},
        )
        for r in range(T)
    ]
    wanted = {k: sum(tree[k] for tree in alone) / T for k in alone[0]}
    assert relative(found, wanted) < 1e-10


def test_warm_starts_are_those_of_each_replica():
    method = CG(max_steps=2, damping=3.0, warm_start=True)
    METHODS["warm"] = method
    try:
        _, wanted = run_by_hand(reading, "top", "warm", "momentum")
    finally:
        del METHODS["warm"]
    for way in WAYS.values():
        program = with_data(reading(way, method), stream(LOOPS), stream(QUERIES), "top")
        mlodeco.run(9, program=program, progress="off", seed=0)
        found = {n: p.detach() for n, p in program.module("top").named_parameters()}
        assert relative(found, wanted) < 1e-10


def test_groups_by_name_and_schedules():
    def groups(module):
        return SGD([{"params": [p], "lr": 0.1} for p in module.parameters()])

    program = maml(T, optimizer=(groups, {}))
    with_data(program, stream(LOOPS), stream(QUERIES), "init")
    mlodeco.run(3, program=program, progress="off")
    stacked = program.built.levels["low"].parameters
    assert all(p.shape[0] == T for p in stacked.values())
    assert all(p.shape[0] != T or p.dim() < 2 for p in program.module("low").parameters())
