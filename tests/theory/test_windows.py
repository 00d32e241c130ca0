"""Compare the search for the smallest window with windows that are summed one by one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.variables import Status
from natgrad.theory import geometry, windows
from natgrad.theory.geometry import Pair
from natgrad.theory.windows import WindowTerms, smallest_decreasing, smallest_effective


def terms_of(alignment, floor=0.0):
    """Return terms of updates of norm 1, one column for each column of ``alignment``."""
    alignment = np.asarray(alignment, float)
    one = np.ones(alignment.shape)
    pair = Pair(one, alignment, 0.5 * one, 3 * one.astype(int))
    return WindowTerms(pair, one, floor * one, one.astype(bool), one.astype(bool))


def one_by_one(terms, follows, longest):
    """Return the smallest window of one column, by definition. A window of unknown status is not effective."""
    updates = len(terms.learning_rate)
    for m in range(1, min(longest, updates) + 1):
        found = []
        for first in range(updates - m + 1):
            part = slice(first, first + m)
            if not follows[first : first + m - 1].all():
                continue
            pair = geometry.window(terms.pair[part], m)[0]
            floor = np.sqrt((terms.update_floor[part] ** 2).sum())
            status = geometry.status(
                pair,
                terms.learning_rate[part].min(),
                terms.finite[part].all(),
                terms.known[part].all() and floor < pair.update_norm,
            )
            found.append(status)
        if found and all(status == Status.EFFECTIVE for status in found):
            return m, len(found)
    return np.nan, 0


@given(
    seed=st.integers(0, 10_000),
    updates=st.integers(1, 9),
    columns=st.integers(1, 3),
    longest=st.integers(1, 10),
    floor=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_the_smallest_effective_window_is_the_first_of_all(seed, updates, columns, longest, floor):
    rng = np.random.default_rng(seed)
    shape = (updates, columns)
    terms = terms_of(rng.standard_normal(shape) + 0.5)
    terms = replace(
        terms,
        update_floor=floor * rng.uniform(0.5, 1.5, shape),
        learning_rate=np.where(rng.random(shape) < 0.1, rng.choice([0.0, np.nan]), 0.5),
        finite=rng.random(shape) > 0.05,
        known=rng.random(shape) > 0.05,
    )
    follows = rng.random(updates - 1) > 0.2
    smallest, count = smallest_effective(terms, follows, longest)
    for column in range(columns):
        single = WindowTerms(
            terms.pair[:, column],
            *(part[:, column] for part in (terms.learning_rate, terms.update_floor, terms.finite, terms.known)),
        )
        np.testing.assert_equal((smallest[column], count[column]), one_by_one(single, follows, longest))


@pytest.mark.parametrize(("floor", "expected"), [(0.99, (1.0, 4)), (1.0, (np.nan, 0)), (1.2, (np.nan, 0))])
def test_updates_that_are_all_lost_in_rounding_do_not_add_up_to_a_window(floor, expected):
    # The errors of m updates add up to sqrt(m) times that of one, as the updates do.
    smallest, count = smallest_effective(terms_of([1.0, 1.0, 1.0, 1.0], floor), np.ones(3, bool), 4)
    np.testing.assert_equal((float(smallest), int(count)), expected)


@pytest.mark.parametrize(("rate", "expected"), [(0.5, (2.0, 2)), (0.0, (np.nan, 0)), (np.nan, (np.nan, 0))])
def test_the_sum_of_a_window_has_the_smallest_learning_rate(rate, expected):
    terms = terms_of([1.0, -0.5, 1.0])
    terms = replace(terms, learning_rate=np.array([1.0, rate, 1.0]))
    # Both windows of 2 descend. If the rate of the second update is not known, neither is known to.
    smallest, count = smallest_effective(terms, np.ones(2, bool), 3)
    np.testing.assert_equal((float(smallest), int(count)), expected)


def test_one_unknown_learning_rate_leaves_no_window():
    terms = replace(terms_of([1.0, 1.0, 1.0]), learning_rate=np.array([1.0, 1.0, np.nan]))
    smallest, count = smallest_effective(terms, np.ones(2, bool), 3)
    np.testing.assert_equal((float(smallest), int(count)), (np.nan, 0))


@given(
    losses=st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, np.nan]), min_size=2, max_size=9),
    longest=st.integers(1, 9),
)
def test_the_smallest_decreasing_window_is_the_first_of_all(losses, longest):
    losses = np.array(losses)
    updates = len(losses) - 1
    expected = (np.nan, 0)
    for m in range(min(longest, updates), 0, -1):
        changes = [losses[first + m] - losses[first] for first in range(updates - m + 1)]
        # The change of an unknown loss is NaN, which is not negative.
        if all(change < 0 for change in changes):
            expected = (float(m), len(changes))
    found = smallest_decreasing(losses[:-1], losses[1:], np.ones(updates - 1, bool), longest)
    np.testing.assert_equal(found, expected)


@given(seed=st.integers(0, 1000), m=st.integers(1, 5), columns=st.sampled_from([(), (2,)]))
def test_the_norm_of_a_window_is_that_of_its_stacked_updates(seed, m, columns):
    values = np.random.default_rng(seed).standard_normal((5, *columns))
    found = windows.rolling_norm(values, m)
    assert found.shape == (6 - m, *columns)
    for first in range(6 - m):
        expected = np.linalg.norm(values[first : first + m], axis=0)
        # One rounding for each square and sum, and that of the root.
        np.testing.assert_allclose(found[first], expected, rtol=(2 * m + 1) * 2.0**-52)
