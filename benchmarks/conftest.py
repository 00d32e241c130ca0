"""The generated run, and what goes into the JSON beside the times."""

import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.stats import Stats

from benchmarks.works import RATIOS, WORKS, Files

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "dask",
    "distributed",
    "llvmlite",
    "numba",
    "numpy",
    "natgrad-pipeline",
    "safetensors",
    "xarray",
    "zarr",
)
SAMPLING_SECONDS = 0.002


def pytest_addoption(parser):
    parser.addoption("--size", type=float, default=1.0, help="gigabytes of training state, about")
    parser.addoption("--states", type=int, default=10, help="logged states")
    parser.addoption("--rounds", type=int, default=5, help="times that each work is run and timed")


def pytest_generate_tests(metafunc):
    # Of the scope of the session: pytest then runs all works in the first turn, all in the second, and so on. What
    # else happens on the machine meanwhile meets all of them alike.
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("turn", range(metafunc.config.option.rounds), scope="session")


@pytest.fixture(scope="session")
def files(pytestconfig):
    generated = Files(ROOT / "bench" / "data")
    shutil.rmtree(generated.folder, ignore_errors=True)
    try:
        generated.generate(pytestconfig.option.size, pytestconfig.option.states)
        yield generated
    finally:
        shutil.rmtree(generated.folder, ignore_errors=True)


# Processes of their own ---------------------------------------------------------------------------------------


def resident_bytes(process):
    """Bytes of a process and of those that it started; one that has just ended has none."""
    total = 0
    try:
        for member in [process, *process.children(recursive=True)]:
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def memory_of(name, files):
    """Resident bytes of a process that runs a work: before it begins, and at most.

    The peak of a process cannot be set back, so each work has its own. It is sampled: the system's own record of
    the peak of a child begins with the memory of the parent that started it.
    """
    files.clear()
    command = [sys.executable, "-m", "benchmarks.works", str(files.folder), name]
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        before = peak = resident_bytes(process)
        while process.poll() is None:
            peak = max(peak, resident_bytes(process))
            try:
                process.wait(SAMPLING_SECONDS)
            except psutil.TimeoutExpired:
                continue
    assert process.returncode == 0
    return {"memory_before": before, "memory_peak": peak}


@pytest.fixture(scope="session")
def memory(files):
    """Memory of every work, measured before any is timed."""
    return {name: memory_of(name, files) for name in WORKS}


@pytest.fixture(scope="session")
def first_call(files):
    """Seconds of the kernel's first call in a process: compiled, and loaded from the cache which that filled."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(files.folder / "compiled")}

    def seconds():
        command = [sys.executable, "-m", "benchmarks.first_call"]
        return float(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)

    return {"compiled": seconds(), "from_cache": seconds()}


# What goes into the JSON --------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]
    machine_info["cores"] = psutil.cpu_count()
    machine_info["memory"] = psutil.virtual_memory().total
    machine_info["packages"] = {name: version(name) for name in PACKAGES}
    machine_info["load_average"] = psutil.getloadavg()


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Take the turns of a work together, and add its rate and the ratios of rates, turn by turn."""
    merged, rates = {}, {}
    for entry in sorted(output_json["benchmarks"], key=lambda entry: entry["extra_info"]["turn"]):
        name = entry["group"]
        kept = merged.setdefault(name, entry)
        rates.setdefault(name, []).append(entry["extra_info"]["bytes"] / 1e9 / entry["stats"]["median"])
        if kept is not entry:
            kept["stats"]["data"] += entry["stats"]["data"]
    for name, entry in merged.items():
        stats = Stats()
        for seconds in entry["stats"]["data"]:
            stats.update(seconds)
        entry["stats"] = {**entry["stats"], **stats.as_dict()}
        del entry["extra_info"]["turn"], entry["params"], entry["param"]
        entry |= {"name": name, "fullname": entry["fullname"].partition("[")[0] + f"[{name}]"}
        entry["extra_info"]["gigabytes_per_second"] = spread(rates[name])
    output_json["benchmarks"] = list(merged.values())
    output_json["ratios"] = [
        {"of": above, "to": below, **spread([a / b for a, b in zip(rates[above], rates[below], strict=True)])}
        for above, below in RATIOS
        if above in rates and below in rates
    ]
    output_json["first_call_seconds"] = config.stash.get(FIRST_CALL, None)


FIRST_CALL = pytest.StashKey[dict[str, float]]()
