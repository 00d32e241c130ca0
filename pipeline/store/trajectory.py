"""The trajectory of a run: its logged states, on disk.

A trajectory is one Zarr group::

    trajectory.zarr/
      parameter, gradient, hvp    (step, element)   chunks of whole steps x about a million elements
      replicate_parameter, replicate_hvp   (step, replicate, element)   of a stochastic rule, a replicate a chunk
      replicate_loss              (step, replicate)
      step, attempt, loss, learning_rate   (step)   and what else of `pipeline.schema.SCALARS` is logged
      run                         (step)            in the trajectory of a sweep: position in its names of runs
      commits/00000000.json ...   which rows exist, and checksums of all that is in them

Rows are in the order of their commits, and only ever appended. A run that was restarted from an older step goes on
with a new *attempt*: its rows follow those that they supersede, which stay. Two rows that follow each other are
before and after an update where they are of one run and one attempt.

What lies beyond the recorded rows (an interrupted write) is overwritten by the next attempt. The shape of an array
is never ahead of the record: it grows after the commit.

bfloat16 is stored as its bits in uint16 with the attribute ``ml_dtype``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from pipeline.blocks import MEBIBYTE, Band
from pipeline.places import is_url, place, put, ranges
from pipeline.places.repository import newest, place_of_store, publish
from pipeline.schema import (
    ATTEMPT,
    ELEMENT,
    LAYOUT_VERSION,
    OPTIMIZER_NUMBERS,
    REPLICATE,
    REPLICATE_HVP,
    REPLICATE_LOSS,
    REPLICATE_STATES,
    RUN,
    STATES,
    STEP,
    TENSOR,
    USUAL_SCALARS,
    InputError,
    Layout,
    of_replicate,
    replicate_of,
    replicate_vectors,
)
from pipeline.store.chunk_file import ChunkFile
from pipeline.store.disk import Writes
from pipeline.store.group import (
    SCALAR_CHUNK,
    ArrayPlan,
    add_array,
    chunk_path,
    damaged,
    flush,
    is_plain,
    make_group,
    migrate_group,
    open_array,
    open_group,
    remove_group,
    require_whole,
    resize_all,
    whole_chunk,
    with_rows,
)
from pipeline.store.journal import Journal, sources_of

__all__ = ["Trajectory", "checksum", "storage_dtype"]

_TABLE_CHUNK = 1 << 16  # values in a chunk of an array (step, tensor), about

_INGEST_AGAIN = "ingest the run again with --overwrite"

_RANGE_BYTES = 4 * MEBIBYTE
"""Bytes of an object that are asked for at a time, of so many ranges at the same time:"""
_RANGES = 4


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Dtype of the words in which values are stored: bfloat16 as uint16, the others as they are."""
    return np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")


def checksum(words: NDArray[Any]) -> int:
    """CRC-32C of the bytes of a contiguous array."""
    return int(crc32c(words.data.cast("B")))


class Trajectory:
    """A run's logged states, on disk.

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
    scalars : tuple of str
        Numbers of a step that are stored.
    source : str
        Where the log was.
    sweep : bool
        Whether it holds several runs.
    tables : tuple of str
        Numbers of a step and tensor that are stored, of `pipeline.schema.OPTIMIZER_NUMBERS`.
    reading : dict or None
        How its log is read, of `pipeline.ingest.reading`; None where an older version made it.
    journal : Journal
        The commit records.
    rows : int
        Committed states.

    Notes
    -----
    Readers may be many and never wait; there is one writer at a time (`pipeline.ingest` holds the lock).
    """

    def __init__(self, path: Path, version: str | None = None) -> None:
        """Open a trajectory at the rows committed so far.

        Parameters
        ----------
        path : Path
        version : str, optional
            Of an Icechunk repository: id, tag or time of the version to read; the newest where not given.

        Raises
        ------
        InputError
            Where there is none, or a newer natgrad wrote it.
        """
        self.path = place_of_store(path, version)
        attributes = open_group(self.path, "trajectory", "ingest a run first: natgrad ingest SOURCE OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.chunk: tuple[int, int] = tuple(attributes["chunk"])
        self.array_dtypes: dict[str, str] = attributes["dtypes"]
        self.replicates: int = attributes.get("replicates", 0)
        self.dtypes = {
            name: dtype
            for array, dtype in self.array_dtypes.items()
            for name in (self.replicates_of(array) if array in REPLICATE_STATES else (array,))
        }
        self._chunk_bytes = {
            name: math.prod(self.chunk) * storage_dtype(dtype).itemsize for name, dtype in self.dtypes.items()
        }
        self.scalars: tuple[str, ...] = tuple(attributes.get("scalars", USUAL_SCALARS))
        self.source: str = attributes["source"]
        self.sweep: bool = attributes.get("sweep", False)
        self.tables: tuple[str, ...] = tuple(attributes.get("tables", ()))
        self.reading: dict[str, Any] | None = attributes.get("reading")
        # A store of version 1 has one attempt at one run.
        self._version: int = attributes["version"]
        self._numbered = (STEP,) if self._version < 2 else (STEP, ATTEMPT, RUN)[: 3 if self.sweep else 2]
        self._compressed = frozenset(name for name in self.array_dtypes if not is_plain(self.path / name))
        self._array = cache(lambda name: open_array(self.path / name))
        self.journal = Journal(self.path / "commits", sealed=self._version > 1)
        self._unflushed: set[Path] = set()
        self._flushed: set[Path] = set()
        self._checksums: dict[str, NDArray[np.uint32]] = {}
        self._runs: tuple[str, ...] = ()
        self._breaks: NDArray[np.int64] | None = None
        self._spans: NDArray[np.int64] | None = None
        self._read: dict[tuple[str, int], NDArray[Any]] = {}
        self._writes = Writes()
        self._open: dict[tuple[str, int, int], ChunkFile] = {}
        self._read_ahead = 0
        self.rows = 0
        self._count_rows()

    @classmethod
    def create(
        cls,
        path: Path,
        layout: Layout,
        dtypes: Mapping[str, str],
        chunk: tuple[int, int],
        source: str = "",
        compressors: Mapping[str, Any] | None = None,
        scalars: Sequence[str] = USUAL_SCALARS,
        sweep: bool = False,
        tables: Sequence[str] = (),
        replicates: int = 0,
        reading: Mapping[str, Any] | None = None,
    ) -> Trajectory:
        """Create an empty trajectory, in place of one that is there.

        Parameters
        ----------
        path : Path
        layout : Layout
        dtypes : mapping
            Array (``parameter``, ``gradient``, ``hvp``, of replicates, what the optimizer keeps) to logical dtype.
        chunk : (int, int)
            Steps and elements of a chunk.
        source : str, optional
            Where the log was, for provenance.
        compressors : mapping, optional
            Array to Zarr codecs. The others are stored as they are: training state hardly compresses.
        scalars : sequence of str, optional
            Numbers of a step to store, of `pipeline.schema.SCALARS`; and ``replicate_loss``.
        sweep : bool
            For several runs.
        tables : sequence of str
            Numbers of a step and tensor to store, of `pipeline.schema.OPTIMIZER_NUMBERS`.
        replicates : int
            Of a stochastic rule.
        reading : mapping, optional
            How its log is read.

        Raises
        ------
        InputError
            Where the path holds something else.
        """
        attributes = {
            "source": source,
            "layout": layout.to_json(),
            "chunk": list(chunk),
            "dtypes": dict(dtypes),
            "scalars": list(scalars),
            "sweep": sweep,
            "tables": list(tables),
        }
        if replicates:
            attributes["replicates"] = replicates
        if reading is not None:
            attributes["reading"] = dict(reading)
        arrays = {}
        for name, dtype in dtypes.items():
            several = name in REPLICATE_STATES
            arrays[name] = ArrayPlan(
                (STEP, REPLICATE, ELEMENT) if several else (STEP, ELEMENT),
                (0, replicates, layout.elements) if several else (0, layout.elements),
                (chunk[0], 1, chunk[1]) if several else chunk,
                storage_dtype(dtype).name,
                {"ml_dtype": dtype} if dtype == "bfloat16" else {},
                (compressors or {}).get(name),
            )
        numbered = (STEP, ATTEMPT, RUN) if sweep else (STEP, ATTEMPT)
        for name in (*numbered, *scalars):
            several = name == REPLICATE_LOSS
            arrays[name] = ArrayPlan(
                (STEP, REPLICATE) if several else (STEP,),
                (0, replicates) if several else (0,),
                (max(1, _TABLE_CHUNK // replicates), replicates) if several else (SCALAR_CHUNK,),
                "int64" if name in numbered else "float64",
            )
        width = len(layout.tensors)
        for name in tables:
            rows = max(1, _TABLE_CHUNK // max(1, width))
            arrays[name] = ArrayPlan((STEP, TENSOR), (0, width), (rows, width), "float64")
        make_group(place(path), "trajectory", attributes, arrays)
        return cls(path)

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a trajectory; what is not one is refused (InputError)."""
        remove_group(path, "trajectory")

    def refresh(self) -> None:
        """See the rows committed since."""
        path = newest(self.path)
        if path != self.path:
            self.path = path
            self._array.cache_clear()
            self.journal = Journal(path / "commits", sealed=self._version > 1)
        self._count_rows()

    def _count_rows(self) -> None:
        names = self.journal.names()
        self._breaks = None
        self.rows = int(self.journal.read(names[-1])["stop"]) if names else 0

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the arrays (step): those that number the rows, and the scalars; and of those (step, tensor)."""
        return (*self._numbered, *self.scalars, *self.tables)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all Zarr arrays."""
        return (*self.array_dtypes, *self.numbers)

    @property
    def logged(self) -> tuple[str, ...]:
        """Names of the arrays (step, element) that were logged of the run, and not of its optimizer."""
        replicates = [name for array in REPLICATE_STATES for name in self.replicates_of(array)]
        return tuple(name for name in (*STATES, *replicates) if name in self.dtypes)

    @property
    def replicate_vectors(self) -> tuple[str, ...]:
        """Vectors of the Gram matrix of the replicates; none where there are no replicates."""
        return replicate_vectors(self.replicates, REPLICATE_HVP in self.array_dtypes)

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

    def scalar(self, name: str) -> NDArray[Any]:
        """Read ``step``, ``attempt`` or ``run`` (int64) or a scalar (float64) of the committed rows, shape (rows,).

        What an optimizer has of each tensor has shape (rows, tensors), and ``replicate_loss`` (rows, R). A scalar
        that the trajectory does not have is NaN at every step.

        Raises
        ------
        InputError
            Where a chunk is missing or too short.
        """
        if name not in self.numbers:
            shape: tuple[int, ...] = (self.rows,)
            if name in OPTIMIZER_NUMBERS or name == REPLICATE_LOSS:
                shape = (self.rows, self.replicates if name == REPLICATE_LOSS else len(self.layout.tensors))
            return np.zeros(shape, np.int64) if name in (ATTEMPT, RUN) else np.full(shape, np.nan)
        if (name, self.rows) in self._read:
            return self._read[name, self.rows]
        array, paths = self._array(name), self._number_chunks(name, 0, self.rows)
        chunk = array.chunks, array.dtype, _INGEST_AGAIN
        if is_url(self.path):
            for path in paths:
                require_whole(path, *chunk)
            values = np.asarray(with_rows(array, self.rows)[:])
        else:
            # A long run has many of them, and Zarr takes longer for each than the disk.
            parts = [np.empty((0, *array.shape[1:]), array.dtype), *(whole_chunk(path, *chunk) for path in paths)]
            values = np.concatenate(parts)[: self.rows]
        values.flags.writeable = False
        self._read = {key: held for key, held in self._read.items() if key[1] == self.rows}
        self._read[name, self.rows] = values
        return values

    def _number_chunks(self, name: str, start: int, stop: int) -> list[Path]:
        """Files of the chunks of rows of an array (step), (step, tensor) or (step, replicate)."""
        rows = self._array(name).chunks[0]
        beside = (0,) if name in self.tables or name == REPLICATE_LOSS else ()
        indices = range(start // rows, -(-stop // rows))
        return [chunk_path(self.path / name, index, *beside) for index in indices]

    @property
    def runs(self) -> tuple[str, ...]:
        """Names of the runs of a sweep, in the order in which they came; of a run by itself, one empty name."""
        if not self.sweep:
            return ("",)
        if len(self._runs) <= int(self.scalar(RUN).max(initial=-1)):
            self._runs = tuple(name for record in self.records() for name in record.get("runs", ()))
        return self._runs

    def spans(self) -> NDArray[np.int64]:
        """Return the updates from each row to the next, shape (rows - 1,); 0 to one of another run or attempt.

        There are states on both sides of such a place, but no update leads from one to the other.
        """
        if self._spans is None or len(self._spans) != max(self.rows - 1, 0):
            self._spans = np.diff(self.scalar(STEP))
            for name in (ATTEMPT, RUN):
                if name in self.numbers:
                    self._spans[np.diff(self.scalar(name)) != 0] = 0
        return self._spans

    def stretches(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Cut rows where no update leads from one to the next; what has no update at all is left out.

        Returns
        -------
        list of (first row, stop row)
            Of two rows at least.
        """
        if self._breaks is None:
            self._breaks = np.flatnonzero(self.spans() == 0) + 1
        inside = self._breaks[np.searchsorted(self._breaks, start, "right") : np.searchsorted(self._breaks, stop)]
        edges = [start, *inside.tolist(), stop]
        return [(low, high) for low, high in itertools.pairwise(edges) if high - low > 1]

    def current(self, attempt: int | None = None) -> NDArray[np.bool_]:
        """Which rows are states of the runs as they stand, shape (rows,): the others were superseded.

        Parameters
        ----------
        attempt : int, optional
            As they stood at this attempt, where later ones are left aside.
        """
        steps, attempts, runs = (self.scalar(name) for name in (STEP, ATTEMPT, RUN))
        chosen = attempts <= (attempts.max(initial=0) if attempt is None else attempt)
        # A new attempt supersedes what its run has from its first step on.
        new = np.unique(runs, return_index=True)[1]
        for begin in np.setdiff1d(np.flatnonzero(self.spans() == 0) + 1, new):
            if chosen[begin]:
                older = (runs[:begin] == runs[begin]) & (attempts[:begin] < attempts[begin])
                chosen[:begin] &= ~older | (steps[:begin] < steps[begin])
        return chosen

    def records(self) -> list[dict[str, Any]]:
        """Commit records, in order; see `pipeline.store.journal.Journal.read`."""
        return [self.journal.read(name) for name in self.journal.names()]

    def sources(self) -> list[dict[str, Any]]:
        """Return what identifies the source of each row."""
        return [source for record in self.records() for source in sources_of(record)]

    # Reading ------------------------------------------------------------------------------------------------

    def is_compressed(self, name: str) -> bool:
        """Whether chunks of an array are compressed: then they are read whole."""
        return replicate_of(name)[0] in self._compressed

    def chunk_path(self, name: str, index: int, column: int) -> Path:
        """File of a chunk of an array (step, element)."""
        array, replicate = replicate_of(name)
        return chunk_path(self.path / array, index, *([] if replicate is None else [replicate]), column)

    def in_pieces(self, name: str) -> bool:
        """Whether a part of a chunk can be read: it is on this machine, and not compressed."""
        return not self.is_compressed(name) and not is_url(self.path)

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
            An array that is `in_pieces`.
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
                        raise damaged(path, f"it ends {missing} bytes early", _INGEST_AGAIN)
            except OSError as error:
                raise damaged(self.chunk_path(name, index, column), str(error), _INGEST_AGAIN) from error

    def _chunk_file(self, name: str, index: int, column: int) -> ChunkFile:
        # A path of the library takes as long to make as the file to open.
        array, replicate = replicate_of(name)
        between = "" if replicate is None else f"{replicate}/"
        try:
            file = ChunkFile(f"{self.path}/{array}/c/{index}/{between}{column}")
        except OSError as error:
            raise damaged(self.chunk_path(name, index, column), str(error), _INGEST_AGAIN) from error
        missing = self._chunk_bytes[name] - file.size
        if missing > 0:
            file.close()
            raise damaged(self.chunk_path(name, index, column), f"it ends {missing} bytes early", _INGEST_AGAIN)
        return file

    def _opened_chunk(self, name: str, index: int, column: int, ahead: bool = True) -> ChunkFile:
        if (name, index, column) in self._open:
            return self._open[name, index, column]
        file = self._open[name, index, column] = self._chunk_file(name, index, column)
        if file.ask() and ahead and column + 1 < self._read_ahead:
            self._opened_chunk(name, index, column + 1, ahead=False)
        return file

    def _require_committed(self, name: str, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.rows:
            raise InputError(
                f"rows {start} to {stop} of {name} are not committed, {self.rows} are", where=str(self.path)
            )

    def _decode(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        path = self.chunk_path(name, index, column)
        array, replicate = replicate_of(name)
        first, last = self.column(column)
        if not path.exists():
            raise damaged(path, "it is missing", _INGEST_AGAIN)
        try:
            rows = with_rows(self._array(array), self.rows)
            steps = slice(start, start + len(out))
            out[:] = rows[steps, first:last] if replicate is None else rows[steps, replicate, first:last]
        except Exception as error:  # codecs share no class of errors
            raise damaged(path, str(error), _INGEST_AGAIN) from error
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
                raise damaged(path, "it is missing", _INGEST_AGAIN) from error
            for low, (offset, end), content in zip(lows, spans, read, strict=True):
                if len(content) != end - offset:
                    raise damaged(path, f"it ends {end - offset - len(content)} bytes early", _INGEST_AGAIN)
                words = np.frombuffer(content, out.dtype).reshape(-1, self.chunk[1])
                out[low : low + len(words)] = words[:, : out.shape[1]]
        self._require_recorded(name, column, start, out, path)

    def _require_recorded(self, name: str, column: int, start: int, out: NDArray[Any], path: Path) -> None:
        recorded = self.recorded_checksums(name)
        for row, words in enumerate(out, start):
            if checksum(words) != recorded[row, column]:
                raise damaged(path, f"row {row} has another checksum than recorded", _INGEST_AGAIN)

    def recorded_checksums(self, name: str) -> NDArray[np.uint32]:
        """Checksums of the committed rows of an array, shape (rows, columns); see `checksum`."""
        if len(self._checksums.get(name, ())) < self.rows:
            self._checksums[name] = np.concatenate([record["checksums"][name] for record in self.records()])
        return self._checksums[name]

    # Writing ------------------------------------------------------------------------------------------------

    def write(self, name: str, start: int, column: int, block: NDArray[Any]) -> None:
        """Write rows of a chunk column; they stay invisible until `commit`.

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
        if start < self.rows:
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
                raise damaged(path, f"it ends {chunk[:row].nbytes - len(before)} bytes early", _INGEST_AGAIN)
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

    def commit(
        self,
        steps: Sequence[int],
        scalars: Mapping[str, Sequence[Any]],
        sources: Sequence[Mapping[str, Any]],
        checksums: Mapping[str, Sequence[Sequence[int]]],
        attempts: Sequence[int] | None = None,
        runs: Sequence[str] = (),
    ) -> None:
        """Make written rows visible, for all arrays together.

        Parameters
        ----------
        steps : sequence of int, length n
            Step numbers of the next n rows.
        scalars : mapping
            Each of `scalars`, n values (of ``replicate_loss`` n times R), and of `tables`, n rows of values; NaN
            where the log has none.
        sources : sequence of mapping, length n
            What identifies each step's source (name, size, time).
        checksums : mapping
            Array name to n rows of one `checksum` per chunk column.
        attempts : sequence of int, length n, optional
            Attempt of each row; the first where not given.
        runs : sequence of str, length n
            In a sweep, the name of each row's run.
        """
        start, stop = self.rows, self.rows + len(steps)
        known = dict(zip(self.runs, range(len(self.runs)), strict=True)) if self.sweep else {}
        numbers = {STEP: steps, ATTEMPT: attempts or [0] * len(steps)}
        if self.sweep:
            numbers[RUN] = [known.setdefault(name, len(known)) for name in runs]
        for name, values in {**numbers, **scalars}.items():
            array = self._array(name)
            with_rows(array, stop)[start:stop] = np.asarray(values, dtype=array.dtype)
            self._unflushed.update(self._number_chunks(name, start, stop))
        self._writes.wait()
        if not is_url(self.path):
            self._flush()
        record = {"start": start, "stop": stop, "sources": list(sources), "checksums": dict(checksums)}
        record["scalars"] = self._scalar_checksums(start, stop)
        if self.sweep:
            record["runs"] = list(known)[len(self.runs) :]
        self.journal.write(f"{len(self.journal.names()):08d}", record, new=True)
        self._unflushed.clear()
        self._flushed.clear()
        self.rows, self._breaks = stop, None
        self.recover()
        publish(self.path, self._message(steps, attempts or [0]))

    def _message(self, steps: Sequence[int], attempts: Sequence[int]) -> str:
        """Say what a commit added."""
        told = []
        for what, numbers in {"steps": steps, "attempt": attempts}.items():
            low, high = min(numbers, default=0), max(numbers, default=0)
            told.append(f"{what} {low}" + (f" to {high}" if high > low else ""))
        return f"trajectory of {self.path.parent.name}: {', '.join(told)}"

    def abandon(self) -> None:
        """Leave what was written and not committed: on return nothing of it is on its way any more."""
        self._writes.abandon()

    def _flush(self) -> None:
        for path in sorted(self._unflushed):
            flush(path)
        # A new chunk may have made folders up to the one of its array.
        for folder in sorted({folder for path in self._unflushed | self._flushed for folder in path.parents}):
            if folder.is_relative_to(self.path):
                flush(folder)

    def recover(self) -> None:
        """Bring the shapes on disk up to the record, should the writer before have stopped between the two.

        A store of an older version becomes one of this.
        """
        self.journal.clear()
        if self._version < LAYOUT_VERSION:
            self._migrate()
        resize_all([self.path / name for name in self.arrays], self.rows)

    def _scalar_checksums(self, start: int, stop: int) -> dict[str, int]:
        """Checksums of rows of each array (step) as they are on disk, and not committed yet maybe."""
        return {name: checksum(np.asarray(with_rows(self._array(name), stop)[start:stop])) for name in self.numbers}

    def _migrate(self) -> None:
        """Write records anew, with what version 1 did not have (and attempts), and be of this version."""
        if self._version < 2:
            none = np.zeros(self.rows, np.int64)
            add_array(self.path, ATTEMPT, ArrayPlan((STEP,), (self.rows,), (SCALAR_CHUNK,), "int64", values=none))
            self._numbered = (STEP, ATTEMPT)
        for name in self.journal.names():
            record = self.journal.read(name)
            if self._version < 2:
                record["scalars"] = self._scalar_checksums(record["start"], record["stop"])
            self.journal.write(name, record)
        migrate_group(self.path, "trajectory", self.arrays)
        publish(self.path, f"trajectory of {self.path.parent.name}: layout version {LAYOUT_VERSION}")
        self._version = LAYOUT_VERSION

    def fingerprint(self) -> str:
        """Digest of every committed state."""
        return self.digests([Band(0, self.rows, ())])[Band(0, self.rows, ())]

    def digests(self, bands: Iterable[Band]) -> dict[Band, str]:
        """Digest of the states that each band of rows is computed from, the halo included."""
        names = self.logged
        begun = np.zeros(self.rows + 1, "<u4")
        begun[np.flatnonzero(self.spans() == 0) + 1] = 1
        hashes = {band: hashlib.sha256() for band in bands}
        waiting = sorted(hashes, reverse=True)
        active: list[Band] = []
        # Record by record: those of a long run of a large model are not held together.
        for number in self.journal.names():
            record = self.journal.read(number)
            start, stop = record["start"], record["stop"]
            if start >= self.rows:  # committed since
                break
            words = np.column_stack([*(record["checksums"][name] for name in names), begun[start:stop]])
            while waiting and waiting[-1].start < stop:
                active.append(waiting.pop())
            for band in active:
                hashes[band].update(words[max(band.start - start, 0) : band.stop + 1 - start].data)
            active = [band for band in active if band.stop + 1 > stop]
        return {band: found.hexdigest() for band, found in hashes.items()}
