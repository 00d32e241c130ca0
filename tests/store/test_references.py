"""Test the tables that locate states in the files of a log."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.errors import InputError
from natgrad.store.references import OpenFiles, ReferencedFile, References, StateReference, encode, merged

ITEMSIZE = 4
parts = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 9).map(lambda n: 4 * n)), max_size=8
)


def positions(located, starts=(0, 0, 0)):
    """Return the file and offset of each element."""
    return [
        (file, starts[file] + offset + ITEMSIZE * inside)
        for start, stop, file, offset in zip(
            located.starts[:-1], located.starts[1:], located.files, located.offsets, strict=True
        )
        for inside in range(stop - start)
    ]


def elements_of(parts):
    return [(file, offset + ITEMSIZE * inside) for count, file, offset in parts for inside in range(count)]


@given(parts)
def test_adjacent_parts_are_merged_and_no_element_moves(parts):
    found = merged(parts, ITEMSIZE)
    assert positions(found) == elements_of(parts)
    for index in range(1, len(found.files)):
        length = found.starts[index] - found.starts[index - 1]
        adjacent = found.offsets[index] == found.offsets[index - 1] + ITEMSIZE * length
        assert not (adjacent and found.files[index] == found.files[index - 1])


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.tuples(st.lists(parts, min_size=2, max_size=2), st.integers(0, 40)),
            st.lists(st.integers(0, 40), min_size=3, max_size=3),
        ),
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_a_record_contains_the_references_that_were_written(states, start):
    files = [ReferencedFile(f"/log/{index}", 100 + index, index) for index in range(3)]
    written = []
    for state in states:
        before = next((known for known in reversed(written) if known is not None), None)
        if isinstance(state, list) and before is not None:  # at other positions of its files
            written.append(StateReference(tuple(files), before.arrays, tuple(state)))
        elif isinstance(state, tuple):
            arrays = {
                name: merged([(n, file, offset + 4 * state[1]) for n, file, offset in own], ITEMSIZE)
                for name, own in zip(("parameter", "gradient"), state[0], strict=True)
            }
            written.append(StateReference(tuple(files), arrays))
        else:
            written.append(None)
    read = References([(start, encode(written))])
    for index, state in enumerate(written, start):
        found = read.state(index)
        assert (found is None) == (state is None)
        assert read.has("parameter", index) == (state is not None)
        if state is not None:
            assert found.files == state.files
            assert {name: positions(pieces, found.starts) for name, pieces in found.arrays.items()} == {
                name: positions(pieces, state.starts or (0, 0, 0)) for name, pieces in state.arrays.items()
            }


def test_equal_files_share_one_table():
    states = [
        StateReference(
            (ReferencedFile(f"/log/step_{number}", 9, 9),),
            {"parameter": merged([(5, 0, 8 * shift + 1000 * tensor) for tensor in range(300)], ITEMSIZE)},
        )
        for number, shift in enumerate([0, 1, 2, 3] * 50)
    ]
    assert len(encode(states)) < 2 * len(encode(states[:1]))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=30), st.integers(1, 40))
def test_ranges_cover_each_update_once_and_list_its_files(owners, width):
    states = [
        StateReference((ReferencedFile(f"/log/{owner}", 9, 9),), {"parameter": merged([(8, 0, 0)], ITEMSIZE)})
        for owner in owners
    ]
    read = References([(0, encode(states))])
    ranges = list(read.ranges({"parameter": ITEMSIZE}, 0, len(owners) - 1, (0, 8)))
    assert [update for start, stop, _ in ranges for update in range(start, stop)] == list(range(len(owners) - 1))
    for start, stop, files in ranges:
        assert {read.files[index].location for index in files} == {
            f"/log/{each}" for each in owners[start : stop + 1]
        }


def test_a_file_that_changes_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "step_0"
    path.write_bytes(bytes(40))
    status = path.stat()
    opened = OpenFiles([ReferencedFile(str(path), status.st_size, status.st_mtime_ns)])
    opened.descriptor(0)
    opened.require_unchanged()
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="it has 41 instead of 40 bytes") as caught:
        opened.require_unchanged()
    assert caught.value.where == str(path)
    opened.close()


def test_columns_cut_pieces_where_they_begin_and_end():
    pieces = merged([(5, 0, 0), (6, 0, 100), (4, 1, 8)], ITEMSIZE)
    state = StateReference(tuple(ReferencedFile(f"/log/{k}", 9, 9) for k in range(2)), {"parameter": pieces})
    read = References([(0, encode([state]))])
    expected = elements_of([(5, 0, 0), (6, 0, 100), (4, 1, 8)])
    for first in range(15):
        for last in range(first + 1, 16):
            files, offsets, starts = read.locate("parameter", range(1), (first, last), ITEMSIZE)
            found = [
                (files[0, piece], offsets[0, piece] + ITEMSIZE * inside)
                for piece in range(len(starts) - 1)
                for inside in range(np.diff(starts)[piece])
            ]
            assert found == expected[first:last]
