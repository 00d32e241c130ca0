"""Stochastic learning rules, eqs. (19), (20): from replicates of an update to labelled results.

From one state theta_t a stochastic rule goes to many theta_{t+1}. All that the paper says of it is algebra on inner
products once more: of the gradient, the replicates' displacements p_r and, where logged, their hvp_r = 2 H p_r.
Means over replicates, and means that leave one out, are linear combinations. So one Gram matrix of all these
vectors, as means and deviations from them, gives the metric of the mean update, whether eq. (19) is one, and
standard errors by the jackknife. As the means are taken before any product, they lose no digits where they are much
shorter than the replicates.

There is no residual in this ledger: an angle below 1e-8 rad, or as close to pi, is not resolved. Standard errors of
means are far larger.

References
----------
Shoji, Suzuki, Kozachkov, "Is All Learning (Natural) Gradient Descent?"; equation numbers are the paper's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from natgrad.results import dataset as results
from natgrad.results.inputs import UpdateTable
from natgrad.schema.errors import InputError
from natgrad.schema.layout import Layout, unit_roundoff
from natgrad.schema.names import (
    ATTEMPT,
    REPLICATE,
    REPLICATE_PARAMETER,
    STEP,
    TENSOR,
    of_replicate,
    replicate_vectors,
)
from natgrad.schema.variables import DIMENSIONS, REPLICATE_VARIABLES, Status
from natgrad.theory import discrete_time, geometry
from natgrad.theory.geometry import Pair
from natgrad.theory.metric_operators import jackknife

__all__ = ["label", "label_run", "ledger"]

Array = NDArray[np.float64]
Columns = dict[str, tuple[tuple[str, ...], NDArray[Any]]]
"""Variable to its dimensions and values."""


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
        In the order of `natgrad.schema.names.replicate_vectors`: 2 + R vectors, or 3 + 2 R. Those of several
        tensors add up to that of the model.

    Raises
    ------
    InputError
        Where the shapes do not fit.
    """
    logged = [np.asarray(array, np.float64) for array in (displacement, hvp) if array is not None]
    shapes, shape = {array.shape for array in logged}, logged[0].shape
    if len(shapes) != 1 or len(shape) < 2 or not shape[-2] or shape[:-2] + shape[-1:] != np.shape(gradient):
        raise InputError(
            f"a gradient of shape {np.shape(gradient)} beside replicates of shapes {sorted(shapes)}",
            remedy="give replicates next to last, elements last, and the same replicates in both",
        )
    parts = [np.asarray(gradient, np.float64)[..., None, :]]
    for array in logged:
        mean = array.mean(axis=-2, keepdims=True)
        parts += [mean, array - mean]
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
    parameter_norm: ArrayLike | None = None,
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
        NaN where it is not known.
    steps : int array, shape (rows,), optional
        Counted from 0 where not given.
    loss_change : array, shape (rows, R), optional
        L(theta_{t+1}) - L(theta_t) of each replicate.
    parameter_norm : array, shape (rows, tensors), optional
        |theta_t|, which tells what rounding to the dtypes of the layout can have made of an update. Where that is
        all of it the status is ``unverifiable``. Exact parameters where not given.

    Returns
    -------
    DataTree
        Groups ``/model`` and ``/tensor``, variables of `natgrad.schema.variables.REPLICATE_VARIABLES`. Those of
        the metric (19) are NaN without hvps; ``stochastic_definite`` is then false.

    Raises
    ------
    InputError
        Where the shapes do not fit, or a learning rate is not positive.
    """
    gram, rate = np.asarray(gram, np.float64), np.asarray(learning_rate, np.float64)
    rows = len(gram)
    _require_ledger(gram, layout, replicates)
    if (rate <= 0).any():
        raise InputError("a learning rate is not positive", remedy="give one above 0 for each step")
    changes = np.full((rows, replicates), np.nan) if loss_change is None else np.asarray(loss_change, np.float64)
    if changes.shape != (rows, replicates):
        raise InputError(
            f"loss_change of shape {changes.shape}",
            remedy=f"give one per step and replicate, {rows} x {replicates}",
        )
    norm = None if parameter_norm is None else np.asarray(parameter_norm, np.float64)
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    rate = np.broadcast_to(rate, (rows,))
    levels = _levels(gram, layout, replicates, (rate, rate[:, None]), norm, roundoff)
    numbers = np.arange(rows) if steps is None else np.asarray(steps, np.int64)
    return _tree(levels, changes, layout, {STEP: numbers})


def label_run(
    inputs: UpdateTable,
    chunks: Iterable[tuple[NDArray[np.int64], Array]],
    replicates: int,
    replicate_loss: Array,
) -> xr.DataTree:
    """Compute and label the results of the replicates of a logged run, one ledger chunk at a time; see `label`.

    Parameters
    ----------
    inputs : UpdateTable
        Of the run.
    ledger chunks : iterable of (positions, gram)
        Rows of the inputs, and the ledger of the replicates of these; together they cover each row once.
    replicates : int
        R.
    replicate_loss : array, shape (rows, R)
        Losses of the states that they lead to, NaN where not logged.

    Notes
    -----
    A replicate is one update from theta_t, also where the log holds every k-th state only.
    """
    own = inputs.learning_rate[:, None] if inputs.tensor_learning_rate is None else inputs.tensor_learning_rate
    rate, own = (np.where(rates > 0, rates, np.nan) for rates in (inputs.learning_rate, own))
    parameter = inputs.vectors.index("parameter")
    norm = np.sqrt(inputs.gram[..., parameter, parameter])
    stored = inputs.dtypes[of_replicate(REPLICATE_PARAMETER, 0)]
    roundoff = np.array([max(map(unit_roundoff, (tensor.dtype, stored))) for tensor in inputs.layout.tensors])
    levels: dict[str, Columns] = {}
    for rows, gram in chunks:
        _require_ledger(gram, inputs.layout, replicates)
        rates = rate[rows], own[rows]
        for name, columns in _levels(gram, inputs.layout, replicates, rates, norm[rows], roundoff).items():
            for variable, (dimensions, values) in columns.items():
                whole = levels.setdefault(name, {}).setdefault(
                    variable, (dimensions, np.empty((len(rate), *values.shape[1:]), values.dtype))
                )
                whole[1][rows] = values
    attempts = np.zeros(len(rate), np.int64) if inputs.attempts is None else inputs.attempts
    labels = {STEP: inputs.steps, ATTEMPT: (STEP, attempts)}
    tree = _tree(levels, replicate_loss - inputs.loss[:, None], inputs.layout, labels)
    if not inputs.runs:
        return tree
    groups = {path: results.by_run(tree[path].to_dataset(), inputs) for path in ("model", "tensor")}
    return xr.DataTree.from_dict({f"/{path}": _described(dataset) for path, dataset in groups.items()})


def _require_ledger(gram: Array, layout: Layout, replicates: int) -> None:
    counts = [len(replicate_vectors(replicates, hvp)) for hvp in (False, True)]
    shapes = [(len(layout.tensors), count, count) for count in counts]
    if replicates < 1 or gram.shape[1:] not in shapes:
        raise InputError(
            f"a ledger of shape {gram.shape} is none of {replicates} replicates and {len(layout.tensors)} tensors",
            remedy="pass the output of natgrad.results.replicates.ledger: (rows, tensors, vectors, vectors)",
        )


def _levels(
    gram: Array,
    layout: Layout,
    replicates: int,
    rates: tuple[Array, Array],
    parameter_norm: Array | None,
    roundoff: Array,
) -> dict[str, Columns]:
    """Variables of the model and of the tensors, each with its learning rates."""
    sizes = np.array([tensor.size for tensor in layout.tensors])
    with np.errstate(all="ignore"):
        # The mean of the lengths is no longer than the root of their mean square.
        length = np.sqrt(gram[..., 1, 1] + _spread(gram, replicates))
        floor = np.zeros(length.shape)
        if parameter_norm is not None:
            floor = geometry.displacement_floor(parameter_norm, length, roundoff)
        whole = np.sqrt(np.square(floor).sum(axis=1))
        return {
            "model": _columns(gram.sum(axis=1), np.array(sizes.sum()), rates[0], replicates, whole, (STEP,)),
            "tensor": _columns(gram, sizes, rates[1], replicates, floor, (STEP, TENSOR)),
        }


def _spread(gram: Array, replicates: int) -> Array:
    """Mean square of the deviations of the displacements from their mean."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)[..., 2 : 2 + replicates]
    return np.asarray(squares.mean(axis=-1))


def _columns(
    gram: Array, size: NDArray[np.int64], rate: Array, replicates: int, floor: Array, leading: tuple[str, ...]
) -> Columns:
    unit = np.eye(replicates)
    mean = _pairs(gram, size, rate, unit.mean(axis=0))
    single = [_pairs(gram, size, rate, weights)[0] for weights in unit]
    each = Pair(*(np.stack([getattr(pair, name) for pair in single], axis=-1) for name in vars(single[0])))
    update_floor = floor / rate
    status = geometry.status(
        mean[0],
        rate,
        # A hvp that is not finite leaves its own results unknown.
        finite=np.isfinite(np.diagonal(gram, axis1=-2, axis2=-1)[..., : 2 + replicates]).all(axis=-1),
        verifiable=~((update_floor >= mean[0].update_norm) & (update_floor > 0)),
    )
    effective, has_angle = status == Status.EFFECTIVE, status <= Status.OBTUSE
    told = ~((update_floor[..., None] >= each.update_norm) & (update_floor[..., None] > 0))
    columns: Columns = {
        "status": (leading, status),
        "effective": (leading, effective),
        "update_norm": (leading, mean[0].update_norm),
        "gradient_norm": (leading, mean[0].gradient_norm),
        "replicate_alignment": ((*leading, REPLICATE), each.alignment),
        "replicate_angle": ((*leading, REPLICATE), np.where(told, geometry.angle(each), np.nan)),
        "replicate_update_norm": ((*leading, REPLICATE), each.update_norm),
    }
    exists = {"alignment": np.True_, "angle": has_angle}

    def statistics(weights: Array) -> Array:
        pair, curvature, product = _pairs(gram, size, rate, weights)
        alpha = _alpha(pair, curvature, product, rate)
        values = {
            "alignment": pair.alignment,
            "angle": geometry.angle(pair),
            "condition_number": geometry.condition_number(pair),
            "stochastic_weight": discrete_time.stochastic_weight(pair, curvature, product, rate),
            "stochastic_alpha": alpha,
            "learning_rate_bound": discrete_time.stochastic_learning_rate_bound(pair, curvature, product, alpha),
        }
        return np.stack([np.where(exists.get(name, effective), values[name], np.nan) for name in _STATISTICS])

    # The mean of rows of the identity are the weights of the replicates; one left out has weight 0.
    for name, value, error in zip(_STATISTICS, *jackknife(statistics, unit), strict=True):
        columns |= {name: (leading, value), f"{name}_error": (leading, error)}
    columns["stochastic_definite"] = (leading, columns["stochastic_alpha"][1] > columns["stochastic_weight"][1])
    return columns


_STATISTICS = (
    "alignment",
    "angle",
    "condition_number",
    "stochastic_weight",
    "stochastic_alpha",
    "learning_rate_bound",
)
"""What is told of the mean update, with an error where `natgrad.schema.variables.REPLICATE_VARIABLES` has one."""


def _pairs(gram: Array, size: NDArray[np.int64], rate: Array, weights: Array) -> tuple[Pair, Pair, Array]:
    """Pairs of a weighted mean update with y and with its <Hg>, and the product of these two across it."""
    known = 2 + len(weights)
    # As the deviations add up to 0, of their weights only those that differ from the mean one count.
    mean = np.concatenate([[weights.sum()], weights - weights.mean()])
    blocks = np.zeros((2, known))
    blocks[0, 0], blocks[1, 1:] = 1.0, mean
    # Of gradient, update and hvp; what is made of hvps is NaN where they were not logged or are not finite.
    small = np.full((*gram.shape[:-2], 3, 3), np.nan)
    small[..., :2, :2] = blocks @ gram[..., :known, :known] @ blocks.T
    if gram.shape[-1] > known:
        # Matrix by matrix, never row by row at once: the bits do not depend on how many are taken together.
        small[..., :2, 2] = small[..., 2, :2] = blocks @ gram[..., :known, known:] @ mean
        small[..., 2, 2] = np.vecdot(gram[..., known:, known:] @ mean, mean)
    square, along, bent = small[..., 1, 1], small[..., 0, 1], small[..., 1, 2]
    line = size == 1

    def across(first: int, second: int) -> Array:
        product = small[..., first, second] - geometry.safe_divide(
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


def _of_losses(changes: Array) -> Columns:
    mean, error = jackknife(lambda means: -means, changes.T)
    return {
        "replicate_loss_decrease": ((STEP, REPLICATE), -changes),
        "loss_decrease": ((STEP,), mean),
        "loss_decrease_error": ((STEP,), error),
    }


def _tree(levels: Mapping[str, Columns], changes: Array, layout: Layout, labels: dict[str, Any]) -> xr.DataTree:
    replicates = np.arange(changes.shape[1])
    groups = {"model": levels["model"] | _of_losses(changes), "tensor": levels["tensor"]}
    names = {"model": {}, "tensor": {TENSOR: np.array(layout.names, dtype=object)}}
    datasets = {}
    for group, columns in groups.items():
        variables = {name: columns[name] for name in REPLICATE_VARIABLES if name in columns}
        dataset = xr.Dataset(variables, {**labels, REPLICATE: replicates, **names[group]})
        datasets[f"/{group}"] = _described(dataset)
    return xr.DataTree.from_dict(datasets)


def _described(dataset: xr.Dataset) -> xr.Dataset:
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
    for name in dataset.coords:
        dataset[name].attrs = {"long_name": DIMENSIONS[str(name)], "units": "1"}
    return dataset
