"""Compute and record the checksums of states: of copies when they are written, of references when they are read.

A pass computes the checksums of all states that it reads while their bytes are in the cache. Those of copied states
are compared with the record of their commit. The first pass over a state in the files of the log records its
checksums in ``commits/reads``, and every later read is compared with them. A log is never read only to compute
checksums.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.layout import LedgerChunk
from natgrad.storage import Storage
from natgrad.store.journal import Journal

if TYPE_CHECKING:
    from natgrad.store.states import States

__all__ = ["KnownChecksums", "Reads", "RecordedChecksums", "add_to_checksums", "checksum", "digest_of"]


def checksum(words: NDArray[Any]) -> int:
    """Return the CRC-32C of the bytes of a contiguous array."""
    return int(crc32c(words.data.cast("B")))


def add_to_checksums(checksums: NDArray[np.uint32], words: NDArray[Any]) -> None:
    """Extend checksums by further bytes of each state.

    Parameters
    ----------
    checksums : uint32 array, shape (states,)
        Checksums of the bytes so far, 0 of none; replaced by those including the new bytes.
    words : array, shape (states, elements)
        The elements of each state are contiguous.
    """
    for state, found in enumerate(checksums.tolist()):
        checksums[state] = crc32c(words[state].data.cast("B"), found)


class Reads(NamedTuple):
    """Checksums of consecutive states that a pass has read.

    Attributes
    ----------
    start : int
        First state.
    checksums : mapping
        Array to uint32 array, shape (states, columns).
    was_read : mapping
        Array to bool array, shape (states,): False for states that the pass did not need.
    """

    start: int
    checksums: Mapping[str, NDArray[np.uint32]]
    was_read: Mapping[str, NDArray[np.bool_]]


class KnownChecksums(NamedTuple):
    """Checksums of consecutive states, and which of them are known.

    Attributes
    ----------
    start : int
        First state.
    values : mapping
        uint32 array by name, shape (states, columns); 0 if unknown.
    known : mapping
        Array to bool array, shape (states, columns).
    """

    start: int
    values: dict[str, NDArray[np.uint32]]
    known: dict[str, NDArray[np.bool_]]


def digest_of(checksums: NDArray[np.uint32], starts: NDArray[np.bool_]) -> str:
    """Return the digest of a ledger chunk of a run without states, as `RecordedChecksums.digests` does.

    Parameters
    ----------
    checksums : uint32 array, shape (updates,)
        Checksum of the inner products of each update.
    starts : bool array, shape (updates + 1,)
        True for steps to which no update leads from the previous step.
    """
    words = np.column_stack([np.append(checksums, 0), starts]).astype("<u4")
    return hashlib.sha256(np.ascontiguousarray(words).data).hexdigest()


class RecordedChecksums:
    """The recorded checksums of the states of a trajectory.

    Parameters
    ----------
    states : States
    folder : Storage
        Folder of the records of reads.
    remedy : str
        Advice for a record that cannot be read, for the error message.
    """

    def __init__(self, states: States, folder: Storage, remedy: str) -> None:
        self._states, self._journal = states, Journal(folder, remedy)
        self._kept: KnownChecksums | None = None
        # The first state of a record never changes.
        self._record_start: Callable[[str], int] = cache(
            lambda number: int(self._states.journal.read(number)["start"])
        )

    def forget(self) -> None:
        """Read the records again, because more were added."""
        self._kept = None

    def each(self, first: int = 0) -> Iterator[KnownChecksums]:
        """Yield the checksums of the states of each commit, in order: those of a long run may not fit in memory.

        Parameters
        ----------
        first : int
            Omit earlier commits.
        """
        for record in self._states.each_record(first):
            yield self.of_record(record)

    def of_record(self, record: Mapping[str, Any]) -> KnownChecksums:
        """Return the checksums of the states of a commit."""
        start, stop, states = record["start"], record["stop"], self._states
        found = KnownChecksums(start, {}, {})
        for name in states.checked:
            values = record["checksums"].get(name)
            found.values[name] = np.zeros((stop - start, states.columns), np.uint32) if values is None else values
            found.known[name] = ~states.are_first_read_by_a_pass(name, start, stop) | (found.values[name] != 0)
        for each in self._journal.names() if states.in_place else ():
            low, high = map(int, each.split("-"))
            if low >= stop or high <= start:
                continue
            read = self._journal.read(each)
            here = slice(max(low, start) - start, min(high, stop) - start)
            there = slice(max(low, start) - low, min(high, stop) - low)
            for name, values in read["checksums"].items():
                rows = np.ones(high - low, bool)
                rows[[state - low for state in read["unread"].get(name, ())]] = False
                new = rows[there, None] & ~found.known[name][here]
                # A copy of the array of the record is changed, because a commit keeps its record.
                found.values[name] = found.values[name].copy()
                found.values[name][here][new] = values[there][new]
                found.known[name][here] |= new
        return found

    def with_copies(
        self, record: Mapping[str, Any], copies: Mapping[str, Mapping[tuple[int, int], int]]
    ) -> dict[str, Any]:
        """Return a record with the known checksums of its states, and those of new copies.

        Parameters
        ----------
        record : mapping
        copies : mapping
            By array, the checksum of each state and column that was copied.
        """
        start, stop = record["start"], record["stop"]
        values = self.of_record(record).values
        for name, found in copies.items():
            values[name] = values[name].copy()
            for (state, column), value in found.items():
                if start <= state < stop:
                    values[name][state - start, column] = value
        return {**record, "checksums": values}

    def of(self, name: str, start: int, stop: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Return the checksums of states of an array, shape (states, columns), and which of them are known.

        The records that contain these states are read and kept until others are needed.
        """
        if start == stop:
            none = np.empty((0, self._states.columns), np.uint32)
            return none, none.astype(bool)
        kept = self._kept
        if kept is None or not kept.start <= start <= stop <= kept.start + len(kept.values[name]):
            parts: list[KnownChecksums] = []
            for part in self.each(self._commit_of(start)):
                if parts and part.start >= stop:
                    break
                parts.append(part)
            kept = self._kept = KnownChecksums(
                parts[0].start,
                {each: np.concatenate([part.values[each] for part in parts]) for each in self._states.checked},
                {each: np.concatenate([part.known[each] for part in parts]) for each in self._states.checked},
            )
        rows = slice(start - kept.start, stop - kept.start)
        return kept.values[name][rows], kept.known[name][rows]

    def _commit_of(self, state: int) -> int:
        """Return the number of the commit that contains a state."""
        return max(bisect_right(self._states.journal.names(), state, key=self._record_start) - 1, 0)

    def digests(self, chunks: Iterable[LedgerChunk], starts: NDArray[np.int64]) -> dict[LedgerChunk, str]:
        """Return the digest of the states from which each ledger chunk is computed, including the halo.

        Parameters
        ----------
        chunks : iterable of LedgerChunk
        starts : int64 array
            States to which no update leads from the previous state.

        Returns
        -------
        dict
            The digest is empty if a checksum is not known. States that are gone and were never read have none.
        """
        states = self._states
        all_names, ends = states.logged, [name for name in states.logged if states.has_halo(name)]
        is_start = np.zeros(states.n_states + 1, "<u4")
        is_start[starts] = 1
        is_gone = np.zeros(states.n_states, bool)
        is_gone[list(states.gone)] = True
        hashes = {chunk: hashlib.sha256() for chunk in chunks}
        waiting = sorted(hashes, reverse=True)
        active: list[LedgerChunk] = []
        unknown: set[LedgerChunk] = set()
        for found in self.each(self._commit_of(waiting[-1].start)) if waiting else ():
            start, stop = found.start, found.start + len(found.known[all_names[0]])
            # An update needs only some arrays of the state after it.
            of_end = {name: found.values[name] if name in ends else 0 * found.values[name] for name in all_names}
            words, end_words = (
                np.column_stack([*(each[name] for name in all_names), is_start[start:stop]])
                for each in (found.values, of_end)
            )
            known, end_known = (
                np.all([found.known[name].all(axis=1) for name in names], axis=0) | is_gone[start:stop]
                for names in (all_names, ends)
            )
            while waiting and waiting[-1].start < stop:
                active.append(waiting.pop())
            for chunk in active:
                own, end = (
                    slice(max(low - start, 0), max(min(high, stop) - start, 0))
                    for low, high in ((chunk.start, chunk.stop), (chunk.stop, chunk.stop + 1))
                )
                hashes[chunk].update(np.ascontiguousarray(words[own]).data)
                hashes[chunk].update(np.ascontiguousarray(end_words[end]).data)
                if not (known[own].all() and end_known[end].all()):
                    unknown.add(chunk)
            active = [chunk for chunk in active if chunk.stop + 1 > stop]
            if not waiting and not active:
                break
        return {chunk: "" if chunk in unknown else each.hexdigest() for chunk, each in hashes.items()}

    def record(self, reads: Reads) -> None:
        """Record the checksums of states that a pass has read. The record is durable on return."""
        start = reads.start
        stop = start + max((len(values) for values in reads.checksums.values()), default=0)
        # Those of copies are in the records of their commits.
        new = {
            name: rows & self._states.are_first_read_by_a_pass(name, start, stop).any(axis=1)
            for name, rows in reads.was_read.items()
        }
        unread = {name: (start + np.flatnonzero(~rows)).tolist() for name, rows in new.items() if not rows.all()}
        described = {"start": start, "stop": stop, "checksums": dict(reads.checksums), "unread": unread}
        self._journal.write(f"{start:012d}-{stop:012d}", described)
        self.forget()
