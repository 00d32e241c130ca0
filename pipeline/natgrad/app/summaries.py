"""Define the summaries that the public functions return. The command line prints their JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from natgrad.ingestion import IngestSummary
from natgrad.schema.summary import Summary
from natgrad.store.verify import Damage

__all__ = [
    "AnalysisSummary",
    "IngestSummary",
    "Inspection",
    "ProcessSummary",
    "Report",
    "ScanSummary",
    "ScannedRun",
    "Verification",
]


@dataclass(frozen=True, kw_only=True, repr=False)
class AnalysisSummary(Summary):
    """Summary of an analysis.

    Attributes
    ----------
    ledger, results : str
        Paths of the stores.
    updates : int
        Number of updates with results.
    chunks, computed_chunks : int
        Number of chunks of the ledger, and of those that were computed now.
    computed_updates : int
        Number of updates that were computed now.
    projected_memory : int
        Memory of a worker in bytes, projected before the pass.
    states_verified : str, optional
        Time since which every state has been compared with its checksums, by a pass or by `natgrad.verify`. None if
        that is not known for a state, because it was trusted (``trust_states``).
    status : mapping of str to int
        Number of updates with each status.
    angle, condition_number : list of float, optional
        Minimum, median and maximum over the updates of the model, with the gradient itself as the estimate.
    """

    ledger: str
    results: str
    updates: int
    chunks: int
    computed_chunks: int
    computed_updates: int
    projected_memory: int
    states_verified: str | None
    status: Mapping[str, int]
    angle: list[float] | None
    condition_number: list[float] | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Summary):
    """The report page of one or several runs.

    Attributes
    ----------
    report : str
        File or URL of the page.
    """

    report: str


@dataclass(frozen=True, kw_only=True, repr=False)
class ProcessSummary(Report, AnalysisSummary, IngestSummary):
    """Summary of ingest, analysis and report of a run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Summary):
    """Contents of a log, missing quantities, and the cost of processing it.

    Entries that do not apply are None, and the JSON form omits them.

    Attributes
    ----------
    source, format : str
    runs : int, optional
        Number of runs of a sweep.
    steps, first_step, last_step : int
    step_numbers : mapping of str to str
        First and last step number, each with the part of the name or the key from which it was taken.
    step_span : int
        Usual distance between two steps.
    gaps : int
        Number of other distances.
    holds, missing : mapping
        For each quantity, its contents in the log; or the results that require it and how to provide it.
    optimizer : str, optional
        State of the optimizer in the log.
    changes, notes, unused_keys : list of str
        Differences between the first and the last step; notes; keys of the files that are not read.
    tensors, elements : int, optional
    dtypes : mapping, optional
    trajectory_bytes, ledger_bytes : int, optional
        Projected sizes of the stores.
    ingest_seconds, pass_seconds : float, optional
        Estimated times. That of the ingest follows from a timed read of the first step.
    worker_memory : int or str, optional
        Memory of a worker process in bytes, or the reason why the memory limit is too low.
    """

    source: str
    format: str
    runs: int | None = None
    steps: int
    first_step: int
    last_step: int
    step_numbers: Mapping[str, str]
    step_span: int
    gaps: int
    holds: Mapping[str, str]
    missing: Mapping[str, str]
    optimizer: str | None = None
    changes: list[str]
    notes: list[str]
    unused_keys: list[str]
    tensors: int | None = None
    elements: int | None = None
    dtypes: Mapping[str, str] | None = None
    trajectory_bytes: int | None = None
    ledger_bytes: int | None = None
    ingest_seconds: float | None = None
    pass_seconds: float | None = None
    worker_memory: int | str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without entries that do not apply."""
        return {name: value for name, value in super().to_json().items() if value is not None}


@dataclass(frozen=True, kw_only=True, repr=False)
class Verification(Summary):
    """Result of verifying stored data against its checksums.

    Attributes
    ----------
    damages : tuple of Damage
        All corrupt data.
    """

    damages: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """Return whether all checksums match."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"damages": [damage.to_json() for damage in self.damages]}

    def __str__(self) -> str:
        return "".join(f"{damage}\n" for damage in self.damages) or "OK: all checksums match\n"


@dataclass(frozen=True, kw_only=True)
class ScannedRun:
    """Outcome of one run in a scan.

    Attributes
    ----------
    run : str
        Path of the log below ROOT.
    state : {"processed", "unchanged", "skipped", "failed"}
    what : str
        Number of new steps, or the error.
    do : str
        Remedy of the error.
    """

    run: str
    state: str
    what: str = ""
    do: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class ScanSummary(Summary):
    """Summary of a scan of the runs below a folder.

    Attributes
    ----------
    processed, unchanged, skipped, failed : int
        Numbers of runs.
    failures : mapping of str to str
        Run to error.
    message : str
        One line for log messages.
    runs : tuple of ScannedRun
        All runs. The JSON form omits them, because there may be many.
    """

    processed: int
    unchanged: int
    skipped: int
    failed: int
    failures: Mapping[str, str]
    message: str
    runs: tuple[ScannedRun, ...] = field(default=())

    @classmethod
    def of(cls, runs: tuple[ScannedRun, ...]) -> ScanSummary:
        """Count the outcomes of runs."""
        numbers = dict.fromkeys(("processed", "unchanged", "skipped", "failed"), 0)
        for run in runs:
            numbers[run.state] += 1
        counts = ", ".join(f"{number} {state}" for state, number in numbers.items() if number)
        return cls(
            **numbers,
            failures={run.run: run.what for run in runs if run.state == "failed"},
            message=f"{len(runs)} runs: {counts}" if runs else "no runs",
            runs=runs,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = super().to_json()
        del values["runs"]
        return values
