"""Select and pack the values that a page draws, so that its size does not depend on the length of the runs.

The model of a run has a value for each update, and bins beyond a number of values (`PageLimits`). Tensors and
groups have bins. The arrays are compressed together; the page refers to each by its position. `natgrad report
--serve` sends the same arrays for any part of the steps.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.reporting.binning import Bins, Reduced, binned, binned_status
from natgrad.reporting.run_results import EIGENVALUES, RunResults, at, blocks
from natgrad.schema.names import DESCENT, DESCENTS, GROUP, GROUP_KIND, STEP, TENSOR
from natgrad.schema.variables import Status

__all__ = ["ROW_VARIABLES", "Blob", "PageLimits", "Rows", "kinds_of", "model_rows", "run_data", "side_by_side"]


@dataclass(frozen=True)
class PageLimits:
    """Limits of the number of values in a page.

    Attributes
    ----------
    cells : int
        Rows times bins of tensors and groups, for each variable.
    columns : int
        Bins of tensors and groups.
    least_columns : int
        Bins below which the tensors of a run are not drawn.
    model_values : int
        Values of models.
    """

    cells: int = 100_000
    columns: int = 1000
    least_columns: int = 20
    model_values: int = 250_000


ROW_VARIABLES = ("angle", "condition_number", "update_to_weight")
"""Variables of tensors and groups in a page, in addition to the status."""

LOGARITHMIC = ("condition_number", "update_to_weight", "gradient_norm", "displacement_norm", *EIGENVALUES)
"""Variables of positive numbers, which are drawn on a logarithmic axis and stored as logarithms."""

_STEPS = 65533
"""Number of steps into which the range of a variable is divided. Two more codes: infinity, and a missing value."""


@dataclass
class Blob:
    """The arrays of a page, one after the other."""

    parts: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, values: NDArray[Any]) -> dict[str, Any]:
        """Append an array, and return its reference in the page."""
        content = np.ascontiguousarray(values).tobytes()
        content += bytes(-len(content) % 8)
        self.parts.append(content)
        self.size += len(content)
        return {"type": values.dtype.name, "at": self.size - len(content), "shape": list(values.shape)}

    def add_coded(self, values: NDArray[Any]) -> dict[str, Any]:
        """Append numbers with 16 bits each: their range is divided into equal steps."""
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        # Divided before they are subtracted, because the difference may overflow.
        step = high / _STEPS - low / _STEPS or 1.0
        with np.errstate(invalid="ignore"):
            codes = np.where(np.isnan(values), _STEPS + 2, np.round(values / step - low / step))
            codes = np.where(np.isinf(values), np.where(values > 0, _STEPS + 1, _STEPS + 2), codes)
        return self.add(codes.astype("<u2")) | {"low": low, "step": step}

    def compressed(self) -> bytes:
        """Return the compressed content as base64."""
        return base64.b64encode(zlib.compress(b"".join(self.parts), 6))


# Rows: tensors, groups of tensors, or runs -----------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Tensors or groups of a run: the rows of a table and of a heat map, each of which can be drawn as a curve.

    Attributes
    ----------
    kind : str
        ``tensor``, ``block``, ``layer``, ``pattern`` or ``model``.
    names : list of str
    dataset : Dataset
        Results of the rows.
    dimension : str
        Dimension of the rows in the dataset.
    positions : int64 array or None
        Positions of the rows in the dataset; None for all.
    """

    kind: str
    names: list[str]
    dataset: xr.Dataset
    dimension: str
    positions: NDArray[np.int64] | None = None

    def blocks(self, variable: str, descent: str, window: int, steps: slice) -> Iterator[NDArray[Any]]:
        """Yield the values of a variable, shape (steps, rows), for some steps at a time."""
        for values in blocks(at(self.dataset[variable], descent, window), self.dimension, steps):
            if values.ndim == 1:  # the model
                yield values[:, None]
            else:
                yield values if self.positions is None else values[:, self.positions]

    def reduced(self, variable: str, descent: str, window: int, bins: Bins) -> Reduced:
        """Return a variable in bins; logarithms of those in `LOGARITHMIC`."""
        found = binned(self.blocks(variable, descent, window, slice(bins.start, bins.stop)), bins)
        if variable not in LOGARITHMIC:
            return found
        return Reduced(*(_logarithm(values) for values in (found.median, found.least, found.greatest)))

    def packed(
        self, blob: Blob, variable: str, descent: str, window: int, bins: Bins, *, exact: bool = False
    ) -> dict[str, Any]:
        """Append a variable in bins to the arrays of a page, and return its reference."""
        if variable == "status":
            status, share = binned_status(
                self.blocks(variable, descent, window, slice(bins.start, bins.stop)), bins
            )
            return {"status": blob.add(status), "share": blob.add(np.round(200 * share).astype(np.uint8))}
        found = self.reduced(variable, descent, window, bins)
        # A bin of one update has one value.
        parts = [found.median] if bins.single else [found.median, found.least, found.greatest]
        values = np.stack(parts)
        return {"values": blob.add(values.astype(np.float32)) if exact else blob.add_coded(values)}

    def summary(self, has_gradient: bool) -> dict[str, list[float | None]]:
        """Return the share of effective updates and medians over all steps, for the gradient and window 1."""
        names = ROW_VARIABLES if has_gradient else ("update_to_weight",)
        found: dict[str, list[float | None]] = {}
        every = slice(None)
        if has_gradient:
            counts, total = np.zeros(len(self.names)), 0
            for status in self.blocks("status", DESCENTS[0], 1, every):
                counts += (status == Status.EFFECTIVE).sum(axis=0)
                total += len(status)
            found["share"] = _plain(counts / total if total else np.full(len(self.names), np.nan))
        for name in names:
            parts = [part.astype(np.float32) for part in self.blocks(name, DESCENTS[0], 1, every)]
            values = np.concatenate(parts) if parts else np.empty((0, len(self.names)), np.float32)
            del parts
            if not len(values):
                found[name] = [None] * len(self.names)
                continue
            found[name] = _plain(binned([values], Bins.of(0, len(values), 1)).median[:, 0])
        return found


def model_rows(run: RunResults) -> Rows:
    """Return the model of a run as one row."""
    return Rows("model", [run.name], run.model, "")


def kinds_of(run: RunResults) -> list[Rows]:
    """Return the tensors of a run, and its groups of each kind."""
    tensors = [str(name) for name in run.tensors[TENSOR].values]
    found = [Rows("tensor", tensors, run.tensors, TENSOR)]
    if run.groups is not None:
        names = [str(name) for name in run.groups[GROUP].values]
        kinds = [str(kind).split(", ") for kind in run.groups[GROUP_KIND].values]
        for kind in dict.fromkeys(kind for several in kinds for kind in several):
            positions = np.flatnonzero([kind in several for several in kinds])
            found.append(Rows(kind, [names[one] for one in positions], run.groups, GROUP, positions))
    return found


# Runs ----------------------------------------------------------------------------------------------------------


def run_data(
    run: RunResults,
    blob: Blob,
    runs: int,
    summaries: Sequence[Mapping[str, Any]],
    limits: PageLimits = PageLimits(),
) -> dict[str, Any]:
    """Return the data of a run in a page.

    Parameters
    ----------
    run : RunResults
    blob : Blob
        The arrays are appended to it.
    runs : int
        Number of runs in the page, which share its space.
    summaries : sequence of mapping
        For each of `kinds_of`, its `Rows.summary`.
    limits : PageLimits
    """
    updates, kinds = len(run.steps), kinds_of(run)
    data: dict[str, Any] = {
        "name": run.name,
        "gradient": run.has_gradient,
        "descents": [str(name) for name in run.model[DESCENT].values] if run.has_gradient else [DESCENTS[0]],
        "windows": run.windows,
        "steps": blob.add(run.steps),
        "model": _model(run, blob, limits, runs) if updates else {},
    }
    rows = sum(len(each.names) for each in kinds)
    combinations = [(descent, window) for descent in data["descents"] for window in run.windows]
    cells = limits.cells // runs // max(rows, 1)
    # A short run has room for all estimates and windows. A long one has the gradient and single updates.
    length = min(updates, limits.columns // 4)
    held = combinations[: min(max(cells // max(length, 1), 1), len(combinations))]
    columns = min(cells // len(held), limits.columns)
    bins = Bins.of(0, updates, columns)
    data["kinds"] = []
    for each, summary in zip(kinds, summaries, strict=True):
        entry: dict[str, Any] = {"kind": each.kind, "rows": each.names, "summary": summary, "values": {}}
        if updates and columns >= min(limits.least_columns, updates):
            entry["edges"] = bins.edges.tolist()
            for descent, window in held if run.has_gradient else held[:1]:
                entry["values"] |= _cells(each, blob, descent, window, bins, run.has_gradient)
        data["kinds"].append(entry)
    return data


def _cells(
    rows: Rows, blob: Blob, descent: str, window: int, bins: Bins, has_gradient: bool
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in (*ROW_VARIABLES, "status") if has_gradient else ("update_to_weight",):
        key = key_of(rows.dataset[name], descent, window)
        if key == name and (descent, window) != (DESCENTS[0], 1):
            continue  # the same for all estimates and windows
        found[key] = rows.packed(blob, name, descent, window, bins)
    return found


def key_of(variable: xr.DataArray, descent: str, window: int) -> str:
    """Return the name of a variable in a page, with the estimate and the window if it depends on them."""
    parts = [str(variable.name)]
    parts += [descent] if DESCENT in variable.dims else []
    parts += [str(window)] if "window" in variable.dims else []
    return "|".join(parts)


def _model(run: RunResults, blob: Blob, limits: PageLimits, runs: int) -> dict[str, Any]:
    """Return the variables of the model: values of each update while they fit into the page, and then bins."""
    found: dict[str, Any] = {}
    budget = limits.model_values // runs
    for name, descent, window in _model_variables(run):
        key = key_of(run.model[name], descent, window)
        if key in found:
            continue
        values = run.values(name, descent, window)
        updates = len(values)
        bins = Bins.of(
            0, updates, updates if updates <= budget else max(min(budget, limits.columns), limits.least_columns)
        )
        budget -= len(bins.edges) - 1
        entry: dict[str, Any] = {} if bins.single else {"edges": bins.edges.tolist()}
        if name == "status":
            status, share = binned_status([values[:, None]], bins)
            entry |= {"status": blob.add(status), "share": blob.add(share)}
        else:
            reduced = binned([values[:, None].astype(np.float64)], bins)
            parts = [reduced.median] if bins.single else [reduced.median, reduced.least, reduced.greatest]
            stacked = np.stack(parts)
            if name in LOGARITHMIC:
                entry["values"] = blob.add(_logarithm(stacked).astype(np.float32))
            else:  # losses may exceed the range of float32
                entry["values"] = blob.add(stacked if name.startswith("loss") else stacked.astype(np.float32))
        found[key] = entry
    return found


def _model_variables(run: RunResults) -> Iterator[tuple[str, str, int]]:
    """Yield the variables of the model with their estimates and windows, in the order of their importance."""
    first, longest = DESCENTS[0], max(run.windows)
    yield from ((name, first, 1) for name in ("loss", "update_to_weight"))
    if run.has_gradient:
        names = ("status", "angle", "condition_number", "angle_uncertainty", *EIGENVALUES)
        yield from ((name, first, 1) for name in names)
    if longest > 1:
        yield ("loss_average", first, longest)
    if run.has_gradient:
        for descent in (str(name) for name in run.model[DESCENT].values):
            for window in run.windows:
                yield from ((name, descent, window) for name in ("status", "angle", "condition_number"))


def side_by_side(
    runs: Sequence[RunResults], blob: Blob, limits: PageLimits = PageLimits()
) -> dict[str, Any] | None:
    """Return the models of several runs as rows in common bins, for the gradient and window 1."""
    if len(runs) < 2:
        return None
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    if not len(steps):
        return None
    bins = Bins.of(0, len(steps), min(limits.columns, max(limits.cells // len(runs), limits.least_columns)))
    found: dict[str, Any] = {"kind": "run", "rows": [run.name for run in runs], "edges": bins.edges.tolist()}
    found["steps"] = blob.add(steps)
    names = ("status", *ROW_VARIABLES) if any(run.has_gradient for run in runs) else ("update_to_weight",)
    found["values"] = {}
    for name in names:
        columns = [_spread(run[name], run.steps, steps, name) for run in runs]
        rows = Rows("run", found["rows"], xr.Dataset({name: ((STEP, "run"), np.stack(columns, axis=1))}), "run")
        suffix = "" if name == "update_to_weight" else f"|{DESCENTS[0]}|1"
        found["values"][name + suffix] = rows.packed(blob, name, DESCENTS[0], 1, bins)
    return found


def _spread(values: NDArray[Any], own: NDArray[Any], steps: NDArray[Any], name: str) -> NDArray[Any]:
    """Place the values of a run at the steps of all runs."""
    spread = np.full(len(steps), Status.NOT_LOGGED, np.int8) if name == "status" else np.full(len(steps), np.nan)
    spread[np.searchsorted(steps, own)] = values
    return spread


def _logarithm(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the decadic logarithm, which is negative infinity for 0; NaN for negative values."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log10(np.asarray(values, np.float64))


def _plain(values: Iterable[Any]) -> list[float | None]:
    """Return numbers as JSON can store them."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
