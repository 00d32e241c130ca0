"""Figures 1 to 3 of the paper, drawn from runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import contourpy
import numpy as np
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
    fit,
    linear_ticks,
    log_limits,
    log_ticks,
    mark,
    number,
    picture,
    placeholder,
    positive,
    step_axis,
)
from natgrad.reporting.figures.chart import Arrow, Axis, Chart, Line, Note, Panel
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
    turn = np.linspace(0.0, 2.0 * np.pi, len(ball))
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    lengths = np.linalg.norm(ball, axis=1)
    ball = ball / np.sqrt(lengths.max() * lengths.min())
    reach = float(size * np.abs(ball).max())
    panels = []
    for letter, outline, steepest in zip("AB", (ball, circle), (g, y), strict=True):
        panel = _plane(letter, state, 1.6 * reach)
        panels.append(panel)
        panel.lines.append(_through(state + size * outline, "#0072b2", 1.6))
        panel.contours = _contours(loss, panel)
        for vector, label, colour in ((y, "y", INK), (g, "g", "#d55e00")):
            arrow = vector / np.linalg.norm(vector) * reach
            panel.arrows.append(Arrow(state, state + arrow, colour, 1.8 if vector is steepest else 0.9))
            x, up = (state + 1.12 * arrow).tolist()
            panel.notes.append(Note(label, x, up, colour, in_data=True))
    return picture(
        Chart(2 * WIDTH, WIDTH, [panels]),
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
    middle = (states.max(axis=0) + states.min(axis=0)) / 2.0
    reach = 0.65 * float((states.max(axis=0) - states.min(axis=0)).max())
    panel = _plane("", middle, reach)
    trajectory = _through(states, "#d55e00", 1.1)
    trajectory.marker, trajectory.size = ".", 3
    panel.lines.append(trajectory)
    # The largest ball is a tenth of the plane, so that the balls do not hide the trajectory.
    size = 0.1 * reach / np.nanmax(np.linalg.norm(balls, axis=-1))
    panel.lines += [
        _through(state + size * ball, "#0072b2", 0.9) for state, ball in zip(states, balls, strict=True)
    ]
    panel.contours = _contours(loss, panel)
    return picture(
        Chart(WIDTH, WIDTH, [[panel]]),
        f"Contours of the loss, a trajectory of {len(states)} states, and at each state the ball of the metric in "
        "which its update is steepest descent.",
    )


def _plane(letter: str, middle: Array, reach: float) -> Panel:
    """Return a panel of the two parameters around a point."""
    x, y = (
        Axis(label, float(centre) - reach, float(centre) + reach, ticks=linear_ticks)
        for label, centre in zip(("first parameter", "second parameter"), middle, strict=True)
    )
    return Panel(x, y, letter, letter=True, grid=False)


def _through(points: Array, colour: str, width: float) -> Line:
    """Return the curve through points, shape (points, 2)."""
    return Line(points[:, 0], points[:, 1], colour, width)


def _contours(loss: Loss, panel: Panel) -> list[Line]:
    """Return the contours of the loss at twelve levels, from dark to light."""
    x, y = (np.linspace(axis.low, axis.high, 120) for axis in (panel.x, panel.y))
    heights = loss(np.stack(np.meshgrid(x, y), axis=-1))
    generator = contourpy.contour_generator(x, y, heights)
    levels = np.linspace(heights.min(), heights.max(), 14)[1:-1]
    lines = []
    for level, shade in zip(levels, np.linspace(0x30, 0xD0, len(levels)).astype(int), strict=True):
        colour = f"#{shade:02x}{shade:02x}{shade:02x}"
        lines += [_through(np.asarray(points, np.float64), colour, 0.6) for points in generator.lines(level)]
    return lines


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
    rates_axis = Axis("learning rate η", float(rates[0]) / 1.1, float(rates[-1]) * 1.1, log=True, ticks=log_ticks)
    panel = Panel(rates_axis, letter=True)
    styles = (("|ψ̄ − ψ| (rad)", angle_change, "#0072b2", "o"), ("‖M̄ − M‖ / ‖M‖ (1)", metric_change, "#d55e00", "^"))
    panel.lines = [
        Line(rates, positive(values), colour, marker=marker, label=label)
        for label, values, colour, marker in styles
    ]
    spread = extent(positive(np.concatenate([angle_change, metric_change])))
    if spread is None:
        placeholder(panel, "the discrete gradient equals the gradient")
    else:
        # The curves approach this line, which is proportional to the learning rate.
        panel.lines.append(Line(rates, spread[2] * rates / rates[-1], MUTED, 0.7, label="∝ η"))
        log_limits(panel, min(spread[0], spread[2] * rates[0] / rates[-1]), spread[2])
        panel.legend = [*panel.lines]
    span = f"from {number(angle_change[-1])} rad to {number(angle_change[0])} rad"
    return picture(
        Chart(WIDTH, HEIGHT, [[panel]]),
        f"Difference between the angles of the discrete gradient and the gradient, {span} as the learning rate "
        f"decreases to {number(rates[0])}.",
    )


def eigenvalue_curves(runs: Sequence[RunResults]) -> Picture:
    """Draw panel A: eq. (9) at |y| = |g|, and the measured eigenvalues."""
    panel = Panel(
        Axis("angle ψ between y and g (rad)", 0.0, np.pi / 2, ticks=lambda low, high: angle_ticks(1)),
        Axis("eigenvalue × |g| / |y|  (1)"),
        "A",
        letter=True,
    )
    low, high, points, legend = 1e-2, 1e2, [], []
    for index, run in enumerate(runs):
        colour, marker = RUN_COLOURS[index % len(RUN_COLOURS)], RUN_MARKERS[index % len(RUN_MARKERS)]
        style: dict[str, Any] = {"colour": colour, "width": 0, "marker": marker}
        legend.append(Line(np.empty(0), np.empty(0), label=drawable(run.name, 30), **style))
        angle = run["angle"]
        with np.errstate(all="ignore"):
            scale = run["update_norm"] / run["gradient_norm"]
            values = np.stack([run[name] * scale for name in EIGENVALUES])
        drawn = np.isfinite(angle) & np.isfinite(values[0]) & (values[0] > 0)
        angle, values = angle[drawn], values[:, drawn]
        columns = spread_points(angle, index / len(runs), max(MARKERS // len(runs), 8))
        for value in values:
            chosen = positive(value[columns])
            points.append(Line(angle[columns], chosen, **style))
            if np.isfinite(chosen).any():
                low, high = min(low, np.nanmin(chosen)), max(high, np.nanmax(chosen))
    # Angles are measured from pi/2, where the curves diverge, so that the curves reach the edge of the panel.
    rest = np.geomspace(max(low * 1e-2, 1e-300), np.pi / 2, 400)
    unit = np.ones_like(rest)
    pair = Pair(unit, np.sin(rest), np.cos(rest) ** 2, np.full(rest.shape, 3))
    panel.legend = [
        Line(np.pi / 2 - rest, exact, colour, dash=dash, label=label)
        for exact, (label, colour, dash) in zip(geometry.eigenvalues(pair), EIGENVALUES.values(), strict=True)
    ]
    panel.lines = [line for line in panel.legend if isinstance(line, Line)] + points
    log_limits(panel, low, high)
    legend_rows = math.ceil(len(runs) / 2)
    chart = Chart(
        WIDTH, HEIGHT + 0.25 + 0.17 * legend_rows, [[panel]], legend=legend, columns=max(1, min(2, len(runs)))
    )
    names = ", ".join(run.name for run in runs)
    return picture(
        chart,
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
    panel = Panel(
        Axis(), Axis("eigenvalue of optimal metric\n(loss · learning rate / parameter²)"), letter, letter=True
    )
    step_axis(panel, run.steps)
    lines, low, high = [], math.inf, 0.0
    for name, (label, colour, dash) in EIGENVALUES.items():
        values = positive(run[name])
        if (spread := extent(values)) is not None:
            lines.append(curve(panel, run.steps, values, colour=colour, label=label, dash=dash))
            low, high = min(low, spread[0]), max(high, spread[2])
    if lines:
        log_limits(panel, low, high)
    else:
        placeholder(panel, "no effective update:\nno metric to draw" if len(run.steps) else "no update")
    without = run["status"] != Status.EFFECTIVE
    if lines and without.any():
        lines.append(mark(panel, run.steps, without))
    panel.legend = [*lines]
    span = f" from {number(low)} to {number(high)}" if high else "; no update has one"
    return picture(
        Chart(WIDTH, HEIGHT, [[panel]]),
        f"Eigenvalues of the optimal metric over the steps of {run.name}{span}.",
    )


def loss_curve(run: RunResults, letter: str) -> Picture:
    """Draw panels C and E: loss over steps."""
    panel = Panel(Axis(), Axis("loss"), letter, letter=True)
    step_axis(panel, run.steps)
    loss, average = run["loss"], run.loss_average
    spread = extent(loss)
    if spread is None:
        placeholder(panel, "no finite loss was logged" if len(run.steps) else "no update")
    else:
        colour = INK if average is None else MUTED
        width = 1.1 if average is None else 0.7
        lines = [curve(panel, run.steps, loss, colour=colour, label="loss", width=width)]
        if average is not None and np.isfinite(average).any():
            label = f"mean of {max(run.windows)}"
            lines.append(curve(panel, run.steps, average, colour="#0072b2", label=label, width=1.6))
        if spread[0] > 0 and spread[2] >= 10 * spread[0]:
            log_limits(panel, spread[0], spread[2])
        else:
            fit(panel, loss[np.isfinite(loss)])
        panel.legend = [] if average is None else [*lines]
    ends = f" from {number(loss[0])} to {number(loss[-1])}" if spread is not None else "; no finite loss was logged"
    return picture(Chart(WIDTH, HEIGHT, [[panel]]), f"Loss over the steps of {run.name}{ends}.")
