"""Determine which states of a run are connected by updates, and which ones a later attempt supersedes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["current_states", "spans_between"]

Integers = NDArray[np.int64]


def spans_between(numbers: Sequence[Integers], step_span: int) -> Integers:
    """Return the number of updates from each state to the next, shape (states - 1,).

    The number is 0 if the next state belongs to another run or attempt, or if the states are not connected.

    Parameters
    ----------
    numbers : sequence of int64 array, shape (states,)
        Steps, attempts and runs.
    step_span : int
        Number of steps between connected states; 0 if each state is connected to the next.
    """
    steps, attempts, runs = numbers
    spans = np.diff(steps)
    spans[(np.diff(attempts) != 0) | (np.diff(runs) != 0)] = 0
    if step_span:
        spans[spans != step_span] = 0
    return spans


def current_states(numbers: Sequence[Integers], starts: Integers, attempt: int | None = None) -> NDArray[np.bool_]:
    """Return a mask of the states that are not superseded by a later attempt, shape (states,).

    Parameters
    ----------
    numbers : sequence of int64 array, shape (states,)
        Steps, attempts and runs.
    starts : int64 array
        Indices of the states to which no update leads from the previous state.
    attempt : int, optional
        Ignore attempts after this one; by default all attempts count.
    """
    steps, attempts, runs = numbers
    chosen = attempts <= (attempts.max(initial=0) if attempt is None else attempt)
    # A new attempt supersedes the states of its run at its first step and later.
    new = np.unique(runs, return_index=True)[1]
    for begin in np.setdiff1d(starts, new):
        if chosen[begin]:
            older = (runs[:begin] == runs[begin]) & (attempts[:begin] < attempts[begin])
            chosen[:begin] &= ~older | (steps[:begin] < steps[begin])
    return chosen
