"""Write the page that compares several runs: aligned curves, differing options, and differences of tensors.

Like the report, the page is one self-contained file that works offline, with BokehJS.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import markupsafe
import numpy as np
from numpy.typing import NDArray

from natgrad.reporting.binning import Bins, binned
from natgrad.reporting.page_files import asset, library, page_environment
from natgrad.reporting.run_results import number
from natgrad.results.comparison import POSITION, Comparison
from natgrad.schema.names import RUN, TENSOR
from natgrad.storage import Storage

__all__ = ["write_comparison"]

_COLUMNS = 1000
"""Maximum number of positions of a curve. More are reduced to medians of consecutive ones."""

_CURVES = {"loss": "loss", "angle": "angle ψ (rad)", "condition_number": "condition number κ"}
_CURVES |= {"update_to_weight": "|θ′ − θ| / |θ|"}

_LOGARITHMIC = {"condition_number", "update_to_weight"}
_DECADES = 100.0
"""Ratio of the largest to the smallest value from which a loss or an option has a logarithmic scale."""

_AXES = {"step": "step", "loss": "smallest loss so far", "length": "length of the path of updates"}

_TENSORS, _TENSORS_DRAWN = 200, 30
"""Number of tensors in the table, and in the heat map."""

_AXES_DRAWN, _TEXTS_DRAWN = 6, 12
"""Number of axes of the configuration that are drawn at first, and of different texts on an axis."""

_RESULTS = ("median_angle", "median_condition_number", "effective_share", "last_loss")

_TITLES = {
    "run": "Run",
    "updates": "Updates",
    "effective_share": "Effective",
    "median_angle": "Median ψ (rad)",
    "median_condition_number": "Median κ",
    "learning_rate": "Learning rate",
    "first_loss": "First loss",
    "last_loss": "Last loss",
}


def write_comparison(comparison: Comparison, page: Storage) -> Storage:
    """Write the page of a comparison.

    Parameters
    ----------
    comparison : Comparison
    page : Storage
        The HTML file. It is replaced atomically.

    Returns
    -------
    Storage
        ``page``, unchanged.
    """
    text = (
        page_environment()
        .get_template("comparison.html")
        .render(
            css=markupsafe.Markup(asset("report.css")),
            scripts=[markupsafe.Markup(script) for script in (*library(), asset("comparison.js"))],
            # A name must not end the element.
            data=markupsafe.Markup(json.dumps(_data(comparison), allow_nan=False).replace("<", r"\u003c")),
            axis=_AXES[comparison.align],
            lead=_lead(comparison),
            titles=_TITLES,
            overview=[{name: _entry(value) for name, value in row.items()} for row in comparison.overview],
            runs=_runs(comparison),
            options=_cells(comparison.options),
            configuration=_cells(comparison.configuration),
            tensors=_tensor_rows(comparison),
            warnings=comparison.warnings,
        )
    )
    page.put(text.encode("utf-8", errors="replace"))
    return page


def _runs(comparison: Comparison) -> list[str]:
    return [str(run) for run in comparison.curves[RUN].values]


def _lead(comparison: Comparison) -> str:
    """Return a sentence that summarizes the comparison."""

    def extremes(name: str) -> tuple[tuple[float, str], tuple[float, str]] | None:
        known = [(float(row[name]), str(row["run"])) for row in comparison.overview if row[name] is not None]
        return (min(known), max(known)) if known else None

    losses, angles = extremes("last_loss"), extremes("median_angle")
    parts = []
    if losses is not None:
        parts.append(f"{losses[0][1]} has the smallest last loss, {number(losses[0][0])}")
    if angles is not None:
        (low, first), (high, last) = angles
        parts.append(
            f"the median angle to the negative gradient reaches from {number(low)} rad ({math.degrees(low):.0f}°, "
            f"{first}) to {number(high)} rad ({math.degrees(high):.0f}°, {last})"
        )
    found = "; ".join(parts) or "no run has losses or angles"
    return f"Of {len(comparison.overview)} runs, {found}."


def _data(comparison: Comparison) -> dict[str, Any]:
    positions = comparison.curves[POSITION[comparison.align]].values.astype(np.float64)
    bins = Bins.of(0, len(positions), _COLUMNS)
    curves = []
    for name, title in _CURVES.items():
        values = comparison.curves[name].values.astype(np.float64)
        known = values[np.isfinite(values)]
        if known.size:
            rows = binned([values.T], bins).median if len(positions) else values
            logarithmic = known.min() > 0 if name in _LOGARITHMIC else name == "loss" and _spans_decades(known)
            entry = {"title": title, "log": bool(logarithmic), "angle": name == "angle"}
            curves.append(entry | {"values": [_finite(row) for row in rows]})
    steps = binned([comparison.curves["at_step"].values.T], bins).least
    drawn = _most_different(comparison)[:_TENSORS_DRAWN]
    return {
        "runs": _runs(comparison),
        "axis": _AXES[comparison.align],
        # Runs start at the largest loss.
        "reversed": comparison.align == "loss",
        "log": comparison.align == "loss" and _spans_decades(positions),
        "positions": _finite(positions[bins.edges[:-1]]),
        "steps": [_finite(row) for row in steps],
        "curves": curves,
        "axes": _axes(comparison),
        "heat": {
            "names": [str(comparison.tensors[TENSOR].values[index]) for index in drawn],
            "values": [_finite(comparison.tensors["mean_angle"].values[:, index]) for index in drawn],
        },
    }


def _axes(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the axes of parallel coordinates: values of the configuration that differ, and results.

    The configuration that explains the results best comes first. Runs are coloured by it.
    """
    columns = {name: list(values.values()) for name, values in comparison.configuration.items()}
    columns |= {name: each for name, of in comparison.options.items() if _is_scale(each := list(of.values()))}
    results = {_TITLES[name]: [row.get(name) for row in comparison.overview] for name in _RESULTS}
    if not columns:
        columns["learning rate"] = [row.get("learning_rate") for row in comparison.overview]
    columns = {name: column for name, column in columns.items() if _is_axis(column)}
    results = {name: column for name, column in results.items() if _is_axis(column)}
    strength = {
        name: max((_association(column, result) for result in results.values()), default=0.0)
        for name, column in columns.items()
    }
    ordered = sorted(columns, key=lambda name: -strength[name])
    configuration = [
        _axis(name, columns[name], configuration=True, drawn=place < _AXES_DRAWN)
        for place, name in enumerate(ordered)
    ]
    return configuration + [
        _axis(name, column, configuration=False, drawn=True) for name, column in results.items()
    ]


def _association(column: Sequence[Any], result: Sequence[Any]) -> float:
    """Return how well values explain the order of results, from 0 to 1.

    This is the absolute rank correlation for numbers, and the correlation ratio of the ranks for text.
    """
    pairs = [(one, other) for one, other in zip(column, result, strict=True) if None not in (one, other)]
    if len(pairs) < 3:
        return 0.0
    order = np.argsort(np.argsort([other for _, other in pairs])).astype(np.float64)
    if _is_scale([one for one, _ in pairs]):
        ranks = np.unique([one for one, _ in pairs], return_inverse=True)[1].astype(np.float64)
        return 0.0 if np.ptp(ranks) == 0 else abs(float(np.corrcoef(ranks, order)[0, 1]))
    groups = np.unique([str(one) for one, _ in pairs], return_inverse=True)[1]
    means = np.bincount(groups, order) / np.bincount(groups)
    return math.sqrt(float(np.var(means[groups]) / np.var(order)))


def _is_scale(column: Sequence[Any]) -> bool:
    """Return True if all values are numbers."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in column)


def _is_axis(column: Sequence[Any]) -> bool:
    """Return True if values differ and can be drawn: numbers, or a few different texts."""
    known = [value for value in column if value is not None]
    if len({json.dumps(value) for value in known}) < 2 or not all(isinstance(v, str | int | float) for v in known):
        return False
    return _is_scale(known) or len({str(value) for value in known}) <= min(_TEXTS_DRAWN, len(known) - 1)


def _axis(name: str, column: Sequence[Any], **entries: bool) -> dict[str, Any]:
    known = [value for value in column if value is not None]
    scale = _is_scale(known)
    values = column if scale else [None if value is None else str(value) for value in column]
    log = scale and "ψ" not in name and _spans_decades(np.array(known))
    return {"name": name, "values": values, "log": log, **entries}


def _spans_decades(values: NDArray[Any]) -> bool:
    """Return True if a linear scale would hide small values: all are positive, and the range is large."""
    return bool(values.size and values.min() > 0 and values.max() >= _DECADES * values.min())


def _most_different(comparison: Comparison) -> NDArray[np.int64]:
    """Return the positions of the tensors in the table: those whose mean angles differ most."""
    difference = comparison.tensors["difference"].values
    return np.argsort(-np.nan_to_num(difference, nan=-1.0), kind="stable")[:_TENSORS]


def _tensor_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the tensors whose mean angles differ most."""
    found = comparison.tensors
    return [
        {
            "name": str(found[TENSOR].values[index]),
            "difference": _cell(float(found["difference"].values[index])),
            "angles": [_cell(float(value)) for value in found["mean_angle"].values[:, index]],
        }
        for index in _most_different(comparison)
    ]


def _finite(values: NDArray[Any]) -> list[float | None]:
    """Return numbers as JSON can store them, with the digits that are drawn."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


def _cells(properties: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    return {name: {run: _cell(value) for run, value in of_run.items()} for name, of_run in properties.items()}


def _entry(value: Any) -> dict[str, str]:
    """Return the text of a cell, and its value for sorting."""
    return {"text": _cell(value), "value": "" if value is None else str(value)}


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return (
        number(value)
        if isinstance(value, float)
        else str(value)
        if isinstance(value, str | int)
        else json.dumps(value)
    )
