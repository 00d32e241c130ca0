"""Rounding to some bits: the error, the bits that remain, and numbers at the limits of float64."""

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from natgrad.results.rounding import round_bits

LARGEST, SMALLEST_NORMAL = np.finfo(np.float64).max, np.finfo(np.float64).tiny

normal = st.floats(SMALLEST_NORMAL, LARGEST) | st.floats(-LARGEST, -SMALLEST_NORMAL)
bits = st.integers(1, 51)


@given(value=normal, kept=bits)
def test_numbers_are_the_nearest_with_the_kept_bits(value, kept):
    found = float(round_bits(value, kept))
    mantissa, exponent = np.frexp(value)
    scaled = Fraction(float(mantissa)) * 2 ** (kept + 1)  # an integer if the number has no more bits
    expected = Fraction(round(scaled)) / 2 ** (kept + 1) * Fraction(2) ** int(exponent)
    if abs(expected) > LARGEST:
        assert found == value
    else:
        assert Fraction(found) == expected
        assert abs(Fraction(found) - Fraction(value)) <= abs(Fraction(value)) / 2 ** (kept + 1)


@given(value=normal, kept=bits)
def test_bounds_are_rounded_to_the_next_larger_magnitude(value, kept):
    found = float(round_bits(value, kept, upwards=True))
    assert abs(found) >= abs(value)
    assert abs(Fraction(found) - Fraction(value)) < abs(Fraction(value)) / 2**kept
    assert float(round_bits(found, kept, upwards=True)) == found


def test_other_numbers_are_unchanged():
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -2e-308, LARGEST])
    for upwards in (False, True):
        found = round_bits(values, 10, upwards=upwards)
        np.testing.assert_array_equal(found.view(np.int64), values.view(np.int64))


def test_shapes_are_those_of_the_values():
    assert round_bits(np.ones((2, 0, 3)), 5).shape == (2, 0, 3)
    assert round_bits(np.ones((4, 3))[:, ::2], 5).tolist() == [[1.0, 1.0]] * 4
