"""Test the ranking of tensors against sums of all values, for results in memory and results that are stored."""

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from natgrad.results.ranking import BLOCK_BYTES, rank, rank_dataset, select, step_parts
from natgrad.schema.errors import InputError
from natgrad.schema.variables import Status

NAMES = ["a", "b", "c"]


def dataset(status, angle):
    """Return results of a group with one descent and one window."""
    dims = ("step", "tensor", "descent", "window")
    values = {"status": (dims, status[:, :, None, None]), "angle": (dims, angle[:, :, None, None])}
    coordinates = {"step": np.arange(len(status)), "tensor": NAMES, "descent": ["gradient"], "window": [1]}
    return xr.Dataset(values, coordinates)


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 12))
def test_the_ranking_has_the_sums_of_all_updates_with_an_angle(data, steps):
    status = data.draw(arrays(np.int8, (steps, 3), elements=st.sampled_from([int(s) for s in Status])))
    angle = data.draw(arrays(float, (steps, 3), elements=st.floats(0, np.pi) | st.just(np.nan)))
    found = rank_dataset(dataset(status, angle))
    expected = {}
    for index, name in enumerate(NAMES):
        known = [
            (s, a)
            for s, a in zip(status[:, index], angle[:, index], strict=True)
            if s in (Status.EFFECTIVE, Status.ORTHOGONAL, Status.OBTUSE) and not np.isnan(a)
        ]
        if known:
            angles = [a for _, a in known]
            share = sum(s == Status.EFFECTIVE for s, _ in known) / len(known)
            expected[name] = (len(known), share, math.fsum(angles) / len(known), max(angles))
    assert {one.tensor for one in found} == set(expected)
    for one in found:
        updates, share, mean, largest = expected[one.tensor]
        assert (one.updates, one.effective_share, one.max_angle) == (updates, share, largest)
        # A sum of n numbers of at most pi has at most n rounding errors of n pi / 2^53.
        assert abs(one.mean_angle - mean) <= steps * np.pi * 2.0**-52
    keys = [(one.effective_share, -one.mean_angle) for one in found]
    assert keys == sorted(keys)


def test_the_ranking_does_not_depend_on_the_division_into_blocks():
    rng = np.random.default_rng(0)
    status, angle = rng.integers(0, 3, (50, 3)), rng.uniform(0, np.pi, (50, 3))
    together = rank(NAMES, [(status, angle)])
    parts = [(status[at : at + 7], angle[at : at + 7]) for at in range(0, 50, 7)]
    for one, other in zip(together, rank(NAMES, parts), strict=True):
        assert (one.tensor, one.updates, one.max_angle) == (other.tensor, other.updates, other.max_angle)
        assert abs(one.mean_angle - other.mean_angle) <= 100 * np.pi * 2.0**-52


def test_parts_of_steps_are_complete_bounded_and_multiples():
    steps = 3 * BLOCK_BYTES // 800
    values = xr.Dataset({"x": (("step", "tensor"), np.arange(100.0 * steps).reshape(steps, 100))})
    parts = list(step_parts(values, 7))
    assert len(parts) > 2
    assert all(part.nbytes <= BLOCK_BYTES for part in parts)
    assert all(part.sizes["step"] % 7 == 0 for part in parts[:-1])
    xr.testing.assert_identical(xr.concat(parts, "step"), values)


@pytest.mark.parametrize(
    ("descent", "window", "text"),
    [
        ("corrected", 1, "no descent 'corrected'.*they have 'gradient'"),
        ("gradient", 20, "no window 20.*--window 20"),
    ],
)
def test_a_descent_or_window_that_does_not_exist_is_an_error(descent, window, text):
    results = dataset(np.zeros((2, 3), int), np.ones((2, 3)))
    with pytest.raises(InputError, match=f"(?s){text}"):
        select(results, descent, window)


def test_all_descents_and_windows_are_kept_and_results_without_these_dimensions_are_unchanged():
    results = dataset(np.zeros((2, 3), int), np.ones((2, 3)))
    xr.testing.assert_identical(select(results, None, None), results)
    single = results.isel(descent=0, window=0)
    xr.testing.assert_identical(select(single, "corrected", 20), single)


def test_results_without_tensors_are_not_ranked():
    with pytest.raises(InputError, match="no dimension tensor"):
        rank_dataset(dataset(np.zeros((2, 3), int), np.ones((2, 3))).isel(tensor=0))
