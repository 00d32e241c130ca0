"""Describe tensors that are plain bytes of files, which can be read without the reader of their format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from natgrad.storage import Storage

__all__ = ["ByteRange", "part_of"]


class ByteRange(NamedTuple):
    """Consecutive elements of a tensor that are plain bytes of a file: little-endian, in C order.

    Attributes
    ----------
    file : Storage
    offset : int
        First byte.
    elements : int
    """

    file: Storage
    offset: int
    elements: int


def part_of(ranges: Sequence[ByteRange] | None, itemsize: int, start: int, elements: int) -> list[ByteRange] | None:
    """Return where some consecutive elements of a tensor are; None if it is not plain bytes.

    Parameters
    ----------
    ranges : sequence of ByteRange or None
        All elements of the tensor.
    itemsize : int
        Bytes of an element.
    start, elements : int
        First of these elements, and their number.
    """
    if ranges is None:
        return None
    found, reached, stop = list[ByteRange](), 0, start + elements
    for each in ranges:
        low, high = max(start, reached), min(stop, reached + each.elements)
        if low < high:
            found.append(ByteRange(each.file, each.offset + (low - reached) * itemsize, high - low))
        reached += each.elements
    return found
