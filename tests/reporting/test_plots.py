"""Test the plotted values of lines, bands, images and labels."""

import importlib.util

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lazy import Lazy
from natgrad.reporting.plots import Plots, binned
from natgrad.schema.errors import InputError

figure = Lazy("matplotlib.figure")


def results(steps, leading=None, names=()):
    """Return results with a random angle, status and eigenvalues, by step and optionally by tensor or run."""
    rng = np.random.default_rng(0)
    dims, shape = ("step",), (steps,)
    if leading is not None:
        dims, shape = ("step", leading), (steps, len(names))
    values = {"angle": (dims, rng.uniform(0, np.pi, shape)), "status": (dims, np.zeros(shape, np.int8))}
    for power, name in enumerate(("eigenvalue_min", "eigenvalue_mid", "eigenvalue_max")):
        values[name] = (dims, 10.0**power * rng.uniform(1, 2, shape))
    found = xr.Dataset(values, {"step": np.arange(steps) * 10, **({leading: list(names)} if leading else {})})
    return found.assign_attrs(title="test")


def new_axes():
    return figure.Figure().subplots()


@settings(max_examples=50, deadline=None)
@given(arrays(float, st.integers(0, 30), elements=st.floats(allow_subnormal=False)), st.integers(1, 12))
def test_bins_have_the_median_and_the_range_of_their_finite_values(values, columns):
    variable = xr.DataArray(values, {"step": np.arange(len(values))}, "step")
    found = binned(variable, columns)
    count = min(len(values), columns)
    assert found.sizes["step"] == count
    for index in range(count):
        start, stop = index * len(values) // count, (index + 1) * len(values) // count
        part = np.sort(values[start:stop][np.isfinite(values[start:stop])])
        assert found["step"].values[index] == start
        expected = [part[(len(part) - 1) // 2], part[0], part[-1]] if part.size else [np.nan] * 3
        for name, value in zip(("median", "least", "greatest"), expected, strict=True):
            np.testing.assert_array_equal(found[name].values[index], value)


def test_a_short_run_is_drawn_step_by_step():
    found = results(12)
    axes = Plots(found).angle(ax=new_axes())
    curve, limit = axes.lines
    np.testing.assert_array_equal(curve.get_xdata(), found["step"])
    np.testing.assert_array_equal(curve.get_ydata(), found["angle"])
    assert set(limit.get_ydata()) == {np.pi / 2}
    assert axes.get_xlabel() == "step"


def test_a_long_run_is_drawn_as_medians_within_the_range():
    found = results(5000)
    axes = Plots(found).angle(ax=new_axes())
    curve = axes.lines[0]
    assert len(curve.get_xdata()) == 1000
    assert curve.get_ydata()[0] == pytest.approx(np.median(found["angle"].values[:5]), rel=1e-15)
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (found["angle"].min(), found["angle"].max())


@pytest.mark.parametrize("leading", ["run", "tensor"])
def test_curves_of_runs_or_of_the_worst_tensors_have_their_names(leading):
    names = ["plain", "$\\frac$", "<b>"]
    axes = Plots(results(8, leading, names)).angle(ax=new_axes())
    labels = axes.get_legend_handles_labels()[1]
    assert set(labels[:-1]) == {"plain", r"\$\frac\$", "<b>"}
    axes.figure.canvas.draw()  # text between dollar signs is not read as a formula


def test_the_worst_tensors_are_drawn():
    found = results(8, "tensor", "abcdefgh")
    axes = Plots(found).angle(tensors=2, ax=new_axes())
    worst = found["angle"].mean("step").sortby(found["angle"].mean("step"), ascending=False)["tensor"].values[:2]
    assert axes.get_legend_handles_labels()[1][:-1] == worst.tolist()


def test_a_spectrum_has_three_curves_on_a_logarithmic_axis():
    found = results(6)
    axes = Plots(found).spectrum(ax=new_axes())
    assert axes.get_yscale() == "log"
    assert axes.get_legend_handles_labels()[1] == ["eigenvalue_max", "eigenvalue_mid", "eigenvalue_min"]
    for line in axes.lines:
        np.testing.assert_allclose(line.get_ydata(), found[line.get_label()], rtol=2**-52)


def test_a_heat_map_has_the_value_of_each_tensor_at_each_step():
    found = results(6, "tensor", ["a", "b"])
    axes = Plots(found).heatmap(ax=new_axes())
    np.testing.assert_allclose(axes.collections[0].get_array(), found["angle"].values.T, rtol=2**-52)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "10", "20", "30", "40", "50"]


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda plots: plots.heatmap("kappa"), "no variable 'kappa'.*angle"),
        (lambda plots: plots.spectrum(), r"select one tensor: .sel\(tensor=...\)"),
        (lambda plots: plots.angle(engine="bokeh"), "unknown engine 'bokeh'"),
    ],
)
def test_variables_that_cannot_be_drawn_are_an_error_with_a_remedy(draw, text):
    with pytest.raises(InputError, match=f"(?s){text}"):
        draw(Plots(results(4, "tensor", ["a", "b"])))


def test_hvplot_draws_if_it_is_installed_and_is_named_otherwise():
    plots = Plots(results(4, "tensor", ["a", "b"]))
    if importlib.util.find_spec("hvplot") is None:
        with pytest.raises(InputError, match="pip install hvplot"):
            plots.heatmap(engine="hvplot")
    else:
        assert type(plots.heatmap(engine="hvplot")).__name__ == "HeatMap"
