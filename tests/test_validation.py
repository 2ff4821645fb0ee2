"""Validations: what they see, what they leave, the best of them, early stopping."""

from __future__ import annotations

import math
from functools import partial

import numpy
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import BindingError, DataError, LossError
from tests.problems import generator, randn


def make(loader=None):
    program = Program()

    @program.level(
        "low",
        module=lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double(),
        optimizer=partial(SGD, lr=0.05),
        data=loader if loader is not None else [randn(6, 3, seed=1)],
    )
    def low(m, batch):
        x = batch[0] if isinstance(batch, list) else batch
        return (m(x) ** 2).mean()

    return program


def run(program, steps, **options):
    return mlodeco.run(steps, program=program, progress="off", **{"seed": 1, **options})


def fed(values, **options):
    """A program whose validation gives these values of 'm', one after another."""
    program, given = make(), iter(values)
    program.validate(**options)(lambda: {"m": next(given)})
    return program


def test_eval_mode_and_no_grad_inside_and_modes_as_before_after():
    program, seen = make(), []

    @program.validate(every=2)
    def look(low):
        seen.append([c.training for c in low.modules()])
        assert not torch.is_grad_enabled()
        assert not low(randn(4, 3)).requires_grad
        return {}

    model = program.module("low")
    model[2].eval()
    wanted = [c.training for c in model.modules()]
    before = int(model[1].num_batches_tracked)
    run(program, 4)
    assert seen == [[False] * 4] * 2
    assert [c.training for c in model.modules()] == wanted == [True, True, True, False]
    assert int(model[1].num_batches_tracked) == before + 4
    assert torch.is_grad_enabled()


def test_modes_are_restored_when_a_validation_raises():
    program = make()

    @program.validate
    def fail(low):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        run(program, 1)
    assert all(c.training for c in program.module("low").modules())
    assert torch.is_grad_enabled()
    assert "test_validation.py" in caught.value.__notes__[0]


def test_average_by_number_of_samples():
    batches = [randn(n, 3, seed=n) for n in (5, 2, 1)]
    program = make()

    @program.validate(data=batches)
    def measure(low, batch):
        return {"mean": batch.mean(), "size": len(batch)}

    history = run(program, 1).history
    assert history.metric("mean")[0] == pytest.approx(torch.cat(batches).mean().item(), abs=1e-12)
    assert history.metric("size")[0] == pytest.approx((25 + 4 + 1) / 8)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(1)),
        lambda x: [["name"] * 3, x],
        lambda x: {"x": x, "y": torch.zeros(9)},
        lambda x: {"ids": ["a"], "inner": (x,)},
    ],
)
def test_samples_are_counted_by_the_first_tensor(wrap):
    batches = [wrap(torch.ones(n, 2)) for n in (3, 1)]
    program = make()
    values = iter([1.0, 5.0])
    program.validate(data=batches)(lambda batch: {"m": next(values)})
    assert run(program, 1).history.metric("m") == [pytest.approx(2.0)]


def test_batches_without_tensors_count_as_one_sample():
    program = make()
    program.validate(data=[1.0, 2.0, 6.0])(lambda batch: {"m": batch})
    assert run(program, 1).history.metric("m") == [3.0]


@pytest.mark.parametrize("form", ["list", "loader", "factory", "generator"])
def test_data_in_every_form(form):
    x = randn(5, 1, seed=3)
    parts = [x[:3], x[3:]]
    data = {
        "list": parts,
        "loader": DataLoader(x, batch_size=3),
        "factory": lambda: parts,
        "generator": lambda: iter(parts),
    }[form]
    program = make()
    program.validate(data=data)(lambda batch: {"m": batch.mean()})
    values = run(program, 3).history.metric("m")
    assert values == pytest.approx([x.mean().item()] * 3)


def test_every_and_the_end_exactly_once():
    program, ticks = make(), []

    @program.validate(every=3)
    def look(ctx):
        ticks.append(ctx.tick)
        return {"m": 0.0}

    result = run(program, 7)
    assert ticks == [3, 6, 7]
    assert [v.tick for v in result.history.validations] == [3, 6, 7]
    ticks.clear()
    run(program, 6)
    assert ticks == [3, 6]
    ticks.clear()
    run(program, 1)
    assert ticks == [1]


def test_each_validation_is_made_at_the_end():
    program, ticks = make(), {2: [], 3: [], 5: []}
    for every, seen in ticks.items():
        program.validate(every=every)(lambda ctx, seen=seen: seen.append(ctx.tick) or {})
    run(program, 4)
    assert ticks == {2: [2, 4], 3: [3, 4], 5: [4]}


def test_final_validation_of_a_runner_that_goes_on():
    program, ticks = make(), []
    program.validate(every=4)(lambda ctx: ticks.append(ctx.tick) or {})
    runner = Runner(program)
    runner.run(3)
    runner.run(3)
    assert ticks == [3, 4, 6]


def test_final_validation_when_a_hook_stops():
    program, ticks = make(), []
    program.validate(every=100)(lambda ctx: ticks.append(ctx.tick) or {})

    @program.on("after_step")
    def stop(ctx):
        if ctx.tick == 3:
            ctx.stop()

    run(program, 50)
    assert ticks == [3]


@pytest.mark.parametrize(
    ("mode", "best", "tick"), [("min", -1.0, 3), ("max", 4.0, 2)], ids=["min", "max"]
)
def test_best(mode, best, tick):
    result = run(fed([3.0, 4.0, -1.0, 4.0, -1.0], monitor="m", mode=mode), 5)
    assert (result.best.value, result.best.tick) == (best, tick)
    assert result.best.metric == "m"
    assert result.best.metrics == {"m": best}


def test_no_best_without_monitor():
    assert run(fed([1.0, 2.0]), 2).best is None


def test_not_a_number_is_never_the_best():
    result = run(fed([math.nan, 2.0, math.nan, 1.0], monitor="m", mode="min"), 4)
    assert (result.best.value, result.best.tick) == (1.0, 4)
    assert run(fed([math.nan, math.nan], monitor="m", mode="min"), 2).best is None


def test_patience():
    values = [5.0, 4.0, 4.0, 6.0, 3.0, 3.5, 3.5, 3.5, 0.0, 0.0]
    result = run(fed(values, monitor="m", mode="min", patience=3), 10)
    assert result.ticks == 8
    assert result.stop_reason == "'m' has not become smaller in 3 validations"
    assert result.best.value == 3.0
    assert result.history.metric("m") == values[:8]


def test_patience_starts_again_with_each_run_of_a_runner():
    runner = Runner(fed([1.0, 2.0, 2.0, 2.0, 2.0, 0.5], monitor="m", mode="min", patience=2))
    assert runner.run(10).ticks == 3
    assert runner.run(10).ticks == 5
    assert runner.run(1).best.value == 0.5


def test_what_a_validation_logs_is_in_its_record():
    program = make()
    program.validate(lambda ctx: ctx.log(extra=torch.ones(())) or {"m": 0.0})
    assert run(program, 1).history.validations[0].metrics == {"m": 0.0, "extra": 1.0}


def test_patience_counts_validations_and_not_ticks():
    result = run(fed([1.0, 1.0, 1.0, 1.0], monitor="m", mode="min", patience=2, every=4), 30)
    assert result.ticks == 12


def test_patience_of_a_maximum():
    result = run(fed([1.0, 2.0, 1.0, 9.0], monitor="m", patience=1, mode="max"), 10)
    assert (result.ticks, result.best.value) == (3, 2.0)
    assert result.stop_reason == "'m' has not become larger in 1 validation"


def test_unknown_monitor_is_refused():
    with pytest.raises(DataError, match="'m'") as caught:
        run(fed([1.0], monitor="n", mode="min"), 1)
    assert "test_validation.py" in str(caught.value)


def test_random_numbers_are_untouched():
    def drawing(program):
        @program.validate
        def draw(low):
            import random

            torch.rand(3), random.random(), numpy.random.rand()
            nn.functional.dropout(torch.ones(9))
            return {"m": low(randn(4, 3)).mean()}

        return program

    def end(program):
        import random

        run(program, 5)
        weights = [p.detach().clone() for p in program.module("low").parameters()]
        return weights, torch.get_rng_state(), random.random(), numpy.random.rand()

    plain, validated = end(make()), end(drawing(make()))
    for left, right in zip(plain[0], validated[0], strict=True):
        assert torch.equal(left, right)
    assert torch.equal(plain[1], validated[1])
    assert plain[2:] == validated[2:]


def test_a_shuffled_loader_that_training_uses_too_goes_on_as_it_would():
    """Its generator is put back after a validation."""

    def end(every):
        data = TensorDataset(randn(10, 3, seed=1))
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator(3))
        program = make(loader)
        if every:
            program.validate(every=every, data=loader)(
                lambda low, batch: {"m": low(batch[0]).mean()}
            )
        run(program, 8)
        return program.module("low")[0].weight

    assert torch.equal(end(0), end(1))
    assert torch.equal(end(0), end(3))


def test_hook_on_validate_gets_the_metrics():
    program, seen = fed([1.0, 2.0]), []
    program.on("validate")(lambda metrics, ctx: seen.append((ctx.tick, metrics["m"])))
    run(program, 2)
    assert seen == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("bad", [None, 3.0, {"m": "high"}, {"m": torch.ones(2)}, {"m": True}])
def test_what_is_no_metric_is_refused(bad):
    program = make()
    program.validate(lambda low: bad)
    with pytest.raises(LossError, match="validation") as caught:
        run(program, 1)
    assert "test_validation.py" in str(caught.value)


def test_unknown_argument_is_refused_before_the_run():
    program = make()
    program.validate(lambda lwo: {})
    with pytest.raises(BindingError, match="'low'"):
        run(program, 1)
    program = make()
    program.validate(lambda low, batch: {})
    with pytest.raises(BindingError, match="batch"):
        run(program, 1)


def test_empty_data_are_refused():
    program = make()
    program.validate(data=[])(lambda batch: {})
    with pytest.raises(DataError, match="empty"):
        run(program, 1)


def test_what_a_function_tells_of_its_batches():
    program = make()

    @program.validate(every=1, data=[randn(4, 3), randn(2, 3)])
    def look(batch, ctx):
        ctx.log(size=len(batch))
        if ctx.tick == 2:
            ctx.stop("seen enough")
        return {"m": ctx.gather(batch).sum()}

    result = run(program, 5)
    assert (result.ticks, result.stop_reason) == (2, "seen enough")
    assert result.history.validations[0].metrics["size"] == 2
