"""Read all scalars of TensorBoard event files: records with checksums, each a protocol buffer.

A record consists of its length (8 bytes), the masked CRC-32C of the length, the data, and the masked CRC-32C of the
data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from crc32c import crc32c

from natgrad.sources.scalars.protocol_buffer import BYTES, FIXED32, FIXED64, VARINT, fields
from natgrad.sources.scalars.scalar_log import RESTART_KEY, RUN_KEY
from natgrad.storage import NotRegularError, Storage

__all__ = ["event_files", "read_events", "read_run_events"]

DATA_LIMIT = 1 << 26
"""Default size above which a record is assumed to be an image or graph. Only its checksum is verified."""
_READ_BLOCK = 1 << 20
_STEP, _SUMMARY, _SESSION, _VALUE, _TAG, _SIMPLE, _TENSOR = 2, 5, 7, 1, 1, 2, 8
_STATUS, _START = 1, 1
_TENSOR_DTYPE, _TENSOR_CONTENT = 1, 4
_DTYPES = {1: ("<f4", 5, FIXED32), 2: ("<f8", 6, FIXED64)}
"""Tensor dtypes DT_FLOAT and DT_DOUBLE: NumPy dtype, and field and wire type of their values."""


def event_files(location: Storage) -> list[Storage]:
    """Return the event files at or in a location, sorted by the time at which they were started.

    If a folder contains none, the files in its folders are returned.
    """
    found = location.files()
    if found == [location]:
        return found if _is_event_file(location) else []
    named = [file for file in found if "tfevents" in file.name]
    if not named:
        folders = [entry for name in location.list() if (entry := location / name).is_folder()]
        named = [file for folder in folders for file in folder.files() if "tfevents" in file.name]
    return [file for _, file in sorted((_start_time(file), file) for file in named)]


def _is_event_file(file: Storage) -> bool:
    with file.open() as content:
        start = content.read(12)
    return len(start) == 12 and _masked(crc32c(start[:8])) == int.from_bytes(start[8:], "little")


def _start_time(file: Storage) -> float:
    """Return the time of the first record, for sorting the files of a folder: file names contain only seconds."""
    try:
        for record in _records(file, []):
            for number, kind, value in fields(record):
                if number == 1 and kind == FIXED64:
                    return float(struct.unpack("<d", value)[0])
            break
    except NotRegularError:
        pass  # reading it is refused, with the reason
    return 0.0


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _records(log: Storage, notes: list[str], limit: int = DATA_LIMIT) -> Iterator[bytes]:
    """Yield the data of the records. A truncated last record is omitted, with a note."""
    with log.open() as file:
        file.widen()
        size, position = file.seek(0, os.SEEK_END), file.seek(0)
        while position < size:
            head = file.read(12)
            length = int.from_bytes(head[:8], "little")
            if len(head) == 12 and _masked(crc32c(head[:8])) != int.from_bytes(head[8:], "little"):
                raise ValueError(f"checksum mismatch in the length of the record at byte {position}")
            if len(head) < 12 or position + 12 + length + 4 > size:
                notes.append(f"the last record of {log.name} is truncated and omitted: it is still being written")
                return
            crc, blocks, rest = 0, [], length
            while rest:
                block = file.read(min(rest, _READ_BLOCK))
                if not block:
                    raise EOFError("the file was truncated while it was read")
                crc, rest = crc32c(block, crc), rest - len(block)
                blocks += [block] if length <= limit else []
            if _masked(crc) != int.from_bytes(file.read(4), "little"):
                raise ValueError(f"checksum mismatch in the record at byte {position}")
            yield b"".join(blocks)
            position += 12 + length + 4


def read_events(
    log: Storage, wanted: Callable[[str], bool], notes: list[str], *, data_limit: int = DATA_LIMIT
) -> Iterator[Mapping[str, Any]]:
    """Yield the scalars of an event file: ``step``, and the value of each tag; and the starts of sessions.

    A writer that resumes a run (``purge_step``) logs the start of a session at the step from which it continues.
    """
    for data in _records(log, notes, data_limit):
        step, summaries, starts = 0, [], False
        for number, kind, value in fields(data):
            if (number, kind) == (_STEP, VARINT):
                step = value - (1 << 64) if value >> 63 else value
            elif (number, kind) == (_SUMMARY, BYTES):
                summaries.append(value)
            elif (number, kind) == (_SESSION, BYTES):
                starts = (_STATUS, VARINT, _START) in fields(value)
        if starts:
            yield {RESTART_KEY: step}
        values: dict[str, float] = {}
        for summary in summaries:
            for number, kind, value in fields(summary):
                if (number, kind) == (_VALUE, BYTES):
                    tag, scalar = _scalar(value)
                    if scalar is not None and wanted(tag):
                        values[tag] = scalar
        if values:
            yield {**values, "step": step}


def read_run_events(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the scalars of an event file with the name of its folder, which is that of the run."""
    for record in read_events(log, wanted, notes):
        yield {**record, RUN_KEY: log.parent.name}


def _scalar(data: bytes) -> tuple[str, float | None]:
    """Return the tag and the value of a summary. The value is None if it is not a scalar float."""
    tag, scalar = "", None
    for number, kind, value in fields(data):
        if (number, kind) == (_TAG, BYTES):
            tag = value.decode()
        elif (number, kind) == (_SIMPLE, FIXED32):
            scalar = float(struct.unpack("<f", value)[0])
        elif (number, kind) == (_TENSOR, BYTES):
            scalar = _tensor(value)
    return tag, scalar


def _tensor(data: bytes) -> float | None:
    """Return the value of a tensor with one float, or None for other tensors."""
    found = list(fields(data))
    dtype = next((value for number, kind, value in found if (number, kind) == (_TENSOR_DTYPE, VARINT)), 0)
    if dtype not in _DTYPES:
        return None
    name, field, single = _DTYPES[dtype]
    # The values are a single one, several packed ones, or the bytes of all.
    content = [
        value
        for number, kind, value in found
        if (number, kind) in ((field, single), (field, BYTES), (_TENSOR_CONTENT, BYTES))
    ]
    words = b"".join(content)
    return float(np.frombuffer(words, name)[0]) if len(words) == np.dtype(name).itemsize else None
