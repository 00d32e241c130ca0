"""Reduce the Gram matrices of updates to pairs: the few numbers for (y, g) that determine all results.

The Gram matrix of an update gives one pair for each estimate of the negative gradient (eq. 12), and the largest
error of this pair caused by rounding. `natgrad.results.variables` computes the variables from the pairs.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.schema.layout import underflow_error, unit_roundoff
from natgrad.schema.names import HVP, STEP, TENSOR
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair

__all__ = ["Aggregation", "model_and_tensors"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GradientEstimate:
    """An estimate of the negative gradient from the vectors of the ledger (eq. 12).

    Attributes
    ----------
    half : str, optional
        Vector, half of which is added to the gradient.
    corrected : bool
        Whether the sum is then corrected along the displacement.
    """

    half: str | None = None
    corrected: bool = False


_ESTIMATES = {
    "gradient": GradientEstimate(),
    "corrected": GradientEstimate(corrected=True),
    "trapezoid": GradientEstimate(half="gradient_change", corrected=True),
    "taylor": GradientEstimate(half=HVP),
}


@dataclass(frozen=True)
class Aggregation:
    """The pairs of all updates, of the model or of each tensor, and the largest errors caused by rounding.

    If parameter groups have different learning rates, each tensor has its own eta, and eq. (2) holds for the tensor
    with that eta. The model has one eta. Its g is parallel to the displacement, so y.g > 0 if and only if the
    update descends. The ratios between the etas of the tensors are part of the learning rule, as in the metric of
    an optimizer. Stacking the g of all tensors, each with its own eta, would give a different vector: the loss may
    decrease along that vector and increase along the update.

    Attributes
    ----------
    dimensions : tuple of str
        Dimensions of the arrays: (step,) for the model, (step, tensor) for tensors.
    rate : array
        eta times the number of updates between the two logged states.
    pair : Pair
    finite : bool array
        False if the parameters or gradients are not finite.
    known : bool array
        False if a loss or a vector that the estimate requires was not logged.
    update_floor, gradient_floor : array
        Largest norm of the error of g and of y, caused by rounding of the stored values.
    gradient_norm : array, optional
        |y| if it is known without a learning rate.
    parameter_norm : array
    """

    dimensions: tuple[str, ...]
    rate: Array
    pair: Pair
    finite: NDArray[np.bool_]
    known: NDArray[np.bool_]
    update_floor: Array
    gradient_floor: Array
    gradient_norm: Array | None
    parameter_norm: Array


def model_and_tensors(table: UpdateTable, descent: str) -> tuple[Aggregation, Aggregation]:
    """Compute the pairs of the model and of its tensors for one estimate of the negative gradient.

    Parameters
    ----------
    table : UpdateTable
    descent : str
        Estimate of the negative gradient, one of `natgrad.schema.names.DESCENTS` (eqs. 12 and 16).

    Returns
    -------
    model, tensors : Aggregation
        Arrays have the shapes (updates,) and (updates, tensors).
    """
    gram, vectors, layout = table.gram, table.vectors, table.layout
    estimate = _ESTIMATES[descent]
    half, logged = estimate.half, estimate.half is None or estimate.half in vectors
    if not logged:
        # A vector that was not logged is replaced by NaN and marked as not known: the run has not failed.
        gram = np.pad(gram, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)
        vectors = (*vectors, str(half))
    index = {name: position for position, name in enumerate(vectors)}

    def norm(vector: str) -> Array:
        return np.sqrt(gram[..., index[vector], index[vector]])

    def is_finite(vector: str) -> NDArray[np.bool_]:
        # The square of a finite vector may overflow to infinity, but only that of another one is NaN.
        return ~np.isnan(gram[..., index[vector], index[vector]])

    # If there are k updates between two logged states, g is their mean (eq. 2).
    rate = (table.learning_rate * table.spans)[:, None]
    own = table.tensor_learning_rate
    own_rate = rate if own is None else own * table.spans[:, None]
    change = (table.next_loss - table.loss)[:, None]
    sizes = np.array([tensor.size for tensor in layout.tensors])
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    of_tensors = geometry.pair(gram, vectors, rate, sizes, half=half)
    of_model = geometry.direct_sum([of_tensors[:, tensor] for tensor in range(len(layout.tensors))])
    if own is not None:
        of_tensors = geometry.pair(gram, vectors, own_rate, sizes, half=half)
    underflow = np.array([underflow_error(tensor.dtype) for tensor in layout.tensors]) * np.sqrt(sizes)
    displacement_floor = geometry.displacement_floor(norm("parameter"), norm("displacement"), roundoff, underflow)
    gradient_floor = _rounding_error(norm("gradient"), sizes, table.dtypes["gradient"])
    finite = is_finite("displacement") & is_finite("gradient")
    if half is not None and logged:
        # The norm of the other gradient is at most the sum of the norms of this one and of their difference.
        stored = _rounding_error(norm(half), sizes, table.dtypes[half if half == HVP else "gradient"]) / 2.0
        gradient_floor = gradient_floor + stored + geometry.across_floor(gram, vectors, half, of_tensors)
        finite &= is_finite(half)
    tensors = Aggregation(
        (STEP, TENSOR),
        np.broadcast_to(own_rate, finite.shape),
        of_tensors,
        finite,
        np.full(finite.shape, logged),
        displacement_floor / own_rate,
        gradient_floor,
        norm("gradient") if half is None else None,
        norm("parameter"),
    )
    model = Aggregation(
        (STEP,),
        rate[:, 0],
        of_model,
        np.asarray(finite.all(axis=1)),
        np.full(len(finite), logged),
        _norm(displacement_floor / rate, axis=1),
        _norm(gradient_floor, axis=1),
        _norm(norm("gradient"), axis=1) if half is None else None,
        _norm(norm("parameter"), axis=1),
    )
    model = _with_time(model, table, estimate)
    if not estimate.corrected:
        return model, tensors
    # A tensor's share of the loss change is computed from the model's pair.
    tensors = replace(
        tensors, known=tensors.known & model.known[:, None], finite=tensors.finite & model.finite[:, None]
    )
    # The g of the model divided by the learning rate of the tensor, as the g of the tensor is.
    factor = np.where(own_rate == rate, 1.0, rate / own_rate)
    return (
        _corrected(model, change[:, 0], model.pair, model.update_floor),
        _corrected(
            tensors, change, geometry.scaled(model.pair[:, None], factor), model.update_floor[:, None] * factor
        ),
    )


def _corrected(aggregation: Aggregation, change: Array, model: Pair, model_floor: Array) -> Aggregation:
    """Correct the negative gradient along the displacement, which requires the losses of both states."""
    floors = aggregation.update_floor, model_floor
    floor = discrete_time.correction_floor(aggregation.pair, aggregation.rate, change, model, floors)
    return replace(
        aggregation,
        pair=discrete_time.corrected(aggregation.pair, aggregation.rate, change, model),
        known=aggregation.known & np.isfinite(change),
        gradient_floor=aggregation.gradient_floor + floor,
        gradient_norm=None,
    )


def _with_time(model: Aggregation, table: UpdateTable, estimate: GradientEstimate) -> Aggregation:
    """Extend the model by time, in the runs that log dL/dt."""
    extended, slope = table.extended(), table.loss_time_derivative
    if slope is None:
        return model
    columns = zip(astuple(geometry.with_time(model.pair, slope)), astuple(model.pair), strict=True)
    norm = model.gradient_norm
    return replace(
        model,
        pair=Pair(*(np.where(extended, new, old) for new, old in columns)),
        finite=model.finite & ~(extended & np.isinf(slope)),
        # A Hessian-vector product of the parameters does not include the change of the gradient with time.
        known=model.known & ~(extended & (np.isnan(slope) | (estimate.half == HVP))),
        gradient_norm=norm if norm is None else np.where(extended, np.hypot(norm, slope), norm),
    )


def _norm(values: Array, axis: int) -> Array:
    return np.asarray(np.sqrt(np.square(values).sum(axis=axis)))


def _rounding_error(norm: Array, sizes: NDArray[np.int64], dtype: str) -> Array:
    return geometry.rounding_error(norm, unit_roundoff(dtype), underflow_error(dtype) * np.sqrt(sizes))
