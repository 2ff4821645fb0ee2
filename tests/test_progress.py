"""What a run prints."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from rich.cells import cell_len
from rich.console import Console
from torch.optim import SGD

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import RunError
from mlodeco.runtime import SolveRecord, StepRecord, Tick, ValidationRecord
from mlodeco.runtime.memory import peak_memory
from mlodeco.show.progress import LiveDisplay, NotebookDisplay, PlainDisplay, View, make_display
from mlodeco.show.readings import DECAY, LevelReading, Readings, Smoothed


def make():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    def one():
        return {"x": torch.ones(2, dtype=torch.float64)}

    @program.level("low", module=one(), optimizer=sgd)
    def low(m, top):
        return ((m.x - top.x) ** 2).sum() + (m.x**2).sum()

    @program.level("top", lower=["low"], module=one(), optimizer=sgd, inner_steps=1)
    def top(m, low):
        return ((low.x - 1) ** 2).sum()

    return program


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def run_with(display, steps, program=None):
    runner = Runner(program or make())
    runner.listeners.append(display)
    return runner.run(steps)


@pytest.mark.parametrize("form", ["plain", "auto"])
def test_plain_lines_where_there_is_no_terminal(form, capsys):
    mlodeco.run(20, program=make(), progress=form)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 11
    assert lines[0].startswith("step 2/20  low ")
    assert "top " in lines[0]
    assert lines[9].startswith("step 20/20")
    assert lines[10].startswith("all 20 steps were run, ")
    assert "\x1b" not in err


def test_off_prints_nothing(capfd):
    mlodeco.run(3, program=make(), progress="off")
    assert capfd.readouterr() == ("", "")


def test_a_runner_without_display_prints_nothing(capfd):
    Runner(make()).run(3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 15, 19, 20, 25, 99, 101, 199])
def test_about_a_dozen_lines_for_any_number_of_steps(steps):
    stream = io.StringIO()
    run_with(make_display("plain", stream), steps)
    lines = stream.getvalue().splitlines()
    assert min(steps, 5) + 1 <= len(lines) <= 12
    assert lines[-2].startswith(f"step {steps}/{steps}")


def test_plain_shows_the_newest_validation_and_the_last():
    program, stream = make(), io.StringIO()
    values = iter([0.25, 0.5, 0.125])
    program.validate(every=8)(lambda low: {"m": next(values)})
    run_with(make_display("plain", stream), 20, program)
    lines = stream.getvalue().splitlines()
    assert "m 0.25" not in lines[2]
    assert "m 0.25" in lines[3]
    assert "m 0.5" in lines[8]
    assert "m 0.125" in lines[9]
    assert [line.split()[1] for line in lines[:10]] == [f"{n}/20" for n in range(2, 21, 2)]
    assert len(lines) == 11


def test_plain_counts_the_steps_of_this_run():
    stream = io.StringIO()
    runner = Runner(make())
    runner.listeners.append(make_display("plain", stream))
    runner.run(2)
    runner.run(3)
    steps = [line.split()[1] for line in stream.getvalue().splitlines() if line[:4] == "step"]
    assert steps == ["1/2", "2/2", "1/3", "2/3", "3/3"]


def test_why_a_run_ended_is_said():
    program, stream = make(), io.StringIO()
    program.on("after_step")(lambda ctx: ctx.stop("enough of it"))
    run_with(make_display("plain", stream), 20, program)
    assert stream.getvalue().splitlines()[-1].startswith("enough of it, ")


def test_forms(terminal):
    assert make_display("off") is None
    assert isinstance(make_display("plain", terminal), PlainDisplay)
    assert isinstance(make_display("auto", terminal), LiveDisplay)
    assert isinstance(make_display("auto", io.StringIO()), PlainDisplay)
    assert isinstance(make_display("live", io.StringIO()), LiveDisplay)


@pytest.mark.parametrize("form", ["fancy", None, True, "Live"])
def test_unknown_form_is_refused_before_anything_runs(form):
    program = make()
    with pytest.raises(RunError, match="progress="):
        mlodeco.run(1, program=program, progress=form)
    assert program.module("low").x.tolist() == [1.0, 1.0]


def test_live_draws_a_row_a_level_and_says_why_it_ended_once(terminal):
    program = make()
    program.validate(every=5)(lambda low: {"accuracy": 0.75})
    run_with(make_display("live", terminal), 5, program)
    text = terminal.getvalue()
    assert text.count("all 5 steps were run") == 1
    last = text[text.rindex("level") :]
    assert last.count("low") == last.count("top") == 1
    assert "Neumann 5" in last
    assert "accuracy 0.75" in last
    assert "5/5" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor comes back


def test_live_shows_names_and_reasons_as_they_are(terminal):
    """Square brackets are no markup."""
    program = Program()

    @program.level("w[bold]", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1))
    def loss(m):
        return (m.x**2).sum()

    program.validate(lambda: {"a[red]": 1.0})
    program.on("after_step")(lambda ctx: ctx.stop("[/bold] is over"))
    run_with(make_display("live", terminal), 3, program)
    text = terminal.getvalue()
    assert "w[bold]" in text
    assert "a[red] 1" in text
    assert "[/bold] is over" in text


def test_live_on_a_given_console():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    run_with(LiveDisplay(console), 3)
    assert "3/3" in stream.getvalue()


def test_live_without_a_terminal_draws_the_end_once(capsys):
    stream = io.StringIO()
    run_with(make_display("live", stream), 5)
    text = stream.getvalue()
    assert text.count("gradient") == 1
    assert text.count("5/5") == 1
    assert text.count("all 5 steps were run") == 1
    assert capsys.readouterr() == ("", "")


def test_live_can_be_started_again(terminal):
    runner = Runner(make())
    runner.listeners.append(make_display("live", terminal))
    runner.run(2)
    runner.run(4)
    text = terminal.getvalue()
    assert "2/2" in text
    assert "4/4" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 2


@pytest.mark.parametrize("event", ["run_start", "before_step", "after_step", "validate", "run_end"])
def test_live_is_closed_by_an_exception(event, terminal):
    program = make()
    program.validate(lambda: {"m": 0.0})

    @program.on(event)
    def fail():
        raise KeyboardInterrupt

    display = make_display("live", terminal)
    with pytest.raises(KeyboardInterrupt):
        run_with(display, 5, program)
    assert not display._live.is_started
    text = terminal.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert "steps were run" not in text


def test_what_a_program_prints_stays_on_its_stream(terminal, capsys):
    """stdout is no terminal here: it is not drawn into the display on stderr."""
    program = make()
    program.on("after_step", level="top")(lambda ctx: print(f"printed at {ctx.tick}"))
    run_with(make_display("live", terminal), 3, program)
    assert capsys.readouterr().out.splitlines() == [f"printed at {n}" for n in (1, 2, 3)]
    assert "printed" not in terminal.getvalue()


# what is shown


def record(tick, name="low", loss=1.0, **options):
    return StepRecord(tick, name, tick, loss, 0.5, 0.1, **options)


def test_losses_are_smoothed_without_the_weight_of_a_start():
    """The exponential mean in closed form; what is not finite is left out."""
    smoothed = Smoothed()
    assert math.isnan(smoothed.value)
    losses = [3.0, -1.0, 2.5, 0.25]
    for loss in (losses[0], math.nan, *losses[1:3], math.inf, losses[3]):
        smoothed.add(loss)
    weights = [DECAY**k for k in (3, 2, 1, 0)]
    wanted = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert smoothed.value == pytest.approx(wanted, rel=1e-14)
    for _ in range(400):
        smoothed.add(7.0)
    assert smoothed.value == pytest.approx(7.0, rel=1e-14)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_and_the_time_left():
    clock = Clock()
    readings = Readings(clock)
    readings.start(Runner(make()), 100)
    assert readings.remaining is None
    for tick in range(1, 41):
        clock.now += 0.5
        readings.update(Tick(tick, (record(tick), *([record(tick, "top")] * (tick % 4 == 0)))))
    assert readings.rates() == {"low": 2.0, "top": 0.5}
    assert (readings.elapsed, readings.remaining) == (20.0, 30.0)
    for tick in range(41, 60):
        clock.now += 0.25
        readings.update(Tick(tick, (record(tick),)))
        readings.rates()
    assert readings.rates()["low"] == pytest.approx(4.0)
    assert readings.rates()["top"] == 0.0


def test_solves_of_a_step_are_told_together():
    solves = (
        SolveRecord("a", "CG", 5, 1e-3, "converged"),
        SolveRecord("b", "Neumann", 3, None, "done"),
        SolveRecord("c", "CG", 2, 2e-2, "converged"),
    )
    level = LevelReading()
    level.update(record(1, solves=solves))
    assert level.solve == "CG+Neumann 10 2.0e-02"
    level.update(record(2, solves=solves[1:2]))
    assert level.solve == "Neumann 3"
    level.update(record(3))
    assert level.solve == ""


def drawn(width, names, **options):
    readings = Readings()
    readings.wanted = 1000
    solves = (SolveRecord("x", "FiniteDifference", 10, 1e-3, "converged"),)
    readings.update(
        Tick(
            17,
            tuple(record(17, name, solves=solves, cosine=0.5, skipped=True) for name in names),
            (ValidationRecord(17, {"accuracy": 0.5}),),
        )
    )
    console = Console(width=width, file=io.StringIO())
    console.print(View(readings, **options))
    return console.file.getvalue().splitlines()


def test_a_wide_terminal_has_all_columns():
    lines = drawn(120, ["weights"], reason="enough")
    titles = "level step loss gradient steps/s lr cosine solve skipped"
    assert lines[1].split() == titles.split()
    told = lines[2].split()
    assert told[:4] == ["weights", "17", "1", "5.00e-01"]
    assert told[5:] == ["0.1", "0.50", "FiniteDifference", "10", "1.0e-03", "1"]
    assert lines[3:] == ["validation: accuracy 0.5 (at 17)", "enough"]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize(
    "name", ["low", "a_level_with_a_long_name_" * 3, "層" * 50], ids=["short", "long", "wide"]
)
def test_a_narrow_terminal_has_whole_columns(width, name):
    """A row is a line; names are cut, and columns left out, before numbers are."""
    lines = drawn(width, [f"{n} {name}" for n in range(12)])
    assert len(lines) == 15
    assert all(cell_len(line) <= width for line in lines)
    titles = lines[1].split()
    assert {"level", "step", "loss", "skipped"} <= set(titles)
    for number, line in enumerate(lines[2:14]):
        assert line.split()[0] == str(number)
        assert "17" in line
        assert len(line[2:].rstrip().rsplit(maxsplit=1)[1]) == 1
        if "solve" in titles:
            assert "FiniteDifference 10 1.0e-03" in line
    assert "level\u2026" not in lines[1]
    assert ("gradient" in titles) == (width >= (80 if name == "low" else 200))


def test_more_levels_than_a_terminal_has_lines():
    """They are cut while the run is on, so that the cursor finds back; all are there at its end."""
    program = Program()
    for number in range(12):
        program.level(
            f"level{number}", module={"x": torch.ones(1)}, optimizer=partial(SGD, lr=0.1)
        )(lambda m: (m.x**2).sum())
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=6)
    run_with(LiveDisplay(console), 300, program)
    text = console.file.getvalue()
    assert text.count("level11") == 1
    assert text.count("level2") > 1
    assert text.index("level11") > text.rindex("300/300")


def test_the_best_validation_and_skipped_steps_are_told(terminal):
    def program():
        found, values = make(), iter([0.5, 0.25, 0.75])
        found.validate(every=2, monitor="error", mode="min")(lambda: {"error": next(values)})
        return found

    plain = io.StringIO()
    run_with(make_display("plain", plain), 6, program())
    assert plain.getvalue().splitlines()[-2].count("best error 0.25 (at 4)") == 1
    run_with(make_display("live", terminal), 6, program())
    assert "error 0.75 (at 6)  best error 0.25 (at 4)" in terminal.getvalue()
    assert re.search(r"memory \d+ MiB", terminal.getvalue())


def test_memory_is_the_peak_of_the_process():
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(2**27)  # 512 MiB
    after = peak_memory(torch.device("cpu"))
    assert before > 2**26
    assert after - before > 2**28 or after > 3 * 2**28
    del block
    assert peak_memory(torch.device("cpu")) > 0.99 * after  # the system counts roughly


ECHO = """
import torch
from mlodeco.runtime.memory import peak_memory
print(peak_memory(torch.device("cpu")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what exec keeps is Linux's")
def test_the_memory_of_what_has_started_the_process_is_left_out():
    block = torch.ones(2**28)  # 1 GiB
    done = subprocess.run(
        [sys.executable, "-c", ECHO], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) < 4 * block.numel()


class Gone(io.StringIO):
    """A stream whose reader goes away."""

    def __init__(self, *, is_terminal, lines):
        super().__init__()
        self.is_terminal, self.left = is_terminal, lines

    def isatty(self):
        return self.is_terminal

    def flush(self):
        self.left -= 1
        if self.left < 0:
            raise self.error()

    error = BrokenPipeError


@pytest.mark.parametrize("error", [BrokenPipeError, OSError])
@pytest.mark.parametrize("form", ["plain", "live"])
@pytest.mark.parametrize("lines", [0, 1, 4])
def test_a_reader_that_goes_away_ends_no_run(form, lines, error, monkeypatch, terminal):
    monkeypatch.setattr(Gone, "error", error)
    monkeypatch.setattr("mlodeco.show.progress._INTERVAL", 0.0)
    monkeypatch.setattr("mlodeco.show.progress._SHARE", 1.0)
    stream, streams = Gone(is_terminal=form == "live", lines=lines), (sys.stdout, sys.stderr)
    result = run_with(make_display(form, stream), 20)
    assert result.ticks == 20
    assert stream.left < 0
    assert (sys.stdout, sys.stderr) == streams


def test_without_a_stderr_nothing_is_drawn(monkeypatch, capsys):
    """A process that was started with it closed has none."""
    monkeypatch.setattr(sys, "stderr", None)
    mlodeco.run(2, program=make())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", ["plain", "live"])
def test_control_characters_of_names_and_reasons_do_not_reach_the_terminal(form, terminal):
    program = make()
    program.validate(every=1, monitor="a\x1b[31m", mode="min")(lambda: {"a\x1b[31m": 1.0})
    program.on("after_step")(lambda ctx: ctx.stop("no\x1b[32m\nmore"))
    run_with(make_display(form, terminal), 3, program)
    text = terminal.getvalue()
    assert "\x1b[31m" not in text
    assert "\x1b[32m" not in text
    assert "a\\x1b[31m 1 (at 1)  best a\\x1b[31m 1 (at 1)" in text
    assert "no\\x1b[32m\\nmore" in text


def test_drawings_take_a_small_part_of_the_time(monkeypatch):
    """A drawing that takes a second is made every 200 seconds, however many ticks there are."""
    clock, drawings = Clock(), []

    class Slow(LiveDisplay):
        def _refresh(self):
            drawings.append(clock.now)
            clock.now += 1.0

    monkeypatch.setattr("mlodeco.show.progress.time.monotonic", clock)
    display = Slow(Console(file=io.StringIO()))
    display.on_start(Runner(make()), 1000)
    for tick in range(1, 1100):
        clock.now += 1.0
        display.on_tick(Tick(tick, (record(tick),)))
    display.on_error()
    assert [b - a for a, b in itertools.pairwise(drawings)] == [201.0] * 5


def test_the_display_of_a_notebook(monkeypatch):
    """One output, that is replaced; what is seen is HTML."""
    shown = []

    class Handle:
        def display(self, view):
            shown.append(("display", view))

        def update(self, view):
            shown.append(("update", view))

    monkeypatch.setattr("IPython.display.DisplayHandle", Handle)
    monkeypatch.setattr(
        "mlodeco.show.progress.Console", partial(Console, force_jupyter=True, width=100)
    )
    display = make_display("auto")
    assert isinstance(display, NotebookDisplay)
    run_with(display, 5)
    assert [what for what, _ in shown[:2]] == ["display", "update"]
    assert {what for what, _ in shown[1:]} == {"update"}
    bundle = shown[-1][1]._repr_mimebundle_([], [])
    for text in bundle.values():
        assert "5/5" in text
        assert "Neumann" in text
        assert "all 5 steps were run" in text
    assert "<pre" in bundle["text/html"]


CELL = """
import torch
from functools import partial
from torch.optim import SGD
import mlodeco

@mlodeco.level("low", module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.1))
def low(m):
    return (m.x**2).sum()

mlodeco.run(50).ticks
"""


def test_a_cell_of_a_notebook_shows_one_output():
    notebook = new_notebook(cells=[new_code_cell(CELL)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    display, result = (found for found in outputs if found["output_type"] != "stream")
    assert result["data"]["text/plain"] == "50"
    assert "50/50" in display["data"]["text/html"]
    assert "all 50 steps were run" in display["data"]["text/html"]


def test_listeners_are_told_of_each_tick():
    told = []

    class Listener:
        def on_start(self, runner, steps):
            told.append(("start", runner.tick, steps))

        def on_tick(self, tick):
            told.append((tick.tick, len(tick.steps), len(tick.validations)))

        def on_end(self, result):
            told.append(("end", result.ticks))

        def on_error(self):
            told.append("error")

    program = make()
    program.validate(every=2)(lambda: {"m": 0.0})
    run_with(Listener(), 3, program)
    assert told == [("start", 0, 3), (1, 2, 0), (2, 2, 1), (3, 2, 0), (3, 0, 1), ("end", 3)]
    told.clear()

    @program.on("after_step")
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run_with(Listener(), 3, program)
    assert told == [("start", 0, 3), "error"]


def test_nothing_is_left_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mlodeco.run(2, program=make(), progress="off")
    assert os.listdir(tmp_path) == []
