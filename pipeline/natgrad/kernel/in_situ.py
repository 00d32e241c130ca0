"""Compute the inner products of an update where it happens, and refresh the copy of the parameters.

A training loop has the parameters after an update, a copy of those before it, and the gradient. Tensors are divided
into segments that fit into the cache, so that the parameters are copied while they are still in the cache. Each
segment has its own ratio of the residual, and the sums are those of `natgrad.kernel.gram`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from natgrad.kernel.compiled import entry, pointer
from natgrad.kernel.gram import BLOCK, segment_products

__all__ = ["SEGMENT", "refresh_products"]

SEGMENT = 32 * BLOCK
"""Elements of a segment. Its three arrays take 384 KiB in float32, which fits into the cache of a core."""


@entry()
def refresh_products(
    before: Any, after: Any, gradient: Any, like: Any, sizes: Any, segments: Any, gram: Any, ratio: Any
) -> None:
    """Compute the products of the segments of some tensors, and copy the parameters after the update.

    Parameters
    ----------
    before, after, gradient : uintp arrays, shape (tensors,)
        Addresses of the elements. Those before the update are overwritten with those after it.
    like : tuple of two arrays
        Arrays with elements of the types of the parameters and the gradients; only the types are used.
    sizes : int64 array, shape (tensors,)
        Number of elements of each tensor.
    segments : int64 array, shape (tensors,)
        First segment of each tensor.
    gram : float64 array, shape (segments, 5, 5)
        Output, in the order of `natgrad.schema.names.VECTORS`. The products of ``gradient_change`` are 0.
    ratio : float64 array, shape (segments,)
        Output.
    """
    total, error, part = np.empty((1, 10)), np.empty((1, 10)), np.empty(10)
    p, g = np.empty(2, np.uintp), np.empty(1, np.uintp)
    null = np.uintp(0)
    words = pointer(null, 0, like[0]), pointer(null, 0, like[1]), pointer(null, 0, like[0])
    for k in range(len(sizes)):
        p[0], p[1], g[0] = before[k], after[k], gradient[k]
        s = segments[k]
        for first in range(0, sizes[k], SEGMENT):
            stop = min(first + SEGMENT, sizes[k])
            segment_products(
                p, g, None, None, words, first, stop, ratio[s : s + 1], total, error, part, gram[s : s + 1]
            )
            copy, new = pointer(before[k], 0, words[0]), pointer(after[k], 0, words[0])
            for i in range(first, stop):
                copy[i] = new[i]
            s += 1
