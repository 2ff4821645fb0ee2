"""The benchmark for GPUs, on small models and a CPU."""

import importlib.util
import json
import os
import time
from itertools import product

import pytest
import torch

from tests.benchmarks import gpu, gpu_side
from tests.benchmarks.agree import difference
from tests.benchmarks.gpu_models import MODELS
from tests.benchmarks.gpu_side import METHODS, Cell, Measured, Way
from tests.benchmarks.sides import LIBRARY, LOOP

AMPLIFIED = 3e-3
"""How far sides may be apart in float32: Adam's step is steep where a gradient is small."""
WAY = Way("cpu", tiny=True, warmup=0, steps=2)
CELL = Cell("transformer110m", "sama", "fp32", LOOP)


def run(side, model, method, dtype):
    """The hypergradients and all parameters of two outer steps."""
    case = MODELS[model](tiny=True)
    case.to(dtype)
    ticking = gpu_side.make_side(Cell(model, method, "fp32", side), case)
    found = []
    for _ in range(2):
        ticking.tick()
        found.append([p.grad for p in case.upper.parameters()])
        found.append([p.detach().clone() for p in case.upper.parameters()])
        found.append([p.detach().clone() for p in case.lower.parameters()])
    return [torch.cat([part.flatten() for part in parts]) for parts in found]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, AMPLIFIED)], ids=str
)
@pytest.mark.parametrize(("model", "method"), list(product(MODELS, METHODS)))
def test_both_sides_take_the_same_steps(model, method, dtype, tolerance):
    found = run(LIBRARY, model, method, dtype)
    for value, wanted in zip(found, run(LOOP, model, method, dtype), strict=True):
        assert difference(value, wanted) <= tolerance


@pytest.mark.slow
def test_the_command_writes_every_cell(tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--warmup", "0", "--steps", "2", "--out", str(tmp_path)]
    chosen = {
        "models": ["transformer110m"],
        "methods": ["finite_difference", "sama"],
        "precisions": ["fp32", "bf16"],
        "sides": [LOOP, LIBRARY],
    }
    gpu.main(words + [word for key, names in chosen.items() for word in (f"--{key}", *names)])
    figures = json.loads((tmp_path / "gpu.json").read_text())
    cells = [
        (row["model"], row["precision"], row["method"], row["side"]) for row in figures["rows"]
    ]
    wanted = [chosen[key] for key in ("models", "precisions", "methods", "sides")]
    assert cells == list(product(*wanted))
    for row in figures["rows"]:
        low, middle, high = row["milliseconds"]
        assert 0.0 < low <= middle <= high
        assert row["error"] < AMPLIFIED or row["precision"] == "bf16"
        assert row["time"] > 0.0 if row["side"] == LIBRARY else row["time"] == 1.0
        assert row["note"] == ""
    assert figures["way"] == {"device": "cpu", "tiny": True, "warmup": 0, "steps": 2}
    assert figures["machine"]["torch"] == torch.__version__
    table = (tmp_path / "gpu.txt").read_text()
    assert table == capsys.readouterr().out
    assert all(all(word in table for word in cell) for cell in cells)
    assert table.count(LIBRARY) == len(cells) // 2


def test_a_budget_that_is_spent_leaves_rows_without_figures(tmp_path):
    words = ["--tiny", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)]
    gpu.main([*words, "--models", "resnet32", "--methods", "cg", "--sides", LIBRARY, LOOP])
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [row["side"] for row in rows] == [LOOP, LIBRARY] * len(gpu_side.PRECISIONS)
    assert {row["note"] for row in rows} == {gpu.OUT_OF_TIME}


def die(sender, cell, way):
    os._exit(3)


def hang(sender, cell, way):
    time.sleep(60.0)


def test_a_process_that_dies_or_hangs_costs_its_own_cell_alone(monkeypatch):
    monkeypatch.setattr(gpu, "_answer", die)
    assert gpu._apart(CELL, WAY, None) == Measured(note="the process ended with 3")
    monkeypatch.setattr(gpu, "_answer", hang)
    assert gpu._apart(CELL, WAY, time.monotonic() + 0.5) == Measured(note=gpu.OUT_OF_TIME)


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (ValueError("first\nsecond"), "ValueError: first"),
    ],
)
def test_errors_are_notes(monkeypatch, error, note):
    def fail(*, tiny):
        raise error

    monkeypatch.setitem(MODELS, CELL.model, fail)
    found = gpu_side.measure(CELL, WAY)
    assert found.note == note
    assert not found.milliseconds


def test_without_betty_its_cells_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = ["--device", "cpu", "--models", "resnet32", "--methods", "cg", "--precisions", "fp32"]
    cells = gpu._cells(gpu._arguments(words))
    assert [cell.side for cell in cells] == [LOOP, LIBRARY]
    assert "betty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cuda"], "torch finds no GPU"),
        (["--steps", "1"], "--steps must be"),
        (["--models", "vgg"], "invalid choice"),
    ],
)
def test_arguments_are_checked(monkeypatch, capsys, words, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(words)
    assert said in capsys.readouterr().err
