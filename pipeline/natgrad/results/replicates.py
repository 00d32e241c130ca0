"""Compute and label the results of stochastic learning rules, eqs. (19), (20), from replicates of an update.

From one state theta_t, a stochastic rule may lead to many theta_{t+1}. All results are computed from inner products
of the gradient, the displacements p_r of the replicates and, if logged, hvp_r = 2 H p_r. Means over
replicates, and means without one of them, are linear combinations of these vectors. One Gram matrix of the means
and the deviations from them therefore gives the metric of the mean update, the definiteness of eq. (19), and
jackknife standard errors. Means are taken before any product, so they lose no digits if they are much shorter than
the replicates.

The residual of the mean keeps its angle exact near 0 and pi. That of another combination of the replicates is the
residual of the mean and a multiple of the deviations. They cancel if the combination is parallel to the gradient
but the mean is not, or if all are parallel and of different lengths: the angle of a single replicate then has an
error of up to 2e-8 times the length of its deviation in units of the mean.

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

from natgrad.results.dataset import split_by_run, with_attributes
from natgrad.results.inputs import UpdateTable
from natgrad.results.replicate_variables import (
    DECLARED,
    MEANS,
    REPLICATE_VARIABLES,
    ComputedFrom,
    Draws,
    error_of,
)
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
from natgrad.theory import geometry
from natgrad.theory.metric_operators import jackknife

__all__ = ["label", "label_run", "ledger"]

Array = NDArray[np.float64]

Columns = dict[str, tuple[tuple[str, ...], NDArray[Any]]]
"""Dimensions and values of each variable, by name."""


def ledger(gradient: ArrayLike, displacement: ArrayLike, hvp: ArrayLike | None = None) -> Array:
    """Return the Gram matrix of the gradient and the vectors of all replicates, summed in float64.

    Parameters
    ----------
    gradient : array, shape (..., D)
        grad L(theta_t), the same for all replicates.
    displacement : array, shape (..., R, D)
        theta_{t+1} - theta_t of each replicate.
    hvp : array, shape (..., R, D), optional
        Hessian (at the point of eq. 11, or near it) times each displacement.

    Returns
    -------
    array, shape (..., vectors, vectors)
        In the order of `natgrad.schema.names.replicate_vectors`: 3 + R vectors, or 4 + 2 R.

    Raises
    ------
    InputError
        If the shapes do not match.
    """
    logged = [np.asarray(array, np.float64) for array in (displacement, hvp) if array is not None]
    shapes, shape = {array.shape for array in logged}, logged[0].shape
    if len(shapes) != 1 or len(shape) < 2 or not shape[-2] or shape[:-2] + shape[-1:] != np.shape(gradient):
        raise InputError(
            f"the shapes of the gradient {np.shape(gradient)} and of the replicates {sorted(shapes)} do not match",
            remedy="pass replicates on the second to last axis and elements on the last axis, in equal shapes",
        )
    slope = np.asarray(gradient, np.float64)[..., None, :]
    parts = [slope]
    for array in logged:
        mean = array.mean(axis=-2, keepdims=True)
        parts.append(mean)
        if len(parts) == 2:
            with np.errstate(all="ignore"):
                square = np.vecdot(mean, mean)
                ratio = np.where(square >= geometry.EXACT_NORM**2, np.vecdot(slope, mean) / square, 0.0)
                parts.append(slope - np.where(np.isfinite(ratio), ratio, 0.0)[..., None] * mean)
        parts.append(array - mean)
    vectors = np.concatenate(parts, axis=-2)
    with np.errstate(all="ignore"):
        gram = np.asarray(vectors @ np.swapaxes(vectors, -1, -2))
    index = np.arange(gram.shape[-1])
    # The bits of the matrix product are kept. Only squares that underflow or overflow are replaced by the
    # convention.
    square, marked = gram[..., index, index], geometry.squared_norm(vectors)
    gram[..., index, index] = np.where((square > 0) & (square < np.inf), square, marked)
    return gram


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
    """Compute and label the results of replicates per step, for the model and for each tensor.

    Parameters
    ----------
    gram : array, shape (updates, tensors, vectors, vectors)
        `ledger` of each tensor.
    layout : Layout
        Layout of the tensors.
    replicates : int
        R.
    learning_rate : array, shape (updates,) or ()
        NaN if it is not known.
    steps : int array, shape (updates,), optional
        Default: counted from 0.
    loss_change : array, shape (updates, R), optional
        L(theta_{t+1}) - L(theta_t) of each replicate.
    parameter_norm : array, shape (updates, tensors), optional
        |theta_t|. It determines the rounding error of an update in the dtypes of the layout. The status of an
        update that is not larger than this error is ``unverifiable``. Default: the parameters are exact.

    Returns
    -------
    DataTree
        Groups ``/model`` and ``/tensor`` with `REPLICATE_VARIABLES`. Without hvps the variables of the metric of
        eq. (19) are NaN, and ``stochastic_definite`` is False.

    Raises
    ------
    InputError
        If the shapes do not match, or a learning rate is not positive.
    """
    gram, rate = np.asarray(gram, np.float64), np.asarray(learning_rate, np.float64)
    updates = len(gram)
    _require_ledger(gram, layout, replicates)
    if (rate <= 0).any():
        raise InputError("a learning rate is not positive", remedy="pass learning rates greater than 0")
    changes = np.full((updates, replicates), np.nan) if loss_change is None else np.asarray(loss_change, np.float64)
    if changes.shape != (updates, replicates):
        raise InputError(
            f"loss_change has the wrong shape {changes.shape}",
            remedy=f"pass one value for each update and replicate, shape ({updates}, {replicates})",
        )
    norm = None if parameter_norm is None else np.asarray(parameter_norm, np.float64)
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    rate = np.broadcast_to(rate, (updates,))
    groups = _groups(gram, layout, replicates, (rate, rate[:, None]), norm, roundoff)
    numbers = np.arange(updates) if steps is None else np.asarray(steps, np.int64)
    return _tree(groups, changes, layout, {STEP: numbers})


def label_run(
    table: UpdateTable,
    chunks: Iterable[tuple[NDArray[np.int64], Array, Array]],
    replicates: int,
    replicate_loss: Array,
) -> xr.DataTree:
    """Compute and label the results of the replicates of a logged run, one ledger chunk at a time; see `label`.

    Parameters
    ----------
    table : UpdateTable
        Table of the run. Its Gram ledger is not needed.
    chunks : iterable of (positions, gram, parameter_norm)
        Positions of updates in the table, the ledger of their replicates, and the norms of the parameters of each
        tensor. Together they cover each update once.
    replicates : int
        R.
    replicate_loss : array, shape (updates, R)
        Losses of the states after each replicate, NaN if not logged.

    Returns
    -------
    DataTree

    Notes
    -----
    A replicate is one update from theta_t, even if the log contains only every k-th state.
    """
    own = table.learning_rate[:, None] if table.tensor_learning_rate is None else table.tensor_learning_rate
    rate, own = (np.where(rates > 0, rates, np.nan) for rates in (table.learning_rate, own))
    stored = table.dtypes[of_replicate(REPLICATE_PARAMETER, 0)]
    roundoff = np.array([max(map(unit_roundoff, (tensor.dtype, stored))) for tensor in table.layout.tensors])
    groups: dict[str, Columns] = {}
    for positions, gram, norm in chunks:
        _require_ledger(gram, table.layout, replicates)
        rates = rate[positions], own[positions]
        for name, columns in _groups(gram, table.layout, replicates, rates, norm, roundoff).items():
            for variable, (dimensions, values) in columns.items():
                _, complete = groups.setdefault(name, {}).setdefault(
                    variable, (dimensions, np.empty((len(rate), *values.shape[1:]), values.dtype))
                )
                complete[positions] = values
    attempts = np.zeros(len(rate), np.int64) if table.attempts is None else table.attempts
    labels = {STEP: table.steps, ATTEMPT: (STEP, attempts)}
    tree = _tree(groups, replicate_loss - table.loss[:, None], table.layout, labels)
    if not table.runs:
        return tree
    variables = list(REPLICATE_VARIABLES.values())
    sweeps = {path: split_by_run(tree[path].to_dataset(), table, variables) for path in ("model", "tensor")}
    return xr.DataTree.from_dict(
        {f"/{path}": with_attributes(dataset, variables) for path, dataset in sweeps.items()}
    )


def _require_ledger(gram: Array, layout: Layout, replicates: int) -> None:
    counts = [len(replicate_vectors(replicates, hvp)) for hvp in (False, True)]
    shapes = [(len(layout.tensors), count, count) for count in counts]
    if replicates < 1 or gram.shape[1:] not in shapes:
        raise InputError(
            f"the ledger has shape {gram.shape}, which does not match {replicates} replicates and "
            f"{len(layout.tensors)} tensors",
            remedy="pass the output of natgrad.results.replicates.ledger: (updates, tensors, vectors, vectors)",
        )


# Computation -------------------------------------------------------------------------------------------------


def _groups(
    gram: Array,
    layout: Layout,
    replicates: int,
    rates: tuple[Array, Array],
    parameter_norm: Array | None,
    roundoff: Array,
) -> dict[str, Columns]:
    """Compute the variables of the model and of the tensors, with their learning rates."""
    sizes = np.array([tensor.size for tensor in layout.tensors])
    with np.errstate(all="ignore"):
        # The mean length is at most the root mean square length.
        length = np.sqrt(gram[..., 1, 1] + _spread(gram, replicates))
        floor = np.zeros(length.shape)
        if parameter_norm is not None:
            floor = geometry.displacement_floor(parameter_norm, length, roundoff)
        return {
            "model": _columns(Draws(gram, sizes, rates[0][:, None], replicates, floor, model=True)),
            "tensor": _columns(Draws(gram, sizes, rates[1], replicates, floor, model=False)),
        }


def _spread(gram: Array, replicates: int) -> Array:
    """Return the mean square of the deviations of the displacements from their mean."""
    squares = np.diagonal(gram, axis1=-2, axis2=-1)[..., MEANS : MEANS + replicates]
    return np.asarray(squares.mean(axis=-1))


def _columns(draws: Draws) -> Columns:
    columns: Columns = {}
    for variable in DECLARED:
        dimensions = tuple(axis for axis in variable.dimensions if axis != TENSOR or draws.status.ndim > 1)
        if variable.computed_from is ComputedFrom.DRAWS:
            columns[variable.name] = (dimensions, np.asarray(variable.compute(draws)))
        elif variable.computed_from is ComputedFrom.MEAN_UPDATE:
            value, error = draws.statistics[variable.name]
            columns[variable.name] = (dimensions, value)
            if variable.error:
                columns[error_of(variable).name] = (dimensions, error)
    return columns


def _of_losses(changes: Array) -> Columns:
    columns: Columns = {}
    for variable in DECLARED:
        if variable.computed_from is ComputedFrom.LOSS_CHANGES:
            columns[variable.name] = (variable.dimensions, np.asarray(variable.compute(changes)))
        elif variable.computed_from is ComputedFrom.MEAN_LOSS_CHANGE:
            value, error = jackknife(variable.compute, changes.T)
            columns[variable.name] = (variable.dimensions, value)
            if variable.error:
                columns[error_of(variable).name] = (variable.dimensions, error)
    return columns


def _tree(groups: Mapping[str, Columns], changes: Array, layout: Layout, labels: dict[str, Any]) -> xr.DataTree:
    replicates = np.arange(changes.shape[1])
    complete = {"model": groups["model"] | _of_losses(changes), "tensor": groups["tensor"]}
    names = {"model": {}, "tensor": {TENSOR: np.array(layout.names, dtype=str)}}
    datasets = {}
    for group, columns in complete.items():
        variables = {name: columns[name] for name in REPLICATE_VARIABLES if name in columns}
        dataset = xr.Dataset(variables, {**labels, REPLICATE: replicates, **names[group]})
        datasets[f"/{group}"] = with_attributes(dataset, list(REPLICATE_VARIABLES.values()))
    return xr.DataTree.from_dict(datasets)
