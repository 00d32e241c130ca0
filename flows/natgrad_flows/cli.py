"""Define the command ``natgrad``: `natgrad.app.cli`, and commands that import Prefect when they run."""

from __future__ import annotations

import os
from typing import Any

import typer

from natgrad.app import options
from natgrad.app.cli import Output, app, command_options, interruptible, main, program

__all__ = ["app", "main", "program"]


@app.command()
@command_options(options.ScanFlowOptions)
def scan(
    root: options.Root,
    out: options.RunsFolder,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Process all runs below ROOT that changed since the last scan. Exits with 1 if a run failed."""
    output = Output(as_json, quiet)
    # The flow also checks the folders. This check runs before Prefect and its server are started.
    from natgrad.app.scan import check_folders

    check_folders(root, out, values["store"])
    if quiet:
        os.environ.setdefault("PREFECT_LOGGING_LEVEL", "WARNING")
    from natgrad_flows.scan import scan_runs
    from natgrad_flows.server import server_errors, use_server

    with interruptible(), server_errors():
        use_server()
        summary = scan_runs(root, out, **values)
    output.show(summary)
    if summary["failed"]:
        raise typer.Exit(1)


@app.command()
@command_options(options.ScheduledScanOptions)
def serve(
    root: options.Root,
    out: options.RunsFolder,
    limit: options.Limit = 1,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Serve the flows to a Prefect server: scan ROOT on a schedule until this process ends."""
    Output(as_json=False, quiet=quiet)
    from natgrad_flows.deployments import serve_flows

    serve_flows(root, out, values, limit=limit)


@app.command()
@command_options(options.ScheduledScanOptions)
def deploy(
    root: options.Root,
    out: options.RunsFolder,
    pool: options.Pool,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    **values: Any,
) -> None:
    """Deploy the flows to a work pool of a Prefect server, on a schedule."""
    output = Output(as_json, quiet)
    from natgrad_flows.deployments import deploy_flows

    made = deploy_flows(root, out, values, pool=pool)
    output.show({"pool": pool, "deployments": made})


if __name__ == "__main__":
    program()
