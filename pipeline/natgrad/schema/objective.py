"""Define when losses and gradients are consistent with one objective: when they explain the change of the loss."""

from __future__ import annotations

__all__ = ["LEAST_UPDATES", "consistency"]

_CONSISTENT, _INCONSISTENT = 0.05, 0.2
"""Largest median residual of a consistent run, and smallest of an inconsistent run. Training on all data has
medians below 0.01 unless the learning rate is so large that the loss oscillates, and mini-batches from 0.1 to 1."""

LEAST_UPDATES = 3
"""Minimum number of updates that show whether a run is consistent, or whether a sign is wrong."""


def consistency(residual: float | None) -> str:
    """Return ``consistent``, ``inconsistent`` or ``undecided``.

    Parameters
    ----------
    residual : float, optional
        Median over the updates of the part of the change of the loss that the gradients of both states do not
        explain; see `natgrad.results.objective.objective_residual`.

    Examples
    --------
    >>> [consistency(residual) for residual in (0.01, 0.1, 0.5, None)]
    ['consistent', 'undecided', 'inconsistent', 'undecided']
    """
    if residual is None or _CONSISTENT < residual < _INCONSISTENT:
        return "undecided"
    return "consistent" if residual <= _CONSISTENT else "inconsistent"
