"""Declare each option and argument once, for the command line, the flows and Python.

`natgrad.app.declarations` describes how the declarations are used. This module imports nothing heavy, so
``natgrad --help`` is fast.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypedDict

from natgrad.app import option_checks as checks
from natgrad.app.declarations import Option
from natgrad.app.progress import StageProgress

__all__ = [
    "AnalyzeOptions",
    "DemoOptions",
    "DemoOut",
    "HistoryOptions",
    "IngestOptions",
    "InspectOptions",
    "Json",
    "Last",
    "Limit",
    "Out",
    "Outs",
    "Page",
    "Pool",
    "ProcessOptions",
    "Progress",
    "Quiet",
    "ReadOptions",
    "ReplayOptions",
    "Root",
    "RunOptions",
    "RunsFolder",
    "ScanFlowOptions",
    "ScanOptions",
    "ScheduleOptions",
    "ScheduledScanOptions",
    "ShowVersion",
    "Source",
    "StatusRoot",
    "VersionOptions",
    "WorkerOptions",
]

# The arguments ------------------------------------------------------------------------------------------------

Location = str | Path

Source = Annotated[
    Location | Sequence[Location],
    Option(
        "Folder or URL of a training log, several logs of one run, or a run file that lists them.",
        metavar="SOURCE",
        required=True,
        positional=True,
    ),
]
Out = Annotated[
    Location,
    Option(
        "Folder or URL for the stores, results and report of the run.",
        metavar="OUT",
        required=True,
        positional=True,
    ),
]
Outs = Annotated[
    Location | Sequence[Location] | Mapping[str, Location],
    Option(
        "Folders or URLs of one or more runs. Without names, each run is named after its folder.",
        metavar="OUT",
        required=True,
        positional=True,
    ),
]
Root = Annotated[
    Location, Option("Folder below which the runs are logged.", metavar="ROOT", required=True, positional=True)
]
RunsFolder = Annotated[
    Location,
    Option("Folder for the results: one folder for each run.", metavar="OUT", required=True, positional=True),
]
StatusRoot = Annotated[
    Location, Option("Folder that contains the OUT of many runs.", metavar="ROOT", required=True, positional=True)
]
DemoOut = Annotated[
    Location, Option("Folder for the logs, the runs and the report.", "demo", metavar="OUT", positional=True)
]
Progress = Annotated[
    StageProgress | None,
    Option(
        "Called with the stage (replay, ingest, analyze), the number of items done and the total number of items.",
        unset="no calls",
    ),
]

# Options of single commands

Page = Annotated[
    Location | None,
    Option("File of the page. It is replaced.", unset="report.html in the first OUT", metavar="FILE"),
]
Serve = Annotated[
    bool,
    Option(
        "Show the page at an address of this machine, until Ctrl-C, instead of writing it. It then has the values "
        "of every update of every tensor.",
        False,
    ),
]
Port = Annotated[
    int | None,
    Option("Port of the address, with {serve}.", unset="a free one", metavar="PORT", minimum=1, maximum=65535),
]
ComparisonPage = Annotated[
    Location | None,
    Option("File of the page. It is replaced.", unset="comparison.html in the first OUT", metavar="FILE"),
]
Align = Annotated[
    str,
    Option(
        "Quantity by which runs are aligned: step, loss (the smallest so far) or length (of the path of updates).",
        "step",
        metavar="KIND",
        choices=checks.alignments,
    ),
]
Last = Annotated[int | None, Option("Number of versions to list.", unset="all", metavar="N", minimum=1)]
Limit = Annotated[int, Option("Number of flows that run at the same time.", 1, metavar="N", minimum=1)]
Pool = Annotated[str, Option("Work pool whose workers run the flows.", metavar="NAME", required=True)]
Json = Annotated[bool, Option("Print one JSON object on standard output.", False, flag="--json")]
Quiet = Annotated[bool, Option("Show only warnings and errors.", False)]
ShowVersion = Annotated[bool, Option("Print the version.", False, flag="--version")]

# The options --------------------------------------------------------------------------------------------------

_MEBIBYTE = 1 << 20

_YEAR = 366 * 86_400.0

_Evaluation = Annotated[
    str,
    Option(
        "Data on which the loss and the gradient of a step are evaluated: batch (the mini-batch of the step), "
        "fixed (the same data at every step) or unknown. Losses of different batches are not compared.",
        "unknown",
        metavar="KIND",
        choices=checks.evaluations,
    ),
]

_MemoryLimit = Annotated[
    int | str,
    Option(
        "Memory limit of each worker process, in bytes or as text such as 2GB.",
        512 * _MEBIBYTE,
        unset="512MiB",
        metavar="BYTES",
        minimum=1,
        check=checks.memory_bytes,
    ),
]


class RunLogOptions(TypedDict, total=False):
    """Options for opening the log of one run."""

    format: Annotated[
        str | None,
        Option(
            "Log format (see 'natgrad formats').",
            unset="detected automatically",
            metavar="NAME",
            choices=checks.formats,
        ),
    ]
    mapping: Annotated[
        Mapping[str, str] | None,
        Option(
            "Key under which a quantity (parameter, gradient, hvp, loss, learning_rate, step) is stored in the log "
            "files. line=FORM states the form of the lines of a text log.",
            unset="the usual keys of the format",
            flag="--map",
            metavar="QUANTITY=KEY",
            parse=checks.parsed_map,
            check=checks.checked_map,
            unordered=True,
        ),
    ]
    shift: Annotated[
        Mapping[str, int] | None,
        Option(
            "A value of the quantity logged at step s belongs to the state of step s+K. For example, K is -1 for "
            "gradients that are logged after the update.",
            unset="no shift",
            metavar="QUANTITY=K",
            parse=checks.parsed_shift,
            check=checks.checked_shift,
            unordered=True,
        ),
    ]
    pattern: Annotated[
        str | None,
        Option(
            "Names of the steps in the folder of the log: {{step}} stands for the number, * for any other text, "
            "for example 'weights-{{step}}-*.pt'.",
            unset="the usual names",
            metavar="NAME",
            check=checks.checked_pattern,
        ),
    ]
    exact_names: Annotated[
        bool,
        Option(
            "Do not match parameters with gradients whose names differ by what DDP, torch.compile, FSDP or PEFT "
            "add.",
            False,
        ),
    ]


class LogOptions(RunLogOptions, total=False):
    """Options for opening a log."""

    sweep: Annotated[bool, Option("Read a folder that contains the logs of many runs of one model.", False)]


class ReadOptions(LogOptions, total=False):
    """Options for opening a log and for storing its steps and arrays."""

    allow_gaps: Annotated[bool, Option("Accept steps that are not evenly spaced.", False)]
    in_place: Annotated[
        bool,
        Option(
            "Read the states of a new OUT from the files of the log instead of copying them. The files must stay "
            "as they are; the ledger and the results do not need them.",
            False,
        ),
    ]
    gradient: Annotated[
        str | None,
        Option(
            "Where gradients come from: logged; from-optimizer, which recovers them from consecutive states of the "
            "optimizer; or replayed, the evaluations of natgrad replay in OUT.",
            unset="logged",
            metavar="NAME",
            choices=checks.gradients,
        ),
    ]
    largest_span: Annotated[
        int | None,
        Option(
            "Maximum number of updates between two states from which a gradient is recovered ({gradient} "
            "from-optimizer). It is a weighted mean over these updates.",
            unset="20",
            metavar="K",
            minimum=1,
        ),
    ]
    include: Annotated[
        Sequence[str] | None,
        Option(
            "Data to store in addition to parameters, gradients and hvp: optimizer, the state of the optimizer.",
            unset="nothing else",
            metavar="NAME",
            choices=checks.included,
            unordered=True,
        ),
    ]
    store: Annotated[
        str | None,
        Option(
            "Storage of a new OUT: plain, or icechunk (object stores only), which keeps all versions.",
            unset="plain",
            metavar="KIND",
            choices=checks.storage_kinds,
        ),
    ]


class OverwriteOptions(TypedDict, total=False):
    """Option to replace the contents of OUT."""

    overwrite: Annotated[bool, Option("Start from scratch and replace the stores in OUT.", False)]


class FollowOptions(TypedDict, total=False):
    """Options for following a log that is being written."""

    follow: Annotated[bool, Option("Keep running, and process new steps as they are logged.", False)]
    interval: Annotated[
        float,
        Option(
            "Seconds between two passes over the log, with {follow}.",
            10.0,
            metavar="SECONDS",
            minimum=0,
            maximum=_YEAR,
        ),
    ]
    gap_timeout: Annotated[
        float,
        Option(
            "Seconds for which {follow} waits for a missing step while later ones are logged. It then continues "
            "without the step, with a warning. Steps that the run has removed are not waited for.",
            60.0,
            metavar="SECONDS",
            minimum=0,
        ),
    ]
    idle_timeout: Annotated[
        float | None,
        Option(
            "Seconds without a new step after which {follow} ends.", unset="no limit", metavar="SECONDS", minimum=0
        ),
    ]


class WorkerOptions(TypedDict, total=False):
    """Options for the workers of this machine."""

    workers: Annotated[
        int | None,
        Option(
            "Number of threads or processes on this machine, or of processes of {cluster}.",
            unset="the number of processors of this machine",
            metavar="N",
            minimum=1,
        ),
    ]
    memory_limit: _MemoryLimit


class AnalyzeOptions(WorkerOptions, total=False):
    """Options for computing the results."""

    scheduler: Annotated[
        str | None,
        Option(
            "Address of an existing Dask scheduler.",
            unset="workers of this machine",
            metavar="ADDRESS",
            check=checks.scheduler_address,
        ),
    ]
    cluster: Annotated[
        str | None,
        Option(
            "Dask cluster to start: slurm, kubernetes, ...; see docs/howto/cluster.md.",
            unset="workers of this machine",
            metavar="NAME",
            choices=checks.clusters,
        ),
    ]
    worker_timeout: Annotated[
        float,
        Option(
            "Seconds for which a pass on a cluster waits if no worker can take its tasks.",
            600.0,
            metavar="SECONDS",
            minimum=0,
        ),
    ]
    learning_rate: Annotated[
        float | None,
        Option("Learning rate of steps without a logged one.", unset="not known", metavar="RATE", above=0),
    ]
    weight_decay: Annotated[
        float | Mapping[str, float] | None,
        Option(
            "Coefficient of decoupled weight decay (AdamW) where the log has none: of all tensors, or of those "
            "whose names match a pattern, TENSOR=LAMBDA; the last match applies. The results then also have the "
            "updates without decay.",
            unset="not known",
            metavar="[TENSOR=]LAMBDA",
            minimum=0,
            parse=checks.parsed_decay,
            check=checks.decay_by_pattern,
        ),
    ]
    evaluation: _Evaluation
    gammas: Annotated[
        Sequence[float] | None,
        Option(
            "Weights of the metric family, eq. (22). If they are set, the results of tensors also have the family.",
            unset="0.01, 0.1, 1, 10 and 100, for the model only",
            flag="--gamma",
            metavar="GAMMA",
            above=0,
            unordered=True,
        ),
    ]
    windows: Annotated[
        Sequence[int] | None,
        Option(
            "Windows of m updates, eq. (3). Windows of one update are always computed.",
            [1],
            flag="--window",
            metavar="M",
            minimum=1,
            unordered=True,
        ),
    ]
    groups: Annotated[
        Sequence[str],
        Option(
            "Groups of tensors in the results: block (the numbered parts of the model), layer (the tensors of a "
            "module), or a pattern of names, in which * stands for any text.",
            ["block"],
            metavar="PATTERN",
            unordered=True,
        ),
    ]
    trust_states: Annotated[
        bool,
        Option(
            "Do not compare the states that are read with their checksums. 'natgrad verify' does that, too.", False
        ),
    ]
    attempt: Annotated[
        int | None,
        Option(
            "Attempt of a restarted run to analyze, counted from 0.",
            unset="the newest",
            metavar="K",
            minimum=0,
        ),
    ]


class RunOptions(ReadOptions, AnalyzeOptions, total=False):
    """Options for ingesting and analyzing one run."""


class ProcessOptions(RunOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.process`."""


class IngestOptions(ReadOptions, OverwriteOptions, FollowOptions, total=False):
    """Options of `natgrad.ingest`."""


class ReplayOptions(RunLogOptions, AnalyzeOptions, OverwriteOptions, total=False):
    """Options of `natgrad.replay`."""

    objective: Annotated[
        str,
        Option(
            "Function without arguments that returns the objective, as package.module:factory. Modules are also "
            "found in the current directory.",
            metavar="MODULE:FACTORY",
            required=True,
            check=checks.objective_name,
        ),
    ]
    keep_gradients: Annotated[
        bool,
        Option(
            "Keep the gradients in OUT, which then has states. By default, workers reduce them to inner products.",
            False,
        ),
    ]
    hvp: Annotated[
        bool,
        Option("Also evaluate the product of the Hessian with each displacement, at the state before it.", False),
    ]
    taylor_point: Annotated[
        bool,
        Option(
            "Also find lambda of eq. (11) for each update. The Hessian is then evaluated there, and its product is "
            "evaluated as with {hvp}.",
            False,
        ),
    ]
    hessian_eigenvalues: Annotated[
        bool, Option("Also compute the extreme eigenvalues of the Hessian for each update, by Lanczos.", False)
    ]
    threads: Annotated[
        int | None,
        Option(
            "Number of threads that libraries may use in each worker on this machine.",
            unset="the number of processors, divided by the number of workers, or that of existing evaluations",
            metavar="N",
            minimum=1,
        ),
    ]
    devices: Annotated[
        Sequence[str] | None,
        Option(
            "Device of CUDA (CUDA_VISIBLE_DEVICES) of a worker on this machine. Workers take the devices in turn.",
            unset="workers see all devices",
            flag="--device",
            metavar="DEVICE",
        ),
    ]


class InspectOptions(LogOptions, total=False):
    """Options of `natgrad.inspect`."""

    evaluation: _Evaluation
    memory_limit: _MemoryLimit


class ProcessLimits(TypedDict, total=False):
    """Options for the process of a run."""

    stall_timeout: Annotated[
        float,
        Option(
            "Seconds without progress after which a run is stopped. The run fails, and the others continue.",
            1800.0,
            metavar="SECONDS",
            above=0,
            maximum=_YEAR,
        ),
    ]
    process_memory: Annotated[
        int | str | None,
        Option(
            "Memory limit of the process of each run, in bytes or as text such as 8GB. A run that needs more "
            "fails. Only Linux enforces it.",
            unset="the memory of this machine, divided by the number of runs at a time",
            metavar="BYTES",
            minimum=1,
            check=functools.partial(checks.memory_bytes, option="process_memory"),
        ),
    ]


class ScanOptions(RunOptions, ProcessLimits, total=False):
    """Options of `natgrad.scan`: those of each run, and of the processes in which the runs are processed."""

    at_once: Annotated[
        int,
        Option("Number of runs that are processed at the same time, each in a process.", 1, metavar="N", minimum=1),
    ]


class LinkOptions(TypedDict, total=False):
    """Options for what Prefect shows about a run."""

    report_url: Annotated[
        str | None,
        Option(
            "Web server that shows the reports, for links in Prefect: FOLDER=URL, for example "
            "/data/runs=http://lab:8000 if /data/runs/a/report.html is at http://lab:8000/a/report.html.",
            unset="reports have no link, but their paths are shown",
            metavar="FOLDER=URL",
            check=checks.report_url,
        ),
    ]
    alert_angle: Annotated[
        float | None,
        Option(
            "Angle in radians. If the median angle of the last part of a run exceeds it, Prefect gets the event "
            "natgrad.angle-exceeded, on which an automation can act.",
            unset="no event is sent",
            metavar="RADIANS",
            minimum=0,
            maximum=3.141592653589793,
        ),
    ]


class HistoryOptions(TypedDict, total=False):
    """Option for the history of a Prefect server."""

    keep_days: Annotated[
        float | None,
        Option(
            "Days after which a scan deletes flow runs of natgrad, with their artifacts, from the Prefect server.",
            unset="they are kept",
            metavar="DAYS",
            minimum=0,
        ),
    ]


class ScanFlowOptions(ScanOptions, LinkOptions, HistoryOptions, total=False):
    """Options of a scan as a flow."""


class VersionOptions(TypedDict, total=False):
    """Option for reading a version of OUT."""

    version: Annotated[
        str | None,
        Option(
            "Version of an Icechunk repository: id, tag or time (see 'natgrad versions').",
            unset="the newest",
            metavar="VERSION",
        ),
    ]


class ScheduleOptions(TypedDict, total=False):
    """Options for the schedule of a deployment."""

    cron: Annotated[
        str | None,
        Option("Schedule of the scans in cron syntax, for example '*/10 * * * *'.", metavar="CRON"),
    ]
    every: Annotated[
        float | None,
        Option(
            "Seconds between two scans, instead of {cron}.",
            metavar="SECONDS",
            minimum=1,
            maximum=_YEAR,
        ),
    ]
    name: Annotated[
        str,
        Option(
            "Name of the deployments. Use a different name for each ROOT.",
            "natgrad",
            metavar="NAME",
            check=checks.deployment_name,
        ),
    ]


class ScheduledScanOptions(ScheduleOptions, ScanFlowOptions, total=False):
    """Options of a scan on a schedule."""


class DemoOptions(TypedDict, total=False):
    """Options of the demonstration as flows."""

    workers: Annotated[int, Option("Number of Dask worker processes.", 2, metavar="N", minimum=1)]
