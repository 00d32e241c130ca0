"""What a user may say to commands: each argument and option that several of them take, once.

The signature of a command lists them, ``learning_rate: options.LearningRate = None``, by the names that they have
in the functions of `natgrad.app.run` and in the flows. So what was said goes there by name (`said`), and is not
listed again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "MEMORY_LIMIT",
    "AllowGaps",
    "Attempt",
    "Cluster",
    "Follow",
    "Format",
    "Gammas",
    "IdleTimeout",
    "Include",
    "Interval",
    "Json",
    "LearningRate",
    "Mapping",
    "MemoryLimit",
    "Out",
    "Overwrite",
    "Quiet",
    "Scheduler",
    "Shift",
    "Sources",
    "Store",
    "Sweep",
    "Version",
    "Windows",
    "Workers",
    "said",
]

MEMORY_LIMIT = "512MiB"
"""Memory of a worker process where nothing else is said."""

Sources = Annotated[
    list[Path],
    typer.Argument(
        metavar="SOURCE", help="Folder or URL of a training log; several of one run, or a run file that lists them."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder or URL of the run's stores, results and report.")]
Format = Annotated[str | None, typer.Option("--format", help="Log format (natgrad formats); found if left out.")]
Mapping = Annotated[
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
Gammas = Annotated[
    list[float] | None,
    typer.Option(
        "--gamma",
        help="Weight of the metric family, eq. (22); repeat for several. [default: 0.01 0.1 1 10 100]",
    ),
]
Windows = Annotated[
    list[int] | None,
    typer.Option("--window", help="Window of m updates, eq. (3); repeat for several. [default: 1]"),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Threads or processes here, or processes of --cluster. [default: as many as processors here]"
    ),
]
Scheduler = Annotated[str | None, typer.Option(metavar="ADDRESS", help="An existing Dask scheduler.")]
Cluster = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Cluster to make: slurm, kubernetes, ...; see docs/cluster.md."),
]
MemoryLimit = Annotated[str, typer.Option(help="Memory of each worker process.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no remarks; warnings and errors only.")]


def said(context: typer.Context) -> dict[str, Any]:
    """Arguments and options of the command that runs, by name, as what takes them wants them.

    Returns
    -------
    dict
        None for an option that was not given and has no default.

    Raises
    ------
    InputError
        Where one cannot be understood.
    """
    from natgrad.compute.clusters import memory_bytes
    from natgrad.sources.names import parse_map, parse_shift

    parsers: dict[str, Callable[[Any], Any]] = {
        "mapping": parse_map,
        "shift": parse_shift,
        "memory_limit": memory_bytes,
    }
    # An option that may be repeated, and was not given, is an empty list or tuple here.
    values = {name: None if value in ([], ()) else value for name, value in context.params.items()}
    return {
        name: value if value is None or name not in parsers else parsers[name](value)
        for name, value in values.items()
    }
