"""Compare panel A of Figure 3 with eq. (9)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import random_walk, write_log
from natgrad.reporting.eigenvalues import exact_curves, measured_points, spread_points
from natgrad.reporting.run_results import RunResults
from natgrad.schema.variables import Status
from processing import process

# Eq. (9) where |y| = |g|, the smallest in the form that does not cancel.
EIGENVALUES = (
    lambda psi: (1 + np.sin(psi)) / np.cos(psi),
    lambda psi: 1 / np.cos(psi),
    lambda psi: np.cos(psi) / (1 + np.sin(psi)),
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return RunResults.of("run", process(write_log(folder / "log", random_walk(60)), folder / "out"))


def test_measured_points_and_curves_are_those_of_equation_9(results):
    ((angle, values),) = measured_points([results])
    for at, found in ((angle, values), exact_curves(1e-2)):
        # Beyond, cosines from angles lose digits to pi/2 itself and prove nothing.
        near = np.cos(at) >= 1e-3
        assert near.sum() > 5
        for formula, value in zip(EIGENVALUES, found, strict=True):
            # Promised are 1e-10 of an eigenvalue there and 1e-13 of an angle, which moves none by more than 1/cos.
            np.testing.assert_allclose(value[near], formula(at[near]), rtol=1e-10 + 1e-13 / 1e-3, atol=0)
    assert set(angle) <= set(results["angle"][results["status"] == Status.EFFECTIVE])


@given(
    st.lists(st.floats(0, np.pi / 2), min_size=1, max_size=200).map(np.array), st.floats(0, 1), st.integers(1, 48)
)
def test_points_are_few_and_include_the_smallest_and_the_largest_angle(angle, shift, columns):
    chosen = angle[spread_points(angle, shift, columns)]
    assert chosen.min() == angle.min()
    assert chosen.max() == angle.max()
    # A shifted grid touches at most two more columns, and the two ends may be added.
    assert len(chosen) <= columns + 4
