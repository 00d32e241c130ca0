"""Verify the stores of a run against their recorded checksums."""

from __future__ import annotations

from pathlib import Path

from natgrad.app.folder import RunFolder
from natgrad.storage import network_errors
from natgrad.store import Trajectory, exists
from natgrad.store.verify import Damage, verify_ledger, verify_trajectory

__all__ = [
    "verify_run",
]


def verify_run(out: Path, version: str | None = None) -> list[Damage]:
    """Compare every stored byte of OUT's trajectory and ledger with the checksums recorded when it was written.

    Memory does not grow with the run: chunks are read one after the other.

    Parameters
    ----------
    out : Path
    version : str, optional
        Of an Icechunk repository: id, tag or time of the version to read; the newest where not given.

    Returns
    -------
    list of Damage
        Everything that is not as it was written, empty where all is.

    Raises
    ------
    InputError
        Where OUT holds no trajectory.
    """
    folder = RunFolder.of(out, version=version)
    with network_errors(folder.storage):
        if not exists(folder.trajectory):
            Trajectory(folder.trajectory)
        damages = list(verify_trajectory(folder.trajectory))
        if exists(folder.ledger):
            # Steps are compared with the trajectory's, where those are whole.
            damages += verify_ledger(folder.ledger, None if damages else Trajectory(folder.trajectory))
    return damages
