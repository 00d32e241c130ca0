"""Figures 1 to 3 of the paper, drawn from runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from natgrad.reporting.figures.canvas import (
    EIGENVALUES,
    HEIGHT,
    INK,
    MARKERS,
    MUTED,
    RUN_COLOURS,
    RUN_MARKERS,
    WIDTH,
    Array,
    Picture,
    angle_ticks,
    curve,
    drawable,
    extent,
    legend_above,
    log_limits,
    mark,
    number,
    panel,
    picture,
    placeholder,
    positive,
    step_axis,
)
from natgrad.reporting.figures.curves import RunResults
from natgrad.schema.variables import Status
from natgrad.theory import geometry
from natgrad.theory.geometry import Pair

__all__ = [
    "Loss",
    "descent_balls",
    "eigenvalue_curves",
    "limit_curve",
    "loss_curve",
    "metric_field",
    "spectrum",
    "spread_points",
]

# Figures 1 and 2, in a plane ----------------------------------------------------------------------------------

Loss = Callable[[Array], Array]
"""Function of states, shape (..., 2), that returns their losses, shape (...)."""


def descent_balls(loss: Loss, state: Array, y: Array, g: Array, ball: Array, size: float) -> Picture:
    """Draw Figure 1: the ball of the metric in which the update is steepest descent, and the Euclidean ball.

    Parameters
    ----------
    loss : callable
    state, y, g : array, shape (2,)
        One state, its negative gradient and its update.
    ball : array, shape (points, 2)
        Unit ball of the metric, v' M v = 1.
    size : float
        Radius of the Euclidean ball. The ball of the metric is drawn with the same area.
    """
    figure = Figure(figsize=(2 * WIDTH, HEIGHT + 0.6), layout="constrained")
    turn = np.linspace(0.0, 2.0 * np.pi, len(ball))
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    lengths = np.linalg.norm(ball, axis=1)
    ball = ball / np.sqrt(lengths.max() * lengths.min())
    reach = float(size * np.abs(ball).max())
    panels = zip(figure.subplots(1, 2), "AB", (ball, circle), (g, y), strict=True)
    for axes, letter, outline, steepest in panels:
        _contours(axes, loss, state, 1.6 * reach)
        axes.plot(*(state + size * outline).T, color="#0072b2", linewidth=1.6)
        for vector, label, colour in ((y, "y", INK), (g, "g", "#d55e00")):
            arrow = vector / np.linalg.norm(vector) * reach
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8 if vector is steepest else 0.9}
            axes.annotate("", xy=state + arrow, xytext=state, arrowprops=style)
            axes.text(*(state + 1.12 * arrow), f"${label}$", color=colour, ha="center", va="center")
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=11)
    return picture(
        figure,
        "Contours of the loss around one state, its update g and its negative gradient y. A: the ball of the "
        "metric in which g is steepest descent. B: the Euclidean ball, in which y is steepest descent.",
    )


def metric_field(loss: Loss, states: Array, balls: Array) -> Picture:
    """Draw Figure 2: the space in which the rule descends, as the balls of its metric along the trajectory.

    Parameters
    ----------
    loss : callable
    states : array, shape (steps, 2)
        Trajectory.
    balls : array, shape (steps, points, 2)
        Ball of the metric at each state, centered at 0, with the same scale for all; NaN if there is no metric.
    """
    figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
    axes = figure.subplots()
    middle = (states.max(axis=0) + states.min(axis=0)) / 2.0
    reach = 0.65 * float((states.max(axis=0) - states.min(axis=0)).max())
    _contours(axes, loss, middle, reach)
    axes.plot(states[:, 0], states[:, 1], color="#d55e00", marker=".", markersize=3)
    # The largest ball is a tenth of the plane, so that the balls do not hide the trajectory.
    size = 0.1 * reach / np.nanmax(np.linalg.norm(balls, axis=-1))
    for state, ball in zip(states, balls, strict=True):
        axes.plot(*(state + size * ball).T, color="#0072b2", linewidth=0.9)
    return picture(
        figure,
        f"Contours of the loss, a trajectory of {len(states)} states, and at each state the ball of the metric in "
        "which its update is steepest descent.",
    )


def _contours(axes: Axes, loss: Loss, middle: Array, reach: float) -> None:
    x, y = (np.linspace(centre - reach, centre + reach, 120) for centre in middle)
    axes.contour(x, y, loss(np.stack(np.meshgrid(x, y), axis=-1)), levels=12, cmap="gray", linewidths=0.6)
    axes.set_aspect("equal")
    axes.set_xlabel("first parameter")
    axes.set_ylabel("second parameter")
    axes.grid(visible=False)


# Figure 3 ----------------------------------------------------------------------------------------------------


def limit_curve(rates: Array, angle_change: Array, metric_change: Array) -> Picture:
    """Draw the distance of the discrete gradient and its metric from those of the gradient, by learning rate.

    Parameters
    ----------
    rates : array, shape (runs,)
        Positive, ascending.
    angle_change : array, shape (runs,)
        |psi_bar - psi|, in radian.
    metric_change : array, shape (runs,)
        |Mbar - M| / |M|.
    """
    figure, axes = panel("")
    styles = (("|ψ̄ − ψ| (rad)", angle_change, "#0072b2", "o"), ("‖M̄ − M‖ / ‖M‖ (1)", metric_change, "#d55e00", "^"))
    lines = [
        axes.plot(rates, positive(values), color=colour, marker=marker, markersize=4, label=label)[0]
        for label, values, colour, marker in styles
    ]
    spread = extent(positive(np.concatenate([angle_change, metric_change])))
    if spread is None:
        placeholder(axes, "the discrete gradient equals the gradient")
    else:
        # The curves approach this line, which is proportional to the learning rate.
        line = axes.plot(rates, spread[2] * rates / rates[-1], color=MUTED, linewidth=0.7, label="∝ η")[0]
        log_limits(axes, min(spread[0], spread[2] * rates[0] / rates[-1]), spread[2])
        legend_above(axes, [*lines, line])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate η")
    span = f"from {number(angle_change[-1])} rad to {number(angle_change[0])} rad"
    return picture(
        figure,
        f"Difference between the angles of the discrete gradient and the gradient, {span} as the learning rate "
        f"decreases to {number(rates[0])}.",
    )


def eigenvalue_curves(runs: Sequence[RunResults]) -> Picture:
    """Draw panel A: eq. (9) at |y| = |g|, and the measured eigenvalues."""
    legend_rows = math.ceil(len(runs) / 2)
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.25 + 0.17 * legend_rows), layout="constrained")
    axes = figure.subplots()
    low, high, handles = 1e-2, 1e2, []
    for index, run in enumerate(runs):
        colour, marker = RUN_COLOURS[index % len(RUN_COLOURS)], RUN_MARKERS[index % len(RUN_MARKERS)]
        style: dict[str, Any] = {
            "marker": marker,
            "markersize": 4,
            "linestyle": "none",
            "markerfacecolor": "none",
            "markeredgecolor": colour,
            "markeredgewidth": 0.9,
        }
        handles.append(Line2D([], [], **style))
        angle = run["angle"]
        with np.errstate(all="ignore"):
            scale = run["update_norm"] / run["gradient_norm"]
            values = np.stack([run[name] * scale for name in EIGENVALUES])
        drawn = np.isfinite(angle) & np.isfinite(values[0]) & (values[0] > 0)
        angle, values = angle[drawn], values[:, drawn]
        columns = spread_points(angle, index / len(runs), max(MARKERS // len(runs), 8))
        for value in values:
            points = np.where(value[columns] > 0, value[columns], np.nan)
            axes.plot(angle[columns], points, zorder=3, **style)
            if np.isfinite(points).any():
                low, high = min(low, np.nanmin(points)), max(high, np.nanmax(points))
    # Angles are measured from pi/2, where the curves diverge, so that the curves reach the edge of the panel.
    rest = np.geomspace(max(low * 1e-2, 1e-300), np.pi / 2, 400)
    unit = np.ones_like(rest)
    pair = Pair(unit, np.sin(rest), np.cos(rest) ** 2, np.full(rest.shape, 3))
    lines = [
        axes.plot(np.pi / 2 - rest, exact, color=colour, linestyle=dash, label=label)[0]
        for exact, (label, colour, dash) in zip(geometry.eigenvalues(pair), EIGENVALUES.values(), strict=True)
    ]
    log_limits(axes, low, high)
    axes.set_xlim(0, np.pi / 2)
    angle_ticks(axes, "x", eighths=True)
    axes.set_xlabel("angle ψ between y and g (rad)")
    axes.set_ylabel("eigenvalue × |g| / |y|  (1)")
    axes.set_title("A", loc="left", fontweight="bold", fontsize=11)
    legend_above(axes, lines)
    legend = figure.legend(
        handles, [str(i) for i in range(len(runs))], loc="outside lower center", ncols=min(2, len(runs))
    )
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(drawable(run.name, 30))
    names = ", ".join(run.name for run in runs)
    return picture(
        figure,
        f"Largest, middle and smallest eigenvalue of the optimal metric against the angle psi from 0 to pi/2, "
        f"and the measured eigenvalues of {names} on these curves.",
    )


def spread_points(angle: Array, shift: float, columns: int) -> NDArray[np.int64]:
    """Select points that do not overlap: both ends, and the point closest to the middle of each column.

    All points lie on the curves, so the points of several runs would cover each other and the curves. The columns
    of each run are therefore shifted by a fraction of a column.

    Returns
    -------
    int64 array
        Indices of the selected points.
    """
    if not angle.size:
        return np.zeros(0, np.int64)
    position = angle / (np.pi / 2) * columns + shift
    column = np.floor(position)
    order = np.lexsort((np.abs(position - column - 0.5), column))
    chosen = order[np.unique(column[order], return_index=True)[1]]
    return np.unique(np.concatenate([chosen, [angle.argmin(), angle.argmax()]])).astype(np.int64)


def spectrum(run: RunResults, letter: str) -> Picture:
    """Draw panels B and D: eigenvalues over steps."""
    figure, axes = panel(letter)
    lines, low, high = [], math.inf, 0.0
    for name, (label, colour, dash) in EIGENVALUES.items():
        values = positive(run[name])
        if (spread := extent(values)) is not None:
            lines.append(curve(axes, run.steps, values, color=colour, label=label, linestyle=dash))
            low, high = min(low, spread[0]), max(high, spread[2])
    if lines:
        log_limits(axes, low, high)
    else:
        placeholder(axes, "no effective update:\nno metric to draw" if len(run.steps) else "no update")
    without = run["status"] != Status.EFFECTIVE
    if lines and without.any():
        lines.append(mark(axes, run.steps, without))
    step_axis(axes, run.steps)
    axes.set_ylabel("eigenvalue of optimal metric\n(loss · learning rate / parameter²)")
    legend_above(axes, lines)
    span = f" from {number(low)} to {number(high)}" if lines else "; no update has one"
    return picture(figure, f"Eigenvalues of the optimal metric over the steps of {run.name}{span}.")


def loss_curve(run: RunResults, letter: str) -> Picture:
    """Draw panels C and E: loss over steps."""
    figure, axes = panel(letter)
    loss, average, lines = run["loss"], run.loss_average, []
    spread = extent(loss)
    if spread is None:
        placeholder(axes, "no finite loss was logged" if len(run.steps) else "no update")
    else:
        colour = INK if average is None else MUTED
        width = 1.1 if average is None else 0.7
        lines.append(curve(axes, run.steps, loss, color=colour, label="loss", linewidth=width))
        if average is not None and np.isfinite(average).any():
            label = f"mean of {max(run.windows)}"
            lines.append(curve(axes, run.steps, average, color="#0072b2", label=label, linewidth=1.6))
        if spread[0] > 0 and spread[2] >= 10 * spread[0]:
            log_limits(axes, spread[0], spread[2])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    step_axis(axes, run.steps)
    axes.set_ylabel("loss")
    legend_above(axes, lines if average is not None else [])
    ends = f" from {number(loss[0])} to {number(loss[-1])}" if spread is not None else "; no finite loss was logged"
    return picture(figure, f"Loss over the steps of {run.name}{ends}.")
