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
