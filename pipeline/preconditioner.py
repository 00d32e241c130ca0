"""Condition of the metric that an adaptive optimizer uses, beside the smallest that its update needs (eq. 9).

Adam moves by -eta m / (sqrt(v) + epsilon): the metric diag(sqrt(v) + epsilon) takes its update to the momentum m.
Where m is not the gradient it is no metric of eq. (6) for the gradient; what it costs in conditioning is this all
the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["adam_eigenvalues", "condition_number"]

Array = NDArray[np.float64]


def adam_eigenvalues(
    smallest: ArrayLike, largest: ArrayLike, beta2: ArrayLike, epsilon: ArrayLike, updates: ArrayLike
) -> tuple[Array, Array]:
    """Smallest and largest eigenvalue of the metric that Adam, with its correction of the bias, used in an update.

    Parameters
    ----------
    smallest, largest : array
        Elements of ``exp_avg_sq`` after the update, in squared loss per squared parameter.
    beta2, epsilon : array
    updates : array
        Updates that ``exp_avg_sq`` has seen, this one included.

    Returns
    -------
    tuple of arrays
        In loss per parameter; NaN where one is not known, no update was made or an element is negative.
    """
    beta2, updates = np.asarray(beta2, np.float64), np.asarray(updates, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = np.where(updates > 0, 1.0 - beta2**updates, np.nan)
        low, high = (np.sqrt(np.asarray(v, np.float64) / bias) + epsilon for v in (smallest, largest))
    return np.asarray(low), np.asarray(high)


def condition_number(smallest: ArrayLike, largest: ArrayLike, learning_rate: ArrayLike) -> tuple[Array, Array]:
    """Condition number of a diagonal metric, of each tensor and of the model.

    Parameters
    ----------
    smallest, largest : array, shape (rows, tensors)
        Eigenvalues of each tensor's block.
    learning_rate : array, shape (rows, tensors)
        Of each tensor: one that moves ten times as fast has a tenth of the metric.

    Returns
    -------
    tensors : array, shape (rows, tensors)
    model : array, shape (rows,)
        NaN where it is not known of one tensor.
    """
    low, high = np.asarray(smallest, np.float64), np.asarray(largest, np.float64)
    rate = np.asarray(learning_rate, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate = np.where(rate > 0, rate, np.nan)
        return np.asarray(high / low), np.asarray((high / rate).max(axis=-1) / (low / rate).min(axis=-1))
