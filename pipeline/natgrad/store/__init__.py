"""Store trajectories and Gram ledgers in Zarr v3.

**Commit rule.** Chunks are written and flushed first. Then one record makes the chunks of all arrays visible
together. The record is written atomically and never replaces another one, except that of a provisional state.
Readers rely on the recorded states and updates, not on the shapes of arrays.
"""

from natgrad.schema.layout import storage_dtype
from natgrad.storage import Location
from natgrad.store.checksums import Reads, add_to_checksums, checksum
from natgrad.store.group import exists, open_store, require_version
from natgrad.store.ledger import Ledger
from natgrad.store.trajectory import Trajectory

__all__ = [
    "Ledger",
    "Reads",
    "Trajectory",
    "add_to_checksums",
    "checksum",
    "exists",
    "open_ledger",
    "open_store",
    "open_trajectory",
    "require_version",
    "storage_dtype",
]


def open_trajectory(location: Location, version: str | None = None) -> Trajectory:
    """Open the trajectory at a path or URL, such as ``OUT/trajectory.zarr``.

    Parameters
    ----------
    location : str, Path or Storage
    version : str, optional
        Identifier, tag or time of a version, if OUT is an Icechunk repository; the latest by default.

    Raises
    ------
    InputError
        If there is no trajectory, or another version of natgrad wrote it.
    """
    return Trajectory(open_store(location, version))


def open_ledger(location: Location, version: str | None = None) -> Ledger:
    """Open the ledger at a path or URL, such as ``OUT/ledger.zarr``; see `open_trajectory`."""
    return Ledger(open_store(location, version))
