"""Summarize results in a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from natgrad.results.dataset import WITHOUT_DECAY
from natgrad.results.objective import Objective
from natgrad.results.ranking import RankedTensor, rank_dataset, select, step_parts
from natgrad.results.recovery import qualification
from natgrad.schema.names import STEP, TENSOR
from natgrad.schema.variables import Status

__all__ = ["NEEDED", "course", "group_overview", "overview"]

WORST = 5
"""Number of tensors in a summary."""

COURSE = 32
"""Number of parts of a run in a summary."""

NEEDED = (
    "descent",
    "window",
    "step_span",
    "status",
    "angle",
    "condition_number",
    "update_to_weight",
    "loss_decrease",
    "objective_residual",
)
"""Variables of the model that an overview needs, and their coordinates."""


def overview(tree: xr.DataTree, ranked: Sequence[RankedTensor] | None = None) -> dict[str, Any]:
    """Summarize the results of the model, for the gradient and window 1.

    Parameters
    ----------
    tree : DataTree
        Results, see `natgrad.results.dataset`.
    ranked : sequence of RankedTensor, optional
        Default: the tensors of the results, see `natgrad.results.ranking.rank_dataset`.

    Returns
    -------
    dict
        ``updates`` is the number of updates, and ``status`` that of the updates with each status. ``angle`` and
        ``condition_number`` are the smallest, median and largest finite value, or None if there are no finite
        values, and so are those of ``update_to_weight``, the norm of the update relative to that of the parameters.
        ``angle_without_decay`` is the same for the updates without weight decay, if the results have them.
        ``angle_course`` has medians of consecutive parts of the run, see `course`, and ``worst_tensors`` the first
        `WORST` tensors of the ranking.
        ``gradient_source`` is the origin of the gradients, or ``none``. ``gradient_recovery`` has what qualifies
        recovered gradients.
        ``objective`` describes whether losses and gradients belong to one objective, see
        `natgrad.results.objective.Objective`.
    """
    model = tree["model"].to_dataset()
    numbers: dict[str, Any] = {
        "objective": Objective.of(model, tree.attrs.get("evaluation", "unknown")).to_json(),
        **group_overview(model),
    }
    ranked = rank_dataset(tree["tensor"].to_dataset()) if ranked is None else ranked
    numbers["angle_course"] = course(model)
    numbers["worst_tensors"] = [asdict(one) for one in ranked[:WORST]]
    numbers["gradient_source"] = tree.attrs["gradient_source"]
    found = qualification({str(name): value for name, value in tree.attrs.items()})
    numbers |= {"gradient_recovery": found} if found else {}
    if WITHOUT_DECAY.strip("/") in tree.children:
        rest = tree[f"{WITHOUT_DECAY}/model"].to_dataset().sel(descent="gradient", window=1)
        numbers["angle_without_decay"] = _spread(rest["angle"])
    return numbers


def group_overview(dataset: xr.Dataset, descent: str = "gradient", window: int = 1) -> dict[str, Any]:
    """Summarize one group of results: see `overview`.

    Parameters
    ----------
    dataset : Dataset
        A group with tensors has ``worst_tensors`` instead of minimum, median and maximum of variables.
    descent : str
        Estimate of the negative gradient.
    window : int
        Number of updates in a window.

    Raises
    ------
    InputError
        If the results do not have this descent or window.
    """
    chosen = select(dataset, descent, window)
    counts: Counter[int] = Counter()
    status = chosen["status"]
    for part in step_parts(chosen[["status"]]):
        codes, numbers_of = np.unique(part["status"].values, return_counts=True)
        counts.update(dict(zip(codes.tolist(), numbers_of.tolist(), strict=True)))
    numbers: dict[str, Any] = {
        "updates": int((dataset["step_span"] > 0).sum()),
        "status": {Status(code).name.lower(): counts[code] for code in sorted(counts)},
    }
    if TENSOR in status.dims:
        ranked = rank_dataset(dataset, descent=descent, window=window)
        worst = [asdict(one) for one in ranked[:WORST]]
        return {"tensors": status.sizes[TENSOR], **numbers, "worst_tensors": worst}
    spreads = {name: _spread(chosen[name]) for name in ("angle", "condition_number", "update_to_weight")}
    return numbers | spreads


def course(model: xr.Dataset) -> list[float | None] | None:
    """Return the median angle of up to `COURSE` parts of a run, in order; None if no update has an angle.

    Parameters
    ----------
    model : Dataset
        The group ``/model`` of results. The runs of a sweep are combined.
    """
    angle = select(model[["angle"]], "gradient", 1)["angle"].transpose(..., STEP).values
    if not np.isfinite(angle).any():
        return None
    parts = np.array_split(angle, min(COURSE, angle.shape[-1]), axis=-1)
    finite = [part[np.isfinite(part)] for part in parts]
    return [float(np.median(part)) if part.size else None for part in finite]


def _spread(variable: xr.DataArray) -> list[float] | None:
    values = variable.values[np.isfinite(variable.values)]
    return [float(f(values)) for f in (np.min, np.median, np.max)] if values.size else None
