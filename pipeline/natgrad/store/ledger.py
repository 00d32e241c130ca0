"""Store the Gram ledger of a run. Many workers write at once: first a complete ledger chunk, then its record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, LedgerChunk
from natgrad.schema.logs import logger
from natgrad.schema.names import REPLICATE_VECTOR, STEP, TENSOR, VECTOR, WITH_REPLICATE_VECTOR, WITH_VECTOR
from natgrad.schema.summary import summary_html
from natgrad.storage import Storage
from natgrad.store.group import (
    SCALAR_CHUNK,
    ArrayPlan,
    chunk_entry,
    create_group,
    damage_error,
    is_current,
    open_array,
    open_group,
    remove_group,
    require_complete_chunk,
    resize_all,
    stored_length,
)
from natgrad.store.journal import Journal

__all__ = ["Ledger", "checksums"]

_log = logger(__name__)

_ANALYZE_AGAIN = "remove the ledger and run natgrad analyze OUT again"

_DIMENSIONS = {
    "gram": (STEP, TENSOR, VECTOR, WITH_VECTOR),
    "residual_ratio": (STEP, TENSOR),
    "replicate_gram": (STEP, TENSOR, REPLICATE_VECTOR, WITH_REPLICATE_VECTOR),
}

_CHECKSUM_BYTES = 1 << 16
"""Minimum number of bytes covered by a checksum. For a small model, a checksum of each update would take longer
than its inner products."""

_NUMBERS_CHUNK = 1 << 20
"""Maximum number of updates in a chunk of an array with one number per update."""


class Ledger:
    """Gram ledger: the inner products of the vectors of each update and tensor.

    Attributes
    ----------
    storage : Storage
    layout : Layout
    vectors : tuple of str
        Vectors of the Gram matrix, in order.
    replicate_vectors : tuple of str
        Vectors of ``replicate_gram``, the Gram matrix of the replicates; empty without replicates.
    updates_per_chunk : int
    journal : Journal
        Records of the finished ledger chunks.
    """

    def __init__(self, storage: Storage) -> None:
        """Open a ledger.

        Parameters
        ----------
        storage : Storage
            `natgrad.store.open_ledger` opens a path or URL.

        Raises
        ------
        InputError
            If there is no ledger, or another version of natgrad wrote it.
        """
        self.storage = storage
        attributes = open_group(storage, "ledger", "compute it first: natgrad analyze OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.vectors: tuple[str, ...] = tuple(attributes["vectors"])
        self.replicate_vectors: tuple[str, ...] = tuple(attributes.get("replicate_vectors", ()))
        self.updates_per_chunk: int = attributes["updates_per_chunk"]
        self._array = cache(lambda name: open_array(storage / name))
        self._updates = cache(lambda: stored_length(storage / "gram"))
        self.journal = Journal(storage / "commits")

    def __repr__(self) -> str:
        return f"<Ledger {self.storage}: {self.n_updates} updates of {len(self.layout.tensors)} tensors>"

    def describe(self) -> dict[str, Any]:
        """Return plain values that describe the ledger: updates, vectors and chunks."""
        steps, _ = self.steps()
        return {
            "ledger": str(self.storage),
            "updates": self.n_updates,
            "first_step": int(steps.min()) if len(steps) else None,
            "last_step": int(steps.max()) if len(steps) else None,
            "tensors": len(self.layout.tensors),
            "elements": self.layout.elements,
            "vectors": list(self.vectors),
            **({"replicate_vectors": list(self.replicate_vectors)} if self.replicate_vectors else {}),
            "chunks": -(-self.n_updates // self.updates_per_chunk),
        }

    def _repr_html_(self) -> str:
        """Return the table that a notebook shows."""
        return summary_html("Ledger", self.describe())

    @property
    def names(self) -> dict[str, tuple[str, ...]]:
        """Content of each array of names."""
        return _names(self.layout, self.vectors, self.replicate_vectors)

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the arrays that are computed, which have the chunks of the ledger."""
        return ("gram", "residual_ratio", *(["replicate_gram"] if self.replicate_vectors else []))

    @property
    def by_step(self) -> tuple[str, ...]:
        """Names of the arrays whose first dimension is the updates."""
        return (STEP, "step_span", *self.products)

    @staticmethod
    def is_current(storage: Storage) -> bool:
        """Return True if a ledger of the current layout version exists; `prepare` replaces an older one.

        Raises
        ------
        InputError
            If the location contains something else, or a newer natgrad wrote it.
        """
        return is_current(storage, "ledger")

    @classmethod
    def prepare(
        cls,
        storage: Storage,
        layout: Layout,
        vectors: Sequence[str],
        steps: NDArray[np.int64],
        spans: NDArray[np.int64],
        updates_per_chunk: int,
        replicate_vectors: Sequence[str] = (),
    ) -> Ledger:
        """Open, extend or create the ledger for the states of a trajectory.

        Parameters
        ----------
        storage : Storage
        layout : Layout
        vectors : sequence of str
        steps, spans : int64 array, shape (updates,)
            Step of the state before each update, and the number of updates to the next logged state. The number is
            0 if the next state belongs to another run or attempt; the ledger is NaN there.
        updates_per_chunk : int
            An existing ledger with other tensors, vectors or chunks, or of an older layout version, is replaced.
        replicate_vectors : sequence of str
            Vectors of the replicates of a stochastic rule.
        """
        wanted: dict[str, Any] = {
            "layout": layout.to_json(),
            "vectors": list(vectors),
            "updates_per_chunk": updates_per_chunk,
            **({"replicate_vectors": list(replicate_vectors)} if replicate_vectors else {}),
        }
        if cls.is_current(storage):
            attributes = open_group(storage, "ledger", "choose another folder")
            described = ("layout", "vectors", "updates_per_chunk", "replicate_vectors")
            if {key: attributes[key] for key in described if key in attributes} == wanted:
                ledger = cls(storage)
                ledger._resize(steps, spans)  # a method of this class, which readers of a ledger must not call
                return ledger
        cls._create(storage, wanted, layout, vectors, steps, spans, updates_per_chunk, replicate_vectors)
        return cls(storage)

    @staticmethod
    def _create(
        storage: Storage,
        attributes: Mapping[str, Any],
        layout: Layout,
        vectors: Sequence[str],
        steps: NDArray[np.int64],
        spans: NDArray[np.int64],
        updates_per_chunk: int,
        replicate_vectors: Sequence[str],
    ) -> None:
        updates, tensors, count = len(steps), len(layout.tensors), len(vectors)
        arrays = {
            name: ArrayPlan((name,), (len(values),), (len(values),), "string", values=values)
            for name, values in _names(layout, vectors, replicate_vectors).items()
        }
        # Creating a file takes longer than writing its bytes, so the initial numbers share one chunk.
        chunk = min(max(SCALAR_CHUNK, updates), _NUMBERS_CHUNK)
        for name, numbers in {STEP: steps, "step_span": spans}.items():
            arrays[name] = ArrayPlan((STEP,), (updates,), (chunk,), "int64", values=numbers)
        arrays["gram"] = ArrayPlan(
            _DIMENSIONS["gram"],
            (updates, tensors, count, count),
            (updates_per_chunk, tensors, count, count),
            "float64",
            {"long_name": "inner products of the vectors of an update"},
        )
        arrays["residual_ratio"] = ArrayPlan(
            _DIMENSIONS["residual_ratio"],
            (updates, tensors),
            (updates_per_chunk, tensors),
            "float64",
            {"long_name": "ratio c of residual = gradient - c displacement"},
        )
        if replicate_vectors:
            count = len(replicate_vectors)
            arrays["replicate_gram"] = ArrayPlan(
                _DIMENSIONS["replicate_gram"],
                (updates, tensors, count, count),
                (updates_per_chunk, tensors, count, count),
                "float64",
                {"long_name": "inner products of the vectors of the replicates of an update"},
            )
        create_group(storage, "ledger", attributes, arrays)

    def _resize(self, steps: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
        """Set the number of updates, and finish an interrupted resize."""
        self.journal.clear()
        resize_all(self.storage, self.by_step, len(steps))
        self._array.cache_clear()
        written: list[Storage] = []
        for name, numbers in {STEP: steps, "step_span": spans}.items():
            array = self._array(name)
            if not np.array_equal(array[:], numbers):
                array[:] = numbers
                written += [chunk_entry(self.storage / name, index) for index in range(array.nchunks)]
        self.storage.flush(written)

    @classmethod
    def remove(cls, storage: Storage) -> None:
        """Remove a ledger; raise InputError if the location contains anything else."""
        remove_group(storage, "ledger")

    @property
    def n_updates(self) -> int:
        """Number of updates of the ledger when all chunks are finished."""
        return self._updates()

    def write(
        self,
        chunk: LedgerChunk,
        gram: NDArray[np.float64],
        ratio: NDArray[np.float64],
        digest: str,
        replicate_gram: NDArray[np.float64] | None = None,
    ) -> None:
        """Write a complete ledger chunk, then record it.

        Parameters
        ----------
        chunk : LedgerChunk
            A full chunk, or the last updates of the ledger.
        gram : float64 array, shape (updates, tensors, vectors, vectors)
            All updates of the chunk, or only the last ones if `partial_chunks` contains the others.
        ratio : float64 array, shape (updates, tensors)
        digest : str
            Digest of the states from which the chunk was computed.
        replicate_gram : float64 array, shape (updates, tensors, replicate vectors, replicate vectors), optional
            Required if there are replicates.
        """
        if chunk.start % self.updates_per_chunk or chunk.stop != min(
            chunk.start + self.updates_per_chunk, self.n_updates
        ):
            raise ValueError(f"updates {chunk.start} to {chunk.stop} are not a chunk of {self.updates_per_chunk}")
        arrays = {"gram": gram, "residual_ratio": ratio}
        if replicate_gram is not None:
            arrays["replicate_gram"] = replicate_gram
        if len(gram) < chunk.stop - chunk.start:
            earlier = self._recorded(self.journal.read(f"{chunk.start:012d}"))
            arrays = {name: np.concatenate([earlier[name], values]) for name, values in arrays.items()}
        if any(len(values) != chunk.stop - chunk.start for values in arrays.values()):
            raise ValueError(f"the arrays do not have one entry for each of updates {chunk.start} to {chunk.stop}")
        covered = {name: _updates_per_checksum(values) for name, values in arrays.items()}
        record: dict[str, Any] = {"start": chunk.start, "stop": chunk.stop, "digest": digest}
        record["checksums"] = {name: checksums(values, covered[name]) for name, values in arrays.items()}
        record["checksum_rows"] = covered
        contents: dict[str, bytes | memoryview] = {}
        for name, values in arrays.items():
            index = self._index(name, chunk.start)
            chunk_entry(self.storage / name, *index).parent.clear_leftovers()
            contents["/".join((name, "c", *map(str, index)))] = self._content(values)
        self.storage.put_entries(contents)
        self.journal.write(f"{chunk.start:012d}", record)

    def _content(self, values: NDArray[np.float64]) -> memoryview:
        missing = self.updates_per_chunk - len(values)
        if missing:
            values = np.pad(values, ((0, missing), *[(0, 0)] * (values.ndim - 1)), constant_values=np.nan)
        return np.ascontiguousarray(values, "<f8").data.cast("B")

    def _index(self, name: str, start: int) -> tuple[int, ...]:
        return (start // self.updates_per_chunk, *(0 for _ in _DIMENSIONS[name][1:]))

    def chunk_entry(self, name: str, start: int) -> Storage:
        """Return the file or object of the ledger chunk that starts at an update."""
        return chunk_entry(self.storage / name, *self._index(name, start))

    def partial_chunks(self) -> list[LedgerChunk]:
        """Return the recorded part of a chunk that was the last one when the ledger was shorter.

        The list has at most one entry. A damaged part is omitted, so it is computed again.
        """
        for name in self.journal.names():
            record = self.journal.read(name)
            if record["stop"] % self.updates_per_chunk and record["stop"] < self.n_updates:
                try:
                    self._recorded(record)
                except InputError as error:
                    _log.warning("%s: computing it again", error)
                    return []
                return [LedgerChunk(record["start"], record["stop"])]
        return []

    def _recorded(self, record: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        """Read the updates of a record; raise InputError if they do not match their checksums."""
        found = {}
        for name in self.products:
            found[name], changed = self.compare(record, name)
            if changed:
                raise damage_error(self.chunk_entry(name, record["start"]), "checksum mismatch", _ANALYZE_AGAIN)
        return found

    def compare(self, record: Mapping[str, Any], name: str) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
        """Read an array of a recorded ledger chunk, and compare it with its checksums.

        Parameters
        ----------
        record : mapping
            Record of the ledger chunk.
        name : str
            One of `products`.

        Returns
        -------
        values : float64 array
        changed : list of (int, int)
            First and stop update of each group of updates that does not match its checksum.

        Raises
        ------
        InputError
            See `read_chunk`.
        """
        start, stop, size = record["start"], record["stop"], record["checksum_rows"][name]
        values = self.read_chunk(name, start, stop)
        recorded = record["checksums"][name][:, 0].tolist()
        pairs = zip(range(start, stop, size), checksums(values, size), recorded, strict=True)
        return values, [(low, min(low + size, stop)) for low, now, then in pairs if now != then]

    def discard_others(self, digests: Mapping[LedgerChunk, str]) -> None:
        """Remove the records of ledger chunks that were computed from other states, so that they are missing.

        Parameters
        ----------
        digests : mapping
            Each ledger chunk of the current trajectory to the digest of its states.
        """
        valid = {(chunk.start, chunk.stop, digest) for chunk, digest in digests.items()}
        for name in self.journal.names():
            record = self.journal.read(name)
            if (record["start"], record["stop"], record["digest"]) not in valid:
                self.journal.remove(name)

    def missing(self, digests: Mapping[LedgerChunk, str]) -> list[LedgerChunk]:
        """Return the ledger chunks that are not recorded, or were computed from other states."""
        recorded = {(r["start"], r["stop"]): r["digest"] for r in map(self.journal.read, self.journal.names())}
        return [chunk for chunk, digest in digests.items() if recorded.get((chunk.start, chunk.stop)) != digest]

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Read the complete ledger.

        Returns
        -------
        gram : float64 array, shape (updates, tensors, vectors, vectors)
        residual_ratio : float64 array, shape (updates, tensors)

        Raises
        ------
        InputError
            If a ledger chunk is not recorded (the pass was interrupted), is missing or is too short.
        """
        recorded = {(r["start"], r["stop"]) for r in map(self.journal.read, self.journal.names())}
        for start in range(0, self.n_updates, self.updates_per_chunk):
            stop = min(start + self.updates_per_chunk, self.n_updates)
            if (start, stop) not in recorded:
                raise InputError(
                    f"the ledger is incomplete: updates {start} to {stop} are missing",
                    where=str(self.storage),
                    why="the analysis was interrupted",
                    remedy="run natgrad analyze OUT again; finished ledger chunks are kept",
                )
            for name in self.products:
                array = self._array(name)
                require_complete_chunk(self.chunk_entry(name, start), array.chunks, array.dtype, _ANALYZE_AGAIN)
        return np.asarray(self._array("gram")[:]), np.asarray(self._array("residual_ratio")[:])

    def read_chunk(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Read the updates of a ledger chunk from one of the arrays `products`.

        Raises
        ------
        InputError
            If the chunk is missing or too short.
        """
        array = self._array(name)
        require_complete_chunk(self.chunk_entry(name, start), array.chunks, array.dtype, _ANALYZE_AGAIN)
        return np.asarray(array[start:stop])

    def steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the step of the state before each update, and the updates to the next state (0 if none)."""
        return np.asarray(self._array(STEP)[:]), np.asarray(self._array("step_span")[:])


def _names(layout: Layout, vectors: Sequence[str], replicate_vectors: Sequence[str]) -> dict[str, tuple[str, ...]]:
    names = {TENSOR: layout.names, VECTOR: tuple(vectors), WITH_VECTOR: tuple(vectors)}
    if replicate_vectors:
        names |= dict.fromkeys((REPLICATE_VECTOR, WITH_REPLICATE_VECTOR), tuple(replicate_vectors))
    return names


def _updates_per_checksum(values: NDArray[Any]) -> int:
    """Return the number of updates that one checksum of a float64 array covers."""
    return max(1, min(len(values), math.ceil(_CHECKSUM_BYTES * len(values) / max(8 * values.size, 1))))


def checksums(values: NDArray[Any], updates: int) -> list[int]:
    """Return the CRC-32C of each group of ``updates`` consecutive updates; the last group may be smaller."""
    words = np.ascontiguousarray(values, "<f8").data.cast("B")
    size = updates * (len(words) // max(len(values), 1))
    return [crc32c(words[begin : begin + size]) for begin in range(0, len(words), size or 1)]
