"""Define progress callbacks for one stage, and for an operation with several stages."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["ITEMS", "Progress", "StageProgress", "stage"]

Progress = Callable[[int, int], None]
"""Callback with the number of items done and the total number."""

StageProgress = Callable[[str, int, int], None]
"""Callback with the stage, the number of items done and the total number.

The stages of a run are ``describe`` and ``ingest`` (states), ``analyze`` (ledger chunks), ``results`` (blocks) and
``report`` (parts of the page).
"""

ITEMS = {
    "describe": "states",
    "ingest": "states",
    "materialize": "states",
    "analyze": "chunks",
    "results": "blocks",
    "report": "parts",
}
"""Items that the numbers of a stage count, for stages whose rate is shown."""


def stage(progress: StageProgress | None, name: str) -> Progress | None:
    """Return the callback of one stage."""
    return None if progress is None else lambda done, total: progress(name, done, total)
