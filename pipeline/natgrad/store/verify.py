"""Every stored byte against what was recorded of it: which steps of which tensors are not as they were written.

The committed states and scalars, the finished ledger chunks, the records and the metadata of arrays are compared.
Bytes that no reader sees are not: rows and elements of a chunk beyond the recorded ones (padding, and what an
interrupted write left), how a JSON file spells what it says, and in a compressed chunk bits that change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import storage_dtype
from natgrad.schema.names import REPLICATE_STATES, STEP
from natgrad.storage import place, read
from natgrad.store.group import ArrayPlan, array_digest, chunk_path, group_document, open_group, rows_on_disk
from natgrad.store.ledger import Ledger
from natgrad.store.states import checksum
from natgrad.store.trajectory import Trajectory

__all__ = ["Damage", "verify_ledger", "verify_trajectory"]


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes
    ----------
    path : Path
        File.
    what : str
    array : str
        Array it belongs to, empty where it is of the whole store.
    steps : tuple of int
        First and last step that it touches, empty where it is not of steps.
    tensors : tuple of str
        First and last tensor that it touches, empty where it is of all.
    """

    path: Path
    what: str
    array: str = ""
    steps: tuple[int, ...] = ()
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        place = [self.array] if self.array else []
        for kind, ends in {"step": self.steps, "tensor": self.tensors}.items():
            if ends:
                first, last = ends
                place.append(f"{kind} {first}" if first == last else f"{kind}s {first} to {last}")
        return f"{', '.join(place) + ': ' if place else ''}{self.what} ({self.path})"


def verify_trajectory(path: Path) -> Iterator[Damage]:
    """Read every committed state of a trajectory, a chunk at a time, and compare it with its checksums.

    A trajectory of version 1 has checksums of the states only.

    Yields
    ------
    Damage
    """
    try:
        states = Trajectory(path)
    except InputError as error:
        yield _told(error)
        return
    records: list[dict[str, Any]] = []
    for name in states.journal.names():
        try:
            record = states.journal.read(name)
        except InputError as error:
            yield _told(error)
            continue
        if record["stop"] > states.n_states:  # a writer is at work, and committed it since
            break
        before = records[-1]["stop"] if records else 0
        if record["start"] != before:
            yield Damage(states.journal.folder, f"rows {before} to {record['start']} have no record to check by")
        records.append(record)
    damages = list(_description(states.path, "trajectory", states.arrays))
    yield from damages
    described = [name for name in states.arrays if not any(damage.array == name for damage in damages)]
    for name in described:
        # The shape follows the record: a writer that was stopped in between left that of the commit before. One
        # that is at work has left that of a later one.
        rows = rows_on_disk(states.path / name)
        before = records[-1]["start"] if records else 0
        if rows not in (before, states.n_states) and not _committed_since(states, rows):
            yield Damage(states.path / name, f"its shape says {rows} rows, recorded are {states.n_states}", name)
    numbers = _numbers(states) if STEP in described else np.arange(states.n_states)
    for name in described:
        if name in states.array_dtypes:
            for part in states.replicates_of(name) if name in REPLICATE_STATES else (name,):
                for column in range(states.columns):
                    yield from _column(states, part, column, records, numbers)
        else:
            yield from _scalar(states, name, records, numbers)


def _committed_since(states: Trajectory, rows: int) -> bool:
    """Whether a commit that came after a trajectory was opened made it so many rows."""
    return any(record["stop"] == rows > states.n_states for record in states.records())


def _told(error: InputError) -> Damage:
    return Damage(place(error.where), error.what)


def _description(path: Path, kind: str, names: Iterable[str]) -> Iterator[Damage]:
    """Compare what describes a store; where an array has no description, its chunks cannot be read."""
    attributes = open_group(path, kind, "")
    for folder, document in {path / "commits": group_document({}), path: None}.items():
        try:
            found = json.loads(read(folder / "zarr.json"))
        except (OSError, ValueError) as error:
            yield Damage(folder / "zarr.json", f"it cannot be read: {error}")
            continue
        # Users may add attributes of their own to the group.
        if {**found, "attributes": {}} != group_document({}) or (document and found != document):
            yield Damage(folder / "zarr.json", "it is not as it was written")
    for name in names:
        described = path / name / "zarr.json"
        try:
            found = array_digest(path / name)
            if found != attributes.get("arrays", {}).get(name, found):
                yield Damage(described, "the description of the array is not as it was written", name)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            yield Damage(described, f"the description of the array cannot be read: {error}", name)


def _numbers(states: Trajectory) -> NDArray[Any]:
    """Return the step of each row; where those cannot be read, the row."""
    try:
        return states.scalar(STEP)
    except InputError:
        return np.arange(states.n_states)


def _ends(numbers: NDArray[Any], start: int, stop: int) -> tuple[int, int]:
    return int(numbers[start]), int(numbers[stop - 1])


def _scalar(
    states: Trajectory, name: str, records: Iterable[Mapping[str, Any]], numbers: NDArray[Any]
) -> Iterator[Damage]:
    try:
        values = states.scalar(name)
    except InputError as error:
        yield Damage(place(error.where), error.what, name)
        return
    for record in records:
        start, stop = record["start"], record["stop"]
        if name in record.get("scalars", {}) and checksum(values[start:stop]) != record["scalars"][name]:
            yield Damage(states.path / name, "another checksum than recorded", name, _ends(numbers, start, stop))


def _column(
    states: Trajectory, name: str, column: int, records: Iterable[Mapping[str, Any]], numbers: NDArray[Any]
) -> Iterator[Damage]:
    recorded = {
        record["start"] + index: found
        for record in records
        for index, found in enumerate(record["checksums"][name][:, column].tolist())
    }
    steps, (first, last) = states.chunk[0], states.column(column)
    pieces = states.layout.segments(first, last)
    tensors = tuple(states.layout.tensors[index].name for index, _, _ in (pieces[0], pieces[-1]))
    buffer = np.zeros((steps, states.chunk[1]), storage_dtype(states.dtypes[name]))
    for index in range(-(-states.n_states // steps)):
        start, stop = index * steps, min((index + 1) * steps, states.n_states)
        path = states.chunk_path(name, index, column)
        try:
            states.read(name, start, stop, column, buffer[: stop - start])
        except InputError as error:
            yield Damage(path, error.what, name, _ends(numbers, start, stop), tensors)
            continue
        if not states.is_compressed(name) and path.stat().st_size != buffer.nbytes:
            yield Damage(path, f"it has {path.stat().st_size} bytes of {buffer.nbytes}", name)
        for row in range(start, stop):
            if row in recorded and checksum(buffer[row - start, : last - first]) != recorded[row]:
                yield Damage(path, "another checksum than recorded", name, _ends(numbers, row, row + 1), tensors)


def verify_ledger(path: Path, states: Trajectory | None = None) -> Iterator[Damage]:
    """Read every finished ledger chunk of a ledger and compare it with its checksums.

    Parameters
    ----------
    path : Path
    states : Trajectory, optional
        That it is of; where it is not given, the steps of the ledger are not compared.

    Yields
    ------
    Damage
    """
    try:
        book = Ledger(path)
    except InputError as error:
        yield _told(error)
        return
    damages = list(_description(book.path, "ledger", (*book.names, *book.by_step)))
    yield from damages
    if damages:
        return
    rows = {name: rows_on_disk(book.path / name) for name in book.by_step}
    if len(set(rows.values())) > 1:
        yield Damage(book.path, f"its arrays have different numbers of rows, {rows}: run natgrad analyze OUT again")
        return
    for name, texts in book.names.items():
        chunk, plan = chunk_path(book.path / name, 0), ArrayPlan((name,), (len(texts),), (len(texts),), "string")
        whole = chunk.exists() and chunk.read_bytes() == plan.encoded(texts)
        if not whole or rows_on_disk(book.path / name) != len(texts):
            yield Damage(chunk, "the names are not as they were written", name)
    numbers = book.steps()[0]
    if states is not None and book.n_updates < states.n_states:
        expected = {STEP: states.scalar(STEP), "step_span": states.spans()}
        for name, found in zip(expected, book.steps(), strict=True):
            wrong = np.flatnonzero(found != expected[name][: book.n_updates])
            if wrong.size:
                what = "it is not that of the trajectory: run natgrad analyze OUT again"
                yield Damage(book.path / name, what, name, _ends(states.scalar(STEP), wrong[0], wrong[-1] + 1))
    for name in book.journal.names():
        try:
            record = book.journal.read(name)
        except InputError as error:
            yield _told(error)
            continue
        yield from _chunk(book, record, numbers)


def _chunk(book: Ledger, record: Mapping[str, Any], numbers: NDArray[Any]) -> Iterator[Damage]:
    start, stop = record["start"], record["stop"]
    for name in record.get("checksums", {}):
        try:
            _, changed = book.compared(record, name)
        except InputError as error:
            yield Damage(place(error.where), error.what, name, _ends(numbers, start, stop))
            continue
        for rows in changed:
            yield Damage(
                book.chunk_path(name, start), "another checksum than recorded", name, _ends(numbers, *rows)
            )
