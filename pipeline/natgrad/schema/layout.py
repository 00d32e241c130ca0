"""Define the layout of tensors on one element axis, the dtypes of elements, and the shapes of stored chunks."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import (
    HVP,
    REPLICATE_HVP,
    REPLICATE_STATES,
    STATES,
    ledger_vectors,
    replicate_vectors,
)

__all__ = [
    "LAYOUT_VERSION",
    "MEBIBYTE",
    "STORAGE_DTYPES",
    "IngestLimits",
    "Layout",
    "LedgerChunk",
    "Tensor",
    "TrajectoryShape",
    "chunk_capacity",
    "chunk_shape",
    "missing_word",
    "promote",
    "storage_dtype",
    "underflow_error",
    "unit_roundoff",
    "widened",
]

MEBIBYTE = 1 << 20

LAYOUT_VERSION = 7
"""Layout version of ``trajectory.zarr``, ``ledger.zarr`` and ``results.zarr``. Other versions are rejected."""

STORAGE_DTYPES: dict[str, int] = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
"""Dtypes that are stored without conversion, and the bits of their significand, including the implicit bit."""

_LEAST_EXPONENTS = {"bfloat16": -126, "float16": -14, "float32": -126, "float64": -1022}
"""Exponent of the smallest normal number of each dtype."""


_BFLOAT16_NAN = 0x7FC0
"""Bits of NaN in bfloat16."""


def unit_roundoff(dtype: str) -> float:
    """Return the largest relative error of rounding to a dtype: 2**-p for a significand of p bits.

    Examples
    --------
    >>> unit_roundoff("bfloat16")
    0.00390625
    """
    return math.ldexp(1.0, -STORAGE_DTYPES[dtype])


def underflow_error(dtype: str) -> float:
    """Return the largest error of rounding a number below the normal range: half the smallest positive number.

    Such numbers are evenly spaced, so `unit_roundoff` does not bound their relative error. The result is 0 for
    float64, because half of its smallest number is not a float64.

    Examples
    --------
    >>> underflow_error("float16") == 2.0**-25
    True
    """
    return math.ldexp(1.0, _LEAST_EXPONENTS[dtype] - STORAGE_DTYPES[dtype])


def promote(dtypes: Sequence[str]) -> str:
    """Return the smallest storage dtype that represents all values of the given dtypes exactly.

    Examples
    --------
    >>> promote(["float16", "bfloat16"])
    'float32'
    """
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    return "float64" if "float64" in distinct else "float32"


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model, and the position of its elements on the element axis.

    Attributes
    ----------
    name : str
        Name as logged.
    offset : int
        First element on the element axis.
    shape : tuple of int
        Shape; its product is the number of elements (1 for a scalar).
    dtype : str
        Dtype of the logged *parameter*. It determines the rounding floor of the displacement.
    group : str
        Parameter group, empty if the log has no groups.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    group: str = ""

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def stop(self) -> int:
        """End of the elements on the element axis (exclusive)."""
        return self.offset + self.size


@dataclass(frozen=True)
class Layout:
    """The layout table of a model: its tensors, concatenated on one element axis."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[tuple[int, ...], str]]) -> Layout:
        """Concatenate tensors in the order of the mapping.

        Parameters
        ----------
        shapes : mapping
            Shape and dtype of each tensor, by name.
        """
        tensors, offset = [], 0
        for name, (shape, dtype) in shapes.items():
            tensors.append(Tensor(name, offset, tuple(shape), dtype))
            offset = tensors[-1].stop
        return cls(tuple(tensors))

    @classmethod
    def from_json(cls, table: Sequence[Mapping[str, Any]]) -> Layout:
        """Return the layout in the attribute of a store."""
        return cls(tuple(Tensor(**{**row, "shape": tuple(row["shape"])}) for row in table))

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rows of the layout table, for the attribute of a store."""
        return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in order."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def elements(self) -> int:
        """Number of elements of the model, the paper's D."""
        return self.tensors[-1].stop if self.tensors else 0

    def segments(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Return the segments of tensors in a range of the element axis.

        Returns
        -------
        list of (tensor index, first element, stop element)
            The nonempty segments, in order. Elements are counted from the start of the axis.
        """
        segments = []
        for index in range(bisect_right(self.tensors, start, key=lambda tensor: tensor.stop), len(self.tensors)):
            tensor = self.tensors[index]
            if tensor.offset >= stop:
                break
            low, high = max(start, tensor.offset), min(stop, tensor.stop)
            if low < high:
                segments.append((index, low, high))
        return segments


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the dtype of stored words: uint16 for bfloat16, and otherwise the dtype itself, little-endian."""
    return np.dtype("<u2") if dtype == "bfloat16" else np.dtype(dtype).newbyteorder("<")


def missing_word(dtype: str) -> np.generic:
    """Return the stored word of an element that was not logged: NaN."""
    return np.uint16(_BFLOAT16_NAN) if dtype == "bfloat16" else storage_dtype(dtype).type(np.nan)


def widened(words: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return the values of elements from `StepReader.read`: bfloat16 is converted to float32, exactly."""
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32) if dtype == "bfloat16" else words


# Chunks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IngestLimits:
    """Limits of an ingest: the chunk shape of a new trajectory, and the amount of data per commit.

    Attributes
    ----------
    chunk_elements : int
        Maximum number of elements in a chunk of the trajectory. The default is 4 MiB of float32.
    minimum_steps : int
        Minimum capacity of a chunk of a small model, in steps, even if the run is shorter.
    chunk : (int, int), optional
        Steps and elements of a chunk, instead of the shape that `chunk_shape` computes. If the log has no states,
        the steps are the updates of a ledger chunk.
    commit_bytes : int
        Approximate bytes of training state per commit. A commit has at least one row of chunks.
    largest_factor : int
        Maximum number of rows of an optimizer factor for which eigenvalues are computed. LAPACK's copies and the
        complex matrix of the skew part take up to 70 bytes per element, which is 1.1 GiB for the default.
    """

    chunk_elements: int = 1 << 20
    minimum_steps: int = 64
    chunk: tuple[int, int] | None = None
    commit_bytes: int = 256 * MEBIBYTE
    largest_factor: int = 4096


@dataclass(frozen=True, order=True)
class LedgerChunk:
    """The updates from ``start`` to ``stop`` (half open) whose inner products form one chunk of the ledger."""

    start: int
    stop: int


@dataclass(frozen=True)
class TrajectoryShape:
    """Properties of a trajectory that determine the plan of a pass. The trajectory may not be stored yet.

    Attributes
    ----------
    states : int
        Number of logged states.
    layout : Layout
    chunk : (int, int)
        Steps and elements of a chunk.
    dtypes : mapping
        Logical dtype of each state array.
    replicates : int
        Number of replicates, 0 if there are none.
    partial_reads : bool
        Whether parts of a chunk can be read, which requires uncompressed local files.
    keeps_versions : bool
        Whether an Icechunk repository contains the trajectory.
    recorded : tuple of str
        Vectors of the inner products that were recorded instead of states; there are then no state arrays.
    """

    states: int
    layout: Layout
    chunk: tuple[int, int]
    dtypes: Mapping[str, str]
    replicates: int
    partial_reads: bool
    keeps_versions: bool
    recorded: tuple[str, ...] = ()

    @property
    def itemsizes(self) -> list[int]:
        """Bytes per element of each array (step, element) that the pass reads."""
        return [
            storage_dtype(self.dtypes[name]).itemsize
            for name in (*STATES, *REPLICATE_STATES)
            if name in self.dtypes
            for _ in range(self.replicates if name in REPLICATE_STATES else 1)
        ]

    @property
    def state_bytes(self) -> int:
        """Bytes of all states, without padding."""
        sizes = (
            storage_dtype(dtype).itemsize * (self.replicates if name in REPLICATE_STATES else 1)
            for name, dtype in self.dtypes.items()
        )
        return self.states * self.layout.elements * sum(sizes)

    @property
    def vectors(self) -> tuple[str, ...]:
        """Vectors of the Gram matrix."""
        return self.recorded or ledger_vectors(HVP in self.dtypes)

    @property
    def replicate_vectors(self) -> tuple[str, ...]:
        """Vectors of the Gram matrix of the replicates; empty without replicates."""
        return replicate_vectors(self.replicates, REPLICATE_HVP in self.dtypes)


def chunk_shape(
    states: int, elements: int, replicates: int = 0, limits: IngestLimits = IngestLimits()
) -> tuple[int, int]:
    """Return the shape of the chunks of a trajectory: complete steps, with about a million elements.

    Parameters
    ----------
    states : int
        Number of logged states so far.
    elements : int
        Elements of the model.
    replicates : int
        Number of replicates logged with each state. Each step of a chunk then has that many additional states.
    limits : IngestLimits, optional

    Returns
    -------
    (steps, elements) of a chunk
        All columns of chunks have nearly the same width, so that the last one contains little padding. A chunk of a
        small model has many steps, but not many more than the run.

    Examples
    --------
    >>> chunk_shape(1000, 2_500_000)
    (1, 833334)
    >>> chunk_shape(201, 25_408)
    (41, 25408)
    >>> chunk_shape(401, 8)
    (512, 8)
    >>> chunk_shape(201, 25_408, replicates=8)
    (5, 25408)
    """
    if limits.chunk is not None:
        return limits.chunk
    columns = max(1, math.ceil(elements / limits.chunk_elements))
    width = max(1, math.ceil(elements / columns))
    most = limits.chunk_elements // width // max(1, replicates)
    return max(1, min(most, chunk_capacity(states, limits.minimum_steps))), width


def chunk_capacity(count: int, minimum: int) -> int:
    """Return the size of a chunk that contains the complete run and leaves space for new steps.

    Parameters
    ----------
    count : int
        Number of states or updates of the run so far.
    minimum : int
        Size for a run that is shorter than this.

    Examples
    --------
    >>> chunk_capacity(10, 64), chunk_capacity(64, 64), chunk_capacity(65, 64)
    (64, 64, 128)
    """
    return 1 << max(minimum - 1, count - 1).bit_length()
