"""Declare the result variables of updates, each with its metadata and the function that computes it.

An entry (`UpdateVariable`) declares the inputs of a variable, the updates at which it is defined, and its
description. `natgrad.results.dataset` computes, masks, stacks and labels all entries in the same way.

Another package adds variables through the entry-point group ``natgrad.variables``, whose entry points refer to an
`UpdateVariable`. While it is installed, the ``results.zarr`` of every analyzed run contains the variables::

    [project.entry-points."natgrad.variables"]
    relative_update = "my_package:relative_update"
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from natgrad.results.objective import objective_residual
from natgrad.results.recovery import GradientCheck, of_model
from natgrad.results.updates import LONGEST_WINDOW, Defined, Updates, UpdateVariable
from natgrad.schema.errors import InputError
from natgrad.schema.extensions import Extension, registered
from natgrad.schema.names import DESCENT, DESCENTS, GAMMA, STEP, TENSOR, WINDOW
from natgrad.schema.variables import ShiftedMetric, Status
from natgrad.theory import geometry, windows
from natgrad.theory.preconditioners import condition_number

__all__ = [
    "LONGEST_WINDOW",
    "VARIABLES",
    "VARIABLES_GROUP",
    "Defined",
    "UpdateVariable",
    "Updates",
    "registered_variables",
]

Array = NDArray[np.float64]

VARIABLES_GROUP = "natgrad.variables"
"""Entry-point group for variables of other packages."""


def registered_variables() -> list[Extension[UpdateVariable]]:
    """Return the variables of other packages. Variables that cannot be used are skipped with a warning."""
    return list(registered(VARIABLES_GROUP, UpdateVariable, VARIABLES).values())


# Functions ---------------------------------------------------------------------------------------------------


def _learning_rate(updates: Updates) -> Array:
    own = updates.table.tensor_learning_rate
    return updates.table.learning_rate if own is None or updates.aggregation_name != "tensor" else own


def _learning_rate_comment(updates: Updates) -> str:
    if updates.table.tensor_learning_rate is None:
        return ""
    if updates.aggregation_name == "tensor":
        return (
            "The parameter groups of the optimizer have different learning rates. Each tensor has the rate of its "
            "group, and the g of a tensor is its displacement divided by this rate."
        )
    return (
        "The parameter groups of the optimizer have different learning rates. This is the rate logged for the step "
        "or set with --learning-rate, or otherwise the largest rate of the tensors. The g of the model is the "
        "displacement divided by this rate, so y.g > 0 if and only if the update descends; the ratios between the "
        "rates are part of the learning rule. Angle and condition number do not depend on this rate, but "
        "update_norm, alignment, eigenvalues and bounds do."
    )


def _logged(name: str) -> Callable[[Updates], Array]:
    """Return a function that returns a column of the table of updates."""

    def column(updates: Updates) -> Array:
        return np.asarray(getattr(updates.table, name))

    return column


def _update_to_weight(updates: Updates) -> Array:
    weights = geometry.representable(updates.aggregation.parameter_norm)
    changes = geometry.representable(updates.aggregation.displacement_norm)
    return np.where(weights > 0, geometry.safe_divide(changes, weights), np.nan)


def _preconditioner_condition_number(updates: Updates) -> Array:
    used = updates.table.optimizer
    if used is None:
        raise InputError("the optimizer state is not stored", remedy="ingest the log with --include optimizer")
    of_tensors, of_model = condition_number(used.smallest, used.largest, used.learning_rate)
    return of_model if updates.aggregation_name == "model" else of_tensors


def _gradient_error_bound(updates: Updates) -> Array:
    return _recovery_error(updates, "error_bound", "gradient")


def _gradient_check_residual(updates: Updates) -> Array:
    return _recovery_error(updates, "residual", "displacement")


def _recovery_error(updates: Updates, figure: str, vector: str) -> Array:
    table = updates.table
    values = np.asarray(getattr(table.recovery, figure))
    if updates.aggregation_name == "tensor":
        return values
    index = table.vectors.index(vector)
    return of_model(values, np.sqrt(table.gram[..., index, index]))


def _gradient_check(updates: Updates) -> NDArray[np.int8]:
    recovery = updates.table.recovery
    assert recovery is not None
    return recovery.check()


def _discrete_identity_residual(updates: Updates) -> Array:
    single = updates.aggregation
    share = windows.consecutive(single.rate * single.pair.alignment, updates.m).sum(axis=-1)
    decrease = updates.loss_decrease
    residual = (share - decrease) / np.abs(decrease)
    return np.where(np.isfinite(residual), residual, np.nan)


def _shifted_metric(updates: Updates) -> NDArray[np.int8]:
    bound, optimal = updates.learning_rate_bounds
    largest = windows.consecutive(updates.table.learning_rate, updates.m).max(axis=-1)
    conditions = [
        (np.isnan(bound), ShiftedMetric.UNKNOWN),
        # g' (Mbar + eta H) g is the y.g of the true gradient, regardless of the estimate.
        (updates.of_gradient.pair.alignment <= 0, ShiftedMetric.INDEFINITE),
        (largest < optimal, ShiftedMetric.DEFINITE_OPTIMAL),
        (largest < bound, ShiftedMetric.DEFINITE),
    ]
    flags = [np.int8(flag) for _, flag in conditions]
    return np.select([condition for condition, _ in conditions], flags, np.int8(ShiftedMetric.UNDECIDED))


# The variables -----------------------------------------------------------------------------------------------

METRIC_BITS = 36
"""Bits of eigenvalues and condition numbers. Their relative error is at most 1e-10, and that of rounding 8e-12."""

NORM_BITS = 44
"""Bits of norms and their ratios. The relative error of rounding is 3e-14, and that of the ledger 1e-14."""

BOUND_BITS = 20
"""Bits of bounds of errors. They are rounded upwards, by at most 1e-6 of the bound."""

# y is a loss per parameter and g a parameter per learning rate (eq. 2), so a metric M with M g = y has this unit.
# The units of a run are not known. These words represent them.
METRIC_UNIT = "loss learning_rate parameter-2"

_SINGLE = (STEP, TENSOR)
_COMPARED = (STEP, TENSOR, DESCENT, WINDOW)
_FAMILY = (*_COMPARED, GAMMA)
_NO_METRIC = "NaN if the update is not effective."
_OUT_OF_RANGE = "NaN if its square underflows or overflows in float64."
_DISCRETE = DESCENTS[1:]

_EXTREME = "Of the Hessian with which hvp was computed, if there is one."

_HESSIAN = (
    (
        "hessian_min_eigenvalue",
        "hessian_max_eigenvalue",
        "loss parameter-2",
        "lambda_min(H), below eq. (17)",
        "smallest eigenvalue of the Hessian",
        _EXTREME,
    ),
    (
        "hessian_max_eigenvalue",
        "hessian_max_eigenvalue",
        "loss parameter-2",
        "lambda_max(H)",
        "largest eigenvalue of the Hessian",
        _EXTREME,
    ),
    (
        "taylor_point",
        "taylor_point",
        "1",
        "lambda of eq. (11)",
        "point of the displacement at which the Hessian was evaluated",
        "0 is the state before the update, and 1 the state after it.",
    ),
)

VARIABLES: dict[str, UpdateVariable] = {
    variable.name: variable
    for variable in (
        UpdateVariable(
            name="loss",
            compute=lambda updates: updates.table.loss,
            dimensions=(STEP,),
            units="loss",
            equation="L(theta_t)",
            long_name="loss before the update",
            description="Logged loss of the state before the update. NaN if it was not logged.",
        ),
        UpdateVariable(
            name="learning_rate",
            compute=_learning_rate,
            dimensions=_SINGLE,
            units="learning_rate",
            equation="eta, eq. (2)",
            long_name="learning rate of the update",
            description="Logged learning rate, or the option --learning-rate for steps without one. NaN if it is "
            "not known. The group /tensor has the dimension tensor only if the rates of parameter groups differ.",
            comment=_learning_rate_comment,
        ),
        UpdateVariable(
            name="weight_decay",
            compute=lambda updates: updates.table.weight_decay,
            needs=("weight_decay",),
            aggregations=("tensor",),
            dimensions=_SINGLE,
            units="learning_rate-1",
            equation="lambda, the decay of an update is -eta lambda theta_t",
            long_name="coefficient of decoupled weight decay",
            description="Coefficient of decoupled weight decay of the tensor, from the optimizer state, the log or "
            "the option --weight-decay. NaN where it is not known. Present only if it is not 0 everywhere, or if "
            "the option is set.",
        ),
        UpdateVariable(
            name="step_span",
            compute=lambda updates: updates.table.spans,
            dimensions=(STEP,),
            units="1",
            equation="t' - t for consecutive logged states t, t'",
            long_name="number of updates from this logged state to the next",
            description="1 if every step was logged. 0 at a step that this run of a sweep did not log.",
        ),
        UpdateVariable(
            name="parameter_norm",
            compute=lambda updates: geometry.representable(updates.aggregation.parameter_norm),
            significant_bits=NORM_BITS,
            dimensions=_SINGLE,
            units="parameter",
            equation="|theta_t|",
            long_name="norm of the parameters",
            description=f"Euclidean norm of the parameters before the update. {_OUT_OF_RANGE}",
        ),
        UpdateVariable(
            name="update_norm",
            compute=lambda updates: geometry.representable(updates.pair.update_norm),
            needs_rate=True,
            significant_bits=NORM_BITS,
            dimensions=(STEP, TENSOR, WINDOW),
            units="parameter learning_rate-1",
            equation="|g|, g = (theta_{t+k} - theta_t) / (k eta), eq. (2)",
            long_name="norm of the mean update over the window",
            description="Norm of the update divided by the learning rate. For a window, norm of its stacked "
            f"updates. NaN if the learning rate is not known. {_OUT_OF_RANGE}",
        ),
        UpdateVariable(
            name="displacement_norm",
            compute=lambda updates: geometry.representable(updates.aggregation.displacement_norm),
            significant_bits=NORM_BITS,
            dimensions=_SINGLE,
            units="parameter",
            equation="|theta_{t+k} - theta_t|",
            long_name="norm of the change of the parameters",
            description="Euclidean norm of the change of the parameters up to the next logged state. "
            f"{_OUT_OF_RANGE}",
        ),
        UpdateVariable(
            name="update_to_weight",
            compute=_update_to_weight,
            significant_bits=NORM_BITS,
            dimensions=_SINGLE,
            units="1",
            equation="|theta_{t+k} - theta_t| / |theta_t|",
            long_name="ratio of the norms of the change of the parameters and the parameters",
            description="displacement_norm divided by parameter_norm. NaN if the parameters are zero.",
        ),
        UpdateVariable(
            name="gradient_norm",
            compute=lambda updates: geometry.representable(updates.gradient_norm),
            significant_bits=NORM_BITS,
            dimensions=_COMPARED,
            units="loss parameter-1",
            equation="|y|",
            long_name="norm of the negative gradient",
            description="Norm of the estimate of the negative gradient selected by the dimension descent. "
            f"{_OUT_OF_RANGE}",
        ),
        UpdateVariable(
            name="gradient_error_bound",
            compute=_gradient_error_bound,
            needs=("recovery",),
            aggregations=("model", "tensor"),
            dimensions=_SINGLE,
            units="1",
            equation="|dy| / |y|",
            long_name="largest relative error of the recovered gradient",
            description="Largest error of a gradient that was recovered from states of the optimizer, by rounding "
            "of these states, relative to its norm. Present only if gradients are recovered. NaN where the "
            "gradient is not known.",
        ),
        UpdateVariable(
            name="gradient_check_residual",
            compute=_gradient_check_residual,
            needs=("recovery",),
            aggregations=("model", "tensor"),
            dimensions=_SINGLE,
            units="1",
            equation="|d' - d| / |d|, with the displacement d' that the update rule makes of the gradient",
            long_name="difference between the displacement of the recovered gradient and the logged one",
            description="Residual of the check of recovered gradients; gradient_check states what it proves. "
            "Present only if gradients are recovered. NaN if it was not computed, as for states that are several "
            "updates apart.",
        ),
        UpdateVariable(
            name="gradient_check",
            compute=_gradient_check,
            needs=("recovery",),
            aggregations=("tensor",),
            fill=GradientCheck.UNKNOWN,
            flags=GradientCheck,
            dimensions=_SINGLE,
            units="1",
            equation="the update rule applied to the recovered gradient",
            long_name="what the check of the recovered gradient proves",
            description="Verified if other gradients would not explain the displacement, rate_only if it proves "
            "the learning rate, but not the gradient, none if it proves nothing. Present only if gradients are "
            "recovered. Unknown where the gradient is not known.",
        ),
        UpdateVariable(
            name="alignment",
            compute=lambda updates: updates.pair.alignment,
            defined=Defined.IN_RANGE,
            needs_rate=True,
            dimensions=_COMPARED,
            units="loss learning_rate-1",
            equation="y.g",
            long_name="inner product of negative gradient and update",
            description="Rate at which the loss decreases along the update. Positive if the update is effective. "
            "NaN if inner products underflow or overflow in float64.",
        ),
        UpdateVariable(
            name="cosine",
            compute=lambda updates: geometry.cosine(updates.pair),
            defined=Defined.WITH_ANGLE,
            dimensions=_COMPARED,
            units="1",
            equation="cos(psi)",
            long_name="cosine of the angle between negative gradient and update",
            description="Cosine of the variable angle. NaN if there is no angle; status gives the reason.",
        ),
        UpdateVariable(
            name="angle",
            compute=lambda updates: geometry.angle(updates.pair),
            defined=Defined.WITH_ANGLE,
            dimensions=_COMPARED,
            units="radian",
            equation="psi in [0, pi], eq. (9)",
            long_name="angle between negative gradient and update",
            description="0 for gradient descent. Above pi/2 the update is not effective. NaN if the update or the "
            "gradient is zero, not finite or not known; status gives the reason.",
        ),
        UpdateVariable(
            name="angle_uncertainty",
            compute=lambda updates: geometry.angle_uncertainty(
                updates.pair, updates.update_floor, updates.gradient_floor
            ),
            defined=Defined.WITH_ANGLE,
            significant_bits=BOUND_BITS,
            upper_bound=True,
            dimensions=_COMPARED,
            units="radian",
            equation="asin(|dy| / |y|) + asin(|dg| / |g|), with the largest errors dy and dg of rounding to the "
            "stored dtypes",
            long_name="largest error of the angle caused by rounding of the stored values",
            description="Upper bound of the error of angle caused by rounding to the stored dtypes. Errors of "
            "logged losses, which affect corrected gradients, are not included. In /without_decay, it also has the "
            "cancellation of decay and the rest of the update.",
        ),
        UpdateVariable(
            name="effective",
            compute=lambda updates: updates.effective,
            fill=False,
            dimensions=_COMPARED,
            units="1",
            equation="y.g > 0, section 2.1",
            long_name="the update descends (y.g > 0)",
            description="True if a symmetric positive definite metric M with M g = y exists. False also if this "
            "cannot be decided; status gives the reason.",
        ),
        UpdateVariable(
            name="condition_number",
            compute=lambda updates: geometry.condition_number(updates.pair),
            defined=Defined.WITH_METRIC,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units="1",
            equation="kappa(M_opt), below eq. (9), Prop. 1",
            long_name="smallest condition number of any metric M with M g = y",
            description=f"1 for gradient descent. It grows without bound as the angle approaches pi/2. "
            f"{_NO_METRIC}",
        ),
        UpdateVariable(
            name="preconditioner_condition_number",
            compute=_preconditioner_condition_number,
            needs=("optimizer",),
            aggregations=("model", "tensor"),
            dimensions=_SINGLE,
            units="1",
            equation="kappa(diag(sqrt(v) + epsilon)) for Adam, kappa of the Kronecker factors for Shampoo, PSGD "
            "and K-FAC",
            long_name="condition number of the metric that the optimizer used",
            description="Compare with condition_number, the smallest that any metric of the update can have. "
            "Present only if the optimizer state was stored. NaN at updates whose metric is not known.",
        ),
        UpdateVariable(
            name="similarity",
            compute=lambda updates: geometry.similarity(updates.pair),
            defined=Defined.WITH_METRIC,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units="1",
            equation="1 / kappa(M_opt)",
            long_name="similarity of update and steepest descent",
            description=f"Inverse of condition_number, from 0 to 1. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_max",
            compute=lambda updates: updates.eigenvalues[0],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="eq. (9)",
            long_name="largest eigenvalue of the optimal metric",
            description=f"The optimal metric is the metric with the smallest condition number. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_mid",
            compute=lambda updates: updates.eigenvalues[1],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="eq. (9)",
            long_name="eigenvalue of the optimal metric with multiplicity D - 2",
            description=f"Eigenvalue of the directions orthogonal to y and g. NaN if D <= 2. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_min",
            compute=lambda updates: updates.eigenvalues[2],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="eq. (9)",
            long_name="smallest eigenvalue of the optimal metric",
            description=f"It goes to zero as the angle approaches pi/2. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_max_infimum",
            compute=lambda updates: updates.eigenvalue_bounds[0],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="Prop. 3",
            long_name="greatest lower bound of the largest eigenvalue of any metric",
            description=f"No metric M with M g = y has a smaller largest eigenvalue. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_min_supremum",
            compute=lambda updates: updates.eigenvalue_bounds[1],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="Prop. 2",
            long_name="least upper bound of the smallest eigenvalue of any metric",
            description=f"No metric M with M g = y has a larger smallest eigenvalue. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_eigenvalue_max",
            compute=lambda updates: updates.family_eigenvalues[0],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="largest eigenvalue of the one-parameter family",
            description=f"Largest eigenvalue of the metric with weight gamma. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_eigenvalue_mid",
            compute=lambda updates: updates.family_eigenvalues[1],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="eigenvalue of the one-parameter family with multiplicity D - 2",
            description=f"Eigenvalue of the directions orthogonal to y and g. NaN if D <= 2. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_eigenvalue_min",
            compute=lambda updates: updates.family_eigenvalues[2],
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            significant_bits=METRIC_BITS,
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="smallest eigenvalue of the one-parameter family",
            description=f"Smallest eigenvalue of the metric with weight gamma. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_condition_number",
            compute=lambda updates: geometry.family_condition_number(updates.pair, updates.gammas),
            defined=Defined.WITH_METRIC,
            significant_bits=METRIC_BITS,
            dimensions=_FAMILY,
            units="1",
            equation="Lemma 1, eq. (22)",
            long_name="condition number of the one-parameter family",
            description=f"Smallest at gamma = 1, where it equals condition_number. {_NO_METRIC}",
        ),
        # The loss cannot be divided between tensors, so only the model has a residual.
        UpdateVariable(
            name="discrete_identity_residual",
            compute=_discrete_identity_residual,
            defined=Defined.IN_RANGE,
            aggregations=("model",),
            dimensions=_COMPARED,
            units="1",
            equation="(eta g.y + dL) / |dL|, eq. (12)",
            long_name="relative error of the discrete gradient identity",
            description="0 if the estimate of the gradient explains the change of the loss exactly. NaN if the "
            "loss is not known or does not change.",
        ),
        UpdateVariable(
            name="objective_residual",
            compute=lambda updates: objective_residual(updates.table),
            aggregations=("model",),
            dimensions=(STEP,),
            units="1",
            equation="|dL - (g + e/2).d| / (|dL| + |g.d| + |e.d|/2), with the gradient g, its change e and the "
            "displacement d",
            long_name="share of the change of the loss that the gradients of both states do not explain",
            description="Near 0 if losses and gradients belong to one smooth objective, and up to 1 if they belong "
            "to changing batches. NaN if a loss is not known, if the changes are within the rounding errors of "
            "losses and states, or if the loss changes with time.",
        ),
        *(
            UpdateVariable(
                name=name,
                compute=_logged(name),
                needs=(needs,),
                aggregations=("model",),
                dimensions=(STEP,),
                units=units,
                equation=equation,
                long_name=long_name,
                description=f"{description} NaN if it is not known. Present only if it was logged or evaluated.",
            )
            for name, needs, units, equation, long_name, description in _HESSIAN
        ),
        # The Hessian is also that of the model: it includes the effect of other tensors on the gradient of a
        # tensor.
        UpdateVariable(
            name="learning_rate_bound",
            compute=lambda updates: updates.learning_rate_bounds[0],
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            dimensions=_COMPARED,
            units="learning_rate",
            equation="eta < |ybar| cos(psi_bar) / (h |g|), below eq. (17)",
            long_name="learning rate below which Mbar + eta H is a metric of the true gradient for some Mbar",
            description="Infinite if the loss is convex. NaN for the gradient itself, if no smallest eigenvalue of "
            "the Hessian was logged, or if the update is not effective.",
        ),
        UpdateVariable(
            name="learning_rate_bound_optimal",
            compute=lambda updates: updates.learning_rate_bounds[1],
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            needs_rate=True,
            dimensions=_COMPARED,
            units="learning_rate",
            equation="eta < lambda_min(Mbar) / h",
            long_name="learning rate below which Mbar + eta H is positive definite for the optimal Mbar",
            description="Bound for the metric Mbar with the smallest condition number. NaN in the same cases as "
            "learning_rate_bound.",
        ),
        UpdateVariable(
            name="shifted_metric",
            compute=_shifted_metric,
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            fill=ShiftedMetric.UNKNOWN,
            flags=ShiftedMetric,
            needs_rate=True,
            dimensions=_COMPARED,
            units="1",
            equation="Mbar + eta H, eq. (17)",
            long_name="definiteness of Mbar + eta H, the metric of the true gradient",
            description="Definiteness at the learning rate of the update. Unknown if learning_rate_bound is NaN.",
        ),
        UpdateVariable(
            name="loss_average",
            compute=lambda updates: windows.consecutive(updates.table.loss, updates.m).mean(axis=-1),
            dimensions=(STEP, WINDOW),
            units="loss",
            equation="L_avg(t), below eq. (3)",
            long_name="mean loss over the window",
            description="Mean of the losses before the m updates of the window. NaN if a loss was not logged.",
        ),
        UpdateVariable(
            name="loss_decrease",
            compute=lambda updates: updates.loss_decrease,
            dimensions=(STEP, WINDOW),
            units="loss",
            equation="L(t) - L(t+m), eq. (3)",
            long_name="decrease of the loss over the window",
            description="Positive if the loss is lower after the m updates. NaN if a loss was not logged, or if "
            "losses are declared to belong to changing batches.",
        ),
        UpdateVariable(
            name="status",
            compute=lambda updates: updates.status,
            fill=Status.UNVERIFIABLE,
            absent=Status.NOT_LOGGED,
            flags=Status,
            dimensions=_COMPARED,
            units="1",
            equation="y.g > 0, section 2.1",
            long_name="reason why a metric does or does not exist",
            description="Reason for missing values. Unverifiable if the update is not larger than its rounding "
            "error, a loss, a gradient or a Hessian-vector product is missing, or the window extends past the end "
            "of the run or a restart. Underflow and overflow if the vectors are finite and not zero, but their "
            "inner products are out of the range of float64.",
        ),
        UpdateVariable(
            name="effective_window",
            compute=lambda updates: updates.smallest_effective_window[0],
            dimensions=(TENSOR, DESCENT),
            units="1",
            equation="m with y.g > 0 for all t, eq. (3)",
            long_name="smallest window length for which all windows are effective",
            description="NaN if there is no such length, or if the status of a window is not known. Lengths up to "
            "the smaller of 256 and half the run are tried, and up to the longest requested window if that is "
            "longer.",
        ),
        UpdateVariable(
            name="effective_window_count",
            compute=lambda updates: updates.smallest_effective_window[1],
            dimensions=(TENSOR, DESCENT),
            units="1",
            equation="number of t, eq. (3)",
            long_name="number of windows that support effective_window",
            description="Number of windows of that length without a gap. 0 if there is no such length.",
        ),
        UpdateVariable(
            name="decreasing_window",
            compute=lambda updates: updates.smallest_decreasing_window[0],
            dimensions=(),
            units="1",
            equation="m of eq. (3)",
            long_name="smallest window length over which the loss always decreases",
            description="NaN if there is no such length, or if the loss of a window is not known. Lengths up to "
            "the smaller of 256 and half the run are tried, and up to the longest requested window if that is "
            "longer.",
        ),
        UpdateVariable(
            name="decreasing_window_count",
            compute=lambda updates: updates.smallest_decreasing_window[1],
            dimensions=(),
            units="1",
            equation="number of t, eq. (3)",
            long_name="number of windows that support decreasing_window",
            description="Number of windows of that length without a gap. 0 if there is no such length.",
        ),
    )
}
"""The variables of this package, by name, in the order of the results."""
