"""Find the smallest window over which a learning rule is effective, even if single updates are not (eq. 3).

A window of m updates may descend although single updates do not. The argument of the paper starts from such an m.
Windows are not monotone in m: for the losses 3, 1, 2.5, 0.5, 2, 0.25, all windows of 2, 4 and 5 descend, but those
of 3 do not. Therefore every m is tried, from 1 up to a limit. The result includes the number of windows that
support it, because an m near the length of the run has few windows.

An m is found only if each of its windows is known to descend. A window with an unknown loss, an unknown learning
rate or an update that is not larger than its rounding error proves nothing, and the loss may rise across it.

`effective_lengths` tries all lengths for some of the windows, so that a run can be searched in parts:
`smallest_length` combines the parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair

__all__ = [
    "LONGEST_WINDOW",
    "WindowTerms",
    "consecutive",
    "effective_lengths",
    "joined",
    "longest_tried",
    "rolling_norm",
    "smallest_decreasing",
    "smallest_effective",
    "smallest_length",
]

LONGEST_WINDOW = 256
"""Longest window in the search for the smallest one; for a short run, half of its updates if that is less."""

Array = NDArray[np.float64]
WindowSearch = tuple[Array, NDArray[np.int64]]


@dataclass(frozen=True)
class WindowTerms:
    """The terms of each update that determine the status of a window.

    Attributes
    ----------
    pair : Pair, shape (updates, ...)
    learning_rate, update_floor : array, shape (updates, ...)
        eta times the number of updates between the two logged states, and the largest error of g. If eta is not
        known, it is NaN, and the pair and the error are those for any eta.
    finite, known : bool array, shape (updates, ...)
    """

    pair: Pair
    learning_rate: Array
    update_floor: Array
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]

    def part(self, index: Any) -> WindowTerms:
        """Select terms with NumPy indexing."""
        return WindowTerms(self.pair[index], *(getattr(self, field.name)[index] for field in fields(self)[1:]))


def longest_tried(updates: int, longest: int) -> int:
    """Return the longest window in the search for the smallest one.

    Parameters
    ----------
    updates : int
        Number of updates of the run.
    longest : int
        Longest requested window.
    """
    return min(max(longest, min(LONGEST_WINDOW, updates // 2)), updates)


def smallest_effective(terms: WindowTerms, follows: NDArray[np.bool_], longest: int) -> WindowSearch:
    """Find the smallest m for which every window is effective.

    Parameters
    ----------
    terms : WindowTerms
    follows : bool array, shape (updates - 1,)
        True if an update continues the one before it.
    longest : int
        Largest m to try.

    Returns
    -------
    smallest : float64 array, shape (...)
        NaN if there is no such m. An m is excluded if the status of one of its windows is unknown.
    count : int64 array, shape (...)
        Number of windows that support it: all windows of that m that do not pass a gap. 0 if there is no such m.
    """
    longest = min(longest, len(follows) + 1)
    return smallest_length(effective_lengths(terms, follows, len(follows) + 1, longest), follows)


def smallest_length(effective: NDArray[np.bool_], follows: NDArray[np.bool_]) -> WindowSearch:
    """Return the smallest length that is effective and has windows, and the number of these windows.

    Parameters
    ----------
    effective : bool array, shape (longest, ...)
        True for each length, from 1, for which all windows are effective: the conjunction of `effective_lengths` of
        all parts of the run.
    follows : bool array, shape (updates - 1,)
        True if an update continues the one before it, for all updates of the run.

    Returns
    -------
    smallest, count
        See `smallest_effective`.
    """
    sizes = np.array([stop - start for start, stop in _contiguous(follows)])
    lengths = np.arange(1, len(effective) + 1)
    counts = np.maximum(sizes[:, None] - lengths + 1, 0).sum(axis=0)
    found = effective & (counts > 0).reshape(-1, *[1] * (effective.ndim - 1))
    at, any_found = found.argmax(axis=0), found.any(axis=0)
    return np.where(any_found, lengths[at], np.nan), np.where(any_found, counts[at], 0)


def effective_lengths(
    terms: WindowTerms, follows: NDArray[np.bool_], starts: int, longest: int
) -> NDArray[np.bool_]:
    """Return for each length whether all windows that start at the first updates are effective.

    Parameters
    ----------
    terms : WindowTerms
        Terms of the updates at which windows start, and of the ``longest - 1`` updates after them if they exist.
    follows : bool array, shape (updates - 1,)
        True if an update continues the one before it. Windows do not pass a gap.
    starts : int
        Number of updates at which windows start.
    longest : int
        Largest length to try.

    Returns
    -------
    bool array, shape (longest, ...)
        Also True for a length without windows.

    Notes
    -----
    The status of a window is defined by sums of m terms in the order of the updates (`geometry.status`). Computing
    all sums takes several roots for each start and length. This function gives the same result, with a subtraction
    and a comparison for most of them, because each of its steps is a proof about the status:

    - A window with an update that is not finite or not known, or without a positive learning rate, is not
      effective. If a learning rate is not known, this holds for windows of several updates: the direction of a
      single update does not depend on it.
    - The windows that start at the largest prefix sum of y.g are the least likely to be effective. Their statuses
      are computed for all lengths, which refutes most lengths.
    - Let p be prefix sums of N values of y.g, and S the sum of their absolute values. A prefix sum and the sum over
      a window are each off by at most N u S to first order, so a difference d of two prefix sums is within
      b = 8 N u S of the sum over the window. If d < -b, this sum is negative, and the window is not effective. If
      d > 2 b + `_LEAST_SUM`, the sum is greater than `_LEAST_SUM`.
    - The same differences of prefix sums of |g|^2 - f^2, where f is the largest error of an update g, decide
      whether the update of a window is larger than its error. The terms are off by 2 u, the norm of the window by
      (m / 2 + 1) u and that of its error by 2 m u relative to their sizes, so b = 32 N u S covers all errors, where
      S is the sum of |g|^2 + f^2.
    - If the sum of y.g is greater than `_LEAST_SUM`, the update is larger than its error, and all terms are within
      `_LEAST_SQUARE` and `_MOST_SQUARE`, then all norms of the window are in the range of `geometry.status`, and
      the window is effective.

    Where no step decides all windows of a length, their statuses are computed from the definition.
    """
    shape = terms.pair.alignment.shape
    pair = Pair(*(_flat(getattr(terms.pair, field.name), shape) for field in fields(Pair)))
    flat = WindowTerms(pair, *(_flat(getattr(terms, field.name), shape) for field in fields(WindowTerms)[1:]))
    effective = np.ones((longest, pair.alignment.shape[1]), bool)
    with np.errstate(all="ignore"):
        for first, last in _contiguous(follows):
            for start in range(first, min(last, starts), _STARTS_AT_ONCE):
                count = min(_STARTS_AT_ONCE, min(last, starts) - start)
                _refute(effective, flat.part(slice(start, min(start + count + longest - 1, last))), count)
        if np.isnan(flat.learning_rate[:starts]).any():
            single = flat.part(slice(0, starts))
            rate = np.where(np.isnan(single.learning_rate), 1.0, single.learning_rate)
            effective[0] = _is_effective(replace(single, learning_rate=rate)).all(axis=0)
    return effective.reshape(longest, *shape[1:])


_STARTS_AT_ONCE = 128
"""Number of windows whose prefix sums are computed together. They fit into the cache, with small errors."""

_LEAST_SQUARE, _MOST_SQUARE, _LEAST_SUM = 1e-100, 1e100, 1e-60
"""Range of squared norms and of y.g in which no window of fewer than 10^15 updates underflows or overflows: the
norms of a window are then between 1e-120 and 1e140, while `geometry.status` allows 1e-132 to 1e150."""


def _flat(values: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.broadcast_to(values, shape).reshape(shape[0], -1)


def _contiguous(follows: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the ranges of updates without a gap."""
    bounds = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(follows) + 1]
    return list(itertools.pairwise(bounds))


def _refute(effective: NDArray[np.bool_], terms: WindowTerms, starts: int) -> None:
    """Mark the lengths with a window that is not effective, among the windows that start at the first updates."""
    alignment = terms.pair.alignment
    lengths = min(len(alignment), len(effective))
    _refute_unknown(effective, terms, starts)
    _refute_from(effective, terms, np.argmax(_prefix_sums(np.nan_to_num(alignment))[:starts], axis=0))
    columns = np.flatnonzero(effective[:lengths].any(axis=0))
    if not len(columns):
        return
    terms = terms.part((slice(None), columns))
    regular = _regular(terms).all(axis=0)
    alignment = np.where(regular, terms.pair.alignment, 0.0)
    tried = np.asarray(effective[:lengths, columns].any(axis=1))
    least, bound = _least_sums(alignment, np.abs(alignment), starts, tried, 8.0)
    refuted, proved = least < -bound, least > 2.0 * bound + _LEAST_SUM
    square, floor = terms.pair.update_square, terms.update_floor
    close = np.flatnonzero(regular & (floor > 0.99 * np.sqrt(square)).any(axis=0))
    if len(close):
        square, error = square[:, close], np.square(floor[:, close])
        least, bound = _least_sums(square - error, square + error, starts, tried, 32.0)
        refuted[:, close] |= least < -bound
        proved[:, close] &= least > bound
    remaining = effective[:lengths, columns] & ~(regular & refuted)
    effective[:lengths, columns] = remaining
    open_lengths = remaining & ~(regular & proved)
    undecided = np.flatnonzero(open_lengths.any(axis=0))
    if len(undecided):
        found = _by_definition(terms.part((slice(None), undecided)), starts, open_lengths[:, undecided])
        effective[:lengths, columns[undecided]] &= found


def _least_sums(
    values: Array, sizes: Array, starts: int, tried: NDArray[np.bool_], factor: float
) -> tuple[Array, Array]:
    """Return the smallest sum over all windows of each length, as a difference of prefix sums, and its error."""
    prefix = _prefix_sums(values)
    least = np.full((len(tried), values.shape[1]), np.nan)
    difference = np.empty((starts, values.shape[1]))
    for m in (np.flatnonzero(tried) + 1).tolist():
        count = min(starts, len(values) - m + 1)
        np.subtract(prefix[m : m + count], prefix[:count], out=difference[:count])
        difference[:count].min(axis=0, out=least[m - 1])
    return least, factor * len(values) * 2.0**-53 * sizes.sum(axis=0)


def _prefix_sums(values: Array) -> Array:
    """Return the sums of the values before each position, and of all values."""
    return np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])


def _regular(terms: WindowTerms) -> NDArray[np.bool_]:
    """Return True where the terms of an update are in the range in which sums decide, see `effective_lengths`."""
    pair, floor = terms.pair, terms.update_floor
    square = pair.update_square
    regular: NDArray[np.bool_] = (
        terms.finite
        & terms.known
        & (terms.learning_rate >= 1e-50)
        & (terms.learning_rate < np.inf)
        & np.where(square == 0, pair.alignment == 0, square >= _LEAST_SQUARE)
        & (square <= _MOST_SQUARE)
        & (pair.across_square <= _MOST_SQUARE)
        & (np.abs(pair.alignment) <= 1e80)
        & (floor <= 1e50)
    )
    return regular


def _refute_unknown(effective: NDArray[np.bool_], terms: WindowTerms, starts: int) -> None:
    """Refute the lengths of windows with an update that makes every window through it unknown."""
    bad = ~(terms.finite & terms.known & (terms.learning_rate > 0))
    if not bad.any():
        return
    updates, columns = bad.shape
    positions = np.where(bad, np.arange(updates)[:, None], updates)
    following = np.minimum.accumulate(positions[::-1], axis=0)[::-1][:starts]
    # The windows from t through the next such update, at position k, have the lengths k - t + 1 to updates - t.
    start, column = np.nonzero(following < updates)
    changes = [
        np.bincount(length * columns + column, minlength=(updates + 2) * columns).reshape(-1, columns)
        for length in (following[start, column] - start + 1, updates - start + 1)
    ]
    reached = np.cumsum(changes[0] - changes[1], axis=0)[1 : len(effective) + 1] > 0
    effective[: len(reached)] &= ~reached


def _refute_from(effective: NDArray[np.bool_], terms: WindowTerms, first: NDArray[np.int64]) -> None:
    """Refute lengths by the windows from one start of each column, whose statuses are computed for all lengths."""
    updates = len(terms.learning_rate)
    lengths = min(updates, len(effective))
    rows = first + np.arange(lengths)[:, None]
    complete = rows < updates
    rows = np.minimum(rows, updates - 1)
    taken = terms.part((rows, np.arange(rows.shape[1])))
    total = WindowTerms(
        Pair(*(np.cumsum(getattr(taken.pair, field.name), axis=0) for field in fields(Pair))),
        np.minimum.accumulate(taken.learning_rate, axis=0),
        np.hypot.accumulate(taken.update_floor, axis=0),
        np.logical_and.accumulate(taken.finite, axis=0),
        np.logical_and.accumulate(taken.known, axis=0),
    )
    effective[:lengths] &= _is_effective(total) | ~complete


def _by_definition(terms: WindowTerms, starts: int, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return whether all windows of some lengths are effective, from their statuses; True for other lengths."""
    effective = np.ones(wanted.shape, bool)
    total, updates = terms.part(slice(0, starts)), len(terms.learning_rate)
    for m in range(1, int(np.flatnonzero(wanted.any(axis=1))[-1]) + 2):
        if m > 1:
            total = _longer(total.part(slice(0, updates - m + 1)), terms, m)
        if wanted[m - 1].any():
            effective[m - 1] = _is_effective(total).all(axis=0) | ~wanted[m - 1]
    return effective


def _is_effective(terms: WindowTerms) -> NDArray[np.bool_]:
    status = geometry.status(terms.pair, terms.learning_rate, terms.finite, terms.known, terms.update_floor)
    effective: NDArray[np.bool_] = status == Status.EFFECTIVE
    return effective


def smallest_decreasing(
    loss: Array, next_loss: Array, follows: NDArray[np.bool_], longest: int
) -> tuple[float, int]:
    """Find the smallest m with L(t + m) < L(t) for all t, eq. (3).

    Parameters
    ----------
    loss, next_loss : array, shape (updates,)
        Loss before and after each update, NaN if not logged.
    follows, longest
        See `smallest_effective`.

    Returns
    -------
    smallest : float
        NaN if there is no such m. An m is excluded if one of its comparisons lacks a loss.
    count : int
        Number of comparisons that support it: all windows of that m that do not pass a gap. 0 if there is no such
        m.

    Examples
    --------
    >>> losses = np.array([3, 1, 2.5, 0.5, 2, 0.25])
    >>> smallest_decreasing(losses[:-1], losses[1:], np.ones(4, bool), longest=5)
    (2.0, 4)

    Across the unknown loss, the loss rises:

    >>> losses = np.array([3, 2, np.nan, 5, 4])
    >>> smallest_decreasing(losses[:-1], losses[1:], np.ones(3, bool), longest=4)
    (nan, 0)
    """
    complete = np.ones(len(loss), bool)
    for m in range(1, min(longest, len(loss)) + 1):
        if m > 1:
            complete = complete[:-1] & follows[m - 2 :]
        # A comparison with an unknown loss, NaN, is false.
        decreases = next_loss[m - 1 :] < loss[: len(loss) - m + 1]
        if complete.any() and decreases[complete].all():
            return float(m), int(complete.sum())
    return np.nan, 0


def _longer(total: WindowTerms, single: WindowTerms, m: int) -> WindowTerms:
    """Extend windows of m - 1 updates to m. y.g is summed in the order of `geometry.window`, with the same bits."""
    added = single.part(slice(m - 1, m - 1 + len(total.learning_rate)))
    return WindowTerms(
        Pair(*(getattr(total.pair, field.name) + getattr(added.pair, field.name) for field in fields(Pair))),
        np.minimum(total.learning_rate, added.learning_rate),
        np.hypot(total.update_floor, added.update_floor),
        total.finite & added.finite,
        total.known & added.known,
    )


def joined(parts: Sequence[WindowTerms]) -> WindowTerms:
    """Return the terms of consecutive updates."""
    pairs = [part.pair for part in parts]
    pair = Pair(*(np.concatenate([getattr(each, field.name) for each in pairs]) for field in fields(Pair)))
    names = [field.name for field in fields(WindowTerms)[1:]]
    return WindowTerms(pair, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))


# Updates of a window -----------------------------------------------------------------------------------------


def consecutive(values: NDArray[Any], m: int) -> NDArray[Any]:
    """Return a view of m consecutive updates along a new last axis."""
    return np.lib.stride_tricks.sliding_window_view(values, m, axis=0)


def rolling_norm(values: Array, m: int) -> Array:
    """Return the norm of m consecutive updates stacked."""
    return np.asarray(np.sqrt(consecutive(np.square(values), m).sum(axis=-1)))
