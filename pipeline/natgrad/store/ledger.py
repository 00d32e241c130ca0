"""The Gram ledger of a run, written by many workers at once: complete ledger chunks, then their records."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION, Layout, LedgerChunk
from natgrad.schema.names import REPLICATE_VECTOR, STEP, TENSOR, VECTOR, WITH_REPLICATE_VECTOR, WITH_VECTOR
from natgrad.storage import is_url
from natgrad.storage.disk import flush_all, replace_files
from natgrad.storage.repository import place_of_store
from natgrad.store.group import (
    SCALAR_CHUNK,
    ArrayPlan,
    chunk_path,
    damaged,
    exists,
    make_group,
    migrate_group,
    open_array,
    open_group,
    remove_group,
    require_complete_chunk,
    resize_all,
    rows_on_disk,
)
from natgrad.store.journal import Journal

__all__ = ["Ledger", "checksums"]

_log = logging.getLogger(__name__)

_ANALYZE_ANEW = "remove the ledger and run natgrad analyze OUT again"

_DIMENSIONS = {
    "gram": (STEP, TENSOR, VECTOR, WITH_VECTOR),
    "residual_ratio": (STEP, TENSOR),
    "replicate_gram": (STEP, TENSOR, REPLICATE_VECTOR, WITH_REPLICATE_VECTOR),
}

_CHECKSUM_BYTES = 1 << 16
"""Bytes that a checksum covers at least: for each row of a small model it would take longer than its products."""

_NUMBERS_CHUNK = 1 << 20
"""Rows in a chunk of an array with one number a row, at most."""


class Ledger:
    """The Gram ledger: inner products of the vectors of every row (update) and tensor.

    Attributes
    ----------
    path : Path
    layout : Layout
    vectors : tuple of str
        Vectors of the Gram matrix, in order.
    replicate_vectors : tuple of str
        Vectors of ``replicate_gram``, the Gram matrix of the replicates; none where there are no replicates.
    updates_per_chunk : int
        Rows of a chunk.
    journal : Journal
        The records of finished ledger chunks.
    """

    def __init__(self, path: Path, version: str | None = None) -> None:
        """Open a ledger.

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
        attributes = open_group(self.path, "ledger", "compute it first: natgrad analyze OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.vectors: tuple[str, ...] = tuple(attributes["vectors"])
        self.replicate_vectors: tuple[str, ...] = tuple(attributes.get("replicate_vectors", ()))
        self.updates_per_chunk: int = attributes["updates_per_chunk"]
        self._array = cache(lambda name: open_array(self.path / name))
        self._rows = cache(lambda: rows_on_disk(self.path / "gram"))
        self._version: int = attributes["version"]
        self.journal = Journal(self.path / "commits", sealed=self._version > 1)

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Arrays of names, and the names."""
        return _names(self.layout, self.vectors, self.replicate_vectors)

    @property
    def products(self) -> tuple[str, ...]:
        """Arrays of which a ledger chunk is a chunk."""
        return ("gram", "residual_ratio", *(["replicate_gram"] if self.replicate_vectors else []))

    @property
    def by_step(self) -> tuple[str, ...]:
        """Arrays with a row for each update."""
        return (STEP, "step_span", *self.products)

    @classmethod
    def prepare(
        cls,
        path: Path,
        layout: Layout,
        vectors: Sequence[str],
        steps: NDArray[np.int64],
        spans: NDArray[np.int64],
        updates_per_chunk: int,
        replicate_vectors: Sequence[str] = (),
    ) -> Ledger:
        """Open the ledger for the rows of a trajectory: as it is, grown, or made anew.

        Parameters
        ----------
        path : Path
        layout : Layout
        vectors : sequence of str
        steps, spans : int64 array, shape (rows,)
            Step of the state before each update, and the number of updates to the next logged state; 0 where the
            next state is of another run or attempt: such a row is NaN.
        updates_per_chunk : int
            Rows of a chunk. A ledger with other tensors, vectors or ledger chunks is replaced.
        replicate_vectors : sequence of str
            Of a stochastic rule.
        """
        wanted: dict[str, Any] = {
            "layout": layout.to_json(),
            "vectors": list(vectors),
            "updates_per_chunk": updates_per_chunk,
            **({"replicate_vectors": list(replicate_vectors)} if replicate_vectors else {}),
        }
        if exists(path):
            attributes = open_group(path, "ledger", "choose another folder")
            described = ("layout", "vectors", "updates_per_chunk", "replicate_vectors")
            if {key: attributes[key] for key in described if key in attributes} == wanted:
                ledger = cls(path)
                ledger._resize(steps, spans)
                return ledger
        cls._create(path, wanted, layout, vectors, steps, spans, updates_per_chunk, replicate_vectors)
        return cls(path)

    @staticmethod
    def _create(
        path: Path,
        attributes: Mapping[str, Any],
        layout: Layout,
        vectors: Sequence[str],
        steps: NDArray[np.int64],
        spans: NDArray[np.int64],
        updates_per_chunk: int,
        replicate_vectors: Sequence[str],
    ) -> None:
        rows, tensors, count = len(steps), len(layout.tensors), len(vectors)
        arrays = {
            name: ArrayPlan((name,), (len(values),), (len(values),), "string", values=values)
            for name, values in _names(layout, vectors, replicate_vectors).items()
        }
        # Of a file the disk takes longer than of its bytes, so the rows that there are share one.
        chunk = min(max(SCALAR_CHUNK, rows), _NUMBERS_CHUNK)
        for name, numbers in {STEP: steps, "step_span": spans}.items():
            arrays[name] = ArrayPlan((STEP,), (rows,), (chunk,), "int64", values=numbers)
        arrays["gram"] = ArrayPlan(
            _DIMENSIONS["gram"],
            (rows, tensors, count, count),
            (updates_per_chunk, tensors, count, count),
            "float64",
            {"long_name": "inner products of the vectors of an update"},
        )
        arrays["residual_ratio"] = ArrayPlan(
            _DIMENSIONS["residual_ratio"],
            (rows, tensors),
            (updates_per_chunk, tensors),
            "float64",
            {"long_name": "ratio c of residual = gradient - c displacement"},
        )
        if replicate_vectors:
            count = len(replicate_vectors)
            arrays["replicate_gram"] = ArrayPlan(
                _DIMENSIONS["replicate_gram"],
                (rows, tensors, count, count),
                (updates_per_chunk, tensors, count, count),
                "float64",
                {"long_name": "inner products of the vectors of the replicates of an update"},
            )
        make_group(path, "ledger", attributes, arrays)

    def _resize(self, steps: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
        """Be of so many rows, and finish what a writer left that was stopped here."""
        self.journal.clear()
        resize_all([self.path / name for name in self.by_step], len(steps))
        self._array.cache_clear()
        written: list[Path] = []
        for name, numbers in {STEP: steps, "step_span": spans}.items():
            array = self._array(name)
            if not np.array_equal(array[:], numbers):
                array[:] = numbers
                written += [chunk_path(self.path / name, index) for index in range(array.nchunks)]
                written.append(self.path / name / "c")
        if not is_url(self.path):
            flush_all(written)
        if self._version < LAYOUT_VERSION:
            self._migrate()

    def _migrate(self) -> None:
        """Drop records written by an older layout version and mark the ledger as current."""
        for name in self.journal.names():
            self.journal.remove(name)
        migrate_group(self.path, "ledger", (*self.names, *self.by_step))
        self._version = LAYOUT_VERSION

    @classmethod
    def remove(cls, path: Path) -> None:
        """Remove a ledger; what is not one is refused (InputError)."""
        remove_group(path, "ledger")

    @property
    def n_updates(self) -> int:
        """Rows that the ledger has when it is complete."""
        return self._rows()

    def write(
        self,
        chunk: LedgerChunk,
        gram: NDArray[np.float64],
        ratio: NDArray[np.float64],
        digest: str,
        replicate_gram: NDArray[np.float64] | None = None,
    ) -> None:
        """Write a ledger chunk whole, then record it.

        Parameters
        ----------
        chunk : LedgerChunk
            Its rows are one chunk (or the last rows of the ledger).
        gram : float64 array, shape (rows, tensors, vectors, vectors)
            Of its rows, or of the last of them, where those before are `begun`.
        ratio : float64 array, shape (rows, tensors)
        digest : str
            Digest of the states it was computed from.
        replicate_gram : float64 array, shape (rows, tensors, replicate vectors, replicate vectors), optional
            Where there are replicates.
        """
        if chunk.start % self.updates_per_chunk or chunk.stop != min(
            chunk.start + self.updates_per_chunk, self.n_updates
        ):
            raise ValueError(f"rows {chunk.start} to {chunk.stop} are not a chunk of {self.updates_per_chunk} rows")
        arrays = {"gram": gram, "residual_ratio": ratio}
        if replicate_gram is not None:
            arrays["replicate_gram"] = replicate_gram
        if len(gram) < chunk.stop - chunk.start:
            kept = self._recorded(self.journal.read(f"{chunk.start:012d}"))
            arrays = {name: np.concatenate([kept[name], values]) for name, values in arrays.items()}
        if any(len(values) != chunk.stop - chunk.start for values in arrays.values()):
            raise ValueError(f"rows {chunk.start} to {chunk.stop} are not as many as are written")
        covered = {name: _rows_of_a_checksum(values) for name, values in arrays.items()}
        record: dict[str, Any] = {"start": chunk.start, "stop": chunk.stop, "digest": digest}
        record["checksums"] = {name: checksums(values, covered[name]) for name, values in arrays.items()}
        record["checksum_rows"] = covered
        self._write_chunks({self.chunk_path(name, chunk.start): values for name, values in arrays.items()})
        self.journal.write(f"{chunk.start:012d}", record)

    def _write_chunks(self, chunks: Mapping[Path, NDArray[np.float64]]) -> None:
        """Write chunks whole: a reader sees the one before or this one. As they are plain, Zarr is not needed."""
        folders: dict[Path, None] = {}
        for path in chunks if not is_url(self.path) else ():
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(".*.tmp"):  # by a writer that was killed
                left.unlink(missing_ok=True)
            # Those that are there may be from a writer that was killed before it flushed them.
            folders |= dict.fromkeys(folder for folder in path.parents if self.path in folder.parents)
        replace_files({path: self._content(values) for path, values in chunks.items()})
        flush_all(folders)

    def _content(self, values: NDArray[np.float64]) -> memoryview:
        missing = self.updates_per_chunk - len(values)
        if missing:
            values = np.pad(values, ((0, missing), *[(0, 0)] * (values.ndim - 1)), constant_values=np.nan)
        return np.ascontiguousarray(values, "<f8").data.cast("B")

    def chunk_path(self, name: str, start: int) -> Path:
        """File of the ledger chunk that begins at a row."""
        beside = (0 for _ in _DIMENSIONS[name][1:])
        return chunk_path(self.path / name, start // self.updates_per_chunk, *beside)

    def begun(self) -> list[LedgerChunk]:
        """Return the recorded updates of a chunk that was the last one when the ledger was shorter.

        There may be no such ledger chunk, or it is damaged.
        """
        for name in self.journal.names():
            record = self.journal.read(name)
            if record["stop"] % self.updates_per_chunk and record["stop"] < self.n_updates:
                try:
                    self._recorded(record)
                except InputError as error:
                    _log.warning("%s: it is computed again", error)
                    return []
                return [LedgerChunk(record["start"], record["stop"])]
        return []

    def _recorded(self, record: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        """Rows of a record, as they were written."""
        found = {}
        for name in self.products:
            found[name], changed = self.compared(record, name)
            if changed:
                path = self.chunk_path(name, record["start"])
                raise damaged(path, "it has another checksum than was recorded", _ANALYZE_ANEW)
        return found

    def compared(self, record: Mapping[str, Any], name: str) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
        """Read one of `products` of a recorded ledger chunk, and compare it with its checksums.

        Returns
        -------
        values : float64 array
        changed : list of (int, int)
            First and stop row of the ledger of each group of rows that is not as it was written.

        Raises
        ------
        InputError
            See `read_chunk`.
        """
        start, stop, rows = record["start"], record["stop"], record.get("checksum_rows", {}).get(name, 1)
        values = self.read_chunk(name, start, stop)
        recorded = record["checksums"][name][:, 0].tolist()
        pairs = zip(range(start, stop, rows), checksums(values, rows), recorded, strict=True)
        return values, [(low, min(low + rows, stop)) for low, now, then in pairs if now != then]

    def discard_others(self, digests: Mapping[LedgerChunk, str]) -> None:
        """Forget every ledger chunk but those computed from these states: what is forgotten reads as missing.

        Parameters
        ----------
        digests : mapping
            Every ledger chunk of the trajectory as it is now, to the digest of its states.
        """
        valid = {(chunk.start, chunk.stop, digest) for chunk, digest in digests.items()}
        for name in self.journal.names():
            record = self.journal.read(name)
            if (record["start"], record["stop"], record["digest"]) not in valid:
                self.journal.remove(name)

    def missing(self, digests: Mapping[LedgerChunk, str]) -> list[LedgerChunk]:
        """Ledger chunks that are not recorded, or were computed from other states."""
        recorded = {(r["start"], r["stop"]): r["digest"] for r in map(self.journal.read, self.journal.names())}
        return [chunk for chunk, digest in digests.items() if recorded.get((chunk.start, chunk.stop)) != digest]

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Read the whole ledger: gram (rows, tensors, vectors, vectors) and residual ratio (rows, tensors).

        Raises
        ------
        InputError
            Where a ledger chunk is not recorded (the pass was interrupted), or a chunk is missing or too short.
        """
        recorded = {(r["start"], r["stop"]) for r in map(self.journal.read, self.journal.names())}
        for start in range(0, self.n_updates, self.updates_per_chunk):
            stop = min(start + self.updates_per_chunk, self.n_updates)
            if (start, stop) not in recorded:
                raise InputError(
                    f"the ledger is not complete: updates {start} to {stop} are missing",
                    where=str(self.path),
                    why="the analysis was interrupted",
                    remedy="run natgrad analyze OUT again; what is finished is kept",
                )
            for name in self.products:
                array = self._array(name)
                require_complete_chunk(self.chunk_path(name, start), array.chunks, array.dtype, _ANALYZE_ANEW)
        return np.asarray(self._array("gram")[:]), np.asarray(self._array("residual_ratio")[:])

    def read_chunk(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Read the rows of a ledger chunk of one of `products`.

        Raises
        ------
        InputError
            Where its chunk is missing or too short.
        """
        array = self._array(name)
        require_complete_chunk(self.chunk_path(name, start), array.chunks, array.dtype, _ANALYZE_ANEW)
        return np.asarray(array[start:stop])

    def steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Step of the state before each update, and updates to the next logged state (0: there is none)."""
        return np.asarray(self._array(STEP)[:]), np.asarray(self._array("step_span")[:])


def _names(layout: Layout, vectors: Sequence[str], replicate_vectors: Sequence[str]) -> dict[str, tuple[str, ...]]:
    names = {TENSOR: layout.names, VECTOR: tuple(vectors), WITH_VECTOR: tuple(vectors)}
    if replicate_vectors:
        names |= dict.fromkeys((REPLICATE_VECTOR, WITH_REPLICATE_VECTOR), tuple(replicate_vectors))
    return names


def _rows_of_a_checksum(values: NDArray[Any]) -> int:
    """Rows of an array of float64 that one checksum covers."""
    return max(1, min(len(values), math.ceil(_CHECKSUM_BYTES * len(values) / max(8 * values.size, 1))))


def checksums(values: NDArray[Any], rows: int) -> list[int]:
    """Return the CRC-32C of each group of so many rows; the last group may have fewer."""
    words = np.ascontiguousarray(values, "<f8").data.cast("B")
    size = rows * (len(words) // max(len(values), 1))
    return [crc32c(words[begin : begin + size]) for begin in range(0, len(words), size or 1)]
