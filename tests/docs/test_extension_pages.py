"""Test the examples of the pages on extensions: install them as distributions and use them with the command."""

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import xarray as xr

import commands
from distributions import install, natgrad
from logs import random_walk, write_log
from natgrad.results.variables import NORM_BITS
from natgrad.store import open_trajectory
from processing import process

PAGES = Path(__file__).parents[2] / "docs" / "howto"
TENSORS = {"theta": (5,)}


def example_of(page, folder):
    """Install the Python module and the entry points of a page."""
    text = (PAGES / page).read_text()
    blocks = dict(re.findall(r"^```(python|toml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    module = re.match(r'"""(\w+)\.py:', blocks["python"])[1]
    points = tomllib.loads(blocks["toml"])["project"]["entry-points"]
    return install(folder, module.replace("_", "-"), {module: blocks["python"]}, points)


def write_f64(folder, states):
    folder.mkdir()
    for number, state in enumerate(states):
        numbers = [state["loss"], state["learning_rate"], *state["parameter/theta"], *state["gradient/theta"]]
        np.array(numbers, "<f8").tofile(folder / f"state_{number}.f64")
    return folder


def test_the_example_reader_gives_the_same_bits_as_the_native_format(tmp_path):
    installed = example_of("reader.md", tmp_path / "site")
    formats = json.loads(natgrad("formats", "--json", installed=[installed]).stdout)
    assert formats["f64"]["layout"] == "folder of state_<N>.f64"
    assert "f64" not in json.loads(commands.natgrad("formats", "--json").stdout)
    states = random_walk(6, TENSORS, "float64")
    log = write_f64(tmp_path / "log", states)
    natgrad("process", log, tmp_path / "own", "--workers", 1, installed=[installed])
    natgrad("ingest", log, tmp_path / "named", "--format", "f64", installed=[installed])
    process(write_log(tmp_path / "native-log", states), tmp_path / "native")
    own, native = (xr.open_datatree(tmp_path / name / "results.zarr") for name in ("own", "native"))
    for group in ("model", "tensor"):
        expected = native[group].to_dataset()
        assert expected.sizes["step"] == 5
        assert own[group].to_dataset().identical(expected)
    one, other = (open_trajectory(tmp_path / name / "trajectory.zarr") for name in ("named", "native"))
    assert one.fingerprint() == other.fingerprint()


def test_the_example_variable_is_in_the_results_only_if_it_is_installed(tmp_path):
    installed = example_of("variable.md", tmp_path / "site")
    log = write_log(tmp_path / "log", random_walk(6, TENSORS, "float64"))
    natgrad("process", log, tmp_path / "with", "--workers", 1, installed=[installed])
    process(log, tmp_path / "without")
    found, plain = (xr.open_datatree(tmp_path / name / "results.zarr") for name in ("with", "without"))
    assert found.attrs["versions"]["my-variable"] == "1.0"
    for group, leading in (("model", ("step",)), ("tensor", ("step", "tensor"))):
        dataset = found[group].to_dataset()
        variable = dataset["relative_update"]
        assert variable.dims == (*leading, "window")
        assert variable.attrs == {
            "long_name": "length of the update in units of the parameters",
            "units": "1",
            "equation": "eta |g| / |theta_t|",
            "description": "NaN if the learning rate is not known.",
        }
        step = dataset["learning_rate"] * dataset["update_norm"].sel(window=1) / dataset["parameter_norm"]
        # Both norms are rounded, and the variable is computed from the exact ones.
        np.testing.assert_allclose(variable.sel(window=1), step, rtol=2.0**-NORM_BITS + 2.0**-50)
        assert dataset.drop_vars("relative_update").identical(plain[group].to_dataset())
