"""Several processes: the numbers of one, one decision for all, and an end for all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlodeco import Runner
from mlodeco.errors import RunError
from mlodeco.runtime.buckets import pack, pack_bytes, unpack, unpack_bytes
from tests.parallel_worker import CASES, bilevel, samples, train, validated

ROOT = Path(__file__).parent.parent
WORKER = "tests.parallel_worker"


def environment(**more):
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def launch(out, what, count=2, worker=WORKER):
    """Starts the worker as a launcher would; what each left, with its exit status and output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-m", worker, str(out), what],
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(count),
                LOCAL_WORLD_SIZE=str(count),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found = [out / f"{rank}.pt" for rank in range(count)]
    return [torch.load(f, weights_only=False) if f.exists() else None for f in found], printed


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    found, printed = launch(tmp_path_factory.mktemp("healthy"), "healthy")
    assert None not in found, "\n".join(printed)
    return found, printed


def distance(left, right):
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_two_processes_with_half_the_batch_are_one_with_the_whole(case, healthy):
    one, (two, other) = train(case, 1), (found[case] for found in healthy[0])
    assert distance(one["state"], two["state"]) < 1e-7
    assert distance(two["state"], other["state"]) == 0.0
    assert two["losses"] == other["losses"]
    for name, losses in one["losses"].items():
        assert two["losses"][name] == pytest.approx(losses, abs=1e-7)
    assert two["norms"] == pytest.approx(one["norms"], abs=1e-7)


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


@pytest.mark.parametrize("kind", ["in order", "shuffled", "own generator", "drop_last", "stream"])
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


def test_an_unknown_reduction_is_refused(healthy):
    for found in healthy[0]:
        assert "Did you mean 'once'?" in found["refused"]
    with pytest.raises(RunError, match="reduce=3"):
        Runner(bilevel("identity", 1), reduce=3)


def test_an_error_of_one_ends_all_with_its_words(tmp_path):
    (first, second), _ = launch(tmp_path, "raises")
    assert second["message"].startswith("ValueError: words of my own")
    assert first["message"].startswith("RunError: process 1 ended with ValueError: words of my own")
    assert "tick 3" in first["message"]
    assert max(first["seconds"], second["seconds"]) < 10.0


def test_a_process_that_was_killed_is_named(tmp_path):
    (first, second), _ = launch(tmp_path, "killed")
    assert second is None
    assert "do not answer: 1." in first["message"]
    assert first["seconds"] < 15.0


def test_processes_with_other_modules_are_refused(healthy):
    for found in healthy[0]:
        assert "differ from process 0 in the names and shapes" in found["differs"]["message"]


SCRIPT = """
import sys, mlodeco
from tests.parallel_worker import bilevel, state
program = bilevel("sama", 2)
result = mlodeco.run(2, program=program, progress="plain", seed=3)
"""


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_work(launcher, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    start = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "accelerate": [
            "accelerate.commands.launch",
            *("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
            *("--dynamo_backend", "no", "--main_process_port", "0"),
        ],
    }[launcher]
    done = subprocess.run(
        [sys.executable, "-m", *start, str(tmp_path / "script.py")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all 2 steps were run") == 1


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
