"""Decode the wire format of protocol buffers into numbered fields, without a schema."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "Fields", "fields", "fields_of_all", "in_groups"]

Integers = NDArray[np.int64]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""


def _varint(data: bytes, position: int, size: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= size or shift > 63:
            raise ValueError("a varint in a record is not terminated")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            if value >> 64:
                raise ValueError("a varint in a record has more than 64 bits")
            return value, position


def fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield the fields of a protocol buffer, in file order.

    Yields
    ------
    number, type : int
    value : int or bytes
        Unsigned 64-bit integer, or bytes.

    Raises
    ------
    ValueError
        If the data are not a protocol buffer or are truncated.
    """
    for number, kind, start, stop, value in _located(data, 0, len(data)):
        yield number, kind, value if kind == VARINT else data[start:stop]


def _located(data: bytes, position: int, size: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield number, type, position of the value, and the value of a `VARINT`, of the fields up to a position."""
    while position < size:
        # Most varints have one byte. Calling a function for each of them takes longer than everything else.
        key = data[position]
        if key < 0x80:
            position += 1
        else:
            key, position = _varint(data, position, size)
        number, kind, value = key >> 3, key & 7, 0
        if not number:
            raise ValueError("a field of a record has the number 0")
        start = position
        if kind == VARINT:
            value, start = _varint(data, position, size)
            length = 0
        elif kind in (FIXED64, FIXED32):
            length = 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, start = _varint(data, position, size)
        else:
            raise ValueError(f"a field of a record has the unsupported wire type {kind}")
        position = start + length
        if position > size:
            raise ValueError("a field of a record is truncated")
        yield number, kind, start, position, value


# Many messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """Fields of messages, in the order of the messages and of their fields.

    Attributes
    ----------
    message : int64 array, shape (n,)
        Index of the message of each field.
    number, kind : int64 array, shape (n,)
        Number and wire type.
    start, stop : int64 array, shape (n,)
        Position of the bytes of the value.
    value : uint64 array, shape (n,)
        Value of a `VARINT`; 0 for other fields.
    """

    message: Integers
    number: Integers
    kind: Integers
    start: Integers
    stop: Integers
    value: NDArray[np.uint64]

    def where(self, chosen: NDArray[np.bool_] | Integers) -> Fields:
        """Return the fields that a mask or indices select."""
        return Fields(*(getattr(self, name)[chosen] for name in _ATTRIBUTES))

    def of(self, number: int, kind: int) -> Fields:
        """Return the fields with a number and a wire type."""
        return self.where((self.number == number) & (self.kind == kind))

    def contents(self, data: bytes) -> list[bytes]:
        """Return the bytes of the values."""
        return [data[start:stop] for start, stop in zip(self.start.tolist(), self.stop.tolist(), strict=True)]


_GROUP_SIZE, _MESSAGE_SIZE = 1 << 20, 64
"""Bytes of a group of messages, and how many each message counts in addition to its own."""

_LARGEST_GROUP = 1 << 21
"""Maximum size of messages that are decoded together. Each field, of at least 2 bytes, takes 48 bytes of memory."""

_ATTRIBUTES = ("message", "number", "kind", "start", "stop", "value")
_LENGTHS = np.array([0, 8, -1, -1, -1, 4, -1, -1])
"""Number of bytes of a value by wire type; -1 if it varies."""
_FEW = 64
"""Number of messages up to which decoding them one by one takes less time."""


def in_groups(messages: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield messages in groups of about a megabyte, which are decoded together."""
    group: list[bytes] = []
    size = 0
    for message in messages:
        group.append(message)
        size += len(message) + _MESSAGE_SIZE
        if size >= _GROUP_SIZE:
            yield group
            group, size = [], 0
    if group:
        yield group


def fields_of_all(data: bytes, start: Integers, stop: Integers) -> Fields:
    """Return the fields of many messages. One field of all messages is decoded at a time.

    Parameters
    ----------
    data : bytes
    start, stop : int64 array, shape (m,)
        Position of each message.

    Raises
    ------
    ValueError
        If one of the messages is not a protocol buffer or is truncated, or if they are too large.
    """
    if len(data) > _LARGEST_GROUP:
        raise ValueError("the messages are too large to be decoded together")
    words = np.frombuffer(data, np.uint8)
    parts: list[tuple[NDArray[Any], ...]] = []
    message, position = np.arange(len(start)), start
    while True:
        left = position < stop
        message, position, stop = message[left], position[left], stop[left]
        if len(message) <= _FEW:
            break
        key, begin = _varints(words, position, stop)
        number, kind = (key >> np.uint64(3)).astype(np.int64), (key & np.uint64(7)).astype(np.int64)
        value, length = np.zeros(len(message), np.uint64), _LENGTHS[kind]
        for own in (VARINT, BYTES):
            chosen = np.flatnonzero(kind == own)
            if len(chosen):
                read, begin[chosen] = _varints(words, begin[chosen], stop[chosen])
                if own == VARINT:
                    value[chosen] = read
                else:
                    length[chosen] = np.minimum(read, np.uint64(len(words) + 1)).astype(np.int64)
        position = begin + length
        if not number.all() or (length < 0).any() or (position > stop).any():
            raise ValueError("a field of a record is not valid")
        parts.append((message, number, kind, begin, position, value))
    rest = tuple(array(code) for code in "qqqqqQ")
    left_over = zip(message.tolist(), position.tolist(), stop.tolist(), strict=True)
    for index, first, last in left_over:
        for field in _located(data, first, last):
            for column, entry in zip(rest, (index, *field), strict=True):
                column.append(entry)
    parts.append(tuple(np.array(column) for column in rest))
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(joined[0], kind="stable")
    return Fields(*(column[order] for column in joined))


def _varints(words: NDArray[np.uint8], position: Integers, stop: Integers) -> tuple[NDArray[np.uint64], Integers]:
    """Return the varints at positions, and the positions after them."""
    byte = words[position] if (position < stop).all() else None
    value, end = np.zeros(len(position), np.uint64), position.copy()
    index = np.arange(len(position))
    for shift in range(0, 64, 7):
        if byte is None or (shift == 63 and (byte > 1).any()):
            break
        value[index] |= (byte & np.uint8(0x7F)).astype(np.uint64) << np.uint64(shift)
        end[index] += 1
        index = index[byte >= 0x80]
        if not len(index):
            return value, end
        byte = words[end[index]] if (end[index] < stop[index]).all() else None
    raise ValueError("a varint in a record is not terminated")
