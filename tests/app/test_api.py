"""Test the public names: they import quickly, no submodule replaces them, and they work on the sample log."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import natgrad
import natgrad_flows
from natgrad.store import open_trajectory

ROOT = Path(__file__).parents[2]
LOG = ROOT / "data" / "linear_system"

NAMES = {
    *(
        "process",
        "ingest",
        "analyze",
        "report",
        "inspect",
        "verify",
        "scan",
        "materialize",
        "slim",
        "compare",
    ),
    *("open_results", "open_trajectory", "open_ledger", "Metric", "InputError", "Unavailable"),
    *("watch", "Recorder", "WatchCallback", "LightningWatch"),
    *("replay", "TorchObjective", "JaxObjective", "causal_lm_loss"),
    "__version__",
}


def test_the_package_exposes_exactly_the_public_names():
    assert set(natgrad.__all__) == set(dir(natgrad)) == NAMES
    assert not NAMES & {module.name for module in pkgutil.iter_modules(natgrad.__path__)}
    with pytest.raises(AttributeError, match="no attribute 'proces'"):
        _ = natgrad.proces


def test_the_import_is_fast_and_loads_no_library():
    code = (
        "import sys, time; before = set(sys.modules); begin = time.process_time(); import natgrad; "
        "print(time.process_time() - begin, *{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert float(seconds) <= 0.15
    assert "natgrad" in loaded
    assert not set(loaded) - set(sys.stdlib_module_names) - {"natgrad"}


MISCONFIGURED = """
import sys
from pathlib import Path
import natgrad

log, processed, file = sys.argv[1], sys.argv[2], Path(sys.argv[3])
out = file.with_name("out")
for call in (lambda: natgrad.process(log, out), lambda: natgrad.open_results(processed)):
    try:
        call()
    except natgrad.InputError as error:
        print(error.what, error.where, out.exists(), sep="|")
file.unlink()  # the remedy
print(len(natgrad.open_results(processed).children))
"""


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    out = tmp_path_factory.mktemp("processed")
    natgrad.process(LOG, out)
    return out


@pytest.mark.parametrize("text", ["distributed: [", "array: 3"])
def test_a_malformed_configuration_of_dask_is_named_and_can_be_corrected(tmp_path, processed, text):
    file = tmp_path / "any.yaml"
    file.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", MISCONFIGURED, LOG, processed, file],
        env=os.environ | {"DASK_CONFIG": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    where = (
        file if text == "distributed: [" else f"a file in {tmp_path}, ~/.config/dask, /etc/dask"
    )  # Dask names none
    refusal = f"a configuration file of Dask is malformed|{where}|False"
    assert done.stdout.splitlines() == [refusal, refusal, "2"]


@pytest.fixture(scope="module")
def every_submodule():
    for package in (natgrad, natgrad_flows):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


@pytest.mark.usefixtures("every_submodule")
def test_every_public_name_works_after_every_submodule_is_imported(tmp_path):
    out, apart = tmp_path / "out", tmp_path / "apart"
    summary = natgrad.process(LOG, str(out), windows=[1, 5], workers=1)
    assert (summary.new_steps, summary.updates) == (41, 40)
    assert natgrad.ingest(str(LOG), apart).steps == 41
    assert natgrad.analyze(apart, windows=(1, 5), workers=1).updates == 40
    assert Path(natgrad.report(apart).report).read_text().startswith("<!")
    assert Path(natgrad.report({"a": apart, "b": out}, tmp_path / "both.html").report) == tmp_path / "both.html"
    assert natgrad.inspect(LOG).steps == 41
    assert natgrad.verify(out).ok
    assert natgrad.scan(LOG.parent, tmp_path / "runs", workers=1).processed == 1
    results = natgrad.open_results(out)
    assert isinstance(results, xr.DataTree)
    xr.testing.assert_equal(results, natgrad.open_results(apart))
    assert natgrad.open_trajectory(out).sizes["step"] == 41
    assert natgrad.open_ledger(out).n_updates == 40
    recorder = natgrad.Recorder(tmp_path / "log")
    recorder.record(0, parameter={"theta": np.ones(2)}, gradient={"theta": np.ones(2)})
    np.testing.assert_allclose(natgrad.Metric(np.array([1.0, 2.0]), np.array([1.0, 1.0])) @ np.ones(2), [1, 2])
    assert issubclass(natgrad.Unavailable, natgrad.InputError)
    assert natgrad.__version__
    with pytest.raises(natgrad.InputError):
        natgrad.open_results(tmp_path / "nothing")


def test_results_carry_the_version_and_the_version_of_the_results(tmp_path):
    natgrad.process(LOG, tmp_path)
    attributes = natgrad.open_results(tmp_path).attrs
    assert attributes["version"] == natgrad.__version__
    assert attributes["results_version"] >= 1


def test_summaries_print_well_and_have_the_keys_of_the_command_line(tmp_path):
    processed = natgrad.process(LOG, tmp_path / "out")
    answers = {
        "process": (processed, "new_steps steps warnings ledger results updates status angle report"),
        "ingest": (natgrad.ingest(LOG, tmp_path / "out"), "source trajectory new_steps steps dtypes replicates"),
        "analyze": (natgrad.analyze(tmp_path / "out"), "ledger results updates chunks projected_memory angle"),
        "report": (natgrad.report(tmp_path / "out"), "report"),
        "inspect": (natgrad.inspect(LOG), "source format steps holds missing notes worker_memory"),
        "verify": (natgrad.verify(tmp_path / "out"), "damages"),
        "scan": (natgrad.scan(LOG, tmp_path / "many"), "processed unchanged skipped failed failures message"),
    }
    for summary, keys in answers.values():
        assert set(keys.split()) <= set(summary.to_json())
        assert json.loads(json.dumps(summary.to_json())) is not None
        assert repr(summary).startswith(type(summary).__name__ + "\n")
        assert "<" in summary._repr_html_()
    assert "new steps" in repr(processed)
    assert str(natgrad.verify(tmp_path / "out")) == "OK: all checksums match\n"


def test_stores_print_well_in_a_notebook(tmp_path):
    summary = natgrad.process(LOG, tmp_path)
    trajectory, ledger = open_trajectory(tmp_path / "trajectory.zarr"), natgrad.open_ledger(tmp_path)
    for store, cells in ((trajectory, ("41", "parameter float64")), (ledger, ("40", "gradient_change"))):
        table = store._repr_html_()
        assert table.startswith(f"<table><caption>{type(store).__name__}</caption>")
        assert all(cell in table for cell in cells)
        assert str(tmp_path) in table
    assert f"<a href='{tmp_path}/report.html'" in summary._repr_html_()


def test_a_summary_in_a_notebook_escapes_what_a_log_contains(tmp_path):
    (tmp_path / "<b>").symlink_to(LOG)
    assert "<b>" not in natgrad.inspect(tmp_path / "<b>")._repr_html_()


def test_progress_is_reported_by_stage(tmp_path):
    calls = []
    natgrad.process(LOG, tmp_path, progress=lambda stage, done, total: calls.append((stage, done, total)))
    assert ("ingest", 41, 41) in calls
    assert ("analyze", 1, 1) in calls


def test_no_text_uses_the_old_package_names():
    # A logger with a different name would hide every INFO line; a template or an entry point would not be found.
    older = re.compile(r"(?<![\w./-])(pipeline|flows)\.[a-z_]+|getLogger\(.(pipeline|flows)\b")
    for folder in ("pipeline", "flows"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".html", ".toml"):
                assert not older.search(path.read_text()), path
