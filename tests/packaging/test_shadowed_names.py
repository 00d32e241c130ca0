"""Test the installed package in a folder that contains modules of a user named pipeline and flows."""

import json
from pathlib import Path

import pytest

LOG = Path(__file__).parents[2] / "data" / "linear_system"

SCRIPT = """
import sys
from pathlib import Path

from natgrad.compute.clusters import local_scheduler
from natgrad_flows.runs import process_run

if __name__ == "__main__":
    import natgrad

    # Workers import what they compute, in this folder; the flow has no other.
    with local_scheduler(1) as scheduler:
        summary = process_run(sys.argv[1], "by-flow", workers=1, scheduler=scheduler)
    print(summary["updates"], summary["computed_chunks"], Path(natgrad.__file__).parents[3].parent)
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("pipeline", "flows"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('the user\\'s {name}.py was imported')\n")
    return tmp_path


def test_the_command_works_in_a_folder_with_other_modules_of_the_old_names(installed, folder):
    assert "process" in installed.run("natgrad", "--help", cwd=folder).stdout
    assert installed.run("natgrad", "--version", cwd=folder).stdout.startswith("natgrad ")
    done = installed.run("natgrad", "process", LOG, "out", "--json", cwd=folder)
    assert json.loads(done.stdout)["updates"] == 40
    assert "INFO 40 updates" in done.stderr
    assert (folder / "out" / "report.html").exists()
    python = "import natgrad; print(natgrad.open_results('out')['model'].sizes['step'])"
    assert installed.run("python", "-c", python, cwd=folder).stdout == "40\n"


@pytest.mark.timeout(600)
def test_a_flow_and_its_dask_workers_run_there(installed, folder):
    (folder / "script.py").write_text(SCRIPT)
    quiet = {"PREFECT_HOME": str(folder / ".prefect"), "PREFECT_LOGGING_LEVEL": "ERROR"}
    done = installed.run("python", "script.py", LOG, cwd=folder, environment=quiet)
    assert done.stdout.split() == ["40", "1", str(installed.bin.parent)]
