"""Find the stored results of a run, and read their summary, without xarray and Zarr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from natgrad.storage import LocalStorage, Storage
from natgrad.store.checked import read_record, require_results_version
from natgrad.store.journal import Journal

__all__ = ["COMPUTE_AGAIN", "exist", "read_summary", "write_summary"]

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


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write the summary of new results, see `natgrad.results.summary.overview`. It contains its own checksum."""
    Journal(LocalStorage(folder)).write(_SUMMARY, summary)


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
