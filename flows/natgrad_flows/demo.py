"""The demonstration as flows: the experiments of the paper, logged, processed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from prefect import flow

from natgrad.app import run
from natgrad.app.folder import RunFolder
from natgrad.compute.clusters import local_scheduler
from natgrad.experiments.demo import WINDOW, write_demo_logs
from natgrad_flows.runs import process_run

__all__ = ["demo"]


@flow(name="demo")
def demo(out: Path = Path("demo"), workers: int = 2) -> dict[str, Any]:
    """Log the experiments, process every log on one local Dask cluster, and draw all on one page.

    Parameters
    ----------
    out : Path
        Folder for logs, runs and the page.
    workers : int
        Dask worker processes.
    """
    runs = {}
    with local_scheduler(workers, run.MEMORY_LIMIT) as scheduler:
        for name, log in write_demo_logs(out / "logs").items():
            runs[name] = out / "runs" / name
            process_run(log, runs[name], windows=[WINDOW], scheduler=scheduler)
    results = {name: str(RunFolder.of(path).results) for name, path in runs.items()}
    return {"results": results, **run.report_run(runs, out / "report.html")}


def main(
    out: Annotated[Path, typer.Argument(help="Folder for logs, runs and the page.")] = Path("demo"),
    workers: Annotated[int, typer.Option(help="Dask worker processes.")] = 2,
) -> None:
    """Run the demonstration and print where its results are."""
    answer = demo(out, workers)
    for name, path in answer["results"].items():
        typer.echo(f"results of {name}: {path}")
    typer.echo(f"report: {answer['report']}")


if __name__ == "__main__":
    typer.run(main)
