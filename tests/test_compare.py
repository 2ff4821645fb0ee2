"""Methods side by side: the command, its table, its files and its picture."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

import mlodeco
from mlodeco import MlodecoError, Program
from mlodeco.cli import app
from mlodeco.cli import compare as comparing
from mlodeco.cli.compare import Job, NoResult, read_methods
from mlodeco.errors import MethodError
from mlodeco.hypergrad import spell
from mlodeco.runtime.checking import Agreement
from mlodeco.runtime.measuring import seconds_per_step
from mlodeco.show import Comparison, Row, comparison_figure, comparison_table, save_figure
from tests.test_cli import METHODS

ROOT = Path(__file__).parent.parent

CURVATURE = np.array([1.0, 2.0, 4.0])

QUADRATIC = """
import sys
from functools import partial
import torch
from torch.optim import SGD
import mlodeco
from mlodeco import level, method, validate

sgd = partial(SGD, lr=0.1)
A = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

@level("low", module={"w": torch.zeros(3, dtype=torch.float64)}, optimizer=sgd)
def fit(m, top):
    return (0.5 * A * m.w**2 - m.w * top.x).sum()

@level("top", lower=["low"], module={"x": torch.ones(3, dtype=torch.float64)}, optimizer=sgd)
def judge(m, low):
    return 0.5 * (low.w - 1).square().sum()

@method("broken")
def broken(matvec, b):
    raise ValueError("no luck")

print("the script prints", *sys.argv[1:])
"""
RUN = "mlodeco.run(7, seed=3)\nprint('trained')\n"
METRIC = """
@validate(every=3, monitor="near", mode="min")
def look(low, ctx):
    ctx.log(vector=low.w)
    return {"far": low.w.sum(), "near": (low.w - 1).abs().sum()}
"""
COLUMNS = ("error", "cosine", "length")


def error_at(w, x, direction):
    """Of an indirect hypergradient against the exact one, where the parameters are w and x."""
    exact = (w - 1) / CURVATURE
    return np.linalg.norm(direction(w - 1) - exact) / np.linalg.norm(exact)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(QUADRATIC + RUN)
    return path


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The processes of a comparison are calls in this one."""

    def result(job):
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        with Program(), redirect_stdout(io.StringIO()):
            try:
                comparing.work(Job(**json.loads(json.dumps(vars(job)))), path)
            except MlodecoError as error:
                raise NoResult(1, f"error: {error}") from error
            except SystemExit as end:
                raise NoResult(end.code, "") from end
        return json.loads(path.read_text())

    monkeypatch.setattr(comparing, "_result", result)


def compare(script, methods, *options):
    return CliRunner().invoke(app, ["compare", str(script), "--hypergrad", methods, *options])


def saved(folder):
    def refuse(constant):
        raise AssertionError(constant)

    text = (folder / "comparison.json").read_text()
    return json.loads(text, parse_constant=refuse)


def compared(script, methods, *options):
    """What is in the file."""
    folder = script.parent / "out"
    found = compare(script, methods, *options, "--out", str(folder))
    assert found.exit_code == 0, found.output
    return saved(folder)


def errors(found, moment="start", level="top"):
    return [row[moment][level]["error"] for row in found["rows"]]


@pytest.mark.slow
def test_methods_are_compared_in_processes_of_their_own(script, tmp_path):
    """On a quadratic bilevel problem in float64, everything is known."""
    out = tmp_path / "new" / "folder"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mlodeco", "compare", script),
            *("--hypergrad", "cg,identity", "--out", out, "--", "argument"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "script prints" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100

    found = saved(out)
    assert found.keys() == Comparison.__dataclass_fields__.keys()
    assert (found["seed"], found["steps"], found["at"]) == (3, 7, 0)
    assert (found["levels"], found["outer"]) == (["top"], "top")
    assert found["dampings"] == {"top -> low": 0.0}
    cg, identity = found["rows"]
    assert all(row.keys() == Row.__dataclass_fields__.keys() for row in found["rows"])
    assert cg["start"]["top"]["error"] < 1e-12
    assert cg["end"]["top"]["error"] < 1e-12
    zero, one = np.zeros(3), np.ones(3)
    assert identity["start"]["top"]["error"] == pytest.approx(error_at(zero, one, lambda b: b))
    for row, inverse in ((cg, 1 / CURVATURE), (identity, one)):
        w, x, losses = zero, one, []
        for _ in range(7):
            w = w - 0.1 * (CURVATURE * w - x)
            losses.append(0.5 * ((w - 1) ** 2).sum())
            x = x - 0.1 * inverse * (w - 1)
        curve = row["curves"]["loss of top"]
        assert [tick for tick, _, _ in curve] == list(range(1, 8))
        assert [value for _, _, value in curve] == pytest.approx(losses, rel=1e-12)
        assert all(a[1] < b[1] for a, b in pairwise(curve))
        wanted = error_at(w, x, lambda b, inverse=inverse: inverse * b)
        assert row["end"]["top"]["error"] == pytest.approx(wanted, abs=1e-12)
        assert (row["ticks"], row["error"], row["notes"]) == (7, None, [])
        assert row["seconds"] > 0
        assert row["memory"] > 0
    assert cg["first_loss"] == identity["first_loss"]

    from PIL import Image

    with Image.open(out / "comparison.png") as picture:
        assert min(picture.size) > 400
        assert len(set(picture.convert("L").resize((60, 30)).tobytes())) > 10


def test_what_the_script_says_when_it_fails_is_told(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint('about to end', file=sys.stderr)\nsys.exit(7)")
    found = compare(script, "cg")
    assert (found.exit_code, found.stdout, found.stderr) == (7, "", "about to end\n")


@pytest.mark.usefixtures("here")
class TestHere:
    """The same in one process, where it is cheap."""

    def test_all_methods_are_measured_at_one_point_of_the_scripts_own_run(self, script):
        methods = "cg,identity,unroll"
        found = compared(script, methods, "--at", "5", "--set", "top.hypergrad=neumann")
        assert found["at"] == 5
        with Program() as program:
            exec(QUADRATIC, {})
            mlodeco.run(5, seed=3, progress="off")
            wanted = [
                mlodeco.check("top", hypergrad=m, program=program) for m in methods.split(",")
            ]
        assert errors(found) == pytest.approx([report.error for report in wanted], abs=1e-12)

    def test_the_reference_is_one_for_all(self, script):
        """It has the damping of the script, whatever that of a method is."""
        script.write_text(
            QUADRATIC.replace(
                'lower=["low"],', 'lower=["low"], hypergrad=partial(CG, damping=1)(),'
            ).replace("import mlodeco\n", "import mlodeco\nfrom mlodeco.hypergrad import CG\n")
            + RUN
        )
        methods = "cg,cg(damping=1),cg(damping=3)"
        bias = [
            np.linalg.norm(1 / (CURVATURE + own) - 1 / (CURVATURE + 1))
            / np.linalg.norm(1 / (CURVATURE + 1))
            for own in (0, 1, 3)
        ]
        found = compared(script, methods)
        assert found["dampings"] == {"top -> low": 1.0}
        assert found["is_own_damping"] is True
        assert errors(found) == pytest.approx(bias, abs=1e-12)
        shown = compare(script, methods, "--damping", "0").stdout
        assert "damping 0." in shown
        found = compared(script, methods, "--damping", "0")
        assert errors(found)[0] < 1e-12
        assert found["is_own_damping"] is False

    def test_metrics_of_validations_stand_in_place_of_the_loss(self, script):
        script.write_text(QUADRATIC + METRIC + RUN)
        found = compared(script, "cg,identity")
        for row in found["rows"]:
            assert list(row["curves"]) == ["near", "far", "loss of top"]
            assert [tick for tick, _, _ in row["curves"]["near"]] == [3, 6, 7]
        shown = compare(script, "cg").stdout
        assert "near" in shown
        assert "loss of" not in shown

    def test_options_go_over_those_of_the_script(self, script):
        found = compared(
            script, "cg,identity", "--steps", "4", "--seed", "9", "--set", "low.inner_steps=2"
        )
        assert (found["seed"], found["steps"]) == (9, 4)
        for row in found["rows"]:
            assert [tick for tick, _, _ in row["curves"]["loss of top"]] == [2, 4]

    @pytest.mark.parametrize("run", [RUN, "", "mlodeco.run(7, out='there', resume='auto')"])
    def test_data_that_a_script_draws_are_the_same_and_nothing_is_saved(self, run, script):
        text = QUADRATIC.replace("m.w * top.x", "m.w * (top.x + noise)").replace(
            "m.w**2", "(m.w - noise)**2"
        )
        script.write_text(text.replace("A =", "noise = torch.randn(())\nA =") + run)
        first, second = compared(script, "cg,identity", "--steps", "3")["rows"]
        assert first["first_loss"] == second["first_loss"]
        assert first["first_loss"] != 0.0
        assert not Path("there").exists()

    def test_a_method_is_on_every_level_or_on_those_named(self, script):
        three = """
@level("most", lower=["top"], module={"z": torch.zeros(3, dtype=torch.float64)}, optimizer=sgd)
def third(m, top):
    return 0.5 * (top.x - m.z - 2).square().sum()
""".replace("top.x - m.z - 2", "top.x - 2 + 0 * m.z")
        text = QUADRATIC.replace("def judge(m, low):", "def judge(m, low, most):").replace(
            "(low.w - 1)", "(low.w - 1 - most.z)"
        )
        script.write_text(text + three + RUN)
        found = compared(script, "cg,None")
        assert found["levels"] == ["top", "most"]
        assert found["outer"] == "most"
        assert found["rows"][0]["start"].keys() == {"top", "most"}
        assert errors(found)[0] < 1e-12
        shown = compare(script, "cg,identity")
        assert shown.exit_code == 0, shown.output
        assert re.search(r"^ cg +top .*\n +most ", shown.stdout, re.MULTILINE)
        assert compared(script, "cg", "--level", "top")["levels"] == ["top"]

    def test_a_run_that_fails_on_its_way_keeps_what_it_has(self, script):
        found = compared(script, "identity(scale=1e200),cg")
        diverged, cg = found["rows"]
        assert "the loss is inf" in diverged["error"]
        assert 0 < diverged["ticks"] < 7
        assert len(diverged["curves"]["loss of top"]) == diverged["ticks"]
        assert diverged["start"]["top"]["error"] > 1e100
        assert cg["error"] is None

    def test_a_process_that_is_killed_ends_its_method_alone(self, script, monkeypatch):
        result = comparing._result

        def killed(job):
            if job.methods == ["identity"]:
                raise NoResult(-9, "a warning\nout of memory\n")
            return result(job)

        monkeypatch.setattr(comparing, "_result", killed)
        identity, cg = compared(script, "identity,cg")["rows"]
        assert identity["error"] == "the process ended with code -9. out of memory"
        assert identity["start"]["top"]["error"] > 0.1
        assert cg["error"] is None

    def test_ctrl_c_ends_all(self, script, monkeypatch):
        def interrupted(job):
            raise KeyboardInterrupt

        monkeypatch.setattr(comparing, "_result", interrupted)
        assert compare(script, "cg").exit_code == 130

    def test_nested_runs_are_compared_with_the_nested_reference(self, script):
        script.write_text(QUADRATIC + "mlodeco.run(3, nested=True)")
        found = compared(script, "cg,cg(damping=1)")
        wanted = np.linalg.norm(1 / (CURVATURE + 1) - 1 / CURVATURE) / np.linalg.norm(1 / CURVATURE)
        assert errors(found) == pytest.approx([0, wanted], abs=1e-12)

    def test_a_terminal_sees_what_is_going_on(self, script, monkeypatch):
        monkeypatch.setenv("FORCE_COLOR", "1")
        found = compare(script, "cg")
        assert found.exit_code == 0
        assert "cg (1 of 1)" in found.stderr

    def test_what_a_solver_warns_of_is_told(self, script):
        script.write_text(QUADRATIC.replace("2.0", "-2.0") + RUN)
        found = compare(script, "cg,identity")
        assert found.exit_code == 0
        assert re.search(r" cg: .*CG after .*curvature", " ".join(found.stdout.split("\n")))

    def test_a_method_that_raises_does_not_end_the_others(self, script):
        shown = compare(script, "cg,broken,identity").stdout
        assert "broken: failed: ValueError: no luck" in shown
        order = re.findall(r"^ (cg|broken|identity) ", shown, re.MULTILINE)
        assert order == ["cg", "broken", "identity"]
        _, broken, identity = compared(script, "cg,broken,identity")["rows"]
        assert broken["error"] == "ValueError: no luck"
        assert broken["start"] == broken["end"] == {}
        assert broken["ticks"] == 0
        assert identity["error"] is None

    def test_it_fails_if_all_do(self, script):
        found = compare(script, "broken")
        assert found.exit_code == 1
        assert "no luck" in found.stdout
        assert found.stdout.count("no luck") == 1

    def test_without_matplotlib_the_table_comes(self, script, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        found = compare(script, "cg", "--out", str(tmp_path / "out"))
        assert found.exit_code == 0
        assert " cg " in found.stdout
        assert "pip install 'mlodeco[plots]'" in found.stderr
        assert saved(tmp_path / "out")["rows"]

    @pytest.mark.parametrize(
        ("text", "options", "said"),
        [
            (RUN, ["--level", "topp"], "Did you mean 'top'"),
            (RUN, ["--level", "low"], "no lower level to differentiate through"),
            (RUN, ["--set", "top.lower=[]"], "no method to compare"),
            (RUN, ["--set", "lo.inner_steps=3"], "Did you mean 'low'"),
            (RUN, ["--damping", "inf"], "damping=inf"),
            (RUN, ["--seed", "-1"], "seed=-1"),
            ("", [], "add --steps 1000"),
            ("mlodeco.Runner().run(2)", ["--steps", "3"], "a Runner of its own"),
        ],
    )
    def test_what_cannot_be_compared_is_refused_at_once(self, text, options, said, script):
        script.write_text(QUADRATIC + text)
        found = compare(script, "cg", *options)
        assert found.exit_code == 1
        assert said in found.stderr
        assert found.stdout == ""


@pytest.mark.parametrize(
    "options",
    [
        ["--hypergrad", ""],
        ["--hypergrad", "cg,cg"],
        ["--hypergrad", "cg, identity,neuman(num_terms=3)"],
        ["--hypergrad", "cg(,sama"],
        ["--hypergrad", "cg,neumann(num_terms=0)"],
        ["--hypergrad", "cg", "--set", "top.hypergrd=cg"],
        ["--hypergrad", "cg", "--steps", "0"],
        ["--hypergrad", "cg", "--at", "-1"],
        [],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_found_before_anything_runs(options, script):
    found = CliRunner().invoke(app, ["compare", str(script), *options])
    assert found.exit_code == 2
    assert found.stdout == ""


def test_a_launcher_of_several_processes_is_refused(script, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = compare(script, "cg")
    assert found.exit_code == 1
    assert "Remedy: run it without a launcher" in found.stderr


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("methods", ["cg,cgg", "broken,{'low': cgg}"])
def test_a_method_that_there_is_not_is_found_before_any_is_measured(methods, script, monkeypatch):
    monkeypatch.setattr(comparing, "_measured", None)
    monkeypatch.setattr(comparing, "_train", None)
    found = compare(script, methods)
    assert (found.exit_code, found.stdout) == (1, "")
    assert "there is no method 'cgg'" in found.stderr
    assert "Did you mean 'cg'?" in found.stderr


def test_a_folder_that_cannot_be_is_found_before_anything_runs(script, tmp_path):
    (tmp_path / "file").touch()
    found = compare(script, "cg", "--out", str(tmp_path / "file" / "out"))
    assert found.exit_code == 1
    assert "give another --out" in found.stderr


@given(
    st.lists(METHODS.map(spell), min_size=1, max_size=4, unique=True), st.sampled_from(["", " "])
)
def test_a_list_is_split_at_commas_outside_parentheses(methods, space):
    assert read_methods(f",{space}".join(methods)) == methods


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cg", ["cg"]),
        (" cg , sama ", ["cg", "sama"]),
        ("neumann(num_terms=10, step_size=0.1),cg", ["neumann(num_terms=10, step_size=0.1)", "cg"]),
        ("{'a': cg, 'b': sama},None", ["{'a': cg, 'b': sama}", "None"]),
        ("ünsere,cg", ["ünsere", "cg"]),
    ],
)
def test_lists_of_methods(text, found):
    assert read_methods(text) == found


@given(st.text("cgs(){},'\"=1 \n\x00", max_size=20))
def test_any_other_text_is_no_list(text):
    try:
        found = read_methods(text)
    except MethodError:
        return
    assert found


def test_the_time_of_a_step_is_a_median_without_the_first():
    ends = [10.0, 20.0, 21.0, 22.0, 23.0, 24.5, 26.0, 26.5, 27.0, 28.0]
    assert seconds_per_step(ends, range(1, 11)) == 1.0
    assert seconds_per_step(ends, [2, 4, 6, 8, 10]) == pytest.approx(2.0)
    assert seconds_per_step(ends, [4, 4, 6]) == pytest.approx(2.5)
    assert seconds_per_step(ends, [3]) == 21.0
    assert seconds_per_step(ends, []) is None
    assert seconds_per_step(ends, [10, 11]) == 28.0  # the tick of a failure has no end


def made(rows, **changes):
    options = {
        "script": "folder/script.py",
        "seed": 1,
        "steps": 2,
        "at": 0,
        "levels": ["top"],
        "outer": "top",
        "dampings": {"top -> low": 0.0},
        "is_own_damping": True,
        "memory_of": "the process",
    }
    return Comparison(rows=rows, **{**options, **changes})


def row(name, seconds=0.01, error=0.5, **changes):
    agreement = {"top": Agreement(error, 0.9, 1.1)}
    options = {"memory": 5 << 20, "ticks": 2, "first_loss": 1.0}
    curves = {"loss of top": [(1, seconds, 3.0), (2, 2 * seconds, 1.25)]}
    given = {"start": agreement, "end": agreement, "curves": curves, **options, **changes}
    return Row(name, seconds=seconds, **given)


def printed(found, width=100):
    console = Console(width=width, force_terminal=False)
    with console.capture() as captured:
        console.print(comparison_table(found, width))
    return captured.get()


def test_the_table():
    text = printed(
        made(
            [
                row("slow", seconds=0.03),
                row("fast"),
                row("early", ticks=1, stop_reason="enough", notes=["noted"]),
                row("late", first_loss=2.0, notes=["noted"]),
                Row("dead", error="killed"),
            ]
        )
    )
    figures = ["0.500", "0.900", "1.100"] * 2
    cells = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert cells["slow"] == [*figures, "30.0", "3.00", "5.00", "1.25"]
    assert cells["fast"] == [*figures, "10.0", "1.00", "5.00", "1.25"]
    assert cells["dead"] == [*["-"] * 9, "failed"]
    assert "dead: failed: killed" in text
    assert "early: stopped at tick 1: enough" in text
    assert "early, late: noted" in text
    assert "do not start alike" in text
    assert "do not start alike" not in printed(made([row("a"), row("b")]))


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("levels", [["top"], ["reweight", "top"]], ids=len)
def test_the_table_fits_into_the_terminal(levels, width):
    name = "neumann(num_terms=10, step_size='auto', product='reverse_over_forward')"
    curves = {f"a long metric {i}": [(2, 1.0, -1234.5678)] for i in range(5)}
    agreement = dict.fromkeys(levels, Agreement(1.2e-17, -0.123, 1.5e-11))
    given = {"start": agreement, "end": agreement, "curves": curves, "memory": 123 << 30}
    text = printed(made([row(name, seconds=12.3, **given), row("cg")], levels=levels), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert min(line.find("cg") for line in text.splitlines() if "cg" in line) == 1
    assert name[:14] in text
    for figure in ("1.2e-17", "-0.123", "1.5e-11", "12300", " 1230", "125952", "-1235"):
        assert figure in text


def test_a_narrow_terminal_has_several_tables():
    names = ["neumann", "finite_difference"]
    for width, tables in (60, 3), (80, 2), (93, 2), (94, 1):
        text = printed(made(list(map(row, names))), width)
        assert text.count(" method ") == text.count(" finite_difference ") == tables


LONG = "neumann(num_terms=10, step_size=0.1, damping=0.003)"


@pytest.mark.parametrize(
    "names",
    [["cg"], ["cg", "sama", "identity", "darts", "gmres", "minres", "unroll", "dense", LONG]],
    ids=len,
)
def test_no_text_of_the_picture_is_cut_or_covered(names):
    """Points that are close together, and one at an error of zero."""
    rows = [row(n, seconds=0.01 * 1.02**i, error=0.5 - i / 50) for i, n in enumerate(names)]
    rows += [row("exact", error=0.0), Row("dead", error="killed")]
    figure = comparison_figure(made(rows))
    figure.draw_without_rendering()
    whole = figure.get_tightbbox()
    assert min(whole.x0, whole.y0) >= 0
    assert whole.x1 <= figure.get_figwidth()
    assert whole.y1 <= figure.get_figheight()
    trade = figure.axes[0]
    boxes = [text.get_window_extent() for text in trade.texts if text.get_text()]
    assert len(boxes) == len(names) + 1, "each point has its name"
    assert trade.get_ylim()[0] > 1e-12
    assert "at 1e-8: that or less" in trade.get_ylabel()
    assert all(tick == int(tick) for tick in figure.axes[1].get_xticks())
    low, high = trade.get_xlim()
    assert sum(low <= tick <= high for tick in trade.get_xticks()) >= 3
    for number, box in enumerate(boxes):
        assert all(trade.bbox.contains(*corner) for corner in box.corners())
        assert not any(box.overlaps(other) for other in boxes[:number])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*names, "exact", "dead (failed)"]
    looks = {(line.get_marker(), line.get_linestyle()) for line in figure.axes[1].lines}
    assert len(looks) == len(rows)


def test_texts_of_the_picture_are_shown_as_they_are(tmp_path):
    """Dollars are no mathematics, underscores hide nothing, and a line is a line."""
    curves = {"$a_$": [(1, 0.1, 1.0)]}
    rows = [row("_$m_$", curves=curves), row("cg\x07", curves=curves)]
    figure = comparison_figure(made(rows, script="a$b_$\n.py"))
    save_figure(figure, tmp_path / "one.png")
    assert figure._repr_png_()
    assert figure.get_suptitle() == "a$b_$\\n.py, seed 1"
    trade, *others = figure.axes
    assert [axes.get_ylabel() for axes in others] == ["$a_$"] * 2
    names = ["_$m_$", "cg\\x07"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    assert [text.get_text() for text in trade.texts] == names


def test_a_comparison_that_found_nothing_is_drawn():
    found = made([Row("dead", error="killed")])
    assert comparison_figure(found).axes
    assert "dead: failed: killed" in printed(found)
