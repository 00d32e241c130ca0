"""Compare rendered charts with their data, and ticks with the limits of their axes."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.reporting.figures import canvas
from natgrad.reporting.figures.chart import Arrow, Axis, Band, Chart, Line, Note, Panel, render

SVG = "{http://www.w3.org/2000/svg}"
RED, BLUE, GREY = "#ff0000", "#0000ff", "#123456"
FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


def drawn(chart):
    """Return the root of a rendered chart."""
    return ElementTree.fromstring(render(chart, "#222222", "#dddddd", {RED: "#00ff00"}))


def coloured(root, colour):
    """Return the paths of a colour in clipped groups."""
    return [path for group in root.iter(f"{SVG}g") for path in group if colour in path.attrib.values()]


def numbers(text):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]


def area(root):
    """Return left, top, right and bottom of the first panel."""
    clip = next(root.iter(f"{SVG}clipPath"))[0]
    left, top, right, bottom, _ = numbers(clip.attrib["d"])
    return left, top, right, bottom


def position(share, start, end):
    return start + share * (end - start)


@given(
    st.lists(st.tuples(FINITE, FINITE | st.just(math.nan)), min_size=1, max_size=20),
    st.booleans(),
)
def test_a_curve_passes_through_its_points_and_has_gaps_at_nan(points, log):
    x, y = np.array(points).T
    if log:
        y = np.abs(y) + 1e-3
    axis = Axis(low=1e-3, high=2e6, log=log) if log else Axis(low=-1e6, high=1e6)
    panel = Panel(Axis(low=-1e6, high=1e6), axis, lines=[Line(x, y, RED)])
    root = drawn(Chart(4, 3, [[panel]]))
    left, top, right, bottom = area(root)
    (path,) = coloured(root, RED)
    found = np.array(numbers(path.attrib["d"])).reshape(-1, 2)
    known = np.isfinite(y)
    share = np.log(y / 1e-3) / np.log(2e9) if log else (y + 1e6) / 2e6
    expected = np.column_stack([position((x + 1e6) / 2e6, left, right), position(share, bottom, top)])
    # Positions are rounded to tenths of a pixel, and those of the area to hundredths.
    np.testing.assert_allclose(found, expected[known], atol=0.05 + 0.01 + 1e-6)
    assert path.attrib["d"].count("M") == (known & ~np.concatenate([[False], known[:-1]])).sum()


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=2, max_size=8))
def test_any_values_give_a_document_without_other_numbers(values):
    values = np.array(values)
    panel = Panel(lines=[Line(values, values, RED, marker="o"), Line(values, values, RED, on_edge=True)])
    panel.bands = [Band(values, values - 1, values + 1, BLUE, "band")]
    canvas.fit(panel, np.array([-1.7e308, 1.7e308]))
    text = render(Chart(4, 3, [[panel]]), "#222222", "#dddddd", {})
    ElementTree.fromstring(text)
    assert not re.search(r"\b(nan|inf)\b", text)


def test_a_band_has_one_area_for_each_range_of_known_limits():
    x = np.arange(7.0)
    low = np.array([0.2, 0.3, np.nan, np.nan, 0.4, 0.5, np.nan])
    panel = Panel(Axis(low=0, high=6), Axis(), bands=[Band(x, low, low + 0.1, BLUE)])
    root = drawn(Chart(4, 3, [[panel]]))
    left, top, right, bottom = area(root)
    corners = [np.array(numbers(path.attrib["d"])).reshape(-1, 2) for path in coloured(root, BLUE)]
    for found, members in zip(corners, ([0, 1, 1, 0], [4, 5, 5, 4]), strict=True):
        y = np.concatenate([low[members[:2]], low[members[2:]] + 0.1])
        expected = np.column_stack([position(x[members] / 6, left, right), position(y, bottom, top)])
        np.testing.assert_allclose(found, expected, atol=0.06)


@pytest.mark.parametrize("marker", "o.|^sDvPX")
def test_each_point_has_one_marker_around_it(marker):
    x, y = np.array([0.25, 0.5, 0.75]), np.array([0.5, np.nan, 0.25])
    root = drawn(Chart(4, 3, [[Panel(lines=[Line(x, y, RED, width=0, marker=marker, size=6)])]]))
    left, top, right, bottom = area(root)
    (path,) = coloured(root, RED)
    starts = [numbers(part)[:2] for part in re.findall(r"M[^M]*", path.attrib["d"])]
    expected = [(position(a, left, right), position(b, bottom, top)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(starts, [expected[0], expected[2]], atol=0.06)
    assert (path.attrib["fill"] == "none") == (marker != ".")


def test_texts_are_escaped_and_placed_at_their_points():
    text = "<script> & 'x'"
    panel = Panel(title=text, notes=[Note("here", 0.25, 0.75, in_data=True), Note("two\nlines")])
    panel.legend = [Line(np.empty(0), np.empty(0), RED, label=("λ", "max"))]
    panel.arrows = [Arrow(np.array([0.0, 0.0]), np.array([0.5, 0.5]), BLUE, 1)]
    root = drawn(Chart(4, 3, [[panel]], x_label="all x", y_label="all y"))
    texts = {"".join(element.itertext()): element for element in root.iter(f"{SVG}text")}
    assert set(texts) == {text, "here", "two", "lines", "λmax", "all x", "all y"}
    left, top, right, bottom = area(root)
    assert float(texts["here"].attrib["x"]) == pytest.approx(position(0.25, left, right), abs=0.02)
    tips = [path for path in root if path.attrib.get("fill") == BLUE]
    assert numbers(tips[0].attrib["d"])[:2] == pytest.approx(
        [position(0.5, left, right), position(0.5, bottom, top)], abs=0.02
    )
    assert '[stroke="#ff0000"]{stroke:#00ff00}' in root.find(f"{SVG}style").text


def test_panels_do_not_overlap_and_share_columns_and_rows():
    rows = [[Panel(y=Axis("long\nlabel")), Panel()], [Panel(title="t"), Panel(tick_labels=(False, False))]]
    root = drawn(Chart(5, 4, rows, legend=3 * [Line(np.empty(0), np.empty(0), RED, label="run")], columns=2))
    boxes = np.array([numbers(clip[0].attrib["d"])[:4] for clip in root.iter(f"{SVG}clipPath")]).reshape(2, 2, 4)
    assert (boxes[:, 0, 2] < boxes[:, 1, 0]).all()
    assert (boxes[0, :, 3] < boxes[1, :, 1]).all()
    assert (boxes[:, :, 0::2] == boxes[:1, :, 0::2]).all()
    assert (boxes[:, :, 1::2] == boxes[:, :1, 1::2]).all()
    assert boxes.min() > 0
    assert boxes[:, :, 2].max() < 5 * 96
    assert boxes[:, :, 3].max() < 4 * 96 - 2 * 17


# Ticks -------------------------------------------------------------------------------------------------------


@given(FINITE, st.floats(1e-3, 1e6), st.integers(2, 8))
def test_linear_ticks_are_equally_spaced_round_numbers_within_the_limits(low, span, limit):
    ticks = [position for position, _ in canvas.linear_ticks(low, low + span, limit)]
    assert len(ticks) <= limit + 1
    # The next smaller step is at least two fifths as long, and a range of n steps has at least n - 1 of their ends.
    assert len(ticks) >= math.floor(limit / 2.5) - 1
    assert all(low <= tick <= low + span for tick in ticks)
    steps = np.diff(ticks)
    if len(steps):
        digits = steps[0] / 10.0 ** np.floor(np.log10(steps[0] * (1 + 1e-6)))
        assert digits == pytest.approx(min((1, 2, 5), key=lambda digit: abs(digit - digits)), rel=1e-4)
        np.testing.assert_allclose(steps, steps[0], rtol=1e-4)


def test_ticks_of_steps_are_whole_numbers():
    assert canvas.linear_ticks(-0.5, 2.5, 5, whole=True) == [(0.0, "0"), (1.0, "1"), (2.0, "2")]
    assert canvas.linear_ticks(0, 20_000, 2, whole=True)[-1] == (20_000.0, "20\u2009000")
    assert canvas.linear_ticks(1, 1) == []


@given(st.integers(-300, 290), st.integers(1, 18), st.integers(3, 8))
def test_log_ticks_are_powers_of_ten_and_few(low, decades, limit):
    ticks = canvas.log_ticks(10.0**low, 10.0 ** (low + decades), limit)
    assert 1 <= len(ticks) <= limit
    for position, text in ticks:
        power = round(math.log10(position))
        assert position == 10.0**power
        assert low <= power <= low + decades
        digits = text.removeprefix("10").translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        assert (text == "1") if power == 0 else int(digits) == power


@given(st.floats(1e-30, 1e30), st.floats(1.0, 99.0))
def test_the_ticks_of_a_short_log_axis_are_read_back_and_within_its_limits(low, ratio):
    panel = Panel()
    canvas.log_limits(panel, low, low * ratio)
    assert panel.y.low < low
    assert panel.y.high >= low * ratio
    ticks = panel.y.visible()
    assert 1 <= len(ticks) <= 12
