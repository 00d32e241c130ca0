"""The command `natgrad`: that of `pipeline.cli`, and what needs Prefect. Prefect is imported by what needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import cli
from pipeline.cli import (
    AllowGaps,
    Cluster,
    FormatName,
    Gamma,
    Include,
    Json,
    LearningRate,
    Map,
    MemoryLimit,
    Quiet,
    Scheduler,
    Shift,
    Window,
    Workers,
    app,
    main,
)

__all__ = ["app", "main"]

Root = Annotated[Path, typer.Argument(metavar="ROOT", help="Folder below which runs are logged.")]
Outs = Annotated[Path, typer.Argument(metavar="OUT", help="Folder of what is made of them, a folder each.")]
Cron = Annotated[str | None, typer.Option(help="When to look for news, '*/10 * * * *' for example.")]
Every = Annotated[float | None, typer.Option(metavar="SECONDS", help="Time between two looks, in place of --cron.")]
Name = Annotated[str, typer.Option(help="Of the deployments; one for each ROOT that a server knows.")]
AtOnce = Annotated[int, typer.Option(min=1, help="Runs in work at a time.")]


def _parameters(
    format: str | None,
    allow_gaps: bool,
    learning_rate: float | None,
    gamma: list[float] | None,
    window: list[int] | None,
    workers: int | None,
    scheduler: str | None,
    cluster: str | None,
    memory_limit: str,
    at_once: int,
    map_: list[str] | None,
    shift: list[str] | None,
    include: list[str] | None,
) -> dict[str, Any]:
    from pipeline.clusters import memory_bytes
    from pipeline.sources.names import parse_map, parse_shift

    return {
        "format": format,
        "allow_gaps": allow_gaps,
        "learning_rate": learning_rate,
        "gammas": gamma,
        "windows": window,
        "workers": workers,
        "scheduler": scheduler,
        "cluster": cluster,
        "memory_limit": memory_bytes(memory_limit),
        "at_once": at_once,
        "mapping": parse_map(map_ or []) or None,
        "shift": parse_shift(shift or []) or None,
        "include": include or None,
    }


@app.command()
def watch(
    root: Root,
    out: Outs,
    format: FormatName = None,
    allow_gaps: AllowGaps = False,
    learning_rate: LearningRate = None,
    gamma: Gamma = None,
    window: Window = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = "512MiB",
    at_once: AtOnce = 1,
    map_: Map = None,
    shift: Shift = None,
    include: Include = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look once for runs below ROOT that have news, and process them."""
    from flows.deployments import require_valid
    from flows.watch import watch_runs

    parameters = _parameters(
        format,
        allow_gaps,
        learning_rate,
        gamma,
        window,
        workers,
        scheduler,
        cluster,
        memory_limit,
        at_once,
        map_,
        shift,
        include,
    )
    require_valid({"root": root, "out": out, **parameters})
    answer = watch_runs(root, out, **parameters)
    cli.show(answer, as_json, quiet)
    if answer["failed"]:
        raise typer.Exit(1)


@app.command()
def serve(
    root: Root,
    out: Outs,
    cron: Cron = None,
    every: Every = None,
    name: Name = "natgrad",
    limit: Annotated[int, typer.Option(min=1, help="Flows in work at a time.")] = 1,
    format: FormatName = None,
    allow_gaps: AllowGaps = False,
    learning_rate: LearningRate = None,
    gamma: Gamma = None,
    window: Window = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = "512MiB",
    at_once: AtOnce = 1,
    map_: Map = None,
    shift: Shift = None,
    include: Include = None,
) -> None:
    """Serve the flows of a Prefect server: look for news on a schedule, until this process ends."""
    from flows.deployments import serve_flows

    parameters = _parameters(
        format,
        allow_gaps,
        learning_rate,
        gamma,
        window,
        workers,
        scheduler,
        cluster,
        memory_limit,
        at_once,
        map_,
        shift,
        include,
    )
    serve_flows(root, out, limit=limit, name=name, cron=cron, every=every, parameters=parameters)


@app.command()
def deploy(
    root: Root,
    out: Outs,
    pool: Annotated[str, typer.Option(help="Work pool whose workers run the flows.")],
    cron: Cron = None,
    every: Every = None,
    name: Name = "natgrad",
    format: FormatName = None,
    allow_gaps: AllowGaps = False,
    learning_rate: LearningRate = None,
    gamma: Gamma = None,
    window: Window = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    cluster: Cluster = None,
    memory_limit: MemoryLimit = "512MiB",
    at_once: AtOnce = 1,
    map_: Map = None,
    shift: Shift = None,
    include: Include = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give the flows to a work pool of a Prefect server, on a schedule."""
    from flows.deployments import deploy_flows

    parameters = _parameters(
        format,
        allow_gaps,
        learning_rate,
        gamma,
        window,
        workers,
        scheduler,
        cluster,
        memory_limit,
        at_once,
        map_,
        shift,
        include,
    )
    made = deploy_flows(root, out, pool=pool, name=name, cron=cron, every=every, parameters=parameters)
    cli.show({"pool": pool, "deployments": made}, as_json, quiet)


if __name__ == "__main__":
    main()
