"""What each argument of a user's function receives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlodeco
from mlodeco import Context, Program
from mlodeco.errors import BindingError, DataError, DeclarationError

sgd = functools.partial(SGD, lr=0.1)


def vector() -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([1.0, 2.0])}


def square(module: Any) -> torch.Tensor:
    return (module.x**2).sum()


def run(program: Program, steps: int = 1) -> Any:
    return mlodeco.run(steps, program=program, progress="off")


class Seen:
    """A program with levels ``low``, ``other`` and ``top``, and what ``low`` was called with."""

    def __init__(self, function: Callable[..., Any], name: str = "low", **options: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.program = Program()
        chosen = {"module": vector, "optimizer": sgd, **options}
        if "data" not in options and "batch" in signature(function).parameters:
            chosen["data"] = [torch.ones(2)]
        self.program.level(name, **chosen)(function)
        self.program.level("other", module=vector, optimizer=sgd)(lambda m: square(m))
        self.name = name

    def module(self, name: str | None = None) -> nn.Module:
        return self.program.module(name or self.name)

    def run(self, steps: int = 1) -> Any:
        return run(self.program, steps)


class TestOwnModule:
    def test_is_the_argument_with_the_name_of_the_level(self):
        got = []

        def loss(batch, other, low):
            got.append((batch, other, low))
            return square(low) * square(other.requires_grad_())

        seen = Seen(loss)
        seen.run()
        assert got[-1][2] is seen.module()
        assert got[-1][1] is seen.module("other")
        assert torch.equal(got[-1][0], torch.ones(2))

    def test_is_the_first_argument_if_nothing_else_matches_it(self):
        got = []

        def loss(model):
            got.append(model)
            return square(model)

        seen = Seen(loss)
        seen.run()
        assert got[-1] is seen.module()

    def test_need_not_be_an_argument(self):
        program = Program()
        program.level("low", module=vector, optimizer=sgd)(
            lambda low, top: ((low.x - top.x) ** 2).sum()
        )

        @program.level("top", lower=["low"], module=vector, optimizer=sgd, data=[torch.zeros(2)])
        def meta(batch, low):
            return ((low.x - batch) ** 2).sum()

        assert len(run(program, 2).history) == 4

    def test_is_not_the_second_argument(self):
        with pytest.raises(BindingError, match=r"'model'(.|\n)*first argument or named 'low'"):
            Seen(lambda batch, model: square(model)).run()

    def test_is_not_the_first_argument_if_another_has_the_name_of_the_level(self):
        with pytest.raises(BindingError, match="'model'"):
            Seen(lambda model, low: square(low)).run()


class TestBatches:
    def test_are_whole_as_batch(self):
        got = []

        def loss(model, batch):
            got.append(batch)
            return square(model)

        Seen(loss, data=[("a", 1), ("b", 2)]).run(2)
        assert got[-1] == ("b", 2)

    @pytest.mark.parametrize("kind", [tuple, list])
    def test_are_in_parts_by_fields(self, kind):
        got = []

        def loss(model, y, x, batch):
            got.append((x, y, batch))
            return square(model)

        Seen(loss, data=[kind((1, 2))], fields=("x", "y")).run()
        assert got[-1] == (1, 2, kind((1, 2)))

    def test_that_are_mappings_are_in_parts_by_fields(self):
        got = []

        def loss(model, x, y):
            got.append((x, y))
            return square(model)

        Seen(loss, data=[{"y": 2, "x": 1, "z": 3}], fields=("x", "y")).run()
        assert got[-1] == (1, 2)

    def test_that_are_mappings_without_a_field_are_refused_with_what_they_have(self):
        seen = Seen(lambda model, x, y: square(model), data=[{"a": 1, "x": 1}], fields=("x", "y"))
        with pytest.raises(DataError, match="no entry 'y'") as caught:
            seen.run()
        assert "'a', 'x'" in str(caught.value)
        assert "data=" not in caught.value.expected

    def test_of_several_loaders_are_read_by_their_names(self):
        got = []

        def loss(model, clean, noisy, batch):
            got.append((clean, noisy, batch))
            return square(model)

        data = {"noisy": [1, 2], "clean": lambda: [10, 20, 30]}
        Seen(loss, data=data).run(4)
        assert got[1:] == [
            (clean, noisy, {"noisy": noisy, "clean": clean})
            for clean, noisy in ((10, 1), (20, 2), (30, 1), (10, 2))
        ]

    def test_need_not_be_wanted(self):
        assert len(Seen(lambda model: square(model), data=None).run(2).history) == 4


class TestContexts:
    def test_say_where_the_run_is_and_take_metrics(self):
        got = []

        def loss(model, ctx):
            got.append((type(ctx), ctx.level, ctx.tick, ctx.step, ctx.is_main))
            ctx.log(number=ctx.step)
            return square(model), {"size": square(model)}

        history = Seen(loss, data=None).run(3).history
        assert got[1:] == [(Context, "low", t, t - 1, True) for t in (1, 2, 3)]
        records = history.of("low")
        assert [record.metrics["number"] for record in records] == [0, 1, 2]
        assert [record.metrics["size"] for record in records] == [r.loss for r in records]


class TestReads:
    def test_as_a_mapping_give_a_level_to_an_argument(self):
        got = []

        def loss(model, teacher):
            got.append(teacher)
            return square(model) * square(teacher)

        seen = Seen(loss, reads={"teacher": "other"})
        seen.run()
        assert got[-1] is seen.module("other")
        assert seen.program.graph().reads["low"] == ("other",)

    def test_as_a_list_declare_levels_that_a_closure_uses(self):
        seen: Seen
        seen = Seen(lambda model: square(model) * square(seen.module("other")), reads=["other"])
        assert len(seen.run(2).history) == 4
        assert seen.program.graph().reads["low"] == ("other",)

    def test_as_a_mapping_go_before_any_other_meaning(self):
        got = []

        def loss(model, batch):
            got.append(batch)
            return square(model)

        seen = Seen(loss, data=None, reads={"batch": "other"})
        seen.run()
        assert got[-1] is seen.module("other")

    def test_of_the_first_argument_leave_the_own_module_out(self):
        with pytest.raises(BindingError, match="'model'"):
            Seen(lambda teacher, model: square(model), reads={"teacher": "other"}).run()

    def test_differentiate_through_a_closure_as_through_an_argument(self):
        def declare(*, closure):
            p = Program()
            p.level("low", module=vector)(lambda low, top: ((low.x - top.x**2) ** 2).sum())
            if closure:
                p.level("top", lower=["low"], reads=["low"], module=vector, hypergrad="dense")(
                    lambda top: (p.module("low").x ** 3).sum()
                )
            else:
                p.level("top", lower=["low"], module=vector, hypergrad="dense")(
                    lambda top, low: (low.x**3).sum()
                )
            return mlodeco.hypergradient("top", program=p)["x"]

        assert torch.equal(declare(closure=True), declare(closure=False))
        assert torch.allclose(declare(closure=True), torch.tensor([6.0, 48.0]))


class TestDefaults:
    @staticmethod
    def declare(*, with_level: bool) -> tuple[Program, list[Any]]:
        got: list[Any] = []
        program = Program()

        @program.level("weights", module=vector, optimizer=sgd)
        def train(model, reweight=None):
            got.append(reweight)
            return square(model) if reweight is None else square(model) * reweight.x.sigmoid().sum()

        if with_level:

            @program.level(
                "reweight", lower=["weights"], module=vector, optimizer=sgd, hypergrad="cg"
            )
            def meta(net, weights):
                return (weights.x.sum() - 1) ** 2

        return program, got

    def test_are_how_a_baseline_runs(self):
        program, got = self.declare(with_level=False)
        history = run(program, 3).history
        assert set(got) == {None}
        assert history.losses("weights")[0] == 5.0
        assert program.graph().edges == ()

    def test_are_replaced_by_the_level_of_that_name(self):
        program, got = self.declare(with_level=True)
        run(program, 3)
        assert all(value is program.module("reweight") for value in got)
        assert len(program.graph().edges) == 2

    def test_are_replaced_once_the_level_is_declared(self):
        program, got = self.declare(with_level=False)
        run(program)
        assert got[-1] is None
        program.level("reweight", module=vector, optimizer=sgd)(lambda own: square(own))
        run(program)
        assert got[-1] is program.module("reweight")

    def test_of_options_are_kept(self):
        got = []

        def loss(model, scale=2.0, *, power=3):
            got.append((scale, power))
            return square(model)

        Seen(loss).run()
        assert got[-1] == (2.0, 3)

    def test_of_options_may_resemble_names_that_are_taken(self):
        got = []

        def loss(model, batch, batch2=5, low2=6):
            got.append((batch2, low2))
            return square(model)

        Seen(loss).run()
        assert got[-1] == (5, 6)


class Losses:
    factor = 3.0

    def loss(self, model, batch, other):
        return self.factor * square(model) + 0 * square(other) + 0 * batch.sum()

    @staticmethod
    def static(model, batch, other):
        return 3.0 * square(model) + 0 * square(other) + 0 * batch.sum()

    @classmethod
    def of_class(cls, model, batch, other):
        return cls.factor * square(model) + 0 * square(other) + 0 * batch.sum()

    def __call__(self, model, batch, other):
        return self.loss(model, batch, other)


class InheritedLosses(Losses):
    pass


class AsyncCalled:
    async def __call__(self, model):
        return square(model)


class InheritedAsync(AsyncCalled):
    pass


def positional_only(model, batch, /, other):
    return Losses.static(model, batch, other)


def all_positional_only(model, batch, other, /):
    return Losses.static(model, batch, other)


def keyword_only(model, *, other, batch):
    return Losses.static(model, batch, other)


def variadic(model, batch, other, *args, **kwargs):
    assert args == ()
    assert kwargs == {}
    return Losses.static(model, batch, other)


def variadic_in_between(model, *args, batch, other, **kwargs):
    assert args == ()
    return Losses.static(model, batch, other)


def with_factor(factor, model, batch, other, offset):
    assert offset == 0
    return factor / 3.0 * Losses.static(model, batch, other)


def wrap(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


FUNCTIONS = {
    "bound method": Losses().loss,
    "static method": Losses.static,
    "class method": Losses.of_class,
    "callable object": Losses(),
    "object with an inherited call": InheritedLosses(),
    "lambda": lambda model, batch, other: Losses.static(model, batch, other),
    "positional-only": positional_only,
    "all positional-only": all_positional_only,
    "keyword-only": keyword_only,
    "*args and **kwargs": variadic,
    "*args in between": variadic_in_between,
    "partial": functools.partial(with_factor, 3.0, offset=0),
    "partial of a partial": functools.partial(functools.partial(with_factor, 3.0), offset=0),
    "partial of a bound method": functools.partial(Losses().loss),
    "wrapped": wrap(Losses.static),
    "wrapped bound method": wrap(Losses().loss),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_kind_of_function_is_filled_in(function):
    seen = Seen(function)
    assert seen.run().history.losses("low") == [15.0]
    assert seen.program.levels["low"].function is function
    assert str(seen.program.levels["low"].site).startswith("test_binding.py:")
    assert seen.program.graph().reads["low"] == ("other",)


def test_variadic_arguments_alone_receive_nothing():
    got = []

    def loss(*args, **kwargs):
        got.append((args, kwargs))
        return square(seen.module())

    seen = Seen(loss)
    seen.run()
    assert got[-1] == ((), {})


def test_positional_only_arguments_are_not_shifted_by_one_that_is_left_out():
    def loss(model, scale=2.0, other=None, /):
        return scale * square(model)

    with pytest.raises(BindingError, match=r"'scale'(.|\n)*Remedy: .*'/'"):
        Seen(loss).run()


def test_inherited_async_calls_are_refused():
    with pytest.raises(DeclarationError, match="async"):
        Program().level("low", module=vector)(InheritedAsync())


@pytest.mark.parametrize("name", ["a.b", "train", "forward", "class", "two words", "ä", "0"])
def test_names_that_are_no_identifiers_work_by_reads(name):
    program = Program()
    program.level(name, module=vector, optimizer=sgd, reads={"upper": f"{name}!"})(
        lambda own, upper: ((own.x - upper.x**2) ** 2).sum()
    )
    program.level(
        f"{name}!",
        lower=[name],
        module=vector,
        optimizer=sgd,
        reads={"lower": name},
        hypergrad="dense",
    )(lambda own, lower: (lower.x**3).sum())
    found = mlodeco.hypergradient(f"{name}!", program=program)["x"]
    assert torch.allclose(found, torch.tensor([6.0, 48.0]))
    assert [record.level for record in run(program).history.steps] == [name, f"{name}!"]


def test_names_of_methods_work_as_arguments():
    program = Program()
    program.level("train", module=vector, optimizer=sgd)(
        lambda train, forward: ((train.x - forward.x) ** 2).sum()
    )
    program.level("forward", lower=["train"], module=vector, optimizer=sgd)(
        lambda forward, train: (train.x**2).sum()
    )
    assert len(run(program, 2).history) == 4


class TestHooksAndValidations:
    def test_receive_what_they_ask_for(self):
        seen = Seen(lambda model: square(model), data=None)
        got: dict[str, Any] = {}

        @seen.program.on("after_step", level="low")
        def hook(low, ctx, optimizer, scheduler, batch, grads, loss, metrics, mine=7):
            got.update(locals())

        @seen.program.validate
        def check(other, ctx):
            got["validated"] = other
            return {"number": ctx.tick}

        result = seen.run()
        assert got["low"] is seen.module()
        assert got["validated"] is seen.module("other")
        assert isinstance(got["optimizer"], SGD)
        assert got["scheduler"] is got["batch"] is None
        assert torch.equal(got["grads"]["x"], 2 * vector()["x"])
        assert got["loss"] == 5.0
        assert got["mine"] == 7
        assert result.history.metric("number") == [1.0]

    def test_of_objects_are_called(self):
        class Listener:
            def __init__(self) -> None:
                self.ticks: list[int] = []

            def hear(self, ctx):
                self.ticks.append(ctx.tick)

        listener = Listener()
        seen = Seen(lambda model: square(model))
        seen.program.on("after_step", level="low")(listener.hear)
        seen.run(3)
        assert listener.ticks == [1, 2, 3]
