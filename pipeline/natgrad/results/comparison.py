"""Compare the results of several runs: aligned curves, differing options, and differences of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.results.dataset import runs
from natgrad.results.objective import Objective
from natgrad.results.ranking import rank_dataset, select
from natgrad.schema.errors import InputError
from natgrad.schema.names import RUN, STEP, TENSOR
from natgrad.schema.variables import Status

__all__ = ["ALIGNMENTS", "POSITION", "POSITIONS", "Comparison", "compare"]

ALIGNMENTS = ("step", "loss", "length")
"""Quantities by which runs are aligned: the step, the smallest loss so far, or the length of the path."""

POSITION = {"step": STEP, "loss": "reached_loss", "length": "path_length"}
"""Dimension of aligned curves."""

POSITIONS = 200
"""Number of losses or lengths at which runs are compared."""

_CURVES = ("loss", "learning_rate", "angle", "condition_number", "update_to_weight", "displacement_norm", "status")

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Differences of several runs.

    Attributes
    ----------
    align : str
        One of `ALIGNMENTS`.
    curves : Dataset
        Variables of the model, for the gradient and windows of one update, with the dimensions ``run`` and
        `POSITION`, and ``at_step``, the step of each value. NaN, or the status ``not_logged``, where a run has no
        update.
    tensors : Dataset
        ``effective_share`` and ``mean_angle`` (run, tensor), see `natgrad.results.ranking`, and ``difference``, the
        largest difference of the mean angles of two runs. NaN for tensors that a run does not have.
    overview : list of mapping
        One row for each run.
    options : mapping of str to mapping
        Options and properties that differ between runs: the value of each run.
    configuration : mapping of str to mapping
        Values of the logged configuration that differ between runs: the value of each run, None where it has none.
    warnings : list of str
        Reasons why values of different runs have different meanings.
    """

    align: str
    curves: xr.Dataset
    tensors: xr.Dataset
    overview: list[dict[str, Any]]
    options: dict[str, dict[str, Any]]
    configuration: dict[str, dict[str, Any]]
    warnings: list[str]


def compare(trees: Mapping[str, xr.DataTree], align: str = "step") -> Comparison:
    """Compare results of several runs.

    Parameters
    ----------
    trees : mapping of str to DataTree
        Results by name. The runs of a sweep are compared one by one, as ``name/run``.
    align : str
        ``step`` compares updates at the same step. ``loss`` compares the first updates at which runs have reached a
        loss. ``length`` compares the updates at which the sums of the norms of all previous updates are equal.

    Raises
    ------
    InputError
        If there are fewer than two runs, or the losses or lengths of a run are not known.
    """
    each = {
        f"{name}/{run}" if run else name: of_run
        for name, tree in trees.items()
        for run, of_run in runs(tree).items()
    }
    if align not in ALIGNMENTS:
        raise InputError(
            f"unknown alignment {align!r}", where="align", remedy=f"choose one of: {', '.join(ALIGNMENTS)}"
        )
    if len(each) < 2:
        raise InputError(
            f"a comparison requires at least two runs, got {len(each)}",
            where=", ".join(each) or "OUT",
            remedy="pass the folders OUT of several runs, or of a sweep",
        )
    models = {
        name: select(tree["model"].to_dataset()[list(_CURVES)], "gradient", 1).load() for name, tree in each.items()
    }
    options = {name: _described(tree) for name, tree in each.items()}
    return Comparison(
        align,
        _curves(models, align),
        _tensors(each),
        [{"run": name, **_overview(model)} for name, model in models.items()],
        _differing(options),
        _differing({name: tree.attrs.get("configuration", {}) for name, tree in each.items()}),
        _warnings(options, align),
    )


def _differing(properties: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the properties that differ between runs, with the value of each run."""
    found = {}
    for name in dict.fromkeys(name for of_run in properties.values() for name in of_run):
        values = {run: of_run.get(name) for run, of_run in properties.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            found[name] = values
    return found


def _described(tree: xr.DataTree) -> dict[str, Any]:
    """Return the options and properties of a run; those that differ between runs are shown."""
    attributes = tree.attrs
    objective = Objective.of(tree["model"].to_dataset(), str(attributes.get("evaluation", "unknown"))).to_json()
    found = {str(name).replace("_", " "): value for name, value in dict(attributes.get("options", {})).items()}
    return {
        **found,
        "objective": objective["consistency"],
        "evaluation": attributes.get("evaluation", "unknown"),
        "gradient source": _source(attributes),
        "elements": attributes.get("elements"),
        "tensors": int(tree["tensor"].sizes[TENSOR]),
        "results version": attributes.get("results_version"),
    }


def _source(attributes: Mapping[Any, Any]) -> str:
    """Return where the gradients of a run come from. Replayed gradients belong to an objective of the user."""
    source, objective = str(attributes.get("gradient_source")), attributes.get("replay", {}).get("objective")
    return source if objective is None else f"{source}: {objective}"


def _warnings(options: Mapping[str, Mapping[str, Any]], align: str) -> list[str]:
    def values(name: str) -> set[Any]:
        return {of_run[name] for of_run in options.values()}

    found = []
    if len(sources := sorted(values("gradient source"))) > 1:
        found.append(
            f"the gradients of the runs have different sources ({', '.join(sources)}), so their angles may mean "
            "different things"
        )
    if len(values("evaluation")) > 1 or {"consistent", "inconsistent"} <= values("objective"):
        found.append("the losses of the runs are evaluated on different kinds of data")
    batches = [n for n, of in options.items() if of["evaluation"] == "batch" or of["objective"] == "inconsistent"]
    if align == "loss" and batches:
        found.append(
            f"the losses of {', '.join(batches)} belong to different mini-batches, so the smallest loss so far "
            "depends on chance; align by step or length"
        )
    if len(values("elements")) > 1:
        found.append("the models have different sizes, so lengths and norms are not comparable")
    return found


def _overview(model: xr.Dataset) -> dict[str, Any]:
    status, updates = model["status"].values, model.sizes[STEP]
    found = {"updates": updates, "effective_share": float((status == Status.EFFECTIVE).mean()) if updates else None}
    for name, label in (("angle", "median_angle"), ("condition_number", "median_condition_number")):
        finite = model[name].values[np.isfinite(model[name].values)]
        found[label] = float(np.median(finite)) if finite.size else None
    rates = model["learning_rate"].values[np.isfinite(model["learning_rate"].values)]
    found["learning_rate"] = float(np.median(rates)) if rates.size else None
    losses = model["loss"].values[np.isfinite(model["loss"].values)]
    first, last = (float(losses[0]), float(losses[-1])) if losses.size else (None, None)
    return {**found, "first_loss": first, "last_loss": last}


# Alignment ---------------------------------------------------------------------------------------------------


def _curves(models: Mapping[str, xr.Dataset], align: str) -> xr.Dataset:
    if align == "step":
        positions = np.unique(np.concatenate([model[STEP].values for model in models.values()]))
        found = {name: _at_steps(model, positions) for name, model in models.items()}
    else:
        of = {name: (_losses if align == "loss" else _lengths)(name, model) for name, model in models.items()}
        positions = _loss_levels([*of.values()]) if align == "loss" else _length_levels([*of.values()])
        at = _at_losses if align == "loss" else _at_lengths
        found = {name: at(values, positions) for name, values in of.items()}
    axis = POSITION[align]
    variables: dict[str, Any] = {}
    for variable in _CURVES:
        fill = Status.NOT_LOGGED if variable == "status" else np.nan
        rows = [_taken(models[name][variable].values, index, fill) for name, index in found.items()]
        variables[variable] = ((RUN, axis), np.stack(rows), models[next(iter(models))][variable].attrs)
    at_step = [_taken(models[name][STEP].values.astype(np.float64), index, np.nan) for name, index in found.items()]
    variables["at_step"] = ((RUN, axis), np.stack(at_step), {"long_name": "step of the values", "units": "1"})
    return xr.Dataset(variables, {RUN: np.array(list(models)), axis: positions})


def _taken(values: NDArray[Any], index: NDArray[np.int64], fill: Any) -> NDArray[Any]:
    """Return values at some positions, and a fill value for negative ones."""
    if not len(values):
        return np.full(len(index), fill, values.dtype)
    return np.where(index >= 0, values[np.maximum(index, 0)], np.asarray(fill, values.dtype))


def _at_steps(model: xr.Dataset, steps: NDArray[Any]) -> NDArray[np.int64]:
    # A run that was restarted has a step several times: the last one counts.
    own = {step: index for index, step in enumerate(model[STEP].values.tolist())}
    return np.array([own.get(step, -1) for step in steps.tolist()], np.int64)


def _losses(name: str, model: xr.Dataset) -> Array:
    """Return the smallest loss up to each update."""
    loss = model["loss"].values.astype(np.float64)
    if not np.isfinite(loss).any():
        raise InputError(
            "the losses of a run are not known, so it cannot be aligned by loss",
            where=f"run {name}",
            remedy="align the runs by step or length (--align)",
        )
    return np.asarray(np.minimum.accumulate(np.where(np.isfinite(loss), loss, np.inf)))


def _loss_levels(losses: list[Array]) -> Array:
    """Return losses from the largest that all runs reach to the smallest that any reaches."""
    high = min(float(loss[np.isfinite(loss)][0]) for loss in losses)
    low = min(float(loss[-1]) for loss in losses)
    return np.geomspace(high, low, POSITIONS) if low > 0 else np.linspace(high, low, POSITIONS)


def _at_losses(losses: Array, levels: Array) -> NDArray[np.int64]:
    # The losses do not increase.
    index = np.searchsorted(-losses, -levels, side="left")
    return np.where(index < len(losses), index, -1)


def _lengths(name: str, model: xr.Dataset) -> Array:
    """Return the length of the path before each update, and after the last one; NaN from an unknown update on."""
    lengths = np.concatenate([[0.0], np.cumsum(model["displacement_norm"].values.astype(np.float64))])
    if len(lengths) < 2 or not np.isfinite(lengths[1]):
        raise InputError(
            "the norms of the updates of a run are not known, so it cannot be aligned by length",
            where=f"run {name}",
            remedy="align the runs by step or loss (--align)",
        )
    return lengths


def _length_levels(lengths: list[Array]) -> Array:
    return np.linspace(0.0, max(float(length[np.isfinite(length)][-1]) for length in lengths), POSITIONS)


def _at_lengths(lengths: Array, levels: Array) -> NDArray[np.int64]:
    known = lengths[np.isfinite(lengths)]
    index = np.minimum(np.searchsorted(known, levels, side="right") - 1, len(known) - 2)
    return np.where(levels <= known[-1], index, -1)


# Tensors -----------------------------------------------------------------------------------------------------


def _tensors(trees: Mapping[str, xr.DataTree]) -> xr.Dataset:
    ranked = {
        name: {one.tensor: one for one in rank_dataset(tree["tensor"].to_dataset())} for name, tree in trees.items()
    }
    names = list(
        dict.fromkeys(str(name) for tree in trees.values() for name in tree["tensor"].to_dataset()[TENSOR].values)
    )
    values = np.full((2, len(ranked), len(names)), np.nan)
    for row, of_run in enumerate(ranked.values()):
        for column, name in enumerate(names):
            if name in of_run:
                values[:, row, column] = of_run[name].effective_share, of_run[name].mean_angle
    known = np.isfinite(values[1])
    spread = np.where(known, values[1], -np.inf).max(axis=0) - np.where(known, values[1], np.inf).min(axis=0)
    variables = {
        "effective_share": ((RUN, TENSOR), values[0]),
        "mean_angle": ((RUN, TENSOR), values[1]),
        "difference": (TENSOR, np.where(known.sum(axis=0) > 1, spread, np.nan)),
    }
    return xr.Dataset(variables, {RUN: np.array(list(ranked)), TENSOR: np.array(names, dtype=str)})
