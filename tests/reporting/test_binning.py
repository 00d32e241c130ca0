"""Compare bins with the values in them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from natgrad.reporting.binning import Bins, binned, binned_status
from natgrad.schema.variables import Status

values_of_rows = st.integers(1, 3).flatmap(
    lambda rows: st.lists(
        st.lists(st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf]), min_size=rows, max_size=rows),
        min_size=1,
        max_size=60,
    ).map(np.array)
)


def parts(values, size):
    return [values[start : start + size] for start in range(0, len(values), size)]


@given(st.integers(0, 50), st.integers(0, 200), st.integers(1, 70))
def test_bins_have_equal_lengths_up_to_one_and_contain_every_update_once(start, length, most):
    bins = Bins.of(start, start + length, most)
    lengths = np.diff(bins.edges)
    assert len(lengths) == min(length, most)
    assert lengths.sum() == length
    assert bins.edges[0] == start
    if length:
        assert 1 <= lengths.min() <= lengths.max() <= lengths.min() + 1
        assert bins.single == (length <= most)


@given(values_of_rows, st.integers(1, 70), st.integers(1, 13))
def test_a_bin_has_the_median_and_the_extremes_of_its_values(values, most, size):
    bins = Bins.of(0, len(values), most)
    found = binned(parts(values, size), bins)
    assert found.median.shape == (values.shape[1], len(bins.edges) - 1)
    for index, (start, stop) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        for row in range(values.shape[1]):
            known = sorted(value for value in values[start:stop, row] if not np.isnan(value))
            middle, least, greatest = (one[row, index] for one in (found.median, found.least, found.greatest))
            if known:
                assert (middle, least, greatest) == (known[(len(known) - 1) // 2], known[0], known[-1])
            else:
                assert np.isnan([middle, least, greatest]).all()


@given(st.lists(st.sampled_from(list(Status)), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 7))
def test_a_bin_is_effective_only_if_all_its_updates_are(statuses, most, size):
    values = np.array(statuses, np.int8)[:, None]
    bins = Bins.of(0, len(values), most)
    status, share = binned_status(parts(values, size), bins)
    for index, (start, stop) in enumerate(zip(bins.edges, bins.edges[1:], strict=False)):
        part = values[start:stop, 0].tolist()
        others = [one for one in part if one != Status.EFFECTIVE]
        assert share[0, index] == np.float32(part.count(Status.EFFECTIVE) / len(part))
        if others:
            assert others.count(status[0, index]) == max(others.count(one) for one in others)
        else:
            assert status[0, index] == Status.EFFECTIVE
