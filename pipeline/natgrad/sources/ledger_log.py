"""Read a log of ledgers, which a training loop writes with `natgrad.watch` (mode="ledger").

The log is a folder of files ``ledger_<k>.log``, one for each process that trained the run; see
`natgrad.schema.ledger_log`. It contains updates, not states: a step of the log has the inner products of the update
from it, and the last step is the one to which the last update leads.

The log can be read while it grows: incomplete records at the end of a file are ignored until they are complete. A
damaged record before others is an error. A resumed run that repeats updates bit for bit continues the run. From the
first other update on, the updates of the new file replace those of the files before it, which `LedgerLog.earlier`
still has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE
from natgrad.schema.ledger_log import SKIPPED as SKIPPED_FLAG
from natgrad.schema.ledger_log import LedgerHeader, is_valid, ledger_names, unpacked
from natgrad.schema.names import RECORDED_VECTORS, SKIPPED, STATES
from natgrad.sources.base import ListedBefore, StepContent
from natgrad.sources.optimizers.state import OptimizerState
from natgrad.sources.steps import LoggedStep, LoggedTensor, NotYet, Unreadable, vanished, where
from natgrad.storage import LocalStorage, Storage, network_errors

__all__ = ["LedgerLog", "holds_ledgers"]

_START_BYTES, _HEADER_BYTES = 1 << 16, 1 << 28
"""Bytes that contain most headers, and maximum size of one. A description of a million tensors takes half of it."""

_BLOCK_BYTES = 4 * MEBIBYTE
"""Bytes that are read together, because a request to an object store takes long."""

_SPAN = 1
"""Number of steps of an update. Steps that are further apart are not connected."""

_START = np.dtype([("step", "<i8"), ("span", "<u4")])
"""The first fields of a record."""

_CHECKSUM_BYTES = 4
"""Size of the last field of a record."""

_PARAMETER, _GRADIENT = STATES[:2]


def holds_ledgers(location: Path | Storage) -> bool:
    """Return True for a folder that contains a log of ledgers."""
    return bool(ledger_names(_storage(location).list()))


def _storage(location: Path | Storage) -> Storage:
    return LocalStorage(location) if isinstance(location, Path) else location


class _Blocks:
    """Ranges of files, of which the last block is kept."""

    def __init__(self) -> None:
        self._file: Storage | None = None
        self._start, self._content = 0, b""

    def read(self, file: Storage, start: int, size: int, block: int = _BLOCK_BYTES) -> bytes:
        """Return a range of a file, which is shorter if the file ends in it."""
        if file != self._file or not 0 <= start - self._start <= len(self._content) - size:
            with network_errors(file):
                (self._content,) = file.get_ranges([(start, start + max(size, block))])
            self._file, self._start = file, start
        first = start - self._start
        return self._content[first : first + size]

    def clear(self) -> None:
        """Forget the last block: a file that grows has other bytes at its end later."""
        self._file, self._content = None, b""


@dataclass(frozen=True)
class _File:
    """A file of the log, its header, and the position of its first record."""

    storage: Storage
    header: LedgerHeader
    start: int

    def position(self, index: int) -> int:
        """Return the position of a record."""
        return self.start + index * self.header.record.itemsize


@dataclass(frozen=True)
class _Record:
    """The record of an update: its file and index, the number of its step and its checksum."""

    file: _File
    index: int
    step: int
    checksum: int

    def read(self, blocks: _Blocks, step: LoggedStep) -> np.void:
        """Read the record, and compare it with its checksum."""
        dtype = self.file.header.record
        try:
            data = blocks.read(self.file.storage, self.file.position(self.index), dtype.itemsize)
        except FileNotFoundError as error:
            raise vanished("the file of this update disappeared", step) from error
        if (
            len(data) < dtype.itemsize
            or not is_valid(data)
            or int.from_bytes(data[-_CHECKSUM_BYTES:], "little") != self.checksum
        ):
            raise _damaged(self.file.storage, f"the record of step {step.number} has a wrong checksum")
        record: np.void = np.frombuffer(data, dtype)[0]
        return record


class LedgerLog:
    """A log of ledgers; see `natgrad.sources.base.Source`.

    Parameters
    ----------
    folder : Path or Storage
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

    def __init__(self, folder: Path | Storage, mapping: Mapping[str, str] | None = None) -> None:
        self.location = _storage(folder)
        if mapping:
            raise InputError(
                "a log of ledgers has no keys to map",
                where=str(folder),
                why="natgrad.watch wrote it with fixed names",
                remedy="omit --map",
            )
        if not holds_ledgers(self.location):
            raise InputError(
                "there are no ledgers (ledger_<k>.log)",
                where=str(folder),
                remedy='pass the folder of natgrad.watch with mode="ledger"',
            )
        self._blocks = _Blocks()
        files = self._files()
        if not files:
            raise self._not_yet()
        self.header = files[0].header
        # By number and content, because a sweep adds its run to a step.
        self._records: dict[tuple[int, str], _Record] = {}
        self._ends: set[tuple[int, str]] = set()

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
            where=str(self.location),
            why="the training has just begun",
            remedy="run again later",
        )

    def _files(self) -> list[_File]:
        """Return the files with a complete header, in order."""
        self._blocks.clear()
        found: list[_File] = []
        for name in ledger_names(self.location.list()).values():
            storage = self.location / name
            header = self._header(storage)
            if header is not None:
                found.append(_File(storage, *header))
                _require_same_tensors(storage, found[0].header, found[-1].header)
        return found

    def _header(self, file: Storage) -> tuple[LedgerHeader, int] | None:
        """Return the header of a file and its size; None if it is not complete yet."""
        try:
            data = self._blocks.read(file, 0, _START_BYTES, _START_BYTES)
            found = LedgerHeader.from_bytes(data)
            if found is None and len(data) == _START_BYTES:
                found = LedgerHeader.from_bytes(self._blocks.read(file, 0, _HEADER_BYTES))
            return found
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise Unreadable(
                f"cannot read a log of ledgers: {error}",
                where=str(file),
                why="the file is damaged, or not written by natgrad.watch",
                remedy="restore the file, or move it out of the folder",
            ) from error

    def _listed(self, file: _File) -> Iterator[_Record]:
        """Yield the complete records of a file."""
        size = file.header.record.itemsize
        with network_errors(file.storage):
            count = (file.storage.stat().size - file.start) // size
        while count > 0 and not is_valid(self._blocks.read(file.storage, file.position(count - 1), size, size)):
            count -= 1  # incomplete records at the end
        # The end of a record and the start of the next one are read together.
        previous, before = -1, self._blocks.read(file.storage, file.start, _START.itemsize)
        for index in range(count):
            end = file.position(index + 1) - _CHECKSUM_BYTES
            after = self._blocks.read(file.storage, end, _CHECKSUM_BYTES + _START.itemsize)
            start = np.frombuffer(before, _START)[0]
            step = int(start["step"])
            if step <= previous:
                raise _damaged(file.storage, f"step {step} follows step {previous}")
            if start["span"] != _SPAN:
                raise _damaged(file.storage, f"the update of step {step} takes {start['span']} steps")
            yield _Record(file, index, step, int.from_bytes(after[:_CHECKSUM_BYTES], "little"))
            previous, before = step, after[_CHECKSUM_BYTES:]

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
        *_, records = self._histories()
        if not records:
            raise self._not_yet()
        self._records.clear()
        self._ends.clear()
        return self._steps(records)

    def earlier(self) -> list[ListedBefore]:
        """Return the log as it was before each restart; see `natgrad.sources.base.Restarted`."""
        *before, _ = self._histories()
        return [ListedBefore(self, self._steps(records)) for records in before]

    def _histories(self) -> list[dict[int, _Record]]:
        """Return the records by step: those before each restart, and the current ones."""
        found: list[dict[int, _Record]] = []
        records: dict[int, _Record] = {}
        for file in self._files():
            differs = False
            for record in self._listed(file):
                known = records.get(record.step)
                if not differs and known is not None and known.checksum == record.checksum:
                    continue
                if not differs and records and record.step <= next(reversed(records)):
                    found.append(records)
                    records = {number: one for number, one in records.items() if number < record.step}
                differs = True
                records[record.step] = record
        self._blocks.clear()
        return [*found, records]

    def _steps(self, records: Mapping[int, _Record]) -> list[LoggedStep]:
        found = []
        for number, record in records.items():
            found.append(_step(number, record, f"{record.checksum:08x}"))
            self._records[number, found[-1].content] = record
            if number + _SPAN not in records:
                found.append(_step(number + _SPAN, record, f"after {record.checksum:08x}"))
        self._ends.add((found[-1].number, found[-1].content))
        return found

    @contextmanager
    def open(self, step: LoggedStep) -> Iterator[_LedgerStep]:
        """Open a step; see `natgrad.sources.base.Source`."""
        if not self._ends:
            self.steps()
        # A state without an update from it has no gradient. Only the last state of a run may lack it; others have
        # the gradient NaN, and belong to no update as a start.
        key = step.number, step.content
        names = (_PARAMETER,) if key in self._ends else (_PARAMETER, _GRADIENT)
        arrays = dict(zip(names, self._arrays, strict=False))
        yield _LedgerStep(step, self._records.get(key), self._blocks, arrays, self.header.evaluation)


def _step(number: int, record: _Record, content: str) -> LoggedStep:
    file = record.file.storage
    return LoggedStep(
        number, file, content=content, origin=f"record {record.index} of {file.name!r}", step_span=_SPAN
    )


class _LedgerStep:
    """Reader of one step."""

    def __init__(
        self,
        step: LoggedStep,
        record: _Record | None,
        blocks: _Blocks,
        arrays: Mapping[str, Mapping[str, LoggedTensor]],
        evaluation: str,
    ) -> None:
        self._step, self._listed, self._blocks = step, record, blocks
        self._arrays, self._evaluation = arrays, evaluation

    @cached_property
    def _record(self) -> np.void | None:
        return None if self._listed is None else self._listed.read(self._blocks, self._step)

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


def _require_same_tensors(file: Storage, first: LedgerHeader, other: LedgerHeader) -> None:
    def described(one: LedgerHeader) -> dict[str, tuple[tuple[int, ...], str]]:
        return {tensor.name: (tensor.shape, tensor.dtype) for tensor in one.tensors}

    before, now = described(first), described(other)
    if list(before.items()) != list(now.items()):
        differing = sorted(dict(before.items() ^ now.items())) or ["the order of the tensors"]
        raise InputError(
            f"the tensors differ from those before: {', '.join(differing[:4])}",
            where=str(file),
            why="the training was resumed with another model, or with other parameters to record",
            remedy="move this file and later ones to another folder, as a separate run",
        )


def _damaged(file: Storage, what: str) -> Unreadable:
    return Unreadable(
        f"a log of ledgers is damaged: {what}",
        where=str(file),
        why="the file was changed after it was written, or the disk is damaged",
        remedy="restore the file from a copy",
    )
