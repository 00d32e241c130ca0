"""Recognize a folder that is a run: its only log, or the numbered folders of its attempts or epochs."""

from __future__ import annotations

import re
from pathlib import Path

from natgrad.sources.formats import FORMATS, find_format

__all__ = ["ATTEMPT_WORDS", "holds_tensors", "run_parts", "single_log"]

ATTEMPT_WORDS = {"attempt", "restart", "resume", "retry", "try"}
"""Words in the names of folders each of which contains an attempt of one run."""

_EPOCH_WORDS = {"epoch", "ep"}
_PART = re.compile(r"([A-Za-z]+)[-_=. ]?([0-9]+)")


def holds_tensors(path: Path) -> bool:
    """Return True if a path is a log with tensors."""
    return any(known.find(path) for known in FORMATS.values() if known.scalars is None)


def single_log(path: Path) -> Path:
    """Return the single file in a folder that is a log, unless the folder itself is a log."""
    if not path.is_dir() or find_format(path) is not None:
        return path
    files = [entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith(".")]
    # Logs with tensors take precedence over logs of scalars in the same folder.
    logs = [file for file in files if holds_tensors(file)] or [file for file in files if find_format(file)]
    return logs[0] if len(logs) == 1 else path


def run_parts(path: Path) -> list[Path]:
    """Return the folders of the attempts, or of the epochs, of one run in their order; empty if there are none.

    Folders such as ``version_0``, ``run_1`` and ``seed-2`` are separate runs.

    Parameters
    ----------
    path : Path
        Folder that may contain them.
    """
    found: dict[bool, dict[int, Path]] = {}
    try:
        entries = sorted(path.iterdir())
    except OSError:
        return []
    for entry in entries:
        match = _PART.fullmatch(entry.name)
        word = match[1].lower() if match else ""
        if match and word in ATTEMPT_WORDS | _EPOCH_WORDS and entry.is_dir() and holds_tensors(single_log(entry)):
            found.setdefault(word in ATTEMPT_WORDS, {}).setdefault(int(match[2]), entry)
    if len(found) != 1 or holds_tensors(path):
        return []
    (parts,) = found.values()
    return [parts[number] for number in sorted(parts)]
