"""Many runs: a flow that looks for runs with news and processes each, and its deployments on a schedule."""

from __future__ import annotations

import contextvars
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, tags
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed

from natgrad.app import scan as watch
from natgrad.app.run import MEMORY_LIMIT
from natgrad.compute.clusters import named_scheduler
from natgrad.schema.errors import InputError
from natgrad_flows.runs import LOOKED, Count, Include, Map, Positive, Shift, process_run

__all__ = ["watch_runs"]


def _flow_name() -> str:
    return f"watch-runs {Path(flow_run.get_parameters()['root']).name}"


@flow(name="watch-runs", flow_run_name=_flow_name)
def watch_runs(
    root: Path,
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
    at_once: Count = 1,
    mapping: Map | None = None,
    shift: Shift | None = None,
    include: Include | None = None,
) -> Any:
    """Look for runs below ROOT, and process those of which something changed since the last time.

    A run that fails does so alone: the others go on, and the table says which it was and what to do. It is tried
    again when its log or an option changes, and at every scan where the failure may heal by itself. A run that
    another flow is working on is skipped. No run that is unchanged is opened.

    Parameters
    ----------
    root, out : Path
        Folder of logs, folder of what is made of them; see `natgrad.app.scan.find_runs`.
    format, allow_gaps, learning_rate, gammas, windows, workers, scheduler, memory_limit, mapping, shift, include
        As those of `process_run`, of every run.
    cluster : str, optional
        Cluster to make if there is anything to do, for all runs; see `natgrad.compute.clusters.CLUSTERS`.
    at_once : int
        Runs in work at a time.

    Returns
    -------
    dict
        Numbers of runs ``processed``, ``unchanged``, ``skipped`` and ``failed``, and ``failures``, run to message.
    """
    if cluster is not None and scheduler is not None:
        raise InputError(
            "a scheduler and a cluster are given",
            where="scheduler, cluster",
            remedy="give the scheduler of a cluster that is there, or the cluster to be made",
        )
    runs = watch.find_runs(root, out)
    watch.remember_root(root, out)
    asked = flow_run.get_parameters().items()
    options = {name: value for name, value in asked if name not in ("root", "out", "at_once")} | {"cluster": None}
    with ExitStack() as stack:
        stack.enter_context(tags("natgrad"))
        if cluster is not None and not all(_stands(found, options) for found in runs):
            options["scheduler"] = stack.enter_context(named_scheduler(cluster, workers or 1))
        pool = stack.enter_context(ThreadPoolExecutor(at_once))
        # A thread has the context of this flow: what it starts is started by it.
        started = [pool.submit(contextvars.copy_context().run, _process, found, options) for found in runs]
        rows = [{"run": found.name, **done.result()} for found, done in zip(runs, started, strict=True)]
    answer = _summary(rows)
    told = [row for row in rows if row["state"] != "unchanged"]
    create_table_artifact(
        table=told or [{"run": "all", "state": "unchanged"}],
        key="watched",
        description=f"{answer['message']} below {root}",
    )
    return Completed(message=answer["message"], data=answer)


def _stands(found: watch.FoundRun, options: dict[str, Any]) -> watch.Outcome | None:
    """Outcome of a run that is as it was when it was processed, else None."""
    outcome = watch.Outcome.of(found.out)
    try:
        stands = outcome is not None and outcome.stands(watch.listing(found.source), options, found.out)
    except OSError:  # it is processed, which says what is wrong with it
        return None
    return outcome if stands else None


def _process(found: watch.FoundRun, options: dict[str, Any]) -> dict[str, str]:
    """Process a run that has news; say what came of it."""
    LOOKED.set(watch.Outcome.of(found.out))
    outcome = _stands(found, options)
    if outcome is not None and outcome.error:
        return {"state": "failed", "what": outcome.error["what"], "do": outcome.error["do"]}
    if outcome is not None:
        return {"state": "unchanged", "what": "", "do": ""}
    try:
        # It dies with this flow, whose heart beats; for the last tick of its own it would wait up to a second.
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            summary = process_run(found.source, found.out, **options)
    except Exception as error:
        parts = watch.error_parts(error)
        get_run_logger().error("%s failed: %s", found.name, error)
        return {"state": "failed", "what": parts["what"], "do": parts["do"]}
    if "skipped" in summary:
        return {"state": "skipped", "what": summary["skipped"], "do": ""}
    return {"state": "processed", "what": f"{summary['new_steps']} new steps", "do": ""}


def _summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    numbers: dict[str, Any] = dict.fromkeys(("processed", "unchanged", "skipped", "failed"), 0)
    for row in rows:
        numbers[row["state"]] += 1
    message = f"{len(rows)} runs: " + ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
    failures = {row["run"]: row["what"] for row in rows if row["state"] == "failed"}
    return {**numbers, "failures": failures, "message": message if rows else "no run"}
