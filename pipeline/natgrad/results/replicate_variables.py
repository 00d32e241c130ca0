"""Declare the result variables of replicates, and define the inputs from which they are computed.

`Draws` holds the replicates of some updates. Each variable is computed from them, from a mean over some of them, or
from their losses. `natgrad.results.replicates` computes and labels all variables.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.results.variables import METRIC_UNIT, VARIABLES, Defined
from natgrad.schema.names import REPLICATE, STEP, TENSOR
from natgrad.schema.variables import Status, Variable
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair
from natgrad.theory.metric_operators import jackknife

__all__ = ["DECLARED", "MEANS", "REPLICATE_VARIABLES", "ComputedFrom", "Draws", "ReplicateVariable", "error_of"]

Array = NDArray[np.float64]

MEANS = 3
"""Number of vectors of the ledger before the deviations of displacements: gradient, mean displacement, residual."""


# Inputs of variables -----------------------------------------------------------------------------------------


class Draws:
    """The replicates of some updates, for the model or for each tensor.

    Attributes
    ----------
    gram : array, shape (updates, tensors, vectors, vectors)
    size : int array, shape (tensors,)
        Dimension D of each tensor.
    rate : array, broadcasts to shape (updates, tensors)
        eta, NaN if it is not known.
    replicates : int
    floor : array, shape (updates, tensors)
        Largest norm of the error of a displacement by rounding.
    model : bool
        True for the model, whose arrays have the shape (updates,). Otherwise they have (updates, tensors).
    """

    def __init__(
        self, gram: Array, size: NDArray[np.int64], rate: Array, replicates: int, floor: Array, *, model: bool
    ) -> None:
        self.gram, self.size, self.replicates, self.model = gram, size, replicates, model
        self._of_tensors = rate
        self.rate = rate[:, 0] if model else np.broadcast_to(rate, gram.shape[:2])
        self._update_floor = (np.sqrt(np.square(floor).sum(axis=1)) if model else floor) / self.rate
        squares = np.diagonal(gram, axis1=-2, axis2=-1)[..., : MEANS + replicates]
        # An hvp that is not finite affects only the results that use it.
        finite = np.asarray(~np.isnan(squares).any(axis=-1))
        self._finite: NDArray[np.bool_] = np.asarray(finite.all(axis=1)) if model else finite
        self._unit = np.eye(replicates)

    def mean(self, weights: Array) -> MeanUpdate:
        """Return the mean update with the given weights of the replicates."""
        of_tensors = _mean_update(self.gram, self.size, self._of_tensors, weights)
        return _stacked(of_tensors, self.rate) if self.model else of_tensors

    @cached_property
    def pair(self) -> Pair:
        """Pair of the mean update."""
        return self.mean(self._unit.mean(axis=0)).pair

    @cached_property
    def each(self) -> Pair:
        """Pair of each replicate, on the last axis."""
        single = [self.mean(weights).pair for weights in self._unit]
        return Pair(*(np.stack([getattr(pair, name) for pair in single], axis=-1) for name in vars(single[0])))

    @cached_property
    def each_status(self) -> NDArray[np.int8]:
        """Status of each replicate, on the last axis."""
        return geometry.status(
            self.each, self.rate[..., None], self._finite[..., None], update_floor=self._update_floor[..., None]
        )

    @cached_property
    def status(self) -> NDArray[np.int8]:
        """Status of the mean update, values of `natgrad.schema.variables.Status`."""
        return geometry.status(self.pair, self.rate, self._finite, update_floor=self._update_floor)

    @cached_property
    def statistics(self) -> dict[str, tuple[Array, Array]]:
        """Value and standard error of each variable of the mean update."""
        variables = [v for v in REPLICATE_VARIABLES.values() if v.computed_from is ComputedFrom.MEAN_UPDATE]
        exists = {
            Defined.ALWAYS: np.True_,
            Defined.IN_RANGE: _in_range(self.status),
            Defined.WITH_ANGLE: self.status <= Status.OBTUSE,
            Defined.WITH_METRIC: self.status == Status.EFFECTIVE,
        }

        def values(weights: Array) -> Array:
            update = self.mean(weights)
            return np.stack([np.where(exists[v.defined], v.compute(update), np.nan) for v in variables])

        # The mean of rows of the identity is the weights of the replicates. An omitted replicate has weight 0.
        found, errors = jackknife(values, self._unit)
        return {v.name: (value, error) for v, value, error in zip(variables, found, errors, strict=True)}


def _in_range(status: NDArray[np.int8]) -> NDArray[np.bool_]:
    return ~np.isin(status, (Status.UNDERFLOW, Status.OVERFLOW))


@dataclass(frozen=True)
class MeanUpdate:
    """The mean of some replicates.

    Attributes
    ----------
    pair : Pair
        Pair of y and the mean update <g>.
    curvature : Pair
        Pair of <Hg> and <g>, NaN if no hvps were logged.
    across_product : array
        Inner product of the components of y and <Hg> orthogonal to <g>.
    rate : array
        eta.
    """

    pair: Pair
    curvature: Pair
    across_product: Array
    rate: Array

    @cached_property
    def alpha(self) -> Array:
        """Weight of the best conditioned Mbar, |<ybar>|^2 / <ybar>.<g>; NaN if there is no Mbar."""
        pair, curvature, rate = self.pair, self.curvature, self.rate
        discrete = Pair(
            pair.update_square,
            pair.alignment - rate * curvature.alignment,
            np.maximum(
                pair.across_square - 2.0 * rate * self.across_product + rate**2 * curvature.across_square, 0.0
            ),
            pair.size,
        )
        return geometry.eigenvalue_bounds(discrete)[0]


# Means of replicates -----------------------------------------------------------------------------------------


_SHORT = 2.0**-7
"""Square of a residual, in units of that of the gradient, above which the gradient itself is used. The angle of
the mean is then above 0.08, and products of the gradient give it to 1e-14."""

_PAIRED = ("gradient", "displacement", "residual")


def _mean_update(gram: Array, size: NDArray[np.int64], rate: Array, weights: Array) -> MeanUpdate:
    """Return a weighted mean of the replicates of each tensor."""
    known = MEANS + len(weights)
    # The deviations add up to 0, so only the differences of their weights from the mean weight matter.
    moved = weights - weights.mean()
    # The residual of the mean is g - c m, so that of m + x is g - c (m + x). It is needed where it is short.
    # Elsewhere its terms may exceed g, and g itself gives a more accurate component across.
    ratio = geometry.safe_divide(gram[..., 0, 1] - gram[..., 2, 1], gram[..., 1, 1])
    deviation = (moved @ gram[..., MEANS:known, MEANS:known] @ moved[:, None])[..., 0]
    kept = gram[..., 2, 2] + ratio**2 * deviation <= _SHORT * gram[..., 0, 0]
    blocks = np.zeros((*gram.shape[:-2], 3, known))
    blocks[..., 0, 0] = 1.0
    blocks[..., 1, 1], blocks[..., 1, MEANS:] = weights.sum(), moved
    blocks[..., 2, 0], blocks[..., 2, 2] = ~kept, kept
    blocks[..., 2, MEANS:] = -np.where(kept, ratio, 0.0)[..., None] * moved
    # Products of gradient, update, residual and hvp. Those of hvps are NaN if hvps were not logged or not finite.
    small = np.full((*gram.shape[:-2], 4, 4), np.nan)
    small[..., :3, :3] = blocks @ gram[..., :known, :known] @ np.swapaxes(blocks, -1, -2)
    if gram.shape[-1] > known:
        # Matrix by matrix, not all updates together, so that the bits do not depend on the number of updates.
        mean = np.concatenate([[weights.sum()], moved])[:, None]
        small[..., :3, 3] = (blocks @ gram[..., :known, known:] @ mean)[..., 0]
        small[..., 3, :3] = small[..., :3, 3]
        small[..., 3, 3] = (mean.T @ (gram[..., known:, known:] @ mean))[..., 0, 0]
    pair = geometry.pair(small[..., :3, :3], _PAIRED, rate, size)
    square, bent = small[..., 1, 1], small[..., 1, 3]

    def across(first: int, second: int) -> Array:
        product = small[..., first, second] - geometry.safe_divide(
            small[..., first, 1] * small[..., second, 1], square
        )
        return np.where(size == 1, 0.0 * product, product)

    # hvp = 2 H p = 2 eta H g.
    curvature = Pair(
        pair.update_square, bent / (2.0 * rate**2), np.maximum(across(3, 3), 0.0) / (4.0 * rate**2), pair.size
    )
    return MeanUpdate(pair, curvature, -across(2, 3) / (2.0 * rate), np.broadcast_to(rate, square.shape))


def _stacked(tensors: MeanUpdate, rate: Array) -> MeanUpdate:
    """Return the mean update of the model from those of its tensors; see `geometry.direct_sum`."""
    count = tensors.across_product.shape[1]
    pair, curvature = (
        geometry.direct_sum([of_tensors[:, tensor] for tensor in range(count)])
        for of_tensors in (tensors.pair, tensors.curvature)
    )
    lengths = tensors.pair.update_norm
    ones, others = (
        (of_tensors.ratio - of_model.ratio[:, None]) * lengths
        for of_tensors, of_model in ((tensors.pair, pair), (tensors.curvature, curvature))
    )
    return MeanUpdate(pair, curvature, (tensors.across_product + ones * others).sum(axis=1), rate)


# The variables -----------------------------------------------------------------------------------------------


class ComputedFrom(enum.Enum):
    """The argument of the function of a variable."""

    DRAWS = enum.auto()
    """`Draws`: values in the shape of the group, with the replicates on the last axis if the variable has them."""
    MEAN_UPDATE = enum.auto()
    """`MeanUpdate`: a statistic of the mean update, masked by ``defined``, with a jackknife error."""
    LOSS_CHANGES = enum.auto()
    """Changes of the loss, shape (updates, R)."""
    MEAN_LOSS_CHANGE = enum.auto()
    """Means of these over some replicates, shape (updates,), with a jackknife error."""


@dataclass(frozen=True, kw_only=True)
class ReplicateVariable(Variable):
    """A result variable of replicates: its metadata, and the function that computes it.

    Attributes
    ----------
    computed_from : ComputedFrom
        Argument of ``compute``.
    compute : callable
    defined : Defined
        Updates at which a statistic of the mean update is defined. Elsewhere it is NaN.
    error : bool
        Whether the results contain the standard error ``<name>_error``.
    """

    compute: Callable[[Any], Any]
    computed_from: ComputedFrom = ComputedFrom.DRAWS
    defined: Defined = Defined.ALWAYS
    error: bool = False


def _like_update_variable(name: str, description: str, **declared: Any) -> ReplicateVariable:
    """Declare a variable with the metadata of the update variable of the same name."""
    known = VARIABLES[name]
    return ReplicateVariable(
        name=name,
        dimensions=(STEP, TENSOR),
        units=known.units,
        equation=known.equation,
        long_name=known.long_name,
        description=description,
        flags=known.flags,
        absent=known.absent,
        **declared,
    )


_EACH = (STEP, TENSOR, REPLICATE)

DECLARED = (
    _like_update_variable(
        "status", "Reason for missing values of the mean update.", compute=lambda draws: draws.status
    ),
    _like_update_variable(
        "effective",
        "True if the mean update is effective.",
        compute=lambda draws: draws.status == Status.EFFECTIVE,
    ),
    _like_update_variable(
        "update_norm",
        "Norm of the mean update.",
        compute=lambda draws: geometry.representable(draws.pair.update_norm),
    ),
    _like_update_variable(
        "gradient_norm",
        "Norm of the gradient.",
        compute=lambda draws: geometry.representable(draws.pair.gradient_norm),
    ),
    _like_update_variable(
        "alignment",
        "Rate at which the loss decreases along the mean update.",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: update.pair.alignment,
        defined=Defined.IN_RANGE,
        error=True,
    ),
    _like_update_variable(
        "angle",
        "Angle of the mean update. NaN if there is no angle; status gives the reason.",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: geometry.angle(update.pair),
        defined=Defined.WITH_ANGLE,
        error=True,
    ),
    _like_update_variable(
        "condition_number",
        "Smallest condition number of any metric of the mean update. NaN if it is not effective.",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: geometry.condition_number(update.pair),
        defined=Defined.WITH_METRIC,
        error=True,
    ),
    ReplicateVariable(
        name="stochastic_weight",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: discrete_time.stochastic_weight(
            update.pair, update.curvature, update.across_product, update.rate
        ),
        defined=Defined.WITH_METRIC,
        error=True,
        dimensions=(STEP, TENSOR),
        units=METRIC_UNIT,
        equation="eq. (19)",
        long_name="weight alpha above which the metric of the mean update is positive definite",
        description="0 if every positive weight is sufficient. NaN if no Hessian-vector products of the draws were "
        "logged, or if the mean update is not effective.",
    ),
    ReplicateVariable(
        name="stochastic_alpha",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: update.alpha,
        defined=Defined.WITH_METRIC,
        dimensions=(STEP, TENSOR),
        units=METRIC_UNIT,
        equation="eqs. (9), (19)",
        long_name="weight alpha of the best conditioned Mbar",
        description="NaN if no Hessian-vector products of the draws were logged, or if the mean update is not "
        "effective.",
    ),
    ReplicateVariable(
        name="stochastic_definite",
        compute=lambda draws: draws.statistics["stochastic_alpha"][0] > draws.statistics["stochastic_weight"][0],
        dimensions=(STEP, TENSOR),
        units="1",
        equation="eq. (19)",
        long_name="the metric of the mean update with weight stochastic_alpha is positive definite",
        description="True if stochastic_alpha is greater than stochastic_weight. False also if one of them is NaN.",
    ),
    ReplicateVariable(
        name="learning_rate_bound",
        computed_from=ComputedFrom.MEAN_UPDATE,
        compute=lambda update: discrete_time.stochastic_learning_rate_bound(
            update.pair, update.curvature, update.across_product, update.alpha
        ),
        defined=Defined.WITH_METRIC,
        error=True,
        dimensions=(STEP, TENSOR),
        units="learning_rate",
        equation="eq. (19)",
        long_name="learning rate up to which the metric of the mean update is positive definite",
        description="Largest learning rate for which the metric of eq. (19) is positive definite, with y, <Hg> and "
        "alpha fixed. NaN if no Hessian-vector products of the draws were logged, or if the mean update is not "
        "effective.",
    ),
    ReplicateVariable(
        name="loss_decrease",
        computed_from=ComputedFrom.MEAN_LOSS_CHANGE,
        compute=lambda change: -change,
        error=True,
        dimensions=(STEP,),
        units="loss",
        equation="-<dL>, section 2.2",
        long_name="mean decrease of the loss",
        description="Mean over replicates. NaN if a loss was not logged.",
    ),
    ReplicateVariable(
        name="replicate_loss_decrease",
        computed_from=ComputedFrom.LOSS_CHANGES,
        compute=lambda changes: -changes,
        dimensions=(STEP, REPLICATE),
        units="loss",
        equation="-dL",
        long_name="decrease of the loss of each replicate",
        description="NaN if a loss was not logged.",
    ),
    ReplicateVariable(
        name="replicate_alignment",
        compute=lambda draws: np.where(_in_range(draws.each_status), draws.each.alignment, np.nan),
        dimensions=_EACH,
        units="loss learning_rate-1",
        equation="y.g",
        long_name="y.g of each replicate",
        description="Rate at which the loss decreases along the update of a replicate.",
    ),
    ReplicateVariable(
        name="replicate_angle",
        compute=lambda draws: np.where(draws.each_status <= Status.OBTUSE, geometry.angle(draws.each), np.nan),
        dimensions=_EACH,
        units="radian",
        equation="psi in [0, pi], eq. (9)",
        long_name="angle between y and g of each replicate",
        description="NaN if the update of the replicate is zero, out of range or not larger than its rounding "
        "error. Near 0 and pi it is accurate to 2e-8, in units of the deviation from the mean.",
    ),
    ReplicateVariable(
        name="replicate_update_norm",
        compute=lambda draws: geometry.representable(draws.each.update_norm),
        dimensions=_EACH,
        units="parameter learning_rate-1",
        equation="|g|",
        long_name="norm of the update of each replicate",
        description="Norm of the update divided by the learning rate. NaN if the learning rate is not known.",
    ),
)
"""Variables without their standard errors."""


def error_of(variable: ReplicateVariable) -> ReplicateVariable:
    """Declare the standard error of a variable."""
    return replace(
        variable,
        name=f"{variable.name}_error",
        equation="jackknife over replicates",
        long_name=f"standard error of {variable.name}",
        description=f"Standard error of {variable.name} of the mean update. NaN if there is only one replicate.",
        error=False,
    )


REPLICATE_VARIABLES: dict[str, ReplicateVariable] = {variable.name: variable for variable in DECLARED} | {
    error.name: error for error in (error_of(variable) for variable in DECLARED if variable.error)
}
"""The variables of the groups of replicates, by name. g denotes its mean over replicates."""
