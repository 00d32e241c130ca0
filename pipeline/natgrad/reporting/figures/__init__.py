"""Drawings of a page: the figures of the paper, and the results of runs over their steps."""

from natgrad.reporting.figures.canvas import Picture, extent, is_thinned, number
from natgrad.reporting.figures.curves import (
    COMPARED_RUNS,
    SHOWN_TENSORS,
    RunResults,
    angle_curve,
    comparison,
    condition_curve,
    relative_update_curve,
    small_panels,
)
from natgrad.reporting.figures.paper import (
    descent_balls,
    eigenvalue_curves,
    limit_curve,
    loss_curve,
    metric_field,
    spectrum,
)

__all__ = [
    "COMPARED_RUNS",
    "SHOWN_TENSORS",
    "Picture",
    "RunResults",
    "angle_curve",
    "comparison",
    "condition_curve",
    "descent_balls",
    "eigenvalue_curves",
    "extent",
    "is_thinned",
    "limit_curve",
    "loss_curve",
    "metric_field",
    "number",
    "relative_update_curve",
    "small_panels",
    "spectrum",
]
