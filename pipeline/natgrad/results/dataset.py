"""Ledger to labelled results: the only file that labels with xarray.

`label` turns ledger arrays into a DataTree with the groups ``/model`` (tensors summed) and ``/tensor``, in the
names of `natgrad.schema.variables`; the pairs are made in `natgrad.results.pairs`, the formulas are those of
`natgrad.theory.geometry`.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.results.pairs import Level, model_and_tensors
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.schema.names import ATTEMPT, DESCENT, DESCENTS, GAMMA, RUN, STEP, TENSOR, WINDOW
from natgrad.schema.variables import DIMENSIONS, VARIABLES, ShiftedMetric, Status
from natgrad.storage import Storage
from natgrad.store import require_version
from natgrad.theory import discrete_time, geometry
from natgrad.theory import windows as windowed
from natgrad.theory.geometry import Pair
from natgrad.theory.preconditioners import condition_number

__all__ = ["GAMMAS", "by_run", "label", "read", "runs", "write"]

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


def label(
    inputs: UpdateTable,
    *,
    gammas: Sequence[float] = GAMMAS,
    windows: Sequence[int] = (1,),
    provenance: Mapping[str, Any] | None = None,
) -> xr.DataTree:
    """Compute and label all results of a run.

    Parameters
    ----------
    inputs : UpdateTable
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
        levels = {name: model_and_tensors(inputs, name) for name in DESCENTS}
        groups = {
            "/model": _dataset(inputs, {name: model for name, (model, _) in levels.items()}, gammas, windows),
            "/tensor": _dataset(inputs, {name: tensors for name, (_, tensors) in levels.items()}, gammas, windows),
        }
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {
        "Conventions": "CF-1.11",
        **(provenance or {}),
        "versions": versions(),
        "layout_version": LAYOUT_VERSION,
    }
    return tree


def versions() -> dict[str, str]:
    """Versions of this package and of those that the numbers depend on."""
    packages = ("natgrad-pipeline", "numpy", "numba", "xarray", "zarr", "dask")
    return {package: importlib.metadata.version(package) for package in packages}


# From pairs to variables -------------------------------------------------------------------------------------


def _dataset(
    inputs: UpdateTable, levels: Mapping[str, Level], gammas: Sequence[float], windows: Sequence[int]
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


def _learning_rate(inputs: UpdateTable, leading: tuple[str, ...]) -> tuple[tuple[str, ...], Array]:
    own = inputs.tensor_learning_rate
    return ((STEP,), inputs.learning_rate) if own is None or TENSOR not in leading else (leading, own)


def _smallest_windows(inputs: UpdateTable, levels: Mapping[str, Level], asked: int) -> dict[str, xr.Variable]:
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
    inputs: UpdateTable, levels: Mapping[str, Level], rows: slice, asked: int
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


def by_run(dataset: xr.Dataset, inputs: UpdateTable) -> xr.Dataset:
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


def _loss_average(inputs: UpdateTable, m: int) -> Array:
    return windowed.where_complete(windowed.consecutive(inputs.loss, m).mean(axis=-1), inputs.whole(m), np.nan)


def _loss_decrease(inputs: UpdateTable, m: int) -> Array:
    return windowed.where_complete(_decrease(inputs, m), inputs.whole(m), np.nan)


def _decrease(inputs: UpdateTable, m: int) -> Array:
    """L(t) - L(t+m) of all m rows that follow each other, eq. (3)."""
    return inputs.loss[: len(inputs.loss) - m + 1] - inputs.next_loss[m - 1 :]


def _metrics(
    inputs: UpdateTable, level: Level, descent: str, m: int, gammas: Sequence[float]
) -> dict[str, NDArray[Any]]:
    """Variables of one descent and one window, each of shape (rows, ...)."""
    per_tensor = TENSOR in level.dimensions
    rate, pair = level.rate, level.pair
    window = geometry.window(pair, m)
    update_floor = windowed.rolling_norm(level.update_floor, m)
    status = geometry.status(
        window,
        # The slowest rate stands for the window: it is NaN where one is missing, not positive where one is not.
        learning_rate=windowed.consecutive(rate, m).min(axis=-1),
        finite=windowed.consecutive(level.finite, m).all(axis=-1),
        # An update no larger than its own rounding cannot be told from it.
        verifiable=windowed.consecutive(level.known, m).all(axis=-1) & ~(update_floor >= window.update_norm),
    )

    angle = geometry.angle(window)
    gradient_floor = windowed.rolling_norm(level.gradient_floor, m) / m
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
        "gradient_norm": windowed.rolling_norm(level.gradient_norm, m) / m
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
        share = windowed.consecutive(rate * pair.alignment, m).sum(axis=-1)
        decrease = _decrease(inputs, m)
        residual = (share - decrease) / np.abs(decrease)
        values["discrete_identity_residual"] = np.where(np.isfinite(residual), residual, np.nan)
        # Nor has it a Hessian of its own: what the others' updates do to its gradient is in the model's alone.
        for name, bound in _learning_rate_bounds(inputs, window, m).items():
            values[name] = np.where(effective & (descent != "gradient"), bound, np.nan)
    complete = inputs.whole(m)
    filled = {name: windowed.where_complete(value, complete, np.nan) for name, value in values.items()}
    filled["effective"] = windowed.where_complete(effective, complete, False)
    filled["status"] = windowed.where_complete(status, complete, np.int8(Status.UNVERIFIABLE))
    return filled


def _learning_rate_bounds(inputs: UpdateTable, window: Pair, m: int) -> dict[str, Array]:
    """Bounds of eq. (18) for the Hessian of the averaged loss, whose blocks are those of the steps over m."""
    if inputs.hessian_min_eigenvalue is None:
        weakest = np.full(window.alignment.shape, np.nan)
    else:
        # The Hessian of the parameters extended by time is another one.
        of_parameters = np.where(inputs.extended(), np.nan, inputs.hessian_min_eigenvalue)
        weakest = windowed.consecutive(of_parameters, m).min(axis=-1) / m
    # g is the mean of as many updates as a row spans, and moves by that many learning rates.
    spans = windowed.consecutive(inputs.spans, m).max(axis=-1)
    supremum, optimal = discrete_time.learning_rate_bounds(window, weakest)
    return {"learning_rate_bound": supremum / spans, "learning_rate_bound_optimal": optimal / spans}


def _shifted_metric(
    inputs: UpdateTable, columns: Mapping[str, NDArray[Any]], windows: Sequence[int]
) -> NDArray[np.int8]:
    """Tell what M + eta H is for every row, descent and window, from the columns of the model."""
    bound, optimal = columns["learning_rate_bound"], columns["learning_rate_bound_optimal"]
    rates = ((m, windowed.consecutive(inputs.learning_rate, m).max(axis=-1)) for m in windows)
    largest = _stack([windowed.where_complete(rate, inputs.whole(m), np.nan) for m, rate in rates])[:, None]
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


def write(tree: xr.DataTree, storage: Storage) -> None:
    """Write results in place of older ones: a reader finds the old ones or the new ones.

    The metadata are consolidated, so ``xarray.open_datatree(path)`` reads them at once.

    Parameters
    ----------
    tree : DataTree
        From `label`.
    storage : Storage
        Its lock is held.
    """
    with storage.replace_tree("zarr.json") as folder, warnings.catch_warnings():
        # Zarr warns that other programs may not read consolidated metadata; they then read the plain ones.
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        tree.to_zarr(folder, zarr_format=3, consolidated=True, mode="w")


def read(storage: Storage) -> xr.DataTree:
    """Open the results of a run.

    Parameters
    ----------
    storage : Storage

    Raises
    ------
    InputError
        Where there are none, or another version of natgrad wrote them.
    """
    try:
        tree = xr.open_datatree(storage.zarr_store(), engine="zarr")
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise InputError(
            "no results here", where=str(storage), remedy="compute them first: natgrad analyze OUT"
        ) from error
    version = tree.attrs.get("layout_version")
    require_version(version.item() if isinstance(version, np.generic) else version, "results", str(storage))
    return tree
