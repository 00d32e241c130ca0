"""Test the wheel in a new environment without the repository.

The demonstration, the recorder alone, and a folder that contains modules of a user named pipeline and flows. They
are in one file, because the environment and the compiled kernel of its first run are shared.
"""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import xarray as xr

from environments import build, copy_sources, make_environment, required
from natgrad.schema.version import FALLBACK_VERSION


def test_the_demonstration_runs_after_pip_install_and_explains_how_to_get_the_rest(installed, tmp_path):
    done = installed.run("natgrad", "demo", "--workers", 1, cwd=tmp_path)
    assert sum("natgrad-pipeline[experiments]" in line for line in done.stderr.splitlines()) == 1
    runs = sorted(path.name for path in (tmp_path / "demo" / "runs").iterdir())
    assert runs == ["linear-euler", "linear-exponential"]
    for run in runs:
        model = xr.open_datatree(tmp_path / "demo" / "runs" / run / "results.zarr")["model"]
        assert model.sizes["step"] == 300
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "linear-euler" in page
    assert "feedback-alignment" not in page


def test_the_wheel_contains_files_that_are_not_modules(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    page = {
        f"natgrad/reporting/{name}" for name in ("templates/report.html", "assets/report.css", "assets/report.js")
    }
    assert {"natgrad/py.typed", "natgrad_flows/py.typed"} | page <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {
        "natgrad",
        "natgrad_flows",
        "natgrad_pipeline",
    }


# This is what a trainer with torch does: the requirements of the pipeline itself are not installed.
TRAINING = """
import sys
import torch
from natgrad.recording import Recorder

recorder = Recorder("log")
model = torch.nn.Linear(3, 2).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
inputs, labels = torch.randn(8, 3).double(), torch.randn(8, 2).double()
for step in range(5):
    optimizer.zero_grad()
    loss = torch.nn.functional.mse_loss(model(inputs), labels)
    loss.backward()
    tensors = dict(model.named_parameters())
    recorder.record(
        step,
        parameter={name: tensor.detach().numpy() for name, tensor in tensors.items()},
        gradient={name: tensor.grad.numpy() for name, tensor in tensors.items()},
        loss=loss.item(),
        learning_rate=0.05,
    )
    optimizer.step()
for name in ("zarr", "numba", "scipy", "xarray", "prefect", "dask", "typer", "ml_dtypes"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported here, so this proves nothing")
"""


def test_a_trainer_needs_only_the_wheel_numpy_safetensors_and_torch(wheel, tmp_path):
    training = make_environment(tmp_path / "training", wheel, required("numpy", "safetensors", "torch"))
    training.run("python", "-c", TRAINING, cwd=tmp_path)
    process = [sys.executable, "-m", "natgrad_flows.cli", "process", "log", "out", "--workers", "1"]
    subprocess.run(process, cwd=tmp_path, check=True, capture_output=True)
    model = xr.open_datatree(tmp_path / "out" / "results.zarr")["model"].sel(descent="gradient", window=1)
    assert model.sizes["step"] == 4
    # Gradient descent at a constant learning rate: the update is the negative gradient, and the angle is 0.
    assert (model["angle"] < 1e-12).all()
    assert (model["effective"] == 1).all()


def test_the_recorder_imports_only_numpy_safetensors_and_the_standard_library(wheel, tmp_path):
    environment = make_environment(tmp_path / "environment", wheel, required("numpy", "safetensors"))
    code = "import sys, natgrad.recording; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(environment.run("python", "-I", "-c", code, cwd=tmp_path).stdout.split())
    ours = {name for name in loaded - sys.stdlib_module_names if not name.startswith(("_", "__"))}
    assert ours == {"natgrad", "numpy", "safetensors"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Build and unpack a source archive of the work tree."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build(copy_sources(tmp_path_factory.mktemp("source")), "sdist", tmp_path_factory.mktemp("archive"))
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    return unpacked


def test_a_wheel_of_a_source_archive_needs_no_network_and_has_its_version(sdist, tmp_path):
    info = sdist / "PKG-INFO"
    info.write_text(info.read_text().replace(f"Version: {FALLBACK_VERSION}\n", "Version: 7.8.9\n"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", tmp_path, sdist], check=True, capture_output=True)
    (wheel,) = tmp_path.iterdir()
    assert wheel.name == "natgrad_pipeline-7.8.9-py3-none-any.whl"
    environment = make_environment(tmp_path / "environment", wheel, [])
    code = "from natgrad.schema.version import __version__; print(__version__)"
    assert environment.run("python", "-c", code, cwd=tmp_path).stdout == "7.8.9\n"


# A folder with other modules of old names ---------------------------------------------------------------------

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
