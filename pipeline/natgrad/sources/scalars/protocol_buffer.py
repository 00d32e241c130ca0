"""Decode the wire format of protocol buffers into numbered fields, without a schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "fields"]

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types."""


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
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
    position, size = 0, len(data)
    while position < size:
        # Most varints have one byte. Calling a function for each of them takes longer than everything else.
        key = data[position]
        if key < 0x80:
            position += 1
        else:
            key, position = _varint(data, position)
        number, kind = key >> 3, key & 7
        if not number:
            raise ValueError("a field of a record has the number 0")
        if kind == VARINT:
            value: Any
            value, position = _varint(data, position)
        elif kind in (FIXED64, FIXED32, BYTES):
            length = 8 if kind == FIXED64 else 4
            if kind == BYTES:
                if position < size and data[position] < 0x80:
                    length, position = data[position], position + 1
                else:
                    length, position = _varint(data, position)
            value, position = data[position : position + length], position + length
            if len(value) < length:
                raise ValueError("a field of a record is truncated")
        else:
            raise ValueError(f"a field of a record has the unsupported wire type {kind}")
        yield number, kind, value
