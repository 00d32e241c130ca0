"""Draw charts as SVG: a grid of panels with linear or logarithmic axes, curves, bands, points and legends.

The figures of a page need no more than this. A plotting library would take a second of processor time per run, half
of it to import it and half of it to measure every text: more than all other work on a small run. Here, margins
follow from an upper estimate of the widths of texts, and the fonts are those of the reader.

Equal charts give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from html import escape
from itertools import count, pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["INCH", "Arrow", "Axis", "Band", "Chart", "Label", "Line", "Note", "Panel", "render"]

Label = str | tuple[str, str]
"""A text, or a symbol with its subscript."""

Ticks = list[tuple[float, str]]

INCH = 96
"""Pixels in an inch."""

_FONT = "DejaVu Sans,Verdana,Helvetica,Arial,sans-serif"
_SIZE, _SMALL = 12.0, 11.3
"""Sizes of labels, and of tick labels and legends, in pixels."""

_ADVANCE = 0.62
"""Mean width of a character in units of the font size, in the widest of the fonts."""

_ROW, _TICK, _KEY, _GAP, _EDGE = 17.0, 4.0, 20.0, 10.0, 12.0
"""Height of a row of text, length of a tick, width of a key of a legend, gap between entries, outer margin."""

_FAR = 100.0
"""Distance from a panel, in sizes of the panel, at which positions are cut off. They are not visible."""


@dataclass
class Axis:
    """An axis. Panels that share an axis have the same limits and ticks.

    Attributes
    ----------
    label : str
        Lines are separated by newlines.
    low, high : float
        Limits.
    log : bool
    ticks : callable
        Returns the positions and texts of the ticks from the limits.
    minor : callable, optional
        Returns the positions of ticks without text.
    """

    label: str = ""
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    ticks: Callable[[float, float], Ticks] = lambda low, high: []
    minor: Callable[[float, float], list[float]] | None = None

    def shares(self, values: ArrayLike) -> NDArray[np.float64]:
        """Return positions as shares of the axis: 0 at the lower limit, 1 at the upper one."""
        with np.errstate(all="ignore"):
            # Halves, because a difference may overflow.
            low, high, found = (
                (np.log10(part) if self.log else np.asarray(part, np.float64)) / 2.0
                for part in (self.low, self.high, np.asarray(values, np.float64))
            )
            return np.clip((found - low) / (high - low), -_FAR, _FAR)

    def visible(self) -> Ticks:
        """Return the ticks within the limits."""
        found = self.ticks(self.low, self.high)
        shares = self.shares([position for position, _ in found])
        return [tick for tick, share in zip(found, shares, strict=True) if -1e-9 <= share <= 1 + 1e-9]


@dataclass
class Line:
    """A curve, points, or both. A value of NaN is a gap.

    Attributes
    ----------
    x, y : array, shape (points,)
    colour : str
    width : float
        In points; 0 draws no curve.
    dash : tuple of float
        Lengths of dashes and gaps, in widths of the line.
    marker : str
        ``.``, ``|``, or one of ``o^sDvPX``, which are drawn as outlines.
    size : float
        Size of a marker in points.
    label : Label
        Text in a legend.
    on_edge : bool
        y is a share of the panel's height.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: str
    width: float = 1.1
    dash: tuple[float, ...] = ()
    marker: str = ""
    size: float = 4.0
    label: Label = ""
    on_edge: bool = False


@dataclass
class Band:
    """The area between two curves."""

    x: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    colour: str
    label: Label = ""


@dataclass
class Arrow:
    """An arrow from one point to another."""

    start: NDArray[np.float64]
    end: NDArray[np.float64]
    colour: str
    width: float


@dataclass
class Note:
    """A text around a point, which is a share of the panel unless it has coordinates."""

    text: str
    x: float = 0.5
    y: float = 0.5
    colour: str = "#808080"
    in_data: bool = False


@dataclass
class Panel:
    """Curves, bands, arrows and texts over two axes.

    Attributes
    ----------
    title : str
        Text above the panel, on the left.
    letter : bool
        The title is a letter, in bold type.
    contours : list of Line
        Curves behind all others.
    legend : list
        Lines and bands whose labels appear above the panel, on the right.
    tick_labels : tuple of bool
        Whether the ticks of the x and of the y axis have texts, and the axes their labels.
    """

    x: Axis = field(default_factory=Axis)
    y: Axis = field(default_factory=Axis)
    title: str = ""
    letter: bool = False
    lines: list[Line] = field(default_factory=list)
    contours: list[Line] = field(default_factory=list)
    bands: list[Band] = field(default_factory=list)
    arrows: list[Arrow] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    legend: list[Line | Band] = field(default_factory=list)
    tick_labels: tuple[bool, bool] = (True, True)
    grid: bool = True


@dataclass
class Chart:
    """A grid of panels, with common labels and a common legend.

    Attributes
    ----------
    width, height : float
        In inches.
    rows : list of list of Panel
    x_label, y_label : str
        Labels of all panels.
    legend : list of Line
        Entries below the panels.
    columns : int
        Columns of the legend.
    """

    width: float
    height: float
    rows: list[list[Panel]]
    x_label: str = ""
    y_label: str = ""
    legend: list[Line] = field(default_factory=list)
    columns: int = 1

    @property
    def panels(self) -> list[Panel]:
        """All panels, row by row."""
        return [panel for row in self.rows for panel in row]


def render(chart: Chart, ink: str, grid: str, on_dark: Mapping[str, str]) -> str:
    """Return a chart as an SVG document.

    Parameters
    ----------
    chart : Chart
    ink, grid : str
        Colours of texts and axes, and of the grid.
    on_dark : mapping of str to str
        Colours that replace others on a dark screen.

    Returns
    -------
    str
    """
    width, height = round(chart.width * INCH), round(chart.height * INCH)
    body = "".join(_Drawing(chart, width, height, ink, grid).elements())
    dark = "".join(
        f'[{part}="{light}"]{{{part}:{dark}}}'
        for light, dark in on_dark.items()
        for part in ("stroke", "fill")
        if f'{part}="{light}"' in body
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="{_FONT}" font-size="{_SIZE}">'
        f"<style>@media(prefers-color-scheme:dark){{{dark}}}</style>{body}</svg>"
    )


@dataclass(frozen=True)
class _Box:
    """Area of a panel in pixels."""

    left: float
    top: float
    width: float
    height: float

    def across(self, axis: Axis, values: ArrayLike) -> NDArray[np.float64]:
        return self.left + self.width * axis.shares(values)

    def up(self, axis: Axis, values: ArrayLike) -> NDArray[np.float64]:
        return self.top + self.height * (1.0 - axis.shares(values))


class _Drawing:
    """The elements of a chart."""

    def __init__(self, chart: Chart, width: float, height: float, ink: str, grid: str) -> None:
        self.chart, self.width, self.height, self.ink, self.grid = chart, width, height, ink, grid
        self.clips = count()
        self.legend_rows = math.ceil(len(chart.legend) / chart.columns)

    def elements(self) -> Iterator[str]:
        for panel, box in self._boxes():
            yield from self._panel(panel, box)
        below = self.height - self.legend_rows * _ROW - 0.35 * _ROW
        if self.chart.x_label:
            yield self._text(self.width / 2, below, self.chart.x_label, "middle")
        if self.chart.y_label:
            yield self._upright(_SIZE, (self.height - _ROW) / 2, self.chart.y_label)
        each = (self.width - _EDGE) / self.chart.columns
        for index, line in enumerate(self.chart.legend):
            row, column = divmod(index, self.chart.columns)
            y = self.height - (self.legend_rows - row - 0.6) * _ROW
            yield from self._entry(line, _EDGE + column * each, y)

    def _boxes(self) -> Iterator[tuple[Panel, _Box]]:
        """Yield each panel and its area. Panels of a row have the same height, those of a column the same width."""
        rows, columns = self.chart.rows, range(max(map(len, self.chart.rows), default=0))
        lefts = [max(_left(row[column]) for row in rows if column < len(row)) for column in columns]
        tops = [max(map(_top, row)) for row in rows]
        bottoms = [max(map(_bottom, row)) for row in rows]
        start = _ROW if self.chart.y_label else 0.0
        reserved = self.legend_rows * _ROW + (_ROW if self.chart.x_label else 0.0)
        width = (self.width - start - sum(lefts)) / max(len(columns), 1) - _EDGE
        height = (self.height - reserved - sum(tops) - sum(bottoms)) / max(len(rows), 1)
        top = 0.0
        for index, row in enumerate(rows):
            left, top = start, top + tops[index]
            for column, panel in enumerate(row):
                left += lefts[column]
                yield panel, _Box(left, top, width, height)
                left += width + _EDGE
            top += height + bottoms[index]

    def _panel(self, panel: Panel, box: _Box) -> Iterator[str]:
        right, bottom = box.left + box.width, box.top + box.height
        yield from self._axes(panel, box)
        clip = f"c{next(self.clips)}"
        area = f"M{_n(box.left)} {_n(box.top)}H{_n(right)}V{_n(bottom)}H{_n(box.left)}z"
        yield f'<clipPath id="{clip}"><path d="{area}"/></clipPath><g clip-path="url(#{clip})">'
        for band in panel.bands:
            known = np.isfinite(band.low) & np.isfinite(band.high)
            x, low, high = box.across(panel.x, band.x), box.up(panel.y, band.low), box.up(panel.y, band.high)
            for part in np.split(np.arange(len(x)), np.flatnonzero(known[1:] != known[:-1]) + 1):
                if len(part) and known[part[0]]:
                    back = part[::-1]
                    edge = _path(np.concatenate([x[part], x[back]]), np.concatenate([low[part], high[back]]))
                    yield f'<path d="{edge}z" fill="{band.colour}" fill-opacity=".25"/>'
        for line in panel.contours + panel.lines:
            y = box.up(Axis() if line.on_edge else panel.y, line.y)
            yield from _line(line, box.across(panel.x, line.x), y)
        yield "</g>"
        for arrow in panel.arrows:
            ends = np.stack([arrow.start, arrow.end])
            yield _arrow(box.across(panel.x, ends[:, 0]), box.up(panel.y, ends[:, 1]), arrow)
        for note in panel.notes:
            yield from self._note(note, panel, box)
        if panel.title:
            size, weight = (14.7, "bold") if panel.letter else (_SMALL, "")
            yield self._text(box.left, box.top - 0.4 * _ROW, panel.title, size=size, weight=weight)
        start = right
        for entry in reversed(panel.legend):
            start -= _width(entry.label, _SMALL) + _KEY
            yield from self._entry(entry, start, box.top - 0.7 * _ROW)
            start -= _GAP

    def _note(self, note: Note, panel: Panel, box: _Box) -> Iterator[str]:
        x, y = box.left + box.width * note.x, box.top + box.height * (1.0 - note.y)
        if note.in_data:
            x, y = float(box.across(panel.x, [note.x])[0]), float(box.up(panel.y, [note.y])[0])
        lines = note.text.split("\n")
        for index, text in enumerate(lines):
            shift = (index - (len(lines) - 1) / 2) * _ROW
            yield self._text(x, y + shift + 0.35 * _SIZE, text, "middle", colour=note.colour)

    def _axes(self, panel: Panel, box: _Box) -> Iterator[str]:
        """Yield the grid, the axes with their ticks, and the labels."""
        right, bottom = box.left + box.width, box.top + box.height
        across, up = panel.x.visible(), panel.y.visible()
        at_x = box.across(panel.x, [position for position, _ in across])
        at_y = box.up(panel.y, [position for position, _ in up])
        if panel.grid:
            lines = "".join(f"M{_n(x)} {_n(box.top)}V{_n(bottom)}" for x in at_x)
            lines += "".join(f"M{_n(box.left)} {_n(y)}H{_n(right)}" for y in at_y)
            yield f'<path d="{lines}" stroke="{self.grid}" stroke-width=".7"/>'
        outline = f"M{_n(box.left)} {_n(box.top)}V{_n(bottom)}H{_n(right)}"
        outline += "".join(f"M{_n(x)} {_n(bottom)}v{_TICK}" for x in at_x)
        outline += "".join(f"M{_n(box.left)} {_n(y)}h-{_TICK}" for y in at_y)
        for axis, position in ((panel.x, box.across), (panel.y, box.up)):
            between = [] if axis.minor is None else axis.minor(axis.low, axis.high)
            for place in position(axis, between):
                outline += f"M{_n(place)} {_n(bottom)}v2" if axis is panel.x else f"M{_n(box.left)} {_n(place)}h-2"
        yield f'<path d="{outline}" fill="none" stroke="{self.ink}" stroke-width=".9"/>'
        with_x, with_y = panel.tick_labels
        if with_x:
            for x, (_, text) in zip(at_x, across, strict=True):
                yield self._text(x, bottom + _TICK + _SMALL, text, "middle", size=_SMALL)
            if panel.x.label:
                below = bottom + (_TICK + _ROW if across else 0.0) + _SIZE
                yield self._text(box.left + box.width / 2, below, panel.x.label, "middle")
        if with_y:
            for y, (_, text) in zip(at_y, up, strict=True):
                yield self._text(box.left - _TICK - 3, y + 0.36 * _SMALL, text, "end", size=_SMALL)
            if panel.y.label:
                lines_of_label = panel.y.label.count("\n") + 1
                x = box.left - _ticks_width(panel) - (lines_of_label - 1) * _SIZE * 1.2 - 0.4 * _SIZE
                yield self._upright(x, box.top + box.height / 2, panel.y.label)

    def _entry(self, entry: Line | Band, x: float, y: float) -> Iterator[str]:
        """Yield the key and the label of a legend."""
        ends = np.array([x, x + _KEY - 5])
        if isinstance(entry, Band):
            area = f"M{_n(x)} {_n(y - 4)}h{_KEY - 5}v8h-{_KEY - 5}z"
            yield f'<path d="{area}" fill="{entry.colour}" fill-opacity=".25"/>'
        else:
            if entry.width:
                yield from _line(Line(ends, ends, entry.colour, entry.width, entry.dash), ends, np.array([y, y]))
            if entry.marker:
                key = Line(ends, ends, entry.colour, 0.0, marker=entry.marker, size=entry.size)
                yield from _line(key, ends[:1] / 2 + ends[1:] / 2, np.array([y]))
        yield self._text(x + _KEY, y + 0.36 * _SMALL, entry.label, size=_SMALL)

    def _text(
        self,
        x: float,
        y: float,
        text: Label,
        anchor: str = "",
        *,
        size: float = _SIZE,
        weight: str = "",
        colour: str = "",
        turned: str = "",
    ) -> str:
        symbol, below = (text, "") if isinstance(text, str) else text
        attributes = {"text-anchor": anchor, "font-weight": weight, "transform": turned}
        attributes["font-size"] = "" if size == _SIZE else _n(size)
        extra = "".join(f' {name}="{value}"' for name, value in attributes.items() if value)
        inner = escape(symbol) + (f'<tspan dy="3" font-size="{_n(0.75 * size)}">{below}</tspan>' if below else "")
        return f'<text x="{_n(x)}" y="{_n(y)}" fill="{colour or self.ink}"{extra}>{inner}</text>'

    def _upright(self, x: float, y: float, text: str) -> str:
        """Return a text that is turned by 90 degrees, with its first line at x and further lines on the right."""
        return "".join(
            self._text(
                x + 1.2 * index * _SIZE,
                y,
                line,
                "middle",
                turned=f"rotate(-90 {_n(x + 1.2 * index * _SIZE)} {_n(y)})",
            )
            for index, line in enumerate(text.split("\n"))
        )


def _n(value: float) -> str:
    """Format a position. Hundredths of a pixel are finer than any screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _width(text: Label, size: float) -> float:
    """Return an upper estimate of the width of a text in pixels."""
    return (len(text) if isinstance(text, str) else len(text[0]) + 0.75 * len(text[1])) * size * _ADVANCE


def _ticks_width(panel: Panel) -> float:
    return _TICK + 3 + max((_width(text, _SMALL) for _, text in panel.y.visible()), default=0.0)


def _left(panel: Panel) -> float:
    if not panel.tick_labels[1]:
        return _TICK
    lines = panel.y.label.count("\n") + 1 if panel.y.label else 0
    return _ticks_width(panel) + lines * _SIZE * 1.2 + 6


def _top(panel: Panel) -> float:
    return 1.6 * _ROW if panel.title or panel.legend or panel.letter else 0.6 * _ROW


def _bottom(panel: Panel) -> float:
    if not panel.tick_labels[0]:
        return _TICK
    return _TICK + 4 + (_ROW if panel.x.visible() else 0.0) + (_ROW if panel.x.label else 0.0)


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Return the path through points, with gaps at values that are not numbers."""
    commands, drawn = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        finite = math.isfinite(a) and math.isfinite(b)
        if finite:
            commands.append(f"{'L' if drawn else 'M'}{a:.1f} {b:.1f}")
        drawn = finite
    return "".join(commands)


def _line(line: Line, x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[str]:
    if line.width:
        width = line.width * INCH / 72
        dashes = ",".join(_n(width * length) for length in line.dash)
        extra = f' stroke-dasharray="{dashes}"' if dashes else ""
        yield (
            f'<path d="{_path(x, y)}" fill="none" stroke="{line.colour}" stroke-width="{_n(width)}" '
            f'stroke-linejoin="round"{extra}/>'
        )
    if line.marker:
        shape = _shape(line.marker, line.size * INCH / 144)
        points = "".join(
            f"M{a:.1f} {b:.1f}{shape}"
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
            if math.isfinite(a) and math.isfinite(b)
        )
        fill, stroke = (line.colour, "none") if line.marker == "." else ("none", line.colour)
        yield f'<path d="{points}" fill="{fill}" stroke="{stroke}" stroke-width="1.2"/>'


def _shape(marker: str, radius: float) -> str:
    """Return the path of a marker, relative to its centre."""
    if marker in "o.":
        r = _n(radius if marker == "o" else 0.6 * radius)
        return f"m-{r} 0a{r} {r} 0 1 0 {_n(2 * float(r))} 0a{r} {r} 0 1 0 -{_n(2 * float(r))} 0z"
    if marker == "|":
        return f"m0 {_n(radius)}v-{_n(2 * radius)}"
    if marker in "PX":
        strokes = ((0, -1, 0, 1), (-1, 0, 1, 0)) if marker == "P" else ((-1, -1, 1, 1), (-1, 1, 1, -1))
        moves = ((f"m{a} {b}", f"l{c - a} {d - b}", f"m{-c} {-d}") for a, b, c, d in strokes)
        return "".join(
            command + " ".join(_n(int(part) * radius) for part in move.split())
            for stroke in moves
            for command, move in ((text[0], text[1:]) for text in stroke)
        )
    corners = {
        "^": ((0, -1), (1, 1), (-1, 1)),
        "v": ((0, 1), (1, -1), (-1, -1)),
        "s": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "D": ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)),
    }[marker]
    steps = [corners[0], *((c[0] - b[0], c[1] - b[1]) for b, c in pairwise(corners))]
    return "m" + "l".join(f"{_n(a * radius)} {_n(b * radius)}" for a, b in steps) + "z"


def _arrow(x: NDArray[np.float64], y: NDArray[np.float64], arrow: Arrow) -> str:
    dx, dy = x[1] - x[0], y[1] - y[0]
    length = math.hypot(dx, dy) or 1.0
    dx, dy = 7.0 * dx / length, 7.0 * dy / length
    base_x, base_y = x[1] - dx, y[1] - dy
    corners = [(x[1], y[1]), (base_x - dy / 2, base_y + dx / 2), (base_x + dy / 2, base_y - dx / 2)]
    head = "L".join(f"{_n(a)} {_n(b)}" for a, b in corners)
    shaft = f"M{_n(x[0])} {_n(y[0])}L{_n(base_x)} {_n(base_y)}"
    width = _n(arrow.width * INCH / 72)
    return (
        f'<path d="{shaft}" stroke="{arrow.colour}" stroke-width="{width}"/>'
        f'<path d="M{head}z" fill="{arrow.colour}"/>'
    )
