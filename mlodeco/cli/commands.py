"""The commands, and their options."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

import mlodeco
from mlodeco.declare.registry import LEVEL_OPTIONS
from mlodeco.errors import MlodecoError, RunError

# what needs torch is imported where it is used: help and completion do not wait for it
if TYPE_CHECKING:
    from mlodeco.cli.settings import Setting
    from mlodeco.show import GraphView

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 an error of the script or its program, 2 a wrong command line, "
    "130 Ctrl-C, 143 SIGTERM. A script's own sys.exit(n) is kept.",
)


def _complete_setting(incomplete: str) -> list[str]:
    """The options of a level; its name is known to the script alone."""
    level, point, option = incomplete.partition(".")
    return [f"{level}.{one}=" for one in LEVEL_OPTIONS if point and one.startswith(option)]


Script = Annotated[
    Path,
    typer.Argument(metavar="SCRIPT", exists=True, dir_okay=False, help="A Python file."),
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ARGS", help="The script's own arguments, after --."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="LEVEL.OPTION=VALUE",
        help="An option of a level, over the script's; may be repeated.",
        autocompletion=_complete_setting,
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show the whole of tracebacks.")]
Seed = Annotated[int | None, typer.Option(help="Of random numbers.")]
Nested = Annotated[
    bool | None,
    typer.Option("--nested/--no-nested", help="True derivatives through nested best responses."),
]


def main() -> None:
    """The entry point; of a wrong command line the main process alone tells."""
    if _is_main():
        app(prog_name="mlodeco")
    try:
        sys.exit(app(prog_name="mlodeco", standalone_mode=False))
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        sys.exit(error.exit_code)


def _is_main() -> bool:
    """Whether this is the process that prints, of those that were launched."""
    if "RANK" not in os.environ:
        return True
    from mlodeco.runtime.launch import launched_rank

    return launched_rank() == 0


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mlodeco {mlodeco.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Multilevel optimization: run and look at the programs of scripts."""


@app.command()
def run(
    context: typer.Context,
    script: Script,
    arguments: Arguments = None,
    settings: Settings = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Ticks to run.")] = None,
    seed: Seed = None,
    progress: Annotated[
        Literal["auto", "live", "plain", "off"] | None,
        typer.Option(help="How progress is shown."),
    ] = None,
    nested: Nested = None,
    reduce: Annotated[
        Literal["exact", "once"] | None,
        typer.Option(help="What several processes average: every product, or the results."),
    ] = None,
    tails: Annotated[
        Literal["drop", "pad"] | None,
        typer.Option(help="What several processes do with the end of a pass over a DataLoader."),
    ] = None,
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"] | None,
        typer.Option("--mixed-precision", help="Of levels without a precision of their own."),
    ] = None,
    compile: Annotated[  # noqa: A002 (as the option is named)
        bool | None,
        typer.Option("--compile/--no-compile", help="Compile second-derivative products."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder for metrics and checkpoints.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ticks between two checkpoints.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="How many of the newest are kept.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|DIR", help="Go on from the newest checkpoint in --out, or from one."
        ),
    ] = None,
    checkpoint_errors: Annotated[
        Literal["warn", "raise"] | None,
        typer.Option(help="What becomes of a run whose checkpoint cannot be written."),
    ] = None,
    nonfinite: Annotated[
        Literal["raise", "skip", "warn"] | None,
        typer.Option(help="What becomes of a step whose numbers are not finite."),
    ] = None,
    log_with: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A tracker, such as tensorboard; may be repeated."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="What trackers call the run.")] = None,
    traceback: Traceback = False,
) -> None:
    """Run a script; options go over those of its first mlodeco.run().

    A script that only declares levels is trained as it ends.
    """
    options = _options_of_run(context)

    def train(run: Callable[..., mlodeco.Result], given: dict[str, Any]) -> mlodeco.Result:
        wanted = {**given, **options}
        if "steps" not in given:
            _refuse_second_training(script, given["program"], asked=bool(options or settings))
        if "steps" not in wanted:
            raise RunError(
                f"{script.name} does not say how many steps to run.",
                remedy="add --steps 1000, for instance.",
            )
        return run(**wanted)

    _execute(script, arguments, settings, train, traceback=traceback)


@app.command()
def graph(
    script: Script,
    arguments: Arguments = None,
    settings: Settings = None,
    form: Annotated[
        Literal["text", "mermaid", "dot"], typer.Option("--format", help="What to print.")
    ] = "text",
    traceback: Traceback = False,
) -> None:
    """Show the dataflow graph of a script's program, and do not train it."""

    def draw(given: dict[str, Any]) -> None:
        if _is_main():
            _print_graph(given["program"].graph(), form)

    _show(script, arguments, settings, draw, traceback=traceback)


@app.command()
def check(
    script: Script,
    arguments: Arguments = None,
    settings: Settings = None,
    level: Annotated[
        list[str] | None, typer.Option(help="The level; default: each with a path to compare on.")
    ] = None,
    seed: Seed = None,
    nested: Nested = None,
    at: Annotated[
        int | None, typer.Option(min=1, metavar="TICK", help="Train so many ticks before.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Compare hypergradients with converged ones where training would start, or later."""

    def compare(given: dict[str, Any]) -> None:
        _compare(
            given,
            level or [],
            seed=given.get("seed") if seed is None else seed,
            nested=given.get("nested", False) if nested is None else nested,
            at=at,
        )

    _show(script, arguments, settings, compare, traceback=traceback)


@app.command()
def methods() -> None:
    """List the methods: what each solves, what it costs and when to use it."""
    from rich.console import Console

    from mlodeco.show import method_table

    is_terminal = Console().is_terminal
    Console(width=None if is_terminal else _WIDTH).print(method_table())


_WIDTH = 110
"""Of the table where it is not for a terminal."""


def _print_graph(view: GraphView, form: str) -> None:
    from rich.console import Console

    console = Console()
    if form == "text" and console.is_terminal:
        console.print(view)
    else:
        forms = {"text": view.__str__, "mermaid": view.to_mermaid, "dot": view.to_dot}
        print(forms[form]())


def _refuse_second_training(script: Path, program: mlodeco.Program, *, asked: bool) -> None:
    """Ends a script that has stepped a Runner of its own, of which a command knows nothing."""
    built = program.built
    if built is None or not built.tick:
        return
    if asked:
        raise RunError(
            f"{script.name} trains by a Runner of its own, which options do not reach.",
            remedy="call mlodeco.run() in the script, or leave the options out.",
        )
    from mlodeco.cli.script import Shown

    raise Shown


_OF_TRAINING = (
    "program",
    "accelerator",
    "reduce",
    "tails",
    "compile",
    "mixed_precision",
    "nonfinite",
)
"""Arguments of a run that training before a check has too; nothing is written."""


def _compare(
    given: dict[str, Any],
    levels: Sequence[str],
    *,
    seed: int | None,
    nested: bool,
    at: int | None,
) -> None:
    from mlodeco.runtime import build, seed_all

    program = given["program"]
    if at is not None:
        options = {name: given[name] for name in _OF_TRAINING if name in given}
        mlodeco.run(at, seed=seed, nested=nested, progress="off", **options)
    elif seed is not None:
        seed_all(seed)
    # shards are made, and made whole, by all processes together
    built = build(program)
    is_main = _is_main()
    if not is_main and not any(one.is_sharded for one in built.levels.values()):
        return
    found = levels or [
        name
        for name in built.levels
        if built.plan(name).visits or (nested and built.needs_nesting(name))
    ]
    if not found:
        raise RunError(
            "no level has a path through lower levels: every hypergradient is the direct gradient.",
            remedy="see what reads what: mlodeco graph.",
        )
    for name in found:
        report = mlodeco.check(name, program=program, nested=nested)
        if is_main:
            print(report)


def _options_of_run(context: typer.Context) -> dict[str, Any]:
    """What the command line gives of the arguments of ``mlodeco.run``."""
    known = inspect.signature(mlodeco.run).parameters
    # a list that is not given may be empty
    return {k: v for k, v in context.params.items() if k in known and v not in (None, [], ())}


def _show(
    script: Path,
    arguments: list[str] | None,
    settings: list[str] | None,
    show: Callable[[dict[str, Any]], None],
    *,
    traceback: bool,
) -> None:
    """Shows what a script would train."""
    from mlodeco.cli.script import Shown

    def act(run: object, given: dict[str, Any]) -> NoReturn:
        show(given)
        raise Shown

    _execute(script, arguments, settings, act, traceback=traceback)


def _execute(
    script: Path,
    arguments: list[str] | None,
    settings: list[str] | None,
    act: Callable[..., Any],
    *,
    traceback: bool,
) -> None:
    from mlodeco.cli.outcome import outcome
    from mlodeco.cli.script import execute
    from mlodeco.cli.settings import read_setting

    try:
        read: list[Setting] = [read_setting(text) for text in settings or ()]
    except MlodecoError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    with outcome(with_traceback=traceback):
        execute(script, arguments or (), read, act)
