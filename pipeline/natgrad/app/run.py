"""One run from end to end: the folder OUT, and what is done in it.

The command line and the flows are two faces of these functions; none of them needs a Prefect server. Each
returns a small summary of plain values and passes paths, never arrays.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from natgrad.app.folder import RunFolder
from natgrad.compute import ledger_pass as compute
from natgrad.ingestion import ingest
from natgrad.results import dataset as results
from natgrad.results.inputs import replicate_products, update_table
from natgrad.results.summary import overview
from natgrad.schema.blocks import MEBIBYTE
from natgrad.schema.errors import InputError
from natgrad.schema.names import ATTEMPT, REPLICATE_LOSS
from natgrad.storage import Location, network_errors, open_all, open_storage
from natgrad.store import Ledger, Trajectory

__all__ = [
    "MEMORY_LIMIT",
    "READING",
    "RUNS_SHOWN",
    "Analysis",
    "analyze_run",
    "draw_run",
    "given",
    "ingest_run",
    "report_run",
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
        Cluster to make for the analysis, one of `natgrad.compute.clusters.CLUSTERS`, of as many ``workers``.
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
    source: Location | Sequence[Location],
    out: Location,
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
    """Read the new steps of one run's log or logs into OUT's trajectory; see `natgrad.ingestion.ingest`.

    Parameters
    ----------
    store : str, optional
        How OUT is stored where nothing is there yet: ``plain``, or ``icechunk`` in an object store, which keeps
        every commit as a version.
    """
    folder = RunFolder.of(out, store=store)
    sources = open_all(source)
    with network_errors(*sources, folder.storage):
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


def analyze_run(
    out: Location, options: Analysis = Analysis(), *, progress: Progress | None = None
) -> dict[str, Any]:
    """Compute what is missing of OUT's ledger, and OUT's results from it.

    Raises
    ------
    InputError
        Where OUT holds no trajectory of two steps, an option does not fit it, or memory does not suffice.
    """
    folder = RunFolder.of(out)
    with network_errors(folder.storage):
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
    folder = RunFolder(folder.storage.latest())
    states = Trajectory(folder.trajectory)
    ledger = Ledger(folder.ledger)
    rows, inputs = update_table(states, ledger, learning_rate=rate, attempt=options.attempt)
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
        from natgrad.results import replicates

        losses = states.scalar(REPLICATE_LOSS)[rows]
        tree["replicates"] = replicates.label_run(
            inputs, replicate_products(ledger, rows), states.replicates, losses
        )
    with folder.results.lock("results") as storage:
        results.write(tree, storage)
        storage.publish(f"results of {folder.storage.name}: {len(inputs.steps)} updates")
    return {
        "ledger": str(folder.ledger),
        "results": str(folder.results),
        "updates": len(inputs.steps),
        "chunks": summary.chunks,
        "computed_chunks": summary.computed_chunks,
        "computed_updates": summary.computed_updates,
        "projected_memory": summary.plan.projected_bytes,
        **overview(tree),
    }


def report_run(
    outs: Sequence[Location] | Mapping[str, Location], page: Location | None = None, version: str | None = None
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
    from natgrad.reporting import page as report

    given = (
        outs.items() if isinstance(outs, Mapping) else ((open_storage(out).absolute().name, out) for out in outs)
    )
    named = {name: RunFolder.of(out, version=version) for name, out in given}
    if version is not None and page is None:
        raise InputError(
            "the page of an old version has no place",
            where="--version",
            why="report.html in OUT is that of the newest",
            remedy="say where to write it: --page PAGE",
        )
    with network_errors(*(folder.storage for folder in named.values())):
        page = next(iter(named.values())).report if page is None else open_storage(page)
        return {"report": str(report.write_report(_trees(named), page))}


def _trees(named: Mapping[str, RunFolder]) -> dict[str, Any]:
    """Results that a page shows, by name."""
    trees = {}
    for name, folder in named.items():
        of_each = results.runs(results.read(folder.results))
        for run in list(of_each)[:RUNS_SHOWN]:
            trees[f"{name}/{run}" if run else name] = of_each[run]
        if len(of_each) > RUNS_SHOWN:
            _log.warning(
                "the page shows the first %d of the %d runs of %s", RUNS_SHOWN, len(of_each), folder.storage
            )
    return trees


def draw_run(out: Location) -> str:
    """Draw the angle over the steps of OUT (of a sweep, its first run): a picture as a ``data:`` address."""
    from natgrad.reporting import figures

    folder = RunFolder.of(out)
    with network_errors(folder.storage), figures.drawing():
        tree = next(iter(results.runs(results.read(folder.results)).values()))
        return figures.angle_curve(figures.RunResults.of(folder.storage.name, tree)).uri
