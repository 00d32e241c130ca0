"""Which tiles, in what order, with how much memory: integers in, integers out.

The step axis and the element axis are cut at the chunks of the store. A *row* is one update, the step from one
logged state to the next, so n states give n - 1 rows, and a tile of rows needs one more state, the halo::

    states   0   1   2   3   4   5   6   7   8           tile A: rows 0..4 reads states 0..4
    rows       0   1   2   3   4   5   6   7             tile B: rows 4..8 reads states 4..8
              |--- tile A ---|--- tile B ---|            state 4 is read twice, all others once

The plan follows from the shape of the store alone, never from the number of workers, and the bits of a row
from the columns of chunks alone: so every executor computes the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from natgrad.schema.errors import InputError

__all__ = ["MEBIBYTE", "RESERVED_BYTES", "LedgerChunk", "PassPlan", "Tile", "chunk_shape", "pieces", "plan_pass"]

MEBIBYTE = 1 << 20

CHUNK_ELEMENTS = 1 << 20
"""Elements in a chunk of the trajectory, about: 4 MiB of float32."""

MINIMUM_STEPS = 64
"""Steps for which a chunk of a small model or of a ledger is made large enough, however short the run so far."""

TILE_BYTES = 512 * MEBIBYTE
"""Bytes a task reads in a large run: they take some forty milliseconds, and a scheduler two for each task."""

MOST_TILES = 50_000
"""Tiles of a pass, about, however large the run: a scheduler keeps a record of each."""

LEAST_TILE_BYTES = 8 * MEBIBYTE
"""Bytes a task reads at least, where a small run is cut into tasks for several workers."""

CHUNKS_OF_SMALL_RUN, TASKS_OF_SMALL_RUN = 8, 16
"""Ledger chunks of a run whose tasks would read less than that, and tasks, about."""

LEDGER_BYTES = 16 * MEBIBYTE
"""Bytes of the ledger that a task writes, about (one row of it where one is larger)."""

LEAST_UPDATES = 32
"""Rows of a ledger chunk, at least, however short the run so far: the halo is one state in this many."""

READ_BLOCK_ELEMENTS = 1 << 17
"""Elements of each array that are read at a time, of one row or of short ones together: two times that much stay in
the cache of a core. Sums begin anew in each piece of a row."""

COMPLETE_CHUNK_BYTES = 72 * MEBIBYTE
"""Bytes of training state read at a time where chunks are read whole (they are compressed, or objects), about: few
are then read for two times."""

LEAST_READ_ROWS = 3
"""Rows read at a time there, at least, where memory allows: the last state of one time is copied for the next."""

RESERVED_BYTES = 320 * MEBIBYTE
"""Memory of a worker process before it computes anything: interpreter, libraries, compiled kernel."""


@dataclass(frozen=True, order=True)
class Tile:
    """Address of the work of one task: rows ``start`` to ``stop`` of the chunk columns ``first`` to ``last``.

    Both ranges are half open.
    """

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True, order=True)
class LedgerChunk:
    """Rows whose ledger is one whole chunk, and the tiles that make it."""

    start: int
    stop: int
    tiles: tuple[Tile, ...]

    def after(self, row: int) -> LedgerChunk:
        """Return the ledger chunk without the work on its rows before one: their ledger is there."""
        return replace(self, tiles=tuple(replace(tile, start=row) for tile in self.tiles))


@dataclass(frozen=True)
class PassPlan:
    """The pass over a trajectory.

    Attributes
    ----------
    n_updates, columns : int
        Updates, and columns of chunks.
    updates_per_chunk, tile_columns : int
        Rows of a ledger chunk, chunk columns of a tile; the last ones may have fewer.
    read_rows, read_elements : int
        Rows, and elements of a chunk, that a worker sees and computes at a time.
    halo_bytes, read_bytes : int
        Bytes read twice because of halos, and bytes read in all.
    projected_bytes : int
        Projected peak memory of a worker process.
    """

    n_updates: int
    columns: int
    updates_per_chunk: int
    tile_columns: int
    read_rows: int
    read_elements: int
    read_bytes: int
    halo_bytes: int
    projected_bytes: int

    @property
    def tasks(self) -> int:
        """Tiles in all."""
        return math.ceil(self.n_updates / self.updates_per_chunk) * math.ceil(self.columns / self.tile_columns)

    def chunks(self) -> Iterator[LedgerChunk]:
        """Yield the ledger chunks in order; together they cover every row and column once."""
        for start in range(0, self.n_updates, self.updates_per_chunk):
            stop = min(start + self.updates_per_chunk, self.n_updates)
            tiles = tuple(
                Tile(start, stop, first, min(first + self.tile_columns, self.columns))
                for first in range(0, self.columns, self.tile_columns)
            )
            yield LedgerChunk(start, stop, tiles)

    def __str__(self) -> str:
        """Say what will be read and how much memory it takes."""
        return (
            f"{self.n_updates} updates in {self.tasks} task{'s' if self.tasks > 1 else ''}, "
            f"{self.read_bytes / 1e6:.1f} MB to read ({self.halo_bytes / max(self.read_bytes, 1):.1%} of it "
            f"twice), projected peak memory per worker {self.projected_bytes / MEBIBYTE:.0f} MiB"
        )


def chunk_shape(states: int, elements: int, replicates: int = 0) -> tuple[int, int]:
    """Chunks of a trajectory: whole steps x about a million elements.

    Parameters
    ----------
    states : int
        Logged states so far.
    elements : int
        Elements of the model.
    replicates : int
        States that are logged beside each, of which a step of a chunk has as many more.

    Returns
    -------
    (steps, elements) of a chunk
        Columns are of nearly one width, so little of the last is padding. Small models share a chunk
        between many steps, but not many more than the run has.

    Examples
    --------
    >>> chunk_shape(1000, 2_500_000)
    (1, 833334)
    >>> chunk_shape(201, 25_408)
    (41, 25408)
    >>> chunk_shape(401, 8)
    (512, 8)
    >>> chunk_shape(201, 25_408, replicates=8)
    (5, 25408)
    """
    columns = max(1, math.ceil(elements / CHUNK_ELEMENTS))
    width = max(1, math.ceil(elements / columns))
    return max(1, min(CHUNK_ELEMENTS // width // max(1, replicates), _enough_steps(states))), width


def _enough_steps(steps: int) -> int:
    """Return the steps of a chunk that holds a run whole, and as many again as it may grow by."""
    return 1 << max(MINIMUM_STEPS - 1, steps - 1).bit_length()


def pieces(first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut the elements of a chunk column into pieces, each of which has inner products of its own.

    They are the same however much is read at a time, as the bits of the products depend on them.

    Examples
    --------
    >>> list(pieces(1_000_000, 1_600_000))
    [(1000000, 1262144), (1262144, 1524288), (1524288, 1600000)]
    """
    for low in range(first, stop, READ_BLOCK_ELEMENTS):
        yield low, min(low + READ_BLOCK_ELEMENTS, stop)


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
        Vectors of that of the replicates, 0 where there are none.
    memory_limit : int, optional
        Bytes that a worker process may use.
    updates_per_chunk : int, optional
        Rows of a chunk of an existing ledger, which the plan must keep.
    complete_chunks : bool
        Chunks cannot be read in pieces, as some are compressed.
    library_bytes : int
        Memory of a library that not every worker loads.

    Raises
    ------
    InputError
        Where the projected memory exceeds the limit; the message says which limit would do.

    Notes
    -----
    Projected memory of a worker is the sum of

    - the reserve of an idle worker process, and of what else it loads,
    - training state read at a time: read_rows x read_elements x bytes of an element, for every array, twice, as
      what was read before is still needed; where chunks are read whole (read_rows + 1) x read_elements,
    - three times the segment ledgers of a ledger chunk (as the tiles return them, joined, and those of another
      chunk that wait for their last tile), and twice the ledger of a ledger chunk (tensors, and its encoded chunk):
      updates x (3 segments + 2 tensors) x (vectors^2 + replicate_vectors^2 + 1) x 8, with the updates of a ledger
      chunk of this run, and segments at most tensors + chunk columns + pieces of a column - 1.
    """
    steps, width = chunk
    rows, columns = max(states - 1, 0), math.ceil(elements / width)
    state_bytes = elements * sum(itemsizes)
    entry_bytes = (vectors * vectors + replicate_vectors * replicate_vectors + 1) * 8

    if updates_per_chunk is None:
        target = min(TILE_BYTES, max(rows * state_bytes // CHUNKS_OF_SMALL_RUN, LEAST_TILE_BYTES))
        wanted = max(math.ceil(target / max(state_bytes, 1)), LEAST_UPDATES)
        wanted = min(wanted, max(1, LEDGER_BYTES // (tensors * entry_bytes)), _enough_steps(rows))
        # If a ledger chunk covers complete chunks of states, only the chunk of the halo is read twice.
        updates_per_chunk = math.ceil(wanted / steps) * steps if wanted >= steps else wanted
    column_bytes = min(updates_per_chunk, rows) * width * sum(itemsizes)
    # Of a run that is not large, tasks are so many that workers end at nearly the same time.
    small = max(rows * state_bytes // TASKS_OF_SMALL_RUN, LEAST_TILE_BYTES)
    tile_bytes = max(min(TILE_BYTES, small), rows * state_bytes // MOST_TILES)
    tile_columns = min(columns, max(1, round(tile_bytes / max(column_bytes, 1)))) if columns else 1

    read_elements = width if complete_chunks else min(width, READ_BLOCK_ELEMENTS)
    row_bytes = read_elements * sum(itemsizes)
    if complete_chunks:
        read_rows = max(LEAST_READ_ROWS, COMPLETE_CHUNK_BYTES // max(row_bytes, 1) - 1)
    else:
        read_rows = max(1, READ_BLOCK_ELEMENTS // read_elements)
    read_rows = min(updates_per_chunk, read_rows)
    # Every boundary of a chunk column, and of a piece of one, can cut one tensor in two.
    segments = tensors + columns + math.ceil(width / READ_BLOCK_ELEMENTS) - 1
    reserved = RESERVED_BYTES + library_bytes
    fixed = reserved + min(updates_per_chunk, rows) * entry_bytes * (3 * segments + 2 * tensors)
    projected = fixed + _held_rows(read_rows, complete_chunks) * row_bytes
    if memory_limit is not None and projected > memory_limit:
        room = (memory_limit - fixed) // max(row_bytes, 1)
        read_rows = room - 1 if complete_chunks else room // 2
        if read_rows < 1:
            least = math.ceil((fixed + 2 * row_bytes) / MEBIBYTE)
            part = "chunk" if complete_chunks else "piece of a chunk"
            raise InputError(
                f"a worker would need {least} MiB, but memory_limit is {memory_limit / MEBIBYTE:.0f} MiB",
                where=f"two states of one {part} ({2 * row_bytes / MEBIBYTE:.1f} MiB), the ledger of "
                f"{updates_per_chunk} rows and {reserved / MEBIBYTE:.0f} MiB of an idle worker",
                remedy=f"raise --memory-limit to {least}MiB or more",
            )
        projected = fixed + _held_rows(read_rows, complete_chunks) * row_bytes

    halo = max(math.ceil(rows / updates_per_chunk) - 1, 0) * state_bytes
    return PassPlan(
        n_updates=rows,
        columns=columns,
        updates_per_chunk=updates_per_chunk,
        tile_columns=tile_columns,
        read_rows=read_rows,
        read_elements=read_elements,
        read_bytes=(states * state_bytes + halo) if rows else 0,
        halo_bytes=halo,
        projected_bytes=projected,
    )


def _held_rows(read_rows: int, complete_chunks: bool) -> int:
    """Rows in the memory of a worker."""
    return read_rows + 1 if complete_chunks else 2 * read_rows
