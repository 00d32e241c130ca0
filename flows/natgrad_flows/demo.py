"""The demonstration as flows: the experiments of the paper, logged, processed and drawn."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from prefect import flow

from natgrad.app import run
from natgrad.app.folder import RunFolder
from natgrad.compute.clusters import local_scheduler
from natgrad.experiments.demo import WINDOW, write_demo_logs
from natgrad_flows.runs import process_run

__all__ = ["demo"]

_log = logging.getLogger(__name__)


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
    _log.info("starting %d Dask workers", workers)
    with local_scheduler(workers, run.MEMORY_LIMIT) as scheduler:
        for name, log in write_demo_logs(out / "logs").items():
            runs[name] = out / "runs" / name
            _log.info("processing %s in a Prefect flow", name)
            process_run(log, runs[name], windows=[WINDOW], scheduler=scheduler)
    results = {name: str(RunFolder(path).results) for name, path in runs.items()}
    return {"results": results, **run.report_run(runs, out / "report.html")}
