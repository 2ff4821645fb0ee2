"""Update rules, tuned options and levels solved on given batches, against loops written out."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import GraphError, MethodError, MlodecoError, OptimizerError, RunError
from mlodeco.hypergrad import CG, Dense, Identity, Neumann, Sama, Unroll, UnrollForward
from mlodeco.runtime.trainer import Trainer
from tests.problems import network, randn, spd
from tests.reference import jacobian
from tests.test_purity import same
from tests.unrolling import (
    FEATURES,
    Plan,
    Swapped,
    gradients,
    leaves_of,
    minibatch,
    plan,
    relative,
    roll,
    samples,
    values_of,
)
from tests.updates import (
    DATA,
    RULES,
    TOP_BATCH,
    Ruled,
    captured,
    close,
    cut,
    judged,
    momentum,
    numbers,
    parameters,
    plain,
    scalars,
    vector,
)

CLOSE = 1e-9

METHODS = {
    "plain": Unroll(),
    "checkpoints": Unroll(checkpoint_every=3),
    "graphs": Unroll(keep_graph=True),
    "forward": UnrollForward(),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def call(case, way):
    """Takes a step of the lower level, one way or another."""
    if way == "run":
        mlodeco.run(1, program=case.program, progress="off")
    elif way == "solve":
        mlodeco.solve("low", steps=1, program=case.program)
    else:
        case.found(UnrollForward() if way == "forward" else Unroll())


def reading(low, batch, top):
    return plain(low, batch) + 0.2 * (vector(low) ** 2).sum() * top.log_lr.exp()


# update rules


@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_differentiated(name, method, bound):
    case = Ruled(name, clip_norm=bound)
    wanted = case.wanted()
    assert relative(case.found(METHODS[method]), wanted) < CLOSE
    read = "log_lr" if name in ("sgd", "in_place") else next(iter(wanted))
    direct = 2e-2 * values_of(case.hyper)[read]
    assert float((wanted[read] - direct).norm()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_reads_the_level_of_the_rule_too(method):
    case = Ruled("momentum", low=reading)
    assert relative(case.found(METHODS[method]), case.wanted()) < CLOSE


@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("truncate", [1, 3, 9])
@pytest.mark.parametrize("name", ["counted", "learned"])
def test_a_rule_truncated(name, truncate, make):
    case = Ruled(name)
    found = case.found(make(truncate=truncate))
    assert relative(found, case.wanted(truncate=truncate)) < CLOSE


@pytest.mark.parametrize("name", ["momentum", "counted", "learned"])
def test_a_rule_with_constant_gradients(name):
    """What the update itself reads still has its derivative."""
    case = Ruled(name)
    found = case.found(Unroll(first_order=True))
    assert relative(found, case.wanted(first_order=True)) < CLOSE


@pytest.mark.parametrize("bound", [None, 0.7])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_in_a_run(name, method, bound):
    case = Ruled(name, 3, hypergrad=METHODS[method], clip_norm=bound)
    wanted, h, w, _ = case.simulated(3)
    found = captured(case.program, 9)
    assert len(found) == 3
    assert all(relative(one, other) < CLOSE for one, other in zip(found, wanted, strict=True))
    assert close(values_of(case.hyper), h)
    assert close(values_of(case.model), w)


@pytest.mark.parametrize("name", ["momentum", "counted"])
def test_after_a_run_a_rule_goes_on_with_its_state(name):
    case = Ruled(name, 3)
    *_, state = case.simulated(2)
    mlodeco.run(6, program=case.program, progress="off")
    assert relative(case.found(Unroll()), case.wanted(state)) < CLOSE
    assert relative(case.found(Unroll()), case.wanted()) > 1e-6


def test_a_second_run_begins_with_an_empty_state():
    case = Ruled("counted", 3)
    states = []
    rule = case.program.updates["low"].function
    assert rule is RULES["counted"][0]
    for _ in range(2):
        runner = Runner(case.program)
        runner.step()
        states.append(runner.built.levels["low"].rule_state["n"])
    assert states == [1, 1]


def test_of_two_runners_each_goes_on_with_its_own_state():
    case = Ruled("counted", 3)
    one, two = Runner(case.program), Runner(case.program)
    for runner in (one, two, one):
        runner.step()
    assert two.built.levels["low"].rule_state["n"] == 2
    two.step()
    assert two.built.levels["low"].rule_state["n"] == 2


def sama_by_hand(case, state):
    """``-(dg/dh)^T (dU/dg)^T b``, the rule's own reads held."""
    h, w = leaves_of(case.hyper), leaves_of(case.model)
    b = torch.autograd.grad(case.value(h, w), list(w.values()))
    found = torch.autograd.grad(
        case.loss(w, DATA[0], h), list(w.values()), create_graph=True, allow_unused=True
    )
    g = {k: f.detach().requires_grad_() for k, f in zip(w, found, strict=True)}
    after, _ = case.rule(cut(w), g, state, Swapped(case.hyper, cut(h)))
    v = torch.autograd.grad([after[k] for k in w], list(g.values()), list(b))
    indirect = torch.autograd.grad(found, list(h.values()), v, materialize_grads=True)
    direct = torch.autograd.grad(case.value(h, cut(w)), list(h.values()), materialize_grads=True)
    return {k: d + i for k, d, i in zip(h, direct, indirect, strict=True)}


@pytest.mark.parametrize("ticks", [0, 6])
@pytest.mark.parametrize("name", ["momentum", "counted"])
def test_sama_through_a_rule(name, ticks):
    case = Ruled(name, 3, low=reading)
    state = case.simulated(ticks // 3)[-1] if ticks else {}
    if ticks:
        mlodeco.run(ticks, program=case.program, progress="off")
    found = case.found(Sama(), batches={"low": DATA[0], "top": TOP_BATCH})
    assert relative(found, sama_by_hand(case, state)) < CLOSE


def test_sama_in_a_run_sees_the_state_behind_the_last_step():
    """The rule is linear in the gradient, so that the batch does not matter."""
    case, twin = (Ruled("counted", 3, low=reading, hypergrad=Sama()) for _ in range(2))
    _, _, w, state = twin.simulated(1)
    (found,) = captured(case.program, 3)
    with torch.no_grad():
        for k, p in twin.model.named_parameters():
            p.copy_(w[k])
    assert relative(found, sama_by_hand(twin, state)) < CLOSE


def test_a_rule_that_writes_to_its_arguments_changes_nothing_outside():
    case = Ruled("in_place", 3)
    mlodeco.run(4, program=case.program, progress="off")
    level = case.program.built.levels["low"]
    before = copy.deepcopy([parameters(case.model), parameters(case.hyper), cut(level.rule_state)])
    gradient = {k: p.grad.clone() for k, p in case.model.named_parameters()}
    for method in METHODS.values():
        case.found(method)
    mlodeco.solve("low", steps=3, batches={"low": DATA[:3]}, program=case.program)
    after = [parameters(case.model), parameters(case.hyper), cut(level.rule_state)]
    assert same(before[:2], after[:2])
    assert close(before[2], after[2], 0)
    assert close({k: p.grad for k, p in case.model.named_parameters()}, gradient, 0)


def test_a_state_that_is_the_parameters_of_the_level_above_keeps_their_values():
    seen = []

    def rule(params, grads, state, top):
        seen.append(None if "at" not in state else state["at"].clone())
        return {k: p - top.log_lr.exp() * grads[k] for k, p in params.items()}, {"at": top.log_lr}

    case = Ruled(rule=rule, steps=1)
    first = case.hyper.log_lr.item()
    runner = Runner(case.program)
    runner.step()
    assert case.hyper.log_lr.item() != first
    seen.clear()
    runner.step()
    assert float(seen[0]) == first


BAD_RETURNS = {
    "nothing": (lambda params, grads, top: None, "returned NoneType"),
    "parameters alone": (lambda params, grads, top: params, "returned dict"),
    "a tuple of three": (lambda params, grads, top: (params, {}, 0), "returned tuple"),
    "no state": (lambda params, grads, top: (params, None), "(dict, NoneType)"),
    "a list": (lambda params, grads, top: (list(params.values()), {}), "(list, dict)"),
    "a missing key": (lambda params, grads, top: ({"w": params["w"]}, {}), "NoneType for 'b'"),
    "a number": (lambda params, grads, top: ({**params, "b": 1.0}, {}), "float for 'b'"),
    "another shape": (
        lambda params, grads, top: ({**params, "b": params["w"]}, {}),
        "(4,) for 'b', of shape (2,)",
    ),
    "integers": (
        lambda params, grads, top: ({**params, "b": params["b"].long()}, {}),
        "torch.int64 for 'b'",
    ),
    "an unknown key": (
        lambda params, grads, top: ({**params, "c": params["w"]}, {}),
        "returned parameters 'c'",
    ),
}


@pytest.mark.parametrize("way", ["run", "hypergradient", "solve", "forward"])
@pytest.mark.parametrize("kind", BAD_RETURNS)
def test_wrong_returns_of_a_rule(kind, way):
    rule, what = BAD_RETURNS[kind]
    case = Ruled(rule=rule, steps=2)
    before = parameters(case.model)
    with pytest.raises(OptimizerError) as found:
        call(case, way)
    assert what in str(found.value)
    assert found.value.level == "low"
    assert f"test_updates.py:{rule.__code__.co_firstlineno}" in found.value.site
    assert same(before, parameters(case.model))


@pytest.mark.parametrize("way", ["run", "hypergradient"])
def test_a_rule_that_raises_is_named(way):
    def rule(params, grads, top):
        raise KeyError("of mine")

    case = Ruled(rule=rule, steps=2)
    with pytest.raises(KeyError, match="of mine") as found:
        call(case, way)
    notes = " ".join(found.value.__notes__)
    assert "update rule of level 'low'" in notes
    assert f"test_updates.py:{rule.__code__.co_firstlineno}" in notes


def test_a_rule_that_raises_leaves_the_level_before_its_step():
    is_bad = []

    def rule(params, grads, state, top):
        if is_bad:
            raise KeyError("once")
        return momentum(params, grads, state, top)

    case, twin = Ruled(rule=rule, steps=2), Ruled("momentum", 2)
    runner = Runner(case.program, seed=0)
    runner.step()
    before = [parameters(case.model), [p.grad.clone() for p in case.model.parameters()]]
    is_bad.append(True)
    with pytest.raises(KeyError, match="once") as found:
        runner.step()
    assert "tick 2" in " ".join(found.value.__notes__)
    assert same(before, [parameters(case.model), [p.grad for p in case.model.parameters()]])
    is_bad.clear()
    runner.step()
    # the second batch is gone with the step that failed
    h, w = leaves_of(twin.hyper), values_of(twin.model)
    w, _ = twin.rolled(h, w, [DATA[0], DATA[2]])
    assert close(values_of(case.model), w)
    wanted = gradients(twin.value(h, w), h)
    assert close({k: p.grad for k, p in case.hyper.named_parameters()}, wanted)


def test_parameters_in_another_precision_are_taken_in_their_own():
    def rule(params, grads, top):
        return {k: (p - top.log_lr.exp() * grads[k]).float() for k, p in params.items()}, {}

    case = Ruled(rule=rule, steps=3)
    assert case.found(Unroll())["log_lr"].dtype == torch.float64
    solved = mlodeco.solve("low", steps=3, batches={"low": DATA[:3]}, program=case.program)
    mlodeco.run(2, program=case.program, progress="off")
    assert [p.dtype for p in case.model.parameters()] == [torch.float64] * 2
    assert [p.dtype for p in solved.parameters()] == [torch.float64] * 2


def test_paths_of_a_state_are_told_apart():
    def rule(params, grads, state, top):
        one, two = state.get("a", {}).get("b", 0.0), state.get("a/b", 0.0)
        g = grads["b"]
        one, two = 0.5 * one + g, 0.3 * two + g**2
        rate = top.log_lr.exp()
        return {
            "w": params["w"] - rate * grads["w"],
            "b": params["b"] - rate * one - 0.1 * rate * two,
        }, {"a": {"b": one}, "a/b": two}

    case = Ruled(rule=rule)
    assert relative(case.found(Unroll()), case.wanted()) < CLOSE
    assert relative(case.found(UnrollForward()), case.wanted()) < CLOSE


# Reptile


EPS = 0.25


def reptile(ticks):
    program = Program()
    init = {"w": randn(4, seed=1), "b": randn(2, seed=2)}

    @program.level(
        "weights",
        module={k: torch.zeros_like(v) for k, v in init.items()},
        optimizer=partial(SGD, lr=0.05, momentum=0.5),
        init_from="init",
        inner_steps=3,
        data=DATA,
    )
    def weights(low, batch):
        return plain(low, batch)

    @program.level("init", lower=["weights"], module=init, hypergrad=None, data=[TOP_BATCH])
    def start(top, batch, weights):
        return judged(top, batch, weights)

    @program.update("init")
    def move(params, weights):
        ends = dict(weights.named_parameters())
        return {k: p + EPS * (ends[k] - p) for k, p in params.items()}, {}

    mlodeco.run(ticks, program=program, progress="off")
    return values_of(program.module("init")), values_of(program.module("weights"))


def test_reptile_moves_towards_the_end_of_each_loop():
    found, end = reptile(9)
    start = {"w": randn(4, seed=1), "b": randn(2, seed=2)}
    for turn in range(3):
        module = nn.ParameterDict({k: v.clone() for k, v in start.items()})
        optimizer = SGD(module.parameters(), lr=0.05, momentum=0.5)
        for t in range(3):
            optimizer.zero_grad()
            plain(module, DATA[(3 * turn + t) % 7]).backward()
            optimizer.step()
        ended = values_of(module)
        start = {k: p + EPS * (ended[k] - p) for k, p in start.items()}
    assert close(found, start, 1e-12)
    assert close(end, ended, 1e-12)


# tuned options


TUNED = {
    name: torch.tensor(value, dtype=torch.float64)
    for name, value in {"log_lr": -2.5, "log_decay": -2.0, "one": 0.4, "two": 0.6}.items()
}
"""The parameters of the level that tunes."""

LR = {"lr": lambda hyper: hyper.log_lr.exp()}
DECAY = {"weight_decay": lambda hyper: hyper.log_decay.exp()}
MOMENTUM = {"momentum": lambda hyper: hyper.one.sigmoid()}
BETAS = {"betas": lambda hyper: (hyper.one.sigmoid(), hyper.two.sigmoid())}
EPS_ = {"eps": lambda hyper: 1e-2 * hyper.two.exp()}

SGD_M = partial(SGD, lr=0.1, momentum=0.7)
CASES = {
    "sgd_lr": (partial(SGD, lr=1.0), LR),
    "sgd_all": (partial(SGD, lr=1.0, momentum=0.1), LR | DECAY | MOMENTUM),
    "sgd_decay": (partial(SGD_M, weight_decay=1.0), DECAY),
    "sgd_maximize": (partial(SGD, lr=1.0, maximize=True), {"lr": lambda hyper: hyper.one / 90}),
    "sgd_nesterov": (partial(SGD_M, nesterov=True), LR | DECAY),
    "sgd_dampening": (partial(SGD_M, dampening=0.3), LR | MOMENTUM),
    "adam_lr": (partial(Adam, lr=1.0), LR),
    "adam_from_rest": (partial(Adam, lr=0.0, eps=1e-3), LR),
    "adam_betas": (partial(Adam, lr=0.1, eps=1e-3), BETAS),
    "adam_one_beta": (
        partial(Adam, lr=0.1, eps=1e-3),
        {"betas": lambda hyper: [hyper.one.sigmoid(), 0.9]},
    ),
    "adam_all": (partial(Adam, lr=1.0), LR | DECAY | BETAS),
    "adam_amsgrad": (partial(Adam, lr=0.1, amsgrad=True, eps=1e-3), LR | DECAY | BETAS),
    "adam_eps": (partial(Adam, lr=0.1), EPS_),
    "adamw_decay": (partial(AdamW, lr=0.1), DECAY),
    "adamw_all": (partial(AdamW, lr=1.0, eps=1e-3), LR | DECAY | BETAS),
}


def own_batches(count, first=0):
    return [minibatch(first + t) for t in range(count)]


class Tuned:
    """A network with an input that is always zero, trained with learnt options."""

    def __init__(
        self, optimizer, tune, steps=5, *, hypergrad="unroll", rate=0.1, own=None, **options
    ):
        self.optimizer, self.tune, self.steps, self.rate = optimizer, tune, steps, rate
        self.options = options
        self.model = network(FEATURES, 3, 1, seed=1)
        self.top_batch = samples(5, 12)
        self.program = Program()

        def train(model, batch):
            return self.loss(model, batch)

        def top(hyper, batch, low):
            return self.top(hyper, batch, low)

        self.program.level(
            "low",
            module=self.model,
            optimizer=optimizer,
            tune=tune,
            inner_steps=steps,
            data=own_batches(7),
            **options,
        )(train)
        self.program.level(
            "hyper",
            lower=["low"],
            module=TUNED if own is None else own,
            optimizer=partial(SGD, lr=rate),
            hypergrad=hypergrad,
            data=[self.top_batch],
        )(top)
        self.hyper = self.program.module("hyper")

    @staticmethod
    def loss(model, batch):
        _, x, y = batch
        return ((model(x)[:, 0] - y) ** 2).mean()

    @staticmethod
    def top(hyper, batch, low):
        x, y = batch
        return ((low(x)[:, 0] - y) ** 2).mean() + 1e-2 * sum(
            (p**2).sum() for p in hyper.parameters()
        )

    def found(self, method, **options):
        batches = {"low": own_batches(self.steps, 50), "hyper": self.top_batch}
        return mlodeco.hypergradient(
            "hyper",
            **{"program": self.program, "batches": batches, "hypergrad": method, **options},
        )

    def rolled(self, h, start, batches, *, taken=0, **options):
        steps = plan(
            self.model, self.optimizer, taken + len(batches), self.options.get("scheduler")
        )
        tuned = {name: f(Swapped(self.hyper, h)) for name, f in self.tune.items()}
        made = [
            {key: {**group, **tuned} for key, group in groups.items()}
            for groups in steps.after(taken).steps
        ]
        return roll(
            lambda w, batch: self.loss(Swapped(self.model, w), batch),
            start,
            batches,
            Plan(steps.rule, made),
            clip_norm=self.options.get("clip_norm"),
            **options,
        )

    def value(self, h, w):
        return self.top(Swapped(self.hyper, h), self.top_batch, Swapped(self.model, w))

    def wanted(self, **options):
        h = leaves_of(self.hyper)
        w, _ = self.rolled(h, values_of(self.model), own_batches(self.steps, 50), **options)
        return gradients(self.value(h, w), h)

    def simulated(self, turns):
        h, w, states, found, options = values_of(self.hyper), values_of(self.model), {}, [], []
        for turn in range(turns):
            h = {n: p.detach().requires_grad_() for n, p in h.items()}
            view = Swapped(self.hyper, h)
            with torch.no_grad():
                options.append({name: numbers(f(view)) for name, f in self.tune.items()})
            first = turn * self.steps
            batches = [minibatch((first + t) % 7) for t in range(self.steps)]
            w, states = self.rolled(h, cut(w), batches, taken=first, states=states)
            found.append(gradients(self.value(h, w), h))
            h = {n: p - self.rate * found[-1][n] for n, p in h.items()}
        return found, cut(h), cut(w), options


def reaches(case, wanted):
    """Whether every tuned option moves where the loop ends."""
    direct = {n: 2e-2 * p for n, p in values_of(case.hyper).items()}
    moved = [n for n in direct if float((wanted[n] - direct[n]).abs().max()) > 1e-9]
    return len(moved) >= len(case.tune)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_tuned_options_are_differentiated(name, method):
    case = Tuned(*CASES[name])
    found, wanted = case.found(METHODS[method]), case.wanted()
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert reaches(case, wanted)
    assert relative(found, wanted) < 1e-8


@pytest.mark.parametrize("make", [Unroll, UnrollForward])
@pytest.mark.parametrize("name", ["sgd_all", "adam_all"])
def test_tuned_options_with_clipping_and_truncation(name, make):
    case = Tuned(*CASES[name], clip_norm=0.2)
    assert relative(case.found(make(truncate=3)), case.wanted(truncate=3)) < 1e-8


def test_tuned_options_with_constant_gradients():
    case = Tuned(*CASES["adam_all"])
    found = case.found(Unroll(first_order=True))
    assert relative(found, case.wanted(first_order=True)) < 1e-8


def executed_options(case, ticks):
    """What the groups of the optimizer say at each step, and the hypergradients."""
    found = []

    @case.program.on("after_backward", level="low")
    def look(optimizer):
        (group,) = optimizer.param_groups
        found.append({name: group[name] for name in case.tune})

    return found, captured(case.program, ticks, "hyper")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sgd_all", "sgd_nesterov", "adam_all", "adamw_all"])
def test_in_a_run_the_options_are_those_of_the_moment(name, method):
    case = Tuned(*CASES[name], steps=3, hypergrad=METHODS[method])
    wanted, h, w, options = case.simulated(3)
    executed, found = executed_options(case, 9)
    assert len(found) == 3
    assert all(relative(one, other) < 1e-8 for one, other in zip(found, wanted, strict=True))
    assert close(values_of(case.hyper), h, 1e-8)
    assert close(values_of(case.model), w, 1e-8)
    for step, group in enumerate(executed):
        for option, value in options[step // 3].items():
            assert group[option] == pytest.approx(value, rel=1e-10)
            assert isinstance(group[option], float | tuple)
    assert executed[0] != executed[-1]


def test_the_records_of_a_run_have_the_tuned_rate():
    case = Tuned(*CASES["sgd_all"], steps=3)
    *_, options = case.simulated(2)
    result = mlodeco.run(6, program=case.program, progress="off")
    rates = [record.learning_rate for record in result.history.of("low")]
    wanted = [one["lr"] for one in options for _ in range(3)]
    assert rates == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_scheduler_beside_another_tuned_option(method):
    scheduler = partial(StepLR, step_size=2, gamma=0.5)
    case = Tuned(partial(SGD_M, lr=0.3), DECAY | MOMENTUM, scheduler=scheduler)
    assert relative(case.found(METHODS[method]), case.wanted()) < 1e-8
    run = Tuned(
        partial(SGD_M, lr=0.3), DECAY, steps=3, scheduler=scheduler, hypergrad=METHODS[method]
    )
    wanted, _, w, _ = run.simulated(2)
    found = captured(run.program, 6, "hyper")
    assert all(relative(one, other) < 1e-8 for one, other in zip(found, wanted, strict=True))
    assert close(values_of(run.model), w, 1e-8)


def test_a_tuned_option_wins_over_a_scheduler_that_cycles_it():
    scheduler = partial(OneCycleLR, max_lr=0.3, total_steps=40, cycle_momentum=True)
    case = Tuned(SGD_M, MOMENTUM, steps=3, scheduler=scheduler)
    wanted, _, w, _ = case.simulated(2)
    found = captured(case.program, 6, "hyper")
    assert all(relative(one, other) < 1e-8 for one, other in zip(found, wanted, strict=True))
    assert close(values_of(case.model), w, 1e-8)


BAD_VALUES = {
    "a vector": ({"lr": lambda hyper: hyper.one.repeat(2)}, "'lr'", "shape (2,)"),
    "a string": ({"lr": lambda hyper: "fast"}, "'lr'", "'fast'"),
    "nothing": ({"lr": lambda hyper: None}, "'lr'", "None"),
    "a pair": ({"lr": lambda hyper: (hyper.one, hyper.two)}, "'lr'", "tuple of length 2"),
    "a flag": ({"lr": lambda hyper: True}, "'lr'", "True"),
    "an integer": ({"lr": lambda hyper: hyper.one.long()}, "'lr'", "torch.int64"),
    "one beta": ({"betas": lambda hyper: hyper.one.sigmoid()}, "'betas'", "a tensor of shape ()"),
    "three betas": ({"betas": lambda hyper: (hyper.one,) * 3}, "'betas'", "tuple of length 3"),
    "a vector in the pair": (
        {"betas": lambda hyper: (hyper.one, hyper.two.repeat(3))},
        "'betas'",
        "shape (3,)",
    ),
}


@pytest.mark.parametrize("way", ["run", "hypergradient", "solve"])
@pytest.mark.parametrize("kind", BAD_VALUES)
def test_bad_values_of_tuned_options(kind, way):
    tune, option, what = BAD_VALUES[kind]
    case = Tuned(partial(Adam, lr=0.1), tune)
    before = parameters(case.model)
    with pytest.raises(OptimizerError) as found:
        call(case, way)
    assert option in str(found.value)
    assert what in str(found.value)
    assert found.value.level == "low"
    assert "test_updates.py:" in found.value.site
    assert same(before, parameters(case.model))


@pytest.mark.parametrize("way", ["run", "hypergradient"])
def test_a_function_of_tune_that_raises_is_named(way):
    case = Tuned(SGD_M, {"lr": lambda hyper: hyper.rate.exp()})
    with pytest.raises(AttributeError, match="rate") as found:
        call(case, way)
    assert "tune= of level 'low'" in " ".join(found.value.__notes__)


@pytest.mark.parametrize(
    ("optimizer", "tune", "option"),
    [
        (SGD_M, {"weight_decay": lambda hyper: hyper.zero}, "weight_decay"),
        (partial(SGD, lr=0.1), {"momentum": lambda hyper: hyper.zero}, "momentum"),
        (partial(AdamW, lr=0.1), {"weight_decay": lambda hyper: hyper.zero}, "weight_decay"),
        (partial(Adam, lr=0.1), {"lr": lambda hyper: hyper.zero}, "lr"),
    ],
    ids=["decay", "momentum", "adamw_decay", "adam_lr"],
)
@pytest.mark.parametrize("method", [Unroll(), UnrollForward()], ids=str)
def test_options_whose_derivative_torch_loses_at_zero_are_refused(optimizer, tune, option, method):
    case = Tuned(optimizer, tune, own={"zero": torch.tensor(0.0)})
    with pytest.raises(OptimizerError, match=f"'{option}'.* is 0") as found:
        case.found(method)
    assert found.value.level == "low"


def test_a_tuned_rate_of_sgd_may_be_zero():
    case = Tuned(SGD_M, {"lr": lambda hyper: hyper.zero}, own={"zero": torch.tensor(0.0)})
    assert relative(case.found(Unroll()), case.wanted()) < 1e-8


@pytest.mark.parametrize("way", ["run", "hypergradient", "solve"])
def test_other_optimizers_and_options_are_refused(way):
    with pytest.raises(OptimizerError, match="tune= on RMSprop") as found:
        call(Tuned(partial(RMSprop, lr=0.1), LR), way)
    assert found.value.level == "low"
    assert "SGD, Adam or AdamW" in found.value.remedy
    with pytest.raises(OptimizerError, match="'learning_rate'") as found:
        call(Tuned(SGD_M, {"learning_rate": LR["lr"]}), way)
    assert "'lr'" in str(found.value)
    for option in ("nesterov", "dampening"):
        with pytest.raises(OptimizerError, match=f"'{option}'"):
            call(Tuned(SGD_M, {option: LR["lr"]}), way)
    with pytest.raises(OptimizerError, match=r"'momentum' of SGD\(nesterov=True\)"):
        call(Tuned(partial(SGD_M, nesterov=True), MOMENTUM), way)


# methods that see the loss alone


LAM = 0.7
BLIND = [CG(), Neumann(), Identity(), Dense(), Sama(), "darts", "nystrom", "minres", "gmres"]


def started(hypergrad, *, near=0.0, steps=3, rate=0.1, **options):
    """A level on a quadratic that starts from the one above."""
    program = Program()
    declare = partial(
        program.level,
        "weights",
        module={"w": torch.zeros(4)},
        init_from="init",
        inner_steps=steps,
        optimizer=partial(SGD, lr=rate),
        data=[randn(4, seed=7)],
        **options,
    )

    def loss(weights, batch, init=None):
        pulled = near / 2 * ((weights.w - init.w) ** 2).sum() if near else 0.0
        return weights.w @ SPD @ weights.w / 2 - batch @ weights.w + pulled

    if near:
        declare(reads={"init": "init"})(loss)
    else:
        declare()(lambda weights, batch: loss(weights, batch))

    @program.level(
        "init",
        lower=["weights"],
        module={"w": randn(4, seed=8)},
        optimizer=partial(SGD, lr=0.1),
        data=[randn(4, seed=9)],
        hypergrad=hypergrad,
    )
    def start(init, batch, weights):
        return ((weights.w - batch) ** 2).sum() / 2

    return program


SPD = spd(4, 3)


@pytest.mark.parametrize("method", BLIND, ids=str)
@pytest.mark.parametrize("way", ["init_from", "tune", "update"])
def test_methods_that_see_the_loss_alone_are_refused(way, method):
    if way == "init_from":
        program, top, low = started(method), "init", "weights"
    elif way == "tune":
        program, top, low = Tuned(SGD_M, LR, steps=1, hypergrad=method).program, "hyper", "low"
    else:
        program, top, low = Ruled("momentum", 1, hypergrad=method).program, "top", "low"
    for act in (
        lambda: mlodeco.hypergradient(top, program=program),
        lambda: mlodeco.run(3, program=program, progress="off"),
    ):
        with pytest.raises(MethodError, match="through its steps alone") as found:
            act()
        assert found.value.level == low
        assert repr(top) in str(found.value)
        assert "hypergrad='unroll'" in found.value.remedy
        assert "iMAML" in found.value.remedy
        assert ".py:" in found.value.site


def test_a_level_that_another_path_reaches_is_not_refused():
    program = Program()

    def low(low, batch):
        return ((vector(low) - batch) ** 2).sum()

    def other(other, top):
        return ((other.x - top.log_lr) ** 2).sum() / 2

    tune = {"lr": lambda top: top.log_lr.exp()}
    program.level("low", module=vectors(), data=DATA, optimizer=partial(SGD, lr=0.1), tune=tune)(
        low
    )
    program.level("other", module={"x": torch.ones(1)}, optimizer=SGD)(other)

    @program.level(
        "top", lower=["low", "other"], module={"log_lr": torch.tensor(-2.0)}, hypergrad=Dense()
    )
    def top(top, low, other):
        return (vector(low) ** 2).sum() + (other.x**3).sum()

    found = mlodeco.hypergradient("top", program=program)["log_lr"]
    assert float(found) == pytest.approx(3.0)


def vectors():
    return {"w": randn(4, seed=24), "b": randn(2, seed=22)}


@pytest.mark.parametrize("method", [CG(max_steps=20, rtol=1e-13), Dense()], ids=str)
def test_imaml(method):
    """``lam (A + lam I)^-1 (w - target)``, at the end of the loop that was run."""
    program = started(method, near=LAM, steps=4)
    turns, w = [], randn(4, seed=8)

    @program.on("hypergradient", level="init")
    def capture(grads, weights):
        turns.append((grads["w"].clone(), weights.w.detach().clone()))

    mlodeco.run(12, program=program, progress="off")
    start, eye = randn(4, seed=8), torch.eye(4)
    for found, end in turns:
        w = start
        for _ in range(4):
            w = w - 0.1 * (SPD @ w - randn(4, seed=7) + LAM * (w - start))
        assert torch.allclose(end, w, atol=1e-12)
        wanted = LAM * torch.linalg.solve(SPD + LAM * eye, w - randn(4, seed=9))
        assert torch.allclose(found, wanted, atol=1e-10)
        start = start - 0.1 * wanted
    assert len(turns) == 3
    report = mlodeco.check("init", program=program)
    assert report.error < 1e-8


def test_unrolling_a_quadratic_from_its_start():
    program = started(Unroll(), near=LAM, steps=3)
    batches = {"weights": [randn(4, seed=7)] * 3, "init": randn(4, seed=9)}
    found = mlodeco.hypergradient("init", program=program, batches=batches)["w"]
    step = torch.eye(4) - 0.1 * (SPD + LAM * torch.eye(4))
    w = start = randn(4, seed=8)
    slope = torch.eye(4)
    for _ in range(3):
        w = w - 0.1 * (SPD @ w - randn(4, seed=7) + LAM * (w - start))
        slope = step @ slope + 0.1 * LAM * torch.eye(4)
    assert torch.allclose(found, slope.T @ (w - randn(4, seed=9)), atol=1e-12)


def test_check_says_where_there_is_no_reference():
    for program, top, low in (
        (started("unroll"), "init", "weights"),
        (Tuned(SGD_M, LR).program, "hyper", "low"),
        (Ruled("momentum").program, "top", "low"),
    ):
        with pytest.raises(RunError, match="through its steps alone") as found:
            mlodeco.check(top, program=program)
        assert found.value.level == top
        assert repr(low) in str(found.value)


def test_check_of_an_unrolled_edge_compares_it_with_the_solution():
    program = Ruled("sgd", 60, low=reading).program
    report = mlodeco.check("top", program=program, batches={"low": [DATA[0]] * 60})
    (edge,) = report.edges
    assert (edge.method, edge.solve.solution.steps) == ("Unroll()", 60)
    assert report.error < 0.1


# nested best responses


@pytest.mark.parametrize("method", ["unroll", "cg"])
def test_nested_best_responses_take_no_steps(method):
    for program, top, low in (
        (started(method), "init", "weights"),
        (Tuned(SGD_M, LR, hypergrad=method).program, "hyper", "low"),
        (Ruled("momentum", hypergrad=method).program, "top", "low"),
    ):
        with pytest.raises(MethodError, match="nested") as found:
            mlodeco.hypergradient(top, program=program, nested=True)
        assert found.value.level == low
        with pytest.raises(MethodError, match="nested"):
            mlodeco.run(5, program=program, progress="off", nested=True)


def test_nested_best_responses_where_the_loss_reads_the_start():
    program = started(Dense(), near=LAM)
    wanted = mlodeco.hypergradient("init", program=program)
    found = mlodeco.hypergradient("init", program=program, nested=True)
    assert close(found, wanted)


# levels solved on given batches


class Noisy(nn.Module):
    """Normalized, with a layer that is used twice and a tied weight."""

    def __init__(self, seed=1):
        super().__init__()
        net = network(4, 4, 4, seed=seed)
        self.first, self.norm, self.last = net[0], nn.BatchNorm1d(4), net[2]
        self.again = self.first
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.norm(self.again(self.norm(self.first(x).tanh())).tanh()))


def noisy_loss(model, batch):
    return (model(batch) ** 2).mean() + 0.1 * model(batch).sin().mean()


def momentum_alone(params, grads, state):
    kept = {k: 0.5 * state.get(k, torch.zeros_like(g)) + g for k, g in grads.items()}
    return {k: p - 0.1 * kept[k] for k, p in params.items()}, kept


SOLVED = {
    "sgd": {"optimizer": partial(SGD, lr=0.1, momentum=0.9)},
    "adam": {"optimizer": partial(Adam, lr=0.1)},
    "scheduler": {
        "optimizer": partial(AdamW, lr=0.1),
        "scheduler": partial(StepLR, step_size=2, gamma=0.3),
    },
    "clip": {"optimizer": partial(SGD, lr=0.1), "clip_norm": 0.05},
    "accumulate": {"optimizer": partial(Adam, lr=0.1), "accumulate": 2},
    "rule": {"clip_norm": 0.05},
    "tune": {
        "optimizer": partial(SGD, lr=1.0),
        "tune": {"lr": lambda init: init.first.bias[0] ** 2},
    },
    "tune_adam": {
        "optimizer": partial(Adam, lr=1.0),
        "tune": {"betas": lambda init: (init.first.bias[0] ** 2, init.first.bias[1].sigmoid())},
    },
}


def norms(seed):
    module = Noisy(seed)
    with torch.no_grad():
        module.norm.running_mean.copy_(randn(4, seed=seed))
        module.norm.running_var.copy_(randn(4, seed=seed).exp())
    return module


def solved_case(kind, init_from, steps=4):
    program = Program()
    options = SOLVED[kind]
    data = [randn(5, 4, seed=60 + t) for t in range(3)]

    def low(model, batch):
        return noisy_loss(model, batch)

    program.level(
        "low", module=norms(1), data=data, inner_steps=steps, init_from=init_from, **options
    )(low)
    if kind == "rule":
        program.update("low")(momentum_alone)

    is_learnt = init_from or "tune" in options

    @program.level(
        "init",
        lower=["low"],
        module=norms(2),
        optimizer=partial(SGD, lr=0.0),
        hypergrad="unroll" if is_learnt else None,
        data=data,
    )
    def init(init, batch, low):
        return noisy_loss(low, batch) + sum((p**2).sum() for p in init.parameters())

    size = options.get("accumulate", 1)
    stream = [data[t % 3] for t in range(size * steps)]
    batches = stream if size == 1 else [stream[t : t + size] for t in range(0, len(stream), size)]
    return program, batches


def everything(program):
    levels = [program.built.levels[name] for name in program.levels] if program.built else []
    modules = [program.module(name) for name in program.levels]
    return copy.deepcopy(
        [
            [t.clone() for m in modules for t in m.state_dict().values()],
            [None if p.grad is None else p.grad.clone() for m in modules for p in m.parameters()],
            [c.training for m in modules for c in m.modules()],
            torch.get_rng_state(),
            [
                [flat for state in level.optimizer.state.values() for flat in state.values()]
                for level in levels
                if level.optimizer is not None
            ],
        ]
    )


@pytest.mark.parametrize("init_from", [None, "init"])
@pytest.mark.parametrize("kind", SOLVED)
def test_solving_equals_the_steps_of_a_run(kind, init_from):
    program, batches = solved_case(kind, init_from)
    program.module("low")
    before = everything(program)
    solved = mlodeco.solve("low", steps=4, batches={"low": batches}, program=program)
    assert same(before, everything(program))
    mlodeco.run(4, program=program, progress="off")
    wanted = program.module("low")
    assert set(solved.state_dict()) == set(wanted.state_dict())
    for name, value in wanted.state_dict().items():
        assert torch.equal(solved.state_dict()[name], value), name
    assert solved is not wanted
    assert solved.again is solved.first
    assert solved.last.weight is solved.first.weight
    assert solved.training
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in solved.parameters())


@pytest.mark.parametrize("kind", ["sgd", "adam", "clip", "scheduler"])
def test_solving_equals_the_loop_written_out(kind):
    program, batches = solved_case(kind, "init")
    solved = mlodeco.solve("low", steps=4, batches={"low": batches}, program=program)
    options, module = SOLVED[kind], norms(2)
    optimizer = options["optimizer"](module.parameters())
    scheduler = options["scheduler"](optimizer) if "scheduler" in options else None
    for batch in batches:
        optimizer.zero_grad()
        noisy_loss(module, batch).backward()
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(module.parameters(), options["clip_norm"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    for name, value in module.state_dict().items():
        assert torch.allclose(solved.state_dict()[name], value, rtol=1e-12, atol=1e-14), name


def test_solving_in_evaluation_mode_leaves_the_statistics():
    program, batches = solved_case("sgd", None)
    program.module("low").eval()
    solved = mlodeco.solve("low", steps=4, batches={"low": batches}, program=program)
    assert not any(child.training for child in solved.modules())
    assert torch.equal(solved.norm.running_mean, norms(1).norm.running_mean)
    assert not torch.equal(solved.first.weight, norms(1).first.weight)


def test_solving_after_a_run_goes_on_from_its_state():
    program, _ = solved_case("adam", None)
    runner = Runner(program)
    for _ in range(4):
        runner.step()
    # the stream of the run goes on with the second of three batches
    data = [randn(5, 4, seed=60 + t) for t in range(3)]
    before = everything(program)
    found = mlodeco.solve("low", steps=2, batches={"low": [data[1], data[2]]}, program=program)
    assert same(before, everything(program))
    assert all(p.grad is None for p in found.parameters())
    for _ in range(2):
        runner.step()
    for name, value in program.module("low").state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def task_program(refresh="loop"):
    program = Program()
    items = [(randn(5, 4, seed=70 + t), randn(5, 4, seed=80 + t)) for t in range(3)]

    @program.source("task", refresh=refresh)
    def tasks():
        yield from items

    @program.level(
        "low",
        module=partial(network, 4, 4, seed=1),
        init_from="init",
        inner_steps=3,
        optimizer=partial(SGD, lr=0.1),
    )
    def low(model, task):
        return (model(task[0]) ** 2).mean()

    @program.level(
        "init",
        lower=["low"],
        module=partial(network, 4, 4, seed=2),
        optimizer=partial(SGD, lr=0.1),
        hypergrad="unroll",
    )
    def init(init, task, low):
        return (low(task[1]) ** 2).mean()

    return program, items


def test_one_item_of_a_source_serves_all_steps():
    program, items = task_program()
    found = mlodeco.solve("low", steps=5, batches={"task": items[1]}, program=program)
    module = network(4, 4, seed=2)
    optimizer = SGD(module.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        (module(items[1][0]) ** 2).mean().backward()
        optimizer.step()
    assert close(values_of(found), values_of(module), 1e-12)
    # the first item of a fresh iterator, where none is given
    missing = mlodeco.solve("low", steps=3, program=program)
    first = mlodeco.solve("low", steps=3, batches={"task": items[0]}, program=program)
    assert close(values_of(missing), values_of(first), 0)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_nothing_is_changed_by_a_loss_that_raises_while_solving(at):
    calls = []
    _, batches = solved_case("adam", None)
    program = Program()

    @program.level("low", module=norms(1), data=batches, optimizer=partial(Adam, lr=0.1))
    def low(model, batch):
        calls.append(1)
        if len(calls) == at:
            raise ZeroDivisionError("of the loss")
        return noisy_loss(model, batch)

    calls += [1] * 10
    mlodeco.run(2, program=program, progress="off")
    before = everything(program)
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        mlodeco.solve("low", steps=4, batches={"low": batches}, program=program)
    assert same(before, everything(program))
    calls += [1] * 10
    mlodeco.solve("low", steps=4, batches={"low": batches}, program=program)
    assert same(before, everything(program))


@pytest.mark.parametrize("steps", [0, -1, 1.5, "three", None, True])
def test_steps_of_solving_are_checked(steps):
    program, _ = solved_case("sgd", None)
    with pytest.raises(RunError, match="steps="):
        mlodeco.solve("low", steps=steps, program=program)


def test_batches_of_solving_are_checked():
    program, batches = solved_case("sgd", None)
    for given in (batches[0], batches[:3], tuple(batches), None):
        with pytest.raises(RunError, match="batches") as found:
            mlodeco.solve("low", steps=4, batches={"low": given}, program=program)
        assert found.value.level == "low"
    with pytest.raises(RunError, match="'lowest'"):
        mlodeco.solve("low", steps=4, batches={"lowest": batches}, program=program)
    with pytest.raises(MlodecoError, match="there is no level"):
        mlodeco.solve("lowest", steps=4, batches={"low": batches}, program=program)
    double, pairs = solved_case("accumulate", None)
    with pytest.raises(RunError, match="accumulate=2"):
        mlodeco.solve("low", steps=4, batches={"low": [p[0] for p in pairs]}, program=double)


def test_solving_needs_an_optimizer_or_a_rule():
    program = Program()
    program.level("low", module={"w": torch.ones(2)})(lambda low: (low.w**2).sum())
    with pytest.raises(OptimizerError, match="no optimizer") as found:
        mlodeco.solve("low", steps=1, program=program)
    assert found.value.level == "low"


# runs


class Pulled:
    """A vector pulled towards batches and the levels above, by SGD with momentum."""

    RATE, BETA, TOP_RATE = 0.1, 0.6, 0.2

    def __init__(self, uppers, steps=2, **options):
        self.steps = steps
        self.data = [randn(3, seed=200 + t) for t in range(5)]
        self.program = Program()
        names = list(uppers)
        self.program.level(
            "low",
            module={"x": randn(3, seed=1)},
            optimizer=partial(SGD, lr=self.RATE, momentum=self.BETA),
            data=self.data,
            inner_steps=steps,
            reads=names,
            **options,
        )(self._low(names))
        for number, (name, given) in enumerate(uppers.items()):
            self.program.level(
                name,
                lower=["low", *given.get("lower", ())],
                module={"h": randn(3, seed=5 + number)},
                optimizer=partial(SGD, lr=self.TOP_RATE),
                **{"hypergrad": "unroll", **{k: v for k, v in given.items() if k != "lower"}},
            )(self._top(name))
        self.found = {name: [] for name in uppers}
        for name in uppers:
            self.program.on("hypergradient", level=name)(
                lambda grads, name=name: self.found[name].append(grads["h"].clone())
            )

    def _low(self, names):
        modules = [self.program.module] * len(names)

        def low(low, batch):
            uppers = [module(name).h for module, name in zip(modules, names, strict=True)]
            return self.loss(low.x, batch, *uppers)

        return low

    def _top(self, name):
        def top(own, low):
            return self.value(own.h, low.x)

        return top

    @staticmethod
    def loss(x, batch, *hs):
        value = ((x - batch) ** 2).sum() / 2 + 0.1 * (x**4).sum()
        return value + sum(((x * h).sin() * (n + 1)).sum() for n, h in enumerate(hs))

    @staticmethod
    def value(h, x):
        return ((x - 1.0) ** 2).sum() + 0.05 * (h**2).sum()

    def roll(self, state, batches, *hs):
        """``(x, buffer)`` after a step on each batch."""
        x, buffer = state
        for batch in batches:
            x = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(self.loss(x, batch, *hs), x, create_graph=True)
            buffer = g if buffer is None else self.BETA * buffer + g
            x = x - self.RATE * buffer
        return x, buffer

    def batches(self, first, count):
        return [self.data[t % 5] for t in range(first, first + count)]

    def start(self):
        return randn(3, seed=1), None

    def solved(self, number, x, batch, hs):
        """The hypergradient of one upper level by a linear solve."""
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(x, batch, *hs), x, create_graph=True)
        v = torch.linalg.solve(jacobian(slope, [x]), 2 * (x.detach() - 1.0))
        (cross,) = torch.autograd.grad(slope, hs[number], v)
        return 0.1 * hs[number].detach() - cross

    def total(self, h, x):
        return torch.autograd.grad(self.value(h, x), h)[0]


def held(state):
    return tuple(part if part is None else part.detach() for part in state)


def run(program, ticks, **options):
    return mlodeco.run(ticks, program=program, progress="off", **options)


UNROLLS = [Unroll(), Unroll(checkpoint_every=3), Unroll(keep_graph=True)]


@pytest.mark.parametrize("method", [*UNROLLS, UnrollForward()], ids=str)
def test_a_run_that_goes_back_after_each_turn(method):
    """Each loop starts with the last step of the one before, repeated from where that started."""
    case = Pulled({"top": {"hypergrad": method}}, steps=3, rollback=True)
    run(case.program, 9)
    state, h = case.start(), randn(3, seed=5)
    for turn, found in enumerate(case.found["top"]):
        h = h.detach().requires_grad_()
        batches = case.batches(3 * turn, 3)
        end = case.roll(state, batches, h)
        wanted = case.total(h, end[0])
        assert torch.allclose(found, wanted, rtol=1e-10)
        h = h - case.TOP_RATE * wanted
        state = held(case.roll(state, batches[-1:], h))
    assert turn == 2
    assert torch.allclose(case.program.module("low").x, state[0], rtol=1e-10)


def test_a_rule_and_its_state_go_back():
    case = Ruled("counted", 3, rollback=True)
    found = captured(case.program, 6)
    h, w, state = scalars(), case.first, {}
    for turn, one in enumerate(found):
        h = {k: p.detach().requires_grad_() for k, p in h.items()}
        batches = [DATA[t % 7] for t in range(3 * turn, 3 * turn + 3)]
        end, _ = case.rolled(h, cut(w), batches, cut(state))
        wanted = gradients(case.value(h, end), h)
        assert relative(one, wanted) < 1e-6
        h = {k: p - 1e-3 * wanted[k] for k, p in h.items()}
        w, state = map(cut, case.rolled(h, cut(w), batches[-1:], cut(state)))
        assert state["n"] == turn + 1
    level = case.program.built.levels["low"]
    assert level.rule_state["n"] == 2
    assert close(values_of(case.model), w, 1e-6)


@pytest.mark.parametrize("method", [*UNROLLS, UnrollForward()], ids=str)
def test_two_steps_of_the_upper_level_on_one_tape(method):
    case = Pulled({"top": {"hypergrad": method, "repeat": 2}}, steps=3)
    run(case.program, 6)
    state, h = case.start(), randn(3, seed=5)
    for turn in range(2):
        at = h.detach().requires_grad_()
        end = case.roll(state, case.batches(3 * turn, 3), at)
        (through,) = torch.autograd.grad(
            (end[0].detach() - 1.0).mul(2) @ end[0], at, retain_graph=True
        )
        for step in range(2):
            wanted = through + 0.1 * h.detach()
            assert torch.allclose(case.found["top"][2 * turn + step], wanted, rtol=1e-10)
            h = h - case.TOP_RATE * wanted
        state = held(end)
    assert len(case.found["top"]) == 4


MIXED = [
    (Unroll(truncate=1), Unroll()),
    (Unroll(keep_graph=True), Unroll(checkpoint_every=3)),
    (Unroll(truncate=2), UnrollForward()),
    (Dense(), Unroll(checkpoint_every=2)),
]


@pytest.mark.parametrize(("one", "two"), MIXED, ids=str)
def test_two_upper_levels_with_their_own_methods(one, two):
    case = Pulled({"one": {"hypergrad": one}, "two": {"hypergrad": two}}, steps=4)
    run(case.program, 8)
    state, hs = case.start(), [randn(3, seed=5), randn(3, seed=6)]
    for turn in range(2):
        hs = [h.detach().requires_grad_() for h in hs]
        batches = case.batches(4 * turn, 4)
        end = case.roll(state, batches, *hs)
        for n, (name, method) in enumerate((("one", one), ("two", two))):
            found = case.found[name][turn]
            cut_at = getattr(method, "truncate", None)
            if isinstance(method, Dense):
                wanted = case.solved(n, end[0], batches[-1], hs)
            elif cut_at is not None:
                middle = held(case.roll(state, batches[:-cut_at], *hs))
                x, _ = case.roll(middle, batches[-cut_at:], *hs)
                wanted = case.total(hs[n], x)
            else:
                wanted = torch.autograd.grad(case.value(hs[n], end[0]), hs[n], retain_graph=True)[0]
            assert torch.allclose(found, wanted, rtol=1e-9), (name, turn)
        hs = [h - case.TOP_RATE * case.found[n][turn] for h, n in zip(hs, case.found, strict=True)]
        state = held(end)


def ragged(method, **options):
    """Of two upper levels one waits for a slow level too, and so for two loops of the other."""
    case = Pulled(
        {"often": {"hypergrad": method}, "seldom": {"hypergrad": method, "lower": ["slow"]}},
        **options,
    )

    @case.program.level(
        "slow", module={"x": torch.zeros(1)}, optimizer=partial(SGD, lr=0.1), inner_steps=4
    )
    def slow(slow):
        return (slow.x**2).sum()

    return case


@pytest.mark.parametrize("method", [*UNROLLS, UnrollForward()], ids=str)
def test_a_level_above_that_waits_goes_back_over_more_steps(method):
    case = ragged(method)
    run(case.program, 8)
    assert [len(found) for found in case.found.values()] == [4, 2]
    state, (a, b) = case.start(), [randn(3, seed=5), randn(3, seed=6)]
    for turn in range(2):
        b = b.detach().requires_grad_()
        for half in range(2):
            a = a.detach().requires_grad_()
            begin = held(state)
            batches = case.batches(4 * turn + 2 * half, 2)
            end = case.roll(begin, batches, a, b.detach())
            wanted = case.total(a, end[0])
            assert torch.allclose(case.found["often"][2 * turn + half], wanted, rtol=1e-10)
            # the other level sees all four steps, with what was above them at the time
            state = case.roll(state, batches, a.detach(), b)
            a = a - case.TOP_RATE * wanted
        wanted = case.total(b, state[0])
        assert torch.allclose(case.found["seldom"][turn], wanted, rtol=1e-10)
        b = b - case.TOP_RATE * wanted
        state = held(state)


@pytest.mark.parametrize("method", [*UNROLLS, UnrollForward()], ids=str)
def test_the_steps_before_the_level_went_back_are_cut_off(method):
    """A level above that waits goes back to there, as the steps before have been undone."""
    case = ragged(method, rollback=True)
    run(case.program, 4)
    state, a, b = case.start(), randn(3, seed=5), randn(3, seed=6)
    a = a.requires_grad_()
    first = case.batches(0, 2)
    end = case.roll(state, first, a, b)
    a = (a - case.TOP_RATE * case.total(a, end[0])).detach()
    state = held(case.roll(state, first[-1:], a, b))
    b = b.requires_grad_()
    end = case.roll(state, case.batches(2, 2), a, b)
    assert torch.allclose(case.found["seldom"][0], case.total(b, end[0]), rtol=1e-10)


def test_a_rule_with_a_warm_up():
    case = Ruled("momentum", 3, warmup=2)
    found = captured(case.program, 5)
    h = scalars()
    w, state = map(cut, case.rolled(h, case.first, DATA[:2]))
    h = {k: p.requires_grad_() for k, p in h.items()}
    end, _ = case.rolled(h, w, DATA[2:5], state)
    assert len(found) == 1
    assert relative(found[0], gradients(case.value(h, end), h)) < 1e-6


@pytest.mark.parametrize("method", UNROLLS, ids=str)
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_run_goes_on_after_an_error_in_the_middle_of_a_loop(at, method):
    case = Pulled({"top": {"hypergrad": method}}, steps=3)
    runner = Runner(case.program, seed=0)
    runner.step()  # after the first look at the loss
    is_bad = []

    @case.program.on("after_backward", level="low")
    def fail(ctx):
        if is_bad:
            raise ZeroDivisionError("once")

    case.program.module("low")
    runner = Runner(case.program, seed=0)
    for _ in range(at - 1):
        runner.step()
    is_bad.append(True)
    with pytest.raises(ZeroDivisionError):
        runner.step()
    is_bad.clear()
    for _ in range(7 - at):
        runner.step()
    # the batch of the step that failed is gone
    stream = [case.data[t % 5] for t in range(8)]
    del stream[at - 1]
    x = case.roll(case.start(), case.data[:1], randn(3, seed=5))[0]
    state, h = (x.detach(), None), randn(3, seed=5)
    for turn, found in enumerate(case.found["top"]):
        h = h.detach().requires_grad_()
        end = case.roll(state, stream[3 * turn : 3 * turn + 3], h)
        wanted = case.total(h, end[0])
        assert torch.allclose(found, wanted, rtol=1e-10)
        h, state = h - case.TOP_RATE * wanted, held(end)
    assert turn == 1


def test_a_second_run_goes_on_with_fresh_momentum():
    case = Pulled({"top": {}}, steps=2)
    run(case.program, 3)
    x, h = (case.program.module(n) for n in ("low", "top"))
    state, h = (x.x.detach().clone(), None), h.h.detach().clone().requires_grad_()
    run(case.program, 2)
    end = case.roll(state, case.batches(0, 2), h)
    assert len(case.found["top"]) == 2
    assert torch.allclose(case.found["top"][1], case.total(h, end[0]), rtol=1e-10)


@pytest.mark.parametrize("method", [*UNROLLS, UnrollForward()], ids=str)
def test_a_hook_that_changes_the_gradient(method):
    """The gradient that was used is taken, and its change as a constant."""
    case = Pulled({"top": {"hypergrad": method}}, steps=3)

    @case.program.on("after_backward", level="low")
    def shorten(grads):
        grads["x"].clamp_(-0.8, 0.8).add_(0.1)

    run(case.program, 3)
    x, buffer = case.start()
    h = randn(3, seed=5).requires_grad_()
    for batch in case.batches(0, 3):
        x = x if x.requires_grad else x.requires_grad_()
        (g,) = torch.autograd.grad(case.loss(x, batch, h), x, create_graph=True)
        g = g + (g.clamp(-0.8, 0.8) + 0.1 - g).detach()
        buffer = g if buffer is None else case.BETA * buffer + g
        x = x - case.RATE * buffer
    assert torch.allclose(case.found["top"][0], case.total(h, x), rtol=1e-10)
    assert torch.allclose(case.program.module("low").x, x, rtol=1e-10)


@pytest.mark.parametrize(
    ("method", "name", "steps"),
    [
        (Unroll(), "Unroll", 3),
        (Unroll(truncate=2), "Unroll", 2),
        (UnrollForward(), "UnrollForward", 3),
    ],
    ids=str,
)
def test_the_records_of_unrolled_solves(method, name, steps):
    result = run(Pulled({"top": {"hypergrad": method}}, steps=3).program, 6)
    for record in result.history.of("top"):
        (solve,) = record.solves
        assert (solve.level, solve.method, solve.steps) == ("low", name, steps)
        assert solve.residual is None
        assert solve.status == "differentiated step by step"
    assert [row["solver_steps"] for row in result.history.rows() if row["level"] == "top"] == [
        steps
    ] * 2


def test_the_graph_shows_what_acts_through_steps():
    for program, top, low in (
        (started("unroll"), "init", "weights"),
        (Tuned(SGD_M, LR).program, "hyper", "low"),
        (Ruled("momentum").program, "top", "low"),
    ):
        text = str(program.graph())
        assert text.count("Unroll") >= 1
        edges = {(e.source, e.target, e.kind.value) for e in program.graph().edges}
        assert edges == {(low, top, "lower-to-upper"), (top, low, "upper-to-lower")}
        assert program.graph().paths(top) == ((top, low, top),)
        for drawing in (text, program.graph().to_mermaid(), program.graph().to_dot()):
            assert top in drawing
            assert low in drawing


# memory


class Saved:
    """Counts what autograd keeps for backward passes."""

    def __init__(self):
        self.now = self.most = 0

    def pack(self, tensor):
        self.now += tensor.numel()
        self.most = max(self.most, self.now)
        return Kept(self, tensor)

    @staticmethod
    def unpack(kept):
        return kept.tensor

    @property
    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)


class Kept:
    def __init__(self, count, tensor):
        # a tensor with its graph would be held by that graph in turn
        self.count, self.tensor = count, tensor.detach()

    def __del__(self):
        self.count.now -= self.tensor.numel()


def most_kept(make, steps, method):
    case = make(steps)
    case.found(method)
    saved = Saved()
    with saved.hooks:
        case.found(method)
    gc.collect()
    assert saved.now == 0
    return saved.most


MAKES = {
    "rule": lambda steps: Ruled("counted", steps, low=reading),
    "tune": lambda steps: Tuned(*CASES["adam_all"], steps=steps),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKES)
def test_no_graph_is_kept_from_step_to_step(make):
    """But where it is asked for; parameters and states are no part of a graph."""
    few, many = (most_kept(MAKES[make], steps, Unroll()) for steps in (3, 9))
    assert many == few
    few, many = (most_kept(MAKES[make], steps, UnrollForward()) for steps in (2, 6))
    assert many == few
    few, many = (most_kept(MAKES[make], steps, Unroll(keep_graph=True)) for steps in (3, 9))
    assert many > 2 * few


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (Unroll(), 16),
        (Unroll(checkpoint_every=4), 4),
        (Unroll(checkpoint_every=16), 1),
        (Unroll(truncate=3), 3),
        (UnrollForward(), 1),
    ],
    ids=str,
)
def test_a_run_keeps_the_iterates_that_were_asked_for(method, kept, monkeypatch):
    made, alive, iterate = [], [], Trainer.iterate

    def noted(trainer):
        found = iterate(trainer)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Trainer, "iterate", noted)
    case = Ruled("sgd", 16, hypergrad=method)

    @case.program.on("before_step", level="top")
    def count():
        gc.collect()
        alive.append(sum(one() is not None for one in made))

    run(case.program, 48)
    assert alive == [kept] * 3


def test_a_rule_that_reads_different_numbers_of_replicas_is_refused():
    program = Program()
    program.level("la", module={"w": torch.ones(1)}, replicas=2)(lambda la: la.w.sum())
    program.level("lb", module={"w": torch.ones(1)}, replicas=4)(lambda lb: lb.w.sum())
    program.level("up", lower=["la", "lb"], module={"w": torch.ones(1)})(lambda up: up.w.sum())

    @program.update("up")
    def rule(params, la, lb):
        return {"w": la.w.detach() + lb.w.detach()}, {}

    with pytest.raises(GraphError, match="the update rule sees different numbers") as found:
        Runner(program)
    assert found.value.level == "up"
    assert "test_updates.py" in str(found.value)
    assert "{'la': 2, 'lb': 4}" in str(found.value)
