"""One run from end to end: the folder OUT, and what is done in it.

The command line and the flows are two faces of these functions; none of them needs a Prefect server. Each
returns a small summary of plain values and passes paths, never arrays.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import compute, levels, results
from pipeline.blocks import MEBIBYTE
from pipeline.ingest import ingest
from pipeline.places import each, network_errors, place
from pipeline.places.repository import newest, outside, place_of_run, publish
from pipeline.preconditioner import adam_eigenvalues
from pipeline.schema import (
    ATTEMPT,
    METRIC_EIGENVALUES,
    OPTIMIZER_NUMBERS,
    REPLICATE_LOSS,
    RUN,
    STEP,
    InputError,
    Status,
)
from pipeline.sources.base import NotYet
from pipeline.store import Ledger, Trajectory, exists, only_writer
from pipeline.store.verify import Damage, verify_ledger, verify_trajectory

__all__ = [
    "MEMORY_LIMIT",
    "READING",
    "RUNS_SHOWN",
    "Analysis",
    "RunFolder",
    "analyze_run",
    "describe_run",
    "draw_run",
    "follow",
    "given",
    "ingest_run",
    "report_run",
    "verify_run",
]

MEMORY_LIMIT = 512 * MEBIBYTE
"""Bytes that a worker process may use, where nothing else is said."""

READING = ("format", "mapping", "shift", "sweep", "allow_gaps", "include", "store")
"""Options of `ingest_run` that say what a log is, and how a trajectory is made of it."""

RUNS_SHOWN = 8
"""Runs of a sweep that a page shows."""

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RunFolder:
    """The folder OUT of a run and the names in it."""

    path: Path

    @classmethod
    def of(cls, out: str | Path, *, store: str | None = None, version: str | None = None) -> RunFolder:
        """Folder of a run, or its Icechunk repository; see `pipeline.places.repository.place_of_run`."""
        return cls(place_of_run(out, store=store, version=version))

    @property
    def trajectory(self) -> Path:
        """Trajectory store."""
        return self.path / "trajectory.zarr"

    @property
    def ledger(self) -> Path:
        """Gram ledger."""
        return self.path / "ledger.zarr"

    @property
    def results(self) -> Path:
        """Labelled results."""
        return self.path / "results.zarr"

    @property
    def report(self) -> Path:
        """Page to look at: a file that a browser opens, so it is never in a repository."""
        return outside(self.path) / "report.html"


@dataclass(frozen=True)
class Analysis:
    """Options of an analysis.

    Attributes
    ----------
    learning_rate : float, optional
        Learning rate of the steps for which the log has none.
    gammas : sequence of float
        Weights of the one-parameter family, eq. (22).
    windows : sequence of int
        Windows of consecutive updates, eq. (3).
    workers : int, optional
        Threads or processes on this machine; as many as there are processors where not given.
    scheduler : str, optional
        Address of an existing Dask scheduler, used in place of processes of our own.
    cluster : str, optional
        Cluster to make for the analysis, one of `pipeline.clusters.CLUSTERS`, of as many ``workers``.
    memory_limit : int
        Bytes that a worker process may use.
    attempt : int, optional
        The run as it stood at this attempt, before it was restarted again; the newest where not given.
    """

    learning_rate: float | None = None
    gammas: Sequence[float] = results.GAMMAS
    windows: Sequence[int] = (1,)
    workers: int | None = None
    scheduler: str | None = None
    cluster: str | None = None
    memory_limit: int = MEMORY_LIMIT
    attempt: int | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Analysis:
        """Analysis of the options of a face, of which the others are passed over; see `given`."""
        return cls(**given(options, [field.name for field in fields(cls)]))

    def executor(self) -> compute.Executor:
        """Executor that these options ask for."""
        if self.scheduler is not None:
            if self.cluster is not None:
                raise InputError(
                    "a scheduler and a cluster are given",
                    where="--scheduler, --cluster",
                    remedy="give --scheduler for a cluster that is there, or --cluster for one to be made",
                )
            return compute.existing_cluster(self.scheduler)
        workers = len(os.sched_getaffinity(0)) if self.workers is None else self.workers
        if workers < 1:
            raise InputError(f"{workers} workers cannot work", where="--workers", remedy="give 1 or more")
        if self.cluster is not None:
            return compute.named_cluster(self.cluster, workers)
        return compute.local(workers, self.memory_limit)


def given(options: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Options of some names that say something: what is None or empty is left to the default of what takes it.

    Parameters
    ----------
    options : mapping
        Those of a face, by name.
    names : iterable of str
        `READING`, for example.
    """
    return {name: options[name] for name in names if options.get(name) not in (None, [], {})}


def ingest_run(
    source: Path | Sequence[Path],
    out: Path,
    *,
    format: str | None = None,
    mapping: Mapping[str, str] | None = None,
    shift: Mapping[str, int] | None = None,
    sweep: bool = False,
    allow_gaps: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    include: Sequence[str] = (),
    store: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read the new steps of one run's log or logs into OUT's trajectory; see `pipeline.ingest.ingest`.

    Parameters
    ----------
    store : str, optional
        How OUT is stored where nothing is there yet: ``plain``, or ``icechunk`` in an object store, which keeps
        every commit as a version.
    """
    folder = RunFolder.of(out, store=store)
    sources = each(source)
    with network_errors(*sources, folder.path):
        summary = ingest(
            sources,
            folder.trajectory,
            format=format,
            mapping=mapping,
            shift=shift,
            sweep=sweep,
            allow_gaps=allow_gaps,
            overwrite=overwrite,
            wait=wait,
            include=include,
            progress=progress,
        )
    return {"source": ", ".join(map(str, sources)), "trajectory": str(folder.trajectory), **asdict(summary)}


def analyze_run(out: Path, options: Analysis = Analysis(), *, progress: Progress | None = None) -> dict[str, Any]:
    """Compute what is missing of OUT's ledger, and OUT's results from it.

    Raises
    ------
    InputError
        Where OUT holds no trajectory of two steps, an option does not fit it, or memory does not suffice.
    """
    folder = RunFolder.of(out)
    with network_errors(folder.path):
        return _analyze(folder, options, progress)


def _analyze(folder: RunFolder, options: Analysis, progress: Progress | None) -> dict[str, Any]:
    rate = options.learning_rate
    if rate is not None and not (np.isfinite(rate) and rate > 0):
        raise InputError(
            f"learning rate {rate} is not positive", where="--learning-rate", remedy="give one above 0"
        )
    summary = compute.compute_ledger(
        folder.trajectory,
        folder.ledger,
        executor=options.executor(),
        memory_limit=options.memory_limit,
        progress=progress,
    )
    folder = RunFolder(newest(folder.path))
    states = Trajectory(folder.trajectory)
    ledger = Ledger(folder.ledger)
    rows, inputs = _inputs(states, ledger, options)
    provenance = {
        "source": states.source,
        "fingerprint": states.fingerprint(),
        "elements": states.layout.elements,
        "options": {
            "learning_rate": rate,
            "gamma": list(options.gammas),
            "window": list(options.windows),
            "attempt": int(states.scalar(ATTEMPT).max()) if options.attempt is None else options.attempt,
        },
    }
    tree = results.label(inputs, gammas=options.gammas, windows=options.windows, provenance=provenance)
    if states.replicates:
        # SciPy's operators, which it needs, take a third of a second to load.
        from pipeline import replicates

        losses = states.scalar(REPLICATE_LOSS)[rows]
        tree["replicates"] = replicates.label_run(inputs, _bands(ledger, rows), states.replicates, losses)
    with only_writer(folder.results, "results") as path:
        results.write(tree, path)
        publish(path, f"results of {folder.path.name}: {len(inputs.steps)} updates")
    return {
        "ledger": str(folder.ledger),
        "results": str(folder.results),
        "updates": len(inputs.steps),
        "chunks": summary.bands,
        "computed_chunks": summary.computed_bands,
        "computed_updates": summary.computed_rows,
        "projected_memory": summary.plan.projected_bytes,
        **_overview(tree),
    }


def _bands(ledger: Ledger, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Positions in some rows of the ledger of those of each band, and the products of their replicates."""
    for start in range(0, ledger.rows, ledger.band_rows):
        stop = min(start + ledger.band_rows, ledger.rows)
        positions = np.flatnonzero((rows >= start) & (rows < stop))
        if len(positions):
            yield positions, ledger.read_band("replicate_gram", start, stop)[rows[positions] - start]


def _inputs(states: Trajectory, ledger: Ledger, options: Analysis) -> tuple[NDArray[np.int64], levels.Inputs]:
    """Rows of the ledger that are updates of the runs as they stand, each run in the order of its steps."""
    gram, _ = ledger.read()
    steps, spans = ledger.steps()
    attempts = states.scalar(ATTEMPT)
    if options.attempt is not None and not 0 <= options.attempt <= attempts.max():
        raise InputError(
            f"there is no attempt {options.attempt}, the last is {attempts.max()}",
            where="--attempt",
            remedy="leave it out for the run as it stands",
        )
    current = states.current(options.attempt)[: len(steps) + 1]
    rows = np.flatnonzero((spans > 0) & current[:-1] & current[1:])
    if not len(rows):
        raise InputError(
            "no two logged states follow each other, but an update needs two",
            where=str(states.path),
            why="the run was restarted, and one state was logged since",
            remedy="ingest more steps",
        )
    run = states.scalar(RUN)
    rows = rows[np.lexsort((steps[rows], run[rows]))]
    loss = states.scalar("loss")
    learning_rate, of_tensors = _learning_rates(states, rows, options.learning_rate)
    return rows, levels.Inputs(
        gram=gram if len(rows) == len(gram) else gram[rows],
        vectors=ledger.vectors,
        layout=ledger.layout,
        steps=steps[rows],
        spans=spans[rows],
        loss=loss[rows],
        next_loss=loss[rows + 1],
        learning_rate=learning_rate,
        dtypes=states.dtypes,
        attempts=attempts[rows],
        hessian_min_eigenvalue=states.scalar("hessian_min_eigenvalue")[rows],
        runs=states.runs if states.sweep else (),
        run=run[rows] if states.sweep else None,
        loss_time_derivative=states.scalar("loss_time_derivative")[rows],
        optimizer=_optimizer(states, rows, learning_rate) if states.tables else None,
        tensor_learning_rate=of_tensors,
    )


def _learning_rates(
    states: Trajectory, rows: NDArray[np.int64], given: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Learning rate of each update, and of each tensor in it where groups of the optimizer have several.

    Where only the groups have rates the model's is the largest, if all are known. Of a loss that changes with time
    it is not taken: its unit of time is that of the learning rate.
    """
    rate, own = states.scalar("learning_rate")[rows], states.scalar("tensor_learning_rate")[rows]
    missing = np.isnan(own)
    differ = np.where(missing, np.inf, own).min(axis=1) < np.where(missing, -np.inf, own).max(axis=1)
    if np.isnan(states.scalar("loss_time_derivative")).all():
        rate = np.where(np.isnan(rate), own.max(axis=1), rate)
    if given is not None:
        rate = np.where(np.isnan(rate), given, rate)
    if not differ.any():
        return rate, None
    return rate, np.where(differ[:, None] & ~missing, own, rate[:, None])


def _optimizer(states: Trajectory, rows: NDArray[np.int64], learning_rate: NDArray[np.float64]) -> levels.Optimizer:
    """Return what the optimizer used in each update: its state is saved after it, the rate before.

    The metric is that of the factors, where the rule has some, or else that of Adam's second moment. A tensor whose
    update was rescaled by what is not saved has no rate.
    """
    after = {name: states.scalar(name)[rows + 1] for name in OPTIMIZER_NUMBERS if name != "tensor_learning_rate"}
    low, high = adam_eigenvalues(
        after["exp_avg_sq_min"], after["exp_avg_sq_max"], after["beta2"], after["epsilon"], after["updates"]
    )
    used = [after[name] for name in METRIC_EIGENVALUES[:2]]
    following = [states.scalar(name)[rows] for name in METRIC_EIGENVALUES[2:]]
    factored = (after["metric_factored"] == 1.0) | (states.scalar("metric_factored")[rows] == 1.0)
    low, high = (
        np.where(factored, np.where(np.isnan(end), next_end, end), adam)
        for end, next_end, adam in zip(used, following, (low, high), strict=True)
    )
    rate = states.scalar("tensor_learning_rate")[rows]
    rate = np.where(np.isnan(rate), learning_rate[:, None], rate)
    return levels.Optimizer(low, high, np.where(after["metric_rescaled"] == 1.0, np.nan, rate))


def follow(
    once: Callable[[bool], dict[str, Any]], *, interval: float = 10.0, idle_timeout: float | None = None
) -> dict[str, Any]:
    """Repeat a pass over a log that is being written, until interrupted, or until nothing new came for so long.

    Parameters
    ----------
    once : callable
        The pass, which is told whether none found anything before; its answer says how many ``new_steps`` it found.
    interval : float
        Seconds between passes.
    idle_timeout : float, optional
        Seconds without a new step after which the log is taken to be at its end.

    Returns
    -------
    dict
        Answer of the last pass that found something, with the new steps of all.

    Raises
    ------
    InputError
        Of a pass; not that a step is not there yet, unless none came at all.
    """
    answer: dict[str, Any] = {}
    new_steps, last = 0, time.monotonic()
    waiting: NotYet | KeyboardInterrupt | None = None
    try:
        with _interrupts() as interrupted:
            while not interrupted.is_set():
                try:
                    found = once(not answer)
                    if found["new_steps"] or not answer:
                        answer, last = found, time.monotonic()
                        new_steps += found["new_steps"]
                except NotYet as error:
                    waiting = error
                if idle_timeout is not None and time.monotonic() - last >= idle_timeout:
                    break
                interrupted.wait(interval)
    except KeyboardInterrupt as interrupt:
        waiting = interrupt
    if not answer and waiting is not None:
        raise waiting
    return {**answer, "new_steps": new_steps}


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Keep in mind that the user interrupted, as libraries swallow the exception in their callbacks."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def report_run(
    outs: Sequence[Path] | Mapping[str, Path], page: Path | None = None, version: str | None = None
) -> dict[str, Any]:
    """Write the page of one run, or of several together.

    Parameters
    ----------
    outs : sequence or mapping of str to Path
        Folders OUT, named after themselves where no names are given.
    page : Path, optional
        ``report.html`` in the first OUT where not given.
    version : str, optional
        Of OUT, where it is an Icechunk repository: id, tag or time of the version to draw, on a page that is given.

    Raises
    ------
    InputError
        Where there are no results.
    """
    # Matplotlib takes a second to load, which only a page is worth.
    from pipeline import report

    given = outs.items() if isinstance(outs, Mapping) else ((place(out).absolute().name, out) for out in outs)
    named = {name: RunFolder.of(out, version=version) for name, out in given}
    if version is not None and page is None:
        raise InputError(
            "the page of an old version has no place",
            where="--version",
            why="report.html in OUT is that of the newest",
            remedy="say where to write it: --page PAGE",
        )
    with network_errors(*(folder.path for folder in named.values())):
        page = next(iter(named.values())).report if page is None else place(page)
        return {"report": str(report.write_report(_trees(named), page))}


def _trees(named: Mapping[str, RunFolder]) -> dict[str, Any]:
    """Results that a page shows, by name."""
    trees = {}
    for name, folder in named.items():
        of_each = results.runs(results.read(folder.results))
        for run in list(of_each)[:RUNS_SHOWN]:
            trees[f"{name}/{run}" if run else name] = of_each[run]
        if len(of_each) > RUNS_SHOWN:
            _log.warning("the page shows the first %d of the %d runs of %s", RUNS_SHOWN, len(of_each), folder.path)
    return trees


def verify_run(out: Path, version: str | None = None) -> list[Damage]:
    """Compare every stored byte of OUT's trajectory and ledger with the checksums recorded when it was written.

    Memory does not grow with the run: chunks are read one after the other.

    Parameters
    ----------
    out : Path
    version : str, optional
        Of an Icechunk repository: id, tag or time of the version to read; the newest where not given.

    Returns
    -------
    list of Damage
        Everything that is not as it was written, empty where all is.

    Raises
    ------
    InputError
        Where OUT holds no trajectory.
    """
    folder = RunFolder.of(out, version=version)
    with network_errors(folder.path):
        if not exists(folder.trajectory):
            Trajectory(folder.trajectory)
        damages = list(verify_trajectory(folder.trajectory))
        if exists(folder.ledger):
            # Steps are compared with the trajectory's, where those are whole.
            damages += verify_ledger(folder.ledger, None if damages else Trajectory(folder.trajectory))
    return damages


def draw_run(out: Path) -> str:
    """Draw the angle over the steps of OUT (of a sweep, its first run): a picture as a ``data:`` address."""
    from pipeline import figures

    folder = RunFolder.of(out)
    with network_errors(folder.path), figures.drawing():
        tree = next(iter(results.runs(results.read(folder.results)).values()))
        return figures.angle_curve(figures.RunResults.of(folder.path.name, tree)).uri


def describe_run(out: Path, version: str | None = None) -> dict[str, Any]:
    """Say what OUT holds, or held at a version: steps, model, and how far the analysis is."""
    folder = RunFolder.of(out, version=version)
    with network_errors(folder.path):
        return _describe(folder)


def _describe(folder: RunFolder) -> dict[str, Any]:
    states = Trajectory(folder.trajectory)
    steps = states.scalar(STEP)[states.current()]
    description: dict[str, Any] = {
        "trajectory": str(folder.trajectory),
        "source": states.source,
        "steps": len(steps),
        "first_step": int(steps.min()) if states.rows else None,
        "last_step": int(steps.max()) if states.rows else None,
        "attempts": int(states.scalar(ATTEMPT).max(initial=0)) + 1,
        **({"runs": len(states.runs)} if states.sweep else {}),
        "elements": states.layout.elements,
        "dtypes": states.array_dtypes,
        **({"replicates": states.replicates} if states.replicates else {}),
        **{what: said for what, said in (states.reading or {}).items() if said and what != "several"},
        "tensors": {tensor.name: list(tensor.shape) for tensor in states.layout.tensors},
    }
    if (folder.results / "zarr.json").exists():
        tree = results.read(folder.results)
        description |= {
            "results": str(folder.results),
            "updates": int((tree["model"].to_dataset()["step_span"] > 0).sum()),
            **_overview(tree),
        }
    if folder.report.exists():
        description["report"] = str(folder.report)
    return description


def _overview(tree: Any) -> dict[str, Any]:
    """Plain numbers of the whole model, compared with the gradient, step by step."""
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    status, counts = np.unique(model["status"].values, return_counts=True)
    overview: dict[str, Any] = {
        "status": {Status(int(s)).name.lower(): int(n) for s, n in zip(status, counts, strict=True)}
    }
    for name in ("angle", "condition_number"):
        values = model[name].values
        values = values[np.isfinite(values)]
        spread = (np.min, np.median, np.max)
        overview[name] = [float(f(values)) for f in spread] if values.size else None
    return overview
