"""Tasks of the pass: compute the inner products of a tile, and write a ledger chunk from those of its tiles.

A task reads one tile. If a tile does not span the model, a second task adds up the segments in the order of the
element axis. Tasks receive paths and addresses, and return small results.
"""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from natgrad.compute.plan import PassPlan, PlanLimits, Tile, read_blocks
from natgrad.compute.work import Work
from natgrad.kernel import crc, gram, ledger_sums, replicates, stream
from natgrad.schema.layout import LedgerChunk, storage_dtype
from natgrad.schema.logs import logger
from natgrad.schema.names import (
    HVP,
    REPLICATE_HVP,
    REPLICATE_PARAMETER,
    VECTORS,
    ledger_vectors,
    replicate_of,
)
from natgrad.storage import Storage
from natgrad.store import Ledger, Reads, Trajectory, add_to_checksums

__all__ = ["Computed", "Finished", "Job", "Segments", "Tiled", "tile_segments", "write_chunk"]

_log = logger(__name__)

_thread_cache = threading.local()
"""Buffers of a worker thread and the trajectory of its job, reused between tasks."""

Segments = tuple[NDArray[Any], ...]
"""Tensor of each segment, gram (updates, segments, vectors, vectors), ratio (updates, segments) and, if there are
replicates, their gram (updates, segments, replicate vectors, replicate vectors)."""


class Tiled(NamedTuple):
    """The segment ledgers of a tile, and the checksums of its states if they are not copied."""

    segments: Segments
    reads: Reads | None


@dataclass(frozen=True)
class Job(Work):
    """Description of a pass for its tasks: two locations, the plan and its limits, but no arrays.

    It is sent with every task, so that a worker process needs only its own installation. In a storage with
    versions, one process commits the ledger, and tasks return their ledger chunks to that process.

    Attributes
    ----------
    trajectory, ledger : Storage
    name : str
        Name of this job, unique even on a scheduler that several users share.
    plan : PassPlan
    limits : PlanLimits
    compiled : bool
        Read and compute chunks in one compiled loop that does not need the interpreter lock. This requires plain
        files and no replicates. Otherwise Python passes states to the kernel, with the same bits.
    verified : str or None
        Time of the pass if it compares the states that it reads with their checksums; see
        `natgrad.store.Ledger.record_verification`.
    """

    trajectory: Storage
    ledger: Storage
    name: str
    plan: PassPlan
    limits: PlanLimits
    compiled: bool
    verified: str | None
    kind = "ledger"

    @property
    def out(self) -> Storage:
        """Folder OUT."""
        return self.ledger.parent

    @property
    def writes(self) -> bool:
        """True if workers write the ledger. The client writes it in a storage with versions."""
        return not self.ledger.keeps_versions

    @property
    def threaded(self) -> bool:
        """True for the compiled loop."""
        return self.compiled

    def compute(self, task: Tile) -> Tiled:
        """Compute a tile."""
        return tile_segments(self, task)

    def finish(self, chunk: LedgerChunk, digest: str, parts: Sequence[Tiled]) -> Finished:
        """Write a ledger chunk."""
        return write_chunk(self, chunk, digest, parts)

    @property
    def run(self) -> str:
        """Name of the run, for log messages."""
        return self.trajectory.parent.name

    @property
    def task_bytes(self) -> int:
        """Approximate number of bytes that a task reads."""
        return math.ceil(self.plan.read_bytes / self.plan.tasks)

    @property
    def worker_bytes(self) -> int:
        """Memory of a worker in addition to that of an idle process."""
        return self.plan.projected_bytes - self.limits.reserved_bytes

    @classmethod
    def of(
        cls,
        trajectory: Storage,
        ledger: Storage,
        plan: PassPlan,
        limits: PlanLimits = PlanLimits(),
        *,
        compiled: bool = False,
        verified: str | None = None,
    ) -> Job:
        """Return the job of a plan, under a new name."""
        trajectory = trajectory.absolute()
        name = f"{uuid.uuid4().hex}-{trajectory.parent.name}"
        return cls(trajectory, ledger.absolute(), name, plan, limits, compiled, verified)


class Computed(NamedTuple):
    """A ledger chunk that the client must write.

    Attributes
    ----------
    chunk : LedgerChunk
    digest : str
        Digest of its states; replaced if ``reads`` is given.
    products : tuple of arrays
        Inner products, ratio and, if there are replicates, their inner products; see `natgrad.store.Ledger.write`.
    reads : Reads, optional
        Checksums of states that were read from the files of the log.
    """

    chunk: LedgerChunk
    digest: str
    products: tuple[NDArray[np.float64], ...]
    reads: Reads | None

    def write(self, ledger: Ledger, states: Callable[[], Trajectory]) -> None:
        """Record the checksums of the states, which determine the digest, and write the chunk."""
        digest = self.digest
        if self.reads is not None:
            trajectory = states()
            trajectory.checksums.record(self.reads)
            digest = trajectory.digests([self.chunk])[self.chunk]
        products, ratio, *replicate_products = self.products
        ledger.write(self.chunk, products, ratio, digest, *replicate_products)


Finished = LedgerChunk | Computed

_GRADIENT = VECTORS.index("gradient")
"""Position of the gradient in a ledger. The vectors after it depend on the gradient."""


def tile_segments(job: Job, tile: Tile) -> Tiled:
    """Compute the segment ledgers of a tile: one for each tensor, or for the part of a tensor in the tile.

    Each state is read once. Only the last state of the tile, the halo, is also read by another task.
    """
    fields = {"run": job.run, "updates": [tile.start, tile.stop], "columns": [tile.first, tile.last]}
    _log.debug("tile starts", extra=fields)
    states = _trajectory(job)
    parts, reads = zip(
        *(_column_segments(job, states, tile, column) for column in range(tile.first, tile.last)), strict=True
    )
    if not states.in_place:
        return Tiled(_joined(parts), None)
    return Tiled(_joined(parts), _of_columns(reads))


def _of_columns(parts: Sequence[Reads]) -> Reads:
    """Join the checksums of neighbouring chunk columns, for which a pass reads the same states."""
    joined = {name: np.column_stack([part.checksums[name] for part in parts]) for name in parts[0].checksums}
    return parts[0]._replace(checksums=joined)


def _joined(parts: Iterable[Segments]) -> Segments:
    """Join the segments of neighbouring parts of the element axis."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    indices, *products = zip(*parts, strict=True)
    return np.concatenate(indices), *(np.concatenate(arrays, axis=1) for arrays in products)


def _summed(tensors: int, parts: Segments) -> tuple[NDArray[np.float64], ...]:
    """Sum segments to tensors, in the order of the element axis."""
    indices, products, ratio, *replicate_products = parts
    ledger = ledger_sums.add_segments(tensors, indices, products, ratio)
    return *ledger, *(ledger_sums.add_replicates(tensors, indices, array) for array in replicate_products)


def _column_segments(job: Job, states: Trajectory, tile: Tile, column: int) -> tuple[Segments, Reads]:
    """Compute the segment ledgers of a chunk column: all updates of a read block, then the next read block."""
    rows = tile.stop + 1 - tile.start
    read = Reads(
        tile.start,
        {name: np.zeros(rows, np.uint32) for name in states.logged},
        {name: np.zeros(rows, bool) for name in states.logged},
    )
    parts: dict[int, Segments] = {}
    with states.opened(column, tile.last):
        leads = states.spans()[tile.start : tile.stop] != 0
        for start, stop in states.ranges(tile.start, tile.stop, column, leads):
            part = replace(tile, start=start, stop=stop)
            parts[start], found = _range_segments(job, states, part, column)
            here = slice(start - tile.start, stop + 1 - tile.start)
            for name, checksums in found.items():
                # No update leads from the last state: only its parameter and gradient are needed.
                own = slice(here.start, here.start + len(checksums))
                read.checksums[name][own], read.was_read[name][own] = checksums, True
    indices, *products = _all_updates(job, states, tile, column, parts)
    if not states.has_gradient:
        # The parameter was used instead of the gradient. The ledger is that of gradients that are NaN.
        gram, ratio = products
        gram[..., _GRADIENT:, :] = gram[..., :, _GRADIENT:] = np.nan
        ratio[:] = 0.0
    # Columns are summed one by one, so that the bits do not depend on which columns are in one tile.
    first_tensor, last_tensor = int(indices[0]), int(indices[-1])
    tensors = np.arange(first_tensor, last_tensor + 1)
    return (tensors, *_summed(len(tensors), (indices - first_tensor, *products))), read


def _range_segments(
    job: Job, states: Trajectory, tile: Tile, column: int
) -> tuple[Segments, dict[str, NDArray[np.uint32]]]:
    """Compute the segment ledgers of updates whose states can be read together, and the checksums of the states."""
    first, last = states.column(column)
    checksums = _new_checksums(job, states, tile)
    # The compiled loop computes checksums only with the instruction of the processor.
    if job.compiled and (crc.HARDWARE or not checksums):
        parts = _compiled_segments(job, states, tile, column, checksums)
    else:
        step = job.plan.read_elements
        parts = _joined(
            _block_segments(job, states, tile, column, low, min(low + step, last), checksums)
            for low in range(first, last, step)
        )
    # All elements of the column have been read, and no product is used before this comparison.
    for name, found in checksums.items():
        states.require_recorded(name, tile.start, column, found)
    return parts, checksums


def _all_updates(job: Job, states: Trajectory, tile: Tile, column: int, parts: Mapping[int, Segments]) -> Segments:
    """Return the segment ledgers of all updates of a tile, NaN for updates that none of the parts contain."""
    if len(parts) == 1 and len(next(iter(parts.values()))[1]) == tile.stop - tile.start:
        return next(iter(parts.values()))
    blocks = read_blocks(*states.column(column), job.limits.read_block_elements)
    indices = np.array([index for block in blocks for index, _, _ in states.layout.segments(*block)])
    updates, vectors = tile.stop - tile.start, len(ledger_vectors(HVP in states.logged))
    shapes = [(vectors, vectors), ()]
    if count := len(states.replicate_vectors):
        shapes.append((count, count))
    products = [np.full((updates, len(indices), *shape), np.nan) for shape in shapes]
    for start, (_, *found) in parts.items():
        for values, part in zip(products, found, strict=True):
            values[start - tile.start : start - tile.start + len(part)] = part
    return indices, *products


def _new_checksums(job: Job, states: Trajectory, tile: Tile) -> dict[str, NDArray[np.uint32]]:
    """Return initial checksums, of no bytes, for the states of each array that a pass compares or records."""
    updates = tile.stop - tile.start
    return {
        # No update leads from the last state: only its parameter and gradient are needed.
        name: np.zeros(updates + states.has_halo(name), np.uint32)
        for name in states.logged
        if job.verified is not None or states.in_place
    }


def _compiled_segments(
    job: Job, states: Trajectory, tile: Tile, column: int, checksums: Mapping[str, NDArray[np.uint32]]
) -> Segments:
    """Compute the segment ledgers of a chunk column in the compiled loop, from the files of its chunks."""
    first, last = states.column(column)
    blocks = read_blocks(first, last, job.limits.read_block_elements)
    segments = [states.layout.segments(*block) for block in blocks]
    indices = np.array([index for block in segments for index, _, _ in block])
    boundaries = [np.array([*(start for _, start, _ in block), block[-1][2]]) - first for block in segments]
    names = states.logged
    updates, count = tile.stop - tile.start, len(ledger_vectors(HVP in names))
    products, ratio = np.empty((updates, len(indices), count, count)), np.empty((updates, len(indices)))
    dtypes = [storage_dtype(states.dtypes[name]) for name in names]
    files = [states.locate(name, tile.start, tile.stop + 1, column) for name in names]
    shape = job.plan.read_elements, job.plan.read_states
    size = stream.buffer_bytes(*shape, [dtype.itemsize for dtype in dtypes])
    buffer = _buffer("stream", (size,), np.dtype(np.uint8))
    leads = states.spans()[tile.start : tile.stop] != 0
    found = np.empty((len(names), updates + 1), np.uint32)
    wanted = found if checksums else None
    while failed := stream.products(files, dtypes, boundaries, *shape, leads, buffer, products, ratio, wanted):
        _read_again(states, names[failed[0]], tile.start + failed[1], column)
    for position, of_states in enumerate(checksums.values()):
        of_states[:] = found[position, : len(of_states)]
    return indices, products, ratio


def _read_again(states: Trajectory, name: str, state: int, column: int) -> None:
    """Read a state that the compiled code could not read, to raise an error with the reason.

    If the read was only interrupted, it now succeeds, and the pass continues.
    """
    buffer = np.empty((1, states.chunk[1]), storage_dtype(states.dtypes[name]))
    states.read(name, state, state + 1, column, buffer)


def _block_segments(
    job: Job,
    states: Trajectory,
    tile: Tile,
    column: int,
    low: int,
    high: int,
    checksums: Mapping[str, NDArray[np.uint32]],
) -> Segments:
    """Compute the segment ledgers of the elements ``low`` to ``high`` of the model, which are read together."""
    blocks = read_blocks(low, high, job.limits.read_block_elements)
    segments = [part for block in blocks for part in states.layout.segments(*block)]
    starts = np.array([start - low for _, start, _ in segments] + [high - low], dtype=np.int64)
    updates, count = tile.stop - tile.start, len(ledger_vectors(HVP in states.dtypes))
    # There is no update from a state to a state of another run or attempt, so the products remain NaN.
    products = np.full((updates, len(segments), count, count), np.nan)
    ratio = np.full((updates, len(segments)), np.nan)
    count = len(states.replicate_vectors)
    replicate_products = [np.full((updates, len(segments), count, count), np.nan)] if count else []
    for done in range(0, updates, job.plan.read_states):
        more = min(job.plan.read_states, updates - done)
        start = tile.start + done
        read = {}
        for name in states.logged:
            # The states after replicates are not states of the run, so they have no halo.
            halo = replicate_of(name)[1] is None
            stop = start + more + halo
            of_states = checksums[name][done:] if name in checksums else None
            read[name] = _read(
                job, states, name, start, stop, column, (low, high), of_states, carried=halo and done > 0
            )
        for first, last in states.contiguous_ranges(start, start + more + 1):
            contiguous = {name: [block[first - start : last - start]] for name, block in read.items()}
            written = slice(first - tile.start, last - 1 - tile.start)
            gram.products(
                contiguous["parameter"],
                contiguous.get("gradient", contiguous["parameter"]),
                starts,
                products[written],
                ratio[written],
                contiguous.get(HVP),
            )
            if replicate_products:
                replicates.replicate_products(
                    contiguous["parameter"],
                    contiguous["gradient"],
                    [contiguous[name] for name in states.replicates_of(REPLICATE_PARAMETER)],
                    starts,
                    replicate_products[0][written],
                    [contiguous[name] for name in states.replicates_of(REPLICATE_HVP) if name in contiguous],
                )
    return np.array([index for index, _, _ in segments]), products, ratio, *replicate_products


def _read(
    job: Job,
    states: Trajectory,
    name: str,
    start: int,
    stop: int,
    column: int,
    elements: tuple[int, int],
    checksums: NDArray[np.uint32] | None,
    *,
    carried: bool,
) -> NDArray[Any]:
    """Read states of a part of a chunk column into a buffer of the worker; the first may be carried over.

    The checksums of the states are extended by the bytes that are read.
    """
    first, last = elements
    most = job.plan.read_states
    buffer = _buffer(name, (most + 1, job.plan.read_elements), storage_dtype(states.dtypes[name]))
    if carried:
        buffer[0] = buffer[most]
    out = buffer[carried : stop - start, : last - first]
    if not states.allows_partial_reads(name):
        # Only complete chunks can be read, so the elements are those of the column.
        states.read(name, start + carried, stop, column, out, verified=False)
    else:
        file = states.locate(name, start + carried, stop, column)
        while (failed := stream.read(file, first - states.column(column)[0], out)) is not None:
            _read_again(states, name, start + carried + failed, column)
    if checksums is not None:
        add_to_checksums(checksums[carried : stop - start], out)
    return buffer[: stop - start, : last - first]


def _trajectory(job: Job) -> Trajectory:
    """Return the trajectory of a job. A worker thread opens it once for all tasks of the job."""
    kept: dict[str, Any] = _thread_cache.__dict__
    if kept.get("job") != job:
        kept["job"], kept["trajectory"] = job, Trajectory(job.trajectory)
    states: Trajectory = kept["trajectory"]
    return states


def _buffer(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the buffer of this worker thread, allocated again if its shape or dtype changes."""
    kept: dict[str, NDArray[Any]] = _thread_cache.__dict__.setdefault("buffers", {})
    if name not in kept or (kept[name].shape, kept[name].dtype) != (shape, dtype):
        kept[name] = np.empty(shape, dtype)
    return kept[name]


def write_chunk(job: Job, chunk: LedgerChunk, digest: str, tiles: Iterable[Tiled]) -> Finished:
    """Add up the segments of the tiles of a ledger chunk in the order of the element axis, and write the chunk."""
    tiles = list(tiles)
    ledger = Ledger(job.ledger) if job.writes else None
    layout = (ledger or _trajectory(job)).layout
    products = _summed(len(layout.tensors), _joined(tile.segments for tile in tiles))
    reads = [tile.reads for tile in tiles if tile.reads is not None]
    computed = Computed(chunk, digest, products, _of_columns(reads) if reads else None)
    if ledger is None:
        return computed
    computed.write(ledger, lambda: _trajectory(job))
    return chunk
