"""Define the command line. Commands import heavy libraries only when they run, so ``--help`` is fast."""

from __future__ import annotations

import functools
import gc
import inspect
import json
import logging
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer

from natgrad.app import declarations, options
from natgrad.schema.errors import InputError
from natgrad.schema.summary import Summary, summary_lines
from natgrad.schema.text import encodable, printable, table_lines

if TYPE_CHECKING:
    from typing import TextIO

    from natgrad.app.progress import StageProgress

    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler

__all__ = ["Output", "app", "command_options", "interruptible", "main", "program"]

app = typer.Typer(
    name="natgrad",
    help="Find the metric that makes a logged training run natural gradient descent, for each step and tensor.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

F = TypeVar("F", bound=Callable[..., Any])

_COLLECTOR_SECONDS = 10.0
"""Seconds after which Python starts to search for cycles of objects that are no longer used.

For a small run, the search takes a sixth of the processor time, most of it at the end, and finds nothing of note.
"""

RUN_AGAIN = "What is finished is stored: run the same command again to continue."
"""Advice after an interrupt."""

_LAST = ("as_json", "quiet")
"""Parameters that the help of a command lists last."""


def command_options(kind: Any = declarations.NoOptions) -> Callable[[F], F]:
    """Decorate a command: derive its arguments and options from `natgrad.app.options`, for Typer.

    Parameters
    ----------
    kind : type, optional
        Set of options that the command takes as ``**values``.
    """
    validating = declarations.with_options(kind, _typer_parameter, _typer_default)

    def decorate(function: F) -> F:
        command = validating(function)
        signature = inspect.signature(command)
        ordered = sorted(signature.parameters.values(), key=lambda one: one.name in _LAST)
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in ordered]
        if {"source", "out"} <= {*signature.parameters}:
            # Typer takes a single path as OUT, and would say that SOURCE is missing.
            parameters = [one.replace(default=[]) if one.name == "source" else one for one in parameters]

        @functools.wraps(command)
        def complete(**values: Any) -> Any:
            if "source" in values and not values["source"]:
                raise _missing_out([values["out"]])
            return command(**values)

        complete.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # Typer reads it
        return cast(F, complete)

    return decorate


def _typer_default(declared: declarations.DeclaredOption) -> Any:
    """Return the default for Typer. It is None for options that the validation sets to their own default."""
    return declared.option.default if declared.kinds == (bool,) or declared.option.positional else None


def _typer_parameter(declared: declarations.DeclaredOption) -> Any:
    """Return the annotation that describes an argument or option to Typer. Its value is validated later."""
    option, kind = declared.option, declared.kinds[-1]
    # Typer parses numbers and flags. Pairs and amounts of memory remain text.
    kind = str if option.parse is not None else kind
    annotation = list[kind] if declared.repeatable else kind  # type: ignore[valid-type]  # for Typer
    description = declared.description(command_line=True)
    with_default = kind is not bool and not option.required and (option.unset or option.default is not None)
    choices = option.choices
    common: dict[str, Any] = {
        "metavar": option.metavar,
        "help": description + (f"  [default: {declared.default_text}]" if with_default else ""),
        "show_default": False,
        "autocompletion": None if choices is None else lambda: list(choices()),
    }
    if option.positional:
        return Annotated[annotation, typer.Argument(**common)]
    if kind is not bool and not option.required:
        annotation = annotation | None
    return Annotated[annotation, typer.Option(declared.flag, **common)]


class _StandardError(_StreamHandler):
    """Write to the current standard error: that of an earlier command may be closed."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _without_dask_arrays() -> None:
    """Let xarray find that the arrays of this process are not those of Dask.

    To recognize those, it imports ``dask.array`` when it creates its first variable, which takes a sixth of the
    processor time of a small run. Commands do not create such arrays. Dask itself is not affected.
    """
    if "dask.array" not in sys.modules:
        import xarray as xr

        sys.modules["dask.array"] = None  # type: ignore[assignment]  # its import fails
        try:
            xr.Variable((), 0)
        finally:
            del sys.modules["dask.array"]


class Output:
    """Print progress and log messages of a command to standard error, and its summary to standard output.

    Parameters
    ----------
    as_json : bool
        Print the summary as one JSON object.
    quiet : bool
        Show only warnings and errors.
    uses_dask : bool
        Check the configuration of Dask first. Importing it takes 0.1 s of processor time.

    Raises
    ------
    InputError
        If the configuration of Dask is malformed.
    """

    def __init__(self, as_json: bool, quiet: bool = False, *, uses_dask: bool = True) -> None:
        from rich.console import Console

        if uses_dask:
            from natgrad.compute.clusters import require_configuration

            require_configuration()
        self.as_json, self.quiet = as_json, quiet
        self.console = Console(stderr=True)
        handler: logging.Handler
        if self.console.is_terminal:
            from rich.logging import RichHandler

            handler = RichHandler(console=self.console, show_time=False, show_path=False, markup=False)
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:
            handler = _StandardError()
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger = logging.getLogger("natgrad")
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)

    @contextmanager
    def progress(self, prefix: str = "", *, again: str = RUN_AGAIN) -> Iterator[StageProgress]:
        """Draw a progress bar for each stage on a terminal, and nothing otherwise.

        Parameters
        ----------
        prefix : str
            Text before the name of a stage.
        again : str
            Advice after an interrupt by the user.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from natgrad.app.progress import ITEMS

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        disabled = self.quiet or not self.console.is_terminal
        with interruptible(again), Progress(*columns, console=self.console, disable=disabled) as bars:
            tasks: dict[str, Any] = {}
            # A large log takes a while to list, before the number of its states is known.
            waiting = bars.add_task(f"{prefix}look for the log", total=None, rate="")

            def show(stage: str, done: int, total: int) -> None:
                if not tasks:
                    bars.remove_task(waiting)
                if stage not in tasks:
                    tasks[stage] = bars.add_task(prefix + stage, total=None, rate="")
                bars.update(tasks[stage], completed=done, total=total)
                task = bars.tasks[bars.task_ids.index(tasks[stage])]
                seconds = task.finished_time or task.elapsed
                if stage in ITEMS and done and seconds:
                    rate = done / seconds
                    bars.update(tasks[stage], rate=f"{rate:{'.3g' if rate < 100 else '.0f'}} {ITEMS[stage]}/s")

            yield show

    def show(self, summary: Summary | Mapping[str, Any]) -> None:
        """Print the summary of a command."""
        values = summary.to_json() if isinstance(summary, Summary) else summary
        if self.as_json:
            sys.stdout.write(json.dumps(values) + "\n")
        elif isinstance(summary, Summary):
            write(str(summary))
        else:
            write("".join(summary_lines(values)))


def write(text: str) -> None:
    """Print a text, also if standard output cannot represent all of its characters."""
    sys.stdout.write(encodable(text, sys.stdout.encoding or "utf-8"))


@contextmanager
def interruptible(again: str = RUN_AGAIN) -> Iterator[None]:
    """Tell the user how to continue after an interrupt, and exit with 1."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        sys.stderr.write(f"natgrad: interrupted. {again}\n")
        raise typer.Exit(1) from interrupt


def _again(values: Mapping[str, Any]) -> str:
    """Return how to continue a command that reads a log."""
    return RUN_AGAIN.replace(":", ": without --overwrite,") if values["overwrite"] else RUN_AGAIN


def _missing_out(paths: Sequence[Any]) -> InputError:
    return InputError(
        "OUT is missing: the folder or URL for the stores, the results and the report",
        where="arguments SOURCE and OUT",
        why=f"the only path is {paths[0]}, which is taken as SOURCE" if paths else "there is no path",
        remedy=f"add OUT at the end: natgrad {sys.argv[1] if sys.argv[1:] else 'process'} "
        f"{shlex.quote(str(paths[0])) if paths else 'SOURCE'} OUT",
    )


def _split_arguments(source: Any, out: options.Out, values: dict[str, Any]) -> tuple[Any, options.Out]:
    """Move QUANTITY=KEY pairs that follow the first pair of ``--map`` from the arguments to the mapping."""
    from natgrad.sources.names import QUANTITIES

    words, mapping = [*source, out], values["mapping"]
    pairs = [word for word in words if mapping and str(word).partition("=")[0] in QUANTITIES and "=" in str(word)]
    paths = [word for word in words if word not in pairs]
    if len(paths) < 2:
        raise _missing_out(paths)
    if pairs:
        values["mapping"] = [*("=".join(pair) for pair in mapping.items()), *map(str, pairs)]
    return paths[:-1], paths[-1]


def _show_result(
    function: Callable[..., Summary],
    source: Any,
    out: options.Out,
    output: Output,
    values: dict[str, Any],
    again: str = RUN_AGAIN,
) -> None:
    """Call a function that reads a log into OUT, with progress, and show its summary."""
    source, out = _split_arguments(source, out, values)
    _without_dask_arrays()
    with output.progress(again=again) as progress:
        summary = function(source, out, progress=progress, **values)
    output.show(summary)


@app.callback(invoke_without_command=True)
@command_options()
def _global_options(context: typer.Context, show_version: options.ShowVersion = False) -> None:
    """Declare the options of the program itself, and print the help if there is no command (``natgrad --``)."""
    if show_version:
        from natgrad.schema.version import __version__

        sys.stdout.write(f"natgrad {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


@app.command()
@command_options(options.ProcessOptions)
def process(
    source: options.Source,
    out: options.Out,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Ingest, analyze and report a run."""
    from natgrad.app import api

    _show_result(api.process, source, out, Output(as_json, quiet), values, _again(values))


@app.command()
@command_options(options.ReplayOptions)
def replay(
    source: options.Source,
    out: options.Out,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Evaluate an objective at the states of a log without gradients, and process the run."""
    from natgrad.app import api

    _show_result(api.replay, source, out, Output(as_json, quiet), values)


@app.command()
@command_options(options.IngestOptions)
def ingest(
    source: options.Source,
    out: options.Out,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Read the new steps of a training log into OUT/trajectory.zarr."""
    from natgrad.app import api

    _show_result(api.ingest, source, out, Output(as_json, quiet), values, _again(values))


@app.command()
@command_options(options.AnalyzeOptions)
def analyze(out: options.Out, as_json: options.Json = False, quiet: options.Quiet = False, **values: Any) -> None:
    """Compute the missing part of OUT/ledger.zarr, and OUT/results.zarr."""
    from natgrad.app import api

    output = Output(as_json, quiet)
    with output.progress() as progress:
        summary = api.analyze(out, progress=progress, **values)
    output.show(summary)


@app.command()
@command_options(options.VersionOptions)
def report(
    outs: options.Outs,
    page: options.Page = None,
    serve: options.Serve = False,
    port: options.Port = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Write the report page of one run, or of several: an interactive overview, and Figure 3 of the paper."""
    from natgrad.app import api

    if serve:
        from natgrad.app.report_server import served

        runs = [outs] if isinstance(outs, str | Path) else outs
        with served(runs, values["version"], port or 0) as server:
            Output(as_json, quiet).show({"serving": server.url})
            sys.stdout.flush()
            with suppress(KeyboardInterrupt):
                server.serve_forever()
        return
    Output(as_json, quiet).show(api.report(outs, page, **values))


@app.command()
@command_options()
def compare(
    outs: options.Outs,
    align: options.Align = "step",
    page: options.ComparisonPage = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the results of several runs: options, curves and tensors, on one page."""
    from natgrad.app import api

    Output(as_json, quiet).show(api.compare(outs, align, page))


@app.command()
@command_options(options.VersionOptions)
def info(out: options.Out, as_json: options.Json = False, quiet: options.Quiet = False, **values: Any) -> None:
    """Describe the contents of OUT."""
    from natgrad.app.describe import describe_run

    Output(as_json, quiet, uses_dask=False).show(describe_run(out, values["version"]))


@app.command()
@command_options(options.VersionOptions)
def verify(out: options.Out, as_json: options.Json = False, quiet: options.Quiet = False, **values: Any) -> None:
    """Verify all stored data against its checksums. Exits with 1 if anything is corrupt, 2 or 3 if it fails."""
    from natgrad.app import api

    output = Output(as_json, quiet)
    found = api.verify(out, **values)
    output.show(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
@command_options()
def materialize(out: options.Out, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Copy the states of OUT that are in the files of its log (--in-place)."""
    from natgrad.app import api

    output = Output(as_json, quiet)
    with output.progress() as progress:
        summary = api.materialize(out, progress=progress)
    output.show(summary)


@app.command()
@command_options()
def slim(out: options.Out, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Remove the copied states of OUT. The ledger, the results and all checksums are kept."""
    from natgrad.app import api

    Output(as_json, quiet, uses_dask=False).show(api.slim(out))


@app.command()
@command_options()
def versions(
    out: options.Out, last: options.Last = None, as_json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """List the versions of OUT, newest first. OUT must be an Icechunk repository (--store icechunk)."""
    from natgrad.storage import open_out, storage_errors

    output = Output(as_json, quiet)
    storage = open_out(out)
    with storage_errors(storage):
        found = storage.versions(last)
    if as_json:
        output.show({"versions": found})
        return
    for row in found:
        write(printable("  ".join((row["version"], row["time"], row["message"], *row["tags"]))) + "\n")


@app.command()
@command_options()
def status(root: options.StatusRoot, as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """Show progress, lag and last error of every run under ROOT."""
    from natgrad.app.status import status as status_of_runs

    output = Output(as_json, quiet)
    runs = status_of_runs(root)
    if as_json:
        output.show({"runs": runs})
        return
    table = [["run", "state", "last step", "lag", "processed", "last error"]]
    for row in runs:
        cells = [row[name] for name in ("run", "state", "last_step", "lag", "processed", "error")]
        table.append(["-" if cell is None else str(cell).partition("\n")[0] for cell in cells])
    write("".join(table_lines(table)))


@app.command()
@command_options(options.WorkerOptions)
def demo(
    out: options.DemoOut = "demo", as_json: options.Json = False, quiet: options.Quiet = False, **values: Any
) -> None:
    """Log the experiments of the paper, process the logs, and write one report of them."""
    from natgrad.app import run
    from natgrad.app.folder import RunFolder
    from natgrad.experiments.demo import WINDOW, write_demo_logs
    from natgrad.storage import require_local

    checked = declarations.validated(options.RunOptions, values | {"windows": [WINDOW]})
    folder, output = require_local(out, "OUT"), Output(as_json, quiet)
    runs = {}
    for name, log in write_demo_logs(folder / "logs").items():
        runs[name] = folder / "runs" / name
        with output.progress(f"{name}: ") as progress:
            run.process_run(log, runs[name], checked, progress=progress)
    paths = {name: str(RunFolder.of(path).results) for name, path in runs.items()}
    output.show(paths | run.report_run(runs, folder / "report.html").to_json())


@app.command("inspect")
@command_options(options.InspectOptions)
def inspect_log(
    source: options.Source, as_json: options.Json = False, quiet: options.Quiet = False, **values: Any
) -> None:
    """Describe a folder or file, and the command that processes it. Exits with 2 if it contains no log."""
    from natgrad.app import api

    output = Output(as_json, quiet)
    found = api.inspect(source, **values)
    output.show(found)
    if not found.readable:
        sys.stderr.write(f"natgrad: {found.refusal}\n")
        raise typer.Exit(2)


@app.command()
@command_options()
def formats(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """List the log formats that can be read, and the contents of each."""
    from natgrad.sources.formats import FORMATS

    table = {
        name: {
            "layout": format.layout,
            "gives": format.gives,
            "lacks": format.lacks,
            "alignment": format.alignment,
        }
        for name, format in FORMATS.items()
    }
    if as_json:
        Output(as_json, quiet).show(table)
        return
    for name, entry in table.items():
        sys.stdout.write(f"{name}\n" + "".join(f"  {key:<9} {text}\n" for key, text in entry.items()))


def main() -> None:
    """Run the command line.

    The exit status is 0 on success. It is 1 if ``verify`` found corrupt data, if a run of a scan failed, or if the
    user interrupted the command. It is 2 if an option or the input is not valid; the message then states what is
    wrong, where, why, and what to do. It is 3 after any other error, and a traceback is printed.
    """
    try:
        app()
    except InputError as error:
        if "--json" in sys.argv:
            parts = {"what": error.what, "where": error.where, "why": error.why, "do": error.remedy}
            sys.stdout.write(json.dumps({"error": parts}) + "\n")
        sys.stderr.write(f"natgrad: {error}\n")
        raise SystemExit(2) from error
    except Exception as error:
        traceback.print_exc()
        raise SystemExit(3) from error


def program() -> None:
    """Run the command line as the program of this process: `main`, but memory is managed for short commands."""
    gc.disable()
    start = threading.Timer(_COLLECTOR_SECONDS, gc.enable)
    start.daemon = True
    start.start()
    main()
