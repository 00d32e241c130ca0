"""Test reading and computing states in one compiled loop: the bits are those of states in memory."""

import contextlib
import os

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from logs import DTYPES, walk_arrays
from natgrad.kernel import crc, gram, stream
from natgrad.kernel.located import Located

ELEMENTS, STATES = 3000, 7
LONG_BLOCK = 2100  # longer than the sample of the ratio, and than two blocks of sums


def words(array):
    """Return the stored words of values."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


@pytest.fixture(scope="module")
def logged():
    """Return the stored words of each array in each dtype."""
    found = {}
    for dtype in DTYPES:
        arrays = walk_arrays(STATES, ELEMENTS, dict.fromkeys(("parameter", "gradient", "hvp"), dtype))
        found[dtype] = [np.ascontiguousarray(words(array)) for array in arrays.values()]
    return found


def located(descriptors, offsets, elements):
    """Return the location of states that are each in one piece."""
    starts = np.array([0, elements])
    return Located(np.array(descriptors, np.int32)[:, None], np.array(offsets, np.int64)[:, None], starts)


@pytest.fixture
def put(tmp_path):
    """Write a number of states to each of several files, at an offset, and open the files."""
    opened = []

    def write(rows, together, padding=0):
        descriptors, offsets = [], []
        for first in range(0, len(rows), together):
            path = tmp_path / f"{len(opened)}"
            path.write_bytes(b"\xff" * padding + rows[first : first + together].tobytes())
            opened.append(os.open(path, os.O_RDONLY))
            for row in range(len(rows[first : first + together])):
                descriptors.append(opened[-1])
                offsets.append(padding + row * rows[0].nbytes)
        return located(descriptors, offsets, rows.shape[1])

    yield write
    for descriptor in opened:
        os.close(descriptor)


def cut(*boundaries):
    return [np.array(block, np.int64) for block in boundaries]


CUTS = {
    "one read block": (cut([0, 7, 1500, ELEMENTS]), ELEMENTS),
    "one read block, not to the end": (cut([0, 7, 1500, ELEMENTS - 8]), ELEMENTS),
    "three read blocks": (cut([0, 900], [900, 901, LONG_BLOCK], [LONG_BLOCK, ELEMENTS]), 1200),
}


def computed(files, dtypes, boundaries, stride, batch, leads, *checksums):
    segments, count = sum(map(len, boundaries)) - len(boundaries), 5 + (len(files) > 2)
    found = np.full((len(leads), segments, count, count), 7.0), np.full((len(leads), segments), 7.0)
    buffer = np.empty(stream.buffer_bytes(stride, batch, [dtype.itemsize for dtype in dtypes]), np.uint8)
    return stream.products(files, dtypes, boundaries, stride, batch, leads, buffer, *found, *checksums), *found


def in_memory(arrays, boundaries, leads):
    """Compute the products of pairs of states one by one, block by block; NaN if there is no update."""
    parts = []
    for block in boundaries:
        held = [array[:, block[0] : block[-1]] for array in arrays]
        count = 5 + (len(arrays) > 2)
        found = (
            np.full((len(leads), len(block) - 1, count, count), np.nan),
            np.full((len(leads), len(block) - 1), np.nan),
        )
        for row in np.flatnonzero(leads):
            pair = [[array[row : row + 2]] for array in held]
            here = slice(row, row + 1)
            gram.products(pair[0], pair[1], block - block[0], found[0][here], found[1][here], *pair[2:])
        parts.append(found)
    return tuple(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))


@pytest.mark.parametrize("cutting", CUTS)
@pytest.mark.parametrize(
    ("dtypes", "together", "batch"),
    [
        (("float32", "float32"), 1, 1),
        (("float32", "float32"), 3, 2),
        (("float32", "float32", "float32"), 7, 8),
        (("bfloat16", "float32"), 2, 3),
        (("float16", "bfloat16", "float64"), 3, 1),
        (("float64", "float64"), 7, 4),
    ],
)
def test_states_read_from_files_give_the_same_bits_as_states_in_memory(
    logged, put, cutting, dtypes, together, batch
):
    arrays = [logged[dtype][position] for position, dtype in enumerate(dtypes)]
    boundaries, stride = CUTS[cutting]
    # An hvp belongs to an update: that of the last state is not read, and need not exist.
    files = [
        put(array[: STATES - (position == 2)], together, 5 * position) for position, array in enumerate(arrays)
    ]
    files = [
        Located(
            *(np.concatenate([part, np.full((STATES - len(part), 1), -1, part.dtype)]) for part in file[:2]),
            file.starts,
        )
        for file in files
    ]
    leads = np.array([True, True, False, True, True, True])
    failed, *found = computed(files, [array.dtype for array in arrays], boundaries, stride, batch, leads)
    assert failed is None
    expected = in_memory(arrays, boundaries, leads)
    assert np.isfinite(expected[0][leads]).all()
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("cutting", CUTS)
@pytest.mark.parametrize(("together", "batch"), [(1, 1), (3, 2), (7, 8)])
def test_checksums_are_those_of_the_bytes_read_and_change_no_product(logged, put, cutting, together, batch):
    arrays = [logged["float16"][0], logged["bfloat16"][1], logged["float64"][2]]
    boundaries, stride = CUTS[cutting]
    files = [put(array, together, 5 * position) for position, array in enumerate(arrays)]
    leads, dtypes = np.array([True, True, False, True, True, True]), [array.dtype for array in arrays]
    _, *expected = computed(files, dtypes, boundaries, stride, batch, leads)
    checksums = np.full((3, STATES), 7, np.uint32)
    possible = contextlib.nullcontext() if crc.HARDWARE else pytest.raises(ValueError, match="no instruction")
    with possible:
        failed, *found = computed(files, dtypes, boundaries, stride, batch, leads, checksums)
        assert failed is None
        for one, other in zip(found, expected, strict=True):
            assert one.tobytes() == other.tobytes()
        for array, of_array in zip(arrays, checksums, strict=True):
            # The Hessian-vector product of the last state is not read.
            states = array[: STATES - (array is arrays[2]), boundaries[0][0] : boundaries[-1][-1]]
            assert of_array[: len(states)].tolist() == [crc32c(state.tobytes()) for state in states]


@given(leads=st.lists(st.booleans(), min_size=STATES - 1, max_size=STATES - 1), batch=st.integers(1, STATES + 1))
def test_missing_updates_do_not_change_the_other_updates_for_any_batch(logged, tmp_path_factory, leads, batch):
    arrays, leads = logged["float32"][:2], np.array(leads)
    path = tmp_path_factory.mktemp("rows") / "both"
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        row = arrays[0][0].nbytes
        files = [
            located([descriptor] * STATES, np.arange(STATES) * row + position * STATES * row, ELEMENTS)
            for position in range(2)
        ]
        failed, *found = computed(files, [np.dtype("<f4")] * 2, cut([0, 10, ELEMENTS]), ELEMENTS, batch, leads)
    finally:
        os.close(descriptor)
    assert failed is None
    for one, other in zip(found, in_memory(arrays, cut([0, 10, ELEMENTS]), leads), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("array", [0, 1, 2])
def test_the_state_that_cannot_be_read_is_returned(logged, put, tmp_path, array, batch):
    arrays = logged["float32"]
    files = [put(rows, 1) for rows in arrays]
    leads, dtypes = np.ones(STATES - 1, bool), [np.dtype("<f4")] * 3
    os.truncate(tmp_path / str(array * STATES + 4), arrays[0][0].nbytes - 1)
    boundaries, stride = CUTS["three read blocks"]
    # The missing byte belongs to the last read block.
    failed, *_ = computed(files, dtypes, boundaries, stride, batch, leads)
    assert failed == (array, 4)
    failed, *_ = computed(files, dtypes, boundaries[:2], stride, batch, leads)
    assert failed is None
    files[array][0][2] = -1  # not the descriptor of an open file
    failed, *_ = computed(files, dtypes, boundaries[:2], stride, batch, leads)
    assert failed == (array, 2)


def test_a_buffer_that_would_be_overrun_is_refused(logged, put):
    files = [put(rows, 1) for rows in logged["float32"][:2]]
    leads, dtypes = np.ones(STATES - 1, bool), [np.dtype("<f4")] * 2
    with pytest.raises(ValueError, match="longer than 2999"):
        computed(files, dtypes, cut([0, ELEMENTS]), ELEMENTS - 1, 1, leads)
    products = np.empty((STATES - 1, 1, 5, 5)), np.empty((STATES - 1, 1))
    short = np.empty(stream.buffer_bytes(ELEMENTS, 2, [4, 4]) - 1, np.uint8)
    with pytest.raises(ValueError, match="the buffer has 95999 bytes, but 96000 are needed"):
        stream.products(files, dtypes, cut([0, ELEMENTS]), ELEMENTS, 2, leads, short, *products)
