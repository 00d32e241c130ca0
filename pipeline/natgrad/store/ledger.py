"""Store the Gram ledger of a run. Workers write concurrently: first a complete ledger chunk, then its record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, LedgerChunk
from natgrad.schema.logs import logger
from natgrad.schema.names import STEP
from natgrad.schema.summary import summary_html
from natgrad.storage import Storage
from natgrad.store.group import (
    ANALYZE_AGAIN,
    RECORD_AGAIN,
    StoredArray,
    chunk_entry,
    create_group,
    damage_error,
    is_current,
    number_chunks,
    open_group,
    read_complete_chunks,
    read_documents,
    remove_group,
    resize_all,
)
from natgrad.store.journal import Journal
from natgrad.store.ledger_arrays import (
    DIMENSIONS,
    checksums,
    ledger_arrays,
    names_of,
    numbers_checksum,
    numbers_record,
    updates_per_checksum,
)

__all__ = ["Ledger"]

_log = logger(__name__)

_NUMBERS = "numbers"
"""Record of the number of updates, and of the checksums of the arrays with one number per update."""


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
    n_updates : int
        Number of updates of the ledger when all chunks are finished.
    recorded : bool
        The inner products were recorded instead of states, so that they cannot be computed again.
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
            If there is no ledger, another version of natgrad wrote it, or its metadata are damaged.
        """
        self.storage = storage
        attributes = open_group(storage, "ledger", "compute it first: natgrad analyze OUT")
        self.layout = Layout.from_json(attributes["layout"])
        self.recorded: bool = attributes.get("recorded", False)
        self._remedy = RECORD_AGAIN if self.recorded else ANALYZE_AGAIN
        self.vectors: tuple[str, ...] = tuple(attributes["vectors"])
        self.replicate_vectors: tuple[str, ...] = tuple(attributes.get("replicate_vectors", ()))
        self.updates_per_chunk: int = attributes["updates_per_chunk"]
        documents = read_documents(storage, "ledger", (*self.names, *self.by_step), attributes["arrays"])
        self._arrays = {name: StoredArray.of(documents[name]) for name in self.by_step}
        self.journal = Journal(storage / "commits", self._remedy)
        self._numbers = self.journal.read(_NUMBERS)
        self.n_updates: int = self._numbers["updates"]

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
        return names_of(self.layout, self.vectors, self.replicate_vectors)

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
    def find(cls, storage: Storage, *, warn: bool = False) -> Ledger | None:
        """Open a ledger; return None if there is none, or if `prepare` will replace it: it is older or damaged.

        Parameters
        ----------
        storage : Storage
        warn : bool
            Warn if the ledger is damaged.

        Raises
        ------
        InputError
            If the location contains something else, or a newer natgrad wrote it.
        """
        if not cls.is_current(storage):
            return None
        try:
            return cls(storage)
        except InputError as error:
            if warn:
                _log.warning("%s (%s): the ledger is computed again", error.what, error.where)
            return None

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
            An existing ledger with other tensors, vectors or chunks, of an older layout version, or with damaged
            metadata is replaced. Damaged ledger chunks become missing.
        replicate_vectors : sequence of str
            Vectors of the replicates of a stochastic rule.
        """
        wanted: dict[str, Any] = {
            "layout": layout.to_json(),
            "vectors": list(vectors),
            "updates_per_chunk": updates_per_chunk,
            **({"replicate_vectors": list(replicate_vectors)} if replicate_vectors else {}),
        }
        ledger = cls.find(storage, warn=True)
        if ledger is not None:
            found = (ledger.layout, ledger.vectors, ledger.updates_per_chunk, ledger.replicate_vectors)
            same = found == (layout, tuple(vectors), updates_per_chunk, tuple(replicate_vectors))
            if same and not ledger.recorded:
                # Methods of this class, which readers of a ledger must not call.
                ledger._resize(steps, spans)
                ledger._discard_damaged()
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
        arrays = ledger_arrays(layout, vectors, steps, spans, updates_per_chunk, replicate_vectors)
        create_group(storage, "ledger", attributes, arrays, {_NUMBERS: numbers_record(steps, spans)})

    def _resize(self, steps: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
        """Set the number of updates, and finish an interrupted resize."""
        self.journal.clear()
        resize_all(self.storage, self.by_step, len(steps))
        try:
            if all(map(np.array_equal, self.steps(), (steps, spans))):
                return
        except InputError as error:
            _log.warning("%s (%s): it is written again", error.what, error.where)
        contents: dict[str, bytes | memoryview] = {}
        for name, numbers in {STEP: steps, "step_span": spans}.items():
            contents |= number_chunks(self._arrays[name], name, numbers[:0], numbers)
        self.storage.put_entries(contents)
        self._numbers, self.n_updates = numbers_record(steps, spans), len(steps)
        self.journal.write(_NUMBERS, self._numbers)

    def _discard_damaged(self) -> None:
        """Remove the records of damaged ledger chunks, so that these chunks are missing and computed again."""
        for name in self.journal.names():
            try:
                self._recorded(self.journal.read(name))
            except InputError as error:
                _log.warning("%s (%s): the ledger chunk is computed again", error.what, error.where)
                self.journal.remove(name)

    @classmethod
    def remove(cls, storage: Storage) -> None:
        """Remove a ledger; raise InputError if the location contains anything else."""
        remove_group(storage, "ledger")

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
            record = self.journal.read(f"{chunk.start:012d}")
            earlier = self._recorded(record)
            arrays = {name: np.concatenate([earlier[name], values]) for name, values in arrays.items()}
        self._write(chunk, arrays, digest)

    def _write(self, chunk: LedgerChunk, arrays: Mapping[str, NDArray[np.float64]], digest: str) -> None:
        if any(len(values) != chunk.stop - chunk.start for values in arrays.values()):
            raise ValueError(f"the arrays do not have one entry for each of updates {chunk.start} to {chunk.stop}")
        covered = {name: updates_per_checksum(values) for name, values in arrays.items()}
        record = {"start": chunk.start, "stop": chunk.stop, "digest": digest}
        record["checksums"] = {name: checksums(values, covered[name]) for name, values in arrays.items()}
        record["checksum_rows"] = covered
        contents: dict[str, bytes | memoryview] = {}
        for name, values in arrays.items():
            index = self._index(name, chunk.start)
            chunk_entry(self.storage / name, *index).parent.clear_leftovers()
            contents["/".join((name, "c", *map(str, index)))] = self._content(values)
        self.storage.put_entries(contents)
        self.journal.write(f"{chunk.start:012d}", record)

    @classmethod
    def create(
        cls,
        storage: Storage,
        layout: Layout,
        vectors: Sequence[str],
        updates_per_chunk: int,
    ) -> Ledger:
        """Create the empty ledger of a run without states, to which `append` adds updates; replace another one."""
        none = np.empty(0, np.int64)
        attributes = {
            "layout": layout.to_json(),
            "vectors": list(vectors),
            "updates_per_chunk": updates_per_chunk,
            "recorded": True,
        }
        cls._create(storage, attributes, layout, vectors, none, none, updates_per_chunk, ())
        return cls(storage)

    def append(
        self,
        start: int,
        steps: NDArray[np.int64],
        spans: NDArray[np.int64],
        gram: NDArray[np.float64],
        ratio: NDArray[np.float64],
        digest: Callable[[LedgerChunk], str],
    ) -> None:
        """Write the updates of a run without states from ``start`` on. They replace later ones, not earlier ones.

        Readers find either the earlier updates or all of them, and so does a writer after one that was killed.

        Parameters
        ----------
        start : int
        steps, spans : int64 array, shape (updates,)
            See `prepare`. Those before ``start`` are the same as before.
        gram : float64 array, shape (updates - start, tensors, vectors, vectors)
        ratio : float64 array, shape (updates - start, tensors)
        digest : callable
            Takes a ledger chunk and returns the digest of the steps from which it was recorded.
        """
        stop, size = len(steps), self.updates_per_chunk
        for low in range(start // size * size, stop, size):
            chunk = LedgerChunk(low, min(low + size, stop))
            new = slice(max(low - start, 0), chunk.stop - start)
            arrays = {"gram": gram[new], "residual_ratio": ratio[new]}
            if low < start:
                record = self._record(low, start)
                arrays = {
                    name: np.concatenate([self._verified(record, name)[: start - low], values])
                    for name, values in arrays.items()
                }
            self._write(chunk, arrays, digest(chunk))
        for name in self.journal.names():  # a writer that was killed may have written more
            if int(name) >= stop:
                self.journal.remove(name)
        self._resize(steps, spans)

    def _content(self, values: NDArray[np.float64]) -> memoryview:
        missing = self.updates_per_chunk - len(values)
        if missing:
            values = np.pad(values, ((0, missing), *[(0, 0)] * (values.ndim - 1)), constant_values=np.nan)
        return np.ascontiguousarray(values, "<f8").data.cast("B")

    def _index(self, name: str, start: int) -> tuple[int, ...]:
        return (start // self.updates_per_chunk, *(0 for _ in DIMENSIONS[name][1:]))

    def chunk_entry(self, name: str, start: int) -> Storage:
        """Return the file or object of the ledger chunk that starts at an update."""
        return chunk_entry(self.storage / name, *self._index(name, start))

    def partial_chunks(self) -> list[LedgerChunk]:
        """Return the recorded part of a chunk that was the last one of a shorter ledger, if there is one."""
        for name in self.journal.names():
            record = self.journal.read(name)
            if record["stop"] % self.updates_per_chunk and record["stop"] < self.n_updates:
                return [LedgerChunk(record["start"], record["stop"])]
        return []

    def settle(self, chunk: LedgerChunk, digest: str) -> None:
        """Record the digest of the states of a ledger chunk without its last update, which will change.

        The state after this update is provisional. When it is completed, `shorten` keeps the other updates.
        """
        name = f"{chunk.start:012d}"
        if self.journal.has(name):
            self.journal.write(name, self.journal.read(name) | {"settled": digest})

    def settled(self) -> list[LedgerChunk]:
        """Return the ledger chunks whose last update will change, with and without this update."""
        chunks = [_chunk_of(record) for record in self.records() if "settled" in record]
        return [*chunks, *map(_without_last, chunks)]

    def shorten(self, digests: Mapping[LedgerChunk, str]) -> None:
        """Remove the last update from the records of `settled` ledger chunks if only its states have changed.

        Parameters
        ----------
        digests : mapping
            Each chunk of `settled` to the digest of its states.
        """
        for record in (record for record in self.records() if "settled" in record):
            chunk, digest = _chunk_of(record), record["settled"]
            shorter = _without_last(chunk)
            if digests[chunk] == record["digest"] or digests[shorter] != digest:
                continue
            covered, times = record["checksum_rows"], self.verification([record])
            shortened: dict[str, Any] = {"start": chunk.start, "stop": shorter.stop, "digest": digest}
            shortened["checksums"] = {
                name: checksums(values[:-1], covered[name]) for name, values in self._recorded(record).items()
            }
            others = [other for other in self.records() if other["start"] != chunk.start]
            all_times = self.verification(others) | times
            self.journal.write(f"{chunk.start:012d}", shortened | {"checksum_rows": covered})
            self.record_verification(all_times, [*others, shortened])

    def _recorded(self, record: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        """Read the updates of a record; raise InputError if they do not match their checksums."""
        return {name: self._verified(record, name) for name in self.products}

    def _verified(self, record: Mapping[str, Any], name: str) -> NDArray[np.float64]:
        values, changed = self.compare(record, name)
        if changed:
            (start, _), (_, stop) = changed[0], changed[-1]
            chunk = self.chunk_entry(name, record["start"])
            raise damage_error(chunk, "checksum mismatch", self._remedy, f"{name}, updates {start} to {stop - 1}")
        return values

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
            If the chunk is missing or has the wrong size.
        """
        start, stop, size = record["start"], record["stop"], record["checksum_rows"][name]
        shape = (self.updates_per_chunk, *self._arrays[name].shape[1:])
        chunks = read_complete_chunks(
            self.storage / name, [self._index(name, start)], shape, np.dtype(np.float64), self._remedy
        )
        values = chunks[0][: stop - start]
        recorded = record["checksums"][name][:, 0].tolist()
        pairs = zip(range(start, stop, size), checksums(values, size), recorded, strict=True)
        return values, [(low, min(low + size, stop)) for low, now, then in pairs if now != then]

    def records(self, digests: Mapping[LedgerChunk, str] | None = None) -> list[dict[str, Any]]:
        """Return the records of the finished ledger chunks, in order.

        Parameters
        ----------
        digests : mapping, optional
            Each ledger chunk of the current trajectory to the digest of its states. Records of others are omitted.
        """
        found = map(self.journal.read, self.journal.names())
        if digests is None:
            return list(found)
        return [record for record in found if digests.get(_chunk_of(record)) == record["digest"]]

    def record_verification(self, times: Mapping[int, str | None], records: Iterable[Mapping[str, Any]]) -> None:
        """Record when the states of ledger chunks were compared with their checksums.

        Parameters
        ----------
        times : mapping
            The first update of each ledger chunk to the time; None if the states were not compared.
        records : iterable of mapping
            Records of these chunks, from `records`.
        """
        digests = {record["start"]: record["digest"] for record in records}
        self.journal.write_verification(
            {"chunks": {str(start): [digests[start], time] for start, time in sorted(times.items())}}
        )

    def verification(self, records: Iterable[Mapping[str, Any]]) -> dict[int, str | None]:
        """Return the times of `record_verification`, except those of ledger chunks that were replaced since."""
        found = self.journal.read_verification().get("chunks", {})
        digests = {str(record["start"]): record["digest"] for record in records}
        return {int(start): time for start, (digest, time) in found.items() if digests.get(start) == digest}

    def discard_others(self, digests: Mapping[LedgerChunk, str]) -> None:
        """Remove the records of ledger chunks that were computed from other states, so that they are missing.

        Parameters
        ----------
        digests : mapping
            Each ledger chunk of the current trajectory to the digest of its states.
        """
        for name in self.journal.names():
            record = self.journal.read(name)
            if digests.get(_chunk_of(record)) != record["digest"]:
                self.journal.remove(name)

    def missing(self, digests: Mapping[LedgerChunk, str]) -> list[LedgerChunk]:
        """Return the ledger chunks that are not recorded, or were computed from other states."""
        recorded = set(map(_chunk_of, self.records(digests)))
        return [chunk for chunk in digests if chunk not in recorded]

    def read(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Read the complete ledger, and compare it with its checksums.

        Returns
        -------
        gram : float64 array, shape (updates, tensors, vectors, vectors)
        residual_ratio : float64 array, shape (updates, tensors)

        Raises
        ------
        InputError
            If a ledger chunk is not recorded (the pass was interrupted), or is damaged.
        """
        tensors, vectors = len(self.layout.tensors), len(self.vectors)
        gram = np.empty((self.n_updates, tensors, vectors, vectors))
        ratio = np.empty((self.n_updates, tensors))
        for start in range(0, self.n_updates, self.updates_per_chunk):
            stop = min(start + self.updates_per_chunk, self.n_updates)
            gram[start:stop] = self.read_chunk("gram", start, stop)
            ratio[start:stop] = self.read_chunk("residual_ratio", start, stop)
        return gram, ratio

    def read_chunk(self, name: str, start: int, stop: int) -> NDArray[np.float64]:
        """Read and verify the updates of a ledger chunk from one of the arrays `products`.

        Raises
        ------
        InputError
            If the chunk is not recorded, or is damaged.
        """
        return self._verified(self._record(start, stop), name)[: stop - start]

    def _record(self, start: int, stop: int) -> dict[str, Any]:
        number = f"{start:012d}"
        record = self.journal.read(number) if self.journal.has(number) else {}
        # The writer of a run without states extends a ledger chunk before the numbers of its updates.
        if record.get("start") != start or record.get("stop", 0) < stop:
            raise InputError(
                f"the ledger is incomplete: updates {start} to {stop} are missing",
                where=str(self.storage),
                why="the analysis was interrupted",
                remedy="run natgrad analyze OUT again; finished ledger chunks are kept",
            )
        return record

    def read_updates(self, updates: NDArray[np.int64]) -> NDArray[np.float64]:
        """Read and verify the Gram matrices of some updates. Only their parts of ledger chunks are read.

        Parameters
        ----------
        updates : int64 array
            Indices into the ledger, in any order.

        Returns
        -------
        float64 array, shape (updates, tensors, vectors, vectors)

        Raises
        ------
        InputError
            See `read_chunk`.
        """
        gram = np.empty((len(updates), *self._arrays["gram"].shape[1:]))
        of_chunk = updates // self.updates_per_chunk * self.updates_per_chunk
        for start in np.unique(of_chunk).tolist():
            positions = np.flatnonzero(of_chunk == start)
            wanted = updates[positions] - start
            low, values = self._read_part("gram", start, int(wanted.min()), int(wanted.max()) + 1)
            gram[positions] = values[wanted - low]
        return gram

    def read_ratios(self, updates: NDArray[np.int64]) -> NDArray[np.float64]:
        """Read and verify the ratios of the residuals of some updates, shape (updates, tensors)."""
        found = np.empty((len(updates), len(self.layout.tensors)))
        for position, update in enumerate(updates.tolist()):
            start = update // self.updates_per_chunk * self.updates_per_chunk
            low, values = self._read_part("residual_ratio", start, update - start, update - start + 1)
            found[position] = values[update - start - low]
        return found

    def gram_checksums(self, updates: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return for each of some updates the recorded checksum, and the position in it, of its Gram matrices.

        Other Gram matrices of the same update have other numbers, except with a probability of 2^-32.

        Returns
        -------
        int64 array, shape (updates, 2)
        """
        found = np.empty((len(updates), 2), np.int64)
        of_chunk = updates // self.updates_per_chunk * self.updates_per_chunk
        for start in np.unique(of_chunk).tolist():
            positions = np.flatnonzero(of_chunk == start)
            record = self._record(start, min(start + self.updates_per_chunk, self.n_updates))
            group, within = np.divmod(updates[positions] - start, record["checksum_rows"]["gram"])
            found[positions] = np.stack([record["checksums"]["gram"][group, 0], within], axis=1)
        return found

    def _read_part(self, name: str, start: int, low: int, high: int) -> tuple[int, NDArray[np.float64]]:
        """Return the updates ``low`` to ``high`` of a ledger chunk, and those that share their checksums."""
        record = self._record(start, min(start + self.updates_per_chunk, self.n_updates))
        stop = record["stop"]
        covered, shape = record["checksum_rows"][name], self._arrays[name].shape[1:]
        low, high = low // covered * covered, min(math.ceil(high / covered) * covered, stop - start)
        row = 8 * math.prod(shape)
        try:
            (content,) = self.chunk_entry(name, start).get_ranges([(low * row, high * row)])
            values = np.frombuffer(content, "<f8").reshape(high - low, *shape)
        except (FileNotFoundError, ValueError):
            values = np.empty((0, *shape))
        recorded = record["checksums"][name][low // covered : math.ceil(high / covered), 0].tolist()
        if len(values) != high - low or checksums(values, covered) != recorded:
            return 0, self._verified(record, name)  # the complete chunk, or an error that names what is damaged
        return low, values

    def steps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the step of the state before each update, and the updates to the next state (0 if none).

        Raises
        ------
        InputError
            If the numbers are damaged.
        """
        return self._read_numbers(STEP), self._read_numbers("step_span")

    def _read_numbers(self, name: str) -> NDArray[np.int64]:
        array = self._arrays[name]
        indices = [(index,) for index in range(-(-self.n_updates // array.chunks[0]))]
        chunks = read_complete_chunks(self.storage / name, indices, array.chunks, array.dtype, self._remedy)
        values = np.concatenate([np.empty(0, np.int64), *chunks])[: self.n_updates]
        if numbers_checksum(values) != self._numbers[name]:
            raise damage_error(chunk_entry(self.storage / name, 0), "checksum mismatch", self._remedy, name)
        return values


def _without_last(chunk: LedgerChunk) -> LedgerChunk:
    return LedgerChunk(chunk.start, chunk.stop - 1)


def _chunk_of(record: Mapping[str, Any]) -> LedgerChunk:
    return LedgerChunk(record["start"], record["stop"])
