"""Detect changes in the files of a step, from their identity and the time of their last change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from natgrad.sources.steps import LoggedStep, vanished
from natgrad.storage import Storage

__all__ = ["change_time", "changed_lately", "files_of", "identity"]

SETTLED_SECONDS = 300.0
"""Time without a change after which an unreadable file is assumed to be no longer in progress."""


def changed_lately(time_ns: int) -> bool:
    """Return True if a change is so recent that a writer may still be active, with a tolerance for clock skew."""
    return abs(time.time() - time_ns / 1e9) < SETTLED_SECONDS


def change_time(storage: Storage) -> int:
    """Return the time of the last change of a file or object, in ns."""
    return storage.stat().time


def identity(step: LoggedStep, *, fresh: bool = False) -> dict[str, Any]:
    """Return the identity of a step: the location, size in bytes, time in ns and tag of its files, and its scalars.

    Equal identities mean equal contents, so the files need not be read again. The converse does not hold: a file
    that was moved, copied or touched has another identity and the same content. For a folder, the identity covers
    all of its files. A step whose log has a checksum of its content is identified by it.

    Parameters
    ----------
    step : LoggedStep
    fresh : bool
        Query the storage for each object. By default, the listing of the steps is used.

    Raises
    ------
    ListingChanged
        If a file no longer exists.
    """
    if step.content:
        found: dict[str, Any] = {"folder": _folder(step.storage), "name": step.storage.name, "size": 0, "time": 0}
        return found | {"content": step.content} | ({"values": step.values} if step.values else {})
    try:
        files = files_of(step)
        stats = [file.stat(fresh=fresh) for file in files]
    except OSError as error:
        raise vanished(f"the files of this step no longer exist: {error.strerror}", step) from error
    found = {
        "folder": _folder(step.storage),
        "name": step.storage.name,
        "size": sum(stat.size for stat in stats),
        "time": max((stat.time for stat in stats), default=0),
    }
    if files == [step.storage]:
        found["tag"] = stats[0].tag
    else:
        folder = step.storage.parent
        listing = [(_relative(file, folder), *stat) for file, stat in zip(files, stats, strict=True)]
        found["files"] = hashlib.sha256(repr(sorted(listing)).encode()).hexdigest()
    if step.values:
        found["values"] = step.values
    return found


def _folder(file: Storage) -> str:
    """Return the folder of a file or folder, in one spelling: absolute and without "..", links are kept."""
    path = file.local_path
    return str(file.parent) if path is None else os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120


def _relative(file: Storage, folder: Storage) -> str:
    if file.local_path is None or folder.local_path is None:
        return str(file)
    return os.path.relpath(file.local_path, folder.local_path)


def files_of(step: LoggedStep) -> list[Storage]:
    """Return the files of a step. Those of a folder are listed (OSError if it no longer exists)."""
    return [file for entry in (step.storage, *step.others) for file in _files(entry)]


def _files(entry: Storage) -> list[Storage]:
    # Follow a link to a folder only if it is the step itself: links further down may form a cycle.
    path = entry.local_path
    if path is None or not path.is_dir():
        return [entry]
    return [
        entry / (Path(folder) / name).relative_to(path).as_posix()
        for folder, _, names in os.walk(path, onerror=_raise)
        for name in names
    ]


def _raise(error: OSError) -> None:
    raise error
