"""The trajectory store and the Gram ledger in Zarr v3; the only file that knows Zarr.

A trajectory is one Zarr group::

    trajectory.zarr/
      parameter, gradient, hvp    (step, element)   chunks of whole steps x about a million elements
      step, loss, learning_rate   (step)
      commits/00000000.json ...   which rows exist, and their checksums

**Commit rule.** Chunks are written and flushed to disk first; then one record, written aside and renamed, makes
the rows visible for all arrays together. Readers trust recorded rows only. What lies beyond (an interrupted
write) is overwritten by the next attempt. The shape of an array is no evidence of data, but it is never ahead
of the record: it grows after the commit.

A ledger is written by many workers at once, each whole bands (chunks) of rows; a band's record follows its data.

bfloat16 is stored as its bits in uint16 with the attribute ``ml_dtype``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from crc32c import crc32c
from numpy.typing import NDArray
from zarr.codecs import BytesCodec

from pipeline.blocks import Band
from pipeline.schema import (
    ELEMENT,
    LAYOUT_VERSION,
    SCALARS,
    STATES,
    STEP,
    TENSOR,
    VECTOR,
    WITH_VECTOR,
    InputError,
    Layout,
)

__all__ = ["Ledger", "Trajectory", "checksum", "storage_dtype"]

_ATTRIBUTE = "natgrad"
_SCALAR_CHUNK = 8192
_INGEST_AGAIN = "ingest the run again with --overwrite"
_ANALYZE_ANEW = "remove the ledger and run natgrad analyze OUT again"


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Dtype of the words in which values are stored: bfloat16 as uint16, the others as they are."""
    return np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")


def checksum(words: NDArray[Any]) -> int:
    """CRC-32C of the bytes of a contiguous array."""
    return int(crc32c(words.data.cast("B")))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Journal:
    """Records that make data visible: one small JSON file each, written aside, flushed and renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("[0-9]*.json"))

    def read(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise InputError(
                f"cannot read a commit record: {error}",
                where=str(path),
                why="records are renamed into place whole, so the file was changed or the disk failed",
                remedy="ingest again with --overwrite",
            ) from error
        return record

    def write(self, name: str, record: Mapping[str, Any]) -> None:
        aside = self.folder / f".{name}.{os.getpid()}.tmp"
        with aside.open("w") as file:
            json.dump(record, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.folder / f"{name}.json")
        _flush(self.folder)

    def remove(self, name: str) -> None:
        (self.folder / f"{name}.json").unlink()
        _flush(self.folder)


@contextmanager
def _new_store(path: Path, kind: str, attributes: Mapping[str, Any]) -> Iterator[zarr.Group]:
    """Make a store aside, to be renamed into place at the end: a store that is there has all its arrays."""
    aside = path.with_name(f".{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    group = zarr.create_group(
        aside, attributes={_ATTRIBUTE: {"kind": kind, "version": LAYOUT_VERSION, **attributes}}
    )
    group.create_group("commits")
    yield group
    for entry in (*aside.rglob("*"), aside):
        _flush(entry)
    _remove(path, kind)
    aside.rename(path)
    _flush(path.parent)


def _open_group(path: Path, kind: str, remedy: str) -> tuple[zarr.Group, dict[str, Any]]:
    try:
        group = zarr.open_group(path, mode="r+")
        attributes: Any = group.attrs.asdict()[_ATTRIBUTE]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"no {kind} here", where=str(path), remedy=remedy) from error
    if attributes["kind"] != kind:
        raise InputError(f"this is a {attributes['kind']}, not a {kind}", where=str(path), remedy=remedy)
    if attributes["version"] > LAYOUT_VERSION:
        raise InputError(
            f"the {kind} has layout version {attributes['version']}, this program knows {LAYOUT_VERSION}",
            where=str(path),
            why="it was written by a newer natgrad",
            remedy="upgrade natgrad-pipeline, or write to another folder",
        )
    return group, attributes


def _remove(path: Path, kind: str) -> None:
    """Remove a store of ours, and nothing else."""
    # Renamed first: where the removal is interrupted, no half store is left under the name.
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        _open_group(path, kind, "choose another folder; what is not a store of natgrad is not overwritten")
        path.rename(aside)
        shutil.rmtree(aside)


def _arrays(group: zarr.Group) -> dict[str, zarr.Array[Any]]:
    # This setting is not kept on disk, and without it a chunk of fill values (no learning rates, a diverged
    # run, a gradient of zeros in bfloat16) is not written, hence cannot be flushed or told from a lost one.
    return {name: array.with_config({"write_empty_chunks": True}) for name, array in group.arrays()}


def _chunk_path(array: zarr.Array[Any], folder: Path, index: Sequence[int]) -> Path:
    return folder / array.metadata.encode_chunk_key(tuple(index))


def _damaged(path: Path, what: str, remedy: str) -> InputError:
    return InputError(
        f"a chunk cannot be read: {what}",
        where=str(path),
        why="a recorded chunk was whole and on disk, so the file was changed, moved or the disk failed",
        remedy=remedy,
    )


def _require_whole(array: zarr.Array[Any], path: Path, remedy: str) -> None:
    """Refuse an uncompressed chunk of another size: Zarr takes one that is missing for fill values."""
    expected = math.prod(array.chunks) * array.dtype.itemsize
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise _damaged(path, f"it has {size} bytes of {expected}", remedy)


def _is_raw(array: zarr.Array[Any]) -> bool:
    """Say whether the chunks of an array are its bytes and nothing else."""
    codecs = array.metadata.codecs  # type: ignore[union-attr]
    return len(codecs) == 1 and isinstance(codecs[0], BytesCodec)


class Trajectory:
    """A run's logged states, on disk.

    Attributes
    ----------
    path : Path
    layout : Layout
        Tensors on the element axis.
    chunk : (int, int)
        Steps and elements of a chunk.
    dtypes : dict
        Logical dtype (``bfloat16`` included) of each array (step, element).
    source : str
        Where the log was.
    rows : int
        Committed states.

    Notes
    -----
    Readers may be many and never wait; there is one writer at a time (`pipeline.ingest` holds the lock).
    """

    def __init__(self, path: Path) -> None:
        """Open a trajectory at the rows committed so far.

        Raises
        ------
        InputError
            Where there is none, or a newer version wrote it.
        """
        self.path = Path(path)
        group, attributes = _open_group(self.path, "trajectory", "ingest a run first: natgrad ingest SOURCE OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.chunk: tuple[int, int] = tuple(attributes["chunk"])
        self.dtypes: dict[str, str] = attributes["dtypes"]
        self.source: str = attributes["source"]
        known = (*self.dtypes, STEP, *SCALARS)
        self._arrays = {name: array for name, array in _arrays(group).items() if name in known}
        self._journal = _Journal(self.path / "commits")
        self._unflushed: set[Path] = set()
        self._checksums: dict[str, list[list[int]]] = {}
        self._kept: dict[tuple[str, int, int], int] | None = None
        self._raw = {name for name in self.dtypes if _is_raw(self._arrays[name])}
        self.rows = 0
        self.refresh()

    @classmethod
    def create(
        cls,
        path: Path,
        layout: Layout,
        dtypes: Mapping[str, str],
        chunk: tuple[int, int],
        source: str = "",
        compressors: Any = None,
    ) -> Trajectory:
        """Create an empty trajectory, in place of one that is there.

        Parameters
        ----------
        path : Path
        layout : Layout
        dtypes : mapping
            Array (``parameter``, ``gradient``, ``hvp``) to logical dtype.
        chunk : (int, int)
            Steps and elements of a chunk.
        source : str, optional
            Where the log was, for provenance.
        compressors : Zarr codecs, optional
            None stores floats as they are: training state hardly compresses (DESIGN, section 5).

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
        }
        with _new_store(Path(path), "trajectory", attributes) as group:
            for name, dtype in dtypes.items():
                group.create_array(
                    name,
                    shape=(0, layout.elements),
                    chunks=chunk,
                    dtype=storage_dtype(dtype),
                    dimension_names=(STEP, ELEMENT),
                    fill_value=0 if dtype == "bfloat16" else np.nan,
                    compressors=compressors,
                    attributes={"ml_dtype": dtype} if dtype == "bfloat16" else {},
                )
            for name in (STEP, *SCALARS):
                group.create_array(
                    name,
                    shape=(0,),
                    chunks=(_SCALAR_CHUNK,),
                    dtype="int64" if name == STEP else "float64",
                    dimension_names=(STEP,),
                    fill_value=-1 if name == STEP else np.nan,
                    compressors=None,
                )
        return cls(path)

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a trajectory; what is not one is refused (InputError)."""
        _remove(path, "trajectory")

    def refresh(self) -> None:
        """See the rows committed since."""
        names = self._journal.names()
        self.rows = int(self._journal.read(names[-1])["stop"]) if names else 0

    @property
    def columns(self) -> int:
        """Number of chunk columns."""
        return -(-self.layout.elements // self.chunk[1])

    def column(self, index: int) -> tuple[int, int]:
        """First and stop element of a chunk column."""
        return index * self.chunk[1], min((index + 1) * self.chunk[1], self.layout.elements)

    def scalar(self, name: str) -> NDArray[Any]:
        """Read the committed ``step`` (int64), ``loss`` or ``learning_rate`` (float64), shape (rows,).

        Raises
        ------
        InputError
            Where a chunk is missing or too short.
        """
        for index in range(-(-self.rows // _SCALAR_CHUNK)):
            _require_whole(self._arrays[name], self._chunk_path(name, index), _INGEST_AGAIN)
        return np.asarray(self._sized(name, self.rows)[:])

    def records(self) -> list[dict[str, Any]]:
        """Commit records, in order: rows, the sources of each, and checksums per array, row and column."""
        return [self._journal.read(name) for name in self._journal.names()]

    # Reading ------------------------------------------------------------------------------------------------

    @property
    def whole_chunks(self) -> bool:
        """Whether chunks cannot be read in pieces, as they are compressed."""
        return self._raw != set(self.dtypes)

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep the chunks open that are read within: those of one task, read piece by piece."""
        self._kept = {}
        try:
            yield
        finally:
            for descriptor in self._kept.values():
                os.close(descriptor)
            self._kept = None

    def read(self, name: str, start: int, stop: int, column: int, out: NDArray[Any], skip: int = 0) -> None:
        """Read committed rows of a chunk column, or of a piece of it, into a buffer.

        Uncompressed chunks on a local disk are read straight into the buffer; anything else goes through
        Zarr. Both give the same bits.

        Parameters
        ----------
        name : str
            ``parameter``, ``gradient`` or ``hvp``.
        start, stop : int
            Rows.
        column : int
            Chunk column.
        out : array, shape (stop - start, elements), C-contiguous, of `storage_dtype`
            Written, as far as the chunk goes; elements beyond the model's last are padding.
        skip : int, optional
            Elements of the chunk before the first that is read; 0 where it has to be read whole.

        Raises
        ------
        InputError
            Where a row is not committed, or a chunk is missing, too short or (compressed) damaged.
        """
        if not 0 <= start <= stop <= self.rows:
            raise InputError(
                f"rows {start} to {stop} of {name} are not committed, {self.rows} are", where=str(self.path)
            )
        steps = self.chunk[0]
        for index in range(start // steps, -(-stop // steps) if start < stop else 0):
            low, high = max(start, index * steps), min(stop, (index + 1) * steps)
            part = out[low - start : high - start]
            if name in self._raw:
                self._read_raw(name, (index, column), low - index * steps, part, skip)
            elif skip:
                raise ValueError(f"chunks of {name} are compressed and cannot be read from element {skip} on")
            else:
                self._read_by_zarr(name, index, column, low, part)

    def _chunk_path(self, name: str, *index: int) -> Path:
        return _chunk_path(self._arrays[name], self.path / name, index)

    def _read_by_zarr(self, name: str, index: int, column: int, start: int, out: NDArray[Any]) -> None:
        path = self._chunk_path(name, index, column)
        first, last = self.column(column)
        if not path.exists():
            raise _damaged(path, "it is missing", _INGEST_AGAIN)
        try:
            out[:, : last - first] = self._sized(name, self.rows)[start : start + len(out), first:last]
        except Exception as error:  # codecs share no class of errors
            raise _damaged(path, str(error), _INGEST_AGAIN) from error
        # Blosc unpacks a truncated chunk to values that were never written, without an error.
        recorded = self._recorded(name)
        for row, words in enumerate(out, start):
            if checksum(words[: last - first]) != recorded[row][column]:
                raise _damaged(path, f"row {row} has another checksum than recorded", _INGEST_AGAIN)

    def _recorded(self, name: str) -> list[list[int]]:
        """Checksums of the committed rows of an array, one for each column."""
        if len(self._checksums.get(name, ())) < self.rows:
            self._checksums[name] = [row for record in self.records() for row in record["checksums"][name]]
        return self._checksums[name]

    def _read_raw(self, name: str, index: tuple[int, int], first_row: int, out: NDArray[Any], skip: int) -> None:
        width = self.chunk[1]
        count = min(out.shape[1], width - skip)
        # Whole rows lie one after the other, in the chunk and in the buffer.
        parts = [out] if out.shape[1] == width else [row[:count] for row in out]
        descriptor = self._descriptor(name, index)
        try:
            for row, part in enumerate(parts, first_row):
                self._fill(name, index, descriptor, (row * width + skip) * out.itemsize, part)
        finally:
            if self._kept is None:
                os.close(descriptor)

    def _descriptor(self, name: str, index: tuple[int, int]) -> int:
        key = (name, *index)
        if self._kept is not None and key in self._kept:
            return self._kept[key]
        path = self._chunk_path(name, *index)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _damaged(path, str(error), _INGEST_AGAIN) from error
        if self._kept is not None:
            self._kept[key] = descriptor
        return descriptor

    def _fill(self, name: str, index: tuple[int, int], descriptor: int, offset: int, out: NDArray[Any]) -> None:
        view = out.data.cast("B")
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                path = self._chunk_path(name, *index)
                raise _damaged(path, f"it ends {len(view)} bytes early", _INGEST_AGAIN)
            view, offset = view[count:], offset + count

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
        """
        if start < self.rows:
            raise ValueError(f"row {start} of {name} is committed and cannot be written again")
        first, last = self.column(column)
        stop = start + len(block)
        self._sized(name, stop)[start:stop, first:last] = block[:, : last - first]
        steps = self.chunk[0]
        for index in range(start // steps, -(-stop // steps)):
            self._unflushed.add(self._chunk_path(name, index, column))

    def commit(
        self,
        steps: Sequence[int],
        scalars: Mapping[str, Sequence[float]],
        sources: Sequence[Mapping[str, Any]],
        checksums: Mapping[str, Sequence[Sequence[int]]],
    ) -> None:
        """Make written rows visible, for all arrays together.

        Parameters
        ----------
        steps : sequence of int, length n
            Step numbers of the next n rows.
        scalars : mapping
            ``loss`` and ``learning_rate``, n values each, NaN where the log has none.
        sources : sequence of mapping, length n
            What identifies each step's source (name, size, time).
        checksums : mapping
            Array name to n rows of one `checksum` per chunk column.
        """
        start, stop = self.rows, self.rows + len(steps)
        for name, values in {STEP: steps, **scalars}.items():
            self._sized(name, stop)[start:stop] = np.asarray(values, dtype=self._arrays[name].dtype)
            for index in range(start // _SCALAR_CHUNK, -(-stop // _SCALAR_CHUNK)):
                self._unflushed.add(self._chunk_path(name, index))
        for path in sorted(self._unflushed):
            _flush(path)
        # A new chunk may have made folders up to the one of its array.
        for folder in sorted({folder for path in self._unflushed for folder in path.parents}):
            if folder.is_relative_to(self.path):
                _flush(folder)
        record = {"start": start, "stop": stop, "sources": list(sources), "checksums": dict(checksums)}
        self._journal.write(f"{len(self._journal.names()):08d}", record)
        self._unflushed.clear()
        self.rows = stop
        self.recover()

    def recover(self) -> None:
        """Bring the shapes on disk up to the record, should the writer before have stopped between the two."""
        for array in self._arrays.values():
            if array.shape[0] != self.rows:
                array.resize((self.rows, *array.shape[1:]))

    def _sized(self, name: str, rows: int) -> zarr.Array[Any]:
        """Return an array as if it had so many rows: its shape on disk lags behind the record."""
        array = self._arrays[name]
        if array.shape[0] == rows:
            return array
        metadata = dataclasses.replace(array.metadata, shape=(rows, *array.shape[1:]))
        sized = zarr.AsyncArray(metadata, array.store_path, config=array.async_array.config)
        return zarr.Array(sized)

    def fingerprint(self) -> str:
        """Digest of every committed state."""
        return self.digests([Band(0, self.rows, ())])[Band(0, self.rows, ())]

    def digests(self, bands: Iterable[Band]) -> dict[Band, str]:
        """Digest of the states that each band of rows is computed from, the halo included."""
        per_row: list[str] = []
        for record in self.records():
            tables = [record["checksums"][name] for name in STATES if name in self.dtypes]
            per_row += [json.dumps(row) for row in zip(*tables, strict=True)]
        return {
            band: hashlib.sha256("".join(per_row[band.start : band.stop + 1]).encode()).hexdigest()
            for band in bands
        }


class Ledger:
    """The Gram ledger: inner products of the vectors of every row (update) and tensor.

    Attributes
    ----------
    path : Path
    layout : Layout
    vectors : tuple of str
        Vectors of the Gram matrix, in order.
    band_rows : int
        Rows of a chunk.
    """

    def __init__(self, path: Path) -> None:
        """Open a ledger.

        Raises
        ------
        InputError
            Where there is none, or a newer version wrote it.
        """
        self.path = Path(path)
        group, attributes = _open_group(self.path, "ledger", "compute it first: natgrad analyze OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.vectors: tuple[str, ...] = tuple(attributes["vectors"])
        self.band_rows: int = attributes["band_rows"]
        self._arrays = _arrays(group)
        self._journal = _Journal(self.path / "commits")

    @classmethod
    def prepare(
        cls, path: Path, layout: Layout, vectors: Sequence[str], steps: NDArray[np.int64], band_rows: int
    ) -> Ledger:
        """Open the ledger for the rows of a trajectory: as it is, grown, or made anew.

        Parameters
        ----------
        path : Path
        layout : Layout
        vectors : sequence of str
        steps : int64 array, shape (states,)
            Steps of the trajectory; a row is named after the state before its update.
        band_rows : int
            Rows of a chunk. A ledger with other tensors, vectors or bands is replaced.
        """
        wanted = {"layout": layout.to_json(), "vectors": list(vectors), "band_rows": band_rows}
        if path.exists():
            _, attributes = _open_group(path, "ledger", "choose another folder")
            if {key: attributes[key] for key in wanted} != wanted:
                _remove(path, "ledger")
        if not path.exists():
            cls._create(path, wanted, layout, vectors, band_rows)
        ledger = cls(path)
        rows = max(len(steps) - 1, 0)
        for name, array in ledger._arrays.items():
            if name not in (TENSOR, VECTOR, WITH_VECTOR):
                array.resize((rows, *array.shape[1:]))
        ledger._arrays[STEP][:] = steps[:-1]
        ledger._arrays["step_span"][:] = np.diff(steps)
        return ledger

    @staticmethod
    def _create(
        path: Path, attributes: Mapping[str, Any], layout: Layout, vectors: Sequence[str], band_rows: int
    ) -> None:
        names = {TENSOR: layout.names, VECTOR: vectors, WITH_VECTOR: vectors}
        tensors, count = len(layout.tensors), len(vectors)
        shapes = {"gram": (tensors, count, count), "residual_ratio": (tensors,)}
        dimensions = {"gram": (STEP, TENSOR, VECTOR, WITH_VECTOR), "residual_ratio": (STEP, TENSOR)}
        long_names = {
            "gram": "inner products of the vectors of an update",
            "residual_ratio": "ratio c of residual = gradient - c displacement",
        }
        with _new_store(path, "ledger", attributes) as group:
            for name, values in names.items():
                array = group.create_array(
                    name, shape=(len(values),), chunks=(len(values),), dtype=str, dimension_names=(name,)
                )
                array[:] = np.array(values, dtype=object)
            for name in (STEP, "step_span"):
                group.create_array(
                    name,
                    shape=(0,),
                    chunks=(_SCALAR_CHUNK,),
                    dtype="int64",
                    dimension_names=(STEP,),
                    fill_value=-1,
                )
            for name, shape in shapes.items():
                group.create_array(
                    name,
                    shape=(0, *shape),
                    chunks=(band_rows, *shape),
                    dtype="float64",
                    dimension_names=dimensions[name],
                    fill_value=np.nan,
                    compressors=None,
                    attributes={"long_name": long_names[name]},
                )

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a ledger; what is not one is refused (InputError)."""
        _remove(path, "ledger")

    @property
    def rows(self) -> int:
        """Rows that the ledger has when it is complete."""
        return int(self._arrays["gram"].shape[0])

    def write(self, band: Band, gram: NDArray[np.float64], ratio: NDArray[np.float64], digest: str) -> None:
        """Write a band whole, then record it.

        Parameters
        ----------
        band : Band
            Its rows are one chunk (or the last rows of the ledger).
        gram : float64 array, shape (rows, tensors, vectors, vectors)
        ratio : float64 array, shape (rows, tensors)
        digest : str
            Digest of the states it was computed from.
        """
        if band.start % self.band_rows or band.stop != min(band.start + self.band_rows, self.rows):
            raise ValueError(f"rows {band.start} to {band.stop} are not a chunk of {self.band_rows} rows")
        for name, values in {"gram": gram, "residual_ratio": ratio}.items():
            array = self._arrays[name]
            array[band.start : band.stop] = values
            chunk = self._chunk_path(name, band.start)
            _flush(chunk)
            for folder in chunk.relative_to(self.path).parents:
                _flush(self.path / folder)
        self._journal.write(f"{band.start:012d}", {"start": band.start, "stop": band.stop, "digest": digest})

    def _chunk_path(self, name: str, start: int) -> Path:
        array = self._arrays[name]
        return _chunk_path(array, self.path / name, [start // self.band_rows, *(0 for _ in array.shape[1:])])

    def discard_others(self, digests: Mapping[Band, str]) -> None:
        """Forget every band but those computed from these states: what is forgotten reads as missing.

        Parameters
        ----------
        digests : mapping
            Every band of the trajectory as it is now, to the digest of its states.
        """
        valid = {(band.start, band.stop, digest) for band, digest in digests.items()}
        for name in self._journal.names():
            record = self._journal.read(name)
            if (record["start"], record["stop"], record["digest"]) not in valid:
                self._journal.remove(name)

    def missing(self, digests: Mapping[Band, str]) -> list[Band]:
        """Bands that are not recorded, or were computed from other states."""
        recorded = {(r["start"], r["stop"]): r["digest"] for r in map(self._journal.read, self._journal.names())}
        return [band for band, digest in digests.items() if recorded.get((band.start, band.stop)) != digest]

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Read the whole ledger: gram (rows, tensors, vectors, vectors) and residual ratio (rows, tensors).

        Raises
        ------
        InputError
            Where a band is not recorded (the pass was interrupted), or a chunk is missing or too short.
        """
        recorded = {(r["start"], r["stop"]) for r in map(self._journal.read, self._journal.names())}
        for start in range(0, self.rows, self.band_rows):
            stop = min(start + self.band_rows, self.rows)
            if (start, stop) not in recorded:
                raise InputError(
                    f"the ledger is not complete: updates {start} to {stop} are missing",
                    where=str(self.path),
                    why="the analysis was interrupted",
                    remedy="run natgrad analyze OUT again; what is finished is kept",
                )
            for name in ("gram", "residual_ratio"):
                _require_whole(self._arrays[name], self._chunk_path(name, start), _ANALYZE_ANEW)
        return np.asarray(self._arrays["gram"][:]), np.asarray(self._arrays["residual_ratio"][:])

    def steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Step of each row's state before the update, and the number of updates to the next logged state."""
        return np.asarray(self._arrays[STEP][:]), np.asarray(self._arrays["step_span"][:])
