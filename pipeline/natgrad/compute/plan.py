"""Plan the pass: its tiles, their order and their memory. Inputs and outputs are integers.

The step axis and the element axis are divided at the chunks of the store. An *update* leads from one logged state
to the next, so n states give n - 1 updates, and a tile of updates needs one more state, the halo::

    states    0   1   2   3   4   5   6   7   8          tile A: updates 0..4 reads states 0..4
    updates     0   1   2   3   4   5   6   7            tile B: updates 4..8 reads states 4..8
               |--- tile A ---|--- tile B ---|           state 4 is read twice, all others once

The plan depends only on the shape of the store and on `PlanLimits`, never on the number of workers. The bits of an
update depend only on the chunk columns and on `PlanLimits.read_block_elements`. Every executor therefore computes
the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, LedgerChunk, TrajectoryShape, chunk_capacity

__all__ = ["PassPlan", "PlanLimits", "Tile", "WorkItem", "peak_bytes", "plan_pass", "plan_shape", "read_blocks"]


@dataclass(frozen=True)
class PlanLimits:
    """Limits by which a pass is divided into tasks and reads, and limits of workers.

    The defaults were chosen by measurement. Tests and benchmarks use other values to divide a small run like a
    large one.

    Attributes
    ----------
    tile_bytes : int
        Bytes that a task reads in a large run. Reading takes about 40 ms, and scheduling a task about 2 ms.
    least_tile_bytes : int
        Smallest number of bytes that a task reads, if a small run is divided into tasks for several workers.
    most_tiles : int
        Approximate maximum number of tiles of a pass, for any size of run. A scheduler keeps a record of each.
    chunks_of_small_run, tasks_of_small_run : int
        Approximate numbers of ledger chunks and tasks for a run whose tasks would read less than ``tile_bytes``.
    ledger_bytes : int
        Approximate bytes of the ledger that a task writes. A ledger chunk has at least one update.
    least_updates : int
        Smallest number of updates of a ledger chunk, even if the run is still short. One state in this many is a
        halo.
    minimum_updates : int
        Capacity of a ledger chunk of a small model, even if the run has fewer updates.
    read_block_elements : int
        Elements of each array that are read at a time, from one state or from several short ones. Two such read
        blocks fit into the cache of a core. Each read block has its own sums, so this determines the bits.
    complete_chunk_bytes : int
        Approximate bytes of training state that are read at a time if only complete chunks can be read, because
        they are compressed or objects. Few chunks are then read in two calls.
    least_read_states : int
        Smallest number of states that are read at a time in this case, if memory allows. The last state of a read
        is copied for the next one.
    reserved_bytes : int
        Memory of an idle worker process: interpreter, libraries, compiled kernel.
    icechunk_bytes : int
        Approximate memory of Icechunk in a worker. It reads four ranges of 4 MiB; 21 MiB were measured.
    tasks_per_worker : int
        Tasks in flight for each Dask worker: enough to keep it busy, and few enough not to load the scheduler.
    least_cluster_bytes : int
        Smallest size of a pass that uses worker processes. A smaller pass takes less time than the processes take
        to start, which is a second or more on every core.
    most_threads : int
        Maximum number of threads of one process. Each needs the interpreter for a twentieth of its time (to open
        files), so threads rarely wait up to this number.
    """

    tile_bytes: int = 512 * MEBIBYTE
    least_tile_bytes: int = 8 * MEBIBYTE
    most_tiles: int = 50_000
    chunks_of_small_run: int = 8
    tasks_of_small_run: int = 16
    ledger_bytes: int = 16 * MEBIBYTE
    least_updates: int = 32
    minimum_updates: int = 64
    read_block_elements: int = 1 << 17
    complete_chunk_bytes: int = 72 * MEBIBYTE
    least_read_states: int = 3
    reserved_bytes: int = 320 * MEBIBYTE
    icechunk_bytes: int = 32 * MEBIBYTE
    tasks_per_worker: int = 3
    least_cluster_bytes: int = 2_000_000_000
    most_threads: int = 8


@dataclass(frozen=True, order=True)
class Tile:
    """The work of one task: the updates ``start`` to ``stop`` of the chunk columns ``first`` to ``last``.

    Both ranges are half open.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, order=True)
class WorkItem:
    """A ledger chunk to compute, and its tiles."""

    chunk: LedgerChunk
    tiles: tuple[Tile, ...]

    def after(self, update: int) -> WorkItem:
        """Return the remaining work if the ledger already has the updates of the chunk before this update."""
        return replace(self, tiles=tuple(replace(tile, start=update) for tile in self.tiles))

    @property
    def n_updates(self) -> int:
        """Number of updates to compute."""
        return self.chunk.stop - self.tiles[0].start


@dataclass(frozen=True)
class PassPlan:
    """The pass over a trajectory.

    Attributes
    ----------
    n_updates, columns : int
        Number of updates, and of columns of chunks.
    updates_per_chunk, tile_columns : int
        Updates of a ledger chunk, and chunk columns of a tile. The last ones may have fewer.
    read_states, read_elements : int
        States, and elements of a chunk, that a worker reads and computes at a time.
    halo_bytes, read_bytes : int
        Bytes read twice because of halos, and total bytes read.
    projected_bytes : int
        Projected peak memory of a worker process.
    """

    n_updates: int
    columns: int
    updates_per_chunk: int
    tile_columns: int
    read_states: int
    read_elements: int
    read_bytes: int
    halo_bytes: int
    projected_bytes: int

    @property
    def tasks(self) -> int:
        """Total number of tiles."""
        return math.ceil(self.n_updates / self.updates_per_chunk) * math.ceil(self.columns / self.tile_columns)

    def work_items(self) -> Iterator[WorkItem]:
        """Yield the ledger chunks with their tiles, in order; together they cover every update and column once."""
        for start in range(0, self.n_updates, self.updates_per_chunk):
            stop = min(start + self.updates_per_chunk, self.n_updates)
            tiles = tuple(
                Tile(start, stop, first, min(first + self.tile_columns, self.columns))
                for first in range(0, self.columns, self.tile_columns)
            )
            yield WorkItem(LedgerChunk(start, stop), tiles)

    def __str__(self) -> str:
        """Return a line with the size of the pass and its projected memory."""
        return (
            f"{self.n_updates} updates in {self.tasks} task{'s' if self.tasks > 1 else ''}, "
            f"{self.read_bytes / 1e6:.1f} MB to read ({self.halo_bytes / max(self.read_bytes, 1):.1%} of it "
            f"twice), projected peak memory per worker {self.projected_bytes / MEBIBYTE:.0f} MiB"
        )


def peak_bytes(workers: int, memory_limit: int | None, idle: int, worker: int) -> int:
    """Return the projected peak memory of a process that computes in as many threads as it may.

    Parameters
    ----------
    workers : int
        Maximum number of threads.
    memory_limit : int or None
        Bytes of the process. It has only as many threads as fit into them.
    idle, worker : int
        Bytes of an idle process, and of one that computes in one thread.
    """
    fitting = workers if memory_limit is None else (memory_limit - idle) // max(worker - idle, 1)
    return idle + max(min(workers, fitting), 1) * (worker - idle)


def read_blocks(first: int, stop: int, elements: int) -> Iterator[tuple[int, int]]:
    """Divide the elements of a chunk column into read blocks, each with its own inner products.

    The division does not depend on how much is read at a time, because it determines the bits of the products.

    Parameters
    ----------
    first, stop : int
        Elements of the column.
    elements : int
        Maximum number of elements of a read block, see `PlanLimits.read_block_elements`.

    Examples
    --------
    >>> list(read_blocks(1_000_000, 1_600_000, 1 << 18))
    [(1000000, 1262144), (1262144, 1524288), (1524288, 1600000)]
    """
    for low in range(first, stop, elements):
        yield low, min(low + elements, stop)


def plan_pass(
    *,
    states: int,
    elements: int,
    chunk: tuple[int, int],
    itemsizes: Sequence[int],
    tensors: int,
    vectors: int,
    replicate_vectors: int = 0,
    memory_limit: int | None = None,
    updates_per_chunk: int | None = None,
    complete_chunks: bool = False,
    library_bytes: int = 0,
    limits: PlanLimits = PlanLimits(),
) -> PassPlan:
    """Plan the pass over a trajectory.

    Parameters
    ----------
    states : int
        Number of logged states.
    elements : int
        Number of elements of the model.
    chunk : (int, int)
        Steps and elements of a chunk.
    itemsizes : sequence of int
        Bytes of an element of each array that is read.
    tensors, vectors : int
        Size of the ledger: tensors of the model, vectors of the Gram matrix.
    replicate_vectors : int
        Vectors of the Gram matrix of the replicates, 0 without replicates.
    memory_limit : int, optional
        Bytes that a worker process may use.
    updates_per_chunk : int, optional
        Updates of a chunk of an existing ledger, which the plan must keep.
    complete_chunks : bool
        Read only complete chunks, because some are compressed or objects.
    library_bytes : int
        Memory of a library that not every worker loads.
    limits : PlanLimits, optional

    Raises
    ------
    InputError
        If the projected memory exceeds the limit; the message contains a limit that suffices.

    Notes
    -----
    Projected memory of a worker is the sum of

    - the reserved memory of an idle worker process, and that of other libraries,
    - the training state read at a time: read_states x read_elements x bytes of an element, for every array, twice,
      because the previous read is still needed; if only complete chunks are read, (read_states + 1) x
      read_elements,
    - three times the segment ledgers of a ledger chunk (as returned by the tiles, joined, and those of another
      chunk that wait for their last tile), and twice the ledger of a ledger chunk (tensors, and the encoded chunk):
      updates x (3 segments + 2 tensors) x (vectors^2 + replicate_vectors^2 + 1) x 8, with the updates of a ledger
      chunk of this run, and at most tensors + chunk columns + read blocks of a column - 1 segments,
    - the recorded checksums of the states of a ledger chunk, of four bytes, three times (kept, decoded, and in the
      text of a record): (updates + 1) x arrays x chunk columns x 12.
    """
    steps, width = chunk
    updates, columns = max(states - 1, 0), math.ceil(elements / width)
    state_bytes = elements * sum(itemsizes)
    entry_bytes = (vectors * vectors + replicate_vectors * replicate_vectors + 1) * 8

    if updates_per_chunk is None:
        target = max(updates * state_bytes // limits.chunks_of_small_run, limits.least_tile_bytes)
        wanted = max(math.ceil(min(limits.tile_bytes, target) / max(state_bytes, 1)), limits.least_updates)
        fitting = max(1, limits.ledger_bytes // (tensors * entry_bytes))
        wanted = min(wanted, fitting, chunk_capacity(updates, limits.minimum_updates))
        # If a ledger chunk covers complete state chunks, only the chunk with the halo is read twice.
        updates_per_chunk = math.ceil(wanted / steps) * steps if wanted >= steps else wanted
    column_bytes = min(updates_per_chunk, updates) * width * sum(itemsizes)
    # A small run gets enough tasks for workers to finish at nearly the same time.
    small = max(updates * state_bytes // limits.tasks_of_small_run, limits.least_tile_bytes)
    tile_bytes = max(min(limits.tile_bytes, small), updates * state_bytes // limits.most_tiles)
    tile_columns = min(columns, max(1, round(tile_bytes / max(column_bytes, 1)))) if columns else 1

    read_elements = width if complete_chunks else min(width, limits.read_block_elements)
    block_bytes = read_elements * sum(itemsizes)
    if complete_chunks:
        read_states = max(limits.least_read_states, limits.complete_chunk_bytes // max(block_bytes, 1) - 1)
    else:
        read_states = max(1, limits.read_block_elements // read_elements)
    read_states = min(updates_per_chunk, read_states)
    # Every boundary of a chunk column, or of a read block in it, can split one tensor.
    segments = tensors + columns + math.ceil(width / limits.read_block_elements) - 1
    reserved = limits.reserved_bytes + library_bytes
    own_updates = min(updates_per_chunk, updates)
    checksum_bytes = 12 * len(itemsizes) * columns * (own_updates + 1)
    fixed = reserved + own_updates * entry_bytes * (3 * segments + 2 * tensors) + checksum_bytes
    projected = fixed + _buffered_states(read_states, complete_chunks) * block_bytes
    if memory_limit is not None and projected > memory_limit:
        blocks = (memory_limit - fixed) // max(block_bytes, 1)
        read_states = blocks - 1 if complete_chunks else blocks // 2
        if read_states < 1:
            least = math.ceil((fixed + 2 * block_bytes) / MEBIBYTE)
            unit = "chunk" if complete_chunks else "read block"
            raise InputError(
                f"a worker would need {least} MiB, but memory_limit is {memory_limit / MEBIBYTE:.0f} MiB",
                where=f"two states of one {unit} ({2 * block_bytes / MEBIBYTE:.1f} MiB), the ledger of "
                f"{updates_per_chunk} updates, and {reserved / MEBIBYTE:.0f} MiB of an idle worker",
                remedy=f"raise --memory-limit to {least}MiB or more",
            )
        projected = fixed + _buffered_states(read_states, complete_chunks) * block_bytes

    halo = max(math.ceil(updates / updates_per_chunk) - 1, 0) * state_bytes
    return PassPlan(
        n_updates=updates,
        columns=columns,
        updates_per_chunk=updates_per_chunk,
        tile_columns=tile_columns,
        read_states=read_states,
        read_elements=read_elements,
        read_bytes=(states * state_bytes + halo) if updates else 0,
        halo_bytes=halo,
        projected_bytes=projected,
    )


def plan_shape(
    shape: TrajectoryShape,
    *,
    memory_limit: int | None = None,
    updates_per_chunk: int | None = None,
    limits: PlanLimits = PlanLimits(),
) -> PassPlan:
    """Plan the pass over a trajectory that is stored, or that an ingest will store; see `plan_pass`."""
    return plan_pass(
        states=shape.states,
        elements=shape.layout.elements,
        chunk=shape.chunk,
        itemsizes=shape.itemsizes,
        tensors=len(shape.layout.tensors),
        vectors=len(shape.vectors),
        replicate_vectors=len(shape.replicate_vectors),
        memory_limit=memory_limit,
        updates_per_chunk=updates_per_chunk,
        complete_chunks=not shape.partial_reads,
        library_bytes=limits.icechunk_bytes if shape.keeps_versions else 0,
        limits=limits,
    )


def _buffered_states(read_states: int, complete_chunks: bool) -> int:
    """Return the number of states in the memory of a worker."""
    return read_states + 1 if complete_chunks else 2 * read_states
