"""Progress callbacks: of one stage, and of an operation with several stages."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "StageProgress", "stage"]

Progress = Callable[[int, int], None]
"""Called with items done and items in all."""

StageProgress = Callable[[str, int, int], None]
"""Called with the stage (``ingest``, ``analyze``), items done and items in all."""


def stage(progress: StageProgress | None, name: str) -> Progress | None:
    """Return the callback of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)
