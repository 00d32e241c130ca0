"""Find out whether the files of a step have changed: their identity, and the time of their last change."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from natgrad.sources.steps import LoggedStep, vanished
from natgrad.storage import Storage

__all__ = ["change_time", "changed_lately", "identity"]

SETTLED_SECONDS = 300.0
"""After so long without a change, what cannot be read is not being written any more."""


def changed_lately(time_ns: int) -> bool:
    """Return whether a change is so recent that a writer may be at work; clocks of machines differ a little."""
    return abs(time.time() - time_ns / 1e9) < SETTLED_SECONDS


def change_time(storage: Storage) -> int:
    """Return the time of the last change of a file or object, in ns."""
    return storage.stat().time


def identity(step: LoggedStep, *, fresh: bool = False) -> dict[str, Any]:
    """Return name, size in bytes and time in ns of the files of a step (all files of a folder), and its values.

    Parameters
    ----------
    step : LoggedStep
    fresh : bool
        Ask the storage for each object; otherwise the listing of the steps is enough. An object has a tag, too.

    Raises
    ------
    InputError
        Where a file is gone.
    """
    try:
        files = [file for entry in (step.storage, *step.others) for file in _files(entry)]
        stats = [file.stat(fresh=fresh) for file in files]
    except OSError as error:
        raise vanished(f"the step cannot be found any more: {error.strerror}", step) from error
    found: dict[str, Any] = {
        "name": step.storage.name,
        "size": sum(stat.size for stat in stats),
        "time": max((stat.time for stat in stats), default=0),
    }
    if stats and stats[0].tag:
        found["tag"] = stats[0].tag
    if files != [step.storage]:
        folder = step.storage.parent
        listing = [(_relative(file, folder), *stat) for file, stat in zip(files, stats, strict=True)]
        found["files"] = hashlib.sha256(repr(sorted(listing)).encode()).hexdigest()
    if step.values:
        found["values"] = step.values
    return found


def _relative(file: Storage, folder: Storage) -> str:
    if file.local_path is None or folder.local_path is None:
        return str(file)
    return os.path.relpath(file.local_path, folder.local_path)


def _files(entry: Storage) -> list[Storage]:
    # A folder that is a link is entered where it is the step itself, not below: a link may lead in a circle.
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
