"""Ledger to labelled results: the only file that labels with xarray.

`label` turns ledger arrays into a DataTree with the groups ``/model`` (tensors summed) and ``/tensor``, in the
names of `pipeline.schema`; the formulas are `pipeline.geometry`.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline import geometry
from pipeline.geometry import Pair
from pipeline.schema import (
    ATTEMPT,
    DESCENT,
    DESCENTS,
    DIMENSIONS,
    GAMMA,
    RUN,
    STEP,
    TENSOR,
    VARIABLES,
    WINDOW,
    InputError,
    Layout,
    Status,
    unit_roundoff,
)
from pipeline.store.disk import replace_folder

__all__ = ["GAMMAS", "Inputs", "label", "read", "runs", "write"]

GAMMAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Weights of the one-parameter family (eq. 22) that results carry where none are asked for."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """What results are made of, all of it small: nothing scales with the number of elements.

    Attributes
    ----------
    gram : float64 array, shape (rows, tensors, vectors, vectors)
        The Gram ledger.
    vectors : tuple of str
        Its vectors.
    layout : Layout
    steps, spans : int64 array, shape (rows,)
        Step before the update, and updates to the next logged state.
    loss, next_loss : float64 array, shape (rows,)
        Before and after the update, NaN where not logged.
    learning_rate : float64 array, shape (rows,)
        NaN where neither logged nor given.
    gradient_dtype : str
        Stored dtype of the gradient.
    attempts : int64 array, shape (rows,), optional
        Restarts before each row was logged; none where not given.
    runs : tuple of str, optional
        Names of the runs of a sweep.
    run : int64 array, shape (rows,), optional
        Position of each row's run in them; rows of a run lie together, in order.
    """

    gram: Array
    vectors: tuple[str, ...]
    layout: Layout
    steps: NDArray[np.int64]
    spans: NDArray[np.int64]
    loss: Array
    next_loss: Array
    learning_rate: Array
    gradient_dtype: str
    attempts: NDArray[np.int64] | None = None
    runs: tuple[str, ...] = ()
    run: NDArray[np.int64] | None = None

    def whole(self, m: int) -> NDArray[np.bool_]:
        """Whether each row is the first of m updates, each from the state that the one before led to."""
        follows = self.steps[:-1] + self.spans[:-1] == self.steps[1:]
        if self.run is not None:
            follows &= self.run[:-1] == self.run[1:]
        if m == 1:
            return np.ones(len(self.steps), bool)
        return np.pad(_windows(follows, m - 1).all(axis=-1), (0, m - 1))


@dataclass(frozen=True)
class _Level:
    """Model or tensors: the pair of every row, what rounding can move it by, and the dimensions."""

    dimensions: tuple[str, ...]
    pair: Pair
    finite: NDArray[np.bool_]
    update_floor: Array
    gradient_norm: Array
    parameter_norm: Array


def label(
    inputs: Inputs,
    *,
    gammas: Sequence[float] = GAMMAS,
    windows: Sequence[int] = (1,),
    provenance: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Compute and label all results of a run.

    Parameters
    ----------
    inputs : Inputs
    gammas : sequence of float
        Positive weights of the one-parameter family.
    windows : sequence of int
        Windows m of consecutive logged updates; 1 is always there. A row whose window passes the end of the
        run, or a restart, is NaN with status ``unverifiable``.
    provenance : mapping, optional
        Attributes of the root.

    Raises
    ------
    InputError
        Where a gamma is not positive, or a window is not a positive number of updates of the run.
    """
    rows = np.bincount(inputs.run).max() if inputs.run is not None else len(inputs.steps)
    windows = sorted({1, *windows})
    gammas = sorted({float(gamma) for gamma in gammas})
    if not gammas or not all(np.isfinite(gamma) and gamma > 0 for gamma in gammas):
        raise InputError(f"gamma must be positive, got {gammas}", where="--gamma", remedy="give values above 0")
    if windows[0] < 1 or windows[-1] > rows:
        raise InputError(
            f"windows {windows} do not fit a run of {rows} updates",
            where="--window",
            remedy=f"give numbers of updates from 1 to {rows}",
        )
    # A run that diverged holds infinities; what follows from them is NaN, and the status says why.
    with np.errstate(all="ignore"):
        model, tensors = _levels(inputs)
        groups = {
            "/model": _dataset(inputs, model, model, gammas, windows),
            "/tensor": _dataset(inputs, tensors, model, gammas, windows),
        }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"Conventions": "CF-1.11", **(provenance or {}), "versions": versions()}
    return tree


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    packages = ("natgrad-pipeline", "numpy", "numba", "xarray", "zarr", "dask")
    return {package: importlib.metadata.version(package) for package in packages}


# From the ledger to pairs of vectors -------------------------------------------------------------------------


def _levels(inputs: Inputs) -> tuple[_Level, _Level]:
    gram, layout = inputs.gram, inputs.layout
    index = {name: position for position, name in enumerate(inputs.vectors)}

    def norm(vector: str) -> Array:
        return np.sqrt(gram[..., index[vector], index[vector]])

    # A row that spans k updates has moved by k of them: the update g is their mean (eq. 2).
    rate = (inputs.learning_rate * inputs.spans)[:, None]
    sizes = np.array([tensor.size for tensor in layout.tensors])
    roundoff = np.array([unit_roundoff(tensor.dtype) for tensor in layout.tensors])
    pair = geometry.pair(gram, inputs.vectors, rate, sizes)
    displacement_floor = geometry.displacement_floor(norm("parameter"), norm("displacement"), roundoff)
    update_floor = displacement_floor / rate
    tensors = _Level(
        (STEP, TENSOR),
        pair,
        np.isfinite(norm("displacement") + norm("gradient")),
        update_floor,
        norm("gradient"),
        norm("parameter"),
    )
    model = _Level(
        (STEP,),
        geometry.direct_sum([pair[:, tensor] for tensor in range(len(layout.tensors))]),
        np.asarray(tensors.finite.all(axis=1)),
        _norm(tensors.update_floor, axis=1),
        _norm(tensors.gradient_norm, axis=1),
        _norm(tensors.parameter_norm, axis=1),
    )
    return model, tensors


def _norm(values: Array, axis: int) -> Array:
    return np.asarray(np.sqrt(np.square(values).sum(axis=axis)))


# Windows -----------------------------------------------------------------------------------------------------


def _windows(values: NDArray[Any], m: int) -> NDArray[Any]:
    """View of m consecutive rows on a last axis of its own."""
    return np.lib.stride_tricks.sliding_window_view(values, m, axis=0)


def _rolling_norm(values: Array, m: int) -> Array:
    return np.asarray(np.sqrt(_windows(np.square(values), m).sum(axis=-1)))


def _where_whole(values: NDArray[Any], whole: NDArray[np.bool_], fill: Any) -> NDArray[Any]:
    """Fill the rows whose window is not whole: at the end of a run there are none, before a restart wrong ones."""
    missing = len(whole) - len(values)
    values = np.concatenate([values, np.full((missing, *values.shape[1:]), fill, values.dtype)])
    values[~whole] = fill
    return values


# From pairs to variables -------------------------------------------------------------------------------------


def _dataset(
    inputs: Inputs, level: _Level, model: _Level, gammas: Sequence[float], windows: Sequence[int]
) -> xr.Dataset:
    leading = level.dimensions
    full = (*leading, DESCENT, WINDOW)
    columns: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "loss": ((STEP,), inputs.loss),
        "learning_rate": ((STEP,), inputs.learning_rate),
        "step_span": ((STEP,), inputs.spans),
        "parameter_norm": (leading, level.parameter_norm),
        "loss_average": ((STEP, WINDOW), _stack([_loss_average(inputs, m) for m in windows])),
        "loss_decrease": ((STEP, WINDOW), _stack([_loss_decrease(inputs, m) for m in windows])),
    }
    cells = [[_metrics(inputs, level, model, descent, m, gammas) for m in windows] for descent in DESCENTS]
    for name in cells[0][0]:
        dimensions = (*full, GAMMA) if name.startswith("family_") else full
        axis = len(leading)
        stacked = np.stack([np.stack([cell[name] for cell in row], axis=axis) for row in cells], axis=axis)
        columns[name] = (dimensions, stacked)
    # The update does not depend on which gradient it is compared with.
    columns["update_norm"] = ((*leading, WINDOW), columns["update_norm"][1][..., 0, :])
    coordinates: dict[str, Any] = {
        STEP: inputs.steps,
        DESCENT: np.array(DESCENTS, dtype=object),
        WINDOW: np.array(windows, dtype=np.int64),
        GAMMA: np.array(gammas),
    }
    if TENSOR in leading:
        coordinates[TENSOR] = np.array(inputs.layout.names, dtype=object)
    attempts = np.zeros(len(inputs.steps), np.int64) if inputs.attempts is None else inputs.attempts
    coordinates[ATTEMPT] = (STEP, attempts)
    dataset = xr.Dataset({name: columns[name] for name in VARIABLES if name in columns}, coordinates)
    return _described(_by_run(dataset, inputs) if inputs.runs else dataset)


def _by_run(dataset: xr.Dataset, inputs: Inputs) -> xr.Dataset:
    """Give a sweep a dimension for its runs: what a run has not logged at a step of another is missing."""
    steps, position = np.unique(inputs.steps, return_inverse=True)

    def spread(variable: xr.Variable, fill: Any) -> tuple[tuple[Any, ...], NDArray[Any]]:
        values = np.full((len(inputs.runs), len(steps), *variable.shape[1:]), fill, variable.dtype)
        values[inputs.run, position] = variable.values
        return (RUN, *variable.dims), values

    fills = {"f": np.nan, "b": False, "i": 0}
    columns = {
        name: spread(variable, Status.NOT_LOGGED if name == "status" else fills[variable.dtype.kind])
        for name, variable in dataset.variables.items()
        if name in dataset.data_vars or name == ATTEMPT
    }
    labels = {name: coordinate for name, coordinate in dataset.coords.items() if name not in (STEP, ATTEMPT)}
    runs = np.array(inputs.runs, dtype=object)
    attempts = columns.pop(ATTEMPT)
    return xr.Dataset(columns, {**labels, RUN: runs, STEP: steps, ATTEMPT: attempts})


def _stack(per_window: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(per_window, axis=-1)


def _loss_average(inputs: Inputs, m: int) -> Array:
    return _where_whole(_windows(inputs.loss, m).mean(axis=-1), inputs.whole(m), np.nan)


def _loss_decrease(inputs: Inputs, m: int) -> Array:
    return _where_whole(_decrease(inputs, m), inputs.whole(m), np.nan)


def _decrease(inputs: Inputs, m: int) -> Array:
    """L(t) - L(t+m) of all m rows that follow each other, eq. (3)."""
    return inputs.loss[: len(inputs.loss) - m + 1] - inputs.next_loss[m - 1 :]


def _metrics(
    inputs: Inputs, level: _Level, model: _Level, descent: str, m: int, gammas: Sequence[float]
) -> dict[str, NDArray[Any]]:
    """Variables of one descent and one window, each of shape (rows, ...)."""
    rows, per_tensor = len(inputs.steps), level is not model
    rate, change, whole = inputs.learning_rate * inputs.spans, inputs.next_loss - inputs.loss, model.pair
    known = np.isfinite(change) if descent == "corrected" else np.ones(rows, dtype=bool)
    if per_tensor:
        rate, change, whole, known = rate[:, None], change[:, None], whole[:, None], known[:, None]
    pair = geometry.corrected(level.pair, rate, change, whole) if descent == "corrected" else level.pair

    window = geometry.window(pair, m)
    update_floor = _rolling_norm(level.update_floor, m)
    gradient_norm = _rolling_norm(level.gradient_norm, m) / m
    status = geometry.status(
        window,
        # The slowest rate stands for the window: it is NaN where one is missing, not positive where one is not.
        learning_rate=_windows(rate, m).min(axis=-1),
        finite=_windows(level.finite, m).all(axis=-1),
        # An update no larger than its own rounding cannot be told from it.
        verifiable=_windows(known, m).all(axis=-1) & ~(update_floor >= window.update_norm),
    )

    angle = geometry.angle(window)
    gradient_floor = unit_roundoff(inputs.gradient_dtype) * gradient_norm
    uncertainty = geometry.angle_uncertainty(window, update_floor, gradient_floor)
    has_angle = status <= Status.OBTUSE
    maximum, middle, minimum = geometry.eigenvalues(window)
    infimum, supremum = geometry.eigenvalue_bounds(window)
    family = geometry.family_eigenvalues(window, np.array(gammas))
    metric = {
        "condition_number": geometry.condition_number(window),
        "similarity": geometry.similarity(window),
        "eigenvalue_max": maximum,
        "eigenvalue_mid": middle,
        "eigenvalue_min": minimum,
        "eigenvalue_max_infimum": infimum,
        "eigenvalue_min_supremum": supremum,
        "family_eigenvalue_max": family[0],
        "family_eigenvalue_mid": family[1],
        "family_eigenvalue_min": family[2],
        "family_condition_number": geometry.family_condition_number(window, np.array(gammas)),
    }
    effective = status == Status.EFFECTIVE
    values: dict[str, NDArray[Any]] = {
        "update_norm": window.update_norm,
        "gradient_norm": window.gradient_norm if descent == "corrected" else gradient_norm,
        "alignment": window.alignment,
        "cosine": np.where(has_angle, geometry.cosine(window), np.nan),
        "angle": np.where(has_angle, angle, np.nan),
        "angle_uncertainty": np.where(has_angle, uncertainty, np.nan),
    }
    for name, value in metric.items():
        mask = effective[..., None] if name.startswith("family_") else effective
        values[name] = np.where(mask, value, np.nan)
    if not per_tensor:
        # A tensor has no loss of its own to compare its share with, so this one belongs to the model.
        share = _windows(rate * pair.alignment, m).sum(axis=-1)
        decrease = _decrease(inputs, m)
        residual = (share - decrease) / np.abs(decrease)
        values["discrete_identity_residual"] = np.where(np.isfinite(residual), residual, np.nan)
    complete = inputs.whole(m)
    filled = {name: _where_whole(value, complete, np.nan) for name, value in values.items()}
    filled["effective"] = _where_whole(effective, complete, False)
    filled["status"] = _where_whole(status, complete, np.int8(Status.UNVERIFIABLE))
    return filled


def _described(dataset: xr.Dataset) -> xr.Dataset:
    for name, variable in VARIABLES.items():
        if name in dataset:
            dataset[name].attrs = {
                "long_name": variable.long_name,
                "units": variable.units,
                "equation": variable.equation,
            }
    dataset["status"].attrs |= {
        "flag_values": [int(status) for status in Status],
        "flag_meanings": " ".join(status.name.lower() for status in Status),
    }
    for name, meaning in DIMENSIONS.items():
        if name in dataset.coords:
            dataset[name].attrs = {"long_name": meaning, "units": "1"}
    return dataset


# On disk -----------------------------------------------------------------------------------------------------


def runs(tree: xr.DataTree) -> dict[str, xr.DataTree]:
    """Results of each run of a sweep by itself, without the steps that only others have; those of one run as is."""
    if RUN not in tree["model"].dims:
        return {"": tree}
    logged = (tree["model"]["status"] != Status.NOT_LOGGED).all([DESCENT, WINDOW])

    def of(name: str) -> xr.DataTree:
        steps = logged.sel({RUN: name}).values
        groups = {
            path: tree[path].to_dataset().sel({RUN: name}).isel({STEP: steps}) for path in ("model", "tensor")
        }
        return xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})

    return {str(name): of(str(name)) for name in tree["model"].to_dataset()[RUN].values}


def write(tree: xr.DataTree, path: Path) -> None:
    """Write results in place of older ones, one writer at a time: aside first, then on disk, then under the name.

    The metadata are consolidated, so ``xarray.open_datatree(path)`` reads them in one go.
    """
    aside = path.with_name(f".{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    with warnings.catch_warnings():
        # Zarr warns that other programs may not read consolidated metadata; they then read the plain ones.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        tree.to_zarr(aside, zarr_format=3, consolidated=True, mode="w")
    replace_folder(aside, path)


def read(path: Path) -> xr.DataTree:
    """Open the results of a run.

    Raises
    ------
    InputError
        Where there are none.
    """
    try:
        return xr.open_datatree(path, engine="zarr")
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            "no results here", where=str(path), remedy="compute them first: natgrad analyze OUT"
        ) from error
