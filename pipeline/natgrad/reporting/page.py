"""Write the report page of runs: an interactive overview, Figure 3 of the paper, tables and warnings.

The page is one self-contained file that works offline: it contains its data (`natgrad.reporting.page_data`), its
program (``assets/report.js``) and the plotting library. It depends only on the results and on the version of that
library, so equal results give equal bytes.

The library is BokehJS, from the Python package bokeh. Only its JavaScript is used: importing the Python package
would take longer than all other work on a small run.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import markupsafe
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from natgrad.reporting.eigenvalues import exact_curves, measured_points
from natgrad.reporting.page_data import Blob, kinds_of, run_data, side_by_side
from natgrad.reporting.page_files import asset, library, page_environment
from natgrad.reporting.run_results import RunResults, extent, number
from natgrad.results.objective import COMPARING_DESCENTS
from natgrad.results.recovery import qualification_text
from natgrad.schema.names import DESCENT, DESCENTS, REPLICATE, TENSOR, WINDOW
from natgrad.schema.variables import WITHOUT_GRADIENTS, ShiftedMetric, Status
from natgrad.storage import Location, open_storage

__all__ = ["STATUS_MEANING", "WINDOW_FACTS", "page_text", "write_report"]

T = TypeVar("T")

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
    Status.SKIPPED: "The optimizer skipped the update, because a gradient was not finite (mixed precision).",
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
    trees: Mapping[str, xr.DataTree], page: Location, progress: Callable[[int, int], None] | None = None
) -> Location:
    """Write the report page of one or several runs.

    The page starts with a sentence about the runs, an overview of each with the table of its tensors, and Figure 3.
    The page states if results have no steps or no finite values.

    Parameters
    ----------
    trees : mapping of str to DataTree
        Results by name of the run, see `natgrad.results.dataset.label`.
    page : str, Path or Storage
        The HTML file. It is replaced atomically.
    progress : callable, optional
        Called with the number of finished parts of the page and their total number.

    Returns
    -------
    str, Path or Storage
        ``page``, unchanged.

    Raises
    ------
    InputError
        If a tree does not hold results.
    """
    text = page_text([RunResults.of(name, tree) for name, tree in trees.items()], progress=progress)
    # File names may contain bytes that are not text.
    open_storage(page).put(text.encode("utf-8", errors="replace"))
    return page


def page_text(
    runs: Sequence[RunResults], *, served: bool = False, progress: Callable[[int, int], None] | None = None
) -> str:
    """Return the page of some runs.

    Parameters
    ----------
    runs : sequence of RunResults
    served : bool
        Whether a server answers requests of the page for further values, see `natgrad.reporting.serving`.
    progress : callable, optional
        See `write_report`.
    """
    environment = page_environment()
    environment.filters |= {"number": number, "percent": _percent}
    return environment.get_template("report.html").render(_content(runs, served, progress))


# Contents of the page ------------------------------------------------------------------------------------------


def _content(
    runs: Sequence[RunResults], served: bool, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    kinds = [kinds_of(run) for run in runs]
    # The parts are the summaries of rows, and the contents and the data of runs.
    total, done = sum(map(len, kinds)) + 2 * len(runs), itertools.count(1)

    def finished(part: T) -> T:
        if progress is not None:
            progress(next(done), total)
        return part

    summaries = [
        [finished(rows.summary(run.has_gradient)) for rows in each] for run, each in zip(runs, kinds, strict=True)
    ]
    contents = [finished(_run_content(run, f"run-{index}")) for index, run in enumerate(runs, start=1)]
    blob = Blob()
    data: dict[str, Any] = {
        "runs": [finished(run_data(run, blob, len(runs), each)) for run, each in zip(runs, summaries, strict=True)],
        "compared": side_by_side(runs, blob),
        "descents": _DESCENT_LABELS,
        "statuses": [{"name": member.name.lower()} for member in sorted(Status)],
        "eigenvalues": _eigenvalues([run for run in runs if run.has_gradient]),
        "served": served,
    }
    if data["compared"]:
        data["compared"]["summary"] = _compared_summary(runs, contents)
    return {
        "css": markupsafe.Markup(asset("report.css")),
        "scripts": [markupsafe.Markup(script) for script in (*library(), asset("report.js"))] if runs else [],
        # A name must not end the element.
        "data": markupsafe.Markup(json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")),
        "arrays": markupsafe.Markup(blob.compressed().decode()),
        "lead": _lead(runs, contents, summaries),
        "drawn_gradients": any(run.has_gradient for run in runs),
        "runs": contents,
        "gradient_labels": _GRADIENT_LABELS,
        "replicate_labels": _REPLICATE_LABELS,
    }


_DESCENT_LABELS = {
    "gradient": "gradient",
    "corrected": "discrete gradient, eq. (12)",
    "trapezoid": "corrected mean gradient, eq. (12)",
    "taylor": "discrete gradient, eq. (16)",
}


def _eigenvalues(runs: Sequence[RunResults]) -> dict[str, Any]:
    """Return the curves and points of panel A."""
    points = measured_points(runs)
    least = min([1e-2, *(float(np.nanmin(values)) for _, values in points if np.isfinite(values).any())])
    angle, curves = exact_curves(least)
    return {
        "theory": {"angle": angle.tolist(), "values": [_finite(curve) for curve in curves]},
        "points": [
            {"angle": angles.tolist(), "values": [_finite(value) for value in values]} for angles, values in points
        ],
    }


def _finite(values: NDArray[np.float64]) -> list[float | None]:
    """Return numbers as JSON can store them."""
    return [float(value) if math.isfinite(value) else None for value in values]


def _compared_summary(runs: Sequence[RunResults], contents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the summary of each run, like those of tensors."""

    def medians(name: str) -> list[float | None]:
        return [found[1] if (found := each["spreads"].get(name)) is not None else None for each in contents]

    shares = [
        each["shares"]["gradient"][0]["share"] if run.has_gradient else math.nan
        for run, each in zip(runs, contents, strict=True)
    ]
    found: dict[str, Any] = {name: medians(name) for name in ("angle", "condition_number", "update_to_weight")}
    return found | {"share": _finite(np.array(shares))}


def _lead(
    runs: Sequence[RunResults],
    contents: Sequence[Mapping[str, Any]],
    summaries: Sequence[Sequence[Mapping[str, Any]]],
) -> str:
    """Return a sentence that summarizes the results."""
    if not runs:
        return ""
    if len(runs) == 1:
        return _sentence(runs[0], contents[0], summaries[0][0])
    known = [
        (each["shares"]["gradient"][0]["share"], run.name)
        for run, each in zip(runs, contents, strict=True)
        if run.has_gradient and math.isfinite(each["shares"]["gradient"][0]["share"])
    ]
    warned = sum(bool(each["warnings"]) for each in contents)
    text = f"{len(runs)} runs"
    if known:
        low, high = min(known), max(known)
        text += (
            f": {_percent(low[0])} of the updates of {low[1]} are effective (they descend the loss), the fewest of "
            f"all runs, and {_percent(high[0])} of those of {high[1]}, the most"
        )
    without = sum(not run.has_gradient for run in runs)
    text += f"; {without} without gradients" if without else ""
    return text + f"; {warned or 'no'} {'run has' if warned == 1 else 'runs have'} warnings."


def _sentence(run: RunResults, content: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    updates, names = content["updates"], [str(name) for name in run.tensors[TENSOR].values]
    size = (
        f"{updates:,} update{'' if updates == 1 else 's'} of {len(names):,} tensor{'' if len(names) == 1 else 's'}"
    )
    warned = len(content["warnings"])
    ending = f"{warned or 'no'} warning{'' if warned == 1 else 's'}"
    if not run.has_gradient:
        changed = content["spreads"]["update_to_weight"]
        median = "" if changed is None else f", whose median size is {number(changed[1])} of that of the parameters"
        return f"{run.name} has {size}{median}; without gradients, there is no angle and no metric; {ending}."
    share, spread = content["shares"]["gradient"][0]["share"], content["spreads"]["angle"]
    part = _percent(share) if math.isfinite(share) else "An unknown share"
    text = f"{part} of the {size} in {run.name} descend the loss"
    if spread is not None:
        degrees = f"{math.degrees(spread[1]):.0f}°"
        text += f", at a median angle of {number(spread[1])} rad ({degrees}) to the negative gradient"
    if len(names) > 1 and updates:
        effective, angle = tensors["share"], tensors["angle"]
        order = sorted(range(len(names)), key=lambda row: (effective[row] or 0.0, -(angle[row] or 0.0)))
        worst = [f"{names[row]} ({_quality(effective[row] or 0.0, angle[row])})" for row in order[:2]]
        text += f"; the worst tensors are {' and '.join(worst)}"
    source = run.attributes.get("gradient_source", "logged")
    return f"{text}; objective: {run.objective}; gradients: {source}; {ending}."


def _quality(share: float, angle: float | None) -> str:
    """Return how bad a tensor is: its share of effective updates or, if all are effective, its median angle."""
    return (
        f"median angle {number(angle)} rad" if share == 1 and angle is not None else f"{_percent(share)} effective"
    )


def _run_content(run: RunResults, anchor: str) -> dict[str, Any]:
    """Return the variables of the template for one run."""
    status = run["status"]
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
        "provenance": {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
            for name, value in ((name, _plain(value)) for name, value in run.attributes.items())
            if name != "configuration"
        },
        "configuration": {
            str(name): number(value) if isinstance(value, float) else str(value)
            for name, value in dict(run.attributes.get("configuration", {})).items()
        },
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


def _spreads(run: RunResults) -> dict[str, tuple[float, float, float] | None]:
    spreads = {name: extent(run[name]) for name in _SPREADS if name in run.model}
    if run.without_decay is not None:
        rest = run.without_decay["angle"].sel({DESCENT: DESCENTS[0], WINDOW: 1})
        spreads["angle_without_decay"] = extent(rest.values)
    return spreads


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _facts(run: RunResults) -> dict[str, str]:
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
    rates = extent(run["learning_rate"]) if "learning_rate" in run.model else None
    if rates is None:
        facts["Learning rate"] = "not known"
    else:
        low, _, high = (number(rate) for rate in rates)
        facts["Learning rate"] = low if low == high else f"{low} to {high}"
    source = str(run.attributes.get("gradient_source", "logged"))
    if source == "recovered":
        facts["Gradients"] = qualification_text(run.attributes)
    elif source == "replayed":
        replay = dict(run.attributes.get("replay", {}))
        facts["Gradients"] = f"replayed: the objective {replay.get('objective')}, evaluated at each state"
    elif source == "recorded":
        facts["Gradients"] = (
            "recorded in the training loop, as inner products of each update: the mean gradient of both states of "
            "an update is not known"
        )
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


def _window_facts(run: RunResults) -> dict[str, str]:
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


def _warnings(run: RunResults, status: NDArray[Any]) -> list[str]:
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


def _shares(run: RunResults) -> dict[str, list[dict[str, float]]]:
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
            # Losses of different batches provide no information about the objective.
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
        "spreads": {name: extent(found[name].values) for name in _REPLICATE_LABELS},
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


def _percent(share: float) -> str:
    """Format a share in percent; 0 and 100 are exact."""
    if not math.isfinite(share):
        return "–"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"
