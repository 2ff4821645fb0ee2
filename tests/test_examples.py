"""The examples beside the quickstart: that they show what they claim, and how they fail."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def hpo():
    spec = importlib.util.spec_from_file_location("logistic_hpo", EXAMPLES / "logistic_hpo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["logistic_hpo.py", *map(str, arguments)])
    module.main()


def arrays(part, x, y):
    x = sp.csr_array(x)
    return {
        f"indices_{part}": x.indices.astype(np.uint8),
        f"indptr_{part}": x.indptr,
        f"counts_{part}": x.data.astype(np.uint16),
        f"y_{part}": y,
    }


@pytest.fixture
def folder(tmp_path):
    """The two data sets, tiny: a class is the first column, the others are noise."""
    generator = np.random.default_rng(0)
    x = generator.integers(3, size=(90, 6))
    x[0] = 1  # no column is empty
    for name, classes in (
        ("libsvm_uci/a9a", [-1, 1, 1]),
        ("news20_counts/news20_counts_full", [0, 1, 2]),
    ):
        here = x if "news20" in name else (x > 0).astype(int)
        y = np.array(classes)[here[:, 0]]
        held = arrays("train", here[:60], y[:60]) | arrays("test", here[60:], y[60:])
        if "a9a" in name:
            held = {key: value for key, value in held.items() if "counts" not in key}
        (tmp_path / name).parent.mkdir()
        np.savez(tmp_path / f"{name}.npz", **held)
    return tmp_path


@pytest.mark.slow
def test_a_coefficient_each_beats_one_where_most_features_are_noise():
    done = subprocess.run(
        [sys.executable, "examples/logistic_hpo.py", "--seeds", "1", "--turns", "6"],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = re.findall(r"^│ +100 .*$", done.stdout, re.MULTILINE)
    one, each, gain, one_loss, each_loss, gain_loss = map(float, re.findall(r"[-+]?\d+\.\d+", row))
    assert done.stdout.startswith("seed 100: accuracy ")
    assert "gain = each - one" in done.stdout
    assert one > 80
    assert gain == pytest.approx(each - one, abs=0.11)
    assert gain_loss == pytest.approx(each_loss - one_loss, abs=0.0011)
    assert gain > 2
    assert gain_loss < -0.05


def test_the_noise_gets_the_larger_coefficients(hpo, monkeypatch):
    monkeypatch.setattr(hpo, "WARMUP", 100)
    data = hpo.digits(noise=64, seed=3)
    coefficients = hpo.learned(data, start=0.3, turns=5, seed=3)
    varies = data.x.std(axis=0) > 0
    pixels, noise = varies.copy(), varies.copy()
    pixels[64:], noise[:64] = False, False
    assert np.median(coefficients[noise]) > 1.3 * np.median(coefficients[pixels])


@pytest.mark.parametrize("name", ["a9a", "news20"])
def test_reads_data_from_either_folder(hpo, folder, monkeypatch, capsys, name):
    monkeypatch.setattr(hpo, "WARMUP", 20)
    data = hpo.load(folder, name)
    assert data.x.shape == (60, 6)
    assert data.x_test.shape == (30, 6)
    with np.load(folder / hpo.FILES[name]) as file:
        classes = np.unique(file["y_train"])
        assert (classes[data.y_test] == file["y_test"]).all()
    for place in (folder, (folder / hpo.FILES[name]).parent):
        call(hpo, monkeypatch, "--data", place, "--dataset", name, "--turns", 1)
        shown = capsys.readouterr()
        assert name in shown.out
        assert re.search(r"│ +100 │", shown.out)
        assert shown.err == ""


@pytest.mark.parametrize("name", ["a9a", "news20"])
def test_both_solvers_minimize_the_same(hpo, folder, name):
    """The levels' loss with a coefficient each, and the scaled features of `fit_and_test`."""
    data = hpo.load(folder, name)
    coefficients = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    x, y = hpo.tensor(data.x), torch.tensor(data.y)
    outputs = {2: 1, 3: 3}[len(np.unique(data.y))]
    model = torch.nn.ParameterDict({"w": torch.zeros(6, outputs), "b": torch.zeros(outputs)})
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def close():
        optimizer.zero_grad()
        cost = (torch.tensor(coefficients).float() * model.w.square().sum(dim=1)).sum() / 2
        total = hpo.loss(model, x, y) + cost / len(y)
        total.backward()
        return total

    optimizer.step(close)
    found = hpo.loss(model, hpo.tensor(data.x_test), torch.tensor(data.y_test)).item()
    assert found == pytest.approx(hpo.fit_and_test(data, coefficients)[1], rel=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "invalid choice"),
        (["--dataset", "a9a"], "--data DIR and --dataset"),
        (["--data", "."], "--data DIR and --dataset"),
        (["--data", "missing", "--dataset", "a9a"], "no libsvm_uci/a9a.npz in missing"),
        (["--data", "bad", "--dataset", "a9a"], "does not hold the arrays"),
        (["--data", "other", "--dataset", "a9a"], "does not hold the arrays"),
        (["--seeds", "0"], "at least 1"),
        (["--turns", "0"], "at least 1"),
        (["--noise", "-1"], "at least 0"),
        (["--noise", "8", "--data", "bad", "--dataset", "a9a"], "--noise is for digits"),
        (["--data", "bad/a9a.npz", "--dataset", "a9a"], "bad/a9a.npz is not a folder"),
    ],
)
def test_wrong_input_gets_a_message(hpo, monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("bad", "other"):
        Path(name).mkdir()
    Path("bad/a9a.npz").write_text("no arrays")
    np.savez("other/a9a.npz", x=np.zeros(3))
    with pytest.raises(SystemExit) as stopped:
        call(hpo, monkeypatch, *arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
