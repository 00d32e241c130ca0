"""The flows of a run: thin faces of `pipeline.run`.

Each does its work in one task. A task can run twice (Prefect delivers at least once): ingest and analysis keep
what is finished, so the second time costs little and changes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefect import State, Task, flow, task
from prefect.artifacts import create_link_artifact, create_table_artifact
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run, task_run

from pipeline import run
from pipeline.run import MEMORY_LIMIT, Analysis, RunFolder
from pipeline.schema import InputError

__all__ = ["analyze_run", "ingest_run", "process_run"]


def _can_heal(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Bad input stays bad; a lost worker or a busy disk may not."""
    try:
        state.result()
    except InputError:
        return False
    except Exception:
        return True
    return False


def _flow_name() -> str:
    return f"{flow_run.get_flow_name()} {Path(flow_run.get_parameters()['out']).name}"


def _task_name() -> str:
    return f"{task_run.get_task_name()} {Path(task_run.get_parameters()['out']).name}"


_RETRY: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": [1, 10, 60],
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _can_heal,
    "task_run_name": _task_name,
}


@task(name="ingest", **_RETRY)
def _ingest(source: Path, out: Path, format: str | None, allow_gaps: bool) -> dict[str, Any]:
    return run.ingest_run(source, out, format=format, allow_gaps=allow_gaps)


@task(name="analyze", **_RETRY)
def _analyze(out: Path, options: Analysis) -> dict[str, Any]:
    return run.analyze_run(out, options)


@task(name="report", **_RETRY)
def _report(out: Path) -> dict[str, Any]:
    return run.report_run([out])


@flow(name="ingest-run", flow_run_name=_flow_name)
def ingest_run(source: Path, out: Path, format: str | None = None, allow_gaps: bool = False) -> dict[str, Any]:
    """Read the new steps of a log into OUT's trajectory.

    Parameters
    ----------
    source, out : Path
        Folder of the log; folder of the run.
    format : str, optional
        Log format, found where not given.
    allow_gaps : bool
        Take steps that are not evenly spaced.

    Returns
    -------
    dict
        What was read; see `pipeline.ingest.IngestSummary`.
    """
    summary = _ingest(source, out, format, allow_gaps)
    _table("ingested", out, summary)
    return summary


@flow(name="analyze-run", flow_run_name=_flow_name)
def analyze_run(
    out: Path,
    learning_rate: float | None = None,
    gammas: list[float] | None = None,
    windows: list[int] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Any]:
    """Compute what is missing of OUT's ledger on Dask, its results, and its report.

    Parameters
    ----------
    out : Path
        Folder of the run.
    learning_rate, gammas, windows, workers, scheduler, memory_limit
        See `pipeline.run.Analysis`.

    Returns
    -------
    dict
        Paths, and the numbers of the whole model.
    """
    chosen: dict[str, Any] = {"gammas": tuple(gammas)} if gammas else {}
    chosen |= {"windows": tuple(windows)} if windows else {}
    options = Analysis(
        learning_rate=learning_rate, workers=workers, scheduler=scheduler, memory_limit=memory_limit, **chosen
    )
    summary = _analyze(out, options) | _report(out)
    _table("analyzed", out, summary)
    create_link_artifact(
        link=RunFolder(Path(out)).report.absolute().as_uri(),
        link_text=f"Report of {Path(out).name}",
        key=_key("report", out),
        description=f"Figure 3 of the paper, drawn from {summary['results']}",
    )
    return summary


@flow(name="process-run", flow_run_name=_flow_name)
def process_run(
    source: Path,
    out: Path,
    format: str | None = None,
    allow_gaps: bool = False,
    learning_rate: float | None = None,
    gammas: list[float] | None = None,
    windows: list[int] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> dict[str, Any]:
    """Ingest, analyze and report a run; parameters as those of `ingest_run` and `analyze_run`."""
    ingested = ingest_run(source, out, format, allow_gaps)
    analyzed = analyze_run(out, learning_rate, gammas, windows, workers, scheduler, memory_limit)
    return ingested | analyzed


def _table(what: str, out: Path, summary: dict[str, Any]) -> None:
    create_table_artifact(
        table=[{"quantity": name, "value": str(value)} for name, value in summary.items()],
        key=_key(what, out),
        description=f"{Path(out).name}: {what}",
    )


def _key(what: str, out: Path) -> str:
    """Artifact keys are lower-case letters, digits and dashes."""
    return f"{what}-{re.sub(r'[^a-z0-9]+', '-', Path(out).name.lower()).strip('-') or 'run'}"
