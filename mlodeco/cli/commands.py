"""The commands, and their options."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn

import typer
from rich.console import Console

import mlodeco
from mlodeco.cli.compare import (
    CHILD,
    Job,
    NoResult,
    open_folder,
    read_methods,
    work,
    write_comparison,
)
from mlodeco.cli.compare import compare as compare_methods
from mlodeco.cli.outcome import outcome
from mlodeco.cli.script import Shown, execute, no_steps, refuse_second_training
from mlodeco.cli.settings import Setting, read_setting
from mlodeco.errors import MlodecoError, RunError
from mlodeco.runtime import build, seed_all
from mlodeco.runtime.launch import launched_rank
from mlodeco.show import Comparison, Form, GraphView, comparison_table, method_table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 fine, 1 an error of the script or its program, 2 a wrong command line, "
    "130 Ctrl-C. A script's own sys.exit(n) is kept.",
)

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
    ),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show the whole of tracebacks.")]
Seed = Annotated[int | None, typer.Option(help="Of random numbers.")]
Nested = Annotated[
    bool | None,
    typer.Option("--nested/--no-nested", help="True derivatives through nested best responses."),
]


def main() -> None:
    """The entry point."""
    app(prog_name="mlodeco")


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
    progress: Annotated[Form | None, typer.Option(help="How progress is shown.")] = None,
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
    traceback: Traceback = False,
) -> None:
    """Run a script; options go over those of its first mlodeco.run().

    A script that only declares levels is trained as it ends.
    """
    options = _options_of_run(context)

    def train(run: Callable[..., mlodeco.Result], given: dict[str, Any]) -> mlodeco.Result:
        wanted = {**given, **options}
        if "steps" not in given:
            refuse_second_training(script, given["program"], asked=bool(options or settings))
        if "steps" not in wanted:
            raise no_steps(script)
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
        if launched_rank() == 0:
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
    traceback: Traceback = False,
) -> None:
    """Compare hypergradients with converged ones where training would start."""

    def compare(given: dict[str, Any]) -> None:
        _compare(
            given,
            level or [],
            seed=given.get("seed") if seed is None else seed,
            nested=given.get("nested", False) if nested is None else nested,
        )

    _show(script, arguments, settings, compare, traceback=traceback)


@app.command()
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
        _show_comparison(job, out)


@app.command(CHILD, hidden=True)
def compare_one(job: Path, result: Path) -> None:
    """One process of a comparison."""
    told = Job.read(job)
    with outcome(with_traceback=told.with_traceback):
        work(told, result)


@app.command()
def methods() -> None:
    """List the methods: what each solves, what it costs and when to use it."""
    is_terminal = Console().is_terminal
    Console(width=None if is_terminal else _WIDTH).print(method_table())


def _show_comparison(job: Job, out: Path | None) -> None:
    if out is not None:
        open_folder(out)
    progress = Console(stderr=True)
    try:
        with progress.status("") if progress.is_terminal else nullcontext() as status:
            found = compare_methods(job, status.update if status else lambda text: None)
    except NoResult as error:
        print(error.told.rstrip() or error, file=sys.stderr)
        raise SystemExit(error.code if error.code > 0 else 1) from None
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH_OF_COMPARISON
    console.print(comparison_table(found))
    if out is not None:
        _write(found, out)
    if all(row.error for row in found.rows):
        raise SystemExit(1)


def _write(found: Comparison, folder: Path) -> None:
    """Writes the files; a picture that cannot be drawn is no failure."""
    try:
        write_comparison(found, folder)
    except RunError as error:
        print(error, file=sys.stderr)


_WIDTH_OF_COMPARISON = 100
"""Where it is not for a terminal."""

_WIDTH = 110
"""Of the table where it is not for a terminal."""


def _print_graph(view: GraphView, form: str) -> None:
    console = Console()
    if form == "text" and console.is_terminal:
        console.print(view)
    else:
        print(_PICTURES[form](view))


_PICTURES: Final[Mapping[str, Callable[[GraphView], str]]] = {
    "text": str,
    "mermaid": GraphView.to_mermaid,
    "dot": GraphView.to_dot,
}


def _compare(
    given: dict[str, Any], levels: Sequence[str], *, seed: int | None, nested: bool
) -> None:
    program = given["program"]
    if seed is not None:
        seed_all(seed)
    # shards are made, and made whole, by all processes together
    built = build(program)
    is_main = launched_rank() == 0
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
    return {k: v for k, v in context.params.items() if k in known and v is not None}


def _show(
    script: Path,
    arguments: list[str] | None,
    settings: list[str] | None,
    show: Callable[[dict[str, Any]], None],
    *,
    traceback: bool,
) -> None:
    """Shows what a script would train."""

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
    read = _read(settings)
    with outcome(with_traceback=traceback):
        execute(script, arguments or (), read, act)


def _read(settings: list[str] | None) -> list[Setting]:
    try:
        return [read_setting(text) for text in settings or ()]
    except MlodecoError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
