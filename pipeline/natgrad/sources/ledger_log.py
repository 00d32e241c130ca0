"""Read a log of ledgers, which a training loop writes with `natgrad.watch` (mode="ledger").

The log is a folder of files ``ledger_<k>.log``, one for each process that trained the run; see
`natgrad.schema.ledger_log`. It contains updates, not states: a step of the log has the inner products of the update
from it, and the last step is the one to which the last update leads.

The log can be read while it grows: incomplete records at the end of a file are ignored until they are complete. A
damaged record before others is an error. A resumed run that repeats updates bit for bit continues the run. From the
first other update on, the updates of the new file replace those of the files before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.ledger_log import SKIPPED as SKIPPED_FLAG
from natgrad.schema.ledger_log import LedgerHeader, is_valid, ledger_files, unpacked
from natgrad.schema.names import RECORDED_VECTORS, SKIPPED, STATES
from natgrad.sources.base import StepContent
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, Unreadable, vanished, where
from natgrad.storage import LocalStorage, open_regular

__all__ = ["LedgerLog", "holds_ledgers"]

_HEADER_BYTES = 1 << 28
"""Maximum size of a header. A description of a million tensors takes half of it."""

_SPAN = 1
"""Number of steps of an update. Steps that are further apart are not connected."""

_START = np.dtype([("step", "<i8"), ("span", "<u4")])
"""The first fields of a record."""

_CHECKSUM_BYTES = 4
"""Size of the last field of a record."""

_PARAMETER, _GRADIENT = STATES[:2]


def holds_ledgers(path: Path) -> bool:
    """Return True for a folder that contains a log of ledgers."""
    return path.is_dir() and bool(ledger_files(path))


@dataclass(frozen=True)
class _File:
    """A file of the log, its header, and the position of its first record."""

    path: Path
    header: LedgerHeader
    start: int


@dataclass(frozen=True)
class _Record:
    """The record of an update: its file and position, its number and its checksum."""

    file: _File
    index: int
    checksum: int

    def read(self, step: LoggedStep) -> np.void:
        """Read the record, and compare it with its checksum."""
        header = self.file.header
        size = header.record.itemsize
        try:
            with os.fdopen(open_regular(self.file.path), "rb") as file:
                data = os.pread(file.fileno(), size, self.file.start + self.index * size)
        except FileNotFoundError as error:
            raise vanished("the file of this update disappeared", step) from error
        if (
            len(data) < size
            or not is_valid(data)
            or int.from_bytes(data[-_CHECKSUM_BYTES:], "little") != (self.checksum)
        ):
            raise _damaged(self.file.path, f"the record of step {step.number} has a wrong checksum")
        record: np.void = np.frombuffer(data, header.record)[0]
        return record


class LedgerLog:
    """A log of ledgers; see `natgrad.sources.base.Source`.

    Parameters
    ----------
    folder : Path
    mapping : mapping, optional
        Not supported: the names in the log are fixed.

    Attributes
    ----------
    location : Storage
    header : LedgerHeader
        That of the first file.

    Raises
    ------
    NotYet
        If the first file has no complete header yet.
    InputError
        If there are no such files, if a header is damaged, or if there is a mapping.
    """

    def __init__(self, folder: Path, mapping: Mapping[str, str] | None = None) -> None:
        self.location = LocalStorage(folder)
        self._folder = folder
        if mapping:
            raise InputError(
                "a log of ledgers has no keys to map",
                where=str(folder),
                why="natgrad.watch wrote it with fixed names",
                remedy="omit --map",
            )
        if not ledger_files(folder):
            raise InputError(
                "there are no ledgers (ledger_<k>.log)",
                where=str(folder),
                remedy='pass the folder of natgrad.watch with mode="ledger"',
            )
        files = self._files()
        if not files:
            raise self._not_yet()
        self.header = files[0].header
        self._records: dict[int, _Record] = {}
        self._repeated = 0

    @cached_property
    def _arrays(self) -> tuple[dict[str, LoggedTensor], dict[str, LoggedTensor]]:
        """Parameters and gradients by name. All steps share these objects."""
        tensors = self.header.tensors
        return (
            {one.name: LoggedTensor(one.shape, one.dtype) for one in tensors},
            {one.name: LoggedTensor(one.shape, one.gradient_dtype) for one in tensors},
        )

    def _not_yet(self) -> NotYet:
        return NotYet(
            "the log contains no update yet",
            where=str(self._folder),
            why="the training has just begun",
            remedy="run again later",
        )

    def _files(self) -> list[_File]:
        """Return the files with a complete header, in order."""
        found: list[_File] = []
        for path in ledger_files(self._folder).values():
            header = _header(path)
            if header is not None:
                found.append(_File(path, *header))
                _require_same_tensors(path, found[0].header, found[-1].header)
        return found

    def steps(self) -> list[LoggedStep]:
        """List the steps; see `natgrad.sources.base.Source`. This reads the start and the end of each record.

        Raises
        ------
        NotYet
            If there is no complete record.
        Unreadable
            If steps of a file do not increase.
        InputError
            If files have different tensors.
        """
        records: dict[int, _Record] = {}
        repeated = 0
        for file in self._files():
            differs = False
            for step, record in _listed(file):
                known = records.get(step)
                if not differs and known is not None and known.checksum == record.checksum:
                    continue
                if not differs and records and step <= next(reversed(records)):
                    kept = {number: one for number, one in records.items() if number < step}
                    repeated += len(records) - len(kept)
                    records = kept
                differs = True
                records[step] = record
        if not records:
            raise self._not_yet()
        self._records, self._repeated = records, repeated
        found = []
        for number, record in records.items():
            found.append(self._step(number, record, f"{record.checksum:08x}"))
            if number + _SPAN not in records:
                found.append(self._step(number + _SPAN, record, f"after {record.checksum:08x}"))
        return found

    def _step(self, number: int, record: _Record, content: str) -> LoggedStep:
        name = record.file.path.name
        return LoggedStep(
            number,
            LocalStorage(record.file.path),
            content=content,
            origin=f"record {record.index} of {name!r}",
            step_span=_SPAN,
        )

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[_LedgerStep]:
        """Open a step; see `natgrad.sources.base.Source`."""
        if not self._records:
            self.steps()
        last = next(reversed(self._records)) + _SPAN
        notes: tuple[str, ...] = ()
        if self._repeated:
            notes = (
                f"the run was restarted: {self._repeated} older updates, which were recorded again later, are "
                "stored only if the log was ingested before the restart",
            )
        # A state without an update from it has no gradient. Only the last state of a run may lack it; others have
        # the gradient NaN, and belong to no update as a start.
        names = (_PARAMETER,) if step.number == last else (_PARAMETER, _GRADIENT)
        arrays = dict(zip(names, self._arrays, strict=False))
        yield _LedgerStep(step, self._records.get(step.number), arrays, notes, self.header.evaluation)


class _LedgerStep:
    """Reader of one step."""

    def __init__(
        self,
        step: LoggedStep,
        record: _Record | None,
        arrays: Mapping[str, Mapping[str, LoggedTensor]],
        notes: tuple[str, ...],
        evaluation: str,
    ) -> None:
        self._step, self._listed, self._arrays = step, record, arrays
        self._notes, self._evaluation = notes, evaluation

    @cached_property
    def _record(self) -> np.void | None:
        return None if self._listed is None else self._listed.read(self._step)

    def content(self) -> StepContent:
        """Describe the step; see `natgrad.sources.base.StepReader`."""
        scalars: dict[str, float] = {}
        optimizer = None
        if self._listed is not None and self._record is not None:
            record, header = self._record, self._listed.file.header
            values = {"loss": float(record["loss"]), SKIPPED: float((record["flags"] & SKIPPED_FLAG) != 0)}
            rates = tuple(record["rates"].tolist())
            if header.groups == 1:
                values["learning_rate"] = rates[0]
            else:
                by_tensor = {one.name: rates[one.group] for one in header.tensors}
                optimizer = OptimizerState(numbers={"tensor_learning_rate": by_tensor}, group_rates=rates)
            scalars = {name: value for name, value in values.items() if not np.isnan(value)}
        return StepContent(
            self._arrays,
            scalars,
            notes=self._notes,
            optimizer=optimizer,
            recorded=RECORDED_VECTORS,
            evaluation=self._evaluation,
        )

    def products(self, tensors: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ledger of the update from this step; see `natgrad.sources.base.Recorded`."""
        if self._listed is None or self._record is None:
            vectors = len(LedgerHeader.vectors)
            return np.full((len(tensors), vectors, vectors), np.nan), np.full(len(tensors), np.nan)
        positions = {one.name: index for index, one in enumerate(self._listed.file.header.tensors)}
        order = [positions[name] for name in tensors]
        gram = unpacked(self._record["gram"].astype(np.float64))
        return gram[order], self._record["ratio"].astype(np.float64)[order]

    def read(self, array: str, tensor: str, start: int, out: NDArray[Any]) -> None:
        """Raise an error: the log has no elements."""
        raise InputError(
            "a log of ledgers contains no states",
            where=where(self._step, array, tensor),
            why='natgrad.watch recorded the inner products of each update (mode="ledger")',
            remedy='record states (natgrad.watch with mode="full")',
        )


def _require_same_tensors(path: Path, first: LedgerHeader, other: LedgerHeader) -> None:
    def described(one: LedgerHeader) -> dict[str, tuple[tuple[int, ...], str]]:
        return {tensor.name: (tensor.shape, tensor.dtype) for tensor in one.tensors}

    before, now = described(first), described(other)
    if list(before.items()) != list(now.items()):
        differing = sorted(dict(before.items() ^ now.items())) or ["the order of the tensors"]
        raise InputError(
            f"the tensors differ from those before: {', '.join(differing[:4])}",
            where=str(path),
            why="the training was resumed with another model, or with other parameters to record",
            remedy="move this file and later ones to another folder, as a separate run",
        )


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


def _listed(file: _File) -> Iterator[tuple[int, _Record]]:
    """Yield the steps of the complete records of a file, and the records."""
    size, previous = file.header.record.itemsize, -1
    with os.fdopen(open_regular(file.path), "rb") as opened:
        descriptor = opened.fileno()
        count = (os.fstat(descriptor).st_size - file.start) // size
        while count > 0 and not is_valid(os.pread(descriptor, size, file.start + (count - 1) * size)):
            count -= 1  # incomplete records at the end
        # The end of a record and the start of the next one are read together.
        before = os.pread(descriptor, _START.itemsize, file.start)
        for index in range(count):
            end = file.start + (index + 1) * size - _CHECKSUM_BYTES
            after = os.pread(descriptor, _CHECKSUM_BYTES + _START.itemsize, end)
            start = np.frombuffer(before, _START)[0]
            step = int(start["step"])
            if step <= previous:
                raise _damaged(file.path, f"step {step} follows step {previous}")
            if start["span"] != _SPAN:
                raise _damaged(file.path, f"the update of step {step} takes {start['span']} steps")
            yield step, _Record(file, index, int.from_bytes(after[:_CHECKSUM_BYTES], "little"))
            previous, before = step, after[_CHECKSUM_BYTES:]


def _damaged(path: Path, what: str) -> Unreadable:
    return Unreadable(
        f"a log of ledgers is damaged: {what}",
        where=str(path),
        why="the file was changed after it was written, or the disk is damaged",
        remedy="restore the file from a copy",
    )
