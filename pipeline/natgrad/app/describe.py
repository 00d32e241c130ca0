"""Describe the contents of the folder OUT of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natgrad.app.folder import RunFolder
from natgrad.results import stored as results
from natgrad.schema.layout import LedgerChunk
from natgrad.schema.logs import logger
from natgrad.storage import Storage, storage_errors
from natgrad.store import Ledger, Trajectory
from natgrad.store.checked import Damaged
from natgrad.store.verify import verified_since

__all__ = [
    "describe_run",
]


_log = logger(__name__)


def describe_run(out: str | Path, version: str | None = None) -> dict[str, Any]:
    """Describe OUT or one of its versions: steps, model and state of the analysis."""
    folder = RunFolder.of(out, version=version)
    with storage_errors(folder.storage):
        return _describe(folder)


def _describe(folder: RunFolder) -> dict[str, Any]:
    states = Trajectory(folder.trajectory)
    description = states.describe() | {"states_verified": _verified_since(folder, states)}
    if results.exist(folder.results):
        description |= {"results": str(folder.results), **_summary(folder.results)}
    if folder.report.exists():
        description["report"] = str(folder.report)
    return description


def _summary(storage: Storage) -> dict[str, Any]:
    """Return the summary of results. If it is damaged, it is computed from the results."""
    try:
        return results.read_summary(storage)
    except Damaged as error:
        _log.warning("%s (%s): the summary is computed from the results", error.what, error.where)
    # These load xarray and Zarr, which a summary does not need.
    from natgrad.compute.clusters import require_configuration
    from natgrad.results import dataset
    from natgrad.results.summary import overview

    require_configuration()
    return overview(dataset.read(storage))


def _verified_since(folder: RunFolder, states: Trajectory) -> str | None:
    """Return the time since which every state has been verified. The ledger may be that of an older trajectory."""
    ledger = Ledger.find(folder.ledger)
    if ledger is None:
        return verified_since(states, None)
    chunks = [LedgerChunk(record["start"], record["stop"]) for record in ledger.records()]
    return verified_since(states, ledger, states.digests(chunks))
