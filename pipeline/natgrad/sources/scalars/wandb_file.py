"""Read the W&B file of a run, ``run-<id>.wandb``: records in the blocks of a LevelDB log, each a protocol buffer.

The file starts with a header of seven bytes and is divided into blocks of 32 KiB. A record is stored in one
fragment, or in several if it crosses block boundaries. A fragment consists of the CRC-32 of its type and data (4
bytes), the length of the data (2), the type (1) and the data. If the rest of a block is too short for a fragment,
it is filled with zeros.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.sources.bounds import parse_json, shown
from natgrad.sources.scalars.columns import RUN_KEY, Batch, Decoded, Values, spread, with_column
from natgrad.sources.scalars.json_records import json_numbers
from natgrad.sources.scalars.protocol_buffer import BYTES, FIXED64, VARINT, Fields, fields, fields_of_all, in_groups
from natgrad.storage import NotRegularError, Storage

__all__ = ["WANDB_START", "read_wandb", "read_wandb_configuration", "read_wandb_run", "wandb_files"]

WANDB_START = b":W&B\xe1\xbe\x00"
"""First bytes of a file: magic number, and version of the layout."""

_BLOCK, _HEAD = 1 << 15, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_RECORD_LIMIT = 1 << 26
"""Longer records are not decoded; only their checksums are verified."""

_FRAGMENT = struct.Struct("<IHB")
_CRC_OF_TYPE = [zlib.crc32(bytes([kind])) for kind in range(256)]
_CELLS = 4
"""Cells of a batch for each item of its records, above which the records are decoded one by one."""

_HISTORY, _ITEM, _STEP, _NUMBER = 2, 1, 2, 1
_CONFIGURATION, _RUN, _RUN_CONFIGURATION, _UPDATE = 5, 17, 4, 1
_KEY, _NESTED_KEY, _INTEGER, _FLOAT, _JSON = 1, 2, 5, 6, (8, 16)


def _fragments(log: Storage, notes: list[str]) -> Iterator[tuple[int, int, bytes]]:
    """Yield position, type and data of the fragments. A truncated last fragment is omitted, with a note."""
    with log.open() as file:
        file.widen()
        position = file.seek(len(WANDB_START))
        truncated = False
        while not truncated and (block := file.read(_BLOCK - position % _BLOCK)):
            space, start = _BLOCK - position % _BLOCK, 0
            while start < len(block) and space - start >= _HEAD:
                begin = start + _HEAD
                if begin > len(block):
                    truncated = True
                    break
                crc, count, kind = _FRAGMENT.unpack_from(block, start)
                if crc == count == kind == 0:
                    # The writer has allocated the zeros at the end of the file but not filled them yet.
                    zeros = block[start:]
                    while zeros:
                        if zeros.count(0) < len(zeros):
                            raise ValueError(f"there are zeros at byte {position + start} instead of a fragment")
                        zeros = file.read(_BLOCK)
                    truncated = True
                    break
                if count > space - start - _HEAD:
                    raise ValueError(f"the fragment at byte {position + start} crosses the end of its block")
                data = block[begin : begin + count]
                if len(data) < count:
                    truncated = True
                    break
                if zlib.crc32(data, _CRC_OF_TYPE[kind]) != crc:
                    raise ValueError(f"checksum mismatch in the fragment at byte {position + start}")
                yield position + start, kind, data
                start = begin + count
            else:
                if any(block[start:]):
                    raise ValueError(f"there are data at byte {position + start}, where no fragment fits")
            position += len(block)
        if truncated:
            notes.append(f"the last record of {log.name} is truncated and omitted: it is still being written")


def _records(log: Storage, notes: list[str]) -> Iterator[bytes]:
    """Yield the data of the records. Records that are too long yield no data."""
    record, length = bytearray(), 0
    continues, notes_before = False, len(notes)
    for position, kind, data in _fragments(log, notes):
        if kind == _FULL and not continues:
            yield data
            continue
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


def read_wandb_run(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Decoded:
    """Yield the history of a run with its name, which is in the name of the file ``run-<id>.wandb``."""
    return with_column(read_wandb(log, wanted, notes), RUN_KEY, log.stem.removeprefix("run-"))


def read_wandb(log: Storage, wanted: Callable[[str], bool], notes: list[str]) -> Decoded:
    """Yield the history of a run: the values logged at each ``_step``. Nested keys are joined by slashes."""
    with log.open() as file:
        file.widen()
        if file.read(len(WANDB_START)) != WANDB_START:
            raise ValueError("it does not start with the header of a W&B run file of the supported version")
    for records in in_groups(_records(log, notes)):
        batch = _batch(records, wanted)
        if batch is not None:
            yield batch
            continue
        for record in records:
            for number, kind, value in fields(record):
                if (number, kind) == (_HISTORY, BYTES):
                    yield _history(value, wanted)


def _batch(records: Sequence[bytes], wanted: Callable[[str], bool]) -> Batch | None:
    """Return the history in records; None if they must be decoded one by one."""
    data, sizes = b"".join(records), np.array(list(map(len, records)), np.int64)
    stops = np.cumsum(sizes)
    try:
        histories = fields_of_all(data, stops - sizes, stops).of(_HISTORY, BYTES)
        size = len(histories.message)
        found = fields_of_all(data, histories.start, histories.stop)
        items = found.of(_ITEM, BYTES)
        parts = fields_of_all(data, items.start, items.stop)
        names = _item_keys(data, parts, len(items.message))
        known = {name: name.decode() for name in dict.fromkeys(names)}
        chosen = {name: key for name, key in known.items() if wanted(key) or key == "_step"}
        if len(chosen) * size > _CELLS * (len(names) + size):
            return None
        codes = {name: code for code, name in enumerate(known)}
        code_of_item = np.array([codes[name] for name in names], np.int64)
        values = _ItemValues(data, parts, len(names))
        columns: dict[str, Values] = {}
        for name, key in chosen.items():
            own = np.flatnonzero(code_of_item == codes[name])
            columns[key] = spread(values.of(own), items.message[own], size)
        steps = _logged_steps(data, found.of(_STEP, BYTES), size)
        pairs = zip(columns.get("_step", [None] * size), steps, strict=True)
        columns["_step"] = [_same_step(first, second) for first, second in pairs]
    except ValueError:
        return None
    return Batch(size, columns)


def _require_once(messages: NDArray[np.int64]) -> None:
    """Raise ValueError if a message appears twice in increasing ones."""
    if (np.diff(messages) == 0).any():
        raise ValueError("a record contains a field twice")


def _item_keys(data: bytes, parts: Fields, size: int) -> list[bytes]:
    """Return the keys of items, whose parts are joined by slashes."""
    parts = parts.where((parts.kind == BYTES) & ((parts.number == _KEY) | (parts.number == _NESTED_KEY)))
    texts = parts.contents(data)
    if np.array_equal(parts.message, np.arange(size)):
        return texts
    nested: list[list[bytes]] = [[] for _ in range(size)]
    for item, text in zip(parts.message.tolist(), texts, strict=True):
        nested[item].append(text)
    return list(map(b"/".join, nested))


class _ItemValues:
    """The values of items, each of which has at most one.

    Raises
    ------
    ValueError
        If an item has several.
    """

    def __init__(self, data: bytes, parts: Fields, size: int) -> None:
        are_json = (parts.kind == BYTES) & np.isin(parts.number, _JSON)
        are_floats = (parts.kind == FIXED64) & (parts.number == _FLOAT)
        are_integers = (parts.kind == VARINT) & (parts.number == _INTEGER)
        self._data, self._values = data, parts.where(are_json | are_floats | are_integers)
        _require_once(self._values.message)
        self._value_of_item = np.full(size, -1)
        self._value_of_item[self._values.message] = np.arange(len(self._values.message))

    def of(self, items: NDArray[np.int64]) -> list[Any]:
        """Return the values of some items."""
        indices = self._value_of_item[items]
        if (indices < 0).any():
            raise ValueError("an item has no value")
        found = self._values.where(indices)
        if (found.kind == BYTES).all():
            texts = found.contents(self._data)
            numbers = json_numbers(texts)
            return list(map(_decode_json, texts)) if numbers is None else numbers
        columns = (found.kind.tolist(), found.contents(self._data), found.value.tolist())
        return [
            _value_of(kind, value if kind == VARINT else content)
            for kind, content, value in zip(*columns, strict=True)
        ]


def _logged_steps(data: bytes, steps: Fields, size: int) -> list[int | None]:
    """Return the steps of histories, which have at most one."""
    _require_once(steps.message)
    numbers = fields_of_all(data, steps.start, steps.stop).of(_NUMBER, VARINT)
    own, first = np.unique(numbers.message, return_index=True)
    values = np.zeros(len(steps.message), np.uint64)
    values[own] = numbers.value[first]
    logged: list[int | None] = [None] * size
    for history, value in zip(steps.message.tolist(), values.tolist(), strict=True):
        logged[history] = value
    return logged


def _same_step(first: Any, second: int | None) -> Any:
    """Return the step of a history, which contains it twice."""
    if first is None or second is None:
        return (second or 0) if first is None else first
    if first != second:
        raise ValueError("a record has two steps")
    return first


def read_wandb_configuration(log: Storage) -> dict[str, dict[str, Any]]:
    """Return the configuration of a run, from its start and from later changes."""
    found: dict[str, Any] = {}
    for record in _records(log, []):
        for number, kind, value in fields(record):
            if (number, kind) == (_RUN, BYTES):
                changes = [part for field, _, part in fields(value) if field == _RUN_CONFIGURATION]
            else:
                changes = [value] if (number, kind) == (_CONFIGURATION, BYTES) else []
            for change in changes:
                items = [_item(item) for field, _, item in fields(change) if field == _UPDATE]
                found |= {key: read() for key, read in items}
    return {log.stem.removeprefix("run-"): found}


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
        elif (number in _JSON and kind == BYTES) or (number, kind) in ((_FLOAT, FIXED64), (_INTEGER, VARINT)):
            read = partial(_value_of, kind, value)
    return "/".join(keys), read


def _value_of(kind: int, value: Any) -> Any:
    """Return the value of an item from that of its field."""
    if kind == BYTES:
        return _decode_json(value)
    if kind == FIXED64:
        return struct.unpack("<d", value)[0]
    return (value >> 1) ^ -(value & 1)  # zigzag encoding: the lowest bit is the sign


def _decode_json(text: bytes) -> Any:
    return parse_json(text, "a value")
