"""What is logged to trackers: TensorBoard for real, trackers of one's own, their errors."""

from __future__ import annotations

import math
import time
import warnings
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch.optim import SGD

import mlodeco
from mlodeco import Program, Runner
from mlodeco.errors import RunError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def make():
    program = Program()
    sgd = partial(SGD, lr=0.1)

    @program.level("low", module={"x": torch.ones(2)}, optimizer=sgd, inner_steps=2)
    def low(m, top, ctx):
        ctx.log(half=m.x[0] / 2, loss=7, many=torch.ones(3), name="text")
        return ((m.x - top.x) ** 2).sum() + (m.x**2).sum()

    @program.level(
        "top", lower=["low"], module={"x": torch.ones(2)}, optimizer=sgd, hypergrad="cg", repeat=2
    )
    def top(m, low):
        return ((low.x - 1) ** 2).sum(), {"kind": 3}

    program.validate(every=2, monitor="error", mode="min")(
        lambda low: {"error": (low.x**2).sum(), "nothing": math.nan}
    )
    return program


def run(steps=5, program=None, **options):
    return mlodeco.run(steps, program=program or make(), seed=0, progress="off", **options)


def scalars(folder):
    """For each name (tick, value), as TensorBoard reads them."""
    found = EventAccumulator(str(folder)).Reload()
    return {
        name: [(event.step, event.value) for event in found.Scalars(name)]
        for name in found.Tags()["scalars"]
    }


def single(value):
    """As TensorBoard keeps it."""
    return torch.tensor(float(value), dtype=torch.float32).item()


def wanted(history):
    """What the history has, as it should be logged; of several steps in a tick the last."""
    found: dict[str, dict[int, float]] = {}
    for row in history.rows():
        names = {n: row[n] for n in row.keys() - {"tick", "level"}}
        for name, value in names.items():
            if isinstance(value, int | float):
                found.setdefault(f"{row['level']}/{name}", {})[row["tick"]] = single(value)
    for record in history.validations:
        for name, value in record.metrics.items():
            found.setdefault(f"validation/{name}", {})[record.tick] = single(value)
    return {name: list(values.items()) for name, values in found.items()}


def same(found, expected):
    return repr(sorted(found.items())) == repr(sorted(expected.items()))  # NaN is NaN


def test_tensorboard_holds_the_history(tmp_path):
    result = run(out=tmp_path / "run", log_with="tensorboard", project="one")
    found = scalars(tmp_path / "run" / "one")
    assert same(found, wanted(result.history))
    for name in ("low/loss", "low/metric_loss", "low/half", "top/kind", "top/residual"):
        assert name in found
    assert [tick for tick, _ in found["top/loss"]] == [2, 4]
    assert "low/many" not in found
    assert "low/name" not in found


def test_tensorboard_goes_on_without_steps_twice(tmp_path):
    options = {"out": tmp_path / "run", "log_with": ["tensorboard"], "resume": "auto"}
    program, calls = make(), []

    @program.on("after_step", level="low")
    def die(ctx):
        calls.append(ctx.tick)
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(9, program, checkpoint_every=3, **options)
    time.sleep(1.1)  # files of one second are read in the order of their numbers as text
    result = run(9, **options)
    assert calls[-1] == 6
    found = scalars(tmp_path / "run" / "mlodeco")
    assert same(found, wanted(result.history))
    assert [tick for tick, _ in found["low/loss"]] == list(range(1, 10))


class Notebook(GeneralTracker):
    """Keeps what it is told."""

    name = "notebook"
    requires_logging_directory = False

    def __init__(self, fails_at=None):
        super().__init__()
        self.told = []
        self.fails_at = fails_at

    @property
    def tracker(self):
        return self.told

    def start(self):
        self._tell("start")

    def store_init_configuration(self, values):
        self._tell("config", values)

    def log(self, values, step=None, **kwargs):
        self._tell("log", step, values)

    def finish(self):
        self._tell("finish")

    def _tell(self, what, *more):
        self.told.append((what, *more))
        if what == self.fails_at:
            raise OSError("the book is full")


def test_a_tracker_of_ones_own():
    book = Notebook()
    result = run(3, log_with=book)
    kinds = [told[0] for told in book.told]
    assert kinds == ["start", "config", *["log"] * 5, "finish"]
    assert book.told[1][1] == {
        "low.inner_steps": 2,
        "low.repeat": 1,
        "low.warmup": 0,
        "low.accumulate": 1,
        "low.rollback": False,
        "top.inner_steps": 1,
        "top.repeat": 2,
        "top.warmup": 0,
        "top.accumulate": 1,
        "top.rollback": False,
        "top.hypergrad.low": "CG()",
        **{
            f"{level}.{name}": value
            for level in ("low", "top")
            for name, value in {
                "optimizer": "SGD",
                **{f"optimizer.{k}": v for k, v in SGD([torch.ones(1)]).defaults.items()},
                "optimizer.lr": 0.1,
            }.items()
            if value is not None
        },
    }
    logged = [told[1:] for told in book.told if told[0] == "log"]
    assert [step for step, _ in logged] == [1, 2, 2, 3, 3]
    assert logged[0][1]["low/loss"] == result.history.losses("low")[0]
    assert logged[2][1]["validation/error"] == result.history.validations[0].metrics["error"]
    assert all(type(value) is float for _, values in logged for value in values.values())


def test_each_run_of_a_runner_starts_and_finishes():
    book = Notebook()
    runner = Runner(make(), log_with=[book])
    runner.run(1)
    runner.run(1)
    assert [told[0] for told in book.told].count("start") == 2
    assert [told[0] for told in book.told].count("finish") == 2
    assert [told[1] for told in book.told if told[0] == "log"] == [1, 1, 2, 2]
    runner.step()
    assert book.told[-1][:2] == ("log", 3)


def test_trackers_of_the_accelerator_given():
    book = Notebook()
    run(1, accelerator=Accelerator(log_with=book))
    assert [told[0] for told in book.told] == ["start", "config", "log", "log", "finish"]


def test_trackers_that_are_started_are_ended_by_who_has_started_them():
    book = Notebook()
    accelerator = Accelerator(log_with=book)
    accelerator.init_trackers("mine", {"mine": 1})
    run(1, accelerator=accelerator)
    assert [told[0] for told in book.told] == ["start", "config", "log", "log"]
    assert accelerator.trackers == [book]
    accelerator.log({"more": 1.0}, step=2)
    assert book.told[-1] == ("log", 2, {"more": 1.0})


def test_hooks_log_more():
    book, program = Notebook(), make()
    program.on("after_step", level="top")(
        lambda ctx: ctx.accelerator.log({"more": 1.0}, step=ctx.tick)
    )
    run(2, program, log_with=book)
    assert ("log", 2, {"more": 1.0}) in book.told


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_the_error_of_a_tracker_ends_the_run_and_names_it(where):
    book, program = Notebook(where), make()
    with pytest.raises(OSError, match="the book is full") as caught:
        run(2, program, log_with=book)
    (note,) = caught.value.__notes__
    assert "'notebook'" in note
    assert (program.built.tick, [told[0] for told in book.told][-1]) == {
        "start": (1, "finish"),
        "log": (1, "finish"),
        "finish": (2, "finish"),
    }[where]


def test_each_tracker_is_finished_and_the_first_error_is_told():
    books = [Notebook("finish"), Notebook("finish"), Notebook()]
    books[0].name = "first"
    with pytest.raises(OSError, match="the book is full") as caught:
        run(2, log_with=books)
    assert [book.told[-1] for book in books] == [("finish",)] * 3
    assert caught.value.__notes__ == ["raised in the tracker 'first'"]


def test_validations_keep_off_a_level_of_their_name():
    book, program = Notebook(), Program()
    for name in ("validation", "validation_"):
        program.level(name, module={"x": torch.ones(2)}, optimizer=partial(SGD, lr=0.1))(
            lambda m: (m.x**2).sum()
        )
    program.validate(lambda: {"loss": 42.0})
    run(1, program, log_with=book)
    (_, _, steps), (_, _, validation) = (told for told in book.told if told[0] == "log")
    assert validation == {"validation__/loss": 42.0}
    assert not steps.keys() & validation.keys()
    assert steps["validation/loss"] == 2.0


def test_a_runner_stepped_by_hand_leaves_its_trackers_open():
    """And how to end them, as the page says."""
    book, accelerator = Notebook(), Accelerator(log_with=(own := Notebook()))
    runner = Runner(make(), log_with=book)
    runner.step()
    assert book.told[-1][0] == "log"
    runner.run(1)
    assert book.told[-1] == ("finish",)
    Runner(make(), accelerator=accelerator).step()
    assert own.told[-1][0] == "log"
    accelerator.end_training()
    assert own.told[-1] == ("finish",)


def test_a_run_that_fails_finishes_its_trackers_and_tells_its_own_error():
    book, program = Notebook("finish"), make()

    @program.on("after_step")
    def fail():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run(2, program, log_with=book)
    assert book.told[-1] == ("finish",)


@pytest.mark.parametrize(
    ("log_with", "said"),
    [
        ("tensorbord", "Did you mean 'tensorboard'?"),
        ("tensorboard", "add out='runs/one'"),
        (["tensorboard"], "add out='runs/one'"),
        (3, "is not a tracker"),
        (Notebook, "is not a tracker"),
    ],
)
def test_trackers_that_cannot_be_made_are_found_before_anything_is_trained(log_with, said):
    program = make()
    with pytest.raises(RunError) as caught:
        run(1, program, log_with=log_with)
    assert said in str(caught.value)
    assert program.built is None


@pytest.mark.skipif(find_spec("wandb") is not None, reason="it is installed")
def test_a_package_that_is_missing_is_named():
    with pytest.raises(RunError, match="pip install wandb"):
        run(1, log_with="wandb")


def test_no_trackers_are_none():
    run(1, log_with=[])


def test_trackers_are_asked_for_in_one_place():
    with pytest.raises(RunError, match="project=3"):
        run(1, log_with=Notebook(), project=3)
    with pytest.raises(RunError, match="both given"):
        run(1, log_with=Notebook(), accelerator=Accelerator())
