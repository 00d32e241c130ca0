"""The kernel: one pass over a tile of training state to the inner products of its vectors.

For two neighbouring states of a segment (a tensor, or the part of one that lies in the tile) the vectors are
formed element by element in float64 and every inner product is accumulated in the same loop, so each stored
byte is read once and nothing as large as the tile is ever allocated::

    parameter        p = theta_t                      gradient         g = grad L(theta_t)
    displacement     d = theta_{t+1} - theta_t        gradient_change  e = grad L(theta_{t+1}) - g
    residual         r = g - c d                      hvp              h = H d, where logged

The residual keeps small angles: the part of g orthogonal to d is that of r, and with c near g.d / d.d the
products r.r and r.d carry it without the cancellation that g.g, g.d and d.d suffer. c is found from a sample
of the segment and kept beside the products. It need not be exact, but of an error of one part in n the angle
keeps a floor of 1e-8 / n, so where the sums show that the sample misled the segment is summed once more.

Sums run over blocks of `BLOCK` elements; the blocks' sums are added with their rounding errors carried along
(Neumaier), so the error does not grow with the length of a segment. The gradient is summed as its two parts,
r and c d, which costs ten products in place of fifteen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from pipeline.schema import HVP, VECTORS

__all__ = ["BLOCK", "add_segments", "combine", "products", "roundoff_bound", "vectors"]

BLOCK = 1024
"""Elements summed in plain float64 before the sum is carried over to the compensated total."""

_RUN, _RUNS = 64, 16
"""The ratio c is taken from this many runs of this many elements, spread evenly over a segment."""

_NEARLY_PARALLEL = 2.0**-40
"""Residuals below 1e-6 of the gradient carry the angle to 1e-14 even where they lie along the displacement."""

_PARAMETER, _DISPLACEMENT, _GRADIENT, _CHANGE, _RESIDUAL, _HVP = range(len(VECTORS))
_WITHOUT_HVP = len(VECTORS) - 1

# Sums may be reordered, which lets the compiler use vector registers; NaN and infinity stay what they are.
_REORDER = {"reassoc", "contract", "nsz"}


def vectors(hvp: bool) -> tuple[str, ...]:
    """Names of the ledger's vectors, with or without the Hessian-vector product."""
    return tuple(name for name in VECTORS if hvp or name != HVP)


def roundoff_bound(elements: int) -> float:
    """Bound of the rounding error of an inner product x.y, as a multiple of |x||y|.

    Sums of ``n`` float64 products in any order differ from each other and from the exact value by at most
    ``4 sqrt(n) u`` with u = 2**-53 (DESIGN, section 3: rounding errors of a long sum behave as independent;
    the worst case is ``n u / (1 - n u)``, Higham, Accuracy and Stability, section 3.1).

    Parameters
    ----------
    elements : int
        Number of terms.
    """
    return float(4.0 * np.sqrt(max(elements, 1)) * 2.0**-53)


# Stored words to float64 --------------------------------------------------------------------------------------
# bfloat16 arrives as uint16 and float16 as int16 (its bits), as the compiler has neither type.


def _bitcast(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


_as_float32: Any = intrinsic(_bitcast)


def _widen(word: Any) -> Any:
    """Value of a stored word in float64, exactly."""


@overload(_widen, strict=False)
def _widen_compiled(word: Any) -> Any:
    if isinstance(word, types.Float):
        return lambda word: np.float64(word)
    if word == types.uint16:
        return lambda word: np.float64(_as_float32(np.uint32(word) << np.uint32(16)))

    def half(word: Any) -> Any:
        # Shifted into place the exponent is short by 112; an exponent of all ones means infinity or NaN.
        bits = np.uint32(word)
        magnitude = (bits & np.uint32(0x7FFF)) << np.uint32(13)
        special = np.uint32(magnitude >= np.uint32(0x0F800000))
        value = _as_float32(magnitude | (special * np.uint32(0x7F800000)))
        scale = np.float32(2.0**112) * np.float32(1 - special) + np.float32(special)
        sign = np.float32(1.0) - np.float32(2.0) * np.float32((bits >> np.uint32(15)) & np.uint32(1))
        return np.float64(sign * scale * value)

    return half


@njit(cache=True, nogil=True, fastmath=_REORDER)
def _block(p0: Any, p1: Any, g0: Any, g1: Any, c: float, out: Any) -> None:
    pp = pd = pe = pr = dd = de = dr = ee = er = rr = 0.0
    for i in range(p0.size):
        p = _widen(p0[i])
        d = _widen(p1[i]) - p
        g = _widen(g0[i])
        e = _widen(g1[i]) - g
        r = g - c * d
        pp += p * p
        pd += p * d
        pe += p * e
        pr += p * r
        dd += d * d
        de += d * e
        dr += d * r
        ee += e * e
        er += e * r
        rr += r * r
    out[0, 0], out[0, 1], out[0, 3], out[0, 4] = pp, pd, pe, pr
    out[1, 1], out[1, 3], out[1, 4] = dd, de, dr
    out[3, 3], out[3, 4] = ee, er
    out[4, 4] = rr


@njit(cache=True, nogil=True, fastmath=_REORDER)
def _hvp_block(p0: Any, p1: Any, g0: Any, g1: Any, h0: Any, c: float, out: Any) -> None:
    # The block is still in the cache of the processor: memory is not read again.
    ph = dh = eh = rh = hh = 0.0
    for i in range(p0.size):
        p = _widen(p0[i])
        d = _widen(p1[i]) - p
        g = _widen(g0[i])
        h = _widen(h0[i])
        ph += p * h
        dh += d * h
        eh += (_widen(g1[i]) - g) * h
        rh += (g - c * d) * h
        hh += h * h
    out[0, 5], out[1, 5], out[3, 5], out[4, 5], out[5, 5] = ph, dh, eh, rh, hh


@njit(cache=True, nogil=True)
def _sampled_ratio(p0: Any, p1: Any, g0: Any, run: int, runs: int) -> float:
    n = p0.size
    dg = dd = 0.0
    if n > run * runs:
        for k in range(runs):
            start = k * (n - run) // (runs - 1)
            for i in range(start, start + run):
                d = _widen(p1[i]) - _widen(p0[i])
                dg += d * _widen(g0[i])
                dd += d * d
    if dd == 0.0:
        # A short segment, or a sparse update of which the sample saw nothing: look at all of it.
        for i in range(n):
            d = _widen(p1[i]) - _widen(p0[i])
            dg += d * _widen(g0[i])
            dd += d * d
    ratio = dg / dd if dd > 0.0 else 0.0
    return ratio if np.isfinite(ratio) else 0.0


@njit(cache=True, nogil=True)
def _sum_blocks(
    p: Any, g: Any, h: Any, rows: Any, first: int, stop: int, ratio: Any, gram: Any, error: Any, part: Any
) -> None:
    """Sum the products of all vectors but the gradient over the blocks of a segment.

    A block is taken through all rows before the next one, so the state after a row is still in the cache when
    it is the state before the next.
    """
    count = gram.shape[-1]
    for t in rows:
        gram[t] = 0.0
        error[t] = 0.0
    for a in range(first, stop, BLOCK):
        b = min(a + BLOCK, stop)
        for t in rows:
            _block(p[t, a:b], p[t + 1, a:b], g[t, a:b], g[t + 1, a:b], ratio[t], part)
            if count == 6:
                _hvp_block(p[t, a:b], p[t + 1, a:b], g[t, a:b], g[t + 1, a:b], h[t, a:b], ratio[t], part)
            for i in range(count):
                for j in range(i, count):
                    x, old = part[i, j], gram[t, i, j]
                    new = old + x
                    error[t, i, j] += (old - new) + x if abs(old) >= abs(x) else (x - new) + old
                    gram[t, i, j] = new
    for t in rows:
        for i in range(count):
            for j in range(i, count):
                # An overflow leaves inf - inf in the error: the infinite total is the honest answer.
                if np.isfinite(error[t, i, j]):
                    gram[t, i, j] += error[t, i, j]


@njit(cache=True, nogil=True)
def _along(c: float, product: float) -> float:
    # Without a ratio the residual is the gradient, whatever the displacement is.
    return c * product if c != 0.0 else 0.0


@njit(cache=True, nogil=True)
def _add_gradient(c: float, gram: Any) -> None:
    """Fill in the products of the gradient, g = r + c d, and the lower half."""
    gram[0, 2] = gram[0, 4] + _along(c, gram[0, 1])
    gram[1, 2] = gram[1, 4] + _along(c, gram[1, 1])
    gram[2, 3] = gram[3, 4] + _along(c, gram[1, 3])
    gram[2, 4] = gram[4, 4] + _along(c, gram[1, 4])
    gram[2, 2] = gram[2, 4] + _along(c, gram[1, 2])
    if gram.shape[0] == 6:
        gram[2, 5] = gram[4, 5] + _along(c, gram[1, 5])
    for i in range(gram.shape[0]):
        for j in range(i):
            gram[i, j] = gram[j, i]


@njit(cache=True, nogil=True)
def _products(p: Any, g: Any, h: Any, starts: Any, run: int, runs: int, gram: Any, ratio: Any) -> None:
    rows, segments, count = gram.shape[0], gram.shape[1], gram.shape[2]
    part = np.zeros((count, count))
    error = np.zeros((rows, count, count))
    for s in range(segments):
        first, stop = starts[s], starts[s + 1]
        c, total = ratio[:, s], gram[:, s]
        for t in range(rows):
            c[t] = _sampled_ratio(p[t, first:stop], p[t + 1, first:stop], g[t, first:stop], run, runs)
        _sum_blocks(p, g, h, range(rows), first, stop, c, total, error, part)
        for t in range(rows):
            rr, rd, dd = total[t, 4, 4], total[t, 1, 4], total[t, 1, 1]
            gg = rr + 2.0 * c[t] * rd + c[t] * c[t] * dd
            if rr > _NEARLY_PARALLEL * gg and rd * rd > 0.5 * rr * dd and np.isfinite(rd / dd):
                # The sample misled: most of the residual lies along the displacement. Its own sums know better.
                c[t] += rd / dd
                _sum_blocks(p, g, h, range(t, t + 1), first, stop, c, total, error, part)
            _add_gradient(c[t], total[t])


def _words(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype == np.float16:
        return array.view(np.int16)
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array


def products(
    parameter: NDArray[Any],
    gradient: NDArray[Any],
    starts: NDArray[np.int64],
    gram: NDArray[np.float64],
    ratio: NDArray[np.float64],
    hvp: NDArray[Any] | None = None,
) -> None:
    """Inner products of the vectors of each pair of neighbouring states, per segment.

    Parameters
    ----------
    parameter, gradient : array, shape (rows + 1, elements), C-contiguous
        States of rows + 1 consecutive logged steps: the last one is the halo. float16, float32, float64,
        bfloat16, or bfloat16 as its bits in uint16.
    starts : int64 array, shape (segments + 1,)
        Segment s is the elements ``starts[s]`` to ``starts[s + 1]``; what lies beyond the last is padding.
    gram : float64 array, shape (rows, segments, vectors, vectors)
        Written: the inner products, in the order of `vectors`.
    ratio : float64 array, shape (rows, segments)
        Written: the ratio c of the residual, gradient per displacement.
    hvp : array, shape (rows or more, elements), optional
        Hessian-vector products H (theta_{t+1} - theta_t), where logged.

    Notes
    -----
    Releases the interpreter lock. The bits of a row depend on its two states and `starts` alone, not on how
    many rows are computed together. A segment whose displacement is zero or not finite has ratio 0. Where the
    displacement is not finite, no product with the gradient is a number.

    Ten products are summed (fifteen with the Hessian-vector product); those of the gradient follow from
    g = r + c d. As neither part is longer than g but for a small factor, they are as accurate as sums of their own.
    """
    p, g = _words(parameter), _words(gradient)
    h = g if hvp is None else _words(hvp)
    _products(p, g, h, starts, _RUN, _RUNS, gram, ratio)


# Sums of ledgers ----------------------------------------------------------------------------------------------


def combine(
    gram: NDArray[np.float64], ratio: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ledger of segments taken together, for example the parts of one tensor.

    Inner products of stacked vectors are sums; only the residuals must first be brought to one ratio, by
    r' = r + (c - c') d with c' = sum(g.d) / sum(d.d), the ratio that makes the joint residual smallest.

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
        # Both updates have reached the corner: r.r + shift d.r, then shift (r.d + shift d.d) on top.
        return moved.sum(axis=-3), common


def add_segments(
    tensors: int, indices: NDArray[np.int64], gram: NDArray[np.float64], ratio: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ledger per tensor from the ledgers of its segments, in the order of the element axis.

    Parameters
    ----------
    tensors : int
        Number of tensors; one without a segment (no elements) has products 0.
    indices : int64 array, shape (segments,)
        Tensor of each segment, not decreasing.
    gram : float64 array, shape (rows, segments, vectors, vectors)
    ratio : float64 array, shape (rows, segments)

    Returns
    -------
    gram : float64 array, shape (rows, tensors, vectors, vectors)
    ratio : float64 array, shape (rows, tensors)
    """
    rows, _, count, _ = gram.shape
    total, common = np.zeros((rows, tensors, count, count)), np.zeros((rows, tensors))
    firsts, stops = (
        np.searchsorted(indices, range(tensors)),
        np.searchsorted(indices, range(tensors), "right"),
    )
    for tensor, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
        if first < stop:
            total[:, tensor], common[:, tensor] = combine(gram[:, first:stop], ratio[:, first:stop])
    return total, common
