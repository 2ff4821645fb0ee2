"""The curves of runs: what is drawn, what leaves gaps, and folders of runs read back."""

from __future__ import annotations

import io
import itertools
import json
import math
import sys
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.optim import SGD
from typer.testing import CliRunner

import mlodeco
from mlodeco import History
from mlodeco.cli import app
from mlodeco.errors import RunError
from mlodeco.runtime import StepRecord, ValidationRecord
from mlodeco.show import plot_histories
from mlodeco.show.curves import smoothed

NAN, INF = math.nan, math.inf


def history(losses, *, metrics=(), skipped=(), level="weights"):
    """Steps of one level at ticks 1, 2, ..., and validations at 10, 20, ..."""
    found = History([level], is_validated=True)
    found.steps = [
        StepRecord(n, level, n, loss, 1.0, 0.1, skipped=n in skipped)
        for n, loss in enumerate(losses, 1)
    ]
    found.validations = [ValidationRecord(10 * n, m) for n, m in enumerate(metrics, 1)]
    return found


def lines(axes):
    """The lines with points, as (ticks, values)."""
    return [tuple(map(list, line.get_data())) for line in axes.lines if len(line.get_xdata())]


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes if axes.axison}


def run(folder=None, *, steps=30, seed=0):
    program = mlodeco.Program()
    common = {"optimizer": partial(SGD, lr=0.1)}
    program.level("weights", module={"w": torch.zeros(3)}, inner_steps=2, **common)(
        lambda m, decay: ((m.w - 1) ** 2).sum() + decay.log.exp() * (m.w**2).sum()
    )
    program.level("decay", lower=["weights"], module={"log": torch.zeros(())}, **common)(
        lambda m, weights: (((weights.w - 0.3) ** 2).sum(), {"size": weights.w.detach()})
    )
    program.validate(every=5)(lambda weights: {"error": float((weights.w - 0.3).norm())})
    return mlodeco.run(steps, program=program, seed=seed, out=folder, progress="off")


# what is drawn


def test_a_run_has_a_panel_a_level_and_a_metric():
    result = run()
    found = panels(result.plot(smooth=1))
    assert list(found) == ["loss of weights", "loss of decay", "error"]
    for level in ("weights", "decay"):
        ticks = [record.tick for record in result.history.of(level)]
        assert lines(found[f"loss of {level}"]) == [(ticks, result.history.losses(level))]
    ticks = [5, 10, 15, 20, 25, 30]
    assert lines(found["error"]) == [(ticks, result.history.metric("error"))]
    assert list(panels(result.plot(level="decay"))) == ["loss of decay"]
    assert list(panels(result.history.plot(metric=["error"]))) == ["error"]
    both = result.plot(metric="error", level=["decay", "weights"])
    assert list(panels(both)) == ["loss of decay", "loss of weights", "error"]


def test_the_thick_line_is_smoothed_and_the_thin_one_is_not():
    losses = [float(n % 7) for n in range(100)]
    figure = history(losses).plot(smooth=5)
    (axes,) = figure.axes
    thin, thick = axes.lines
    assert list(thin.get_ydata()) == losses
    assert list(thick.get_ydata()) == smoothed(losses, 5)
    assert thin.get_linewidth() < thick.get_linewidth()
    assert len(history(losses).plot(smooth=1).axes[0].lines) == 1
    # a fortieth of the steps
    assert list(history(losses).plot().axes[0].lines[1].get_ydata()) == smoothed(losses, 2)
    assert len(history(losses[:79]).plot().axes[0].lines) == 1


@given(
    st.lists(st.one_of(st.just(NAN), st.floats(-1e6, 1e6)), min_size=1, max_size=30),
    st.integers(1, 50),
)
def test_smoothing_is_a_mean_of_what_is_around(values, window):
    half = window // 2
    for place, found in enumerate(smoothed(values, window)):
        around = [v for v in values[max(place - half, 0) : place + half + 1] if not math.isnan(v)]
        if math.isnan(values[place]):
            assert math.isnan(found)
        else:
            assert found == pytest.approx(sum(around) / len(around), abs=1e-6)


def test_small_values_beside_large_ones_are_averaged_exactly():
    found = smoothed([1e12] * 5 + [1e-9] * 20, 3)
    np.testing.assert_allclose(found[6:], 1e-9, rtol=1e-12)


def test_skipped_steps_and_numbers_that_are_not_finite_are_gaps():
    found = history([1.0, 2.0, INF, 4.0, NAN, 6.0, 7.0, -INF], skipped={2}).plot(smooth=3)
    gaps = [2, 3, 5, 8]
    for line in found.axes[0].lines:
        ticks, values = line.get_data()
        assert [t for t, v in zip(ticks, values, strict=True) if math.isnan(v)] == gaps
        # the first and the fourth have no neighbour, and show as points
        assert list(line.get_markevery()) == [0, 3]
    figure = history([NAN, INF], metrics=[{"a": NAN}, {"b": 1.0}]).plot()
    figure.draw_without_rendering()
    assert list(panels(figure)) == ["loss of weights", "a", "b"]


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([1.0, 101.0], "log"),
        ([1.0, 99.0], "linear"),
        ([0.0, 1e5], "linear"),
        ([-1.0, 1e5], "linear"),
        ([1.0, 2.0, INF], "linear"),
        ([NAN], "linear"),
    ],
)
def test_an_axis_is_logarithmic_for_more_than_two_decades(losses, scale):
    figure = history(losses).plot()
    assert figure.axes[0].get_yscale() == scale
    figure.draw_without_rendering()


def test_several_runs_are_told_apart_by_a_legend():
    names = ["one", "_two", "$x$", *(f"run{n}" for n in range(9))]
    runs = {name: history([float(n + 1)] * 60) for n, name in enumerate(names)}
    figure = plot_histories(runs, smooth=1)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == names
    looks = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    dashes = [(line.get_color(), line._dash_pattern) for line in legend.get_lines()]
    assert len({str(look) for look in dashes}) == len(names)
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert [(line.get_color(), line.get_linestyle()) for line in drawn] == looks
    assert not plot_histories({"one": runs["one"]}).legends


@pytest.mark.parametrize("count", [2, 12])
@pytest.mark.parametrize("name", ["run", "a_folder_with_a_name_" * 6])
def test_nothing_is_cut_off_or_on_top_of_another(name, count):
    runs = {
        f"{name}{n}": history(
            [10.0 ** (k % 5) for k in range(50)], metrics=[{"a_metric_of_mine_" * 3: 0.5}]
        )
        for n in range(count)
    }
    figure = plot_histories(runs)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    places = [axes.get_tightbbox().extents for axes in figure.axes if axes.axison]
    places += [text.get_window_extent().extents for text in figure.legends[0].get_texts()]
    for left, bottom, right, top in places:
        assert left >= 0
        assert bottom >= 0
        assert right <= width
        assert top <= height
    for one, other in itertools.combinations(places, 2):
        assert min(one[2], other[2]) <= max(one[0], other[0]) or min(one[3], other[3]) <= max(
            one[1], other[1]
        )


def test_names_alike_at_their_ends_stay_whole():
    end = "/a_long_path" * 5
    runs = {f"{n}{end}": history([1.0]) for n in range(2)}
    (legend,) = plot_histories(runs).legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)


def test_what_cannot_be_drawn_is_said(monkeypatch):
    found = history([1.0], metrics=[{"error": 1.0}])
    with pytest.raises(
        RunError, match=r"steps of a level 'wieghts'(.*\n)*.*Did you mean 'weights'"
    ):
        found.plot(level="wieghts")
    with pytest.raises(RunError, match=r"validation metric 'err'(.*\n)*.*'error'"):
        found.plot(metric="err")
    for smooth in (0, -1, 1.5, "x"):
        with pytest.raises(RunError, match="smooth="):
            found.plot(smooth=smooth)
    with pytest.raises(RunError, match="nothing to show"):
        History().plot()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"pip install 'mlodeco\[plots\]'"):
        found.plot()


def test_what_a_run_lacks_is_left_out_of_its_curves():
    runs = {
        "a": history([1.0, 2.0]),
        "b": history([3.0], metrics=[{"error": 1.0}]),
        "c": history([4.0], level="other"),
        "d": History(),
    }
    figure = plot_histories(runs, smooth=1)
    found = {title: len(lines(axes)) for title, axes in panels(figure).items()}
    assert found == {"loss of weights": 2, "loss of other": 1, "error": 1}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]


def test_notebooks_show_the_curves():
    formatters = pytest.importorskip("IPython.core.formatters")
    shown, _ = formatters.DisplayFormatter().format(history([1.0, 2.0]).plot())
    assert shown.keys() == {"image/png", "text/plain"}
    with Image.open(io.BytesIO(shown["image/png"])) as picture:
        assert 300 < picture.size[0] < 600


# folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    run(path)
    return path


def plain(records):
    """Records with their tensors as lists, which is how they come back."""
    found = [dict(vars(record)) for record in records]
    for fields in found:
        fields["metrics"] = {
            k: v.tolist() if isinstance(v, torch.Tensor) else v
            for k, v in fields["metrics"].items()
        }
    return found


def test_a_history_is_read_back(folder):
    wanted, found = run().history, mlodeco.read_history(folder)
    assert plain(found.steps) == plain(wanted.steps)
    assert plain(found.validations) == plain(wanted.validations)
    assert repr(found) == repr(wanted)
    assert found.losses("decay") == wanted.losses("decay")
    assert panels(found.plot()).keys() == panels(wanted.plot()).keys()


def test_a_line_that_is_cut_off_is_left_out(folder, tmp_path):
    whole = (folder / "metrics.jsonl").read_bytes()
    head, last = whole[: whole[:-1].rindex(b"\n") + 1], whole[whole[:-1].rindex(b"\n") + 1 :]
    count = whole.count(b"\n")
    for length in range(len(last) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(head + last[:length])
        found = mlodeco.read_history(tmp_path)
        read = len(found.steps) + len(found.validations)
        assert read == count - (length < len(last) - 1)


def test_an_empty_file_is_a_history_without_records(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    found = mlodeco.read_history(tmp_path)
    assert (len(found), found.validations) == (0, [])
    with pytest.raises(RunError, match="nothing to show"):
        found.plot()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "3",
        "[]",
        "{}",
        '{"kind": "validation", "tick": 3}',
        '{"kind": "validation", "tick": 3, "metrics": {"a": "x"}}',
        '{"kind": "validation", "tick": 3, "metrics": 4}',
        '{"kind": "step", "tick": 3, "level": "a", "solves": []}',
        '{"kind": "step", "tick": "3", "level": "a", "step": 1, "loss": 1.0, "grad_norm": 1.0, '
        '"learning_rate": 0.1, "metrics": {}, "solves": []}',
        '{"kind": "step", "tick": 3, "level": 5, "step": 1, "loss": 1.0, "grad_norm": 1.0, '
        '"learning_rate": 0.1, "metrics": {}, "solves": []}',
        "\N{LATIN SMALL LETTER U WITH DIAERESIS}".encode("latin-1"),
    ],
)
def test_a_damaged_line_is_named(line, folder, tmp_path):
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    lines[2] = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(RunError, match=r"line 3 of .* is damaged"):
        mlodeco.read_history(tmp_path)


def test_what_is_no_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("none", "file", "empty"):
        with pytest.raises(RunError, match=r"holds no metrics.jsonl"):
            mlodeco.read_history(tmp_path / name)


def test_numbers_that_are_not_finite_are_read_back(tmp_path):
    step = {"kind": "step", "tick": 1, "level": "a", "step": 1, "loss": "NaN", "grad_norm": 1.0}
    step |= {"learning_rate": 0.1, "metrics": {"x": "Infinity"}, "solves": [], "skipped": True}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    (record,) = mlodeco.read_history(tmp_path).steps
    assert math.isnan(record.loss)
    assert record.metrics == {"x": INF}


# the command


def plot(*arguments):
    return CliRunner().invoke(app, ["plot", *map(str, arguments)])


def texts(path):
    root = ElementTree.parse(path).getroot()
    return [found.text for found in root.iter("{http://www.w3.org/2000/svg}text")]


def test_plot_draws_the_curves_of_folders(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plot(folder)
    assert (found.exit_code, found.stdout) == (0, "curves.png\n")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    other = tmp_path / "other"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    out = tmp_path / "a.svg"
    assert plot(folder, other, folder, "--out", out, "--smooth", 3).exit_code == 0
    assert {"loss of weights", "loss of decay", "error", "one", "other"} <= set(texts(out))
    assert plot(other, "--out", out, "--level", "decay", "--metric", "error").exit_code == 0
    assert "loss of weights" not in texts(out)
    assert {"loss of decay", "error"} <= set(texts(out))


def test_folders_of_one_name_are_shown_by_their_paths(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
        text = (folder / "metrics.jsonl").read_bytes()
        (tmp_path / name / "run" / "metrics.jsonl").write_bytes(text)
    assert plot("a/run", "b/run", "--out", "a.svg").exit_code == 0
    assert {"a/run", "b/run"} <= set(texts("a.svg"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["."], 1, "holds no metrics.jsonl"),
        (["none"], 2, "does not exist"),
        ([], 2, "Missing argument"),
        (["{folder}", "--level", "dekay"], 1, "Did you mean 'decay'?"),
        (["{folder}", "--smooth", "0"], 2, "--smooth"),
        (["{folder}", "--out", "a.jpg"], 1, "no picture can be written to 'a.jpg'"),
    ],
)
def test_what_plot_refuses(arguments, code, words, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = plot(*(each.format(folder=folder) for each in arguments))
    assert found.exit_code == code
    assert words in found.stderr
    assert not list(tmp_path.iterdir())
