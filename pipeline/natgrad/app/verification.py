"""Verify the stores of a run against their recorded checksums."""

from __future__ import annotations

from pathlib import Path

from natgrad.app.folder import RunFolder
from natgrad.schema.errors import InputError
from natgrad.schema.logs import logger
from natgrad.schema.times import now
from natgrad.storage import storage_errors
from natgrad.store import Trajectory, exists
from natgrad.store.verify import Damage, verify_ledger, verify_results, verify_trajectory

__all__ = [
    "unfinished",
    "verify_run",
]

_log = logger(__name__)


def verify_run(out: str | Path, version: str | None = None) -> list[Damage]:
    """Verify the stores of OUT against the checksums recorded when they were written.

    Memory does not grow with the run, because chunks are read one after the other. If the trajectory is not
    damaged, the time is recorded in it. A repository that keeps versions is not changed.

    Parameters
    ----------
    out : Path
    version : str, optional
        Version of an Icechunk repository to read: id, tag or time. Default: the newest.

    Returns
    -------
    list of Damage
        All corrupt data; empty if all checksums match.

    Raises
    ------
    InputError
        If OUT contains no trajectory.
    """
    folder = RunFolder.of(out, version=version)
    with storage_errors(folder.storage):
        if not exists(folder.trajectory):
            Trajectory(folder.trajectory)
        started, states = now(), _opened(folder)
        damages = list(verify_trajectory(folder.trajectory))
        if states is not None and not damages:
            _record(states, started)
        if exists(folder.ledger):
            # The steps are compared with those of the trajectory only if it is not damaged.
            damages += verify_ledger(folder.ledger, None if damages else Trajectory(folder.trajectory))
        if folder.results.exists():
            damages += verify_results(folder.results)
    return damages


def unfinished(out: str | Path, version: str | None = None) -> str:
    """Return what the last state of OUT lacks, as a sentence; empty if it is complete or cannot be read."""
    states = _opened(RunFolder.of(out, version=version))
    return "" if states is None else states.unfinished


def _opened(folder: RunFolder) -> Trajectory | None:
    """Open the trajectory; return None if it is damaged."""
    try:
        return Trajectory(folder.trajectory)
    except InputError:
        return None


def _record(states: Trajectory, time: str) -> None:
    """Record the time of a verification without damage."""
    if states.storage.keeps_versions or not states.was_read:
        return
    try:
        states.record_verification(time)
    except (OSError, InputError) as error:  # OUT may be read-only
        _log.info("the time of this verification is not recorded: %s", error)
