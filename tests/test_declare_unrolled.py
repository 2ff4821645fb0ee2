"""Declarations of init_from, replicas, tune and update rules, and what a build makes of them."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import mlodeco
from mlodeco import Program, Replicas
from mlodeco.declare.registry import LEVEL_OPTIONS
from mlodeco.errors import (
    BindingError,
    DeclarationError,
    GraphError,
    MethodError,
    MlodecoError,
    ModuleError,
    RedeclarationWarning,
)
from mlodeco.graph import Edge, EdgeKind
from mlodeco.runtime.build import Build, build

UP = EdgeKind.LOWER_TO_UPPER
DOWN = EdgeKind.UPPER_TO_LOWER
SIDE = EdgeKind.SIDEWAYS
ORDER = EdgeKind.ORDERING

sgd = functools.partial(SGD, lr=0.1)


def vector() -> dict[str, Tensor]:
    return {"x": torch.tensor([1.0, 2.0])}


def square(own: Any) -> Tensor:
    return (own.x**2).sum()


def rule(params, grads, state):
    return {key: params[key] - 0.1 * grads[key] for key in params}, state


class Net(nn.Module):
    """A body and a head, the head with a buffer."""

    def __init__(self, width: int = 2, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.body = nn.Linear(2, width, dtype=dtype)
        self.head = nn.Linear(width, 1, dtype=dtype)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) * self.scale)


def fit(net: Any) -> Tensor:
    return (net(torch.ones(3, 2)) ** 2).mean()


def maml(
    program: Program, *, module: Any = Net, start: Any = Net, top: Any = None, **options: Any
) -> None:
    """``weights`` starts from ``init``, which learns from it."""

    @program.level("weights", **{"module": module, "init_from": "init", **options})
    def inner(weights):
        return fit(weights)

    @program.level("init", lower=["weights"], module=start, **(top or {}))
    def outer(init, weights):
        return fit(weights)


def tuned(program: Program, function: Callable[..., Any], **options: Any) -> None:
    """The learning rate of ``weights`` comes from ``hyper``; ``other`` stands beside both."""
    chosen = {"module": vector, "optimizer": sgd, "tune": {"lr": function}, **options}
    program.level("weights", **chosen)(square)
    program.level("other", module=vector)(square)
    program.level("hyper", lower=["weights"], module=vector)(
        lambda own, weights: square(weights) + 0 * square(own)
    )


def built(program: Program) -> Build:
    return build(program)


def edges(program: Program) -> set[tuple[str, str, EdgeKind]]:
    return {(e.source, e.target, e.kind) for e in program.graph().edges}


def message(kind: type[MlodecoError], declare: Callable[[], Any]) -> str:
    """The whole text of an error, which names a place in this file and a remedy."""
    with pytest.raises(kind) as caught:
        declare()
    assert type(caught.value) is kind
    assert "test_declare_unrolled.py:" in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestOptions:
    def test_are_known_by_name_and_documented(self):
        assert LEVEL_OPTIONS[-3:] == ("init_from", "replicas", "tune")
        shown = inspect.signature(mlodeco.level).parameters
        for option in LEVEL_OPTIONS[-3:]:
            assert shown[option].default is None
            assert f"{option}:" in Program.level.__doc__

    def test_are_empty_where_not_given(self, program):
        program.level("low", module=vector)(square)
        declaration = program.levels["low"]
        assert declaration.init_from is None
        assert declaration.replicas is None
        assert declaration.tune == {}
        level = built(program).levels["low"]
        assert level.init_from is None
        assert level.update is None
        assert level.tune_reads == level.update_reads == level.step_reads == ()

    def test_that_fail_leave_no_trace(self, program):
        for option in ({"init_from": 3}, {"replicas": 0}, {"tune": 3}):
            with pytest.raises(DeclarationError):
                program.level("low", module=vector, **option)(square)
        for decorate in (program.update(""), program.update("low")):
            with pytest.raises(DeclarationError):
                decorate(lambda state: state)
        assert program.levels == program.updates == {}
        assert program.version == 0


class TestInitFrom:
    def test_is_recorded_before_the_level_is_known(self, program):
        maml(program)
        assert program.levels["weights"].init_from == "init"
        assert built(program).levels["weights"].init_from == "init"

    @pytest.mark.parametrize("wrong", ["", " ", 3, ["init"], Net])
    def test_is_a_name(self, program, wrong):
        text = message(DeclarationError, lambda: maml(program, init_from=wrong))
        assert f"init_from={wrong!r}." in text
        assert "Expected: the name of a level above." in text
        assert "init_from='init'" in text

    def test_is_not_the_level_itself(self, program):
        text = message(DeclarationError, lambda: maml(program, init_from="weights"))
        assert "init_from='weights' names the level itself." in text

    def test_does_not_stand_beside_rollback(self, program):
        text = message(DeclarationError, lambda: maml(program, rollback=True))
        assert "init_from='init' and rollback=True." in text
        assert "the next loop starts from 'init' anyway" in text
        assert "Remedy: leave rollback out." in text

    def test_does_not_stand_beside_warmup(self, program):
        text = message(DeclarationError, lambda: maml(program, warmup=3))
        assert "init_from='init' and warmup=3." in text
        assert "every inner loop starts from 'init'" in text
        maml(program, warmup=0, rollback=False)

    def test_names_a_known_level(self, program):
        maml(program, init_from="innit")
        text = message(GraphError, program.graph)
        assert "init_from='innit' names no known level." in text
        assert "Expected: a level above, one of 'init'." in text
        assert "Did you mean 'init'?" in text

    def test_names_a_level_above(self, program):
        maml(program, init_from="beside")
        program.level("beside", module=Net)(fit)
        text = message(GraphError, program.graph)
        assert "init_from='beside' names a level that is not above it." in text
        assert "Expected: one of 'init'." in text
        assert "Remedy: add 'weights' to lower= of 'beside'." in text

    def test_says_so_where_nothing_is_above(self, program):
        program.level("weights", module=Net, init_from="beside")(fit)
        program.level("beside", module=Net)(fit)
        text = message(GraphError, program.graph)
        assert "Expected: a level above, which steps between two inner loops." in text

    def test_may_name_a_level_above_others(self, program):
        program.level("low", module=Net, init_from="top")(fit)
        program.level("mid", lower=["low"], module=Net)(lambda mid, low: fit(low) + fit(mid))
        program.level("top", lower=["mid"], module=Net)(lambda top, mid: fit(mid))
        assert ("top", "low", DOWN) in edges(program)
        assert ("top", "low", "mid", "top") in program.graph().paths("top")

    def test_is_an_edge_without_a_read(self, program):
        maml(program)
        assert edges(program) == {("weights", "init", UP), ("init", "weights", DOWN)}
        assert program.graph().paths("init") == (("init", "weights", "init"),)
        level = built(program).levels["weights"]
        assert level.loss.sees == ("weights",)
        assert level.step_reads == ("init",)

    def test_is_left_out_of_what_the_loss_has_to_depend_on(self, program):
        maml(program)
        assert built(program).reads_on_paths("weights") == ()
        assert built(program).reads_on_paths("init") == ("weights",)

    def test_that_the_loss_reads_too_stays_among_these(self, program):
        # proximal inner problem, as in iMAML
        @program.level("weights", module=vector, init_from="init")
        def inner(weights, init):
            return ((weights.x - init.x) ** 2).sum()

        @program.level("init", lower=["weights"], module=vector)
        def outer(init, weights):
            return square(weights)

        assert built(program).reads_on_paths("weights") == ("init",)
        edge = Edge("init", "weights", DOWN)
        assert [e for e in program.graph().edges if e.target == "weights"] == [edge]


class TestCopies:
    def refuse(self, program: Program, **options: Any) -> str:
        maml(program, **options)
        text = message(ModuleError, program.graph)
        assert text.startswith("level 'weights' (test_declare_unrolled.py:")
        return text

    def test_find_every_parameter(self, program):
        text = self.refuse(program, start=lambda: nn.ModuleDict({"bodi": nn.Linear(2, 2)}))
        assert "its parameter 'body.weight' is not in the module of 'init'" in text
        assert "init_from=" in text
        assert "Did you mean 'bodi.weight'?" in text

    def test_find_every_buffer(self, program):
        class Bare(Net):
            def __init__(self) -> None:
                super().__init__()
                del self.scale

        text = self.refuse(program, start=Bare)
        assert "its buffer 'scale' is not in the module of 'init'" in text

    def test_find_buffers_that_are_not_saved(self, program):
        class Hidden(Net):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("seen", torch.zeros(1), persistent=False)

        assert "its buffer 'seen'" in self.refuse(program, module=Hidden)

    def test_find_the_same_shapes(self, program):
        text = self.refuse(program, start=lambda: Net(3))
        assert "its parameter 'body.weight' is (2, 2) torch.float32, and that of 'init'" in text
        assert "(3, 2) torch.float32." in text
        assert "Expected: the same shape and dtype." in text

    def test_find_the_same_dtypes(self, program):
        text = self.refuse(program, start=lambda: Net(dtype=torch.float64))
        assert "(2, 2) torch.float64." in text

    def test_find_the_same_buffers(self, program):
        def other() -> nn.Module:
            net = Net()
            net.scale = torch.ones(5)
            return net

        text = self.refuse(program, start=other)
        assert "its buffer 'scale' is (2,) torch.float32" in text

    @pytest.mark.parametrize("way", ["name", "object"])
    def test_need_two_modules(self, program, way):
        net = Net()
        options = {"params": lambda name: name.startswith("head")}
        text = self.refuse(
            program,
            module=net,
            start="weights" if way == "name" else net,
            top={"params": lambda name: name.startswith("body")},
            **options,
        )
        assert "init_from='init' names a level with the same module." in text
        assert "give each its own, such as module=Net to both." in text

    def test_may_leave_more_in_the_start(self, program):
        class More(Net):
            def __init__(self) -> None:
                super().__init__()
                self.rates = nn.Parameter(torch.ones(3))

        maml(program, start=More)
        assert built(program).levels["init"].parameters.keys() >= {"rates"}


class TestPartialCopies:
    """ANIL: the level optimizes its head alone, and its body is that of the start."""

    def anil(self, program: Program, **options: Any) -> Build:
        maml(program, params=lambda name: name.startswith("head"), **options)
        return built(program)

    def test_belong_to_the_start(self, program):
        made = self.anil(program)
        assert set(made.levels["weights"].parameters) == {"head.weight", "head.bias"}
        assert set(made.levels["weights"].loss.sees) == {"weights", "init"}
        assert set(made.levels["init"].loss.sees) == {"weights", "init"}
        assert made.reads_on_paths("weights") == ("init",)

    def test_are_seen_by_losses_with_the_values_of_the_start(self, program):
        made = self.anil(program)
        body = made.levels["init"].parameters["body.weight"]
        loss = made.levels["weights"].loss
        seen = []

        def evaluate() -> None:
            net = made.levels["weights"].module
            seen.append((net.body.weight, net.head.weight))

        loss.within(loss.state(made.values(("weights", "init"))), evaluate)
        assert torch.equal(seen[0][0], body)
        assert not torch.equal(made.levels["weights"].module.body.weight, body)
        assert torch.equal(seen[0][1], made.levels["weights"].module.head.weight)

    def test_carry_a_hypergradient_to_the_body_of_the_start(self, program):
        self.anil(program, top={"hypergrad": "cg"})
        found = mlodeco.hypergradient("init", program=program)
        assert found["body.weight"].abs().sum() > 0
        assert found["head.weight"].abs().sum() == 0

    def test_are_not_made_of_what_the_start_does_not_optimize(self, program):
        made = self.anil(program, top={"params": ["head.weight"]})
        assert made.levels["weights"].loss.sees == ("weights",)

    def test_are_not_made_of_what_another_level_optimizes(self, program):
        program.level("body", module="weights", params=lambda name: name.startswith("body"))(fit)
        made = self.anil(program)
        assert set(made.levels["weights"].loss.sees) == {"weights", "body"}
        assert ("body", "weights", SIDE) in edges(program)

    def test_may_be_frozen_in_the_level(self, program):
        def frozen() -> nn.Module:
            net = Net()
            net.body.requires_grad_(False)
            return net

        maml(program, module=frozen)
        assert set(built(program).levels["weights"].loss.sees) == {"weights", "init"}

    def test_go_through_a_start_that_has_copies_itself(self, program):
        def head(name: str) -> bool:
            return name.startswith("head")

        program.level("low", module=Net, params=head, init_from="mid")(fit)
        program.level("mid", lower=["low"], module=Net, params=head, init_from="top")(
            lambda mid, low: fit(low)
        )
        program.level("top", lower=["mid"], module=Net)(lambda top, mid: fit(mid))
        made = built(program)
        assert set(made.levels["mid"].loss.sees) == {"mid", "low", "top"}
        assert set(made.levels["low"].loss.sees) == {"low", "top"}

    def test_of_tied_parameters_are_found_by_either_name(self, program):
        def tied() -> nn.Module:
            net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
            net["head"].weight = net["body"].weight
            return net

        def loss(net: Any) -> Tensor:
            return sum((p**2).sum() for p in net.parameters())

        @program.level("weights", module=tied, params=["head.bias"], init_from="init")
        def inner(weights):
            return loss(weights)

        @program.level("init", lower=["weights"], module=tied)
        def outer(init, weights):
            return loss(weights)

        assert set(built(program).levels["weights"].loss.sees) == {"weights", "init"}


class TestClosedStarts:
    def test_are_refused_with_the_remedy(self, program):
        maml(program, top={"hypergrad": None})
        text = message(MethodError, program.graph)
        assert text.startswith("level 'init' (test_declare_unrolled.py:")
        assert "hypergrad=None closes the edge by which 'init' learns from 'weights'" in text
        assert "hypergrad=Unroll(first_order=True) for first-order MAML" in text
        assert "an @update('init') rule such as Reptile" in text

    def test_are_refused_in_a_mapping(self, program):
        maml(program, top={"hypergrad": {"weights": None}})
        message(MethodError, program.graph)

    def test_are_refused_on_the_way_through_another_level(self, program):
        program.level("low", module=Net, init_from="top")(fit)
        program.level("mid", lower=["low"], module=Net)(lambda mid, low: fit(low) + fit(mid))
        program.level("top", lower=["mid"], module=Net, hypergrad=None)(lambda top, mid: fit(mid))
        assert "'top' learns from 'low'" in message(MethodError, program.graph)

    def test_are_refused_with_the_update_rule_of_another_level(self, program):
        maml(program, top={"hypergrad": None})
        program.update("weights")(rule)
        message(MethodError, program.graph)

    def test_are_fine_where_the_start_has_an_update_rule(self, program):
        maml(program, top={"hypergrad": None})

        @program.update("init")
        def reptile(params, weights):
            return params, None

        assert built(program).methods == {("init", "weights"): None}

    def test_are_fine_where_the_start_reads_nothing_below(self, program):
        program.level("weights", module=Net, init_from="init")(fit)
        program.level("init", lower=["weights"], module=Net, hypergrad=None)(fit)
        assert edges(program) == {("init", "weights", DOWN), ("weights", "init", ORDER)}


class TestReplicas:
    @pytest.mark.parametrize("count", [1, 4, np.int64(4), torch.tensor(4)])
    def test_are_a_number(self, program, count):
        program.level("low", module=vector, replicas=count)(square)
        assert program.levels["low"].replicas == Replicas(int(count))
        assert type(program.levels["low"].replicas.count) is int

    def test_are_a_record(self, program):
        record = Replicas(8, way="vmap", chunk=2)
        program.level("low", module=vector, replicas=record)(square)
        assert program.levels["low"].replicas is record
        assert built(program).levels["low"].declaration.replicas is record

    def test_are_by_default_solved_as_suits_the_device(self):
        assert Replicas(3) == Replicas(3, "auto", None)
        assert hash(Replicas(np.int64(3), chunk=np.int64(2))) == hash(Replicas(3, chunk=2))
        with pytest.raises(AttributeError):
            Replicas(3).count = 4

    @pytest.mark.parametrize("wrong", [0, -1, True, False, 2.0, "4", [4]])
    def test_are_at_least_one(self, program, wrong):
        text = message(
            DeclarationError,
            lambda: program.level("low", module=vector, replicas=wrong)(square),
        )
        assert f"level 'low' (test_declare_unrolled.py:{square.__code__.co_firstlineno})" in text
        assert f"replicas={wrong!r}." in text
        assert "an integer of at least 1" in text

    @pytest.mark.parametrize("option", ["count", "chunk"])
    @pytest.mark.parametrize("wrong", [0, True, 1.5, "2"])
    def test_check_the_numbers_of_a_record(self, option, wrong):
        text = message(DeclarationError, lambda: Replicas(**{"count": 2, option: wrong}))
        assert f"Replicas: {option}={wrong!r}." in text
        assert "Expected: an integer from 1 to 2147483647." in text

    def test_check_the_way_of_a_record(self):
        text = message(DeclarationError, lambda: Replicas(2, way="vmpa"))
        assert "Replicas: way='vmpa'." in text
        assert "one of 'auto', 'loop', 'vmap'" in text
        assert "Did you mean 'vmap'?" in text
        message(DeclarationError, lambda: Replicas(2, way=None))

    def test_have_no_lower_levels(self, program):
        text = message(
            DeclarationError,
            lambda: program.level("mid", lower=["low"], module=vector, replicas=2)(square),
        )
        assert "replicas= on a level with the lower levels 'low'." in text
        assert "make the lowest level the one with replicas" in text

    def test_do_not_share_by_name(self, program):
        text = message(
            DeclarationError, lambda: program.level("low", module="other", replicas=2)(square)
        )
        assert "replicas= on a level that shares the module of 'other'." in text

    @pytest.mark.parametrize("way", ["name", "object", "part"])
    def test_are_not_shared_by_others(self, program, way):
        net = Net()
        other = {"name": "low", "object": net, "part": nn.Sequential(net.body, nn.Linear(2, 2))}
        head, body = (lambda part: lambda name: part in name)("head"), ["body.weight"]
        last = {"params": lambda name: name.startswith("1")}
        program.level("low", module=net, params=body if way == "part" else head, replicas=2)(fit)
        program.level("other", module=other[way], **(last if way == "part" else {"params": body}))(
            fit
        )
        text = message(ModuleError, program.graph)
        assert text.startswith("level 'low' (test_declare_unrolled.py:")
        assert "replicas= is given, and level 'other' has" in text
        assert "give 'other' another module" in text

    def test_may_be_read_and_start_from_a_level_above(self, program):
        maml(program, replicas=4)
        assert edges(program) == {("weights", "init", UP), ("init", "weights", DOWN)}


class TestTune:
    def test_is_recorded_and_bound(self, program):
        given = {"lr": lambda hyper: hyper.x[0], "momentum": lambda hyper, scale=2.0: hyper.x[1]}
        tuned(program, given["lr"], tune=given)
        assert program.levels["weights"].tune == given
        assert program.levels["weights"].tune is not given
        level = built(program).levels["weights"]
        assert level.binding.tune_reads == {"lr": ("hyper",), "momentum": ("hyper",)}
        assert level.tune_reads == level.step_reads == ("hyper",)

    def test_is_an_edge_without_a_read_of_the_loss(self, program):
        tuned(program, lambda hyper: hyper.x[0])
        assert edges(program) == {("weights", "hyper", UP), ("hyper", "weights", DOWN)}
        assert built(program).reads_on_paths("weights") == ()

    def test_may_be_empty(self, program):
        program.level("low", module=vector, tune={})(square)
        assert built(program).levels["low"].binding.tune_reads == {}

    @pytest.mark.parametrize("wrong", [0.1, "lr", ["lr"], abs])
    def test_is_a_mapping(self, program, wrong):
        text = message(DeclarationError, lambda: tuned(program, abs, tune=wrong))
        assert "Expected: a mapping from options of the optimizer to functions" in text
        assert "write tune={'lr': lambda hyper: hyper.log_lr.exp()}" in text

    @pytest.mark.parametrize("wrong", [3, "", "weight decay", None])
    def test_has_names_of_options(self, program, wrong):
        text = message(DeclarationError, lambda: tuned(program, abs, tune={wrong: abs}))
        assert f"tune= has the key {wrong!r}." in text

    def test_has_functions(self, program):
        text = message(DeclarationError, lambda: tuned(program, 0.1))
        assert "tune['lr']=0.1 is not callable." in text
        assert "a constant belongs into optimizer=" in text

    def test_has_functions_of_names(self, program):
        text = message(DeclarationError, lambda: tuned(program, lambda hyper, /: hyper.x[0]))
        assert "the argument 'hyper' is positional-only." in text
        assert "levels are given to tune['lr'] by name" in text
        text = message(DeclarationError, lambda: tuned(program, min))
        assert "cannot be found out" in text

    def test_does_not_stand_beside_a_scheduler_of_the_learning_rate(self, program):
        steps = functools.partial(StepLR, step_size=3)
        text = message(DeclarationError, lambda: tuned(program, lambda hyper: 0.1, scheduler=steps))
        assert "tune= computes 'lr' and scheduler= sets it too." in text
        tuned(program, abs, tune={"momentum": lambda hyper: hyper.x[0]}, scheduler=steps)

    def test_takes_known_levels(self, program):
        tuned(program, lambda hypre: hypre.x[0])
        text = message(BindingError, program.graph)
        assert text.startswith("level 'weights' (test_declare_unrolled.py:")
        assert "tune['lr'] asks for 'hypre', which is not offered to it." in text
        assert "any of 'other', 'hyper'" in text
        assert "Did you mean 'hyper'?" in text

    def test_does_not_take_the_level_itself(self, program):
        tuned(program, lambda weights: weights.x[0])
        assert "asks for 'weights'" in message(BindingError, program.graph)

    def test_takes_some_level(self, program):
        tuned(program, lambda rate=0.1: rate)
        text = message(BindingError, program.graph)
        assert "tune['lr'] takes no level, so that no level can learn 'lr'." in text

    def test_takes_levels_above(self, program):
        tuned(program, lambda hyper, other: hyper.x[0] + other.x[0])
        text = message(GraphError, program.graph)
        assert "tune['lr'] takes 'other', a level that is not above it." in text
        assert "Expected: some of 'hyper'." in text
        assert "add 'weights' to lower= of 'other'" in text


class TestUpdate:
    def test_returns_the_function_and_records_it(self, program):
        program.level("low", module=vector)(square)
        version = program.version
        assert program.update("low")(rule) is rule
        assert program.version == version + 1
        record = program.updates["low"]
        assert (record.level, record.function) == ("low", rule)
        assert str(record.site).startswith("test_declare_unrolled.py:")

    def test_belongs_to_the_current_program(self, program):
        with program:
            mlodeco.update("low")(rule)
        assert list(program.updates) == ["low"]
        assert mlodeco.update.__name__ == "update"
        assert mlodeco.update.__doc__ == Program.update.__doc__
        assert list(inspect.signature(mlodeco.update).parameters) == ["level", "unknown"]

    def test_is_counted(self, program):
        program.update("low")(rule)
        assert repr(program) == "<Program: levels none; 1 update rule>"

    def test_needs_a_level(self, program):
        text = message(DeclarationError, lambda: program.update(rule))
        assert "@update was used without a level." in text
        assert "write @update('weights') above the function." in text

    @pytest.mark.parametrize("wrong", ["", 3, None, "batch"])
    def test_needs_the_name_of_a_level(self, program, wrong):
        assert "the level's name" in message(DeclarationError, lambda: program.update(wrong)(rule))

    def test_is_a_plain_function(self, program):
        async def later(params):
            return params, None

        def parts(params):
            yield params

        decorate = program.update("low")
        assert "async" in message(DeclarationError, lambda: decorate(later))
        assert "generator" in message(DeclarationError, lambda: decorate(parts))
        with pytest.raises(DeclarationError, match="class 'Net'"):
            decorate(Net)
        with pytest.raises(DeclarationError, match="not a function"):
            decorate(3)
        text = message(DeclarationError, lambda: decorate(lambda params, /: (params, None)))
        assert "the argument 'params' is positional-only." in text

    def test_takes_params_or_grads(self, program):
        text = message(DeclarationError, lambda: program.update("low")(lambda state, hyper: 3))
        assert "takes neither 'params' nor 'grads', but 'state', 'hyper'." in text
        assert "write def rule(params, grads, state)" in text
        assert "but none." in message(
            DeclarationError, lambda: program.update("low")(lambda *args, **options: 3)
        )

    def test_is_one_a_level(self, program):
        program.update("low")(rule)
        program.update("top")(rule)
        text = message(DeclarationError, lambda: program.update("low")(rule))
        assert "the update rule of 'low' is declared twice, first at" in text
        assert len(program.updates) == 2

    def test_replaces_its_earlier_declaration_at_a_prompt(self, program):
        code = compile(
            "@program.update('low')\ndef rule(params):\n    return params, None\n",
            "<stdin>",
            "exec",
        )
        names = {"__name__": "__main__", "program": program}
        exec(code, names)
        with pytest.warns(RedeclarationWarning, match="update rule of 'low'") as caught:
            exec(code, names)
        assert len(caught) == 1  # the same input, which declares it twice
        assert program.updates["low"].function is names["rule"]


class TestBoundUpdate:
    def pair(self, program: Program, **options: Any) -> None:
        program.level("low", module=vector, **options)(lambda own, top: square(own) * top.x.sum())
        program.level("top", lower=["low"], module=vector)(lambda own, low: square(low))
        program.level("other", module=vector)(square)

    @pytest.mark.parametrize(
        ("function", "takes", "reads"),
        [
            (rule, ("params", "grads", "state"), ()),
            (lambda params: (params, None), ("params",), ()),
            (lambda grads: (grads, None), ("grads",), ()),
            (lambda state, grads, top: (grads, state), ("grads", "state"), ("top",)),
            (lambda other, params, top: (params, None), ("params",), ("other", "top")),
            (lambda params, rate=0.1, *rest, **more: (params, None), ("params",), ()),
        ],
    )
    def test_takes_what_it_names(self, program, function, takes, reads):
        self.pair(program)
        program.update("low")(function)
        level = built(program).levels["low"]
        assert level.update.declaration is program.updates["low"]
        assert (level.update.takes, level.update.reads) == (takes, reads)
        assert level.update_reads == level.step_reads == reads
        assert built(program).levels["top"].update is None

    def test_after_a_build_makes_a_new_one(self, program):
        self.pair(program)
        first = built(program)
        program.update("low")(rule)
        assert built(program) is not first
        assert built(program).levels["low"].module is first.levels["low"].module
        assert built(program).levels["low"].update is not None

    def test_belongs_to_a_known_level(self, program):
        self.pair(program)
        program.update("lov")(rule)
        text = message(GraphError, program.graph)
        assert "@update names 'lov', not a known level." in text
        assert "Did you mean 'low'?" in text

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("optimizer", sgd),
            ("scheduler", functools.partial(StepLR, step_size=3)),
            ("tune", {"lr": lambda top: top.x[0]}),
        ],
    )
    def test_takes_the_place_of_the_optimizer(self, program, option, value):
        self.pair(program, **{option: value})
        program.update("low")(rule)
        text = message(DeclarationError, program.graph)
        assert text.startswith("level 'low' (test_declare_unrolled.py:")
        assert f"the level has {option}= and the update rule at test_declare_unrolled.py:" in text
        assert f"leave {option} out, or remove the rule." in text

    def test_does_not_take_the_level_itself(self, program):
        self.pair(program)
        program.update("low")(lambda params, low=None: (params, None))
        text = message(BindingError, program.graph)
        assert "the update rule takes 'low', the level itself." in text
        assert "Remedy: take params in its place." in text

    def test_takes_known_names(self, program):
        self.pair(program)
        program.update("low")(lambda param, grads: (param, None))
        text = message(BindingError, program.graph)
        assert "the update rule asks for 'param', which is not offered to it." in text
        assert "any of 'params', 'grads', 'state', 'top', 'other'" in text
        assert "Did you mean 'params'?" in text

    def test_has_no_options_that_resemble_a_name(self, program):
        self.pair(program)
        program.update("low")(lambda params, states=None: (params, None))
        assert "asks for 'states'" in message(BindingError, program.graph)

    def test_takes_nothing_that_is_two_things(self, program):
        self.pair(program)
        program.level("state", module=vector)(square)
        program.update("low")(rule)
        text = message(BindingError, program.graph)
        assert "the update rule takes 'state', which is a level too." in text
        program.level("grads", module=vector)(square)
        program.updates.clear()
        program.update("low")(lambda params: (params, None))
        built(program)


class TestEdgesOfUpdate:
    def test_come_from_above(self, program):
        program.level("weights", module=vector)(square)
        program.level("learned", lower=["weights"], module=vector)(
            lambda learned, weights: square(weights)
        )

        @program.update("weights")
        def learnable(params, grads, learned):
            return {key: params[key] - learned.x * grads[key] for key in params}, None

        assert edges(program) == {("weights", "learned", UP), ("learned", "weights", DOWN)}
        assert built(program).reads_on_paths("weights") == ()

    def test_come_from_beside(self, program):
        program.level("low", module=vector)(square)
        program.level("other", module=vector)(square)
        program.update("low")(lambda params, other: (params, None))
        assert edges(program) == {("other", "low", SIDE)}

    def test_from_below_are_no_best_responses(self, program):
        program.level("weights", module=vector, init_from="init")(square)
        program.level("init", lower=["weights"], module=vector)(square)

        @program.update("init")
        def reptile(params, grads, weights):
            return {"x": params["x"] + 0.1 * (weights.x - params["x"])}, None

        assert edges(program) == {("init", "weights", DOWN), ("weights", "init", ORDER)}
        assert built(program).methods == {}
        assert built(program).levels["init"].update_reads == ("weights",)

    def test_without_a_gradient_need_no_path(self, program):
        program.level("low", module=vector)(square)
        program.level("top", lower=["low"], module=vector)(square)
        program.update("top")(lambda params: (params, None))
        assert edges(program) == {("low", "top", ORDER)}

    def test_with_a_gradient_and_no_path_are_warned_of(self, program):
        program.level("low", module=vector)(square)
        program.level("top", lower=["low"], module=vector)(square)
        program.update("top")(rule)
        with pytest.warns(mlodeco.errors.GraphWarning, match="reaches its lower levels by no path"):
            program.graph()

    def test_that_the_loss_has_too_stay_best_responses(self, program):
        program.level("low", module=vector)(lambda own, top: ((own.x - top.x) ** 2).sum())
        program.level("top", lower=["low"], module=vector)(lambda own, low: square(low))
        program.update("top")(lambda params, grads, low: (params, None))
        assert edges(program) == {("low", "top", UP), ("top", "low", DOWN)}
