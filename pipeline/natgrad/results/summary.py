"""Summarize results in a few numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from natgrad.results.dataset import WITHOUT_DECAY
from natgrad.results.objective import Objective
from natgrad.results.recovery import qualification
from natgrad.schema.variables import Status

__all__ = ["NEEDED", "overview"]

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


def overview(tree: xr.DataTree) -> dict[str, Any]:
    """Summarize the results of the model, for the gradient and window 1.

    Parameters
    ----------
    tree : DataTree
        Results, see `natgrad.results.dataset`.

    Returns
    -------
    dict
        ``updates`` is the number of updates, and ``status`` that of the updates with each status. ``angle`` and
        ``condition_number`` are the smallest, median and largest finite value, or None if there are no finite
        values, and so are those of ``update_to_weight``, the norm of the update relative to that of the parameters.
        ``angle_without_decay`` is the same for the updates without weight decay, if the results have them.
        ``gradient_source`` is the origin of the gradients, or ``none``. ``gradient_recovery`` has what qualifies
        recovered gradients.
        ``objective`` describes whether losses and gradients belong to one objective, see
        `natgrad.results.objective.Objective`.
    """
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    status, counts = np.unique(model["status"].values, return_counts=True)
    numbers: dict[str, Any] = {
        "objective": Objective.of(tree["model"].to_dataset(), tree.attrs.get("evaluation", "unknown")).to_json(),
        "updates": int((model["step_span"] > 0).sum()),
        "status": {Status(int(s)).name.lower(): int(n) for s, n in zip(status, counts, strict=True)},
    }
    numbers |= {name: _spread(model[name]) for name in ("angle", "condition_number", "update_to_weight")}
    numbers["gradient_source"] = tree.attrs["gradient_source"]
    found = qualification({str(name): value for name, value in tree.attrs.items()})
    numbers |= {"gradient_recovery": found} if found else {}
    if WITHOUT_DECAY.strip("/") in tree.children:
        rest = tree[f"{WITHOUT_DECAY}/model"].to_dataset().sel(descent="gradient", window=1)
        numbers["angle_without_decay"] = _spread(rest["angle"])
    return numbers


def _spread(variable: xr.DataArray) -> list[float] | None:
    values = variable.values[np.isfinite(variable.values)]
    return [float(f(values)) for f in (np.min, np.median, np.max)] if values.size else None
