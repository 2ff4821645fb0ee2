"""The notebook of the docs: it runs in a fresh kernel, and shows what it showed.

``PYTHONPATH=. python -m tests.test_notebook`` runs it and writes its outputs anew.
"""

from __future__ import annotations

import os
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


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        nbformat.write(execute(nbformat.read(NOTEBOOK, as_version=4), temporary), NOTEBOOK)
