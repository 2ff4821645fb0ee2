"""The files of checkpoints: exact, checked, and never dangerous."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import math
import os
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adam

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import CheckpointError, CheckpointWarning, RunError
from mlodeco.runtime.checkpoint import folder, output
from mlodeco.runtime.checkpoint.encoding import decode, encode
from tests.checkpoint_worker import bits, in_child, run, state, trained

FUZZED = int(os.environ.get("MLODECO_FUZZED", "150"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(folder, "_sync", lambda path: None)


def small(size=3, optimizer=None, lower=True):
    program = Program()
    batches = [torch.linspace(0.0, 1.0, size) + n for n in range(3)]

    @program.level(
        "low",
        module={"x": torch.ones(size)},
        optimizer=optimizer or partial(SGD, lr=0.1, momentum=0.9),
        data=batches,
    )
    def low(m, batch, top):
        return ((m.x - batch) ** 2).sum() + top.y * (m.x**2).sum() + torch.rand(())

    if lower:

        @program.level(
            "top",
            lower=["low"],
            hypergrad="identity",
            module={"y": torch.tensor(0.5)},
            optimizer=partial(Adam, lr=0.1),
        )
        def top(m, low):
            return (low.x**2).sum()

    return program


# Trees.


class Point(NamedTuple):
    x: Any
    y: Any

    def sum(self):
        return self.x + self.y


NT = collections.namedtuple("NT", "x y")


def same(left, right):
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.stride() == right.stride()
            and torch.equal(left.contiguous().view(-1), right.contiguous().view(-1))
        )
    if isinstance(left, np.ndarray | np.generic):
        return (
            type(left) is type(right) and left.dtype == right.dtype and np.array_equal(left, right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple | collections.deque):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    return left == right


def round_trip(value, tmp_path):
    tree, tensors = encode(value, "it")
    folder._write_part(tmp_path, "part", folder.Part(tree, tensors))
    part = folder._read_part(tmp_path, "part")
    return decode(part.tree, part.tensors, CPU)


VALUES = [
    None,
    True,
    -3,
    2**80,
    -(10**5000),
    0.1 + 0.2,
    math.nan,
    -math.inf,
    1.5 - 2j,
    "\ud800 ü \x00",
    b"\x00\xff",
    (1, [2, (3,)]),
    {"a": 1, 2: "b", (3, "c"): None, None: 4, 1.5: 5},
    {1, 2},
    frozenset({"a"}),
    collections.Counter({3: 2}),
    collections.OrderedDict(b=1, a=2),
    collections.deque([1, 2]),
    torch.float16,
    torch.device("cpu"),
    np.float32(1.5),
    np.arange(6).reshape(2, 3),
    np.array(3, dtype=np.uint64),
    np.array([1 + 2j]),
    np.array([True]),
    Point(1, (2.5, None)),
    [Point(1, 2), NT(torch.float16, b"")],
]

TENSORS = [
    *(torch.arange(3).to(t) for t in (torch.float64, torch.float16, torch.bfloat16, torch.uint8)),
    *(torch.arange(3).to(t) for t in (torch.int8, torch.bool, torch.uint16, torch.complex64)),
    torch.tensor([1 + 2j, 3.0], dtype=torch.complex128).conj(),
    torch.arange(3.0).to(torch.float8_e4m3fn),
    torch.tensor(3.5),
    torch.zeros(0, 3),
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(3, 4).T,
    torch.tensor([math.nan, -0.0, math.inf]),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_exact(value, tmp_path):
    assert same(round_trip(value, tmp_path), value)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype} {tuple(t.shape)}")
def test_tensors_are_exact(tensor, tmp_path):
    found = round_trip([tensor], tmp_path)[0]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.stride() == tensor.stride()
    raw = [t.resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (found, tensor)]
    assert torch.equal(*raw)


@pytest.mark.parametrize(
    "make",
    [
        torch.Tensor.to_sparse,
        lambda t: torch.cat([t.to_sparse(), t.to_sparse()]).t(),
        torch.Tensor.to_sparse_csr,
        torch.Tensor.to_sparse_csc,
        partial(torch.Tensor.to_sparse_bsr, blocksize=(2, 2)),
        partial(torch.Tensor.to_sparse_bsc, blocksize=(2, 2)),
        lambda t: t.to(torch.complex128).to_sparse(),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
def test_sparse_tensors_are_exact(make, tmp_path):
    tensor = make(torch.diag(torch.arange(4.0)))
    found, again = round_trip([tensor, tensor], tmp_path)
    assert found is again
    assert (found.layout, found.dtype, found.shape) == (tensor.layout, tensor.dtype, tensor.shape)
    assert torch.equal(found.to_dense(), tensor.to_dense())
    if found.layout == torch.sparse_coo:
        assert found.is_coalesced() == tensor.is_coalesced()
        assert torch.equal(found._values(), tensor._values())
    else:
        assert torch.equal(found.values(), tensor.values())


def test_a_namedtuple_of_a_function_keeps_its_names(tmp_path):
    local = collections.namedtuple("Local", "x y")
    found = round_trip(local(1, 2), tmp_path)
    assert type(found).__name__ == "Local"
    assert (found, found.x, found.y) == ((1, 2), 1, 2)


def test_a_file_of_memory_is_an_array(tmp_path):
    mapped = np.memmap(tmp_path / "data", "f4", "w+", shape=(3,))
    assert same(round_trip(mapped, tmp_path), np.zeros(3, "f4"))


def test_one_tensor_in_two_places_is_one(tmp_path):
    tensor = torch.ones(3)
    first, second, view = round_trip([tensor, tensor, tensor[1:]], tmp_path)
    assert first is second
    assert torch.equal(view, torch.ones(2))


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


@given(trees)
def test_trees_are_exact(tree):
    found, tensors = encode(tree, "it")
    assert tensors == {}
    assert same(decode(json.loads(json.dumps(found, allow_nan=False)), {}, CPU), tree)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"a": [1, object()]}, "it['a'][1] is a builtins.object"),
        ([len], "it[0] is a builtins.builtin_function_or_method"),
        (np.array(["a"]), "it is a NumPy array of <U1"),
        (torch.eye(2).to_mkldnn(), "it is a tensor of the layout torch._mkldnn"),
        (torch.empty(2, device="meta"), "it is a tensor on the meta device"),
        (torch.zeros(2, dtype=torch.uint8).view(torch.bits8), "it is a tensor of torch.bits8"),
        (np.ones(2, ">f4"), "it is a NumPy array of >f4"),
        (np.array([1, "a"], dtype=object), "it is a NumPy array of object"),
        (np.zeros(2, [("a", "f4")]), "it is a NumPy array of [('a', '<f4')]"),
        (np.array(["2020-01-01"], "M8[D]"), "it is a NumPy array of datetime64[D]"),
        (np.datetime64("2020-01-01"), "it is a NumPy array of datetime64[D]"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "it is a NumPy MaskedArray"),
        (torch.ones(2).max(0), "it is a torch.return_types.max"),
    ],
)
def test_what_cannot_be_saved_is_named(value, found):
    with pytest.raises(CheckpointError) as caught:
        encode(value, "it")
    assert found in str(caught.value)
    assert "program.track" in caught.value.remedy


def test_a_tree_that_holds_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="holds itself"):
        encode(loop, "it")


# Damage.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "_sync", lambda path: None)
        path = tmp_path_factory.mktemp("saved") / "one"
        runner = Runner(small(), seed=3)
        for _ in range(4):
            runner.step()
        runner.save(path)
    return path


FILES = [
    "common.json",
    "common.safetensors",
    "history.jsonl",
    "levels/low.safetensors",
    "levels/top.safetensors",
    "manifest.json",
    "process-0.json",
    "process-0.safetensors",
]


def test_these_are_the_files(saved):
    found = [p.relative_to(saved) for p in saved.rglob("*") if p.is_file()]
    assert sorted(map(str, found)) == FILES


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def become_a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink, become_a_folder])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_names_the_file(name, damage, saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "one")
    damage(path / name)
    program = small()
    runner = Runner(program, seed=7)
    before = bits(state(program))
    with pytest.raises(CheckpointError) as caught:
        runner.load(path)
    assert str(path / name) in caught.value.found
    assert bits(state(program)) == before
    assert runner.tick == 0


def test_another_version_is_named(saved, tmp_path):
    path = shutil.copytree(saved, tmp_path / "one")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["format"] = 2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="has the format 2"):
        Runner(small(), seed=7).load(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(small, 4), r"parameter 'x' was \(3,\) torch.float32 and is \(4,\)"),
        (partial(small, optimizer=partial(Adam, lr=0.1)), "optimizer was SGD and is Adam"),
        (lambda: other_program(), "the levels were 'low', 'top' and are 'low'"),
    ],
)
def test_another_program_is_named(make, message, saved):
    with pytest.raises(CheckpointError, match=message) as caught:
        Runner(make(), seed=7).load(saved)
    assert str(saved) in caught.value.found


def other_program():
    program = Program()

    @program.level("low", module={"x": torch.ones(3)}, optimizer=partial(SGD, lr=0.1))
    def low(m):
        return (m.x**2).sum()

    return program


def test_a_path_without_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: there is no checkpoint") as caught:
        Runner(small(), seed=7, resume=tmp_path / "nowhere")
    assert "damaged" not in str(caught.value)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"manifest.json.*there is no such file"):
        Runner(small(), seed=7).load(tmp_path)


def test_auto_falls_back_to_the_newest_good_one_and_says_so(tmp_path):
    whole = trained(tmp_path / "whole", program=small(), steps=9, checkpoint_every=2)
    out = tmp_path / "out"
    trained(out, program=small(), steps=7, checkpoint_every=2)
    cut(out / "checkpoints" / "000000007" / "common.json")
    flip(out / "checkpoints" / "000000006" / "levels" / "top.safetensors")
    with pytest.warns(CheckpointWarning) as caught:
        found = trained(out, program=small(), steps=9, checkpoint_every=2)
    messages = [str(w.message) for w in caught]
    assert [f"00000000{n}/" in m for n, m in zip((7, 6), messages, strict=True)] == [True, True]
    assert all("goes on from" in m and "000000004" in m for m in messages)
    assert bits(found["state"]) == bits(whole["state"])
    assert found["metrics"] == whole["metrics"]


def test_what_was_passed_over_is_not_taken_for_the_newest(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    run(tmp_path, small(), steps=6, checkpoint_every=2, keep=3)
    for name in ("000000006", "000000004"):
        cut(checkpoints / name / "common.json")
    with pytest.warns(CheckpointWarning):
        run(tmp_path, small(), steps=5, checkpoint_every=1, keep=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "000000004.unusable",
        "000000005",
        "000000006.unusable",
    ]
    assert run(tmp_path, small(), steps=5).ticks == 5


def test_one_that_was_about_to_be_replaced_gets_its_name_back(tmp_path):
    run(tmp_path, small(), steps=5, checkpoint_every=None)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "000000005").rename(checkpoints / ".000000005.old")
    program, ticks = small(), []
    program.on("run_start")(lambda ctx: ticks.append(ctx.tick))
    run(tmp_path, program, steps=6, checkpoint_every=None)
    assert ticks == [5]
    assert not list(checkpoints.glob(".*"))


def test_a_checkpoint_is_not_written_over_itself(tmp_path, monkeypatch):
    run(tmp_path, small(), steps=5, checkpoint_every=None)

    def write(*args):
        raise AssertionError("nothing has changed")

    monkeypatch.setattr(folder, "write", write)
    assert run(tmp_path, small(), steps=5, checkpoint_every=None).ticks == 5


def test_two_runs_in_one_folder_are_told_apart(tmp_path):
    program = small()
    messages = []

    @program.on("after_step", level="low", every=2)
    def another(ctx):
        for options in ({}, {"resume": None}):
            with pytest.raises(RunError, match="another run is writing to out=") as caught:
                run(tmp_path, small(), steps=2, **options)
            messages.append(str(caught.value))

    assert run(tmp_path, program, steps=3).ticks == 3
    assert len(messages) == 2


def test_metrics_hold_what_came_before_an_error(tmp_path):
    program = small()

    @program.on("before_step", level="low")
    def fail(ctx):
        if ctx.tick == 7:
            raise ValueError("words of my own")

    with pytest.raises(ValueError, match="words of my own"):
        run(tmp_path, program, steps=9, checkpoint_every=None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["tick"] for line in lines] == [tick for tick in range(1, 7) for _ in range(2)]


def test_metrics_of_a_run_that_loads_another_are_its_history(tmp_path):
    trained(tmp_path / "a", program=small(), steps=8, checkpoint_every=None)
    runner = Runner(small(), seed=5, out=tmp_path / "b", checkpoint_every=2)
    runner.run(2)
    runner.load(tmp_path / "a" / "checkpoints" / "000000008")
    runner.run(2)
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    losses = [(json.loads(line)["tick"], json.loads(line)["loss"]) for line in lines]
    assert losses == [(record.tick, record.loss) for record in runner.history.steps]
    assert (tmp_path / "b" / "checkpoints" / "000000010").exists()


def test_auto_refuses_where_none_is_good(tmp_path):
    run(tmp_path, small(), steps=3)
    cut(tmp_path / "checkpoints" / "000000003" / "common.json")
    with pytest.raises(CheckpointError, match=r"common\.json"):
        run(tmp_path, small(), steps=5)


def signed(path, change):
    """A checkpoint that somebody has changed, checksums included."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    body = {key: value for key, value in manifest.items() if key != "checksum"}
    manifest["checksum"] = folder._checksum(body)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("option", "value"),
    [("processes", 0), ("processes", 10**30), ("processes", True), ("tick", -1), ("tick", 2)],
)
def test_signed_numbers_that_no_run_has_written_are_refused(option, value, saved, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(saved, path)
    signed(path, lambda manifest: manifest["head"].update({option: value}))
    with pytest.raises(CheckpointError, match="damaged"):
        Runner(small(), seed=3).load(path)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("stop_reason", 3),
        ("best", {"tick": "../../x", "metric": "m", "value": 1.0, "metrics": {}}),
        ("best", {"tick": 1}),
        ("run_seed", "no"),
    ],
)
def test_a_signed_progress_that_no_run_has_written_is_passed_over(entry, value, tmp_path):
    run(tmp_path, small(), steps=4, checkpoint_every=2)
    path = tmp_path / "checkpoints" / "000000004"
    name = "process-0" if entry == "run_seed" else "common"
    part = folder._read_part(path, name)
    tree = decode(part.tree, part.tensors, CPU)
    (tree if entry == "run_seed" else tree["progress"])[entry] = value
    folder._write_part(path, name, folder.Part(*encode(tree, "the state")))
    resigned(path)
    with pytest.warns(CheckpointWarning, match="000000002 instead"):
        assert run(tmp_path, small(), steps=5).ticks == 5


def test_what_would_be_read_without_end_is_refused(saved, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(saved, path)
    (path / "common.json").unlink()
    os.mkfifo(path / "common.json")
    with pytest.raises(CheckpointError, match=r"common\.json.*no ordinary file"):
        Runner(small(), seed=3).load(path)


def resigned(path):
    def change(manifest):
        for name in manifest["files"]:
            if (path / name).is_file():
                size = (path / name).stat().st_size
                manifest["files"][name] = [size, folder._digest(path / name)]

    signed(path, change)


edits = st.lists(
    st.tuples(
        st.sampled_from(FILES),
        st.sampled_from(["cut", "flip", "swap", "insert", "json"]),
        st.floats(0.0, 1.0),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)

WORDS = [b"null", b"[]", b"{}", b"-1", b'"x"', b"1e999", b"[[[[", b'{"tensor": {"name": "0"}}']


def edit(path, name, kind, at, some):
    file = path / name
    content = bytearray(file.read_bytes())
    place = int(at * max(len(content) - 1, 0))
    match kind:
        case "cut":
            del content[place:]
        case "flip":
            for n, byte in enumerate(some):
                content[(place + n) % len(content)] ^= byte
        case "swap":
            other = path / FILES[some[0] % len(FILES)]
            content, theirs = bytearray(other.read_bytes()), bytes(content)
            other.write_bytes(theirs)
        case "insert":
            content[place:place] = some
        case "json":
            content[place : place + some[0] % 9] = WORDS[some[-1] % len(WORDS)]
    file.write_bytes(content)


def test_fuzzed_checkpoints_end_in_a_clear_error_or_load(saved, tmp_path):
    """Neither a crash nor a hang, whether or not the checksums are made to fit."""
    counts = collections.Counter()

    @settings(max_examples=FUZZED, deadline=None)
    @given(edits, st.booleans())
    def fuzz(edits, signs):
        path = tmp_path / "one"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(saved, path)
        for one in edits:
            if (path / one[0]).stat().st_size:
                edit(path, *one)
        if signs:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                resigned(path)
        message = load(path)
        assert message is None or str(path) in message
        counts["loaded" if message is None else "told", signs] += 1

    fuzz()
    print(f"{counts.total()} fuzzed checkpoints: {dict(counts)}")
    assert counts["told", False] > 0 < counts["told", True]


def load(path):
    """The message of the error that a checkpoint ends in, if it does."""
    try:
        Runner(small(), seed=3).load(path)
    except mlodeco.MlodecoError as error:
        return str(error)
    return None


# A disk that is full.


def full(patch, after):
    """Lets files be written until there have been so many."""
    count = 0
    real_file, real_text = folder.save_file, folder._write_text

    def limited(real):
        def write(*args):
            nonlocal count
            count += 1
            if count > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(*args)

        return write

    patch.setattr(folder, "save_file", limited(real_file))
    patch.setattr(folder, "_write_text", limited(real_text))


@pytest.mark.parametrize("after", range(9))
def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(after, tmp_path, monkeypatch):
    program = small()

    @program.on("checkpoint")
    def fill(ctx):
        if ctx.tick == 2:
            full(monkeypatch, after)

    whole = trained(tmp_path / "whole", program=small(), steps=7, checkpoint_every=2)
    with pytest.warns(CheckpointWarning, match="No space left on device") as caught:
        found = trained(tmp_path / "out", program=program, steps=7, checkpoint_every=2)
    assert bits(found["state"]) == bits(whole["state"])
    monkeypatch.undo()
    checkpoints = tmp_path / "out" / "checkpoints"
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == (["000000002"] if after < 8 else ["000000002", "000000004"])
    assert left[-1] in str(caught[-1].message)
    resumed = trained(tmp_path / "out", program=small(), steps=7, checkpoint_every=2)
    assert bits(resumed["state"]) == bits(whole["state"])
    assert resumed["metrics"] == whole["metrics"]


def test_a_full_disk_ends_the_run_if_asked_to(tmp_path, monkeypatch):
    full(monkeypatch, 5)
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path, small(), steps=7, checkpoint_every=2, checkpoint_errors="raise")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_limit_of_the_system_is_told(tmp_path):
    """Files may grow to 2000 bytes: the system itself refuses more."""

    def act():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        with pytest.warns(CheckpointWarning, match="could not be written"):
            run(tmp_path, small(), steps=2, checkpoint_every=2)

    assert os.waitpid(in_child(act), 0)[1] == 0
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_lines_of_metrics_are_kept_until_they_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "INTERVAL", 0.0)
    program = small()
    metrics, hidden = tmp_path / "metrics.jsonl", tmp_path / "hidden"

    @program.on("after_step", level="low")
    def hide(ctx):
        if ctx.tick == 2:
            metrics.rename(hidden)
            metrics.mkdir()
        if ctx.tick == 4:
            metrics.rmdir()

    with pytest.warns(CheckpointWarning, match="cannot be written to") as caught:
        result = run(tmp_path, program, steps=6, checkpoint_every=None)
    assert len(caught) == 2
    assert len(metrics.read_text().splitlines()) == len(result.history) == 12
