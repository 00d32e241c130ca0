"""Verify all stored data against its checksums, and identify the damaged steps and tensors.

The check covers the committed states and scalars, the finished ledger chunks, the records, the metadata of
arrays and all files of the results. It does not cover bytes that no reader uses: padding, data beyond the recorded
states, the formatting of JSON files, and bits of a compressed chunk that do not affect its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import LedgerChunk, storage_dtype
from natgrad.schema.names import REPLICATE_STATES, STEP
from natgrad.schema.times import oldest
from natgrad.storage import Storage
from natgrad.store.checked import verify_files
from natgrad.store.checksums import KnownChecksums, checksum
from natgrad.store.group import (
    RECORD_AGAIN,
    OtherVersion,
    chunk_entry,
    document_of,
    encode_texts,
    open_group,
    read_documents,
    stored_length,
)
from natgrad.store.journal import Journal
from natgrad.store.ledger import Ledger
from natgrad.store.trajectory import Trajectory

__all__ = ["Damage", "verified_since", "verify_ledger", "verify_results", "verify_trajectory"]


@dataclass(frozen=True)
class Damage:
    """Stored data that does not match its checksum or its record.

    Attributes
    ----------
    path : str
        Path or URL of the file or object.
    what : str
        Description of the damage.
    array : str
        Name of the array, empty if the damage concerns the complete store.
    steps : tuple of int
        First and last damaged step, empty if the damage does not concern particular steps.
    tensors : tuple of str
        First and last damaged tensor, empty if the damage concerns all tensors.
    """

    path: str
    what: str
    array: str = ""
    steps: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the attributes as a dictionary."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [self.array] if self.array else []
        for kind, ends in {"step": self.steps, "tensor": self.tensors}.items():
            if ends:
                first, last = ends
                parts.append(f"{kind} {first}" if first == last else f"{kind}s {first} to {last}")
        return f"{', '.join(parts) + ': ' if parts else ''}{self.what} ({self.path})"


def verify_trajectory(storage: Storage) -> Iterator[Damage]:
    """Compare every committed state of a trajectory with its checksums, one chunk at a time.

    Yields
    ------
    Damage

    Raises
    ------
    InputError
        If another layout version wrote the store.
    """
    try:
        states = Trajectory(storage)
    except InputError as error:
        yield from _verify_closed(storage, "trajectory", error)
        return
    records: list[dict[str, Any]] = []
    for record in _records(states.journal):
        if isinstance(record, Damage):
            yield record
            continue
        if record["stop"] > states.n_fixed:  # committed by a writer since the trajectory was opened
            break
        before = records[-1]["stop"] if records else 0
        if record["start"] != before:
            yield Damage(str(states.journal.folder), f"there is no record of states {before} to {record['start']}")
        records.append(record)
    before = records[-1]["start"] if records else 0
    # The record of a provisional state was compared with its own checksum when the trajectory was opened.
    records += [record for record in states.each_record(len(records)) if record["start"] == states.n_fixed]
    yield from _verify_metadata(states.storage, "trajectory")
    for name in states.arrays:
        # The shape is set after the record. If a writer stopped in between, the shape is that of the previous
        # commit (perhaps with a provisional state), and a running writer may already have set that of a later one.
        length = stored_length(states.storage / name)
        usual = (before, before + 1, states.n_fixed, states.n_states)
        if length not in usual and not _committed_since(states, length):
            what = f"the shape has {length} states, but {states.n_states} are recorded"
            yield Damage(str(states.storage / name), what, name)
    numbers = _step_numbers(states)
    checksums = list(map(states.checksums.of_record, records))
    for name in states.arrays:
        if name in states.array_dtypes:
            for part in states.replicates_of(name) if name in REPLICATE_STATES else (name,):
                for column in range(states.columns):
                    yield from _verify_column(states, part, column, checksums, numbers)
        else:
            yield from _verify_scalar(states, name, records, numbers)


def verified_since(
    states: Trajectory, ledger: Ledger | None, digests: Mapping[LedgerChunk, str] | None = None
) -> str | None:
    """Return the time since which every state has been compared with its checksums; None if that is not known.

    A pass compares the states that it reads, and `natgrad verify` all states. The result is the oldest, over the
    states, of the times at which each was last compared. The updates of a ledger chunk share one time, the oldest.

    Parameters
    ----------
    states : Trajectory
    ledger : Ledger, optional
    digests : mapping, optional
        See `Ledger.records`. Required if the ledger may be that of an older trajectory.
    """
    stop, time = states.verification()
    records = [] if ledger is None else ledger.records(digests)
    compared = {} if ledger is None else ledger.verification(records)
    reached, times = 0, []
    for record in records:
        if record["start"] == reached:
            reached = record["stop"]
            # The states of these updates include the halo.
            own, all_states = compared.get(record["start"]), time if reached < stop else None
            times.append(max(filter(None, (own, all_states)), default=None))
    if reached + 1 < states.n_states:
        times.append(time if stop >= states.n_states else None)
    return oldest(times)


def _committed_since(states: Trajectory, length: int) -> bool:
    """Return True if a commit since the trajectory was opened has extended it to this number of states."""
    journal = states.journal
    records = [*map(journal.read, journal.names()), journal.read_provisional()]
    return any(record.get("stop", 0) == length > states.n_states for record in records)


def _damage(error: InputError) -> Damage:
    """Return the damage that an error reports. A store of another layout version is not damaged: it is refused."""
    if isinstance(error, OtherVersion):
        raise error
    return Damage(error.where, error.what)


_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}
"""Metadata of a group, without attributes that users may have added."""


def _verify_closed(storage: Storage, kind: str, error: InputError) -> Iterator[Damage]:
    """Report why a store cannot be opened, and the other damage of its metadata. Its data cannot be compared."""
    yield (first := _damage(error))
    try:
        yield from (damage for damage in _verify_metadata(storage, kind) if damage.path != first.path)
    except InputError:
        return  # the reason why the store cannot be opened


def _verify_metadata(storage: Storage, kind: str) -> Iterator[Damage]:
    """Compare the metadata of a store with its checksums."""
    attributes = open_group(storage, kind, "")
    for group in (storage / "commits", storage):
        where = str(group / "zarr.json")
        try:
            found = document_of(group)
        except (OSError, ValueError) as error:
            yield Damage(where, f"cannot read it: {error}")
            continue
        if {**found, "attributes": found.get("attributes") if group is not storage else {}} != _GROUP:
            yield Damage(where, "the metadata of the group has changed")
    for name, digest in attributes["arrays"].items():
        try:
            read_documents(storage, kind, [name], {name: digest})
        except InputError as error:
            yield Damage(error.where, error.what, name)


def _step_numbers(states: Trajectory) -> NDArray[Any]:
    """Return the step of each state, or the index of each state if the steps cannot be read."""
    try:
        return states.scalar(STEP)
    except InputError:
        return np.arange(states.n_states)


def _first_and_last(numbers: NDArray[Any], start: int, stop: int) -> tuple[int, int]:
    return int(numbers[start]), int(numbers[stop - 1])


def _verify_scalar(
    states: Trajectory, name: str, records: Iterable[Mapping[str, Any]], numbers: NDArray[Any]
) -> Iterator[Damage]:
    try:
        values = states.stored_numbers.unverified(name)
    except InputError as error:
        yield Damage(error.where, error.what, name)
        return
    where = str(states.storage / name)
    for start, stop in states.stored_numbers.damaged(name, values, records):
        yield Damage(where, "checksum mismatch", name, _first_and_last(numbers, start, stop))


def _verify_column(
    states: Trajectory, name: str, column: int, checksums: Iterable[KnownChecksums], numbers: NDArray[Any]
) -> Iterator[Damage]:
    recorded = {
        each.start + index: found
        for each in checksums
        for index, found in enumerate(each.values[name][:, column].tolist())
        if each.known[name][index, column]
    }
    steps, (first, last) = states.chunk[0], states.column(column)
    tensors = states.tensors_of(column)
    buffer = np.zeros((steps, states.chunk[1]), storage_dtype(states.dtypes[name]))
    for start, stop, in_place in states.readable(name, column):
        path = str(states.chunk_entry(name, start // steps, column))
        try:
            states.read(name, start, stop, column, buffer[: stop - start], verified=False)
        except InputError as error:
            path = error.where if in_place else path
            yield Damage(path, error.what, name, _first_and_last(numbers, start, stop), tensors)
            continue
        if in_place:
            path = states.references.first_file(start, name, (first, last)).location
        elif not states.is_compressed(name):
            size, expected = states.chunk_entry(name, start // steps, column).stat().size, buffer.nbytes
            if size != expected:
                yield Damage(path, f"it has {size} of {expected} bytes", name)
        for state in range(start, stop):
            if state in recorded and checksum(buffer[state - start, : last - first]) != recorded[state]:
                steps_of = _first_and_last(numbers, state, state + 1)
                yield Damage(path, "checksum mismatch", name, steps_of, tensors)


def verify_ledger(storage: Storage, states: Trajectory | None = None) -> Iterator[Damage]:
    """Compare every finished chunk of a ledger with its checksums.

    Parameters
    ----------
    storage : Storage
    states : Trajectory, optional
        Trajectory of the ledger; without it, the steps of the ledger are not compared.

    Yields
    ------
    Damage

    Raises
    ------
    InputError
        If another layout version wrote the store.
    """
    try:
        ledger = Ledger(storage)
    except InputError as error:
        yield from _verify_closed(storage, "ledger", error)
        return
    yield from _verify_metadata(storage, "ledger")
    for name in ledger.by_step:
        if (length := stored_length(storage / name)) != ledger.n_updates:
            again = "process the log again" if ledger.recorded else "run natgrad analyze OUT"
            what = f"the array has {length} updates, but {ledger.n_updates} are recorded: {again}"
            yield Damage(str(storage / name), what, name)
    for name, texts in ledger.names.items():
        chunk = chunk_entry(storage / name, 0)
        (content,) = chunk.parent.get_entries([chunk.name])
        if content != encode_texts(texts) or stored_length(storage / name) != len(texts):
            yield Damage(str(chunk), "the names were changed", name)
    numbers = np.arange(ledger.n_updates)
    found_steps: tuple[NDArray[Any], ...] = ()
    try:
        found_steps = ledger.steps()
        numbers = found_steps[0]
    except InputError as error:
        yield _damage(error)
    if states is not None and found_steps and ledger.n_updates < states.n_states:
        expected = {STEP: states.scalar(STEP), "step_span": states.spans()}
        for name, found in zip(expected, found_steps, strict=True):
            wrong = np.flatnonzero(found != expected[name][: ledger.n_updates])
            if wrong.size:
                again = RECORD_AGAIN if ledger.recorded else "run natgrad analyze OUT again"
                what = f"the steps differ from those of the trajectory: {again}"
                steps = _first_and_last(states.scalar(STEP), wrong[0], wrong[-1] + 1)
                yield Damage(str(storage / name), what, name, steps)
    for record in _records(ledger.journal):
        if isinstance(record, Damage):
            yield record
        else:
            yield from _verify_chunk(ledger, record, numbers)


def _records(journal: Journal) -> Iterator[dict[str, Any] | Damage]:
    """Yield the records, or the damage of those that cannot be read."""
    for name in journal.names():
        try:
            yield journal.read(name)
        except InputError as error:
            yield _damage(error)


def _verify_chunk(ledger: Ledger, record: Mapping[str, Any], numbers: NDArray[Any]) -> Iterator[Damage]:
    start, stop = record["start"], record["stop"]
    for name in record["checksums"]:
        try:
            _, changed = ledger.compare(record, name)
        except InputError as error:
            yield Damage(error.where, error.what, name, _first_and_last(numbers, start, stop))
            continue
        where = str(ledger.chunk_entry(name, start))
        for updates in changed:
            yield Damage(where, "checksum mismatch", name, _first_and_last(numbers, *updates))


def verify_results(storage: Storage) -> Iterator[Damage]:
    """Compare every file of the results with its checksum.

    Yields
    ------
    Damage

    Raises
    ------
    InputError
        If another layout version wrote the results.
    """
    for error in verify_files(storage, ""):
        yield Damage(error.where, error.what)
