"""Define the metadata of result variables, their dimensions, and the flags that explain missing values.

Each variable of ``results.zarr`` is one entry, which also has the function that computes it.
`natgrad.results.variables` has the entries for updates, and `natgrad.results.replicate_variables` those for
stochastic rules.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers refer to this paper.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from natgrad.schema.names import (
    ATTEMPT,
    DESCENT,
    ELEMENT,
    GAMMA,
    GROUP,
    GROUP_KIND,
    REPLICATE,
    REPLICATE_VECTOR,
    RUN,
    STEP,
    TENSOR,
    VECTOR,
    WINDOW,
    WITH_REPLICATE_VECTOR,
    WITH_VECTOR,
)

__all__ = [
    "DIMENSIONS",
    "WITHOUT_GRADIENTS",
    "ShiftedMetric",
    "Status",
    "Variable",
]

WITHOUT_GRADIENTS = (
    "the log has no gradients: the results have norms of parameters and updates, and losses, but no angle, no "
    "metric and no condition number. To obtain gradients, record them in the training loop (natgrad.watch or "
    "natgrad.Recorder). If the log has states of the optimizer, or if gradients are in another log or under "
    "another key, start again with --overwrite, and pass --gradient from-optimizer, that log as an additional "
    "SOURCE, or the key with --map gradient=KEY"
)
"""Sentence for users about a run without gradients."""

DIMENSIONS: dict[str, str] = {
    STEP: "step number, as logged, of the state before the update",
    ATTEMPT: "number of restarts before this step was logged",
    RUN: "name of the run",
    ELEMENT: "element of the flattened model, with tensors in the order of the layout table",
    TENSOR: "name of the tensor",
    GROUP: "name of the group of tensors",
    GROUP_KIND: "kind of the group: block, layer, or pattern of names",
    VECTOR: "first vector of an inner product",
    WITH_VECTOR: "second vector of an inner product",
    DESCENT: "estimate of the negative gradient",
    WINDOW: "number m of consecutive updates in a window, eq. (3)",
    REPLICATE: "one of several draws of the update of a stochastic rule from the same state",
    REPLICATE_VECTOR: "first vector of an inner product of replicates",
    WITH_REPLICATE_VECTOR: "second vector of an inner product of replicates",
    GAMMA: "weight in the one-parameter family of metrics, eq. (22)",
}


class Status(enum.IntEnum):
    """Reasons why a metric does or does not exist: the CF flag values of the variable ``status``.

    If several apply, the first in this order is used: not_logged (this run of a sweep did not log the step),
    skipped (by the optimizer, because a gradient was not finite), non_finite, no_learning_rate (it is not positive;
    or it is not known, and the direction of g depends on it), overflow, zero_gradient, zero_update, unverifiable
    because a loss, a gradient or a Hessian-vector product is missing, underflow, unverifiable because of rounding,
    and then the sign of the alignment.
    """

    EFFECTIVE = 0
    ORTHOGONAL = 1
    OBTUSE = 2
    ZERO_UPDATE = 3
    ZERO_GRADIENT = 4
    NON_FINITE = 5
    NO_LEARNING_RATE = 6
    UNVERIFIABLE = 7
    NOT_LOGGED = 8
    UNDERFLOW = 9
    OVERFLOW = 10
    SKIPPED = 11


class ShiftedMetric(enum.IntEnum):
    """Definiteness of Mbar + eta H, the metric of the true gradient of eq. (17); flags of ``shifted_metric``.

    It is unknown if no smallest Hessian eigenvalue was logged, or if Mbar does not exist. It is indefinite for
    every Mbar if y.g <= 0. Otherwise it is definite for the Mbar with the smallest condition number, definite for
    some Mbar, or undecided: a metric of the true gradient exists, but the learning rate is not below the bound.
    """

    UNKNOWN = 0
    DEFINITE_OPTIMAL = 1
    DEFINITE = 2
    UNDECIDED = 3
    INDEFINITE = 4


@dataclass(frozen=True, kw_only=True)
class Variable:
    """The metadata of a variable of ``results.zarr``.

    Attributes
    ----------
    name : str
    dimensions : tuple of str
        Dimensions from `DIMENSIONS`, in the order step, replicate or tensor, descent, window, gamma. In the group
        ``/model`` the variable does not have the dimension ``tensor``.
    units, equation, long_name, description : str
        Attributes of the variable: the unit as a product of ``loss``, ``parameter`` and ``learning_rate``, the
        equation or definition, a short label, and a description of its meaning and its missing values.
    flags : type, optional
        Enumeration of the values, if the variable has flags.
    absent : int, optional
        Value at steps that a run of a sweep did not log. The default is NaN, False or 0, depending on the dtype.
    significant_bits : int, optional
        Bits of the mantissa to which values are rounded, from 1 to 51, so that they compress better. The error of
        rounding must be small compared with the guaranteed accuracy. The default is not to round.
    """

    name: str
    dimensions: tuple[str, ...]
    units: str
    equation: str
    long_name: str
    description: str
    flags: type[enum.IntEnum] | None = None
    absent: int | None = None
    significant_bits: int | None = None

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the variable in ``results.zarr``."""
        attributes: dict[str, Any] = {
            "long_name": self.long_name,
            "units": self.units,
            "equation": self.equation,
            "description": self.description,
        }
        if self.flags is not None:
            attributes["flag_values"] = [int(flag) for flag in self.flags]
            attributes["flag_meanings"] = " ".join(flag.name.lower() for flag in self.flags)
        if self.significant_bits is not None:
            attributes["significant_bits"] = self.significant_bits
        return attributes
