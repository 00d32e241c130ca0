"""Define the flows of a run, which call `natgrad.app.stages` in a separate process.

The process has a time limit, so a run that hangs does not occupy a slot of `natgrad serve` forever. Each stage is
one task. A task can run twice, because Prefect delivers at least once. Ingest and analysis keep
finished work, so the second run is cheap and changes nothing. The parameters are the options of
`natgrad.app.options`.

The flows have no option ``follow``, because a schedule repeats them (`natgrad serve`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, Unpack
from uuid import UUID

import psutil
from prefect import State, Task, flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType, TaskRun
from prefect.context import TagsContext
from prefect.runtime import flow_run, task_run
from prefect.states import Completed, Crashed

from natgrad.app import declarations, options
from natgrad.app.run import Analysis
from natgrad.app.scan import Busy, Outcome, error_parts, only_processor, process_once
from natgrad.app.stages import analyze_stage, ingest_stage, replay_stage, report_stage
from natgrad.app.worker import ProcessLost, Worker
from natgrad.sources.steps import NotYet
from natgrad.storage import Storage, open_storage
from natgrad_flows.artifacts import (
    StageProgressArtifacts,
    alert,
    full_path,
    show_failure,
    show_results,
    show_table,
    tag_of,
)
from natgrad_flows.parameters import with_parameters

__all__ = ["analyze_run", "ingest_run", "mark_crashed", "process_run", "replay_run"]


class IngestParameters(options.ReadOptions, options.OverwriteOptions, options.ProcessLimits, total=False):
    """Options of `ingest_run`."""


class AnalyzeParameters(options.AnalyzeOptions, options.LinkOptions, options.ProcessLimits, total=False):
    """Options of `analyze_run`."""


class ProcessParameters(
    options.RunOptions, options.OverwriteOptions, options.LinkOptions, options.ProcessLimits, total=False
):
    """Options of `process_run`."""


class ReplayParameters(options.ReplayOptions, options.LinkOptions, options.ProcessLimits, total=False):
    """Options of `replay_run`."""


class _IngestedWith(options.ReadOptions, options.OverwriteOptions, total=False):
    """Options of `natgrad.app.run.ingest_run`."""


# Descriptions of the flows for people who start them from a form.

INGEST = (
    "Read the new steps of one training log and store them in the folder OUT. Steps that are stored already are "
    "not read again. Start this flow if results are computed later, for example on another machine."
)

ANALYZE = (
    "Compute the results and the report of a run whose steps are stored in the folder OUT. Only what is missing is "
    "computed. Start this flow to compute results with other options."
)

REPLAY = (
    "Evaluate an objective at the checkpoints of a training log that contains no gradients, and then compute the "
    "results and the report of the run."
)

PROCESS = (
    "Process one training run: read the new steps of its log, and compute the results and the report in the folder "
    "OUT. Start it again when the log has grown: only new steps are processed. A run that another flow is "
    "processing is skipped."
)

_STALLED = (
    "check that the log can be read; raise stall_timeout if its steps take long. Finished work is kept, and the "
    "flow can be run again"
)


def _can_heal(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Return True if a retry may succeed soon.

    A retry cannot succeed after invalid input, or if a step is not logged yet. A call that hung is not repeated,
    because this would take the time limit again.
    """
    try:
        state.result()
    except (NotYet, ProcessLost):
        return False
    except Exception as error:
        return bool(error_parts(error)["heals"])
    return False


def _flow_name() -> str:
    return f"{flow_run.get_flow_name()} {full_path(flow_run.get_parameters()['out'])}"


def _task_name() -> str:
    return f"{task_run.get_task_name()} {full_path(task_run.get_parameters()['out'])}"


_RETRY: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [1, 10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _can_heal,
    "task_run_name": _task_name,
    "cache_policy": NO_CACHE,
}


def _worker(values: Mapping[str, Any]) -> Worker:
    """Return the process of a run: if it hangs, crashes or exhausts memory, the flow run fails in time."""
    memory = values["process_memory"] or psutil.virtual_memory().total
    return Worker(values["stall_timeout"], memory, stalled=_STALLED, again="the flow can be run again")


@task(name="ingest", **_RETRY)
def _ingest(
    source: options.Source, out: options.Out, values: Mapping[str, Any], analysis: Analysis | None, worker: Worker
) -> dict[str, Any]:
    return _called(worker, out, ingest_stage, source, out, declarations.selected(_IngestedWith, values), analysis)


@task(name="analyze", **_RETRY)
def _analyze(out: options.Out, analysis: Analysis, worker: Worker) -> dict[str, Any]:
    return _called(worker, out, analyze_stage, out, analysis)


@task(name="replay", **_RETRY)
def _replay(source: options.Source, out: options.Out, values: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    return _called(worker, out, replay_stage, source, out, declarations.selected(options.ReplayOptions, values))


@task(name="report", **_RETRY)
def _report(out: options.Out, worker: Worker) -> dict[str, Any]:
    return _called(worker, out, report_stage, out)


def _called(
    worker: Worker, out: options.Out, function: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """Call a stage in the process of a run, and show its progress."""
    summary: dict[str, Any] = worker.call(
        function, *arguments, where=str(out), progress=StageProgressArtifacts(out)
    )
    return summary


@flow(name="ingest-run", flow_run_name=_flow_name, description=INGEST)
@with_parameters(IngestParameters)
def ingest_run(source: options.Source, out: options.Out, **values: Unpack[IngestParameters]) -> dict[str, Any]:
    """Read the new steps of a log into the trajectory of OUT.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.ingestion.IngestSummary` in its JSON form.
    """
    with closing(_worker(values)) as worker:
        return _ingested(source, out, values, None, worker)


def _ingested(
    source: options.Source, out: options.Out, values: Mapping[str, Any], analysis: Analysis | None, worker: Worker
) -> dict[str, Any]:
    summary = _ingest(source, out, values, analysis, worker)
    show_table("ingested", out, summary)
    return summary


@flow(name="analyze-run", flow_run_name=_flow_name, description=ANALYZE)
@with_parameters(AnalyzeParameters)
def analyze_run(out: options.Out, **values: Unpack[AnalyzeParameters]) -> dict[str, Any]:
    """Compute the missing part of the ledger of OUT, the results and the report.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.app.summaries.AnalysisSummary` in its JSON form, and the report.
    """
    with closing(_worker(values)) as worker:
        return _analyzed(out, Analysis.of(values), values, worker)


@flow(name="replay-run", flow_run_name=_flow_name, description=REPLAY)
@with_parameters(ReplayParameters)
def replay_run(source: options.Source, out: options.Out, **values: Unpack[ReplayParameters]) -> dict[str, Any]:
    """Evaluate an objective at the states of a log without gradients, and process the run.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.app.summaries.ReplaySummary` in its JSON form.
    """
    with closing(_worker(values)) as worker:
        return _shown(out, _replay(source, out, values, worker), "replayed", values)


def _analyzed(out: options.Out, analysis: Analysis, values: Mapping[str, Any], worker: Worker) -> dict[str, Any]:
    return _shown(out, _analyze(out, analysis, worker) | _report(out, worker), "analyzed", values)


def _shown(out: options.Out, summary: dict[str, Any], what: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Create the artifacts of results, send an event if their angle is large, and return their summary."""
    show_results(what, out, summary, values["report_url"])
    alert(out, summary, values["alert_angle"])
    return summary


@flow(name="process-run", flow_run_name=_flow_name, description=PROCESS)
@with_parameters(ProcessParameters)
def process_run(source: options.Source, out: options.Out, **values: Unpack[ProcessParameters]) -> Any:
    """Ingest, analyze and report a run, and record the outcome in OUT.

    If another flow is working on this OUT, the flow run ends immediately in the state ``Skipped``. If the process
    of an earlier flow run died, that flow run is marked as crashed, and this one continues its work.

    Parameters
    ----------
    **options

    Returns
    -------
    dict
        `natgrad.app.summaries.ProcessSummary` in its JSON form, or ``skipped`` with the reason.
    """
    analysis = Analysis.of(values)
    try:
        # For each tag of a task, Prefect requests a concurrency slot from the server. SQLite takes seconds to
        # respond while another request writes. Therefore the flow has the tags, and its tasks have none.
        with (
            only_processor(out),
            TagsContext(current_tags=set()),
            get_client(sync_client=True) as client,
            closing(_worker(values)) as worker,
        ):
            own = UUID(flow_run.get_id())
            client.update_flow_run(own, tags={*flow_run.get_tags(), tag_of(out)})

            def work() -> dict[str, Any]:
                # A flow that has just processed the run may not have reported its end yet, although it did not die.
                # In that case the run is up to date, and this function is not called.
                mark_crashed(client, open_storage(out), own=own)
                return _ingested(source, out, values, analysis, worker) | _analyzed(out, analysis, values, worker)

            return process_once(
                source,
                out,
                values,
                work,
                known=Outcome.of(out),
                on_failure=lambda parts: show_failure(out, parts),
            )
    except Busy as busy:
        get_run_logger().warning("skipping %s: %s", out, busy.what)
        return Completed(name="Skipped", message=str(busy), data={"skipped": busy.what})


def mark_crashed(client: SyncPrefectClient, out: Storage, own: UUID | None = None) -> None:
    """Mark flow runs on OUT that the server lists as running as crashed.

    The caller has locked OUT, so these flow runs died.

    Parameters
    ----------
    client : SyncPrefectClient
    out : Storage
    own : UUID, optional
        The flow run of the caller.
    """
    running = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    )
    named = FlowFilter(name=FlowFilterName(any_=["process-run"]))
    for other in client.read_flow_runs(flow_filter=named, flow_run_filter=running):
        if other.id == own or open_storage(other.parameters.get("out", "")).absolute() != out.absolute():
            continue
        message = f"The process died. {flow_run.get_name()} continues the work."
        client.set_flow_run_state(other.id, Crashed(message=message), force=True)
        get_run_logger().warning("%s: %s", other.name, message)
