"""Replicas against programs of one task each, averaged."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import mlodeco
from mlodeco import Program, Replicas, Runner
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
    "differences": CG(max_steps=4, damping=3.0, product="difference"),
    "unroll_differences": Unroll(product="difference"),
    "part": CG(max_steps=30, damping=3.0, curvature_batch=0.5),
    "identity": Identity(scale=0.1),
    "sama": Sama(),
    "difference": FiniteDifference(scale=0.1),
}
UNROLLED = ("unroll_differences", "unroll", "checkpoints", "kept", "first_order", "forward")
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
    return 1e-6 if "difference" in name else 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", UNROLLED)
def test_maml_is_the_mean_over_tasks(name, optimizer, way):
    options = {"optimizer": OPTIMIZERS[optimizer]}
    found, wanted = hypergradients(maml, "init", name, way, rolled=True, **options)
    assert relative(found, wanted) < tolerance(name)


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


@pytest.mark.slow
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
    own = dict(program.module("low").named_parameters())
    assert all(p.shape == (T, *own[n].shape) for n, p in stacked.items())


# random numbers


def dropped(replicas, hypergrad="unroll"):
    """A loss with dropout in its inputs, whose masks are kept."""
    program, masks = Program(), []

    @program.level(
        "low",
        module={"w": randn(40, seed=1)},
        optimizer=partial(SGD, lr=0.1, momentum=0.5),
        inner_steps=3,
        replicas=replicas,
        data=[randn(T, 40, seed=2)],
    )
    def low(m, batch, top):
        mask = nn.functional.dropout(torch.ones(40))
        masks.append(mask.detach())
        return ((m.w * mask - batch) ** 2 * top.x.exp()).sum() / 2

    @program.level(
        "top",
        lower=["low"],
        module={"x": 0.1 * randn(40, seed=3)},
        hypergrad=hypergrad,
        optimizer=partial(SGD, lr=0.0),
        data=[torch.zeros(T, 1)],
    )
    def top(h, batch, low):
        return ((low.w - 1) ** 2).sum() + (h.x**2).sum()

    return program, masks


def test_replicas_see_different_masks():
    program, masks = dropped(T)
    mlodeco.run(3, program=program, progress="off", seed=0)
    different = {tuple(mask.tolist()) for mask in masks}
    # one a step and replica, and that of the first look
    assert 9 <= len(different) <= 10


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["unroll", "kept", "checkpoints", "forward"])
def test_products_see_the_masks_of_the_steps(method, way):
    program, _ = dropped(WAYS[way], METHODS[method])
    batches = {"low": [randn(T, 40, seed=6 + s) for s in range(3)], "top": torch.zeros(T, 1)}
    direction = randn(40, seed=9)
    x = program.module("top").x

    def value(shift):
        """The upper loss behind the loop, by the hypergradient's own pass."""
        losses = []
        with torch.no_grad():
            x.add_(shift * direction)
        inner = program.levels["top"].function

        def spy(h, batch, low):
            loss = inner(h, batch, low)
            losses.append(loss)
            return loss

        spied, _ = dropped(WAYS[way], METHODS[method])
        object.__setattr__(spied.levels["top"], "function", spy)
        with torch.no_grad():
            spied.module("top").x.copy_(x)
            x.sub_(shift * direction)
        mlodeco.hypergradient("top", program=spied, batches=batches)
        if WAYS[way].way == "loop":
            return float(sum(losses[-T:]).detach()) / T
        return None

    torch.manual_seed(0)
    found = mlodeco.hypergradient("top", program=program, batches=batches)["x"]
    if WAYS[way].way == "loop":
        size = 1e-5
        slope = (value(size) - value(-size)) / (2 * size)
        assert float(found @ direction) == pytest.approx(slope, rel=1e-6)
    again = mlodeco.hypergradient("top", program=program, batches=batches)["x"]
    assert torch.equal(found, again)


@pytest.mark.parametrize("way", WAYS)
def test_unrolled_methods_agree_on_the_masks_of_a_run(way):
    ends = []
    for method in ("unroll", "kept", "checkpoints", "forward"):
        found = []
        program, _ = dropped(WAYS[way], METHODS[method])
        program.on("hypergradient", level="top")(
            lambda grads, found=found: found.append(grads["x"].clone())
        )
        mlodeco.run(6, program=program, progress="off", seed=0)
        ends.append(found)
    for others in ends[1:]:
        for one, other in zip(ends[0], others, strict=True):
            assert torch.allclose(one, other, rtol=1e-9)


# what is refused, and what is done instead


def small(replicas, function, **more):
    program = Program()
    program.level(
        "low",
        module=more.pop("module", {"w": torch.ones(2)}),
        optimizer=partial(SGD, lr=0.1),
        replicas=replicas,
        data=more.pop("data", [randn(T, 2, seed=1)]),
        **more,
    )(function)
    return program


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [2, 4])
def test_another_leading_dimension_is_refused(count, way):
    program = small(WAYS[way], lambda m, batch: (m.w * batch["x"]).sum())
    wrong = {"low": {"x": randn(count, 2)}}
    with pytest.raises(DataError, match="first dimension 3") as found:
        mlodeco.hypergradient("low", program=program, batches=wrong)
    assert f"'batch' has a tensor of shape ({count}, 2)" in str(found.value)
    assert found.value.level == "low"


def test_items_of_levels_above_are_checked_too():
    program = maml(T)
    batches = {"low": [stack([SUPPORT[r][0] for r in range(T)])] * 3, "init": task(1)}
    with pytest.raises(DataError) as found:
        mlodeco.hypergradient("init", program=program, batches=batches)
    assert found.value.level == "init"


@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_dimensions_goes_to_every_replica(way):
    def low(m, batch):
        scale, name, x, nested = batch["scale"], batch["name"], batch["x"], batch["more"][0]
        assert name == "task"
        assert x.shape == (2,)
        assert scale.dim() == 0
        return (scale * m.w * x * nested).sum()

    program = small(WAYS[way], low)
    x, more = randn(T, 2), randn(T, 2, seed=4)
    batch = {"scale": torch.tensor(2.0), "name": "task", "x": x, "more": [more, None]}
    found = mlodeco.hypergradient("low", program=program, batches={"low": batch})
    assert torch.allclose(found["w"], 2 * x * more)


@pytest.mark.parametrize("way", WAYS)
def test_items_without_tensors(way):
    program = small(WAYS[way], lambda m, batch: batch * (m.w**2).sum())
    found = mlodeco.hypergradient("low", program=program, batches={"low": 3})
    assert torch.allclose(found["w"], torch.full((T, 2), 6.0))


def branching(m, batch):
    return (m.w * batch).sum() if batch.sum() > 0 else (m.w**2 * batch).sum()


def batch_normed():
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


UNBATCHED = {
    "branch": ({"w": torch.ones(2)}, branching, randn(T, 2, seed=1)),
    "norm": (batch_normed, lambda m, batch: m(batch).square().mean(), randn(T, 5, 2, seed=1)),
}


@pytest.mark.parametrize("case", UNBATCHED)
def test_what_cannot_be_vmapped_is_refused(case):
    module, function, batch = UNBATCHED[case]
    program = small(Replicas(T, "vmap"), function, module=module, data=[batch])
    with pytest.raises(MethodError, match="cannot be vmapped") as found:
        mlodeco.run(1, program=program, progress="off")
    assert found.value.level == "low"
    assert "way='loop'" in str(found.value)
    assert "track_running_stats=False" in str(found.value)


@pytest.mark.parametrize("case", UNBATCHED)
def test_auto_takes_the_loop_where_vmap_cannot(case, monkeypatch):
    module, function, batch = UNBATCHED[case]
    monkeypatch.setattr("mlodeco.runtime.replicas.prefers_vmap", lambda tensor: True)
    program = small(Replicas(T, "auto"), function, module=module, data=[batch])
    with pytest.warns(FallbackWarning, match="cannot be vmapped") as found:
        mlodeco.run(3, program=program, progress="off", seed=0)
    assert len([w for w in found if issubclass(w.category, FallbackWarning)]) == 1
    other = small(Replicas(T, "loop"), function, module=module, data=[batch])
    mlodeco.run(3, program=other, progress="off", seed=0)
    for key, value in other.built.levels["low"].parameters.items():
        assert value.shape == program.built.levels["low"].parameters[key].shape


def test_auto_is_the_loop_on_a_cpu():
    program = small(T, branching)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlodeco.run(2, program=program, progress="off")


def test_a_mistake_of_the_function_is_not_blamed_on_vmap():
    def low(m, batch):
        raise KeyError("typo")

    program = small(Replicas(T, "vmap"), low)
    with pytest.raises(KeyError, match="typo"):
        mlodeco.run(1, program=program, progress="off")


def test_different_numbers_are_refused():
    program = Program()
    for name, count in (("one", 2), ("other", 3)):
        program.level(name, module={"w": torch.ones(2)}, replicas=count)(
            lambda m, batch: (m.w * batch).sum()
        )

    @program.level("top", lower=["one", "other"], module={"x": torch.ones(2)})
    def top(h, one, other):
        return (h.x * one.w * other.w).sum()

    with pytest.raises(GraphError, match="different numbers of replicas"):
        program.module("top")


def test_optimizers_that_mix_entries_are_refused():
    program = small(T, lambda m, batch: (m.w * batch).sum())
    object.__setattr__(program.levels["low"], "optimizer", torch.optim.Adafactor)
    with pytest.raises(OptimizerError, match="Adafactor"):
        mlodeco.run(1, program=program, progress="off")


def test_nested_responses_are_refused():
    batches = {"low": SUPPORT[0][0], "top": QUERY[0]}
    with pytest.raises(GraphError, match="nested"):
        mlodeco.hypergradient("top", program=reading(T, CG()), batches=batches, nested=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_changed(name, way):
    program = reading(WAYS[way], METHODS[name])
    level = program.module("low"), program.module("top")
    stacked = program.built.levels["low"].parameters
    parameters = [p for module in level for p in module.parameters()] + list(stacked.values())
    before = [(p, p.data_ptr(), p.detach().clone()) for p in parameters]
    rng = torch.get_rng_state()
    rolled = name in UNROLLED
    steps = [stack([SUPPORT[r][s] for r in range(T)]) for s in range(3)]
    batches = {"low": steps if rolled else steps[0], "top": stack(QUERY)}
    mlodeco.hypergradient("top", program=program, batches=batches)
    assert torch.equal(rng, torch.get_rng_state())
    for p, place, value in before:
        assert p.data_ptr() == place
        assert torch.equal(p, value)
        assert p.grad is None
    assert [p for module in level for p in module.parameters()] == parameters[: -len(stacked)]


def test_after_an_error_in_a_replica_the_module_is_whole():
    calls = []

    def low(m, batch):
        calls.append(1)
        if len(calls) == 6:
            raise ValueError("no")
        return (m.w * batch).sum()

    program = small(T, low)
    module = program.module("low")
    before = module.w
    with pytest.raises(ValueError, match="no"):
        mlodeco.run(3, program=program, progress="off")
    assert module.w is before
    assert isinstance(module.w, nn.Parameter)
    assert torch.equal(module.w, program.built.levels["low"].parameters["w"][0])


# levels between, rules, products together


def test_a_level_between_reads_replicas():
    def chain(replicas, support, middle, batch):
        program = Program()

        @program.level("low", module={"w": randn(3, seed=1)}, replicas=replicas)
        def low(m, batch, mid):
            return ((m.w - batch * mid.y) ** 2).sum() / 2 + (m.w**4).sum() / 4

        @program.level("mid", lower=["low"], module={"y": randn(3, seed=2)}, hypergrad="dense")
        def mid(m, batch, low, top):
            return ((low.w * m.y - batch) ** 2).sum() / 2 + (m.y**2 * top.x.exp()).sum()

        @program.level("top", lower=["mid"], module={"x": randn(3, seed=3)}, hypergrad="dense")
        def top(h, batch, mid):
            return ((mid.y - batch) ** 2).sum() + (h.x**2).sum()

        batches = {"low": support, "mid": middle, "top": batch}
        return mlodeco.hypergradient("top", program=program, batches=batches)

    support, middle, batch = randn(T, 3, seed=4), randn(T, 3, seed=5), randn(3, seed=6)
    found = chain(T, support, middle, batch)["x"]
    # the level between is one: its Hessian is the mean over replicas
    w, y, x = (randn(3, seed=seed) for seed in (1, 2, 3))
    hessian = torch.diag(w**2 + 2 * x.exp())
    cross = torch.diag(2 * y * x.exp())
    wanted = 2 * x - cross @ torch.linalg.solve(hessian, 2 * (y - batch))
    assert torch.allclose(found, wanted)
    assert torch.allclose(chain(Replicas(T, "vmap"), support, middle, batch)["x"], wanted)


@pytest.mark.parametrize("way", WAYS)
def test_a_rule_of_a_replicated_level(way):
    def make(replicas):
        program = Program()

        @program.level("low", module={"w": randn(2, seed=1)}, inner_steps=3, replicas=replicas)
        def low(m, batch, top):
            return ((m.w - batch) ** 2 * top.x.exp()).sum()

        @program.update("low")
        def rule(params, grads, state, top):
            size = grads["w"].norm() + 1.0
            kept = state.get("m", torch.zeros_like(grads["w"])) * 0.5 + grads["w"] / size
            return {"w": params["w"] - 0.1 * top.x.exp() * kept}, {"m": kept}

        @program.level(
            "top", lower=["low"], module={"x": 0.1 * randn(2, seed=2)}, hypergrad="unroll"
        )
        def top(h, batch, low):
            return ((low.w - batch) ** 2).sum()

        return program

    support, query = [randn(T, 2, seed=s) for s in range(3)], randn(T, 2, seed=8)
    found = mlodeco.hypergradient(
        "top", program=make(WAYS[way]), batches={"low": support, "top": query}
    )
    alone = [
        mlodeco.hypergradient(
            "top", program=make(None), batches={"low": [s[r] for s in support], "top": query[r]}
        )
        for r in range(T)
    ]
    assert relative(found, {"x": sum(one["x"] for one in alone) / T}) < 1e-10


def test_reptile_moves_to_the_mean_of_the_tasks():
    program = maml(T, hypergrad=None)
    with_data(program, stream(LOOPS), stream(QUERIES), "init")
    object.__setattr__(program.levels["init"], "optimizer", None)

    @program.update("init")
    def rule(params, low):
        ends = dict(low.named_parameters())
        return {n: p + 0.5 * (ends[n] - p) for n, p in params.items()}, {}

    start = {n: p.detach().clone() for n, p in program.module("init").named_parameters()}
    mlodeco.run(3, program=program, progress="off")
    stacked = program.built.levels["low"].parameters
    for n, p in program.module("init").named_parameters():
        assert torch.allclose(p, start[n] + 0.5 * (stacked[n].mean(0) - start[n]))


def test_vmapped_solvers_share_their_products():
    calls = {}
    for way, spec in WAYS.items():
        program = reading(spec, CG(max_steps=20, rtol=1e-10, damping=3.0))
        inner, count = program.levels["low"].function, []

        def low(model, batch, top, inner=inner, count=count):
            count.append(1)
            return inner(model, batch, top)

        object.__setattr__(program.levels["low"], "function", low)
        batches = {"low": stack([SUPPORT[r][0] for r in range(T)]), "top": stack(QUERY)}
        mlodeco.hypergradient("top", program=program, batches=batches)
        count.clear()
        mlodeco.hypergradient("top", program=program, batches=batches)
        calls[way] = len(count)
    assert calls == {"loop": 3, "vmap": 1, "chunk": 2}


def test_an_error_in_a_vmapped_solver_is_raised_and_leaves_no_thread():
    import threading

    program = reading(Replicas(T, "vmap"), "broken")

    @program.method("broken")
    def broken(matvec, b):
        matvec(matvec(b))
        raise ValueError("no solution")

    batches = {"low": stack([SUPPORT[r][0] for r in range(T)]), "top": stack(QUERY)}
    before = threading.active_count()
    with pytest.raises(ValueError, match="no solution"):
        mlodeco.hypergradient("top", program=program, batches=batches)
    assert threading.active_count() == before


def test_solve_takes_one_task():
    program = maml(T)
    alone = maml(None)
    support = SUPPORT[0][:3]
    found, wanted = (
        mlodeco.solve("low", batches={"low": support}, steps=3, program=one)
        for one in (program, alone)
    )
    for p, q in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_loaded_before_the_first_step_reach_every_replica(way):
    program = reading(WAYS[way], METHODS["identity"])
    state = {n: p + 1.0 for n, p in program.module("low").state_dict().items()}
    program.module("low").load_state_dict(state)
    batches = {"low": stack([SUPPORT[r][0] for r in range(T)]), "top": stack(QUERY)}
    mlodeco.hypergradient("top", program=program, batches=batches)
    for n, p in program.built.levels["low"].parameters.items():
        assert torch.equal(p, state[n].expand_as(p))


def test_check_compares_replicas_too():
    program = reading(T, CG(max_steps=30, rtol=1e-12, damping=3.0))
    batches = {"low": stack([SUPPORT[r][0] for r in range(T)]), "top": stack(QUERY)}
    report = mlodeco.check("top", program=program, batches=batches)
    assert report.findings.overall.error < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_rollback_repeats_every_replica(way):
    program = dropped(WAYS[way], "identity")[0]
    object.__setattr__(program.levels["low"], "rollback", True)
    object.__setattr__(program.levels["top"], "optimizer", partial(SGD, lr=0.0))
    mlodeco.run(3, program=program, progress="off", seed=0)
    other = dropped(WAYS[way], "identity")[0]
    mlodeco.run(3, program=other, progress="off", seed=0)
    ends = [one.built.levels["low"].parameters["w"] for one in (program, other)]
    assert ends[0].shape == ends[1].shape
    assert ends[0].isfinite().all()


PARTLY = [
    (partial(SGD, lr=0.1, momentum=0.9), 1),
    (partial(SGD, lr=0.1, weight_decay=0.1), 1),
    (partial(torch.optim.Adam, lr=0.1), 1),
    (partial(SGD, lr=0.1), 0),
]


@pytest.mark.parametrize("method", ["identity", Unroll(), Unroll(keep_graph=True)])
@pytest.mark.parametrize(("optimizer", "count"), PARTLY)
def test_a_parameter_that_some_replicas_alone_touch_is_told_of_once(optimizer, count, method):
    program = Program()
    flags = [torch.tensor([0, 0]), torch.tensor([0, 1])]

    @program.level(
        "low",
        replicas=Replicas(2, way="loop"),
        module={"a": torch.ones(2), "b": torch.ones(2)},
        optimizer=optimizer,
        data=flags,
        inner_steps=2,
    )
    def low(low, batch, top):
        loss = (low.a**2).sum() * top.x.sum()
        return loss if batch.item() else loss + (low.b**2).sum()

    @program.level(
        "top",
        lower=["low"],
        module={"x": torch.ones(1)},
        hypergrad=method,
        optimizer=partial(SGD, lr=0.1),
    )
    def top(top, low):
        return (low.a**2).sum()

    runner = Runner(program, seed=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            runner.step()
    told = [str(one.message) for one in caught if "some replicas" in str(one.message)]
    assert len(told) == count
    assert all("'low'" in text and "'b': replica 1" in text for text in told)
