"""Compute the inner products of single updates from arrays in memory, with numba or with NumPy alone.

A training loop has the parameters before and after an update and the gradient, but not the gradient after it.
`refresh_products` uses the compiled kernel if numba is installed. `portable_products` forms the vectors in float64
with NumPy, some thousand elements at a time, which takes six times as long. Both use the conventions of
`natgrad.kernel.gram` for squares, and both errors are bounded by `natgrad.kernel.ledger_sums.roundoff_bound`.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.ledger_sums import add_segments
from natgrad.schema.layout import widened
from natgrad.schema.names import RECORDED_VECTORS, VECTORS, ledger_vectors

__all__ = ["is_compiled", "mark_squares", "portable_products", "refresh_products", "update_products"]

_BLOCK = 1 << 16
"""Elements that `portable_products` converts to float64 at a time."""

_ROWS = np.array([VECTORS.index(name) for name in RECORDED_VECTORS])

_EXACT_SQUARE, _NONZERO = 2.0**-980, 5e-324
"""See `natgrad.kernel.gram`."""

Ledgers = tuple[NDArray[np.float64], NDArray[np.float64]]


def is_compiled() -> bool:
    """Return True if `refresh_products` uses the compiled kernel, because numba is installed."""
    return importlib.util.find_spec("numba") is not None


def refresh_products(
    before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], gradient: Sequence[NDArray[Any]]
) -> Ledgers:
    """Compute the products of the vectors of an update, and copy the parameters after it to those before it.

    Parameters
    ----------
    before, after, gradient : sequences of arrays, one for each tensor
        One-dimensional contiguous arrays of float16, float32, float64, or uint16 with the bits of bfloat16. Those
        of a tensor have the same length, which may be 0, and those before and after the update the same dtype. The
        parameters before the update are overwritten with those after it.

    Returns
    -------
    gram : float64 array, shape (tensors, 4, 4)
        Inner products of the vectors, in the order of `natgrad.schema.names.RECORDED_VECTORS`.
    ratio : float64 array, shape (tensors,)
        Ratio c of the residual, gradient - c displacement.

    Raises
    ------
    ValueError
        If the arrays of a tensor differ in length or are not contiguous, or those of the parameter differ in dtype.

    Notes
    -----
    The compiled kernel releases the interpreter lock.
    """
    for old, new, slope in zip(before, after, gradient, strict=True):
        if not old.shape == new.shape == slope.shape or old.dtype != new.dtype:
            described = ", ".join(f"{array.dtype} {array.shape}" for array in (old, new, slope))
            raise ValueError(f"arrays of a tensor differ: {described}")
        if old.ndim != 1 or not (old.flags.c_contiguous and new.flags.c_contiguous and slope.flags.c_contiguous):
            raise ValueError("arrays must be one-dimensional and contiguous")
    if is_compiled():
        return _compiled_products(before, after, gradient)
    found = portable_products(before, after, gradient)
    for old, new in zip(before, after, strict=True):
        old[:] = new
    return found


def update_products(
    before: Sequence[NDArray[Any]],
    after: Sequence[NDArray[Any]],
    gradient: Sequence[NDArray[Any]],
    next_gradient: Sequence[NDArray[Any]],
    hvp: Sequence[NDArray[Any]] | None = None,
) -> Ledgers:
    """Compute the products of all vectors of an update, from arrays of both states, with numba.

    Parameters
    ----------
    before, after, gradient, next_gradient, hvp : sequences of arrays, one for each tensor
        Arrays of float16, bfloat16, float32 or float64. Those of a tensor have the same shape. ``hvp`` is the
        product of the Hessian with the displacement, if it is known.

    Returns
    -------
    gram : float64 array, shape (tensors, vectors, vectors)
        Inner products of the vectors, in the order of `natgrad.schema.names.ledger_vectors`.
    ratio : float64 array, shape (tensors,)
        Ratio c of the residual, gradient - c displacement.
    """
    from natgrad.kernel import in_situ
    from natgrad.kernel.gram import products

    count, tensors = len(ledger_vectors(hvp is not None)), len(before)
    grams, ratios, indices = [np.empty((0, count, count))], [np.empty(0)], [np.empty(0, np.int64)]
    for tensor in range(tensors):
        arrays = [
            [np.ascontiguousarray(one[tensor]).reshape(1, -1) for one in kind]
            for kind in ((before, after), (gradient, next_gradient), () if hvp is None else (hvp,))
        ]
        size = before[tensor].size
        starts = np.append(np.arange(0, size, in_situ.SEGMENT), size)
        if not size:
            continue
        gram, ratio = np.empty((1, len(starts) - 1, count, count)), np.empty((1, len(starts) - 1))
        products(arrays[0], arrays[1], starts, gram, ratio, arrays[2] or None)
        grams.append(gram[0])
        ratios.append(ratio[0])
        indices.append(np.full(len(starts) - 1, tensor))
    return add_segments(tensors, np.concatenate(indices), np.concatenate(grams), np.concatenate(ratios))


def portable_products(
    before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], gradient: Sequence[NDArray[Any]]
) -> Ledgers:
    """Compute the same products with NumPy alone. Nothing is overwritten.

    Parameters
    ----------
    before, after, gradient
        As for `refresh_products`; arrays of bfloat16 are accepted as well.
    """
    segments = -(-np.array([array.size for array in before], np.int64) // _BLOCK)
    gram, ratio = np.zeros((int(segments.sum()), 5, 5)), np.zeros(int(segments.sum()))
    parts = (part for arrays in zip(before, after, gradient, strict=True) for part in _parts(*arrays))
    for segment, part in enumerate(parts):
        gram[segment][_ROWS[:, None], _ROWS], ratio[segment] = _block_products(*part)
    return _added(segments, gram, ratio)


def _added(segments: NDArray[np.int64], gram: NDArray[np.float64], ratio: NDArray[np.float64]) -> Ledgers:
    """Return the products of tensors with these numbers of segments, without those of the gradient change."""
    total, common = add_segments(len(segments), np.repeat(np.arange(len(segments)), segments), gram, ratio)
    return total[:, _ROWS[:, None], _ROWS], common


def _parts(*arrays: NDArray[Any]) -> Iterator[list[NDArray[np.float64]]]:
    """Yield blocks of some arrays in float64."""
    for first in range(0, arrays[0].size, _BLOCK):
        blocks = [array[first : first + _BLOCK] for array in arrays]
        yield [
            widened(block, "bfloat16" if block.dtype == np.uint16 else "").astype(np.float64) for block in blocks
        ]


def _block_products(
    parameter: NDArray[np.float64], moved: NDArray[np.float64], gradient: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Return the products of a block, and the ratio of the residual."""
    with np.errstate(all="ignore"):
        displacement = moved - parameter
        square = float(displacement @ displacement)
        ratio = float(gradient @ displacement) / square if _EXACT_SQUARE <= square < math.inf else 0.0
        if not math.isfinite(ratio):
            ratio = 0.0
        residual = gradient - ratio * displacement if ratio else gradient
        vectors = np.stack([parameter, displacement, gradient, residual])
        gram = vectors @ vectors.T
    mark_squares(gram, abs(vectors).max(axis=1))
    return gram, ratio


def mark_squares(gram: NDArray[np.float64], largest: NDArray[np.float64]) -> None:
    """Make the squares of vectors obey the convention of `natgrad.kernel.gram`.

    Parameters
    ----------
    gram : float64 array, shape (..., vectors, vectors)
        Changed in place.
    largest : float64 array, shape (..., vectors)
        Largest absolute value of the elements of each vector, NaN if one is NaN.
    """
    square = np.einsum("...ii->...i", gram)
    square[(square == 0.0) & (largest > 0.0)] = _NONZERO
    square[~(square < math.inf)] = np.where(np.isfinite(largest), math.inf, math.nan)[~(square < math.inf)]


def _compiled_products(
    before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]], gradient: Sequence[NDArray[Any]]
) -> Ledgers:
    from natgrad.kernel import in_situ
    from natgrad.kernel.compiled import words_of

    sizes = np.array([array.size for array in before], np.int64)
    segments = -(-sizes // in_situ.SEGMENT)
    firsts = np.cumsum(segments) - segments
    gram, ratio = np.empty((int(segments.sum()), 5, 5)), np.empty(int(segments.sum()))
    kinds: dict[tuple[Any, Any], list[int]] = {}
    for tensor, (one, another) in enumerate(zip(before, gradient, strict=True)):
        kinds.setdefault((one.dtype, another.dtype), []).append(tensor)
    for dtypes, tensors in kinds.items():
        old, new, descent = (
            np.array([arrays[tensor].__array_interface__["data"][0] for tensor in tensors], np.uintp)
            for arrays in (before, after, gradient)
        )
        like = tuple(words_of([np.empty(0, dtype)])[0] for dtype in dtypes)
        in_situ.refresh_products(old, new, descent, like, sizes[tensors], firsts[tensors], gram, ratio)
    return _added(segments, gram, ratio)
