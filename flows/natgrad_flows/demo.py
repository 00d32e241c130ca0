"""Run the demonstration as flows: log, process and report the experiments of the paper."""

from __future__ import annotations

from typing import Any, Unpack

from prefect import flow

from natgrad.app import options, run
from natgrad.app.folder import RunFolder
from natgrad.compute.clusters import local_scheduler
from natgrad.experiments.demo import WINDOW, write_demo_logs
from natgrad.schema.logs import logger
from natgrad.storage import require_local
from natgrad_flows.parameters import with_parameters
from natgrad_flows.runs import process_run

__all__ = ["demo"]

_log = logger(__name__)


@flow(
    name="demo",
    description="Log the experiments of the paper, process the logs, and write one report into the folder OUT.",
)
@with_parameters(options.DemoOptions)
def demo(out: options.DemoOut = "demo", **values: Unpack[options.DemoOptions]) -> dict[str, Any]:
    """Log the experiments, process every log on one local Dask cluster, and write one report of all.

    Parameters
    ----------
    **options
    """
    folder, runs = require_local(out, "OUT"), {}
    _log.info("starting %d Dask workers", values["workers"])
    with local_scheduler(values["workers"], run.Analysis().memory_limit) as scheduler:
        for name, log in write_demo_logs(folder / "logs").items():
            runs[name] = folder / "runs" / name
            _log.info("processing %s in a Prefect flow", name)
            process_run(log, runs[name], windows=[WINDOW], scheduler=scheduler)
    results = {name: str(RunFolder.of(path).results) for name, path in runs.items()}
    return {"results": results, **run.report_run(runs, folder / "report.html").to_json()}
