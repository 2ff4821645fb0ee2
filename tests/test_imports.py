"""The house: imports go downwards only, and importing has no effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlodeco

ROOT = Path(mlodeco.__file__).parent
RANKS = {
    "errors": 0,
    "tree": 1,
    "declare": 2,
    "graph": 3,
    "calculus": 4,
    "hypergrad": 5,
    "runtime": 6,
    "show": 7,
    "api": 8,
    "": 9,
    "cli": 10,
    "__main__": 11,
}
FILES = sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to; ``""`` is ``mlodeco/__init__.py``."""
    first = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> set[str]:
    """Every dotted name that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def parts_imported(path: Path) -> set[str]:
    own = (name.split(".") for name in imported(path))
    parts = {name[1] if len(name) > 1 else "" for name in own if name[0] == "mlodeco"}
    return {part if part in RANKS else "" for part in parts}


def libraries_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)} - {"mlodeco"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_downwards(path):
    part = part_of(path)
    assert part in RANKS
    upwards = {other for other in parts_imported(path) if RANKS[other] > RANKS[part]}
    assert upwards == UPWARDS.get(name_of(path), set())
    if path.parent == ROOT and part:
        assert part not in parts_imported(path)


UPWARDS = {"runtime/history.py": {"show"}, "runtime/result.py": {"show"}}
"""Files whose methods hand over to a part above, ``result.plot()``, when they are called."""


@pytest.mark.parametrize("path", [ROOT / name for name in UPWARDS], ids=name_of)
def test_what_is_above_is_not_imported_with_a_module(path):
    tree = ast.parse(path.read_text())
    runs = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) for node in runs}
    assert not [name for name in modules if name and name.startswith("mlodeco.show")]


LIBRARIES = {"torch", "accelerate", "filelock", "rich", "safetensors", "typer"}
FORBIDDEN = {
    "errors": {"torch", "accelerate", "rich", "typer"},
    "declare": {"torch", "accelerate", "rich", "typer"},
    "graph": {"torch", "accelerate", "rich", "typer"},
    "tree": {"accelerate", "rich", "typer"},
    "calculus": {"accelerate", "rich", "typer"},
    "hypergrad": {"accelerate", "rich", "typer"},
    "runtime": {"rich", "typer"},
    "show": {"accelerate", "typer"},
    "api": {"accelerate", "rich", "typer"},
    "": {"accelerate", "rich", "torch", "typer"},
    "cli": {"accelerate", "torch"},
    "__main__": {"accelerate", "rich", "torch", "typer"},
}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_in_their_parts(path):
    assert not libraries_imported(path) & FORBIDDEN[part_of(path)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_declared_libraries_are_imported(path):
    allowed = {*LIBRARIES, *sys.stdlib_module_names}
    assert libraries_imported(path) - EXTRAS.get(name_of(path), set()) <= allowed


EXTRAS = {
    "show/comparison.py": {"matplotlib"},
    "show/figures.py": {"matplotlib", "cycler"},
    "show/progress.py": {"IPython"},
}
"""Libraries that are not always there, and the files that may ask for them."""


def test_every_part_is_looked_at():
    assert {part_of(path) for path in FILES} == RANKS.keys()


@pytest.mark.parametrize("module", [mlodeco, mlodeco.hypergrad], ids=lambda m: m.__name__)
def test_public_names_exist_and_are_sorted(module):
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert len(set(module.__all__)) == len(module.__all__)


def test_public_functions_are_documented():
    undocumented = [
        name
        for name in mlodeco.__all__
        if callable(getattr(mlodeco, name)) and not getattr(mlodeco, name).__doc__
    ]
    assert undocumented == []


EFFECTS = """
import random, warnings
import numpy, torch
torch.manual_seed(3); random.seed(3); numpy.random.seed(3)
before = torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())
settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    import mlodeco
    mlodeco.run
after = torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state())
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert settings == (
    torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
)
assert mlodeco.api.DEFAULT.levels == {}
assert not torch.cuda.is_initialized()
print("done")
"""


LIGHT = """
import sys
import mlodeco, mlodeco.cli, mlodeco.errors
assert not {"torch", "accelerate"} & sys.modules.keys()
assert set(mlodeco.__all__) <= set(dir(mlodeco))
assert {name for name in dir(mlodeco) if name[:2] != "__"} < set(mlodeco.__all__)
assert {"__doc__", "__file__"} < set(dir(mlodeco))
from mlodeco import *
assert level is mlodeco.level and mlodeco.errors.RunError and tree is mlodeco.tree
assert "torch" in sys.modules
try:
    mlodeco.levels
except AttributeError as error:
    print(error)
"""


def test_the_library_is_loaded_when_it_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "module 'mlodeco' has no attribute 'levels'\n", done.stderr


def test_each_part_is_an_attribute():
    assert set(mlodeco._MODULES) == RANKS.keys() - {"", "__main__"}
    done = subprocess.run(
        [sys.executable, "-c", "import mlodeco; print(mlodeco.runtime.trackers.Trackers)"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout == "<class 'mlodeco.runtime.trackers.Trackers'>\n", done.stderr


def test_importing_draws_no_random_numbers_and_changes_no_setting():
    done = subprocess.run(
        [sys.executable, "-c", EFFECTS], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
