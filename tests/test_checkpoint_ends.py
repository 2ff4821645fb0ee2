"""Runs that are ended from outside, one process or several, and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import mlodeco
from mlodeco import Runner
from mlodeco.errors import Preempted
from mlodeco.runtime.checkpoint import folder
from tests.checkpoint_worker import bits, everything, run, trained

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("MLODECO_KILLS", "2"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(folder, "_sync", lambda path: None)


def worker(*arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint_worker", *map(str, arguments)],
        env={**ENVIRONMENT, **more},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(out, plan, count, *, ends=True):
    """Starts the worker as a launcher would; what each process left, and its output."""
    (out / "plan.json").write_text(json.dumps(plan))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    started = [worker(out, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(count)]
    try:
        printed = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found = [out / f"{rank}.json" for rank in range(count)]
    if not ends:
        assert not any(path.exists() for path in found)
        return [], printed
    assert all(path.exists() for path in found), "\n".join(printed)
    return [json.loads(path.read_text()) for path in found], printed


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed(tmp_path):
    process = worker(tmp_path, KILLS)
    printed = process.communicate(timeout=60 + 30 * KILLS)[0]
    assert process.returncode == 0, printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["differ"] == []
    assert report["killed"] == KILLS, report


# Signals.


def ended_by(number, at, count=1):
    """A program that a signal reaches in the middle of a tick."""
    program = everything()

    @program.on("before_step", level="low")
    def end(ctx):
        if ctx.tick == at:
            for _ in range(count):
                signal.raise_signal(number)

    return program


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_ends_the_run_behind_a_checkpoint(number, code, tmp_path, capsys):
    before = signal.getsignal(number)
    out = tmp_path / "out"
    whole = trained(tmp_path / "whole", steps=40)
    with pytest.raises(Preempted) as caught:
        run(out, ended_by(number, 27), steps=40)
    assert caught.value.code == code
    assert signal.getsignal(number) is before
    path = out / "checkpoints" / "000000027"
    assert path.exists()
    said = capsys.readouterr().err
    assert said == f"{caught.value}\n"
    for part in (number.name, "at tick 27", "resume='auto'", str(path)):
        assert part in said
    found = trained(out, steps=40)
    assert bits(found["state"]) == bits(whole["state"])
    assert found["metrics"] == whole["metrics"]


def test_a_second_sigint_ends_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ended_by(signal.SIGINT, 27, count=2), steps=40)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    newest = sorted((tmp_path / "checkpoints").glob("0*"))[-1]
    runner = Runner(everything(), seed=3)
    runner.load(newest)
    assert runner.tick == 20


@pytest.mark.filterwarnings("ignore::mlodeco.errors.SolverWarning")
def test_a_sigint_behind_a_sigterm_ends_at_once(tmp_path):
    program = everything()

    @program.on("before_step", level="low")
    def end(ctx):
        if ctx.tick == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, program, steps=5)


def test_a_signal_behind_the_last_tick_ends_the_process_too(tmp_path):
    program = everything()

    @program.on("run_end")
    def end():
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted) as caught:
        run(tmp_path, program, steps=3)
    assert "000000003" in str(caught.value)


def test_signals_stay_as_they_are_without_a_folder_and_in_other_threads(tmp_path):
    program, seen = everything(), []

    @program.on("before_step")
    def look():
        seen.append(signal.getsignal(signal.SIGTERM))

    mlodeco.run(2, program=program, progress="off")
    thread = threading.Thread(target=run, args=(tmp_path, program), kwargs={"steps": 2})
    thread.start()
    thread.join()
    assert set(seen) == {signal.getsignal(signal.SIGTERM)}


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run(tmp_path, ended_by(signal.SIGINT, 2), steps=3)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# Several processes.


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Two processes: never interrupted; ended and gone on; with a disk that is full for one."""
    out = tmp_path_factory.mktemp("several")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder, "_sync", lambda path: None)
        trained(out / "one", steps=25)
    draw = random.Random(1)
    killed = {}
    for number in range(KILLS // 2):
        # one of the two, at an operation on a file of a checkpoint, of which the first does more
        rank = draw.randrange(2)
        kill = [rank, draw.randrange(1, 12 if rank else 25)]
        killed[f"killed {number}"] = {"out": f"killed {number}", "steps": 50}
        launch(out, {"it": {**killed[f"killed {number}"], "kill": kill}}, 2, ends=False)
    plan = {
        **killed,
        "whole": {"out": "whole", "steps": 50},
        "ended": {"out": "ended", "steps": 50, "term": 33},
        "gone on": {"out": "ended", "steps": 50},
        "from one": {"out": "one", "steps": 50},
        "full": {"out": "full", "steps": 8, "checkpoint_every": 4, "full": True},
        "short": {"out": "short", "steps": 25},
        "divided": {"out": "divided", "steps": 30, "divided": True},
        "sharded": {"out": "sharded", "steps": 12, "sharded": True},
        "a part": {"out": "part", "steps": 5, "sharded": True},
        "the rest": {"out": "part", "steps": 12, "sharded": True},
        "begun": {"out": "begun", "steps": 15, "divided": True},
        "and ended": {"out": "begun", "steps": 30, "divided": True},
    }
    found, printed = launch(out, plan, 2)
    return out, found, printed


@pytest.mark.slow
def test_several_processes_go_on_to_the_bit(several):
    _, found, printed = several
    for one in found:
        for number in range(KILLS // 2):
            assert one[f"killed {number}"]["bits"] == one["whole"]["bits"]
            assert one[f"killed {number}"]["metrics"] == one["whole"]["metrics"]
        assert one["ended"]["code"] == 143
        assert one["gone on"]["bits"] == one["whole"]["bits"]
        assert one["gone on"]["metrics"] == one["whole"]["metrics"]
    assert (
        found[0]["gone on"]["bits"]["low.0.weight"] == found[1]["gone on"]["bits"]["low.0.weight"]
    )
    assert ["SIGTERM ended the run at tick 33" in text for text in printed] == [True, False]


@pytest.mark.slow
def test_an_optimizer_that_is_divided_goes_on(several):
    _, found, _ = several
    for one in found:
        assert one["and ended"]["bits"] == one["divided"]["bits"]
        assert one["and ended"]["metrics"] == one["divided"]["metrics"]


@pytest.mark.slow
def test_a_sharded_level_goes_on(several):
    _, found, _ = several
    for one in found:
        assert one["the rest"]["bits"] == one["sharded"]["bits"]
        assert one["the rest"]["metrics"] == one["sharded"]["metrics"]


@pytest.mark.slow
def test_a_process_that_cannot_write_keeps_all_from_it(several):
    out, found, _ = several
    assert list((out / "full" / "checkpoints").iterdir()) == []
    assert any("No space left on device" in text for text in found[0]["full"]["warned"])
    assert [one["full"]["ticks"] for one in found] == [8, 8]


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_loaded_by_two(several):
    out, found, _ = several
    assert [one["from one"]["ticks"] for one in found] == [50, 50]
    assert found[0]["from one"]["losses"] == found[1]["from one"]["losses"]
    metrics = found[0]["from one"]["metrics"]
    one = trained(out / "alone", steps=25)["metrics"].decode()
    assert metrics.startswith(one[: one.rindex('{"kind": "validation", "tick": 25')])


@pytest.mark.slow
def test_a_checkpoint_of_two_processes_is_loaded_by_one(several):
    out, found, _ = several
    program = everything()
    saved = out / "short" / "checkpoints" / "000000025"
    runner = Runner(program, seed=3)
    runner.load(saved)
    assert runner.tick == 25
    expected = found[0]["short"]["bits"]
    names = ("0.weight", "1.running_mean", "4.bias")
    state = runner.built.levels["low"].module.state_dict()
    for name in names:
        assert bits({name: state[name]})[name] == expected[f"low.{name}"]
    # steps of four samples in each of two processes are steps of eight in one
    feed = runner._trainers["low"]._feed.state_dict()[""]
    assert feed["pass"]["drawn"] == 25 % 6
    runner.run(5)
    assert torch.isfinite(torch.tensor(runner.history.losses("low"))).all()
