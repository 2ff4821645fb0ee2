"""What the page about watching a run says of the records is what they are."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from mlodeco.runtime import SolveRecord, StepRecord, ValidationRecord
from mlodeco.runtime.checkpoint.journal import Journal, read_records
from mlodeco.runtime.history import History, columns

PAGE = (Path(__file__).parent.parent / "docs" / "monitoring.md").read_text()

TYPES = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}


def listed(what):
    """The documented fields of a kind of record, and the types of their values."""
    table = PAGE[PAGE.index(f"| field of a {what} |") :].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", table, re.MULTILINE)
    return {name: {TYPES[one] for one in kinds.split(" or ")} for name, kinds in rows}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    program = Program()

    @program.level("low", module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.1))
    def low(m, top, ctx):
        ctx.log(many=torch.tensor([1.0, torch.inf]))
        return ((m.x - top.x) ** 2).sum()

    @program.level(
        "top",
        lower=["low"],
        module={"x": torch.zeros(2)},
        optimizer=partial(SGD, lr=0.1),
        hypergrad="cg",
    )
    def top(m, low, ctx):
        factor = float("nan") if ctx.tick == 3 else 1.0
        return factor * ((low.x - 3) ** 2).sum()

    program.validate(every=2)(lambda: {"m": 1})
    out = tmp_path_factory.mktemp("lines")
    with pytest.warns(mlodeco.errors.NonFiniteWarning):
        mlodeco.run(5, program=program, out=out, progress="off", nonfinite="skip")
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


@pytest.mark.parametrize("kind", ["step", "validation", "solve"])
def test_the_fields_of_a_record_are_those_documented(kind, lines):
    steps = [line for line in lines if line["kind"] == "step"]
    found = (
        [solve for line in steps for solve in line["solves"]]
        if kind == "solve"
        else [line for line in lines if line["kind"] == kind]
    )
    assert found
    fields = listed(kind)
    for line in found:
        assert list(line) == list(fields)
        for name, value in line.items():
            number = float(value) if value == "NaN" else value
            assert type(number) in fields[name], name
    seen = {name: {type(line[name]) for line in found} - {str} for name in fields}
    if kind == "step":
        assert seen["cosine"] == fields["cosine"], "each type is there"
        assert [line["grad_norm"] == "NaN" for line in found] == [line["skipped"] for line in found]
        assert found[0]["metrics"] == {"many": [1.0, "Infinity"]}
    if kind == "solve":
        assert tuple(fields) == SolveRecord._fields


def test_the_order_is_that_documented(lines):
    assert [(line["tick"], line.get("level")) for line in lines[:7]] == [
        (1, "low"),
        (1, "top"),
        (2, "low"),
        (2, "top"),
        (2, None),
        (3, "low"),
        (3, "top"),
    ]


def test_every_scalar_is_listed():
    record = StepRecord(1, "low", 1, 0.0, 0.0, 0.1)
    table = PAGE[PAGE.index("| scalar | is |") :].partition("\n\n")[0]
    named = set(re.findall(r"`LEVEL/(\w+)`", table)) - {"METRIC", "metric_loss"}
    assert named == columns(record).keys() - {"tick", "level"}


def test_only_where_numbers_stand_are_words_read_as_numbers():
    solve = SolveRecord("NaN", "Infinity", 3, math.inf, "-Infinity")
    metrics = {"NaN": -math.inf, "many": [1.0, math.nan]}
    history = History()
    history.steps = [
        StepRecord(1, "NaN", 1, math.nan, math.inf, -math.inf, metrics, (solve,), math.nan),
        StepRecord(1, "Infinity", 1, 0.5, 0.5, 0.5, {"text": "nan", "none": None}),
    ]
    history.validations = [ValidationRecord(1, {"Infinity": math.nan})]
    journal = Journal(history)
    journal.update(1)
    found = read_records(journal.text())
    assert list(map(vars_of, found)) == list(map(vars_of, [*history.steps, *history.validations]))


def vars_of(record):
    return repr(vars(record))  # NaN is NaN


def test_a_run_of_a_level_that_is_called_nan_is_read_and_goes_on(tmp_path):
    program = Program()

    @program.level("NaN", module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.1))
    def loss(m, ctx):
        ctx.log(text="NaN")
        return (m.x**2).sum()

    mlodeco.run(2, program=program, out=tmp_path, progress="off")
    assert len(mlodeco.read_history(tmp_path).of("NaN")) == 2
    result = mlodeco.run(4, program=program, out=tmp_path, progress="off", resume="auto")
    assert len(result.history.of("NaN")) == 4
    texts = [record.metrics["text"] for record in result.history.steps]
    assert repr(texts) == "[nan, nan, 'NaN', 'NaN']", "as the page says"
