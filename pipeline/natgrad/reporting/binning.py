"""Reduce the values of many steps to bins: their median, and their smallest and largest value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.variables import Status

__all__ = ["Bins", "Reduced", "binned", "binned_status"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Bins:
    """Consecutive updates of a run, divided into bins of equal length, up to one update.

    Attributes
    ----------
    start, stop : int
        First update, and the end of the updates.
    edges : int64 array, shape (bins + 1,)
        Positions of the updates at which bins start, and the end.
    """

    start: int
    stop: int
    edges: NDArray[np.int64]

    @classmethod
    def of(cls, start: int, stop: int, most: int) -> Bins:
        """Divide updates into bins: at most a number of them, and one for each update if that suffices."""
        count = min(max(stop - start, 0), max(most, 1))
        return cls(start, stop, start + (np.arange(count + 1, dtype=np.int64) * (stop - start)) // max(count, 1))

    @property
    def single(self) -> bool:
        """Return True if each bin has one update."""
        return len(self.edges) - 1 == self.stop - self.start


@dataclass(frozen=True)
class Reduced:
    """Values of rows in bins, each array of shape (rows, bins); NaN where a bin has no value.

    Attributes
    ----------
    median, least, greatest : array
        Infinite values count, values of NaN do not. The median of an even number of values is the lower one.
    """

    median: Array
    least: Array
    greatest: Array


def binned(blocks: Iterable[NDArray[Any]], bins: Bins) -> Reduced:
    """Reduce values to bins.

    Parameters
    ----------
    blocks : iterable of array
        Values of all updates of the bins, shape (updates, rows), in consecutive parts.
    bins : Bins
    """
    if bins.single:
        values = np.concatenate([*blocks]).T.astype(np.float64)
        return Reduced(values, values, values)
    parts = [_reduced(values) for values in _by_bin(blocks, bins)]
    median, least, greatest = (np.stack(column, axis=1) for column in zip(*parts, strict=True))
    return Reduced(median, least, greatest)


def binned_status(blocks: Iterable[NDArray[Any]], bins: Bins) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the most frequent status of each bin that is not effective, and the share of effective updates.

    Parameters
    ----------
    blocks, bins
        See `binned`.

    Returns
    -------
    status, share : array, shape (rows, bins)
        The status is effective only if all updates of the bin are.
    """
    if bins.single:
        status = np.concatenate([*blocks]).T
        return status.astype(np.uint8), (status == Status.EFFECTIVE).astype(np.float32)
    others = np.array([member for member in Status if member is not Status.EFFECTIVE])
    codes, shares = [], []
    for values in _by_bin(blocks, bins):
        counts = np.stack([(values == member).sum(axis=0) for member in others])
        codes.append(np.where(counts.any(axis=0), others[counts.argmax(axis=0)], Status.EFFECTIVE))
        shares.append((values == Status.EFFECTIVE).mean(axis=0))
    return np.stack(codes, axis=1).astype(np.uint8), np.stack(shares, axis=1).astype(np.float32)


def _by_bin(blocks: Iterable[NDArray[Any]], bins: Bins) -> Iterable[NDArray[Any]]:
    """Yield the values of each bin, shape (updates, rows)."""
    waiting: list[NDArray[Any]] = []
    first, bin_ = bins.start, 0
    for block in blocks:
        waiting.append(block)
        end = first + sum(map(len, waiting))
        if bins.edges[bin_ + 1] > end:
            continue
        values = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
        origin = first
        while bin_ < len(bins.edges) - 1 and bins.edges[bin_ + 1] <= end:
            yield values[bins.edges[bin_] - origin : bins.edges[bin_ + 1] - origin]
            bin_ += 1
        first = int(bins.edges[bin_])
        waiting = [values[first - origin :]]
        if bin_ == len(bins.edges) - 1:
            return


def _reduced(values: NDArray[Any]) -> tuple[Array, Array, Array]:
    """Return the median, the smallest and the largest value of each row, shape (rows,)."""
    ordered = np.sort(values, axis=0)  # NaN last
    known = (~np.isnan(ordered)).sum(axis=0)
    rows = np.arange(ordered.shape[1])
    last = np.maximum(known - 1, 0)
    found = (ordered[last // 2, rows], ordered[0], ordered[last, rows])
    median, least, greatest = (np.where(known > 0, one, np.nan) for one in found)
    return median, least, greatest
