"""Describe the contents of the folder OUT of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from natgrad.app.folder import RunFolder
from natgrad.results import dataset as results
from natgrad.results.summary import overview
from natgrad.storage import network_errors
from natgrad.store import Trajectory

__all__ = [
    "describe_run",
]


def describe_run(out: str | Path, version: str | None = None) -> dict[str, Any]:
    """Describe OUT or one of its versions: steps, model and state of the analysis."""
    folder = RunFolder.of(out, version=version)
    with network_errors(folder.storage):
        return _describe(folder)


def _describe(folder: RunFolder) -> dict[str, Any]:
    description = Trajectory(folder.trajectory).describe()
    if results.exist(folder.results):
        tree = results.read(folder.results)
        description |= {
            "results": str(folder.results),
            "updates": int((tree["model"].to_dataset()["step_span"] > 0).sum()),
            **overview(tree),
        }
    if folder.report.exists():
        description["report"] = str(folder.report)
    return description
