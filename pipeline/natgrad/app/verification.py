"""Verify the stores of a run against their recorded checksums."""

from __future__ import annotations

from pathlib import Path

from natgrad.app.folder import RunFolder
from natgrad.storage import network_errors
from natgrad.store import Trajectory, exists
from natgrad.store.verify import Damage, verify_ledger, verify_results, verify_trajectory

__all__ = [
    "verify_run",
]


def verify_run(out: str | Path, version: str | None = None) -> list[Damage]:
    """Verify the stores of OUT against the checksums recorded when they were written.

    Memory does not grow with the run, because chunks are read one after the other.

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
    with network_errors(folder.storage):
        if not exists(folder.trajectory):
            Trajectory(folder.trajectory)
        damages = list(verify_trajectory(folder.trajectory))
        if exists(folder.ledger):
            # The steps are compared with those of the trajectory only if it is not damaged.
            damages += verify_ledger(folder.ledger, None if damages else Trajectory(folder.trajectory))
        if folder.results.exists():
            damages += verify_results(folder.results)
    return damages
