"""Define the command ``natgrad``: `natgrad.app.cli`, and commands that import Prefect when they run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from natgrad.app import options
from natgrad.app.cli import Json, Output, Quiet, app, command_options, main

__all__ = ["app", "main"]

Root = Annotated[Path, typer.Argument(metavar="ROOT", help=options.ROOT)]
RunsFolder = Annotated[Path, typer.Argument(metavar="OUT", help=options.RUNS)]


class ScheduledScanOptions(options.ScheduleOptions, options.ScanOptions, total=False):
    """Options of a scan on a schedule."""


@app.command()
@command_options(options.ScanOptions)
def scan(root: Root, out: RunsFolder, as_json: Json = False, quiet: Quiet = False, **values: Any) -> None:
    """Process all runs below ROOT that changed since the last scan. Exits with 1 if a run failed."""
    checked = options.validated(options.ScanOptions, values)
    output = Output(as_json, quiet)
    # Prefect, and its server, are started only if the options and the folders are valid.
    from natgrad.app.scan import check_folders

    check_folders(root, out, checked["store"])
    if quiet:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    from natgrad_flows.scan import scan_runs

    summary = scan_runs(root, out, **checked)
    output.show(summary)
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
@command_options(ScheduledScanOptions)
def serve(
    root: Root,
    out: RunsFolder,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Number of flows that run at the same time.")] = 1,
    quiet: Quiet = False,
    **values: Any,
) -> None:
    """Serve the flows to a Prefect server: scan ROOT on a schedule until this process ends."""
    Output(as_json=False, quiet=quiet)
    options.validated(ScheduledScanOptions, values)
    from natgrad_flows.deployments import serve_flows

    serve_flows(root, out, values, limit=limit)


@app.command()
@command_options(ScheduledScanOptions)
def deploy(
    root: Root,
    out: RunsFolder,
    pool: Annotated[str, typer.Option(metavar="NAME", help="Work pool whose workers run the flows.")],
    as_json: Json = False,
    quiet: Quiet = False,
    **values: Any,
) -> None:
    """Deploy the flows to a work pool of a Prefect server, on a schedule."""
    output = Output(as_json, quiet)
    options.validated(ScheduledScanOptions, values)
    from natgrad_flows.deployments import deploy_flows

    made = deploy_flows(root, out, values, pool=pool)
    output.show({"pool": pool, "deployments": made})


if __name__ == "__main__":
    main()
