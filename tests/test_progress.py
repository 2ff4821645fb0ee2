"""What a run prints."""

from __future__ import annotations

import io
import os
from functools import partial

import pytest
import torch
from rich.console import Console
from torch.optim import SGD

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import RunError
from mlodeco.show.progress import LiveDisplay, PlainDisplay, make_display


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
