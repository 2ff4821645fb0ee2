"""What the tape of a run must hold besides parameters: seeds, hooks, options and writes."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LinearLR

import mlodeco
from mlodeco import Program, Runner
from mlodeco.calculus.roll import Start, roll
from mlodeco.errors import GraphWarning, MethodError, OptimizerError
from mlodeco.hypergrad import Unroll, UnrollForward
from tests.problems import randn

START, HYPER = torch.ones(3).double(), torch.tensor([-0.2, 0.5, 0.3]).double()
METHODS = [Unroll(), Unroll(checkpoint_every=2), Unroll(keep_graph=True), UnrollForward()]
FROZEN = partial(SGD, lr=0.0)


def quartic(method, optimizer=None, **options):
    program = Program()
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.5)

    @program.level("low", module={"w": START}, optimizer=optimizer, **options)
    def low(low, top):
        return ((low.w - top.a) ** 4).sum()

    @program.level("top", lower=["low"], hypergrad=method, module={"a": HYPER}, optimizer=FROZEN)
    def top(top, low):
        return (low.w**2).sum()

    return program


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_random_numbers_of_a_step_between_are_those_of_its_hypergradient(method):
    program = Program()

    @program.level("low", module={"w": START}, optimizer=FROZEN)
    def low(low):
        return (low.w**2).sum()

    @program.level(
        "mid", lower=["low"], hypergrad=None, module={"w": START * 0}, optimizer=partial(SGD, lr=1)
    )
    def mid(mid, low, top):
        noise = torch.randn(3, dtype=torch.float64)
        return (noise * top.h * mid.w).sum() + 0 * low.w.sum()

    @program.level("top", lower=["mid"], hypergrad=method, module={"h": START}, optimizer=FROZEN)
    def top(top, mid):
        return mid.w.sum()

    Runner(program, seed=0).step()
    # w' = -noise h, so that the derivative of its sum in h is w'
    assert torch.equal(program.module("top").h.grad, program.module("mid").w.detach())


def by_hand(kind):
    a, w = HYPER.clone().requires_grad_(), START.clone().requires_grad_()
    momentum, rate = torch.zeros(3).double(), 0.05 if kind == "rate" else 0.1
    for _ in range(4):
        (g,) = torch.autograd.grad(((w - a) ** 4).sum(), w, create_graph=True)
        if kind == "gradient":
            g = g.detach() * 0.5 + (g - g.detach())
        momentum = 0.5 * momentum + g
        w = w - rate * momentum
        if kind == "projection":
            w = w - 0.1 * w.detach()
    return torch.autograd.grad((w**2).sum(), a)[0]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("kind", ["gradient", "rate", "projection"])
def test_what_hooks_change_is_on_the_tape_and_their_own_derivative_is_the_identity(kind, method):
    program = quartic(method, inner_steps=4)
    if kind == "gradient":

        @program.on("after_backward", level="low")
        def halve(low):
            low.w.grad.mul_(0.5)

    elif kind == "rate":

        @program.on("after_backward", level="low")
        def slow_down(optimizer):
            optimizer.param_groups[0]["lr"] = 0.05

    else:

        @program.on("after_step", level="low")
        def project(low):
            with torch.no_grad():
                low.w.mul_(0.9)

    runner = Runner(program, seed=0)
    for _ in range(4):
        runner.step()
    assert torch.allclose(program.module("top").a.grad, by_hand(kind), rtol=1e-10)


@pytest.mark.parametrize("truncate", [1, 3])
def test_a_run_refuses_to_cut_a_start_off(truncate):
    program = Program()

    @program.level(
        "low", module={"w": START}, init_from="top", inner_steps=4, optimizer=partial(SGD, lr=0.1)
    )
    def low(low):
        return (low.w**4).sum()

    @program.level(
        "top",
        lower=["low"],
        hypergrad=Unroll(truncate=truncate),
        module={"w": START},
        optimizer=FROZEN,
    )
    def top(top, low):
        return (low.w**2).sum()

    with pytest.raises(MethodError, match="cut off"):
        mlodeco.run(4, program=program, progress="off")


def test_an_optimizer_given_as_an_instance_keeps_its_options():
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    optimizer = SGD(model.parameters(), lr=0.1)
    program = Program()

    @program.level(
        "low",
        module=model,
        optimizer=optimizer,
        scheduler=partial(LinearLR, start_factor=0.5, total_iters=4),
        inner_steps=2,
        data=[randn(4, 3, seed=1)],
    )
    def low(low, batch, top):
        return ((low(batch) - top.a) ** 2).mean()

    @program.level(
        "top", lower=["low"], hypergrad="unroll", module={"a": HYPER[:1]}, optimizer=FROZEN
    )
    def top(top, low):
        return (low.weight**2).sum()

    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    first = mlodeco.hypergradient("top", program=program)["a"]
    mlodeco.solve("low", program=program, steps=2)
    assert torch.equal(mlodeco.hypergradient("top", program=program)["a"], first)
    after = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert before == after


class WritesData(Optimizer):
    """As many optimizers outside torch: no version counter moves."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


def test_upper_levels_that_are_written_through_data():
    def trained(kind):
        program = quartic(Unroll(), inner_steps=2)
        program.levels["top"].__dict__["optimizer"] = partial(kind, lr=0.5)
        mlodeco.run(8, program=program, seed=0, progress="off")
        return program.module("top").a.detach()

    assert torch.equal(trained(SGD), trained(WritesData))


@pytest.mark.parametrize("method", [*METHODS, Unroll(first_order=True)], ids=str)
@pytest.mark.parametrize("is_heard", [False, True])
def test_random_numbers_of_a_rule_are_those_of_the_executed_one(method, is_heard):
    program = Program()

    @program.level("low", module={"w": START}, inner_steps=2)
    def low(low):
        return low.w.sum()

    @program.update("low")
    def rule(params, grads, state, top):
        noise = torch.randn(3, dtype=torch.float64)
        return {"w": params["w"] - noise * top.a * grads["w"]}, {}

    @program.level("top", lower=["low"], hypergrad=method, module={"a": START}, optimizer=FROZEN)
    def top(top, low):
        return low.w.sum()

    if is_heard:

        @program.on("after_backward")
        def listen(grads):
            pass

    runner = Runner(program, seed=0)
    runner.step()
    runner.step()
    moved = program.module("low").w.detach() - START
    assert torch.allclose(program.module("top").a.grad, moved, rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "iterates", "graphs"),
    [
        (Unroll(truncate=2), 2, 0),
        (Unroll(truncate=2, keep_graph=True), 2, 2),
        (Unroll(truncate=5, checkpoint_every=2), 3, 0),
        (UnrollForward(), 1, 0),
    ],
    ids=str,
)
def test_a_loop_taken_for_a_hypergradient_keeps_no_more_than_is_asked_for(
    method, iterates, graphs, monkeypatch
):
    tapes = []

    def noted(level, start: Start, steps, recording):
        found = roll(level, start, steps, recording)
        tapes.append(found[0])
        return found

    monkeypatch.setattr("mlodeco.runtime.loops.roll", noted)
    program = quartic(method, inner_steps=20)
    mlodeco.hypergradient("top", program=program)
    (tape,) = tapes
    assert sum(step.before is not None for step in tape.steps) == iterates
    assert sum(step.graph is not None for step in tape.steps) == graphs


@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tiny", [0.0, 1e-23, 1e-30, 1e-170])
def test_gradients_whose_squares_vanish_are_like_zeros(tiny, dtype, method):
    def found(slope):
        program = Program()
        slopes = torch.tensor([1.0, slope], dtype=dtype)

        @program.level(
            "low",
            module={"w": torch.zeros(2, dtype=dtype)},
            optimizer=partial(torch.optim.Adam, lr=0.01),
            inner_steps=2,
        )
        def low(low, top):
            return (low.w * slopes * top.a.exp()).sum() + 0.5 * low.w[0] ** 2

        @program.level(
            "top", lower=["low"], hypergrad=method, module={"a": torch.zeros(1).to(dtype)}
        )
        def top(top, low):
            return (low.w - 1).square().sum()

        return mlodeco.hypergradient("top", program=program)["a"]

    if tiny < torch.finfo(dtype).tiny ** 0.5:
        assert torch.allclose(found(tiny), found(0.0), rtol=1e-3)
    assert torch.isfinite(found(tiny)).all()


def test_a_norm_sees_every_nan():
    tree = {"a": torch.zeros(2), "b": torch.tensor([0.0, torch.nan]), "c": torch.zeros(1)}
    assert mlodeco.tree.norm(tree) != mlodeco.tree.norm(tree)
    assert mlodeco.tree.norm({**tree, "a": torch.full((1,), 1e-30)}) != 0.0


def test_a_rule_without_a_graph_is_refused():
    program = Program()

    @program.level("low", module={"w": START})
    def low(low):
        return (low.w**2).sum()

    @program.update("low")
    @torch.no_grad()
    def rule(params, grads, state, top):
        return {"w": params["w"] - top.a * grads["w"]}, {}

    @program.level("top", lower=["low"], hypergrad="unroll", module={"a": START}, optimizer=FROZEN)
    def top(top, low):
        return (low.w**2).sum()

    with pytest.raises(OptimizerError, match="without a graph"):
        mlodeco.hypergradient("top", program=program)


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf")])
def test_tuned_options_must_be_numbers_that_an_optimizer_takes(value):
    program = Program()

    @program.level(
        "low", module={"w": START}, optimizer=partial(SGD, lr=0.1), tune={"lr": lambda top: top.lr}
    )
    def low(low):
        return (low.w**2).sum()

    @program.level(
        "top",
        lower=["low"],
        hypergrad="unroll",
        module={"lr": torch.tensor(value)},
        optimizer=FROZEN,
    )
    def top(top, low):
        return (low.w**2).sum()

    with pytest.raises(OptimizerError, match=r"tune=\{'lr': ...\} gave"):
        mlodeco.run(1, program=program, progress="off")


def test_optimizers_without_a_derivative_are_refused_before_the_first_step():
    program = quartic(Unroll(), partial(torch.optim.SparseAdam, lr=0.1))
    with pytest.raises(OptimizerError, match="SparseAdam"):
        Runner(program)
    with pytest.raises(OptimizerError, match="SparseAdam"):
        mlodeco.hypergradient("top", program=program)


def test_a_task_that_changes_before_it_is_judged_is_warned_of():
    program = Program()

    @program.source("task")
    def task():
        while True:
            yield torch.randn(3, dtype=torch.float64)

    @program.level(
        "low", module={"w": START}, init_from="top", optimizer=partial(SGD, lr=0.1), inner_steps=2
    )
    def low(low, task):
        return ((low.w - task) ** 2).sum()

    @program.level("top", lower=["low"], hypergrad="unroll", module={"w": START}, optimizer=FROZEN)
    def top(top, low, task):
        return ((low.w - task) ** 2).sum()

    with pytest.warns(GraphWarning, match='refresh="loop"'):
        program.graph()
