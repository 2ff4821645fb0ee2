"""The public face: a program, the decorators of the current one, and ``run``."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Concatenate, Final, Literal, ParamSpec, Protocol, TypeVar, overload

from torch import Tensor, nn

from mlodeco.declare.records import UNSET, Refresh, Unset
from mlodeco.declare.registry import Registry, current_registry
from mlodeco.errors import RunError
from mlodeco.hypergrad import describe
from mlodeco.runtime import Accelerator, Build, Result, Runner, build
from mlodeco.runtime.checking import compare
from mlodeco.runtime.functional import compute
from mlodeco.runtime.runner import check_steps
from mlodeco.runtime.solving import solve as solve_level
from mlodeco.show import Form, GraphView, Report, make_display

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Program(Registry):
    """A registry of levels, sources, validations, hooks, methods and update rules.

    There is a default one; ``with Program() as p:`` makes another the current one, to which
    the module-level decorators then belong.
    """

    def __init__(self) -> None:
        super().__init__()
        for made in _made:
            if len(made) < _ENOUGH:
                made.append(self)

    def module(self, name: str) -> nn.Module:
        """The real module of a level, built if it has not been.

        Raises:
            MlodecoError: the program cannot be built, or has no such level.
        """
        current: Build | None = self.built
        # a look at a trained module, perhaps frozen by now, checks nothing anew
        built = current if current and current.version == self.version else build(self)
        return built.levels[built.graph.known(name)].module

    def graph(self) -> GraphView:
        """The dataflow graph: ``edges``, ``order``, ``paths(level)``; ``print`` draws it.

        Builds the modules that have not been: which levels share parameters decides on edges.
        """
        built = build(self)
        words = {
            edge: "direct gradient only" if method is None else describe(method)
            for edge, method in built.methods.items()
        }
        return GraphView(built.graph, words)

    def reset(self) -> None:
        """Forgets modules built and batches seen, and keeps the declarations.

        Modules given as factories or mappings are made anew at the next use.
        """
        self.built = None


_made: Final[list[list[Program]]] = []
_ENOUGH: Final = 2
"""Programs to keep: they tell that there is not one alone, and hold no more memory."""

DEFAULT: Final = Program()
"""The program of the module-level decorators outside any ``with Program()``."""

Registry.default = DEFAULT


def current_program() -> Program:
    """The innermost program entered by ``with``, else the default one."""
    current = current_registry()
    return current if isinstance(current, Program) else DEFAULT


def _of_current(method: Callable[Concatenate[Program, P], R]) -> Callable[P, R]:
    """A method of Program as a function that belongs to the current program."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(current_program(), *args, **kwargs)

    signature = inspect.signature(method)
    parameters = list(signature.parameters.values())[1:]
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    return call


class _Source(Protocol):
    """``Program.source`` as a function: with parentheses and without."""

    @overload
    def __call__(self, name: str | None = None, refresh: Refresh = "step") -> Callable[[T], T]: ...

    @overload
    def __call__(self, name: T, refresh: Refresh = "step") -> T: ...


def _known(program: Program | None) -> Program:
    """The program given, else the current one.

    Raises:
        RunError: it is none.
    """
    if program is None:
        return current_program()
    if not isinstance(program, Program):
        raise RunError(f"program={program!r} is not a Program.", remedy="pass a Program.")
    return program


level = _of_current(Program.level)  # type: ignore[arg-type]
on = _of_current(Program.on)  # type: ignore[arg-type]
source: _Source = _of_current(Program.source)  # type: ignore[assignment]
validate = _of_current(Program.validate)
method = _of_current(Program.method)  # type: ignore[arg-type]
update = _of_current(Program.update)  # type: ignore[arg-type]
track = _of_current(Program.track)


Takeover = Callable[[Callable[..., Result], dict[str, Any]], Result]
"""Is given ``run`` and the arguments of a call by name, ``program`` always among them."""

_takeovers: Final[list[Takeover]] = []


@contextmanager
def first_run_to(takeover: Takeover) -> Iterator[list[Program]]:
    """Within the block, hands the first call of :func:`run` over; later ones are as written.

    Gives the first two programs that are made until then.
    """
    made: list[Program] = []
    _takeovers.append(takeover)
    _made.append(made)
    try:
        yield made
    finally:
        _takeovers.clear()
        _made.clear()


def _yielding(function: Callable[P, Result]) -> Callable[P, Result]:
    """Lets whoever waits for it have the first call."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        if not _takeovers:
            return function(*args, **kwargs)
        given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
        given["program"] = _known(given.get("program"))
        _made.clear()
        return _takeovers.pop()(function, given)

    return call


@_yielding
def run(
    steps: int,
    *,
    program: Program | None = None,
    seed: int | None = None,
    progress: Form = "auto",
    accelerator: Accelerator | None = None,
    nested: bool = False,
    reduce: str = "exact",
    tails: str = "drop",
    compile: bool | str = False,  # noqa: A002 (as torch names it)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    keep: int = 3,
    resume: str | os.PathLike[str] | None = None,
    checkpoint_errors: str = "warn",
    nonfinite: Literal["raise", "skip", "warn"] = "raise",
    log_with: Any = None,
    project: str = "mlodeco",
) -> Result:
    """Trains every level of a program for ``steps`` ticks.

    At each tick the levels without lower levels take a step; a level above takes its turn
    once its lower levels have finished their inner loops. A second ``run`` goes on with the
    modules as they are and with fresh optimizers, except those given as instances.

    Args:
        steps: ticks.
        program: the program; default: the current one.
        seed: seeds torch, ``random`` and NumPy before modules are built; those that a look at
            the graph or an earlier run has built stay as they are.
        progress: ``"auto"``, ``"live"``, ``"plain"`` or ``"off"``.
        accelerator: an Accelerator to use; default: a new one.
        nested: hypergradients are the true derivatives through nested best responses, in place
            of Eq. (2); see :func:`hypergradient`.
        reduce: in several processes, ``"exact"`` averages every product of a hypergradient over
            them, so that it is that of the mean loss; ``"once"`` averages the hypergradients that
            the processes find each on its own data, by one collective.
        tails: what becomes in several processes of the end of a pass over a DataLoader, where
            there is no full batch for each: ``"drop"`` leaves it out, ``"pad"`` fills it up with
            samples from the beginning of the pass.
        compile: compiles the exact second-derivative products of each level as whole functions:
            True, or the name of a backend of ``torch.compile``. Takes seconds to a minute a
            level at its first hypergradient. Where a loss cannot be compiled whole, or not to
            the same result within 1e-5, its level goes on as without, and a warning says why.
        mixed_precision: ``"bf16"`` or ``"fp16"`` runs the functions of levels without a
            ``precision`` of their own, and validations, under autocast, ``"no"`` does not;
            default: that of the Accelerator, or of ``accelerate launch``.
        out: a folder for ``metrics.jsonl`` and ``checkpoints``; a last one is written at the end.
            SIGTERM and SIGINT then end the run between two ticks, behind a checkpoint.
        checkpoint_every: ticks between two checkpoints.
        keep: how many of the newest are kept, beside that of the best validation.
        resume: ``"auto"`` goes on from the newest good checkpoint in ``out``, or begins if there
            is none; or the folder of the checkpoint to go on from. ``steps`` then counts those
            before it too.
        checkpoint_errors: ``"warn"`` goes on where a checkpoint cannot be written, ``"raise"``
            ends the run.
        nonfinite: what becomes of a step whose loss, cotangent, solve or gradient is not finite:
            ``"raise"`` ends the run before it; ``"skip"`` leaves it out, and ends the run after
            100 in a row; ``"warn"`` takes it, where a solve failed with a hypergradient of NaN.
            Warns once a level and cause. Overflows in float16 are skipped in any case.
        log_with: ``"tensorboard"`` or another of Accelerate's trackers, an
            ``accelerate.tracking.GeneralTracker``, or a list of these: each tick is logged to
            them. Default: those of the Accelerator given. What a tracker raises ends the run.
        project: what the trackers call the run; TensorBoard writes to this folder in ``out``.

    Returns:
        The history, the best validation and why the run ended.

    Raises:
        MlodecoError: the program cannot be run, which is found before anything changes; or a
            loss, gradient or batch of a step cannot be used, and the level is as before the step.
        CheckpointError: a checkpoint is damaged, or of another program or version.
        Preempted: a signal ended the run; the exit status of the process is 128 and its number.
    """
    check_steps(steps)
    display = make_display(progress)
    runner = Runner(
        _known(program),
        seed=seed,
        accelerator=accelerator,
        nested=nested,
        reduce=reduce,
        tails=tails,
        compile=compile,
        mixed_precision=mixed_precision,
        out=out,
        checkpoint_every=checkpoint_every,
        keep=keep,
        resume=resume,
        checkpoint_errors=checkpoint_errors,
        nonfinite=nonfinite,
        log_with=log_with,
        project=project,
    )
    if display is not None and runner.is_main:
        runner.listeners.append(display)
    return runner.run_to(steps)


def hypergradient(
    level: str,
    *,
    batches: Mapping[str, Any] | None = None,
    program: Program | None = None,
    hypergrad: Any | Unset = UNSET,
    nested: bool = False,
) -> dict[str, Tensor]:
    """The total derivative of a level's loss in its own parameters; nothing is changed.

    Direct gradient plus the indirect one through the best responses of the levels below, at
    the current parameters (Eq. (2) of Choe et al. 2023, arXiv:2207.02849). Random numbers in the
    losses (dropout) are the same in all passes of a call, and others once torch's global stream
    has moved.

    Args:
        level: the level.
        batches: for levels, the batch to use (a list of ``accumulate`` batches where that is
            above 1), and for sources the item that every level reads; others use that of the
            last step, else the first of a fresh iterator. A source with ``refresh="loop"``
            gives all levels the item of the newest step among its readers'.
        program: the program; default: the current one.
        hypergrad: a method for every edge in place of those declared; None for the direct
            gradient alone.
        nested: the true derivative where levels between respond through levels below them. Eq.
            (2) takes the Hessian of a level with those below it held constant, which is exact
            unless the level feeds back into them, as an upper level that they read. Needs
            linear solvers that converge (CG, MINRES, GMRES, Dense); each product of a level's
            solve makes 4 solves of a level that it feeds back into, so that the cost multiplies
            with depth. Of a method its solver and damping count, not ``product``,
            ``curvature_batch`` or ``warm_start``.

    Returns:
        A tensor for each parameter that the level optimizes, by its name and of its shape
        and dtype; zeros where the loss does not depend on it.

    Raises:
        MlodecoError: the program or a batch does not fit.
    """
    return compute(
        level,
        batches=batches,
        program=_known(program),
        hypergrad=hypergrad,
        nested=nested,
    )


def solve(
    level: str,
    *,
    batches: Mapping[str, Any] | None = None,
    steps: int,
    program: Program | None = None,
) -> nn.Module:
    """The level after ``steps`` optimizer steps on given batches; nothing is changed.

    The steps are those of an inner loop: from the level's present parameters and optimizer
    state, or with ``init_from`` from those of that level and a fresh state; schedules, clipping
    and tuned options included, and the levels that it reads held as they are. So a meta-learnt
    start is evaluated: solve on a task's support set, then look at the query set. With
    ``replicas`` one of them is solved: the items are those of a single task. A level with lower
    levels follows its direct gradient.

    Args:
        level: the level.
        batches: for the level a list of ``steps`` batches (each a list of ``accumulate``
            micro-batches where that is above 1), and for sources the item that every step reads;
            otherwise those of the last steps, else the first of a fresh iterator.
        steps: optimizer steps.
        program: the program; default: the current one.

    Returns:
        A copy of the level's module, in its present train/eval mode.

    Raises:
        MlodecoError: the program or a batch does not fit.
    """
    return solve_level(level, batches=batches, steps=steps, program=_known(program))


def check(
    level: str,
    *,
    batches: Mapping[str, Any] | None = None,
    program: Program | None = None,
    hypergrad: Any | Unset = UNSET,
    damping: float | None = None,
    nested: bool = False,
) -> Report:
    """Compares a level's hypergradient with a converged one, at the current parameters.

    The reference solves ``(H + damping I) v = b`` on every edge to a tight tolerance: as a
    matrix for up to 1024 parameters, else by GMRES or MINRES. Each edge is also checked by
    itself, with the reference on all others. Nothing is changed. Dear: the reference may take
    1500 Hessian products, and there is one sweep an edge and a few for the advice.

    Args:
        level: the level.
        batches: as for :func:`hypergradient`.
        program: the program; default: the current one.
        hypergrad: a method for every edge in place of those declared.
        damping: of the reference; default: on each edge that of its own method.
        nested: also compare Eq. (2) itself, solved to convergence, with the true derivative
            through nested best responses; see :func:`hypergradient`.

    Returns:
        Errors and cosines by edge and overall, and which knob to turn; ``print`` shows a table.

    Raises:
        MlodecoError: the program or a batch does not fit, or the level has no path to compare
            on: by Eq. (2), or with ``nested`` by nested best responses.
    """
    found = compare(
        level,
        batches=batches,
        program=_known(program),
        hypergrad=hypergrad,
        damping=damping,
        nested=nested,
    )
    return Report(found)
