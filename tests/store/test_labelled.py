"""Compare labelled arrays with those that xarray writes: metadata, chunks and values."""

import json
import warnings

import numpy as np
import pytest
import xarray as xr
import zarr

from natgrad.storage import LocalStorage
from natgrad.store import labelled
from natgrad.store.labelled import ChunkedArray, LabelledArray, LabelledGroup, contents_of, encoded_chunk


def write(folder, groups):
    LocalStorage(folder).put_entries(contents_of(groups))


def group(seed):
    """Return arrays of all data types, with coordinates, and scalars."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal((5, 3))
    values[2] = np.nan
    of = {
        "float64": (("step", "name"), values),
        "float32": (("step",), values[:, 0].astype("float32")),
        "int64": (("name",), np.arange(3) - 1),
        "int8": (("step",), np.arange(5, dtype="int8")),
        "bool": (("step", "name"), values > 0),
        "scalar": ((), np.array(2.5)),
        "missing": (("step",), np.full(5, np.nan)),
        "zero": (("step",), np.zeros(5, "int64")),
        "negative_zero": (("step",), np.full(5, -0.0)),
        "empty": (("step", "none"), np.empty((5, 0))),
    }
    arrays = {name: LabelledArray(dims, found, {"long_name": f"{name} é"}) for name, (dims, found) in of.items()}
    coordinates = {
        "step": LabelledArray(("step",), np.arange(5) * 10, {"units": "1"}),
        "name": LabelledArray(("name",), np.array(["a", "", "snow \N{SNOWMAN}"])),
        "attempt": LabelledArray(("step",), np.array([0, 0, 1, 1, 2])),
    }
    return LabelledGroup(arrays, coordinates, {"of": seed, "numbers": [1, 2.5]})


GROUPS = {"": LabelledGroup(attributes={"title": "all"}), "model": group(1), "deep/below": group(2)}


def as_tree(groups):
    """Return the same arrays as xarray's."""

    def dataset(one):
        found = [
            {name: (a.dimensions, a.values, a.attributes) for name, a in part.items()}
            for part in (one.arrays, one.coordinates)
        ]
        return xr.Dataset(*found, attrs=one.attributes)

    return xr.DataTree.from_dict({f"/{path}": dataset(one) for path, one in groups.items()})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the folder of our arrays, and that of the same arrays written by xarray."""
    ours, theirs = (tmp_path_factory.mktemp("labelled") / name for name in ("ours", "theirs"))
    write(ours, GROUPS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        # The registry of Zarr's specification lists the type of texts; Zarr 3.1 does not know that.
        warnings.filterwarnings("ignore", message="The data type .FixedLengthUTF32.* does not have a Zarr V3")
        as_tree(GROUPS).to_zarr(theirs, zarr_format=3, consolidated=True, mode="w")
    return ours, theirs


def documents(folder):
    return {path.relative_to(folder): json.loads(path.read_text()) for path in folder.rglob("zarr.json")}


def test_metadata_are_those_of_xarray(written):
    ours, theirs = map(documents, written)
    assert ours == theirs


def test_chunks_are_those_of_xarray_byte_by_byte(written):
    ours, theirs = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "zarr.json"
        }
        for folder in written
    )
    assert ours == theirs
    assert not [path for path in ours if path.parts[1] in ("missing", "zero")]


def test_xarray_and_zarr_read_the_values(written):
    ours, _ = written
    tree = xr.open_datatree(ours, engine="zarr").load()
    expected = as_tree(GROUPS)
    assert tree.identical(expected)
    found = zarr.open_group(ours, mode="r", use_consolidated=False)["deep/below/float64"][:]
    np.testing.assert_array_equal(found, GROUPS["deep/below"].arrays["float64"].values)


def test_large_arrays_are_divided_along_their_first_dimension(tmp_path):
    rows = 2 * labelled.CHUNK_BYTES // 8 // 3 + 7
    values = np.arange(3.0 * rows).reshape(rows, 3)
    write(tmp_path / "w", {"": LabelledGroup({"x": LabelledArray(("step", "tensor"), values)})})
    array = zarr.open_group(tmp_path / "w", mode="r")["x"]
    assert array.chunks == (labelled.CHUNK_BYTES // 24, 3)
    assert len(list((tmp_path / "w" / "x" / "c").iterdir())) == 3
    np.testing.assert_array_equal(array[:], values)


@pytest.mark.parametrize("separator", [".", "/"])
@pytest.mark.parametrize("kind", ["float64", "int8", "bool", "int64"])
def test_an_array_can_be_written_chunk_by_chunk(tmp_path, kind, separator):
    values = np.random.default_rng(0).integers(0, 2, (7, 3, 2)).astype(kind)
    values[:4, :, 1] = np.nan if kind == "float64" else 0
    array = ChunkedArray(("step", "tensor", "descent"), values.shape, (4, 3, 1), kind, {"units": "1"}, separator)
    contents = contents_of({"of": LabelledGroup({"x": array})})
    for row, descent in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        part = values[4 * row : 4 * row + 4, :, descent : descent + 1]
        found = encoded_chunk(part, array.chunks, (row, 0, descent), separator)
        # A chunk of missing values is not stored.
        assert (found is None) == (row == 0 and descent == 1)
        contents |= {f"of/x/{found[0]}": found[1]} if found else {}
    LocalStorage(tmp_path / "w").put_entries(contents)
    found = xr.open_datatree(tmp_path / "w", engine="zarr")["of"]["x"]
    assert found.dtype == kind
    np.testing.assert_array_equal(found.values, values)
    # The metadata and the chunks are those that Zarr writes.
    group = zarr.open_group(tmp_path / "w", mode="a", use_consolidated=False)
    chunk = tmp_path / "w" / "of" / "x" / separator.join(("c", "0", "0", "0"))
    ours = chunk.read_bytes()
    group["of/x"][:4, :, :1] = values[:4, :, :1]
    assert chunk.read_bytes() == ours
