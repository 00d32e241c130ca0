"""Read all scalars of TensorBoard event files: records with checksums, each a protocol buffer.

A record consists of its length (8 bytes), the masked CRC-32C of the length, the data, and the masked CRC-32C of the
data.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from natgrad.sources.scalars.columns import RESTART_KEY, RUN_KEY, Batch, Decoded, Values, spread, with_column
from natgrad.sources.scalars.protocol_buffer import (
    BYTES,
    FIXED32,
    FIXED64,
    VARINT,
    fields,
    fields_of_all,
    in_groups,
)
from natgrad.storage import NotRegularError, Storage

__all__ = ["event_files", "read_events", "read_run_events"]

DATA_LIMIT = 1 << 26
"""Default size above which a record is assumed to be an image or graph. Only its checksum is verified."""
_READ_BLOCK = 1 << 20
_HEAD, _CRC, _CRC_SIZE, _MASK = struct.Struct("<QI"), struct.Struct("<I"), 4, 0xA282EAD8
_RECORD = _HEAD.size + _CRC_SIZE
"""Bytes of a record in addition to its data."""
_CELLS = 8
"""Cells of a batch for each value in its records, above which the records are decoded one by one."""

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
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF


def _records(log: Storage, notes: list[str], limit: int = DATA_LIMIT) -> Iterator[bytes]:
    """Yield the data of the records. A truncated last record is omitted, with a note."""
    with log.open() as file:
        file.widen()
        size, position = file.seek(0, os.SEEK_END), file.seek(0)
        block = file.read(_READ_BLOCK)
        while True:
            parsed = 0
            for end, data in _records_in(block, position, limit):
                yield data
                parsed = end
            position, block = position + parsed, block[parsed:]
            if position >= size:
                return
            length = int.from_bytes(block[:8], "little")
            if len(block) >= _HEAD.size and position + _RECORD + length > size:
                break
            if len(block) < _HEAD.size or length <= _READ_BLOCK:
                more = file.read(_READ_BLOCK)
                if not more:
                    break
                block += more
                continue
            data, foot = block[_HEAD.size : _HEAD.size + length], block[_HEAD.size + length :]
            crc, blocks, rest = crc32c(data), [data], length - len(data)
            while rest and (data := file.read(min(rest, _READ_BLOCK))):
                crc, rest = crc32c(data, crc), rest - len(data)
                blocks += [data] if length <= limit else []
            foot += file.read(_CRC_SIZE - len(foot))
            if rest or _masked(crc) != int.from_bytes(foot, "little"):
                raise ValueError(f"checksum mismatch in the record at byte {position}")
            yield b"".join(blocks) if length <= limit else b""
            position, block = position + _RECORD + length, file.read(_READ_BLOCK)
        notes.append(f"the last record of {log.name} is truncated and omitted: it is still being written")


def _records_in(block: bytes, position: int, limit: int) -> Iterator[tuple[int, bytes]]:
    """Yield the end and the data of each complete record of a block, which starts at a position of the file."""
    start, known = 0, dict[bytes, int]()
    while start + _HEAD.size <= len(block):
        head = block[start : start + _HEAD.size]
        length = known.get(head)
        if length is None:  # records of one tag often have one length
            length, crc = _HEAD.unpack(head)
            if _masked(crc32c(head[:8])) != crc:
                raise ValueError(f"checksum mismatch in the length of the record at byte {position + start}")
            known[head] = length
        end = start + _RECORD + length
        if end > len(block):
            return
        data = block[start + _HEAD.size : end - _CRC_SIZE]
        crc = crc32c(data)
        if ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF != _CRC.unpack_from(block, end - _CRC_SIZE)[0]:
            raise ValueError(f"checksum mismatch in the record at byte {position + start}")
        start = end
        yield end, data if length <= limit else b""


def read_events(
    log: Storage, wanted: Callable[[str], bool], notes: list[str], *, data_limit: int = DATA_LIMIT
) -> Decoded:
    """Yield the scalars of an event file: ``step``, and the value of each tag; and the starts of sessions.

    A writer that resumes a run (``purge_step``) logs the start of a session at the step from which it continues.
    """
    for records in in_groups(_records(log, notes, data_limit)):
        batch = _batch(records, wanted)
        if batch is not None:
            yield batch
            continue
        for record in records:
            yield from _scalars(record, wanted)


def _batch(records: Sequence[bytes], wanted: Callable[[str], bool]) -> Batch | None:
    """Return the scalars in records; None if they must be decoded one by one."""
    data, sizes = b"".join(records), np.array(list(map(len, records)), np.int64)
    stops = np.cumsum(sizes)
    try:
        events = fields_of_all(data, stops - sizes, stops)
        summaries = events.of(_SUMMARY, BYTES)
        found = fields_of_all(data, summaries.start, summaries.stop).of(_VALUE, BYTES)
        parts = fields_of_all(data, found.start, found.stop)
        steps, tags = events.of(_STEP, VARINT), parts.of(_TAG, BYTES)
        singles, tensors = parts.of(_SIMPLE, FIXED32), parts.of(_TENSOR, BYTES)
        are_repeated = any((np.diff(each.message) == 0).any() for each in (steps, tags, singles, tensors))
        has_both = np.isin(singles.message, tensors.message).any()
        if (
            are_repeated
            or has_both
            or len(tags.message) < len(found.message)
            or len(events.of(_SESSION, BYTES).message)
        ):
            return None
        names = tags.contents(data)
        known = {name: name.decode() for name in dict.fromkeys(names)}
        chosen = {name: key for name, key in known.items() if wanted(key)}
        values, are_scalars = np.zeros(len(names)), np.zeros(len(names), bool)
        values[singles.message] = np.frombuffer(b"".join(singles.contents(data)), "<f4")
        are_scalars[singles.message] = True
        for value, content in zip(tensors.message.tolist(), tensors.contents(data), strict=True):
            scalar = _tensor(content) if names[value] in chosen else None
            values[value], are_scalars[value] = (0.0, False) if scalar is None else (scalar, True)
        codes = {name: code for code, name in enumerate(known)}
        code_of_value = np.array([codes[name] for name in names], np.int64)
        are_scalars &= np.isin(code_of_value, [codes[name] for name in chosen])
        used, row_of_value = np.unique(summaries.message[found.message[are_scalars]], return_inverse=True)
        if len(chosen) * len(used) > _CELLS * len(names):
            return None
        values, code_of_value = values[are_scalars], code_of_value[are_scalars]
        columns: dict[str, Values] = {}
        for name, key in chosen.items():
            own = np.flatnonzero(code_of_value == codes[name])
            if len(own):
                columns[key] = spread(values[own], row_of_value[own], len(used))
    except ValueError:
        return None
    step_of_event = np.zeros(len(records))
    step_of_event[steps.message] = steps.value.view(np.int64)
    return Batch(len(used), columns | {"step": step_of_event[used]})


def _scalars(data: bytes, wanted: Callable[[str], bool]) -> Iterator[Mapping[str, Any]]:
    """Yield the scalars of a record, and the start of a session."""
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


def read_run_events(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Decoded:
    """Yield the scalars of an event file with the name of its folder, which is that of the run."""
    return with_column(read_events(log, wanted, notes), RUN_KEY, log.parent.name)


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
