"""The command line. Heavy libraries are imported by the commands that need them, so help answers at once."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from natgrad.app import options
from natgrad.schema.errors import InputError

__all__ = ["app", "main", "show"]

app = typer.Typer(
    name="natgrad",
    help="Which metric makes a logged training run natural gradient descent, step by step and tensor by tensor.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Face:
    """What a command shows: progress and remarks on standard error, the answer on standard output."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        from rich.console import Console
        from rich.logging import RichHandler

        self.as_json, self.quiet = as_json, quiet
        self.console = Console(stderr=True)
        handler: logging.Handler
        if self.console.is_terminal:
            handler = RichHandler(console=self.console, show_time=False, show_path=False, markup=False)
            handler.setFormatter(logging.Formatter("%(message)s"))
        else:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        logger = logging.getLogger("natgrad")
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Progress bar on a terminal, and nothing elsewhere."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        disabled = self.quiet or not self.console.is_terminal
        with Progress(*columns, console=self.console, disable=disabled) as bars:
            task = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)

    def answer(self, values: dict[str, Any]) -> None:
        """Print the answer of a command."""
        if self.as_json:
            sys.stdout.write(json.dumps(values) + "\n")
        else:
            sys.stdout.write("".join(_lines(values)))


def show(values: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Print the answer of a command that shows no progress."""
    _Face(as_json, quiet).answer(values)


_SHORT = 60


def _lines(values: dict[str, Any]) -> Iterator[str]:
    width = max(len(name) for name in values)
    for name, value in values.items():
        if name == "angle" and value is not None:
            shown = "min {:.6g}, median {:.6g}, max {:.6g} rad".format(*value)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            shown = "min {:.6g}, median {:.6g}, max {:.6g}".format(*value)
        elif isinstance(value, dict) and any(len(str(item)) > _SHORT for item in value.values()):
            yield f"{name.replace('_', ' ')}\n"
            yield from (f"  {line}" for line in _lines(value))
            continue
        elif isinstance(value, dict):
            shown = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            shown = "; ".join(map(str, value)) or "none"
        else:
            shown = str(value)
        yield f"{name.replace('_', ' '):<{width}}  {shown}\n"


def _arguments(sources: list[Path], out: Path, pairs: list[str] | None) -> tuple[list[Path], Path, dict[str, str]]:
    """Sort pairs that follow the one of ``--map`` without another ``--map`` out of the arguments."""
    from natgrad.sources.names import QUANTITIES, parse_map

    words = [*sources, out]
    more = (
        [word for word in words if str(word).partition("=")[0] in QUANTITIES and "=" in str(word)] if pairs else []
    )
    paths = [word for word in words if word not in more]
    if len(paths) < 2:
        raise typer.BadParameter("give a SOURCE and OUT")
    return paths[:-1], paths[-1], parse_map([*(pairs or []), *map(str, more)])


def _ingest(
    face: _Face, sources: list[Path], out: Path, said: dict[str, Any], then: Callable[[], dict[str, Any]] = dict
) -> None:
    """Ingest, and do what is done then, once or whenever the log has news; show what came of it."""
    from natgrad.app import run
    from natgrad.app.follow import follow

    def once(first: bool) -> dict[str, Any]:
        with face.progress("ingest") as progress:
            answer = run.ingest_run(
                sources,
                out,
                **run.given(said, run.READING),
                overwrite=said["overwrite"] and first,
                wait=said["follow"],
                progress=progress,
            )
        return answer | then() if first or answer["new_steps"] else answer

    if said["follow"]:
        face.answer(follow(once, interval=said["interval"], idle_timeout=said["idle_timeout"]))
    else:
        face.answer(once(True))


@app.command()
def process(
    context: typer.Context,
    sources: options.Sources,
    out: options.Out,
    format: options.Format = None,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    sweep: options.Sweep = False,
    allow_gaps: options.AllowGaps = False,
    overwrite: options.Overwrite = False,
    include: options.Include = None,
    store: options.Store = None,
    follow: options.Follow = False,
    interval: options.Interval = 10.0,
    idle_timeout: options.IdleTimeout = None,
    learning_rate: options.LearningRate = None,
    gammas: options.Gammas = None,
    windows: options.Windows = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    cluster: options.Cluster = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    attempt: options.Attempt = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ingest, analyze and report a run in a row."""
    from natgrad.app import run

    face, said = _Face(as_json, quiet), options.said(context)
    sources, out, said["mapping"] = _arguments(sources, out, mapping)
    analysis = run.Analysis.of(said)

    def analyze_and_report() -> dict[str, Any]:
        with face.progress("analyze") as progress:
            answer = run.analyze_run(out, analysis, progress=progress)
        return answer | run.report_run([out])

    _ingest(face, sources, out, said, analyze_and_report)


@app.command()
def ingest(
    context: typer.Context,
    sources: options.Sources,
    out: options.Out,
    format: options.Format = None,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    sweep: options.Sweep = False,
    allow_gaps: options.AllowGaps = False,
    overwrite: options.Overwrite = False,
    include: options.Include = None,
    store: options.Store = None,
    follow: options.Follow = False,
    interval: options.Interval = 10.0,
    idle_timeout: options.IdleTimeout = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Read the new steps of a training log into OUT/trajectory.zarr."""
    face, said = _Face(as_json, quiet), options.said(context)
    sources, out, said["mapping"] = _arguments(sources, out, mapping)
    _ingest(face, sources, out, said)


@app.command()
def analyze(
    context: typer.Context,
    out: options.Out,
    learning_rate: options.LearningRate = None,
    gammas: options.Gammas = None,
    windows: options.Windows = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    cluster: options.Cluster = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    attempt: options.Attempt = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compute OUT/ledger.zarr, or what is missing of it, and OUT/results.zarr."""
    from natgrad.app import run

    face = _Face(as_json, quiet)
    analysis = run.Analysis.of(options.said(context))
    with face.progress("analyze") as progress:
        answer = run.analyze_run(out, analysis, progress=progress)
    face.answer(answer)


@app.command()
def report(
    outs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders of one or several runs.")],
    page: Annotated[Path | None, typer.Option(help="The page. [default: report.html in the first OUT]")] = None,
    version: options.Version = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Draw Figure 3 of the paper from the results of one run, or of several on one page."""
    from natgrad.app import run

    _Face(as_json, quiet).answer(run.report_run(outs, page, version))


@app.command()
def info(
    out: options.Out, version: options.Version = None, as_json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """Say what OUT holds."""
    from natgrad.app.describe import describe_run

    _Face(as_json, quiet).answer(describe_run(out, version))


@app.command()
def verify(
    out: options.Out, version: options.Version = None, as_json: options.Json = False, quiet: options.Quiet = False
) -> None:
    """Compare all that OUT's stores hold with its checksums; exits with 1 where something was damaged."""
    from natgrad.app.verification import verify_run

    face = _Face(as_json, quiet)
    damages = verify_run(out, version)
    if as_json:
        face.answer({"damages": [damage.to_json() for damage in damages]})
    else:
        sys.stdout.write("".join(f"{damage}\n" for damage in damages) or "all is as it was written\n")
    if damages:
        raise typer.Exit(1)


@app.command()
def versions(
    out: options.Out,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many. [default: all]")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """List the versions of OUT, the newest first, where it is an Icechunk repository (--store icechunk)."""
    from natgrad.storage import network_errors, open_out

    storage = open_out(out)
    with network_errors(storage):
        found = storage.versions(last)
    if as_json:
        show({"versions": found}, as_json, quiet)
        return
    for row in found:
        sys.stdout.write("  ".join((row["version"], row["time"], row["message"], *row["tags"])) + "\n")


@app.command()
def status(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the OUT of many runs.")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Say of every run below ROOT how far it is, how far behind its log, and what failed last."""
    from natgrad.app import scan as watch

    runs = watch.status(root)
    if as_json:
        show({"runs": runs}, as_json, quiet)
        return
    table = [["run", "state", "last step", "lag", "processed", "last error"]]
    for row in runs:
        cells = [row[name] for name in ("run", "state", "last_step", "lag", "processed", "error")]
        table.append(["-" if cell is None else str(cell).partition("\n")[0] for cell in cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        sys.stdout.write("  ".join(map(str.ljust, line, widths)).rstrip() + "\n")


@app.command()
def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for logs, runs and the report.")] = Path(
        "demo"
    ),
    workers: options.Workers = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Log the experiments of the paper, process the logs, and draw them on one page."""
    from natgrad.app import run
    from natgrad.app.folder import RunFolder
    from natgrad.experiments.demo import WINDOW, write_demo_logs
    from natgrad.storage import require_local

    out = require_local(out, "OUT")
    face = _Face(as_json, quiet)
    analysis = run.Analysis.of(options.said(context) | {"windows": [WINDOW]})
    runs = {}
    for name, log in write_demo_logs(out / "logs").items():
        runs[name] = out / "runs" / name
        with face.progress(f"{name}: ingest") as progress:
            run.ingest_run(log, runs[name], progress=progress)
        with face.progress(f"{name}: analyze") as progress:
            run.analyze_run(runs[name], analysis, progress=progress)
        run.report_run([runs[name]])
    answer = {name: str(RunFolder.of(path).results) for name, path in runs.items()}
    face.answer(answer | run.report_run(runs, out / "report.html"))


@app.command()
def inspect(
    context: typer.Context,
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Folder of a log; several of one run, or a run file."),
    ],
    format: options.Format = None,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    sweep: options.Sweep = False,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    as_json: options.Json = False,
) -> None:
    """Say what a log holds, what is missing for which result, and what processing it will take."""
    from natgrad.app.inspection import inspect_source
    from natgrad.storage import network_errors, open_all

    face, said = _Face(as_json, quiet=False), options.said(context)
    logs = open_all(sources)
    reading = {name: said[name] for name in ("format", "mapping", "shift", "sweep", "memory_limit")}
    with network_errors(*logs):
        found = inspect_source(logs, **reading)
    face.answer(found)


@app.command()
def formats(as_json: options.Json = False, quiet: options.Quiet = False) -> None:
    """List the log formats that can be read, and what each can and cannot give."""
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
        _Face(as_json, quiet).answer(table)
        return
    for name, entry in table.items():
        sys.stdout.write(f"{name}\n" + "".join(f"  {key:<9} {text}\n" for key, text in entry.items()))


def main() -> None:
    """Run the command line.

    Exits with 0 when done, 2 on bad usage or bad input (the message says what, where, why and what to do), and
    1 on anything else, and where ``verify`` finds damages.
    """
    try:
        app()
    except InputError as error:
        if "--json" in sys.argv:
            parts = {"what": error.what, "where": error.where, "why": error.why, "do": error.remedy}
            sys.stdout.write(json.dumps({"error": parts}) + "\n")
        sys.stderr.write(f"natgrad: {error}\n")
        raise SystemExit(2) from error
