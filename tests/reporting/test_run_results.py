"""Read results for drawings, and format their numbers."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from natgrad.reporting.run_results import blocks, number


@given(st.floats(1e-300, 1e300))
def test_numbers_read_back_to_four_digits(value):
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    text = number(value).translate(digits).replace("×10", "e")
    # Four significant digits are off by half a unit of the fourth at most, and reading is one rounding more.
    assert abs(float(text) - value) <= value * (0.5e-3 + 4 * np.finfo(float).eps)


@pytest.mark.parametrize("steps", [slice(None), slice(3, 16), slice(14, 20)])
def test_values_are_read_chunk_by_chunk_and_each_chunk_once(steps):
    values = np.arange(60.0).reshape(20, 3)
    variable = xr.DataArray(values, dims=("step", "tensor"))
    variable.encoding["preferred_chunks"] = {"step": 7}
    parts = list(blocks(variable, "tensor", steps))
    np.testing.assert_array_equal(np.concatenate(parts), values[steps])
    start, stop, _ = steps.indices(20)
    assert len(parts) == len({position // 7 for position in range(start, stop)})
