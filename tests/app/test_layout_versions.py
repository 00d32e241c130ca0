"""Test stores of another layout version: every command rejects them, and the remedy in the message works."""

import json

import pytest

from logs import random_walk, write_log
from natgrad.app import run
from natgrad.app.describe import describe_run
from natgrad.app.verification import verify_run
from natgrad.schema.errors import InputError
from natgrad.schema.layout import LAYOUT_VERSION
from processing import Serial


@pytest.fixture
def log(tmp_path):
    return write_log(tmp_path / "log", random_walk(6))


@pytest.fixture
def out(tmp_path, log):
    run.ingest_run(log, tmp_path / "out")
    run.analyze_run(tmp_path / "out", Serial())
    return tmp_path / "out"


def change(document, version):
    """Replace the layout version everywhere in a document."""
    for key, value in list(document.items()):
        if isinstance(value, dict):
            change(value, version)
        elif key in ("version", "layout_version") and value == LAYOUT_VERSION:
            document[key] = version
            if version is None:
                del document[key]


def with_version(out, store, version):
    path = out / store / "zarr.json"
    document = json.loads(path.read_text())
    change(document, version)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("version", [LAYOUT_VERSION - 1, None])
def test_an_older_run_is_processed_again_with_overwrite(out, log, version):
    for store in ("trajectory.zarr", "ledger.zarr", "results.zarr"):
        with_version(out, store, version)
    for command in (describe_run, run.analyze_run, lambda out: run.ingest_run(log, out)):
        with pytest.raises(
            InputError, match=rf"the trajectory has .*layout version.*, .* natgrad reads {LAYOUT_VERSION}\n"
        ):
            command(out)
    with pytest.raises(InputError, match="layout version"):
        verify_run(out)
    assert run.ingest_run(log, out, overwrite=True).new_steps == 6
    assert run.analyze_run(out, Serial()).computed_chunks == 1
    assert describe_run(out)["updates"] == 5
    assert verify_run(out) == []


@pytest.mark.parametrize("version", [LAYOUT_VERSION - 1, None, "4"])
def test_older_results_are_refused_until_they_are_computed_again(out, version):
    with_version(out, "results.zarr", version)
    for command in (describe_run, lambda out: run.report_run([out])):
        with pytest.raises(InputError, match="the results have") as refusal:
            command(out)
        assert refusal.value.remedy == "compute them again: natgrad analyze OUT"
    run.analyze_run(out, Serial())
    assert describe_run(out)["updates"] == 5


def test_results_of_a_newer_natgrad_are_refused(out):
    with_version(out, "results.zarr", LAYOUT_VERSION + 1)
    with pytest.raises(InputError, match=f"layout version {LAYOUT_VERSION + 1}") as refusal:
        describe_run(out)
    assert "upgrade" in refusal.value.remedy


def test_a_newer_run_is_kept_for_all_options(out, log):
    with_version(out, "trajectory.zarr", LAYOUT_VERSION + 1)
    before = (out / "trajectory.zarr" / "zarr.json").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(InputError, match=f"layout version {LAYOUT_VERSION + 1}") as refusal:
            run.ingest_run(log, out, overwrite=overwrite)
        assert "upgrade" in refusal.value.remedy
    assert (out / "trajectory.zarr" / "zarr.json").read_bytes() == before
