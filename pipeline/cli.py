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

from pipeline.schema import InputError

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

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE", help="Folder or URL of a training log; several of one run, or a run file that lists them."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder or URL of the run's stores, results and report.")]
FormatName = Annotated[
    str | None, typer.Option("--format", help="Log format (natgrad formats); found if left out.")
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="QUANTITY=KEY",
        help="Where a quantity (parameter, gradient, hvp, loss, learning_rate, step) is in the files; repeatable.",
    ),
]
Shift = Annotated[
    list[str] | None,
    typer.Option(
        "--shift",
        metavar="QUANTITY=K",
        help="What is logged of a quantity at step s belongs to the state s+K: gradient=-1, loss=-1; repeatable.",
    ),
]
Sweep = Annotated[bool, typer.Option("--sweep", help="SOURCE is a folder of many runs of one model.")]
Attempt = Annotated[
    int | None, typer.Option(help="A run that was restarted: as it stood at this attempt. [default: the newest]")
]
AllowGaps = Annotated[bool, typer.Option("--allow-gaps", help="Take steps that are not evenly spaced.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew, dropping what OUT holds.")]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="WHAT", help="Store this too: optimizer, what it keeps between steps (may be repeated)."),
]
Store = Annotated[
    str | None,
    typer.Option(
        metavar="KIND",
        help="How a new OUT is stored: plain, or icechunk (object stores only), which keeps every version. "
        "[default: plain]",
    ),
]
Version = Annotated[
    str | None,
    typer.Option(
        help="Version of an Icechunk repository: id, tag or time (natgrad versions). [default: the newest]"
    ),
]
Follow = Annotated[bool, typer.Option("--follow", help="Go on with what is logged later, until interrupted.")]
Interval = Annotated[float, typer.Option(min=0.0, help="Seconds between looks at the log, with --follow.")]
IdleTimeout = Annotated[
    float | None,
    typer.Option(min=0.0, help="Seconds without a new step after which --follow ends. [default: never]"),
]
LearningRate = Annotated[float | None, typer.Option(help="Learning rate where the log has none.")]
Gamma = Annotated[
    list[float] | None,
    typer.Option(help="Weight of the metric family, eq. (22); repeat for several. [default: 0.01 0.1 1 10 100]"),
]
Window = Annotated[
    list[int] | None, typer.Option(help="Window of m updates, eq. (3); repeat for several. [default: 1]")
]
Workers = Annotated[
    int | None, typer.Option(help="Processes, here or of --cluster. [default: as many as processors here]")
]
Scheduler = Annotated[str | None, typer.Option(metavar="ADDRESS", help="An existing Dask scheduler.")]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Cluster to make: slurm, kubernetes, ...; see docs/cluster.md."),
]
MemoryLimit = Annotated[str, typer.Option(help="Memory of each worker process.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no remarks; warnings and errors only.")]


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
        logger = logging.getLogger("pipeline")
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
    from pipeline.sources.names import QUANTITIES, parse_map

    words = [*sources, out]
    more = (
        [word for word in words if str(word).partition("=")[0] in QUANTITIES and "=" in str(word)] if pairs else []
    )
    paths = [word for word in words if word not in more]
    if len(paths) < 2:
        raise typer.BadParameter("give a SOURCE and OUT")
    return paths[:-1], paths[-1], parse_map([*(pairs or []), *map(str, more)])


def _shift(pairs: list[str] | None) -> dict[str, int]:
    from pipeline.sources.names import parse_shift

    return parse_shift(pairs or [])


def _ingest(
    face: _Face,
    sources: list[Path],
    out: Path,
    mapping: dict[str, str],
    shift: dict[str, int],
    format: str | None,
    sweep: bool,
    allow_gaps: bool,
    overwrite: bool,
    wait: bool,
    include: list[str] | None,
    store: str | None,
) -> dict[str, Any]:
    from pipeline import run

    with face.progress("ingest") as progress:
        return run.ingest_run(
            sources,
            out,
            format=format,
            mapping=mapping,
            shift=shift,
            sweep=sweep,
            allow_gaps=allow_gaps,
            overwrite=overwrite,
            wait=wait,
            include=include or (),
            store=store,
            progress=progress,
        )


def _options(
    learning_rate: float | None,
    gamma: list[float] | None,
    window: list[int] | None,
    workers: int | None,
    scheduler: str | None,
    cluster: str | None,
    memory_limit: str,
    attempt: int | None = None,
) -> Any:
    from pipeline.clusters import memory_bytes
    from pipeline.run import Analysis

    memory = memory_bytes(memory_limit)
    chosen: dict[str, Any] = {"gammas": tuple(gamma)} if gamma else {}
    chosen |= {"windows": tuple(window)} if window else {}
    return Analysis(
        learning_rate=learning_rate,
        workers=workers,
        scheduler=scheduler,
        cluster=cluster,
        memory_limit=memory,
        attempt=attempt,
        **chosen,
    )


@app.command()
def process(
    sources: Sources,
    out: Out,
    format: FormatName = None,
    map_: Map = None,
    shift: Shift = None,
    sweep: Sweep = False,
    allow_gaps: AllowGaps = False,
    overwrite: Overwrite = False,
    include: Include = None,
    store: Store = None,
    follow: Follow = False,
    interval: Interval = 10.0,
    idle_timeout: IdleTimeout = None,
    learning_rate: LearningRate = None,
    gamma: Gamma = None,
    window: Window = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = "512MiB",
    attempt: Attempt = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ingest, analyze and report a run in a row."""
    from pipeline import run

    face = _Face(as_json, quiet)
    sources, out, mapping = _arguments(sources, out, map_)
    shifts = _shift(shift)
    options = _options(learning_rate, gamma, window, workers, scheduler, cluster, memory_limit, attempt)

    def once(first: bool) -> dict[str, Any]:
        answer = _ingest(
            face,
            sources,
            out,
            mapping,
            shifts,
            format,
            sweep,
            allow_gaps,
            overwrite and first,
            follow,
            include,
            store,
        )
        if not first and not answer["new_steps"]:
            return answer
        with face.progress("analyze") as progress:
            answer |= run.analyze_run(out, options, progress=progress)
        return answer | run.report_run([out])

    face.answer(run.follow(once, interval=interval, idle_timeout=idle_timeout) if follow else once(True))


@app.command()
def ingest(
    sources: Sources,
    out: Out,
    format: FormatName = None,
    map_: Map = None,
    shift: Shift = None,
    sweep: Sweep = False,
    allow_gaps: AllowGaps = False,
    overwrite: Overwrite = False,
    include: Include = None,
    store: Store = None,
    follow: Follow = False,
    interval: Interval = 10.0,
    idle_timeout: IdleTimeout = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read the new steps of a training log into OUT/trajectory.zarr."""
    from pipeline import run

    face = _Face(as_json, quiet)
    sources, out, mapping = _arguments(sources, out, map_)
    shifts = _shift(shift)

    def once(first: bool) -> dict[str, Any]:
        return _ingest(
            face,
            sources,
            out,
            mapping,
            shifts,
            format,
            sweep,
            allow_gaps,
            overwrite and first,
            follow,
            include,
            store,
        )

    face.answer(run.follow(once, interval=interval, idle_timeout=idle_timeout) if follow else once(True))


@app.command()
def analyze(
    out: Out,
    learning_rate: LearningRate = None,
    gamma: Gamma = None,
    window: Window = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = "512MiB",
    attempt: Attempt = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute OUT/ledger.zarr, or what is missing of it, and OUT/results.zarr."""
    from pipeline import run

    face = _Face(as_json, quiet)
    options = _options(learning_rate, gamma, window, workers, scheduler, cluster, memory_limit, attempt)
    with face.progress("analyze") as progress:
        answer = run.analyze_run(out, options, progress=progress)
    face.answer(answer)


@app.command()
def report(
    outs: Annotated[list[Path], typer.Argument(metavar="OUT...", help="Folders of one or several runs.")],
    page: Annotated[Path | None, typer.Option(help="The page. [default: report.html in the first OUT]")] = None,
    version: Version = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw Figure 3 of the paper from the results of one run, or of several on one page."""
    from pipeline import run

    _Face(as_json, quiet).answer(run.report_run(outs, page, version))


@app.command()
def info(out: Out, version: Version = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what OUT holds."""
    from pipeline import run

    _Face(as_json, quiet).answer(run.describe_run(out, version))


@app.command()
def verify(out: Out, version: Version = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Compare all that OUT's stores hold with its checksums; exits with 1 where something was damaged."""
    from pipeline import run

    face = _Face(as_json, quiet)
    damages = run.verify_run(out, version)
    if as_json:
        face.answer({"damages": [damage.to_json() for damage in damages]})
    else:
        sys.stdout.write("".join(f"{damage}\n" for damage in damages) or "all is as it was written\n")
    if damages:
        raise typer.Exit(1)


@app.command()
def versions(
    out: Out,
    last: Annotated[int | None, typer.Option(min=1, help="Only the last so many. [default: all]")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the versions of OUT, the newest first, where it is an Icechunk repository (--store icechunk)."""
    from pipeline.places import repository

    found = repository.versions(out, last)
    if as_json:
        show({"versions": found}, as_json, quiet)
        return
    for row in found:
        sys.stdout.write("  ".join((row["version"], row["time"], row["message"], *row["tags"])) + "\n")


@app.command()
def status(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="Folder of the OUT of many runs.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say of every run below ROOT how far it is, how far behind its log, and what failed last."""
    from pipeline import watch

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
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for logs, runs and the report.")] = Path(
        "demo"
    ),
    workers: Workers = None,
    memory_limit: MemoryLimit = "512MiB",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Log the experiments of the paper, process the logs, and draw them on one page."""
    from pipeline import run
    from pipeline.experiments.demo import WINDOW, write_demo_logs
    from pipeline.places import require_local

    out = require_local(out, "OUT")
    face = _Face(as_json, quiet)
    options = _options(None, None, [WINDOW], workers, None, None, memory_limit)
    runs = {}
    for name, log in write_demo_logs(out / "logs").items():
        runs[name] = out / "runs" / name
        with face.progress(f"{name}: ingest") as progress:
            run.ingest_run(log, runs[name], progress=progress)
        with face.progress(f"{name}: analyze") as progress:
            run.analyze_run(runs[name], options, progress=progress)
        run.report_run([runs[name]])
    answer = {name: str(run.RunFolder(path).results) for name, path in runs.items()}
    face.answer(answer | run.report_run(runs, out / "report.html"))


@app.command()
def inspect(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="SOURCE...", help="Folder of a log; several of one run, or a run file."),
    ],
    format: FormatName = None,
    map_: Map = None,
    shift: Shift = None,
    sweep: Sweep = False,
    memory_limit: MemoryLimit = "512MiB",
    as_json: Json = False,
) -> None:
    """Say what a log holds, what is missing for which result, and what processing it will take."""
    from pipeline.clusters import memory_bytes
    from pipeline.inspection import inspect_source
    from pipeline.places import each, network_errors
    from pipeline.sources.names import parse_map

    face, memory = _Face(as_json, quiet=False), memory_bytes(memory_limit)
    mapping, shifts = parse_map(map_ or []), _shift(shift)
    logs = each(sources)
    with network_errors(*logs):
        found = inspect_source(logs, format=format, mapping=mapping, shift=shifts, sweep=sweep, memory_limit=memory)
    face.answer(found)


@app.command()
def formats(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the log formats that can be read, and what each can and cannot give."""
    from pipeline.sources.formats import FORMATS

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
