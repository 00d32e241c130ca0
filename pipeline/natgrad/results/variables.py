"""The result variables of updates: one entry each, with its metadata and the function that computes it.

An entry (`UpdateVariable`) declares what a variable is computed from, where it is defined, and how it is described.
`natgrad.results.dataset` computes, masks, stacks and labels all entries in the same way, so a new variable needs a
new entry and nothing else. The function and the metadata stand together here, and not in `natgrad.schema`, because
neither is understood without the other.

Another package adds variables through the entry-point group ``natgrad.variables``; each entry point names an
`UpdateVariable`. They appear in ``results.zarr`` of every run that is analyzed where the package is installed::

    [project.entry-points."natgrad.variables"]
    relative_update = "my_package:relative_update"
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.results.pairs import Aggregation
from natgrad.schema.errors import InputError
from natgrad.schema.extensions import Extension, registered
from natgrad.schema.names import DESCENT, DESCENTS, GAMMA, STEP, TENSOR, VECTORS, WINDOW
from natgrad.schema.variables import ShiftedMetric, Status, Variable
from natgrad.theory import discrete_time, geometry, windows
from natgrad.theory.geometry import Pair
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
"""Entry-point group of the variables of other packages."""

LONGEST_WINDOW = 256
"""Longest window in the search for the smallest one; the limit is half the run if that is less."""

MODEL_AND_TENSORS = ("model", "tensor")
_AXES = (STEP, TENSOR, DESCENT, WINDOW, GAMMA)


# What a variable is computed from ----------------------------------------------------------------------------


class Updates:
    """The updates of a run, of the model or of each tensor, in windows of m with one estimate of the gradient.

    Functions of variables take this as their argument. Properties are computed once and shared by all variables.
    Arrays have the shape (updates,) for the model and (updates, tensors) for tensors; those of windows have
    m - 1 updates fewer.

    Attributes
    ----------
    table : UpdateTable
        The ledger and the scalars of every update.
    aggregation : Aggregation
        Pairs of single updates, and the largest errors by rounding.
    aggregation_name : str
        ``model`` or ``tensor``.
    descent : str
        Estimate of the negative gradient, one of `natgrad.schema.names.DESCENTS`.
    m : int
        Number of consecutive updates in a window.
    gammas : float64 array
        Weights of the one-parameter family.
    longest : int
        Longest window that was requested.
    of_gradient : Updates
        The same windows, with the gradient itself as the estimate.
    run : slice
        The updates of the run for which a variable without the dimension ``step`` is computed.
    """

    def __init__(
        self,
        table: UpdateTable,
        aggregation: Aggregation,
        descent: str,
        m: int = 1,
        *,
        gammas: Sequence[float] = (),
        longest: int = 1,
        of_gradient: Updates | None = None,
        run: slice = slice(None),
    ) -> None:
        self.table, self.aggregation, self.descent, self.m = table, aggregation, descent, m
        self.aggregation_name = "tensor" if TENSOR in aggregation.dimensions else "model"
        self.gammas, self.longest, self.run = np.asarray(gammas, np.float64), longest, run
        self.of_gradient: Updates = self if of_gradient is None else of_gradient

    @cached_property
    def pair(self) -> Pair:
        """Pair of each window."""
        return geometry.window(self.aggregation.pair, self.m)

    @cached_property
    def update_floor(self) -> Array:
        """Largest norm of the error of g by rounding of the stored parameters."""
        return windows.rolling_norm(self.aggregation.update_floor, self.m)

    @cached_property
    def gradient_floor(self) -> Array:
        """Largest norm of the error of y by rounding of the stored values."""
        return windows.rolling_norm(self.aggregation.gradient_floor, self.m) / self.m

    @cached_property
    def gradient_norm(self) -> Array:
        """Norm of the negative gradient; that of the gradient itself is known without a learning rate."""
        if self.aggregation.gradient_norm is None:
            return self.pair.gradient_norm
        return windows.rolling_norm(self.aggregation.gradient_norm, self.m) / self.m

    @cached_property
    def status(self) -> NDArray[np.int8]:
        """Values of `natgrad.schema.variables.Status`."""
        known = windows.consecutive(self.aggregation.known, self.m).all(axis=-1)
        return geometry.status(
            self.pair,
            # The smallest rate stands for the window: it is NaN if one is missing, and not positive if one is not.
            learning_rate=windows.consecutive(self.aggregation.rate, self.m).min(axis=-1),
            finite=windows.consecutive(self.aggregation.finite, self.m).all(axis=-1),
            # An update that is not larger than its rounding error cannot be told from it.
            verifiable=known & ~(self.update_floor >= self.pair.update_norm),
        )

    @cached_property
    def has_angle(self) -> NDArray[np.bool_]:
        """True if the angle is defined."""
        has_angle: NDArray[np.bool_] = self.status <= Status.OBTUSE
        return has_angle

    @cached_property
    def effective(self) -> NDArray[np.bool_]:
        """True if metrics exist."""
        effective: NDArray[np.bool_] = self.status == Status.EFFECTIVE
        return effective

    @cached_property
    def loss_decrease(self) -> Array:
        """L(t) - L(t+m), eq. (3)."""
        table, m = self.table, self.m
        return table.loss[: len(table.loss) - m + 1] - table.next_loss[m - 1 :]

    @cached_property
    def eigenvalues(self) -> tuple[Array, Array, Array]:
        """Largest, middle and smallest eigenvalue of the optimal metric."""
        return geometry.eigenvalues(self.pair)

    @cached_property
    def eigenvalue_bounds(self) -> tuple[Array, Array]:
        """Bounds of the spectrum of every metric (Props. 2 and 3)."""
        return geometry.eigenvalue_bounds(self.pair)

    @cached_property
    def family_eigenvalues(self) -> tuple[Array, Array, Array]:
        """Eigenvalues of the one-parameter family, gammas last."""
        return geometry.family_eigenvalues(self.pair, self.gammas)

    @cached_property
    def learning_rate_bounds(self) -> tuple[Array, Array]:
        """Bounds of eq. (18) for the Hessian of the averaged loss, whose blocks are those of the steps over m."""
        table, m = self.table, self.m
        if table.hessian_min_eigenvalue is None:
            weakest = np.full(self.pair.alignment.shape, np.nan)
        else:
            # The Hessian of the parameters extended by time is another one.
            of_parameters = np.where(table.extended(), np.nan, table.hessian_min_eigenvalue)
            weakest = windows.consecutive(of_parameters, m).min(axis=-1) / m
        # g is the mean of the updates between two logged states, and moves by that many learning rates.
        spans = windows.consecutive(table.spans, m).max(axis=-1)
        supremum, optimal = discrete_time.learning_rate_bounds(self.pair, weakest)
        return supremum / spans, optimal / spans

    # Of one run, for variables without the dimension step ----------------------------------------------------

    @property
    def _longest_tried(self) -> int:
        return max(self.longest, min(LONGEST_WINDOW, len(self.table.steps[self.run]) // 2))

    @property
    def _follows(self) -> NDArray[np.bool_]:
        return self.table.follows()[self.run][: len(self.table.steps[self.run]) - 1]

    @cached_property
    def smallest_effective_window(self) -> tuple[Array, NDArray[np.int64]]:
        """Smallest window of which all are effective, and the number of windows that support it."""
        own, run = self.aggregation, self.run
        terms = windows.WindowTerms(
            own.pair[run], own.rate[run], own.update_floor[run], own.finite[run], own.known[run]
        )
        return windows.smallest_effective(terms, self._follows, self._longest_tried)

    @cached_property
    def smallest_decreasing_window(self) -> tuple[float, int]:
        """Smallest window over which the loss always falls, and the number of windows that support it."""
        loss, next_loss = self.table.loss[self.run], self.table.next_loss[self.run]
        return windows.smallest_decreasing(loss, next_loss, self._follows, self._longest_tried)


# How a variable is declared ----------------------------------------------------------------------------------


class Defined(enum.Enum):
    """The updates at which a variable is defined; elsewhere it has the fill value of its entry."""

    ALWAYS = enum.auto()
    WITH_ANGLE = enum.auto()
    WITH_METRIC = enum.auto()


@dataclass(frozen=True, kw_only=True)
class UpdateVariable(Variable):
    """A result variable of updates: its metadata, and how it is computed.

    Attributes
    ----------
    compute : callable
        Takes `Updates` and returns an array with the dimensions of the variable except ``descent`` and ``window``:
        it is called once for each estimate of the gradient and each window, if the variable has these dimensions.
        The dimension ``tensor`` may be left out of the array if all tensors have the same value. A variable without
        ``step`` is a number of the run (of each tensor), computed for ``updates.run``.
    needs : tuple of str
        Vectors of the ledger and columns of `natgrad.results.inputs.UpdateTable` without which the variable is left
        out of the results.
    aggregations : tuple of str
        ``model``, ``tensor`` or both: the groups that have the variable.
    descents : tuple of str
        Estimates of the negative gradient with which it is defined.
    defined : Defined
        Updates at which it is defined.
    fill : float, int or bool
        Value where it is not defined, and of windows that pass the end of the run or a restart.
    comment : callable, optional
        Takes `Updates` and returns the attribute ``comment``, or an empty string if it has none.
    """

    compute: Callable[[Updates], Any]
    needs: tuple[str, ...] = ()
    aggregations: tuple[str, ...] = MODEL_AND_TENSORS
    descents: tuple[str, ...] = DESCENTS
    defined: Defined = Defined.ALWAYS
    fill: float = np.nan
    comment: Callable[[Updates], str] | None = None

    def __post_init__(self) -> None:
        unknown = {*self.needs} - {*VECTORS, *(field.name for field in fields(UpdateTable))}
        if unknown:
            raise InputError(
                f"variable {self.name!r} needs {', '.join(sorted(unknown))}, which no ledger has",
                remedy="use the names of the ledger's vectors and of the columns of UpdateTable",
            )
        if self.dimensions != tuple(axis for axis in _AXES if axis in self.dimensions):
            raise InputError(
                f"variable {self.name!r} has the dimensions {self.dimensions}",
                remedy=f"use some of {', '.join(_AXES)}, in this order",
            )
        required = {STEP, TENSOR} if self.defined is not Defined.ALWAYS else set()
        required |= {STEP, TENSOR, DESCENT} if self.descents != DESCENTS else set()
        if not required <= {*self.dimensions}:
            raise InputError(
                f"variable {self.name!r} is not defined everywhere, but lacks dimensions",
                why=f"it has {self.dimensions}, and whether it is defined depends on {sorted(required)}",
                remedy="declare these dimensions, or declare it as defined everywhere",
            )

    def values(self, updates: Updates) -> NDArray[Any]:
        """Compute the variable, with the fill value where it is not defined.

        Raises
        ------
        InputError
            If the array does not have the shape that the dimensions of the variable require.
        """
        try:
            values = np.asarray(self.compute(updates))
        except Exception as error:
            error.add_note(f"raised by the function of the result variable {self.name!r}")
            raise
        self._require_shape(values, updates)
        if values.dtype.kind in "iub" and np.isnan(self.fill) and self._may_be_undefined:
            values = values.astype(np.float64)
        if self.defined is Defined.ALWAYS and updates.descent in self.descents:
            return values
        mask: NDArray[np.bool_] = np.full(updates.status.shape, updates.descent in self.descents)
        if self.defined is Defined.WITH_ANGLE:
            mask &= updates.has_angle
        elif self.defined is Defined.WITH_METRIC:
            mask &= updates.effective
        if values.ndim < mask.ndim + (GAMMA in self.dimensions):
            values = values[:, None]  # the same for all tensors
        if GAMMA in self.dimensions:
            mask = mask[..., None]
        return np.where(mask, values, values.dtype.type(self.fill))

    @property
    def _may_be_undefined(self) -> bool:
        everywhere = self.defined is Defined.ALWAYS and self.descents == DESCENTS
        return WINDOW in self.dimensions or not everywhere

    def _require_shape(self, values: NDArray[Any], updates: Updates) -> None:
        sizes = {
            STEP: len(updates.table.steps) - updates.m + 1,
            TENSOR: len(updates.table.layout.tensors),
            GAMMA: len(updates.gammas),
        }
        axes = [axis for axis in sizes if axis in self.dimensions]
        if updates.aggregation_name == "model":
            axes = [axis for axis in axes if axis != TENSOR]
        shape = tuple(sizes[axis] for axis in axes)
        without_tensors = tuple(sizes[axis] for axis in axes if axis != TENSOR)
        if values.shape != shape and not (STEP in axes and values.shape == without_tensors):
            raise InputError(
                f"variable {self.name!r} has values of shape {values.shape}, not {shape}",
                where=f"{updates.aggregation_name}, descent {updates.descent}, window {updates.m}",
                why=f"its dimensions are {self.dimensions}",
                remedy="correct the function or the dimensions of the variable",
            )


def registered_variables() -> list[Extension[UpdateVariable]]:
    """Return the variables that other packages register; those that cannot be used are skipped with a warning."""
    return list(registered(VARIABLES_GROUP, UpdateVariable, VARIABLES).values())


# Functions of several lines ----------------------------------------------------------------------------------


def _learning_rate(updates: Updates) -> Array:
    own = updates.table.tensor_learning_rate
    return updates.table.learning_rate if own is None or updates.aggregation_name == "model" else own


def _learning_rate_comment(updates: Updates) -> str:
    if updates.table.tensor_learning_rate is None:
        return ""
    if updates.aggregation_name == "tensor":
        return "groups of the optimizer have several: each tensor has its own, and g of the tensor is per that"
    return (
        "groups of the optimizer have several: that logged or given for the step, else the largest of the "
        "tensors'; g of the model is the displacement per this one, so that y.g > 0 says that the update descends, "
        "and the ratios of the others to it are a part of the rule. Angle and condition number do not depend on "
        "it; update_norm, alignment, eigenvalues and bounds are per this one"
    )


def _preconditioner_condition_number(updates: Updates) -> Array:
    used = updates.table.optimizer
    if used is None:
        raise InputError("the state of the optimizer is not stored", remedy="ingest with --include optimizer")
    of_tensors, of_model = condition_number(used.smallest, used.largest, used.learning_rate)
    return of_model if updates.aggregation_name == "model" else of_tensors


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
        # g' (Mbar + eta H) g is the y.g of the true gradient, whatever the estimate.
        (updates.of_gradient.pair.alignment <= 0, ShiftedMetric.INDEFINITE),
        (largest < optimal, ShiftedMetric.DEFINITE_OPTIMAL),
        (largest < bound, ShiftedMetric.DEFINITE),
    ]
    flags = [np.int8(flag) for _, flag in conditions]
    return np.select([condition for condition, _ in conditions], flags, np.int8(ShiftedMetric.UNDECIDED))


# The variables -----------------------------------------------------------------------------------------------

# y is a loss per parameter and g a parameter per learning rate (eq. 2), so a metric M with M g = y has this unit.
# The units of a run are not known: the words stand for them.
METRIC_UNIT = "loss learning_rate parameter-2"

_SINGLE = (STEP, TENSOR)
_COMPARED = (STEP, TENSOR, DESCENT, WINDOW)
_FAMILY = (*_COMPARED, GAMMA)
_NO_METRIC = "NaN if the update is not effective."
_DISCRETE = DESCENTS[1:]

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
            description="Loss at the state before the update, as logged. NaN if it was not logged.",
        ),
        UpdateVariable(
            name="learning_rate",
            compute=_learning_rate,
            dimensions=_SINGLE,
            units="learning_rate",
            equation="eta, eq. (2)",
            long_name="learning rate of the update",
            description="Learning rate as logged, or as passed for steps without one. NaN if it is not known. "
            "Tensors have the dimension tensor only if the parameter groups of the optimizer differ.",
            comment=_learning_rate_comment,
        ),
        UpdateVariable(
            name="step_span",
            compute=lambda updates: updates.table.spans,
            dimensions=(STEP,),
            units="1",
            equation="t' - t for logged neighbours t, t'",
            long_name="number of updates between this logged state and the next",
            description="1 if every step was logged. 0 at a step that this run of a sweep has not logged.",
        ),
        UpdateVariable(
            name="parameter_norm",
            compute=lambda updates: updates.aggregation.parameter_norm,
            dimensions=_SINGLE,
            units="parameter",
            equation="|theta_t|",
            long_name="norm of the parameters",
            description="Euclidean norm of the parameters before the update.",
        ),
        UpdateVariable(
            name="update_norm",
            compute=lambda updates: updates.pair.update_norm,
            dimensions=(STEP, TENSOR, WINDOW),
            units="parameter learning_rate-1",
            equation="|g|, g = (theta_{t+k} - theta_t) / (k eta), eq. (2)",
            long_name="norm of the mean update over the window's steps",
            description="Norm of the update per learning rate; of a window, of its updates stacked. NaN if the "
            "learning rate is not known.",
        ),
        UpdateVariable(
            name="gradient_norm",
            compute=lambda updates: updates.gradient_norm,
            dimensions=_COMPARED,
            units="loss parameter-1",
            equation="|y|",
            long_name="norm of the negative gradient",
            description="Norm of the estimate of the negative gradient that the dimension descent names.",
        ),
        UpdateVariable(
            name="alignment",
            compute=lambda updates: updates.pair.alignment,
            dimensions=_COMPARED,
            units="loss learning_rate-1",
            equation="y.g",
            long_name="inner product of negative gradient and update",
            description="Rate at which the loss falls along the update. Positive if the update is effective.",
        ),
        UpdateVariable(
            name="cosine",
            compute=lambda updates: geometry.cosine(updates.pair),
            defined=Defined.WITH_ANGLE,
            dimensions=_COMPARED,
            units="1",
            equation="cos(psi)",
            long_name="cosine of the angle between negative gradient and update",
            description="Cosine of angle. NaN if there is no angle; status says why.",
        ),
        UpdateVariable(
            name="angle",
            compute=lambda updates: geometry.angle(updates.pair),
            defined=Defined.WITH_ANGLE,
            dimensions=_COMPARED,
            units="radian",
            equation="psi in [0, pi], eq. (9)",
            long_name="angle between negative gradient and update",
            description="0 for gradient descent; beyond pi/2 the update is not effective. NaN if the update or the "
            "gradient is zero, not finite or not known; status says why.",
        ),
        UpdateVariable(
            name="angle_uncertainty",
            compute=lambda updates: geometry.angle_uncertainty(
                updates.pair, updates.update_floor, updates.gradient_floor
            ),
            defined=Defined.WITH_ANGLE,
            dimensions=_COMPARED,
            units="radian",
            equation="asin(|dy| / |y|) + asin(|dg| / |g|), dy and dg what rounding to the stored dtypes makes at "
            "most",
            long_name="largest error of the angle by rounding of the stored values",
            description="Bound of the error of angle that rounding to the stored dtypes can cause. Errors of "
            "logged losses, which move corrected gradients, are not included.",
        ),
        UpdateVariable(
            name="effective",
            compute=lambda updates: updates.effective,
            fill=False,
            dimensions=_COMPARED,
            units="1",
            equation="y.g > 0, section 2.1",
            long_name="the update descends: y.g > 0",
            description="True if a symmetric positive definite metric turns the gradient into the update. False "
            "also if this cannot be decided; status says why.",
        ),
        UpdateVariable(
            name="condition_number",
            compute=lambda updates: geometry.condition_number(updates.pair),
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units="1",
            equation="kappa(M_opt), below eq. (9), Prop. 1",
            long_name="smallest condition number of any metric M with M g = y",
            description=f"1 for gradient descent; it grows without bound as the angle approaches pi/2. "
            f"{_NO_METRIC}",
        ),
        UpdateVariable(
            name="preconditioner_condition_number",
            compute=_preconditioner_condition_number,
            needs=("optimizer",),
            dimensions=_SINGLE,
            units="1",
            equation="kappa(diag(sqrt(v) + epsilon)) of Adam, of the factors of Shampoo, PSGD and K-FAC, beside "
            "kappa(M_opt) of eq. (9)",
            long_name="condition number of the metric that the optimizer used",
            description="To be compared with condition_number, the least that the update needs. Only if the state "
            "of the optimizer was stored; NaN at updates whose metric is not known.",
        ),
        UpdateVariable(
            name="similarity",
            compute=lambda updates: geometry.similarity(updates.pair),
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units="1",
            equation="1 / kappa(M_opt)",
            long_name="similarity of update and steepest descent",
            description=f"Inverse of condition_number, between 0 and 1. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_max",
            compute=lambda updates: updates.eigenvalues[0],
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="eq. (9)",
            long_name="largest eigenvalue of the optimal metric",
            description=f"The optimal metric is the one of smallest condition number. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_mid",
            compute=lambda updates: updates.eigenvalues[1],
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units=METRIC_UNIT,
            equation="eq. (9)",
            long_name="eigenvalue of the optimal metric of multiplicity D - 2 (none where D <= 2)",
            description=f"Eigenvalue across both y and g. NaN if D <= 2. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="eigenvalue_min",
            compute=lambda updates: updates.eigenvalues[2],
            defined=Defined.WITH_METRIC,
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
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="largest eigenvalue over the one-parameter family",
            description=f"Largest eigenvalue of the metric of weight gamma. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_eigenvalue_mid",
            compute=lambda updates: updates.family_eigenvalues[1],
            defined=Defined.WITH_METRIC,
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="eigenvalue of multiplicity D - 2 over the one-parameter family",
            description=f"Eigenvalue across both y and g. NaN if D <= 2. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_eigenvalue_min",
            compute=lambda updates: updates.family_eigenvalues[2],
            defined=Defined.WITH_METRIC,
            dimensions=_FAMILY,
            units=METRIC_UNIT,
            equation="Lemma 1, eq. (22)",
            long_name="smallest eigenvalue over the one-parameter family",
            description=f"Smallest eigenvalue of the metric of weight gamma. {_NO_METRIC}",
        ),
        UpdateVariable(
            name="family_condition_number",
            compute=lambda updates: geometry.family_condition_number(updates.pair, updates.gammas),
            defined=Defined.WITH_METRIC,
            dimensions=_FAMILY,
            units="1",
            equation="Lemma 1, eq. (22)",
            long_name="condition number over the one-parameter family",
            description=f"Smallest at gamma = 1, where it is condition_number. {_NO_METRIC}",
        ),
        # A tensor has no loss of its own with which its share could be compared, so this one is of the model.
        UpdateVariable(
            name="discrete_identity_residual",
            compute=_discrete_identity_residual,
            aggregations=("model",),
            dimensions=_COMPARED,
            units="1",
            equation="(eta g.y + dL) / |dL|, eq. (12)",
            long_name="relative failure of the discrete gradient identity",
            description="0 if the estimate of the gradient explains the change of the loss. NaN if the loss is not "
            "known or does not change.",
        ),
        # Nor does it have a Hessian of its own: the effect of other tensors on its gradient is in the model's
        # alone.
        UpdateVariable(
            name="learning_rate_bound",
            compute=lambda updates: updates.learning_rate_bounds[0],
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units="learning_rate",
            equation="eta < |ybar| cos(psi_bar) / (h |g|), below eq. (17)",
            long_name="learning rate below which some metric Mbar + eta H is one of the true gradient",
            description="Infinite if the loss is convex. NaN for the gradient itself, if no smallest eigenvalue of "
            "the Hessian was logged, or if the update is not effective.",
        ),
        UpdateVariable(
            name="learning_rate_bound_optimal",
            compute=lambda updates: updates.learning_rate_bounds[1],
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            dimensions=_COMPARED,
            units="learning_rate",
            equation="eta < lambda_min(Mbar) / h",
            long_name="learning rate below which that of the optimal Mbar is",
            description="Bound for the metric Mbar of smallest condition number. Missing as learning_rate_bound "
            "is.",
        ),
        UpdateVariable(
            name="shifted_metric",
            compute=_shifted_metric,
            aggregations=("model",),
            descents=_DISCRETE,
            defined=Defined.WITH_METRIC,
            fill=ShiftedMetric.UNKNOWN,
            flags=ShiftedMetric,
            dimensions=_COMPARED,
            units="1",
            equation="Mbar + eta H, eq. (17)",
            long_name="what Mbar + eta H is, the metric of the true gradient",
            description="Definiteness of Mbar + eta H at the learning rate of the update. Unknown where "
            "learning_rate_bound is NaN.",
        ),
        UpdateVariable(
            name="loss_average",
            compute=lambda updates: windows.consecutive(updates.table.loss, updates.m).mean(axis=-1),
            dimensions=(STEP, WINDOW),
            units="loss",
            equation="L_avg(t), below eq. (3)",
            long_name="mean loss over the window",
            description="Mean of the losses before the m updates of the window. NaN if one was not logged.",
        ),
        UpdateVariable(
            name="loss_decrease",
            compute=lambda updates: updates.loss_decrease,
            dimensions=(STEP, WINDOW),
            units="loss",
            equation="L(t) - L(t+m), eq. (3)",
            long_name="decrease of the loss over the window",
            description="Positive if the loss is lower after the m updates. NaN if one of the two was not logged.",
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
            long_name="why the metric exists or not",
            description="Reason for missing values. Unverifiable if the update is smaller than its rounding, a "
            "loss or a Hessian-vector product is missing, or the window passes the end of the run or a restart.",
        ),
        UpdateVariable(
            name="effective_window",
            compute=lambda updates: updates.smallest_effective_window[0],
            dimensions=(TENSOR, DESCENT),
            units="1",
            equation="m with y.g > 0 for all t, eq. (3)",
            long_name="smallest window of which all are effective, NaN where none is",
            description="Tried are lengths up to 256 or half the run, if that is less, or up to the longest "
            "requested window.",
        ),
        UpdateVariable(
            name="effective_window_count",
            compute=lambda updates: updates.smallest_effective_window[1],
            dimensions=(TENSOR, DESCENT),
            units="1",
            equation="number of t, eq. (3)",
            long_name="windows that support effective_window",
            description="Windows of that length that can be judged. 0 if there is no such length.",
        ),
        UpdateVariable(
            name="decreasing_window",
            compute=lambda updates: updates.smallest_decreasing_window[0],
            dimensions=(),
            units="1",
            equation="m of eq. (3)",
            long_name="smallest window over which the loss always decreases, NaN where none is",
            description="Tried are lengths up to 256 or half the run, if that is less, or up to the longest "
            "requested window.",
        ),
        UpdateVariable(
            name="decreasing_window_count",
            compute=lambda updates: updates.smallest_decreasing_window[1],
            dimensions=(),
            units="1",
            equation="number of t, eq. (3)",
            long_name="windows that support decreasing_window",
            description="Windows of that length whose two losses were logged. 0 if there is no such length.",
        ),
    )
}
"""The variables of this package, by name, in the order of the results."""
