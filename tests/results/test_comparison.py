"""Test the alignment of runs against a search in all updates, and the differences that are reported."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compared import tree
from logs import random_walk, write_log
from natgrad.results.comparison import POSITIONS, compare
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status
from processing import process

numbers = st.lists(st.floats(0.01, 10), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers)
def test_runs_are_aligned_at_the_first_update_that_has_reached_a_loss(one, other):
    curves = compare({"one": tree(one), "other": tree(other)}, "loss").curves
    levels = curves["reached_loss"].values
    assert len(levels) == POSITIONS
    assert levels[0] == min(one[0], other[0])
    assert levels[-1] == min(*one, *other)
    for name, losses in (("one", one), ("other", other)):
        for level, step in zip(levels, curves["at_step"].sel(run=name).values, strict=True):
            reached = [index for index, loss in enumerate(losses) if loss <= level]
            assert (step == reached[0]) if reached else np.isnan(step)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers)
def test_runs_are_aligned_at_the_update_that_is_under_way_at_a_length(one, other):
    curves = compare({"one": tree(one, one), "other": tree(other, other)}, "length").curves
    lengths = curves["path_length"].values
    assert lengths[0] == 0
    for name, norms in (("one", one), ("other", other)):
        path = np.concatenate([[0.0], np.cumsum(norms)])
        for length, step in zip(lengths, curves["at_step"].sel(run=name).values, strict=True):
            if length > path[-1]:
                assert np.isnan(step)
            else:
                at = int(step)
                assert path[at] <= length
                assert length < path[at + 1] or at == len(norms) - 1


def test_runs_are_aligned_by_step_and_missing_steps_are_marked():
    found = compare({"a": tree([3, 2, 1], steps=[0, 1, 2]), "b": tree([9, 8], steps=[1, 5])})
    curves = found.curves
    assert curves["step"].values.tolist() == [0, 1, 2, 5]
    np.testing.assert_array_equal(curves["loss"].sel(run="b"), [np.nan, 9, np.nan, 8])
    assert curves["status"].sel(run="b").values.tolist() == [8, 0, 8, 0]
    assert Status(8) is Status.NOT_LOGGED
    assert [row["updates"] for row in found.overview] == [3, 2]


def test_the_overview_has_the_medians_of_known_values_and_the_first_and_last_known_loss():
    one = tree([np.nan, 3, 5, 2, np.nan])  # the angles are 0, 1, 2, 3, 4
    one["model"]["status"][:3] = Status.OBTUSE
    one["model"]["angle"][2:] = np.nan
    one["model"]["condition_number"][:] = np.array([7, np.inf, np.nan, 9, 1.5]).reshape(5, 1, 1)
    one["model"]["learning_rate"][:] = [np.nan, 0.1, 0.4, 0.2, np.nan]
    overview = compare({"one": one, "none": tree([])}).overview
    assert overview[0] == {
        "run": "one",
        "updates": 5,
        "effective_share": 0.4,
        "median_angle": 0.5,
        "median_condition_number": 7.0,
        "learning_rate": 0.2,
        "first_loss": 3.0,
        "last_loss": 2.0,
    }
    unknown = dict.fromkeys(overview[0], None)
    assert overview[1] == unknown | {"run": "none", "updates": 0}


@pytest.mark.parametrize(
    ("properties", "align", "texts"),
    [
        ([{"evaluation": "fixed"}] * 2, "loss", []),
        ([{"evaluation": "batch"}] * 2, "step", []),
        ([{"evaluation": "batch"}] * 2, "loss", ["losses of a, b belong to different mini-batches"]),
        ([{"evaluation": "batch"}, {"evaluation": "fixed"}], "step", ["on different kinds of data"]),
        ([{"elements": 3}, {"elements": 4}], "length", ["the models have different sizes"]),
    ],
)
def test_runs_whose_values_have_different_meanings_are_compared_with_a_warning(properties, align, texts):
    trees = {name: tree([2, 1], **each) for name, each in zip("ab", properties, strict=True)}
    found = compare(trees, align).warnings
    assert len(found) == len(texts)
    assert all(text in warning for text, warning in zip(texts, found, strict=True))


def test_losses_are_compared_at_equal_ratios_and_those_of_any_sign_at_equal_differences():
    def levels(*losses):
        return compare({"a": tree(losses), "b": tree([9, 8])}, "loss").curves["reached_loss"].values

    ratios = np.diff(np.log(levels(10, 1)))
    np.testing.assert_allclose(ratios, -np.log(9) / (POSITIONS - 1), rtol=1e-9)
    np.testing.assert_allclose(np.diff(levels(10, 0)), -9 / (POSITIONS - 1), rtol=1e-9)


def test_an_unknown_norm_ends_the_path():
    curves = compare({"a": tree([1, 1, 1], [1, np.nan, 1]), "b": tree([1, 1, 1])}, "length").curves
    at = curves["at_step"].sel(run="a").values
    assert np.nanmax(at) == 0
    assert np.isnan(at[curves["path_length"].values > 1]).all()


def test_differences_of_options_tensors_and_sources_are_reported():
    one = tree([1, 2], tensors=("w", "b"), angle=0.5, options={"window": [1], "gamma": None})
    other = tree([1, 2], tensors=("w", "c"), angle=0.75, options={"window": [1, 20], "gamma": None})
    other.attrs |= {"gradient_source": "recovered", "evaluation": "batch"}
    found = compare({"one": one, "other": other}, "loss")
    assert found.options["window"] == {"one": [1], "other": [1, 20]}
    assert "gamma" not in found.options
    assert found.options["gradient source"] == {"one": "logged", "other": "recovered"}
    assert found.tensors["difference"].sel(tensor="w") == 0.25
    assert np.isnan(found.tensors["difference"].sel(tensor=["b", "c"])).all()
    assert any("different sources" in text for text in found.warnings)
    assert any("losses of other belong to different mini-batches" in text for text in found.warnings)


def test_gradients_of_different_objectives_have_different_sources():
    def replayed(objective):
        return tree([1, 2], gradient_source="replayed", replay={"objective": objective})

    same = compare({"a": replayed("tasks:first"), "b": replayed("tasks:first")})
    assert "gradient source" not in same.options
    assert same.warnings == []
    found = compare({"a": replayed("tasks:first"), "b": replayed("tasks:second"), "c": tree([1, 2])})
    assert found.options["gradient source"]["b"] == "replayed: tasks:second"
    (warning,) = found.warnings
    assert "(logged, replayed: tasks:first, replayed: tasks:second)" in warning


@pytest.mark.parametrize(
    ("trees", "align", "text"),
    [
        ({"a": tree([1])}, "step", "at least two runs, got 1"),
        ({"a": tree([1]), "b": tree([np.nan])}, "loss", "run b"),
        ({"a": tree([1]), "b": tree([1], [np.nan])}, "length", "run b"),
        ({"a": tree([1]), "b": tree([])}, "length", "run b"),
        ({"a": tree([1]), "b": tree([1])}, "time", "unknown alignment 'time'"),
    ],
)
def test_what_cannot_be_compared_is_an_error(trees, align, text):
    with pytest.raises(InputError, match=f"(?s){text}"):
        compare(trees, align)


def test_stored_results_are_compared(tmp_path):
    trees = {
        name: process(write_log(tmp_path / name, random_walk(6, seed=seed)), tmp_path / f"out-{name}")
        for seed, name in enumerate(("a", "b"))
    }
    found = compare(trees)
    assert set(found.options) <= {"objective"}
    angle = trees["b"]["model"]["angle"].sel(descent="gradient", window=1)
    np.testing.assert_array_equal(found.curves["angle"].sel(run="b"), angle)
