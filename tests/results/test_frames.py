"""Test that tables contain every value of the results, and that files have the same bits."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from logs import random_walk, write_log
from natgrad.results import frames
from natgrad.results.ranking import BLOCK_BYTES
from natgrad.schema.errors import InputError
from processing import process

READ = {"csv": pd.read_csv, "parquet": pd.read_parquet}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    return process(write_log(folder / "log", random_walk(7)), folder / "out", windows=(1, 3))


@pytest.mark.parametrize("descent", ["gradient", "corrected", None])
@pytest.mark.parametrize("group", ["model", "tensor"])
def test_a_table_has_every_value_of_a_group(tree, group, descent):
    dataset = tree[group].to_dataset()
    frame = frames.to_dataframe(dataset, descent=descent, window=None)
    assert {*frame.columns} >= {"angle", "loss", "status", "attempt"}
    assert not {name for name in frame.columns if name.startswith("family")}
    for labels, row in frame.iterrows():
        at = dict(zip(frame.index.names, labels, strict=True)) | ({} if descent is None else {"descent": descent})
        for name in ("angle", "loss", "update_norm"):
            variable = dataset[name]
            expected = variable.sel({axis: value for axis, value in at.items() if axis in variable.dims})
            np.testing.assert_array_equal(row[name], expected.values)
    codes = frame["status"].map(lambda name: tree["model"]["status"].attrs["flag_meanings"].split().index(name))
    expected = dataset["status"] if descent is None else dataset["status"].sel(descent=descent)
    np.testing.assert_array_equal(codes.to_numpy().reshape(expected.shape), expected.values)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_has_the_bits_of_the_table(tree, tmp_path, kind):
    dataset = tree["tensor"].to_dataset()
    path = getattr(frames, f"to_{kind}")(dataset, tmp_path / f"table.{kind}")
    read = READ[kind](path)
    expected = frames.to_dataframe(dataset).reset_index()
    pd.testing.assert_frame_equal(read, expected, check_exact=True, check_dtype=False)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_large_table_is_written_in_parts(tmp_path, kind):
    steps = 2 * BLOCK_BYTES // 8 // 50 + 3
    values = np.random.default_rng(0).standard_normal((steps, 50))
    dataset = xr.Dataset({"x": (("step", "tensor"), values)}, {"tensor": [f"t{i}" for i in range(50)]})
    parts = list(frames.frames(dataset))
    assert len(parts) == 3
    path = getattr(frames, f"to_{kind}")(dataset.isel(tensor=[0, 49]), tmp_path / "table")
    read = READ[kind](path)
    np.testing.assert_array_equal(read["x"].to_numpy(), values[:, [0, 49]].ravel())
    assert sum(map(len, parts)) == values.size


def test_variables_can_be_chosen(tree):
    frame = frames.to_dataframe(tree["model"].to_dataset(), variables=["family_eigenvalue_max"])
    assert frame.index.names == ["step", "gamma"]
    assert {*frame.columns} == {"attempt", "family_eigenvalue_max"}
    with pytest.raises(InputError, match="no variable 'kappa'"):
        frames.to_dataframe(tree["model"].to_dataset(), variables=["kappa"])


def test_a_table_needs_steps(tree):
    with pytest.raises(InputError, match="no steps"):
        frames.to_dataframe(tree["model"].to_dataset().isel(step=0))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_that_cannot_be_written_is_an_error_and_an_existing_one_stays(tree, tmp_path, kind):
    dataset, write = tree["model"].to_dataset(), getattr(frames, f"to_{kind}")
    with pytest.raises(InputError, match="could not be written"):
        write(dataset, tmp_path / "missing" / "table")
    (tmp_path / "table").write_text("before")
    with pytest.raises(InputError, match="no window 2"):
        write(dataset, tmp_path / "table", window=2)
    assert (tmp_path / "table").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_table_of_a_sweep_has_the_runs(tmp_path):
    values = np.arange(6.0).reshape(2, 3)
    dataset = xr.Dataset({"x": (("run", "step"), values)}, {"run": ["a", "b"], "step": [0, 1, 2]})
    frame = frames.to_dataframe(dataset)
    assert frame.index.names == ["run", "step"]
    assert frame.loc[("b", 1), "x"] == 4.0
