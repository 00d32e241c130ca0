"""Compute labelled results as xarray datasets, write them to ``results.zarr`` and read them.

`label` converts a table of updates to a DataTree with the groups ``/model`` (tensors summed) and ``/tensor``. If
decoupled weight decay is known, ``/without_decay`` has the same groups, for the updates without decay. Each
variable of `natgrad.results.variables` declares how it is computed and where it is defined.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.results.pairs import Aggregation, model_and_tensors, without_decay
from natgrad.results.stored import COMPUTE_AGAIN, exist, write_summary
from natgrad.results.variables import VARIABLES, Updates, UpdateVariable, registered_variables
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.schema.names import ATTEMPT, DESCENT, DESCENTS, GAMMA, RUN, STEP, TENSOR, WINDOW
from natgrad.schema.variables import DIMENSIONS, Status, Variable
from natgrad.schema.version import RESULTS_VERSION, __version__
from natgrad.storage import Storage
from natgrad.store.checked import Damaged, record_files, recorded_files
from natgrad.store.checked_store import CheckedStore
from natgrad.store.labelled import LabelledArray, LabelledGroup, write_groups

__all__ = [
    "GAMMAS",
    "WITHOUT_DECAY",
    "Damaged",
    "label",
    "read",
    "recorded_options",
    "runs",
    "split_by_run",
    "with_attributes",
    "write",
]

GAMMAS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Default weights of the one-parameter family (eq. 22) in results."""

WITHOUT_DECAY = "/without_decay"
"""Path of the results of updates without decoupled weight decay."""

_WITHOUT_DECAY = (
    "Results of the updates without decoupled weight decay: the displacement is theta_{t+1} - theta_t "
    "+ eta lambda theta_t, where lambda is the variable weight_decay of /tensor. The estimates of the negative "
    "gradient are those of /model and /tensor."
)


def label(
    table: UpdateTable,
    *,
    gammas: Sequence[float] = GAMMAS,
    windows: Sequence[int] = (1,),
    provenance: Mapping[str, Any] | None = None,
    variables: Sequence[UpdateVariable] | None = None,
) -> xr.DataTree:
    """Compute all results of a run, as labelled arrays.

    Parameters
    ----------
    table : UpdateTable
    gammas : sequence of float
        Positive weights of the one-parameter family.
    windows : sequence of int
        Numbers m of consecutive logged updates in a window; 1 is always included. If a window extends past the end
        of the run or a restart, its values are NaN and its status is ``unverifiable``. The search for the smallest
        effective window tries lengths up to the longest of these windows, and at least up to the smaller of
        `natgrad.results.updates.LONGEST_WINDOW` and half the run.
    provenance : mapping, optional
        Attributes of the root group.
    variables : sequence of UpdateVariable, optional
        Additional variables. Default: the variables that other packages register under the entry-point group
        ``natgrad.variables``.

    Returns
    -------
    DataTree

    Raises
    ------
    InputError
        If a gamma is not positive, or a window is not a positive number of updates of the run.
    """
    updates = int(np.bincount(table.run).max()) if table.run is not None else len(table.steps)
    windows = sorted({1, *windows})
    gammas = sorted({float(gamma) for gamma in gammas})
    if not gammas or not all(np.isfinite(gamma) and gamma > 0 for gamma in gammas):
        raise InputError(
            f"gammas must be positive and finite, got {gammas}",
            where="--gamma",
            remedy="use finite values above 0",
        )
    if windows[0] < 1 or windows[-1] > updates:
        raise InputError(
            f"windows must be from 1 to {updates} for a run with {updates} updates, got {windows}",
            where="--window",
            remedy="use shorter windows, or log more steps first",
        )
    extensions = registered_variables() if variables is None else []
    chosen = [*VARIABLES.values(), *(variables or ()), *(extension.value for extension in extensions)]
    # A diverged run contains infinities. Results that depend on them are NaN, and the status gives the reason.
    with np.errstate(all="ignore"):
        complete = {descent: model_and_tensors(table, descent) for descent in DESCENTS}
        updates_by_path = {"": complete}
        if table.weight_decay is not None:
            updates_by_path[WITHOUT_DECAY] = {
                descent: without_decay(table, descent, both) for descent, both in complete.items()
            }
        groups = {
            f"{path}/{name}": _dataset(
                table, {descent: both[index] for descent, both in aggregations.items()}, gammas, windows, chosen
            )
            for path, aggregations in updates_by_path.items()
            for index, name in enumerate(("model", "tensor"))
        }
    tree = xr.DataTree.from_dict(groups)
    if table.weight_decay is not None:
        tree[WITHOUT_DECAY].attrs = {"description": _WITHOUT_DECAY}
    extended = {extension.distribution: extension.version for extension in extensions}
    tree.attrs = {"Conventions": "CF-1.11", **(provenance or {})}
    tree.attrs |= {"versions": {**versions(), **extended}, "results_version": RESULTS_VERSION}
    tree.attrs |= {"layout_version": LAYOUT_VERSION, "evaluation": table.evaluation}
    tree.attrs |= {"gradient_source": table.gradient_source}
    return tree


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that affect the results."""
    packages = ("numpy", "numba", "xarray", "zarr", "dask")
    others = {package: importlib.metadata.version(package) for package in packages}
    return {"natgrad-pipeline": __version__} | others


# Variables ---------------------------------------------------------------------------------------------------


def _dataset(
    table: UpdateTable,
    aggregations: Mapping[str, Aggregation],
    gammas: Sequence[float],
    windows: Sequence[int],
    variables: Sequence[UpdateVariable],
) -> xr.Dataset:
    """Compute and label the variables of one group, from its pairs for each estimate of the gradient."""
    leading = next(iter(aggregations.values())).dimensions
    name = "tensor" if TENSOR in leading else "model"
    chosen = [variable for variable in variables if name in variable.aggregations and table.has(variable.needs)]
    coordinates: dict[str, Any] = {
        STEP: table.steps,
        DESCENT: np.array(list(aggregations), dtype=object),
        WINDOW: np.array(windows, dtype=np.int64),
        GAMMA: np.array(gammas),
    }
    if TENSOR in leading:
        coordinates[TENSOR] = np.array(table.layout.names, dtype=object)
    attempts = np.zeros(len(table.steps), np.int64) if table.attempts is None else table.attempts
    coordinates[ATTEMPT] = (STEP, attempts)
    columns, comments = _update_variables(
        [variable for variable in chosen if STEP in variable.dimensions], table, aggregations, gammas, windows
    )
    dataset = xr.Dataset(columns, coordinates)
    if table.runs:
        dataset = split_by_run(dataset, table, chosen)
    dataset = dataset.assign(
        _run_variables(
            [variable for variable in chosen if STEP not in variable.dimensions], table, aggregations, max(windows)
        )
    )
    dataset = with_attributes(dataset, chosen)
    for variable, comment in comments.items():
        dataset[variable].attrs["comment"] = comment
    return dataset


def _update_variables(
    variables: Sequence[UpdateVariable],
    table: UpdateTable,
    aggregations: Mapping[str, Aggregation],
    gammas: Sequence[float],
    windows: Sequence[int],
) -> tuple[dict[str, xr.Variable], dict[str, str]]:
    """Compute variables with steps, and their comments, for all estimates of the gradient and all windows."""
    columns: dict[str, xr.Variable] = {}
    comments: dict[str, str] = {}
    for at_window, m in enumerate(windows):
        complete = table.complete(m)
        of_gradient = None
        for at_descent, (descent, aggregation) in enumerate(aggregations.items()):
            updates = Updates(table, aggregation, descent, m, gammas=gammas, of_gradient=of_gradient)
            of_gradient = updates.of_gradient
            for variable in variables:
                if (at_window and WINDOW not in variable.dimensions) or (
                    at_descent and DESCENT not in variable.dimensions
                ):
                    continue
                values = variable.values(updates)
                if variable.name not in columns:
                    columns[variable.name] = _empty(variable, values, updates, len(aggregations), len(windows))
                    comment = variable.comment(updates) if variable.comment is not None else ""
                    comments |= {variable.name: comment} if comment else {}
                column = columns[variable.name]
                at = {DESCENT: at_descent, WINDOW: at_window}
                cell = column.values[tuple(at.get(str(axis), slice(None)) for axis in column.dims)]
                cell[: len(values)] = values
                if m > 1:
                    cell[~complete] = variable.fill
    return columns, comments


def _empty(
    variable: UpdateVariable, values: NDArray[Any], updates: Updates, descents: int, windows: int
) -> xr.Variable:
    """Return an empty array for all estimates and windows, with the dtype and shape of the first result."""
    axes = [axis for axis in variable.dimensions if axis not in (DESCENT, WINDOW)]
    if values.ndim < len(axes):
        axes.remove(TENSOR)
    sizes = {**dict(zip(axes, values.shape, strict=True)), DESCENT: descents, WINDOW: windows}
    sizes[STEP] = len(updates.table.steps)
    dimensions = [axis for axis in variable.dimensions if axis in (*axes, DESCENT, WINDOW)]
    return xr.Variable(dimensions, np.empty([sizes[axis] for axis in dimensions], values.dtype))


def _run_variables(
    variables: Sequence[UpdateVariable],
    table: UpdateTable,
    aggregations: Mapping[str, Aggregation],
    longest: int,
) -> dict[str, xr.Variable]:
    """Compute variables without steps, which have one value per run."""
    found: dict[str, list[NDArray[Any]]] = {variable.name: [] for variable in variables}
    for run in table.run_slices():
        each = [
            Updates(table, aggregation, descent, longest=longest, run=run)
            for descent, aggregation in aggregations.items()
        ]
        for variable in variables:
            compared = each if DESCENT in variable.dimensions else each[:1]
            values = [variable.values(updates) for updates in compared]
            found[variable.name].append(np.stack(values, axis=-1) if DESCENT in variable.dimensions else values[0])
    leading = next(iter(aggregations.values())).dimensions
    columns = {}
    for variable in variables:
        dimensions = tuple(axis for axis in variable.dimensions if axis in (*leading, DESCENT))
        values = found[variable.name]
        if table.runs:
            columns[variable.name] = xr.Variable((RUN, *dimensions), np.stack(values))
        else:
            columns[variable.name] = xr.Variable(dimensions, values[0])
    return columns


def split_by_run(dataset: xr.Dataset, table: UpdateTable, variables: Sequence[Variable]) -> xr.Dataset:
    """Add the dimension ``run`` to the results of a sweep. Steps that a run did not log have missing values.

    Parameters
    ----------
    dataset : Dataset
        Results of all updates, by step.
    table : UpdateTable
        Table of the updates.
    variables : sequence of Variable
        Entries of the variables, which declare the values at missing steps.

    Returns
    -------
    Dataset
    """
    steps, position = np.unique(table.steps, return_inverse=True)
    absent = {variable.name: variable.absent for variable in variables if variable.absent is not None}
    fills = {"f": np.nan, "b": False, "i": 0}

    def spread(name: str, variable: xr.Variable) -> tuple[tuple[Any, ...], NDArray[Any]]:
        fill = absent.get(name, fills[variable.dtype.kind])
        values = np.full((len(table.runs), len(steps), *variable.shape[1:]), fill, variable.dtype)
        values[table.run, position] = variable.values
        return (RUN, *variable.dims), values

    columns = {
        name: spread(str(name), variable)
        for name, variable in dataset.variables.items()
        if name in dataset.data_vars or name == ATTEMPT
    }
    labels = {name: coordinate for name, coordinate in dataset.coords.items() if name not in (STEP, ATTEMPT)}
    names = np.array(table.runs, dtype=object)
    attempts = columns.pop(ATTEMPT)
    return xr.Dataset(columns, {**labels, RUN: names, STEP: steps, ATTEMPT: attempts})


def with_attributes(dataset: xr.Dataset, variables: Sequence[Variable]) -> xr.Dataset:
    """Set the attributes of all variables and coordinates, and return the dataset."""
    for variable in variables:
        if variable.name in dataset:
            dataset[variable.name].attrs = variable.attributes()
    for name, meaning in DIMENSIONS.items():
        if name in dataset.coords:
            dataset[name].attrs = {"long_name": meaning, "units": "1"}
    return dataset


# On disk -----------------------------------------------------------------------------------------------------


def runs(tree: xr.DataTree) -> dict[str, xr.DataTree]:
    """Return the results of each run, by name. Steps that only other runs of the sweep logged are removed."""
    if RUN not in tree["model"].dims:
        return {"": tree}
    logged = (tree["model"]["status"] != Status.NOT_LOGGED).all([DESCENT, WINDOW])

    def of(name: str) -> xr.DataTree:
        steps = logged.sel({RUN: name}).values
        paths = [group.path.strip("/") for group in tree.leaves]
        groups = {path: tree[path].to_dataset().sel({RUN: name}).isel({STEP: steps}) for path in paths}
        found = xr.DataTree.from_dict({f"/{path}": dataset for path, dataset in groups.items()})
        found.attrs = tree.attrs
        return found

    return {str(name): of(str(name)) for name in tree["model"].to_dataset()[RUN].values}


def write(tree: xr.DataTree, storage: Storage, summary: Mapping[str, Any]) -> None:
    """Replace the results atomically: a reader finds either the old results or the new results.

    The metadata are consolidated, so ``xarray.open_datatree(path)`` reads them with one request.

    Parameters
    ----------
    tree : DataTree
        From `label`.
    storage : Storage
        The caller must hold its lock.
    summary : mapping
        See `natgrad.results.summary.overview`.
    """
    groups = {group.path.strip("/"): _stored(group) for group in tree.subtree}
    with storage.replace_tree("zarr.json") as folder:
        write_groups(folder, groups)
        write_summary(folder, summary)
        record_files(folder, {"options": tree.attrs.get("options", {})})


def _stored(group: xr.DataTree) -> LabelledGroup:
    dataset = group.to_dataset(inherit=False)
    arrays, coordinates = (
        {
            str(name): LabelledArray(tuple(map(str, variable.dims)), variable.values, variable.attrs)
            for name, variable in variables.items()
        }
        for variables in (dataset.data_vars, dataset.coords)
    )
    return LabelledGroup(arrays, coordinates, {str(name): value for name, value in group.attrs.items()})


def read(storage: Storage) -> xr.DataTree:
    """Open the results of a run. Each file is compared with its checksum when it is read.

    Parameters
    ----------
    storage : Storage

    Returns
    -------
    DataTree

    Raises
    ------
    InputError
        If there are no results, or another version of natgrad wrote them.
    Damaged
        If a file is missing or was changed; also when the values of a variable are read later.
    """
    if not exist(storage):
        raise InputError(
            "there are no results here", where=str(storage), remedy="compute them first: natgrad analyze OUT"
        )
    files = recorded_files(storage, COMPUTE_AGAIN)["files"]
    store: Any = CheckedStore.of(storage, files, COMPUTE_AGAIN)  # xarray does not type stores
    return xr.open_datatree(store, engine="zarr")


def recorded_options(storage: Storage) -> dict[str, Any]:
    """Return the options of the analysis that computed the results; raise Damaged if their record is damaged."""
    options: dict[str, Any] = recorded_files(storage, COMPUTE_AGAIN)["options"]
    return options
