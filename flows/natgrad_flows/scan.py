"""Define the flow that scans a folder for changed runs and processes them.

Each run is processed in another process (`natgrad.app.worker`), and the flow records it on the server: as one flow
run, without tasks and artifacts. With them, each run would take a second of processor time and a quarter of a
megabyte, however small it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar, Unpack

import httpx
from prefect import State, flow, get_run_logger, tags
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
)
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, Running

from natgrad.app import declarations, options
from natgrad.app.folder import RunFolder
from natgrad.app.scan import Busy, FoundRun, Outcome, only_processor, process_in, process_once, scan_root
from natgrad.app.worker import Worker
from natgrad.storage import open_storage
from natgrad_flows.artifacts import alert, full_path, report_link, tag_of
from natgrad_flows.parameters import with_parameters
from natgrad_flows.runs import analyze_run, ingest_run, mark_crashed, process_run
from natgrad_flows.server import shorten_request_errors

__all__ = ["delete_history", "scan_runs"]

T = TypeVar("T")


def _flow_name() -> str:
    return f"scan-runs {full_path(flow_run.get_parameters()['root'])}"


@flow(
    name="scan-runs",
    flow_run_name=_flow_name,
    description="Look for training logs below the folder ROOT, and process each run that has changed since the "
    "last scan. A run that fails does not stop the others. The artifact of the flow run lists all runs that were "
    "processed, with errors and remedies.",
)
@with_parameters(options.ScanFlowOptions)
def scan_runs(root: options.Root, out: options.RunsFolder, **values: Unpack[options.ScanFlowOptions]) -> Any:
    """Process the runs below ROOT that changed since the last scan.

    A run that fails, hangs, crashes or exhausts memory does not stop the others; the table shows its error and
    remedy. It is processed again if its log or an option changes, or at every scan if the error may heal by itself.
    A run that another flow is working on is skipped. Unchanged runs are not opened.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.app.summaries.ScanSummary` in its JSON form.
    """
    shorten_request_errors()
    with get_client(sync_client=True) as client:
        records = _Records(client)
        if values["keep_days"] is not None:
            records.attempt(delete_history, client, timedelta(days=values["keep_days"]))
        links = declarations.selected(options.LinkOptions, values)
        summary = scan_root(root, out, values, partial(_process, records, links))
        rows = [asdict(one) for one in summary.runs if one.state != "unchanged"]
        with tags("natgrad"):
            records.attempt(
                create_table_artifact,
                table=rows or [{"run": "all", "state": "unchanged"}],
                key="scan",
                description=f"{summary.message} below {root}",
            )
    return Completed(message=summary.message, data=summary.to_json())


class _Records:
    """Record runs on the server. If it does not respond, the scan continues without it.

    Parameters
    ----------
    client : SyncPrefectClient
    """

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client, self.lost = client, False

    def attempt(self, call: Callable[..., T], *arguments: Any, **keywords: Any) -> T | None:
        """Make a request, unless an earlier one failed."""
        if self.lost:
            return None
        try:
            return call(*arguments, **keywords)
        except httpx.HTTPError as error:
            self.lost = True
            get_run_logger().warning(
                "the Prefect server does not respond (%s): the scan continues, but the server has no record of the "
                "following runs",
                error or type(error).__name__,
            )
            return None

    def start(self, found: FoundRun, values: dict[str, Any]) -> Callable[[State[Any]], None]:
        """Record that a run is being processed; return the function that records its end."""
        self.attempt(mark_crashed, self.client, open_storage(found.out))
        made = self.attempt(
            self.client.create_flow_run,
            process_run,
            name=f"process-run {full_path(found.out)}",
            parameters=json.loads(json.dumps({"source": found.source, "out": found.out, **values}, default=str)),
            tags=["natgrad", tag_of(found.out)],
            state=Running(),
        )

        def end(state: State[Any]) -> None:
            if made is not None:
                self.attempt(self.client.set_flow_run_state, made.id, state, force=True)

        return end


def _process(
    records: _Records,
    links: dict[str, Any],
    found: FoundRun,
    known: Outcome | None,
    values: dict[str, Any],
    worker: Worker,
) -> dict[str, Any]:
    """Process a run in a worker, and record it as a flow run.

    The end is recorded before the lock of the run is released: a flow run that is still running while another
    process has the lock has died.
    """

    def work() -> dict[str, Any]:
        end = records.start(found, values)
        try:
            summary = process_in(worker, found, values)
        except Exception as error:
            end(Failed(message=str(error)))
            raise
        report = report_link(found.out, links["report_url"]) or RunFolder.of(found.out).report
        alert(found.out, summary, links["alert_angle"])
        end(Completed(message=f"{summary['new_steps']} new steps, {summary['updates']} updates; report: {report}"))
        return summary

    with only_processor(found.out):
        try:
            return process_once(found.source, found.out, values, work, known=known)
        except Busy:
            raise
        except Exception as error:
            get_run_logger().error("%s failed: %s", found.name, error)
            raise


def delete_history(client: SyncPrefectClient, age: timedelta) -> int:
    """Delete the flow runs of natgrad that ended before some time, with their artifacts; return their number."""
    flows = [one.name for one in (scan_runs, process_run, ingest_run, analyze_run)]
    named = FlowFilter(name=FlowFilterName(any_=flows))
    before = FlowRunFilterEndTime.model_validate({"before_": datetime.now(UTC) - age})
    ended = FlowRunFilter(end_time=before)
    deleted = 0
    # The server returns a page of them at a time.
    while found := client.read_flow_runs(flow_filter=named, flow_run_filter=ended):
        made_by = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[one.id for one in found]))
        while artifacts := client.read_artifacts(artifact_filter=made_by):
            for artifact in artifacts:
                _delete(client.delete_artifact, artifact.id)
        for one in found:
            _delete(client.delete_flow_run, one.id)
        deleted += len(found)
    return deleted


def _delete(call: Callable[[Any], None], identifier: Any) -> None:
    with suppress(ObjectNotFound):  # another scan is also deleting flow runs
        call(identifier)
