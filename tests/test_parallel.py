"""Several processes: the numbers of one, one decision for all, and an end for all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Adam
from torch.utils.data import DataLoader, IterableDataset

from mlodeco import Runner
from mlodeco.errors import DataError, OptimizerError, RunError
from mlodeco.runtime.buckets import pack, pack_bytes, unpack, unpack_bytes
from mlodeco.runtime.processes import SeveralProcesses
from mlodeco.runtime.shares import share
from tests.launching import LAUNCHERS, launched
from tests.parallel_worker import (
    CASES,
    EXPLICIT,
    FAILURES,
    bilevel,
    free_port,
    place,
    samples,
    train,
    validated,
)

ROOT = Path(__file__).parent.parent


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(out, what, worker="tests.parallel_worker", **more):
    return subprocess.Popen(
        [sys.executable, "-m", worker, str(out), what],
        env=environment(**more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(started):
    """The output of each process."""
    try:
        return [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()


def left(out):
    """What each of two processes has left."""
    found = [out / f"{rank}.pt" for rank in range(2)]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in found]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    out, port = tmp_path_factory.mktemp("healthy"), free_port()
    started = [start(out, "healthy", **place(rank, 2, port)) for rank in range(2)]
    printed = finish(started)
    found = left(out)
    assert None not in found, "\n".join(printed)
    return found, printed


def distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """What was left of each failure, when it happened, and the exit statuses."""
    out = tmp_path_factory.mktemp("failed")
    printed = finish([start(out, "failures")])
    exits = iter(json.loads((out / "exits").read_text())) if (out / "exits").exists() else None
    assert exits, printed
    return {
        what: (left(out / what), float((out / what / "failed").read_text()), [*islice(exits, 2)])
        for what in FAILURES
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_two_processes_with_half_the_batch_are_one_with_the_whole(case, healthy):
    one, (two, other) = train(case, 1), (found[case] for found in healthy[0])
    assert distance(one["state"], two["state"]) < 1e-7
    assert distance(two["state"], other["state"]) == 0.0
    assert two["losses"] == other["losses"]
    for name, losses in one["losses"].items():
        assert two["losses"][name] == pytest.approx(losses, abs=1e-7)
    assert two["numbers"] == pytest.approx(one["numbers"], abs=1e-7, nan_ok=True)


def test_the_steps_of_leaf_levels_go_through_ddp(healthy):
    for case in CASES:
        leaves = {
            "chain": ["head", "body"],
            "tuned": ["low", "ruled"],
            "odd modules": ["low", "other"],
        }
        expected = leaves.get(case, leaves.get(case.split()[0], ["low"]))
        found = [ranked[case]["overlapped"] for ranked in healthy[0]]
        assert found == [[] if case in EXPLICIT else expected] * 2, case


def test_micro_batches_are_averaged_together(healthy):
    found = healthy[0][0]
    assert found["micro-batches"]["collectives"] == found["bilevel neumann"]["collectives"]


def test_the_options_of_a_given_accelerator_take_effect(healthy):
    one = healthy[0][0]["schedule"]
    given = healthy[0][0]["accelerators"]
    for name in ("plain", "buckets"):
        assert distance(given[name]["state"], one["state"]) < 1e-12
        assert given[name]["numbers"] == pytest.approx(one["numbers"], abs=1e-12)
    assert given["plain"]["collectives"] == one["collectives"]
    assert given["buckets"]["collectives"] > one["collectives"]
    assert 1e-6 < distance(given["hook"]["state"], one["state"]) < 1e-2
    first = given["hook"]["losses"]["low"][0]  # gradients are in half precision, losses are not
    assert first == pytest.approx(one["losses"]["low"][0], rel=1e-6)


@pytest.mark.parametrize("method", ["neumann", "sama", "unroll", "cg"])
def test_once_makes_one_collective_a_hypergradient(method, healthy):
    first, second = (found[f"once {method}"] for found in healthy[0])
    assert first["seen"] == second["seen"] == [1, 1, 1]
    assert distance(first["state"], second["state"]) == 0.0


def test_exact_averages_the_direct_pass_and_every_product(healthy):
    first, second = (found["exact"] for found in healthy[0])
    # what is touched; four products, and for the step at first five, then one; cross; direct
    assert first["seen"] == second["seen"] == [12, 8, 8]
    assert distance(first["state"], healthy[0][0]["once neumann"]["state"]) > 1e-7


@pytest.mark.parametrize(
    "kind", ["in order", "shuffled", "own generator", "numpy sampler", "drop_last", "stream"]
)
def test_processes_see_together_what_one_sees(kind, healthy):
    first, second = (found["samples"][kind] for found in healthy[0])
    seen = [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    assert {len(batch) for batch in seen} == {8}
    for epoch in (seen[:2], seen[2:4]):
        together = [number for batch in epoch for number in batch]
        assert len(set(together)) == 16  # 22 samples: the rest is dropped, and nothing repeated
    if kind in ("in order", "drop_last", "stream"):
        assert seen[:2] == [list(range(8)), list(range(8, 16))]
    else:
        assert seen[:2] != seen[2:4]
    if kind != "stream":
        assert first["ends"] == second["ends"] == [2, 4]


def padded(kind, healthy):
    """What both processes see together, and when passes end, with the tails padded."""
    first, second = (found["samples"][f"{kind}, padded"] for found in healthy[0])
    assert first["ends"] == second["ends"]
    return [a + b for a, b in zip(first["seen"], second["seen"], strict=True)], first["ends"]


@pytest.mark.parametrize("kind", ["in order", "shuffled", "stream"])
def test_what_is_left_of_a_pass_is_padded_where_asked_for(kind, healthy):
    seen, ends = padded(kind, healthy)
    one_pass = [number for batch in seen[:3] for number in batch]
    assert {len(batch) for batch in seen} == {8}
    assert set(one_pass) == set(range(22))
    assert one_pass[22:] == one_pass[:2]
    assert ends == ([4] if kind == "stream" else [3])  # without a length an end shows later


def test_missing_batches_are_padded_whole(healthy):
    seen, _ = padded("drop_last", healthy)
    assert seen[2] == [16, 17, 18, 19, 0, 1, 2, 3]
    assert padded("single, odd", healthy)[0] == [[0, 1], [2, 0], [0, 1], [2, 0], [0, 1]]


class Words(IterableDataset):
    def __iter__(self):
        return iter(("one", "two", "three"))


def test_batches_that_cannot_be_padded_are_refused():
    processes = SimpleNamespace(count=2, rank=0)
    cut = share(DataLoader(Words(), batch_size=1), processes, "pad")
    with pytest.raises(DataError, match=r"(?s)cannot be padded.*tails=\"pad\""):
        list(cut)
    assert list(share(DataLoader(Words(), batch_size=1), processes, "drop")) == [["one"]]


def test_a_shuffled_pass_is_that_of_one_process(healthy):
    first, second = (found["samples"]["own generator"] for found in healthy[0])
    seen = [a + b for a, b in zip(first["seen"], second["seen"], strict=True)]
    one = [number for batch in samples()["own generator"]["seen"][:4] for number in batch]
    assert [number for batch in seen[:2] for number in batch] == one


def test_other_data_are_shared_out_or_replicated(healthy):
    first, second = (found["samples"] for found in healthy[0])
    assert (first["single"]["seen"], second["single"]["seen"]) == (
        [[0], [2], [4], [6], [8]],
        [[1], [3], [5], [7], [9]],
    )
    assert first["list"]["seen"] == second["list"]["seen"]
    assert first["distributed"]["seen"][0] == [0, 2, 4, 6]
    assert second["distributed"]["seen"][0] == [1, 3, 5, 7]


def test_all_stop_where_one_asks_for_it(healthy):
    assert [found["stops"] for found in healthy[0]] == [{"reason": "enough of it", "ticks": 4}] * 2


@pytest.mark.filterwarnings("ignore::mlodeco.MlodecoWarning")
def test_validations_are_averaged_by_samples(healthy):
    first, second = (found["validated"] for found in healthy[0])
    one = validated(1)
    assert first["metrics"] == second["metrics"]
    assert first["reason"] == second["reason"] == one["reason"]
    for metrics, expected in zip(first["metrics"][::2], one["metrics"][::2], strict=True):
        assert metrics == pytest.approx(expected, abs=1e-7)
    assert first["metrics"][1] == {"rises": 2.5, "own": 1.0}
    times = len(first["metrics"]) // 2
    assert sorted(first["calls"] + second["calls"]) == sorted(one["calls"])
    assert len(first["calls"]) == 4 * times
    assert len(second["calls"]) == 3 * times


def test_buffers_are_those_of_the_main_process_and_masks_differ(healthy):
    first, second = (found["buffers"] for found in healthy[0])
    assert distance(first["state"], second["state"]) == 0.0
    assert float(first["state"]["low.1.running_mean"]) != 0.0
    assert first["drawn"] != second["drawn"]


def test_gather_and_is_main(healthy):
    ((main, numbers, rows),), ((other, _, _),) = (found["told"] for found in healthy[0])
    assert (main, other) == (True, False)
    assert numbers.tolist() == [0.0, 1.0]
    assert rows.tolist() == [[0.0, 0.0]] * 2 + [[1.0, 1.0]] * 2


def test_progress_is_printed_once(healthy):
    first, second = healthy[1]
    assert first.count("step 1/1") == 1
    assert "step" not in second


def test_processes_that_drift_apart_are_told_of_once(healthy):
    (message,), nothing = (found["drifts"] for found in healthy[0])
    assert "the parameters of 'low' are not the same" in message
    assert nothing == []


def test_what_cannot_be_done_is_refused(healthy):
    for found in healthy[0]:
        messages = found["refused"]
        assert "Did you mean 'once'?" in messages["reduce"]
        assert "Did you mean 'pad'?" in messages["tails"]
        assert "divide the batch sizes by the number of processes" in messages["split"]
        assert "leave data= out of @validate" in messages["gather"]
        for what in ("sama", "unroll", "rollback"):
            message = messages[f"divided {what}"]
            assert "level 'low'" in message
            assert "ZeroRedundancyOptimizer keeps a part in each process" in message
            assert "partial(Adam, lr=...)" in message
    with pytest.raises(RunError, match="reduce=3"):
        Runner(bilevel("identity", 1), reduce=3)


def test_a_divided_optimizer_needs_several_processes():
    program = bilevel(
        "neumann", 1, {"optimizer": partial(ZeroRedundancyOptimizer, optimizer_class=Adam, lr=0.1)}
    )
    with pytest.raises(OptimizerError, match=r"level 'low'.*there is one process"):
        Runner(program)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (DistributedType.DEEPSPEED, "ZeroRedundancyOptimizer.*FSDP2"),
        (DistributedType.MEGATRON_LM, "accelerate launch --multi_gpu"),
        (DistributedType.XLA, "accelerate launch --multi_gpu"),
    ],
)
def test_other_engines_are_refused(kind, words, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(RunError, match=rf"(?s){kind.value}.*{words}"):
        Runner(bilevel("identity", 1))


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_engines_are_refused_before_accelerate_looks_for_them(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(RunError, match=f"kind {name} is not available"):
        Runner(bilevel("identity", 1))


class Work:
    """A collective that is over at a look, in the middle of which its time runs out."""

    def __init__(self, over_at, error=None):
        self.over_at, self.error, self.waits = over_at, error, 0

    def wait(self, timeout=None):
        self.waits += 1
        if self.error is not None and self.is_completed():
            raise self.error
        if timeout is not None:
            raise RuntimeError("timed out")

    def is_completed(self):
        return self.waits >= self.over_at


def waiting(looks):
    found = object.__new__(SeveralProcesses)
    found._device = torch.device("cpu")
    found._board = SimpleNamespace(check=lambda: looks.append("look"))
    return found


def test_a_process_that_is_late_is_waited_for():
    looks, work = [], Work(over_at=3)
    waiting(looks)._wait(work)
    assert (work.waits, looks) == (4, ["look", "look"])


def test_a_collective_that_fails_says_why():
    work = Work(over_at=2, error=RuntimeError("no such device"))
    with pytest.raises(RuntimeError, match="no such device"):
        waiting([])._wait(work)


def test_gradient_accumulation_belongs_to_levels():
    given = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(RunError, match=r"(?s)gradient_accumulation_steps=2.*accumulate="):
        Runner(bilevel("identity", 1), accelerator=given)


@pytest.mark.parametrize("what", [what for what in FAILURES if what.startswith("raises")])
def test_an_error_of_one_ends_all_with_its_words(what, failed):
    (first, second), since, exits = failed[what]
    assert exits == [0, 0]
    assert second["message"].startswith("ValueError: words of my own")
    assert first["message"].startswith("RunError: process 1 ended with ValueError: words of my own")
    assert "tick 3" in first["message"]
    assert max(first["ended"], second["ended"]) - since < 8.0


@pytest.mark.parametrize("what", [what for what in FAILURES if what.startswith("killed")])
def test_a_process_that_was_killed_is_named(what, failed):
    (first, second), since, exits = failed[what]
    assert exits == [0, -signal.SIGKILL]
    assert second is None
    assert "do not answer: 1." in first["message"]
    assert first["ended"] - since < 15.0


def test_processes_with_other_modules_are_refused(healthy):
    for found in healthy[0]:
        assert "differ from process 0 in the names and shapes" in found["differs"]["message"]


SCRIPT = """
import os, sys, mlodeco
from tests.parallel_worker import bilevel, state
program = bilevel("sama", 2)
result = mlodeco.run(2, program=program, progress="plain", seed=3)
print("of", os.environ["WORLD_SIZE"])
"""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_work(launcher, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launched(launcher, str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all 2 steps were run") == 1
    assert done.stdout.count("of 2") == 2


def test_a_bucket_keeps_what_is_missing_apart():
    like = {
        "a": torch.ones(2, dtype=torch.bfloat16),
        "b": torch.ones(()),
        "c": torch.ones(2, dtype=torch.complex64),
    }
    tree = {"a": like["a"] * 3, "c": like["c"] * 2j}
    bucket = pack([tree, {}], [like, {"d": torch.ones(1)}])
    assert bucket.dtype is torch.float32
    found, empty = unpack(bucket, [like, {"d": torch.ones(1)}])
    assert found.keys() == {"a", "c"}
    assert empty == {}
    assert all(torch.equal(found[key], tree[key]) for key in found)
    assert found["a"].dtype is torch.bfloat16


def test_bytes_of_any_dtype_come_back():
    tensors = [torch.tensor([True]), torch.randn(3, dtype=torch.float64), torch.tensor(7)]
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    unpack_bytes(pack_bytes(tensors), copies)
    assert all(map(torch.equal, tensors, copies))
