"""Test the layout table, dtypes and errors."""

import itertools
import pickle

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import DTYPES
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES, Layout, promote, unit_roundoff
from natgrad.schema.names import DESCENTS
from natgrad.schema.variables import DIMENSIONS, Status

shapes = st.dictionaries(
    st.text(min_size=1, max_size=8),
    st.tuples(st.lists(st.integers(0, 5), max_size=3).map(tuple), st.sampled_from(list(STORAGE_DTYPES))),
    max_size=6,
)


@given(shapes)
def test_tensors_are_contiguous_and_the_table_survives_its_attribute(table):
    layout = Layout.from_shapes(table)
    assert layout.names == tuple(table)
    edges = [0, *(tensor.stop for tensor in layout.tensors)]
    assert [tensor.offset for tensor in layout.tensors] == edges[:-1]
    assert layout.elements == edges[-1] == sum(int(np.prod(shape)) for shape, _ in table.values())
    assert Layout.from_json(layout.to_json()) == layout


@given(shapes, st.data())
def test_segments_cover_a_range_once_each_within_its_tensor(table, data):
    layout = Layout.from_shapes(table)
    start = data.draw(st.integers(0, layout.elements))
    stop = data.draw(st.integers(start, layout.elements))
    pieces = layout.segments(start, stop)
    covered = [element for _, low, high in pieces for element in range(low, high)]
    assert covered == list(range(start, stop))
    for index, low, high in pieces:
        assert layout.tensors[index].offset <= low < high <= layout.tensors[index].stop


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_the_unit_roundoff_is_half_the_spacing_at_one(dtype):
    assert unit_roundoff(dtype) == float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2


def values(dtype):
    """Return all values of a two-byte dtype, or the extremes and the neighbours of one of a wider dtype."""
    words = np.dtype(DTYPES[dtype])
    if words.itemsize == 2:
        every = np.arange(1 << 16, dtype=np.uint16).view(words)
        with np.errstate(invalid="ignore"):  # signalling NaNs are among the words
            return every[np.isfinite(every)]
    limits = np.finfo(words)
    return np.array([limits.max, limits.tiny, limits.smallest_subnormal, 1 + limits.eps, 1 - limits.epsneg], words)


@pytest.mark.parametrize("dtypes", list(itertools.product(STORAGE_DTYPES, repeat=2)))
def test_the_promoted_dtype_holds_both_exactly_and_no_smaller_one_does(dtypes):
    def holds(dtype):
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return all((values(d).astype(DTYPES[dtype]).astype(DTYPES[d]) == values(d)).all() for d in dtypes)

    promoted = promote(dtypes)
    width = np.dtype(DTYPES[promoted]).itemsize
    assert holds(promoted)
    assert not any(holds(dtype) for dtype in STORAGE_DTYPES if np.dtype(DTYPES[dtype]).itemsize < width)


def test_an_error_keeps_its_four_parts_when_it_is_pickled():
    error = InputError("truncated", where="step_3.npz, step 3", why="the disk was full", remedy="write it again")
    lines = ["truncated", "  where: step_3.npz, step 3", "  why:   the disk was full", "  do:    write it again"]
    assert str(error).splitlines() == lines
    crossed = pickle.loads(pickle.dumps(error))
    assert (str(crossed), crossed.where, crossed.remedy) == (str(error), error.where, error.remedy)
    assert str(InputError("truncated")) == "truncated"


def test_every_dimension_is_explained_and_no_status_has_the_value_of_another():
    assert all(DIMENSIONS.values())
    assert len({int(status) for status in Status}) == len(Status.__members__)
    assert len(set(DESCENTS)) == len(DESCENTS)
