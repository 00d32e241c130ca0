"""Define the public functions of the package, which ``import natgrad`` exposes under the same names.

Each function validates all its options before any work starts. The command line calls these functions. A library
that only some functions need is imported inside them: `inspect` and `verify` load neither the compiler nor xarray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from natgrad.app import options
from natgrad.app.folder import RunFolder
from natgrad.app.follow import follow
from natgrad.app.progress import StageProgress, stage
from natgrad.app.summaries import (
    AnalysisSummary,
    IngestSummary,
    Inspection,
    ProcessSummary,
    Report,
    Verification,
)
from natgrad.ingestion import StepWait
from natgrad.storage import network_errors, open_all
from natgrad.store import Ledger, Trajectory

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "analyze",
    "ingest",
    "inspect",
    "open_ledger",
    "open_results",
    "open_trajectory",
    "process",
    "report",
    "verify",
]

T = TypeVar("T", bound=IngestSummary)


@options.with_options(options.ProcessOptions)
def process(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    progress: StageProgress | None = None,
    **values: Unpack[options.ProcessOptions],
) -> ProcessSummary:
    """Ingest, analyze and report a run.

    Parameters
    ----------
    source : path or sequence of path
        Folder or URL of a training log; several logs of one run; or a run file that lists them.
    out : path
        Folder or URL of the run's stores, results and report.
    progress : callable, optional
        Called with the stage (``ingest``, ``analyze``), the items done and the total number of items.
    **options

    Returns
    -------
    ProcessSummary

    Raises
    ------
    InputError
        If an option or the log is not valid. Nothing of an invalid log is stored.
    """
    checked = options.validated(options.ProcessOptions, values)
    from natgrad.app import run

    def once(first: bool, wait: StepWait | None) -> ProcessSummary | None:
        return run.process_run(
            source,
            out,
            checked,
            overwrite=checked["overwrite"] and first,
            wait=wait,
            skip_unchanged=not first,
            progress=progress,
        )

    return _repeated(once, checked)


@options.with_options(options.IngestOptions)
def ingest(
    source: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    progress: StageProgress | None = None,
    **values: Unpack[options.IngestOptions],
) -> IngestSummary:
    """Read the new steps of a training log into OUT/trajectory.zarr.

    Parameters
    ----------
    source : path or sequence of path
        Folder or URL of a training log; several logs of one run; or a run file that lists them.
    out : path
        Folder or URL of the run's stores, results and report.
    progress : callable, optional
        Called with the stage (``ingest``), the steps done and the total number of steps.
    **options

    Returns
    -------
    IngestSummary

    Raises
    ------
    InputError
        If an option or the log is not valid. Nothing of an invalid log is stored.
    """
    checked = options.validated(options.IngestOptions, values)
    from natgrad.app import run

    def once(first: bool, wait: StepWait | None) -> IngestSummary | None:
        found = run.ingest_run(
            source,
            out,
            **options.selected(options.ReadOptions, checked),
            overwrite=checked["overwrite"] and first,
            wait=wait,
            progress=stage(progress, "ingest"),
        )
        return found if first or found.new_steps else None

    return _repeated(once, checked)


def _repeated(once: Callable[[bool, StepWait | None], T | None], checked: Mapping[str, Any]) -> T:
    """Run a pass once, or repeatedly with ``follow``, whenever the log has new steps."""
    if not checked["follow"]:
        found = once(True, None)
        assert found is not None  # the first pass always returns a summary
        return found
    wait = StepWait(checked["gap_timeout"])
    return follow(
        lambda first: once(first, wait),
        wait=wait,
        interval=checked["interval"],
        idle_timeout=checked["idle_timeout"],
    )


@options.with_options(options.AnalyzeOptions)
def analyze(
    out: str | Path,
    *,
    progress: StageProgress | None = None,
    **values: Unpack[options.AnalyzeOptions],
) -> AnalysisSummary:
    """Compute the missing part of OUT/ledger.zarr, and OUT/results.zarr.

    Parameters
    ----------
    out : path
        Folder or URL of the run's stores, results and report.
    progress : callable, optional
        Called with the stage (``analyze``), the chunks done and the total number of chunks.
    **options

    Returns
    -------
    AnalysisSummary

    Raises
    ------
    InputError
        If an option is not valid, OUT contains fewer than two steps, or the memory limit is too low.
    """
    checked = options.validated(options.AnalyzeOptions, values)
    from natgrad.app import run

    analysis = run.Analysis.of(checked)
    return run.analyze_run(out, analysis, progress=stage(progress, "analyze"))


@options.with_options(options.VersionOptions)
def report(
    outs: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    page: str | Path | None = None,
    **values: Unpack[options.VersionOptions],
) -> Report:
    """Draw Figure 3 of the paper from the results of one run, or of several on one page.

    Parameters
    ----------
    outs : path, sequence of path, or mapping of str to path
        Folders or URLs of the runs. Without names, each run is named after its folder.
    page : path, optional
        File of the page. Default: ``report.html`` in the first OUT.
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

    checked = options.validated(options.VersionOptions, values)
    return run.report_run([outs] if isinstance(outs, str | Path) else outs, page, checked["version"])


@options.with_options(options.InspectOptions)
def inspect(source: str | Path | Sequence[str | Path], **values: Unpack[options.InspectOptions]) -> Inspection:
    """Describe a log: its contents, missing quantities, and the cost of processing it. Nothing is written.

    Parameters
    ----------
    source : path or sequence of path
        Folder or URL of a training log; several logs of one run; or a run file that lists them.
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

    checked = options.validated(options.InspectOptions, values)
    logs = open_all(source)
    with network_errors(*logs):
        return inspect_source(logs, **checked)


@options.with_options(options.VersionOptions)
def verify(out: str | Path, **values: Unpack[options.VersionOptions]) -> Verification:
    """Verify all stored data of OUT against its checksums.

    Parameters
    ----------
    out : path
        Folder or URL of the run's stores.
    **options

    Returns
    -------
    Verification

    Raises
    ------
    InputError
        If OUT contains no trajectory.
    """
    from natgrad.app.verification import verify_run

    checked = options.validated(options.VersionOptions, values)
    return Verification(damages=tuple(verify_run(out, checked["version"])))


@options.with_options(options.VersionOptions)
def open_results(out: str | Path, **values: Unpack[options.VersionOptions]) -> xr.DataTree:
    """Open the labelled results of a run.

    Parameters
    ----------
    out : path
        Folder or URL of the run.
    **options

    Returns
    -------
    xarray.DataTree
        Groups ``/model`` and ``/tensor``, and ``/replicates`` if the log has replicates of a stochastic rule.

    Raises
    ------
    InputError
        If there are no results.
    """
    from natgrad.results import dataset

    folder = RunFolder.of(out, **options.validated(options.VersionOptions, values))
    with network_errors(folder.storage):
        return dataset.read(folder.results)


@options.with_options(options.VersionOptions)
def open_trajectory(out: str | Path, **values: Unpack[options.VersionOptions]) -> Trajectory:
    """Open the trajectory of a run, which contains its logged states.

    Parameters
    ----------
    out : path
        Folder or URL of the run.
    **options

    Raises
    ------
    InputError
        If there is no trajectory.
    """
    folder = RunFolder.of(out, **options.validated(options.VersionOptions, values))
    with network_errors(folder.storage):
        return Trajectory(folder.trajectory)


@options.with_options(options.VersionOptions)
def open_ledger(out: str | Path, **values: Unpack[options.VersionOptions]) -> Ledger:
    """Open the ledger of a run, which contains the Gram matrices of its updates.

    Parameters
    ----------
    out : path
        Folder or URL of the run.
    **options

    Raises
    ------
    InputError
        If there is no ledger.
    """
    folder = RunFolder.of(out, **options.validated(options.VersionOptions, values))
    with network_errors(folder.storage):
        return Ledger(folder.ledger)
