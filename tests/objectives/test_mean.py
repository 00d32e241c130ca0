"""Test the mean over batches against exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.objectives.mean import RunningMean, counted
from natgrad.schema.errors import InputError

values = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(st.integers(1, 1000), values, values), min_size=1, max_size=20))
def test_means_are_weighted_by_the_number_of_elements(parts):
    mean = RunningMean()
    for count, loss, slope in parts:
        mean.add(count, loss, [np.array([slope])])
    total = sum(count for count, _, _ in parts)
    found = mean.result()
    for index, value in ((1, found[0]), (2, found[1][0].item())):
        exact = sum(Fraction(part[index]) * part[0] for part in parts) / total
        largest = max(abs(part[index]) for part in parts)
        # Each of the updates rounds four times, with operands of up to twice the largest value.
        assert abs(Fraction(value) - exact) <= Fraction(8 * len(parts) * largest * 2.0**-53)
    if len(parts) == 1:
        assert found[0] == parts[0][1]


@pytest.mark.parametrize("count", [-1, math.nan, math.inf])
def test_other_weights_are_refused(count):
    with pytest.raises(InputError, match="counted elements"):
        RunningMean().add(count, 1.0, [])


def test_nothing_has_no_mean():
    with pytest.raises(InputError, match="no batch has a counted element"):
        RunningMean().result()


def test_forms_of_losses():
    assert counted(np.array([1.0, 3.0]), alone=False) == (2.0, 2)
    assert counted(np.empty(0), alone=False) == (None, 0)
    assert counted((2.0, 7), alone=False) == (2.0, 7)
    assert counted(2.0, alone=True) == (2.0, 1)
    for found in (2.0, (1.0, 2.0, 3.0), (np.ones(2), 2)):
        with pytest.raises(InputError, match="the loss of a batch"):
            counted(found, alone=False)
