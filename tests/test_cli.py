"""The command line: scripts, options, settings, exit codes, processes."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD
from typer.testing import CliRunner

import mlodeco
from mlodeco import MlodecoError, Program
from mlodeco.cli import app, commands
from mlodeco.cli.settings import apply_settings, read_setting
from mlodeco.declare.registry import LEVEL_OPTIONS
from mlodeco.errors import OptimizerError, RunError
from mlodeco.hypergrad import CG, NAMES, Guide, Neumann, read_method, spell
from mlodeco.hypergrad.options import Options
from mlodeco.runtime.checkpoint.output import ERRORS
from mlodeco.runtime.nonfinite import POLICIES
from mlodeco.runtime.processes import REDUCTIONS
from mlodeco.runtime.shares import TAILS
from mlodeco.show.progress import FORMS
from tests.launching import LAUNCHERS, launched

ROOT = Path(__file__).parent.parent

HEAD = """
import sys
from functools import partial
import torch
from torch.optim import SGD
import mlodeco
from mlodeco import level, run

@level(
    "weights",
    module=lambda: torch.nn.Linear(3, 1, bias=False),
    optimizer=partial(SGD, lr=0.1),
    data=[torch.ones(3), -torch.ones(3)],
    inner_steps=2,
)
def train(model, batch, decay):
    return (model(batch) - 1).square().sum() + decay.log.exp() * model.weight.square().sum()

@level("decay", lower=["weights"], module={"log": torch.zeros(())}, optimizer=partial(SGD, lr=0.1))
def tune(m, weights):
    return (weights.weight - 0.3).square().sum()
"""
RUN = HEAD + "run(4, seed=3, progress='off')\n"


class Session:
    """Scripts of one folder, run in this process, each with a default program of its own."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, command, text, *options):
        script = self.folder / "script.py"
        script.write_text(text)
        with Program() as self.program:
            return CliRunner().invoke(app, [command, str(script), *options])

    @property
    def weight(self):
        return self.program.module("weights").weight.tolist()

    def option(self, level, option):
        return getattr(self.program.levels[level], option)


@pytest.fixture
def session(tmp_path):
    return Session(tmp_path)


def test_a_script_runs_as_python_runs_it(session):
    (session.folder / "beside.py").write_text("value = 5\n")
    text = (
        "import sys, inspect, pickle, beside\n"
        "class Here: pass\n"
        "assert __name__ == '__main__' and sys.modules['__main__'].Here is Here\n"
        "assert pickle.loads(pickle.dumps(Here)) is Here\n"
        "assert sys.argv == [__file__, '--epochs', '3', '--', 'x'], sys.argv\n"
        "assert 'class' in inspect.getsource(Here)\n"
        "def plain(x: int): pass\n"
        "assert plain.__annotations__ == {'x': int}\n"
    )
    before = list(sys.path), sys.argv, sys.modules["__main__"]
    found = session("run", RUN + text, "--", "--epochs", "3", "--", "x")
    assert found.exit_code == 0, found.output
    assert (list(sys.path), sys.argv, sys.modules["__main__"]) == before


def test_the_first_run_yields_to_the_options_and_later_ones_do_not(session):
    text = (
        HEAD + "first = run(40, seed=3)\nsecond = mlodeco.run(2)\nprint(first.ticks, second.ticks)"
    )
    found = session("run", text, "--steps", "3", "--seed", "5", "--progress", "plain")
    assert found.stdout == "3 2\n"
    assert "all 3 steps were run" in found.stderr
    wanted = session.weight
    assert session("run", HEAD + "run(3, seed=5)\nrun(2)").exit_code == 0
    assert session.weight == wanted
    assert session("run", HEAD + "run(3, seed=6)\nrun(2)").exit_code == 0
    assert session.weight != wanted


@pytest.mark.parametrize("option", ["--nested", "--reduce=once", "--no-nested"])
def test_other_options_of_run_are_passed_on(option, session, monkeypatch):
    seen = {}

    class Watched(mlodeco.Runner):
        def __init__(self, *args, **options):
            seen.update(options)
            super().__init__(*args, **options)

    monkeypatch.setattr("mlodeco.api.Runner", Watched)
    text = HEAD + "run(1, nested=True, progress='off')"
    assert (
        session("run", text.replace('"weights"],', '"weights"], hypergrad="cg",'), option).exit_code
        == 0
    )
    assert seen["nested"] is (option != "--no-nested")
    assert seen["reduce"] == ("once" if "once" in option else "exact")


def test_a_run_is_kept_and_goes_on(session):
    out = session.folder / "out"
    kept = (
        "--out",
        str(out),
        "--checkpoint-every",
        "2",
        "--keep",
        "1",
        "--checkpoint-errors=raise",
    )
    more = ("--nonfinite", "skip", "--log-with", "tensorboard", "--project", "mine")
    found = session("run", RUN, *kept, *more)
    assert found.exit_code == 0, found.output
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["000000004"]
    assert list((out / "mine").glob("events.*"))
    assert session("run", RUN, *kept).exit_code == 1
    found = session("run", RUN + "print('over')", *kept, "--resume", "auto", "--steps", "6")
    assert found.stdout == "over\n"
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["tick"] for line in lines] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    one = str(out / "checkpoints" / "000000006")
    found = session("run", RUN + "print('over')", "--resume", one, "--steps", "7")
    assert found.stdout == "over\n", found.output


@pytest.mark.parametrize("option", ["--keep=2", "--checkpoint-every=2", "--resume=auto"])
def test_what_needs_a_folder_says_so_as_the_command_line_has_it(option, session):
    found = session("run", RUN, option)
    assert found.exit_code == 1
    assert f"{option.partition('=')[0]} is given and --out is not" in found.stderr
    assert "--out runs/one" in found.stderr


def test_trackers_that_are_not_known(session):
    found = session("run", RUN, "--log-with", "tensorbord")
    assert found.exit_code == 1
    assert "Did you mean 'tensorboard'?" in found.stderr


@pytest.mark.parametrize(("signal", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_ends_a_run_that_is_kept(signal, code, session):
    text = HEAD + (
        "import signal\n"
        "@mlodeco.on('after_step', level='decay')\n"
        f"def end(): signal.raise_signal(signal.{signal})\n"
        "run(10, progress='off')\nprint('not reached')"
    )
    found = session("run", text, "--out", str(session.folder / "out"))
    assert found.exit_code == code
    assert found.stdout == ""
    assert found.stderr.count(f"{signal} ended the run at tick 2; go on with") == 1


def test_the_program_of_the_first_run_is_the_one_that_is_set(session):
    text = (
        "import mlodeco\nwith mlodeco.Program() as program:\n    "
        + HEAD.replace("\n", "\n    ")
        + "\nmlodeco.run(2, program=program, progress='off')"
        + "\nprint(program.levels['weights'].inner_steps)"
    )
    assert session("run", text, "--set", "weights.inner_steps=1").stdout == "1\n"
    assert "decay -> weights -> decay" in session("graph", text).stdout


def test_a_script_that_only_declares_is_trained_as_it_ends(session):
    found = session("run", HEAD + "print('declared')", "--steps", "2")
    assert found.exit_code == 0
    assert "all 2 steps" in found.stderr
    found = session("run", HEAD)
    assert found.exit_code == 1
    assert "Remedy: add --steps 1000" in found.stderr
    for command in ("run", "graph", "check"):
        found = session(command, "print('nothing')")
        assert found.exit_code == 1
        assert "neither calls mlodeco.run() nor declares levels" in found.stderr


def test_a_script_with_a_runner_of_its_own_is_not_trained_twice(session):
    text = HEAD + "runner = mlodeco.Runner()\nrunner.run(2)\nprint(runner.tick)"
    found = session("run", text)
    assert (found.exit_code, found.stdout) == (0, "2\n")
    found = session("run", text, "--steps", "3")
    assert found.exit_code == 1
    assert "trains by a Runner of its own" in found.stderr


OWN = HEAD.replace("@level(", "@p.level(").replace("\n@p", "\np = mlodeco.Program()\n@p", 1)


def test_a_script_with_a_program_and_a_runner_of_its_own_runs_as_it_is(session):
    text = OWN + "runner = mlodeco.Runner(p)\nrunner.run(2)\nprint(runner.tick)"
    found = session("run", text)
    assert (found.exit_code, found.stdout, found.stderr) == (0, "2\n", "")
    found = session("run", text, "--steps", "3")
    assert found.exit_code == 1
    assert "trains by a Runner of its own" in found.stderr
    for use in "mlodeco.Runner(p)", "mlodeco.hypergradient('decay', program=p)":
        assert session("run", OWN + use).exit_code == 0
    found = session("run", OWN)
    assert found.exit_code == 1
    assert "Remedy: add --steps 1000" in found.stderr
    assert "all 2 steps" in session("run", OWN, "--steps", "2").stderr
    found = session("check", text)
    assert "Neumann()" in found.stdout
    assert found.stdout.endswith("measured after the script's own 2 ticks\n")
    assert "measured after" not in session("check", OWN).stdout


def test_the_only_program_of_a_script_is_shown(session):
    done = CliRunner().invoke(app, ["graph", str(ROOT / "examples" / "figure1.py")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines.count(lines[0]) == 2  # printed by the script, then by the command
    assert "decay" in session("graph", OWN + "mlodeco.Program()").stdout
    both = OWN + "q = mlodeco.Program()\nq.level('x', module={'w': torch.ones(1)})(train)"
    found = session("graph", both)
    assert found.exit_code == 1
    assert "declares its levels in several Programs that no run() was given" in found.stderr
    assert session("run", both + "\nmlodeco.Runner(p).run(1)").exit_code == 0


@pytest.mark.parametrize("form", ["text", "mermaid", "dot"])
def test_graph_shows_and_does_not_train(form, session):
    text = HEAD + "try:\n    run(4)\nexcept Exception:\n    pass\nprint('trained')"
    found = session("graph", text, "--format", form, "--set", "decay.hypergrad=cg")
    assert found.exit_code == 0, found.output
    view = session.program.graph()
    assert found.stdout.rstrip("\n") == {
        "text": str,
        "mermaid": type(view).to_mermaid,
        "dot": type(view).to_dot,
    }[form](view)
    assert "CG" in found.stdout
    assert session.program.built.tick == 0


@pytest.mark.parametrize(
    ("options", "name", "start"),
    [
        (["--format", "svg"], "script.svg", "<?xml"),
        (["--format", "png"], "script.png", "\x89PNG"),
        (["--out", "a.PDF"], "a.PDF", "%PDF"),
        (["--out", "a.svg", "--format", "svg"], "a.svg", "<?xml"),
        (["--out", "a.dot"], "a.dot", "digraph"),
        (["--out", "a.mmd"], "a.mmd", "flowchart"),
        (["--out", "a.txt"], "a.txt", "decay\n"),
        (["--out", "a.gv", "--format", "dot"], "a.gv", "digraph"),
    ],
)
def test_graph_writes_files(options, name, start, session, monkeypatch):
    monkeypatch.chdir(session.folder)
    found = session("graph", RUN + "print('trained')", *options)
    assert found.exit_code == 0, found.output
    assert found.stdout == f"{name}\n"
    written = (session.folder / name).read_bytes()
    assert written.startswith(start.encode("latin-1"))
    session.program.graph().save(session.folder / "again.svg")
    if name.endswith("svg"):
        assert written == (session.folder / "again.svg").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--out", "a.jpg"], 2, "'a.jpg' ends in none of"),
        (["--out", "a"], 2, "name the format by"),
        (["--out", "a.png", "--format", "svg"], 2, "does not end in '.svg'"),
        (["--format", "jpg"], 2, "--format"),
        (["--out", "none/a.svg"], 1, "no picture can be written"),
        (["--out", "none/a.dot"], 1, "cannot be written to"),
    ],
)
def test_files_that_graph_cannot_write(options, code, words, session, monkeypatch):
    monkeypatch.chdir(session.folder)
    monkeypatch.setenv("COLUMNS", "200")
    found = session("graph", "print('ran')\n" + RUN, *options)
    assert found.exit_code == code
    assert ("ran" in found.stdout) == (code == 1), "wrong usage is found before the script runs"
    assert words in found.stderr
    assert [path.name for path in session.folder.iterdir()] == ["script.py"]


def test_pictures_need_matplotlib_and_say_so(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = session("graph", RUN, "--out", str(session.folder / "a.svg"))
    assert found.exit_code == 1
    assert "Remedy: pip install 'mlodeco[plots]'" in found.stderr
    assert session("graph", RUN).exit_code == 0


def test_check_compares_at_the_start_of_the_run(session):
    found = session(
        "check", RUN + "print('trained')", "--set", "decay.hypergrad=identity(scale=9.0)"
    )
    assert found.exit_code == 0, found.output
    assert "Identity(scale=9.0)" in found.stdout
    assert "trained" not in found.stdout
    weight = session.weight
    again = session("check", RUN, "--level", "decay")
    assert "Neumann()" in again.stdout
    assert session.weight == weight
    assert session("check", RUN, "--seed", "4").exit_code == 0
    assert session.weight != weight
    nested = session("check", RUN, "--nested", "--set", "decay.hypergrad=cg")
    assert "Eq. (2) against nested" in nested.stdout
    session("check", RUN)
    before = session.weight
    for options in ("--at", "6"), ("--at", "6", "--seed", "3"):
        later = session("check", HEAD + "run(100, seed=3, out='never')", *options)
        assert "Neumann()" in later.stdout, later.output
        assert session.program.built.tick == 6
        assert session.weight != before
    assert later.stderr == ""
    assert not Path("never").exists()
    unknown = session("check", RUN, "--level", "dekay")
    assert unknown.exit_code == 1
    assert "Did you mean 'decay'?" in unknown.stderr
    alone = session("check", RUN, "--set", "decay.lower=[]", "--set", "weights.inner_steps=1")
    assert alone.exit_code == 1
    assert "no level has a path" in alone.stderr


def test_check_says_what_to_do_where_nothing_flows(session):
    text = HEAD.replace("+ decay.log.exp() * model.weight", "+ decay.log**2 * model.weight")
    found = session("check", text + "run(1)")
    assert "check again after some ticks: mlodeco check --at 10" in " ".join(found.stdout.split())


def test_methods_lists_every_method():
    found = CliRunner().invoke(app, ["methods"])
    assert found.exit_code == 0
    for name, method in NAMES.items():
        assert f"│ {name} " in found.stdout
        assert isinstance(vars(method)["guide"], Guide), "each has its own"


@pytest.mark.parametrize("width", [40, 200])
def test_a_terminal_of_any_width_will_do(width, session, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "depth 1" in session("graph", RUN).stdout
    table = CliRunner().invoke(app, ["methods"]).stdout
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in table.splitlines()) <= width


# exit codes


def test_errors_of_the_program_are_told_by_their_message(session):
    found = session("run", HEAD + "run(0)")
    assert found.exit_code == 1
    assert found.stderr.startswith("error: steps=0.")
    assert "Traceback" not in found.stderr
    found = session("run", HEAD + "run(0)", "--traceback")
    assert found.exit_code == 1
    assert "Traceback" in found.stderr
    assert "cli" in found.stderr


def test_what_is_no_program_is_refused_as_ever(session):
    for command in ("run", "graph", "check"):
        found = session(command, HEAD + "run(1, program=3)", "--set", "weights.inner_steps=1")
        assert found.exit_code == 1
        assert found.stderr.startswith("error: program=3 is not a Program.")


def test_errors_of_the_script_have_its_traceback(session):
    found = session("run", HEAD + "def f():\n    return {}['key']\nf()")
    assert found.exit_code == 1
    assert "KeyError: 'key'" in found.stderr
    assert "in f\n" in found.stderr
    assert "cli" not in found.stderr
    found = session(
        "run", HEAD.replace("(weights.weight - 0.3)", "(weights.wait - 0.3)"), "--steps=2"
    )
    assert found.exit_code == 1
    assert "in tune\n" in found.stderr
    found = session("run", "def (")
    assert found.exit_code == 1
    assert "SyntaxError" in found.stderr


@pytest.mark.parametrize(("end", "code"), [("sys.exit(7)", 7), ("raise KeyboardInterrupt", 130)])
def test_other_ends(end, code, session):
    assert session("run", f"import sys\n{end}").exit_code == code


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--unknown"],
        ["--reduce", "never"],
        ["--keep", "0"],
        ["--nonfinite", "ignore"],
        ["--set", "inner_steps=3"],
        ["--set", "weights.inner_stps=3"],
        ["--set", "weights.module=3"],
        ["--set", "decay.hypergrad=neuman(num_terms=3)"],
        ["--set", "decay.hypergrad=neumann(num_terms=0)"],
    ],
    ids=lambda options: options[-1],
)
def test_wrong_usage_is_found_before_the_script_runs(options, session):
    found = session("run", "print('ran')", *options)
    assert found.exit_code == 2
    assert found.stdout == ""
    assert "Usage:" in found.stderr


@pytest.mark.parametrize(
    ("command", "options", "stray"),
    [
        ("run", ["--steps", "4", "extra"], "'extra'"),
        ("run", ["extra", "--steps", "4", "--", "own"], "'extra'"),
        ("graph", ["b.py"], "'b.py'"),
        ("check", ["a", "b", "--", "a", "b"], "'a', 'b'"),
        ("compare", ["--hypergrad", "cg", "neumann"], "'neumann'"),
    ],
)
def test_arguments_of_the_script_stand_behind_two_dashes(command, options, stray, session):
    found = session(command, "print('ran')", *options)
    assert (found.exit_code, found.stdout) == (2, "")
    assert f"{stray}: the script's own arguments stand after --." in found.stderr


def test_a_script_may_stand_behind_two_dashes(session):
    script = session.folder / "script.py"
    script.write_text(RUN + "assert sys.argv == [__file__, 'x'], sys.argv")
    with Program():
        found = CliRunner().invoke(app, ["run", "--", str(script), "x"])
    assert found.exit_code == 0, found.output


def test_a_script_must_be_there():
    assert CliRunner().invoke(app, ["run", "no_such_file.py"]).exit_code == 2


def test_the_page_of_the_command_line_is_that_of_its_script(session, monkeypatch):
    """Its script runs, and every command in it."""
    monkeypatch.chdir(session.folder)
    text = (ROOT / "docs" / "command-line.md").read_text()
    script = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL).group(1)
    commands = re.findall(r"^mlodeco (\w+) script.py ?(.*)$", text, re.MULTILINE)
    assert len(commands) == 11
    for command, options in commands:
        found = session(command, script, *shlex.split(options))
        assert found.exit_code == 0, found.output


def test_the_command_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["mlodeco"].partition(":")
    assert getattr(importlib.import_module(module), function) is mlodeco.cli.main


@pytest.mark.parametrize("options", [["--help"], ["-h"], ["run", "--help"], ["--version"]])
def test_help_and_version(options):
    found = CliRunner().invoke(app, options)
    assert found.exit_code == 0
    assert ("Exit codes" in found.stdout) == (options[0] in ("--help", "-h"))
    if options == ["--version"]:
        assert found.stdout == f"mlodeco {mlodeco.__version__}\n"


@pytest.mark.parametrize("command", ["run", "graph", "check", "compare", "plot"])
def test_help_has_every_option_whole(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = CliRunner().invoke(app, [command, "--help"]).stdout
    names = inspect.signature(getattr(commands, command)).parameters
    for name in names.keys() - {"context", "script", "arguments", "folders"}:
        option = {"settings": "set", "form": "format", "methods": "hypergrad"}.get(name, name)
        assert f"--{option.replace('_', '-')} " in text.replace("/", " ").replace("\n", " ")
    assert max(map(len, text.splitlines())) <= 80
    text.encode("ascii")


def test_a_terminal_without_other_letters_than_ascii_will_do(tmp_path):
    """Help, a graph, an error with a letter of a script's own."""
    script = tmp_path / "script.py"
    script.write_text(HEAD.replace('"decay"', '"zerfäll"').replace("decay", "zerfäll"))
    ascii_only = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    for options in ["run", "--help"], ["graph", script], ["run", script, "--set", "zerfall.a=1"]:
        done = python("-m", "mlodeco", *options, **ascii_only)
        assert "UnicodeEncodeError" not in done.stderr
        assert done.returncode == (2 if "--set" in options else 0), done.stderr


LIGHT = """
import sys
from typer.testing import CliRunner
from mlodeco.cli import app, commands
for options in ["--help"], ["run", "--help"], ["--version"], ["run", "no_such_file.py"]:
    CliRunner().invoke(app, options)
assert not {"torch", "accelerate"} & sys.modules.keys()
"""


def python(*options, **environment):
    return subprocess.run(
        [sys.executable, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_does_not_wait_for_torch():
    done = python("-c", LIGHT)
    assert done.returncode == 0, done.stderr


def test_the_choices_of_the_command_line_are_those_of_run():
    hints = get_type_hints(commands.run)
    found = {name: get_args(get_args(hint)[0]) for name, hint in hints.items() if get_args(hint)}
    choices = {
        "progress": FORMS,
        "reduce": REDUCTIONS,
        "tails": TAILS,
        "checkpoint_errors": ERRORS,
        "nonfinite": POLICIES,
    }
    assert {name: set(found[name]) for name in choices} == {n: set(c) for n, c in choices.items()}
    options = {*inspect.signature(mlodeco.run).parameters} - {"program", "accelerator"}
    assert options <= hints.keys()


@pytest.mark.parametrize("options", [["run", "no_such_file.py"], ["run"], ["--unknown"]])
def test_a_wrong_command_line_is_told_of_by_the_main_process(options):
    for rank in "01":
        done = python("-m", "mlodeco", *options, RANK=rank, WORLD_SIZE="2")
        assert (done.returncode, done.stdout) == (2, "")
        assert ("Usage:" in done.stderr) == (rank == "0")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("mlodeco ch", ["check"]),
        ("mlodeco run script.py --checkpoint-", ["--checkpoint-every", "--checkpoint-errors"]),
        ("mlodeco run script.py --set weights.inn", ["weights.inner_steps="]),
        ("mlodeco run script.py --nonfinite s", ["skip"]),
    ],
)
def test_a_shell_completes(words, wanted):
    shell = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = python("-m", "mlodeco", _MLODECO_COMPLETE="complete_bash", **shell)
    assert done.stdout.split() == wanted, done.stderr


def test_completion_is_installed(tmp_path):
    home = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = python("-m", "mlodeco", "--show-completion", "bash", **home)
    assert "_MLODECO_COMPLETE=complete_bash" in done.stdout, done.stderr
    done = python("-m", "mlodeco", "--install-completion", "bash", **home)
    assert done.returncode == 0, done.stderr
    assert "mlodeco" in (tmp_path / ".bashrc").read_text()


# settings


def declared(**options):
    program = Program()
    program.level("low", module={"w": torch.zeros(3)}, optimizer=partial(SGD, lr=0.1), **options)(
        lambda m, up: ((m.w - up.x) ** 2).sum()
    )
    program.level("up", lower=["low"], module={"x": torch.ones(3)}, optimizer=partial(SGD, lr=0.1))(
        lambda m, low: (low.w**2).sum()
    )
    return program


def changed(program, *texts):
    apply_settings([read_setting(text) for text in texts], program)
    return program


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("low.inner_steps=5", 5),
        ("low.rollback=True", True),
        ("low.clip_norm = 0.5", 0.5),
        ("low.clip_norm=None", None),
        ("low.params=['w']", ("w",)),
        ("low.init_from=up", "up"),
        ("low.init_from='up'", "up"),
        ("low.scheduler=None", None),
        ("up.lower=['low']", ("low",)),
        ("up.hypergrad=cg", "cg"),
        ('up.hypergrad="cg"', "cg"),
        ("up.hypergrad=None", None),
        ("up.hypergrad=cg(damping=0.1, max_steps=3)", CG(damping=0.1, max_steps=3)),
        ("up.hypergrad={'low': 'cg(damping=0.1)'}", {"low": CG(damping=0.1)}),
        ("up.hypergrad={'low': cg(damping=0.1)}", {"low": CG(damping=0.1)}),
    ],
)
def test_settings_declare_a_level_again(text, value):
    program = declared(clip_norm=3.0)
    level, _, option = text.partition("=")[0].strip().rpartition(".")
    before = dict(program.levels)
    changed(program, text)
    assert getattr(program.levels[level], option) == value
    assert list(program.levels) == ["low", "up"]
    for name, old in before.items():
        new = program.levels[name]
        assert new.function is old.function
        assert new.site == old.site
        others = vars(new).keys() - ({option} if name == level else set())
        assert {k: vars(new)[k] for k in others} == {k: vars(old)[k] for k in others}


def test_the_other_options_of_a_level_stay():
    program = declared()
    program.level(
        "inner",
        module=torch.nn.Linear(2, 1),
        reads={"start": "up"},
        params=["weight"],
        optimizer=partial(SGD, lr=0.1),
        data={"x": [1]},
        accumulate=2,
        replicas=3,
        tune={"lr": lambda up: up.x},
    )(lambda m, x, start: m.weight.sum())
    old = program.levels["inner"]
    changed(program, "inner.warmup=4")
    assert vars(program.levels["inner"]) == {**vars(old), "warmup": 4}


def test_settings_of_a_level_are_made_together():
    program = changed(declared(rollback=True), "low.init_from=up", "low.rollback=False")
    assert program.levels["low"].init_from == "up"
    program = changed(declared(), "low.optimizer.lr=0.5", "low.optimizer.momentum=0.9")
    mlodeco.run(1, program=program, progress="off")
    (group,) = program.built.levels["low"].optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)


def test_settings_are_those_of_the_run():
    program = changed(declared(), "low.inner_steps=3", "up.hypergrad=cg(max_steps=2)")
    result = mlodeco.run(6, program=program, progress="off")
    assert len(result.history.of("up")) == 2
    assert "CG" in str(program.graph())


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(SGD, lr=0.1),
        SGD,
        lambda params: SGD([{"params": [p]} for p in params], lr=0.1),
        lambda module: SGD([{"params": module.parameters(), "lr": 0.3}]),
    ],
    ids=["partial", "class", "groups", "module"],
)
def test_options_of_an_optimizer_go_to_all_its_groups(optimizer):
    program = Program()
    program.level("low", module={"w": torch.zeros(2), "b": torch.zeros(1)}, optimizer=optimizer)(
        lambda m: m.w.sum() + m.b.sum()
    )
    changed(program, "low.optimizer.lr=0.5", "low.optimizer.weight_decay=0")
    mlodeco.run(1, program=program, progress="off")
    module = program.module("low")
    assert torch.equal(module.w, torch.full((2,), -0.5))
    assert torch.equal(module.b, torch.full((1,), -0.5))


def test_options_of_an_optimizer_that_is_there():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight])
    program = Program()
    program.level("low", module={"w": weight}, optimizer=optimizer)(lambda m: m.w.sum())
    changed(program, "low.optimizer.betas=[0.5, 0.9]", "low.optimizer.amsgrad=True")
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert program.levels["low"].optimizer is optimizer


def test_options_that_an_optimizer_refuses_change_nothing_of_it():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight])
    program = Program()
    program.level("low", module={"w": weight}, optimizer=optimizer)(lambda m: m.w.sum())
    before = {name: v for name, v in optimizer.param_groups[0].items() if name != "params"}
    with pytest.raises(OptimizerError, match="Adam cannot take") as caught:
        changed(program, "low.optimizer.lr=0.5", "low.optimizer.betas=[0.5, 1.5]")
    assert caught.value.__notes__ == [
        "  Set by: --set low.optimizer.lr=0.5, --set low.optimizer.betas=[0.5, 1.5]"
    ]
    assert {n: v for n, v in optimizer.param_groups[0].items() if n != "params"} == before


class Halved(SGD):
    """An optimizer that is made in a way of its own."""

    def __init__(self, params, rate):
        super().__init__(params, lr=rate / 2)


def test_options_of_an_optimizer_that_is_made_in_another_way():
    program = Program()
    program.level("low", module={"w": torch.zeros(2)}, optimizer=partial(Halved, rate=1.0))(
        lambda m: m.w.sum()
    )
    mlodeco.run(1, program=changed(program, "low.optimizer.lr=0.25"), progress="off")
    assert torch.equal(program.module("low").w, torch.full((2,), -0.25))


class Open(SGD):
    """An optimizer that hands its options on."""

    def __init__(self, params, **options):
        super().__init__(params, **options)


@pytest.mark.parametrize("kind", [Open, torch.optim.AdamW, torch.optim.Muon])  # of matrices alone
def test_the_class_of_an_optimizer_looks_at_its_options(kind):
    program = Program()
    program.level("low", module={"w": torch.zeros(2, 3)}, optimizer=kind)(lambda m: m.w.sum())
    changed(program, "low.optimizer.lr=-1")
    with pytest.raises(OptimizerError, match=f"{kind.__name__} cannot take lr=-1"):
        mlodeco.run(1, program=program, progress="off")


@pytest.mark.parametrize("order", [1, -1])
def test_an_optimizer_that_is_left_out_has_no_options(order):
    texts = ["low.optimizer=None", "low.optimizer.lr=0.2"][::order]
    with pytest.raises(RunError, match=r"left out, and its 'lr' set") as caught:
        changed(declared(), *texts)
    assert "low.optimizer.lr=0.2" in caught.value.__notes__[0]


def test_what_a_module_has_learned_stays():
    program = Program()
    program.level("low", module=lambda: torch.nn.Linear(2, 1), optimizer=partial(SGD, lr=0.1))(
        lambda m: m.weight.square().sum()
    )
    module = program.module("low")
    torch.nn.init.constant_(module.weight, 4.0)
    changed(program, "low.clip_norm=1.0")
    assert program.module("low") is module


@pytest.mark.parametrize(
    "text",
    ["decay.hypergrad=neuman", "weights.optimizer=None", "weights.replicas=2"],
)
def test_an_error_that_the_run_finds_says_which_setting_it_comes_from(text, session):
    found = session("run", RUN, "--set", "decay.clip_norm=1.0", "--set", text)
    assert found.exit_code == 1
    assert f"--set {text}" in found.stderr.rpartition("Set by: ")[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lo.inner_steps=3", "Did you mean 'low'?"),
        ("low.inner_steps=x", "inner_steps='x'"),
        ("low.clip_norm=" + "9" * 400, "a positive number"),
        ("low.hypergrad=cg", "without lower levels"),
        ("up.lower=low", "lower='low' is a string"),
        ("low.lower=['up']", "closes a circle"),
        ("low.module=None", "the level has no module"),
        ("low.optimizer.lrr=1", "Did you mean 'lr'?"),
        ("low.optimizer.lr=fast", "a value like 0.1"),
        ("low.optimizer.nesterov=1", "a value like False"),
        ("low.optimizer.foreach=maybe", "a value like True"),
        ("low.optimizer.fused=5", "a value like True"),
        ("low.optimizer.lr=1e400", "lr is set to inf"),
        ("low.optimizer.lr=-1", "SGD cannot take lr=-1: Invalid learning rate"),
        ("low.optimizer.momentum=-5", "Invalid momentum"),
        ("low.optimizer.nesterov=True", "requires a momentum"),
        ("low.optimizer=SGD", "low.optimizer.lr=0.1"),
        ("low.data=[1]", "an object of the script"),
        ("low.replica=3", "Did you mean 'replicas'?"),
        ("low", "LEVEL.OPTION=VALUE"),
        ("up.hypergrad={'lo': 'cg'}", "which is not below the level"),
    ],
)
def test_settings_that_cannot_be_made(text, said):
    program = declared()
    before = dict(program.levels)
    with pytest.raises(MlodecoError) as caught:
        mlodeco.run(1, program=changed(program, text), progress="off")
    assert said in str(caught.value)
    if program.levels != before:  # found by the build, with an optimizer or the graph at hand
        assert "optimizer" in text or "hypergrad" in text
    if "optimizer." in text:
        assert caught.value.__notes__ == [f"  Set by: --set {text}"]


def test_a_level_without_an_optimizer_has_no_options_of_one():
    program = Program()
    program.level("low", module={"w": torch.zeros(2)})(lambda m: m.w.sum())
    with pytest.raises(MlodecoError, match="no optimizer whose 'lr'") as caught:
        changed(program, "low.optimizer.lr=1")
    assert caught.value.__notes__ == ["  Set by: --set low.optimizer.lr=1"]


# method expressions

COUNTS = st.integers(1, 10**6)
NUMBERS = st.floats(1e-300, 1e300)
VALUES = {
    "product": st.sampled_from(["auto", "reverse", "difference"]),
    "step_size": NUMBERS | st.just("auto"),
    "warm_start": st.booleans(),
    "keep_graph": st.just(False),
    "first_order": st.booleans(),
    "curvature_batch": st.floats(0.001, 1.0),
    **dict.fromkeys(["damping", "rtol", "scale"], NUMBERS),
    "radius": NUMBERS | st.none(),
    **dict.fromkeys(["truncate", "seed"], COUNTS | st.none()),
}


def methods_of(kind):
    names = [field.name for field in fields(kind)]
    options = {field: VALUES.get(field, COUNTS) for field in names}
    return st.fixed_dictionaries({}, optional=options).map(lambda given: kind(**given))


METHODS = st.sampled_from(list(dict.fromkeys(NAMES.values()))).flatmap(methods_of)


@given(METHODS)
def test_a_method_is_read_as_it_is_written(method):
    assert read_method(repr(method)) == method
    assert read_method(spell(method)) == method
    assert read_method(f"{{'low': {method!r}}}") == {"low": method}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_methods_take_options(name):
    assert read_method(f"{name}()") == NAMES[name]()
    assert read_method(name) == name


GRAMMAR = st.text("cgneumann(){}[]=,:'\"*-+.0123456789 \\\n\t_x\x00", max_size=40)


def settings_of(option):
    return (GRAMMAR | st.text()).map(f"low.{option}={{}}".format)


@given(st.text(max_size=30) | GRAMMAR | GRAMMAR.map("neumann(num_terms={})".format))
def test_any_other_text_is_refused(text):
    try:
        found = read_method(text)
    except MlodecoError:
        return
    known = found.values() if isinstance(found, dict) else [found]
    assert all(one is None or isinstance(one, str | dict | Options) for one in known)


@given(st.text(max_size=30) | st.sampled_from(LEVEL_OPTIONS).flatmap(settings_of))
def test_any_text_is_a_setting_or_refused(text):
    try:
        found = read_setting(text)
    except MlodecoError:
        return
    assert found.text == text
    assert found.level


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch ran')",
        "neumann(num_terms=__import__('os').system('touch ran'))",
        "neumann(**{'num_terms': 3})",
        "neumann(*[3])",
        "neumann(num_terms=3).solve",
        "(lambda: neumann)()",
        "[neumann() for _ in 'x']",
        "open('ran', 'w')",
        "exec('x')",
        "f'{open(1)}'",
        "{'low': open('ran', 'w')}",
        "{**{'low': 'cg'}}",
        "{1: 'cg'}",
        "cg(rtol=1.0, rtol=0.1)",
        "neumann(step_size=auto)",
        "neumann(3)",
        "cg(damping=" + "9" * 400 + ")",
        "True",
        "3",
        "",
        "(" * 300,
        "-" * 100_000 + "1",
        "9" * 10_000,
        "a\x00",
        "\ud800",
        "cg; neumann",
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_nothing_is_executed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlodecoError) as caught:
        read_method(text)
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_an_option_is_spelt_for_who_misses_it():
    with pytest.raises(MlodecoError, match="Did you mean 'num_terms'"):
        read_method("neumann(num_term=3)")
    with pytest.raises(MlodecoError, match="Did you mean 'neumann'"):
        read_method("neumman(num_terms=3)")
    assert read_method("neumann(num_terms=3)") == Neumann(num_terms=3)


# processes

LAUNCHED = (
    RUN
    + """
import json, os, pathlib
found = {
    "argv": sys.argv[1:],
    "processes": int(os.environ["WORLD_SIZE"]),
    "weight": mlodeco.current_program().module("weights").weight.tolist(),
    "inner_steps": mlodeco.current_program().levels["weights"].inner_steps,
}
here = pathlib.Path(__file__).parent
(here / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
"""
)
RUN_OPTIONS = ("--steps", "2", "--set", "weights.inner_steps=1", "--progress", "plain")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_run_the_module(launcher, tmp_path, session):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    arguments = ("run", str(script), *RUN_OPTIONS, "--", "--epochs", "3")
    done = launched(launcher, "-m", "mlodeco", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all 2 steps were run") == 1
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert (first["argv"], first["processes"]) == (["--epochs", "3"], 2)
    assert first["inner_steps"] == 1
    session("run", RUN, *RUN_OPTIONS)
    assert first["weight"][0] == pytest.approx(session.weight[0], abs=1e-6)


def test_python_m_mlodeco_and_its_exit_code(tmp_path):
    (tmp_path / "script.py").write_text("import mlodeco\nmlodeco.run(0)")
    done = subprocess.run(
        [sys.executable, "-m", "mlodeco", "run", "script.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "process 1: steps=0.\n"
