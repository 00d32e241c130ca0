"""Compute labelled results as xarray datasets, and read them from ``results.zarr``.

`label` computes all results of a table in memory, as a DataTree with the groups ``/model`` (tensors summed),
``/tensor``, and ``/group`` if the table has groups of tensors. If decoupled weight decay is known,
``/without_decay`` has the groups ``model`` and ``tensor`` for the updates without decay. Each variable of
`natgrad.results.variables` declares how it is computed and where it is defined.

`natgrad.results.building` computes and stores the results of a run of any length, block by block, with the
functions of this module.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.inputs import UpdateTable
from natgrad.results.pairs import Aggregation, model_and_tensors, without_decay
from natgrad.results.stored import COMPUTE_AGAIN, exist, publish, put
from natgrad.results.variables import VARIABLES, Updates, UpdateVariable, registered_variables
from natgrad.schema.errors import InputError
from natgrad.schema.extensions import Extension
from natgrad.schema.layout import LAYOUT_VERSION
from natgrad.schema.names import ATTEMPT, DESCENT, DESCENTS, GAMMA, GROUP, GROUP_KIND, RUN, STEP, TENSOR, WINDOW
from natgrad.schema.variables import DIMENSIONS, Status, Variable
from natgrad.schema.version import RESULTS_VERSION, __version__
from natgrad.storage import Storage
from natgrad.store.checked import Damaged, recorded_files
from natgrad.store.checked_store import CheckedStore
from natgrad.store.labelled import LabelledArray, LabelledGroup, contents_of

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

WITHOUT_DECAY_DESCRIPTION = (
    "Results of the updates without decoupled weight decay: the displacement is theta_{t+1} - theta_t "
    "+ eta lambda theta_t, where lambda is the variable weight_decay of /tensor. The estimates of the negative "
    "gradient are those of /model and /tensor."
)


@dataclass(frozen=True)
class Request:
    """Describe the results to compute from a table.

    Attributes
    ----------
    gammas : tuple of float
        Weights of the one-parameter family.
    windows : tuple of int
        Numbers of consecutive updates in a window, from 1.
    tensor_family : bool
        True if tensors also have the variables with the dimension gamma.
    """

    gammas: tuple[float, ...]
    windows: tuple[int, ...]
    tensor_family: bool

    @classmethod
    def of(cls, table: UpdateTable, gammas: Sequence[float] | None, windows: Sequence[int]) -> Request:
        """Check and complete the options of `label` (InputError)."""
        updates = int(np.bincount(table.run).max()) if table.run is not None else len(table.steps)
        every_window = sorted({1, *windows})
        every_gamma = sorted({float(gamma) for gamma in (GAMMAS if gammas is None else gammas)})
        if not every_gamma or not all(np.isfinite(gamma) and gamma > 0 for gamma in every_gamma):
            raise InputError(
                f"gammas must be positive and finite, got {every_gamma}",
                where="--gamma",
                remedy="use finite values above 0",
            )
        if every_window[0] < 1 or every_window[-1] > updates:
            raise InputError(
                f"windows must be from 1 to {updates} for a run with {updates} updates, got {every_window}",
                where="--window",
                remedy="use shorter windows, or log more steps first",
            )
        return cls(tuple(every_gamma), tuple(every_window), gammas is not None)

    def chosen(
        self, variables: Sequence[UpdateVariable], table: UpdateTable, aggregation: str
    ) -> list[UpdateVariable]:
        """Return the variables that a group has."""
        return [
            variable
            for variable in variables
            if aggregation in variable.aggregations
            and table.has(variable.needs)
            and (aggregation == "model" or self.tensor_family or GAMMA not in variable.dimensions)
        ]


def label(
    table: UpdateTable,
    *,
    gammas: Sequence[float] | None = None,
    windows: Sequence[int] = (1,),
    provenance: Mapping[str, Any] | None = None,
    variables: Sequence[UpdateVariable] | None = None,
) -> xr.DataTree:
    """Compute all results of a run, as labelled arrays.

    Parameters
    ----------
    table : UpdateTable
    gammas : sequence of float, optional
        Positive weights of the one-parameter family. If they are set, tensors also have the variables with the
        dimension ``gamma``. Default: `GAMMAS`, for the model.
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
    request = Request.of(table, gammas, windows)
    extensions = registered_variables() if variables is None else []
    every = [*VARIABLES.values(), *(variables or ()), *(extension.value for extension in extensions)]
    # A diverged run contains infinities. Results that depend on them are NaN, and the status gives the reason.
    with np.errstate(all="ignore"):
        found: dict[str, dict[str, Aggregation]] = {}
        for descent, groups in aggregated(table):
            for group, aggregation in groups.items():
                found.setdefault(group, {})[descent] = aggregation
        datasets = {
            group: _dataset(table, aggregations, request, request.chosen(every, table, group.rpartition("/")[2]))
            for group, aggregations in found.items()
        }
    tree = xr.DataTree.from_dict(datasets)
    if table.weight_decay is not None:
        tree[WITHOUT_DECAY].attrs = {"description": WITHOUT_DECAY_DESCRIPTION}
    tree.attrs = root_attributes(table, provenance or {}, extensions)
    return tree


def root_attributes(
    table: UpdateTable, provenance: Mapping[str, Any], extensions: Sequence[Extension[UpdateVariable]]
) -> dict[str, Any]:
    """Return the attributes of the root group."""
    extended = {extension.distribution: extension.version for extension in extensions}
    return {
        "Conventions": "CF-1.11",
        **provenance,
        "versions": {**versions(), **extended},
        "results_version": RESULTS_VERSION,
        "layout_version": LAYOUT_VERSION,
        "evaluation": table.evaluation,
        "gradient_source": table.gradient_source,
        **({} if table.recovery is None else table.recovery.attributes()),
    }


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that affect the results."""
    packages = ("numpy", "numba", "xarray", "zarr", "dask")
    others = {package: importlib.metadata.version(package) for package in packages}
    return {"natgrad-pipeline": __version__} | others


# Variables ---------------------------------------------------------------------------------------------------


def aggregated(table: UpdateTable) -> Iterator[tuple[str, dict[str, Aggregation]]]:
    """Yield each estimate of the gradient, with its pairs by the path of the group."""
    for descent in DESCENTS:
        every = model_and_tensors(table, descent)
        paths = ("/model", "/tensor", "/group")[: len(every)]
        groups = dict(zip(paths, every, strict=True))
        if table.weight_decay is not None:
            rest = without_decay(table, descent, every)
            groups |= dict(zip((f"{WITHOUT_DECAY}/model", f"{WITHOUT_DECAY}/tensor"), rest, strict=True))
        yield descent, groups


def _dataset(
    table: UpdateTable,
    aggregations: Mapping[str, Aggregation],
    request: Request,
    variables: Sequence[UpdateVariable],
) -> xr.Dataset:
    """Compute and label the variables of one group, from its pairs for each estimate of the gradient."""
    leading = next(iter(aggregations.values())).dimensions
    parts: dict[str, list[Column]] = {}
    of_gradient: dict[int, Updates] = {}
    for descent, aggregation in aggregations.items():
        for name, column in columns(variables, table, aggregation, descent, request, of_gradient).items():
            parts.setdefault(name, []).append(column)
    stacked = {
        name: (of_each[0].dimensions, np.stack([column.values for column in of_each], of_each[0].descent_axis))
        if DESCENT in of_each[0].dimensions
        else (of_each[0].dimensions, of_each[0].values)
        for name, of_each in parts.items()
    }
    dataset = xr.Dataset(stacked, coordinates(table, request, leading))
    if table.runs:
        dataset = split_by_run(dataset, table, variables)
    per_run = run_values(variables, table, aggregations, max(request.windows))
    dataset = with_attributes(dataset.assign(per_run), variables)
    for name, of_each in parts.items():
        if of_each[0].comment:
            dataset[name].attrs["comment"] = of_each[0].comment
    return dataset


def coordinates(table: UpdateTable, request: Request, leading: Sequence[str]) -> dict[str, Any]:
    """Return the coordinates of a group with some leading dimensions, by step."""
    found: dict[str, Any] = {
        STEP: table.steps,
        DESCENT: np.array(DESCENTS),
        WINDOW: np.array(request.windows, dtype=np.int64),
        GAMMA: np.array(request.gammas),
    }
    if TENSOR in leading:
        found[TENSOR] = np.array(table.layout.names, dtype=str)
    if GROUP in leading:
        found[GROUP] = np.array([group.name for group in table.groups], dtype=str)
        found[GROUP_KIND] = (GROUP, np.array([group.kind for group in table.groups], dtype=str))
    attempts = np.zeros(len(table.steps), np.int64) if table.attempts is None else table.attempts
    found[ATTEMPT] = (STEP, attempts)
    return found


@dataclass(frozen=True)
class Column:
    """The values of a variable for one estimate of the gradient.

    Attributes
    ----------
    dimensions : tuple of str
        Dimensions of the variable.
    values : array
        Without the dimension ``descent``.
    comment : str
    """

    dimensions: tuple[str, ...]
    values: NDArray[Any]
    comment: str

    @property
    def descent_axis(self) -> int:
        """Position of the dimension ``descent``."""
        return self.dimensions.index(DESCENT)


def columns(
    variables: Sequence[UpdateVariable],
    table: UpdateTable,
    aggregation: Aggregation,
    descent: str,
    request: Request,
    of_gradient: dict[int, Updates],
) -> dict[str, Column]:
    """Compute the variables with steps for one estimate of the gradient and all windows.

    Parameters
    ----------
    variables, table, aggregation, descent, request
        A variable without the dimension ``descent`` is computed for the first estimate only.
    of_gradient : dict of int to Updates
        For each window, the updates with the gradient itself as the estimate, which the first call adds.
    """
    first = descent == DESCENTS[0]
    wanted = [each for each in variables if STEP in each.dimensions and (first or DESCENT in each.dimensions)]
    found: dict[str, Column] = {}
    for at_window, m in enumerate(request.windows):
        complete = table.complete(m)
        updates = Updates(table, aggregation, descent, m, gammas=request.gammas, of_gradient=of_gradient.get(m))
        of_gradient.setdefault(m, updates)
        for variable in wanted:
            if at_window and WINDOW not in variable.dimensions:
                continue
            values = variable.values(updates)
            if variable.name not in found:
                found[variable.name] = _empty(variable, values, updates, len(request.windows))
            column = found[variable.name]
            axes = [axis for axis in column.dimensions if axis != DESCENT]
            cell = column.values[tuple(at_window if axis == WINDOW else slice(None) for axis in axes)]
            cell[: len(values)] = values
            if m > 1:
                cell[~complete] = variable.fill
    return found


def _empty(variable: UpdateVariable, values: NDArray[Any], updates: Updates, windows: int) -> Column:
    """Return an empty array for all windows, with the dtype and shape of the first result."""
    axes = [axis for axis in variable.dimensions if axis not in (DESCENT, WINDOW)]
    if values.ndim < len(axes):
        axes.remove(TENSOR)
    sizes = {**dict(zip(axes, values.shape, strict=True)), WINDOW: windows}
    sizes[STEP] = len(updates.table.steps)
    dimensions = tuple(axis for axis in variable.dimensions if axis in (*axes, DESCENT, WINDOW))
    shape = [sizes[axis] for axis in dimensions if axis != DESCENT]
    if updates.aggregation_name == GROUP:
        dimensions = tuple(GROUP if axis == TENSOR else axis for axis in dimensions)
    comment = variable.comment(updates) if variable.comment is not None else ""
    return Column(dimensions, np.empty(shape, values.dtype), comment)


def run_values(
    variables: Sequence[UpdateVariable],
    table: UpdateTable,
    aggregations: Mapping[str, Aggregation],
    longest: int,
    effective: Mapping[str, Sequence[NDArray[np.bool_]]] | None = None,
) -> dict[str, xr.Variable]:
    """Compute variables without steps, which have one value per run.

    Parameters
    ----------
    variables, table, aggregations, longest
        See `Updates`.
    effective : mapping of str to sequence of bool array, optional
        For each estimate of the gradient and run, the lengths of windows that are effective, see
        `natgrad.theory.windows.effective_lengths`. Default: computed from the pairs.
    """
    variables = [variable for variable in variables if STEP not in variable.dimensions]
    found: dict[str, list[NDArray[Any]]] = {variable.name: [] for variable in variables}
    for position, run in enumerate(table.run_slices()):
        each = [
            Updates(
                table,
                aggregation,
                descent,
                longest=longest,
                run=run,
                effective_lengths=None if effective is None else effective[descent][position],
            )
            for descent, aggregation in aggregations.items()
        ]
        for variable in variables:
            compared = each if DESCENT in variable.dimensions else each[:1]
            values = [variable.values(updates) for updates in compared]
            found[variable.name].append(np.stack(values, axis=-1) if DESCENT in variable.dimensions else values[0])
    leading = next(iter(aggregations.values())).dimensions
    labelled = {}
    for variable in variables:
        own = [GROUP if axis == TENSOR and GROUP in leading else axis for axis in variable.dimensions]
        dimensions = tuple(axis for axis in own if axis in (*leading, DESCENT))
        values = found[variable.name]
        if table.runs:
            labelled[variable.name] = xr.Variable((RUN, *dimensions), np.stack(values))
        else:
            labelled[variable.name] = xr.Variable(dimensions, values[0])
    return labelled


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
    names = np.array(table.runs, dtype=str)
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
        found.attrs = {**tree.attrs, "configuration": tree.attrs.get("configuration", {}).get(name, {})}
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
    with storage.staging() as staging:
        staging.delete_entries(staging.walk() if staging.exists() else [])
        files = put(staging, contents_of(labelled_groups(tree)))
        publish(storage, staging, files, summary, {"options": tree.attrs.get("options", {})})


def labelled_groups(tree: xr.DataTree) -> dict[str, LabelledGroup]:
    """Return the groups of a tree, by path."""
    return {group.path.strip("/"): labelled_group(group.to_dataset(inherit=False)) for group in tree.subtree}


def labelled_group(dataset: xr.Dataset) -> LabelledGroup:
    """Return the arrays of a dataset."""
    arrays, coordinates = (
        {
            str(name): LabelledArray(tuple(map(str, variable.dims)), variable.values, variable.attrs)
            for name, variable in variables.items()
        }
        for variables in (dataset.data_vars, dataset.coords)
    )
    return LabelledGroup(arrays, coordinates, {str(name): value for name, value in dataset.attrs.items()})


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
