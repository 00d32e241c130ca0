"""Unpack the data of a page, and compare them with the results."""

import base64
import itertools
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logs import random_walk, write_log
from natgrad.reporting.page_data import Blob, PageLimits, kinds_of, run_data
from natgrad.reporting.run_results import RunResults
from processing import process


def unpacked(blob, reference):
    """Return an array as the page reads it."""
    content = zlib.decompress(base64.b64decode(blob.compressed()))
    values = np.frombuffer(content, reference["type"], int(np.prod(reference["shape"])), reference["at"])
    if "step" in reference:
        known = reference["low"] + values.astype(float) * reference["step"]
        values = np.where(values == 65535, np.nan, np.where(values == 65534, np.inf, known))
    return values.reshape(reference["shape"])


@given(
    st.lists(st.floats(-1e300, 1e300) | st.sampled_from([np.nan, np.inf, -np.inf]), min_size=1, max_size=40).map(
        np.array
    )
)
def test_codes_are_at_most_half_a_step_off(values):
    blob = Blob()
    reference = blob.add_coded(values)
    found = unpacked(blob, reference)
    finite = np.isfinite(values)
    assert np.array_equal(np.isnan(found), np.isnan(values) | (values == -np.inf))
    assert np.array_equal(found == np.inf, values == np.inf)
    # Half a step, and some roundings of the numbers themselves.
    size = np.abs(values[finite]).max(initial=0.0)
    assert (np.abs(found[finite] / 2 - values[finite] / 2) <= reference["step"] / 4 * 1.01 + 1e-11 * size).all()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tree = process(write_log(folder / "log", random_walk(130, {"a.w": (3,), "a.b": (2,)})), folder / "out")
    return RunResults.of("run", tree)


def packed(run, runs=1, limits=PageLimits()):
    blob = Blob()
    return blob, run_data(run, blob, runs, [{} for _ in kinds_of(run)], limits)


def test_a_short_run_has_every_value_of_every_estimate(results):
    blob, data = packed(results)
    (tensors,) = data["kinds"]
    for descent in data["descents"]:
        angle = results.tensors["angle"].sel(descent=descent, window=1).values.T
        found = unpacked(blob, tensors["values"][f"angle|{descent}|1"]["values"])
        assert found.shape == (1, 2, 129)
        np.testing.assert_allclose(found[0], angle, atol=np.pi / 65533)
        exact = unpacked(blob, data["model"][f"angle|{descent}|1"]["values"])
        np.testing.assert_array_equal(exact[0, 0], results.values("angle", descent, 1).astype(np.float32))


def test_the_size_of_a_page_is_limited_by_bins_and_not_by_steps(results):
    limits = PageLimits(cells=80, model_values=300, least_columns=15)
    blob, data = packed(results, limits=limits)
    (tensors,) = data["kinds"]
    assert set(tensors["values"]) == {f"{name}|gradient|1" for name in ("angle", "condition_number", "status")} | {
        "update_to_weight"
    }
    found = unpacked(blob, tensors["values"]["angle|gradient|1"]["values"])
    assert found.shape == (3, 2, 40)
    edges = tensors["edges"]
    angle = results.tensors["angle"].sel(descent="gradient", window=1).values.T
    for index, (start, stop) in enumerate(itertools.pairwise(edges)):
        assert found[1, :, index] == pytest.approx(np.nanmin(angle[:, start:stop], axis=1), abs=1e-4)
        assert found[2, :, index] == pytest.approx(np.nanmax(angle[:, start:stop], axis=1), abs=1e-4)
    # The first two variables of the model fit as they are; the others have bins.
    assert "edges" not in data["model"]["loss"]
    assert len(data["model"]["condition_number|gradient|1"]["edges"]) - 1 == 15


def test_many_runs_share_the_page(results):
    blob, data = packed(results, runs=PageLimits().cells)
    assert data["kinds"][0]["values"] == {}
    assert data["kinds"][0]["rows"] == ["a.b", "a.w"]
    assert unpacked(blob, data["steps"]).tolist() == list(range(129))
