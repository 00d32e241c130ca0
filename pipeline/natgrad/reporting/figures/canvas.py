"""Shared elements of the figures: style, panels, axes, curves, and the conversion to vector graphics.

Only matplotlib's object interface is used, so figures of the caller are not affected. Equal results give equal
bytes.
"""

from __future__ import annotations

import base64
import io
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

__all__ = [
    "ALARM",
    "COLUMNS",
    "COMPARED_COLOURS",
    "COMPARED_DASHES",
    "EIGENVALUES",
    "HEIGHT",
    "INK",
    "MARKERS",
    "MUTED",
    "RUN_COLOURS",
    "RUN_MARKERS",
    "SMALL_COLUMNS",
    "WIDTH",
    "Array",
    "Picture",
    "angle_limits",
    "angle_ticks",
    "column_starts",
    "curve",
    "draw_angle",
    "drawable",
    "drawing",
    "extent",
    "is_thinned",
    "legend_above",
    "log_limits",
    "mark",
    "number",
    "panel",
    "picture",
    "placeholder",
    "positive",
    "step_axis",
    "thinned",
]

Array = NDArray[np.float64]

# Wong's palette (Nature Methods 8, 441), which colour-blind readers can distinguish. Eigenvalues and runs have
# different colours.
EIGENVALUES = {
    "eigenvalue_max": (r"$\lambda_{\max}$", "#0072b2", "-"),
    "eigenvalue_mid": (r"$\lambda_{\mathrm{mid}}$", "#009e73", (0, (4, 1.5))),
    "eigenvalue_min": (r"$\lambda_{\min}$", "#d55e00", (0, (1.5, 1))),
}
RUN_COLOURS = ("#a8528a", "#d18f00", "#3a97d3", "#6b6b6b")
# Tol's muted scheme, for many runs in one panel; further runs are dashed.
COMPARED_COLOURS = (
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
COMPARED_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)))
RUN_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
INK, MUTED, _GRID, ALARM = "#222222", "#808080", "#dddddd", "#b00020"
_ON_DARK = {
    INK: "#e6e6e6",
    MUTED: "#9a9a9a",
    _GRID: "#3d3d3d",
    ALARM: "#ff7b86",
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
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
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
    # Without a salt, the names of clip paths are random, and equal results do not give equal pages.
    "svg.fonttype": "path",
    "svg.hashsalt": "natgrad",
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.color": INK,
    "ytick.labelsize": 8.5,
}

WIDTH, HEIGHT = 4.2, 2.9
"""Size of a panel in inches: about the width of a phone; two fit side by side on a desktop."""

COLUMNS, SMALL_COLUMNS, MARKERS = 360, 150, 48
"""Number of pixel columns in a panel and in a small panel, for thinning of curves, and of points in panel A."""

_DRAWING = threading.Lock()
"""Lock for Matplotlib's style, which is global to the process. Flows may draw in several threads."""


@dataclass(frozen=True)
class Picture:
    """A figure in a page.

    Attributes
    ----------
    uri : str
        The vector graphic as a ``data:`` URL.
    alt : str
        Text alternative of the figure.
    width, height : int
        Pixels.
    figure : Figure
        Matplotlib's figure.
    """

    uri: str
    alt: str
    width: int
    height: int
    figure: Figure = field(repr=False, compare=False)


@contextmanager
def drawing() -> Iterator[None]:
    """Set the style of the figures, for one thread at a time. All drawing must happen in this context."""
    with _DRAWING, matplotlib.style.context(["default", _STYLE]):
        yield


def is_thinned(steps: int) -> bool:
    """Return True if a run with this many steps is thinned in its smallest panels."""
    return steps > 2 * SMALL_COLUMNS


def extent(values: NDArray[Any]) -> tuple[float, float, float] | None:
    """Return the smallest, median and largest finite value; None if there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(np.median(finite)), float(finite.max())) if finite.size else None


def number(value: float) -> str:
    """Format a number with four digits.

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


# Panels ------------------------------------------------------------------------------------------------------


def panel(letter: str) -> tuple[Figure, Axes]:
    """Create a figure with one panel. The letter above it may be empty."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    # A blank title takes up the same space as a letter, so all panels have the same size.
    axes.set_title(letter or " ", loc="left", fontweight="bold", fontsize=11)
    return figure, axes


def curve(axes: Axes, steps: Array, values: Array, columns: int = COLUMNS, **style: Any) -> Line2D:
    """Draw values over steps. A value without neighbours is drawn as a dot, because a line would not show it."""
    x, y = thinned(steps, np.where(np.isfinite(values), values, np.nan), columns)
    (line,) = axes.plot(x, y, **style)
    finite = np.concatenate([[False], np.isfinite(y), [False]])
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    if alone.any():
        axes.plot(x[alone], y[alone], color=style["color"], marker=".", markersize=2.5, linestyle="none")
    return line


def mark(axes: Axes, steps: Array, mask: NDArray[np.bool_], columns: int = COLUMNS) -> Any:
    """Mark steps along the lower edge, at most one in each pixel column."""
    marked = np.flatnonzero(mask)
    marked = marked[np.unique(marked * columns // len(mask), return_index=True)[1]]
    style: dict[str, Any] = {"color": ALARM, "marker": "|", "markersize": 5, "linestyle": "none"}
    axes.plot(steps[marked], np.full(len(marked), 0.025), transform=axes.get_xaxis_transform(), **style)
    return Line2D([], [], label="no metric", **style)


def column_starts(points: int, columns: int) -> NDArray[np.int64]:
    """Return the first point of each pixel column."""
    return np.unique(np.linspace(0, points, min(points, columns), endpoint=False).astype(np.int64))


def thinned(x: Array, y: Array, columns: int) -> tuple[Array, Array]:
    """Keep the smallest and the largest value of each pixel column, which looks the same on a screen."""
    if len(x) <= 2 * columns:
        return x, y
    kept: list[int] = []
    for start, stop in pairwise([*column_starts(len(x), columns).tolist(), len(x)]):
        part = y[start:stop]
        if np.isfinite(part).any():
            kept += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
        else:
            kept.append(start)
    return x[kept], y[kept]


def positive(values: Array) -> Array:
    """Return the values that a log scale can show, and NaN for the others."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def log_limits(axes: Axes, low: float, high: float, limit: int = 6) -> None:
    """Set the limits of a log axis, with space below for marks. Short axes also get tick labels."""
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
        axes.yaxis.set_major_locator(LogLocator(numticks=limit))
    if top - bottom < 2 or top - bottom > 5:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def step_axis(axes: Axes, steps: Array, limit: int = 5) -> None:
    """Set up the x axis for steps."""
    axes.set_xlabel("step")
    if not len(steps):
        axes.set_xticks([])
        return
    margin = 0.02 * (steps[-1] - steps[0]) or 0.5
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(limit, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}".replace(",", "\u2009")))


def angle_limits(axes: Axes, spread: tuple[float, float, float] | None) -> None:
    """Set up the y axis for angles, up to pi if any angle is obtuse."""
    obtuse = spread is not None and spread[2] > np.pi / 2
    axes.set_ylim(-0.03 * np.pi, (1.03 if obtuse else 0.55) * np.pi)
    angle_ticks(axes, "y", eighths=False)


def angle_ticks(axes: Axes, which: str, *, eighths: bool) -> None:
    """Label an axis in fractions of pi."""
    eighth = ("0", "π/8", "π/4", "3π/8", "π/2", "5π/8", "3π/4", "7π/8", "π")
    chosen = range(0, 9, 1 if eighths else 2)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([k * np.pi / 8 for k in chosen]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: eighth[round(value / (np.pi / 8))]))


def legend_above(axes: Axes, handles: Sequence[Any]) -> None:
    """Put the legend above the panel, in one row."""
    if handles:
        axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles))


def placeholder(axes: Axes, reason: str) -> None:
    """Show in the panel why it has no data."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", color=MUTED)
    axes.set_yticks([])


def drawable(text: str, limit: int) -> str:
    """Shorten a name in the middle, and replace characters that the font of the figures does not have."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    known = "".join(
        c if c.isprintable() and font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    if len(known) <= limit:
        return known
    # The end of a tensor's name distinguishes more than its beginning.
    return f"{known[: limit // 3]}…{known[-(limit - limit // 3 - 1) :]}"


def picture(figure: Figure, alt: str) -> Picture:
    """Convert a figure to a vector graphic, in the colours of the reader's screen, light or dark."""
    file = io.StringIO()
    # `savefig` would draw the figure twice.
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(file, metadata=metadata)  # type: ignore[no-untyped-call]
    graphic = file.getvalue()
    graphic = graphic[graphic.index("<svg") :]
    # Hundredths of a point are finer than any screen. Rounding to them halves the size.
    graphic = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), graphic)
    dark = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _ON_DARK.items()
        for part in ("stroke", "fill")
    )
    graphic = graphic.replace("</style>", f"@media (prefers-color-scheme:dark){{{dark}}}</style>", 1)
    width, height = figure.get_size_inches() * 96
    uri = "data:image/svg+xml;base64," + base64.b64encode(graphic.encode()).decode()
    return Picture(uri, alt, round(width), round(height), figure)


def draw_angle(axes: Axes, steps: Array, angle: Array, uncertainty: Array, columns: int) -> list[Any]:
    """Draw angles over steps with their uncertainty, and return the entries of the legend."""
    lines: list[Any] = [curve(axes, steps, angle, columns=columns, color=INK, label="ψ")]
    reach = np.where(np.isfinite(angle), uncertainty, np.nan)
    # A band thinner than the line would not be visible.
    if (spread := extent(reach)) is not None and spread[2] > 0.01:
        below, above = np.clip(angle - reach, 0.0, np.pi), np.clip(angle + reach, 0.0, np.pi)
        at = column_starts(len(steps), columns)
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
        axes.axhline(np.pi / 2, color=ALARM, linewidth=0.8, linestyle=(0, (4, 2)), label="π/2, not effective above")
    )
    return lines
