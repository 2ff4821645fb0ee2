"""Random declarations, most of them wrong: whatever they raise must be the package's own.

As a script, ``python -m tests.fuzz_declarations 10000`` prints how many programs were accepted,
refused by which exception, and ended by a foreign one.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter, OrderedDict
from functools import partial
from random import Random
from time import monotonic

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import mlodeco
from mlodeco import MlodecoError, Program
from mlodeco.hypergrad import CG, Neumann, Unroll


class MineError(Exception):
    """What a person's own code raises."""


def fail(*args, **kwargs):
    raise MineError


def failing_items():
    yield torch.ones(2)
    raise MineError


class Callable:
    def __call__(self, model, batch=None):
        return penalty(model)


class FailingIterable:
    def __iter__(self):
        raise MineError


class OddRepr:
    """No junk of a person's is safe to print in full."""

    def __repr__(self):
        return "odd " * 1000


def penalty(*values):
    """A loss of whatever is a module among the arguments."""
    loss = torch.zeros(())
    for module in values:
        if isinstance(module, nn.Module):
            for p in module.parameters():
                if p.is_floating_point() and not p.is_meta and not p.is_sparse:
                    loss = loss + (p.float() ** 2).sum()
    return loss


JUNK = (
    *(None, True, False, 0, 1, -1, 10**400, -(10**30), 1.5, float("nan"), float("inf"), 1j),
    *("", "x", "low", "top", "batch", "neumann", b"bytes", (), [], {}, set(), ["low"], ("low", 1)),
    *({"low": "top"}, {1: 2}, {"x": None}, {"lr": len}, object(), OddRepr(), object, int, len, max),
    *(
        fail,
        torch.zeros(2),
        torch.zeros(()),
        np.zeros(2),
        np.int64(3),
        nn.Linear,
        nn.ReLU(),
        range(2),
    ),
    *(
        failing_items,
        failing_items(),
        FailingIterable(),
        Ellipsis,
        NotImplemented,
        mlodeco,
        Program(),
    ),
    *(
        lambda: None,
        lambda x: x,
        SGD,
        [None],
        [[]],
        {"low": None},
        {"low": "cg"},
        "unroll",
        CG(),
        CG,
    ),
)

NAMES = (
    *(
        "low",
        "top",
        "mid",
        "x",
        "batch",
        "ctx",
        "",
        " ",
        "class",
        "None",
        "__init__",
        "a.b",
        "é",
        "日本",
    ),
    *("a" * 5000, "1a", "a b", "\n", "\x00", "self", "args", "model", "💥", "params", "\ud800"),
    *(
        None,
        1,
        True,
        b"low",
        ("low",),
        [],
        {},
        object(),
        len,
        float("nan"),
        "_",
        "__dict__",
        "grads",
    ),
)


def functions(r: Random):
    """Level functions of every signature."""
    other = r.choice(["low", "top", "mid", "x", "nobody"])
    returned = r.choice(
        [
            None,
            3,
            "x",
            torch.ones(2),
            torch.ones((), dtype=torch.int),
            {},
            {"loss": None},
            (),
            [],
            (torch.ones(()),),
            (torch.ones(()), 3),
            torch.ones((), dtype=torch.cfloat),
            nn.ReLU(),
            torch.ones(()),
            torch.ones((), device="meta"),
            object(),
            {"loss": torch.ones(())},
        ]
    )
    made: dict[str, object] = {}
    text = r.choice(
        [
            "model", "model, batch", f"model, {other}", f"model, {other}=None", "*args", "**kwargs",
            "model, *args, **kwargs", "*, model", "model, /", f"model, /, *, {other}", "",
            "self, m",
            "ctx", "batch", "model, batch=None, ctx=None", f"{other}, model", "low, top", "m, a, b",
            "model, x=1", "low", "top", "m, *, batch", "m, loww=None",
        ]
    )  # fmt: skip
    names = [part.strip().split("=")[0].lstrip("*") for part in text.split(",")]
    values = ", ".join(name for name in names if name not in ("", "/", "args", "kwargs"))
    exec(f"def made({text}): return penalty({values})", {"penalty": penalty}, made)
    plain = made["made"]
    wrapped = {
        "plain": plain,
        "lambda": lambda model: penalty(model),
        "partial": partial(plain),
        "bound": partial(plain, 1),
        "named": partial(plain, model=1),
        "returns": lambda model: returned,
        "pair": lambda model: (penalty(model), {"metric": returned}),
        "dictionary": lambda model: {"loss": penalty(model), "other": returned},
        "nan": lambda model: penalty(model) * float("nan"),
        "fails": fail,
        "callable": Callable(),
    }
    odd = {
        "class": Callable, "async": coroutine, "generator": failing_items, "builtin": max,
        "torch": torch.sum, "type": type, "method": Callable.__call__, "descriptor": dict.update,
        "junk": r.choice(JUNK), "module": nn.Linear(2, 2), "property": property(fail),
        "staticmethod": staticmethod(plain), "classmethod": classmethod(plain),
        "partial": partial(max), "ufunc": np.add,
    }  # fmt: skip
    return r.choice([*wrapped.values(), *[plain] * 10, r.choice([*odd.values()])])


async def coroutine(model):
    return model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight


SHARED = nn.Linear(2, 1)


def modules(r: Random):
    integers = nn.Module()
    integers.n = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    mixed = nn.Linear(1, 1)
    mixed.n = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    bad_key = r.choice(["", "a.b", "keys", "x", 1, None, "é", "class", ("a",)])
    junk = r.choice(JUNK)
    forms = [
        partial(nn.Linear, 2, 1), {"x": torch.ones(2)}, lambda: nn.Linear(2, 1), fail,
        lambda: junk, {bad_key: torch.ones(1)}, {"x": junk}, "low", "top", "nobody", SHARED,
        nn.ReLU(), integers, mixed, frozen, nn.Linear(2, 1, device="meta"), Tied(), nn.Linear,
        nn.LazyLinear(2), {"x": torch.ones(2, dtype=torch.cfloat)}, {"x": torch.empty(0)},
        {"x": torch.eye(2).to_sparse()}, {"x": torch.ones(1, device="meta")}, {}, junk,
        {"x": torch.ones(2).half()}, OrderedDict(x=torch.ones(1)), nn.ModuleList(),
        nn.ParameterDict(), lambda a: nn.Linear(2, 1),
        nn.Embedding(3, 2, sparse=True), {"x": torch.tensor(float("nan"))},
        lambda: {"x": torch.ones(2)}, nn.Parameter(torch.ones(2)), Tied, [nn.Linear(1, 1)],
        nn.Linear(2, 1).state_dict(), lambda: nn.Linear(2, 1, device="meta"),
    ]  # fmt: skip
    return r.choice([*forms, *forms[:3] * 12])


def datas(r: Random):
    junk = r.choice(JUNK)
    batch = torch.ones(2, 2)
    return r.choice([
        None, [batch], [batch] * 2, [], (batch,), iter([batch]), failing_items, failing_items(),
        FailingIterable(), DataLoader([torch.ones(2)] * 4, batch_size=2), DataLoader([]), junk,
        {"a": [batch]}, {"a": [batch], "b": junk}, {"low": [batch]}, {"batch": [batch]},
        {1: [batch]},
        {}, lambda: [batch], lambda: iter([batch]), lambda: junk, fail, {"a b": [batch]}, [junk],
        {"a": []}, {"class": [batch]}, batch, "text", {"a": failing_items}, lambda x: [batch],
    ])  # fmt: skip


def optimizers(r: Random):
    junk = r.choice(JUNK)
    mine = [nn.Parameter(torch.ones(1))]
    return r.choice([
        partial(SGD, lr=0.1), partial(Adam, lr=0.1), partial(SGD, lr=0.1), SGD, None, junk, fail,
        lambda params: junk, lambda module: SGD(module.parameters(), lr=0.1), SGD(mine, lr=0.1),
        lambda params: SGD(mine, lr=0.1), lambda: None, lambda a, b: None, torch.optim.LBFGS,
        lambda *, params: SGD(params, lr=0.1), torch.optim.Optimizer, nn.Linear(1, 1),
    ])  # fmt: skip


def schedulers(r: Random):
    junk = r.choice(JUNK)
    return r.choice(
        [None, partial(StepLR, step_size=1), junk, fail, lambda optimizer: junk, lambda: None]
    )


def methods(r: Random):
    junk = r.choice(JUNK)
    known = ["neumann", "cg", "minres", "identity", "unroll", "sama", "nystrom", "dense", "neuman"]
    mapped = [{"low": r.choice(known)}, {"low": junk}, {"nobody": "cg"}]
    mapped.append({junk: "cg"} if _hashes(junk) else {})
    return r.choice(
        [*known, None, CG(max_steps=2), Neumann(num_terms=2), Unroll(), CG, junk, *mapped]
    )


def _hashes(value):
    try:
        hash(value)
    except TypeError:
        return False
    return True


NAMED_LISTS = (
    (),
    ["low"],
    ["low", "mid"],
    ["nobody"],
    ["top"],
    "low",
    [""],
    [1],
    ["low", "low"],
    None,
    1,
)


def options(r: Random):
    """One option of ``level`` with some value."""
    junk = r.choice(JUNK)
    name = r.choice((*mlodeco.declare.registry.LEVEL_OPTIONS, "lr", "modul", "name"))
    makers = {
        "module": modules, "data": datas, "optimizer": optimizers, "scheduler": schedulers,
        "hypergrad": methods,
        "lower": lambda r: r.choice(NAMED_LISTS),
        "reads": lambda r: r.choice([*NAMED_LISTS, {"low": "x"}, {"x": "low"}]),
        "params": lambda r: r.choice([
            lambda n: True, lambda n: False, ["weight"], ["nope"], fail, lambda: 1, lambda n: junk,
            [junk], junk,
        ]),
        "fields": lambda r: r.choice([("x", "y"), ("x",), ("batch",), ("a b",), (), "xy", ["low"]]),
        "tune": lambda r: r.choice([
            {"lr": lambda low: 0.1}, {"lr": fail}, {"lr": lambda top: junk}, {"nope": len},
            {"lr": junk}, {1: fail}, {"lr": lambda nobody: 1},
        ]),
        "replicas": lambda r: r.choice([1, 2, 0, -(10**6), True]),
        "init_from": lambda r: r.choice(["top", "low", "nobody", ""]),
        "precision": lambda r: r.choice(["fp32", "bf16", "fp16", "bf61"]),
    }  # fmt: skip
    if name in makers and r.random() < 0.8:
        return name, makers[name](r)
    if name in ("inner_steps", "repeat", "accumulate", "warmup") and r.random() < 0.5:
        return name, r.choice([1, 2, 3, np.int64(2)])
    # so many steps are legal, and would be taken
    return name, -junk if isinstance(junk, int) and junk > 1000 else junk


def odd_name(r: Random):
    if r.random() < 0.3:
        return "".join(chr(r.randrange(0x110000)) for _ in range(r.randrange(4)))
    return r.choice(NAMES)


def declare_level(program: Program, r: Random, name: str):
    given = {"module": {"x": torch.ones(2)}, "optimizer": partial(SGD, lr=0.1)}
    if name == "top":
        given |= {"lower": ["low"], "hypergrad": r.choice(["neumann", "cg", "unroll", "identity"])}
    for _ in range(r.choice([0, 0, 0, 1, 1, 2])):
        key, value = options(r)
        given[key] = value
    given.pop("name", None)
    chosen = odd_name(r) if r.random() < 0.05 else name
    reading = {
        "low": lambda model, top=None: penalty(model, top),
        "top": lambda m, low: penalty(m, low),
    }
    function = (
        functions(r) if r.random() < 0.25 else reading.get(name, lambda model: penalty(model))
    )
    program.level(chosen, **given)(function)


def declare_other(program: Program, r: Random):
    """A source, hook, validation, method or update rule."""
    junk, function = r.choice(JUNK), functions(r)
    kind = r.choice(["source", "on", "validate", "method", "update", "bare"])
    key = r.choice(
        ["every", "refresh", "level", "data", "monitor", "mode", "patience", "evry", "event"]
    )
    some = {key: r.choice([junk, 1, "low", "loop"])} if r.random() < 0.6 else {}
    if kind == "source":
        named = r.choice(["x", "low", odd_name(r)])
        value = r.choice([datas(r), function, failing_items, lambda low: iter([low])])
        some.pop("name", None)
        program.source(named, **some)(value)
    elif kind == "on":
        event = r.choice([*mlodeco.declare.registry.EVENTS, "stepp", junk])
        some.pop("event", None)
        program.on(event, **some)(r.choice([function, lambda ctx: None, lambda grads: None, fail]))
    elif kind == "validate":
        returned = r.choice([junk, {"a": junk}, {"a": 1.0}, {junk: 1.0} if _hashes(junk) else {}])
        program.validate(**some)(r.choice([function, lambda low: returned, lambda: returned, junk]))
    elif kind == "method":
        program.method(r.choice(["mine", "cg", odd_name(r)]))(
            r.choice([function, junk, lambda matvec, b: b, lambda matvec, b: junk, CG, CG()])
        )
    elif kind == "update":
        program.update(r.choice(["low", "top", odd_name(r)]))(
            r.choice(
                [function, junk, lambda params: junk, lambda params, grads: (params, {}), fail]
            )
        )
    else:
        getattr(program, r.choice(["level", "source", "on", "validate", "method", "update"]))(junk)


def attempt(r: Random) -> Counter[str]:
    """Declares a random program and uses it.

    Returns:
        How many calls were accepted, and refused by which exception; foreign ones with their
        last lines under ``"foreign: ..."``.
    """
    program, found = Program(), Counter()

    def tried(what, call):
        try:
            call()
            found[f"{what}: accepted"] += 1
        except MlodecoError as error:
            found[f"{what}: {type(error).__name__}"] += 1
        except MineError:
            found[f"{what}: a person's own"] += 1
        except Exception as error:
            if any("raised by" in note for note in getattr(error, "__notes__", ())):
                found[f"{what}: a person's own"] += 1
                return
            frames = traceback.extract_tb(error.__traceback__)[-6:]
            where = " < ".join(
                f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in reversed(frames)
            )
            found[f"foreign: {what}: {type(error).__name__}: {str(error)[:90]!r} {where}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = r.choice(
            [["low"], ["low", "top"], ["low", "top"], ["top", "low"], ["low", "mid", "top"]]
        )
        for name in names:
            tried("declared", lambda name=name: declare_level(program, r, name))
        for _ in range(r.choice([0, 0, 1, 2])):
            tried("declared", lambda: declare_other(program, r))
        tried("graph", lambda: str(program.graph()))
        asked = r.choice(["low", "top", "top", odd_name(r)])
        given = {} if r.random() < 0.8 else {"hypergrad": methods(r)}
        tried("hypergradient", lambda: mlodeco.hypergradient(asked, program=program, **given))
        tried("run", lambda: mlodeco.run(2, program=program, progress="off"))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    total: Counter[str] = Counter()
    for seed in range(int(sys.argv[1])):
        begun = monotonic()
        found = attempt(Random(seed))
        total.update(found)
        if (seconds := monotonic() - begun) > 5.0:
            print(seed, f"took {seconds:.0f} s", flush=True)
        for key in found:
            if key.startswith("foreign"):
                print(seed, key, flush=True)
    for key, count in sorted(total.items()):
        if not key.startswith("foreign"):
            print(f"{count:7} {key}")
    foreign = sum(count for key, count in total.items() if key.startswith("foreign"))
    print(f"{foreign:7} foreign")
