"""Store to ledger: run the tiles of the pass, serially, in threads or on a Dask cluster (`pipeline.clusters`).

The serial executor is the reference: the same functions, one after the other. A task reads its tiles, and where
a tile does not span the model, a second task on a worker adds the segments up in the order of the element axis.
Workers write the ledger; what comes back to the client is the address of a finished band. (For an Icechunk
repository it is the band: there one process commits.)
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import gram, stream
from pipeline.blocks import MEBIBYTE, RESERVED_BYTES, Band, PassPlan, Tile, pieces, plan_pass
from pipeline.clusters import local_scheduler, named_scheduler
from pipeline.places import place
from pipeline.places.repository import is_repository, place_of_store, publish
from pipeline.schema import (
    HVP,
    REPLICATE_HVP,
    REPLICATE_PARAMETER,
    REPLICATE_STATES,
    STATES,
    STEP,
    InputError,
    Unavailable,
    replicate_of,
    replicate_vectors,
)
from pipeline.store import Ledger, Trajectory, exists, only_writer, storage_dtype

__all__ = [
    "Executor",
    "PassSummary",
    "compute_ledger",
    "existing_cluster",
    "local_cluster",
    "named_cluster",
    "serial",
    "threads",
]

_log = logging.getLogger(__name__)

_AHEAD = 3
"""Tasks in flight per worker: enough to keep it busy, few enough for the scheduler not to notice."""

_CLUSTER_BYTES = 2_000_000_000
"""A pass over less than this takes less time than processes take to start: a second or more, of every core."""

_ICECHUNK_BYTES = 32 * MEBIBYTE
"""Memory of Icechunk in a worker, about: measured were 21 MiB, as it reads four ranges of 4 MiB."""

_CONNECT_SECONDS = 10
"""How long a scheduler may take to answer."""

_held = threading.local()
"""What a worker thread keeps from task to task: its buffers, and the trajectory of its job."""

Segments = tuple[NDArray[Any], ...]
"""Tensor of each segment, gram (rows, segments, vectors, vectors), ratio (rows, segments); and where there are
replicates, their gram (rows, segments, replicate vectors, replicate vectors)."""


@dataclass(frozen=True)
class Job:
    """What a task needs to know besides its tile: two paths, never an array.

    A ledger in an Icechunk repository is committed by one process: there, bands are returned to it.
    """

    trajectory: Path
    ledger: Path
    read_rows: int
    read_elements: int
    task_bytes: int
    """Bytes that a task reads, about."""
    worker_bytes: int
    """Memory of a worker beyond that of an idle process."""
    name: str
    """Of this job and no other, also on a scheduler that others share."""

    @property
    def run(self) -> str:
        """Name of the run, for the log."""
        return self.trajectory.parent.name

    @classmethod
    def of(cls, trajectory: Path, ledger: Path, plan: PassPlan) -> Job:
        """Job of a plan for a trajectory."""
        trajectory = place(trajectory).absolute()
        name = f"{trajectory.parent.name}-{uuid.uuid4().hex}"
        return cls(
            trajectory,
            place(ledger).absolute(),
            plan.read_rows,
            plan.read_elements,
            math.ceil(plan.read_bytes / plan.tasks),
            plan.projected_bytes - RESERVED_BYTES,
            name,
        )


class Computed(NamedTuple):
    """A band that is still to be written, as by `pipeline.store.Ledger.write`."""

    band: Band
    gram: NDArray[np.float64]
    ratio: NDArray[np.float64]
    digest: str
    replicate_gram: NDArray[np.float64] | None = None


Finished = Band | Computed

Executor = Callable[[Job, "list[tuple[Band, str]]"], Iterator[Finished]]
"""Runs bands (with the digest of their input) and yields each when its ledger is on disk, or to be written here."""


@dataclass(frozen=True)
class PassSummary:
    """What a pass did.

    Attributes
    ----------
    rows : int
        Updates in the ledger.
    bands, computed_bands : int
        Chunks of the ledger, and those computed now; the others were complete.
    plan : PassPlan
    """

    rows: int
    bands: int
    computed_bands: int
    plan: PassPlan


def compute_ledger(
    trajectory: Path,
    ledger: Path,
    *,
    executor: Executor | None = None,
    memory_limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PassSummary:
    """Compute the Gram ledger of a trajectory, or what is missing of it.

    Parameters
    ----------
    trajectory, ledger : Path
    executor : callable, optional
        `serial` (the default), `threads(n)`, `local_cluster(n)` or `existing_cluster(address)`.
    memory_limit : int, optional
        Bytes that a worker process may use.
    progress : callable, optional
        Called with bands done and bands to do.

    Raises
    ------
    InputError
        Where there are fewer than two states, or no elements, or the plan does not fit the memory limit, where
        another process writes this ledger, and where the disk refuses.
    """
    ledger, states = place_of_store(ledger), Trajectory(trajectory)
    if states.rows < 2:
        raise InputError(
            f"{states.rows} logged step(s), but an update needs two",
            where=str(trajectory),
            why="the displacement of a step is the difference to the next logged state",
            remedy="ingest more steps",
        )
    if not states.layout.elements:
        raise InputError(
            "a model without elements has no updates",
            where=str(trajectory),
            why="all its tensors are empty",
            remedy="log at least one element",
        )
    hvp = HVP in states.dtypes
    names, names_of_replicates = gram.vectors(hvp), _replicate_vectors(states)
    arguments: dict[str, Any] = {
        "states": states.rows,
        "elements": states.layout.elements,
        "chunk": states.chunk,
        "itemsizes": [storage_dtype(states.dtypes[name]).itemsize for name in _logged(states)],
        "tensors": len(states.layout.tensors),
        "vectors": len(names),
        "replicate_vectors": len(names_of_replicates),
        "memory_limit": memory_limit,
        "whole_chunks": not all(map(states.in_pieces, _logged(states))),
        "library_bytes": _ICECHUNK_BYTES if is_repository(states.path) else 0,
    }
    plan = plan_pass(**arguments, band_rows=_band_rows(ledger, states, names, names_of_replicates))
    _log.info("%s", plan)
    steps, spans = states.scalar(STEP)[:-1], states.spans()
    digests = states.digests(plan.bands())
    job = Job.of(states.path, ledger, plan)
    with only_writer(ledger, "ledger") as ledger:
        book = Ledger.prepare(ledger, states.layout, names, steps, spans, plan.band_rows, names_of_replicates)
        # Where the trajectory is another one by now, an interrupted pass must not leave rows of the old one valid.
        book.discard_others(digests)
        missing = book.missing(digests)
        run = executor or serial
        for done, found in enumerate(run(job, [(band, digests[band]) for band in missing]), start=1):
            band = found.band if isinstance(found, Computed) else found
            if isinstance(found, Computed):
                book.write(*found)
            fields = {"run": job.run, "first_step": int(steps[band.start]), "last_step": int(steps[band.stop - 1])}
            _log.debug("chunk %d of %d is in the ledger", done, len(missing), extra=fields)
            if progress is not None:
                progress(done, len(missing))
        publish(ledger, f"ledger of {job.run}: {len(missing)} of {len(digests)} chunks computed")
    return PassSummary(plan.rows, len(digests), len(missing), plan)


def _replicate_vectors(states: Trajectory) -> tuple[str, ...]:
    return replicate_vectors(states.replicates, REPLICATE_HVP in states.array_dtypes)


def _band_rows(
    ledger: Path, states: Trajectory, names: tuple[str, ...], names_of_replicates: tuple[str, ...]
) -> int | None:
    """Rows of a band of the ledger that is there, if it is this trajectory's: then it grows."""
    if not exists(ledger):
        return None
    book = Ledger(ledger)
    same = (book.layout, book.vectors, book.replicate_vectors) == (states.layout, names, names_of_replicates)
    return book.band_rows if same else None


# Tasks -------------------------------------------------------------------------------------------------------


def tile_segments(job: Job, tile: Tile) -> Segments:
    """Compute the segment ledgers of a tile: of each tensor, or the part of it in the tile.

    Each state is read once; only the tile's own last state, the halo, is read by another task too.
    """
    fields = {"run": job.run, "rows": [tile.start, tile.stop], "columns": [tile.first, tile.last]}
    _log.debug("tile begins", extra=fields)
    states = _trajectory(job)
    return _together([_column_segments(job, states, tile, column) for column in range(tile.first, tile.last)])


def _together(parts: Iterable[Segments]) -> Segments:
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    indices, *products = zip(*parts, strict=True)
    return np.concatenate(indices), *(np.concatenate(arrays, axis=1) for arrays in products)


def _added(tensors: int, parts: Segments) -> tuple[NDArray[np.float64], ...]:
    """Sum segments to tensors, in the order of the element axis."""
    indices, products, ratio, *of_replicates = parts
    whole = gram.add_segments(tensors, indices, products, ratio)
    return *whole, *(gram.add_products(tensors, indices, array) for array in of_replicates)


def _column_segments(job: Job, states: Trajectory, tile: Tile, column: int) -> Segments:
    """Compute the segment ledgers of a chunk column, all rows of a piece after the other."""
    first, last = states.column(column)
    with states.opened(column, tile.last):
        if all(map(states.in_pieces, _logged(states))) and not states.replicates:
            parts = _streamed_segments(job, states, tile, column)
        else:
            lows = range(first, last, job.read_elements)
            parts = _together(
                _piece_segments(job, states, tile, column, low, min(low + job.read_elements, last)) for low in lows
            )
    # Added up here, column by column, so that it does not matter which columns are in one tile.
    indices, *products = parts
    first_tensor, last_tensor = int(indices[0]), int(indices[-1])
    tensors = np.arange(first_tensor, last_tensor + 1)
    return tensors, *_added(len(tensors), (indices - first_tensor, *products))


def _streamed_segments(job: Job, states: Trajectory, tile: Tile, column: int) -> Segments:
    """Compute the segment ledgers of a chunk column from the files of its chunks, where those are plain."""
    first, last = states.column(column)
    segments = [states.layout.segments(*piece) for piece in pieces(first, last)]
    indices = np.array([index for piece in segments for index, _, _ in piece])
    boundaries = [np.array([*(start for _, start, _ in piece), piece[-1][2]]) - first for piece in segments]
    names = _logged(states)
    rows, count = tile.stop - tile.start, len(gram.vectors(HVP in names))
    products, ratio = np.empty((rows, len(indices), count, count)), np.empty((rows, len(indices)))
    dtypes = [storage_dtype(states.dtypes[name]) for name in names]
    files = [states.located(name, tile.start, tile.stop + 1, column) for name in names]
    size = stream.buffer_bytes(job.read_elements, job.read_rows, [dtype.itemsize for dtype in dtypes])
    buffer = _buffer("stream", (1, size), np.dtype(np.uint8))[0]
    leads = states.spans()[tile.start : tile.stop] != 0
    shape = job.read_elements, job.read_rows
    while failed := stream.products(files, dtypes, boundaries, *shape, leads, buffer, products, ratio):
        _read_again(states, names[failed[0]], tile.start + failed[1], column)
    return indices, products, ratio


def _read_again(states: Trajectory, name: str, row: int, column: int) -> None:
    """Read what the compiled code could not: this says why. A read that was only interrupted goes well now."""
    states.read(name, row, row + 1, column, np.empty((1, states.chunk[1]), storage_dtype(states.dtypes[name])))


def _piece_segments(job: Job, states: Trajectory, tile: Tile, column: int, low: int, high: int) -> Segments:
    """Compute the segment ledgers of what is read at a time, the elements ``low`` to ``high`` of the model."""
    segments = [part for piece in pieces(low, high) for part in states.layout.segments(*piece)]
    starts = np.array([start - low for _, start, _ in segments] + [high - low], dtype=np.int64)
    rows, count = tile.stop - tile.start, len(gram.vectors(HVP in states.dtypes))
    # From a state to one of another run or attempt no update leads: such a row stays NaN.
    products, ratio = np.full((rows, len(segments), count, count), np.nan), np.full((rows, len(segments)), np.nan)
    count = len(_replicate_vectors(states))
    of_replicates = [np.full((rows, len(segments), count, count), np.nan)] if count else []
    for done in range(0, rows, job.read_rows):
        more = min(job.read_rows, rows - done)
        start = tile.start + done
        read = {}
        for name in _logged(states):
            # What replicates lead to is no state of the run: there is no halo.
            halo = replicate_of(name)[1] is None
            stop = start + more + halo
            read[name] = _read(job, states, name, start, stop, column, (low, high), carried=halo and done > 0)
        for first, last in states.stretches(start, start + more + 1):
            stretch = {name: [rows_read[first - start : last - start]] for name, rows_read in read.items()}
            written = slice(first - tile.start, last - 1 - tile.start)
            gram.products(
                stretch["parameter"],
                stretch["gradient"],
                starts,
                products[written],
                ratio[written],
                stretch.get(HVP),
            )
            if of_replicates:
                gram.replicate_products(
                    stretch["parameter"],
                    stretch["gradient"],
                    [stretch[name] for name in states.replicates_of(REPLICATE_PARAMETER)],
                    starts,
                    of_replicates[0][written],
                    [stretch[name] for name in states.replicates_of(REPLICATE_HVP) if name in stretch],
                )
    return np.array([index for index, _, _ in segments]), products, ratio, *of_replicates


def _logged(states: Trajectory) -> list[str]:
    """Arrays that the pass reads: not what the optimizer keeps."""
    replicates = [name for array in REPLICATE_STATES for name in states.replicates_of(array)]
    return [name for name in (*STATES, *replicates) if name in states.dtypes]


def _read(
    job: Job,
    states: Trajectory,
    name: str,
    start: int,
    stop: int,
    column: int,
    elements: tuple[int, int],
    *,
    carried: bool,
) -> NDArray[Any]:
    """Read rows of a part of a chunk column into a buffer of the worker, the first one carried over."""
    first, last = elements
    buffer = _buffer(name, (job.read_rows + 1, job.read_elements), storage_dtype(states.dtypes[name]))
    if carried:
        buffer[0] = buffer[job.read_rows]
    out = buffer[carried : stop - start, : last - first]
    if not states.in_pieces(name):
        states.read(name, start + carried, stop, column, out)
        return buffer[: stop - start, : last - first]
    file = states.located(name, start + carried, stop, column)
    while (failed := stream.read(file, first - states.column(column)[0], out)) is not None:
        _read_again(states, name, start + carried + failed, column)
    return buffer[: stop - start, : last - first]


def _trajectory(job: Job) -> Trajectory:
    """Return the trajectory of a job, which a worker thread opens once for all tasks of the job."""
    held: dict[str, Any] = _held.__dict__
    if held.get("job") != job:
        held["job"], held["trajectory"] = job, Trajectory(job.trajectory)
    states: Trajectory = held["trajectory"]
    return states


def _buffer(name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the buffer of this worker thread, as large as asked for."""
    held: dict[str, NDArray[Any]] = _held.__dict__.setdefault("buffers", {})
    if name not in held or (held[name].shape, held[name].dtype) != (shape, dtype):
        held[name] = np.empty(shape, dtype)
    return held[name]


def write_band(job: Job, band: Band, digest: str, parts: Iterable[Segments]) -> Finished:
    """Add up the segments of a band's tiles in the order of the element axis, and write its ledger."""
    if is_repository(job.ledger):
        tensors = len(_trajectory(job).layout.tensors)
        products, ratio, *of_replicates = _added(tensors, _together(parts))
        return Computed(band, products, ratio, digest, *of_replicates)
    ledger = Ledger(job.ledger)
    products, ratio, *of_replicates = _added(len(ledger.layout.tensors), _together(parts))
    ledger.write(band, products, ratio, digest, *of_replicates)
    return band


def whole_band(job: Job, band: Band, digest: str) -> Finished:
    """Compute and write a band in one task."""
    return write_band(job, band, digest, [tile_segments(job, tile) for tile in band.tiles])


# Executors ---------------------------------------------------------------------------------------------------


def serial(job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
    """Run band after band in this process, each written while the next is computed: the reference of executors."""
    written: Future[Finished] | None = None
    with ThreadPoolExecutor(1) as pool:
        for band, digest in bands:
            parts = [tile_segments(job, tile) for tile in band.tiles]
            if written is not None:
                yield written.result()
            written = pool.submit(write_band, job, band, digest, parts)
        if written is not None:
            yield written.result()


def threads(workers: int) -> Executor:
    """Run tiles in threads of this process; reading and the kernel release the interpreter lock."""

    def run(job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
        pool = ThreadPoolExecutor(workers)
        pending: deque[tuple[Band, str, list[Future[Any]]]] = deque()

        def begin(band: Band, digest: str) -> list[Future[Any]]:
            # What is one task is written by its thread: another one computes while it waits for the disk.
            if len(band.tiles) == 1:
                return [pool.submit(whole_band, job, band, digest)]
            return [pool.submit(tile_segments, job, tile) for tile in band.tiles]

        def finish_oldest() -> Finished:
            band, digest, parts = pending.popleft()
            found = [part.result() for part in parts]
            finished: Finished = found[0] if len(band.tiles) == 1 else write_band(job, band, digest, found)
            return finished

        try:
            for band, digest in bands:
                while sum(len(parts) for _, _, parts in pending) >= workers * _AHEAD:
                    yield finish_oldest()
                pending.append((band, digest, begin(band, digest)))
            while pending:
                yield finish_oldest()
        finally:
            # Where a band failed, or no more are asked for, those not begun are left.
            pool.shutdown(cancel_futures=True)

    return run


def local_cluster(workers: int, memory_limit: int | None = None) -> Executor:
    """Run bands on a Dask cluster of processes on this machine, of one thread each.

    What takes less time than starting them is computed in this process: a run of one task, and a short one in as
    many threads as fit into the memory of one worker.

    Parameters
    ----------
    workers : int
        Processes, at most.
    memory_limit : int, optional
        Bytes of each process.
    """

    def run(job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
        tasks = sum(len(band.tiles) for band, _ in bands)
        processes = min(workers, tasks)
        if processes < 2 or tasks * job.task_bytes < _CLUSTER_BYTES:
            room = processes if memory_limit is None else (memory_limit - RESERVED_BYTES) // job.worker_bytes
            together = min(processes, room)
            yield from (threads(together) if together > 1 else serial)(job, bands)
            return
        with local_scheduler(processes, memory_limit) as address:
            yield from existing_cluster(address)(job, bands)

    return run


def named_cluster(name: str, workers: int) -> Executor:
    """Run bands on a cluster of a batch system or of Kubernetes that is there as long as the pass.

    Parameters
    ----------
    name : str
        One of `pipeline.clusters.CLUSTERS`.
    workers : int
        Worker processes to ask for.
    """

    def run(job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
        if bands:
            with named_scheduler(name, workers) as address:
                yield from existing_cluster(address)(job, bands)

    return run


def existing_cluster(address: str) -> Executor:
    """Run bands on the workers of a Dask scheduler that is there already.

    Parameters
    ----------
    address : str
        For example ``tcp://host:8786``. Its workers need this package, and the paths of the stores.

    Raises
    ------
    Unavailable
        When run, where the scheduler does not answer or is lost, or a task's workers died again and again. Bands
        that are finished are kept.
    """

    def run(job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
        from distributed import CancelledError, Client, KilledWorker
        from distributed.comm.core import CommClosedError

        try:
            client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, TimeoutError, ValueError, TypeError) as error:  # TypeError: TLS, and no certificates
            raise Unavailable(
                f"the Dask scheduler does not answer: {error}",
                where=address,
                why="it is not running, the address is wrong, or it wants TLS",
                remedy="start one (dask scheduler) and give its address, or leave --scheduler out",
            ) from error
        finished = 0

        def go_on() -> str:
            done = f"{finished} of {len(bands)} chunks are done and kept"
            return f"go on with: natgrad analyze {job.ledger.parent} ({done})"

        try:
            with closing(client):
                for band in _run_on(client, job, bands):
                    finished += 1
                    yield band
        except (CancelledError, CommClosedError) as error:
            raise Unavailable(
                f"the Dask scheduler was lost: {error}",
                where=address,
                why="it ended, or the network to it was cut",
                remedy=f"see that it runs, and {go_on()}",
            ) from error
        except KilledWorker as error:
            raise Unavailable(
                f"the workers of one task died {error.allowed_failures + 1} times, {error.last_worker} the last",
                where=f"{address}, task {error.task}",
                why="they had less memory than the pass projects, or their jobs or hosts ended",
                remedy=f"look at the worker's log, give workers the memory of --memory-limit, and {go_on()}",
            ) from error

    return run


def _run_on(client: Any, job: Job, bands: list[tuple[Band, str]]) -> Iterator[Finished]:
    from distributed import as_completed

    known = client.scheduler_info(n_workers=-1)
    workers = len(known["workers"])
    if "dashboard" in known["services"]:
        _log.info("Dask dashboard: %s", client.dashboard_link)
    if not workers:
        _log.warning("the Dask scheduler has no worker yet: waiting for one")
    # Two bands at least, so that there are tiles to compute while a band is added up.
    tiles = max((len(band.tiles) for band, _ in bands), default=1)
    ahead = max(2, math.ceil(_AHEAD * max(1, workers) / tiles))
    waiting = iter(bands)
    first = [_submit(client, job, *item) for item in itertools.islice(waiting, ahead)]
    finishing = as_completed(first, loop=client.loop)
    del first  # a future that is held keeps its result on the cluster
    for future in finishing:
        yield future.result()
        for band, digest in itertools.islice(waiting, 1):
            finishing.add(_submit(client, job, band, digest))


def _submit(client: Any, job: Job, band: Band, digest: str) -> Any:
    name = f"{job.name}-{band.start}"
    if len(band.tiles) == 1:
        return client.submit(whole_band, job, band, digest, key=f"ledger-{name}", pure=False)
    parts = [
        client.submit(tile_segments, job, tile, key=f"tile-{name}-{tile.first}", pure=False) for tile in band.tiles
    ]
    return client.submit(write_band, job, band, digest, parts, key=f"ledger-{name}", pure=False)
