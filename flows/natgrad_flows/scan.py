"""Define the flow that scans a folder for changed runs and processes each run as a flow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from prefect import flow, get_run_logger, tags
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed

from natgrad.app import options
from natgrad.app.scan import Busy, FoundRun, Outcome, scan_root
from natgrad_flows.parameters import with_parameters
from natgrad_flows.runs import SCANNED, process_run

__all__ = ["scan_runs"]


def _flow_name() -> str:
    return f"scan-runs {Path(flow_run.get_parameters()['root']).name}"


@flow(name="scan-runs", flow_run_name=_flow_name)
@with_parameters(options.ScanOptions)
def scan_runs(root: options.Root, out: options.RunsFolder, **values: Unpack[options.ScanOptions]) -> Any:
    """Process the runs below ROOT that changed since the last scan.

    A run that fails does not stop the others; the table shows its error and remedy. It is processed again if its
    log or an option changes, or at every scan if the error may heal by itself. A run that another flow is working
    on is skipped. Unchanged runs are not opened.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.app.summaries.ScanSummary` in its JSON form.
    """
    with tags("natgrad"):
        summary = scan_root(root, out, values, _process)
    rows = [asdict(one) for one in summary.runs if one.state != "unchanged"]
    create_table_artifact(
        table=rows or [{"run": "all", "state": "unchanged"}],
        key="scan",
        description=f"{summary.message} below {root}",
    )
    return Completed(message=summary.message, data=summary.to_json())


def _process(found: FoundRun, known: Outcome | None, values: dict[str, Any]) -> dict[str, Any]:
    """Process a run as a flow."""
    SCANNED.set(known)
    try:
        # The flow ends with this one, which has a heartbeat. A separate heartbeat would take up to a second.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            summary: dict[str, Any] = process_run(found.source, found.out, **values)
    except Exception as error:
        get_run_logger().error("%s failed: %s", found.name, error)
        raise
    if "skipped" in summary:
        raise Busy(summary["skipped"])
    return summary
