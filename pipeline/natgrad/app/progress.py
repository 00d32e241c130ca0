"""Define progress callbacks for one stage, and for an operation with several stages."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "StageProgress", "stage"]

Progress = Callable[[int, int], None]
"""Callback with the number of items done and the total number."""

StageProgress = Callable[[str, int, int], None]
"""Callback with the stage (``ingest``, ``analyze``), the number of items done and the total number."""


def stage(progress: StageProgress | None, name: str) -> Progress | None:
    """Return the callback of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)
