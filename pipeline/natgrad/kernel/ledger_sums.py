"""Sum the ledgers of segments to ledgers of tensors with NumPy, and bound their rounding error."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import VECTORS, replicate_vectors

__all__ = [
    "add_replicates",
    "add_segments",
    "best_ratio",
    "combine",
    "convert",
    "roundoff_bound",
]

_Positions = tuple[int, int, int]
"""Positions of the displacement, the gradient and the residual among the vectors of a ledger."""


def _positions(vectors: Sequence[str], displacement: str) -> _Positions:
    return vectors.index(displacement), vectors.index("gradient"), vectors.index("residual")


_OF_UPDATES = _positions(VECTORS, "displacement")
_OF_REPLICATES = _positions(replicate_vectors(1, hvp=False), "mean_displacement")


def roundoff_bound(elements: int) -> float:
    """Return a bound of the rounding error of an inner product x.y, as a multiple of |x||y|.

    Sums of ``n`` float64 products in any order differ from each other and from the exact value by at most
    ``4 sqrt(n) u`` with u = 2**-53, because rounding errors of a long sum behave as if independent. The worst case
    is ``n u / (1 - n u)`` (Higham, Accuracy and Stability, section 3.1).

    Parameters
    ----------
    elements : int
        Number of terms.
    """
    return float(4.0 * np.sqrt(max(elements, 1)) * 2.0**-53)


def combine(
    gram: NDArray[np.float64], ratio: NDArray[np.float64], positions: _Positions = _OF_UPDATES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Combine the ledgers of several segments, for example of the parts of one tensor.

    The inner products of stacked vectors are sums. The residuals must first be converted to one ratio, by
    r' = r + (c - c') d with c' = sum(g.d) / sum(d.d), the ratio that minimizes the joint residual.

    Parameters
    ----------
    gram : float64 array, shape (..., segments, vectors, vectors)
    ratio : float64 array, shape (..., segments)
    positions : (int, int, int)
        Positions of the displacement, the gradient and the residual among the vectors.

    Returns
    -------
    gram : float64 array, shape (..., vectors, vectors)
    ratio : float64 array, shape (...)
    """
    total, common = add_segments(1, np.zeros(gram.shape[-3], np.int64), gram, ratio, positions)
    return total[..., 0, :, :], common[..., 0]


def add_segments(
    tensors: int,
    indices: NDArray[np.int64],
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    positions: _Positions = _OF_UPDATES,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ledger of each tensor from the ledgers of its segments, in the order of the element axis.

    If every tensor is one segment, the ledgers are returned without a copy.

    Parameters
    ----------
    tensors : int
        Number of tensors. The products of a tensor without elements, which has no segment, are 0.
    indices : int64 array, shape (segments,)
        Tensor of each segment, non-decreasing.
    gram : float64 array, shape (..., segments, vectors, vectors)
    ratio : float64 array, shape (..., segments)
    positions : (int, int, int)
        See `combine`.

    Returns
    -------
    gram : float64 array, shape (..., tensors, vectors, vectors)
    ratio : float64 array, shape (..., tensors)
    """
    if np.array_equal(indices, np.arange(tensors)):
        return gram, ratio
    *before, _, vectors, _ = gram.shape
    total, common = np.zeros((*before, tensors, vectors, vectors)), np.zeros((*before, tensors))
    counts = np.bincount(indices, minlength=tensors)
    firsts = np.cumsum(counts) - counts
    single = counts == 1
    total[..., single, :, :], common[..., single] = gram[..., firsts[single], :, :], ratio[..., firsts[single]]
    several = counts > 1
    if several.any():
        parts = np.repeat(several, counts)
        found = _joined(gram[..., parts, :, :], ratio[..., parts], counts[several], positions)
        total[..., several, :, :], common[..., several] = found
    return total, common


def _joined(
    gram: NDArray[np.float64], ratio: NDArray[np.float64], counts: NDArray[np.int64], positions: _Positions
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ledgers of tensors with these numbers of consecutive segments; the products are overwritten."""
    displacement, gradient, _ = positions
    firsts = np.cumsum(counts) - counts
    along = np.add.reduceat(gram[..., gradient, displacement], firsts, axis=-1)
    square = np.add.reduceat(gram[..., displacement, displacement], firsts, axis=-1)
    common = best_ratio(along, square)
    convert(gram, ratio, np.repeat(common, counts, axis=-1), positions)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.add.reduceat(gram, firsts, axis=-3), common


def best_ratio(along: NDArray[np.float64], square: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ratio c that minimizes the residual g - c d, from g.d and d.d; 0 if there is none."""
    with np.errstate(all="ignore"):
        ratio = along / square
    return np.where(np.isfinite(ratio), ratio, 0.0)


def convert(
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    common: NDArray[np.float64],
    positions: _Positions = _OF_UPDATES,
) -> None:
    """Replace the products of residuals with one ratio by those with another ratio.

    Parameters
    ----------
    gram : float64 array, shape (..., vectors, vectors)
        Changed in place.
    ratio, common : float64 arrays, shape (...)
        The ratio before and after.
    positions : (int, int, int)
        See `combine`.
    """
    displacement, _, residual = positions
    shift = (ratio - common)[..., None]
    with np.errstate(invalid="ignore", over="ignore"):
        gram[..., residual, :] += shift * gram[..., displacement, :]
        gram[..., :, residual] += shift * gram[..., :, displacement]
        # The element r.r receives both terms: r.r + shift d.r, and then shift (r.d + shift d.d).


def add_replicates(tensors: int, indices: NDArray[np.int64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ledger of the replicates of each tensor from those of its segments, as `add_segments` does.

    The ratio c of the residual of the mean m is not stored, because c = (g.m - r.m) / m.m. Its rounding error
    turns the gradient by a few units roundoff.

    Parameters
    ----------
    tensors, indices
        As for `add_segments`.
    gram : float64 array, shape (updates, segments, vectors, vectors)

    Returns
    -------
    array, shape (updates, tensors, vectors, vectors)
    """
    mean, gradient, residual = _OF_REPLICATES
    with np.errstate(all="ignore"):
        ratio = (gram[..., gradient, mean] - gram[..., residual, mean]) / gram[..., mean, mean]
    ratio = np.where(np.isfinite(ratio), ratio, 0.0)
    return add_segments(tensors, indices, gram, ratio, _OF_REPLICATES)[0]
