"""Determine the size of the blocks in which results are computed, and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence

from natgrad.schema.errors import InputError
from natgrad.schema.layout import MEBIBYTE, TrajectoryShape
from natgrad.schema.names import DESCENTS
from natgrad.theory.windows import longest_tried

__all__ = ["LEAST_UPDATES", "block_bytes", "most_updates", "require_memory"]

_ELEMENTS = 48_000
"""Approximate number of updates times tensors of a block: each of its arrays then has 400 kB, and a worker takes
about 80 MB, so that two threads fit into the default memory limit of a process."""

LEAST_UPDATES, _MOST_UPDATES = 64, 4096
"""Limits of the number of updates of a block of a small model."""


def most_updates(tensors: int) -> int:
    """Return the maximum number of updates of a block, for a number of tensors."""
    return min(max(_ELEMENTS // max(tensors, 1), 1), _MOST_UPDATES)


def block_bytes(shape: TrajectoryShape, windows: Sequence[int], groups: int = 0) -> int:
    """Return the memory that a worker takes to compute blocks, in addition to that of an idle process.

    Parameters
    ----------
    shape : TrajectoryShape
    windows : sequence of int
        Requested windows.
    groups : int
        Number of groups of tensors.

    Notes
    -----
    Per update of a block and of its requested windows, and per tensor or group: the Gram matrix twice (as read,
    and with a vector that was not logged), and about 80 numbers for the pairs of two estimates and for their
    variables. Per update whose windows are not complete yet, in the search for the smallest one: five numbers, two
    for each estimate, and seven for the search. A model counts as eight tensors.
    """
    states, tensors, longest = max(shape.states - 1, 1), len(shape.layout.tensors), max(windows, default=1)
    updates = min(most_updates(tensors), states)
    waiting = 2 * updates + longest_tried(states, longest) - 1
    entries = 2 * (len(shape.vectors) + 1) ** 2 + 80
    return 8 * (tensors + groups + 8) * ((updates + longest - 1) * entries + waiting * (12 + 2 * len(DESCENTS)))


def require_memory(
    shape: TrajectoryShape, windows: Sequence[int], reserved: int, memory_limit: int | None, groups: int = 0
) -> int:
    """Return the projected peak memory of a worker that computes results.

    Parameters
    ----------
    shape, windows
        See `block_bytes`.
    reserved : int
        Memory of an idle worker process.
    memory_limit : int or None
        Bytes that a worker process may use.
    groups : int
        Number of groups of tensors.

    Raises
    ------
    InputError
        If the projected memory exceeds the limit; the message contains a limit that suffices.
    """
    projected = reserved + block_bytes(shape, windows, groups)
    if memory_limit is not None and projected > memory_limit:
        least = math.ceil(projected / MEBIBYTE)
        longest = max(windows, default=1)
        raise InputError(
            f"a worker would need {least} MiB, but memory_limit is {memory_limit / MEBIBYTE:.0f} MiB",
            where=f"results of {len(shape.layout.tensors)} tensors, with windows of up to {longest} updates, and "
            f"{reserved / MEBIBYTE:.0f} MiB of an idle worker",
            remedy=f"raise --memory-limit to {least}MiB or more",
        )
    return projected
