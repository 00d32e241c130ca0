"""The states of a run: words of committed rows are read, and those of new rows written, however their chunks lie.

Chunks are plain files of this machine, plain objects of a store, or compressed. A reader of plain files can be told
where rows lie in them; what is read otherwise, and can be read whole only, is compared with its checksums.

bfloat16 is stored as its bits in uint16 with the attribute ``ml_dtype``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, Layout, storage_dtype
from natgrad.schema.names import ELEMENT, REPLICATE, REPLICATE_STATES, STEP, of_replicate, replicate_of
from natgrad.storage import is_url, put, ranges
from natgrad.storage.chunk_file import ChunkFile
from natgrad.storage.disk import Writes, flush
from natgrad.storage.repository import newest
from natgrad.store.group import ArrayPlan, chunk_path, damaged, is_plain, open_array, with_rows
from natgrad.store.journal import Journal

__all__ = ["INGEST_AGAIN", "States", "checksum", "state_arrays", "storage_dtype"]

INGEST_AGAIN = "ingest the run again with --overwrite"
"""What remedies a damaged chunk."""

_RANGE_BYTES = 4 * MEBIBYTE
"""Bytes of an object that are asked for at a time, of so many ranges at the same time:"""
_RANGES = 4


def checksum(words: NDArray[Any]) -> int:
    """CRC-32C of the bytes of a contiguous array."""
    return int(crc32c(words.data.cast("B")))


def state_arrays(
    layout: Layout,
    dtypes: Mapping[str, str],
    chunk: tuple[int, int],
    replicates: int,
    compressors: Mapping[str, Any],
) -> dict[str, ArrayPlan]:
    """Return the arrays to be made for the states of a run, which has none yet.

    Parameters
    ----------
    layout : Layout
    dtypes : mapping
        Array to logical dtype.
    chunk : (int, int)
        Steps and elements of a chunk.
    replicates : int
    compressors : mapping
        Array to Zarr codecs; the others are stored as they are.
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
    """The states of a run, of which the recorded rows are committed; and those that are written to be so.

    Parameters
    ----------
    path : Path
        Of their group.
    version : int
        Of its layout.
    layout : Layout
    chunk : (int, int)
    dtypes : dict
        Logical dtype of each array.
    replicates : int

    Attributes
    ----------
    path : Path
    layout : Layout
        Tensors on the element axis.
    chunk : (int, int)
        Steps and elements of a chunk.
    array_dtypes : dict
        Logical dtype (``bfloat16`` included) of each array of states.
    replicates : int
        R, 0 where there are none.
    dtypes : dict
        Logical dtype of each array (step, element): a replicate is one of its own, ``replicate_parameter/3``.
    journal : Journal
        The commit records.
    rows : int
        Committed states.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        layout: Layout,
        chunk: tuple[int, int],
        dtypes: dict[str, str],
        replicates: int,
    ) -> None:
        self.path, self._version = path, version
        self.layout, self.chunk, self.array_dtypes, self.replicates = layout, chunk, dtypes, replicates
        self.dtypes = {
            name: dtype
            for array, dtype in dtypes.items()
            for name in (self.replicates_of(array) if array in REPLICATE_STATES else (array,))
        }
        self._chunk_bytes = {
            name: math.prod(chunk) * storage_dtype(dtype).itemsize for name, dtype in self.dtypes.items()
        }
        self._compressed = frozenset(name for name in dtypes if not is_plain(path / name))
        self._array = cache(lambda name: open_array(self.path / name))
        self._checksums: dict[str, NDArray[np.uint32]] = {}
        self._open: dict[tuple[str, int, int], ChunkFile] = {}
        self._read_ahead = 0
        self._writes = Writes()
        self._unflushed: set[Path] = set()
        self._flushed: set[Path] = set()
        self.journal = Journal(path / "commits", sealed=version > 1)
        self.n_states = self._recorded_rows()

    def refresh(self) -> None:
        """See the rows committed since."""
        path = newest(self.path)
        if path != self.path:
            self.path = path
            self._array.cache_clear()
            self.journal = Journal(path / "commits", sealed=self._version > 1)
        self.n_states = self._recorded_rows()

    def _recorded_rows(self) -> int:
        names = self.journal.names()
        return int(self.journal.read(names[-1])["stop"]) if names else 0

    def records(self) -> list[dict[str, Any]]:
        """Commit records, in order; see `natgrad.store.journal.Journal.read`."""
        return [self.journal.read(name) for name in self.journal.names()]

    def replicates_of(self, array: str) -> tuple[str, ...]:
        """Names of the replicates of an array (step, replicate, element)."""
        return tuple(of_replicate(array, replicate) for replicate in range(self.replicates))

    @property
    def columns(self) -> int:
        """Number of chunk columns."""
        return -(-self.layout.elements // self.chunk[1])

    def column(self, index: int) -> tuple[int, int]:
        """First and stop element of a chunk column."""
        return index * self.chunk[1], min((index + 1) * self.chunk[1], self.layout.elements)

    def is_compressed(self, name: str) -> bool:
        """Whether chunks of an array are compressed: then they are read whole."""
        return replicate_of(name)[0] in self._compressed

    def chunk_path(self, name: str, index: int, column: int) -> Path:
        """File of a chunk of an array (step, element)."""
        array, replicate = replicate_of(name)
        return chunk_path(self.path / array, index, *([] if replicate is None else [replicate]), column)

    def reads_parts(self, name: str) -> bool:
        """Whether a part of a chunk can be read: it is on this machine, and not compressed."""
        return not self.is_compressed(name) and not is_url(self.path)

    # Reading ------------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self, column: int, columns: int = 0) -> Iterator[None]:
        """Keep the files of the chunks of a column open, which are read piece by piece.

        Parameters
        ----------
        column : int
        columns : int
            Where chunks come from the disk, those of the next column are read ahead, if it is before this one.
        """
        self._read_ahead = columns
        kept: set[tuple[str, int, int]] = set()
        try:
            yield
            kept = {key for key in self._open if key[2] > column}
        finally:
            for key in set(self._open) - kept:
                self._open.pop(key).close()

    def located(self, name: str, start: int, stop: int, column: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Where committed rows of a chunk column lie, for a reader of files; while the column is `opened`.

        Parameters
        ----------
        name : str
            An array that is `reads_parts`.
        start, stop : int
            Rows.
        column : int

        Returns
        -------
        descriptors : int32 array, shape (rows,)
            Of the open file of each row's chunk.
        offsets : int64 array, shape (rows,)
            First byte of each row there.

        Raises
        ------
        InputError
            Where a row is not committed, or a chunk is missing or too short.
        """
        self._require_committed(name, start, stop)
        steps = self.chunk[0]
        indices = range(start // steps, -(-stop // steps))
        files = [self._opened_chunk(name, index, column).descriptor for index in indices]
        rows = np.arange(steps, dtype=np.int64) * (self._chunk_bytes[name] // steps)
        asked = slice(start - indices.start * steps, stop - indices.start * steps)
        return np.repeat(np.array(files, np.int32), steps)[asked], np.tile(rows, len(files))[asked]

    def read(self, name: str, start: int, stop: int, column: int, out: NDArray[Any]) -> None:
        """Read committed rows of a chunk column into a buffer, wherever and however they lie, with the same bits.

        Parameters
        ----------
        name : str
            One of `dtypes`.
        start, stop : int
            Rows.
        column : int
            Chunk column.
        out : array, shape (stop - start, chunk elements), of `storage_dtype`
            Written; elements beyond the model's last are left as they are.

        Raises
        ------
        InputError
            Where a row is not committed, or a chunk is missing, too short or (where it is read whole) damaged.
        """
        self._require_committed(name, start, stop)
        first, last = self.column(column)
        out = out[:, : last - first]
        steps = self.chunk[0]
        read = self._decode if self.is_compressed(name) else self._fetch if is_url(self.path) else self._read_file
        for index in range(start // steps, -(-stop // steps) if start < stop else 0):
            low, high = max(start, index * steps), min(stop, (index + 1) * steps)
            read(name, index, column, low, out[low - start : high - start])

    def _read_file(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        """Read rows of a plain chunk on this machine, at once where they lie together."""
        row = self.chunk[1] * out.itemsize
        together = out.flags.c_contiguous and out.shape[1] == self.chunk[1]
        with closing(self._chunk_file(name, index, column)) as file:
            try:
                for position, words in enumerate([out] if together else out, start - index * self.chunk[0]):
                    if missing := file.read(position * row, words):
                        path = self.chunk_path(name, index, column)
                        raise damaged(path, f"it ends {missing} bytes early", INGEST_AGAIN)
            except OSError as error:
                raise damaged(self.chunk_path(name, index, column), str(error), INGEST_AGAIN) from error

    def _chunk_file(self, name: str, index: int, column: int) -> ChunkFile:
        # A path of the library takes as long to make as the file to open.
        array, replicate = replicate_of(name)
        between = "" if replicate is None else f"{replicate}/"
        try:
            file = ChunkFile(f"{self.path}/{array}/c/{index}/{between}{column}")
        except OSError as error:
            raise damaged(self.chunk_path(name, index, column), str(error), INGEST_AGAIN) from error
        missing = self._chunk_bytes[name] - file.size
        if missing > 0:
            file.close()
            raise damaged(self.chunk_path(name, index, column), f"it ends {missing} bytes early", INGEST_AGAIN)
        return file

    def _opened_chunk(self, name: str, index: int, column: int, ahead: bool = True) -> ChunkFile:
        if (name, index, column) in self._open:
            return self._open[name, index, column]
        file = self._open[name, index, column] = self._chunk_file(name, index, column)
        if file.ask() and ahead and column + 1 < self._read_ahead:
            self._opened_chunk(name, index, column + 1, ahead=False)
        return file

    def _require_committed(self, name: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.n_states:
            raise InputError(
                f"rows {start} to {stop} of {name} are not committed, {self.n_states} are", where=str(self.path)
            )

    def _decode(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        path = self.chunk_path(name, index, column)
        array, replicate = replicate_of(name)
        first, last = self.column(column)
        if not path.exists():
            raise damaged(path, "it is missing", INGEST_AGAIN)
        try:
            rows = with_rows(self._array(array), self.n_states)
            steps = slice(start, start + len(out))
            out[:] = rows[steps, first:last] if replicate is None else rows[steps, replicate, first:last]
        except Exception as error:  # codecs share no class of errors
            raise damaged(path, str(error), INGEST_AGAIN) from error
        # Blosc unpacks a truncated chunk to values that were never written, without an error.
        self._require_recorded(name, column, start, out, path)

    def _fetch(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        """Read rows of a chunk that is an object, in ranges of bytes."""
        path = self.chunk_path(name, index, column)
        row = self.chunk[1] * out.itemsize
        begin = (start - index * self.chunk[0]) * row
        rows = max(1, _RANGE_BYTES // row)
        for first in range(0, len(out), rows * _RANGES):
            lows = range(first, min(first + rows * _RANGES, len(out)), rows)
            spans = [(begin + low * row, begin + min(low + rows, len(out)) * row) for low in lows]
            try:
                read = ranges(path, spans)
            except FileNotFoundError as error:
                raise damaged(path, "it is missing", INGEST_AGAIN) from error
            for low, (offset, end), content in zip(lows, spans, read, strict=True):
                if len(content) != end - offset:
                    raise damaged(path, f"it ends {end - offset - len(content)} bytes early", INGEST_AGAIN)
                words = np.frombuffer(content, out.dtype).reshape(-1, self.chunk[1])
                out[low : low + len(words)] = words[:, : out.shape[1]]
        self._require_recorded(name, column, start, out, path)

    def _require_recorded(self, name: str, column: int, start: int, out: NDArray[Any], path: Path) -> None:
        recorded = self.recorded_checksums(name)
        for row, words in enumerate(out, start):
            if checksum(words) != recorded[row, column]:
                raise damaged(path, f"row {row} has another checksum than recorded", INGEST_AGAIN)

    def recorded_checksums(self, name: str) -> NDArray[np.uint32]:
        """Checksums of the committed rows of an array, shape (rows, columns); see `checksum`."""
        if len(self._checksums.get(name, ())) < self.n_states:
            self._checksums[name] = np.concatenate([record["checksums"][name] for record in self.records()])
        return self._checksums[name]

    # Writing ------------------------------------------------------------------------------------------------

    def write(self, name: str, start: int, column: int, block: NDArray[Any]) -> None:
        """Write rows of a chunk column; they stay invisible until they are committed.

        Parameters
        ----------
        name : str
        start : int
            First row, not committed yet.
        column : int
            Chunk column.
        block : array, shape (rows, chunk elements), of `storage_dtype`
            Elements beyond the model's last are padding.
        """
        if start < self.n_states:
            raise ValueError(f"row {start} of {name} is committed and cannot be written again")
        first, last = self.column(column)
        stop = start + len(block)
        if self.is_compressed(name):
            array, replicate = replicate_of(name)
            place = (slice(first, last),) if replicate is None else (replicate, slice(first, last))
            with_rows(self._array(array), stop)[(slice(start, stop), *place)] = block[:, : last - first]
        steps = self.chunk[0]
        for index in range(start // steps, -(-stop // steps)):
            path = self.chunk_path(name, index, column)
            if not self.is_compressed(name):
                low, high = max(start, index * steps), min(stop, (index + 1) * steps)
                write = self._put if is_url(self.path) else self._place
                write(path, low - index * steps, block[low - start : high - start])
                if high == (index + 1) * steps and not is_url(self.path):
                    # Nothing is added to it: it is flushed while the next chunks are read and written.
                    self._flushed.add(path)
                    self._writes.begin(flush, path)
                    continue
            self._unflushed.add(path)

    def _put(self, path: Path, row: int, block: NDArray[Any]) -> None:
        """Write rows into the object of a chunk, which is put whole: those before stay as they are."""
        chunk = np.zeros(self.chunk, block.dtype)
        chunk[row : row + len(block)] = block
        if row:
            self._writes.wait()
            (before,) = ranges(path, [(0, chunk[:row].nbytes)])
            if len(before) != chunk[:row].nbytes:
                raise damaged(path, f"it ends {chunk[:row].nbytes - len(before)} bytes early", INGEST_AGAIN)
            chunk[:row] = np.frombuffer(before, block.dtype).reshape(row, self.chunk[1])
        self._writes.begin(put, path, chunk.tobytes())

    def _place(self, path: Path, row: int, block: NDArray[Any]) -> None:
        """Write rows into the file of a chunk; those before stay as they are, for readers that have them open."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.truncate(descriptor, math.prod(self.chunk) * block.itemsize)
            offset = row * self.chunk[1] * block.itemsize
            view = block.data.cast("B")
            while view:
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        finally:
            os.close(descriptor)

    def abandon(self) -> None:
        """Leave what was written and not committed: on return nothing of it is on its way any more."""
        self._writes.abandon()

    def _settle(self, others: Iterable[Path]) -> None:
        """Wait until all that was written is on disk, and other chunks that are to be committed with it."""
        self._unflushed.update(others)
        self._writes.wait()
        if not is_url(self.path):
            for path in sorted(self._unflushed):
                flush(path)
            # A new chunk may have made folders up to the one of its array.
            for folder in sorted({folder for path in self._unflushed | self._flushed for folder in path.parents}):
                if folder.is_relative_to(self.path):
                    flush(folder)
        self._unflushed.clear()
        self._flushed.clear()
