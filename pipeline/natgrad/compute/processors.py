"""Determine the number of processors that this process may use, on every platform."""

from __future__ import annotations

import os

__all__ = ["usable_processors"]


def usable_processors() -> int:
    """Return the number of processors that this process may run on, at least 1.

    Python 3.13 provides this number. Older versions use the affinity of the process, which batch systems and
    ``taskset`` set. macOS has no affinity, so every processor is usable there.
    """
    if hasattr(os, "process_cpu_count"):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
