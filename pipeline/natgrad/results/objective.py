"""Test whether the losses and gradients of a run belong to one objective.

For a smooth objective that does not change, the change of the loss over an update is the mean of the gradients of
both states times the displacement, up to terms of third order. If the loss and the gradient of each step belong to
its own mini-batch, the losses of two steps also differ because the batches do. Then a decrease of the loss is
meaningless, and so is every other comparison of the losses of two steps. A gradient with the wrong sign can also be
detected: the loss falls although every angle is obtuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.names import DESCENT, DESCENTS, WINDOW
from natgrad.schema.objective import LEAST_UPDATES, consistency
from natgrad.schema.variables import Status
from natgrad.theory.discrete_time import trapezoid_residual

__all__ = ["COMPARING_DESCENTS", "Objective", "loss_precision", "objective_residual"]

Array = NDArray[np.float64]

COMPARING_DESCENTS = ("corrected", "trapezoid")
"""Estimates of the gradient that compare the losses of two states."""

_SIGNIFICANT = 32.0
"""A change of the loss is informative if its terms exceed this multiple of their rounding errors."""


def objective_residual(table: UpdateTable) -> Array:
    """Return how much of the change of the loss the gradients of both states do not explain.

    With the displacement d and the change e of the gradient, this is ``|dL - (g + e/2).d|`` divided by
    ``|dL| + |g.d| + |e.d| / 2``: 0 if the trapezoid rule explains the change, and at most 1.

    Returns
    -------
    array, shape (updates,)
        NaN if a loss is not known, if the terms are within the rounding errors of losses and states, or if the loss
        changes with time.
    """
    index = {name: position for position, name in enumerate(table.vectors)}
    if not {"displacement", "gradient", "gradient_change"} <= index.keys():
        return np.full(len(table.steps), np.nan)
    of_parameter, of_gradient = (
        np.array([unit_roundoff(tensor.dtype) for tensor in table.layout.tensors]),
        unit_roundoff(table.dtypes["gradient"]),
    )
    with np.errstate(all="ignore"):

        def product(one: str, other: str) -> Array:
            return np.asarray(table.gram[..., index[one], index[other]])

        def norm(vector: str) -> Array:
            return np.sqrt(product(vector, vector))

        slope = norm("gradient") + norm("gradient_change") / 2.0
        floor = of_parameter * (2.0 * norm("parameter") + norm("displacement"))
        error = (slope * (floor + of_gradient * norm("displacement"))).sum(axis=1)
        precision = loss_precision(table.loss) if table.loss_precision is None else table.loss_precision
        error += _loss_error(table.loss, precision) + _loss_error(table.next_loss, precision)
        first = product("gradient", "displacement").sum(axis=1)
        second = product("gradient_change", "displacement").sum(axis=1) / 2.0
        change = table.next_loss - table.loss
        residual, scale = trapezoid_residual(change, first, second)
    significant = np.isfinite(residual) & (scale > _SIGNIFICANT * error) & ~table.extended()
    return np.where(significant, residual, np.nan)


def _loss_error(loss: Array, precision: tuple[float, float]) -> Array:
    """Return the largest error of losses that are written in a precision."""
    relative, absolute = precision
    return np.asarray(np.maximum(relative * np.abs(loss), absolute))


def loss_precision(losses: Array) -> tuple[float, float]:
    """Return the relative and the absolute precision in which all losses of a run are written; NaN if unknown."""
    known = losses[np.isfinite(losses)]
    if not len(known):
        return np.nan, np.nan
    mantissa, _ = np.frexp(known)
    bits = next((count for count in (8, 11, 24) if not (np.ldexp(mantissa, count) % 1).any()), 53)
    # Losses in text logs have few decimals.
    for decimals in range(8):
        scaled = known * 10.0**decimals
        if (np.abs(scaled - np.rint(scaled)) <= 4.0 * 2.0**-53 * np.abs(scaled)).all():
            return 2.0**-bits, 0.5 * 10.0**-decimals
    return 2.0**-bits, 0.0


@dataclass(frozen=True)
class Objective:
    """Findings about the objective of a run.

    Attributes
    ----------
    evaluation : str
        What the user declared, one of `natgrad.schema.names.EVALUATIONS`.
    residual : float or None
        Median of `objective_residual` over the informative updates. None if there are too few.
    updates : int
        Number of these updates.
    wrong_sign : bool
        The loss falls at every step, and every angle is obtuse.
    """

    evaluation: str
    residual: float | None
    updates: int
    wrong_sign: bool

    @classmethod
    def of(cls, model: xr.Dataset, evaluation: str) -> Objective:
        """Return the objective from the results of the model, and what the user declared."""
        residual = model["objective_residual"].values if "objective_residual" in model else np.empty(0)
        residual = residual[np.isfinite(residual)]
        status = model["status"].sel({DESCENT: DESCENTS[0], WINDOW: 1}).values.ravel()
        angled, logged = status <= Status.OBTUSE, status != Status.NOT_LOGGED
        falls = False
        if "loss_decrease" in model:
            falls = bool((model["loss_decrease"].sel({WINDOW: 1}).values.ravel()[logged] > 0).all())
        obtuse = angled.sum() >= LEAST_UPDATES and bool((status[angled] == Status.OBTUSE).all())
        median = float(np.median(residual)) if len(residual) >= LEAST_UPDATES else None
        return cls(evaluation, median, len(residual), obtuse and falls)

    @property
    def consistency(self) -> str:
        """Agreement of losses and gradients: ``consistent``, ``inconsistent`` or ``undecided``."""
        return consistency(self.residual)

    @property
    def comparable(self) -> bool:
        """Return True if the losses of two steps may be compared."""
        return self.evaluation == "fixed" or (self.evaluation == "unknown" and self.consistency != "inconsistent")

    def __str__(self) -> str:
        declared = {
            "batch": "each step has its own mini-batch (declared)",
            "fixed": "the same data at every step (declared)",
            "unknown": "not declared",
        }[self.evaluation]
        if self.residual is None:
            return f"{declared}; the log does not show whether losses and gradients agree"
        agree = {"consistent": "agree", "inconsistent": "do not agree", "undecided": "agree only roughly"}
        median = f"median residual {self.residual:.2g} of {self.updates} updates"
        return f"{declared}; losses and gradients {agree[self.consistency]} ({median})"

    @property
    def caution(self) -> str:
        """Caution for comparisons of the losses of two steps; empty if there is none."""
        if self.evaluation == "batch":
            return "not comparable: the losses belong to changing batches"
        if not self.comparable:
            return "unverifiable: the losses probably belong to changing batches"
        if self.evaluation == "unknown" and self.consistency == "undecided":
            return "if the losses do not belong to changing batches, which the log does not show"
        return ""

    def warnings(self) -> list[str]:
        """Return what users must know to read the results."""
        if self.wrong_sign:
            return [
                "The loss falls at every step, but every update is obtuse: the gradients probably have the wrong "
                "sign. Log the gradient of the loss, not of its negative."
            ]
        if self.evaluation == "batch" or self.consistency != "inconsistent":
            return []
        found = (
            f"The gradients do not explain how the loss changes: the median residual of {self.updates} updates is "
            f"{self.residual:.2g}, and that of one smooth objective is near 0."
        )
        if self.evaluation == "fixed":
            return [
                f"{found} The run was declared with --evaluation fixed. Check that loss, gradient and parameters "
                "of a step belong to the same state (--shift) and the same data, and that the learning rate is not "
                "so large that the loss oscillates."
            ]
        return [
            f"{found} The batches probably change: the loss and the gradient of each step belong to its own batch. "
            "Comparisons of the losses of two steps are then meaningless, and the descents corrected and "
            "trapezoid are unverifiable: declare it with --evaluation batch. Otherwise check that loss, gradient "
            "and parameters of a step belong to the same state (--shift)."
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "evaluation": self.evaluation,
            "consistency": self.consistency,
            "residual": self.residual,
            "warnings": self.warnings(),
        }
