"""Stochastic learning rules, eqs. (19), (20): from replicates of an update to labelled results.

From one state theta_t a stochastic rule goes to many theta_{t+1}. All that the paper says of it is algebra on inner
products once more: of the gradient, the replicates' displacements p_r and, where logged, their hvp_r = 2 H p_r.
Means over replicates, and means that leave one out, are linear combinations. So one Gram matrix of all 1 + 2 R
vectors gives the metric of the mean update, whether eq. (19) is one, and standard errors by the jackknife.

There is no residual in this ledger: an angle below 1e-8 rad, or as close to pi, is not resolved, and a mean that is
much shorter than the replicates loses as many digits. Standard errors of means are far larger.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from pipeline import discrete_time, geometry
from pipeline.geometry import Pair
from pipeline.metrics import jackknife
from pipeline.schema import REPLICATE, REPLICATE_VARIABLES, STEP, TENSOR, InputError, Layout, Status

__all__ = ["label", "ledger"]

Array = NDArray[np.float64]


def ledger(gradient: ArrayLike, displacement: ArrayLike, hvp: ArrayLike | None = None) -> Array:
    """Gram matrix of the gradient and all replicates' vectors, summed in float64.

    Parameters
    ----------
    gradient : array, shape (..., D)
        grad L(theta_t), one for all replicates.
    displacement : array, shape (..., R, D)
        theta_{t+1} - theta_t of each replicate.
    hvp : array, shape (..., R, D), optional
        Hessian (at the point of eq. 11, or near it) times each displacement.

    Returns
    -------
    array, shape (..., vectors, vectors)
        In the order gradient, displacements, hvps: 1 + R vectors, or 1 + 2 R. Those of several tensors add up to
        that of the model.

    Raises
    ------
    InputError
        Where the shapes do not fit.
    """
    parts = [np.asarray(gradient, np.float64)[..., None, :], np.asarray(displacement, np.float64)]
    parts += [] if hvp is None else [np.asarray(hvp, np.float64)]
    shapes = {part.shape for part in parts[1:]}
    if len(shapes) != 1 or parts[1].ndim < 2 or parts[1].shape[:-2] + parts[1].shape[-1:] != np.shape(gradient):
        raise InputError(
            f"a gradient of shape {np.shape(gradient)} beside replicates of shapes {sorted(shapes)}",
            remedy="give replicates next to last, elements last, and the same replicates in both",
        )
    vectors = np.concatenate(parts, axis=-2)
    return np.asarray(vectors @ np.swapaxes(vectors, -1, -2))


def label(
    gram: ArrayLike,
    layout: Layout,
    *,
    replicates: int,
    learning_rate: ArrayLike,
    steps: ArrayLike | None = None,
    loss_change: ArrayLike | None = None,
) -> xr.DataTree:
    """Compute and label what the replicates of a run say, per step, for the model and for each tensor.

    Parameters
    ----------
    gram : array, shape (rows, tensors, vectors, vectors)
        `ledger` of each tensor.
    layout : Layout
        Its tensors.
    replicates : int
        R.
    learning_rate : array, shape (rows,) or ()
    steps : int array, shape (rows,), optional
        Counted from 0 where not given.
    loss_change : array, shape (rows, R), optional
        L(theta_{t+1}) - L(theta_t) of each replicate.

    Returns
    -------
    DataTree
        Groups ``/model`` and ``/tensor``, variables of `pipeline.schema.REPLICATE_VARIABLES`. Those of the metric
        (19) are NaN without hvps; ``stochastic_definite`` is then false.

    Raises
    ------
    InputError
        Where the shapes do not fit, or a learning rate is not positive.
    """
    gram, rate = np.asarray(gram, np.float64), np.asarray(learning_rate, np.float64)
    rows = len(gram)
    with_hvp = gram.shape[-1] == 1 + 2 * replicates
    if gram.shape[1:] != (len(layout.tensors), *[1 + replicates * (1 + with_hvp)] * 2) or replicates < 1:
        raise InputError(
            f"a ledger of shape {gram.shape} is none of {replicates} replicates and {len(layout.tensors)} tensors",
            remedy="give what pipeline.replicates.ledger makes of each tensor, (rows, tensors, vectors, vectors)",
        )
    if not (rate > 0).all():
        raise InputError("a learning rate is not positive", remedy="give one above 0 for each step")
    rate = np.broadcast_to(rate, (rows,))
    sizes = np.array([tensor.size for tensor in layout.tensors])
    changes = np.full((rows, replicates), np.nan) if loss_change is None else np.asarray(loss_change, np.float64)
    if changes.shape != (rows, replicates):
        raise InputError(
            f"loss_change of shape {changes.shape}",
            remedy=f"give one per step and replicate, {rows} x {replicates}",
        )
    numbers = np.arange(rows) if steps is None else np.asarray(steps, np.int64)
    labels: dict[str, Any] = {STEP: numbers, REPLICATE: np.arange(replicates)}
    with np.errstate(all="ignore"):
        model = _columns(gram.sum(axis=1), np.array(sizes.sum()), rate, replicates, (STEP,))
        model |= _of_losses(changes)
        tensors = _columns(gram, sizes, rate[:, None], replicates, (STEP, TENSOR))
    names = {TENSOR: np.array(layout.names, dtype=object)}
    return xr.DataTree.from_dict({"/model": _dataset(model, labels), "/tensor": _dataset(tensors, labels | names)})


def _columns(
    gram: Array, size: NDArray[np.int64], rate: Array, replicates: int, leading: tuple[str, ...]
) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    unit = np.eye(replicates)
    mean = _pairs(gram, size, rate, unit.mean(axis=0))
    single = [_pairs(gram, size, rate, weights)[0] for weights in unit]
    each = Pair(*(np.stack([getattr(pair, name) for pair in single], axis=-1) for name in vars(single[0])))
    status = geometry.status(mean[0], rate)
    effective = status == Status.EFFECTIVE
    columns: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "status": (leading, status),
        "effective": (leading, effective),
        "update_norm": (leading, mean[0].update_norm),
        "gradient_norm": (leading, mean[0].gradient_norm),
        "replicate_alignment": ((*leading, REPLICATE), each.alignment),
        "replicate_angle": ((*leading, REPLICATE), geometry.angle(each)),
        "replicate_update_norm": ((*leading, REPLICATE), each.update_norm),
    }
    statistics: dict[str, Callable[[Pair, Pair, Array], Array]] = {
        "alignment": lambda pair, curvature, product: pair.alignment,
        "angle": lambda pair, curvature, product: geometry.angle(pair),
        "condition_number": lambda pair, curvature, product: geometry.condition_number(pair),
        "stochastic_weight": lambda pair, curvature, product: discrete_time.stochastic_weight(
            pair, curvature, product, rate
        ),
        "learning_rate_bound": lambda pair, curvature, product: discrete_time.stochastic_learning_rate_bound(
            pair, curvature, product, _alpha(pair, curvature, product, rate)
        ),
    }
    for name, statistic in statistics.items():
        # The mean of rows of the identity are the weights of the replicates; one left out has weight 0.
        value, error = jackknife(lambda weights, of=statistic: of(*_pairs(gram, size, rate, weights)), unit)
        columns[name], columns[f"{name}_error"] = (leading, value), (leading, error)
    alpha = _alpha(*mean, rate)
    columns["stochastic_alpha"] = (leading, alpha)
    columns["stochastic_definite"] = (leading, alpha > columns["stochastic_weight"][1])
    return columns


def _pairs(gram: Array, size: NDArray[np.int64], rate: Array, weights: Array) -> tuple[Pair, Pair, Array]:
    """Pairs of a weighted mean update with y and with its <Hg>, and the product of these two across it."""
    replicates = len(weights)
    blocks = np.zeros((3, gram.shape[-1]))
    blocks[0, 0], blocks[1, 1 : 1 + replicates] = 1.0, weights
    if gram.shape[-1] > 1 + replicates:
        blocks[2, 1 + replicates :] = weights
    else:
        blocks[2] = np.nan  # and so is what is made of hvps that were not logged
    small = blocks @ gram @ blocks.T
    square, along, bent = small[..., 1, 1], small[..., 0, 1], small[..., 1, 2]
    line = size == 1

    def across(first: int, second: int) -> Array:
        product = small[..., first, second] - geometry.quotient(
            small[..., first, 1] * small[..., second, 1], square
        )
        return np.where(line, 0.0 * product, product)

    shape = np.broadcast_shapes(square.shape, rate.shape)
    dimension = np.broadcast_to(size, shape)
    pair = Pair(square / rate**2, -along / rate, np.maximum(across(0, 0), 0.0), dimension)
    # hvp = 2 H p = 2 eta H g.
    curvature = Pair(
        square / rate**2, bent / (2.0 * rate**2), np.maximum(across(2, 2), 0.0) / (4.0 * rate**2), dimension
    )
    return pair, curvature, -across(0, 2) / (2.0 * rate)


def _alpha(pair: Pair, curvature: Pair, product: Array, rate: Array) -> Array:
    """Weight of the best conditioned Mbar, |<ybar>|^2 / <ybar>.<g>; NaN where there is none."""
    discrete = Pair(
        pair.update_square,
        pair.alignment - rate * curvature.alignment,
        np.maximum(pair.across_square - 2.0 * rate * product + rate**2 * curvature.across_square, 0.0),
        pair.size,
    )
    return geometry.eigenvalue_bounds(discrete)[0]


def _of_losses(changes: Array) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    mean, error = jackknife(lambda means: -means, changes.T)
    return {
        "replicate_loss_decrease": ((STEP, REPLICATE), -changes),
        "loss_decrease": ((STEP,), mean),
        "loss_decrease_error": ((STEP,), error),
    }


def _dataset(columns: dict[str, tuple[tuple[str, ...], NDArray[Any]]], labels: dict[str, Any]) -> xr.Dataset:
    dataset = xr.Dataset({name: columns[name] for name in REPLICATE_VARIABLES if name in columns}, labels)
    for name in dataset.data_vars:
        variable = REPLICATE_VARIABLES[str(name)]
        dataset[name].attrs = {
            "long_name": variable.long_name,
            "units": variable.units,
            "equation": variable.equation,
        }
    dataset["status"].attrs |= {
        "flag_values": [int(status) for status in Status],
        "flag_meanings": " ".join(status.name.lower() for status in Status),
    }
    return dataset
