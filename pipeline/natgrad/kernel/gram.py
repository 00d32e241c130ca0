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

The kernel uses numba because NumPy would write each difference and product to memory and read it again, which takes
several passes instead of one, and memory bandwidth limits the pass. A compiled extension would need a build for
every platform. The intrinsics exist because numba has neither bfloat16 nor float16, and because passing array
slices to a compiled function takes longer than summing a short segment (reference counts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

__all__ = [
    "BLOCK",
    "entry",
    "inner",
    "pointer",
    "products",
    "replicate_products",
    "row_products",
    "segment_products",
    "words_of",
]

BLOCK = 1024
"""Elements summed in plain float64 before the sum is added to the compensated total."""

_CACHE_BLOCK = 16 * BLOCK
"""Elements that are processed for all updates before the next elements. They are few enough that the next update
finds its first state in the cache, and many enough that the processor detects sequential reads and prefetches."""

_SAMPLE, _SAMPLES = 64, 16
"""The ratio c is estimated from at most 16 samples of 64 elements, spread evenly over a segment."""

_NEARLY_PARALLEL = 2.0**-40
"""A residual below 1e-6 of the gradient gives the angle to 1e-14 even if it is parallel to the displacement."""

_EXACT_SQUARE = 2.0**-980
"""A smaller square of a displacement is not accurate, because its products underflow; it leaves no ratio c."""

_NONZERO = 5e-324
"""Square of a vector that is not zero, but whose square underflows."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def entry(**options: Any) -> Callable[[_Function], _Function]:
    """Compile a function that is called from Python, without a wrapper for calls by address.

    Parameters
    ----------
    **options
        Additional options of `numba.njit`.
    """
    compiler: Any = njit  # its annotations lack the options for wrappers
    function: Callable[[_Function], _Function] = compiler(cache=True, nogil=True, no_cfunc_wrapper=True, **options)
    return function


def inner(**options: Any) -> Callable[[_Function], _Function]:
    """Compile a function that is only called from compiled code. Without a Python wrapper it compiles faster.

    Parameters
    ----------
    **options
        Additional options of `numba.njit`.
    """
    return entry(no_cpython_wrapper=True, **options)


# The compiler may reorder sums, to use vector registers. NaN and infinity are preserved.
_REORDER = {"reassoc", "contract", "nsz"}


# Stored words to float64 --------------------------------------------------------------------------------------
# bfloat16 is passed as uint16 and float16 as int16, because the compiler has neither type.


def _bfloat16(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # The upper half of a float32.
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


def _float16(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


_from_bfloat16: Any = intrinsic(_bfloat16)
_from_float16: Any = intrinsic(_float16)


def _widen(word: Any) -> Any:
    """Return the value of a stored word in float64, exactly."""


@overload(_widen, strict=False)
def _widen_compiled(word: Any) -> Any:
    if isinstance(word, types.Float):
        return lambda word: np.float64(word)
    if word == types.uint16:
        return lambda word: np.float64(_from_bfloat16(word))
    return lambda word: np.float64(_from_float16(word))


def _to_pointer(typing_context: Any, address: Any, first: Any, like: Any) -> Any:
    """Generate the code of `pointer`."""
    pointer = types.CPointer(like.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(builder.inttoptr(arguments[0], context.get_value_type(pointer)), [arguments[1]])

    return pointer(types.uintp, types.intp, like), generate


pointer: Any = intrinsic(_to_pointer)
"""Return a pointer to the elements of a state, starting at ``first``: ``pointer(address, first, like)``.

It is for compiled code; ``like`` is an array or pointer with elements of the same type. A slice of an array would
also work, but compiled code counts references when an array is passed to a function, which takes longer than
summing a short segment. For the same reason, functions that run once per short segment are always inlined. Inlining
more functions would cost more compile time than it saves.
"""


@inner(fastmath=_REORDER)
def _block(p0: Any, p1: Any, g0: Any, g1: Any, n: int, c: float, out: Any) -> None:
    pp = pd = pe = pr = dd = de = dr = ee = er = rr = 0.0
    for i in range(n):
        p = _widen(p0[i])
        d = _widen(p1[i]) - p
        g = _widen(g0[i])
        r = g - c * d
        pp += p * p
        pd += p * d
        pr += p * r
        dd += d * d
        dr += d * r
        rr += r * r
        if g1 is not None:
            e = _widen(g1[i]) - g
            pe += p * e
            de += d * e
            ee += e * e
            er += e * r
    out[0], out[1], out[2], out[3] = pp, pd, pe, pr
    out[4], out[5], out[6] = dd, de, dr
    out[7], out[8] = ee, er
    out[9] = rr


@inner(fastmath=_REORDER)
def _hvp_block(p0: Any, p1: Any, g0: Any, g1: Any, h0: Any, n: int, c: float, out: Any) -> None:
    # The block is still in the cache of the processor, so memory is not read again.
    ph = dh = eh = rh = hh = 0.0
    for i in range(n):
        p = _widen(p0[i])
        d = _widen(p1[i]) - p
        g = _widen(g0[i])
        h = _widen(h0[i])
        ph += p * h
        dh += d * h
        eh += (_widen(g1[i]) - g) * h
        rh += (g - c * d) * h
        hh += h * h
    out[10], out[11], out[12], out[13], out[14] = ph, dh, eh, rh, hh


_SUMS, _SUMS_WITH_HVP = 10, 15


@inner(fastmath=_REORDER)
def _sample(p0: Any, p1: Any, g0: Any, n: int) -> tuple[float, float]:
    dg = dd = 0.0
    for i in range(n):
        d = _widen(p1[i]) - _widen(p0[i])
        dg += d * _widen(g0[i])
        dd += d * d
    return dg, dd


@inner(forceinline=True)
def _quotient(dg: float, dd: float) -> float:
    ratio = dg / dd if dd > 0.0 else 0.0
    return ratio if np.isfinite(ratio) else 0.0


@inner(forceinline=True)
def _sampled_ratio(p0: Any, p1: Any, g0: Any, like: Any, first: int, n: int) -> float:
    dg = dd = 0.0
    # Sampling an element costs a third of summing its products, so at most a quarter of the elements are sampled.
    size, samples = _SAMPLE, min(_SAMPLES, n // (4 * _SAMPLE))
    if samples > 1:
        for k in range(samples):
            a = first + k * (n - size) // (samples - 1)
            more = _sample(pointer(p0, a, like[0]), pointer(p1, a, like[0]), pointer(g0, a, like[1]), size)
            dg += more[0]
            dd += more[1]
    if dd == 0.0:
        # Fewer than two samples, or a sparse update that they missed: use all elements.
        dg, dd = _sample(pointer(p0, first, like[0]), pointer(p1, first, like[0]), pointer(g0, first, like[1]), n)
    return _quotient(dg, dd)


@inner(forceinline=True)
def _improved(c: float, dd: float, rd: float, rr: float) -> float:
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


_ATTEMPTS = 3
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
        count += _widen(x1[i]) != (0.0 if x0 is None else _widen(x0[i]))
    return count


@inner()
def _not_finite(x: Any, n: int) -> int:
    count = 0
    for i in range(n):
        value = _widen(x[i])
        count += not abs(value) < np.inf
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
        gram[vector, vector] = 0.0 if _differing(x0, x1, n) == 0 else _NONZERO
    else:
        count = _not_finite(x1, n)
        if x0 is not None:
            count += _not_finite(x0, n)
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
        for attempt in range(1, _ATTEMPTS):
            better = _improved(ratio[t], total[t, 4], total[t, 6], total[t, 9])
            if better == ratio[t]:
                break
            if attempt > 1 or np.isnan(better):
                better = _quotient(*_sample(p0, p1, g0, stop - first))
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
                for attempt in range(_ATTEMPTS):
                    # There is only one block, so there is no rounding error to compensate.
                    _block(p0, p1, g0, g1, n, c, part)
                    if h is not None:
                        _hvp_block(p0, p1, g0, g1, pointer(h[t], first, words[2]), n, c, part)
                    better = _improved(c, part[4], part[6], part[9])
                    if better == c or attempt == _ATTEMPTS - 1:
                        break
                    if attempt > 0 or np.isnan(better):
                        better = _quotient(*_sample(p0, p1, g0, n))
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


def words_of(blocks: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Return views of blocks in a dtype that the compiler has: float16 as int16, bfloat16 as uint16."""
    dtype = blocks[0].dtype
    words = np.int16 if dtype == np.float16 else np.uint16 if dtype.name == "bfloat16" else None
    return blocks if words is None else [block.view(words) for block in blocks]


def _addresses(blocks: Sequence[NDArray[Any]], elements: int) -> NDArray[np.uintp]:
    """Return the address of each state of the blocks. The compiled code reads there without further checks."""
    for block in blocks:
        if block.dtype != blocks[0].dtype or block.strides[1] != block.itemsize or block.shape[1] < elements:
            raise ValueError(f"states must have one dtype, be contiguous, and have at least {elements} elements")
    first = [block.__array_interface__["data"][0] for block in blocks]
    rows = [start + np.arange(len(block)) * block.strides[0] for start, block in zip(first, blocks, strict=True)]
    return np.concatenate(rows).astype(np.uintp)


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
    parameters, gradients, hvps = (_addresses(array, int(starts[-1])) for array in blocks)
    if min(len(parameters), len(gradients)) <= rows or len(hvps) < rows:
        raise ValueError(f"{rows} updates need {rows + 1} states")
    # The compiled code receives addresses, and an empty array for the type of each array.
    like = tuple(np.empty(0, array[0].dtype) for array in blocks)
    row_products(parameters, gradients, None if hvp is None else hvps, like, starts, gram, ratio)


# Replicates ---------------------------------------------------------------------------------------------------

_REPLICATE_VALUES = 16 * BLOCK
"""Approximate number of values of all replicate vectors that are formed at a time. They fit into the cache."""

_MEANS = 3
"""Number of replicate vectors before the deviations: the gradient, the mean displacement and the residual."""


@inner()
def _form_replicates(mean: Any, deviations: Any) -> None:
    """Replace replicates by their mean and the deviations from it."""
    mean[:] = 0.0
    for r in range(len(deviations)):
        for i in range(mean.size):
            mean[i] += deviations[r, i]
    for i in range(mean.size):
        mean[i] /= len(deviations)
    for r in range(len(deviations)):
        for i in range(mean.size):
            deviations[r, i] -= mean[i]


@inner(fastmath=_REORDER)
def _dots(values: Any, j: int, n: int, out: Any) -> None:
    """Compute the products of vector j with itself and those after it, four at a time to load it less often."""
    count, x = len(values), values[j, :n]
    fours = j + (count - j) // 4 * 4
    for k in range(j, fours, 4):
        a, b, c, d = values[k, :n], values[k + 1, :n], values[k + 2, :n], values[k + 3, :n]
        xa = xb = xc = xd = 0.0
        for i in range(n):
            xa += x[i] * a[i]
            xb += x[i] * b[i]
            xc += x[i] * c[i]
            xd += x[i] * d[i]
        out[k], out[k + 1], out[k + 2], out[k + 3] = xa, xb, xc, xd
    for k in range(fours, count):
        y = values[k, :n]
        total = 0.0
        for i in range(n):
            total += x[i] * y[i]
        out[k] = total


@inner()
def _mean_products(p0: Any, g0: Any, q: Any, t: int, like: Any, first: int, n: int) -> tuple[float, float]:
    """Return the products of the mean displacement with the gradient and with itself, for some elements."""
    mg = mm = 0.0
    for i in range(first, first + n):
        p, mean = _widen(pointer(p0, i, like[0])[0]), 0.0
        for r in range(q.shape[0]):
            mean += _widen(pointer(q[r, t], i, like[2])[0]) - p
        mean /= q.shape[0]
        mg += mean * _widen(pointer(g0, i, like[1])[0])
        mm += mean * mean
    return mg, mm


@inner()
def _mean_ratio(p0: Any, g0: Any, q: Any, t: int, like: Any, first: int, n: int) -> float:
    """Return the ratio of the residual of the mean, from a sample; see `_sampled_ratio`."""
    mg = mm = 0.0
    size, samples = _SAMPLE, min(_SAMPLES, n // (4 * _SAMPLE))
    if samples > 1:
        for k in range(samples):
            more = _mean_products(p0, g0, q, t, like, first + k * (n - size) // (samples - 1), size)
            mg += more[0]
            mm += more[1]
    if mm == 0.0:
        mg, mm = _mean_products(p0, g0, q, t, like, first, n)
    return _quotient(mg, mm)


@inner()
def _form_block(
    p0: Any, g0: Any, q: Any, h: Any, t: int, like: Any, first: int, n: int, c: float, values: Any
) -> None:
    """Form n elements of all replicate vectors."""
    replicates = q.shape[0]
    p, g = pointer(p0, first, like[0]), pointer(g0, first, like[1])
    for i in range(n):
        values[0, i] = _widen(g[i])
    for r in range(replicates):
        q0 = pointer(q[r, t], first, like[2])
        for i in range(n):
            values[_MEANS + r, i] = _widen(q0[i]) - _widen(p[i])
    _form_replicates(values[1, :n], values[_MEANS : _MEANS + replicates, :n])
    for i in range(n):
        values[2, i] = values[0, i] - c * values[1, i]
    if h.shape[0] > 0:
        mean = _MEANS + replicates
        for r in range(replicates):
            h0 = pointer(h[r, t], first, like[3])
            for i in range(n):
                values[mean + 1 + r, i] = _widen(h0[i])
        _form_replicates(values[mean, :n], values[mean + 1 :, :n])


@inner()
def _any_not_finite(p0: Any, states: Any, t: int, like: Any, word: Any, first: int, n: int) -> bool:
    count = _not_finite(pointer(p0, first, like[0]), n)
    for r in range(states.shape[0]):
        count += _not_finite(pointer(states[r, t], first, word), n)
    return count > 0


@entry()
def _replicate_products(p: Any, g: Any, q: Any, h: Any, like: Any, starts: Any, gram: Any) -> None:
    rows, segments, count = gram.shape[0], gram.shape[1], gram.shape[2]
    size = max(_REPLICATE_VALUES // count // 64 * 64, 64)
    values, error, part = np.empty((count, size)), np.empty((count, count)), np.empty(count)
    known = _MEANS + q.shape[0]
    for s in range(segments):
        first, length = starts[s], starts[s + 1] - starts[s]
        for t in range(rows):
            total = gram[t, s]
            c = _mean_ratio(p[t], g[t], q, t, like, first, length)
            zero, bad = np.ones(count, np.bool_), np.zeros(count, np.bool_)
            for attempt in range(_ATTEMPTS):
                total[:] = 0.0
                error[:] = 0.0
                for a in range(first, starts[s + 1], size):
                    n = min(size, starts[s + 1] - a)
                    _form_block(p[t], g[t], q, h, t, like, a, n, c, values)
                    for j in range(count):
                        _dots(values, j, n, part)
                        for k in range(j, count):
                            # As in the sums of the ledger, the rounding error of each sum is compensated (Knuth).
                            new = total[j, k] + part[k]
                            added = new - total[j, k]
                            error[j, k] += (total[j, k] - (new - added)) + (part[k] - added)
                            total[j, k] = new
                        # The convention for squares that underflow or overflow, while the block is in the cache.
                        if part[j] > 0.0:
                            zero[j] = False
                        elif part[j] == 0.0 and zero[j]:
                            zero[j] = not values[j, :n].any()
                        if not part[j] < np.inf and not bad[j]:
                            if j == 0:
                                bad[j] = _not_finite(pointer(g[t], a, like[1]), n) > 0
                            elif j < known:
                                bad[j] = _any_not_finite(p[t], q, t, like, like[2], a, n)
                            else:
                                bad[j] = _any_not_finite(p[t], h, t, like, like[3], a, n)
                better = _improved(c, total[1, 1], total[1, 2], total[2, 2])
                if better == c or attempt == _ATTEMPTS - 1:
                    break
                if attempt > 0 or np.isnan(better):
                    better = _quotient(*_mean_products(p[t], g[t], q, t, like, first, length))
                c = better
            for j in range(count):
                for k in range(j, count):
                    if np.isfinite(error[j, k]):
                        total[j, k] += error[j, k]
                    total[k, j] = total[j, k]
                if bad[j]:
                    total[j, j] = np.nan
                elif not total[j, j] < np.inf:
                    total[j, j] = np.inf
                elif total[j, j] == 0.0 and not zero[j]:
                    total[j, j] = _NONZERO


def replicate_products(
    parameter: Sequence[NDArray[Any]],
    gradient: Sequence[NDArray[Any]],
    replicates: Sequence[Sequence[NDArray[Any]]],
    starts: NDArray[np.int64],
    gram: NDArray[np.float64],
    hvps: Sequence[Sequence[NDArray[Any]]] = (),
) -> None:
    """Compute the inner products of the vectors of the replicates of each state, per segment.

    Parameters
    ----------
    parameter, gradient : sequence of arrays, shape (some states, elements)
        States and their gradients, as for `products`; no halo is needed.
    replicates : sequence, length R, of the same
        States to which each replicate of the update leads.
    starts : int64 array, shape (segments + 1,)
    gram : float64 array, shape (updates, segments, vectors, vectors)
        Output: the inner products, in the order of `natgrad.schema.names.replicate_vectors`.
    hvps : sequence, length R, of the same, optional
        Hessian times the displacement of each replicate, if logged.

    Raises
    ------
    ValueError
        If there are too few states or elements, or they are not contiguous.

    Notes
    -----
    The function releases the interpreter lock. The bits of an update depend only on its states and `starts`. Means,
    deviations and the residual of the mean are formed in float64, some hundred elements at a time.
    """
    rows, elements = len(gram), int(starts[-1])
    words = [words_of(array) for array in (parameter, gradient, *replicates, *hvps)]
    found = [_addresses(array, elements)[:rows] for array in words]
    if min(map(len, found)) < rows:
        raise ValueError(f"{rows} updates need {rows} states of each replicate")
    first_hvp = 2 + len(replicates)
    dtypes = {index: words[index][0].dtype for index in (0, 1, 2, first_hvp if hvps else 2)}
    for index, array in enumerate(words[2:], start=2):
        if array[0].dtype != dtypes[2 if index < first_hvp else first_hvp]:
            raise ValueError("all replicates must have the same dtype")
    like = tuple(np.empty(0, dtypes[index]) for index in (0, 1, 2, first_hvp if hvps else 2))
    hvp_addresses = np.stack(found[first_hvp:]) if hvps else np.empty((0, rows), np.uintp)
    _replicate_products(found[0], found[1], np.stack(found[2:first_hvp]), hvp_addresses, like, starts, gram)
