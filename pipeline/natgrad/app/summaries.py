"""Define the summaries that the public functions return. The command line prints their JSON form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from natgrad.ingestion import IngestSummary
from natgrad.schema.errors import InputError
from natgrad.schema.summary import Summary, summary_lines
from natgrad.schema.text import printable
from natgrad.store.verify import Damage

if TYPE_CHECKING:
    from natgrad.results.comparison import Comparison

__all__ = [
    "AnalysisSummary",
    "ComparisonSummary",
    "IngestSummary",
    "Inspection",
    "MovedStates",
    "ProcessSummary",
    "ReplaySummary",
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
        Memory of a process in bytes, with all its threads, projected before the pass.
    states_verified : str, optional
        Time since which every state has been compared with its checksums, by a pass or by `natgrad.verify`. None if
        that is not known for a state, because it was trusted (``trust_states``), or if the run has no states.
    objective : mapping
        Whether losses and gradients belong to one objective: ``evaluation``, as declared, ``consistency``
        (consistent, inconsistent or undecided), its median ``residual``, and ``warnings``.
    status : mapping of str to int
        Number of updates with each status.
    gradient_source : str
        Origin of the gradients: ``logged``, ``recorded`` in the training loop without states, ``recovered``,
        ``replayed``, or ``none`` if the log has no gradients.
    gradient_recovery : mapping, optional
        For recovered gradients: ``batch``, whether they are ``clipped``, ``rule``, the largest ``error_bound``,
        what the ``check`` proves, its largest ``check_residual``, and the maximum number of ``updates`` between
        states. The JSON form omits it for others.
    angle, condition_number, update_to_weight : list of float, optional
        Minimum, median and maximum over the updates of the model, with the gradient itself as the estimate.
    angle_course : list of float, optional
        Median angle of the model in consecutive parts of the run.
    worst_tensors : list of mapping
        Tensors with the smallest share of effective updates and the largest mean angle, see
        `natgrad.results.ranking.RankedTensor`.
    angle_without_decay : list of float, optional
        The same for the updates without weight decay. The JSON form omits it if the results do not have them.
    """

    ledger: str
    results: str
    updates: int
    chunks: int
    computed_chunks: int
    computed_updates: int
    projected_memory: int
    states_verified: str | None
    objective: Mapping[str, Any]
    status: Mapping[str, int]
    angle: list[float] | None
    condition_number: list[float] | None
    update_to_weight: list[float] | None
    angle_course: list[float | None] | None
    worst_tensors: list[Mapping[str, Any]]
    gradient_source: str
    angle_without_decay: list[float] | None = None
    gradient_recovery: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, without entries that do not apply."""
        values = super().to_json()
        for name in ("angle_without_decay", "gradient_recovery"):
            if getattr(self, name) is None:
                del values[name]
        return values


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
class ComparisonSummary(Report):
    """Differences of several runs, and the page that shows them.

    Attributes
    ----------
    comparison : Comparison
        The labelled curves and tables, see `natgrad.results.comparison.Comparison`. The JSON form has its tables.
    """

    comparison: Comparison

    def to_json(self) -> dict[str, Any]:
        """Return plain values: one row for each run, each difference, and each tensor with a large difference."""
        found = self.comparison
        tensors = found.tensors.sortby(-found.tensors["difference"].fillna(-1.0)).isel(tensor=slice(None, 10))
        runs = [str(run) for run in tensors["run"].values]
        return {
            "align": found.align,
            "runs": found.overview,
            "differing_options": [{"option": name, **values} for name, values in found.options.items()],
            "differing_configuration": [{"key": name, **values} for name, values in found.configuration.items()],
            "differing_tensors": [
                {
                    "tensor": str(name),
                    "difference": _number(tensors["difference"].values[index]),
                    **{run: _number(tensors["mean_angle"].values[row, index]) for row, run in enumerate(runs)},
                }
                for index, name in enumerate(tensors["tensor"].values)
            ],
            "warnings": found.warnings,
            "report": self.report,
        }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True, repr=False)
class ProcessSummary(Report, AnalysisSummary, IngestSummary):
    """Summary of ingest, analysis and report of a run."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ReplaySummary(ProcessSummary):
    """Summary of the replay of a run.

    Attributes
    ----------
    new_evaluations : int
        Number of evaluations of states by this replay, without those that test the determinism.
    replay : dict
        Objective, fingerprint, determinism and number of all evaluations; see
        `natgrad.sources.replayed.Replays.provenance`.
    """

    new_evaluations: int
    replay: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection(Summary):
    """Contents of a folder or file, the command that processes it, missing quantities, and the cost of processing.

    The command was tried on the first two states and the last one. Entries that do not apply are None, and the JSON
    form omits them. If there is a command, the entries from ``steps`` on describe the log that it reads.

    Attributes
    ----------
    source, format : str
        The format is that of the logs that can be read.
    contents : mapping of str to str
        For each kind of files and folders, their number, and the first and last name.
    command : str, optional
        Command that processes the source, in which OUT stands for the folder of the results. None if there is none.
    run_file : mapping, optional
        ``path`` and ``content`` of a run file that lists the logs of the command. A command that names it needs it;
        otherwise it is useful for scans only.
    other_commands : list of str
        Other commands that were tried successfully, for other runs or other logs of the run.
    refused : mapping of str to str
        Attempts that failed, and the reasons that the readers state.
    error : mapping, optional
        ``what``, ``where``, ``why`` and ``do`` if there is no command.
    nearest_format : str, optional
        Format that the source resembles most, and why it is not of this format.
    provides : mapping of str to str
        For each log that was found in the source, its quantities and their steps.
    objective : str, optional
        Whether losses and gradients belong to one objective: what was declared with ``--evaluation``, and
        ``consistent``, ``not consistent`` or ``unknown``, with the reason.
    gradient_from : mapping of str to str, optional
        For a log without gradients: how to obtain them, and what that takes, the cheapest approach first. Those
        that are not possible come last, with the reason.
    steps, first_step, last_step : int, optional
    runs : int, optional
        Number of runs of a sweep.
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
    log_bytes : int, optional
        Size of the files of the log.
    trajectory_bytes, ledger_bytes : int, optional
        Projected sizes of the stores.
    in_place : str, optional
        What ``--in-place`` saves, unless the arrays are not plain bytes of the files.
    ingest_seconds, pass_seconds, process_seconds : float, optional
        Estimated times. That of the ingest follows from a timed read of the first step.
    worker_memory : int or str, optional
        Memory of a process in bytes, with all its threads, or the reason why the memory limit is too low.
    """

    source: str
    format: str
    contents: Mapping[str, str]
    command: str | None = None
    run_file: Mapping[str, str] | None = None
    other_commands: list[str] = field(default_factory=list)
    refused: Mapping[str, str] = field(default_factory=dict)
    error: Mapping[str, str] | None = None
    nearest_format: str | None = None
    provides: Mapping[str, str] = field(default_factory=dict)
    objective: str | None = None
    gradient_from: Mapping[str, str] | None = None
    runs: int | None = None
    steps: int | None = None
    first_step: int | None = None
    last_step: int | None = None
    step_numbers: Mapping[str, str] = field(default_factory=dict)
    step_span: int | None = None
    gaps: int | None = None
    holds: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    optimizer: str | None = None
    changes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused_keys: list[str] = field(default_factory=list)
    tensors: int | None = None
    elements: int | None = None
    dtypes: Mapping[str, str] | None = None
    log_bytes: int | None = None
    trajectory_bytes: int | None = None
    ledger_bytes: int | None = None
    ingest_seconds: float | None = None
    pass_seconds: float | None = None
    process_seconds: float | None = None
    in_place: str | None = None
    worker_memory: int | str | None = None

    @property
    def readable(self) -> bool:
        """Return True if a command was found, or if a log was found that others could supplement."""
        return self.command is not None or self.steps is not None

    @property
    def refusal(self) -> InputError | None:
        """Return the error, if there is no command."""
        if self.error is None:
            return None
        return InputError(
            self.error["what"], where=self.error["where"], why=self.error["why"], remedy=self.error["do"]
        )

    def __str__(self) -> str:
        values = self.to_json()
        optional = ("other_commands", "refused", "provides", "changes", "notes", "unused_keys", "holds", "missing")
        values = {name: value for name, value in values.items() if value or name not in optional}
        file = values.pop("run_file", None)
        text = "".join(summary_lines(values))
        if file is None:
            return text
        lines = "".join(f"  {printable(line)}".rstrip() + "\n" for line in file["content"].splitlines())
        needed = file["path"] in (self.command or "")
        use = "save these lines before you run the command" if needed else "optional; natgrad scan reads it"
        return f"{text}run file {printable(file['path'])} ({use})\n{lines}"

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
    unfinished : str
        What the log did not contain yet of the last state; empty if nothing is missing.
    """

    damages: tuple[Damage, ...]
    unfinished: str = ""

    @property
    def ok(self) -> bool:
        """True if all checksums match."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        damages = {"damages": [damage.to_json() for damage in self.damages]}
        return damages | ({"unfinished": self.unfinished} if self.unfinished else {})

    def __str__(self) -> str:
        damages = "".join(f"{damage}\n" for damage in self.damages) or "OK: all checksums match\n"
        return damages + (f"{self.unfinished}\n" if self.unfinished else "")


@dataclass(frozen=True, kw_only=True, repr=False)
class MovedStates(Summary):
    """Summary of copying states that were processed in place, or of removing copies.

    Attributes
    ----------
    trajectory : str
        The store.
    states : int
        Number of states that were copied or removed.
    bytes : int
        Their size.
    """

    trajectory: str
    states: int
    bytes: int


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
