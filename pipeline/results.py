"""Ledger to labelled results: the only file that labels with xarray.

`label` turns ledger arrays into a DataTree with the groups ``/model`` (tensors summed) and ``/tensor``, in the
names of `pipeline.schema`; the formulas are `pipeline.geometry`.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline import discrete_time, geometry
from pipeline import windows as windowed
from pipeline.geometry import Pair
from pipeline.preconditioner import condition_number
from pipeline.repository import holds, place_of_store
from pipeline.schema import (
    ATTEMPT,
    DESCENT,
    DESCENTS,
    DIMENSIONS,
    GAMMA,
    HVP,
    RUN,
    STEP,
    TENSOR,
    VARIABLES,
    WINDOW,
    InputError,
    Layout,
    ShiftedMetric,
    Status,
    unit_roundoff,
)
from pipeline.store.disk import folder_aside, replace_folder
from pipeline.store.group import zarr_store

__all__ = ["GAMMAS", "Inputs", "Optimizer", "by_run", "label", "read", "runs", "write"]

GAMMAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Weights of the one-parameter family (eq. 22) that results carry where none are asked for."""

_RATES = {
    True: "groups of the optimizer have several: each tensor has its own, and g of the tensor is per that",
    False: "groups of the optimizer have several: that logged or given for the step, else the largest of the "
    "tensors'; g of the model is the displacement per this one, so that y.g > 0 says that the update descends, and "
    "the ratios of the others to it are a part of the rule. Angle and condition number do not depend on it; "
    "update_norm, alignment, eigenvalues and bounds are per this one",
}
"""What ``learning_rate`` is of the tensors, and of the model."""

LONGEST_WINDOW = 256
"""Windows up to this length, and to half the run, are tried where no longer one is asked for."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Optimizer:
    """The metric that an adaptive optimizer used in each update.

    Attributes
    ----------
    smallest, largest : float64 array, shape (rows, tensors)
        Its eigenvalues, NaN where not known.
    learning_rate : float64 array, shape (rows, tensors)
        Of the group of each tensor.
    """

    smallest: Array
    largest: Array
    learning_rate: Array


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
        eta of the model, NaN where neither logged nor given.
    dtypes : mapping of str to str
        Stored dtypes of ``gradient``, and of ``hvp`` where it was logged.
    attempts : int64 array, shape (rows,), optional
        Restarts before each row was logged; none where not given.
    hessian_min_eigenvalue : float64 array, shape (rows,), optional
        Smallest eigenvalue of the Hessian, NaN where not logged.
    runs : tuple of str, optional
        Names of the runs of a sweep.
    run : int64 array, shape (rows,), optional
        Position of each row's run in them; rows of a run lie together, in order.
    loss_time_derivative : float64 array, shape (rows,), optional
        dL/dt of a loss that changes with time (section 2.1), NaN where not logged. A run that logs it has the model
        extended by time: y has the element -dL/dt more, and g the element 1.
    optimizer : Optimizer, optional
        Where its state was stored.
    tensor_learning_rate : float64 array, shape (rows, tensors), optional
        eta of each tensor, where groups of the optimizer have several; that of the model where not given.
    """

    gram: Array
    vectors: tuple[str, ...]
    layout: Layout
    steps: NDArray[np.int64]
    spans: NDArray[np.int64]
    loss: Array
    next_loss: Array
    learning_rate: Array
    dtypes: Mapping[str, str]
    attempts: NDArray[np.int64] | None = None
    hessian_min_eigenvalue: Array | None = None
    runs: tuple[str, ...] = ()
    run: NDArray[np.int64] | None = None
    loss_time_derivative: Array | None = None
    optimizer: Optimizer | None = None
    tensor_learning_rate: Array | None = None

    def whole(self, m: int) -> NDArray[np.bool_]:
        """Whether each row is the first of m updates, each from the state that the one before led to."""
        if m == 1:
            return np.ones(len(self.steps), bool)
        return np.pad(_windows(self.follows(), m - 1).all(axis=-1), (0, m - 1))

    def follows(self) -> NDArray[np.bool_]:
        """Whether each row but the first starts from the state that the one before led to, shape (rows - 1,)."""
        follows: NDArray[np.bool_] = self.steps[:-1] + self.spans[:-1] == self.steps[1:]
        if self.run is not None:
            follows &= self.run[:-1] == self.run[1:]
        return follows

    def extended(self) -> NDArray[np.bool_]:
        """Whether the model of each row is extended by time: its run logs how the loss changes with it."""
        if self.loss_time_derivative is None:
            return np.zeros(len(self.steps), bool)
        runs = np.zeros(len(self.steps), np.int64) if self.run is None else self.run
        return np.isin(runs, runs[~np.isnan(self.loss_time_derivative)])

    def of_runs(self) -> list[slice]:
        """Rows of each run of a sweep; all rows where it is one run."""
        if self.run is None:
            return [slice(0, len(self.steps))]
        bounds = np.searchsorted(self.run, range(len(self.runs) + 1))
        return [slice(int(first), int(stop)) for first, stop in itertools.pairwise(bounds)]


@dataclass(frozen=True)
class _Descent:
    """How a negative gradient is made of the ledger: with half of which vector, and corrected or not (eq. 12)."""

    half: str | None = None
    corrected: bool = False


_DESCENTS = {
    "gradient": _Descent(),
    "corrected": _Descent(corrected=True),
    "trapezoid": _Descent(half="gradient_change", corrected=True),
    "taylor": _Descent(half=HVP),
}


@dataclass(frozen=True)
class _Level:
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
        run, or a restart, is NaN with status ``unverifiable``. The search for the smallest effective window goes
        to the longest of them, and at least to `LONGEST_WINDOW` or half the run.
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
        levels = {name: _levels(inputs, _DESCENTS[name]) for name in DESCENTS}
        groups = {
            "/model": _dataset(inputs, {name: model for name, (model, _) in levels.items()}, gammas, windows),
            "/tensor": _dataset(inputs, {name: tensors for name, (_, tensors) in levels.items()}, gammas, windows),
        }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"Conventions": "CF-1.11", **(provenance or {}), "versions": versions()}
    return tree


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    packages = ("natgrad-pipeline", "numpy", "numba", "xarray", "zarr", "dask")
    return {package: importlib.metadata.version(package) for package in packages}


# From the ledger to pairs of vectors -------------------------------------------------------------------------


def _levels(inputs: Inputs, descent: _Descent) -> tuple[_Level, _Level]:
    """Model and tensors, compared with one negative gradient."""
    gram, vectors, layout = inputs.gram, inputs.vectors, inputs.layout
    half, logged = descent.half, descent.half is None or descent.half in vectors
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
    tensors = _Level(
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
    model = _Level(
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
    model = _with_time(model, inputs, descent)
    if not descent.corrected:
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


def _corrected(level: _Level, change: Array, whole: Pair, whole_floor: Array) -> _Level:
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


def _with_time(model: _Level, inputs: Inputs, descent: _Descent) -> _Level:
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
        known=model.known & ~(extended & (np.isnan(slope) | (descent.half == HVP))),
        gradient_norm=norm if norm is None else np.where(extended, np.hypot(norm, slope), norm),
    )


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
    inputs: Inputs, levels: Mapping[str, _Level], gammas: Sequence[float], windows: Sequence[int]
) -> xr.Dataset:
    leading = levels["gradient"].dimensions
    full = (*leading, DESCENT, WINDOW)
    columns: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "loss": ((STEP,), inputs.loss),
        "learning_rate": _learning_rate(inputs, leading),
        "step_span": ((STEP,), inputs.spans),
        "parameter_norm": (leading, levels["gradient"].parameter_norm),
        "loss_average": ((STEP, WINDOW), _stack([_loss_average(inputs, m) for m in windows])),
        "loss_decrease": ((STEP, WINDOW), _stack([_loss_decrease(inputs, m) for m in windows])),
    }
    if inputs.optimizer is not None:
        used = inputs.optimizer
        of_tensors, of_model = condition_number(used.smallest, used.largest, used.learning_rate)
        kappa = of_tensors if TENSOR in leading else of_model
        columns["preconditioner_condition_number"] = (leading, kappa)
    cells = [[_metrics(inputs, level, name, m, gammas) for m in windows] for name, level in levels.items()]
    for name in cells[0][0]:
        dimensions = (*full, GAMMA) if name.startswith("family_") else full
        axis = len(leading)
        stacked = np.stack([np.stack([cell[name] for cell in row], axis=axis) for row in cells], axis=axis)
        columns[name] = (dimensions, stacked)
    # The update does not depend on which gradient it is compared with.
    columns["update_norm"] = ((*leading, WINDOW), columns["update_norm"][1][..., 0, :])
    if TENSOR not in leading:
        columns["shifted_metric"] = (
            full,
            _shifted_metric(inputs, {name: values for name, (_, values) in columns.items()}, windows),
        )
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
    if inputs.runs:
        dataset = by_run(dataset, inputs)
    described = _described(dataset.assign(_smallest_windows(inputs, levels, max(windows))))
    if inputs.tensor_learning_rate is not None:
        described["learning_rate"].attrs["comment"] = _RATES[TENSOR in leading]
    return described


def _learning_rate(inputs: Inputs, leading: tuple[str, ...]) -> tuple[tuple[str, ...], Array]:
    own = inputs.tensor_learning_rate
    return ((STEP,), inputs.learning_rate) if own is None or TENSOR not in leading else (leading, own)


def _smallest_windows(inputs: Inputs, levels: Mapping[str, _Level], asked: int) -> dict[str, xr.Variable]:
    """Smallest windows of each run, and how many windows support them."""
    found = [_smallest_window(inputs, levels, rows, asked) for rows in inputs.of_runs()]
    leading = levels["gradient"].dimensions[1:]
    variables = {}
    for name in found[0]:
        dimensions = (*leading, DESCENT) if name.startswith("effective") else ()
        values = [of_run[name] for of_run in found]
        variables[name] = (
            xr.Variable((RUN, *dimensions), np.stack(values)) if inputs.runs else xr.Variable(dimensions, values[0])
        )
    return variables


def _smallest_window(
    inputs: Inputs, levels: Mapping[str, _Level], rows: slice, asked: int
) -> dict[str, NDArray[Any]]:
    count = rows.stop - rows.start
    longest = max(asked, min(LONGEST_WINDOW, count // 2))
    follows = inputs.follows()[rows][: count - 1]
    effective = [
        windowed.smallest_effective(
            windowed.Rows(
                level.pair[rows],
                level.rate[rows],
                level.update_floor[rows],
                level.finite[rows],
                level.known[rows],
            ),
            follows,
            longest,
        )
        for level in levels.values()
    ]
    decreasing = windowed.smallest_decreasing(inputs.loss[rows], inputs.next_loss[rows], follows, longest)
    return {
        "effective_window": np.stack([smallest for smallest, _ in effective], axis=-1),
        "effective_window_count": np.stack([support for _, support in effective], axis=-1),
        "decreasing_window": np.asarray(decreasing[0]),
        "decreasing_window_count": np.asarray(decreasing[1]),
    }


def by_run(dataset: xr.Dataset, inputs: Inputs) -> xr.Dataset:
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
    inputs: Inputs, level: _Level, descent: str, m: int, gammas: Sequence[float]
) -> dict[str, NDArray[Any]]:
    """Variables of one descent and one window, each of shape (rows, ...)."""
    per_tensor = TENSOR in level.dimensions
    rate, pair = level.rate, level.pair
    window = geometry.window(pair, m)
    update_floor = _rolling_norm(level.update_floor, m)
    status = geometry.status(
        window,
        # The slowest rate stands for the window: it is NaN where one is missing, not positive where one is not.
        learning_rate=_windows(rate, m).min(axis=-1),
        finite=_windows(level.finite, m).all(axis=-1),
        # An update no larger than its own rounding cannot be told from it.
        verifiable=_windows(level.known, m).all(axis=-1) & ~(update_floor >= window.update_norm),
    )

    angle = geometry.angle(window)
    gradient_floor = _rolling_norm(level.gradient_floor, m) / m
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
        # The gradient's own is known without a learning rate too.
        "gradient_norm": _rolling_norm(level.gradient_norm, m) / m
        if level.gradient_norm is not None
        else window.gradient_norm,
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
        # Nor has it a Hessian of its own: what the others' updates do to its gradient is in the model's alone.
        for name, bound in _learning_rate_bounds(inputs, window, m).items():
            values[name] = np.where(effective & (descent != "gradient"), bound, np.nan)
    complete = inputs.whole(m)
    filled = {name: _where_whole(value, complete, np.nan) for name, value in values.items()}
    filled["effective"] = _where_whole(effective, complete, False)
    filled["status"] = _where_whole(status, complete, np.int8(Status.UNVERIFIABLE))
    return filled


def _learning_rate_bounds(inputs: Inputs, window: Pair, m: int) -> dict[str, Array]:
    """Bounds of eq. (18) for the Hessian of the averaged loss, whose blocks are those of the steps over m."""
    if inputs.hessian_min_eigenvalue is None:
        weakest = np.full(window.alignment.shape, np.nan)
    else:
        # The Hessian of the parameters extended by time is another one.
        of_parameters = np.where(inputs.extended(), np.nan, inputs.hessian_min_eigenvalue)
        weakest = _windows(of_parameters, m).min(axis=-1) / m
    # g is the mean of as many updates as a row spans, and moves by that many learning rates.
    spans = _windows(inputs.spans, m).max(axis=-1)
    supremum, optimal = discrete_time.learning_rate_bounds(window, weakest)
    return {"learning_rate_bound": supremum / spans, "learning_rate_bound_optimal": optimal / spans}


def _shifted_metric(
    inputs: Inputs, columns: Mapping[str, NDArray[Any]], windows: Sequence[int]
) -> NDArray[np.int8]:
    """Tell what M + eta H is for every row, descent and window, from the columns of the model."""
    bound, optimal = columns["learning_rate_bound"], columns["learning_rate_bound_optimal"]
    largest = _stack(
        [_where_whole(_windows(inputs.learning_rate, m).max(axis=-1), inputs.whole(m), np.nan) for m in windows]
    )[:, None]
    # g' (Mbar + eta H) g is the y.g of the true gradient, with every discrete one.
    gradient = columns["alignment"][:, [DESCENTS.index("gradient")]]
    conditions = [
        (np.isnan(bound), ShiftedMetric.UNKNOWN),
        (gradient <= 0, ShiftedMetric.INDEFINITE),
        (largest < optimal, ShiftedMetric.DEFINITE_OPTIMAL),
        (largest < bound, ShiftedMetric.DEFINITE),
    ]
    where = [np.broadcast_to(condition, bound.shape) for condition, _ in conditions]
    return np.select(where, [np.int8(flag) for _, flag in conditions], np.int8(ShiftedMetric.UNDECIDED))


def _described(dataset: xr.Dataset) -> xr.Dataset:
    for name, variable in VARIABLES.items():
        if name in dataset:
            dataset[name].attrs = {
                "long_name": variable.long_name,
                "units": variable.units,
                "equation": variable.equation,
            }
    flags: dict[str, type[Status] | type[ShiftedMetric]] = {"status": Status, "shifted_metric": ShiftedMetric}
    for name in flags.keys() & dataset.keys():
        dataset[name].attrs |= {
            "flag_values": [int(flag) for flag in flags[name]],
            "flag_meanings": " ".join(flag.name.lower() for flag in flags[name]),
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
        paths = [group.path.strip("/") for group in tree.leaves]
        groups = {path: tree[path].to_dataset().sel({RUN: name}).isel({STEP: steps}) for path in paths}
        return xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})

    return {str(name): of(str(name)) for name in tree["model"].to_dataset()[RUN].values}


def write(tree: xr.DataTree, path: Path) -> None:
    """Write results in place of older ones, one writer at a time: aside first, then on disk, then under the name.

    The metadata are consolidated, so ``xarray.open_datatree(path)`` reads them in one go.
    """
    with folder_aside(path) as aside:
        with warnings.catch_warnings():
            # Zarr warns that other programs may not read consolidated metadata; they then read the plain ones.
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            tree.to_zarr(aside, zarr_format=3, consolidated=True, mode="w")
        if not holds(path, aside):
            replace_folder(aside, path, "zarr.json")


def read(path: Path, version: str | None = None) -> xr.DataTree:
    """Open the results of a run.

    Parameters
    ----------
    path : Path
    version : str, optional
        Of an Icechunk repository: id, tag or time of the version to read; the newest where not given.

    Raises
    ------
    InputError
        Where there are none.
    """
    path = place_of_store(path, version)
    try:
        return xr.open_datatree(zarr_store(path), engine="zarr")
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise InputError(
            "no results here", where=str(path), remedy="compute them first: natgrad analyze OUT"
        ) from error
