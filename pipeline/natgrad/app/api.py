"""Define the public functions that process one run, which ``import natgrad`` exposes under the same names.

All arguments and options are validated before a function runs (`natgrad.app.declarations.with_options`). The
command line calls these functions. A library that only some functions need is imported inside them: `inspect` and
`verify` load neither the compiler nor xarray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from natgrad.app import declarations, options
from natgrad.app.follow import follow
from natgrad.app.progress import stage
from natgrad.app.summaries import (
    AnalysisSummary,
    ComparisonSummary,
    IngestSummary,
    Inspection,
    MovedStates,
    ProcessSummary,
    ReplaySummary,
    Report,
    Verification,
)
from natgrad.ingestion import StepWait
from natgrad.storage import Location, open_all, storage_errors

if TYPE_CHECKING:
    from natgrad.app.folder import RunFolder
    from natgrad.store import copies

__all__ = [
    "analyze",
    "compare",
    "ingest",
    "inspect",
    "materialize",
    "process",
    "replay",
    "report",
    "slim",
    "verify",
]

T = TypeVar("T", bound=IngestSummary)


@declarations.with_options(options.ProcessOptions)
def process(
    source: options.Source,
    out: options.Out,
    *,
    progress: options.Progress = None,
    **values: Unpack[options.ProcessOptions],
) -> ProcessSummary:
    """Ingest, analyze and report a run.

    Parameters
    ----------
    **options

    Returns
    -------
    ProcessSummary

    Raises
    ------
    InputError
        If an option or the log is not valid. No part of an invalid log is stored.
    """
    from natgrad.app import run

    def once(first: bool, wait: StepWait | None) -> ProcessSummary | None:
        return run.process_run(
            source,
            out,
            values,
            overwrite=values["overwrite"] and first,
            wait=wait,
            skip_unchanged=not first,
            progress=progress,
        )

    return _repeated(once, values)


@declarations.with_options(options.IngestOptions)
def ingest(
    source: options.Source,
    out: options.Out,
    *,
    progress: options.Progress = None,
    **values: Unpack[options.IngestOptions],
) -> IngestSummary:
    """Read the new steps of a training log into OUT/trajectory.zarr.

    Parameters
    ----------
    **options

    Returns
    -------
    IngestSummary

    Raises
    ------
    InputError
        If an option or the log is not valid. No part of an invalid log is stored.
    """
    from natgrad.app import run

    def once(first: bool, wait: StepWait | None) -> IngestSummary | None:
        found = run.ingest_run(
            source,
            out,
            **declarations.selected(options.ReadOptions, values),
            overwrite=values["overwrite"] and first,
            wait=wait,
            progress=progress,
        )
        return found if first or found.new_steps or found.completed_steps else None

    return _repeated(once, values)


def _repeated(once: Callable[[bool, StepWait | None], T | None], values: Mapping[str, Any]) -> T:
    """Run a pass once, or repeatedly with ``follow``, whenever the log has new steps."""
    if not values["follow"]:
        found = once(True, None)
        assert found is not None  # the first pass always returns a summary
        return found
    wait = StepWait(values["gap_timeout"])
    return follow(
        lambda first: once(first, wait),
        wait=wait,
        interval=values["interval"],
        idle_timeout=values["idle_timeout"],
    )


@declarations.with_options(options.ReplayOptions)
def replay(
    source: options.Source,
    out: options.Out,
    *,
    progress: options.Progress = None,
    **values: Unpack[options.ReplayOptions],
) -> ReplaySummary:
    """Evaluate an objective at the states of a log without gradients, and process the run with its gradients.

    Parameters
    ----------
    **options

    Returns
    -------
    ReplaySummary

    Raises
    ------
    InputError
        If an option or the log is not valid, or the objective fails. Evaluated states are kept.
    """
    from natgrad.app import run

    return run.replay_run(source, out, values, progress=progress)


@declarations.with_options(options.AnalyzeOptions)
def analyze(
    out: options.Out,
    *,
    progress: options.Progress = None,
    **values: Unpack[options.AnalyzeOptions],
) -> AnalysisSummary:
    """Compute the missing part of OUT/ledger.zarr, and OUT/results.zarr.

    Parameters
    ----------
    **options

    Returns
    -------
    AnalysisSummary

    Raises
    ------
    InputError
        If an option is not valid, OUT contains fewer than two steps, or the memory limit is too low.
    """
    from natgrad.app import run

    analysis = run.Analysis.of(values)
    return run.analyze_run(out, analysis, progress=progress)


@declarations.with_options(options.VersionOptions)
def report(
    outs: options.Outs,
    page: options.Page = None,
    **values: Unpack[options.VersionOptions],
) -> Report:
    """Draw Figure 3 of the paper from the results of one run, or of several on one page.

    Parameters
    ----------
    **options

    Returns
    -------
    Report

    Raises
    ------
    InputError
        If there are no results.
    """
    from natgrad.app import run

    return run.report_run([outs] if isinstance(outs, str | Path) else outs, page, values["version"])


@declarations.with_options()
def compare(
    outs: options.Outs, align: options.Align = "step", page: options.ComparisonPage = None
) -> ComparisonSummary:
    """Compare the results of several runs, and write one page with all of them.

    Parameters
    ----------
    **options

    Returns
    -------
    ComparisonSummary

    Raises
    ------
    InputError
        If there are no results, fewer than two runs, or the runs cannot be aligned.
    """
    from natgrad.app import run

    return run.compare_runs([outs] if isinstance(outs, str | Path) else outs, align, page)


@declarations.with_options(options.InspectOptions)
def inspect(source: options.Source, **values: Unpack[options.InspectOptions]) -> Inspection:
    """Describe a log: its contents, missing quantities, and the cost of processing it. Nothing is written.

    Parameters
    ----------
    **options

    Returns
    -------
    Inspection

    Raises
    ------
    InputError
        If there is no log, or its first or last step cannot be described.
    """
    from natgrad.app.inspection import inspect_source

    logs = open_all(source)
    with storage_errors(*logs):
        return inspect_source(logs, **declarations.selected(options.InspectOptions, values))


@declarations.with_options(options.VersionOptions)
def verify(out: options.Out, **values: Unpack[options.VersionOptions]) -> Verification:
    """Verify all stored data of OUT against its checksums.

    Parameters
    ----------
    **options

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        If OUT contains no trajectory.
    """
    from natgrad.app.verification import unfinished, verify_run

    damages = verify_run(out, values["version"])
    return Verification(damages=tuple(damages), unfinished="" if damages else unfinished(out, values["version"]))


@declarations.with_options()
def materialize(out: options.Out, *, progress: options.Progress = None) -> MovedStates:
    """Copy the states of a run that was processed in place. The ledger and the results do not change.

    Parameters
    ----------
    **options

    Returns
    -------
    MovedStates

    Raises
    ------
    InputError
        If there is no trajectory, or a file of the log is missing or was changed.
    """
    from natgrad.store import copies

    return _moved(out, lambda folder: copies.materialize(folder.trajectory, stage(progress, "materialize")))


@declarations.with_options()
def slim(out: options.Out) -> MovedStates:
    """Remove the copied states of a run, and keep its ledger, results and checksums. The run can still grow.

    Parameters
    ----------
    **options

    Returns
    -------
    MovedStates

    Raises
    ------
    InputError
        If there is no trajectory, or the ledger lacks updates.
    """
    from natgrad.store import copies

    return _moved(out, lambda folder: copies.slim(folder.trajectory, folder.ledger))


def _moved(out: Location, move: Callable[[RunFolder], copies.Moved]) -> MovedStates:
    """Copy or remove states of OUT, and describe what was done."""
    from natgrad.app.folder import RunFolder

    folder = RunFolder.of(out)
    with storage_errors(folder.storage):
        moved = move(folder)
    return MovedStates(trajectory=str(folder.trajectory), **moved._asdict())
