"""Show the state of every run below a folder.

Stores and logs are read in another process (`natgrad.app.worker`), so that a file system that does not respond is
an error of one run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

from natgrad.app.folder import RunFolder
from natgrad.app.progress import StageProgress
from natgrad.app.scan import (
    LOCK_FILE,
    OUTCOME_FILE,
    Busy,
    Outcome,
    error_parts,
    listing,
    only_processor,
    scanned_runs,
)
from natgrad.app.worker import ProcessLost, Worker
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.sources.opening import holds_run, open_sources
from natgrad.storage import Storage, network_errors, open_storage, require_local
from natgrad.store import Trajectory, exists

__all__ = ["STATUS_SECONDS", "status", "status_of_run"]

STATUS_SECONDS = 60.0
"""Seconds after which a run or a folder that does not respond is reported."""

_REMEDIES = {
    "stalled": "check that the file systems and object stores of OUT and of the logs respond, then show it again",
    "again": "natgrad status shows the other runs",
}

_log = logger(__name__)


def status(out: str | Path, *, seconds: float = STATUS_SECONDS) -> list[dict[str, Any]]:
    """List progress, lag and last error of every run below OUT.

    Parameters
    ----------
    out : path
        Folder that contains the OUT of many runs.
    seconds : float
        Seconds after which a run that does not respond is ``failed``.

    Returns
    -------
    list of dict
        ``run``; ``state`` (``done``, ``behind``, ``failed``, ``working``, ``waiting``); ``last_step`` and ``steps``
        of its trajectory; ``lag``, the number of steps logged since (None if the log cannot be listed);
        ``processed``, the time of the last outcome; ``error`` and ``do``, the last error and its remedy.

    Raises
    ------
    InputError
        If there is no run.
    Unavailable
        If OUT does not respond.
    """
    out = require_local(out, "ROOT")
    with closing(Worker(seconds, psutil.virtual_memory().total, **_REMEDIES)) as worker:
        runs: dict[str, Path | None] = dict.fromkeys(worker.call(_list_outs, out, where=str(out)))
        try:
            runs |= worker.call(_list_logs, out, where=f"the logs of the last scan into {out}")
        except ProcessLost as error:
            _log.warning("only runs in %s are shown: %s", out, error)
        if not runs:
            raise InputError(
                "there is no run below this folder",
                where=str(out),
                remedy="pass the OUT of natgrad scan, serve or deploy",
            )
        return [{"run": name, **_row(worker, out / name, source)} for name, source in sorted(runs.items())]


def _row(worker: Worker, out: Path, source: Path | None) -> dict[str, Any]:
    try:
        row: dict[str, Any] = worker.call(_status, out, source, where=str(source or out))
    except Exception as error:
        parts = error_parts(error)
        empty = dict.fromkeys(("steps", "last_step", "lag", "processed"))
        return {"state": "failed", **empty, "error": parts["what"], "do": parts["do"]}
    return row


# In the worker -----------------------------------------------------------------------------------------------


def _list_outs(out: Path, progress: StageProgress) -> list[str]:
    """Return the names of the runs in OUT."""
    return list(_outs(out, progress))


def _list_logs(out: Path, progress: StageProgress) -> dict[str, Path]:
    """Return the logs of the runs of the last scan, by name."""

    def holds(folder: Path, **keywords: Any) -> bool:
        progress("search", 0, 1)
        return holds_run(folder, **keywords)

    return {one.name: one.source for one in scanned_runs(out, holds)}


def _status(out: Path, source: Path | None, progress: StageProgress) -> dict[str, Any]:
    return status_of_run(out, source)


def _outs(out: Path, progress: StageProgress) -> Iterator[str]:
    for folder, below, files in os.walk(out):
        progress("search", 0, 1)
        if RunFolder.of(folder).trajectory.exists() or OUTCOME_FILE in files:
            below.clear()
            yield Path(folder).relative_to(out).as_posix()


def status_of_run(out: Path, source: Path | None) -> dict[str, Any]:
    """Return the row of one run, without its name; see `status`.

    Parameters
    ----------
    out : Path
        OUT of the run.
    source : Path, optional
        Its log. Default: the log that OUT records.
    """
    outcome, steps, last, sweep = Outcome.of(out), 0, None, False
    logs = [] if source is None else [open_storage(source)]
    damage: dict[str, Any] = {}
    try:
        if exists(RunFolder.of(out).trajectory):
            states = Trajectory(RunFolder.of(out).trajectory)
            logs, sweep = logs or [open_storage(states.source)], states.sweep
            steps, last = states.n_states, int(states.scalar("step")[-1]) if states.n_states else None
    except InputError as found:
        damage = error_parts(found)
    if outcome:
        logs = [open_storage(log) for log in (outcome.source, *outcome.others)]
    # For a sweep, the number of steps counts, because its runs have the same step numbers.
    reached = steps if sweep else last
    lag = _lag(logs, reached, outcome.options if outcome else {}, sweep) if logs else None
    error = (outcome.error if outcome else {}) or damage
    changed = False
    if outcome is not None and logs[0].local_path is not None and logs[0].is_folder():
        changed = listing(logs[0]) != outcome.listing
    if _is_locked(out):
        state = "working"
    elif error:
        state = "failed"
    elif last is None:
        state = "waiting"
    else:
        state = "behind" if lag or changed else "done"
    return {
        "state": state,
        "steps": steps,
        "last_step": last,
        "lag": lag,
        "processed": outcome.time if outcome else None,
        "error": error.get("what"),
        "do": error.get("do"),
    }


def _lag(sources: Sequence[Storage], reached: int | None, values: Mapping[str, Any], sweep: bool) -> int | None:
    """Count the steps logged after the last ingested step; for a sweep, those beyond the number ingested."""
    try:
        with network_errors(*sources):
            opened = (values.get(name) for name in ("format", "mapping", "shift"))
            log = open_sources(sources, *opened, sweep=sweep, pattern=values.get("pattern") or "")
            steps = log.steps()
    except InputError:
        return None
    if sweep:
        return max(0, len(steps) - (reached or 0))
    return sum(reached is None or step.number > reached for step in steps)


def _is_locked(out: Path) -> bool:
    if not (out / LOCK_FILE).exists():
        return False
    try:
        with only_processor(out):
            return False
    except Busy:
        return True
    except OSError:  # the lock file may belong to another user
        return False
