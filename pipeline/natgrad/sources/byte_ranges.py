"""Describe tensors that are plain bytes of files, which can be read without the reader of their format."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from natgrad.storage import Storage

__all__ = ["ByteRange", "Placement", "of_boxes", "part_of", "runs_of"]

_RUNS_LIMIT = 1 << 12
"""Maximum number of contiguous ranges of a tensor. Reading more of them takes longer than copying the tensor."""


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


@dataclass(frozen=True)
class Placement:
    """Where the ranges of some tensors of a step begin.

    The steps of a run usually have their tensors at the same places of their files. If two placements have equal
    tables, the ranges of a tensor differ only in the files, and in their offsets by the difference of ``starts``.

    Attributes
    ----------
    table : object
        What determines the ranges otherwise. Only its equality has a meaning.
    files : tuple of Storage
        All files of the ranges.
    starts : tuple of int
        An offset in each file.
    """

    table: object
    files: tuple[Storage, ...]
    starts: tuple[int, ...]

    def of(self, table: object) -> Placement:
        """Return a copy with another table."""
        return replace(self, table=table)


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


def runs_of(
    offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[int, int, Callable[[Any], Any]]:
    """Divide a box of a tensor into runs of equal length, each contiguous in the tensor, in ascending order.

    Returns
    -------
    runs, length : int
        Number of runs, and elements of each.
    position : callable
        Function of the number of a run that returns its first element in the tensor, in C order.
    """
    # A run consists of the last dimension that the box does not fill, and the following ones.
    level = next((i for i in range(len(shape) - 1, -1, -1) if sizes[i] != shape[i]), 0)
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    base = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))

    def position(run: Any) -> Any:
        index = np.unravel_index(run, sizes[:level]) if level else ()
        return base + sum(i * stride for i, stride in zip(index, strides, strict=False))

    return math.prod(sizes[:level]), math.prod(sizes[level:]), position


def of_boxes(
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...], ByteRange]], shape: tuple[int, ...], itemsize: int
) -> list[ByteRange] | None:
    """Return where the elements of a tensor that is stored as boxes are.

    Parameters
    ----------
    boxes : sequence of (offsets, sizes, ByteRange)
        Each box, and where its elements are, in C order.
    shape : tuple of int
        Shape of the tensor.
    itemsize : int

    Returns
    -------
    list of ByteRange or None
        None if the boxes overlap or are incomplete, or consist of too many ranges.
    """
    divided = [(runs_of(offsets, sizes, shape), stored) for offsets, sizes, stored in boxes]
    if sum(runs for (runs, _, _), _ in divided) > _RUNS_LIMIT:
        return None
    found = sorted(
        (int(position(run)), ByteRange(stored.file, stored.offset + run * length * itemsize, length))
        for (runs, length, position), stored in divided
        for run in range(runs)
    )
    reached = 0
    for start, run in found:
        if start != reached:
            return None
        reached += run.elements
    return [run for _, run in found] if reached == math.prod(shape) else None
