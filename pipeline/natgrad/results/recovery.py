"""Represent the properties of recovered gradients: their errors, their rules, and what the checks prove."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import RECOVERY
from natgrad.sources.optimizers.recovery import GRADES, RULE_NAMES
from natgrad.store import Trajectory

__all__ = ["GradientCheck", "Recovery", "of_model", "qualification", "qualification_text"]

Array = NDArray[np.float64]


class GradientCheck(enum.IntEnum):
    """Meaning of the comparison of the displacement of a recovered gradient with the logged one."""

    UNKNOWN = -1
    NONE = 0
    RATE_ONLY = 1
    VERIFIED = 2


@dataclass(frozen=True)
class Recovery:
    """Properties of recovered gradients by update and tensor, in the order of `natgrad.schema.names.RECOVERY`.

    They have the shape (updates, tensors), and are NaN where the gradient is not known.

    Attributes
    ----------
    error_bound : array
        Largest error of the gradient that rounding causes, relative to its norm.
    residual, rounding : array
        Difference between the displacement of the recovered gradient and the logged one, and the largest one that
        rounding explains, relative to the norm of the latter.
    grade, rule : array
        Indices into `natgrad.sources.optimizers.recovery.GRADES` and ``RULE_NAMES``.
    updates : array
        Number of updates to the next state.
    """

    error_bound: Array
    residual: Array
    rounding: Array
    grade: Array
    rule: Array
    updates: Array

    @classmethod
    def of(cls, states: Trajectory, updates: NDArray[np.int64]) -> Recovery | None:
        """Return the properties for the states before some updates; None if the gradients are not recovered."""
        if not {*RECOVERY} <= {*states.tables}:
            return None
        return cls(*(states.scalar(name)[updates] for name in RECOVERY))

    def check(self) -> NDArray[np.int8]:
        """Return the `GradientCheck` of each update and tensor."""
        return np.where(np.isnan(self.grade), GradientCheck.UNKNOWN, self.grade).astype(np.int8)

    def attributes(self) -> dict[str, Any]:
        """Return what qualifies the gradients, as attributes of the results: the worst value of each property."""
        known = np.isfinite(self.grade)
        found: dict[str, Any] = {"gradient_batch": "mini-batch", "gradient_clipped": "unknown"}
        rules = np.unique(self.rule[known]).astype(int)
        found["gradient_rule"] = ", ".join(RULE_NAMES[index] for index in rules)
        found["gradient_check"] = GRADES[int(self.grade[known].min())] if known.any() else GRADES[0]
        names = {"error_bound": "gradient_error_bound", "residual": "gradient_check_residual"}
        names["updates"] = "gradient_updates"
        for field in fields(self):
            values = getattr(self, field.name)
            if field.name in names and np.isfinite(values).any():
                found[names[field.name]] = float(values[np.isfinite(values)].max())
        return found


def qualification(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what qualifies recovered gradients, from the attributes of results; empty if none are recovered."""
    if attributes.get("gradient_source") != "recovered":
        return {}
    start = "gradient_"
    found = {name.removeprefix(start): value for name, value in attributes.items() if name.startswith(start)}
    return {name: value for name, value in found.items() if name != "source"}


def qualification_text(attributes: Mapping[str, Any]) -> str:
    """Return the same as text, for users."""
    found = qualification(attributes)
    error = f"relative error up to {found['error_bound']:.2g}" if "error_bound" in found else "none is known"
    residual = f", residual up to {found['check_residual']:.2g}" if "check_residual" in found else ""
    span = int(found.get("updates", 1))
    mean = f", means over up to {span} updates" if span > 1 else ""
    return (
        f"recovered from the states of the optimizer ({found['rule'] or 'no update'}){mean}; {error}; check: "
        f"{found['check']}{residual}; of the {found['batch']} of each update, after clipping if there was any"
    )


def of_model(values: Array, norms: Array) -> Array:
    """Return a relative error of the model from those of its tensors, shape (updates,).

    Parameters
    ----------
    values, norms : array, shape (updates, tensors)
        Relative errors, and the norms that they refer to.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        errors = np.where(norms > 0, values * norms, 0.0)
        return np.asarray(np.linalg.norm(errors, axis=1) / np.linalg.norm(norms, axis=1))
