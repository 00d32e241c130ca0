"""Whether the files of a step have changed: what they are told by, and how lately they were written."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

from natgrad.sources.steps import LoggedStep, vanished
from natgrad.storage import is_url, status

__all__ = ["change_time", "changed_lately", "identity"]

SETTLED_SECONDS = 300.0
"""After so long without a change, what cannot be read is not being written any more."""


def changed_lately(time_ns: int) -> bool:
    """Whether a time of change is so near that a writer may be at work; clocks of machines differ a little."""
    return abs(time.time() - time_ns / 1e9) < SETTLED_SECONDS


def change_time(path: Path) -> int:
    """When a file or object was changed last, in ns."""
    return int(_stat(path, fresh=True)[1])


def identity(step: LoggedStep, *, fresh: bool = False) -> dict[str, Any]:
    """Name, size in bytes and time in ns of the files of a step (of a folder, all files in it), and its ``values``.

    Parameters
    ----------
    step : LoggedStep
    fresh : bool
        Look at each object anew, where else what the listing of the steps said of it is taken. An object has a tag
        of its content too.

    Raises
    ------
    InputError
        Where a file is gone.
    """
    try:
        files = [file for path in (step.path, *step.others) for file in _files(path)]
        stats = [(path, *_stat(path, fresh)) for path in files]
    except OSError as error:
        raise vanished(f"the step cannot be found any more: {error.strerror}", step) from error
    found: dict[str, Any] = {
        "name": step.path.name,
        "size": sum(size for _, size, *_ in stats),
        "time": max((time for _, _, time, *_ in stats), default=0),
    }
    if is_url(step.path):
        found["tag"] = stats[0][3]
    if files != [step.path]:
        listing = [(_relative(path, step.path.parent), *facts) for path, *facts in stats]
        found["files"] = hashlib.sha256(repr(sorted(listing)).encode()).hexdigest()
    if step.values:
        found["values"] = step.values
    return found


def _stat(path: Path, fresh: bool) -> tuple[Any, ...]:
    """Size and time of a file; of an object, its tag too."""
    if is_url(path):
        return status(path, fresh=fresh)
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _relative(path: Path, folder: Path) -> str:
    return str(path) if is_url(path) or is_url(folder) else os.path.relpath(path, folder)


def _files(path: Path) -> list[Path]:
    # A folder that is a link is entered where it is the step itself, not below: a link may lead in a circle.
    if is_url(path) or not path.is_dir():
        return [path]
    return [Path(folder) / name for folder, _, names in os.walk(path, onerror=_raise) for name in names]


def _raise(error: OSError) -> None:
    raise error
