"""Compute the inner products of the replicates of each update, in one pass over a tile of training state.

The replicates of an update are the states to which several draws of a stochastic rule lead. Their mean, the
deviations from it and the residual of the mean are formed in float64, a block of elements at a time. Every inner
product is accumulated while the block is in the cache. The ratio of the residual, the convention for squares that
underflow or overflow, and the compensated sums are those of `natgrad.kernel.gram`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.kernel.compiled import REORDER, addresses, entry, inner, not_finite, pointer, widen, words_of
from natgrad.kernel.gram import ATTEMPTS, BLOCK, NONZERO, SAMPLE, SAMPLES, improved, quotient

__all__ = ["replicate_products"]

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


@inner(fastmath=REORDER)
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
        p, mean = widen(pointer(p0, i, like[0])[0]), 0.0
        for r in range(q.shape[0]):
            mean += widen(pointer(q[r, t], i, like[2])[0]) - p
        mean /= q.shape[0]
        mg += mean * widen(pointer(g0, i, like[1])[0])
        mm += mean * mean
    return mg, mm


@inner()
def _mean_ratio(p0: Any, g0: Any, q: Any, t: int, like: Any, first: int, n: int) -> float:
    """Return the ratio of the residual of the mean, from a sample; see `_sampled_ratio`."""
    mg = mm = 0.0
    size, samples = SAMPLE, min(SAMPLES, n // (4 * SAMPLE))
    if samples > 1:
        for k in range(samples):
            more = _mean_products(p0, g0, q, t, like, first + k * (n - size) // (samples - 1), size)
            mg += more[0]
            mm += more[1]
    if mm == 0.0:
        mg, mm = _mean_products(p0, g0, q, t, like, first, n)
    return quotient(mg, mm)


@inner()
def _form_block(
    p0: Any, g0: Any, q: Any, h: Any, t: int, like: Any, first: int, n: int, c: float, values: Any
) -> None:
    """Form n elements of all replicate vectors."""
    replicates = q.shape[0]
    p, g = pointer(p0, first, like[0]), pointer(g0, first, like[1])
    for i in range(n):
        values[0, i] = widen(g[i])
    for r in range(replicates):
        q0 = pointer(q[r, t], first, like[2])
        for i in range(n):
            values[_MEANS + r, i] = widen(q0[i]) - widen(p[i])
    _form_replicates(values[1, :n], values[_MEANS : _MEANS + replicates, :n])
    for i in range(n):
        values[2, i] = values[0, i] - c * values[1, i]
    if h.shape[0] > 0:
        mean = _MEANS + replicates
        for r in range(replicates):
            h0 = pointer(h[r, t], first, like[3])
            for i in range(n):
                values[mean + 1 + r, i] = widen(h0[i])
        _form_replicates(values[mean, :n], values[mean + 1 :, :n])


@inner()
def _any_not_finite(p0: Any, states: Any, t: int, like: Any, word: Any, first: int, n: int) -> bool:
    count = not_finite(pointer(p0, first, like[0]), n)
    for r in range(states.shape[0]):
        count += not_finite(pointer(states[r, t], first, word), n)
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
            for attempt in range(ATTEMPTS):
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
                                bad[j] = not_finite(pointer(g[t], a, like[1]), n) > 0
                            elif j < known:
                                bad[j] = _any_not_finite(p[t], q, t, like, like[2], a, n)
                            else:
                                bad[j] = _any_not_finite(p[t], h, t, like, like[3], a, n)
                better = improved(c, total[1, 1], total[1, 2], total[2, 2])
                if better == c or attempt == ATTEMPTS - 1:
                    break
                if attempt > 0 or np.isnan(better):
                    better = quotient(*_mean_products(p[t], g[t], q, t, like, first, length))
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
                    total[j, j] = NONZERO


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
    replicates : sequence of length R
        For each replicate of the update, the states to which it leads, as in ``parameter``.
    starts : int64 array, shape (segments + 1,)
    gram : float64 array, shape (updates, segments, vectors, vectors)
        Output: the inner products, in the order of `natgrad.schema.names.replicate_vectors`.
    hvps : sequence of length R, optional
        Hessian times the displacement of each replicate, if logged, as in ``parameter``.

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
    found = [addresses(array, elements)[:rows] for array in words]
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
