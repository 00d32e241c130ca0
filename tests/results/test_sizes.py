"""Test the size of the blocks in which results are computed."""

from hypothesis import given
from hypothesis import strategies as st

from natgrad.results.sizes import most_updates


@given(st.integers(0, 10**7))
def test_a_block_has_as_many_updates_as_its_limits_allow(tensors):
    updates = most_updates(tensors)
    assert 1 <= updates <= 4096
    assert updates == 1 or updates * tensors * 8 <= 400_000
    assert updates == 4096 or (updates + 1) * tensors * 8 > 380_000
