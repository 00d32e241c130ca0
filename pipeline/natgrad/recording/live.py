"""Compute the angle and other values of the last update, while a run is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from natgrad.theory import geometry

__all__ = ["LastUpdate", "UpdateValues", "last_update"]

_VECTORS = ("parameter", "displacement", "gradient", "residual")


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
    step: int, tensors: Iterable[tuple[str, ArrayLike, ArrayLike, ArrayLike]], rates: Mapping[str, float]
) -> LastUpdate:
    """Return the values of an update.

    Parameters
    ----------
    step : int
        Number of updates before it.
    tensors : iterable of (name, before, after, gradient)
        Parameters before and after the update, and the gradient before it. One tensor at a time is converted to
        float64.
    rates : mapping
        Learning rate of each tensor. That of the model is the largest.
    """
    names, pairs, lengths, largest = [], [], [], max(rates.values())
    if any(map(math.isnan, rates.values())):
        largest = math.nan
    for name, before, after, gradient in tensors:
        gram = _products(before, after, gradient)
        names.append(name)
        pairs.append([geometry.pair(gram, _VECTORS, rate, np.size(before)) for rate in (rates[name], largest)])
        lengths.append((gram[0, 0], gram[1, 1]))
    total = np.sum(lengths, axis=0)
    values = [_values(pair, *squares) for (pair, _), squares in zip(pairs, lengths, strict=True)]
    model = geometry.direct_sum([pair for _, pair in pairs])
    return LastUpdate(step, _values(model, total[0], total[1]), dict(zip(names, values, strict=True)))


def _products(before: ArrayLike, after: ArrayLike, gradient: ArrayLike) -> NDArray[np.float64]:
    """Return the inner products of parameter, displacement, gradient and residual, see `natgrad.kernel.gram`."""
    parameter, moved, descent = (
        np.asarray(array).astype(np.float64).ravel() for array in (before, after, gradient)
    )
    with np.errstate(all="ignore"):
        displacement = moved - parameter
        ratio = (descent @ displacement) / (displacement @ displacement)
        residual = descent - (ratio if math.isfinite(ratio) else 0.0) * displacement
        vectors = np.stack([parameter, displacement, descent, residual])
        products: NDArray[np.float64] = vectors @ vectors.T
    return products


def _values(pair: geometry.Pair, parameter_square: float, displacement_square: float) -> UpdateValues:
    ratio = math.sqrt(displacement_square / parameter_square) if parameter_square > 0 else math.nan
    return UpdateValues(
        angle=float(geometry.angle(pair)),
        condition_number=float(geometry.condition_number(pair)),
        effective=bool(pair.alignment > 0),
        update_to_weight=ratio,
    )
