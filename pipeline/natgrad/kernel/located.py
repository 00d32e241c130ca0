"""Describe where the elements of states are in open files, for readers that do not need the compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Located", "joined"]


class Located(NamedTuple):
    """Location of the elements of states in open files.

    Attributes
    ----------
    descriptors : int32 array, shape (states, pieces)
        Descriptor of the file that contains each piece of a state.
    offsets : int64 array, shape (states, pieces)
        Offset of the first byte of each piece in its file.
    starts : int64 array, shape (pieces + 1,)
        First element of each piece, and the end of the last one. The first piece starts at element 0.
    """

    descriptors: NDArray[np.int32]
    offsets: NDArray[np.int64]
    starts: NDArray[np.int64]


def joined(parts: Sequence[Located], itemsize: int) -> Located:
    """Join the locations of consecutive states. Their pieces are cut where those of any of them end."""
    if len(parts) == 1:
        return parts[0]
    starts = np.unique(np.concatenate([part.starts for part in parts]))
    cut = []
    for part in parts:
        piece = np.searchsorted(part.starts, starts[:-1], "right") - 1
        inside = (starts[:-1] - part.starts[piece]) * itemsize
        cut.append((part.descriptors[:, piece], part.offsets[:, piece] + inside))
    descriptors, offsets = (np.concatenate(each) for each in zip(*cut, strict=True))
    return Located(descriptors, offsets, starts)
