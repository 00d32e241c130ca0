"""Run the demonstration as flows: log, process and report the experiments of the paper."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack

from prefect import flow

from natgrad.app import options, run
from natgrad.app.folder import RunFolder
from natgrad.compute.clusters import local_scheduler
from natgrad.experiments.demo import WINDOW, write_demo_logs
from natgrad_flows.parameters import Out, with_parameters
from natgrad_flows.runs import process_run

__all__ = ["DemoOptions", "demo"]

WORKERS = 2


class DemoOptions(TypedDict, total=False):
    """Options of the demonstration."""

    workers: Annotated[int, options.Option("Number of Dask worker processes.", WORKERS, metavar="N", minimum=1)]


_log = logging.getLogger(__name__)


@flow(name="demo")
@with_parameters(DemoOptions)
def demo(out: Out = Path("demo"), **values: Unpack[DemoOptions]) -> dict[str, Any]:
    """Log the experiments, process every log on one local Dask cluster, and write one report of all.

    Parameters
    ----------
    out : path
        Folder for the logs, the runs and the report.
    **options
    """
    checked = options.validated(DemoOptions, values)
    out, runs = Path(out), {}
    _log.info("starting %d Dask workers", checked["workers"])
    with local_scheduler(checked["workers"], run.Analysis().memory_limit) as scheduler:
        for name, log in write_demo_logs(out / "logs").items():
            runs[name] = out / "runs" / name
            _log.info("processing %s in a Prefect flow", name)
            process_run(log, runs[name], windows=[WINDOW], scheduler=scheduler)
    results = {name: str(RunFolder.of(path).results) for name, path in runs.items()}
    return {"results": results, **run.report_run(runs, out / "report.html").to_json()}
