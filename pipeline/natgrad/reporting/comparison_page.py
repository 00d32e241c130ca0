"""Write the page that compares several runs: aligned curves, differing options, and differences of tensors.

Like the report, the page is one self-contained file that works offline, with BokehJS.
"""

from __future__ import annotations

import json
import math
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

_CURVES = {
    "loss": ("Loss", False),
    "angle": ("Angle ψ (rad)", False),
    "condition_number": ("Condition number κ", True),
    "update_to_weight": ("|θ′ − θ| / |θ|", True),
}
"""Title of each curve, and whether its axis is logarithmic."""

_AXES = {"step": "step", "loss": "smallest loss so far", "length": "length of the path of updates"}

_TENSORS = 200
"""Number of tensors in the table."""

_CONFIGURATION = ("learning_rate", "weight_decay")
_RESULTS = ("median_angle", "median_condition_number", "last_loss")


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
            overview=[{name: _cell(value) for name, value in row.items()} for row in comparison.overview],
            runs=[str(run) for run in comparison.curves[RUN].values],
            options={name: [_cell(value) for value in of.values()] for name, of in comparison.options.items()},
            tensors=_tensor_rows(comparison),
            warnings=comparison.warnings,
        )
    )
    page.put(text.encode("utf-8", errors="replace"))
    return page


def _data(comparison: Comparison) -> dict[str, Any]:
    positions = comparison.curves[POSITION[comparison.align]].values.astype(np.float64)
    bins = Bins.of(0, len(positions), _COLUMNS)
    curves = []
    for name, (title, logarithmic) in _CURVES.items():
        values = comparison.curves[name].values.astype(np.float64)
        if np.isfinite(values).any():
            rows = binned([values.T], bins).median if len(positions) else values
            positive = logarithmic and (rows[np.isfinite(rows)] > 0).all()
            curves.append({"title": title, "log": bool(positive), "values": [_finite(row) for row in rows]})
    steps = binned([comparison.curves["at_step"].values.T], bins).least
    return {
        "axis": _AXES[comparison.align],
        # Runs start at the largest loss.
        "reversed": comparison.align == "loss",
        "positions": _finite(positions[bins.edges[:-1]]),
        "steps": [_finite(row) for row in steps],
        "curves": curves,
        "parallel": _parallel(comparison),
    }


def _parallel(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the axes of parallel coordinates: numbers of the configuration that differ, and results."""
    rows = {str(row["run"]): row for row in comparison.overview}
    columns = {name: [rows[run].get(name) for run in rows] for name in (*_CONFIGURATION, *_RESULTS)}
    for option, values in comparison.options.items():
        columns = {option: list(values.values()), **columns}
    found = []
    for name, column in columns.items():
        numbers = [value for value in column if isinstance(value, int | float) and math.isfinite(value)]
        if len(numbers) == len(column) and len(set(numbers)) > 1:
            found.append({"name": name.replace("_", " "), "values": numbers, "log": min(numbers) > 0})
    configured = {axis["name"] for axis in found} - {name.replace("_", " ") for name in _RESULTS}
    return found if configured and len(rows) > 2 else []


def _tensor_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the tensors whose mean angles differ most."""
    found = comparison.tensors
    order = np.argsort(-np.nan_to_num(found["difference"].values, nan=-1.0), kind="stable")[:_TENSORS]
    return [
        {
            "name": str(found[TENSOR].values[index]),
            "difference": _cell(float(found["difference"].values[index])),
            "angles": [_cell(float(value)) for value in found["mean_angle"].values[:, index]],
        }
        for index in order
    ]


def _finite(values: NDArray[Any]) -> list[float | None]:
    """Return numbers as JSON can store them, with the digits that are drawn."""
    return [float(f"{value:.7g}") if math.isfinite(value) else None for value in values]


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
