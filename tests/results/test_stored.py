"""Test the stored summary of results, and what happens when it is damaged."""

import shutil

import numpy as np
import pytest
from test_dataset import table_of, walk

from logs import random_walk, write_log
from natgrad.app.describe import describe_run
from natgrad.app.verification import verify_run
from natgrad.results import dataset, stored
from natgrad.results.summary import overview
from natgrad.schema.errors import InputError
from natgrad.store import open_store
from processing import process
from torture import WAYS


@pytest.fixture
def results(tmp_path):
    """Return the storage of results and their tree."""
    tree, storage = dataset.label(table_of(walk())), open_store(tmp_path / "results.zarr")
    dataset.write(tree, storage, overview(tree))
    return storage, tree


def test_the_summary_of_stored_results_is_that_of_the_tree(results):
    storage, tree = results
    assert stored.exist(storage)
    assert stored.read_summary(storage) == overview(tree) == overview(dataset.read(storage))


def test_there_is_no_summary_without_results(tmp_path):
    storage = open_store(tmp_path / "results.zarr")
    assert not stored.exist(storage)
    with pytest.raises(dataset.Damaged, match=r"summary\.json"):
        stored.read_summary(storage)


def test_a_damaged_summary_is_computed_from_the_results(tmp_path, caplog):
    run = tmp_path / "run"
    process(write_log(tmp_path / "log", random_walk(4)), run)
    expected = describe_run(run)
    assert expected["updates"] == 3
    for way, damage in WAYS.items():
        out = shutil.copytree(run, tmp_path / way / "run")
        path = out / "results.zarr" / "summary.json"
        content = damage(path.read_bytes(), np.random.default_rng(0))
        path.unlink() if content is None else path.write_bytes(content)
        caplog.clear()
        found = describe_run(out)
        assert {name: found[name] for name in ("updates", "status", "angle", "condition_number")} == {
            name: expected[name] for name in ("updates", "status", "angle", "condition_number")
        }
        assert "the summary is computed from the results" in caplog.text
        assert [damage.path for damage in verify_run(out)] == [str(path)]
        # If the results are damaged as well, there is nothing to compute it from.
        (out / "results.zarr" / "model" / "angle" / "c.0.0.0").unlink()
        with pytest.raises(InputError, match=r"model/angle/c\.0\.0\.0"):
            describe_run(out)
