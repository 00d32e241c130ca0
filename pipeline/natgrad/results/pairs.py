"""Ledger to pairs: of the model and of each tensor, the numbers of (y, g) that everything else is computed from.

The Gram matrix of a row becomes a pair for each way of making a negative gradient (eq. 12), with what rounding can
move it by. `natgrad.results.dataset` makes variables of them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.schema.layout import unit_roundoff
from natgrad.schema.names import HVP, STEP, TENSOR
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair

__all__ = ["Level", "model_and_tensors"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Way:
    """How a negative gradient is made of the ledger: with half of which vector, and corrected or not (eq. 12)."""

    half: str | None = None
    corrected: bool = False


_WAYS = {
    "gradient": _Way(),
    "corrected": _Way(corrected=True),
    "trapezoid": _Way(half="gradient_change", corrected=True),
    "taylor": _Way(half=HVP),
}


@dataclass(frozen=True)
class Level:
    """Model or tensors: of every row the pair, eta times its updates, what rounding can move it by; the dimensions.

    Each tensor has its own eta where groups of the optimizer have several: eq. (2) holds for it with that. The
    model has one. Its g is along the displacement, which alone decides whether the update descends, y.g > 0: how
    the etas of the tensors differ is a part of the learning rule, as in the metric that an optimizer used. Stacked
    g of etas of their own would be another vector, along which the loss may fall where it rises along the update.
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


def model_and_tensors(inputs: UpdateTable, descent: str) -> tuple[Level, Level]:
    """Model and tensors, compared with one negative gradient.

    Parameters
    ----------
    inputs : UpdateTable
    descent : str
        One of `natgrad.schema.names.DESCENTS`: how y is made (eqs. 12 and 16).

    Returns
    -------
    model, tensors : Level
        With arrays of shape (rows,) and (rows, tensors).
    """
    gram, vectors, layout = inputs.gram, inputs.vectors, inputs.layout
    way = _WAYS[descent]
    half, logged = way.half, way.half is None or way.half in vectors
    if not logged:
        # NaN in its place, and not known: a vector that was not logged is no failure of the run.
        gram = np.pad(gram, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=np.nan)
        vectors = (*vectors, str(half))
    index = {name: position for position, name in enumerate(vectors)}

    def norm(vector: str) -> Array:
        return np.sqrt(gram[..., index[vector], index[vector]])

    # A row that spans k updates has moved by k of them: the update g is their mean (eq. 2).
    rate = (inputs.learning_rate * inputs.spans)[:, None]
    own = inputs.tensor_learning_rate
    own_rate = rate if own is None else own * inputs.spans[:, None]
    change = (inputs.next_loss - inputs.loss)[:, None]
    sizes = np.array([tensor.size for tensor in layout.tensors])
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    part = geometry.pair(gram, vectors, rate, sizes, half=half)
    whole = geometry.direct_sum([part[:, tensor] for tensor in range(len(layout.tensors))])
    if own is not None:
        part = geometry.pair(gram, vectors, own_rate, sizes, half=half)
    displacement_floor = geometry.displacement_floor(norm("parameter"), norm("displacement"), roundoff)
    gradient_floor = unit_roundoff(inputs.dtypes["gradient"]) * norm("gradient")
    finite = np.isfinite(norm("displacement") + norm("gradient"))
    if half is not None and logged:
        # The other gradient is no longer than this one and their difference together.
        stored = unit_roundoff(inputs.dtypes[half if half == HVP else "gradient"]) * norm(half) / 2.0
        gradient_floor = gradient_floor + stored + geometry.across_floor(gram, vectors, half, part)
        finite &= np.isfinite(norm(half))
    tensors = Level(
        (STEP, TENSOR),
        np.broadcast_to(own_rate, finite.shape),
        part,
        finite,
        np.full(finite.shape, logged),
        displacement_floor / own_rate,
        gradient_floor,
        norm("gradient") if half is None else None,
        norm("parameter"),
    )
    model = Level(
        (STEP,),
        rate[:, 0],
        whole,
        np.asarray(finite.all(axis=1)),
        np.full(len(finite), logged),
        _norm(displacement_floor / rate, axis=1),
        _norm(gradient_floor, axis=1),
        _norm(norm("gradient"), axis=1) if half is None else None,
        _norm(norm("parameter"), axis=1),
    )
    model = _with_time(model, inputs, way)
    if not way.corrected:
        return model, tensors
    # The share of a tensor in the change of the loss is told by the model's pair.
    tensors = replace(tensors, known=tensors.known & model.known[:, None])
    # Per the learning rate of the tensor, as the tensor's own update is.
    factor = np.where(own_rate == rate, 1.0, rate / own_rate)
    return (
        _corrected(model, change[:, 0], model.pair, model.update_floor),
        _corrected(
            tensors, change, geometry.scaled(model.pair[:, None], factor), model.update_floor[:, None] * factor
        ),
    )


def _corrected(level: Level, change: Array, whole: Pair, whole_floor: Array) -> Level:
    """Level of the discrete gradient along the displacement, which needs the losses at both ends."""
    floors = level.update_floor, whole_floor
    floor = discrete_time.correction_floor(level.pair, level.rate, change, whole, floors)
    return replace(
        level,
        pair=discrete_time.corrected(level.pair, level.rate, change, whole),
        known=level.known & np.isfinite(change),
        gradient_floor=level.gradient_floor + floor,
        gradient_norm=None,
    )


def _with_time(model: Level, inputs: UpdateTable, way: _Way) -> Level:
    """Model extended by time, in the runs that log how their loss changes with it."""
    extended, slope = inputs.extended(), inputs.loss_time_derivative
    if slope is None:
        return model
    columns = zip(astuple(geometry.with_time(model.pair, slope)), astuple(model.pair), strict=True)
    norm = model.gradient_norm
    return replace(
        model,
        pair=Pair(*(np.where(extended, new, old) for new, old in columns)),
        # A Hessian-vector product of the parameters alone lacks what the gradient does in time.
        known=model.known & ~(extended & (np.isnan(slope) | (way.half == HVP))),
        gradient_norm=norm if norm is None else np.where(extended, np.hypot(norm, slope), norm),
    )


def _norm(values: Array, axis: int) -> Array:
    return np.asarray(np.sqrt(np.square(values).sum(axis=axis)))
