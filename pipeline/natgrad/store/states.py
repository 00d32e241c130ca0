"""Read and write the elements of the states of a run, independent of how their chunks are stored.

Chunks are uncompressed local files, uncompressed objects in another storage, or compressed. The compiled read loop
reads uncompressed local files directly: it needs the offset of each state, and returns their checksums. States that
are read are compared with their checksums, because a disk, a storage or a codec may return wrong bytes without an
error. The committed states of a chunk are also compared before others are appended to it, because a write would
otherwise replace a lost chunk by zeros.

The last state may be *provisional*: the log does not contain all of it yet. It has its own record, which lists what
it lacks, and which the next commit replaces. What it lacks is NaN for every reader, regardless of the contents of
its chunks: the bytes of the completed state are written there before the commit. All other bytes stay the same, so
that a reader, and a writer that is killed, never see a part of a state.

bfloat16 is stored as its bits in uint16, with the attribute ``ml_dtype``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.located import Located, joined
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, missing_word, storage_dtype
from natgrad.schema.names import (
    ELEMENT,
    PRODUCTS,
    REPLICATE,
    REPLICATE_STATES,
    STATES,
    STEP,
    of_replicate,
    replicate_of,
)
from natgrad.storage import Storage
from natgrad.store.checksums import RecordedChecksums, add_to_checksums, checksum
from natgrad.store.chunk_files import ChunkFiles
from natgrad.store.chunk_objects import fetch_states
from natgrad.store.group import INGEST_AGAIN, ArrayPlan, chunk_name, damage_error, open_array, with_length
from natgrad.store.journal import Journal
from natgrad.store.references import OpenFiles, References, StateReference
from natgrad.store.virtual_chunks import chunk_range

__all__ = ["States", "state_arrays", "storage_dtype"]


def state_arrays(
    layout: Layout,
    dtypes: Mapping[str, str],
    chunk: tuple[int, int],
    replicates: int,
    compressors: Mapping[str, Any],
) -> dict[str, ArrayPlan]:
    """Return the descriptions of the empty arrays for the states of a new run.

    Parameters
    ----------
    layout : Layout
    dtypes : mapping
        Array to logical dtype.
    chunk : (int, int)
        Steps and elements of a chunk.
    replicates : int
    compressors : mapping
        Array to Zarr codecs; other arrays are not compressed.
    """
    arrays = {}
    for name, dtype in dtypes.items():
        several = name in REPLICATE_STATES
        arrays[name] = ArrayPlan(
            (STEP, REPLICATE, ELEMENT) if several else (STEP, ELEMENT),
            (0, replicates, layout.elements) if several else (0, layout.elements),
            (chunk[0], 1, chunk[1]) if several else chunk,
            storage_dtype(dtype).name,
            {"ml_dtype": dtype} if dtype == "bfloat16" else {},
            compressors.get(name),
        )
    return arrays


class States:
    """The committed states of a run, and the states that are written but not committed yet.

    Parameters
    ----------
    storage : Storage
        Group that contains the arrays.
    layout : Layout
    chunk : (int, int)
    dtypes : dict
        Logical dtype of each array.
    replicates : int
    compressed : collection of str
        Arrays whose chunks are compressed.
    in_place : bool
        States are read from the files of the log (`natgrad.store.references`) unless they are copied.
    recorded : tuple of str
        Vectors of the inner products that were recorded instead of states; see `natgrad.store.recorded`. No states
        are stored, and none can be read.

    Attributes
    ----------
    storage : Storage
        Group that contains the arrays.
    layout : Layout
        Tensors along the element axis.
    chunk : (int, int)
        Steps and elements of a chunk.
    array_dtypes : dict
        Logical dtype (``bfloat16`` included) of each array of states.
    replicates : int
        Number R of replicates, 0 if there are none.
    dtypes : dict
        Logical dtype of each array (step, element). Each replicate counts as one, such as
        ``replicate_parameter/3``. Empty if no states are stored.
    checked : tuple of str
        Names under which checksums of each state are recorded: `dtypes`, or `PRODUCTS` if no states are stored.
    journal : Journal
        The commit records.
    n_states : int
        Number of committed states, including a provisional one.
    n_fixed : int
        Number of states that will not change: all except a provisional one.
    dropped : frozenset of int
        States whose elements were removed; see `natgrad.store.copies.slim`.
    """

    def __init__(
        self,
        storage: Storage,
        layout: Layout,
        chunk: tuple[int, int],
        dtypes: dict[str, str],
        replicates: int,
        compressed: Iterable[str],
        in_place: bool = False,
        recorded: tuple[str, ...] = (),
    ) -> None:
        self.storage, self.in_place, self.recorded = storage, in_place, recorded
        self.layout, self.chunk, self.array_dtypes, self.replicates = layout, chunk, dtypes, replicates
        self.dtypes = {
            name: dtype
            for array, dtype in dtypes.items()
            for name in (self.replicates_of(array) if array in REPLICATE_STATES else (array,))
            if not recorded
        }
        self.checked = (PRODUCTS,) if recorded else tuple(self.dtypes)
        self._chunk_bytes = {
            name: math.prod(chunk) * storage_dtype(dtype).itemsize for name, dtype in self.dtypes.items()
        }
        self._compressed = frozenset(compressed)
        self._array = cache(lambda name: open_array(self.storage / name))
        # Creating a storage path takes as long as opening a file.
        self._folder = None if storage.local_path is None else str(storage.local_path)
        self._chunks = ChunkFiles(self._folder or "", chunk, self.dtypes, self._damaged)
        self._writes = storage.writes()
        self._written: set[Storage] = set()
        self.journal = Journal(storage / "commits", INGEST_AGAIN)
        self.checksums = RecordedChecksums(self, storage / "commits/reads", INGEST_AGAIN)
        self._load_records()

    def refresh(self) -> None:
        """Find the states that were committed since this object was opened or refreshed."""
        storage = self.storage.latest()
        if storage != self.storage:
            self.storage = storage
            self._array.cache_clear()
            self.journal = Journal(storage / "commits", INGEST_AGAIN)
            self.checksums = RecordedChecksums(self, storage / "commits/reads", INGEST_AGAIN)
        self._load_records()

    def _load_records(self) -> None:
        """Find the number of recorded states, and keep the newest record and that of a provisional state."""
        # A commit replaces the provisional state after its own record, so this order never misses both.
        provisional = self.journal.read_provisional()
        names = self.journal.names()
        self._newest: dict[str, Any] = self.journal.read(names[-1]) if names else {"stop": 0}
        self.n_fixed = int(self._newest["stop"])
        self._provisional = provisional if provisional.get("start") == self.n_fixed else {}
        self.n_states = self.n_fixed + bool(self._provisional)
        self.dropped = frozenset(
            state for first, last in self.journal.read_dropped() for state in range(first, last)
        )
        self._references: References | None = None
        self._files = OpenFiles([])
        self._gone: frozenset[int] = frozenset()
        self._partial: dict[str, bool] = {}
        self.checksums.forget()

    @property
    def references(self) -> References:
        """The files of the log that contain states which are not copied."""
        if self._references is None:
            records = [record for record in self.each_record() if "references" in record] if self.in_place else []
            self._references = References((record["start"], record["references"]) for record in records)
            self._files = OpenFiles(self._references.files)
            self._gone = frozenset(state for record in records for state in record.get("gone", ()))
        return self._references

    @property
    def gone(self) -> frozenset[int]:
        """States of older attempts whose files a restarted run has overwritten or removed."""
        return self._gone if self.references.files else frozenset()

    @property
    def provisional(self) -> tuple[str, ...]:
        """Names of the arrays and numbers that the last state lacks, if it is provisional; otherwise empty."""
        return tuple(self._provisional["lacking"][str(self.n_fixed)]) if self._provisional else ()

    def lacking(self) -> dict[int, tuple[str, ...]]:
        """Return what each incomplete state lacks: names of arrays and numbers, by state.

        In addition to a provisional state, these are the last states of runs and attempts that ended without it.
        """
        parts = [record["lacking"] for record in self.each_record() if "lacking" in record]
        return {int(state): tuple(names) for part in parts for state, names in part.items()}

    def records(self) -> list[dict[str, Any]]:
        """Return the records of the states, in order; see `natgrad.store.journal.Journal.read`."""
        return list(self.each_record())

    def each_record(self, first: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the records of the states, in order, one by one: those of a long run may not fit in memory.

        Parameters
        ----------
        first : int
            Omit earlier commits.
        """
        for name in self.journal.names()[first:]:
            record = self.journal.read(name)
            if record["start"] >= self.n_fixed:  # committed since the trajectory was opened
                break
            yield record
        if self._provisional:
            yield self._provisional

    def _stored(self, name: str) -> int:
        """Return the number of states whose elements of an array are stored; a provisional state may lack them."""
        return self.n_fixed if replicate_of(name)[0] in self.provisional else self.n_states

    def replicates_of(self, array: str) -> tuple[str, ...]:
        """Return the names of the replicates of an array (step, replicate, element)."""
        return tuple(of_replicate(array, replicate) for replicate in range(self.replicates))

    @property
    def columns(self) -> int:
        """Number of chunk columns."""
        return -(-self.layout.elements // self.chunk[1])

    def column(self, index: int) -> tuple[int, int]:
        """Return the first and stop element of a chunk column."""
        return index * self.chunk[1], min((index + 1) * self.chunk[1], self.layout.elements)

    def is_compressed(self, name: str) -> bool:
        """Return True if the chunks of an array are compressed; a compressed chunk is always read completely."""
        return replicate_of(name)[0] in self._compressed

    def chunk_name(self, name: str, index: int, column: int) -> str:
        """Return the name of a chunk of an array (step, element) below the storage of the trajectory."""
        array, replicate = replicate_of(name)
        return f"{array}/{chunk_name(index, *([] if replicate is None else [replicate]), column)}"

    def chunk_entry(self, name: str, index: int, column: int) -> Storage:
        """Return the file or object of a chunk of an array (step, element)."""
        return self.storage / self.chunk_name(name, index, column)

    def allows_partial_reads(self, name: str) -> bool:
        """Return True if parts of a chunk can be read, because they are in uncompressed local files."""
        if name not in self._partial:
            are_copied = not self._are_all_referenced(name)
            local = self.references.is_local and (self._folder is not None or not are_copied)
            self._partial[name] = local and not self.is_compressed(name)
        return self._partial[name]

    def _are_all_referenced(self, name: str) -> bool:
        states = self._stored(name) if self.in_place else 0
        return states > 0 and all(self._are_referenced(name, 0, states, column).all() for column in self._differing)

    @property
    def _differing(self) -> range:
        """Chunk columns of a state that may be stored differently: one stands for all columns if they may not."""
        return range(self.columns if self.storage.refers else 1)

    def _are_referenced(self, name: str, start: int, stop: int, column: int) -> NDArray[np.bool_]:
        """Return which states of a chunk column are in the files of the log, shape (states,)."""
        if not self.in_place:
            return np.zeros(stop - start, bool)
        references, refers = self.references, self.storage.refers
        found = (
            self.refers_to(references.state(state), name, column) if refers else references.has(name, state)
            for state in range(start, stop)
        )
        return np.fromiter(found, bool, stop - start)

    def refers_to(self, reference: StateReference | None, name: str, column: int) -> bool:
        """Return True if a chunk column of a state with this reference is not copied.

        If chunks can refer to other files, those that are one range of a file do. All other chunks are copied, so
        that every reader of the storage finds them.
        """
        if reference is None or not self.storage.refers:
            return reference is not None and name in reference.arrays
        return chunk_range(self, reference, name, column) is not None

    def are_first_read_by_a_pass(self, name: str, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which states have no checksum before a pass has read them, shape (states, columns)."""
        if name not in self.logged:
            return np.zeros((stop - start, self.columns), bool)
        found = [self._are_referenced(name, start, stop, column) for column in self._differing]
        return np.broadcast_to(np.column_stack(found), (stop - start, self.columns))

    @property
    def logged(self) -> tuple[str, ...]:
        """Names under which checksums of what a pass reads are recorded: arrays without those of the optimizer."""
        if self.recorded:
            return self.checked
        replicates = [name for array in REPLICATE_STATES for name in self.replicates_of(array)]
        return tuple(name for name in (*STATES, *replicates) if name in self.dtypes)

    def has_halo(self, name: str) -> bool:
        """Return True if an update needs an array of the state after it, not only of the state before it."""
        return name in STATES[:2]

    def readable(self, name: str, column: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the states of a chunk column that can be read: ranges in a chunk, single states of the log (True).

        States that are `gone` are omitted.
        """
        steps = self.chunk[0]
        for begin, end, in_place in self.divided(name, 0, self.n_states, column):
            step = 1 if in_place else steps
            for index in range(begin // step, -(-end // step)):
                low, high = max(begin, index * step), min(end, (index + 1) * step)
                if low not in self.gone and low not in self.dropped:
                    yield low, high, in_place

    # Reading ------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, column: int, columns: int = 0) -> Iterator[None]:
        """Keep the chunk files of a column open while they are read block by block.

        Parameters
        ----------
        column : int
        columns : int
            Limit of the read-ahead: if the chunks are not cached, the next column is read ahead, provided that its
            index is less than this.
        """
        self._chunks.columns = columns
        finished = None
        try:
            yield
            self._files.require_unchanged()
            finished = column if column + 1 < columns else None
        finally:
            self._chunks.close(finished)
            if finished is None:
                self._files.close()

    def ranges(self, start: int, stop: int, column: int, leads: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """Divide updates into ranges whose states can be located together, while a column is `opened`.

        The number of open files and of located pieces is limited. Updates of states that are `gone` are omitted
        if no pass has read them: their products are unknown. States that no update needs are also omitted if they
        are gone or dropped.

        Parameters
        ----------
        start, stop : int
            Updates; the states of a range include the one after its last update.
        column : int
        leads : bool array, shape (updates,)
            True if an update leads from a state to the next.

        Yields
        ------
        (int, int)

        Raises
        ------
        InputError
            If a state is gone that one of these updates needs, and that a pass has read before.
        """
        sizes = {name: storage_dtype(self.dtypes[name]).itemsize for name in self.logged}
        missing = sorted(state for state in self.gone | self.dropped if start <= state <= stop)
        for state in missing:
            if leads[max(state - 1 - start, 0) : state + 1 - start].any():
                self.require_available(state, state + 1)
                self._require_never_read(state)
        # A state that is gone belongs to the update that leads to it, and to the next one.
        starts, stops = [start, *(state + 1 for state in missing)], [*(state - 1 for state in missing), stop]
        for low, high in zip(starts, stops, strict=True):
            for first, last, files in self.references.ranges(sizes, low, high, self.column(column)):
                self._files.keep(files)
                yield first, last

    def _require_never_read(self, state: int) -> None:
        """Raise an error for a state that is gone if a pass has read it: its updates must not be lost."""
        which = state, state + 1
        if any(
            (self.checksums.of(name, *which)[1] & self.are_first_read_by_a_pass(name, *which)).any()
            for name in self.logged
        ):
            raise self.references.first_file(state).error(
                "a restarted run has overwritten or removed it", self.named(state, state + 1)
            )

    def locate(self, name: str, start: int, stop: int, column: int) -> Located:
        """Locate committed states of a chunk column in their files, while the column is `opened`.

        Parameters
        ----------
        name : str
            An array for which `allows_partial_reads` is True.
        start, stop : int
            Range of states.
        column : int

        Raises
        ------
        InputError
            If a state is not committed, or a chunk or file is missing, too short or changed.
        """
        self._require_committed(name, start, stop)
        stored = max(start, min(stop, self._stored(name)))
        itemsize, ends = storage_dtype(self.dtypes[name]).itemsize, self.column(column)
        parts = []
        for low, high, referenced in self.divided(name, start, stored, column):
            if not referenced:
                parts.append(self._chunks.locate(name, low, high, column, ends[1] - ends[0]))
                continue
            files, *rest = self.references.locate(name, range(low, high), ends, itemsize)
            used, positions = np.unique(files, return_inverse=True)
            descriptors = np.array([self._files.descriptor(index) for index in used.tolist()], np.int32)
            parts.append(Located(descriptors[positions].reshape(files.shape), *rest))
        if stored < stop or not parts:
            parts.append(self._chunks.locate_missing(name, stop - stored, ends[1] - ends[0]))
        return joined(parts, itemsize)

    def divided(self, name: str, start: int, stop: int, column: int) -> Iterator[tuple[int, int, bool]]:
        """Divide states of a chunk column into ranges in the files of the log (True), and in chunks (False)."""
        referenced = self._are_referenced(name, start, stop, column)
        edges = [0, *(np.flatnonzero(np.diff(referenced)) + 1).tolist(), stop - start]
        for low, high in itertools.pairwise(edges):
            if low < high:
                yield start + low, start + high, bool(referenced[low])

    def read(
        self, name: str, start: int, stop: int, column: int, out: NDArray[Any], *, verified: bool = True
    ) -> None:
        """Read committed states of a chunk column into a buffer. The bits are the same for every storage.

        Parameters
        ----------
        name : str
            One of `dtypes`.
        start, stop : int
            Range of states.
        column : int
            Chunk column.
        out : array, shape (stop - start, chunk elements), of `storage_dtype`
            Output; elements beyond the last element of the model are not changed.
        verified : bool
            Compare the states with their checksums.

        Raises
        ------
        InputError
            If a state is not committed, a chunk is missing or too short, or a state does not match its checksum.
        """
        self._require_committed(name, start, stop)
        first, last = self.column(column)
        out = out[:, : last - first]
        steps = self.chunk[0]
        read = (
            self._decode if self.is_compressed(name) else self._fetch if self._folder is None else self._chunks.read
        )
        stored = min(stop, self._stored(name))
        out[max(stored - start, 0) :] = missing_word(self.dtypes[name])
        for begin, end, referenced in self.divided(name, start, stored, column):
            for index in range(begin // steps, -(-end // steps)):
                low, high = max(begin, index * steps), min(end, (index + 1) * steps)
                states = out[low - start : high - start]
                if referenced:
                    for state, words in enumerate(states, low):
                        part = f"{name}, {self.named(state, state + 1)}"
                        self.references.read(name, state, self.column(column), words, part)
                else:
                    read(name, index, column, low, states)
                if verified:
                    # Blosc decompresses a truncated chunk to wrong values without an error.
                    checksums = np.zeros(len(states), np.uint32)
                    add_to_checksums(checksums, states)
                    self.require_recorded(name, low, column, checksums)

    def _damaged(
        self, name: str, index: int, column: int, what: str, states: tuple[int, int] | None = None
    ) -> InputError:
        """Return the error for a chunk, which names its tensors, and the steps of all its states or of a range."""
        start, stop = states or (index * self.chunk[0], min((index + 1) * self.chunk[0], self.n_states))
        first, last = self.tensors_of(column)
        tensors = f"tensor {first}" if first == last else f"tensors {first} to {last}"
        part = f"{name}, {self.named(start, stop)}, {tensors}"
        if self._are_referenced(name, start, start + 1, column)[0]:
            return self.references.first_file(start, name, self.column(column)).error(what, part)
        return damage_error(self.chunk_entry(name, index, column), what, INGEST_AGAIN, part)

    def tensors_of(self, column: int) -> tuple[str, str]:
        """Return the names of the first and last tensor in a chunk column."""
        segments = self.layout.segments(*self.column(column))
        return self.layout.tensors[segments[0][0]].name, self.layout.tensors[segments[-1][0]].name

    def named(self, start: int, stop: int) -> str:
        """Return a name for a range of states, for messages."""
        return self.numbered(start, stop)

    @staticmethod
    def numbered(start: int, stop: int) -> str:
        """Return the indices of a range of states, for messages."""
        return f"state {start}" if stop - start == 1 else f"states {start} to {stop - 1}"

    def _require_committed(self, name: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_states:
            raise InputError(
                f"states {start} to {stop} of {name} are not committed; {self.n_states} states are",
                where=str(self.storage),
            )
        self.require_available(start, stop)

    def _decode(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        """Read states of a compressed chunk through Zarr."""
        chunk = self.chunk_entry(name, index, column)
        array, replicate = replicate_of(name)
        first, last = self.column(column)
        if not chunk.exists():
            raise self._damaged(name, index, column, "it is missing")
        try:
            values = with_length(self._array(array), self.n_states)
            steps = slice(start, start + len(out))
            out[:] = values[steps, first:last] if replicate is None else values[steps, replicate, first:last]
        except Exception as error:  # codecs share no class of errors
            raise self._damaged(name, index, column, str(error)) from error

    def _fetch(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        """Read states of an uncompressed chunk by range requests."""
        first = start - index * self.chunk[0]
        if what := fetch_states(self.chunk_entry(name, index, column), first, self.chunk[1], out):
            raise self._damaged(name, index, column, what)

    def require_recorded(
        self,
        name: str,
        start: int,
        column: int,
        checksums: NDArray[np.uint32],
    ) -> None:
        """Compare the checksums of states that were read from a chunk column with those that are recorded.

        Parameters
        ----------
        name : str
        start : int
            The first of the states.
        column : int
        checksums : uint32 array, shape (states,)
            See `natgrad.store.checksums.checksum`.

        Raises
        ------
        InputError
            If they differ. The message names the first damaged chunk, its tensors and the damaged steps.
        """
        recorded, known = self.checksums.of(name, start, start + len(checksums))
        damaged = start + np.flatnonzero((checksums != recorded[:, column]) & known[:, column])
        if damaged.size:
            index = int(damaged[0]) // self.chunk[0]
            last = int(damaged[damaged // self.chunk[0] == index][-1])
            raise self._damaged(name, index, column, "checksum mismatch", (int(damaged[0]), last + 1))

    def require_states(self) -> None:
        """Raise an error if the run has no states."""
        if self.recorded:
            raise InputError(
                "the run has no states, only the inner products of its updates",
                where=str(self.storage),
                why="they were recorded or computed outside of natgrad process, for example by natgrad.watch with "
                'mode="ledger"; the results do not need states',
                remedy='to have the states of a run, record them: natgrad.watch with mode="full"',
            )

    def require_available(self, start: int, stop: int) -> None:
        """Raise an error if a state was dropped from the trajectory, or if there are none; see `slim`."""
        self.require_states()
        dropped = [state for state in range(start, stop) if state in self.dropped]
        if dropped:
            raise InputError(
                f"the states of {self.named(dropped[0], dropped[-1] + 1)} were dropped",
                where=str(self.storage),
                why="natgrad slim has removed them; the ledger and the results do not need them",
                remedy="to compute damaged or other data again, process the log again with --overwrite",
            )

    # Writing ------------------------------------------------------------------------------------------------

    def write(self, name: str, start: int, column: int, block: NDArray[Any]) -> None:
        """Write states of a chunk column; they are invisible until they are committed.

        Parameters
        ----------
        name : str
        start : int
            First state, which must not be committed yet, or be provisional.
        column : int
            Chunk column.
        block : contiguous array, shape (states, chunk elements), of `storage_dtype`
            Elements beyond the last element of the model are padding.
        """
        if start < self.n_fixed:
            raise ValueError(f"state {start} of {name} is committed and cannot be written again")
        stop, steps = start + len(block), self.chunk[0]
        indices = range(start // steps, -(-stop // steps))
        if self.n_fixed > indices.start * steps:
            self._require_intact(name, indices.start, column)
        if self.is_compressed(name):
            first, last = self.column(column)
            array, replicate = replicate_of(name)
            elements = (slice(first, last),) if replicate is None else (replicate, slice(first, last))
            with_length(self._array(array), stop)[(slice(start, stop), *elements)] = block[:, : last - first]
            self._written.update(self.chunk_entry(name, index, column) for index in indices)
            return
        size = self._chunk_bytes[name]
        for index in indices:
            low, high = max(start, index * steps), min(stop, (index + 1) * steps)
            chunk, offset = self.chunk_entry(name, index, column), (low - index * steps) * (size // steps)
            try:
                if self.in_place and offset and not chunk.exists():
                    # The states before it are in the files of the log.
                    self._writes.write_segment(chunk, 0, memoryview(b""), size)
                    self._writes.wait()
                self._writes.write_segment(chunk, offset, block[low - start : high - start].data.cast("B"), size)
            except (EOFError, FileNotFoundError) as error:
                raise self._damaged(name, index, column, str(error)) from error

    def _require_intact(self, name: str, index: int, column: int) -> None:
        """Raise an error if the committed copies in a chunk do not match their checksums."""
        for start, stop, referenced in self.divided(name, index * self.chunk[0], self.n_fixed, column):
            if not referenced:
                states = np.empty((stop - start, self.chunk[1]), storage_dtype(self.dtypes[name]))
                self.read(name, start, stop, column, states)

    def copied_states(self, name: str, index: int, column: int) -> NDArray[Any]:
        """Return a chunk with the committed states that are copied, and zeros for all others."""
        block = np.zeros(self.chunk, storage_dtype(self.dtypes[name]))
        first = index * self.chunk[0]
        for start, stop, referenced in self.divided(
            name, first, min(first + self.chunk[0], self._stored(name)), column
        ):
            if not referenced and start not in self.dropped:
                self.read(name, start, stop, column, block[start - first : stop - first])
        return block

    def write_chunk(self, name: str, index: int, column: int, block: NDArray[Any]) -> None:
        """Write a chunk of committed states that are copied now. They are visible when this is recorded."""
        content = block.reshape(-1).data.cast("B")
        self._writes.write_segment(self.chunk_entry(name, index, column), 0, content, len(content))

    def copy_chunk(self, name: str, index: int, column: int) -> dict[int, int]:
        """Write a complete chunk of an array, with the states that are in the files of the log.

        Returns
        -------
        dict
            Checksum of each state in the chunk.
        """
        steps, (first, last) = self.chunk[0], self.column(column)
        block = np.zeros(self.chunk, storage_dtype(self.dtypes[name]))
        sums = {}
        for state in range(index * steps, min((index + 1) * steps, self._stored(name))):
            if state not in self.gone | self.dropped:
                words = block[state - index * steps]
                self.read(name, state, state + 1, column, words[None])
                sums[state] = checksum(words[: last - first])
        self.write_chunk(name, index, column, block)
        return sums

    def abandon(self) -> None:
        """Cancel uncommitted writes. On return, no write is running."""
        self._writes.abandon()

    def _settle(self) -> None:
        """Wait until all written chunks are durable."""
        self._writes.settle(self._written)
        self._written.clear()
