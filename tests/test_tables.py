"""A history as frames of pandas and as HTML, and what a cell shows of a run."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import RunError
from mlodeco.runtime.history import History, ValidationRecord
from tests.test_hooks import make, run

COLUMNS = {
    "tick": "int64",
    "level": "str",
    "step": "int64",
    "loss": "float64",
    "grad_norm": "float64",
    "learning_rate": "float64",
    "cosine": "float64",
    "skipped": "bool",
    "solver_steps": "int64",
    "residual": "float64",
}


@pytest.fixture
def result(tmp_path):
    program = make()

    @program.on("after_step", level="top")
    def log(ctx, low):
        ctx.log(count=ctx.step, whole=low.x, loss=7.0)

    @program.validate(every=2, monitor="a", mode="min")
    def first(low, ctx):
        return {"a": 10.0 - ctx.tick}

    program.validate(every=3)(lambda ctx: {"<b>": 1.0})
    return run(program, 4)


def dtypes(frame):
    return {key: str(dtype) for key, dtype in frame.dtypes.items()}


def test_frames_hold_the_records(result):
    steps, validations = result.history.to_pandas()
    assert len(steps) == len(result.history) == 8
    assert list(steps.columns) == [*COLUMNS, "size", "count", "whole", "metric_loss"]
    found = dtypes(steps)
    assert {key: found[key] for key in COLUMNS} == COLUMNS
    assert found["size"] == found["count"] == "float64"
    assert steps.loss.tolist() == [record.loss for record in result.history.steps]
    low, top = steps[steps.level == "low"], steps[steps.level == "top"]
    assert top["count"].tolist() == [1, 2, 3, 4]
    assert low["count"].isna().all()
    assert low.cosine.isna().all()
    assert math.isnan(top.cosine.iloc[0])
    assert top.cosine.iloc[1:].tolist() == [r.cosine for r in result.history.of("top")[1:]]
    assert torch.is_tensor(top.whole.iloc[0])
    assert dtypes(validations) == {"tick": "int64", "a": "float64", "<b>": "float64"}
    assert validations.tick.tolist() == [2, 3, 4, 4]
    assert validations.a.dropna().tolist() == [8.0, 6.0]


def test_a_validation_metric_keeps_off_the_column_of_ticks():
    history = History()
    history.validations = [ValidationRecord(3, {"tick": 0.5, "a": 1.0})]
    (row,) = history.to_pandas().validations.to_dict("records")
    assert row == {"tick": 3, "metric_tick": 0.5, "a": 1.0}


def test_frames_of_nothing_have_the_same_columns():
    steps, validations = History(["low"]).to_pandas()
    assert dtypes(steps) == COLUMNS
    assert dtypes(validations) == {"tick": "int64"}
    assert len(steps) == len(validations) == 0


def test_without_pandas_the_error_says_what_to_do(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RunError, match=r"pip install pandas; history\.rows\(\)"):
        result.history.to_pandas()


def test_html_is_a_row_a_level(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    html = result.history._repr_html_()
    rows = [re.findall("<t[hd]>(.*?)</t", row) for row in re.findall("<tr>(.*?)</tr>", html)]
    last = {record.level: record for record in result.history.steps}
    assert rows[0] == ["level", "step", "loss", "gradient", "cosine", "rate", "skipped"]
    assert [row[:3] for row in rows[1:3]] == [
        [name, "4", f"{last[name].loss:.4g}"] for name in ("low", "top")
    ]
    assert rows[1][4] == ""  # the cosine of a level without lower levels
    assert rows[4:] == [["a", "6", "4"], ["&lt;b&gt;", "1", "4"]]
    assert "<p>4 ticks;" in html
    assert "<p>0 ticks;" in History(["low"])._repr_html_()


def test_what_a_cell_shows_is_a_line(result):
    history = result.history
    low, top = history.steps[-2:]
    assert repr(result) == "<Result: 4 ticks; all 4 steps were run; best a 6 at tick 4>"
    assert repr(low) == (
        f"<step 4 of 'low' at tick 4: loss {low.loss:.4g}, size {low.metrics['size']:.4g}>"
    )
    assert repr(top) == (
        f"<step 4 of 'top' at tick 4: loss {top.loss:.4g}, count 4, whole of shape (2,), loss 7>"
    )
    assert repr(history.validations[0]) == "<validation at tick 2: a 8>"
    assert "best" not in repr(run(make(), 1))


def test_a_tick_is_a_line():
    program = make({"inner_steps": 2})
    program.validate(every=2)(lambda low: {"x": torch.tensor(2.0)})
    runner = Runner(program)
    first, second = runner.step(), runner.step()
    assert repr(first) == f"<Tick 1: low {first.steps[0].loss:.4g}>"
    losses = ", ".join(f"{r.level} {r.loss:.4g}" for r in second.steps)
    assert repr(second) == f"<Tick 2: {losses}; x 2>"
    assert len(second.steps) == 2


def test_a_skipped_step_says_so():
    program = Program()

    @program.level("low", module={"x": torch.ones(1)}, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    def low(m, ctx):
        return m.x.sum() * (float("nan") if ctx.tick == 2 else 1.0)

    with pytest.warns(mlodeco.errors.NonFiniteWarning):
        history = run(program, 2, nonfinite="skip").history
    assert repr(history.steps[1]) == "<step 2 of 'low' at tick 2: skipped>"
    assert history._repr_html_().count("<td>1</td>") == 1
    assert history.to_pandas().steps.skipped.tolist() == [False, True]
