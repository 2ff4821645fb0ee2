"""Declarations: decorators, programs, replacement, rebuilding and laziness."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from mlodeco.api import DEFAULT, current_program
from mlodeco.declare.registry import LEVEL_OPTIONS
from mlodeco.errors import DeclarationError, GraphError, RedeclarationWarning

sgd = functools.partial(SGD, lr=0.1)


def run(program: Program, steps: int = 1, **options: Any) -> Any:
    return mlodeco.run(steps, program=program, progress="off", **options)


def square(own):
    return (own.x**2).sum()


def vector() -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([1.0, 2.0])}


@pytest.fixture
def program() -> Program:
    return Program()


def declare_pair(program: Program, *, module: Any = vector, **options: Any) -> None:
    @program.level("low", module=module, optimizer=sgd)
    def lower(own, top):
        return ((own.x - top.x) ** 2).sum()

    @program.level("top", lower=["low"], module=module, optimizer=sgd, **options)
    def upper(own, low):
        return ((low.x - 1) ** 2).sum()


class TestDecorators:
    def test_return_the_function_unchanged(self, program):
        def function(low):
            return {}

        before = dict(vars(function))
        assert program.level("low", module=vector)(square) is square
        assert program.on("run_end")(function) is function
        assert program.validate(function) is function
        assert program.validate(every=2)(function) is function
        assert program.method("mine")(function) is function
        assert vars(function) == before

    def test_may_be_stacked(self, program):
        @program.level("b", module=vector, optimizer=sgd, reads={"other": "a"})
        @program.level("a", module=vector, optimizer=sgd, reads={"other": "b"})
        @program.validate(every=1)
        @program.on("run_end")
        def function(own=None, other=None):
            return {"x": 1.0} if own is None else ((own.x - other.x) ** 2).sum() + square(own)

        assert list(program.levels) == ["a", "b"]
        assert program.levels["a"].function is program.levels["b"].function is function
        result = run(program)
        assert [record.level for record in result.history.steps] == ["a", "b"]
        assert result.history.metric("x") == [1.0]

    def test_may_be_applied_as_calls(self, program):
        program.level("low", module=vector, optimizer=sgd)(square)
        assert len(run(program, 2).history) == 2

    def test_grow_the_version_with_each_success_only(self, program):
        program.level("low", module=vector)(square)
        version = program.version
        for decorate in (
            program.level("low", module=vector),
            program.level("new", module=None),
            program.on("sunrise"),
            program.validate(patience=3),
            program.method("not a name"),
        ):
            with pytest.raises(DeclarationError):
                decorate(square)
        assert program.version == version
        program.on("run_end")(lambda: None)
        assert program.version == version + 1

    @pytest.mark.parametrize("form", ["bare", "called", "with options"])
    def test_of_validations_work_with_and_without_parentheses(self, program, form):
        program.level("low", module=vector, optimizer=sgd)(square)

        def norm(low):
            assert not low.training
            assert not torch.is_grad_enabled()
            return {"norm": low.x.norm()}

        decorate = {
            "bare": lambda: program.validate(norm),
            "called": lambda: program.validate()(norm),
            "with options": lambda: program.validate(every=2)(norm),
        }[form]
        decorate()
        found = run(program, 5).history
        ticks = [record.tick for record in found.validations]
        assert ticks == ([2, 4, 5] if form == "with options" else [1, 2, 3, 4, 5])
        assert len(found.metric("norm")) == len(ticks)

    def test_take_nested_functions_whose_first_argument_is_self(self, program):
        def loss(self):
            return square(self)

        program.level("low", module=vector, optimizer=sgd)(loss)
        assert len(run(program).history) == 1

    def test_do_not_look_at_generic_types_by_their_equality(self, program):
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.x = nn.Parameter(torch.ones(1))

            def __eq__(self, other: object) -> bool:
                raise AssertionError

            __hash__ = nn.Module.__hash__

        program.level("low", module=Odd(), optimizer=sgd)(square)
        assert len(run(program).history) == 1


class TestCurrentProgram:
    def test_is_the_innermost_and_is_restored(self):
        assert current_program() is DEFAULT
        with Program() as outer:
            assert current_program() is outer
            with Program() as inner:
                mlodeco.level("low", module=vector)(square)
                assert current_program() is inner
            mlodeco.on("run_end")(lambda: None)
            assert current_program() is outer
        assert current_program() is DEFAULT
        assert list(inner.levels) == ["low"]
        assert inner.hooks == []
        assert len(outer.hooks) == 1
        assert outer.levels == {}

    def test_is_restored_after_an_exception(self):
        with contextlib.suppress(ZeroDivisionError), Program():
            raise ZeroDivisionError
        assert current_program() is DEFAULT

    def test_may_be_entered_again(self, program):
        with program, program:
            assert current_program() is program
        with program:
            mlodeco.level("low", module=vector)(square)
        assert current_program() is DEFAULT
        assert list(program.levels) == ["low"]

    def test_is_what_the_functions_of_the_module_use(self):
        with Program() as p:
            declare_pair(p)
            assert set(mlodeco.hypergradient("top")) == {"x"}
            assert len(mlodeco.run(1, progress="off").history) == 2
            assert mlodeco.Runner().step().tick == 1

    def test_does_not_matter_to_an_explicit_program(self, program):
        with Program() as other:
            declare_pair(program)
            assert len(run(program).history) == 2
        assert other.levels == {}

    def test_decorates_where_the_decorator_was_made(self):
        with Program() as p:
            decorate = mlodeco.level("low", module=vector)
        decorate(square)
        assert list(p.levels) == ["low"]

    def test_is_by_default_that_of_the_module(self):
        assert DEFAULT.levels == {}
        try:
            mlodeco.level("low", module=vector, optimizer=sgd)(square)
            mlodeco.validate(lambda low: {"norm": low.x.norm()})
            assert list(DEFAULT.levels) == ["low"]
            assert len(mlodeco.run(2, progress="off").history.validations) == 2
            assert mlodeco.Runner().step().tick == 1
        finally:
            DEFAULT.levels.clear()
            DEFAULT.validations.clear()
            DEFAULT.reset()
        with pytest.raises(mlodeco.errors.RunError, match="no levels"):
            mlodeco.run(1, progress="off")


class TestSignatures:
    def test_of_the_functions_of_the_module_show_the_options(self):
        shown = inspect.signature(mlodeco.level).parameters
        assert list(shown) == ["name", *LEVEL_OPTIONS, "unknown"]
        assert shown["inner_steps"].default == 1
        assert "self" not in inspect.signature(mlodeco.on).parameters
        assert list(inspect.signature(mlodeco.on).parameters)[:3] == ["event", "level", "every"]
        assert "patience" in inspect.signature(mlodeco.validate).parameters
        assert list(inspect.signature(mlodeco.method).parameters) == ["name", "unknown"]

    def test_keep_names_and_documentation(self):
        for name in ("level", "on", "validate", "method"):
            function = getattr(mlodeco, name)
            assert function.__name__ == name
            assert function.__doc__ == getattr(Program, name).__doc__
            assert "Args:" in function.__doc__ or name == "method"


def figure_one(order: tuple[str, ...]) -> Program:
    program = Program()

    def one(own, three, four):
        return ((own.x - three.x * four.x) ** 2).sum()

    def two(own):
        return square(own)

    def three(own, one, two, four):
        return ((own.x - one.x - two.x + four.x) ** 2).sum()

    def four(own, three):
        return ((own.x - three.x) ** 2).sum()

    lower = {"three": ["one", "two"], "four": ["three"]}
    functions = {"one": one, "two": two, "three": three, "four": four}
    for name in order:
        program.level(name, lower=lower.get(name, ()), module=vector)(functions[name])
    return program


def test_order_of_declaration_does_not_matter_to_the_graph():
    names = ("one", "two", "three", "four")
    wanted = figure_one(names).graph()
    for order in itertools.permutations(names):
        graph = figure_one(order).graph()
        assert set(graph.edges) == set(wanted.edges)
        assert set(graph.paths("four")) == set(wanted.paths("four"))
        assert graph.order.index("three") == 2
        assert graph.order[3] == "four"


def test_levels_that_are_not_declared_yet_are_waited_for(program):
    program.level("top", lower=["low"], module=vector)(lambda own, low: (low.x * own.x).sum())
    with pytest.raises(GraphError, match="'low'"):
        program.module("top")
    program.level("low", module=vector)(lambda own, top: ((own.x - top.x) ** 2).sum())
    assert program.graph().order == ("low", "top")


CELL = """
@program.level("low", module=module, optimizer=sgd)
def lower(own, top):
    return {factor} * ((own.x - top.x) ** 2).sum()
"""


class Prompt:
    """Runs code as an interactive prompt does."""

    def __init__(self, **names: Any) -> None:
        self.names = {"__name__": "__main__", "sgd": sgd, **names}

    def enter(self, code: str) -> None:
        exec(compile(code, "<stdin>", "exec"), self.names)


class TestRedeclaration:
    def test_at_a_prompt_replaces_without_a_word(self, program):
        declare_pair(other := Program())
        program.level("top", lower=["low"], module=vector)(other.levels["top"].function)
        prompt = Prompt(program=program, module=vector)
        prompt.enter(CELL.format(factor=1.0))
        top = program.module("top")
        low = program.module("low")
        prompt.enter("\n\n" + CELL.format(factor=5.0))
        assert program.levels["low"].function is prompt.names["lower"]
        assert program.module("top") is top
        assert program.module("low") is not low

    def test_at_a_prompt_is_used_by_the_next_hypergradient(self, program):
        prompt = Prompt(program=program, module=vector)
        prompt.enter(CELL.format(factor=1.0))
        program.level("top", lower=["low"], module=vector, hypergrad="identity")(
            lambda own, low: ((low.x + 1) ** 2).sum()
        )
        once = mlodeco.hypergradient("top", program=program)["x"]
        prompt.enter(CELL.format(factor=5.0))
        assert torch.allclose(mlodeco.hypergradient("top", program=program)["x"], 5 * once)

    def test_that_is_turned_into_an_error_leaves_no_trace(self, program):
        prompt = Prompt(program=program, module=vector)
        prompt.enter(CELL.format(factor=1.0))
        before = dict(program.levels), program.version
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RedeclarationWarning):
                prompt.enter(CELL.format(factor=5.0).replace("lower", "another"))
        assert (dict(program.levels), program.version) == before

    def test_at_a_prompt_replaces_a_level_whatever_its_function_is_called(self, program):
        prompt = Prompt(program=program, module=vector)
        prompt.enter(CELL.format(factor=1.0))
        with pytest.warns(RedeclarationWarning, match=r"level 'low' \(<stdin>:\d+\)") as caught:
            prompt.enter(CELL.format(factor=1.0).replace("lower", "another"))
        assert len(caught) == 1
        assert caught[0].filename == "<stdin>"
        assert program.levels["low"].function.__name__ == "another"

    def test_in_a_module_is_an_error(self, program):
        declare_pair(program)
        before = dict(program.levels)
        with pytest.raises(DeclarationError, match=r"declared twice, first at test_declare\.py:"):
            declare_pair(program)
        assert program.levels == before

    def test_of_hooks_and_validations_at_a_prompt_replaces_them(self, program):
        program.level("low", module=vector, optimizer=sgd)(square)
        seen: list[int] = []
        code = """
@program.on("after_step")
@program.on("run_end")
def hook():
    seen.append({number})

@program.validate
def check(low):
    return {{"number": {number}}}

@program.method("mine")
def solve(matvec, b):
    return b
"""
        prompt = Prompt(program=program, seen=seen)
        prompt.enter(code.format(number=1))
        prompt.enter("\n" + code.format(number=2))
        result = run(program)
        assert seen == [2, 2]
        assert [record.metrics for record in result.history.validations] == [{"number": 2.0}]

    def test_twice_in_one_input_says_so(self, program):
        prompt = Prompt(program=program, module=vector)
        with pytest.warns(RedeclarationWarning, match="level 'low'"):
            prompt.enter(2 * CELL.format(factor=1.0))

    @pytest.mark.parametrize(
        "code",
        [
            # in a loop, by a class, by partials, of a function from elsewhere
            "for n in (1, 2):\n    program.on('run_end')(lambda n=n: seen.append(n))",
            "for n in (1, 2):\n    @program.on('run_end')\n    def _(n=n): seen.append(n)",
            "for n in (1, 2):\n    @program.on('run_end')\n    def hook(n=n): seen.append(n)",
            "class Log:\n    def __init__(self, n): self.n = n\n"
            "    def note(self): seen.append(self.n)\n"
            "one, two = Log(1), Log(2)\n"
            "program.on('run_end')(one.note)\nprogram.on('run_end')(two.note)",
            "program.on('run_end')(partial(note, 1))\nprogram.on('run_end')(partial(note, 2))",
        ],
    )
    def test_of_hooks_in_one_input_adds_them_and_another_run_of_it_replaces_all(
        self, program, code
    ):
        program.level("low", module=vector, optimizer=sgd)(square)
        seen: list[int] = []

        def note(n):
            seen.append(n)

        program.on("run_end")(lambda: seen.append(3))
        prompt = Prompt(program=program, seen=seen, partial=functools.partial, note=note)
        prompt.enter("program.on('run_end')(lambda: seen.append(0))")
        for _ in range(3):
            prompt.enter(code)
        assert len(program.hooks) == 4
        run(program)
        assert seen == [3, 0, 1, 2]

    def test_of_nameless_hooks_of_several_inputs_adds_them(self, program):
        prompt = Prompt(program=program)
        for number in range(3):
            prompt.enter(f"program.on('run_end')(lambda: {number})")
            prompt.enter(f"@program.on('run_end')\ndef _(): return {number}")
        assert len(program.hooks) == 6

    def test_keeps_the_place_of_a_hook(self, program):
        prompt = Prompt(program=program)
        code = "@program.on('run_end')\ndef {name}(): pass"
        for name in ("a", "b", "c", "b"):
            prompt.enter(code.format(name=name))
        assert [hook.site.name for hook in program.hooks] == ["a", "b", "c"]
        assert program.hooks[1].function is prompt.names["b"]

    def test_of_a_hook_at_another_event_says_so(self, program):
        prompt = Prompt(program=program)
        code = "@program.on('{event}')\ndef hook(): pass"
        prompt.enter(code.format(event="run_start"))
        with pytest.warns(RedeclarationWarning, match="the hook 'hook' on 'run_start'"):
            prompt.enter(code.format(event="run_end"))
        assert [hook.event for hook in program.hooks] == ["run_end"]

    def test_of_a_monitor_at_a_prompt_replaces_it(self, program):
        prompt = Prompt(program=program)
        code = "@program.validate(monitor='{name}', mode='min')\ndef check(): pass"
        prompt.enter(code.format(name="a"))
        prompt.enter(code.format(name="b"))
        assert [validation.monitor for validation in program.validations] == ["b"]

    def test_of_fewer_hooks_leaves_none_of_the_former(self, program):
        prompt = Prompt(program=program)
        code = "for event in {events}:\n    @program.on(event)\n    def note(): pass"
        prompt.enter(code.format(events=["after_step", "loop_end", "before_step"]))
        prompt.enter("@program.on('run_end')\ndef other(): pass")
        for events in (["loop_end", "after_step"], ["after_step"]):
            prompt.enter(code.format(events=events))
            assert [hook.event for hook in program.hooks] == [*events, "run_end"]

    def test_keeps_the_order_of_a_cell(self, program):
        prompt = Prompt(program=program)
        code = (
            "for n in range({count}):\n"
            "    @program.on('run_end')\n    def a(): pass\n"
            "    @program.on('run_end')\n    def b(): pass\n"
        )
        prompt.enter(code.format(count=2))
        prompt.enter("@program.on('run_end')\ndef z(): pass")
        for count in (2, 3, 1):
            prompt.enter(code.format(count=count))
            names = [hook.site.name for hook in program.hooks]
            assert names == [*count * ["a", "b"], "z"]

    def test_of_two_hooks_in_one_cell_leaves_another_between_them(self, program):
        prompt = Prompt(program=program)
        code = "@program.on('run_end')\ndef {name}(): pass\n"
        for name in ("a", "b", "c"):
            prompt.enter(code.format(name=name))
        prompt.enter(code.format(name="a") + code.format(name="c"))
        assert [hook.site.name for hook in program.hooks] == ["a", "b", "c"]

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("first.note", "second.note"),
            ("first", "second"),
            ("partial(note, n=1)", "partial(note, n=2)"),
            ("partial(note, 1)", "partial(note, n=1)"),
            ("partial(note, first)", "partial(note, second)"),
            ("make(1)", "make(2)"),
        ],
    )
    def test_of_a_callable_is_told_from_another_of_its_code(self, program, one, other):
        prompt = Prompt(program=program, partial=functools.partial)
        prompt.enter(
            "class Log:\n"
            "    def note(self): pass\n"
            "    def __call__(self): pass\n"
            "first, second = Log(), Log()\n"
            "def note(n): pass\n"
            "def make(n):\n"
            "    def hook(): return n\n"
            "    return hook\n"
        )
        code = "program.on('run_end')({})"
        for text in (one, other, one, other):
            prompt.enter(code.format(text))
        assert len(program.hooks) == 2
        if "make" not in one:  # which makes another function whenever it is called
            prompt.enter("program.on('run_end', every=2)(" + one + ")")
            assert [hook.every for hook in program.hooks] == [2, 1]

    def test_of_a_method_of_an_object_that_was_made_anew_replaces_it(self, program):
        prompt = Prompt(program=program)
        prompt.enter("class Log:\n    def note(self): pass")
        for text in ("log = Log()", "log = Log()", "log = Log()"):
            prompt.enter(text + "\nprogram.on('run_end')(log.note)")
        assert [hook.function for hook in program.hooks] == [prompt.names["log"].note]

    def test_of_a_monitored_validation_by_another_at_a_prompt_replaces_it_and_says_so(
        self, program
    ):
        prompt = Prompt(program=program)
        code = "@program.validate(monitor='e', mode='min')\ndef {name}(): pass\n"
        prompt.enter(code.format(name="check"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RedeclarationWarning):
                prompt.enter(code.format(name="renamed"))
        assert [each.site.name for each in program.validations] == ["check"]
        with pytest.warns(RedeclarationWarning, match="'check'.*'renamed'.*monitor= out") as caught:
            prompt.enter(code.format(name="renamed"))
        assert len(caught) == 1
        assert [each.site.name for each in program.validations] == ["renamed"]

    def test_of_two_monitored_validations_in_one_input_is_an_error(self, program):
        code = "@program.validate(monitor='e', mode='min')\ndef {name}(): pass\n"
        with pytest.raises(DeclarationError, match="'e' already"):
            Prompt(program=program).enter(code.format(name="a") + code.format(name="b"))

    def test_of_a_tracked_object_at_a_prompt_replaces_it(self, program):
        class Kept:
            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        prompt = Prompt(program=program, Kept=Kept)
        for _ in range(2):
            prompt.enter("kept = program.track('kept', Kept())")
        assert program.tracked == {"kept": prompt.names["kept"]}

    def test_behind_a_runner_is_told_to_it_once_and_changes_nothing_in_it(self, program):
        prompt = Prompt(program=program, module=vector)
        alone = CELL.replace(", top", "").replace("- top.x", "")
        prompt.enter(alone.format(factor=1.0))
        runner = mlodeco.Runner(program)
        first = runner.step().steps[0].loss
        prompt.enter(alone.format(factor=5.0))
        with pytest.warns(RedeclarationWarning, match="make a new one") as caught:
            runner.run(2)
        assert len(caught) == 1
        assert runner.history.losses("low")[1] < first
        fresh = mlodeco.Runner(program)
        assert fresh.step().steps[0].loss == pytest.approx(5 * first)

    def test_of_hooks_in_a_module_adds_them(self, program):
        program.level("low", module=vector, optimizer=sgd)(square)
        seen = []
        for _ in range(2):
            program.on("run_end")(lambda: seen.append(1))
        run(program)
        assert seen == [1, 1]


class TestRebuilding:
    def test_after_a_run_keeps_the_modules_of_other_levels(self, program):
        declare_pair(program)
        run(program, 3)
        low, top = program.module("low"), program.module("top")
        values = low.x.detach().clone()
        program.level("more", module=vector, optimizer=sgd)(lambda own, low: (own.x * low.x).sum())
        assert program.module("low") is low
        assert program.module("top") is top
        assert torch.equal(low.x, values)
        assert [r.level for r in run(program).history.steps] == ["low", "more", "top"]
        assert not torch.equal(low.x, values)

    def test_after_a_hook_or_validation_keeps_every_module(self, program):
        declare_pair(program)
        run(program)
        low = program.module("low")
        program.on("run_end")(lambda: None)
        program.validate(lambda low: {"x": low.x.sum()})
        run(program)
        assert program.module("low") is low

    def test_continues_with_modules_as_they_are(self, program):
        declare_pair(program)
        run(program, 2)
        values = program.module("low").x.detach().clone()
        assert run(program).history.of("low")[0].step == 1
        assert not torch.equal(program.module("low").x, values)
        first = run(program).history.losses("low")[0]
        assert first < 2.0

    def test_forgets_all_at_a_reset_but_the_declarations(self, program):
        declare_pair(program)
        run(program, 3)
        low = program.module("low")
        program.reset()
        assert list(program.levels) == ["low", "top"]
        assert program.module("low") is not low
        assert torch.equal(program.module("low").x, vector()["x"])

    def test_keeps_a_module_that_was_given_as_an_object_at_a_reset(self, program):
        module = nn.ParameterDict(vector())
        program.level("low", module=module, optimizer=sgd)(square)
        run(program)
        program.reset()
        assert program.module("low") is module

    def test_after_a_failed_declaration_does_nothing(self, program):
        declare_pair(program)
        low = program.module("low")
        built = program.built
        with pytest.raises(DeclarationError):
            program.level("more", module=None)(square)
        assert program.module("low") is low
        assert program.built is built


class TestLaziness:
    def test_calls_factories_at_first_use_and_once(self, program):
        calls: list[str] = []

        def factory(name):
            calls.append(name)
            return nn.ParameterDict(vector())

        def optimizer(params):
            calls.append("optimizer")
            return SGD(params, lr=0.1)

        def data():
            calls.append("data")
            return [torch.ones(2)]

        program.level(
            "low", module=functools.partial(factory, "low"), optimizer=optimizer, data=data
        )(lambda own, batch, top: ((own.x - top.x * batch) ** 2).sum())
        program.level(
            "top", lower=["low"], module=functools.partial(factory, "top"), optimizer=sgd
        )(lambda own, low: (low.x * own.x).sum())
        assert calls == []
        program.graph()
        program.module("low")
        program.module("top")
        assert calls == ["low", "top"]
        mlodeco.hypergradient("top", program=program)
        run(program, 2)
        run(program, 2)
        assert calls.count("low") == calls.count("top") == 1
        assert calls.count("optimizer") == 2
        assert calls.count("data") == 3

    def test_calls_no_factory_if_the_declarations_do_not_fit(self, program):
        calls: list[int] = []
        program.level("low", module=lambda: calls.append(1))(lambda own, nobody: square(own))
        with pytest.raises(mlodeco.errors.BindingError):
            program.module("low")
        assert calls == []

    def test_seeds_before_modules_are_built(self):
        found = []
        for _ in range(2):
            p = Program()
            p.level("low", module=lambda: nn.Linear(3, 3), optimizer=sgd)(
                lambda own: own.weight.sum()
            )
            run(p, seed=5)
            found.append(p.module("low").weight.detach())
        assert torch.equal(*found)

    def test_copies_the_tensors_of_a_mapping(self, program):
        values = torch.ones(2)
        program.level("low", module={"x": values}, optimizer=sgd)(square)
        run(program, 3)
        assert torch.equal(values, torch.ones(2))
        module = program.module("low")
        assert isinstance(module, nn.ParameterDict)
        assert module.x is module["x"]

    def test_keeps_frozen_parameters_of_a_mapping_frozen(self, program):
        fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        program.level("low", module={"x": torch.ones(2), "fixed": fixed}, optimizer=sgd)(
            lambda own: square(own) * own.fixed.sum()
        )
        run(program)
        assert torch.equal(program.module("low").fixed, fixed)

    def test_shares_the_module_of_another_level(self, program):
        program.level("body", module="whole", params=lambda n: n == "x", optimizer=sgd)(square)
        program.level(
            "head",
            module="body",
            params=lambda n: n == "y",
            optimizer=sgd,
        )(lambda own: (own.x * own.y).sum())
        program.level(
            "whole",
            module={**vector(), "y": torch.ones(2), "z": torch.ones(2)},
            params=lambda n: n == "z",
            optimizer=sgd,
        )(lambda own: (own.z**2).sum())
        assert program.module("body") is program.module("head") is program.module("whole")
        before = {name: p.detach().clone() for name, p in program.module("whole").items()}
        assert [r.level for r in run(program).history.steps] == ["body", "head", "whole"]
        after = program.module("whole")
        assert not any(torch.equal(after[name], before[name]) for name in before)
