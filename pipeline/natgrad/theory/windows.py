"""Smallest window over which a learning rule is effective, for rules that need not improve at every step (eq. 3).

A window of m updates may descend though a single one does not, and the paper argues from such an m on. Windows are
not monotone in m: of the losses 3, 1, 2.5, 0.5, 2, 0.25 all windows of 2, 4 and 5 descend, those of 3 do not. So
every m is tried, from 1 up to a longest one, and beside the answer stands how many windows support it: of an m near
the length of the run there are next to none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair

__all__ = ["Rows", "consecutive", "rolling_norm", "smallest_decreasing", "smallest_effective", "where_complete"]

Array = NDArray[np.float64]
Found = tuple[Array, NDArray[np.int64]]


@dataclass(frozen=True)
class Rows:
    """What the status of a window is made of, row by row.

    Attributes
    ----------
    pair : Pair, shape (rows, ...)
    learning_rate, update_floor : array, shape (rows, ...)
        eta times the number of updates of a row, and the largest error of g.
    finite, known : bool array, shape (rows, ...)
    """

    pair: Pair
    learning_rate: Array
    update_floor: Array
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]


def smallest_effective(rows: Rows, follows: NDArray[np.bool_], longest: int) -> Found:
    """Find the smallest m of which every window is effective.

    Parameters
    ----------
    rows : Rows
    follows : bool array, shape (rows - 1,)
        Whether a row starts where the one before it ended.
    longest : int
        Largest m to try.

    Returns
    -------
    smallest : float64 array, shape (...)
        NaN where no m will do.
    count : int64 array, shape (...)
        Windows that support it: all of that m but those that cannot be judged, as a learning rate or a loss is
        missing in them or they move no more than their rounding. 0 where there is none.
    """
    shape = rows.pair.alignment.shape
    smallest, count = np.full(shape[1:], np.nan), np.zeros(shape[1:], np.int64)
    flat_smallest, flat_count = smallest.reshape(-1), count.reshape(-1)
    open_columns = np.arange(flat_smallest.size)

    def column(values: NDArray[Any]) -> NDArray[Any]:
        return np.broadcast_to(values, shape).reshape(shape[0], -1)

    pair = Pair(*(column(getattr(rows.pair, field.name)) for field in fields(Pair)))
    each = Rows(pair, *(column(getattr(rows, field.name)) for field in fields(Rows)[1:]))
    total, whole = each, np.ones(shape[0], bool)
    for m in range(1, min(longest, shape[0]) + 1):
        if m > 1:
            total, whole = _longer(total, each, m), whole[:-1] & follows[m - 2 :]
        verifiable = total.known & ~(total.update_floor >= total.pair.update_norm)
        status = geometry.status(total.pair, total.learning_rate, total.finite, verifiable)
        judged = whole[:, None] & ~np.isin(status, (Status.NO_LEARNING_RATE, Status.UNVERIFIABLE))
        windows = judged.sum(axis=0)
        held = ((status == Status.EFFECTIVE) | ~judged).all(axis=0) & (windows > 0)
        if held.any():
            flat_smallest[open_columns[held]], flat_count[open_columns[held]] = m, windows[held]
            if held.all():
                break
            # Most columns are done at once: only the others are summed any further.
            open_columns, each, total = open_columns[~held], _columns(each, ~held), _columns(total, ~held)
    return smallest, count


def smallest_decreasing(
    loss: Array, next_loss: Array, follows: NDArray[np.bool_], longest: int
) -> tuple[float, int]:
    """Find the smallest m with L(t + m) < L(t) for all t, eq. (3).

    Parameters
    ----------
    loss, next_loss : array, shape (rows,)
        Before and after each update, NaN where not logged.
    follows, longest
        As for `smallest_effective`.

    Returns
    -------
    smallest : float
        NaN where no m will do.
    count : int
        Comparisons that support it; one with a loss that was not logged is none.

    Examples
    --------
    >>> losses = np.array([3, 1, 2.5, 0.5, 2, 0.25])
    >>> smallest_decreasing(losses[:-1], losses[1:], np.ones(4, bool), longest=5)
    (2.0, 4)
    """
    whole = np.ones(len(loss), bool)
    for m in range(1, min(longest, len(loss)) + 1):
        if m > 1:
            whole = whole[:-1] & follows[m - 2 :]
        before, after = loss[: len(loss) - m + 1], next_loss[m - 1 :]
        compared = whole & ~np.isnan(before) & ~np.isnan(after)
        if compared.any() and (after < before)[compared].all():
            return float(m), int(compared.sum())
    return np.nan, 0


def _longer(total: Rows, each: Rows, m: int) -> Rows:
    """Windows of m updates from those of m - 1; y.g is summed in the order of `geometry.window`, to its bits."""
    pair = Pair(*(getattr(total.pair, f.name)[:-1] + getattr(each.pair, f.name)[m - 1 :] for f in fields(Pair)))
    return Rows(
        pair,
        np.minimum(total.learning_rate[:-1], each.learning_rate[m - 1 :]),
        np.hypot(total.update_floor[:-1], each.update_floor[m - 1 :]),
        total.finite[:-1] & each.finite[m - 1 :],
        total.known[:-1] & each.known[m - 1 :],
    )


def _columns(rows: Rows, kept: NDArray[np.bool_]) -> Rows:
    return Rows(rows.pair[:, kept], *(getattr(rows, field.name)[:, kept] for field in fields(Rows)[1:]))


# Rows of a window -------------------------------------------------------------------------------------------


def consecutive(values: NDArray[Any], m: int) -> NDArray[Any]:
    """View of m consecutive rows on a last axis of its own."""
    return np.lib.stride_tricks.sliding_window_view(values, m, axis=0)


def rolling_norm(values: Array, m: int) -> Array:
    """Norm of m consecutive rows together."""
    return np.asarray(np.sqrt(consecutive(np.square(values), m).sum(axis=-1)))


def where_complete(values: NDArray[Any], whole: NDArray[np.bool_], fill: Any) -> NDArray[Any]:
    """Fill the rows whose window is not whole: at the end of a run there are none, before a restart wrong ones."""
    missing = len(whole) - len(values)
    values = np.concatenate([values, np.full((missing, *values.shape[1:]), fill, values.dtype)])
    values[~whole] = fill
    return values
