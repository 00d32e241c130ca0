"""Read states of uncompressed chunks that are objects, by range requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.layout import MEBIBYTE
from natgrad.storage import Storage

__all__ = ["fetch_states", "ranges_of"]

_RANGE_BYTES, _RANGES = 4 * MEBIBYTE, 4
"""Bytes in a range of an object, and number of ranges that are requested concurrently."""


def ranges_of(
    states: int, state_bytes: int, *, range_bytes: int = _RANGE_BYTES, at_once: int = _RANGES
) -> Iterator[list[tuple[int, int]]]:
    """Divide consecutive states of a chunk into ranges that are requested concurrently.

    Parameters
    ----------
    states : int
    state_bytes : int
        Bytes of one state.
    range_bytes : int
        Maximum number of bytes in a range; a range of one state may be larger.
    at_once : int
        Number of concurrent ranges.

    Yields
    ------
    list of (int, int)
        First and stop state of each range.
    """
    step = max(1, range_bytes // state_bytes)
    for first in range(0, states, step * at_once):
        last = min(first + step * at_once, states)
        yield [(low, min(low + step, last)) for low in range(first, last, step)]


def fetch_states(chunk: Storage, first: int, elements: int, out: NDArray[Any]) -> str:
    """Read states of a chunk.

    Parameters
    ----------
    chunk : Storage
    first : int
        Position of the first of these states in the chunk.
    elements : int
        Elements of a state in the chunk.
    out : array, shape (states, at most as many elements)

    Returns
    -------
    str
        What is wrong with the chunk; empty if the states were read.
    """
    state_bytes = elements * out.itemsize
    for ranges in ranges_of(len(out), state_bytes):
        spans = [((first + low) * state_bytes, (first + high) * state_bytes) for low, high in ranges]
        try:
            contents = chunk.get_ranges(spans)
        except FileNotFoundError:
            return "it is missing"
        for (low, high), content in zip(ranges, contents, strict=True):
            if missing := (high - low) * state_bytes - len(content):
                return f"it is {missing} bytes too short"
            words = np.frombuffer(content, out.dtype).reshape(-1, elements)
            out[low:high] = words[:, : out.shape[1]]
    return ""
