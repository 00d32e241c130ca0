"""The command ``natgrad``: `natgrad.app.cli` and the commands that need Prefect, which import it on demand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from natgrad.app import cli, options
from natgrad.app.cli import app, main

__all__ = ["app", "main"]

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder below which runs are logged.")]
Outs = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of what is made of them, a folder each.")]
Cron = Annotated[str | None, typer.Option(help="When to look for news, '*/10 * * * *' for example.")]
Every = Annotated[float | None, typer.Option(metavar="SECONDS", help="Time between two looks, in place of --cron.")]
Name = Annotated[str, typer.Option(help="Of the deployments; one for each ROOT that a server knows.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Runs in work at a time.")]


def _parameters(context: typer.Context) -> dict[str, Any]:
    """Parameters of `natgrad_flows.scan.watch_runs` that a command was given; ROOT and OUT are its own."""
    from natgrad_flows.scan import watch_runs

    said = options.said(context)
    return {name: said[name] for name in watch_runs.parameters.properties if name not in ("root", "out")}


@app.command()
def watch(
    context: typer.Context,
    root: Root,
    out: Outs,
    format: options.Format = None,
    allow_gaps: options.AllowGaps = False,
    learning_rate: options.LearningRate = None,
    gammas: options.Gammas = None,
    windows: options.Windows = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    cluster: options.Cluster = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    at_once: AtOnce = 1,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    include: options.Include = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Look once for runs below ROOT that have news, and process them."""
    from natgrad_flows.deployments import require_valid
    from natgrad_flows.scan import watch_runs

    parameters = _parameters(context)
    require_valid({"root": root, "out": out, **parameters})
    answer = watch_runs(root, out, **parameters)
    cli.show(answer, as_json, quiet)
    if answer["failed"]:
        raise typer.Exit(1)


@app.command()
def serve(
    context: typer.Context,
    root: Root,
    out: Outs,
    cron: Cron = None,
    every: Every = None,
    name: Name = "natgrad",
    limit: Annotated[int, typer.Option(min=1, help="Flows in work at a time.")] = 1,
    format: options.Format = None,
    allow_gaps: options.AllowGaps = False,
    learning_rate: options.LearningRate = None,
    gammas: options.Gammas = None,
    windows: options.Windows = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    cluster: options.Cluster = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    at_once: AtOnce = 1,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    include: options.Include = None,
) -> None:
    """Serve the flows of a Prefect server: look for news on a schedule, until this process ends."""
    from natgrad_flows.deployments import serve_flows

    parameters = _parameters(context)
    serve_flows(root, out, limit=limit, name=name, cron=cron, every=every, parameters=parameters)


@app.command()
def deploy(
    context: typer.Context,
    root: Root,
    out: Outs,
    pool: Annotated[str, typer.Option(help="Work pool whose workers run the flows.")],
    cron: Cron = None,
    every: Every = None,
    name: Name = "natgrad",
    format: options.Format = None,
    allow_gaps: options.AllowGaps = False,
    learning_rate: options.LearningRate = None,
    gammas: options.Gammas = None,
    windows: options.Windows = None,
    workers: options.Workers = None,
    scheduler: options.Scheduler = None,
    cluster: options.Cluster = None,
    memory_limit: options.MemoryLimit = options.MEMORY_LIMIT,
    at_once: AtOnce = 1,
    mapping: options.Mapping = None,
    shift: options.Shift = None,
    include: options.Include = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Give the flows to a work pool of a Prefect server, on a schedule."""
    from natgrad_flows.deployments import deploy_flows

    parameters = _parameters(context)
    made = deploy_flows(root, out, pool=pool, name=name, cron=cron, every=every, parameters=parameters)
    cli.show({"pool": pool, "deployments": made}, as_json, quiet)


if __name__ == "__main__":
    main()
