"""The figures of a report: the results of a run, and their drawings as vector graphics.

Only matplotlib's objects are used, so nothing of the caller's own drawing is touched. Equal results give equal
bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib.style
import numpy as np
import xarray as xr
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from pipeline import geometry
from pipeline.geometry import Pair
from pipeline.schema import DESCENT, DESCENTS, STEP, TENSOR, WINDOW, InputError, Status

__all__ = [
    "COMPARED_RUNS",
    "SHOWN_TENSORS",
    "Picture",
    "RunResults",
    "angle_curve",
    "comparison",
    "condition_curve",
    "descent_balls",
    "drawing",
    "eigenvalue_curves",
    "extent",
    "is_thinned",
    "limit_curve",
    "loss_curve",
    "metric_field",
    "number",
    "small_panels",
    "spectrum",
]

SHOWN_TENSORS = 12
"""Tensors that get curves of their own; of more, those with the largest gradient."""

COMPARED_RUNS = 18
"""Runs that are told apart in one panel, by colour and dashes."""

Array = NDArray[np.float64]

# Wong's palette (Nature Methods 8, 441), which the colour blind can tell apart; eigenvalues and runs share none.
_EIGENVALUES = {
    "eigenvalue_max": (r"$\lambda_{\max}$", "#0072b2", "-"),
    "eigenvalue_mid": (r"$\lambda_{\mathrm{mid}}$", "#009e73", (0, (4, 1.5))),
    "eigenvalue_min": (r"$\lambda_{\min}$", "#d55e00", (0, (1.5, 1))),
}
_RUN_COLOURS = ("#a8528a", "#d18f00", "#3a97d3", "#6b6b6b")
# Tol's muted scheme, for as many runs in one panel; a second round is dashed.
_COMPARED_COLOURS = (
    "#332288",
    "#cc6677",
    "#117733",
    "#88ccee",
    "#882255",
    "#ddcc77",
    "#44aa99",
    "#aa4499",
    "#999933",
)
_COMPARED_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)))
_RUN_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_INK, _MUTED, _GRID, _ALARM = "#222222", "#808080", "#dddddd", "#b00020"
_ON_DARK = {
    _INK: "#e6e6e6",
    _MUTED: "#9a9a9a",
    _GRID: "#3d3d3d",
    _ALARM: "#ff7b86",
    "#0072b2": "#4db1ea",
    "#009e73": "#2fc79a",
    "#d55e00": "#ff8a3c",
    "#a8528a": "#dc8fc0",
    "#d18f00": "#f0b429",
    "#3a97d3": "#7cc4f0",
    "#6b6b6b": "#b5b5b5",
    "#332288": "#9a8ff0",
    "#117733": "#56c278",
    "#882255": "#e0699f",
}

_STYLE: dict[str, Any] = {
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.5,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.2,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.1,
    "savefig.facecolor": "none",
    # The names of clip paths would be random, and equal results would not give equal pages.
    "svg.fonttype": "path",
    "svg.hashsalt": "natgrad",
    "text.color": _INK,
    "xtick.color": _INK,
    "xtick.labelsize": 8.5,
    "ytick.color": _INK,
    "ytick.labelsize": 8.5,
}

_WIDTH, _HEIGHT = 4.2, 2.9
"""Inches of a panel: a phone shows it at about its natural size, a desktop shows two side by side."""

_COLUMNS, _SMALL_COLUMNS, _MARKERS = 360, 150, 48
"""Pixel columns to which curves of a panel and of a small panel are thinned, and points on a curve of panel A."""

_DRAWING = threading.Lock()
"""Matplotlib's style is a state of the process, and flows may draw in several threads."""


@dataclass(frozen=True)
class Picture:
    """A figure as a page holds it."""

    uri: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class RunResults:
    """Results of a run: of the model all, of the tensors what is asked for, of a stochastic rule the replicates."""

    name: str
    attributes: Mapping[str, Any]
    model: xr.Dataset
    tensors: xr.Dataset
    replicates: xr.Dataset | None = None

    @classmethod
    def of(cls, name: str, tree: xr.DataTree) -> RunResults:
        """Take the results of a run apart; refuse what are none (InputError)."""
        try:
            model, tensors = tree["model"].to_dataset(), tree["tensor"].to_dataset()
            needed = ("angle", "angle_uncertainty", "condition_number", "gradient_norm", "status")
            for dataset, names in ((model, (*needed, *_EIGENVALUES, "update_norm", "loss")), (tensors, needed)):
                for variable in names:
                    dataset[variable]
        except KeyError as error:
            raise InputError(
                f"results without {error}", where=f"run {name}", remedy="compute them again: natgrad analyze OUT"
            ) from error
        replicates = tree["replicates/model"].to_dataset() if "replicates" in tree.children else None
        return cls(name, {str(key): value for key, value in tree.attrs.items()}, model, tensors, replicates)

    def __getitem__(self, variable: str) -> NDArray[Any]:
        """Values of the model, step by step, compared with the gradient."""
        return np.asarray(_at(self.model[variable]).values)

    @property
    def steps(self) -> Array:
        """Steps of the updates."""
        return np.asarray(self.model[STEP].values, dtype=np.float64)

    @property
    def windows(self) -> list[int]:
        """Windows m that the results hold."""
        return [int(m) for m in self.model[WINDOW].values]

    @property
    def loss_average(self) -> Array | None:
        """Average over the largest window, where there is one of several updates."""
        if max(self.windows) == 1:
            return None
        return np.asarray(self.model["loss_average"].sel({WINDOW: max(self.windows)}).values)

    def tensor(self, variable: str, name: str) -> Array:
        """Values of a tensor, step by step, compared with the gradient."""
        return np.asarray(_at(self.tensors[variable]).sel({TENSOR: name}).values)

    def largest_tensors(self) -> list[str]:
        """Names of the tensors with the largest gradient, root mean square over the run, largest first."""
        names = [str(name) for name in self.tensors[TENSOR].values]
        if len(names) <= SHOWN_TENSORS:
            return names
        norms = np.asarray(_at(self.tensors["gradient_norm"]).transpose(STEP, TENSOR).values)
        with np.errstate(over="ignore", invalid="ignore"):
            size = np.where(np.isfinite(norms), norms, 0.0) ** 2
            order = np.argsort(-size.sum(axis=0), kind="stable")
        return [names[index] for index in order[:SHOWN_TENSORS]]


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style of the figures, for one thread at a time: all drawing happens within."""
    with _DRAWING, matplotlib.style.context(["default", _STYLE]):
        yield


def is_thinned(steps: int) -> bool:
    """Say whether a run of so many steps has more points than its smallest panels draw."""
    return steps > 2 * _SMALL_COLUMNS


def _at(variable: xr.DataArray) -> xr.DataArray:
    chosen = {DESCENT: DESCENTS[0], WINDOW: 1}
    return variable.sel({name: value for name, value in chosen.items() if name in variable.dims})


def extent(values: NDArray[Any]) -> tuple[float, float, float] | None:
    """Smallest, median and largest finite value."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(np.median(finite)), float(finite.max())) if finite.size else None


def number(value: float) -> str:
    """Four digits, as one would write them.

    Examples
    --------
    >>> number(1.5), number(123456.0), number(2e-9)
    ('1.5', '1.235×10⁵', '2×10⁻⁹')
    """
    if not math.isfinite(value):
        return "–"
    plain = f"{value:.4g}"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.3e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}×10{_superscript(str(int(exponent)))}"
    return plain if "e" not in plain else f"{value:.0f}"


def _superscript(digits: str) -> str:
    return digits.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


# Figures 1 and 2, in a plane ----------------------------------------------------------------------------------

Loss = Callable[[Array], Array]
"""Loss of states, shape (..., 2) to (...)."""


def descent_balls(loss: Loss, state: Array, y: Array, g: Array, ball: Array, size: float) -> Picture:
    """Figure 1: the ball of the metric, in which the update is steepest descent, and that of Euclid.

    Parameters
    ----------
    loss : callable
    state, y, g : array, shape (2,)
        One state, its negative gradient and its update.
    ball : array, shape (points, 2)
        Ball of the metric around 0, v' M v = 1.
    size : float
        Radius of the Euclidean ball; that of the metric is drawn with the same area.
    """
    figure = Figure(figsize=(2 * _WIDTH, _HEIGHT + 0.6), layout="constrained")
    turn = np.linspace(0.0, 2.0 * np.pi, len(ball))
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    lengths = np.linalg.norm(ball, axis=1)
    ball = ball / np.sqrt(lengths.max() * lengths.min())
    reach = float(size * np.abs(ball).max())
    panels = zip(figure.subplots(1, 2), "AB", (ball, circle), (g, y), strict=True)
    for axes, letter, curve, steepest in panels:
        _contours(axes, loss, state, 1.6 * reach)
        axes.plot(*(state + size * curve).T, color="#0072b2", linewidth=1.6)
        for vector, label, colour in ((y, "y", _INK), (g, "g", "#d55e00")):
            arrow = vector / np.linalg.norm(vector) * reach
            look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8 if vector is steepest else 0.9}
            axes.annotate("", xy=state + arrow, xytext=state, arrowprops=look)
            axes.text(*(state + 1.12 * arrow), f"${label}$", color=colour, ha="center", va="center")
        axes.set_title(letter, loc="left", fontweight="bold", fontsize=11)
    return _picture(
        figure,
        "Contours of the loss around one state, its update g and its negative gradient y. A: the ball of the "
        "metric in which g is steepest descent. B: the Euclidean ball, in which y is.",
    )


def metric_field(loss: Loss, states: Array, balls: Array) -> Picture:
    """Figure 2: the space in which the rule descends, as the balls of its metric along the trajectory.

    Parameters
    ----------
    loss : callable
    states : array, shape (steps, 2)
        Trajectory.
    balls : array, shape (steps, points, 2)
        Ball of the metric around 0 at each state, of one unit for all; NaN where there is none.
    """
    figure = Figure(figsize=(_WIDTH, _WIDTH), layout="constrained")
    axes = figure.subplots()
    middle = (states.max(axis=0) + states.min(axis=0)) / 2.0
    reach = 0.65 * float((states.max(axis=0) - states.min(axis=0)).max())
    _contours(axes, loss, middle, reach)
    axes.plot(states[:, 0], states[:, 1], color="#d55e00", marker=".", markersize=3)
    # The largest ball is as long as a tenth of the plane, or the balls would hide the trajectory.
    size = 0.1 * reach / np.nanmax(np.linalg.norm(balls, axis=-1))
    for state, ball in zip(states, balls, strict=True):
        axes.plot(*(state + size * ball).T, color="#0072b2", linewidth=0.9)
    return _picture(
        figure,
        f"Contours of the loss, a trajectory of {len(states)} states, and at each the ball of the metric in which "
        "its update is steepest descent.",
    )


def _contours(axes: Axes, loss: Loss, middle: Array, reach: float) -> None:
    x, y = (np.linspace(centre - reach, centre + reach, 120) for centre in middle)
    axes.contour(x, y, loss(np.stack(np.meshgrid(x, y), axis=-1)), levels=12, cmap="gray", linewidths=0.6)
    axes.set_aspect("equal")
    axes.set_xlabel("first parameter")
    axes.set_ylabel("second parameter")
    axes.grid(visible=False)


# Figure 3 ----------------------------------------------------------------------------------------------------


def limit_curve(rates: Array, turned: Array, moved: Array) -> Picture:
    """How far the discrete gradient and its metric are from those of the gradient, over the learning rate.

    Parameters
    ----------
    rates : array, shape (runs,)
        Positive, ascending.
    turned : array, shape (runs,)
        |psi_bar - psi|, in radian.
    moved : array, shape (runs,)
        |Mbar - M| / |M|.
    """
    figure, axes = _panel("")
    looks = (("|ψ̄ − ψ| (rad)", turned, "#0072b2", "o"), ("‖M̄ − M‖ / ‖M‖ (1)", moved, "#d55e00", "^"))
    lines = [
        axes.plot(rates, _positive(values), color=colour, marker=marker, markersize=4, label=label)[0]
        for label, values, colour, marker in looks
    ]
    seen = _positive(np.concatenate([turned, moved]))
    spread = extent(seen)
    if spread is None:
        _say(axes, "the discrete gradient is the gradient")
    else:
        # In proportion to the learning rate: what the curves run along.
        line = axes.plot(rates, spread[2] * rates / rates[-1], color=_MUTED, linewidth=0.7, label="∝ η")[0]
        _log_limits(axes, min(spread[0], spread[2] * rates[0] / rates[-1]), spread[2])
        _legend_above(axes, [*lines, line])
    axes.set_xscale("log")
    axes.set_xlabel("learning rate η")
    said = f" from {number(turned[-1])} rad to {number(turned[0])} rad"
    return _picture(
        figure, f"As the learning rate falls to {number(rates[0])}, the angle of the discrete gradient goes{said}."
    )


def eigenvalue_curves(runs: Sequence[RunResults]) -> Picture:
    """Panel A: eq. (9) at |y| = |g|, and what was measured."""
    legend_rows = math.ceil(len(runs) / 2)
    figure = Figure(figsize=(_WIDTH, _HEIGHT + 0.25 + 0.17 * legend_rows), layout="constrained")
    axes = figure.subplots()
    low, high, handles = 1e-2, 1e2, []
    for index, run in enumerate(runs):
        colour, marker = _RUN_COLOURS[index % len(_RUN_COLOURS)], _RUN_MARKERS[index % len(_RUN_MARKERS)]
        look: dict[str, Any] = {
            "marker": marker,
            "markersize": 4,
            "linestyle": "none",
            "markerfacecolor": "none",
            "markeredgecolor": colour,
            "markeredgewidth": 0.9,
        }
        handles.append(Line2D([], [], **look))
        angle = run["angle"]
        with np.errstate(all="ignore"):
            scale = run["update_norm"] / run["gradient_norm"]
            values = np.stack([run[name] * scale for name in _EIGENVALUES])
        drawable = np.isfinite(angle) & np.isfinite(values[0]) & (values[0] > 0)
        angle, values = angle[drawable], values[:, drawable]
        columns = _spread_out(angle, index / len(runs), max(_MARKERS // len(runs), 8))
        for value in values:
            points = np.where(value[columns] > 0, value[columns], np.nan)
            axes.plot(angle[columns], points, zorder=3, **look)
            if np.isfinite(points).any():
                low, high = min(low, np.nanmin(points)), max(high, np.nanmax(points))
    # Counted from pi/2, where the curves leave the page, so that they reach its edge.
    rest = np.geomspace(max(low * 1e-2, 1e-300), np.pi / 2, 400)
    unit = np.ones_like(rest)
    pair = Pair(unit, np.sin(rest), np.cos(rest) ** 2, np.full(rest.shape, 3))
    lines = [
        axes.plot(np.pi / 2 - rest, curve, color=colour, linestyle=dash, label=label)[0]
        for curve, (label, colour, dash) in zip(geometry.eigenvalues(pair), _EIGENVALUES.values(), strict=True)
    ]
    _log_limits(axes, low, high)
    axes.set_xlim(0, np.pi / 2)
    _angle_ticks(axes, "x", eighths=True)
    axes.set_xlabel("angle ψ between y and g (rad)")
    axes.set_ylabel("eigenvalue × |g| / |y|  (1)")
    axes.set_title("A", loc="left", fontweight="bold", fontsize=11)
    _legend_above(axes, lines)
    legend = figure.legend(
        handles, [str(i) for i in range(len(runs))], loc="outside lower center", ncols=min(2, len(runs))
    )
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(_drawable(run.name, 30))
    names = ", ".join(run.name for run in runs)
    return _picture(
        figure,
        f"Largest, middle and smallest eigenvalue of the optimal metric against the angle psi from 0 to pi/2, "
        f"and the measured eigenvalues of {names} on these curves.",
    )


def _spread_out(angle: Array, shift: float, columns: int) -> NDArray[np.int64]:
    """Choose points that lie apart: the ends, and in each column the one next to its middle.

    All points lie on the curves, so points of several runs would cover each other and the curves; the columns of
    each run are shifted by a part of one.
    """
    if not angle.size:
        return np.zeros(0, np.int64)
    place = angle / (np.pi / 2) * columns + shift
    column = np.floor(place)
    order = np.lexsort((np.abs(place - column - 0.5), column))
    chosen = order[np.unique(column[order], return_index=True)[1]]
    return np.unique(np.concatenate([chosen, [angle.argmin(), angle.argmax()]])).astype(np.int64)


def spectrum(run: RunResults, letter: str) -> Picture:
    """Panels B, D: eigenvalues over steps."""
    figure, axes = _panel(letter)
    lines, low, high = [], math.inf, 0.0
    for name, (label, colour, dash) in _EIGENVALUES.items():
        values = _positive(run[name])
        if (spread := extent(values)) is not None:
            lines.append(_curve(axes, run.steps, values, color=colour, label=label, linestyle=dash))
            low, high = min(low, spread[0]), max(high, spread[2])
    if lines:
        _log_limits(axes, low, high)
    else:
        _say(axes, "no effective update:\nno metric to draw" if len(run.steps) else "no update")
    without = run["status"] != Status.EFFECTIVE
    if lines and without.any():
        lines.append(_mark(axes, run.steps, without))
    _step_axis(axes, run.steps)
    axes.set_ylabel("eigenvalue of optimal metric\n(loss · learning rate / parameter²)")
    _legend_above(axes, lines)
    span = f" from {number(low)} to {number(high)}" if lines else ", of which there is none"
    return _picture(figure, f"Eigenvalues of the optimal metric over the steps of {run.name}{span}.")


def loss_curve(run: RunResults, letter: str) -> Picture:
    """Panels C, E: loss over steps."""
    figure, axes = _panel(letter)
    loss, average, lines = run["loss"], run.loss_average, []
    spread = extent(loss)
    if spread is None:
        _say(axes, "no finite loss was logged" if len(run.steps) else "no update")
    else:
        colour = _INK if average is None else _MUTED
        width = 1.1 if average is None else 0.7
        lines.append(_curve(axes, run.steps, loss, color=colour, label="loss", linewidth=width))
        if average is not None and np.isfinite(average).any():
            label = f"mean of {max(run.windows)}"
            lines.append(_curve(axes, run.steps, average, color="#0072b2", label=label, linewidth=1.6))
        if spread[0] > 0 and spread[2] >= 10 * spread[0]:
            _log_limits(axes, spread[0], spread[2])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
    _step_axis(axes, run.steps)
    axes.set_ylabel("loss")
    _legend_above(axes, lines if average is not None else [])
    said = f" from {number(loss[0])} to {number(loss[-1])}" if spread is not None else ", which was not logged"
    return _picture(figure, f"Loss over the steps of {run.name}{said}.")


# Angle and condition number ----------------------------------------------------------------------------------


def angle_curve(run: RunResults) -> Picture:
    """Angle of the model over the steps, with what rounding of the stored values can turn."""
    figure, axes = _panel("")
    angle, uncertainty = run["angle"], run["angle_uncertainty"]
    spread = extent(angle)
    if spread is None:
        _say(axes, "no angle is defined")
    lines = _draw_angle(axes, run.steps, angle, uncertainty, _COLUMNS)
    _angle_limits(axes, spread)
    _step_axis(axes, run.steps)
    axes.set_ylabel("angle ψ (rad)")
    _legend_above(axes, lines if spread is not None else [])
    said = f" from {number(spread[0])} to {number(spread[2])} rad" if spread else ", defined nowhere"
    return _picture(figure, f"Angle between update and negative gradient over the steps of {run.name}{said}.")


def condition_curve(run: RunResults) -> Picture:
    """Smallest condition number of the model over the steps."""
    figure, axes = _panel("")
    values = _positive(run["condition_number"])
    spread = extent(values)
    lines = []
    if spread is None:
        _say(axes, "no effective update:\nno condition number")
    else:
        _curve(axes, run.steps, values, color=_INK)
        _log_limits(axes, spread[0], spread[2])
        without = run["status"] != Status.EFFECTIVE
        lines = [_mark(axes, run.steps, without)] if without.any() else []
    _step_axis(axes, run.steps)
    axes.set_ylabel("condition number κ (1)")
    _legend_above(axes, lines)
    said = f" from {number(spread[0])} to {number(spread[2])}" if spread else ", defined nowhere"
    return _picture(figure, f"Condition number of the optimal metric over the steps of {run.name}{said}.")


def small_panels(run: RunResults, names: Sequence[str], variable: str) -> Picture:
    """Angle or condition number of each tensor, on common axes."""
    columns = min(2, len(names))
    rows = math.ceil(len(names) / columns)
    # Margins in inches, not a layout engine: it would measure every text of every panel, in twice the time.
    height = 0.75 + (1.15 if rows > 1 else 1.6) * rows
    figure = Figure(figsize=(_WIDTH, height))
    left, right, lower, upper = 0.72 / _WIDTH, 1 - 0.14 / _WIDTH, 0.5 / height, 1 - 0.25 / height
    figure.subplots_adjust(left=left, right=right, bottom=lower, top=upper, hspace=0.38, wspace=0.13)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    of_angle = variable == "angle"
    values = {name: run.tensor(variable, name) for name in names}
    if not of_angle:
        values = {name: _positive(value) for name, value in values.items()}
    spread = extent(np.concatenate(list(values.values())))
    labels = _tensor_labels(names, 26 if columns == 2 else 52)
    for axes, name, label in zip(grid.flat, names, labels, strict=False):
        title = axes.set_title(" ", loc="left", fontsize=8.5, pad=3)
        title.set_parse_math(False)
        title.set_text(label)
        without = run.tensor("status", name) != Status.EFFECTIVE
        if extent(values[name]) is None:
            axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=_MUTED)
        if of_angle:
            _draw_angle(axes, run.steps, values[name], run.tensor("angle_uncertainty", name), _SMALL_COLUMNS)
        else:
            _curve(axes, run.steps, values[name], columns=_SMALL_COLUMNS, color=_INK)
        if without.any() and not of_angle:
            _mark(axes, run.steps, without, columns=_SMALL_COLUMNS)
    first = grid[0, 0]
    if of_angle:
        _angle_limits(first, spread)
    elif spread is not None:
        _log_limits(first, spread[0], spread[2], most=4)
    _step_axis(first, run.steps, most=3)
    first.set_xlabel("")
    # The last row may be shorter: then the panel above the gap carries the numbers of the steps.
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
        grid[rows - 2, columns - 1].xaxis.set_tick_params(labelbottom=True)
    middle = (left + right) / 2, (lower + upper) / 2
    figure.supxlabel("step", x=middle[0], y=0.08 / height, fontsize=9)
    label = "angle ψ (rad)" if of_angle else "condition number κ (1)"
    figure.supylabel(label, x=0.08 / _WIDTH, y=middle[1], fontsize=9)
    what = "Angle between update and negative gradient" if of_angle else "Condition number of the optimal metric"
    return _picture(figure, f"{what} over the steps of {run.name}, for {len(names)} tensors: {', '.join(names)}.")


def comparison(runs: Sequence[RunResults]) -> Picture:
    """Angle and condition number of several runs: rows are the model and the tensors of all, columns the two.

    Parameters
    ----------
    runs : sequence of RunResults
        `COMPARED_RUNS` at most; each has its colour, where there are more than nine with dashes.
    """
    shared = set.intersection(*({str(name) for name in run.tensors[TENSOR].values} for run in runs))
    tensors = [name for name in runs[0].largest_tensors() if name in shared]
    # The one tensor of a model is the model.
    tensors = tensors if any(run.tensors.sizes[TENSOR] > 1 for run in runs) else []
    legend_rows = math.ceil(len(runs) / 3)
    height = 0.45 + 1.3 * (1 + len(tensors)) + 0.2 * legend_rows
    figure = Figure(figsize=(2 * _WIDTH, height), layout="constrained")
    grid = figure.subplots(1 + len(tensors), 2, sharex=True, sharey="col", squeeze=False)
    conditions, angles, handles = [], [], []
    for index, run in enumerate(runs):
        look: dict[str, Any] = {
            "color": _COMPARED_COLOURS[index % len(_COMPARED_COLOURS)],
            "linestyle": _COMPARED_DASHES[index // len(_COMPARED_COLOURS) % len(_COMPARED_DASHES)],
        }
        handles.append(Line2D([], [], **look))
        for row, name in zip(grid, (None, *tensors), strict=True):
            angle, condition = (
                run[variable] if name is None else run.tensor(variable, name)
                for variable in ("angle", "condition_number")
            )
            angles.append(angle)
            conditions.append(_positive(condition))
            for axes, values in zip(row, (angle, conditions[-1]), strict=True):
                _curve(axes, run.steps, values, columns=_SMALL_COLUMNS, **look)
    for row, label in zip(grid, ("whole model", *_tensor_labels(tensors, 52)), strict=True):
        title = row[0].set_title(" ", loc="left", fontsize=8.5, pad=3)
        title.set_parse_math(False)
        title.set_text(label)
        row[0].axhline(np.pi / 2, color=_ALARM, linewidth=0.8, linestyle=(0, (4, 2)))
        row[0].set_ylabel("angle ψ (rad)")
        row[1].set_ylabel("κ (1)")
    angle_spread, spread = extent(np.concatenate(angles)), extent(np.concatenate(conditions))
    _angle_limits(grid[0, 0], angle_spread)
    if spread is not None:
        _log_limits(grid[0, 1], spread[0], spread[2], most=5)
    _step_axis(grid[0, 0], np.unique(np.concatenate([run.steps for run in runs])))
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    for axes in grid[-1]:
        axes.set_xlabel("step")
    legend = figure.legend(handles, [str(i) for i in range(len(runs))], loc="outside lower center", ncols=3)
    for text, run in zip(legend.get_texts(), runs, strict=True):
        text.set_parse_math(False)
        text.set_text(_drawable(run.name, 30))
    names = ", ".join(run.name for run in runs)
    of = f" and of the tensors {', '.join(tensors)}" if tensors else ""
    return _picture(figure, f"Angle and condition number of the model{of} over the steps, in the runs {names}.")


def _tensor_labels(names: Sequence[str], most: int) -> list[str]:
    """Write number and name, and leave out of long names the parts that all have in common.

    Examples
    --------
    >>> _tensor_labels(["encoder.layers.1.attention.weight", "encoder.layers.23.attention.weight"], 20)
    ['1  …1…', '2  …23…']
    """
    parts = [name.split(".") for name in names]
    start = end = 0
    if len(names) > 1 and max(map(len, names)) > most - 4:
        # One part of each name is always left, though it be the same.
        spare = min(map(len, parts)) - 1
        while start < spare and len({part[start] for part in parts}) == 1:
            start += 1
        while end < spare - start and len({part[-1 - end] for part in parts}) == 1:
            end += 1
    kept = [".".join(part[start : len(part) - end]) for part in parts]
    shown = [f"{'…' if start else ''}{_drawable(name, most - 6)}{'…' if end else ''}" for name in kept]
    return [f"{number}  {name}" for number, name in enumerate(shown, start=1)]


def _draw_angle(axes: Axes, steps: Array, angle: Array, uncertainty: Array, columns: int) -> list[Any]:
    lines: list[Any] = [_curve(axes, steps, angle, columns=columns, color=_INK, label="ψ")]
    reach = np.where(np.isfinite(angle), uncertainty, np.nan)
    # A band thinner than the line would not be seen.
    if (spread := extent(reach)) is not None and spread[2] > 0.01:
        below, above = np.clip(angle - reach, 0.0, np.pi), np.clip(angle + reach, 0.0, np.pi)
        at = _column_starts(len(steps), columns)
        band = axes.fill_between(
            steps[at],
            np.fmin.reduceat(below, at),
            np.fmax.reduceat(above, at),
            color="#0072b2",
            alpha=0.25,
            linewidth=0,
            label="rounding",
        )
        lines.append(band)
    lines.append(
        axes.axhline(
            np.pi / 2, color=_ALARM, linewidth=0.8, linestyle=(0, (4, 2)), label="π/2, not effective beyond"
        )
    )
    return lines


# Drawing -----------------------------------------------------------------------------------------------------


def _panel(letter: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    # Without a letter the title still takes its room, so all panels are of one size.
    axes.set_title(letter or " ", loc="left", fontweight="bold", fontsize=11)
    return figure, axes


def _curve(axes: Axes, steps: Array, values: Array, columns: int = _COLUMNS, **look: Any) -> Line2D:
    """Draw values over steps; one without neighbours is a dot, as a line would not show it."""
    x, y = _thin(steps, np.where(np.isfinite(values), values, np.nan), columns)
    (line,) = axes.plot(x, y, **look)
    there = np.concatenate([[False], np.isfinite(y), [False]])
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], color=look["color"], marker=".", markersize=2.5, linestyle="none")
    return line


def _mark(axes: Axes, steps: Array, mask: NDArray[np.bool_], columns: int = _COLUMNS) -> Any:
    """Mark steps along the lower edge, at most one in each pixel column."""
    rows = np.flatnonzero(mask)
    rows = rows[np.unique(rows * columns // len(mask), return_index=True)[1]]
    look: dict[str, Any] = {"color": _ALARM, "marker": "|", "markersize": 5, "linestyle": "none"}
    axes.plot(steps[rows], np.full(len(rows), 0.025), transform=axes.get_xaxis_transform(), **look)
    return Line2D([], [], label="no metric", **look)


def _column_starts(rows: int, columns: int) -> NDArray[np.int64]:
    """First row of each pixel column."""
    return np.unique(np.linspace(0, rows, min(rows, columns), endpoint=False).astype(np.int64))


def _thin(x: Array, y: Array, columns: int) -> tuple[Array, Array]:
    """Keep the smallest and the largest value of each pixel column: nothing that a screen could show is lost."""
    if len(x) <= 2 * columns:
        return x, y
    kept: list[int] = []
    for start, stop in pairwise([*_column_starts(len(x), columns).tolist(), len(x)]):
        part = y[start:stop]
        if np.isfinite(part).any():
            kept += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
        else:
            kept.append(start)
    return x[kept], y[kept]


def _positive(values: Array) -> Array:
    """Values that a log scale can show."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _log_limits(axes: Axes, low: float, high: float, most: int = 6) -> None:
    """Limits of a log axis: room below for marks, and numbers on it however short it is."""
    bottom, top = math.log10(low), math.log10(high)
    if top - bottom < 0.5:
        bottom, top = (bottom + top) / 2 - 0.25, (bottom + top) / 2 + 0.25
    below, above = 0.12 * (top - bottom), 0.05 * (top - bottom)
    axes.set_yscale("log")
    axes.set_ylim(10.0 ** max(bottom - below, -307.0), 10.0 ** min(top + above, 308.0))
    if top - bottom < 2:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    else:
        axes.yaxis.set_major_locator(LogLocator(numticks=most))
    if top - bottom < 2 or top - bottom > 5:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _step_axis(axes: Axes, steps: Array, most: int = 5) -> None:
    axes.set_xlabel("step")
    if not len(steps):
        axes.set_xticks([])
        return
    margin = 0.02 * (steps[-1] - steps[0]) or 0.5
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u2009")))


def _angle_limits(axes: Axes, spread: tuple[float, float, float] | None) -> None:
    obtuse = spread is not None and spread[2] > np.pi / 2
    axes.set_ylim(-0.03 * np.pi, (1.03 if obtuse else 0.55) * np.pi)
    _angle_ticks(axes, "y", eighths=False)


def _angle_ticks(axes: Axes, which: str, *, eighths: bool) -> None:
    eighth = ("0", "π/8", "π/4", "3π/8", "π/2", "5π/8", "3π/4", "7π/8", "π")
    chosen = range(0, 9, 1 if eighths else 2)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([k * np.pi / 8 for k in chosen]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: eighth[round(value / (np.pi / 8))]))


def _legend_above(axes: Axes, handles: Sequence[Any]) -> None:
    if handles:
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles))


def _say(axes: Axes, what: str) -> None:
    """Say in place of data why there is none."""
    axes.text(0.5, 0.5, what, transform=axes.transAxes, ha="center", va="center", color=_MUTED)
    axes.set_yticks([])


def _drawable(text: str, most: int) -> str:
    """Shorten a name in the middle, and replace what the font of the figures has no sign for."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    known = "".join(
        c if c.isprintable() and font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    if len(known) <= most:
        return known
    # The end of a tensor's name tells more than its beginning.
    return f"{known[: most // 3]}…{known[-(most - most // 3 - 1) :]}"


def _picture(figure: Figure, alt: str) -> Picture:
    """Vector graphic inside a page, in the colours of the reader's screen, light or dark."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    graphic = file.getvalue()
    graphic = graphic[graphic.index("<svg") :]
    # Hundredths of a point are finer than any screen, and half of the bytes.
    graphic = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), graphic)
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _ON_DARK.items()
        for part in ("stroke", "fill")
    )
    graphic = graphic.replace("</style>", f"@media (prefers-color-scheme:dark){{{dark}}}</style>", 1)
    width, height = figure.get_size_inches() * 96
    uri = "data:image/svg+xml;base64," + base64.b64encode(graphic.encode()).decode()
    return Picture(uri, alt, round(width), round(height))
