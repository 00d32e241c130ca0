"""Compute the inner products of the vectors of neighbouring states, in one pass over a tile of training state.

For two neighbouring states of a segment (a tensor, or the part of a tensor in the tile), the vectors are formed
element by element in float64, and every inner product is accumulated in the same loop. Each stored byte is read
once, and nothing as large as the tile is allocated::

    parameter        p = theta_t                      gradient         g = grad L(theta_t)
    displacement     d = theta_{t+1} - theta_t        gradient_change  e = grad L(theta_{t+1}) - g
    residual         r = g - c d                      hvp              h = H d, if logged

The residual preserves small angles. The component of g orthogonal to d equals that of r. With c near g.d / d.d, the
products r.r and r.d contain it without the cancellation that affects g.g, g.d and d.d. c is estimated from a sample
of the segment and stored with the products. It need not be exact, but if it is off by one part in n, the angle has
a floor of 1e-8 / n. If the sums show that the estimate is poor, the segment is therefore summed again.

Products may underflow or overflow. The squares of the vectors tell this apart from vectors that are zero or not
finite (`squared_norm` of `natgrad.theory.geometry` has the same convention): a square is 0 only if the vector is
zero, NaN only if an element is not finite, the smallest positive float64 if it underflows to 0, and infinity if it
overflows.

Sums run over blocks of `BLOCK` elements. The sums of blocks are added with compensation for their rounding errors,
so the error does not grow with the length of a segment. The gradient is summed as its two parts, r and c d, which
takes ten products instead of fifteen.

The kernel is compiled because NumPy would write each difference and product to memory and read it again. That takes
several passes instead of one, and memory bandwidth limits the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload
from numpy.typing import NDArray

from natgrad.kernel.compiled import REORDER, addresses, entry, inner, not_finite, pointer, widen, words_of

__all__ = [
    "ATTEMPTS",
    "BLOCK",
    "NONZERO",
    "SAMPLE",
    "SAMPLES",
    "improved",
    "products",
    "quotient",
    "row_products",
    "segment_products",
]

BLOCK = 1024
"""Elements summed in plain float64 before the sum is added to the compensated total."""

_CACHE_BLOCK = 16 * BLOCK
"""Elements that are processed for all updates before the next elements. They are few enough that the next update
finds its first state in the cache, and many enough that the processor detects sequential reads and prefetches."""

SAMPLE, SAMPLES = 64, 16
"""The ratio c is estimated from at most 16 samples of 64 elements, spread evenly over a segment."""

_NEARLY_PARALLEL = 2.0**-40
"""A residual below 1e-6 of the gradient gives the angle to 1e-14 even if it is parallel to the displacement."""

_EXACT_SQUARE = 2.0**-980
"""A smaller square of a displacement is not accurate, because its products underflow; it leaves no ratio c."""

NONZERO = 5e-324
"""Square of a vector that is not zero, but whose square underflows."""


@inner(fastmath=REORDER)
def _block(p0: Any, p1: Any, g0: Any, g1: Any, n: int, c: float, out: Any) -> None:
    pp = pd = pe = pr = dd = de = dr = ee = er = rr = 0.0
    for i in range(n):
        p = widen(p0[i])
        d = widen(p1[i]) - p
        g = widen(g0[i])
        r = g - c * d
        pp += p * p
        pd += p * d
        pr += p * r
        dd += d * d
        dr += d * r
        rr += r * r
        if g1 is not None:
            e = widen(g1[i]) - g
            pe += p * e
            de += d * e
            ee += e * e
            er += e * r
    out[0], out[1], out[2], out[3] = pp, pd, pe, pr
    out[4], out[5], out[6] = dd, de, dr
    out[7], out[8] = ee, er
    out[9] = rr


@inner(fastmath=REORDER)
def _hvp_block(p0: Any, p1: Any, g0: Any, g1: Any, h0: Any, n: int, c: float, out: Any) -> None:
    # The block is still in the cache of the processor, so memory is not read again.
    ph = dh = eh = rh = hh = 0.0
    for i in range(n):
        p = widen(p0[i])
        d = widen(p1[i]) - p
        g = widen(g0[i])
        h = widen(h0[i])
        ph += p * h
        dh += d * h
        eh += (widen(g1[i]) - g) * h
        rh += (g - c * d) * h
        hh += h * h
    out[10], out[11], out[12], out[13], out[14] = ph, dh, eh, rh, hh


_SUMS, _SUMS_WITH_HVP = 10, 15


@inner(fastmath=REORDER)
def _sample(p0: Any, p1: Any, g0: Any, n: int) -> tuple[float, float]:
    dg = dd = 0.0
    for i in range(n):
        d = widen(p1[i]) - widen(p0[i])
        dg += d * widen(g0[i])
        dd += d * d
    return dg, dd


@inner(forceinline=True)
def quotient(dg: float, dd: float) -> float:
    """Return the ratio d.g / d.d, or 0 if it is not finite."""
    ratio = dg / dd if dd > 0.0 else 0.0
    return ratio if np.isfinite(ratio) else 0.0


@inner(forceinline=True)
def _sampled_ratio(p0: Any, p1: Any, g0: Any, like: Any, first: int, n: int) -> float:
    dg = dd = 0.0
    # Sampling an element costs a third of summing its products, so at most a quarter of the elements are sampled.
    size, samples = SAMPLE, min(SAMPLES, n // (4 * SAMPLE))
    if samples > 1:
        for k in range(samples):
            a = first + k * (n - size) // (samples - 1)
            more = _sample(pointer(p0, a, like[0]), pointer(p1, a, like[0]), pointer(g0, a, like[1]), size)
            dg += more[0]
            dd += more[1]
    if dd == 0.0:
        # Fewer than two samples, or a sparse update that they missed: use all elements.
        dg, dd = _sample(pointer(p0, first, like[0]), pointer(p1, first, like[0]), pointer(g0, first, like[1]), n)
    return quotient(dg, dd)


@inner(forceinline=True)
def improved(c: float, dd: float, rd: float, rr: float) -> float:
    """Return the ratio itself, a better one if the sums show that it is poor, or NaN if they show nothing else."""
    if not _EXACT_SQUARE <= dd < np.inf:
        # The displacement has no ratio, even if the sample had one.
        return 0.0
    if rr == np.inf:
        # The ratio of the sample is so large that the residual overflows, or an element is infinite.
        return np.nan
    gg = rr + 2.0 * c * rd + c * (c * dd)
    if rr > _NEARLY_PARALLEL * gg and abs(rd) > np.sqrt(0.5) * np.sqrt(rr) * np.sqrt(dd):
        # Most of the residual is parallel to the displacement, so its own sums give a better ratio.
        return c + rd / dd if np.isfinite(rd / dd) else c
    return c


ATTEMPTS = 3
"""Maximum number of times that a segment is summed: with the ratio of a sample, with the ratio from the sums, and
with the ratio of all elements. The last one is needed if the first ratio is 1e16 times as large as the best."""


@inner()
def _sum_blocks(
    p: Any,
    g: Any,
    e: Any,
    h: Any,
    like: Any,
    rows: Any,
    first: int,
    stop: int,
    ratio: Any,
    total: Any,
    error: Any,
    part: Any,
) -> None:
    """Sum the products of all vectors except the gradient over the blocks of a segment.

    A cache block is processed for all updates before the next cache block. The state after an update is then still
    in the cache when it is the state before the next update.
    """
    sums = total.shape[1]
    for t in rows:
        total[t] = 0.0
        error[t] = 0.0
    for low in range(first, stop, _CACHE_BLOCK):
        high = min(low + _CACHE_BLOCK, stop)
        for t in rows:
            for a in range(low, high, BLOCK):
                b = min(a + BLOCK, high)
                p0, p1 = pointer(p[t], a, like[0]), pointer(p[t + 1], a, like[0])
                g0 = pointer(g[t], a, like[1])
                if e is None:
                    _block(p0, p1, g0, None, b - a, ratio[t], part)
                else:
                    _block(p0, p1, g0, pointer(e[t], a, like[1]), b - a, ratio[t], part)
                if h is not None:
                    g1 = pointer(e[t], a, like[1])
                    _hvp_block(p0, p1, g0, g1, pointer(h[t], a, like[2]), b - a, ratio[t], part)
                for k in range(sums):
                    # The rounding error of a sum, exactly and without a branch that could be mispredicted (Knuth).
                    new = total[t, k] + part[k]
                    added = new - total[t, k]
                    error[t, k] += (total[t, k] - (new - added)) + (part[k] - added)
                    total[t, k] = new
    for t in rows:
        for k in range(sums):
            # After an overflow the error is inf - inf; the infinite total is then the correct result.
            if np.isfinite(error[t, k]):
                total[t, k] += error[t, k]


@inner()
def _along(c: float, product: float) -> float:
    # Without a ratio the residual is the gradient, even if the displacement is not finite.
    return c * product if c != 0.0 else 0.0


@inner(forceinline=True)
def _fill(c: float, sums: Any, gram: Any) -> None:
    """Fill in a Gram matrix: the sums, and the products of the gradient g = r + c d."""
    pp, pd, pe, pr = sums[0], sums[1], sums[2], sums[3]
    dd, de, dr, ee, er, rr = sums[4], sums[5], sums[6], sums[7], sums[8], sums[9]
    pg, dg, ge, gr = pr + _along(c, pd), dr + _along(c, dd), er + _along(c, de), rr + _along(c, dr)
    gram[0, 0] = pp
    gram[0, 1] = gram[1, 0] = pd
    gram[0, 2] = gram[2, 0] = pg
    gram[0, 3] = gram[3, 0] = pe
    gram[0, 4] = gram[4, 0] = pr
    gram[1, 1] = dd
    gram[1, 2] = gram[2, 1] = dg
    gram[1, 3] = gram[3, 1] = de
    gram[1, 4] = gram[4, 1] = dr
    gram[2, 2] = gr + _along(c, dg)
    gram[2, 3] = gram[3, 2] = ge
    gram[2, 4] = gram[4, 2] = gr
    gram[3, 3] = ee
    gram[3, 4] = gram[4, 3] = er
    gram[4, 4] = rr
    if gram.shape[0] == 6:
        ph, dh, eh, rh, hh = sums[10], sums[11], sums[12], sums[13], sums[14]
        gram[0, 5] = gram[5, 0] = ph
        gram[1, 5] = gram[5, 1] = dh
        gram[2, 5] = gram[5, 2] = rh + _along(c, dh)
        gram[3, 5] = gram[5, 3] = eh
        gram[4, 5] = gram[5, 4] = rh
        gram[5, 5] = hh


@inner()
def _differing(x0: Any, x1: Any, n: int) -> int:
    """Count the elements of x1 that differ from those of x0, or that are not zero if x0 is None."""
    count = 0
    for i in range(n):
        count += widen(x1[i]) != (0.0 if x0 is None else widen(x0[i]))
    return count


def _square_leaves_range(words: Any) -> Any:
    """Return True if squares of stored words can underflow or overflow in float64: only those of float64 can."""


@overload(_square_leaves_range, strict=False)
def _square_leaves_range_compiled(words: Any) -> Any:
    if words.dtype == types.float64:
        return lambda words: True
    return lambda words: False


@inner()
def _mark(gram: Any, vector: int, x0: Any, x1: Any, n: int) -> None:
    """Make the square of a vector x1 (or x1 - x0) obey the convention. The segment is still in the cache."""
    square = gram[vector, vector]
    if 0.0 < square < np.inf:
        return
    if not _square_leaves_range(x1) and not square < 0.0:
        gram[vector, vector] = 0.0 if square == 0.0 else np.nan
    elif square <= 0.0:
        gram[vector, vector] = 0.0 if _differing(x0, x1, n) == 0 else NONZERO
    else:
        count = not_finite(x1, n)
        if x0 is not None:
            count += not_finite(x0, n)
        gram[vector, vector] = np.inf if count == 0 else np.nan


@inner()
def _mark_all(p0: Any, p1: Any, g0: Any, g1: Any, n: int, gram: Any) -> None:
    _mark(gram, 0, None, p0, n)
    _mark(gram, 1, p0, p1, n)
    if np.isnan(gram[1, 1]):
        gram[2, 2] = np.nan  # summed from parts along and across the displacement
    else:
        _mark(gram, 2, None, g0, n)
    if g1 is not None:
        _mark(gram, 3, g0, g1, n)


@inner()
def segment_products(
    p: Any,
    g: Any,
    e: Any,
    h: Any,
    like: Any,
    first: int,
    stop: int,
    ratio: Any,
    total: Any,
    error: Any,
    part: Any,
    gram: Any,
) -> None:
    """Compute the products of one segment of any length, for all updates.

    Parameters
    ----------
    p, g, h : uintp arrays
        As for `row_products`.
    e : uintp array or None
        Address of the gradient after each update; if None, the products of its change are 0.
    like : tuple of three pointers
        As for `row_products`.
    first, stop : int
        Elements of the segment.
    ratio, total, error, part : arrays
        Output, shape (updates,), and buffers, shape (updates, sums) and (sums,).
    gram : array, shape (updates, vectors, vectors)
        Output.
    """
    rows = len(ratio)
    for t in range(rows):
        ratio[t] = _sampled_ratio(p[t], p[t + 1], g[t], like, first, stop - first)
    _sum_blocks(p, g, e, h, like, range(rows), first, stop, ratio, total, error, part)
    for t in range(rows):
        p0, p1, g0 = pointer(p[t], first, like[0]), pointer(p[t + 1], first, like[0]), pointer(g[t], first, like[1])
        for attempt in range(1, ATTEMPTS):
            better = improved(ratio[t], total[t, 4], total[t, 6], total[t, 9])
            if better == ratio[t]:
                break
            if attempt > 1 or np.isnan(better):
                better = quotient(*_sample(p0, p1, g0, stop - first))
            ratio[t] = better
            _sum_blocks(p, g, e, h, like, range(t, t + 1), first, stop, ratio, total, error, part)
        _fill(ratio[t], total[t], gram[t])
        if e is None:
            _mark_all(p0, p1, g0, None, stop - first, gram[t])
        else:
            _mark_all(p0, p1, g0, pointer(e[t], first, like[1]), stop - first, gram[t])
        if h is not None:
            _mark(gram[t], 5, None, pointer(h[t], first, like[2]), stop - first)


@entry()
def row_products(p: Any, g: Any, h: Any, like: Any, starts: Any, gram: Any, ratio: Any) -> None:
    """Compute `products` from compiled code.

    Parameters
    ----------
    p, g, h : uintp arrays
        Address of each state of the parameter, the gradient and, unless None, the Hessian-vector product.
    like : tuple of three arrays
        Arrays with elements of the same types; only the types are used.
    starts, gram, ratio : arrays
        As for `products`.
    """
    rows, segments = gram.shape[0], gram.shape[1]
    sums = _SUMS_WITH_HVP if gram.shape[2] == 6 else _SUMS
    total, error, part = np.empty((rows, sums)), np.empty((rows, sums)), np.empty(sums)
    # Only the types of `like` are needed, and pointers have them at no cost.
    null = np.uintp(0)
    words = pointer(null, 0, like[0]), pointer(null, 0, like[1]), pointer(null, 0, like[2])
    end = 0
    for begin in range(segments):
        if begin < end:
            continue
        # Segments of at most one block are processed together for all updates, as many as fit into a cache block.
        end = begin
        while end < segments and starts[end + 1] <= min(starts[end] + BLOCK, starts[begin] + _CACHE_BLOCK):
            end += 1
        for t in range(rows):
            for s in range(begin, end):
                first, n = starts[s], starts[s + 1] - starts[s]
                p0, p1 = pointer(p[t], first, words[0]), pointer(p[t + 1], first, words[0])
                g0, g1 = pointer(g[t], first, words[1]), pointer(g[t + 1], first, words[1])
                c = _sampled_ratio(p[t], p[t + 1], g[t], words, first, n)
                for attempt in range(ATTEMPTS):
                    # There is only one block, so there is no rounding error to compensate.
                    _block(p0, p1, g0, g1, n, c, part)
                    if h is not None:
                        _hvp_block(p0, p1, g0, g1, pointer(h[t], first, words[2]), n, c, part)
                    better = improved(c, part[4], part[6], part[9])
                    if better == c or attempt == ATTEMPTS - 1:
                        break
                    if attempt > 0 or np.isnan(better):
                        better = quotient(*_sample(p0, p1, g0, n))
                    c = better
                ratio[t, s] = c
                _fill(c, part, gram[t, s])
                _mark_all(p0, p1, g0, g1, n, gram[t, s])
                if h is not None:
                    _mark(gram[t, s], 5, None, pointer(h[t], first, words[2]), n)
        if end > begin:
            continue
        # A segment of several blocks.
        end = begin + 1
        low, high = starts[begin], starts[end]
        segment_products(p, g, g[1:], h, words, low, high, ratio[:, begin], total, error, part, gram[:, begin])


def products(
    parameter: Sequence[NDArray[Any]],
    gradient: Sequence[NDArray[Any]],
    starts: NDArray[np.int64],
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    hvp: Sequence[NDArray[Any]] | None = None,
) -> None:
    """Compute the inner products of the vectors of each pair of neighbouring states, per segment.

    Parameters
    ----------
    parameter, gradient : sequence of arrays, shape (some states, elements)
        States of updates + 1 consecutive logged steps, in one block of states or in several at any address. The
        last state is the halo. The dtype is float16, float32, float64, bfloat16, or uint16 with the bits of
        bfloat16. The elements of a state are contiguous.
    starts : int64 array, shape (segments + 1,)
        Segment s has the elements ``starts[s]`` to ``starts[s + 1]``. Elements after the last segment are padding.
    gram : float64 array, shape (updates, segments, vectors, vectors)
        Output: the inner products, in the order of `natgrad.schema.names.VECTORS`.
    ratio : float64 array, shape (updates, segments)
        Output: the ratio c of the residual, gradient per displacement.
    hvp : sequence of arrays, shape (some updates, elements), optional
        Hessian-vector products H (theta_{t+1} - theta_t) of at least as many updates, if logged.

    Raises
    ------
    ValueError
        If there are too few states or elements, or they are not contiguous.

    Notes
    -----
    The function releases the interpreter lock. The bits of an update depend only on its two states and `starts`,
    not on the number of updates computed together. A segment whose displacement is zero, not finite, or so
    small or large that its square underflows or overflows, has ratio 0. If the displacement is not finite, every
    product with the gradient is NaN or infinite.

    Ten products are summed (fifteen with the Hessian-vector product). Those of the gradient follow from g = r + c
    d. Neither part exceeds g by more than a small factor, so they are as accurate as direct sums.
    """
    rows = len(gram)
    blocks = [words_of(array) for array in (parameter, gradient, hvp or parameter)]
    parameters, gradients, hvps = (addresses(array, int(starts[-1])) for array in blocks)
    if min(len(parameters), len(gradients)) <= rows or len(hvps) < rows:
        raise ValueError(f"{rows} updates need {rows + 1} states")
    # The compiled code receives addresses, and an empty array for the type of each array.
    like = tuple(np.empty(0, array[0].dtype) for array in blocks)
    row_products(parameters, gradients, None if hvp is None else hvps, like, starts, gram, ratio)
