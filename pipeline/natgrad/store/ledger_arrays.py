"""Describe the arrays of a Gram ledger, and compute the checksums of their updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from natgrad.schema.layout import Layout
from natgrad.schema.names import REPLICATE_VECTOR, STEP, TENSOR, VECTOR, WITH_REPLICATE_VECTOR, WITH_VECTOR
from natgrad.store.group import SCALAR_CHUNK, ArrayPlan

__all__ = [
    "DIMENSIONS",
    "checksums",
    "ledger_arrays",
    "names_of",
    "numbers_checksum",
    "numbers_record",
    "updates_per_checksum",
]

DIMENSIONS = {
    "gram": (STEP, TENSOR, VECTOR, WITH_VECTOR),
    "residual_ratio": (STEP, TENSOR),
    "replicate_gram": (STEP, TENSOR, REPLICATE_VECTOR, WITH_REPLICATE_VECTOR),
}
"""Dimensions of the arrays that are computed."""

_MEANINGS = {
    "gram": "inner products of the vectors of an update",
    "residual_ratio": "ratio c of residual = gradient - c displacement",
    "replicate_gram": "inner products of the vectors of the replicates of an update",
}

_CHECKSUM_BYTES = 1 << 16
"""Minimum number of bytes covered by a checksum. For a small model, a checksum of each update would take longer
than its inner products."""

_NUMBERS_CHUNK = 1 << 20
"""Maximum number of updates in a chunk of an array with one number per update."""


def names_of(
    layout: Layout, vectors: Sequence[str], replicate_vectors: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Return the content of each array of names."""
    names = {TENSOR: layout.names, VECTOR: tuple(vectors), WITH_VECTOR: tuple(vectors)}
    if replicate_vectors:
        names |= dict.fromkeys((REPLICATE_VECTOR, WITH_REPLICATE_VECTOR), tuple(replicate_vectors))
    return names


def ledger_arrays(
    layout: Layout,
    vectors: Sequence[str],
    steps: NDArray[np.int64],
    spans: NDArray[np.int64],
    updates_per_chunk: int,
    replicate_vectors: Sequence[str],
) -> dict[str, ArrayPlan]:
    """Return the descriptions of the arrays of a new ledger; see `natgrad.store.Ledger.prepare`."""
    names = names_of(layout, vectors, replicate_vectors)
    arrays = {
        name: ArrayPlan((name,), (len(values),), (len(values),), "string", values=values)
        for name, values in names.items()
    }
    # Creating a file takes longer than writing its bytes, so the initial numbers share one chunk.
    chunk = min(max(SCALAR_CHUNK, len(steps)), _NUMBERS_CHUNK)
    for name, numbers in {STEP: steps, "step_span": spans}.items():
        arrays[name] = ArrayPlan((STEP,), (len(steps),), (chunk,), "int64", values=numbers)
    for name, dimensions in DIMENSIONS.items():
        if {*dimensions} - {STEP} <= names.keys():
            inner = [len(names[axis]) for axis in dimensions[1:]]
            arrays[name] = ArrayPlan(
                dimensions,
                (len(steps), *inner),
                (updates_per_chunk, *inner),
                "float64",
                {"long_name": _MEANINGS[name]},
            )
    return arrays


def numbers_record(steps: NDArray[np.int64], spans: NDArray[np.int64]) -> dict[str, int]:
    """Return the record of the number of updates, and of the checksums of their steps and spans."""
    return {"updates": len(steps), STEP: numbers_checksum(steps), "step_span": numbers_checksum(spans)}


def numbers_checksum(numbers: NDArray[np.int64]) -> int:
    """Return the CRC-32C of integers."""
    return int(crc32c(np.ascontiguousarray(numbers, "<i8").data.cast("B")))


def updates_per_checksum(values: NDArray[Any]) -> int:
    """Return the number of updates that one checksum of a float64 array covers."""
    return max(1, min(len(values), math.ceil(_CHECKSUM_BYTES * len(values) / max(8 * values.size, 1))))


def checksums(values: NDArray[Any], updates: int) -> list[int]:
    """Return the CRC-32C of each group of ``updates`` consecutive updates; the last group may be smaller."""
    words = np.ascontiguousarray(values, "<f8").data.cast("B")
    size = updates * (len(words) // max(len(values), 1))
    return [crc32c(words[begin : begin + size]) for begin in range(0, len(words), size or 1)]
