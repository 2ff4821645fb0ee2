"""The commands, and their options."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

import mlodeco
from mlodeco.declare.registry import LEVEL_OPTIONS
from mlodeco.errors import MlodecoError, quoted

# what needs torch is imported where it is used: help and completion do not wait for it
if TYPE_CHECKING:
    from mlodeco.cli.settings import Setting

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut the names of options off, and are not ASCII
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 an error of the script or its program, 2 a wrong command line, "
    "130 Ctrl-C, 143 SIGTERM. A script's own sys.exit(n) is kept.",
)


def _complete_setting(incomplete: str) -> list[str]:
    """The options of a level; its name is known to the script alone."""
    level, point, option = incomplete.partition(".")
    return [f"{level}.{one}=" for one in LEVEL_OPTIONS if point and one.startswith(option)]


class ScriptCommand(TyperCommand):
    """A command whose script has its own arguments after ``--``, and nowhere else."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments of the command, read into the context.

        Raises:
            BadParameter: one of the script's stands before ``--``.
        """
        behind = args[args.index("--") + 1 :] if "--" in args else []
        rest = super().parse_args(ctx, args)
        own = ctx.params.get("arguments") or ()
        stray = own[: max(len(own) - len(behind), 0)]
        if stray and not ctx.resilient_parsing:
            raise typer.BadParameter(
                f"{quoted(stray)}: the script's own arguments stand after --.", ctx=ctx
            )
        return rest


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
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what is shown may have letters it has not
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


@app.command(cls=ScriptCommand)
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
    from mlodeco.cli.script import (
        end_of_own,
        first_program,
        refuse_second_training,
        require_folder,
    )

    options = _options_of_run(context)

    def train(run: Callable[..., mlodeco.Result], given: dict[str, Any]) -> mlodeco.Result:
        wanted = {**given, **options}
        if "steps" not in given:
            refuse_second_training(script, given["program"], asked=bool(options or settings))
        if "steps" not in wanted:
            raise end_of_own(script, given["program"])
        require_folder(options, wanted.get("out"))
        return run(**wanted)

    _execute(script, arguments, settings, train, first_program, traceback=traceback)


@app.command(cls=ScriptCommand)
def graph(
    script: Script,
    arguments: Arguments = None,
    settings: Settings = None,
    form: Annotated[
        Literal["text", "mermaid", "dot", "svg", "png", "pdf"] | None,
        typer.Option("--format", help="What to print or draw; default: text."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file, whose ending names the format.")] = None,
    traceback: Traceback = False,
) -> None:
    """Show the dataflow graph of a script's program, and do not train it."""
    from mlodeco.cli.pictures import graph_form, show_graph

    found = graph_form(form, out)

    def draw(given: dict[str, Any]) -> None:
        if _is_main():
            show_graph(given["program"].graph(), found, out, script)

    _show(script, arguments, settings, draw, traceback=traceback)


@app.command(cls=ScriptCommand)
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
    from mlodeco.cli.checks import check_levels

    def compare(given: dict[str, Any]) -> None:
        check_levels(
            given,
            level or [],
            seed=given.get("seed") if seed is None else seed,
            nested=given.get("nested", False) if nested is None else nested,
            at=at,
        )

    _show(script, arguments, settings, compare, traceback=traceback)


@app.command(cls=ScriptCommand)
def compare(
    script: Script,
    methods: Annotated[
        str,
        typer.Option(
            "--hypergrad", metavar="METHODS", help='As in "neumann(num_terms=10),cg,sama".'
        ),
    ],
    arguments: Arguments = None,
    settings: Settings = None,
    level: Annotated[
        list[str] | None, typer.Option(help="The level; default: each above others.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Ticks to run.")] = None,
    seed: Seed = None,
    at: Annotated[
        int, typer.Option(min=0, help="The tick at which all are measured at one point.")
    ] = 0,
    damping: Annotated[
        float | None, typer.Option(min=0.0, help="Of the reference; default: as in the script.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder for comparison.json and .png.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Train a script once with each method, and compare errors, time, memory and metrics."""
    from mlodeco.cli.compare import Job, read_methods, show_comparison
    from mlodeco.cli.outcome import outcome

    try:
        found = read_methods(methods)
    except MlodecoError as error:
        raise typer.BadParameter(str(error), param_hint="--hypergrad") from None
    _read(settings)
    job = Job(
        script=str(script),
        arguments=arguments or (),
        settings=settings or (),
        methods=found,
        levels=level or (),
        steps=steps,
        seed=seed,
        at=at,
        damping=damping,
        with_traceback=traceback,
    )
    with outcome(with_traceback=traceback):
        show_comparison(job, out)


@app.command("compare-one", hidden=True)
def compare_one(job: Path, result: Path) -> None:
    """One process of a comparison."""
    from mlodeco.cli.compare import Job, work
    from mlodeco.cli.outcome import outcome

    told = Job.read(job)
    with outcome(with_traceback=told.with_traceback):
        work(told, result)


@app.command()
def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", exists=True, file_okay=False, help="Folders of runs."),
    ],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path(
        "curves.png"
    ),
    level: Annotated[list[str] | None, typer.Option(help="A level; may be repeated.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(help="A validation metric; may be repeated.")
    ] = None,
    smooth: Annotated[
        int | None, typer.Option(min=1, help="How many steps the smoothed line averages.")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Draw the curves of runs, from the folders that they wrote by out=."""
    from mlodeco.cli.outcome import outcome
    from mlodeco.cli.pictures import draw_curves

    with outcome(with_traceback=traceback):
        print(draw_curves(folders, out, level or (), metric or (), smooth))


@app.command()
def methods() -> None:
    """List the methods: what each solves, what it costs and when to use it."""
    from rich.console import Console

    from mlodeco.show import method_table

    is_terminal = Console().is_terminal
    Console(width=None if is_terminal else _WIDTH).print(method_table())


_WIDTH = 110
"""Of the table where it is not for a terminal."""


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
    from mlodeco.cli.script import Shown, only_program

    def act(run: object, given: dict[str, Any]) -> NoReturn:
        show(given)
        raise Shown

    _execute(script, arguments, settings, act, only_program, traceback=traceback)


def _execute(
    script: Path,
    arguments: list[str] | None,
    settings: list[str] | None,
    act: Callable[..., Any],
    choose: Callable[..., mlodeco.Program],
    *,
    traceback: bool,
) -> None:
    from mlodeco.cli.outcome import outcome
    from mlodeco.cli.script import execute

    read = _read(settings)
    with outcome(with_traceback=traceback):
        execute(script, arguments or (), read, act, choose)


def _read(settings: list[str] | None) -> list[Setting]:
    from mlodeco.cli.settings import read_setting

    try:
        return [read_setting(text) for text in settings or ()]
    except MlodecoError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
