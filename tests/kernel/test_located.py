"""Test joining the locations of states that consist of different pieces."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from natgrad.kernel.located import Located, joined

ELEMENTS, ITEMSIZE = 12, 4

located = st.builds(
    lambda cuts, states, seed: (sorted({0, *cuts, ELEMENTS}), states, seed),
    st.sets(st.integers(1, ELEMENTS - 1)),
    st.integers(1, 3),
    st.integers(0, 99),
).map(
    lambda drawn: Located(
        np.random.default_rng(drawn[2]).integers(0, 9, (drawn[1], len(drawn[0]) - 1), np.int32),
        np.random.default_rng(drawn[2]).integers(0, 999, (drawn[1], len(drawn[0]) - 1)),
        np.array(drawn[0]),
    )
)


def position_of(part, state, element):
    """Return the file and the offset of an element."""
    piece = next(index for index in range(len(part.starts) - 1) if element < part.starts[index + 1])
    inside = (element - part.starts[piece]) * ITEMSIZE
    return part.descriptors[state, piece], part.offsets[state, piece] + inside


@given(st.lists(located, min_size=1, max_size=4))
def test_each_element_keeps_its_position(parts):
    found = joined(parts, ITEMSIZE)
    assert found.starts[0] == 0
    assert found.starts[-1] == ELEMENTS
    assert set(found.starts) == {start for part in parts for start in part.starts}
    state = 0
    for part in parts:
        for row in range(len(part.descriptors)):
            for element in range(ELEMENTS):
                assert position_of(found, state, element) == position_of(part, row, element)
            state += 1
    assert state == len(found.descriptors) == len(found.offsets)
