"""The flows of a run: thin faces of `natgrad.app.run`.

Each does its work in one task. A task can run twice (Prefect delivers at least once): ingest and analysis keep
what is finished, so the second time costs little and changes nothing. What a flow was asked for goes to them by
name, as Prefect tells it, defaults included: the signatures of the flows are the one list of it.
"""

from __future__ import annotations

import re
import time
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import State, Task, flow, get_run_logger, task
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
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
from pydantic import Field

from natgrad.app import run
from natgrad.app import scan as watch
from natgrad.app.folder import RunFolder
from natgrad.app.run import MEMORY_LIMIT, Analysis
from natgrad.ingestion import INCLUDES
from natgrad.sources.names import OF_A_STATE, QUANTITIES
from natgrad.sources.steps import NotYet
from natgrad.storage import KINDS, Storage, network_errors, open_all, open_storage

__all__ = ["analyze_run", "ingest_run", "process_run"]

PROGRESS_SECONDS = 5.0
"""Time between two changes of a progress artifact; what is done sooner has none."""

LOOKED: ContextVar[watch.Outcome | None] = ContextVar("LOOKED")
"""What a look found in OUT before it started a flow: where it stands otherwise, another one was faster."""

# Values that a server can refuse before a run is started.
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Key = Annotated[str, Field(min_length=1)]
Sources = Path | Annotated[list[Path], Field(min_length=1)]
Map = dict[Literal[*QUANTITIES, "run"], Key]
Shift = dict[Literal[*OF_A_STATE], int]
Include = list[Literal[*INCLUDES]]
Store = Literal[*KINDS]


def _can_heal(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Bad input stays bad; a lost worker or a busy disk may not. Steps still to come are for the next run."""
    try:
        state.result()
    except NotYet:
        return False
    except Exception as error:
        return bool(watch.error_parts(error)["heals"])
    return False


def _flow_name() -> str:
    return f"{flow_run.get_flow_name()} {Path(flow_run.get_parameters()['out']).name}"


def _task_name() -> str:
    return f"{task_run.get_task_name()} {Path(task_run.get_parameters()['out']).name}"


class _Progress:
    """A progress artifact of what takes longer.

    Parameters
    ----------
    what : str
    out : Path
    """

    def __init__(self, what: str, out: Path) -> None:
        self.what, self.out = what, Path(out)
        self.artifact: UUID | None = None
        self.told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        ended = done == total and self.artifact is not None
        if not ended and time.monotonic() - self.told < PROGRESS_SECONDS:
            return
        self.told, percent = time.monotonic(), 100 * done / max(total, 1)
        if self.artifact is None:
            description = f"{self.out.name}: {self.what}, {total} in all"
            self.artifact = create_progress_artifact(percent, _key(self.what, self.out), description)
        else:
            update_progress_artifact(self.artifact, percent)


_RETRY: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [1, 10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _can_heal,
    "task_run_name": _task_name,
}


@task(name="ingest", **_RETRY)
def _ingest(source: Sources, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    return run.ingest_run(source, out, **options, progress=_Progress("steps-ingested", out))


@task(name="analyze", **_RETRY)
def _analyze(out: Path, options: Analysis) -> dict[str, Any]:
    return run.analyze_run(out, options, progress=_Progress("chunks-computed", out))


@task(name="report", **_RETRY)
def _report(out: Path) -> dict[str, Any]:
    return run.report_run([out])


@flow(name="ingest-run", flow_run_name=_flow_name)
def ingest_run(
    source: Sources,
    out: Path,
    format: str | None = None,
    allow_gaps: bool = False,
    mapping: Map | None = None,
    shift: Shift | None = None,
    include: Include | None = None,
    store: Store | None = None,
) -> dict[str, Any]:
    """Read the new steps of a log into OUT's trajectory.

    Parameters
    ----------
    source : Path or list of Path
        Folder of the log, or run file; or several logs of one run, which are joined by step.
    out : Path
        Folder of the run.
    format : str, optional
        Log format, found where not given.
    allow_gaps : bool
        Take steps that are not evenly spaced.
    mapping : dict, optional
        Quantity to the key that it stands under in the log.
    shift : dict, optional
        Quantity to K: what is logged of it at step s belongs to the state s + K.
    include : list of str, optional
        What to store beside, of `natgrad.ingestion.INCLUDES`.
    store : str, optional
        How a new OUT is stored: ``plain``, or ``icechunk`` in an object store.

    Returns
    -------
    dict
        What was read; see `natgrad.ingestion.IngestSummary`.
    """
    return _ingested(source, out, flow_run.get_parameters())


def _ingested(source: Sources, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    summary = _ingest(source, out, run.given(options, run.READING))
    _table("ingested", out, summary)
    return summary


@flow(name="analyze-run", flow_run_name=_flow_name)
def analyze_run(
    out: Path,
    learning_rate: Positive | None = None,
    gammas: list[Positive] | None = None,
    windows: list[Count] | None = None,
    workers: Count | None = None,
    scheduler: str | None = None,
    cluster: str | None = None,
    memory_limit: Count = MEMORY_LIMIT,
) -> dict[str, Any]:
    """Compute what is missing of OUT's ledger on Dask, its results, and its report.

    Parameters
    ----------
    out : Path
        Folder of the run.
    learning_rate, gammas, windows, workers, scheduler, cluster, memory_limit
        See `natgrad.app.run.Analysis`.

    Returns
    -------
    dict
        Paths, and the numbers of the whole model.
    """
    return _analyzed(out, flow_run.get_parameters())


def _analyzed(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    summary = _analyze(out, Analysis.of(options)) | _report(out)
    _table("analyzed", out, summary)
    create_image_artifact(
        run.draw_run(out), _key("angle", out), f"{Path(out).name}: angle between update and steepest descent"
    )
    create_link_artifact(
        link=_uri(RunFolder.of(out).report),
        link_text=f"Report of {Path(out).name}",
        key=_key("report", out),
        description=f"Figure 3 of the paper, drawn from {summary['results']}",
    )
    return summary


@flow(name="process-run", flow_run_name=_flow_name)
def process_run(
    source: Sources,
    out: Path,
    format: str | None = None,
    allow_gaps: bool = False,
    learning_rate: Positive | None = None,
    gammas: list[Positive] | None = None,
    windows: list[Count] | None = None,
    workers: Count | None = None,
    scheduler: str | None = None,
    cluster: str | None = None,
    memory_limit: Count = MEMORY_LIMIT,
    mapping: Map | None = None,
    shift: Shift | None = None,
    include: Include | None = None,
    store: Store | None = None,
) -> Any:
    """Ingest, analyze and report a run, and remember in OUT what came of it.

    Where another flow is at work on this OUT, it ends at once in the state ``Skipped``. Where the process of an
    earlier one died, that one is marked as crashed, and this one goes on where it stopped.

    Parameters
    ----------
    source, out, format, allow_gaps, mapping, shift, include, store
        As those of `ingest_run`.
    learning_rate, gammas, windows, workers, scheduler, cluster, memory_limit
        As those of `analyze_run`.

    Returns
    -------
    dict
        What both return, or ``skipped`` and why.
    """
    options = {
        name: value for name, value in flow_run.get_parameters().items() if name not in ("source", "out", "store")
    }
    try:
        # For each tag of a task the server is asked whether there is a place, and SQLite answers that only after
        # seconds while another request writes: the flow has the tags, its tasks have none.
        with watch.only_processor(out), TagsContext(current_tags=set()):
            with get_client(sync_client=True) as client:
                client.update_flow_run(flow_run.get_id(), tags={*flow_run.get_tags(), f"run:{Path(out).name}"})
                _end_the_dead(client, open_storage(out))
            log, *others = open_all(source)
            with network_errors(log):
                listed = watch.listing(log) if log.local_path is None or log.is_folder() else ""
            _require_undone(Path(out), listed, options)
            try:
                ingested = _ingested(source, out, {**options, "store": store})
                summary = ingested | _analyzed(out, options)
            except Exception as error:
                parts = watch.error_parts(error)
                watch.Outcome(str(log), listed, options, error=parts, others=list(map(str, others))).remember(out)
                _tell_failure(Path(out), parts)
                raise
            watch.Outcome(str(log), listed, options, summary, others=list(map(str, others))).remember(out)
            return summary
    except watch.Held as held:
        get_run_logger().warning("%s is skipped: %s", out, held.what)
        return Completed(name="Skipped", message=str(held), data={"skipped": held.what})


def _require_undone(out: Path, listed: str, options: dict[str, Any]) -> None:
    """Refuse to do again what another process did since a look found it undone (`watch.Held`)."""
    outcome = watch.Outcome.of(out)
    if outcome is not None and outcome != LOOKED.get(outcome) and outcome.stands(listed, options, out):
        raise watch.Held(
            "another process has done this run meanwhile",
            where=str(out),
            why="two watchers found it",
            remedy="nothing: the next scan takes what is new then",
        )


def _end_the_dead(client: SyncPrefectClient, out: Storage) -> None:
    """Mark flows as crashed that are said to work on OUT, though none can: the lock is ours."""
    running = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING]))
    )
    named = FlowFilter(name=FlowFilterName(any_=["process-run"]))
    for other in client.read_flow_runs(flow_filter=named, flow_run_filter=running):
        ours = str(other.id) == flow_run.get_id()
        if ours or open_storage(other.parameters.get("out", "")).absolute() != out.absolute():
            continue
        message = f"Its process died. {flow_run.get_name()} goes on where it stopped."
        client.set_flow_run_state(other.id, Crashed(message=message), force=True)
        get_run_logger().warning("%s: %s", other.name, message)


def _tell_failure(out: Path, parts: dict[str, Any]) -> None:
    lines = [f"**{out.name}**: {parts['what']}"]
    lines += [f"- {name}: {parts[name]}" for name in ("where", "why", "do") if parts[name]]
    create_markdown_artifact("\n".join(lines), _key("failed", out), f"{out.name}: why it failed, and what to do")


def _uri(page: Storage) -> str:
    return str(page) if page.local_path is None else page.local_path.absolute().as_uri()


def _table(what: str, out: Path, summary: dict[str, Any]) -> None:
    create_table_artifact(
        table=[{"quantity": name, "value": str(value)} for name, value in summary.items()],
        key=_key(what, out),
        description=f"{Path(out).name}: {what}",
    )


def _key(what: str, out: Path) -> str:
    """Artifact keys are lower-case letters, digits and dashes."""
    return f"{what}-{re.sub(r'[^a-z0-9]+', '-', Path(out).name.lower()).strip('-') or 'run'}"
