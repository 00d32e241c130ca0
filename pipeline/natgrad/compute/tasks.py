"""What a task of the pass does: the products of a tile, and of a ledger chunk of tiles its chunk of the ledger.

A task reads its tiles, and where a tile does not span the model, a second task on a worker adds the segments up in
the order of the element axis. Tasks get paths and addresses, and what they return is small.
"""

from __future__ import annotations

import logging
import math
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel import gram, ledger_sums, stream
from natgrad.schema.blocks import RESERVED_BYTES, LedgerChunk, PassPlan, Tile, pieces
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import HVP, REPLICATE_HVP, REPLICATE_PARAMETER, ledger_vectors, replicate_of
from natgrad.storage import Storage
from natgrad.store import Ledger, Trajectory

__all__ = ["Computed", "Finished", "Job", "Segments", "compute_chunk", "tile_segments", "write_chunk"]

_log = logging.getLogger(__name__)

_held = threading.local()
"""What a worker thread keeps from task to task: its buffers, and the trajectory of its job."""

Segments = tuple[NDArray[Any], ...]
"""Tensor of each segment, gram (rows, segments, vectors, vectors), ratio (rows, segments); and where there are
replicates, their gram (rows, segments, replicate vectors, replicate vectors)."""


@dataclass(frozen=True)
class Job:
    """What a task needs to know besides its tile: two locations, never an array.

    A ledger in a storage with versions is committed by one process: there, ledger chunks are returned to it.
    """

    trajectory: Storage
    ledger: Storage
    read_rows: int
    read_elements: int
    task_bytes: int
    """Bytes that a task reads, about."""
    worker_bytes: int
    """Memory of a worker beyond that of an idle process."""
    name: str
    """Of this job and no other, also on a scheduler that others share."""
    streamed: bool = False
    """Whether chunks are read and computed in one compiled loop, without the interpreter lock: they are plain files
    and have no replicates. Else Python hands rows to the kernel, with the same bits."""

    @property
    def run(self) -> str:
        """Name of the run, for the log."""
        return self.trajectory.parent.name

    @classmethod
    def of(cls, trajectory: Storage, ledger: Storage, plan: PassPlan, streamed: bool = False) -> Job:
        """Job of a plan for a trajectory."""
        trajectory = trajectory.absolute()
        name = f"{trajectory.parent.name}-{uuid.uuid4().hex}"
        return cls(
            trajectory,
            ledger.absolute(),
            plan.read_rows,
            plan.read_elements,
            math.ceil(plan.read_bytes / plan.tasks),
            plan.projected_bytes - RESERVED_BYTES,
            name,
            streamed,
        )


class Computed(NamedTuple):
    """A ledger chunk that is still to be written, as by `natgrad.store.Ledger.write`."""

    chunk: LedgerChunk
    gram: NDArray[np.float64]
    ratio: NDArray[np.float64]
    digest: str
    replicate_gram: NDArray[np.float64] | None = None


Finished = LedgerChunk | Computed


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
    whole = ledger_sums.add_segments(tensors, indices, products, ratio)
    return *whole, *(ledger_sums.add_products(tensors, indices, array) for array in of_replicates)


def _column_segments(job: Job, states: Trajectory, tile: Tile, column: int) -> Segments:
    """Compute the segment ledgers of a chunk column, all rows of a piece after the other."""
    first, last = states.column(column)
    with states.opened(column, tile.last):
        if job.streamed:
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
    names = states.logged
    rows, count = tile.stop - tile.start, len(ledger_vectors(HVP in names))
    products, ratio = np.empty((rows, len(indices), count, count)), np.empty((rows, len(indices)))
    dtypes = [storage_dtype(states.dtypes[name]) for name in names]
    files = [states.located(name, tile.start, tile.stop + 1, column) for name in names]
    size = stream.buffer_bytes(job.read_elements, job.read_rows, [dtype.itemsize for dtype in dtypes])
    buffer = _buffer("stream", (size,), np.dtype(np.uint8))
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
    rows, count = tile.stop - tile.start, len(ledger_vectors(HVP in states.dtypes))
    # From a state to one of another run or attempt no update leads: such a row stays NaN.
    products, ratio = np.full((rows, len(segments), count, count), np.nan), np.full((rows, len(segments)), np.nan)
    count = len(states.replicate_vectors)
    of_replicates = [np.full((rows, len(segments), count, count), np.nan)] if count else []
    for done in range(0, rows, job.read_rows):
        more = min(job.read_rows, rows - done)
        start = tile.start + done
        read = {}
        for name in states.logged:
            # What replicates lead to is no state of the run: there is no halo.
            halo = replicate_of(name)[1] is None
            stop = start + more + halo
            read[name] = _read(job, states, name, start, stop, column, (low, high), carried=halo and done > 0)
        for first, last in states.contiguous_ranges(start, start + more + 1):
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
    if not states.reads_parts(name):
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


def _buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the buffer of this worker thread, as large as asked for."""
    held: dict[str, NDArray[Any]] = _held.__dict__.setdefault("buffers", {})
    if name not in held or (held[name].shape, held[name].dtype) != (shape, dtype):
        held[name] = np.empty(shape, dtype)
    return held[name]


def write_chunk(job: Job, chunk: LedgerChunk, digest: str, parts: Iterable[Segments]) -> Finished:
    """Add up the segments of a ledger chunk's tiles in the order of the element axis, and write its ledger."""
    if job.ledger.keeps_versions:
        tensors = len(_trajectory(job).layout.tensors)
        products, ratio, *of_replicates = _added(tensors, _together(parts))
        return Computed(chunk, products, ratio, digest, *of_replicates)
    ledger = Ledger(job.ledger)
    products, ratio, *of_replicates = _added(len(ledger.layout.tensors), _together(parts))
    ledger.write(chunk, products, ratio, digest, *of_replicates)
    return chunk


def compute_chunk(job: Job, chunk: LedgerChunk, digest: str) -> Finished:
    """Compute and write a ledger chunk in one task."""
    return write_chunk(job, chunk, digest, [tile_segments(job, tile) for tile in chunk.tiles])
