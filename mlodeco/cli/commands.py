"""The commands, and their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

import mlodeco
from mlodeco.cli.graphs import GraphForm, graph_form, show_graph
from mlodeco.cli.outcome import outcome
from mlodeco.cli.script import Shown, execute
from mlodeco.cli.settings import Setting, read_setting
from mlodeco.errors import MlodecoError, RunError
from mlodeco.runtime import build, read_history, seed_all
from mlodeco.runtime.launch import launched_rank
from mlodeco.show import Form, method_table, plot_histories, save_figure

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
        GraphForm | None,
        typer.Option("--format", help="Text or a picture; default: as the file ends, else text."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file; default: text is printed, a picture is named as the script."),
    ] = None,
    traceback: Traceback = False,
) -> None:
    """Show the dataflow graph of a script's program, and do not train it."""
    found = graph_form(form, out)

    def draw(given: dict[str, Any]) -> None:
        if launched_rank() == 0:
            show_graph(given["program"].graph(), found, out, script)

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
    with outcome(with_traceback=traceback):
        runs = {name: read_history(folder) for name, folder in named(folders).items()}
        figure = plot_histories(runs, level=level or (), metric=metric or (), smooth=smooth)
        print(save_figure(figure, out))


@app.command()
def methods() -> None:
    """List the methods: what each solves, what it costs and when to use it."""
    is_terminal = Console().is_terminal
    Console(width=None if is_terminal else _WIDTH).print(method_table())


_WIDTH = 110
"""Of the table where it is not for a terminal."""


def named(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their names, or by their paths where two have the same name."""
    unique = list(dict.fromkeys(folders))
    names = [folder.resolve().name for folder in unique]
    return {
        name if names.count(name) == 1 else str(folder): folder
        for name, folder in zip(names, unique, strict=True)
    }


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
    raise Shown


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
    try:
        read: list[Setting] = [read_setting(text) for text in settings or ()]
    except MlodecoError as error:
        raise typer.BadParameter(str(error), param_hint="--set") from None
    with outcome(with_traceback=traceback):
        execute(script, arguments or (), read, act)
