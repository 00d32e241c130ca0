"""Define the stages of a run as functions for a `natgrad.app.worker.Worker`, whose results can be sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from natgrad.app import run
from natgrad.app.progress import StageProgress
from natgrad.storage import Location

__all__ = ["analyze_stage", "ingest_stage", "process_stages", "replay_stage", "report_stage"]


def ingest_stage(
    source: Location | Sequence[Location],
    out: Location,
    values: Mapping[str, Any],
    analysis: run.Analysis | None,
    progress: StageProgress,
) -> dict[str, Any]:
    """Ingest a run; see `natgrad.app.run.ingest_run`."""
    summary = run.ingest_run(source, out, **values, analysis=analysis, progress=progress)
    return summary.to_json()


def analyze_stage(out: Location, analysis: run.Analysis, progress: StageProgress) -> dict[str, Any]:
    """Analyze a run; see `natgrad.app.run.analyze_run`."""
    return run.analyze_run(out, analysis, progress=progress).to_json()


def replay_stage(
    source: Location | Sequence[Location], out: Location, values: Mapping[str, Any], progress: StageProgress
) -> dict[str, Any]:
    """Replay a run; see `natgrad.app.run.replay_run`."""
    return run.replay_run(source, out, values, progress=progress).to_json()


def report_stage(out: Location, progress: StageProgress) -> dict[str, Any]:
    """Write the report of a run; see `natgrad.app.run.report_run`."""
    return run.report_run([out], progress=progress).to_json()


def process_stages(
    source: Location | Sequence[Location], out: Location, values: Mapping[str, Any], progress: StageProgress
) -> dict[str, Any]:
    """Ingest, analyze and report a run; see `natgrad.app.run.process_run`."""
    summary = run.process_run(source, out, values, progress=progress)
    return {} if summary is None else summary.to_json()
