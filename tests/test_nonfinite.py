"""Numbers that are not finite: where they are found, what is said of them, and the policies."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

from mlodeco import Program, Runner
from mlodeco.errors import NonFiniteError, NonFiniteWarning, RunError, SolverWarning
from mlodeco.hypergrad import CG, Neumann
from mlodeco.runtime.nonfinite import LONGEST
from tests.test_precision import EVERY, batches, bilevel, run, same, snapshot

NAN = math.nan
sgd = partial(SGD, lr=0.1)


def quietly(program, steps=4, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonFiniteWarning)
        return run(program, steps, **options)


def leaf(function, value=1.0, size=1, data=None, **options):
    """A program of one level."""
    program = Program()
    module = {"x": torch.full((size,), value, dtype=torch.float64)}
    program.level("low", module=module, optimizer=sgd, data=data, **options)(function)
    return program


def test_unknown_policies_are_refused():
    with pytest.raises(RunError, match="Did you mean 'skip'"):
        Runner(leaf(lambda m: m.x.sum()), nonfinite="skpi")


# skip


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("at", ["low", "top"])
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_a_skipped_step_changes_nothing(name, at):
    data = {f"{at}_data": (1, 1, NAN, 1) if at == "low" else (1, NAN, 1)}
    program = bilevel(EVERY[name], clip_norm=1.0, **data)
    around, told = {}, []

    @program.on("before_step")
    def before(ctx):
        around[ctx.level] = snapshot(runner, ctx.level)

    @program.on("after_backward")
    def gradients(ctx, grads):
        assert all(bool(g.isfinite().all()) for g in grads.values())

    @program.on("hypergradient")
    def hypergradient(ctx, grads):
        assert all(bool(g.isfinite().all()) for g in grads.values())

    @program.on("after_step")
    def after(ctx, grads):
        assert bool(grads) is not ctx.skipped
        if ctx.skipped:
            told.append((ctx.level, ctx.tick))
        assert same(around[ctx.level], snapshot(runner, ctx.level)) is ctx.skipped

    runner = Runner(program, seed=0, nonfinite="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = runner.run(6)
    skipped = [(r.level, r.tick) for r in result.history.steps if r.skipped]
    assert skipped == told == [(at, 4 if at == "top" else 3)]
    assert result.skipped == {at: 1}
    assert f"skipped, since not finite: 1 step of {at!r}" in result.stop_reason
    assert sum(w.category is NonFiniteWarning for w in caught) == 1
    state = program.module("top").state_dict() | program.module("low").state_dict()
    assert all(bool(t.isfinite().all()) for t in state.values())


@pytest.mark.filterwarnings("ignore::mlodeco.errors.NonFiniteWarning")
def test_training_goes_on_as_if_a_skipped_step_had_not_been():
    def trained(factors, ticks):
        program = alone_in_single(factors)
        run(program, ticks, nonfinite="skip")
        return program.module("low").state_dict()

    assert same(trained((1, 1, NAN), 3), trained((1, 1, 1), 2))


def alone_in_single(factors):
    program = Program()
    torch.manual_seed(0)

    @program.level(
        "low", module=partial(torch.nn.Linear, 3, 1), optimizer=sgd, data=batches(*factors)
    )
    def low(model, batch):
        x, y = batch
        return F.mse_loss(model(x)[:, 0], y)

    return program


@pytest.mark.parametrize("name", ["unroll", "kept graphs", "kept seldom", "unroll_forward"])
def test_a_skipped_step_of_an_unrolled_loop_moves_nothing(name):
    """The hypergradient is that of the loop without the step."""
    found, kept = [], []
    for data, steps in (((1, NAN, 1), 3), ((1, 1), 2)):
        program = bilevel(EVERY[name], low_data=data, low={"inner_steps": steps, "clip_norm": 0.5})
        own = program.levels["low"].data
        own[:] = kept or own
        kept = [own[0], own[-1]]
        program.on("hypergradient")(lambda grads: found.append(grads["x"].clone()))
        quietly(program, steps, nonfinite="skip")
    assert torch.allclose(*found, rtol=1e-4)
    assert float(found[0].norm()) > 1e-4


@pytest.mark.parametrize(
    "low",
    [{"accumulate": 2}, {"rollback": True}, {"replicas": 2}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_what_a_step_is(low):
    program = Program()
    items = [torch.full((2, 1), value) for value in (1.0, NAN, 2.0, 1.0)]

    @program.level("low", module={"x": torch.zeros(1)}, optimizer=sgd, data=items, **low)
    def train(m, batch, top):
        return ((m.x - top.x * batch) ** 2).sum()

    @program.level(
        "top", lower=["low"], module={"x": torch.ones(1)}, optimizer=sgd, hypergrad="identity"
    )
    def meta(m, low):
        return (low.x**2).sum()

    result = quietly(program, 4, nonfinite="skip")
    assert result.skipped["low"] == (2 if "accumulate" in low else 1)
    for name in ("low", "top"):
        state = program.module(name).state_dict().values()
        assert all(bool(t.isfinite().all()) for t in state)
    assert program.module("low").x.item() != 0.0


def test_nested_hypergradients_are_skipped_too():
    program = bilevel(CG(max_steps=3, damping=0.5), top_data=(1, NAN, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SolverWarning)
        assert quietly(program, 6, nested=True, nonfinite="skip").skipped == {"top": 1}


def test_nothing_but_skips_ends_a_run():
    program = leaf(lambda m, batch: (m.x * batch).sum(), data=[torch.tensor([NAN])])
    with (
        pytest.warns(NonFiniteWarning) as caught,
        pytest.raises(NonFiniteError, match=rf"{LONGEST} steps in a row.*the loss is nan") as e,
    ):
        run(program, LONGEST + 10, nonfinite="skip")
    assert len(caught) == 1
    assert "batch" in e.value.cause
    assert program.module("low").x.tolist() == [1.0]


def test_a_step_between_begins_the_count_anew():
    data = [torch.tensor([NAN])] * (LONGEST - 1) + [torch.tensor([1.0])]
    program = leaf(lambda m, batch: (m.x * batch).sum(), data=data)
    result = quietly(program, 2 * LONGEST, nonfinite="skip")
    assert result.skipped == {"low": 2 * LONGEST - 2}


def test_what_a_hook_makes_of_the_gradients_counts():
    program = leaf(lambda m: (m.x**2).sum())

    @program.on("after_backward")
    def spoil(ctx, grads):
        if ctx.tick == 2:
            grads["x"].fill_(NAN)

    assert quietly(program, 3, nonfinite="skip").skipped == {"low": 1}
    assert program.module("low").x.item() == pytest.approx(0.64)


# warn


@pytest.mark.parametrize("at", ["low", "top"])
def test_warn_goes_on_with_the_numbers(at):
    program = bilevel("neumann", **{f"{at}_data": (1, NAN)})
    with pytest.warns(NonFiniteWarning, match="taken all the same") as caught:
        result = run(program, 8, nonfinite="warn")
    assert result.skipped == {}
    assert len(result.history.of(at)) == (8 if at == "low" else 4)
    values = [t for t in program.module(at).state_dict().values() if t.is_floating_point()]
    assert any(bool(t.isnan().any()) for t in values)
    assert sum("batch" in str(w.message) for w in caught) <= 2  # one a level


# messages


def test_a_bad_batch_is_named():
    data = [(torch.ones(3), torch.ones(3)), (torch.tensor([1.0, NAN, math.inf]), torch.ones(3))]
    program = leaf(lambda m, x, y: (m.x * x + y).sum(), data=data, fields=("x", "y"))
    with pytest.raises(NonFiniteError) as caught:
        run(program, 2)
    error = caught.value
    assert error.when == "step 2 of level 'low', tick 2."
    assert error.cause == "x of level 'low' has 1 NaN and 1 inf."
    assert error.remedy == "look into the data."
    assert f"At: {error.when}\n  Likely cause: {error.cause}" in str(error)
    assert "test_nonfinite.py:" in error.site


def test_a_bad_parameter_is_named():
    program = leaf(lambda m: (m.x**2).sum(), value=math.inf)
    with pytest.raises(NonFiniteError, match=r"parameter 'x' of level 'low' has 1 inf") as caught:
        run(program, 1)
    assert "clip_norm" in caught.value.remedy


def test_a_bad_buffer_and_a_bad_source_are_named():
    module = torch.nn.BatchNorm1d(2)
    module.running_var.fill_(NAN)
    program = Program()

    @program.level("low", module=module.eval(), optimizer=sgd)
    def low(model):
        return model(torch.ones(2, 2)).sum()

    with pytest.raises(NonFiniteError, match="buffer 'running_var' of level 'low' has 2 NaN"):
        run(program, 1)

    program = leaf(lambda m, task: (m.x * task["t"]).sum())
    program.source("task")(lambda: iter([{"t": torch.tensor([NAN])}]))
    with pytest.raises(NonFiniteError, match=r"task\['t'\] of level 'low' has 1 NaN"):
        run(program, 1)


def test_numbers_that_arise_in_the_function_are_told_apart():
    program = leaf(lambda m: m.x.sqrt().sum(), value=0.0)
    with pytest.raises(NonFiniteError, match=r"norm of the gradient before clipping is inf") as e:
        run(program, 1)
    assert "arises in the functions" in e.value.cause
    assert "sqrt at 0" in e.value.remedy


def two(low_loss, top_loss, method="neumann", start=1.0):
    program = Program()
    module = {"x": torch.full((1,), start, dtype=torch.float64)}
    program.level("low", module=dict(module), optimizer=partial(SGD, lr=0.0))(low_loss)
    top = program.level("top", lower=["low"], module=dict(module), optimizer=sgd, hypergrad=method)
    top(top_loss)
    return program


def low_of(term):
    def low(m, top):
        return term(m.x, top.x).sum()

    return low


def top_of(term):
    def top(m, low):
        return term(m.x, low.x).sum()

    return top


@pytest.mark.parametrize(
    ("low", "top", "level", "words"),
    [
        (lambda w, h: (w - h) ** 2, lambda h, w: (w - 1).sqrt() + h, "low", "the cotangent that"),
        (lambda w, h: (w - h) ** 2, lambda h, w: w + (h - 1).sqrt(), "top", "the direct gradient"),
        (lambda w, h: (w - 1).abs() ** 1.5 * h, lambda h, w: w, "low", "the solution of Neumann"),
        (
            lambda w, h: w**2 + w * (h - 1).abs() ** 0.5,
            lambda h, w: w,
            "low",
            "the second derivative towards level 'top'",
        ),
        (lambda w, h: (w - h) ** 2, lambda h, w: w / (h - 1), "top", "the loss is inf"),
    ],
    ids=["cotangent", "direct", "solution", "product", "loss"],
)
def test_each_term_is_named(low, top, level, words):
    program = two(low_of(low), top_of(top))
    with pytest.raises(NonFiniteError, match=words) as caught:
        run(program, 1)
    assert caught.value.level == level
    assert caught.value.when == "step 1 of level 'top', tick 1."
    assert "arises in the functions" in caught.value.cause
    program = two(low_of(low), top_of(top))
    with pytest.warns(NonFiniteWarning, match=words):
        assert run(program, 1, nonfinite="skip").skipped == {"top": 1}


def warned(program, steps, **options):
    """The first lines of the warnings of a run that skips."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(program, steps, nonfinite="skip", **options)
    found = [str(w.message) for w in caught if w.category is NonFiniteWarning]
    return [message.split("\n")[0].partition(": ")[2] for message in found]


def test_terms_that_arise_in_functions_are_each_named():
    def low(m, ctx):
        bad = {3: NAN, 4: math.inf}.get(ctx.tick, 1.0)
        root = (0 * m.x).sqrt().sum() if ctx.tick in (6, 7) else 0.0
        return (m.x**2).sum() * bad + root

    assert [m.split(" is ")[0] for m in warned(leaf(low), 8)] == [
        "the loss",
        "the norm of the gradient before clipping",
    ]


def test_levels_at_fault_are_each_named():
    def top(m, low, ctx):
        root = (0 * low.x).sqrt().sum() if ctx.tick in (5, 6) else 0.0
        return (low.x**2).sum() * (NAN if ctx.tick == 3 else 1.0) + root

    found = warned(two(low_of(lambda w, h: (w - h) ** 2), top, "cg"), 8)
    assert [m.split(" is ")[0] for m in found] == [
        "the loss",
        "the cotangent that reaches the level",
    ]


def test_a_run_that_goes_on_counts_skips_on(tmp_path):
    def make():
        return leaf(lambda m, ctx: (m.x**2).sum() * (NAN if ctx.tick > 2 else 1.0))

    runner = Runner(make(), nonfinite="skip")
    with pytest.warns(NonFiniteWarning):
        runner.run(60)
    runner.save(tmp_path / "saved")
    other = Runner(make(), nonfinite="skip")
    other.load(tmp_path / "saved")
    with pytest.raises(NonFiniteError, match=f"{LONGEST} steps in a row"):  # and no warning
        other.run(200)
    assert other.tick == LONGEST + 1
    assert other.history.skipped == {"low": LONGEST - 1}


def test_a_series_that_overflows_names_its_step():
    method = Neumann(num_terms=200, step_size=1.0)
    program = two(low_of(lambda w, h: 1e6 / 2 * w**2 + w * h), top_of(lambda h, w: w), method)
    with pytest.raises(NonFiniteError, match="the solution of Neumann") as caught:
        run(program, 1)
    assert "the terms of the series grow" in caught.value.cause
    assert "step_size" in caught.value.cause


@pytest.mark.parametrize("value", [NAN, math.inf])
def test_bad_data_are_no_overflow_in_half(value):
    def make():
        program = Program()
        data = [torch.ones(4, 3), torch.full((4, 3), value)]
        low = program.level(
            "low", module=partial(torch.nn.Linear, 3, 1), optimizer=sgd, data=data, precision="fp16"
        )
        low(lambda model, batch: 0.01 * (model(batch).float() ** 2).mean())
        return program

    with pytest.raises(NonFiniteError, match="batch of level 'low' has 12"):
        run(make(), 4)
    program = make()
    with pytest.warns(NonFiniteWarning, match="batch of level 'low' has 12") as caught:
        result = run(program, 4, nonfinite="skip")
    assert len(caught) == 1
    assert result.skipped == {"low": 2}
    assert "skipped, since not finite: 2 steps of 'low'" in result.stop_reason
    assert all(bool(p.isfinite().all()) for p in program.module("low").parameters())


# solves that are finite and wrong


@pytest.mark.parametrize(
    ("method", "curvature", "knobs"),
    [
        (Neumann(num_terms=10, step_size=1.0), 3.0, ("grow", "step_size", "damping")),
        (Neumann(num_terms=10, step_size=1.0), -2.0, ("grow", "damping")),
        (Neumann(num_terms=10), -1.0, ("grow", "damping")),
        (CG(), -1.0, ("positive curvature", "damping", "minres")),
        (CG(), 0.0, ("positive curvature", "damping")),
    ],
    ids=repr,
)
@pytest.mark.parametrize("policy", ["raise", "skip", "warn"])
def test_solver_trouble_is_told_once_with_the_knob_to_turn(method, curvature, knobs, policy):
    program = two(
        low_of(lambda w, h: curvature / 2 * w**2 + w * h), top_of(lambda h, w: w), method, 0.5
    )
    with pytest.warns(SolverWarning) as caught:
        result = run(program, 3, nonfinite=policy)
    assert len(caught) == 1
    assert all(word in str(caught[0].message) for word in ("level 'low'", *knobs))
    assert result.skipped == {}
