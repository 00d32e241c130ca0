"""Read a log of ledgers, which a training loop writes with `natgrad.watch` (mode="ledger").

The log is a folder of files ``ledger_<k>.log``, one for each process that trained the run; see
`natgrad.schema.ledger_log`. It contains updates, not states. It can be read while it grows: incomplete records at
the end of a file are ignored until they are complete. A damaged record before others is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.ledger_log import SKIPPED, LedgerHeader, is_valid, ledger_files, unpacked
from natgrad.sources.steps import NotYet, Unreadable
from natgrad.storage import open_regular

__all__ = ["LedgerLog", "RecordedUpdates", "holds_ledgers"]

_BLOCK_BYTES = 1 << 22
"""Approximate size of the records that are read at a time."""

_HEADER_BYTES = 1 << 28
"""Maximum size of a header. A description of a million tensors takes half of it."""


@dataclass(frozen=True)
class RecordedUpdates:
    """Consecutive updates of a log.

    Attributes
    ----------
    file : Path
    steps : int64 array, shape (updates,)
        Number of updates before each update.
    spans : int64 array, shape (updates,)
        Number of steps that each update takes.
    attempt : int
        Number of times that the run was restarted from an earlier step before these updates.
    skipped : bool array, shape (updates,)
        The optimizer skipped the update, because a gradient was not finite.
    loss : float64 array, shape (updates,)
        Loss before each update, NaN if it was not logged.
    rates, ratio : float64 arrays, shape (updates, tensors)
        Learning rate of each tensor, NaN if it is not known, and ratio of the residual.
    gram : float64 array, shape (updates, tensors, vectors, vectors)
        Inner products of the vectors of `LedgerLog.vectors`.
    """

    file: Path
    steps: NDArray[np.int64]
    spans: NDArray[np.int64]
    attempt: int
    skipped: NDArray[np.bool_]
    loss: NDArray[np.float64]
    rates: NDArray[np.float64]
    ratio: NDArray[np.float64]
    gram: NDArray[np.float64]


class LedgerLog:
    """A log of ledgers.

    Parameters
    ----------
    folder : Path

    Attributes
    ----------
    folder : Path
    header : LedgerHeader
        That of the first file.
    layout : Layout
        Tensors of the model.
    vectors : tuple of str

    Raises
    ------
    NotYet
        If the first file has no complete header yet.
    InputError
        If there are no such files, or if a header is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not ledger_files(folder):
            raise InputError(
                "there are no ledgers (ledger_<k>.log)",
                where=str(folder),
                remedy='pass the folder of natgrad.watch with mode="ledger"',
            )
        headers = (_header(path) for path in ledger_files(folder).values())
        found = next((header for header in headers if header is not None), None)
        if found is None:
            raise NotYet(
                "the log contains no update yet",
                where=str(folder),
                why="the training has just begun",
                remedy="run again later",
            )
        self.header, _ = found
        shapes = {tensor.name: (tensor.shape, tensor.dtype) for tensor in self.header.tensors}
        self.layout, self.vectors = Layout.from_shapes(shapes), self.header.vectors

    def updates(self) -> Iterator[RecordedUpdates]:
        """Yield the updates in the order in which they were recorded, some at a time.

        The steps of an attempt increase. An attempt begins with a file whose first step was recorded before.

        Raises
        ------
        Unreadable
            If a record is damaged, or if steps of a file do not increase.
        InputError
            If files have different tensors.
        """
        attempt, last = 0, -1
        for path in ledger_files(self.folder).values():
            found = _header(path)
            if found is None:
                continue
            header, start = found
            self._require_same_tensors(path, header)
            groups = [tensor.group for tensor in header.tensors]
            first = True
            for records in _records(path, header, start):
                steps = records["step"]
                if first and steps[0] <= last:
                    attempt += 1
                first, last = False, int(steps[-1])
                yield RecordedUpdates(
                    path,
                    steps.astype(np.int64),
                    records["span"].astype(np.int64),
                    attempt,
                    (records["flags"] & SKIPPED) != 0,
                    records["loss"].astype(np.float64),
                    records["rates"][:, groups].astype(np.float64),
                    records["ratio"].astype(np.float64),
                    unpacked(records["gram"]),
                )

    def no_states(self) -> InputError:
        """Return the error for a log of ledgers where a log of states is needed. It checks all records."""
        count, first, last, attempt = 0, None, 0, 0
        for block in self.updates():
            count, last, attempt = count + len(block.steps), int(block.steps[-1]), block.attempt
            first = int(block.steps[0]) if first is None else first
        extent = "" if first is None else f", from step {first} to {last}"
        extent += f" in {attempt + 1} attempts" if attempt else ""
        return InputError(
            f"a log of ledgers contains no states: it has {count} updates{extent}, of {len(self.layout.names)} "
            f"tensors with {self.layout.elements} elements",
            where=str(self.folder),
            why='natgrad.watch recorded the inner products of each update (mode="ledger"), which this version of '
            "natgrad records and checks, but does not process",
            remedy='record states to process them (natgrad.watch with mode="full")',
        )

    def _require_same_tensors(self, path: Path, header: LedgerHeader) -> None:
        def described(one: LedgerHeader) -> dict[str, tuple[tuple[int, ...], str]]:
            return {tensor.name: (tensor.shape, tensor.dtype) for tensor in one.tensors}

        before, now = described(self.header), described(header)
        if list(before.items()) != list(now.items()):
            differing = sorted(dict(before.items() ^ now.items())) or ["the order of the tensors"]
            raise InputError(
                f"the tensors differ from those before: {', '.join(differing[:4])}",
                where=str(path),
                why="the training was resumed with another model, or with other parameters to record",
                remedy="move this file and later ones to another folder, as a separate run",
            )


def holds_ledgers(path: Path) -> bool:
    """Return True for a folder that contains a log of ledgers."""
    return path.is_dir() and bool(ledger_files(path))


def _header(path: Path) -> tuple[LedgerHeader, int] | None:
    """Return the header of a file and its size; None if it is not complete yet."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = file.read(1 << 16)
            found = LedgerHeader.from_bytes(data)
            if found is None and len(data) == 1 << 16:
                found = LedgerHeader.from_bytes(data + file.read(_HEADER_BYTES))
            return found
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise Unreadable(
            f"cannot read a log of ledgers: {error}",
            where=str(path),
            why="the file is damaged, or not written by natgrad.watch",
            remedy="restore the file, or move it out of the folder",
        ) from error


def _records(path: Path, header: LedgerHeader, start: int) -> Iterator[NDArray[np.void]]:
    """Yield the complete records of a file, some at a time."""
    size, previous, position = header.record.itemsize, -1, 0
    with os.fdopen(open_regular(path), "rb") as file:
        while True:
            # The file may have grown since its end was read.
            file.seek(start + position * size)
            data = file.read(max(_BLOCK_BYTES // size, 1) * size)
            count = len(data) // size
            if not count:
                return
            view = memoryview(data)
            valid = [is_valid(view[index * size : (index + 1) * size]) for index in range(count)]
            good = valid.index(False) if False in valid else count
            records = np.frombuffer(data, header.record, good)
            steps = np.concatenate([[previous], records["step"]])
            if not (np.diff(steps) > 0).all():
                index = int(np.argmin(np.diff(steps) > 0))
                raise _damaged(path, f"step {steps[index + 1]} follows step {steps[index]}")
            if good:
                yield records
                previous = int(steps[-1])
            position += good
            if good < count:
                if True in valid[good:] or _any_valid(file, size):
                    raise _damaged(path, f"record {position} has a wrong checksum; it follows step {previous}")
                return


def _any_valid(file: IO[bytes], size: int) -> bool:
    """Return True if a later record is complete."""
    while len(data := file.read(size)) == size:
        if is_valid(data):
            return True
    return False


def _damaged(path: Path, what: str) -> Unreadable:
    return Unreadable(
        f"a log of ledgers is damaged: {what}",
        where=str(path),
        why="the file was changed after it was written, or the disk is damaged",
        remedy="restore the file from a copy",
    )
