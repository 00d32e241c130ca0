"""Estimate how long a copy of a log takes, before it starts."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from natgrad.storage import Storage

__all__ = ["LARGE_LOG_BYTES", "copy_notice"]

LARGE_LOG_BYTES = 1_000_000_000
"""Bytes of states above which a copy of a log is announced."""

_SAMPLE_BYTES = 64 << 20
"""Bytes that are read and written to measure a rate."""


def copy_notice(logs: Sequence[Storage], out: Storage, state_bytes: int) -> str:
    """Return a sentence about the cost of copying the states of local logs, and the option that avoids it.

    The time follows from a probe: up to 64 MiB of a file of the log are read, written to an unnamed file in the
    folder of OUT, and flushed to the disk.

    Parameters
    ----------
    logs : sequence of Storage
        Local files or folders.
    out : Storage
        The trajectory. Its folder need not exist.
    state_bytes : int
        Size of the states.
    """
    cost = f"{state_bytes / 1e9:.1f} GB of states are copied into {out}"
    rate = _rate(logs, out)
    if rate is not None:
        cost += (
            f", which takes about {state_bytes / rate:.0f} s at {rate / 1e9:.2g} GB/s (measured with a small copy)"
        )
    return f"{cost}; --in-place reads them from the files of the log instead, which must then stay as they are"


def _rate(logs: Sequence[Storage], out: Storage) -> float | None:
    """Return the bytes per second of a small copy; None if nothing can be copied."""
    found = next((path for log in logs if (path := _large_file(log)) is not None), None)
    if found is None or out.local_path is None:
        return None
    folder = next(parent for parent in out.local_path.absolute().parents if parent.is_dir())
    begin = time.perf_counter()
    try:
        with found.open("rb") as file:
            content = file.read(_SAMPLE_BYTES)
        # The file has no name, so nothing remains after a kill.
        with tempfile.TemporaryFile(dir=folder) as copy:
            copy.write(content)
            copy.flush()
            os.fsync(copy.fileno())
    except OSError:
        return None
    return len(content) / (time.perf_counter() - begin) if content else None


def _large_file(log: Storage) -> Path | None:
    """Return the first file of a log that is as large as a sample, or else the largest of some of its files."""
    path, largest = log.local_path, None
    if path is None or path.is_file():
        return path
    for seen, (folder, folders, names) in enumerate(os.walk(path)):
        folders.sort()
        for name in sorted(names)[:16]:
            size = (file := Path(folder, name)).stat().st_size
            if largest is None or size > largest[0]:
                largest = (size, file)
        if seen >= 16 or (largest is not None and largest[0] >= _SAMPLE_BYTES):
            break
    return None if largest is None else largest[1]
