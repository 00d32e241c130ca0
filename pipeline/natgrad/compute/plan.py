"""Plan the pass: which tiles, in what order, with how much memory. Integers in, integers out.

The step axis and the element axis are cut at the chunks of the store. An *update* leads from one logged state to
the next, so n states give n - 1 updates, and a tile of updates needs one more state, the halo::

    states    0   1   2   3   4   5   6   7   8          tile A: updates 0..4 reads states 0..4
    updates     0   1   2   3   4   5   6   7            tile B: updates 4..8 reads states 4..8
               |--- tile A ---|--- tile B ---|           state 4 is read twice, all others once

The plan follows from the shape of the store and from `PlanLimits` alone, never from the number of workers. The bits
of an update depend on the chunk columns and on `PlanLimits.read_block_elements` alone. Every executor therefore
computes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, LedgerChunk, room_to_grow

__all__ = ["PassPlan", "PlanLimits", "Tile", "WorkItem", "plan_pass", "read_blocks"]


@dataclass(frozen=True)
class PlanLimits:
    """Limits of a pass: how it is cut into tasks and reads, and what a worker may take.

    The defaults are measured. Tests and benchmarks pass other values to cut a small run like a large one.

    Attributes
    ----------
    tile_bytes : int
        Bytes that a task reads in a large run. It reads them in about 40 ms; a scheduler needs 2 ms for a task.
    least_tile_bytes : int
        Bytes that a task reads at least, where a small run is cut into tasks for several workers.
    most_tiles : int
        Tiles of a pass, about, however large the run is. A scheduler keeps a record of each.
    chunks_of_small_run, tasks_of_small_run : int
        Ledger chunks, and tasks, of a run whose tasks would read less than ``tile_bytes``, about.
    ledger_bytes : int
        Bytes of the ledger that a task writes, about. A ledger chunk holds at least one update.
    least_updates : int
        Updates of a ledger chunk at least, however short the run is so far. The halo is one state in this many.
    minimum_updates : int
        Updates for which a ledger chunk of a small model has room, even if the run is shorter.
    read_block_elements : int
        Elements of each array that are read at a time, from one state or from several short ones. Two such read
        blocks stay in the cache of a core. Sums start anew in each read block, so this determines the bits.
    complete_chunk_bytes : int
        Bytes of training state that are read at a time where only complete chunks can be read (because they are
        compressed, or objects), about. Few chunks are then read in two calls.
    least_read_states : int
        States that are read at a time there, at least, where memory allows. The last state of a read is copied for
        the next one.
    reserved_bytes : int
        Memory of a worker process before it computes anything: interpreter, libraries, compiled kernel.
    icechunk_bytes : int
        Memory of Icechunk in a worker, about. Measured were 21 MiB, because it reads four ranges of 4 MiB.
    tasks_per_worker : int
        Tasks in flight for each Dask worker: enough to keep it busy, few enough to cost the scheduler nothing.
    least_cluster_bytes : int
        Bytes from which a pass is worth worker processes. A smaller pass takes less time than they take to start:
        a second or more, on every core.
    most_threads : int
        Most threads of one process. Each needs the interpreter for a twentieth of its time (to open files), so this
        many threads wait little.
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
    """Work of one task: the updates ``start`` to ``stop`` of the chunk columns ``first`` to ``last``.

    Both ranges are half open.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, order=True)
class WorkItem:
    """A ledger chunk to compute, and the tiles from which it is made."""

    chunk: LedgerChunk
    tiles: tuple[Tile, ...]

    def after(self, update: int) -> WorkItem:
        """Return the work that is left where the ledger has the updates of the chunk before this one."""
        return replace(self, tiles=tuple(replace(tile, start=update) for tile in self.tiles))

    @property
    def n_updates(self) -> int:
        """Updates to compute."""
        return self.chunk.stop - self.tiles[0].start


@dataclass(frozen=True)
class PassPlan:
    """The pass over a trajectory.

    Attributes
    ----------
    n_updates, columns : int
        Updates, and columns of chunks.
    updates_per_chunk, tile_columns : int
        Updates of a ledger chunk, and chunk columns of a tile; the last ones may have fewer.
    read_states, read_elements : int
        States, and elements of a chunk, that a worker reads and computes at a time.
    halo_bytes, read_bytes : int
        Bytes read twice because of halos, and bytes read in all.
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
        """Tiles in all."""
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
        """Return what will be read and how much memory it takes."""
        return (
            f"{self.n_updates} updates in {self.tasks} task{'s' if self.tasks > 1 else ''}, "
            f"{self.read_bytes / 1e6:.1f} MB to read ({self.halo_bytes / max(self.read_bytes, 1):.1%} of it "
            f"twice), projected peak memory per worker {self.projected_bytes / MEBIBYTE:.0f} MiB"
        )


def read_blocks(first: int, stop: int, elements: int) -> Iterator[tuple[int, int]]:
    """Cut the elements of a chunk column into read blocks, each of which has inner products of its own.

    The cut does not depend on how much is read at a time, because the bits of the products depend on it.

    Parameters
    ----------
    first, stop : int
        Elements of the column.
    elements : int
        Most elements of a read block, see `PlanLimits.read_block_elements`.

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
        Logged states.
    elements : int
        Elements of the model.
    chunk : (int, int)
        Steps and elements of a chunk.
    itemsizes : sequence of int
        Bytes of an element of each array that is read.
    tensors, vectors : int
        Size of the ledger: tensors of the model, vectors of the Gram matrix.
    replicate_vectors : int
        Vectors of the Gram matrix of the replicates, 0 where there are none.
    memory_limit : int, optional
        Bytes that a worker process may use.
    updates_per_chunk : int, optional
        Updates of a chunk of an existing ledger, which the plan must keep.
    complete_chunks : bool
        Read complete chunks only, because some are compressed or objects.
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

    - the reserve of an idle worker process, and of what else it loads,
    - training state read at a time: read_states x read_elements x bytes of an element, for every array, twice,
      because what was read before is still needed; where only complete chunks are read (read_states + 1) x
      read_elements,
    - three times the segment ledgers of a ledger chunk (as the tiles return them, joined, and those of another
      chunk that wait for their last tile), and twice the ledger of a ledger chunk (tensors, and its encoded chunk):
      updates x (3 segments + 2 tensors) x (vectors^2 + replicate_vectors^2 + 1) x 8, with the updates of a ledger
      chunk of this run, and segments at most tensors + chunk columns + read blocks of a column - 1.
    """
    steps, width = chunk
    updates, columns = max(states - 1, 0), math.ceil(elements / width)
    state_bytes = elements * sum(itemsizes)
    entry_bytes = (vectors * vectors + replicate_vectors * replicate_vectors + 1) * 8

    if updates_per_chunk is None:
        target = max(updates * state_bytes // limits.chunks_of_small_run, limits.least_tile_bytes)
        wanted = max(math.ceil(min(limits.tile_bytes, target) / max(state_bytes, 1)), limits.least_updates)
        room = max(1, limits.ledger_bytes // (tensors * entry_bytes))
        wanted = min(wanted, room, room_to_grow(updates, limits.minimum_updates))
        # If a ledger chunk covers complete chunks of states, only the chunk of the halo is read twice.
        updates_per_chunk = math.ceil(wanted / steps) * steps if wanted >= steps else wanted
    column_bytes = min(updates_per_chunk, updates) * width * sum(itemsizes)
    # A run that is not large gets so many tasks that workers finish at nearly the same time.
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
    # Every boundary of a chunk column, and of a read block of one, can cut one tensor in two.
    segments = tensors + columns + math.ceil(width / limits.read_block_elements) - 1
    reserved = limits.reserved_bytes + library_bytes
    fixed = reserved + min(updates_per_chunk, updates) * entry_bytes * (3 * segments + 2 * tensors)
    projected = fixed + _buffered_states(read_states, complete_chunks) * block_bytes
    if memory_limit is not None and projected > memory_limit:
        room = (memory_limit - fixed) // max(block_bytes, 1)
        read_states = room - 1 if complete_chunks else room // 2
        if read_states < 1:
            least = math.ceil((fixed + 2 * block_bytes) / MEBIBYTE)
            unit = "chunk" if complete_chunks else "read block"
            raise InputError(
                f"a worker would need {least} MiB, but memory_limit is {memory_limit / MEBIBYTE:.0f} MiB",
                where=f"two states of one {unit} ({2 * block_bytes / MEBIBYTE:.1f} MiB), the ledger of "
                f"{updates_per_chunk} updates and {reserved / MEBIBYTE:.0f} MiB of an idle worker",
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


def _buffered_states(read_states: int, complete_chunks: bool) -> int:
    """Return the states in the memory of a worker."""
    return read_states + 1 if complete_chunks else 2 * read_states
