"""The notebook of the docs: it runs in a fresh kernel, and shows what it showed.

``PYTHONPATH=. python -m tests.test_notebook`` runs it and writes its outputs anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def execute(notebook, folder):
    """The notebook executed by a kernel that knows the package of this tree alone."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "IPYTHONDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        # of tqdm, which others import: it would like to have ipywidgets
        "PYTHONWARNINGS": "ignore:IProgress not found",
    }
    client = nbclient.NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=environment)
    return notebook


def shown(cell):
    """What the outputs of a cell say, as text; of a warning, too."""
    found = [
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.get("outputs", ())
    ]
    return "".join(found)


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return execute(notebook, tmp_path_factory.mktemp("notebook"))


def test_the_notebook_runs_without_a_warning(executed):
    for cell in executed.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type in ("stream", "execute_result"), output
            assert output.get("name") != "stderr", output.text


def test_the_notebook_shows_what_it_showed(executed, committed):
    assert [shown(cell) for cell in executed.cells] == [shown(cell) for cell in committed.cells]
    assert all(cell.outputs or "def " in cell.source for cell in committed.cells if is_code(cell))


def is_code(cell):
    return cell.cell_type == "code"


def test_the_notebook_is_small_and_was_run_from_top_to_bottom(committed):
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 100_000
    counts = [cell.execution_count for cell in committed.cells if is_code(cell)]
    assert counts == list(range(1, len(counts) + 1))


DECLARE = """
@program.source
def items():
    while True:
        yield 1.0

@program.level("low", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1))
def low(m, items):
    return (m.x**2).sum() * items * FACTOR
"""
LISTEN = """
program.on("run_end")(lambda: seen.append("lambda"))

@program.on("run_end")
def hook():
    seen.append("first")

@program.on("run_end")
def _():
    seen.append("nobody")

for n in range(2):
    @program.on("run_end")
    def looped(n=n):
        seen.append(n)
"""
RUN = 'history = mlodeco.run(1, program=program, progress="off").history; print(seen)'
FACTORIES = """
program, seen = mlodeco.Program(), []
program.level("low", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1))(
    lambda m: m.x.sum()
)
class Log:
    def __init__(self, name):
        self.name = name
    def note(self):
        seen.append(self.name)
def make(name):
    def hook():
        seen.append(name)
    return hook
"""
ONE = """log = Log("first")
program.on("run_end")(log.note)
program.on("run_end")(make("made"));"""
OTHER = """second = Log("second")
program.on("run_end")(second.note)
program.on("run_end")(make("another"));"""
EVENTS = """seen.clear()
for event in (EVENTS):
    @program.on(event)
    def event_note(event=event):
        seen.append(event)"""
CELLS = (
    "import torch, mlodeco\nfrom functools import partial\nfrom torch.optim import SGD\n"
    "program, seen = mlodeco.Program(), []",
    *[DECLARE.replace("FACTOR", factor) for factor in ("1", "1", "2")],
    LISTEN,
    LISTEN,
    'program.on("run_end")(lambda: seen.append("other"));',
    RUN,
    'print(history.losses("low"))',
    'seen.clear()\n@program.on("run_end")\ndef hook():\n    seen.append("edited")',
    RUN,
    FACTORIES,
    *2 * [ONE, OTHER],
    RUN,
    # another line, the same statement
    "\n" + ONE.replace("made", "anew").replace("first", "again"),
    EVENTS.replace("EVENTS", "'run_start', 'run_end'"),
    EVENTS.replace("EVENTS", "'run_end',"),
    RUN,
)
SHELL = """
import json, sys, warnings
warnings.simplefilter("error")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in json.load(sys.stdin):
    shell.run_cell(cell, store_history=True).raise_error()
"""


def test_cells_that_are_run_again_replace_what_they_declared(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHELL],
        input=json.dumps(CELLS),
        env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "['lambda', 'first', 'nobody', 0, 1, 'other']",
        "[2.0]",
        "['lambda', 'edited', 'nobody', 0, 1, 'other']",
        "['first', 'made', 'second', 'another']",
        "['again', 'anew', 'made', 'second', 'another', 'run_end']",
    ]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), temporary), NOTEBOOK)
