"""A few plain numbers that summarize results, for terminals and logs."""

from __future__ import annotations

from typing import Any

import numpy as np

from natgrad.schema.variables import Status

__all__ = []


def overview(tree: Any) -> dict[str, Any]:
    """Plain numbers of the whole model, compared with the gradient, step by step."""
    model = tree["model"].to_dataset().sel(descent="gradient", window=1)
    status, counts = np.unique(model["status"].values, return_counts=True)
    overview: dict[str, Any] = {
        "status": {Status(int(s)).name.lower(): int(n) for s, n in zip(status, counts, strict=True)}
    }
    for name in ("angle", "condition_number"):
        values = model[name].values
        values = values[np.isfinite(values)]
        spread = (np.min, np.median, np.max)
        overview[name] = [float(f(values)) for f in spread] if values.size else None
    return overview
