"""Compute panel A of Figure 3: the eigenvalues of optimal metrics against the angle, eq. (9) and measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from natgrad.reporting.run_results import EIGENVALUES, Array, RunResults
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair

__all__ = ["exact_curves", "measured_points", "spread_points"]

_POINTS = 48
"""Number of points of all runs for each eigenvalue."""


def measured_points(runs: Sequence[RunResults]) -> list[tuple[Array, Array]]:
    """Return angles and eigenvalues of effective updates, times |g| / |y|, thinned so that points do not overlap.

    Returns
    -------
    list of (angle, values)
        For each run, with the shapes (points,) and (3, points). A value that is not positive is NaN.
    """
    found = []
    for index, run in enumerate(runs):
        angle = run["angle"]
        with np.errstate(all="ignore"):
            scale = run["update_norm"] / run["gradient_norm"]
            values = np.stack([run[name] * scale for name in EIGENVALUES])
        drawn = np.isfinite(angle) & np.isfinite(values[0]) & (values[0] > 0)
        angle, values = angle[drawn], values[:, drawn]
        chosen = spread_points(angle, index / len(runs), max(_POINTS // len(runs), 8))
        values = values[:, chosen]
        found.append((angle[chosen], np.where(np.isfinite(values) & (values > 0), values, np.nan)))
    return found


def exact_curves(least: float) -> tuple[Array, Array]:
    """Return angles from 0 to almost pi/2, and the eigenvalues of eq. (9) at |y| = |g|.

    Parameters
    ----------
    least : float
        Smallest eigenvalue that is drawn, at most 1. The curves reach a hundredth of it.

    Returns
    -------
    angle, values : array, shape (points,) and (3, points)
    """
    # Angles are measured from pi/2, where the curves diverge, so that the curves reach the edge of the panel.
    rest = np.geomspace(max(least * 1e-2, 1e-300), np.pi / 2, 400)
    unit = np.ones_like(rest)
    pair = Pair(unit, np.sin(rest), np.cos(rest) ** 2, np.full(rest.shape, 3))
    return np.pi / 2 - rest, np.stack(geometry.eigenvalues(pair))


def spread_points(angle: Array, shift: float, columns: int) -> NDArray[np.int64]:
    """Select points that do not overlap: both ends, and the point closest to the middle of each column.

    All points lie on the curves, so the points of several runs would cover each other and the curves. The columns
    of each run are therefore shifted by a fraction of a column.

    Returns
    -------
    int64 array
        Indices of the selected points.
    """
    if not angle.size:
        return np.zeros(0, np.int64)
    position = angle / (np.pi / 2) * columns + shift
    column = np.floor(position)
    order = np.lexsort((np.abs(position - column - 0.5), column))
    chosen = order[np.unique(column[order], return_index=True)[1]]
    return np.unique(np.concatenate([chosen, [angle.argmin(), angle.argmax()]])).astype(np.int64)
