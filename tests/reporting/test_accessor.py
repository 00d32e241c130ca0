"""Test the accessor of xarray on the stored results of a run."""

import json

import numpy as np
import pytest
import xarray as xr

import natgrad
from lazy import Lazy
from logs import random_walk, write_log
from natgrad.schema.errors import InputError
from processing import process

figure = Lazy("matplotlib.figure")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("accessor")
    process(write_log(folder / "log", random_walk(9)), folder / "out", windows=(1, 3))
    return folder / "out"


def test_values_are_read_when_they_are_used(out):
    tree = natgrad.open_results(out)
    assert len(tree.natgrad.worst()) == 3
    assert not any(variable._in_memory for variable in tree["tensor"].data_vars.values())
    chunked = natgrad.open_results(out).chunk()
    assert chunked["tensor"]["angle"].chunks
    assert chunked.natgrad.worst().equals(tree.natgrad.worst())


def test_the_worst_tensors_are_those_of_the_group(out):
    tree = natgrad.open_results(out)
    found = tree.natgrad.worst(2, window=3)
    assert found.equals(tree["tensor"].natgrad.worst(2, window=3))
    assert found.equals(tree["tensor"].to_dataset().natgrad.worst(2, window=3))
    angle = tree["tensor"]["angle"].sel(descent="gradient", window=3).mean("step")
    name = found.index[0]
    assert found.loc[name, "mean_angle"] == pytest.approx(float(angle.sel(tensor=name)), rel=1e-14)


def test_the_summary_is_that_of_the_command(out):
    tree = natgrad.open_results(out)
    summary = tree.natgrad.summary()
    stored = json.loads((out / "results.zarr" / "summary.json").read_text())
    assert summary.to_json() | {"crc32c": stored["crc32c"]} == stored
    assert "worst tensors" in str(summary)
    assert "<table>" in tree.natgrad._repr_html_()
    assert "status" in repr(tree["tensor"].natgrad)
    of_tensors = tree["tensor"].natgrad.summary()
    assert sum(of_tensors["status"].values()) == 3 * 8
    assert tree["model"].natgrad.summary(window=3)["angle"] == tree.natgrad.summary(window=3)["angle"]


def test_tables_are_those_of_the_group(out, tmp_path):
    tree = natgrad.open_results(out)
    assert tree.natgrad.to_dataframe().equals(tree["model"].natgrad.to_dataframe())
    path = tree["tensor"].natgrad.to_csv(tmp_path / "tensors.csv", variables=["angle"])
    assert len(path.read_text().splitlines()) == 1 + 3 * 8
    path = tree.natgrad.to_parquet(tmp_path / "model.parquet")
    assert path.read_bytes().startswith(b"PAR1")


def test_drawings_need_results_of_the_right_dimensions(out):
    tree = natgrad.open_results(out)
    axes = figure.Figure().subplots()
    assert tree.natgrad.plot.heatmap("condition_number", ax=axes) is axes
    assert tree.natgrad.plot.spectrum(ax=axes) is axes
    with pytest.raises(InputError, match="no dimension tensor"):
        tree["model"].natgrad.worst()
    with pytest.raises(InputError, match="a heat map has the dimensions tensor and step") as error:
        tree["model"].natgrad.plot.heatmap(ax=axes)
    assert "use the group /tensor" in error.value.remedy


def test_results_of_a_run_without_gradients_have_no_worst_tensor(tmp_path):
    states = [{k: v for k, v in state.items() if not k.startswith("gradient")} for state in random_walk(4)]
    tree = process(write_log(tmp_path / "log", states), tmp_path / "out")
    assert list(tree.natgrad.worst().columns) == ["updates", "effective_share", "mean_angle", "max_angle"]
    assert tree.natgrad.worst().empty
    assert tree.natgrad.summary()["angle_course"] is None


def test_xarray_registers_the_accessor_once():
    assert xr.Dataset({"x": ("step", np.arange(3))}).natgrad is not None
