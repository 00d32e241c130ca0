"""Read the W&B file of a run, ``run-<id>.wandb``: records in the blocks of a LevelDB log, each a protocol buffer.

The file starts with a header of seven bytes and is divided into blocks of 32 KiB. A record is stored in one
fragment, or in several if it crosses block boundaries. A fragment consists of the CRC-32 of its type and data (4
bytes), the length of the data (2), the type (1) and the data. If the rest of a block is too short for a fragment,
it is filled with zeros.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from natgrad.sources.bounds import parse_json, shown
from natgrad.sources.scalars.protocol_buffer import BYTES, FIXED64, VARINT, fields
from natgrad.sources.scalars.scalar_log import RUN_KEY
from natgrad.storage import NotRegularError, Storage

__all__ = ["WANDB_START", "read_wandb", "read_wandb_run", "wandb_files"]

WANDB_START = b":W&B\xe1\xbe\x00"
"""First bytes of a file: magic number, and version of the layout."""

_BLOCK, _HEAD = 1 << 15, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_RECORD_LIMIT = 1 << 26
"""Longer records are not decoded; only their checksums are verified."""

_HISTORY, _ITEM, _STEP, _NUMBER = 2, 1, 2, 1
_KEY, _NESTED_KEY, _INTEGER, _FLOAT, _JSON = 1, 2, 5, 6, (8, 16)


def _fragments(log: Storage, notes: list[str]) -> Iterator[tuple[int, int, bytes]]:
    """Yield position, type and data of the fragments. A truncated last fragment is omitted, with a note."""
    with log.open() as file:
        file.widen()
        size, position = file.seek(0, os.SEEK_END), file.seek(len(WANDB_START))
        while position < size:
            space = _BLOCK - position % _BLOCK
            if space < _HEAD:
                if any(file.read(space)):
                    raise ValueError(f"there are data at byte {position}, where no fragment fits")
                position += space
                continue
            head = file.read(_HEAD)
            if len(head) < _HEAD:
                break
            if not any(head):
                # The writer has allocated the zeros at the end of the file but not filled them yet.
                while rest := file.read(_BLOCK):
                    if any(rest):
                        raise ValueError(f"there are zeros at byte {position} instead of a fragment")
                break
            crc, count, kind = struct.unpack("<IHB", head)
            if count > space - _HEAD:
                raise ValueError(f"the fragment at byte {position} crosses the end of its block")
            data = file.read(count)
            if len(data) < count:
                break
            if zlib.crc32(data, zlib.crc32(head[-1:])) != crc:
                raise ValueError(f"checksum mismatch in the fragment at byte {position}")
            yield position, kind, data
            position += _HEAD + count
        else:
            return
        notes.append(f"the last record of {log.name} is truncated and omitted: it is still being written")


def _records(log: Storage, notes: list[str]) -> Iterator[bytes]:
    """Yield the data of the records. Records that are too long yield no data."""
    record, length = bytearray(), 0
    continues, notes_before = False, len(notes)
    for position, kind, data in _fragments(log, notes):
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or continues != (kind in (_MIDDLE, _LAST)):
            raise ValueError(f"the fragment at byte {position} has type {kind}, which is not valid there")
        if not continues:
            record, length = bytearray(), 0
        length += len(data)
        if length <= _RECORD_LIMIT:
            record += data
        continues = kind in (_FIRST, _MIDDLE)
        if not continues:
            yield bytes(record) if length <= _RECORD_LIMIT else b""
    if continues and len(notes) == notes_before:
        notes.append(f"the last record of {log.name} is truncated and omitted: it is still being written")


def wandb_files(location: Storage) -> list[Storage]:
    """Return the W&B file at a location, or those of all runs in W&B's folder ``wandb``, in the order started."""
    if not location.is_folder():
        return [location] if _is_run_file(location) else []
    # Names are run-<time>-<id> or offline-run-<time>-<id>; latest-run is a link to one of them.
    names = [name for name in location.list() if name.startswith(("run-", "offline-run-"))]
    return [
        file
        for name in sorted(names, key=lambda name: name.removeprefix("offline-"))
        if (location / name).is_folder()
        for file in (location / name).files()
        if _is_run_file(file)
    ]


def _is_run_file(file: Storage) -> bool:
    if file.suffix != ".wandb":
        return False
    try:
        with file.open() as content:
            return content.read(len(WANDB_START)) == WANDB_START
    except NotRegularError:
        return True  # reading it is refused, with the reason


def read_wandb_run(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the history of a run with its name, which is in the name of the file ``run-<id>.wandb``."""
    run = log.stem.removeprefix("run-")
    for record in read_wandb(log, wanted, notes):
        yield {**record, RUN_KEY: run}


def read_wandb(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the history of a run: the values logged at each ``_step``. Nested keys are joined by slashes."""
    with log.open() as file:
        file.widen()
        if file.read(len(WANDB_START)) != WANDB_START:
            raise ValueError("it does not start with the header of a W&B run file of the supported version")
    for record in _records(log, notes):
        for number, kind, value in fields(record):
            if (number, kind) == (_HISTORY, BYTES):
                yield _history(value, wanted)


def _history(data: bytes, wanted: Callable[[str], bool]) -> dict[str, Any]:
    values: dict[str, Any] = {"_step": 0}
    logged_keys: set[str] = set()
    for number, kind, value in fields(data):
        if (number, kind) == (_ITEM, BYTES):
            key, logged = _item(value)
            if wanted(key) or key == "_step":
                if key in logged_keys:
                    raise ValueError(f"a record contains {shown(key)} twice")
                logged_keys.add(key)
                values[key] = logged()
        elif (number, kind) == (_STEP, BYTES):
            values["_step"] = next(
                (n for field, wire_type, n in fields(value) if (field, wire_type) == (_NUMBER, VARINT)), 0
            )
    return values


def _item(data: bytes) -> tuple[str, Callable[[], Any]]:
    """Return the key of an item and a function that decodes its value (None if it is not a number or text)."""
    keys: list[str] = []
    read: Callable[[], Any] = lambda: None  # noqa: E731
    for number, kind, value in fields(data):
        if number in (_KEY, _NESTED_KEY) and kind == BYTES:
            keys.append(value.decode())
        elif number in _JSON and kind == BYTES:
            read = partial(_decode_json, value)
        elif (number, kind) == (_FLOAT, FIXED64):
            read = partial(lambda words: struct.unpack("<d", words)[0], value)
        elif (number, kind) == (_INTEGER, VARINT):
            # Zigzag encoding: the lowest bit is the sign.
            read = partial(lambda word: (word >> 1) ^ -(word & 1), value)
    return "/".join(keys), read


def _decode_json(text: bytes) -> Any:
    return parse_json(text, "a value")
