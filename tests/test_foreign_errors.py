"""Exceptions of a person's own code come through, and say from which part they came."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.optim import SGD

import mlodeco
from mlodeco import Program
from mlodeco.calculus.clipping import clip_differentiably
from mlodeco.errors import DeclarationError, MlodecoError, ModuleError, OptimizerError, RunError


class MineError(ValueError):
    pass


def fail(*given):
    raise MineError


def failing_items():
    yield torch.ones(2)
    raise MineError


class Failing:
    state_dict = load_state_dict = fail


def make(data=(1, 2), hypergrad="neumann", lr=0.1):
    program = Program()
    optimizer = partial(SGD, lr=lr)

    @program.level("low", module={"x": torch.ones(2)}, optimizer=optimizer, data=data)
    def low(m, top, batch=None):
        return ((m.x - top.y) ** 2).sum()

    @program.level(
        "top", lower=["low"], hypergrad=hypergrad, module={"y": torch.ones(2)}, optimizer=optimizer
    )
    def top(m, low):
        return (low.x**2).sum()

    return program


@pytest.mark.parametrize(
    ("options", "error", "note"),
    [
        ({"data": failing_items}, MineError, "raised by data="),
        ({"hypergrad": fail}, MineError, "raised by the method 'fail'"),
        ({"lr": 1e300}, RuntimeError, "raised by optimizer="),
    ],
)
def test_the_part_is_named(options, error, note):
    with pytest.raises(error) as caught:
        mlodeco.run(3, program=make(**options), progress="off")
    assert any(note in text for text in caught.value.__notes__)


class Items(Failing):
    def __iter__(self):
        return self

    def __next__(self):
        return 1.0


def test_a_source_that_cannot_be_put_back_is_named():
    program = make()
    program.source("items")(Items())

    @program.level("third", module={"z": torch.ones(2)})
    def third(m, items):
        return (m.z**2).sum() * items

    with pytest.raises(MineError) as caught:
        mlodeco.hypergradient("third", program=program)
    (note,) = caught.value.__notes__
    assert "raised in the source 'items'" in note


def test_a_tracked_object_is_named(tmp_path):
    program = make()
    program.track("mine", Failing())
    with pytest.raises(MineError) as caught:
        mlodeco.run(1, program=program, progress="off", out=tmp_path / "run")
    assert any("raised by state_dict() of the tracked 'mine'" in n for n in caught.value.__notes__)


@pytest.mark.parametrize("option", ["lower", "params"])
def test_a_list_of_a_declaration_is_named(option):
    with pytest.raises(MineError) as caught:
        Program().level("mine", module={"x": torch.ones(2)}, **{option: failing_items()})(abs)
    assert any(f"raised by {option}= of level 'mine'" in n for n in caught.value.__notes__)


@pytest.mark.parametrize(
    "options", [{"optimizer": int}, {"scheduler": max}, {"data": property}, {"module": next}]
)
def test_a_builtin_that_does_not_fit_is_refused(options):
    program = Program()
    given = {"module": {"x": torch.ones(2)}, "optimizer": partial(SGD, lr=0.1)} | options
    program.level("mine", **given)(lambda m, batch=None: (m.x**2).sum())
    with pytest.raises(MlodecoError):
        mlodeco.run(1, program=program, progress="off")


def test_sparse_parameters_are_refused():
    program = Program()
    program.level("mine", module={"x": torch.eye(2).to_sparse()})(lambda m: m.x.to_dense().sum())
    with pytest.raises(ModuleError, match="'x' are sparse"):
        program.graph()


def test_more_replicas_than_a_tensor_holds_are_refused():
    with pytest.raises(DeclarationError, match="an integer from 1 to"):
        Program().level("mine", module={"x": torch.ones(2)}, replicas=10**30)(abs)


@pytest.mark.parametrize("decorator", ["method", "update"])
def test_an_unknown_option_is_refused(decorator):
    with pytest.raises(DeclarationError, match="evry"):
        getattr(Program(), decorator)("mine", evry=1)(lambda params, b: params)


def test_clipping_keeps_the_dtype_of_each_gradient():
    gradients = {"a": torch.tensor(3.0), "b": torch.tensor([4.0], dtype=torch.double)}
    clipped = clip_differentiably(gradients, 1.0)
    assert {key: value.dtype for key, value in clipped.items()} == {
        "a": torch.float32,
        "b": torch.float64,
    }
    assert clipped["b"].item() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("option", ["reduce", "tails", "nonfinite", "checkpoint_errors"])
def test_an_array_is_no_choice(option):
    with pytest.raises(RunError, match=f"{option}=array"):
        mlodeco.Runner(make(), **{option: np.ones(2)})


@pytest.mark.parametrize("reason", [np.ones(2), "", None, 3])
def test_a_reason_to_stop_is_a_text(reason):
    program = make()
    program.on("after_step")(lambda ctx: ctx.stop(reason))
    with pytest.raises(RunError, match=r"ctx\.stop\("):
        mlodeco.run(1, program=program, progress="off")


def test_a_module_is_no_optimizer():
    program = Program()
    program.level("low", module={"x": torch.ones(2)}, optimizer=torch.nn.ReLU())(
        lambda m: (m.x**2).sum()
    )
    with pytest.raises(OptimizerError, match=r"optimizer=ReLU\(\) is not an optimizer"):
        mlodeco.run(1, program=program, progress="off")
