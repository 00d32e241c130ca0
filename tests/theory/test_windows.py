"""Compare the search for the smallest window with windows that are summed one by one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natgrad.schema.variables import Status
from natgrad.theory import geometry, windows
from natgrad.theory.geometry import Pair
from natgrad.theory.windows import (
    WindowTerms,
    effective_lengths,
    longest_tried,
    smallest_decreasing,
    smallest_effective,
    smallest_length,
)


def terms_of(alignment, floor=0.0):
    """Return terms of updates of norm 1, one column for each column of ``alignment``."""
    alignment = np.asarray(alignment, float)
    one = np.ones(alignment.shape)
    pair = Pair(one, alignment, 0.5 * one, 3 * one.astype(int))
    return WindowTerms(pair, one, floor * one, one.astype(bool), one.astype(bool))


def column_of(terms, column):
    return WindowTerms(terms.pair[:, column], *(part[:, column] for part in list_of_others(terms)))


def of_single(rate):
    """Return the rates that the status of a single update needs: any positive rate if it is unknown."""
    return np.where(np.isnan(rate), 1.0, rate)


def statuses_of(terms, follows, m):
    """Return the status of each window of one column, by definition."""
    found = []
    for first in range(len(terms.learning_rate) - m + 1):
        part = slice(first, first + m)
        if not follows[first : first + m - 1].all():
            continue
        pair = geometry.window(terms.pair[part], m)[0]
        floor = terms.update_floor[first]
        for other in terms.update_floor[first + 1 : first + m]:
            floor = np.hypot(floor, other)
        known = terms.known[part].all() and floor < pair.update_norm
        rate = of_single(terms.learning_rate)[first] if m == 1 else terms.learning_rate[part].min()
        found.append(geometry.status(pair, rate, terms.finite[part].all(), known))
    return found


def one_by_one(terms, follows, longest):
    """Return the smallest window of one column, by definition. A window of unknown status is not effective."""
    for m in range(1, min(longest, len(terms.learning_rate)) + 1):
        found = statuses_of(terms, follows, m)
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
        expected = one_by_one(column_of(terms, column), follows, longest)
        np.testing.assert_equal((smallest[column], count[column]), expected)


DAMAGE = {
    "none": lambda rng, terms: terms,
    "zero updates": lambda rng, terms: scaled(terms, np.where(rng.random(terms.finite.shape) < 0.2, 0.0, 1.0)),
    "tiny": lambda rng, terms: scaled(terms, np.full(terms.finite.shape, 2.0**-450)),
    "huge": lambda rng, terms: scaled(terms, np.where(rng.random(terms.finite.shape) < 0.1, 2.0**499, 1.0)),
    "errors near the updates": lambda rng, terms: replace(
        terms, update_floor=terms.pair.update_norm * rng.choice([0.0, 0.5, 1.0, 1.0 + 2.0**-40], terms.finite.shape)
    ),
    "unknown": lambda rng, terms: replace(terms, known=rng.random(terms.finite.shape) > 0.02),
    "no rate": lambda rng, terms: replace(
        terms, learning_rate=np.where(rng.random(terms.finite.shape) < 0.02, np.nan, terms.learning_rate)
    ),
    "infinite": lambda rng, terms: replace(
        terms,
        pair=replace(
            terms.pair,
            alignment=np.where(rng.random(terms.finite.shape) < 0.05, np.inf, terms.pair.alignment),
        ),
    ),
}


def scaled(terms, factor):
    pair = Pair(terms.pair.update_square * factor**2, terms.pair.alignment * factor, *list_of(terms.pair)[2:])
    return replace(terms, pair=pair, update_floor=terms.update_floor * factor)


def list_of(pair):
    return [pair.update_square, pair.alignment, pair.across_square, pair.size]


def some_terms(rng, updates, columns, mean, ties, damage):
    values = rng.integers(-2, 4, (updates, columns)) if ties else rng.standard_normal((updates, columns)) + mean
    with np.errstate(over="ignore"):
        return DAMAGE[damage](rng, terms_of(values, 0.1))


@given(
    seed=st.integers(0, 10_000),
    updates=st.integers(1, 12),
    mean=st.sampled_from([0.1, 0.5, 2.0]),
    ties=st.booleans(),
    damage=st.sampled_from(sorted(DAMAGE)),
)
@settings(max_examples=50)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_each_length_is_effective_exactly_if_all_its_windows_are(seed, updates, mean, ties, damage):
    rng = np.random.default_rng(seed)
    terms = some_terms(rng, updates, 2, mean, ties, damage)
    follows = rng.random(updates - 1) > 0.1
    found = effective_lengths(terms, follows, updates, updates)
    for column in range(2):
        single = column_of(terms, column)
        for m in range(1, updates + 1):
            windows = statuses_of(single, follows, m)
            assert found[m - 1, column] == all(status == Status.EFFECTIVE for status in windows), m


@given(seed=st.integers(0, 10_000), damage=st.sampled_from(sorted(DAMAGE)), ties=st.booleans())
@settings(max_examples=10)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_run_can_be_searched_in_parts(seed, damage, ties):
    rng = np.random.default_rng(seed)
    updates, longest = 700, 40
    terms = some_terms(rng, updates, 3, rng.uniform(0.2, 2.0), ties, damage)
    follows = rng.random(updates - 1) > rng.choice([0.0, 0.005])
    parts = []
    bounds = [0, *sorted(rng.integers(1, updates, 2).tolist()), updates]
    for first, last in itertools.pairwise(bounds):
        stop = min(last + longest - 1, updates)
        rows = slice(first, stop)
        part = WindowTerms(terms.pair[rows], *(each[rows] for each in list_of_others(terms)))
        parts.append(effective_lengths(part, follows[first : stop - 1], last - first, longest))
    found = smallest_length(np.logical_and.reduce(parts), follows)
    np.testing.assert_equal(found, smallest_effective(terms, follows, longest))
    # Every length, with sums in the order of the definition.
    total = terms
    for m in range(1, longest + 1):
        if m > 1:
            total = longer(total, terms, m)
        single = replace(total, learning_rate=of_single(total.learning_rate))
        status = geometry.status(*list_of_statuses(single if m == 1 else total))
        complete = np.array([follows[first : first + m - 1].all() for first in range(updates - m + 1)])
        expected = (status[complete] == Status.EFFECTIVE).all(axis=0)
        np.testing.assert_array_equal(np.logical_and.reduce(parts)[m - 1], expected)


def list_of_others(terms):
    return [terms.learning_rate, terms.update_floor, terms.finite, terms.known]


def list_of_statuses(terms):
    return [terms.pair, terms.learning_rate, terms.finite, terms.known, terms.update_floor]


def longer(total, terms, m):
    """Return windows of m updates from those of m - 1, in the order of `natgrad.theory.geometry.window`."""
    pair = Pair(
        *(sums[:-1] + each[m - 1 :] for sums, each in zip(list_of(total.pair), list_of(terms.pair), strict=True))
    )
    functions = (np.minimum, np.hypot, np.logical_and, np.logical_and)
    others = zip(functions, list_of_others(total), list_of_others(terms), strict=True)
    return WindowTerms(pair, *(function(sums[:-1], each[m - 1 :]) for function, sums, each in others))


@pytest.mark.parametrize(("floor", "expected"), [(0.99, (1.0, 4)), (1.0, (np.nan, 0)), (1.2, (np.nan, 0))])
def test_updates_that_are_all_lost_in_rounding_do_not_add_up_to_a_window(floor, expected):
    # The errors of m updates add up to sqrt(m) times that of one, as the updates do.
    smallest, count = smallest_effective(terms_of([1.0, 1.0, 1.0, 1.0], floor), np.ones(3, bool), 4)
    np.testing.assert_equal((float(smallest), int(count)), expected)


@pytest.mark.parametrize(("rate", "expected"), [(0.5, (2.0, 2)), (0.0, (np.nan, 0)), (np.nan, (np.nan, 0))])
def test_the_sum_of_a_window_has_the_smallest_learning_rate(rate, expected):
    terms = terms_of([1.0, -0.5, 1.0])
    terms = replace(terms, learning_rate=np.array([1.0, rate, 1.0]))
    # Both windows of 2 descend. If the rate of the second update is unknown, it is unknown whether they do.
    smallest, count = smallest_effective(terms, np.ones(2, bool), 3)
    np.testing.assert_equal((float(smallest), int(count)), expected)


@pytest.mark.parametrize(("alignment", "expected"), [(1.0, (1.0, 3)), (-0.5, (np.nan, 0))])
def test_one_unknown_learning_rate_leaves_only_windows_of_one_update(alignment, expected):
    terms = replace(terms_of([1.0, alignment, 1.0]), learning_rate=np.array([1.0, np.nan, 1.0]))
    smallest, count = smallest_effective(terms, np.ones(2, bool), 3)
    np.testing.assert_equal((float(smallest), int(count)), expected)


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


@pytest.mark.parametrize(
    ("updates", "longest", "expected"),
    [(1, 1, 1), (7, 1, 3), (7, 5, 5), (3, 5, 3), (512, 1, 256), (1000, 300, 300)],
)
def test_lengths_up_to_half_of_the_run_and_a_limit_are_tried(updates, longest, expected):
    assert longest_tried(updates, longest) == expected
