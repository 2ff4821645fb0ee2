"""Compiled products against those that they stand for."""

import logging
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from mlodeco import Program, Runner, run
from mlodeco.calculus.kernels import second_derivatives
from mlodeco.calculus.point import LowerProblem
from mlodeco.calculus.products import Compiler, open_curvature, open_linearization
from mlodeco.errors import FallbackWarning, RunError
from mlodeco.hypergrad import CG, Dense, Identity, Neumann, Sama, Unroll
from mlodeco.runtime.build import build
from mlodeco.runtime.drawn import Drawn
from mlodeco.runtime.engine import make_point, muted_context
from tests.problems import randn
from tests.test_facts import CASES

# pytest's handler would have torch write, and pytest keep, a log of every step of a trace
logging.getLogger("torch.__trace").propagate = False

WHOLE = {
    "no_grad",
    "item",
    "module_reused_twice",
    "tied_weights",
    "two_names_for_one_module",
    "batch_norm",
    "attention",
    "penalty_on_parameters",
}
"""The cases that are compiled; the others take gradients themselves, are RNNs or checkpointed."""

BEGUN = {"checkpointing": 1}
"""Graphs of the others: checkpointing is compiled, and refused by torch as it first runs."""


def relative(found, wanted):
    sizes = [float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted]
    return max(sizes)


def problem_at(built, number, batch, compiler=None):
    """The lower problem at parameters that depend on the number."""
    values = {
        name: {k: p.detach() + 0.1 * number * torch.cos(p.detach()) for k, p in ps.items()}
        for name, ps in ((name, level.parameters) for name, level in built.levels.items())
    }
    context = muted_context(built, "low")
    point = make_point(built, "low", (Drawn(batch),), context, values, (0, "low", number, ""))
    return LowerProblem(replace(point, compiler=compiler), "low", ("top",))


@pytest.mark.parametrize("case", CASES)
def test_products_are_the_same_at_other_parameters(case):
    built = build(CASES[case]().program)
    batch = next(iter(built.levels["low"].declaration.data))
    compiler = Compiler("eager")
    with second_derivatives(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        for number in range(3):
            plain = open_curvature(problem_at(built, number, batch), "reverse")
            found = open_curvature(problem_at(built, number, batch, compiler), "auto")
            v = {k: randn(*p.shape, seed=7) for k, p in built.levels["low"].parameters.items()}
            assert set(found.touched()) == set(plain.touched())
            assert relative(found.hvp(v), plain.hvp(v)) < 1e-12
            assert relative(found.cross(v)["top"], plain.cross(v)["top"]) < 1e-12
    assert (compiler.refusal is None) == (case in WHOLE)
    assert compiler.graphs == (2 if case in WHOLE else BEGUN.get(case, 0))
    messages = [str(w.message) for w in caught if w.category is FallbackWarning]
    assert len(messages) == (0 if case in WHOLE else 1)
    assert all(m.startswith("level 'low' (test_facts.py:") for m in messages)


def weighted(net, batch, hyper):
    x, y = batch
    losses = F.cross_entropy(net(x), y, reduction="none")
    return (hyper.logits.sigmoid()[y] * losses).mean()


def clean(hyper, batch, net):
    x, y = batch
    return F.cross_entropy(net(x), y) + 0.01 * (hyper.logits**2).sum()


def samples(count, seed, dtype=torch.float64):
    x = randn(count, 4, seed=seed).to(dtype)
    return x, (x.sum(1) > 0).long()


def network(*extra, dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), *extra, nn.Linear(5, 2)).to(dtype)


def program(method, loss=weighted, net=None, data=None, dtype=torch.float64, **options):
    found = Program()
    found.level(
        "net",
        module=network(dtype=dtype) if net is None else net,
        optimizer=partial(SGD, lr=0.1),
        data=[samples(8, n, dtype) for n in range(3)] if data is None else data,
        reads={loss.__code__.co_varnames[2]: "hyper"},
        **options,
    )(loss)
    found.level(
        "hyper",
        lower=["net"],
        hypergrad=method,
        module={"logits": torch.zeros(2, dtype=dtype)},
        optimizer=partial(SGD, lr=1.0),
        data=[samples(6, 9, dtype)],
    )(clean)
    return found


def trained(made, backend, steps=4):
    """The parameters after a few ticks, and the runner."""
    runner = Runner(made, seed=0, compile=backend)
    runner.run(steps)
    levels = runner.built.levels.items()
    return {
        f"{n}.{k}": p.detach() for n, level in levels for k, p in level.parameters.items()
    }, runner


def compiler_of(runner):
    return runner._parts.compilers["net"]


METHODS = {
    "identity": (Identity(), {}),
    "neumann": (Neumann(damping=0.5), {}),
    "cg_on_parts": (CG(max_steps=3, damping=1.0, curvature_batch=0.5), {"accumulate": 2}),
    "dense": (Dense(damping=1.0), {}),
    "sama": (Sama(), {}),
    "unroll": (Unroll(), {"inner_steps": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_the_same(method):
    chosen, options = METHODS[method]
    found, runner = trained(program(chosen, **options), "aot_eager")
    wanted, _ = trained(program(chosen, **options), False)
    assert relative(found, wanted) < 1e-12
    assert compiler_of(runner).refusal is None
    assert compiler_of(runner).graphs > 0


@pytest.mark.parametrize(("method", "graphs"), [(Identity(), 1), (CG(damping=1.0), 2)], ids=repr)
def test_ten_hypergradients_compile_once(method, graphs):
    runner = Runner(program(method), seed=0, compile="eager")
    runner.run(1)
    assert compiler_of(runner).graphs == graphs
    runner.run(9)
    assert compiler_of(runner).graphs == graphs


def test_inductor_gives_the_same_in_single_precision():
    made = partial(program, Identity(), dtype=torch.float32)
    found, runner = trained(made(), True)
    wanted, _ = trained(made(), False)
    assert relative(found, wanted) < 1e-5
    assert compiler_of(runner).refusal is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_that_of_eager_runs(precision):
    made = partial(program, CG(max_steps=3, damping=1.0), dtype=torch.float32, precision=precision)
    found, runner = trained(made(), "aot_eager")
    wanted, _ = trained(made(), False)
    assert relative(found, wanted) < 1e-2
    assert relative(found, trained(made(), False, steps=1)[0]) > 1e-1
    assert compiler_of(runner).refusal is None
    assert compiler_of(runner).graphs > 0


def test_other_sizes_of_batches_are_compiled_anew():
    made = partial(program, Neumann(damping=0.5), data=[samples(n, n) for n in (8, 5, 7)])
    found, runner = trained(made(), "eager", steps=6)
    assert relative(found, trained(made(), False, steps=6)[0]) < 1e-12
    assert compiler_of(runner).refusal is None


def test_other_branches_are_compiled_anew():
    def branching(net, batch, hyper):
        (x, y), flag = batch
        return weighted(net if flag else net[:1], (x, y), hyper) + (net[0].weight ** 2).sum()

    data = [(samples(8, n), n % 2 == 0) for n in range(4)]
    made = partial(program, CG(max_steps=3, damping=1.0), branching, data=data)
    found, runner = trained(made(), "eager", steps=6)
    assert relative(found, trained(made(), False, steps=6)[0]) < 1e-12
    assert compiler_of(runner).refusal is None


def test_random_numbers_are_those_of_eager_runs():
    made = partial(program, CG(max_steps=3, damping=1.0))
    nets = [network(nn.Dropout(0.5)) for _ in range(2)]
    found, runner = trained(made(net=nets[0]), "aot_eager")
    wanted, _ = trained(made(net=nets[1]), False)
    assert relative(found, wanted) < 1e-12
    assert compiler_of(runner).refusal is None


def test_buffers_and_modes_are_as_in_eager_runs():
    def changes_mode(net, batch, hyper):
        net[2].train(False)
        net[2].train(True)
        return weighted(net, batch, hyper)

    nets = [network(nn.BatchNorm1d(5, dtype=torch.float64)) for _ in range(2)]
    made = partial(program, Neumann(damping=0.5), changes_mode)
    found, runner = trained(made(net=nets[0]), "eager")
    assert relative(found, trained(made(net=nets[1]), False)[0]) < 1e-12
    assert compiler_of(runner).refusal is None
    for left, right in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=0.0)


def with_context(net, batch, hyper, ctx):
    return weighted(net, batch, hyper) * (1.0 + ctx.step)


def with_print(net, batch, hyper):
    torch._dynamo.graph_break()
    return weighted(net, batch, hyper)


def data_dependent(net, batch, hyper):
    loss = weighted(net, batch, hyper)
    return loss * 2.0 if loss > 0.3 else loss


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (with_context, "'ctx' is or holds a Context"),
        (with_print, "torch._dynamo.graph_break"),
        (data_dependent, "ata-dependent"),
    ],
)
def test_what_cannot_be_compiled_whole_is_said_once_and_runs_as_before(loss, reason):
    made = partial(program, CG(max_steps=2, damping=3.0), loss)
    with pytest.warns(FallbackWarning, match=r"level 'net' \(test_compiled.py:\d+\)") as caught:
        found, _ = trained(made(), "eager")
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert relative(found, trained(made(), False)[0]) < 1e-12


def wrong(graph, inputs):
    return lambda *args: tuple(1.001 * out for out in graph(*args))


def test_wrong_products_are_found_out():
    torch._dynamo.register_backend(wrong)
    made = partial(program, Identity())
    with pytest.warns(FallbackWarning, match="are .* off"):
        found, _ = trained(made(), "wrong")
    assert relative(found, trained(made(), False)[0]) < 1e-12


def test_a_user_s_own_error_is_as_without_and_does_not_end_compiling():
    def raising(net, batch, hyper):
        if len(batch[1]) == 5:
            raise KeyError("mine")
        return weighted(net, batch, hyper)

    built = build(program(Identity(), raising))
    compiler = Compiler("eager")
    context, values = muted_context(built, "net"), built.values(built.levels)
    v = {k: torch.ones_like(p) for k, p in built.levels["net"].parameters.items()}
    for size in (8, 5, 8):
        point = make_point(
            built, "net", (Drawn(samples(size, 1)),), context, values, (0, "", 0, "")
        )
        problem = LowerProblem(replace(point, compiler=compiler), "net", ("hyper",))
        if size == 5:
            with pytest.raises(KeyError, match="mine"):
                open_curvature(problem, "auto").cross(v)
        else:
            open_curvature(problem, "auto").cross(v)
    assert compiler.refusal is None


def test_a_linearization_leaves_out_what_is_not_touched():
    def partly(net, batch, hyper):
        x, y = batch
        return weighted(nn.Sequential(net[0]), (x, y), hyper) + (net[0].weight ** 2).sum()

    built = build(program(Unroll(), partly))
    compiler, batch = Compiler("eager"), samples(8, 1)
    context, values = muted_context(built, "net"), built.values(built.levels)
    for _ in range(2):
        point = make_point(built, "net", (Drawn(batch),), context, values, (0, "net", 0, ""))
        problem = LowerProblem(replace(point, compiler=compiler), "net", ("hyper",))
        opened = open_linearization(problem, "auto")
        assert set(opened.gradient()) == {"0.weight", "0.bias"}
        v = {k: randn(*p.shape, seed=7) for k, p in built.levels["net"].parameters.items()}
        plain = open_linearization(replace(problem, point=point), "reverse").pull_back(v)
        curved, cross = opened.pull_back(v)
        assert relative({k: curved[k] for k in plain[0]}, plain[0]) < 1e-12
        assert relative(cross["hyper"], plain[1]["hyper"]) < 1e-12
    assert compiler.graphs == 1


def test_unknown_backends_and_nested_runs():
    with pytest.raises(RunError, match="compile='fast'"):
        run(1, program=program(Identity()), compile="fast", progress="off")
    with pytest.warns(FallbackWarning, match="nested=True"):
        run(1, program=program(Dense(damping=1.0)), compile=True, nested=True, progress="off")
