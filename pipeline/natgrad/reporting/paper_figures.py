"""Draw Figures 1 to 3 of the paper from runs, with Matplotlib: static vector graphics for documents.

The report page draws Figure 3 itself, with the library of its other figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from natgrad.reporting.eigenvalues import exact_curves, measured_points
from natgrad.reporting.run_results import EIGENVALUES, Array, RunResults

__all__ = ["descent_balls", "eigenvalue_curves", "limit_curve", "loss_curve", "metric_field", "save", "spectrum"]

Loss = Callable[[Array], Array]
"""Function of states, shape (..., 2), that returns their losses, shape (...)."""

_INK, _MUTED, _BLUE, _ORANGE, _GREEN = "#222222", "#808080", "#0072b2", "#d55e00", "#009e73"
_SIDE, _HEIGHT = 4.2, 3.1
_LABELS = dict(zip(EIGENVALUES, ("λmax", "λmid", "λmin"), strict=True))
_STYLES = dict(zip(EIGENVALUES, ((_BLUE, "-"), (_GREEN, "--"), (_ORANGE, ":")), strict=True))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG. Equal figures give equal bytes."""
    with mpl.rc_context({"svg.hashsalt": "natgrad", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# Figures 1 and 2, in a plane -----------------------------------------------------------------------------------


def descent_balls(loss: Loss, state: Array, y: Array, g: Array, ball: Array, size: float) -> Figure:
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
    figure = Figure(figsize=(2 * _SIDE, _SIDE), layout="constrained")
    panels = zip(np.ravel(figure.subplots(1, 2)), "AB", (ball, circle), (g, y), strict=True)
    for axes, letter, outline, steepest in panels:
        _plane(axes, loss, state, 1.6 * reach)
        axes.set_title(letter, loc="left", fontweight="bold")
        axes.plot(*(state + size * outline).T, color=_BLUE, linewidth=1.6)
        for vector, label, colour in ((y, "y", _INK), (g, "g", _ORANGE)):
            tip = vector / np.linalg.norm(vector) * reach
            width = 1.8 if vector is steepest else 0.9
            arrow = {"arrowstyle": "->", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=tuple(state + tip), xytext=tuple(state), arrowprops=arrow)
            axes.text(*(state + 1.12 * tip), label, color=colour, ha="center", va="center")
    return figure


def metric_field(loss: Loss, states: Array, balls: Array) -> Figure:
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
    figure = Figure(figsize=(_SIDE, _SIDE), layout="constrained")
    axes = figure.subplots()
    _plane(axes, loss, middle, reach)
    axes.plot(*states.T, color=_ORANGE, linewidth=1.1, marker=".", markersize=3)
    # The largest ball is a tenth of the plane, so that the balls do not hide the trajectory.
    size = 0.1 * reach / np.nanmax(np.linalg.norm(balls, axis=-1))
    for state, ball in zip(states, balls, strict=True):
        axes.plot(*(state + size * ball).T, color=_BLUE, linewidth=0.9)
    return figure


def _plane(axes: Axes, loss: Loss, middle: Array, reach: float) -> None:
    """Set up a panel of the two parameters around a point, with twelve contours of the loss, from dark to light."""
    x, y = (np.linspace(centre - reach, centre + reach, 120) for centre in middle.tolist())
    heights = loss(np.stack(np.meshgrid(x, y), axis=-1))
    levels = np.linspace(heights.min(), heights.max(), 14)[1:-1]
    axes.contour(
        x, y, heights, levels=levels, colors=[str(shade) for shade in np.linspace(0.19, 0.82, 12)], linewidths=0.6
    )
    axes.set(xlim=(x[0], x[-1]), ylim=(y[0], y[-1]), xlabel="first parameter", ylabel="second parameter")
    axes.set_aspect("equal")


# Figure 3 ------------------------------------------------------------------------------------------------------


def eigenvalue_curves(runs: Sequence[RunResults]) -> Figure:
    """Draw panel A: eq. (9) at |y| = |g|, and the measured eigenvalues."""
    figure, axes = _panel("A", "angle ψ between y and g (rad)", "eigenvalue × |g| / |y|  (1)")
    points = measured_points(runs)
    drawn = np.concatenate([np.ravel(values) for _, values in points])
    low, high = np.nanmin([1e-2, *drawn]), np.nanmax([1e2, *drawn])
    angle, curves = exact_curves(float(low))
    for name, curve in zip(EIGENVALUES, curves, strict=True):
        colour, dash = _STYLES[name]
        axes.plot(angle, curve, color=colour, linestyle=dash, label=_LABELS[name])
    for run, (at, values), marker in zip(runs, points, "o^sDvPX" * (len(runs) // 7 + 1), strict=False):
        for index, value in enumerate(values):
            label = _text(run.name) if index == 0 else None
            axes.plot(
                at, value, linestyle="", marker=marker, markersize=4, fillstyle="none", color=_MUTED, label=label
            )
    ticks = np.arange(5) * np.pi / 8
    axes.set(yscale="log", ylim=(low / 1.3, high * 1.3), xlim=(0, np.pi / 2))
    axes.set_xticks(ticks, ["0", "π/8", "π/4", "3π/8", "π/2"])
    axes.legend(frameon=False, fontsize="small")
    return figure


def spectrum(run: RunResults, letter: str) -> Figure:
    """Draw panels B and D: eigenvalues over steps."""
    figure, axes = _panel(letter, "step", "eigenvalue of optimal metric\n(loss · learning rate / parameter²)")
    for name in EIGENVALUES:
        colour, dash = _STYLES[name]
        axes.plot(
            run.steps, run[name], color=colour, linestyle=dash, label=_LABELS[name], marker=_marker(run[name])
        )
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize="small")
    return figure


def loss_curve(run: RunResults, letter: str) -> Figure:
    """Draw panels C and E: loss over steps."""
    figure, axes = _panel(letter, "step", "loss")
    average = run.loss_average
    axes.plot(run.steps, run["loss"], color=_INK if average is None else _MUTED, linewidth=0.9, label="loss")
    if average is not None:
        axes.plot(run.steps, average, color=_BLUE, linewidth=1.6, label=f"mean of {max(run.windows)}")
        axes.legend(frameon=False, fontsize="small")
    known = run["loss"][np.isfinite(run["loss"])]
    if known.size and known.min() > 0 and known.max() >= 10 * known.min():
        axes.set_yscale("log")
    return figure


def limit_curve(rates: Array, angle_change: Array, metric_change: Array) -> Figure:
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
    figure, axes = _panel("", "learning rate η", "")
    axes.plot(rates, angle_change, color=_BLUE, marker="o", label="|ψ̄ − ψ| (rad)")
    axes.plot(rates, metric_change, color=_ORANGE, marker="^", label="‖M̄ − M‖ / ‖M‖ (1)")
    largest = max(angle_change[-1], metric_change[-1])
    # The curves approach this line, which is proportional to the learning rate.
    axes.plot(rates, largest * rates / rates[-1], color=_MUTED, linewidth=0.7, label="∝ η")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize="small")
    return figure


def _panel(letter: str, x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_SIDE, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(letter, loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    return figure, axes


def _marker(values: Array) -> str:
    """Return a marker for short runs, in which a value may have no neighbour that a line could reach."""
    return "." if len(values) < 100 else ""


def _text(name: str) -> str:
    """Return a name that Matplotlib does not read as a formula."""
    return name.replace("$", r"\$")
