"""Find the smallest window over which a learning rule is effective, even if single updates are not (eq. 3).

A window of m updates may descend although single updates do not. The argument of the paper starts from such an m.
Windows are not monotone in m: for the losses 3, 1, 2.5, 0.5, 2, 0.25, all windows of 2, 4 and 5 descend, but those
of 3 do not. Therefore every m is tried, from 1 up to a limit. The result includes the number of windows that
support it, because an m near the length of the run has few windows.

An m is found only if each of its windows is known to descend. A window with an unknown loss, an unknown learning
rate or an update that is not larger than its rounding error proves nothing, and the loss may rise across it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair

__all__ = [
    "WindowTerms",
    "consecutive",
    "rolling_norm",
    "smallest_decreasing",
    "smallest_effective",
]

Array = NDArray[np.float64]
WindowSearch = tuple[Array, NDArray[np.int64]]


@dataclass(frozen=True)
class WindowTerms:
    """The terms of each update that determine the status of a window.

    Attributes
    ----------
    pair : Pair, shape (updates, ...)
    learning_rate, update_floor : array, shape (updates, ...)
        eta times the number of updates between the two logged states, and the largest error of g.
    finite, known : bool array, shape (updates, ...)
    """

    pair: Pair
    learning_rate: Array
    update_floor: Array
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]


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
        NaN if there is no such m. An m with a window whose status is not known is not one.
    count : int64 array, shape (...)
        Number of windows that support it: all windows of that m that do not pass a gap. 0 if there is no such m.
    """
    shape = terms.pair.alignment.shape
    smallest, count = np.full(shape[1:], np.nan), np.zeros(shape[1:], np.int64)
    flat_smallest, flat_count = smallest.reshape(-1), count.reshape(-1)
    open_columns = np.arange(flat_smallest.size)

    def column(values: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(values, shape).reshape(shape[0], -1)

    pair = Pair(*(column(getattr(terms.pair, field.name)) for field in fields(Pair)))
    single = WindowTerms(pair, *(column(getattr(terms, field.name)) for field in fields(WindowTerms)[1:]))
    total, complete = single, np.ones(shape[0], bool)
    for m in range(1, min(longest, shape[0]) + 1):
        if m > 1:
            total, complete = _longer(total, single, m), complete[:-1] & follows[m - 2 :]
        status = geometry.status(total.pair, total.learning_rate, total.finite, total.known, total.update_floor)
        solved = (status[complete] == Status.EFFECTIVE).all(axis=0) & complete.any()
        if solved.any():
            flat_smallest[open_columns[solved]], flat_count[open_columns[solved]] = m, complete.sum()
            if solved.all():
                break
            # Most columns are solved by a small m. Only the others are summed further.
            open_columns = open_columns[~solved]
            single, total = _columns(single, ~solved), _columns(total, ~solved)
    return smallest, count


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
        NaN if there is no such m. An m with a comparison that lacks a loss is not one.
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
    pair = Pair(*(getattr(total.pair, f.name)[:-1] + getattr(single.pair, f.name)[m - 1 :] for f in fields(Pair)))
    return WindowTerms(
        pair,
        np.minimum(total.learning_rate[:-1], single.learning_rate[m - 1 :]),
        np.hypot(total.update_floor[:-1], single.update_floor[m - 1 :]),
        total.finite[:-1] & single.finite[m - 1 :],
        total.known[:-1] & single.known[m - 1 :],
    )


def _columns(terms: WindowTerms, kept: NDArray[np.bool_]) -> WindowTerms:
    return WindowTerms(
        terms.pair[:, kept], *(getattr(terms, field.name)[:, kept] for field in fields(WindowTerms)[1:])
    )


# Updates of a window -----------------------------------------------------------------------------------------


def consecutive(values: NDArray[Any], m: int) -> NDArray[Any]:
    """Return a view of m consecutive updates along a new last axis."""
    return np.lib.stride_tricks.sliding_window_view(values, m, axis=0)


def rolling_norm(values: Array, m: int) -> Array:
    """Return the norm of m consecutive updates stacked."""
    return np.asarray(np.sqrt(consecutive(np.square(values), m).sum(axis=-1)))
