"""Assign the records of a log of scalars to steps: restarts, counters of epochs, several records for one step.

All functions work on the records of one key in the order in which they were written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Conflict", "Restarts", "Series", "concatenated", "counts_within_epochs", "merged"]

Integers = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Series:
    """The values of a key, in the order in which they were written.

    Attributes
    ----------
    records : int64 array, shape (n,)
        Number of the record of each value, increasing.
    steps : int64 array, shape (n,)
    values : float64 array, shape (n,)
    """

    records: Integers
    steps: Integers
    values: NDArray[np.float64]

    def where(self, mask: NDArray[np.bool_]) -> Series:
        """Return the values that a mask selects."""
        return self if mask.all() else Series(self.records[mask], self.steps[mask], self.values[mask])


@dataclass
class Restarts:
    """Restarts of a run. Values that were logged before a restart, at its step or later ones, were abandoned.

    Attributes
    ----------
    marks : list of tuple of int
        Record number and step of each restart that the log states itself. The values before the record are
        abandoned from the step on.
    boundaries : list of int
        Numbers of the records at which a writer started: the first of a file, or after a repeated header.
    """

    marks: list[tuple[int, int]] = field(default_factory=list)
    boundaries: list[int] = field(default_factory=list)

    def falls(self, series: Series) -> Integers:
        """Return the indices of the values at which a run was restarted: their step is not after the one before.

        An equal step is a restart only if another writer logged it.
        """
        changes = np.diff(series.steps)
        falls = changes < 0
        equal = np.flatnonzero(changes == 0)
        pairs = np.array([series.records[equal], series.records[equal + 1]])
        writers = np.searchsorted(np.array(self.boundaries, np.int64), pairs, side="right")
        falls[equal] = writers[1] > writers[0]
        return 1 + np.flatnonzero(falls)

    def current(self, series: Series, reference: Series) -> NDArray[np.bool_]:
        """Return True for each value that no later restart abandoned, shape (n,).

        Parameters
        ----------
        series : Series
        reference : Series
            Values whose steps show the restarts: the same ones, or others of the same records.
        """
        falls = self.falls(reference)
        if not len(falls) and not self.marks:
            return np.ones(len(series.steps), bool)
        records = np.array([record for record, _ in self.marks], np.int64)
        steps = np.array([step for _, step in self.marks], np.int64)
        records = np.concatenate([records, reference.records[falls]])
        steps = np.concatenate([steps, reference.steps[falls]])
        order = np.argsort(records, kind="stable")
        # The lowest step at which the run was restarted at this restart or a later one.
        lowest = np.minimum.accumulate(np.append(steps[order], _NEVER)[::-1])[::-1]
        return series.steps < lowest[np.searchsorted(records[order], series.records, side="right")]


def counts_within_epochs(series: Series, falls: Integers, epochs: Series | None) -> int | None:
    """Return the index of the first value at which a step falls because it counts within epochs, or None.

    It does so if the number of the epoch rises where the step falls, or if all of at least three passes start at
    one step, and all but the last end at one step.

    Parameters
    ----------
    series : Series
    falls : int64 array
        Indices of the values at which the step falls.
    epochs : Series, optional
        Values of the key of the epoch.
    """
    if not len(falls):
        return None
    if epochs is not None and len(epochs.records):
        known = np.searchsorted(epochs.records, series.records, side="right") - 1
        epoch = epochs.values[np.maximum(known, 0)]
        rising = falls[(known[falls - 1] >= 0) & (epoch[falls] > epoch[falls - 1])]
        if len(rising):
            return int(rising[0])
    starts, ends = series.steps[np.append(0, falls)], series.steps[falls - 1]
    periodic = len(falls) > 1 and np.ptp(starts) == 0 and np.ptp(ends) == 0 and ends[0] > starts[0]
    return int(falls[0]) if periodic else None


@dataclass(frozen=True)
class Conflict:
    """Steps with several different values.

    Attributes
    ----------
    steps : int64 array, shape (n,)
    first, second : tuple of (record, value)
        Two different values of the first of these steps.
    """

    steps: Integers
    first: tuple[int, float]
    second: tuple[int, float]


def merged(series: Series) -> tuple[Series, Conflict | None]:
    """Return the value of each step, by increasing step.

    Equal values of a step are one value; different ones are a conflict.

    Examples
    --------
    >>> import numpy as np
    >>> found, conflict = merged(Series(np.arange(4), np.array([0, 0, 1, 1]), np.array([5.0, 5.0, 4.0, 3.0])))
    >>> found.steps.tolist(), found.values.tolist(), conflict.steps.tolist()
    ([0], [5.0], [1])
    """
    if (np.diff(series.steps) > 0).all():
        return series, None
    steps, first, inverse = np.unique(series.steps, return_index=True, return_inverse=True)
    expected = series.values[first][inverse]
    differ = (series.values != expected) & ~(np.isnan(series.values) & np.isnan(expected))
    unequal = np.zeros(len(steps), bool)
    unequal[inverse[differ]] = True
    found = Series(series.records[first], steps, series.values[first]).where(~unequal)
    if not unequal.any():
        return found, None
    one = first[np.flatnonzero(unequal)[0]]
    other = np.flatnonzero(differ & (series.steps == series.steps[one]))[0]
    pair = [(int(series.records[index]), float(series.values[index])) for index in (one, other)]
    return found, Conflict(steps[unequal], *pair)


def concatenated(parts: Sequence[Series]) -> Series:
    """Return the values of several series, one after another."""
    if len(parts) == 1:
        return parts[0]
    empty = Series(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    parts = [empty, *parts]
    return Series(
        np.concatenate([part.records for part in parts]),
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.values for part in parts]),
    )
