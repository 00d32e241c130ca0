"""Ingest, analyze and report one run. `natgrad.app.api` combines these stages for users.

The functions need no Prefect server. They take options that are already validated
(`natgrad.app.declarations.validated`), pass paths and never arrays, and return small summaries.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from natgrad.app import declarations, options
from natgrad.app.copying import LARGE_LOG_BYTES, copy_notice
from natgrad.app.folder import RunFolder
from natgrad.app.memory import memory_errors
from natgrad.app.progress import Progress, StageProgress, stage
from natgrad.app.summaries import (
    AnalysisSummary,
    ComparisonSummary,
    IngestSummary,
    ProcessSummary,
    ReplaySummary,
    Report,
)
from natgrad.compute import executors
from natgrad.compute.clusters import require_cluster, require_configuration
from natgrad.compute.ledger_pass import compute_ledger, plan_ledger
from natgrad.compute.plan import PlanLimits, peak_bytes
from natgrad.compute.processors import usable_processors
from natgrad.compute.work import calls
from natgrad.ingestion import Extent, StepWait, buffer_bytes, ingest
from natgrad.ingestion.read_options import ReadOptions
from natgrad.results import dataset as results
from natgrad.results.blocks import BlockTask, BlockWork
from natgrad.results.building import build
from natgrad.results.grouping import groups_of
from natgrad.results.inputs import replicate_products, update_table
from natgrad.results.sizes import block_bytes, require_memory
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.layout import IngestLimits, Layout, TrajectoryShape
from natgrad.schema.logs import logger
from natgrad.schema.names import ATTEMPT, REPLAYED, REPLICATE_LOSS
from natgrad.schema.version import RESULTS_VERSION, __version__
from natgrad.sources.replayed import Replays
from natgrad.sources.steps import NotYet
from natgrad.storage import LocalStorage, Location, Storage, open_all, open_storage, require_local, storage_errors
from natgrad.store import Ledger, Trajectory, exists

__all__ = [
    "RUNS_SHOWN",
    "Analysis",
    "analyze_run",
    "compare_runs",
    "ingest_run",
    "named_outs",
    "open_trees",
    "process_run",
    "replay_run",
    "report_run",
]

T = TypeVar("T")

RUNS_SHOWN = 8
"""Number of runs of a sweep that a page shows."""

_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Error codes of a location in which no file can be created."""

_log = logger(__name__)

_DEFAULTS = {name: option.option.default for name, option in declarations.declared(options.AnalyzeOptions).items()}


@dataclass(frozen=True)
class Analysis:
    """Options of an analysis; see `natgrad.app.options.AnalyzeOptions`."""

    learning_rate: float | None = None
    weight_decay: Mapping[str, float] | None = None
    evaluation: str = _DEFAULTS["evaluation"]
    gammas: Sequence[float] | None = None
    windows: Sequence[int] = tuple(_DEFAULTS["windows"])
    groups: Sequence[str] = tuple(_DEFAULTS["groups"])
    workers: int | None = None
    scheduler: str | None = None
    cluster: str | None = None
    worker_timeout: float = _DEFAULTS["worker_timeout"]
    memory_limit: int = _DEFAULTS["memory_limit"]
    trust_states: bool = False
    attempt: int | None = None

    def __post_init__(self) -> None:
        """Check the options that do not depend on a log (InputError)."""
        least = PlanLimits().reserved_bytes
        if self.memory_limit <= least:
            raise InputError(
                f"a worker needs more than {least} bytes before it reads anything, got {self.memory_limit}",
                where="option memory_limit",
                remedy="raise --memory-limit, for example to 512MiB",
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Analysis:
        """Build an Analysis from validated options, ignoring unrelated ones."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def executor(self, stack: ExitStack | None = None) -> executors.Executor:
        """Return the executor that these options request. Its cluster exists until the stack closes."""
        if self.scheduler is not None:
            return executors.existing_cluster(self.scheduler, worker_seconds=self.worker_timeout)
        workers = self._local_workers
        if self.cluster is not None:
            return executors.named_cluster(self.cluster, workers, worker_seconds=self.worker_timeout, stack=stack)
        return executors.local(workers, self.memory_limit)

    def check(self, extent: Extent) -> None:
        """Check the options that depend on the steps of the run.

        Raises
        ------
        InputError
            If there is no such attempt, or a window is longer than the run.
        """
        if self.attempt is not None and self.attempt >= extent.attempts:
            raise InputError(
                f"there is no attempt {self.attempt}; the last attempt is {extent.attempts - 1}",
                where="option attempt",
                remedy="omit --attempt to analyze the newest attempt",
            )
        updates, window = extent.updates(self.attempt), max(self.windows)
        # A run without an update is rejected later for that reason, regardless of its windows.
        if window > max(updates, 1):
            raise InputError(
                f"--window {window} is longer than the run, which has {updates} updates",
                where="option windows",
                remedy=f"use windows from 1 to {updates}, or log more steps first",
            )

    def check_pass(self, shape: TrajectoryShape, ledger: Storage, limits: PlanLimits = PlanLimits()) -> None:
        """Check that the pass over a trajectory can be planned, and that its workers can be reached.

        Raises
        ------
        InputError
            If the memory limit is too low, or a cluster cannot be started.
        Unavailable
            If the scheduler does not respond.
        """
        # The pass itself refuses a trajectory without updates.
        if shape.states > 1 and shape.layout.elements:
            self.projected_bytes(shape, ledger, limits)
        self.require_workers()

    def projected_bytes(self, shape: TrajectoryShape, ledger: Storage, limits: PlanLimits = PlanLimits()) -> int:
        """Return the projected peak memory of a process, for the pass and for the results.

        This is the process of the command with all its threads, or a worker process of a cluster with one thread.

        Raises
        ------
        InputError
            If it exceeds the memory limit, or the location of the ledger contains something else.
        """
        plan = plan_ledger(shape, ledger, memory_limit=self.memory_limit, limits=limits)
        groups = self.number_of_groups(shape.layout)
        worker = max(
            plan.projected_bytes,
            require_memory(shape, self.windows, limits.reserved_bytes, self.memory_limit, groups),
        )
        if self.scheduler is not None or self.cluster is not None:
            return worker
        return peak_bytes(self._local_workers, self.memory_limit, limits.reserved_bytes, worker)

    @property
    def _local_workers(self) -> int:
        return usable_processors() if self.workers is None else self.workers

    def number_of_groups(self, layout: Layout) -> int:
        """Return the number of groups of tensors (InputError if a pattern matches none)."""
        return len(groups_of(layout.names, self.groups))

    def require_workers(self) -> None:
        """Check that Dask is configured, and that the requested scheduler or cluster can be used.

        Raises
        ------
        InputError
            If the configuration of Dask is malformed, or the package of the cluster is missing.
        Unavailable
            If the scheduler does not respond.
        """
        require_configuration()
        if self.scheduler is not None:
            executors.require_scheduler(self.scheduler)
        if self.cluster is not None:
            require_cluster(self.cluster)


def ingest_run(
    source: Location | Sequence[Location],
    out: Location,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    pattern: str | None = None,
    exact_names: bool = False,
    sweep: bool = False,
    allow_gaps: bool = False,
    in_place: bool = False,
    gradient: str | None = None,
    largest_span: int | None = None,
    include: Sequence[str] | None = None,
    store: str | None = None,
    overwrite: bool = False,
    wait: StepWait | None = None,
    limits: IngestLimits = IngestLimits(),
    analysis: Analysis | None = None,
    progress: StageProgress | None = None,
) -> IngestSummary:
    """Read the new steps of the logs of a run into the trajectory of OUT; see `natgrad.ingestion.ingest`.

    If an analysis follows, its options are checked before anything is stored.
    """
    folder = RunFolder.of(out, store=store)
    sources = open_all(source)
    shapes: list[TrajectoryShape] = []

    def check_shape(shape: TrajectoryShape) -> None:
        shapes.append(shape)
        # A log that is followed may be rotated.
        large = wait is None and not in_place and shape.state_bytes > LARGE_LOG_BYTES
        local = all(log.local_path is not None for log in sources)
        if large and local and (overwrite or not exists(folder.trajectory)):
            _log.info("%s", copy_notice(sources, folder.trajectory, shape.state_bytes))
        if analysis is not None:
            analysis.check_pass(shape, folder.ledger)

    def planned() -> int:
        return PlanLimits().reserved_bytes + sum(map(buffer_bytes, shapes))

    with memory_errors(planned), storage_errors(*sources, folder.storage):
        return ingest(
            sources,
            folder.states,
            format=format,
            mapping=mapping,
            shift=shift,
            pattern=pattern,
            exact_names=exact_names,
            sweep=sweep,
            allow_gaps=allow_gaps,
            in_place=in_place,
            gradient=gradient,
            largest_span=largest_span,
            overwrite=overwrite,
            wait=wait,
            include=include or (),
            limits=limits,
            check=None if analysis is None else analysis.check,
            check_shape=check_shape,
            describing=stage(progress, "describe"),
            progress=stage(progress, "ingest"),
        )


def analyze_run(
    out: Location,
    analysis: Analysis = Analysis(),
    *,
    limits: PlanLimits = PlanLimits(),
    progress: StageProgress | None = None,
) -> AnalysisSummary:
    """Compute the missing part of the ledger of OUT, and the results from it.

    Raises
    ------
    InputError
        If OUT has no trajectory with two steps, an option does not fit it, or the memory limit is too low.
    """
    folder = RunFolder.of(out)

    def planned() -> int:
        return analysis.projected_bytes(Trajectory(folder.trajectory).shape, folder.ledger, limits)

    with memory_errors(planned), storage_errors(folder.storage), ExitStack() as stack:
        return _analyze(folder, analysis, limits, progress, analysis.executor(stack))


def _analyze(
    folder: RunFolder,
    analysis: Analysis,
    limits: PlanLimits,
    progress: StageProgress | None,
    executor: executors.Executor,
) -> AnalysisSummary:
    trajectory = Trajectory(folder.trajectory)
    analysis.check(Extent.of(trajectory))
    projected = 0
    if trajectory.n_states > 1 and trajectory.layout.elements:  # the pass refuses others
        projected = analysis.projected_bytes(trajectory.shape, folder.ledger, limits)
    computed = compute_ledger(
        folder.trajectory,
        folder.ledger,
        executor=executor,
        memory_limit=analysis.memory_limit,
        limits=limits,
        trust_states=analysis.trust_states,
        progress=stage(progress, "analyze"),
    )
    folder = RunFolder(folder.storage.latest())
    states = Trajectory(folder.trajectory)
    ledger = Ledger(folder.ledger)
    rows, inputs = update_table(
        states,
        ledger,
        learning_rate=analysis.learning_rate,
        weight_decay=analysis.weight_decay,
        evaluation=analysis.evaluation,
        groups=analysis.groups,
        attempt=analysis.attempt,
        with_gram=False,
    )
    provenance = {
        "source": states.source,
        "fingerprint": states.fingerprint(),
        "elements": states.layout.elements,
        "version": __version__,
        "results_version": RESULTS_VERSION,
        "options": {
            "learning_rate": analysis.learning_rate,
            "weight_decay": analysis.weight_decay,
            "evaluation": analysis.evaluation,
            "gamma": None if analysis.gammas is None else list(analysis.gammas),
            "window": list(analysis.windows),
            "groups": list(analysis.groups),
            "attempt": int(states.scalar(ATTEMPT).max()) if analysis.attempt is None else analysis.attempt,
        },
    }
    provenance |= {"unfinished": states.unfinished} if states.unfinished else {}
    if found := states.configurations():
        provenance["configuration"] = found if states.sweep else found[""]
    if states.gradient_source == REPLAYED:
        provenance["replay"] = Replays(folder.replay).provenance()
    additional = {}
    if states.replicates:
        # This imports SciPy's operators, which take a third of a second to load.
        from natgrad.results import replicates

        losses = states.scalar(REPLICATE_LOSS)[rows]
        additional["replicates"] = replicates.label_run(
            inputs, replicate_products(ledger, rows), states.replicates, losses
        )

    def call(work: BlockWork, tasks: Sequence[BlockTask]) -> Iterable[Any]:
        gram_bytes = 8 * len(ledger.layout.tensors) * len(ledger.vectors) ** 2
        return calls(
            executor,
            work,
            tasks,
            kind="results",
            out=folder.storage,
            task_bytes=max((gram_bytes * len(task.updates) for task in tasks), default=0),
            worker_bytes=block_bytes(states.shape, analysis.windows, analysis.number_of_groups(states.layout)),
            limits=limits,
        )

    with folder.results.lock("results") as storage:
        built = build(
            inputs,
            rows,
            folder.ledger.absolute(),
            storage,
            call,
            gammas=analysis.gammas,
            windows=analysis.windows,
            provenance=provenance,
            additional=additional,
            progress=stage(progress, "results"),
        )
        for text in built.summary["objective"]["warnings"]:
            _log.warning("%s", text)
        storage.publish(f"results of {folder.storage.name}: {len(inputs.steps)} updates")
    return AnalysisSummary(
        ledger=str(folder.ledger),
        results=str(folder.results),
        chunks=computed.chunks,
        computed_chunks=computed.computed_chunks,
        computed_updates=computed.computed_updates,
        projected_memory=projected,
        states_verified=computed.states_verified,
        **built.summary,
    )


def report_run(
    outs: Sequence[Location] | Mapping[str, Location],
    page: Location | None = None,
    version: str | None = None,
    progress: StageProgress | None = None,
) -> Report:
    """Write the report page of one or several runs.

    Parameters
    ----------
    outs : sequence or mapping of str to path
        Folders OUT. Without names, each run is named after its folder.
    page : path, optional
        Default: ``report.html`` in the first OUT.
    version : str, optional
        Version of an Icechunk repository to draw: id, tag or time. Requires ``page``.
    progress : callable, optional
        Called with the stage, the items done and the total number of items.

    Raises
    ------
    InputError
        If there are no results.
    """
    drawn = stage(progress, "report") or (lambda done, total: None)
    drawn(0, 1)
    named = {name: RunFolder.of(out, version=version) for name, out in named_outs(outs).items()}
    if version is not None and page is None:
        raise InputError(
            "the page of an old version requires a file name",
            where="option version",
            why="report.html in OUT is the page of the newest version",
            remedy="set the file to write with --page PAGE",
        )
    errors = storage_errors(*(folder.storage for folder in named.values()))
    with memory_errors(lambda: PlanLimits().reserved_bytes), errors:
        page = next(iter(named.values())).report if page is None else open_storage(page)
        if page.local_path is not None and page.is_folder():
            raise InputError(
                "the page must be a file, but it is a folder",
                where=str(page),
                remedy=f"use the name of a file, for example {page / 'report.html'}",
            )
        try:
            found = _write_page(named, page, drawn)
        except results.Damaged as error:
            if version is not None:
                raise
            damaged = [folder for folder in named.values() if error.where.startswith(f"{folder.results}/")]
            for folder in damaged:
                _compute_results_again(folder, error)
            found = _write_page(named, page, drawn)
    return found


def compare_runs(
    outs: Sequence[Location] | Mapping[str, Location], align: str, page: Location | None = None
) -> ComparisonSummary:
    """Compare the results of several runs, and write the page of the comparison.

    Parameters
    ----------
    outs : sequence or mapping of str to path
        Folders OUT. Without names, each run is named after its folder.
    align : str
        See `natgrad.results.comparison.compare`.
    page : path, optional
        Default: ``comparison.html`` in the first OUT.

    Raises
    ------
    InputError
        If there are no results, fewer than two runs, or the runs cannot be aligned.
    """
    from natgrad.reporting.comparison_page import write_comparison
    from natgrad.results.comparison import compare

    named = {name: RunFolder.of(out) for name, out in named_outs(outs).items()}
    with (
        memory_errors(lambda: PlanLimits().reserved_bytes),
        storage_errors(*(folder.storage for folder in named.values())),
    ):
        first = next(iter(named.values())).report.parent
        target = first / "comparison.html" if page is None else open_storage(page)
        found = compare({name: results.read(folder.results) for name, folder in named.items()}, align)
        return ComparisonSummary(report=_written(write_comparison, found, target), comparison=found)


def _written(write: Callable[[T, Storage], Any], content: T, page: Storage) -> str:
    """Write a page, and return its location; raise Unavailable if its folder is read-only."""
    try:
        return str(write(content, page))
    except OSError as error:
        if page.local_path is None or error.errno not in _NOT_WRITABLE:
            raise
        raise Unavailable(
            f"cannot write the page: {error.strerror}",
            where=str(page),
            why="its folder is read-only, or belongs to another user",
            remedy="choose another file with --page PAGE: OUT is only read",
        ) from error


def _write_page(named: Mapping[str, RunFolder], page: Storage, drawn: Progress) -> Report:
    # Imported here, because Matplotlib takes a second to load.
    from natgrad.reporting import page as report

    write = functools.partial(report.write_report, progress=drawn)
    return Report(report=_written(write, open_trees(named), page))


def _compute_results_again(folder: RunFolder, error: InputError) -> None:
    """Compute damaged results again, with the options of their analysis. Raise the error if these are also lost."""
    options = results.recorded_options(folder.results)
    _log.warning("%s (%s): the results are computed again", error.what, error.where)
    attempt = options["attempt"]
    newest = int(Trajectory(folder.trajectory).scalar(ATTEMPT).max(initial=0))
    analyze_run(
        folder.storage,
        Analysis(
            learning_rate=options["learning_rate"],
            weight_decay=options["weight_decay"],
            evaluation=options["evaluation"],
            gammas=options["gamma"],
            windows=options["window"],
            groups=options["groups"],
            attempt=None if attempt == newest else attempt,
        ),
    )


def named_outs(outs: Sequence[Location] | Mapping[str, Location]) -> dict[str, Location]:
    """Name runs after their folders, or after their full locations if two folders have the same name."""
    if not outs:
        raise InputError("no run was specified", where="OUT", remedy="pass the folders OUT of one or more runs")
    if isinstance(outs, Mapping):
        return dict(outs)
    names = [open_storage(out).absolute().name for out in outs]
    if len(set(names)) < len(names):
        names = [str(open_storage(out).absolute()) for out in outs]
    return dict(zip(names, outs, strict=True))


def process_run(
    source: Location | Sequence[Location],
    out: Location,
    values: Mapping[str, Any],
    *,
    overwrite: bool = False,
    wait: StepWait | None = None,
    skip_unchanged: bool = False,
    progress: StageProgress | None = None,
) -> ProcessSummary | None:
    """Ingest, analyze and report a run.

    Parameters
    ----------
    source, out
        See `ingest_run`.
    values : mapping
        Validated options of `natgrad.app.options.RunOptions`; other entries are ignored.
    overwrite, wait
        See `natgrad.ingestion.ingest`.
    skip_unchanged : bool
        Return None, without an analysis, if the log has no new step.
    progress : callable, optional
        Called with the stage, the items done and the total number of items.
    """
    analysis = Analysis.of(values)
    ingested = ingest_run(
        source,
        out,
        **declarations.selected(options.ReadOptions, values),
        overwrite=overwrite,
        wait=wait,
        analysis=analysis,
        progress=progress,
    )
    if wait is not None and ingested.steps < 2:
        raise NotYet(
            f"only step {ingested.last_step} is logged, but an update requires two steps",
            where=ingested.source,
            why="the training run has just started",
            remedy="run again later; natgrad process waits for it with --follow",
        )
    if skip_unchanged and not ingested.new_steps and not ingested.completed_steps:
        return None
    analyzed = analyze_run(out, analysis, progress=progress)
    return ProcessSummary(**vars(ingested), **vars(analyzed), **vars(report_run([out], progress=progress)))


def replay_run(
    source: Location | Sequence[Location],
    out: Location,
    values: Mapping[str, Any],
    *,
    progress: StageProgress | None = None,
) -> ReplaySummary:
    """Evaluate an objective at the states of a log, and process the run with its gradients.

    Parameters
    ----------
    source, out
        See `ingest_run`. OUT is a local folder.
    values : mapping
        Validated options of `natgrad.app.options.ReplayOptions`.
    progress : callable, optional
        Called with the stage, the items done and the total number of items.
    """
    # Workers import the module of the objective, and the libraries that it needs.
    from natgrad.objectives.evaluation import Curvature
    from natgrad.objectives.replay import LogOptions, evaluate_log

    analysis = Analysis.of(values)
    if (storage := open_storage(out)).local_path is None:
        raise InputError(
            "OUT of a replay must be a folder",
            where=str(storage),
            why="workers append to files in it, which object stores cannot do",
            remedy="use a folder; workers on other hosts need one in a file system that all of them share",
        )
    folder, sources = RunFolder(LocalStorage(require_local(out, "OUT")).absolute()), open_all(source)
    replays = Replays(folder.replay)
    with storage_errors(*sources, folder.storage), ExitStack() as stack:
        of_log = declarations.selected(options.RunLogOptions, values)
        read = ReadOptions.requested(
            sources,
            of_log["mapping"],
            of_log["shift"],
            of_log["pattern"],
            of_log["exact_names"],
            gradient=REPLAYED,
        )
        read = read if values["overwrite"] else read.for_resuming(folder.trajectory)
        log = LogOptions(
            tuple(one.absolute() for one in sources),
            of_log["format"],
            read.mapping,
            read.shift,
            read.pattern,
            read.exact_names,
        )
        if values["scheduler"] is None and values["cluster"] is None:
            devices = values["devices"] or ()
            workers = values["workers"] or len(devices) or usable_processors()
            begun = "" if values["overwrite"] else replays.document("fingerprint").get("threads", "")
            kept = int(begun) if begun.isdecimal() else max(1, usable_processors() // workers)
            executor = executors.processes(workers, values["threads"] or kept)
        else:
            workers, devices = values["workers"] or usable_processors(), ()
            executor = analysis.executor(stack)
        evaluated = evaluate_log(
            log,
            replays,
            executor,
            objective=values["objective"],
            folder=str(Path.cwd()),
            curvature=Curvature(values["hvp"], values["taylor_point"], values["hessian_eigenvalues"]),
            keep_gradients=values["keep_gradients"],
            workers=workers,
            devices=devices,
            overwrite=values["overwrite"],
            progress=stage(progress, "replay"),
        )
    processed = process_run(
        source,
        out,
        {
            **{name: option.option.default for name, option in declarations.declared(options.RunOptions).items()},
            **declarations.selected(options.RunOptions, values),
            "gradient": REPLAYED,
            "in_place": values["keep_gradients"],
            "allow_gaps": True,
        },
        overwrite=values["overwrite"],
        progress=progress,
    )
    assert processed is not None  # it is None only for a log that is followed
    return ReplaySummary(**vars(processed), new_evaluations=evaluated.pop("new_evaluations"), replay=evaluated)


def open_trees(named: Mapping[str, RunFolder]) -> dict[str, Any]:
    """Open the results that a page shows, by name."""
    trees = {}
    for name, folder in named.items():
        of_each = results.runs(results.read(folder.results))
        for run in list(of_each)[:RUNS_SHOWN]:
            trees[f"{name}/{run}" if run else name] = of_each[run]
        if len(of_each) > RUNS_SHOWN:
            _log.warning(
                "the page shows only the first %d of the %d runs of %s", RUNS_SHOWN, len(of_each), folder.storage
            )
    return trees
