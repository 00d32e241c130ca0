"""Find the stored results of a run, and read their summary, without xarray and Zarr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crc32c import crc32c

from natgrad.storage import Storage
from natgrad.store.checked import read_record, record_files, require_results_version
from natgrad.store.journal import Journal

__all__ = ["COMPUTE_AGAIN", "exist", "publish", "put", "read_summary"]

COMPUTE_AGAIN = "run natgrad analyze OUT with the options of the analysis: it computes the results again"
"""Remedy for damaged results."""

_SUMMARY = "summary"
"""Name of the record, ``summary.json``."""


def exist(storage: Storage) -> bool:
    """Return True if there are results.

    In an object store, results without their root document are being replaced. A folder is replaced atomically, so
    results without a root document are damaged.
    """
    return storage.exists() if storage.local_path is not None else (storage / "zarr.json").exists()


def put(staging: Storage, contents: Mapping[str, bytes]) -> dict[str, int]:
    """Write files of new results to the staging location, and return their checksums."""
    staging.put_entries(contents)
    return {name: crc32c(content) for name, content in contents.items()}


def publish(
    storage: Storage,
    staging: Storage,
    files: Mapping[str, int],
    summary: Mapping[str, Any],
    described: Mapping[str, Any],
) -> None:
    """Replace the results with those in the staging location of their storage.

    The replacement is atomic: a reader finds either the old results or the new results.

    Parameters
    ----------
    storage : Storage
        The caller must hold its lock.
    staging : Storage
        See `natgrad.storage.Storage.staging`.
    files : mapping of str to int
        All files in the staging location, and their checksums.
    summary : mapping
        See `natgrad.results.summary.overview`. It is stored in ``summary.json``, with its own checksum.
    described : mapping
        Additional entries of the record of all checksums.
    """
    name = f"{_SUMMARY}.json"
    Journal(staging).write(_SUMMARY, summary)
    record_files(staging, {**files, name: crc32c((staging / name).get())}, described)
    storage.replace_with(staging, "zarr.json")


def read_summary(storage: Storage) -> dict[str, Any]:
    """Return the summary of results.

    Raises
    ------
    Damaged
        If the summary is missing or was changed.
    OtherVersion
        If another version of natgrad wrote the results.
    """
    require_results_version(storage)
    record = read_record(storage, _SUMMARY, COMPUTE_AGAIN)
    return {name: value for name, value in record.items() if name != "crc32c"}
