"""Test the bound on the error of the correction of a discrete gradient with inaccurate displacements."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.theory import discrete_time
from natgrad.theory.metric_operators import pair_of


def correction(x, g, part, rate, change):
    """Return the vector that eq. (12) adds to a part of the negative gradient."""
    return (-change / rate - x @ g) / (g @ g) * g[part]


@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([1e-6, 1e-2, 0.5]),
    size=st.sampled_from([0.0, 1e-3, 1.0, 10.0]),
    rate=st.sampled_from([0.01, 1.0]),
)
def test_an_inaccurate_displacement_changes_the_correction_by_at_most_its_floor(seed, share, size, rate):
    rng = np.random.default_rng(seed)
    x, g = rng.standard_normal((2, 6))
    # With a size of 0 the change of the loss is that of the gradient, and the correction is 0.
    change = -rate * (x @ g) * (1.0 + size)
    directions = [x, -x, g, -g, *rng.standard_normal((2, 6))]
    for part in (slice(0, 6), slice(1, 4)):
        for direction in directions:
            error = share * np.linalg.norm(g) * direction / np.linalg.norm(direction)
            own, of_model = (np.linalg.norm(error[index]) for index in (part, slice(None)))
            pair, model = pair_of(x[part], g[part]), pair_of(x, g)
            floor = discrete_time.correction_floor(pair, rate, change, model, (own, of_model))
            moved = correction(x, g + error, part, rate, change) - correction(x, g, part, rate, change)
            # The rounding errors of the inner products of six elements.
            rounding = 64 * 2.0**-53 * (1.0 + size) * np.linalg.norm(x)
            assert np.linalg.norm(moved) <= floor + rounding


def test_the_floor_of_a_correction_is_its_bound():
    pair = pair_of(np.array([3.0]), np.array([4.0]))
    # k = (28 - 3 * 4) / 4^2 = 1, and k is off by at most (3 f + 1 (2 * 4 f + f^2)) / (4 - f)^2 = 26 / 4 for f = 2.
    floor = discrete_time.correction_floor(pair, 1.0, -28.0, pair, (np.float64(1.0), np.float64(2.0)))
    np.testing.assert_allclose(floor, 1.0 * 1.0 + 26 / 4 * (4.0 + 1.0), rtol=1e-15)


@pytest.mark.parametrize("error", [1.0, 2.0])
def test_a_displacement_that_is_not_known_has_no_correction(error):
    pair = pair_of(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    assert discrete_time.correction_floor(pair, 1.0, -1.0, pair, (error, error)) == np.inf
