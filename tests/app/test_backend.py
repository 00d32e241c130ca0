"""Test the engine of xarray, through its entry point in a separate process."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import xarray as xr

import distributions
from logs import random_walk, write_log
from natgrad.app.backend import NatgradBackend
from natgrad.schema.errors import InputError
from processing import process

GROUP = "xarray.backends"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backend")
    process(write_log(folder / "log", random_walk(5)), folder / "out", windows=(1, 3))
    return folder / "out"


def test_xarray_finds_the_engine_and_opens_a_run(out, tmp_path):
    declared = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = {GROUP: declared["project"]["entry-points"][GROUP]}
    folder = distributions.install(tmp_path / "site", "natgrad-engine", {}, points)
    code = f"""
import sys, json, xarray
sys.path.insert(0, {str(folder)!r})
out = sys.argv[1]
tree = xarray.open_datatree(out, engine="natgrad", chunks={{}})
guessed = xarray.open_datatree(out)
assert tree["tensor"]["angle"].chunks, tree
assert guessed.equals(tree)
dataset = xarray.open_dataset(out, engine="natgrad", group="tensor")
print(json.dumps([list(tree.children), tree.natgrad.worst(1).index.tolist(), list(dataset.sizes)]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    groups, worst, sizes = json.loads(done.stdout)
    assert groups == ["group", "model", "tensor"]
    assert worst[0] in ("layer.weight", "layer.bias", "scale")
    assert {*sizes} >= {"step", "tensor", "descent", "window"}


def test_the_engine_loads_little(out):
    code = (
        "import sys, xarray; before = set(sys.modules); import natgrad.app.backend; "
        "print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"natgrad"}


def test_variables_can_be_dropped_and_groups_are_opened_alone(out):
    tree = xr.open_datatree(out, engine=NatgradBackend, drop_variables="angle")
    assert "angle" not in tree["model"].data_vars
    assert "angle" not in tree["tensor"].data_vars
    assert "cosine" in tree["tensor"].data_vars
    groups = xr.open_groups(out, engine=NatgradBackend)
    assert {*groups} == {"/", "/group", "/model", "/tensor"}
    assert "angle" in xr.open_dataset(out, engine=NatgradBackend).data_vars


def test_other_folders_and_groups_are_refused(out, tmp_path):
    assert NatgradBackend().guess_can_open(out)
    assert not NatgradBackend().guess_can_open(tmp_path)
    assert not NatgradBackend().guess_can_open(object())
    with pytest.raises(InputError, match="there are no results here"):
        xr.open_datatree(tmp_path, engine=NatgradBackend)
    with pytest.raises(InputError, match=r"(?s)no group 'layers'.*/model, /tensor"):
        xr.open_dataset(out, engine=NatgradBackend, group="layers")
