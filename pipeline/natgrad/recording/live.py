"""Compute the angle and other values of the last update, while a run is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from natgrad.schema.names import RECORDED_VECTORS
from natgrad.theory import geometry

__all__ = ["LastUpdate", "UpdateValues", "last_update"]


@dataclass(frozen=True)
class UpdateValues:
    """Values of one update, for the model or for one tensor.

    Attributes
    ----------
    angle : float
        Angle between the update and the negative gradient, in radians; NaN if one of them is zero or not finite, or
        if the learning rate is not known.
    condition_number : float
        Smallest condition number of a metric that explains the update; NaN if it is not effective.
    effective : bool
        True if the update decreases the loss to first order.
    update_to_weight : float
        Norm of the displacement divided by that of the parameters; NaN if the latter is zero.
    """

    angle: float
    condition_number: float
    effective: bool
    update_to_weight: float


@dataclass(frozen=True)
class LastUpdate:
    """Values of the last update.

    Attributes
    ----------
    step : int
        Number of updates before it.
    model : UpdateValues
        Values of all recorded tensors together.
    tensors : dict
        Values of each tensor, by name.
    """

    step: int
    model: UpdateValues
    tensors: dict[str, UpdateValues]


def last_update(
    step: int, gram: NDArray[np.float64], sizes: Sequence[int], rates: Mapping[str, float]
) -> LastUpdate:
    """Return the values of an update.

    Parameters
    ----------
    step : int
        Number of updates before it.
    gram : float64 array, shape (tensors, 4, 4)
        Inner products of each tensor; see `natgrad.kernel.updates.refresh_products`.
    sizes : sequence of int
        Number of elements of each tensor.
    rates : mapping
        Learning rate of each tensor, by name, in the same order. That of the model is the largest.
    """
    largest = max(rates.values())
    if any(map(math.isnan, rates.values())):
        largest = math.nan
    tensors, pairs = {}, []
    for (name, rate), products, size in zip(rates.items(), gram, sizes, strict=True):
        own, shared = (geometry.pair(products, RECORDED_VECTORS, one, size) for one in (rate, largest))
        tensors[name] = _values(own, products[0, 0], products[1, 1])
        pairs.append(shared)
    squares = np.sum([np.diagonal(products)[:2] for products in gram], axis=0)
    return LastUpdate(step, _values(geometry.direct_sum(pairs), *squares), tensors)


def _values(pair: geometry.Pair, parameter_square: float, displacement_square: float) -> UpdateValues:
    ratio = math.sqrt(displacement_square / parameter_square) if parameter_square > 0 else math.nan
    return UpdateValues(
        angle=float(geometry.angle(pair)),
        condition_number=float(geometry.condition_number(pair)),
        effective=bool(pair.alignment > 0),
        update_to_weight=ratio,
    )
