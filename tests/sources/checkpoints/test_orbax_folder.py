"""Checkpoints written by Orbax in each of its layouts, read without JAX."""

import contextlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import TENSORS, ledger_of, refusal

from damage import LENGTHS, changes, damage, reads_only
from logs import random_walk, run_writer, write_log
from memory import assert_out_of_core
from natgrad.schema.errors import InputError
from natgrad.sources.formats import FORMATS, find_format
from opened import open_source

LAYOUTS = ["ocdbt", "plain", "zarr3", "parts", "standard"]
DTYPES = ["float32", "bfloat16"]


def states_of(dtype):
    return random_walk(3, TENSORS, dtype=dtype)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folders of the run in all layouts, by dtype."""
    folder = tmp_path_factory.mktemp("orbax")
    paths = [folder / f"{dtype}.states" for dtype in DTYPES]
    for path in paths:
        path.write_bytes(pickle.dumps(states_of(path.stem)))
    run_writer("write_orbax.py", *paths, JAX_PLATFORMS="cpu")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The ledger of the run in the native format, with nested names as in Orbax."""

    def leveled(key):
        array, _, tensor = key.partition("/")
        module, _, leaf = tensor.rpartition(".")
        return "/".join(part for part in (array, module, leaf) if part)

    found = {}
    for dtype in DTYPES:
        folder = tmp_path_factory.mktemp(dtype)
        states = [{leveled(key): value for key, value in state.items()} for state in states_of(dtype)]
        found[dtype] = ledger_of(folder, [write_log(folder / "log", states)])
    return found


@pytest.fixture
def log(job, tmp_path):
    """A log of the first step that tests may modify."""

    def copy(layout):
        step = "ckpt_000000" if layout == "plain" else "0"
        shutil.copytree(job / "float32" / layout / step, tmp_path / "log" / "0")
        return tmp_path / "log"

    return copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_ledger_of_the_run(tmp_path, job, expected, layout, dtype):
    folder = job / dtype / layout
    assert next(name for name, format in FORMATS.items() if format.find(folder)) == "orbax"
    assert ledger_of(tmp_path, [folder]) == expected[dtype]


@given(
    layout=st.sampled_from(LAYOUTS),
    tensor=st.sampled_from(["layers.10/weight", "layers.9/bias", "scale"]),
    a=st.integers(0),
    b=st.integers(0),
)
@settings(reads_only, max_examples=40)
def test_slices_equal_the_tensor(job, layout, tensor, a, b):
    expected = states_of("float32")[1][f"gradient/{tensor.replace('/', '.')}"].ravel()
    start, stop = sorted((a % (expected.size + 1), b % (expected.size + 1)))
    out = np.zeros(stop - start, np.float32)
    stored = open_source(job / "float32" / layout)
    with stored.open(stored.steps()[1]) as reader:
        reader.read("gradient", tensor, start, out)
    np.testing.assert_array_equal(out, expected[start:stop])


def test_a_large_tensor_is_read_chunk_by_chunk(job):
    assert_out_of_core(open_source(job / "large"), "weight", np.zeros((1 << 19) + 7, np.float32))


def test_unfinished_checkpoints_are_omitted_with_a_warning(tmp_path, job, caplog):
    folder = tmp_path / "log"
    shutil.copytree(job / "float32" / "ocdbt", folder)
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp-17")
    os.utime(folder / "2.orbax-checkpoint-tmp-17" / "_CHECKPOINT_METADATA")
    (folder / "1" / "commit_success.txt").unlink()
    metadata = json.loads((folder / "1" / "_CHECKPOINT_METADATA").read_text())
    (folder / "1" / "_CHECKPOINT_METADATA").write_text(json.dumps({**metadata, "commit_timestamp_nsecs": None}))
    assert [step.number for step in open_source(folder).steps()] == [0]
    assert "2.orbax-checkpoint-tmp-17 is left for the next pass: its name" in caplog.text
    assert "1 is left for the next pass: _CHECKPOINT_METADATA has no commit time" in caplog.text


def test_a_folder_of_runs_is_not_a_run(tmp_path, job):
    for run in ("run-1", "run-2"):
        shutil.copytree(job / "float32" / "standard" / "0" / "default", tmp_path / run / "step_7")
    assert find_format(tmp_path) is None
    assert [step.number for step in open_source(tmp_path / "run-2").steps()] == [7]


# Inconsistent files ------------------------------------------------------------------------------------------


def rewritten(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


WEIGHT = "('params', 'layers.10', 'weight')"


def leaf(tree):
    return tree["tree_metadata"][WEIGHT]


@pytest.mark.parametrize("layout", ["ocdbt", "plain"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tree: tree.pop("tree_metadata"), "malformed"),
        (lambda tree: tree.update(tree_metadata=3), "malformed"),
        (lambda tree: leaf(tree).pop("value_metadata"), "malformed"),
        (lambda tree: leaf(tree).update(key_metadata=[]), "0 levels"),
        (lambda tree: leaf(tree)["key_metadata"][2].update(key="nowhere"), "nowhere"),
        (lambda tree: leaf(tree)["key_metadata"][0].update(key="../../params"), "outside of the folder"),
        (lambda tree: leaf(tree)["key_metadata"][0].update(key="/params"), "outside of the folder"),
        (lambda tree: tree["tree_metadata"].update(again=leaf(tree)), "twice"),
        (lambda tree: tree.update(use_zarr3=True), "zarr.json"),
    ],
)
def test_a_tree_that_refers_outside_its_folder_is_refused(log, layout, change, what):
    folder = log(layout)
    rewritten(folder / "0" / "state" / "_METADATA", change)
    assert what in refusal(folder).what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda array: array.update(shape=[1 << 30, 30], chunks=[1 << 30, 30]), "has chunks of shape"),
        (lambda array: array.update(shape=[1 << 60, 30], chunks=[1 << 60, 30]), "cannot read"),
        (lambda array: array.update(shape=[1 << 59, 1 << 59]), "the number of elements"),
        (lambda array: array.update(dtype="|V9"), "has no parameter"),
        (lambda array: array.update(compressor={"id": "pickle"}), "pickle"),
        (lambda array: array.clear(), "cannot read"),
    ],
)
def test_an_array_that_exceeds_its_data_is_refused(log, change, what):
    folder = log("plain")
    rewritten(folder / "0" / "state" / "params.layers.10.weight" / ".zarray", change)
    assert what in refusal(folder).what


def read_all(folder):
    stored = open_source(folder)
    with stored.open(stored.steps()[0]) as reader:
        for name, logged in reader.content().arrays["parameter"].items():
            size = min(np.prod(logged.shape, dtype=object), 10_000)
            dtype = np.dtype("uint16" if logged.dtype == "bfloat16" else logged.dtype)
            reader.read("parameter", name, 0, np.zeros(size, dtype))


def test_a_lost_chunk_is_not_read_as_zeros(log):
    folder = log("plain")
    (folder / "0" / "state" / "params.layers.10.weight" / "0.0").unlink()
    with pytest.raises(InputError, match=r"layers\.10/weight"):
        read_all(folder)


@given(
    layout=st.sampled_from(LAYOUTS),
    file=st.integers(0),
    changes=changes(),
    length=LENGTHS,
)
@reads_only
def test_a_corrupt_checkpoint_is_either_read_or_refused(tmp_path, job, layout, file, changes, length):
    folder = tmp_path / layout
    if not folder.exists():
        step = "ckpt_000000" if layout == "plain" else "0"
        shutil.copytree(job / "float32" / layout / step, folder / "0")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path = paths[file % len(paths)]
    whole = path.read_bytes()
    path.write_bytes(damage(whole, changes, length))
    with contextlib.suppress(InputError):
        read_all(folder)
    path.write_bytes(whole)
