"""Test how numbers are checked and how values of any kind are shown."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.arguments import number, real_array, shown


@given(st.integers(-(2**63) + 1, 2**63 - 1))
def test_a_whole_number_is_returned_unchanged(value):
    assert number(value, int) == value
    assert type(number(np.int64(value), int)) is int
    assert number(value, float) == float(value)


@given(st.floats(), st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_a_number_is_accepted_exactly_in_its_range(value, minimum, maximum):
    inside = math.isfinite(value) and minimum <= value <= maximum
    if inside:
        assert number(value, float, minimum=minimum, maximum=maximum) == value
    else:
        with pytest.raises(ValueError, match=r"must be (finite|at least|at most)"):
            number(value, float, minimum=minimum, maximum=maximum)


WRONG = [True, np.True_, "1", None, 1j, np.complex64(1), [1], np.ones(1), 10**400, object(), np.datetime64("2026")]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize("kind", [int, float])
def test_a_value_that_is_not_a_number_is_refused(value, kind):
    with pytest.raises(ValueError, match="must be"):
        number(value, kind)


def test_numbers_of_other_types_are_accepted():
    assert [number(value, float) for value in (Fraction(1, 2), np.float32(0.5), np.array(0.5))] == [0.5] * 3


@pytest.mark.parametrize("value", ["a", None, [[1], [1, 2]], [1j], [True], object(), [np.datetime64("2026")]])
def test_an_array_of_anything_but_real_numbers_is_refused(value):
    with pytest.raises(ValueError, match="must consist of"):
        real_array(value)


class Unprintable:
    def __repr__(self):
        raise RuntimeError


@given(st.text())
def test_a_value_is_shown_on_one_short_line(text):
    assert len(shown(text)) <= 80
    assert "\n" not in shown(text)


def test_a_value_that_cannot_be_printed_is_shown_by_its_type():
    assert shown(Unprintable()) == "an object of type Unprintable"
    assert shown(10**5000) == "an object of type int"
