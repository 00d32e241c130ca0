"""Read the stored numbers of the states of a run, such as steps and losses, and compare them with their checksums.

A commit records one checksum of the numbers of all states so far. A reader of a growing run reads and compares only
the numbers of new states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout
from natgrad.schema.names import REPLICATE, REPLICATE_LOSS, STEP, TENSOR
from natgrad.store.group import (
    INGEST_AGAIN,
    SCALAR_CHUNK,
    ArrayPlan,
    StoredArray,
    chunk_entry,
    damage_error,
    read_complete_chunks,
)

if TYPE_CHECKING:
    from natgrad.store.states import States

__all__ = ["StateNumbers", "number_arrays"]


_TABLE_CHUNK = 1 << 16
"""Approximate number of values in a chunk of an array (step, tensor)."""


def number_arrays(
    layout: Layout, numbered: Sequence[str], scalars: Sequence[str], tables: Sequence[str], replicates: int
) -> dict[str, ArrayPlan]:
    """Return the descriptions of the empty arrays for the numbers of a new run.

    Parameters
    ----------
    layout : Layout
    numbered, scalars, tables : sequence of str
        Names of integers and of numbers per step, and of numbers per step and tensor.
    replicates : int
    """
    arrays = {}
    for name in (*numbered, *scalars):
        several = name == REPLICATE_LOSS
        arrays[name] = ArrayPlan(
            (STEP, REPLICATE) if several else (STEP,),
            (0, replicates) if several else (0,),
            (max(1, _TABLE_CHUNK // replicates), replicates) if several else (SCALAR_CHUNK,),
            "int64" if name in numbered else "float64",
        )
    width = len(layout.tensors)
    for name in tables:
        steps = max(1, _TABLE_CHUNK // max(1, width))
        arrays[name] = ArrayPlan((STEP, TENSOR), (0, width), (steps, width), "float64")
    return arrays


class StateNumbers:
    """The numbers of the fixed states of a run.

    Parameters
    ----------
    states : States
    arrays : mapping of str to StoredArray

    Attributes
    ----------
    arrays : mapping of str to StoredArray
        Arrays (step,) or (step, tensor).
    """

    def __init__(self, states: States, arrays: Mapping[str, StoredArray]) -> None:
        self._states, self.arrays = states, arrays
        self._read: dict[str, tuple[NDArray[Any], int]] = {}

    def verified(self, name: str, recorded: Mapping[str, int]) -> tuple[NDArray[Any], int]:
        """Return the numbers of all fixed states, and their checksum. Only those of new states are read.

        Parameters
        ----------
        name : str
        recorded : mapping of str to int
            Checksums in the newest record of a commit.

        Raises
        ------
        InputError
            If they do not match their checksum. The message names the first chunk that differs.
        """
        known, found = self._read.get(name) or self._empty(name)
        count = self._states.n_fixed
        if len(known) == count:
            return known, found
        values = np.concatenate([known, *self._read_from(name, len(known))])[:count]
        found = crc32c(values[len(known) :].data.cast("B"), found)
        if found != recorded[name]:
            raise self._damaged(name, values)
        values.flags.writeable = False
        self._read[name] = values, found
        return values, found

    def unverified(self, name: str) -> NDArray[Any]:
        """Read the numbers of all fixed states without comparing them with their checksums."""
        empty, _ = self._empty(name)
        return np.concatenate([empty, *self._read_from(name, 0)])[: self._states.n_fixed]

    def damaged(
        self, name: str, values: NDArray[Any], records: Iterable[Mapping[str, Any]]
    ) -> Iterator[tuple[int, int]]:
        """Yield the range of states of each commit whose numbers do not match their checksum.

        Parameters
        ----------
        name : str
        values : array
            From `unverified`.
        records : iterable of mapping
            Records of the commits, in order. A commit is not compared if the record before it is not given. That of
            a provisional state is omitted: it contains its numbers.
        """
        reached = before = 0
        for record in records:
            start, stop = record["start"], record["stop"]
            if stop > self._states.n_fixed:  # committed since the trajectory was opened
                return
            expected = record["scalars"][name]
            if start == reached and crc32c(values[start:stop].data.cast("B"), before) != expected:
                yield start, stop
            reached, before = stop, expected

    def _read_from(self, name: str, start: int) -> list[NDArray[Any]]:
        """Read the numbers of the fixed states from ``start`` to the end of the last chunk."""
        array, states = self.arrays[name], self._states
        rows, other_axes = array.chunks[0], [0] * (len(array.shape) - 1)
        indices = [(index, *other_axes) for index in range(start // rows, -(-states.n_fixed // rows))]
        found = read_complete_chunks(states.storage / name, indices, array.chunks, array.dtype, INGEST_AGAIN)
        # The first chunk also contains earlier states.
        return [chunk[0 if position else start % rows :] for position, chunk in enumerate(found)]

    def _empty(self, name: str) -> tuple[NDArray[Any], int]:
        """Return the numbers of no state, and their checksum."""
        array = self.arrays[name]
        return np.empty((0, *array.shape[1:]), array.dtype), 0

    def _damaged(self, name: str, values: NDArray[Any]) -> InputError:
        states, array = self._states, self.arrays[name]
        start, stop = next(self.damaged(name, values, states.each_record()), (0, states.n_fixed))
        chunk = chunk_entry(states.storage / name, start // array.chunks[0], *(0 for _ in array.shape[1:]))
        # If the steps themselves are damaged, states are named by their indices.
        part = states.numbered(start, stop) if name == STEP else states.named(start, stop)
        return damage_error(chunk, "checksum mismatch", INGEST_AGAIN, f"{name}, {part}")
