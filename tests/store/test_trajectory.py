"""The trajectory store and the Gram ledger: committed data are complete, other data are invisible."""

import contextlib
import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from logs import DTYPES, append_states, walk_arrays, write_trajectory
from natgrad.kernel import stream
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION, Layout, LedgerChunk, storage_dtype
from natgrad.schema.names import VECTORS
from natgrad.storage import LocalStorage
from natgrad.store import Ledger, Trajectory, checksum, open_ledger, open_trajectory
from natgrad.store.group import ArrayPlan
from natgrad.store.journal import Journal

SHAPES = {"a": (3, 3), "b": (), "c": (3,)}  # 13 elements
ELEMENTS = 13
CHUNK = (4, 5)  # the last of three columns holds three elements and two of padding
MIXED = {"parameter": "float32", "gradient": "bfloat16", "hvp": "float64"}


def random_bits(rows, elements, dtypes, seed=0):
    """Arbitrary bits: NaNs of every payload, infinities, subnormals."""
    rng = np.random.default_rng(seed)
    return {
        name: np.frombuffer(rng.bytes(rows * elements * np.dtype(DTYPES[dtype]).itemsize), storage_dtype(dtype))
        .reshape(rows, elements)
        .view(DTYPES[dtype])
        for name, dtype in dtypes.items()
    }


def read(trajectory, name, start=0, stop=None):
    """Committed states of an array, complete, as words."""
    stop = trajectory.n_states if stop is None else stop
    parts = []
    for column in range(trajectory.columns):
        out = np.zeros((stop - start, trajectory.chunk[1]), storage_dtype(trajectory.dtypes[name]))
        trajectory.read(name, start, stop, column, out)
        first, last = trajectory.column(column)
        parts.append(out[:, : last - first])
    return np.concatenate(parts, axis=1)


def words(array):
    return array.view(storage_dtype(array.dtype.name))


def assert_holds(trajectory, arrays, rows=None):
    """Assert that a trajectory contains exactly these states, bit for bit."""
    rows = len(arrays["parameter"]) if rows is None else rows
    assert trajectory.n_states == rows
    for name, array in arrays.items():
        assert read(trajectory, name).tobytes() == words(array)[:rows].tobytes(), name
    assert trajectory.scalar("step").tolist() == list(range(rows))


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_on_disk(path):
    """Length of each array according to its shape, which does not imply that the data exist."""
    return {name: array.shape[0] for name, array in zarr.open_group(path, mode="r").arrays()}


class Stopped(Exception):
    """Simulate the kill of a process."""


def stopping(function, calls):
    """Let a function be called ``count`` times, then raise instead."""
    left = iter(range(calls))

    def stopped(*arguments, **options):
        if next(left, None) is None:
            raise Stopped
        return function(*arguments, **options)

    return stopped


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.zarr"


class Watch:
    """Call a function around every rename and in-place write, and before every flush, in any thread."""

    def __init__(self, monkeypatch, observe):
        replace, link, fsync, pwrite = Path.replace, os.link, os.fsync, os.pwrite

        def watched_pwrite(descriptor, *arguments):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            observe("write", path, before=True)
            count = pwrite(descriptor, *arguments)
            observe("write", path, before=False)
            return count

        def watched_replace(aside, target):
            observe("rename", Path(target), before=True)
            moved = replace(aside, target)
            observe("rename", Path(target), before=False)
            return moved

        def watched_link(aside, target):
            observe("rename", Path(target), before=True)
            link(aside, target)
            observe("rename", Path(target), before=False)

        def watched_fsync(descriptor):
            observe("flush", Path(f"/proc/self/fd/{descriptor}").readlink(), before=True)
            fsync(descriptor)

        monkeypatch.setattr(Path, "replace", watched_replace)
        monkeypatch.setattr(os, "link", watched_link)
        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "pwrite", watched_pwrite)


# The commit rule ---------------------------------------------------------------------------------------------


def write_only(trajectory, arrays):
    """Write states after the committed ones, without committing them."""
    for name, array in arrays.items():
        for column in range(trajectory.columns):
            first, last = trajectory.column(column)
            block = np.zeros((len(array), trajectory.chunk[1]), storage_dtype(trajectory.dtypes[name]))
            block[:, : last - first] = words(array)[:, first:last]
            trajectory.write(name, trajectory.n_states, column, block)


def test_written_states_are_invisible_until_all_arrays_are_committed(path):
    arrays = walk_arrays(6, ELEMENTS, MIXED)
    write_trajectory(path, {name: array[:3] for name, array in arrays.items()}, SHAPES, CHUNK)
    writer = open_trajectory(path)
    write_only(writer, {name: array[3:] for name, array in arrays.items()})
    reader = open_trajectory(path)
    assert_holds(reader, arrays, rows=3)
    assert sum(record["stop"] - record["start"] for record in reader.records()) == 3
    assert rows_on_disk(path) == dict.fromkeys([*MIXED, "step", "attempt", "loss", "learning_rate"], 3)
    with pytest.raises(InputError, match="not committed"):
        read(reader, "parameter", 2, 4)
    append_states(path, {name: array[3:] for name, array in arrays.items()})
    assert_holds(reader, arrays, rows=3)  # a reader keeps its view
    reader.refresh()
    assert_holds(reader, arrays)


def test_a_reader_opened_during_a_write_sees_only_complete_steps(path, monkeypatch):
    arrays = walk_arrays(9, ELEMENTS, MIXED)
    # Three states leave a chunk incomplete, so the second commit rewrites a chunk with states that readers use.
    write_trajectory(path, {name: array[:3] for name, array in arrays.items()}, SHAPES, CHUNK)
    seen = []

    def observe(kind, target, before):
        reader = open_trajectory(path)
        assert_holds(reader, arrays, rows=reader.n_states)
        assert max(rows_on_disk(path).values()) <= reader.n_states
        seen.append(reader.n_states)

    with monkeypatch.context() as patch:
        Watch(patch, observe)
        append_states(path, {name: array[3:] for name, array in arrays.items()})
    assert sorted(set(seen)) == [3, 9]
    assert seen == sorted(seen)
    assert_holds(open_trajectory(path), arrays)


def test_all_data_is_flushed_before_the_record_and_the_record_before_its_name(path, monkeypatch):
    arrays = walk_arrays(6, ELEMENTS, MIXED)
    write_trajectory(path, {name: array[:3] for name, array in arrays.items()}, SHAPES, CHUNK)
    events = []
    with monkeypatch.context() as patch:
        Watch(patch, lambda kind, target, before: events.append((kind, target)) if before else None)
        append_states(path, {name: array[3:] for name, array in arrays.items()})
    record = path / "commits" / "00000001.json"
    named = events.index(("rename", record))
    written = {target for kind, target in events if kind != "flush" and "c" in target.relative_to(path).parts}
    assert len(written) == 2 * 3 * len(MIXED) + 4  # rows of chunks x columns x arrays, and the numbers of steps
    flushed = {target for kind, target in events[:named] if kind == "flush"}
    numbers = {target for target in written if target.relative_to(path).parts[0] not in MIXED}
    assert written - numbers <= flushed
    assert {path / name / "c" for name in MIXED} <= flushed  # the folders that contain the names of new chunks
    assert {target.parent for target in written} <= flushed
    for target in numbers:  # written to a temporary file, flushed and renamed
        renamed = events.index(("rename", target))
        assert any(kind == "flush" and aside.parent == target.parent for kind, aside in events[:renamed])
        assert ("flush", target.parent) in events[renamed:named]
    for target in written - numbers:
        last = max(i for i, event in enumerate(events) if event in (("rename", target), ("write", target)))
        assert ("flush", target) in events[last:named]
    asides = [target for kind, target in events[:named] if kind == "flush" and target.parent == record.parent]
    assert asides
    assert ("flush", record.parent) in events[named:]


attempts = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=5)


@pytest.mark.parametrize("chunk", [(1, 8), (4, 5), (64, 13)])
@settings(max_examples=6)  # each example creates a store
@given(attempts=attempts, seed=st.integers(0, 9))
def test_data_of_an_interrupted_write_are_overwritten(tmp_path_factory, chunk, attempts, seed):
    path = tmp_path_factory.mktemp("store") / "trajectory.zarr"
    dtypes = {"parameter": "float32", "gradient": "bfloat16"}
    committed = write = random_bits(1, ELEMENTS, dtypes, seed)
    write_trajectory(path, write, SHAPES, chunk)
    for attempt, (rows, whole) in enumerate(attempts):
        write = random_bits(rows, ELEMENTS, dtypes, seed + 10 * (attempt + 1))
        if whole:
            append_states(path, write)
            committed = {name: np.concatenate([array, write[name]]) for name, array in committed.items()}
        else:
            write_only(open_trajectory(path), write)
        assert_holds(open_trajectory(path), committed)
    for name, array in committed.items():
        assert zarr.open_array(path / name, mode="r")[:].tobytes() == words(array).tobytes()


@pytest.mark.parametrize("resizes", [0, 2, 5])
def test_recover_sets_shapes_after_an_interrupted_commit(path, monkeypatch, resizes):
    arrays = walk_arrays(5, ELEMENTS, MIXED)
    write_trajectory(path, {name: array[:2] for name, array in arrays.items()}, SHAPES, CHUNK)
    replace, resize = Path.replace, stopping(Path.replace, resizes)

    def replaced(aside, target):
        return (resize if target.name == "zarr.json" else replace)(aside, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replaced)
        patch.setattr(Path, "unlink", lambda aside, **options: None)  # a killed process does not clean up
        with pytest.raises(Stopped):
            append_states(path, {name: array[2:] for name, array in arrays.items()})
    left = open_trajectory(path)
    assert sorted(rows_on_disk(path).values()) == [2] * (7 - resizes) + [5] * resizes
    assert_holds(left, arrays)
    left.recover()
    assert_holds(open_trajectory(path), arrays)
    with xr.open_zarr(path, consolidated=False) as dataset:
        assert dataset.sizes == {"step": 5, "element": ELEMENTS}


def test_a_committed_state_cannot_be_written_again(path):
    arrays = walk_arrays(2, ELEMENTS)
    trajectory = open_trajectory(write_trajectory(path, arrays, SHAPES, CHUNK))
    block = np.zeros((1, CHUNK[1]), np.float32)
    for row in (0, 1):
        with pytest.raises(ValueError, match=f"state {row} of gradient is committed"):
            trajectory.write("gradient", row, 0, block)
    assert_holds(open_trajectory(path), arrays)


def test_a_damaged_record_is_rejected_by_name(path):
    arrays = walk_arrays(2, ELEMENTS)
    write_trajectory(path, arrays, SHAPES, CHUNK)
    record = path / "commits" / "00000000.json"
    record.write_text(record.read_text()[:-9])
    with pytest.raises(InputError) as caught:
        open_trajectory(path)
    assert caught.value.where == str(record)


# Reading -----------------------------------------------------------------------------------------------------


def test_the_checksum_is_crc_32c():
    assert checksum(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


def test_checksums_of_each_state_and_column_are_recorded(path):
    arrays = random_bits(6, ELEMENTS, MIXED)
    write_trajectory(path, {name: array[:2] for name, array in arrays.items()}, SHAPES, CHUNK)
    append_states(path, {name: array[2:] for name, array in arrays.items()})
    trajectory = open_trajectory(path)
    assert [(record["start"], record["stop"]) for record in trajectory.records()] == [(0, 2), (2, 6)]
    for name in MIXED:
        recorded = [row for record in trajectory.records() for row in record["checksums"][name].tolist()]
        stored = read(trajectory, name)
        assert recorded == [
            [checksum(np.ascontiguousarray(row[low:high])) for low, high in ((0, 5), (5, 10), (10, 13))]
            for row in stored
        ]


CODECS = {
    "blosc": BloscCodec(cname="zstd"),
    "zstd": ZstdCodec(),
    "gzip": GzipCodec(),
    "checksummed": Crc32cCodec(),
}


def write_compressed(path, arrays, codec):
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    layout = Layout.from_shapes({name: (shape, dtypes["parameter"]) for name, shape in SHAPES.items()})
    compressors = dict.fromkeys(dtypes, CODECS[codec])
    Trajectory.create(LocalStorage(path), layout, dtypes, CHUNK, compressors=compressors)
    return append_states(path, arrays)


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The same bits in an uncompressed store and in a compressed one, for each dtype."""
    folder, twins = tmp_path_factory.mktemp("twins"), {}
    for dtype in DTYPES:
        arrays = random_bits(11, ELEMENTS, {"parameter": dtype, "gradient": dtype})
        raw = write_trajectory(folder / f"{dtype}.zarr", arrays, SHAPES, CHUNK)
        packed = write_compressed(folder / f"{dtype}-packed.zarr", arrays, "blosc")
        assert not zarr.open_array(raw / "parameter", mode="r").compressors
        assert zarr.open_array(packed / "parameter", mode="r").compressors
        twins[dtype] = open_trajectory(raw), open_trajectory(packed), arrays
    return twins


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted), column=st.integers(0, 2))
def test_direct_reads_and_zarr_reads_give_the_same_bits(twins, dtype, rows, column):
    start, stop = rows
    raw, packed, arrays = twins[dtype]
    first, last = raw.column(column)
    for name, array in arrays.items():
        for trajectory in (raw, packed):
            out = np.full((stop - start, CHUNK[1]), 77, storage_dtype(dtype))
            trajectory.read(name, start, stop, column, out)
            assert out[:, : last - first].tobytes() == words(array)[start:stop, first:last].tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.tuples(st.integers(0, 11), st.integers(0, 11)).map(sorted),
    column=st.integers(0, 2),
    part=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted),
)
def test_each_part_of_a_chunk_column_is_at_its_offset(twins, dtype, rows, column, part):
    start, stop = rows
    trajectory, _, arrays = twins[dtype]
    first, last = trajectory.column(column)
    low, high = (min(position, last - first) for position in part)
    for name, array in arrays.items():
        out = np.full((stop - start, CHUNK[1]), 77, storage_dtype(dtype))
        with trajectory.opened(column):
            located = trajectory.locate(name, start, stop, column)
            assert stream.read(located, low, out[:, : high - low]) is None
        assert out[:, : high - low].tobytes() == words(array)[start:stop, first + low : first + high].tobytes()
        assert (out[:, high - low :] == 77).all()


def test_later_writes_do_not_change_states_that_a_reader_sees(path):
    arrays = walk_arrays(4, ELEMENTS)
    write_trajectory(path, {name: array[:2] for name, array in arrays.items()}, SHAPES, CHUNK)
    reader, out = open_trajectory(path), np.empty((2, 5), np.float32)
    with reader.opened(0):
        located = reader.locate("parameter", 0, 2, 0)
        append_states(path, {name: array[2:] for name, array in arrays.items()})
        assert stream.read(located, 0, out) is None
    np.testing.assert_array_equal(out, arrays["parameter"][:2, :5])


def let_the_cache_hold(monkeypatch, everything):
    """Make the system report that the page cache contains all bytes, or none."""
    preadv = os.preadv

    def answering(descriptor, buffers, offset, flags=0):
        if not flags & os.RWF_NOWAIT:
            return preadv(descriptor, buffers, offset, flags)
        if everything():
            return 1
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", answering)


@pytest.mark.parametrize(("columns", "asked"), [(0, {0}), (1, {0}), (2, {0, 1}), (3, {0, 1})])
def test_uncached_chunks_of_the_next_column_are_read_ahead(path, monkeypatch, columns, asked):
    arrays = walk_arrays(6, ELEMENTS)
    write_trajectory(path, arrays, SHAPES, CHUNK)
    reader, cached, found = open_trajectory(path), True, set()

    def advise(descriptor, offset, length, advice):
        assert (offset, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        found.add(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "posix_fadvise", advise)
    let_the_cache_hold(monkeypatch, lambda: cached)
    with reader.opened(0, columns):
        reader.locate("parameter", 0, 6, 0)
    assert not found
    cached = False
    with reader.opened(0, columns):
        reader.locate("parameter", 0, 6, 0)
    assert found == {path / f"parameter/c/{row}/{column}" for row in (0, 1) for column in asked}


def descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def test_files_are_closed_with_their_column_or_after_read_ahead_with_the_next(path, monkeypatch):
    write_trajectory(path, walk_arrays(6, ELEMENTS), SHAPES, CHUNK)
    let_the_cache_hold(monkeypatch, lambda: False)
    reader, before = open_trajectory(path), len(descriptors())
    with reader.opened(0, 2):
        reader.locate("parameter", 0, 6, 0)
        assert len(descriptors()) == before + 4
    assert len(descriptors()) == before + 2
    with reader.opened(1, 2):
        reader.locate("parameter", 0, 6, 1)
        assert len(descriptors()) == before + 2
    assert len(descriptors()) == before
    with contextlib.suppress(InputError), reader.opened(0, 2):
        reader.locate("parameter", 0, 6, 0)
        reader.locate("parameter", 0, 7, 0)
    assert len(descriptors()) == before


def test_a_truncated_file_is_rejected_by_name_and_closed(path):
    write_trajectory(path, walk_arrays(6, ELEMENTS), SHAPES, CHUNK)
    reader, out, before = open_trajectory(path), np.empty((6, 5), np.float32), len(descriptors())
    with reader.opened(0):
        located = reader.locate("parameter", 0, 3, 0)
        os.truncate(path / "parameter/c/0/0", 24)
        assert stream.read(located, 0, out[:3]) == 0
        with pytest.raises(InputError, match=r"it is \d+ bytes too short") as caught:
            reader.read("parameter", 0, 6, 0, out)
    assert caught.value.where == str(path / "parameter/c/0/0")
    assert len(descriptors()) == before


def test_damaged_array_metadata_are_rejected_by_name(path):
    write_trajectory(path, walk_arrays(2, ELEMENTS), SHAPES, CHUNK)
    document = path / "gradient/zarr.json"
    document.write_text(document.read_text()[:-9])
    with pytest.raises(InputError, match="metadata of an array") as caught:
        open_trajectory(path)
    assert caught.value.where == str(document)


def test_a_folder_instead_of_a_chunk_is_rejected_by_name(path):
    write_trajectory(path, walk_arrays(2, ELEMENTS), SHAPES, CHUNK)
    chunk = path / "parameter/c/0/0"
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(InputError, match="cannot read a chunk") as caught:
        read(open_trajectory(path), "parameter")
    assert caught.value.where == str(chunk)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_of_fill_values_is_stored(path, dtype):
    # Zarr omits such chunks by default, even after the store is opened again.
    arrays = {"parameter": np.zeros((9, ELEMENTS), DTYPES[dtype])}
    arrays["gradient"] = np.full((9, ELEMENTS), np.nan, DTYPES[dtype])
    assert_holds(open_trajectory(write_trajectory(path, arrays, SHAPES, CHUNK)), arrays)
    append_states(path, arrays)
    assert_holds(open_trajectory(path), {name: np.concatenate([array, array]) for name, array in arrays.items()})


def test_scalars_that_the_log_lacks_are_nan_and_stored(path):
    arrays = walk_arrays(3, ELEMENTS)
    trajectory = open_trajectory(write_trajectory(path, arrays, SHAPES, CHUNK))
    write_only(trajectory, arrays)
    nothing = {"loss": [math.nan] * 3, "learning_rate": [math.nan] * 3}
    trajectory.commit([3, 4, 5], nothing, [{}] * 3, {name: [[0] * 3] * 3 for name in arrays})
    np.testing.assert_array_equal(open_trajectory(path).scalar("loss"), [0, 0, 0, *nothing["loss"]])


def test_plain_xarray_shows_the_dimensions_and_the_values(path):
    arrays = walk_arrays(6, ELEMENTS, MIXED)
    write_trajectory(path, arrays, SHAPES, CHUNK)
    with xr.open_zarr(path, consolidated=False) as dataset:
        assert dataset.sizes == {"step": 6, "element": ELEMENTS}
        assert dataset["step"].values.tolist() == list(range(6))
        np.testing.assert_array_equal(dataset["learning_rate"].values, 0.1)
        for name in ("parameter", "hvp"):
            assert dataset[name].dims == ("step", "element")
            np.testing.assert_array_equal(dataset[name].values, arrays[name])
        stored = dataset["gradient"]
        assert (stored.dtype, stored.attrs["ml_dtype"]) == (np.uint16, "bfloat16")
        np.testing.assert_array_equal(stored.values.view(DTYPES["bfloat16"]), arrays["gradient"])


def test_the_columns_cover_the_elements_once(path):
    trajectory = open_trajectory(write_trajectory(path, walk_arrays(1, ELEMENTS), SHAPES, CHUNK))
    assert [trajectory.column(index) for index in range(trajectory.columns)] == [(0, 5), (5, 10), (10, 13)]
    assert trajectory.layout.names == tuple(SHAPES)


@pytest.mark.parametrize("codec", [None, *CODECS])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_chunk_is_rejected_by_name(path, codec, damage):
    arrays = walk_arrays(6, ELEMENTS)
    if codec is None:
        write_trajectory(path, arrays, SHAPES, CHUNK)
    else:
        write_compressed(path, arrays, codec)
    chunk = path / "gradient" / "c" / "1" / "2"
    spoil(chunk, damage)
    trajectory = open_trajectory(path)
    for column in (0, 1):
        trajectory.read("gradient", 0, 6, column, np.empty((6, CHUNK[1]), np.float32))
    trajectory.read("gradient", 0, 4, 2, np.empty((4, CHUNK[1]), np.float32))
    with pytest.raises(InputError) as caught:
        trajectory.read("gradient", 3, 6, 2, np.empty((3, CHUNK[1]), np.float32))
    assert caught.value.where == str(chunk)
    assert "--overwrite" in caught.value.remedy


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "inverted"])
@pytest.mark.parametrize("name", ["parameter", "gradient", "step", "loss"])
def test_nothing_is_appended_to_a_damaged_chunk(path, codec, damage, name):
    arrays = walk_arrays(6, ELEMENTS)
    first, rest = ({key: array[part] for key, array in arrays.items()} for part in (slice(3), slice(3, 6)))
    if codec is None:
        write_trajectory(path, first, SHAPES, CHUNK)
    else:
        write_compressed(path, first, codec)
    chunk = path / name / "c" / ("0/1" if name in arrays else "0")
    whole = chunk.read_bytes()
    spoil(chunk, damage)
    with pytest.raises(InputError, match="cannot read a chunk") as caught:
        append_states(path, rest)
    assert caught.value.where == str(chunk)
    assert "--overwrite" in caught.value.remedy
    assert open_trajectory(path).n_states == 3
    chunk.write_bytes(whole)
    append_states(path, rest)
    assert_holds(open_trajectory(path), arrays)


def test_a_changed_state_is_rejected_with_its_array_and_step(path):
    write_trajectory(path, walk_arrays(6, ELEMENTS), SHAPES, CHUNK)
    chunk = path / "gradient/c/1/0"
    spoil(chunk, "inverted")
    with pytest.raises(InputError, match="cannot read a chunk of gradient, steps 4 to 5, tensor") as caught:
        open_trajectory(path).read("gradient", 0, 6, 0, np.empty((6, CHUNK[1]), np.float32))
    assert caught.value.where == str(chunk)


@given(
    counts=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    ranges=st.lists(st.tuples(st.integers(0, 48), st.integers(0, 48)), min_size=1, max_size=4),
)
@settings(max_examples=30)  # each example creates a store
def test_checksums_of_a_range_are_read_from_its_own_records(tmp_path_factory, counts, ranges):
    path, arrays = tmp_path_factory.mktemp("committed") / "trajectory.zarr", walk_arrays(sum(counts), ELEMENTS)
    stops = np.cumsum(counts)
    parts = [{name: array[a - n : a] for name, array in arrays.items()} for a, n in zip(stops, counts, strict=True)]
    write_trajectory(path, parts[0], SHAPES, CHUNK)
    for part in parts[1:]:
        append_states(path, part)
    states, read = open_trajectory(path), []
    states.journal.read = lambda number, reading=states.journal.read: read.append(number) or reading(number)
    for low, high in ranges:
        start, stop = sorted((low % (stops[-1] + 1), high % (stops[-1] + 1)))
        read.clear()
        found = {name: states.checksums.of(name, start, stop)[0] for name in arrays}
        for name, array in arrays.items():
            words = [
                [array[state, slice(*states.column(c))] for c in range(states.columns)]
                for state in range(start, stop)
            ]
            assert found[name].tolist() == [[checksum(np.ascontiguousarray(part)) for part in row] for row in words]
        own = np.searchsorted(stops, stop) - np.searchsorted(stops, start, "right") + 1
        # The first record is found by bisection, and the one after the last shows where the range ends.
        assert len(read) <= own + 1 + 1 + len(counts).bit_length()


def spoil(chunk, damage):
    if damage == "missing":
        chunk.unlink()
    elif damage == "inverted":
        chunk.write_bytes(bytes(byte ^ 255 for byte in chunk.read_bytes()))
    else:
        whole = chunk.read_bytes()
        chunk.write_bytes(whole[: len(whole) // 3])


@pytest.mark.parametrize("damage", ["truncated", "missing", "inverted"])
@pytest.mark.parametrize("name", ["step", "attempt", "loss", "learning_rate"])
def test_a_damaged_scalar_is_rejected_by_name(path, name, damage):
    write_trajectory(path, walk_arrays(2, ELEMENTS), SHAPES, CHUNK)
    spoil(path / name / "c" / "0", damage)
    with pytest.raises(InputError) as caught:
        open_trajectory(path).scalar(name)
    assert caught.value.where == str(path / name / "c" / "0")


@pytest.mark.parametrize("row", range(7))
def test_a_changed_state_changes_the_digests_of_its_ledger_chunks(tmp_path, row):
    arrays = walk_arrays(7, ELEMENTS)
    chunks = [LedgerChunk(0, 2), LedgerChunk(2, 4), LedgerChunk(4, 6)]
    before = open_trajectory(write_trajectory(tmp_path / "before.zarr", arrays, SHAPES, CHUNK))
    arrays["gradient"][row, 12] *= 2
    after = open_trajectory(write_trajectory(tmp_path / "after.zarr", arrays, SHAPES, CHUNK))
    old, new = before.digests(chunks), after.digests(chunks)
    in_two = write_trajectory(
        tmp_path / "two.zarr", {name: array[:2] for name, array in arrays.items()}, SHAPES, CHUNK
    )
    append_states(in_two, {name: array[2:] for name, array in arrays.items()})
    assert open_trajectory(in_two).digests(chunks) == new
    # States of a ledger chunk, and the halo: the state after the last one.
    assert [chunk for chunk in chunks if old[chunk] != new[chunk]] == [
        b for b in chunks if b.start <= row <= b.stop
    ]
    assert before.fingerprint() != after.fingerprint()


def test_the_fingerprint_does_not_depend_on_the_commits(tmp_path):
    arrays = walk_arrays(6, ELEMENTS)
    one = open_trajectory(write_trajectory(tmp_path / "one.zarr", arrays, SHAPES, CHUNK))
    write_trajectory(tmp_path / "two.zarr", {name: array[:2] for name, array in arrays.items()}, SHAPES, CHUNK)
    append_states(tmp_path / "two.zarr", {name: array[2:] for name, array in arrays.items()})
    assert open_trajectory(tmp_path / "two.zarr").fingerprint() == one.fingerprint()


# Ownership of the folder -------------------------------------------------------------------------------------

STEPS = np.array([0, 1, 2, 3, 4, 6, 7, 8])
LAYOUT = Layout.from_shapes({name: (shape, "float32") for name, shape in SHAPES.items()})
FIVE = VECTORS[:5]


def create_trajectory(path):
    return Trajectory.create(LocalStorage(path), LAYOUT, {"parameter": "float32", "gradient": "float32"}, CHUNK)


def prepare_ledger(path, steps=STEPS, vectors=FIVE, updates_per_chunk=3, layout=LAYOUT):
    return Ledger.prepare(LocalStorage(path), layout, vectors, steps[:-1], np.diff(steps), updates_per_chunk)


KINDS = {"trajectory": (create_trajectory, open_trajectory), "ledger": (prepare_ledger, open_ledger)}


def remover(kind):
    remove = {"trajectory": Trajectory.remove, "ledger": Ledger.remove}[kind]
    return lambda path: remove(LocalStorage(path))


def foreign_folder(path):
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")


def foreign_file(path):
    path.write_text("years of work")


def foreign_zarr(path):
    zarr.create_group(path, attributes={"title": "years of work"})


def foreign_array(path):
    zarr.create_array(path, shape=(3,), dtype="float64")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [foreign_folder, foreign_file, foreign_zarr, foreign_array])
def test_foreign_data_are_neither_opened_nor_removed(tmp_path, kind, make):
    create, cls = KINDS[kind]
    path = tmp_path / "precious"
    make(path)
    before = files(tmp_path)
    for action in (cls, remover(kind), create):
        with pytest.raises(InputError, match=f"no {kind} here") as caught:
            action(path)
        assert caught.value.where in (str(path), str(path / "zarr.json"))
    kept = {name: content for name, content in files(tmp_path).items() if name.parts[0] == "precious"}
    assert kept == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_whose_kind_was_changed_is_damaged(tmp_path, kind):
    create, *others = KINDS[kind]
    create(tmp_path / "store")
    document = tmp_path / "store" / "zarr.json"
    document.write_text(document.read_text().replace(f'"{kind}"', f'"{kind.title()}"'))
    for action in others:
        with pytest.raises(InputError, match=f"no {kind} here: its metadata cannot be read") as refusal:
            action(tmp_path / "store")
        assert refusal.value.where == str(document)


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_another_kind_is_neither_opened_nor_removed(tmp_path, kind):
    other = {"trajectory": "ledger", "ledger": "trajectory"}[kind]
    KINDS[other][0](tmp_path / "store")
    for action in (*reversed(KINDS[kind]), remover(kind)):
        with pytest.raises(InputError, match=f"this is a {other}, not a {kind}"):
            action(tmp_path / "store")
    KINDS[other][1](tmp_path / "store")


def with_version(path, version):
    """Set another layout version of a store, or remove it."""
    document = json.loads((path / "zarr.json").read_text())
    group = document["attributes"]["natgrad"]
    assert group.pop("version") == LAYOUT_VERSION
    if version is not None:
        group["version"] = version
    (path / "zarr.json").write_text(json.dumps(document))
    return path


AGAIN = {"trajectory": "--overwrite", "ledger": "natgrad analyze OUT"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_a_newer_version_is_refused_and_kept(tmp_path, kind):
    create, cls = KINDS[kind]
    create(tmp_path / "store")
    path = with_version(tmp_path / "store", LAYOUT_VERSION + 1)
    before = files(path)
    for action in (cls, remover(kind), create):
        with pytest.raises(
            InputError, match=rf"(?m)version {LAYOUT_VERSION + 1}, .* natgrad reads {LAYOUT_VERSION}$"
        ) as caught:
            action(path)
        assert "upgrade" in caught.value.remedy
    assert files(path) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", [*range(1, LAYOUT_VERSION), None, 0, -1, "4", 4.5, True, [4]])
def test_a_store_of_another_version_is_rejected_until_it_is_replaced(tmp_path, kind, version):
    create, cls = KINDS[kind]
    create(tmp_path / "store")
    made = files(tmp_path / "store")
    path = with_version(tmp_path / "store", version)
    before = files(path)
    found = "has no layout version" if version is None else f"has layout version {version!r}"
    message = f"(?m){re.escape(found)}, .* natgrad reads {LAYOUT_VERSION}$"
    with pytest.raises(InputError, match=message) as caught:
        cls(path)
    assert AGAIN[kind] in caught.value.remedy
    assert files(path) == before
    create(path)
    assert files(path) == made
    with_version(path, version)
    remover(kind)(path)
    assert not path.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_store_is_rejected_and_not_created(tmp_path, kind):
    with pytest.raises(InputError, match=f"no {kind} here"):
        KINDS[kind][1](tmp_path / "nowhere")
    remover(kind)(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arrays", [0, 3])
def test_an_incompletely_created_store_does_not_exist(tmp_path, monkeypatch, kind, arrays):
    create, cls = KINDS[kind]
    with monkeypatch.context() as patch:
        patch.setattr(ArrayPlan, "create", stopping(ArrayPlan.create, arrays))
        with pytest.raises(Stopped):
            create(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    create(tmp_path / "store")
    cls(tmp_path / "store")
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_incompletely_removed_store_does_not_exist(tmp_path, monkeypatch, kind):
    create, _ = KINDS[kind]
    create(tmp_path / "store")

    def stop(folder, ignore_errors=False):
        if folder.exists():
            (folder / "zarr.json").unlink()
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(Stopped):
            remover(kind)(tmp_path / "store")
    assert not (tmp_path / "store").exists()
    create(tmp_path / "store")
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


def test_an_empty_trajectory_replaces_another(path):
    write_trajectory(path, walk_arrays(3, ELEMENTS, MIXED), SHAPES, CHUNK)
    trajectory = create_trajectory(path)
    assert (trajectory.n_states, set(trajectory.dtypes)) == (0, {"parameter", "gradient"})
    assert trajectory.scalar("step").tolist() == []
    assert not (path / "hvp").exists()


# The ledger --------------------------------------------------------------------------------------------------

BANDS = [
    LedgerChunk(0, 3),
    LedgerChunk(3, 6),
    LedgerChunk(6, 7),
]  # of the seven updates between the eight steps
DIGESTS = {chunk: f"digest {chunk.start}" for chunk in BANDS}


def products(chunk, seed=0):
    rng = np.random.default_rng([seed, chunk.start])
    rows = chunk.stop - chunk.start
    return rng.standard_normal((rows, len(SHAPES), 5, 5)), rng.standard_normal((rows, len(SHAPES)))


@pytest.fixture
def ledger(tmp_path):
    return prepare_ledger(tmp_path / "ledger.zarr")


def fill(ledger, chunks=BANDS):
    for chunk in chunks:
        ledger.write(chunk, *products(chunk), DIGESTS[chunk])


def test_a_ledger_is_read_when_all_chunks_are_recorded_in_any_order(ledger):
    for chunk in (BANDS[2], BANDS[0]):
        open_ledger(ledger.storage.local_path).write(chunk, *products(chunk), DIGESTS[chunk])
    assert ledger.missing(DIGESTS) == [BANDS[1]]
    with pytest.raises(InputError, match="updates 3 to 6 are missing") as caught:
        ledger.read()
    assert caught.value.where == str(ledger.storage.local_path)
    fill(ledger, [BANDS[1]])
    assert open_ledger(ledger.storage.local_path).missing(DIGESTS) == []
    for read_back, written in zip(
        open_ledger(ledger.storage.local_path).read(), zip(*map(products, BANDS), strict=True), strict=True
    ):
        np.testing.assert_array_equal(read_back, np.concatenate(written))


@pytest.mark.parametrize("rows", [(0, 2), (1, 3), (1, 4), (0, 6), (0, 7), (3, 7), (6, 9), (6, 6)])
def test_an_incomplete_ledger_chunk_is_rejected(ledger, rows):
    chunk = LedgerChunk(*rows)
    with pytest.raises(ValueError, match="are not a chunk of 3"):
        ledger.write(chunk, *products(chunk), "digest")
    assert ledger.missing(DIGESTS) == BANDS


def test_a_ledger_chunk_is_recorded_after_its_data_is_on_disk(ledger, monkeypatch):
    chunks = [
        ledger.storage.local_path / "gram" / "c" / "1" / "0" / "0" / "0",
        ledger.storage.local_path / "residual_ratio" / "c" / "1" / "0",
    ]
    events = []
    with monkeypatch.context() as patch:
        Watch(patch, lambda kind, target, before: events.append((kind, target)) if before else None)
        fill(ledger, [BANDS[1]])
    (record,) = (ledger.storage.local_path / "commits").glob("[0-9]*.json")
    named = events.index(("rename", record))
    for chunk in chunks:
        aside = chunk.with_name(f".{chunk.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
        order = [events.index(event) for event in (("flush", aside), ("rename", chunk), ("flush", chunk.parent))]
        assert [*order, named] == sorted([*order, named])
    # Every folder with a new name is flushed once. That of the ledger has no new name and is not flushed.
    folders = {
        folder for chunk in chunks for folder in chunk.parents if ledger.storage.local_path in folder.parents
    }
    flushed = [target for kind, target in events if kind == "flush" and target.suffix != ".tmp"]
    assert sorted(flushed) == sorted([*folders, record.parent])


def test_files_of_a_ledger_chunk_are_flushed_together(ledger, monkeypatch):
    written = []

    def observe(kind, target, before):
        if kind == "flush" and target.suffix == ".tmp" and target.parent.name != "commits":
            sizes = {
                path.relative_to(ledger.storage.local_path).parts[0]: path.stat().st_size
                for path in asides(ledger.storage.local_path)
            }
            written.append(sizes)

    def asides(folder):
        return [path for path in folder.rglob(".*.tmp") if path.parent.name != "commits"]

    with monkeypatch.context() as patch:
        Watch(patch, observe)
        fill(ledger, [BANDS[0]])
    assert written == [{"gram": 3 * 3 * 25 * 8, "residual_ratio": 3 * 3 * 8}] * 2


def test_a_ledger_chunk_without_a_record_is_missing(ledger, monkeypatch):
    fill(ledger, BANDS[:2])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", stopping(Journal.write, 0))
        with pytest.raises(Stopped):
            fill(ledger, [BANDS[2]])
    assert open_ledger(ledger.storage.local_path).missing(DIGESTS) == [BANDS[2]]
    with pytest.raises(InputError, match="updates 6 to 7 are missing"):
        open_ledger(ledger.storage.local_path).read()


def test_a_ledger_chunk_of_other_states_is_missing(ledger):
    fill(ledger)
    assert ledger.missing(DIGESTS | {BANDS[1]: "other"}) == [BANDS[1]]


def test_a_ledger_chunk_of_a_diverged_run_is_stored(ledger):
    for chunk in BANDS:
        ledger.write(
            chunk,
            *(np.full_like(values, np.nan) for values in products(chunk)),
            DIGESTS[chunk],
        )
    assert all(np.isnan(values).all() and len(values) == 7 for values in ledger.read())


def test_an_extended_ledger_keeps_its_complete_chunks(ledger):
    fill(ledger)
    grown = prepare_ledger(ledger.storage.local_path, np.append(STEPS, [9, 10]))
    chunks = {
        LedgerChunk(0, 3): "digest 0",
        LedgerChunk(3, 6): "digest 3",
        LedgerChunk(6, 9): "digest 6",
    }
    assert grown.missing(chunks) == [LedgerChunk(6, 9)]
    with pytest.raises(InputError, match="updates 6 to 9 are missing"):
        grown.read()
    numbers, spans = grown.steps()
    assert numbers.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert spans.tolist() == [1, 1, 1, 1, 2, 1, 1, 1, 1]


def test_the_numbers_of_new_updates_are_on_disk_before_a_ledger_chunk_is_recorded(ledger, monkeypatch):
    flushed = {}

    def observe(kind, target, before):
        if kind == "flush":
            flushed[target] = target.read_bytes() if target.is_file() else sorted(target.iterdir())

    with monkeypatch.context() as patch:
        Watch(patch, observe)
        prepare_ledger(ledger.storage.local_path, np.append(STEPS, [9, 10]))
    for folder in (ledger.storage.local_path / "step" / "c", ledger.storage.local_path / "step_span" / "c"):
        assert flushed[folder] == [folder / "0"]
        # The file is written under a temporary name, flushed and renamed.
        aside = [content for path, content in flushed.items() if path.parent == folder and path.name[0] == "."]
        assert aside == [(folder / "0").read_bytes()]


def test_the_numbers_of_a_long_run_share_a_file_and_grow_beyond_it(tmp_path):
    path = tmp_path / "ledger.zarr"
    for rows, chunks in ((20_000, 1), (30_000, 2), (50_000, 3)):
        steps = np.arange(rows + 1)
        numbers, spans = prepare_ledger(path, steps, updates_per_chunk=10_000).steps()
        np.testing.assert_array_equal(numbers, steps[:-1])
        assert set(spans) == {1}
        assert len(spans) == rows
        for name in ("step", "step_span"):
            assert sorted(file.name for file in (path / name / "c").iterdir()) == list(map(str, range(chunks)))


@pytest.mark.parametrize(("tensors", "rows"), [(1, 1), (1, 5000), (2, 164), (2, 165), (300, 3), (327, 4), (328, 4)])
def test_a_checksum_covers_64_kib_or_an_update_and_each_update_once(tmp_path, tensors, rows):
    layout = Layout.from_shapes({f"t{number}": ((1,), "float32") for number in range(tensors)})
    gram_ledger = prepare_ledger(tmp_path / "ledger.zarr", np.arange(rows + 1), FIVE, rows, layout)
    rng = np.random.default_rng(0)
    arrays = {
        "gram": rng.standard_normal((rows, tensors, 5, 5)),
        "residual_ratio": rng.standard_normal((rows, tensors)),
    }
    gram_ledger.write(LedgerChunk(0, rows), *arrays.values(), "digest")
    record = gram_ledger.journal.read("0" * 12)
    for name, values in arrays.items():
        covered = record["checksum_rows"][name]
        groups = [values[low : low + covered] for low in range(0, rows, covered)]
        assert record["checksums"][name].tolist() == [[checksum(group)] for group in groups]
        assert all(group.nbytes >= 65536 for group in groups[:-1])
        assert covered == 1 or values[1:covered].nbytes < 65536  # not more updates than necessary


@pytest.mark.parametrize(
    "other",
    [{"vectors": VECTORS}, {"updates_per_chunk": 4}, {"layout": Layout.from_shapes({"a": ((13,), "float32")})}],
)
def test_a_ledger_with_other_tensors_vectors_or_chunks_is_replaced(ledger, other):
    fill(ledger)
    replaced = prepare_ledger(ledger.storage.local_path, **other)
    assert len(replaced.missing(DIGESTS)) == len(BANDS)
    for name, value in other.items():
        assert getattr(replaced, name) == value


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("chunk", ["gram/c/1/0/0/0", "residual_ratio/c/2/0"])
def test_a_damaged_ledger_chunk_is_rejected_by_name(ledger, chunk, damage):
    fill(ledger)
    spoil(ledger.storage.local_path / chunk, damage)
    with pytest.raises(InputError) as caught:
        open_ledger(ledger.storage.local_path).read()
    assert caught.value.where == str(ledger.storage.local_path / chunk)


def test_plain_xarray_shows_the_names_of_the_ledger(ledger):
    fill(ledger)
    with xr.open_zarr(ledger.storage.local_path, consolidated=False) as dataset:
        assert dataset["gram"].dims == ("step", "tensor", "vector", "with_vector")
        assert dataset["step"].values.tolist() == STEPS[:-1].tolist()
        assert dataset["step_span"].values.tolist() == [1, 1, 1, 1, 2, 1, 1]
        assert dataset["tensor"].values.tolist() == list(SHAPES)
        entry = dataset["gram"].sel(step=6, tensor="b", vector="gradient", with_vector="displacement")
        assert float(entry) == products(BANDS[1])[0][2, 1, 2, 1]
