"""The examples whose levels are unrolled, in tiny settings: they run, and learn something."""

import argparse
import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # postponed annotations of its records are looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maml():
    return load("maml_omniglot")


@pytest.fixture(scope="module")
def rates():
    return load("learned_learning_rate")


@pytest.fixture(scope="module")
def forward():
    return load("hyper_lr_forward")


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["example.py", *map(str, arguments)])
    module.main()


def given(method, steps, test_tasks):
    return argparse.Namespace(method=method, steps=steps, tasks=4, test_tasks=test_tasks)


@pytest.fixture(scope="module")
def omniglot(tmp_path_factory):
    """A file of the form of Omniglot's: enough characters to learn from, and noise as drawings."""
    folder = tmp_path_factory.mktemp("omniglot")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (1230 * 20, 28, 28), dtype=np.uint8)
    np.savez(folder / "omniglot_28_u8.npz", x_bg=images[: 1000 * 20], x_ev=images[1000 * 20 :])
    return folder


class TestMaml:
    def test_beats_fresh_weights_and_the_nearest_image(self, maml, monkeypatch):
        monkeypatch.setattr(maml, "CHOOSING", 5)
        setting = maml.Setting(maml.Divisions(3), partial(maml.small, 3), 1e-2)
        nearest, few, more, without, found = maml.experiment(
            setting, given("maml", 100, 20), 3
        ).values()
        assert found > max(nearest, few, more) + 3
        assert 40 < without < 60  # which group is which cannot be known

    @pytest.mark.parametrize("method", ["maml", "fomaml", "anil", "imaml", "reptile"])
    def test_methods_run(self, maml, monkeypatch, method):
        monkeypatch.setattr(maml, "CHOOSING", 1)
        setting = maml.Setting(maml.Divisions(0), partial(maml.small, 0), 1e-2)
        row = maml.experiment(setting, given(method, 2, 2), 0)
        steps = maml.METHODS[method].steps
        assert list(row)[-2:] == [f"{method}\n0 steps", f"{method}\n{steps} steps"]
        assert all(0 <= value <= 100 for value in row.values())

    def test_tells_anil_to_move_the_last_layer_alone(self, maml):
        setting = maml.Setting(maml.Divisions(0), partial(maml.small, 0), 1e-2)
        program = maml.declare(setting, "anil", 0, 2)
        task = setting.tasks.draw("test", torch.Generator().manual_seed(0))
        start = program.module("init")
        solved = maml.mlodeco.solve("weights", batches={"task": task}, steps=5, program=program)
        pairs = zip(start.named_parameters(), solved.parameters(), strict=True)
        moved = {name for (name, before), after in pairs if not torch.equal(before, after)}
        assert moved == {"4.weight", "4.bias"}

    def test_parts_share_no_division_and_no_image(self, maml):
        tasks = maml.Divisions(0)
        one, other = ({tuple(d.tolist()) for d in tasks.parts[part]} for part in ("learn", "test"))
        assert (len(one), len(other), one & other) == (80, 40, set())
        images = [torch.cat(tasks.of_digit[part]) for part in ("learn", "test")]
        assert not torch.isin(*images).any()

    @pytest.mark.parametrize(("ways", "shots"), [(5, 1), (20, 2)])
    def test_reads_omniglot(self, maml, omniglot, monkeypatch, capsys, ways, shots):
        monkeypatch.setattr(maml, "CHOOSING", 1)
        monkeypatch.setattr(maml, "GRID", (0.1,))
        options = {"ways": ways, "shots": shots, "width": 4, "tasks": 2, "steps": 1, "seeds": 1}
        arguments = [x for name, value in options.items() for x in (f"--{name}", value)]
        call(maml, monkeypatch, "--data", omniglot, *arguments, "--test-tasks", 1)
        shown = capsys.readouterr().out
        assert f"{ways} ways, {shots} shots" in shown
        assert "nan" not in shown

    def test_omniglot_has_classes_that_are_turned_characters(self, maml):
        images = torch.arange(1201 * 20, dtype=torch.uint8).view(1201, 20, 1, 1)
        images = images.repeat(1, 1, 28, 28)
        tasks = maml.Omniglot(images, ways=5, shots=2)
        task = tasks.draw("learn", torch.Generator().manual_seed(0))
        assert task["x"].shape == (10, 1, 28, 28)
        assert task["query_x"].shape == (75, 1, 28, 28)
        assert task["y"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert len(tasks.parts["test"]) == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--ways", "5"], "go with --data DIR"),
            (["--data", "missing"], "no omniglot_28_u8.npz in missing"),
            (["--data", "bad"], "does not hold the arrays"),
            (["--steps", "0"], "at least 1"),
            (["--data", "bad", "--shots", "20"], "at most 19"),
            (["--method", "no"], "invalid choice"),
        ],
    )
    def test_wrong_input_gets_a_message(
        self, maml, monkeypatch, capsys, tmp_path, arguments, message
    ):
        monkeypatch.chdir(tmp_path)
        Path("bad").mkdir()
        Path("bad/omniglot_28_u8.npz").write_text("no arrays")
        with pytest.raises(SystemExit) as stopped:
            call(maml, monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


class TestLearnedLearningRate:
    def test_raises_a_rate_that_is_too_small(self, rates, monkeypatch):
        monkeypatch.setattr(rates, "GRID", [(0.2, 0.0)])
        row, found = rates.experiment(3, 12)
        first, _, one, each = row
        assert len(row) == len(rates.COLUMNS)
        assert all(0 <= value <= 100 for value in row)
        assert min(one, each) > first + 5
        assert list(found) == rates.NAMES
        assert found["0.weight"] > 2 * rates.START

    def test_shows_a_table(self, rates, monkeypatch, capsys):
        monkeypatch.setattr(rates, "GRID", [(0.2, 0.0)])
        monkeypatch.setattr(rates, "STEPS", 2)
        call(rates, monkeypatch, "--seeds", 2, "--turns", 1)
        shown = capsys.readouterr().out
        assert all(column in shown for column in (*rates.COLUMNS, "std. error"))

    @pytest.mark.parametrize("option", ["--seeds", "--turns"])
    def test_refuses_less_than_one(self, rates, monkeypatch, capsys, option):
        with pytest.raises(SystemExit):
            call(rates, monkeypatch, option, 0)
        assert "at least 1" in capsys.readouterr().err


class TestForward:
    def test_finds_less_loss_than_where_it_begins(self, forward):
        data = forward.load(3)
        found = forward.learned(data, 4, 3)
        begin = np.log([0.03, 0.01, 0.01, 0.01])
        assert forward.loss(data, found) < forward.loss(data, begin) - 0.2

    def test_shows_a_table(self, forward, monkeypatch, capsys):
        monkeypatch.setattr(forward, "STEPS", 2)
        call(forward, monkeypatch, "--seeds", 2, "--turns", 2)
        shown = capsys.readouterr().out
        words = [w for column in forward.COLUMNS + forward.FOUND for w in column.split()]
        assert all(word in shown for word in (*words, "std. error"))
        assert not any(math.isnan(value) for value in forward.experiment(3, 1))

    @pytest.mark.parametrize("option", ["--seeds", "--turns"])
    def test_refuses_less_than_one(self, forward, monkeypatch, capsys, option):
        with pytest.raises(SystemExit):
            call(forward, monkeypatch, option, 0)
        assert "at least 1" in capsys.readouterr().err
