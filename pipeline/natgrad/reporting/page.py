"""Write the report page: Figure 3 of the paper for one or several runs, with tables and warnings.

The page is one self-contained file: figures are vector graphics, there is no script, and nothing is downloaded. It
depends only on the results, so equal results give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import jinja2
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.reporting import figures
from natgrad.results.objective import COMPARING_DESCENTS
from natgrad.results.recovery import qualification_text
from natgrad.schema.names import DESCENT, DESCENTS, REPLICATE, TENSOR, WINDOW
from natgrad.schema.variables import WITHOUT_GRADIENTS, ShiftedMetric, Status
from natgrad.storage import Location, open_storage

__all__ = ["STATUS_MEANING", "WINDOW_FACTS", "write_report"]

STATUS_MEANING: dict[Status, str] = {
    Status.EFFECTIVE: "y·g > 0: the update descends the loss, so metrics M with M g = y exist.",
    Status.ORTHOGONAL: "y·g = 0: to first order the update does not change the loss. No metric exists.",
    Status.OBTUSE: "y·g < 0: to first order the update raises the loss. No metric exists.",
    Status.ZERO_UPDATE: "The parameters did not change, so the update has no direction, no angle and no metric.",
    Status.ZERO_GRADIENT: "The gradient is zero, so it has no direction, and there is no angle and no metric.",
    Status.NON_FINITE: "A parameter or a gradient is NaN or infinite, for example because the run diverged.",
    Status.NO_LEARNING_RATE: "The log has no positive learning rate. Set it with natgrad analyze --learning-rate.",
    Status.UNVERIFIABLE: "The update is not larger than the rounding of the stored parameters, so its direction "
    "is not known. Log the parameters in a wider dtype.",
    Status.UNDERFLOW: "The update or the gradient is not zero, but its inner products underflow in float64. "
    "Log it in other units: multiply the parameters, or the loss and its gradients, by a constant.",
    Status.OVERFLOW: "The parameters and gradients are finite, but inner products overflow in float64. "
    "Log them in other units: divide the parameters, or the loss and its gradients, by a constant.",
    Status.NOT_LOGGED: "This run of the sweep did not log the step; another run did.",
}
"""Explanation of each status."""

_GRADIENT_LABELS = {
    "gradient": "with the gradient",
    "corrected": "with the discrete gradient of eq. (12): the loss decreased",
    "trapezoid": "with the corrected mean gradient of both states, eq. (12): the loss decreased",
    "taylor": "with the discrete gradient of eq. (16), if Hessian-vector products were logged",
}


def write_report(
    trees: Mapping[str, xr.DataTree], page: Location, *, compared_runs: int = figures.COMPARED_RUNS
) -> Location:
    """Write the report page of one or several runs.

    Panel A of Figure 3 has the points of all runs. Each run has its spectrum and its loss (panels B and C, D and E
    of the paper), its angles and condition numbers, and tables. The page states if results have no steps or no
    finite values.

    Parameters
    ----------
    trees : mapping of str to DataTree
        Results by name of the run, see `natgrad.results.dataset.label`.
    page : str, Path or Storage
        The HTML file. It is replaced atomically.
    compared_runs : int
        Maximum number of runs to compare in one figure.

    Returns
    -------
    str, Path or Storage
        ``page``, unchanged.

    Raises
    ------
    InputError
        If a tree does not hold results.
    """
    runs = [figures.RunResults.of(name, tree) for name, tree in trees.items()]
    content = _content(runs) | _side_by_side(runs, compared_runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("natgrad.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": figures.number, "percent": _percent}
    text = environment.get_template("report.html").render(content)
    # File names may contain bytes that are not text.
    open_storage(page).put(text.encode("utf-8", errors="replace"))
    return page


# Contents of the page ------------------------------------------------------------------------------------------


def _content(runs: Sequence[figures.RunResults]) -> dict[str, Any]:
    letters = _letters()
    next(letters)
    contents = [_run_content(run, f"run-{index}", letters) for index, run in enumerate(runs, start=1)]
    return {
        "curves": figures.eigenvalue_curves(runs) if runs else None,
        "runs": contents,
        "gradient_labels": _GRADIENT_LABELS,
        "replicate_labels": _REPLICATE_LABELS,
    }


def _side_by_side(runs: Sequence[figures.RunResults], limit: int) -> dict[str, Any]:
    compared = 1 < len(runs) <= limit
    return {
        "comparison": figures.comparison(runs) if compared else None,
        "compared_at_most": limit,
    }


def _letters() -> Iterator[str]:
    """Yield A, B, .., Z, AA, AB, .."""
    for index in count():
        yield (chr(ord("A") + index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _run_content(run: figures.RunResults, anchor: str, letters: Iterator[str]) -> dict[str, Any]:
    """Return the variables of the template for one run."""
    status = run["status"]
    letter_of_spectrum, letter_of_loss = next(letters), next(letters)
    # If a model has one tensor, the tensor is the model, which is drawn already.
    shown = run.largest_tensors() if len(run.steps) and run.tensors.sizes[TENSOR] > 1 else []
    columns = _TENSOR_COLUMNS if run.has_gradient else _TENSOR_COLUMNS_WITHOUT_GRADIENTS
    return {
        "anchor": anchor,
        "name": run.name,
        "updates": len(run.steps),
        "facts": _facts(run),
        "warnings": _warnings(run, status),
        "statuses": [
            {"name": member.name.lower(), "meaning": meaning, "count": int((status == member).sum())}
            for member, meaning in STATUS_MEANING.items()
        ],
        "spreads": _spreads(run),
        "has_gradient": run.has_gradient,
        "shares": _shares(run),
        "cautions": dict.fromkeys(COMPARING_DESCENTS, run.objective.caution),
        "replicates": None if run.replicates is None else _replicates(run.replicates),
        "windows": sorted({1, max(run.windows)}),
        "letters": (letter_of_spectrum, letter_of_loss),
        "spectrum": (
            figures.spectrum(run, letter_of_spectrum)
            if run.has_gradient
            else figures.relative_update_curve(run, letter_of_spectrum)
        ),
        "loss": figures.loss_curve(run, letter_of_loss),
        **(_figures_of_gradients(run, shown) if run.has_gradient else {}),
        "tensor_columns": columns,
        "tensors": [_tensor_row(run, name, columns) for name in shown],
        "tensors_left_out": run.tensors.sizes[TENSOR] - len(shown) if shown else 0,
        "thinned": figures.is_thinned(len(run.steps)),
        "provenance": {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            for name, value in ((name, _plain(value)) for name, value in run.attributes.items())
        },
    }


def _figures_of_gradients(run: figures.RunResults, shown: Sequence[str]) -> dict[str, figures.Picture | None]:
    """Draw the angles and condition numbers of the model and of some tensors."""
    return {
        "angle": figures.angle_curve(run),
        "condition": figures.condition_curve(run),
        "tensor_angle": figures.small_panels(run, shown, "angle") if shown else None,
        "tensor_condition": figures.small_panels(run, shown, "condition_number") if shown else None,
    }


_SPREADS = (
    "angle",
    "angle_uncertainty",
    "condition_number",
    "preconditioner_condition_number",
    "parameter_norm",
    "displacement_norm",
    "update_to_weight",
)


def _spreads(run: figures.RunResults) -> dict[str, tuple[float, float, float] | None]:
    spreads = {name: figures.extent(run[name]) for name in _SPREADS if name in run.model}
    if run.without_decay is not None:
        rest = run.without_decay["angle"].sel({DESCENT: DESCENTS[0], WINDOW: 1})
        spreads["angle_without_decay"] = figures.extent(rest.values)
    return spreads


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _facts(run: figures.RunResults) -> dict[str, str]:
    steps = run.steps
    facts = {"Source": str(run.attributes.get("source") or "not recorded")}
    if len(steps):
        facts["Steps"] = f"{steps[0]:.0f} to {steps[-1]:.0f}, {len(steps)} updates"
        if "step_span" in run.model:
            spans = sorted({int(span) for span in run["step_span"]})
            if spans != [1]:
                facts["Steps between logged states"] = ", ".join(map(str, spans[:6])) + (
                    ", …" if len(spans) > 6 else ""
                )
    else:
        facts["Steps"] = "none"
    facts["Tensors"] = str(run.tensors.sizes[TENSOR])
    if "elements" in run.attributes:
        facts["Elements"] = str(run.attributes["elements"])
    rates = figures.extent(run["learning_rate"]) if "learning_rate" in run.model else None
    if rates is None:
        facts["Learning rate"] = "not known"
    else:
        low, _, high = (figures.number(rate) for rate in rates)
        facts["Learning rate"] = low if low == high else f"{low} to {high}"
    if run.attributes.get("gradient_source") == "recovered":
        facts["Gradients"] = qualification_text(run.attributes)
    facts["Objective"] = str(run.objective)
    facts |= _window_facts(run)
    bounded = run.model.get("shifted_metric")
    if bounded is not None:
        # The metric Mbar of eq. (17) belongs to the discrete gradient.
        flags = bounded.sel({DESCENT: "corrected", WINDOW: 1}).values
        known = int((flags != ShiftedMetric.UNKNOWN).sum())
        if known:
            small = int(np.isin(flags, (ShiftedMetric.DEFINITE_OPTIMAL, ShiftedMetric.DEFINITE)).sum())
            facts["Learning rate below the bound of eq. (17)"] = f"at {small} of {known} updates"
    return facts


def _window_facts(run: figures.RunResults) -> dict[str, str]:
    """Return the smallest windows over which the run always descends."""
    facts = {}
    objective = run.objective
    for name, text in WINDOW_FACTS.items():
        if name not in run.model:
            continue
        caution = objective.caution if name == "decreasing_window" else ""
        if caution and not objective.comparable:
            facts[text] = caution
            continue
        if name == "effective_window" and not run.has_gradient:
            facts[text] = "not known without gradients"
            continue
        found = run.model[[name, f"{name}_count"]]
        if DESCENT in found.dims:
            found = found.sel({DESCENT: DESCENTS[0]})
        smallest, support = float(found[name]), int(found[f"{name}_count"])
        updates = "1 update" if smallest == 1 else f"{smallest:.0f} updates"
        facts[text] = f"{updates} ({support} such windows)" if support else "none"
        facts[text] += f", {caution}" if caution else ""
    return facts


WINDOW_FACTS = {
    "effective_window": "Smallest window over which updates are always effective",
    "decreasing_window": "Smallest window over which the loss always decreases",
}
"""Labels of the window variables in the table of facts."""


def _warnings(run: figures.RunResults, status: NDArray[Any]) -> list[str]:
    """Return messages that explain the gaps in the curves."""
    updates = len(status)
    if not updates:
        return ["The run has no update: an update requires two logged states."]
    unfinished = str(run.attributes.get("unfinished", ""))
    found = [unfinished[:1].upper() + unfinished[1:] + "."] if unfinished else []
    if not run.has_gradient:
        # The statuses have no other reason.
        return [*found, WITHOUT_GRADIENTS[:1].upper() + WITHOUT_GRADIENTS[1:] + "."]
    found += run.objective.warnings()
    explained = len(found)
    for member, meaning in STATUS_MEANING.items():
        missing = status == member
        if member is not Status.EFFECTIVE and missing.any():
            share = _percent(missing.mean())
            found.append(
                f"{missing.sum()} of {updates} updates ({share}) are {member.name.lower().replace('_', ' ')}, at "
                f"{_step_ranges(run.steps, missing)}. {meaning}"
            )
    if len(found) > explained and not (status == Status.EFFECTIVE).any():
        found.insert(explained, "No update is effective, so there is no metric to draw.")
    if not np.isfinite(run["loss"]).any():
        found.append("No finite loss was logged, so there is no loss curve and no discrete gradient.")
    return found


def _step_ranges(steps: NDArray[np.float64], mask: NDArray[np.bool_], limit: int = 4) -> str:
    """Format the steps of a mask as ranges."""
    masked = np.flatnonzero(mask)
    ranges = np.split(masked, np.flatnonzero(np.diff(masked) > 1) + 1)
    texts = [
        f"{steps[part[0]]:.0f}" + (f"–{steps[part[-1]]:.0f}" if len(part) > 1 else "") for part in ranges[:limit]
    ]
    more = len(ranges) - limit
    tail = f" and {more} more {'range' if more == 1 else 'ranges'}" if more > 0 else ""
    return f"{'step' if len(masked) == 1 else 'steps'} {', '.join(texts)}{tail}"


def _shares(run: figures.RunResults) -> dict[str, list[dict[str, float]]]:
    """Return the share of effective updates for each negative gradient, at window 1 and at the largest."""
    shares: dict[str, list[dict[str, float]]] = {}
    for descent in (str(name) for name in run.model[DESCENT].values):
        shares[descent] = []
        for m in sorted({1, max(run.windows)}):
            # The last m - 1 updates have no complete window.
            complete = max(len(run.steps) - m + 1, 0)
            status = run.model["status"].sel({DESCENT: descent, WINDOW: m}).values[:complete]
            effective = int((status == Status.EFFECTIVE).sum())
            # If no update has a known status, the data for this gradient were not logged, and 0 % would be wrong.
            known = (status <= Status.OBTUSE).any() or not (status == Status.UNVERIFIABLE).any()
            # Losses of different batches say nothing about the objective.
            known &= run.objective.comparable or descent not in COMPARING_DESCENTS
            shares[descent].append(
                {
                    "count": effective,
                    "of": complete,
                    "share": effective / complete if complete and known else math.nan,
                }
            )
    return shares


def _replicates(found: xr.Dataset) -> dict[str, Any]:
    """Summarize the replicates of a stochastic rule over all steps."""
    known = found["status"] <= Status.OBTUSE
    drawn = found["replicate_alignment"].where(known)
    return {
        "count": found.sizes[REPLICATE],
        "updates": int(known.sum()),
        "effective": int(found["effective"].sum()),
        "drawn": int(drawn.notnull().sum()),
        "drawn_effective": int((drawn > 0).sum()),
        "curvature": bool(found["stochastic_alpha"].notnull().any()),
        "definite": int(found["stochastic_definite"].sum()),
        "spreads": {name: figures.extent(found[name].values) for name in _REPLICATE_LABELS},
    }


_REPLICATE_LABELS = {
    "angle": "Angle ψ of the mean update (rad)",
    "angle_error": "Standard error of ψ (rad)",
    "replicate_angle": "Angle ψ of each draw (rad)",
    "condition_number": "Condition number κ of the mean update",
    "condition_number_error": "Standard error of κ",
    "loss_decrease": "Mean decrease of the loss",
    "loss_decrease_error": "Standard error of the mean decrease",
    "learning_rate_bound": "Largest learning rate for which eq. (19) is a metric",
}
"""Labels of the replicate variables."""


_TENSOR_COLUMNS = {
    "angle": "Median ψ",
    "condition_number": "Median κ",
    "gradient_norm": "Median |y|",
    "update_to_weight": "Median |θ′ − θ| / |θ|",
}
"""Variables in the table of tensors, and their labels."""

_TENSOR_COLUMNS_WITHOUT_GRADIENTS = {
    "displacement_norm": "Median |θ′ − θ|",
    "update_to_weight": _TENSOR_COLUMNS["update_to_weight"],
}


def _tensor_row(run: figures.RunResults, name: str, columns: Iterable[str]) -> dict[str, Any]:
    row = {column: figures.extent(run.tensor(column, name)) for column in columns}
    share = float((run.tensor("status", name) == Status.EFFECTIVE).mean()) if run.has_gradient else math.nan
    return {"name": name, "share": share, **row}


def _percent(share: float) -> str:
    """Format a share in percent; 0 and 100 are exact."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
