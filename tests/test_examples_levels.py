"""The examples of three and four levels: what they print holds, and wrong input is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
NUMBER = r"-?\d+\.\d+"


def run(name, *arguments):
    """The example as a user starts it, with this checkout's library and warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def numbers(text, begin):
    """The numbers of the line that begins so."""
    (line,) = re.findall(rf"^{re.escape(begin)} .*$", text, re.MULTILINE)
    return torch.tensor([float(n) for n in re.findall(NUMBER, line.removeprefix(begin))])


@pytest.fixture(scope="module")
def figure1():
    done = run("figure1")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class TestFigure1:
    def test_has_the_edges_and_paths_of_the_figure(self, figure1):
        graph, _, _ = figure1.partition("The derivative")
        entries = re.findall(r"^(?:(\w+)|  ([v^~.]) (\w+) .*)$", graph, re.MULTILINE)
        edges, reader = set(), ""
        for name, mark, read in entries:
            reader = name or reader
            if mark:
                edges.add((read, mark, reader))
        assert edges == {
            ("one", "^", "three"),
            ("two", "^", "three"),
            ("three", "^", "four"),
            ("four", "v", "three"),
            ("four", "v", "one"),
            ("three", "v", "one"),
        }

    def test_the_terms_sum_to_the_hypergradient(self, figure1):
        paths = "four -> three -> four", "four -> one -> three -> four"
        terms = [numbers(figure1, name) for name in ("direct", *paths)]
        assert all(term.abs().max() > 0.1 for term in terms)
        found = numbers(figure1, "mlodeco.hypergradient")
        torch.testing.assert_close(sum(terms), found, rtol=0, atol=1e-6)

    def test_only_the_nested_one_is_the_derivative_of_the_program_solved_anew(self, figure1):
        solved = numbers(figure1, "all levels solved anew")
        nested = numbers(figure1, "nested=True")
        torch.testing.assert_close(nested, solved, rtol=0, atol=1e-6)
        assert (numbers(figure1, "sum, Eq. (2)") - solved).abs().max() > 0.1

    def test_fails_where_the_library_is_wrong(self, monkeypatch, capsys):
        monkeypatch.syspath_prepend(ROOT / "examples")
        monkeypatch.setattr(sys, "argv", ["figure1.py"])
        import figure1

        true = figure1.mlodeco.hypergradient

        def wrong(level, *, program, nested=False):
            found = true(level, program=program, nested=nested)
            return {key: value + 1e-8 for key, value in found.items()}

        monkeypatch.setattr(figure1.mlodeco, "hypergradient", wrong)
        with pytest.raises(AssertionError, match="differ"):
            figure1.main()


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A file of the form of Fashion-MNIST: each class a pattern, with noise."""
    folder = tmp_path_factory.mktemp("data") / "fashion_mnist"
    folder.mkdir()
    generator = np.random.default_rng(0)
    patterns = generator.integers(0, 256, (10, 28, 28))

    def part(count):
        labels = np.arange(count) % 10
        noise = generator.integers(0, 256, (count, 28, 28))
        return ((patterns[labels] + 3 * noise) // 4).astype(np.uint8), labels.astype(np.uint8)

    x_train, y_train = part(1400)
    x_test, y_test = part(200)
    np.savez(
        folder / "fashion_mnist.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
    )
    return folder


def test_quickstart_with_one_seed_claims_no_standard_error():
    done = run("quickstart", "--seeds", 1, "--steps", 20)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Reweighted minus" in done.stdout
    assert "standard error" not in done.stdout


class TestPretraining:
    @pytest.mark.slow
    def test_three_levels_beat_the_others_and_find_who_is_careless(self):
        done = run("pretraining", "--seeds", 1, "--steps", 300)
        assert (done.returncode, done.stderr) == (0, "")
        for word in ("target only", "pooled", "plain", "two levels", "three levels", "AUC"):
            assert word in done.stdout
        assert "+-" not in done.stdout  # one seed has no standard error
        (row,) = re.findall(r"^│ mean.*$", done.stdout, re.MULTILINE)
        *baselines, three, auc = map(float, re.findall(NUMBER, row))
        assert len(baselines) == 4
        assert three > max(baselines)
        assert auc > 0.8

    @pytest.mark.slow
    @pytest.mark.parametrize("above", [False, True])
    def test_reads_fashion_mnist(self, fashion, above):
        folder = fashion.parent if above else fashion
        done = run("pretraining", "--seeds", 1, "--steps", 5, "--data", folder)
        assert (done.returncode, done.stderr) == (0, "")
        (row,) = re.findall(r"^│ mean.*$", done.stdout, re.MULTILINE)
        assert float(re.findall(NUMBER, row)[0]) > 90  # the patterns are easy to tell apart

    def test_says_which_file_is_missing(self, tmp_path):
        done = run("pretraining", "--data", tmp_path / "nowhere")
        assert done.returncode == 1
        assert "fashion_mnist.npz" in done.stderr
        assert "nowhere" in done.stderr
        assert "Traceback" not in done.stderr

    def test_says_that_a_file_is_no_folder(self, fashion):
        done = run("pretraining", "--data", fashion / "fashion_mnist.npz")
        assert done.returncode == 1
        assert "fashion_mnist.npz is not a folder" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("option", ["--seeds", "--steps"])
    def test_refuses_less_than_one(self, option):
        done = run("pretraining", option, 0)
        assert done.returncode == 2
        assert "at least 1" in done.stderr
