"""Every Python snippet of the README and the docs runs, page by page, in one namespace each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlodeco
from mlodeco.declare.registry import EVENTS
from mlodeco.hypergrad import NAMES
from mlodeco.runtime.hooks import OFFERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def snippets(page):
    text = page.read_text()
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start(1))
        yield "\n" * line + found.group(1)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__docs__"}
    with mlodeco.Program():
        for snippet in snippets(page):
            exec(compile(snippet, str(page), "exec"), namespace)


def test_the_picture_of_the_concepts_is_that_of_their_program():
    page = ROOT / "docs" / "concepts.md"
    namespace = {"__name__": "__docs__"}
    exec(next(snippets(page)), namespace)
    (picture,) = re.findall(r"^```mermaid\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    assert picture.strip() == namespace["program"].graph().to_mermaid()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_listed():
    names = {page.name for page in PAGES[1:]}
    index = set(LINK.findall((ROOT / "docs" / "index.md").read_text()))
    assert names - {"index.md"} <= index
    readme = set(LINK.findall((ROOT / "README.md").read_text()))
    assert {f"docs/{name}" for name in names} <= readme


def test_the_page_on_hooks_lists_what_is_offered():
    table = (ROOT / "docs" / "hooks.md").read_text().partition("| event | when |")[2]
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", table.partition("\n\n")[0], re.MULTILINE)
    assert {event: tuple(re.findall(r"`(\w+)`", offers)) for event, offers in rows} == OFFERS
    assert [event for event, _ in rows] == list(EVENTS)
    explained = set(re.findall(r"`(\w+)`", table.partition("| argument | is |")[2]))
    assert {name for offers in OFFERS.values() for name in offers} <= explained


def test_every_method_has_its_name_in_the_page_about_methods():
    text = (ROOT / "docs" / "choosing-a-method.md").read_text()
    assert [name for name in NAMES if f'`"{name}"`' not in text] == []


def test_readme_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    for name in ("quickstart", "tests"):
        assert re.search(rf"<!-- command: {name} -->\n```sh\n[^\n]+\n```", text)


def test_quickstart_beats_its_baselines_and_finds_the_wrong_labels():
    done = subprocess.run(
        [sys.executable, "examples/quickstart.py", "--seeds", "2", "--steps", "400"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for word in ("plain", "clean set only", "both pooled", "reweighted", "AUC", "+-"):
        assert word in done.stdout
    assert done.stderr == ""
    (row,) = re.findall(r"^│ mean.*$", done.stdout, re.MULTILINE)
    *baselines, reweighted, auc = map(float, re.findall(r"\d+\.\d+", row))
    assert len(baselines) == 3
    assert reweighted > max(baselines)
    assert auc > 0.8


def test_import_is_silent():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import mlodeco; mlodeco.run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
