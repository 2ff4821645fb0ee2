"""Random programs, half of them with something odd: what they raise must be the package's own.

Each begins as one that is in order, made of fuzz_parts; then up to three things about it are
changed. It is declared, drawn, differentiated, run, saved and resumed.
``python -m tests.fuzz_declarations 10000`` prints how these ended, and a few seeds whose runs
together take every part, which are those of the tests.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path
from random import Random
from time import monotonic
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn, optim
from torch.optim import SGD
from torch.utils.data import DataLoader

import mlodeco
from mlodeco import MlodecoError, MlodecoWarning, Program, Runner
from mlodeco.api import DEFAULT
from mlodeco.declare.registry import EVENTS, LEVEL_OPTIONS
from mlodeco.errors import CheckpointError
from mlodeco.hypergrad import CG, NAMES, read_method
from mlodeco.runtime.checkpoint import folder
from tests import fuzz_parts as parts
from tests.fuzz_parts import BATCH, define, loss_of

PACKAGE = str(Path(mlodeco.__file__).parent)
MINE = (__file__, parts.__file__)
PASSING_ON = ("return func(*args, **kwargs)", "return self.intercept(func, args, kwargs or {})")
"""Where the package stands between a person's function and torch's that it calls."""

SECONDS = 30
"""What a program may take."""

OF_TORCH = ("torch.jit.script", "batching rule")
"""Warnings of torch's on what it does inside."""


class MineError(ValueError):
    """What a person's own code raises."""


class TooSlow(BaseException):
    """A program has taken too long."""


@dataclass
class Level:
    """A level to be declared: its options, and the arguments of its function after the first."""

    name: str
    options: dict[str, Any]
    arguments: list[str]
    signature: str | None = None
    wrap: Callable[[Any], Any] = lambda function: function


@dataclass
class Plan:
    """A program to be declared and run; ``used`` are the names of its parts."""

    levels: dict[str, Level]
    others: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)

    def above(self, name: str) -> list[str]:
        """The levels over this one that it reads."""
        known = [n for n in self.levels[name].arguments if n in self.levels]
        return [n for n in known if n not in self.levels[name].options.get("lower", ())]

    def add(self, kind: str, *given: Any, value: Any, part: str, **options: Any) -> None:
        """A declaration that is not a level."""
        self.others.append((kind, given, options, value))
        self.used.append(f"{kind} {part}")


# programs in order

CHANCES = {"data": 0.7, "scheduler": 0.3, "hypergrad": 1.0, "params": 0.05, "precision": 0.1}
"""How often a level has an option; others have a tenth."""


def make_plan(r: Random) -> Plan:
    shape = r.choice([*parts.SHAPES, "upper", "upper"])
    plan = Plan({}, used=[f"shape {shape}"])
    for name, (lower, reads) in parts.SHAPES[shape].items():
        plan.levels[name] = make_level(plan, r, name, lower, reads)
    for add in ADDITIONS:
        if r.random() < 0.3:
            add(plan, r)
    for option in parts.RUNS:
        if r.random() < 0.25 and (option != "nested" or r.random() < 0.4):
            choose(plan, r, parts.RUNS, option, plan.run)
    if r.random() < 0.5:
        plan.run |= {"checkpoint_every": 2, "resume": "auto"}
    return plan


def choose(plan: Plan, r: Random, table: Any, option: str, into: Any) -> str:
    part = r.choice(list(table[option]))
    into[option] = table[option][part]()
    plan.used.append(f"{option} {part}")
    return part


def make_level(plan: Plan, r: Random, name: str, lower: list[str], reads: list[str]) -> Level:
    level = Level(name, {"lower": lower} if lower else {}, list(reads))
    options = level.options
    for option in ("module", "optimizer"):
        choose(plan, r, parts.OPTIONS, option, options)
    refused = {"hypergrad"} if not lower else {"replicas", "inner_steps"}
    for option in sorted(parts.OPTIONS.keys() - options.keys() - refused):
        if r.random() < CHANCES.get(option, 0.1):
            part = choose(plan, r, parts.OPTIONS, option, options)
            if option == "data":
                level.arguments += parts.ARGUMENTS.get(part, ["batch"])
                if part == "fields":
                    options["fields"] = ["x", "y"]
    if "params" in options:
        options["optimizer"] = partial(SGD, lr=0.1)
    if lower and r.random() < 0.1:
        options["hypergrad"] = dict.fromkeys(lower, options["hypergrad"])
    if r.random() < 0.15:
        level.arguments.append("ctx")
    if r.random() < 0.2:
        level.wrap = r.choice([partial, with_metrics, as_dictionary])
    return level


def with_metrics(function: Any) -> Any:
    return rewrapped(function, lambda loss: (loss, {"own": loss.detach()}))


def as_dictionary(function: Any) -> Any:
    return rewrapped(function, lambda loss: {"loss": loss, "own": 1.0})


def rewrapped(function: Any, change: Callable[[Any], Any]) -> Any:
    """The function with its signature, whose result is changed."""

    def call(*given: Any, **named: Any) -> Any:
        return change(function(*given, **named))

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def add_source(plan: Plan, r: Random) -> None:
    part = r.choice(list(parts.SOURCES))
    refresh = r.choice(["step", "loop"])
    for level in r.sample(list(plan.levels.values()), r.randint(1, len(plan.levels))):
        level.arguments.append("task")
    plan.add("source", "task", value=parts.SOURCES[part](), part=part, refresh=refresh)


def add_rule(plan: Plan, r: Random) -> None:
    name, part = r.choice(list(plan.levels)), r.choice(list(parts.RULES))
    above = plan.above(name)
    part = part if above else "descend"
    for option in ("optimizer", "scheduler", "tune"):
        plan.levels[name].options.pop(option, None)
    plan.add("update", name, value=parts.RULES[part]((above or [""])[0]), part=part)


def add_tune(plan: Plan, r: Random) -> None:
    above = plan.above("low")
    if above:
        plan.levels["low"].options.pop("scheduler", None)
        plan.levels["low"].options["optimizer"] = partial(SGD, lr=0.1)
        plan.levels["low"].options["tune"] = {"lr": parts.rate_of(above[0])}
        plan.used.append("tune lr")


def add_start(plan: Plan, r: Random) -> None:
    above = plan.above("low")
    if above and r.random() < 0.5:
        low, top = plan.levels["low"].options, plan.levels[above[0]].options
        low |= {"init_from": above[0], "module": {"x": torch.ones(2)}}
        top["module"] = {"x": torch.zeros(2)}
        for option in ("rollback", "warmup", "params"):
            low.pop(option, None)
        plan.used.append("init_from above")


def add_hook(plan: Plan, r: Random) -> None:
    for event in r.sample(EVENTS, r.randint(1, 3)):
        function = r.choice([lambda ctx: ctx.log(seen=1.0), lambda low: None, lambda: None])
        plan.add("on", event, value=function, part=event, every=r.choice([1, 2]))


def add_validation(plan: Plan, r: Random) -> None:
    part = r.choice(list(parts.VALIDATIONS))
    function = parts.measure_batch if part == "with data" else parts.measure
    plan.add("validate", value=function, part=part, **parts.VALIDATIONS[part])


def add_tracked(plan: Plan, r: Random) -> None:
    plan.add("track", "cursor", value=parts.Cursor(), part="cursor")


ADDITIONS = (
    *(add_source, add_tune, add_rule, add_start),
    *(add_hook, add_validation, add_tracked),
)


# what is odd


def fail(*given: Any, **named: Any) -> Any:
    raise MineError


def failing_items() -> Any:
    yield BATCH
    raise MineError


class Failing:
    """Whatever is done with it fails."""

    __iter__ = __call__ = __len__ = __next__ = state_dict = load_state_dict = fail


class OddState(parts.Cursor):
    """A state that is none, or that it does not take back."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def state_dict(self) -> Any:
        return self.state


class OddRepr:
    """No junk of a person's is safe to print in full."""

    def __repr__(self) -> str:
        return "odd " * 1000


def owned(kind: Any) -> Any:
    """The class of optimizers as one that is written here, which may fail."""

    class Own(kind):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)

        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Own


async def coroutine(model: Any) -> Any:
    return model


def junk(r: Random) -> Any:
    values = (
        *(None, True, False, 0, -1, -(10**400), 1.5, float("nan"), float("inf"), 1j, "", "x"),
        *("low", "top", "batch", "auto", b"bytes", (), [], {}, set(), ["low"], ("low", 1)),
        *({"low": "top"}, {1: 2}, {"x": None}, {"lr": len}, {"low": None}, [None], [[]]),
        *(object(), OddRepr(), object, int, len, max, fail, Failing(), Failing, MineError()),
        *(torch.zeros(2), torch.zeros(()), np.zeros(2), np.int64(3), nn.Linear, nn.ReLU()),
        *(range(2), failing_items, failing_items(), Ellipsis, NotImplemented, mlodeco, Program()),
        *(lambda: None, lambda x: x, lambda x, y=1: x, SGD, CG(), CG, "unroll", coroutine),
    )
    return r.choice(values)


def odd_name(r: Random) -> Any:
    if r.random() < 0.3:
        return "".join(chr(r.randrange(0x110000)) for _ in range(r.randrange(4)))
    words = "low top mid task x batch ctx class None __init__ a.b é 日本 1a a/b .. self params 💥"
    more = (
        "",
        " ",
        "\n",
        "\x00",
        "\ud800",
        "a" * 5000,
        None,
        1,
        b"low",
        ("low",),
        [],
        len,
        "grads",
    )
    return r.choice([*words.split(), *more, "loww", float("nan")])


def odd_modules(r: Random) -> Any:
    integers = nn.Module()
    integers.n = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    kinds = [torch.half, torch.cfloat, torch.int64]
    tensors = [torch.eye(2).to_sparse(), torch.ones(2, dtype=r.choice(kinds)), torch.empty(0)]
    tensors += [torch.ones(1, device="meta"), torch.tensor(float("nan")), junk(r)]
    key = r.choice(["", "a.b", "keys", "x", 1, None, "é", "class", ("a",)])
    return r.choice([
        {key: torch.ones(1)}, nn.ReLU(), integers, nn.Linear(2, 1, device="meta"), nn.LazyLinear(2),
        nn.Linear(1, 1).requires_grad_(False), {"x": r.choice(tensors)}, {"x": r.choice(tensors)},
        fail, "low", "top", lambda a: nn.Linear(2, 1), lambda: fail(), lambda: "low", {},
        nn.Parameter(torch.ones(2)), nn.ModuleList(), nn.Embedding(3, 2, sparse=True),
    ])  # fmt: skip


def odd_data(r: Random) -> Any:
    return r.choice([
        None, [], (BATCH,), iter([BATCH]), failing_items, failing_items(), Failing(), BATCH, "text",
        DataLoader([]), {"a": [BATCH], "b": junk(r)}, {"low": [BATCH]}, {1: [BATCH]}, {}, fail,
        lambda: [BATCH], lambda: iter([BATCH]), lambda: junk(r), {"a b": [BATCH]}, [junk(r)],
        [BATCH, junk(r)], [BATCH, BATCH * float("nan")], [BATCH, BATCH[:0]], lambda x: [BATCH],
        {"a": failing_items}, OddState({"at": "x"}), [BATCH, BATCH.to_sparse()], OddState(junk(r)),
        [parts.loader, {"x": 1}], DataLoader([1, 2], collate_fn=fail), [BATCH.numpy()],
    ])  # fmt: skip


def odd_optimizers(r: Random) -> Any:
    mine = [nn.Parameter(torch.ones(1))]
    given = junk(r)
    kinds = [optim.LBFGS, optim.Rprop, optim.SparseAdam, optim.Adafactor, SGD]
    rates = [float("nan"), -1.0, 0.0, torch.tensor(0.1), 1e300, given]
    return r.choice([
        None, fail, lambda params: given, SGD(mine, lr=0.1), lambda params: SGD(mine, lr=0.1),
        lambda a, b: None, owned(r.choice(kinds)), *(partial(owned(SGD), lr=n) for n in rates),
    ])  # fmt: skip


def odd_methods(r: Random) -> Any:
    known = [*NAMES, "neuman", "mine", "odd"]
    return r.choice([
        CG, r.choice(known), {"low": r.choice(known)}, {"low": junk(r)}, {"nobody": "cg"}, {}, fail,
        lambda matvec, b: junk(r), lambda matvec, b: b, lambda b: b,
        lambda matvec, b: {k: v * float("nan") for k, v in b.items()},
    ])  # fmt: skip


def odd_lists(r: Random) -> Any:
    lists = ([], ["low"], ["low", "mid"], ["nobody"], ["top"], "low", [""], [1], ["low", "low"])
    return r.choice([*lists, None, {"low": "x"}, {"x": "low"}, {"task": "low"}, Failing()])


ODD: dict[str, Callable[[Random], Any]] = {
    "module": odd_modules,
    "data": odd_data,
    "optimizer": odd_optimizers,
    "hypergrad": odd_methods,
    "scheduler": lambda r: r.choice([fail, lambda optimizer: junk(r), lambda: None, owned(SGD)]),
    "lower": odd_lists,
    "reads": odd_lists,
    "params": lambda r: r.choice([
        lambda n: False, ["weight"], ["nope"], fail, lambda n: junk(r), [junk(r)], failing_items(),
    ]),
    "fields": lambda r: r.choice([("x", "y", "z"), ("x",), ("batch",), ("a b",), "xy", ["low"]]),
    "tune": lambda r: r.choice([
        {"lr": lambda low: 0.1}, {"lr": fail}, {"lr": lambda top: junk(r)}, {"nope": len},
        {1: fail}, {"lr": lambda nobody: 1}, {"momentum": lambda top: top.x.sum()},
    ]),
    "replicas": lambda r: r.choice([1, 3, 0, -(10**6), 10**30]),
    "init_from": lambda r: r.choice(["top", "low", "nobody", "", "mid"]),
    "precision": lambda r: r.choice(["fp16", "bf61"]),
    "clip_norm": lambda r: r.choice([0, 1e-300, float("inf"), 1]),
}  # fmt: skip
"""By option of a level, what it may oddly be; others are junk."""


def oddly(option: str, r: Random) -> Any:
    return ODD[option](r) if option in ODD and r.random() < 0.75 else junk(r)


def a_level(plan: Plan, r: Random) -> Level:
    return r.choice(list(plan.levels.values()))


def change_option(plan: Plan, r: Random) -> None:
    options = a_level(plan, r).options
    option = r.choice([*options, *options, *LEVEL_OPTIONS, "lr"])
    options[option] = oddly(option, r)


def drop_option(plan: Plan, r: Random) -> None:
    options = a_level(plan, r).options
    options.pop(r.choice(list(options)))


def change_name(plan: Plan, r: Random) -> None:
    a_level(plan, r).name = odd_name(r)


def change_signature(plan: Plan, r: Random) -> None:
    level = a_level(plan, r)
    names = ", ".join(level.arguments)
    more = f"{names}, " if names else ""
    others = {"low", "top", "mid", "x", "nobody", "batch", "ctx", "task"} - set(level.arguments)
    other = r.choice(sorted(others))
    level.signature = r.choice([
        "", "*args", "**kwargs", "model, *args, **kwargs", f"*, model, {names}",
        f"model, /, {names}",
        f"model, {more}{other}=None", "batch", "ctx", f"model, {more}*args", "self, m",
        "low, top",
        f"model, {more}loww=1", f"model, {more}*, extra=2", f"{more}model", f"model, {other}",
        f"model, {more}*, {other}", f"model, {more}{other}",
    ])  # fmt: skip


def change_function(plan: Plan, r: Random) -> None:
    odd = junk(r)
    functions = [
        *(parts.Tied, coroutine, failing_items, max, torch.sum, type, dict.update, nn.Linear(2, 2)),
        *(odd, property(fail), staticmethod(loss_of), classmethod(loss_of), partial(max), np.add),
        *(fail, Failing(), lambda model: loss_of(model), lambda *given: loss_of(*given)),
    ]
    chosen = r.choice(functions)
    a_level(plan, r).wrap = lambda function: chosen


def change_loss(plan: Plan, r: Random) -> None:
    odd = junk(r)
    changes = [
        lambda loss: odd, lambda loss: (loss, odd), lambda loss: {"loss": loss, "other": odd},
        lambda loss: (loss, {"own": odd}), lambda loss: {"loss": odd}, lambda loss: (loss,),
        lambda loss: loss * float(r.choice(["nan", "inf", "1e300"])), lambda loss: loss.expand(2),
        lambda loss: loss.detach(), lambda loss: loss.to(r.choice([torch.cfloat, torch.int64])),
        lambda loss: loss.float(), lambda loss: loss.half(), lambda loss: loss.backward(),
        lambda loss: loss if r.random() < 0.8 else fail(), lambda loss: loss.numpy(),
    ]  # fmt: skip
    change = r.choice(changes)
    a_level(plan, r).wrap = lambda function: rewrapped(function, change)


def change_other(plan: Plan, r: Random) -> None:
    """Something about a source, hook, validation, rule, method or tracked object."""
    if not plan.others:
        add_other(plan, r)
        return
    index = r.randrange(len(plan.others))
    kind, given, options, value = plan.others[index]
    match r.choice(["value", "value", "name", "option"]):
        case "value":
            value = odd_value(kind, r)
        case "name":
            given = (odd_name(r), *given[1:])
        case _:
            names = [*options, "every", "refresh", "data", "monitor", "mode", "patience"]
            names += ["level"] if kind != "update" else []
            options = {**options, r.choice([*names, "evry"]): r.choice([junk(r), odd_data(r), 2])}
    plan.others[index] = kind, given, options, value


def odd_value(kind: str, r: Random) -> Any:
    given = junk(r)
    values = {
        "source": [
            odd_data(r), lambda low: iter([low]), lambda: iter([BATCH, given]), OddState(given),
        ],
        "on": [lambda grads: None, lambda nobody: None, lambda ctx: ctx.stop(given)],
        "validate": [lambda low: given, lambda: {"own": given}, lambda: {"own": float("nan")}],
        "update": [
            lambda params: given, lambda params, grads: (params, {}), lambda params: ({}, {}),
            lambda params, state: (params, given), lambda params, state: (params, {"s": given}),
            lambda grads: (grads, {"at": "x", 1: torch.ones(2)}), lambda params, **some: params,
        ],
        "track": [OddState(given), OddState({"at": given}), OddState({}), Failing(), parts.Cursor],
        "method": [lambda matvec, b: given, lambda matvec, b: {}, CG, CG(), lambda b: b],
    }  # fmt: skip
    return r.choice([*values[kind], given, fail])


def add_other(plan: Plan, r: Random) -> None:
    kind = r.choice(["source", "on", "validate", "update", "track", "method"])
    names = {"on": r.choice(EVENTS), "update": r.choice(list(plan.levels)), "method": "odd"}
    given = () if kind == "validate" else (names.get(kind, "task"),)
    plan.add(kind, *given, value=odd_value(kind, r), part="odd")


def change_run(plan: Plan, r: Random) -> None:
    options = [*parts.RUNS, "out", "steps", "accelerator", "compile", "program", "progress"]
    plan.run[r.choice(options)] = junk(r)


ODDITIES = (
    *(change_option, change_option, change_option, drop_option, change_name, change_signature),
    *(change_function, change_loss, change_loss, change_other, change_other, add_other, change_run),
)


# using a program


def make_function(level: Level) -> Any:
    """The level's function, of its own signature."""
    text = level.signature
    if text is None:
        text = ", ".join(["model", *level.arguments])
    names = [part.strip().split("=")[0] for part in text.split(",")]
    values = ", ".join(name for name in names if name not in ("", "*", "/") and "**" not in name)
    return level.wrap(define(text, f"loss_of({values})", loss_of=loss_of))


class Attempt:
    """One program, and what became of each use of it."""

    def __init__(self, seed: int) -> None:
        self.r = Random(seed)
        self.found: Counter[str] = Counter()
        self.used: set[str] = set()
        self.is_odd = False

    def tried(self, what: str, call: Callable[[], Any]) -> Any:
        """What the call gives; None where it is refused."""
        try:
            given = call()
        except MlodecoError as error:
            if isinstance(error, CheckpointError) and not self.is_odd:
                self.foreign(what, error)
            self.found[f"{what}: {type(error).__name__}"] += 1
            return None
        except Exception as error:
            if is_own(error):
                self.found[f"{what}: a person's own"] += 1
            else:
                self.foreign(what, error)
            return None
        self.found[f"{what}: accepted"] += 1
        return given

    def foreign(self, what: str, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames))
        self.found[f"foreign: {what}: {type(error).__name__}: {str(error)[:90]!r} {where}"] += 1

    def go(self) -> None:
        r = self.r
        plan = make_plan(r)
        for _ in range(r.choice([0, 0, 0, 1, 1, 2, 3])):
            r.choice(ODDITIES)(plan, r)
            self.is_odd = True
        program = self.declare(plan)
        top = r.choice([*plan.levels, list(plan.levels)[-1]])
        self.look(program, plan, top)
        with tempfile.TemporaryDirectory() as out:
            self.run(program, plan, Path(out) / "run")
            if r.random() < 0.2:
                self.save_and_load(plan, Path(out) / "mine")
        if r.random() < 0.3:
            self.tried("hypergradient after", lambda: mlodeco.hypergradient(top, program=program))

    def declare(self, plan: Plan) -> Program:
        program = Program()
        program.method("mine")(parts.solve)
        for level in plan.levels.values():
            self.tried("level", partial(declare_level, program, level))
        for kind, given, options, value in plan.others:
            self.tried(kind, partial(declare_other, program, kind, given, options, value))
        return program

    def look(self, program: Program, plan: Plan, top: str) -> None:
        r = self.r
        graph = self.tried("graph", program.graph)
        if graph is not None:
            self.tried("draw", lambda: (str(graph), graph.to_dot(), graph.to_mermaid()))
        self.tried("read method", lambda: read_method(random_text(r)))
        level = r.choice([top, top, top, odd_name(r)])
        batches = r.choice([None, None, {}, {top: BATCH}, {top: [BATCH]}, {top: junk(r)}, junk(r)])
        given: dict[str, Any] = {"program": program, "batches": batches}
        some = {"hypergrad": odd_methods(r)} if r.random() < 0.2 else {}
        if r.random() < 0.1:
            some["nested"] = r.choice([True, junk(r)])
        if r.random() < 0.5:
            self.tried("hypergradient", lambda: mlodeco.hypergradient(level, **given, **some))
        if r.random() < 0.15:
            steps = r.choice([1, 2, 2, junk(r)])
            self.tried("solve", lambda: mlodeco.solve(level, steps=steps, **given))
        if r.random() < 0.08:
            self.tried("check", lambda: str(mlodeco.check(level, **given, **some)))

    def run(self, program: Program, plan: Plan, out: Path) -> None:
        given: dict[str, Any] = {"steps": 4, "program": program, "progress": "off"}
        if plan.run.keys() & {"checkpoint_every", "resume", "keep"}:
            given["out"] = out
        given |= plan.run
        result = self.tried("run", lambda: mlodeco.run(**given))
        if result is None:
            return
        stepped = {record.level for record in result.history.steps}
        self.used |= set(plan.used) if stepped >= set(plan.levels) else set()
        self.tried("result", lambda: (repr(result), list(result.history.rows())))
        if given.get("resume") == "auto" and given["steps"] == 4:
            again = self.declare(plan)
            more = given | {"steps": 6, "program": again}
            resumed = self.tried("resumed run", lambda: mlodeco.run(**more))
            self.used |= {f"resumed with {part}" for part in self.used if resumed}

    def save_and_load(self, plan: Plan, path: Path) -> None:
        runner = self.tried("runner", lambda: Runner(self.declare(plan)))
        if (
            runner
            and self.tried("step", runner.step)
            and self.tried("save", lambda: runner.save(path))
        ):
            other = self.tried("runner", lambda: Runner(self.declare(plan)))
            self.tried("load", lambda: other.load(path))
            self.tried("step", other.step)


def is_own(error: BaseException) -> bool:
    """Whether code that the package called raised it, and a note says so."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.line not in PASSING_ON]
    last = max((n for n, f in enumerate(frames) if f.filename.startswith(PACKAGE)), default=-1)
    is_noted = any("raised by" in n or "raised in" in n for n in getattr(error, "__notes__", ()))
    return is_noted and any(f.filename in MINE for f in frames[last + 1 :])


def declare_level(program: Program, level: Level) -> None:
    program.level(level.name, **level.options)(make_function(level))


def declare_other(program: Program, kind: str, given: Any, options: Any, value: Any) -> None:
    if kind == "track":
        program.track(*given, value)
    else:
        getattr(program, kind)(*given, **options)(value)


def random_text(r: Random) -> str:
    pieces = [
        *(*NAMES, "CG", "None", "(", ")", "{", "}", ":", ",", "=", "num_terms", "damping", "'low'"),
        *("1", "-1", "1e999", "lambda: 0", "__import__('os')", "\\", "\n", "\x00", "[" * 200, "é"),
    ]
    return "".join(r.choice(pieces) for _ in range(r.randrange(8)))


# a program and what is around it


def surroundings() -> tuple[Any, ...]:
    """What no program may change."""
    return (
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads()),
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), threading.active_count()),
        *(torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled()),
        *(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        *(mlodeco.current_program() is DEFAULT, DEFAULT.version, tuple(DEFAULT.tracked)),
    )


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(seed: int) -> Attempt:
    """Declares and uses a random program.

    Returns:
        ``found``: how many calls were accepted, and refused by which exception; what is not the
        package's own under ``"foreign: ..."``. ``used``: the parts in runs that were accepted.
    """
    torch.manual_seed(seed)
    tried, printed, before = Attempt(seed), StringIO(), surroundings()
    with warnings.catch_warnings(record=True) as told, redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            with redirect_stderr(printed), limited(SECONDS):
                tried.go()
        except TooSlow as error:
            tried.foreign("time", error)
    for warning in told:
        text = str(warning.message)
        is_own = issubclass(warning.category, MlodecoWarning)
        if not is_own and not any(known in text for known in OF_TORCH):
            tried.found[f"foreign: {warning.category.__name__}: {text[:90]!r}"] += 1
    if printed.getvalue():
        tried.found[f"foreign: printed {printed.getvalue()[:200]!r}"] += 1
    if surroundings() != before:
        changed = [pair for pair in zip(before, surroundings(), strict=True) if pair[0] != pair[1]]
        tried.found[f"foreign: changed {changed}"] += 1
    return tried


@contextmanager
def no_waiting_for_the_disk() -> Iterator[None]:
    before, folder._sync = folder._sync, lambda path: None
    try:
        yield
    finally:
        folder._sync = before


DEEP = {
    *(f"hypergrad {part}" for part in parts.OPTIONS["hypergrad"]),
    *(
        f"{use}{kind} {part}"
        for use in ("", "resumed with ")
        for kind, table in (
            *(("scheduler", parts.OPTIONS["scheduler"]), ("update", parts.RULES)),
            *(("source", parts.SOURCES), ("track", {"cursor": None})),
        )
        for part in table
    ),
}
"""The parts that runs must be seen to take, and to go on with."""


def cover(used: dict[int, set[str]]) -> list[int]:
    """A few of the seeds, whose programs use all of DEEP that any uses."""
    left, chosen = DEEP & set().union(*used.values()), []
    while left:
        chosen.append(max(used, key=lambda seed: len(used[seed] & left)))
        left -= used[chosen[-1]]
    return sorted(chosen)


def main(count: int, first: int = 0) -> None:
    found: Counter[str] = Counter()
    used: dict[int, set[str]] = {}
    begun = monotonic()
    for seed in range(first, first + count):
        tried = attempt(seed)
        found.update(tried.found)
        used[seed] = tried.used
        for key in tried.found:
            if key.startswith("foreign"):
                print(seed, key, flush=True)
    for key, number in sorted(found.items()):
        if not key.startswith("foreign"):
            print(f"{number:7} {key}")
    print(f"\nnever in an accepted run: {sorted(DEEP - set().union(*used.values()))}")
    print(f"seeds that reach the others: {cover(used)}")
    foreign = sum(number for key, number in found.items() if key.startswith("foreign"))
    print(f"{count} programs, {foreign} foreign, {monotonic() - begun:.0f} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with no_waiting_for_the_disk():
        main(*map(int, sys.argv[1:]))
