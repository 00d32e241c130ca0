"""Shared elements of the figures: colours, panels, axes, curves, and pictures in a page.

Equal results give equal bytes.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from natgrad.reporting.figures.chart import INCH, Band, Chart, Label, Line, Note, Panel, Ticks, render

__all__ = [
    "ALARM",
    "COLUMNS",
    "COMPARED_COLOURS",
    "COMPARED_DASHES",
    "DASHED",
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
    "extent",
    "fit",
    "half_angle",
    "is_thinned",
    "linear_ticks",
    "log_limits",
    "log_ticks",
    "mark",
    "number",
    "picture",
    "placeholder",
    "positive",
    "step_axis",
    "thinned",
]

Array = NDArray[np.float64]

# Wong's palette (Nature Methods 8, 441), which colour-blind readers can distinguish. Eigenvalues and runs have
# different colours.
EIGENVALUES: dict[str, tuple[Label, str, tuple[float, ...]]] = {
    "eigenvalue_max": (("λ", "max"), "#0072b2", ()),
    "eigenvalue_mid": (("λ", "mid"), "#009e73", (4, 1.5)),
    "eigenvalue_min": (("λ", "min"), "#d55e00", (1.5, 1)),
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
DASHED = (4.0, 2.0)
COMPARED_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5))
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

WIDTH, HEIGHT = 4.2, 2.9
"""Size of a panel in inches: about the width of a phone; two fit side by side on a desktop."""

COLUMNS, SMALL_COLUMNS, MARKERS = 360, 150, 48
"""Number of pixel columns in a panel and in a small panel, for thinning of curves, and of points in panel A."""


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
    figure : Chart
        Panels and curves of the figure.
    """

    uri: str
    alt: str
    width: int
    height: int
    figure: Chart = field(repr=False, compare=False)


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


def curve(panel: Panel, steps: Array, values: Array, columns: int = COLUMNS, **style: Any) -> Line:
    """Draw values over steps. A value without neighbours is drawn as a dot, because a line would not show it."""
    x, y = thinned(steps, np.where(np.isfinite(values), values, np.nan), columns)
    line = Line(x, y, **style)
    panel.lines.append(line)
    finite = np.concatenate([[False], np.isfinite(y), [False]])
    alone = finite[1:-1] & ~finite[:-2] & ~finite[2:]
    if alone.any():
        panel.lines.append(Line(x[alone], y[alone], line.colour, width=0, marker=".", size=2.5))
    return line


def mark(panel: Panel, steps: Array, mask: NDArray[np.bool_], columns: int = COLUMNS) -> Line:
    """Mark steps along the lower edge, at most one in each pixel column."""
    marked = np.flatnonzero(mask)
    marked = marked[np.unique(marked * columns // len(mask), return_index=True)[1]]
    line = Line(
        steps[marked],
        np.full(len(marked), 0.025),
        ALARM,
        width=0,
        marker="|",
        size=5,
        label="no metric",
        on_edge=True,
    )
    panel.lines.append(line)
    return line


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


def log_limits(panel: Panel, low: float, high: float, limit: int = 6) -> None:
    """Set the limits of a log axis, with space below for marks. Short axes also get ticks between powers of ten."""
    bottom, top = math.log10(low), math.log10(high)
    if top - bottom < 0.5:
        bottom, top = (bottom + top) / 2 - 0.25, (bottom + top) / 2 + 0.25
    below, above = 0.12 * (top - bottom), 0.05 * (top - bottom)
    axis = panel.y
    axis.log = True
    axis.low, axis.high = 10.0 ** max(bottom - below, -307.0), 10.0 ** min(top + above, 308.0)
    axis.ticks = _short_log_ticks if top - bottom < 2 else lambda low, high: log_ticks(low, high, limit)
    axis.minor = _digits_between if 2 <= top - bottom <= 5 else None


def log_ticks(low: float, high: float, limit: int = 6) -> Ticks:
    """Return powers of ten within limits, at most a number of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    stride = max(-(-(last - first + 1) // limit), 1)
    powers = range(first + -first % stride, last + 1, stride)
    return [(10.0**power, "1" if power == 0 else f"10{_superscript(str(power))}") for power in powers]


def _short_log_ticks(low: float, high: float) -> Ticks:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    positions = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    return [(position, number(position)) for position in positions if low <= position <= high]


def _digits_between(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    positions = (digit * 10.0**power for power in decades for digit in range(2, 10))
    return [position for position in positions if low <= position <= high]


def linear_ticks(low: float, high: float, limit: int = 5, *, whole: bool = False) -> Ticks:
    """Return round numbers within limits: multiples of 1, 2 or 5 times a power of ten, at most limit + 1 of them.

    Parameters
    ----------
    low, high : float
    limit : int
    whole : bool
        Only whole numbers, with a space between thousands.
    """
    least = (high - low) / limit
    if not (math.isfinite(least) and least > 0):
        return []
    power = 10.0 ** math.floor(math.log10(least))
    step = next(digit * power for digit in (1, 2, 5, 10, 20) if digit * power >= least * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    positions = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(at, f"{at:,.0f}".replace(",", "\u2009") if whole else number(at)) for at in positions]


def step_axis(panel: Panel, steps: Array, limit: int = 5) -> None:
    """Set up the x axis for steps."""
    panel.x.label = "step"
    if not len(steps):
        return
    margin = 0.02 * (steps[-1] - steps[0]) or 0.5
    panel.x.low, panel.x.high = steps[0] - margin, steps[-1] + margin
    panel.x.ticks = lambda low, high: linear_ticks(low, high, limit, whole=True)


def fit(panel: Panel, values: Array) -> None:
    """Set the limits of the y axis to those of finite values, with a margin."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    # The difference of two numbers may overflow.
    margin = 0.05 * high - 0.05 * low or 0.05 * abs(high) or 0.5
    panel.y.low, panel.y.high = low - margin, high + margin
    panel.y.ticks = linear_ticks


def angle_limits(panel: Panel, spread: tuple[float, float, float] | None) -> None:
    """Set up the y axis for angles, up to pi if any angle is obtuse."""
    obtuse = spread is not None and spread[2] > np.pi / 2
    panel.y.low, panel.y.high = -0.03 * np.pi, (1.03 if obtuse else 0.55) * np.pi
    panel.y.ticks = lambda low, high: angle_ticks(2)


def angle_ticks(eighths: int) -> Ticks:
    """Return multiples of some eighths of pi."""
    texts = ("0", "π/8", "π/4", "3π/8", "π/2", "5π/8", "3π/4", "7π/8", "π")
    return [(k * np.pi / 8, texts[k]) for k in range(0, 9, eighths)]


def placeholder(panel: Panel, reason: str) -> None:
    """Show in the panel why it has no data."""
    panel.notes.append(Note(reason, colour=MUTED))
    panel.y.ticks = lambda low, high: []


def drawable(text: str, limit: int) -> str:
    """Shorten a name in the middle, and replace characters that cannot be printed."""
    known = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if len(known) <= limit:
        return known
    # The end of a tensor's name distinguishes more than its beginning.
    return f"{known[: limit // 3]}…{known[-(limit - limit // 3 - 1) :]}"


def picture(chart: Chart, alt: str) -> Picture:
    """Convert a chart to a vector graphic, in the colours of the reader's screen, light or dark."""
    graphic = render(chart, INK, _GRID, _ON_DARK).encode()
    width, height = (round(inches * INCH) for inches in (chart.width, chart.height))
    return Picture("data:image/svg+xml;base64," + base64.b64encode(graphic).decode(), alt, width, height, chart)


def draw_angle(panel: Panel, steps: Array, angle: Array, uncertainty: Array, columns: int) -> list[Line | Band]:
    """Draw angles over steps with their uncertainty, and return the entries of the legend."""
    entries: list[Line | Band] = [curve(panel, steps, angle, columns=columns, colour=INK, label="ψ")]
    reach = np.where(np.isfinite(angle), uncertainty, np.nan)
    # A band thinner than the line would not be visible.
    if (spread := extent(reach)) is not None and spread[2] > 0.01:
        below, above = np.clip(angle - reach, 0.0, np.pi), np.clip(angle + reach, 0.0, np.pi)
        at = column_starts(len(steps), columns)
        low, high = np.fmin.reduceat(below, at), np.fmax.reduceat(above, at)
        panel.bands.append(Band(steps[at], low, high, "#0072b2", "rounding"))
        entries.append(panel.bands[-1])
    entries.append(half_angle(panel))
    return entries


def half_angle(panel: Panel) -> Line:
    """Draw the angle above which an update is not effective, over the complete x axis."""
    ends = np.array([panel.x.low, panel.x.high])
    line = Line(ends, np.full(2, np.pi / 2), ALARM, 0.8, DASHED, label="π/2, not effective above")
    panel.lines.append(line)
    return line
