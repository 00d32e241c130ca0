"""Sum the ledgers of segments to ledgers of tensors with NumPy, and bound their rounding error."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import VECTORS

__all__ = [
    "add_products",
    "add_segments",
    "combine",
    "roundoff_bound",
]

_DISPLACEMENT, _GRADIENT, _RESIDUAL = map(VECTORS.index, ("displacement", "gradient", "residual"))


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
    gram: NDArray[np.float64], ratio: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Combine the ledgers of several segments, for example of the parts of one tensor.

    The inner products of stacked vectors are sums. The residuals must first be converted to one ratio, by
    r' = r + (c - c') d with c' = sum(g.d) / sum(d.d), the ratio that minimizes the joint residual.

    Parameters
    ----------
    gram : float64 array, shape (..., segments, vectors, vectors)
    ratio : float64 array, shape (..., segments)

    Returns
    -------
    gram : float64 array, shape (..., vectors, vectors)
    ratio : float64 array, shape (...)
    """
    if gram.shape[-3] == 1:
        return gram[..., 0, :, :], ratio[..., 0]
    along = gram[..., _GRADIENT, _DISPLACEMENT].sum(axis=-1)
    square = gram[..., _DISPLACEMENT, _DISPLACEMENT].sum(axis=-1)
    with np.errstate(all="ignore"):
        common = along / square
    common = np.where(np.isfinite(common), common, 0.0)
    shift = (ratio - common[..., None])[..., None]
    moved = gram.copy()
    with np.errstate(invalid="ignore", over="ignore"):
        moved[..., _RESIDUAL, :] += shift * gram[..., _DISPLACEMENT, :]
        moved[..., :, _RESIDUAL] += shift * moved[..., :, _DISPLACEMENT]
        # The element r.r receives both terms: r.r + shift d.r, and then shift (r.d + shift d.d).
        return moved.sum(axis=-3), common


def add_segments(
    tensors: int, indices: NDArray[np.int64], gram: NDArray[np.float64], ratio: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ledger of each tensor from the ledgers of its segments, in the order of the element axis.

    If every tensor is one segment, the ledgers are returned without a copy.

    Parameters
    ----------
    tensors : int
        Number of tensors. The products of a tensor without elements, which has no segment, are 0.
    indices : int64 array, shape (segments,)
        Tensor of each segment, non-decreasing.
    gram : float64 array, shape (updates, segments, vectors, vectors)
    ratio : float64 array, shape (updates, segments)

    Returns
    -------
    gram : float64 array, shape (updates, tensors, vectors, vectors)
    ratio : float64 array, shape (updates, tensors)
    """
    if np.array_equal(indices, np.arange(tensors)):
        return gram, ratio
    updates, _, count, _ = gram.shape
    total, common = np.zeros((updates, tensors, count, count)), np.zeros((updates, tensors))
    counts = np.bincount(indices, minlength=tensors)
    firsts = np.cumsum(counts) - counts
    single = counts == 1
    total[:, single], common[:, single] = gram[:, firsts[single]], ratio[:, firsts[single]]
    for tensor in np.flatnonzero(counts > 1):
        parts = slice(firsts[tensor], firsts[tensor] + counts[tensor])
        total[:, tensor], common[:, tensor] = combine(gram[:, parts], ratio[:, parts])
    return total, common


def add_products(tensors: int, indices: NDArray[np.int64], gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the inner products of each tensor from those of its segments, in the order of the element axis.

    Parameters
    ----------
    tensors, indices
        As for `add_segments`.
    gram : float64 array, shape (updates, segments, vectors, vectors)

    Returns
    -------
    array, shape (updates, tensors, vectors, vectors)
    """
    total = np.zeros((len(gram), tensors, *gram.shape[2:]))
    for segment, tensor in enumerate(indices):
        total[:, tensor] += gram[:, segment]
    return total
