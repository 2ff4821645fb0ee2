"""The example with two upper levels: it beats its baselines, reads its format, refuses others."""

import gzip
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
COLUMNS = ("plain", "clean set only", "both pooled", "reweighted", "corrected", "two uppers")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "examples" / "weak_supervision.py"))


@pytest.fixture
def example(script, monkeypatch, capsys):
    """Runs the example's ``main`` here: exit code, output, errors."""
    threads = torch.get_num_threads()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["weak_supervision.py", *map(str, arguments)])
        try:
            script["main"]()
        except SystemExit as stop:
            code, message = (1, stop.code) if isinstance(stop.code, str) else (stop.code, "")
        else:
            code, message = 0, ""
        captured = capsys.readouterr()
        return code, captured.out, captured.err + message

    yield call
    torch.set_num_threads(threads)


def means(output):
    (row,) = re.findall(r"^│ mean.*$", output, re.MULTILINE)
    return dict(zip(COLUMNS, map(float, re.findall(r"\d+\.\d+", row)), strict=True))


def rules(count):
    """The first is always right, the second always wrong; both abstain at times."""
    return [[i % 2 if i % 5 else -1, 1 - i % 2 if i % 7 == 0 else -1] for i in range(count)]


def fake_set(folder, name="tiny", **changes):
    """Two classes told apart by one word."""

    def part(count):
        y = [index % 2 for index in range(count)]
        return {
            "text": [f"{('good', 'bad')[label]} thing {i % 3}" for i, label in enumerate(y)],
            "y": y,
            "L": rules(count),
        }

    data = {"classes": ["good", "bad"], "train": part(60), "valid": part(20), "test": part(30)}
    data["train"]["n_unlabeled"] = 50
    data.update(changes)
    with gzip.open(folder / f"{name}.json.gz", "wt") as file:
        json.dump(data, file)


@pytest.mark.slow
def test_two_uppers_beat_training_on_the_weak_labels():
    done = subprocess.run(
        [sys.executable, "examples/weak_supervision.py", "--seeds", "1", "--steps", "400"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = means(done.stdout)
    assert found["two uppers"] > found["plain"] + 5
    assert found["two uppers"] > found["both pooled"] + 5
    assert "the best other column" in done.stdout


def test_a_set_in_the_real_format_is_learned(tmp_path, example):
    fake_set(tmp_path)
    code, output, errors = example("--data", tmp_path, "--set", "tiny", "--seeds", 2, "--steps", 30)
    assert (code, errors) == (0, "")
    assert means(output)["two uppers"] == 100.0
    assert "+-" in output


def test_uncovered_and_further_rows_are_left_out(tmp_path, script):
    fake_set(tmp_path)
    task = script["texts"](tmp_path / "tiny.json.gz", 0)
    votes = rules(50)
    covered = [row for row in votes if max(row) >= 0]
    alone = [row for row in covered if min(row) == -1]
    assert len(covered) < 50
    assert len(task.weak) == len(covered)
    _, _, agreement = task.weak.tensors
    assert (agreement == 1.0).sum() == len(alone)  # the two rules never agree
    assert (len(task.clean), len(task.test), task.classes) == (20, 30, 2)


def test_the_vote_takes_the_majority(script):
    x, y = np.zeros((3, 1)), np.array([0, 1, 1])
    votes = np.array([[0, 0, 1], [1, -1, -1], [-1, -1, -1]])
    task = script["task_of"](2, (x, y), votes, (x, y), (x, y), np.random.default_rng(0))
    _, labels, agreement = task.weak.tensors
    assert labels.tolist() == [0, 1]
    assert agreement.tolist() == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize("what", ["no folder", "no set", "not gzip", "no labels", "other length"])
def test_wrong_data_are_refused_with_a_message(tmp_path, example, what):
    folder = tmp_path / "missing" if what == "no folder" else tmp_path
    fake_set(tmp_path, "other length", valid={"text": ["one", "two"], "y": [0], "L": [[0, 0]]})
    fake_set(tmp_path, "no labels", test={"text": ["one"]})
    (tmp_path / "not gzip.json.gz").write_text("{}")
    code, output, errors = example("--data", folder, "--set", what, "--seeds", 1, "--steps", 1)
    assert code != 0
    assert output == ""
    assert str(folder) in errors
    expected = {"no folder": "there is no such folder", "no set": "there is no file"}
    assert expected.get(what, "is not a data set") in errors


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
def test_counts_below_one_are_refused(example, option):
    code, _, errors = example(option, 0)
    assert code == 2
    assert "must be at least 1" in errors
