"""What a newcomer is told: every mistake, its message, and that nothing was changed by it."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import re
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import mlodeco
from mlodeco import Program
from mlodeco.errors import (
    BindingError,
    DataError,
    DeclarationError,
    GraphError,
    GraphWarning,
    LossError,
    MethodError,
    MlodecoError,
    ModuleError,
    ModuleWarning,
    NonFiniteError,
    OptimizerError,
    RunError,
)
from mlodeco.hypergrad import CG, Dense, FiniteDifference, Identity, Neumann, Nystrom

sgd = functools.partial(SGD, lr=0.05, momentum=0.9)


def size(module: nn.Module) -> Any:
    return sum((p**2).sum() for p in module.parameters())


def lower_loss(own, batch, other):
    x, y = batch
    losses = ((own(x) - y) ** 2)[:, 0]
    return (other(losses.detach()[:, None])[:, 0].sigmoid() * losses).mean() + 0.1 * size(own)


def upper_loss(own, batch, other):
    x, y = batch
    return ((other(x) - y) ** 2).mean()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


class Bilevel:
    """A good program, and others that differ from it in a mistake, on the same modules."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.low = nn.Sequential(
                nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
            )
            self.top = nn.Linear(1, 1)
            data = TensorDataset(torch.randn(8, 3), torch.randn(8, 1))
            for parameter in (*self.low.parameters(), *self.top.parameters()):
                parameter.grad = torch.randn_like(parameter)
        self.loader = DataLoader(data, batch_size=4, shuffle=True)
        self.program = self.declare()
        self.program.on("after_step")(lambda ctx: None)
        self.program.validate(lambda low: {"size": size(low)})
        self.program.method("mine")(lambda matvec, b: b)

    def declare(self, **changes: Any) -> Program:
        """``low={...}`` and ``top={...}`` change options; ``function`` is one of them."""
        common = {"optimizer": sgd, "data": self.loader}
        low = {"function": lower_loss, "module": self.low, "reads": {"other": "top"}}
        top = {
            "function": upper_loss,
            "module": self.top,
            "reads": {"other": "low"},
            "hypergrad": "identity",
        }
        program = Program()
        for name, options in (("low", low), ("top", {**top, "lower": ["low"]})):
            chosen = {**common, **options, **changes.get(name, {})}
            program.level(name, **{k: v for k, v in chosen.items() if k != "function"})(
                chosen["function"]
            )
        return program

    def run(self, **changes: Any) -> Any:
        return run(self.declare(**changes))

    def hypergradient(self, level: str = "top", **changes: Any) -> Any:
        return mlodeco.hypergradient(level, program=self.declare(**changes))

    def add(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Adds a level ``new`` to the good program."""
        chosen = {"module": {"x": torch.zeros(2)}, "optimizer": sgd, **options}
        name = chosen.pop("name", "new")
        return self.program.level(name, **chosen)(function or new_loss)

    def declared(self) -> Any:
        p = self.program
        return dict(p.levels), list(p.hooks), list(p.validations), dict(p.methods), p.version

    def state(self) -> dict[str, bytes]:
        return {**bits("low", self.low), **bits("top", self.top), **streams()}


def new_loss(own):
    return size(own)


def of_task(own, item):
    return size(own) * item


def run_alone(function: Callable[..., Any], *, source: bool = False, **options: Any) -> Any:
    """Runs a program of one level ``new``, perhaps with a source ``task``."""
    program = Program()
    if source:
        program.source("task")([1.0])
    program.level("new", module={"x": torch.zeros(2)}, optimizer=sgd, **options)(function)
    return run(program)


def run(program: Program, **options: Any) -> Any:
    return mlodeco.run(**{"steps": 1, "program": program, "progress": "off", **options})


def bits(prefix: str, module: nn.Module) -> dict[str, bytes]:
    tensors = {f"{prefix}.{key}": value for key, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            tensors[f"{prefix}.{name}.grad"] = parameter.grad
    return {key: value.detach().numpy().tobytes() for key, value in tensors.items()}


def streams() -> dict[str, bytes]:
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": repr(random.getstate()).encode(),
        "numpy": repr(np.random.get_state()[1:]).encode() + np.random.get_state()[1].tobytes(),
    }


@dataclass(frozen=True)
class Mistake:
    """``level`` is the one at fault; ``located``: whether a function of the user's is."""

    name: str
    make: Callable[[Bilevel], Any]
    error: type[MlodecoError]
    culprit: str
    remedy: str
    level: str | None = None
    located: bool = True
    after_steps: bool = False


def of_levels() -> list[Mistake]:
    def lower_as(value: Any) -> Callable[[Bilevel], Any]:
        return lambda g: g.add(lower=value)

    def circle_of_two(g: Bilevel) -> None:
        p = Program()
        p.level("one", lower=["two"], module=g.low)(lower_loss)
        p.level("two", lower=["one"], module=g.top)(upper_loss)

    def circle_of_three(g: Bilevel) -> None:
        p = Program()
        for name, low in (("one", "two"), ("two", "three"), ("three", "one")):
            p.level(name, lower=[low], module=g.low)(lower_loss)

    def misspelt(own, batch, lwo):
        return size(own)

    def misspelt_with_default(own, batc=None):
        return size(own)

    def unmatched(own, batch, teacher):
        return size(own)

    return [
        Mistake(
            "an unknown lower level",
            lambda g: g.run(top={"lower": ["low", "xyz"]}),
            GraphError,
            "'xyz'",
            "import the module that declares it",
            "top",
        ),
        Mistake(
            "a misspelt lower level",
            lambda g: g.run(top={"lower": ["lwo"]}),
            GraphError,
            "'lwo'",
            "Did you mean 'low'?",
            "top",
        ),
        Mistake(
            "a circle of two levels",
            circle_of_two,
            GraphError,
            "one -> two -> one",
            "remove one of these from lower=",
            "two",
        ),
        Mistake(
            "a circle of three levels",
            circle_of_three,
            GraphError,
            "one -> two -> three -> one",
            "remove one of these from lower=",
            "three",
        ),
        Mistake(
            "its own name in lower",
            lower_as(["new"]),
            DeclarationError,
            "the level itself, 'new'",
            "name other levels",
            "new",
        ),
        Mistake(
            "a name twice in lower",
            lower_as(["low", "low"]),
            DeclarationError,
            "'low' twice",
            "once",
            "new",
        ),
        Mistake(
            "lower as a string",
            lower_as("low"),
            DeclarationError,
            "lower='low' is a string",
            "lower=['low']",
            "new",
        ),
        Mistake(
            "lower as a number", lower_as(3), DeclarationError, "lower=3", "lower=['name'", "new"
        ),
        Mistake(
            "a function in lower",
            lower_as([lower_loss]),
            DeclarationError,
            "lower_loss",
            "by the string",
            "new",
        ),
        Mistake(
            "reads as a string",
            lambda g: g.add(reads="low"),
            DeclarationError,
            "reads='low'",
            "reads=['low']",
            "new",
        ),
        Mistake(
            "reads of an unknown level",
            lambda g: g.run(low={"reads": {"other": "topp"}}),
            BindingError,
            "'topp'",
            "Did you mean 'top'?",
            "low",
        ),
        Mistake(
            "reads of itself",
            lambda g: g.run(low={"reads": {"other": "low"}}),
            BindingError,
            "the level itself",
            "name a declared level",
            "low",
        ),
        Mistake(
            "reads of nothing there is",
            lambda g: run_alone(new_loss, reads=["zz"]),
            BindingError,
            "'zz', no level or source",
            "name a declared level or source",
            "new",
        ),
        Mistake(
            "reads of a misspelt source",
            lambda g: run_alone(of_task, source=True, reads={"item": "tsak"}),
            BindingError,
            "'tsak', no level or source",
            "Did you mean 'task'?",
            "new",
        ),
        Mistake(
            "reads of an argument that is not there",
            lambda g: g.run(low={"reads": {"othr": "top"}}),
            BindingError,
            "'othr'",
            "Did you mean 'other'?",
            "low",
        ),
        Mistake(
            "a level declared twice",
            lambda g: g.add(name="low"),
            DeclarationError,
            "'low' is declared twice, first at test_errors.py:",
            "rename one of them",
            "low",
        ),
        Mistake(
            "an argument that names nothing",
            lambda g: g.run(low={"function": unmatched, "reads": ()}),
            BindingError,
            "'teacher'",
            "declare a level or a source of that name, map it by reads={'teacher': 'name'}",
            "low",
        ),
        Mistake(
            "a misspelt argument",
            lambda g: g.run(top={"function": misspelt, "reads": ()}),
            BindingError,
            "'lwo'",
            "Did you mean 'low'?",
            "top",
        ),
        Mistake(
            "a misspelt argument in spite of its default",
            lambda g: g.run(top={"function": misspelt_with_default, "reads": ["low"]}),
            BindingError,
            "'batc'",
            "Did you mean 'batch'?",
            "top",
        ),
        Mistake(
            "a level as the name of a field",
            lambda g: g.run(low={"fields": ("x", "top")}),
            BindingError,
            "field 'top' is a level",
            "rename the field",
            "low",
        ),
        Mistake(
            "a reserved name as a field",
            lambda g: g.run(low={"fields": ("x", "ctx")}),
            BindingError,
            "field 'ctx' is reserved",
            "rename the field",
            "low",
        ),
        Mistake(
            "a level as a key of data",
            lambda g: g.run(low={"data": {"top": g.loader}}),
            BindingError,
            "loader 'top' is a level",
            "rename the loader",
            "low",
        ),
        Mistake(
            "a reserved level name",
            lambda g: g.add(name="batch"),
            DeclarationError,
            "'batch' is reserved",
            "choose another name",
            "batch",
        ),
        Mistake(
            "an empty level name",
            lambda g: g.add(name=" "),
            DeclarationError,
            "the level's name is ' '",
            "give the level a name",
            " ",
        ),
        Mistake(
            "a number as level name",
            lambda g: g.add(name=3),
            DeclarationError,
            "the level's name is 3",
            "give the level a name",
        ),
        Mistake(
            "@level without a name",
            lambda g: g.program.level(new_loss),
            DeclarationError,
            "without a name",
            "@level('name'",
        ),
    ]


def of_functions() -> list[Mistake]:
    async def waits(own, batch):
        return size(own)

    def yields(own, batch):
        yield size(own)

    async def both(own, batch):
        yield size(own)

    class Loss:
        def __call__(self, own, batch):
            return size(own)

    def method(g: Bilevel) -> None:
        class Trainer:
            @g.program.level("new", module={"x": torch.zeros(2)})
            def loss(self, own, batch):
                return size(own)

    def rows(name: str, function: Any, culprit: str, remedy: str) -> Mistake:
        return Mistake(
            name, lambda g: g.add(function), DeclarationError, culprit, remedy, "new", True
        )

    return [
        rows("an async function", waits, "async function", "def, not async def"),
        rows("an async generator", both, "async function", "def, not async def"),
        rows("a generator function", yields, "generator function", "return the result"),
        rows("a class", Loss, "the class 'Loss'", "an object with __call__"),
        rows("a number instead of a function", 3, "3, which is not a function", "above a function"),
        Mistake(
            "a method without an object",
            method,
            DeclarationError,
            "Trainer.loss'",
            "decorate the bound method",
            "new",
        ),
        Mistake(
            "an async hook",
            lambda g: g.program.on("run_start")(waits),
            DeclarationError,
            "@on decorates an async function",
            "def, not async def",
        ),
        Mistake(
            "a generator as validation",
            lambda g: g.program.validate(yields),
            DeclarationError,
            "@validate decorates a generator",
            "return the result",
        ),
    ]


def of_options() -> list[Mistake]:
    def option(name: str, options: dict[str, Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(name, lambda g: g.add(**options), DeclarationError, culprit, remedy, "new")

    def on(name: str, make: Callable[[Program], Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(
            name, lambda g: make(g.program)(lambda: None), DeclarationError, culprit, remedy
        )

    return [
        option("an unknown option", {"zebra": 1}, "no option 'zebra'", "correct or remove it"),
        option("a misspelt option", {"optimiser": sgd}, "'optimiser'", "mean 'optimizer'?"),
        option("inner_steps=0", {"inner_steps": 0}, "inner_steps=0", "inner_steps=1"),
        option("inner_steps=True", {"inner_steps": True}, "inner_steps=True", "inner_steps=1"),
        option("repeat=1.5", {"repeat": 1.5}, "repeat=1.5", "repeat=1"),
        option("warmup=-1", {"warmup": -1}, "warmup=-1", "warmup=0"),
        option("accumulate=0", {"accumulate": 0}, "accumulate=0", "accumulate=1"),
        option("clip_norm=0", {"clip_norm": 0}, "clip_norm=0", "clip_norm=1.0"),
        option("clip_norm as text", {"clip_norm": "1"}, "clip_norm='1'", "clip_norm=1.0"),
        option("rollback as text", {"rollback": "yes"}, "rollback='yes'", "rollback=True"),
        option("fields as a string", {"fields": "xy"}, "fields='xy'", "fields=['xy']"),
        option("optimizer as text", {"optimizer": "sgd"}, "optimizer='sgd'", "functools.partial"),
        option("scheduler as a number", {"scheduler": 3}, "scheduler=3", "functools.partial"),
        option("params as a string", {"params": "head"}, "params='head'", "lambda name"),
        option("params as a number", {"params": 3}, "params=3", "lambda name"),
        on("an option of @on", lambda p: p.on("run_end", evry=2), "'evry'", "mean 'every'?"),
        on("an unknown event", lambda p: p.on("sunrise"), "'sunrise'", "choose one of them"),
        on("a misspelt event", lambda p: p.on("after_stp"), "'after_stp'", "mean 'after_step'?"),
        on("every=0 of a hook", lambda p: p.on("run_end", every=0), "every=0", "every=1"),
        on(
            "a level of a run's event",
            lambda p: p.on("run_end", "low"),
            "belongs to the run",
            "leave level out",
        ),
        on("an option of @validate", lambda p: p.validate(evry=2), "'evry'", "mean 'every'?"),
        on("a misspelt mode", lambda p: p.validate(mode="mn"), "mode='mn'", "mean 'min'?"),
        on("monitor as a number", lambda p: p.validate(monitor=3), "monitor=3", "name one of"),
        on(
            "patience without monitor",
            lambda p: p.validate(patience=3),
            "monitor is not",
            "monitor='accuracy', mode='max'",
        ),
        on(
            "monitor without mode",
            lambda p: p.validate(monitor="accuracy"),
            "monitor='accuracy' is set and mode is not",
            "mode='max' for an accuracy",
        ),
        on("@method without a name", lambda p: p.method, "without a name", "@method('name')"),
        on("a method's name", lambda p: p.method("my method"), "'my method'", "like a variable"),
        on("a method declared twice", lambda p: p.method("mine"), "'mine'", "rename one"),
    ]


def short_solver(b):
    return b


def idle_solver(matvec, b):
    matvec(b)


def of_methods() -> list[Mistake]:
    def bad(make: Callable[[], Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(culprit, lambda g: make(), MethodError, culprit, remedy, located=False)

    def needs(value):
        class Needs:
            def __init__(self, terms):
                self.terms = terms

            def solve(self, matvec, b):
                return b

        return Needs

    return [
        Mistake(
            "an unknown method",
            lambda g: g.run(top={"hypergrad": "magic"}),
            MethodError,
            "'magic'",
            "@method('magic')",
            "top",
        ),
        Mistake(
            "a misspelt method",
            lambda g: g.run(top={"hypergrad": "newman"}),
            MethodError,
            "'newman'",
            "Did you mean 'neumann'?",
            "top",
        ),
        Mistake(
            "a misspelt method of hypergradient()",
            lambda g: mlodeco.hypergradient("top", program=g.program, hypergrad="newman"),
            MethodError,
            "'newman'",
            "Did you mean 'neumann'?",
            located=False,
        ),
        Mistake(
            "a number as method",
            lambda g: g.run(top={"hypergrad": 3}),
            MethodError,
            "hypergrad=3",
            "'neumann'",
            "top",
        ),
        Mistake(
            "a class that needs arguments as method",
            lambda g: g.run(top={"hypergrad": needs(0)}),
            MethodError,
            "without arguments",
            "hypergrad=Method(...)",
            "top",
        ),
        Mistake(
            "hypergrad of a leaf",
            lambda g: g.add(hypergrad="cg"),
            DeclarationError,
            "hypergrad='cg' on a level without lower levels",
            "add lower=[...]",
            "new",
        ),
        Mistake(
            "an unknown key of hypergrad",
            lambda g: g.run(top={"hypergrad": {"lwo": "cg"}}),
            MethodError,
            "'lwo'",
            "Did you mean 'low'?",
            "top",
        ),
        bad(lambda: Neumann(num_terms=0), "Neumann(num_terms=0)", "num_terms=1"),
        bad(lambda: Neumann(num_terms=2.0), "Neumann(num_terms=2.0)", "num_terms=1"),
        bad(lambda: Neumann(step_size=-1), "Neumann(step_size=-1)", "above zero"),
        bad(lambda: Neumann(step_size="atuo"), "Neumann(step_size='atuo')", "above zero"),
        bad(lambda: Neumann(power_steps=0), "Neumann(power_steps=0)", "power_steps=1"),
        bad(lambda: CG(max_steps=0), "CG(max_steps=0)", "max_steps=1"),
        bad(lambda: CG(10), "CG(10) does not name", "write CG(max_steps=10)."),
        bad(lambda: CG(0.1), "CG(0.1) does not name", "write CG(damping=0.1)."),
        bad(lambda: CG("forward"), "CG('forward') does", "write CG(product='forward')."),
        bad(lambda: Neumann(10, 0.1), "Neumann(10, 0.1)", "write Neumann(num_terms=10)."),
        bad(lambda: Nystrom(5), "Nystrom(5) does not name", "write Nystrom(rank=5)."),
        bad(lambda: Dense(9), "Dense(9) does not name", "write Dense(max_size=9)."),
        bad(lambda: Identity(2), "Identity(2) does not name", "write Identity(scale=2)."),
        bad(lambda: CG(num_terms=4), "'num_terms'", "Perhaps CG(max_steps=4) is meant."),
        bad(lambda: CG(dampign=1), "'dampign'", "Did you mean 'damping'?"),
        bad(lambda: Identity(damping=1), "no option 'damping'", "correct or remove it."),
        bad(
            lambda: CG(curvature_batch=0),
            "CG(curvature_batch=0)",
            "curvature_batch=1.0 for the whole",
        ),
        Mistake(
            "a negative damping of check()",
            lambda g: mlodeco.check("top", program=g.program, damping=-1),
            RunError,
            "damping=-1.",
            "leave it out",
            located=False,
        ),
        Mistake(
            "a solver without a right-hand side",
            lambda g: g.run(top={"hypergrad": short_solver}),
            MethodError,
            "the method 'short_solver' (test_errors.py:",
            "the product with the Hessian and the right-hand side",
            "top",
        ),
        Mistake(
            "a solver that returns nothing",
            lambda g: g.run(top={"hypergrad": idle_solver}),
            MethodError,
            "the method 'idle_solver' (test_errors.py:",
            "return a dictionary",
            "low",
            after_steps=True,
        ),
        bad(lambda: CG(rtol=-1.0), "CG(rtol=-1.0)", "of at least zero"),
        bad(lambda: CG(damping=float("nan")), "CG(damping=nan)", "of at least zero"),
        bad(lambda: CG(product="revers"), "CG(product='revers')", "Did you mean 'reverse'?"),
        bad(lambda: Dense(max_size=0), "Dense(max_size=0)", "max_size=1"),
        bad(lambda: Dense(damping=-1), "Dense(damping=-1)", "of at least zero"),
        bad(lambda: Identity(scale=0), "Identity(scale=0)", "above zero"),
        bad(lambda: Identity(product=None), "Identity(product=None)", "'auto' suits"),
        bad(lambda: FiniteDifference(scale=-1), "FiniteDifference(scale=-1)", "above zero"),
        bad(lambda: FiniteDifference(radius=0.0), "FiniteDifference(radius=0.0)", "above zero"),
    ]


def of_losses() -> list[Mistake]:
    def vector(own, batch, other):
        return torch.stack([size(own), size(own)])

    def nothing(own, batch, other):
        size(own)

    def item(own, batch, other):
        return size(own).item()

    def integer(own, batch, other):
        return size(own).long()

    def without_loss(own, batch, other):
        return {"lss": size(own)}

    def pair(own, batch, other):
        return size(own), size(own)

    def nan(own, batch, other):
        return size(own) * size(other) * float("nan")

    def inf(own, batch, other):
        return size(own) * size(other) / 0.0

    def backward(own, batch, other):
        loss = size(own)
        loss.backward()
        return loss

    def autograd_backward(own, batch, other):
        loss = size(own)
        torch.autograd.backward(loss)
        return loss

    stepper = SGD([torch.zeros(1, requires_grad=True)], lr=0.1)

    def steps(own, batch, other):
        stepper.step()
        return size(own)

    def detached(own, batch, other):
        return size(own).detach()

    def under_no_grad(own, batch, other):
        with torch.no_grad():
            return size(own)

    def of_the_batch_alone(own, batch, other):
        return batch[0].sum()

    unused = "depends on none of the level's parameters"
    table: list[tuple[Callable[..., Any], type[MlodecoError], str, str]] = [
        (vector, LossError, "shape (2,)", "losses.mean()"),
        (nothing, LossError, "returned None", "return the loss"),
        (item, LossError, "returned float", "without .item()"),
        (integer, LossError, "torch.int64", "floating point"),
        (without_loss, LossError, "without 'loss': ['lss']", "return {'loss': loss"),
        (pair, LossError, "a loss and Tensor in a tuple", "must be a dictionary of metrics"),
        (nan, NonFiniteError, "the loss is nan", "learning rate"),
        (inf, NonFiniteError, "the loss is inf", "division by zero"),
        (backward, LossError, "calls .backward()", "return the loss"),
        (autograd_backward, LossError, "calls .backward()", "return the loss"),
        (steps, LossError, "steps an optimizer", "return the loss"),
        (detached, LossError, unused, "neither .detach()"),
        (under_no_grad, LossError, unused, "torch.no_grad()"),
        (of_the_batch_alone, LossError, unused, "use the level's module"),
    ]
    not_finite = "towards level 'top' is not finite", "the logarithm of zero"
    ways: dict[str, tuple[str, Callable[..., Any]]] = {
        "of a level in a run": ("low", lambda f, g: g.run(low={"function": f})),
        "of a lower level": ("low", lambda f, g: g.hypergradient(low={"function": f})),
        "of an upper level": ("top", lambda f, g: g.hypergradient(top={"function": f})),
    }
    silent = {(nan, "of a lower level"), (inf, "of a lower level")}
    return [
        Mistake(
            f"{function.__name__} {way}",
            functools.partial(act, function),
            error,
            *(not_finite if (function, way) in silent else (culprit, remedy)),
            level,
        )
        for function, error, culprit, remedy in table
        for way, (level, act) in ways.items()
    ]


def of_hidden_reads() -> list[Mistake]:
    def lower(g: Bilevel) -> Any:
        def loss(own, batch):
            return size(own) * size(g.top)

        return g.run(low={"function": loss, "reads": ()}, top={"hypergrad": None})

    def upper(g: Bilevel) -> Any:
        def loss(own, batch):
            return size(own) + size(g.low)

        return g.hypergradient(top={"function": loss, "reads": (), "hypergrad": None})

    return [
        Mistake(
            "a level read by a closure",
            lower,
            BindingError,
            "depends on the parameters of 'top'",
            "add reads=['top']",
            "low",
        ),
        Mistake(
            "a lower level read by a closure",
            upper,
            BindingError,
            "depends on the parameters of 'low'",
            "add reads=['low']",
            "top",
        ),
    ]


def of_optimizers() -> list[Mistake]:
    def low(name: str, option: Callable[[Bilevel], Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(
            name,
            lambda g: g.run(low={"optimizer": option(g)}),
            OptimizerError,
            culprit,
            remedy,
            "low",
        )

    def scheduler(name: str, factory: Any, culprit: str, remedy: str) -> Mistake:
        return Mistake(
            name,
            lambda g: g.run(low={"scheduler": factory}),
            OptimizerError,
            culprit,
            remedy,
            "low",
        )

    return [
        low("no optimizer", lambda g: None, "no optimizer", "functools.partial"),
        low("a factory of nothing", lambda g: lambda params: None, "returned NoneType", "return a"),
        low("LBFGS", lambda g: functools.partial(LBFGS, lr=1), "LBFGS", "use SGD, Adam"),
        low(
            "foreign parameters",
            lambda g: SGD([*g.low.parameters(), *g.top.parameters()], lr=1),
            "2 tensors that the level does not own",
            "the level's own parameters",
        ),
        low(
            "parameters left out",
            lambda g: SGD(list(g.low.parameters())[:-1], lr=1),
            "leaves out '3.bias'",
            "params=",
        ),
        scheduler("a factory of no scheduler", lambda o: 3, "returned int", "lr_scheduler"),
        scheduler(
            "ReduceLROnPlateau",
            lambda o: ReduceLROnPlateau(o),
            "ReduceLROnPlateau",
            "@on('loop_end'",
        ),
    ]


def of_data() -> list[Mistake]:
    def low(name: str, options: dict[str, Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(name, lambda g: g.run(low=options), DataError, culprit, remedy, "low")

    def exhausted() -> Any:
        iterator = (item for item in [1])
        next(iterator)
        return iterator

    tensors = torch.zeros(4, 3), torch.zeros(4, 1)

    def three(own, x, y, z, other):
        return size(own)

    def keyed(own, one, other):
        return size(own)

    return [
        low("no batches", {"data": []}, "empty", "the data set's size"),
        low(
            "a loader of too few samples",
            {"data": DataLoader(TensorDataset(*tensors), batch_size=8, drop_last=True)},
            "empty",
            "drop_last=True",
        ),
        low("an exhausted generator", {"data": exhausted()}, "a generator", "lambda:"),
        low("a fresh generator", {"data": (i for i in [tensors])}, "a generator", "lambda:"),
        low("an iterator of a loader", {"data": iter([tensors])}, "list_iterator", "lambda:"),
        low("tensors as data", {"data": tensors}, "one batch of tensors", "data=[(x, y)]"),
        low("a tensor as data", {"data": tensors[0]}, "one batch of tensors", "data=[(x, y)]"),
        low("a number as data", {"data": 3}, "a int, which is not iterable", "a DataLoader"),
        low("a batch without data", {"data": None}, "takes 'batch'", "give data="),
        low(
            "fields of another count",
            {"function": three, "fields": ("x", "y", "z"), "data": [tensors]},
            "tuple with 2 parts, fields= names 3",
            "every part of the batch",
        ),
        low(
            "fields of a tensor",
            {"function": three, "fields": ("x", "y", "z"), "data": [tensors[0]]},
            "Tensor with no parts",
            "every part of the batch",
        ),
        low(
            "an empty loader among others",
            {"function": keyed, "data": {"one": []}},
            "data['one']: the data are empty",
            "the data set's size",
        ),
        Mistake(
            "a batch of hypergradient() without the key",
            lambda g: mlodeco.hypergradient(
                "top",
                program=g.declare(low={"function": keyed, "data": {"one": g.loader}}),
                batches={"low": tensors},
            ),
            DataError,
            "no entry 'one'",
            "batches={'low': {'one': ...}}",
            "low",
        ),
    ]


def of_modules() -> list[Mistake]:
    def new(name: str, options: dict[str, Any], culprit: str, remedy: str) -> Mistake:
        return Mistake(name, lambda g: g.add(**options), DeclarationError, culprit, remedy, "new")

    def built(
        name: str,
        options: Callable[[Bilevel], dict[str, Any]],
        culprit: str,
        remedy: str,
        error: type[MlodecoError] = ModuleError,
    ) -> Mistake:
        return Mistake(name, lambda g: g.run(low=options(g)), error, culprit, remedy, "low")

    def reserved(key: str) -> Mistake:
        return built(
            f"the reserved key {key!r}",
            lambda g: {"module": {key: torch.zeros(1)}},
            f"{key!r}, which is an attribute",
            f"'{key}_value'",
        )

    def freeze(g: Bilevel) -> dict[str, Any]:
        module = copy.deepcopy(g.top)
        module.bias.requires_grad_(False)
        return {"module": module, "params": lambda name: True}

    def freeze_all(g: Bilevel) -> dict[str, Any]:
        return {"module": copy.deepcopy(g.top).requires_grad_(False)}

    return [
        new("no module", {"module": None}, "has no module", "module=Net"),
        new("a tensor as module", {"module": torch.zeros(2)}, "module=tensor", "{'name': tensor}"),
        new("its own name as module", {"module": "new"}, "the level itself", "another level"),
        built(
            "an unknown level as module",
            lambda g: {"module": "topp"},
            "'topp' names no known level",
            "Did you mean 'top'?",
            GraphError,
        ),
        built(
            "a factory of something else",
            lambda g: {"module": lambda: 3},
            "returned int",
            "return an nn.Module",
        ),
        reserved("keys"),
        reserved("items"),
        reserved("train"),
        built(
            "a key with a dot",
            lambda g: {"module": {"a.b": torch.zeros(1)}},
            "the key 'a.b'",
            "without dots",
        ),
        built(
            "a number as value", lambda g: {"module": {"x": 3.0}}, "'x' to float", "torch.tensor"
        ),
        built(
            "integers as value",
            lambda g: {"module": {"x": torch.zeros(2, dtype=torch.long)}},
            "'x' to torch.int64",
            "floating point",
        ),
        built(
            "a lazy module", lambda g: {"module": nn.LazyLinear(2)}, "no shape", "once on a batch"
        ),
        built(
            "a selection of nothing",
            lambda g: {"params": lambda name: name.startswith("head")},
            "no parameters to optimize",
            "'0.weight'",
        ),
        built("a frozen module", freeze_all, "no parameters to optimize", "require gradients"),
        built("a frozen parameter", freeze, "'bias', which do not require", "requires_grad_()"),
        built(
            "foreign parameters selected",
            lambda g: {"params": [*g.low.parameters(), *g.top.parameters()]},
            "2 entries that are not parameters",
            "select among",
        ),
        built(
            "a foreign parameter selected",
            lambda g: {"params": [*g.low.parameters(), g.top.bias]},
            "1 entry that is not a parameter",
            "select among",
        ),
        built(
            "a misspelt name of a parameter",
            lambda g: {"params": ["0.wieght"]},
            "'0.wieght'",
            "Did you mean '0.weight'?",
        ),
        built(
            "the name of a part of the module",
            lambda g: {"params": ["0"]},
            "'0', which is not a parameter",
            "Did you mean '0.weight', '0.bias'?",
        ),
        Mistake(
            "parameters of two levels",
            lambda g: g.run(top={"module": "low"}),
            ModuleError,
            "is optimized by level 'low' too",
            "params=lambda name",
            "top",
        ),
    ]


def of_runs() -> list[Mistake]:
    def steps(value: Any) -> Mistake:
        return Mistake(
            f"steps={value!r}",
            lambda g: run(g.program, steps=value),
            RunError,
            f"steps={value!r}",
            "run(steps=1000)",
            located=False,
        )

    def seed(value: Any) -> Mistake:
        return Mistake(
            f"seed={value!r}",
            lambda g: run(g.program, seed=value),
            RunError,
            f"seed={value!r}",
            "run(seed=0)",
            located=False,
        )

    def listening(*arguments: Any, **options: Any) -> Callable[[Bilevel], Any]:
        def act(g: Bilevel) -> Any:
            *on, function = arguments
            program = g.declare()
            program.on(*on, **options)(function)
            return run(program)

        return act

    def validating(function: Any, **options: Any) -> Callable[[Bilevel], Any]:
        def act(g: Bilevel) -> Any:
            program = g.declare()
            program.validate(**options)(function)
            return run(program)

        return act

    def name(row: str, make: Any, error: type[MlodecoError], culprit: str, remedy: str) -> Mistake:
        return Mistake(row, make, error, culprit, remedy, located=False)

    return [
        name("no levels", lambda g: run(Program()), RunError, "no levels", "@level('name'"),
        *map(steps, (0, -1, 2.5, True, "10")),
        *map(seed, (-1, 2**32, 1.5, "0", True)),
        name("a word", lambda g: run(g.program, progress="liv"), RunError, "'liv'", "mean 'live'?"),
        name(
            "an unknown level of hypergradient()",
            lambda g: mlodeco.hypergradient("topp", program=g.program),
            GraphError,
            "'topp'",
            "Did you mean 'top'?",
        ),
        name(
            "an unknown level of module()",
            lambda g: g.program.module("lwo"),
            GraphError,
            "'lwo'",
            "Did you mean 'low'?",
        ),
        name(
            "an unknown level of paths()",
            lambda g: g.program.graph().paths("lwo"),
            GraphError,
            "'lwo'",
            "Did you mean 'low'?",
        ),
        name(
            "an unknown level in batches",
            lambda g: mlodeco.hypergradient("top", program=g.program, batches={"lwo": 1}),
            RunError,
            "'lwo'",
            "Did you mean 'low'?",
        ),
        Mistake(
            "too few micro-batches",
            lambda g: mlodeco.hypergradient(
                "top", program=g.declare(low={"accumulate": 2}), batches={"low": [1]}
            ),
            RunError,
            "accumulate=2",
            "a list of 2 batches",
            "low",
        ),
        Mistake(
            "a hook that asks for what is not offered",
            listening("run_start", lambda batch: None),
            BindingError,
            "'batch', which is not offered",
            "rename or remove",
        ),
        Mistake(
            "a hook with a misspelt argument",
            listening("after_step", lambda optimiser: None),
            BindingError,
            "'optimiser'",
            "Did you mean 'optimizer'?",
        ),
        Mistake(
            "a hook on an unknown level",
            listening("after_step", "lwo", lambda: None),
            GraphError,
            "'lwo'",
            "Did you mean 'low'?",
        ),
        Mistake(
            "a validation of an unknown level",
            validating(lambda lwo: {}),
            BindingError,
            "'lwo'",
            "Did you mean 'low'?",
        ),
        Mistake(
            "a validation that returns a number",
            validating(lambda low: 0.5),
            LossError,
            "returned float",
            "return {'accuracy': value}",
            after_steps=True,
        ),
        Mistake(
            "a metric that is text",
            validating(lambda low: {"accuracy": "good"}),
            LossError,
            "'accuracy' of the validation '<lambda>' is a str",
            "return numbers",
            after_steps=True,
        ),
        Mistake(
            "an unknown metric",
            validating(lambda low: {"accuracy": 0.5}, monitor="acuracy", mode="max"),
            DataError,
            "'acuracy'",
            "Did you mean 'accuracy'?",
            after_steps=True,
        ),
        Mistake(
            "a validation with batch and without data",
            validating(lambda low, batch: {"accuracy": 0.5}),
            BindingError,
            "the validation '<lambda>' asks for 'batch'",
            "give data= to @validate",
        ),
        Mistake(
            "empty validation data",
            validating(lambda low, batch: {"accuracy": 0.5}, data=[]),
            DataError,
            "empty",
            "at least one batch",
            after_steps=True,
        ),
    ]


MISTAKES = [
    *of_levels(),
    *of_functions(),
    *of_options(),
    *of_methods(),
    *of_losses(),
    *of_hidden_reads(),
    *of_optimizers(),
    *of_data(),
    *of_modules(),
    *of_runs(),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_names_the_mistake_and_its_remedy_and_changes_nothing(mistake):
    good = Bilevel()
    declared, state = good.declared(), good.state()
    with pytest.raises(mistake.error) as caught:
        mistake.make(good)
    error, text = caught.value, str(caught.value)
    assert type(error) is mistake.error
    assert mistake.culprit in text
    assert "Remedy:" in text
    assert mistake.remedy in text.replace(error.found, "")
    assert error.level == mistake.level
    if mistake.level is not None:
        assert f"level {mistake.level!r}" in text
    if mistake.located:
        assert error.site is not None
        assert error.site in text
        assert re.fullmatch(r"test_errors\.py:\d+|\?:0", error.site)
    assert good.declared() == declared
    if not mistake.after_steps:
        assert good.state() == state
    assert [record.level for record in run(good.program).history.steps] == ["low", "top"]


def test_layers_that_two_levels_share_by_a_partial_are_told_of():
    module = functools.partial(nn.Sequential, nn.Linear(1, 4))
    good = Bilevel()
    with pytest.warns(ModuleWarning, match=r"program\.reset\(\)") as told:
        program = good.declare(low={"module": module}, top={"module": module})
    for level, warning in zip(("low", "top"), told, strict=True):
        assert f"level {level!r} (test_errors.py:" in str(warning.message)
        assert "module=lambda: nn.Sequential(nn.Linear(...))" in str(warning.message)
    with pytest.raises(ModuleError, match="optimized by level 'low' too") as caught:
        run(program)
    assert "module=lambda: nn.Sequential(nn.Linear(...))" in caught.value.remedy


@pytest.mark.parametrize(
    "module",
    [
        functools.partial(nn.Linear, 1, 1),
        functools.partial(nn.Sequential, nn.ReLU()),
        functools.partial(lambda kind: kind(1, 1), nn.Linear),
        nn.Sequential(nn.Linear(1, 1)),
    ],
)
def test_modules_without_held_layers_are_silent(module):
    Bilevel().add(module=module)


def test_error_of_a_module_factory_says_whose_it_is():
    good = Bilevel()
    with pytest.raises(TypeError) as caught:
        good.run(low={"module": lambda: nn.Linear()})
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"raised by module= of level 'low' \(test_errors\.py:\d+\)", note)


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"module": nn.Linear}, ModuleError, "module= cannot be called without arguments"),
        ({"module": nn.Linear(2, 1, device="meta")}, ModuleError, "meta device"),
        ({"params": lambda: True}, ModuleError, "params= cannot be called with"),
        ({"optimizer": lambda: None}, OptimizerError, "optimizer= cannot be called"),
        ({"scheduler": lambda: None}, OptimizerError, "scheduler= cannot be called"),
        ({"data": lambda x: x}, DataError, "data= cannot be called without arguments"),
        ({"data": {1: []}}, DeclarationError, "data has the key 1"),
        ({"reads": {1: "top"}}, DeclarationError, "reads has the key 1"),
        ({"params": torch.zeros(())}, DeclarationError, "params="),
        ({"repeat": torch.zeros(2)}, DeclarationError, "repeat="),
        ({"repeat": int}, DeclarationError, "repeat="),
    ],
)
def test_what_no_option_can_be_called_or_named_with(given, kind, words):
    with pytest.raises(kind, match=words):
        Bilevel().run(low=given)


@pytest.mark.parametrize("function", [max, functools.partial(new_loss, 1, 2, 3, 4), nn.ReLU()])
def test_functions_of_unknown_arguments_are_refused(function):
    with pytest.raises(DeclarationError, match=r"cannot be found out|decorates a module"):
        Program().level("low", module={"x": torch.zeros(1)})(function)


def test_a_level_without_a_name_is_refused():
    with pytest.raises(DeclarationError, match="without a name") as caught:
        Program().level(module={"x": torch.zeros(1)})(new_loss)
    assert "@level('name', module=..., ...)" in caught.value.remedy
    assert caught.value.level is None
    assert re.fullmatch(r"test_errors\.py:\d+", caught.value.site)


def test_leaves_a_program_usable_after_a_circle():
    program = Program()
    common = {"optimizer": sgd}
    program.level("one", lower=["two"], module={"x": torch.ones(1)}, **common)(
        lambda own, two: size(two) + size(own)
    )
    with pytest.raises(GraphError):
        program.level("two", lower=["one"], module={"x": torch.ones(1)})(new_loss)
    assert list(program.levels) == ["one"]
    program.level("two", module={"x": torch.ones(1)}, **common)(
        lambda own, one: ((own.x - one.x) ** 2).sum()
    )
    assert len(run(program, steps=3).history) == 6


def test_tells_a_first_step_that_computes_no_gradient_from_a_lower_level_in_a_run():
    good = Bilevel()
    program = good.declare(top={"function": lambda own, batch, other: batch[0].sum()})
    before = bits("top", good.top)
    with pytest.raises(LossError, match="depends on none of the level's parameters"):
        run(program)
    assert bits("top", good.top) == before


@pytest.mark.parametrize(
    ("options", "function", "words"),
    [
        ({"data": [1.0]}, new_loss, ("data= is given", "as an argument: batch")),
        (
            {"data": {"clean": [1.0], "noisy": [2.0]}},
            new_loss,
            ("data= is given", "as an argument: clean, noisy"),
        ),
        (
            {"data": [(1.0, 2.0)], "fields": ("x", "y")},
            lambda own, batch: size(own) * batch[0],
            ("fields= is given", "as arguments: x, y"),
        ),
        ({"inner_steps": 4}, new_loss, ("inner_steps= is given", "add 'new' to lower=")),
        ({"rollback": True}, new_loss, ("rollback= is given", "add 'new' to lower=")),
    ],
)
def test_options_without_effect_are_told_of(options, function, words):
    with pytest.warns(GraphWarning) as told:
        run_alone(function, **options)
    (warning,) = told
    for part in ("level 'new' (test_errors.py:", *words):
        assert part in str(warning.message)


def test_data_that_a_hook_sees_are_not_idle():
    for event, hook in (("before_step", lambda batch: None), ("epoch_end", lambda: None)):
        program = Program()
        program.level("new", module={"x": torch.zeros(2)}, optimizer=sgd, data=[1.0])(new_loss)
        program.on(event, level="new")(hook)
        run(program)


class TestPathlessUppers:
    @staticmethod
    def declare(*, lower_reads: bool, upper_reads: bool, **options: Any) -> Program:
        program = Program()
        program.level("low", module={"w": torch.ones(2)})(
            (lambda m, top: ((m.w - top.x) ** 2).sum())
            if lower_reads
            else (lambda m: (m.w**2).sum())
        )
        program.level("top", lower=["low"], module={"x": torch.arange(2.0)}, **options)(
            (lambda m, low: (m.x**2).sum() + (low.w * m.x).sum())
            if upper_reads
            else (lambda m: (m.x**2).sum())
        )
        return program

    @pytest.mark.parametrize(
        ("lower_reads", "upper_reads", "culprit", "remedy"),
        [
            (True, False, "reads none of 'low'", "take one of them as an argument"),
            (False, True, "nothing below it reads 'top' back", "take 'top' as an argument"),
            (False, False, "reads none of 'low'", "take one of them as an argument"),
        ],
    )
    def test_are_named_and_get_the_direct_gradient(self, lower_reads, upper_reads, culprit, remedy):
        program = self.declare(lower_reads=lower_reads, upper_reads=upper_reads)
        with pytest.warns(GraphWarning) as caught:
            found = mlodeco.hypergradient("top", program=program)
        text = str(caught[0].message)
        assert len(caught) == 1
        assert "level 'top' (test_errors.py:" in text
        assert culprit in text
        assert remedy in text
        assert "hypergrad=None" in text
        wanted = 2 * torch.arange(2.0) + (1.0 if upper_reads else 0.0)
        assert torch.equal(found["x"], wanted)

    def test_are_warned_of_once(self):
        program = self.declare(lower_reads=False, upper_reads=True)
        with pytest.warns(GraphWarning):
            program.module("top")
        mlodeco.hypergradient("top", program=program)

    def test_are_silent_where_the_direct_gradient_is_asked_for(self):
        program = self.declare(lower_reads=False, upper_reads=True, hypergrad=None)
        found = mlodeco.hypergradient("top", program=program)
        assert torch.equal(found["x"], 2 * torch.arange(2.0) + 1.0)

    def test_do_not_occur_in_a_good_program(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.declare(lower_reads=True, upper_reads=True).module("top")


class SnagError(Exception):
    pass


class Wire:
    """Raises at one call, counted from when it is armed."""

    def __init__(self, at: int = 0) -> None:
        self.calls = 0
        self.at = at
        self.tripped = ""

    def touch(self, level: str) -> None:
        self.calls += 1
        random.random()
        np.random.rand()
        torch.rand(1)
        if self.calls == self.at:
            self.tripped = level
            raise SnagError(f"at call {self.at}")


def wired(good: Bilevel, wire: Wire, method: Any) -> Program:
    def lower(own, batch, other):
        loss = lower_loss(own, batch, other)
        wire.touch("low")  # the line of the lower loss
        return loss

    def upper(own, batch, other):
        wire.touch("top")  # the line of the upper loss
        return upper_loss(own, batch, other) + 0.1 * size(own)

    return good.declare(
        low={"function": lower, "accumulate": 2, "inner_steps": 2},
        top={"function": upper, "hypergrad": method, "optimizer": functools.partial(Adam, lr=0.1)},
    )


LINES = {"low": "# the line of the lower loss", "top": "# the line of the upper loss"}
PASSES = [
    Identity(product="reverse"),
    Identity(product="reverse_over_forward"),
    Identity(product="difference"),
    FiniteDifference(),
    Neumann(num_terms=3, damping=9.0, product="reverse"),
    Neumann(num_terms=3, damping=9.0, product="reverse_over_forward"),
    CG(max_steps=2, damping=9.0, product="difference"),
    Neumann(damping=9.0),
    None,
]


def assert_traceable(error: SnagError, wire: Wire) -> None:
    text = "".join(traceback.format_exception(error))
    assert LINES[wire.tripped] in text
    notes = getattr(error, "__notes__", [])
    assert any(f"level {wire.tripped!r}" in note for note in notes)
    assert all("test_errors.py:" in note for note in notes)


@pytest.mark.parametrize("method", PASSES, ids=repr)
def test_hypergradient_that_raises_in_any_pass_changes_nothing(method):
    good = Bilevel()
    before = good.state()
    tripped = []
    for at in itertools.count(1):
        wire = Wire(at)
        program = wired(good, wire, method)
        try:
            mlodeco.hypergradient("top", program=program)
        except SnagError as error:
            assert_traceable(error, wire)
            tripped.append(wire.tripped)
            assert good.state() == before, f"call {at}"
        else:
            break
    assert good.state() == before
    assert tripped.count("top") == 2
    assert tripped.count("low") >= (0 if method is None else 2)


class Trial:
    """A run in which the wire is armed after some ticks, and the state after each step."""

    def __init__(self, method: Any, warm: int, at: int) -> None:
        torch.manual_seed(1)
        self.good, self.wire = Bilevel(), Wire()
        program = wired(self.good, self.wire, method)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.remembered = self.now()
        program.on("before_step")(self.learn)
        program.on("after_step")(self.remember)
        self.runner = mlodeco.Runner(program)
        for _ in range(warm):
            self.runner.step()
        self.remember()
        self.wire.calls, self.wire.at = 0, at

    def learn(self, ctx, optimizer):
        self.optimizers[ctx.level] = optimizer

    def remember(self):
        self.remembered = self.now()

    def now(self) -> Any:
        states = {name: optimizer_bits(o) for name, o in self.optimizers.items()}
        return self.good.state(), {name: state for name, state in states.items() if state}


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("method", PASSES, ids=repr)
def test_run_that_raises_in_any_pass_is_as_before_the_step(method, warm):
    tripped = []
    for at in itertools.count(1):
        trial = Trial(method, warm, at)
        try:
            for _ in range(2):
                trial.runner.step()
        except SnagError as error:
            assert_traceable(error, trial.wire)
            tripped.append(trial.wire.tripped)
            assert trial.now() == trial.remembered, f"call {at}"
        else:
            break
        trial.runner.step()
    assert "top" in tripped
    assert tripped.count("low") >= 4


def optimizer_bits(optimizer: torch.optim.Optimizer) -> dict[Any, bytes]:
    return {
        (number, key): value.numpy().tobytes() if isinstance(value, Tensor) else value
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def test_error_of_a_hook_and_of_a_validation_say_where_they_come_from():
    good = Bilevel()

    def broken(low):
        raise SnagError

    for declare, words in (
        (
            lambda p: p.on("before_step", "top")(broken),
            "hook 'broken' on 'before_step' (test_errors.py:",
        ),
        (lambda p: p.validate(broken), "validation 'broken' (test_errors.py:"),
    ):
        program = good.declare()
        declare(program)
        with pytest.raises(SnagError) as caught:
            run(program)
        assert any(words in note for note in caught.value.__notes__)


def test_runtime_error_of_the_user_in_every_mode_is_the_one_that_is_shown():
    good = Bilevel()
    calls = itertools.count()

    def lower(own, batch, other):
        if next(calls):
            raise RuntimeError("of the user")
        return lower_loss(own, batch, other)

    before = good.state()
    with pytest.raises(RuntimeError, match="of the user"):
        good.hypergradient(low={"function": lower})
    assert good.state() == before
