"""The variables of ``results.zarr``: name, unit, equation, and the flags that explain missing values.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers refer to this paper.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from natgrad.schema.names import (
    ATTEMPT,
    DESCENT,
    ELEMENT,
    GAMMA,
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
    "REPLICATE_VARIABLES",
    "VARIABLES",
    "ShiftedMetric",
    "Status",
    "Variable",
]


DIMENSIONS: dict[str, str] = {
    STEP: "step number, as logged, of the state before the update",
    ATTEMPT: "number of restarts before this step was logged",
    RUN: "name of the run",
    ELEMENT: "element of the flattened model, tensors in the order of the layout table",
    TENSOR: "name of the tensor",
    VECTOR: "first vector of an inner product",
    WITH_VECTOR: "second vector of an inner product",
    DESCENT: "which negative gradient is meant",
    WINDOW: "number m of consecutive updates taken together, eq. (3)",
    REPLICATE: "one of many updates that a stochastic rule makes from the same state",
    REPLICATE_VECTOR: "first vector of an inner product of the replicates of an update",
    WITH_REPLICATE_VECTOR: "second vector of an inner product of the replicates of an update",
    GAMMA: "weight of the one-parameter family of metrics, eq. (22)",
}


class Status(enum.IntEnum):
    """Why a metric exists or not; CF flag values of the variable ``status``.

    Where several apply the first of this order wins: not_logged (a run of a sweep does not have the step, another
    has), non_finite, no_learning_rate, zero_gradient, zero_update, unverifiable, and then the sign of the
    alignment decides.
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


class ShiftedMetric(enum.IntEnum):
    """What is known of Mbar + eta H, the metric of the true gradient of eq. (17); flags of ``shifted_metric``.

    Unknown where no smallest Hessian eigenvalue was logged or Mbar does not exist. Indefinite whatever Mbar is,
    where y.g <= 0. Otherwise definite with the Mbar of smallest condition number, or with some Mbar; or undecided:
    a metric of the true gradient exists, but the learning rate is not below the bound that makes it this one.
    """

    UNKNOWN = 0
    DEFINITE_OPTIMAL = 1
    DEFINITE = 2
    UNDECIDED = 3
    INDEFINITE = 4


@dataclass(frozen=True)
class Variable:
    """What a variable of ``results.zarr`` is called, in which unit, by which equation."""

    long_name: str
    units: str
    equation: str


# y is a loss per parameter, g a parameter per learning rate (eq. 2), so a metric M with M g = y has the
# unit loss x learning rate / parameter^2. The pipeline does not know these units and names them.
_METRIC = "loss learning_rate parameter-2"

VARIABLES: dict[str, Variable] = {
    "loss": Variable("loss before the update", "loss", "L(theta_t)"),
    "learning_rate": Variable("learning rate of the update", "learning_rate", "eta, eq. (2)"),
    "step_span": Variable(
        "number of updates between this logged state and the next", "1", "t' - t for logged neighbours t, t'"
    ),
    "parameter_norm": Variable("norm of the parameters", "parameter", "|theta_t|"),
    "update_norm": Variable(
        "norm of the mean update over the window's steps",
        "parameter learning_rate-1",
        "|g|, g = (theta_{t+k} - theta_t) / (k eta), eq. (2)",
    ),
    "gradient_norm": Variable("norm of the negative gradient", "loss parameter-1", "|y|"),
    "alignment": Variable("inner product of negative gradient and update", "loss learning_rate-1", "y.g"),
    "cosine": Variable("cosine of the angle between negative gradient and update", "1", "cos(psi)"),
    "angle": Variable("angle between negative gradient and update", "radian", "psi in [0, pi], eq. (9)"),
    "angle_uncertainty": Variable(
        "largest error of the angle by rounding of the stored values",
        "radian",
        "asin(|dy| / |y|) + asin(|dg| / |g|), dy and dg what rounding to the stored dtypes makes at most",
    ),
    "effective": Variable("the update descends: y.g > 0", "1", "y.g > 0, section 2.1"),
    "condition_number": Variable(
        "smallest condition number of any metric M with M g = y", "1", "kappa(M_opt), below eq. (9), Prop. 1"
    ),
    "preconditioner_condition_number": Variable(
        "condition number of the metric that the optimizer used",
        "1",
        "kappa(diag(sqrt(v) + epsilon)) of Adam, of the factors of Shampoo, PSGD and K-FAC, beside kappa(M_opt) of "
        "eq. (9)",
    ),
    "similarity": Variable("similarity of update and steepest descent", "1", "1 / kappa(M_opt)"),
    "eigenvalue_max": Variable("largest eigenvalue of the optimal metric", _METRIC, "eq. (9)"),
    "eigenvalue_mid": Variable(
        "eigenvalue of the optimal metric of multiplicity D - 2 (none where D <= 2)", _METRIC, "eq. (9)"
    ),
    "eigenvalue_min": Variable("smallest eigenvalue of the optimal metric", _METRIC, "eq. (9)"),
    "eigenvalue_max_infimum": Variable(
        "greatest lower bound of the largest eigenvalue of any metric", _METRIC, "Prop. 3"
    ),
    "eigenvalue_min_supremum": Variable(
        "least upper bound of the smallest eigenvalue of any metric", _METRIC, "Prop. 2"
    ),
    "family_eigenvalue_max": Variable(
        "largest eigenvalue over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_eigenvalue_mid": Variable(
        "eigenvalue of multiplicity D - 2 over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_eigenvalue_min": Variable(
        "smallest eigenvalue over the one-parameter family", _METRIC, "Lemma 1, eq. (22)"
    ),
    "family_condition_number": Variable("condition number over the one-parameter family", "1", "Lemma 1, eq. (22)"),
    "discrete_identity_residual": Variable(
        "relative failure of the discrete gradient identity", "1", "(eta g.y + dL) / |dL|, eq. (12)"
    ),
    "learning_rate_bound": Variable(
        "learning rate below which some metric Mbar + eta H is one of the true gradient",
        "learning_rate",
        "eta < |ybar| cos(psi_bar) / (h |g|), below eq. (17)",
    ),
    "learning_rate_bound_optimal": Variable(
        "learning rate below which that of the optimal Mbar is", "learning_rate", "eta < lambda_min(Mbar) / h"
    ),
    "shifted_metric": Variable(
        "what Mbar + eta H is, the metric of the true gradient", "1", "Mbar + eta H, eq. (17)"
    ),
    "loss_average": Variable("mean loss over the window", "loss", "L_avg(t), below eq. (3)"),
    "loss_decrease": Variable("decrease of the loss over the window", "loss", "L(t) - L(t+m), eq. (3)"),
    "effective_window": Variable(
        "smallest window of which all are effective, NaN where none is", "1", "m with y.g > 0 for all t, eq. (3)"
    ),
    "effective_window_count": Variable("windows that support effective_window", "1", "number of t, eq. (3)"),
    "decreasing_window": Variable(
        "smallest window over which the loss always decreases, NaN where none is", "1", "m of eq. (3)"
    ),
    "decreasing_window_count": Variable("windows that support decreasing_window", "1", "number of t, eq. (3)"),
    "status": Variable("why the metric exists or not", "1", "y.g > 0, section 2.1"),
}

# Of a stochastic rule g stands for its mean over replicates, and an error is that of the mean, by the jackknife.
REPLICATE_VARIABLES: dict[str, Variable] = {
    **{
        name: VARIABLES[name]
        for name in (
            "status",
            "effective",
            "update_norm",
            "gradient_norm",
            "alignment",
            "angle",
            "condition_number",
        )
    },
    "stochastic_weight": Variable(
        "weight alpha above which the metric of the mean update is positive definite", _METRIC, "eq. (19)"
    ),
    "stochastic_alpha": Variable("weight alpha of the best conditioned Mbar", _METRIC, "eqs. (9), (19)"),
    "stochastic_definite": Variable("with it the metric of the mean update is positive definite", "1", "eq. (19)"),
    "learning_rate_bound": Variable(
        "learning rate up to which it is, with y, <Hg> and alpha held", "learning_rate", "eq. (19)"
    ),
    "loss_decrease": Variable("mean decrease of the loss", "loss", "-<dL>, section 2.2"),
    "replicate_loss_decrease": Variable("decrease of the loss in each replicate", "loss", "-dL"),
    "replicate_alignment": Variable("y.g of each replicate", "loss learning_rate-1", "y.g"),
    "replicate_angle": Variable("angle between y and g of each replicate", "radian", "psi in [0, pi], eq. (9)"),
    "replicate_update_norm": Variable("norm of the update of each replicate", "parameter learning_rate-1", "|g|"),
}

REPLICATE_VARIABLES |= {
    f"{name}_error": Variable(
        f"standard error of {name}", REPLICATE_VARIABLES[name].units, "jackknife over replicates"
    )
    for name in (
        "alignment",
        "angle",
        "condition_number",
        "stochastic_weight",
        "learning_rate_bound",
        "loss_decrease",
    )
}
"""Variables of `natgrad.results.replicates.label`."""
