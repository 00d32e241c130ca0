"""Generate the runs, and add rates, ratios and memory use to the JSON report."""

import os
import statistics
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from pytest_benchmark.stats import Stats

from benchmarks.fixed_cost import fixed_cost_of
from benchmarks.options import Scale
from benchmarks.runs import Runs
from benchmarks.tasks import groups

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
    default = Scale()
    parser.addoption("--size", type=float, default=default.size, help="approximate gigabytes of training state")
    parser.addoption("--states", type=int, default=default.states, help="logged states")
    parser.addoption("--sizes", type=float, nargs="*", default=default.sizes, help="gigabytes of longer runs")
    parser.addoption("--tall", type=int, default=default.tall, help="states of the run with 1,000 parameters")
    parser.addoption("--wide", type=int, default=default.wide, help="parameters of the run with 64 states")
    parser.addoption("--sweep", type=int, default=default.sweep, help="runs of the sweep")
    parser.addoption("--rounds", type=int, default=5, help="number of times that each task is timed")


def pytest_generate_tests(metafunc):
    # All tasks of a group run in the first turn, then all in the second turn, and so on, so that other load on the
    # machine affects them equally. Groups run one after another, because each has its own runs on disk.
    if "turn" in metafunc.fixturenames:
        option = metafunc.config.option
        tasks = [
            (group, name, turn)
            for group, members in groups(option.sizes).items()
            for turn in range(option.rounds)
            for name in members.tasks
        ]
        metafunc.parametrize(("group", "name", "turn"), tasks, ids=[f"{g}/{n}-{turn}" for g, n, turn in tasks])


@pytest.fixture(scope="session")
def runs(pytestconfig):
    option = pytestconfig.option
    generated = Runs(
        ROOT / "bench" / "data",
        Scale(option.size, option.states, tuple(option.sizes), option.tall, option.wide, option.sweep),
    )
    try:
        yield generated
    finally:
        generated.clear()


# Separate processes -------------------------------------------------------------------------------------------


def resident_bytes(process):
    """Return the resident bytes of a process and of each of its children, without processes that have ended."""
    found = []
    try:
        for member in [process, *process.children(recursive=True)]:
            found.append(member.memory_info().rss)
    except psutil.NoSuchProcess:
        pass
    return found or [0]


def processor_seconds():
    """Return the processor time in seconds of this process and its children."""
    own = psutil.Process()
    started = sum(sum(member.cpu_times()[:2]) for member in own.children(recursive=True))
    return time.process_time() + started + sum(own.cpu_times()[2:4])


def memory_of(name, files):
    """Measure the resident bytes of a process that runs a task: initial bytes, peak, and peak of one process.

    The peak of a process cannot be reset, so each task has its own process. The peak is sampled, because the peak
    that the system records for a child process starts at the memory of its parent.
    """
    files.clear()
    command = [sys.executable, "-m", "benchmarks.tasks", str(files.folder), name]
    with psutil.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        found = resident_bytes(process)
        before, peak, largest = sum(found), sum(found), max(found)
        while process.poll() is None:
            found = resident_bytes(process)
            peak, largest = max(peak, sum(found)), max(largest, *found)
            try:
                process.wait(SAMPLING_SECONDS)
            except psutil.TimeoutExpired:
                continue
    assert process.returncode == 0
    return {"memory_before": before, "memory_peak": peak, "memory_of_a_process": largest}


@pytest.fixture(scope="session")
def memory():
    """Function that measures the memory of a task once, before it is timed."""
    return cache(memory_of)


@pytest.fixture(scope="session")
def fixed_cost(runs):
    """Times of the phases of the full command on a tiny run."""
    return fixed_cost_of(runs.folder / "tiny")


@pytest.fixture(scope="session")
def first_call(runs):
    """Seconds of the first call of the kernel in a process: with compilation, and from the cache."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(runs.folder / "compiled")}

    def seconds():
        command = [sys.executable, "-m", "benchmarks.first_call"]
        return float(subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True).stdout)

    return {"compiled": seconds(), "from_cache": seconds()}


# JSON report --------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config, machine_info):
    del machine_info["node"]
    machine_info["cores"] = psutil.cpu_count()
    machine_info["memory"] = psutil.virtual_memory().total
    machine_info["packages"] = {name: version(name) for name in PACKAGES}
    machine_info["load_average"] = psutil.getloadavg()


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Merge the turns of each task, and add rates and ratios of rates in the same turn."""
    merged, rates, used = {}, {}, {}
    for entry in sorted(output_json["benchmarks"], key=lambda entry: entry["extra_info"]["turn"]):
        name, facts = entry["group"], entry["extra_info"]
        kept = merged.setdefault(name, entry)
        rates.setdefault(name, []).append(facts["bytes"] / 1e9 / entry["stats"]["median"])
        used.setdefault(name, []).append(facts["bytes"] / 1e9 / facts.pop("processor_seconds"))
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
        entry["extra_info"]["gigabytes_per_processor_second"] = spread(used[name])
    output_json["benchmarks"] = list(merged.values())
    output_json["ratios"] = [
        {"of": f"{group}/{above}", "to": f"{group}/{below}", **compared(rates, used, group, above, below)}
        for group, members in groups(config.option.sizes).items()
        for above, below in members.ratios
        if f"{group}/{above}" in rates and f"{group}/{below}" in rates
    ]
    output_json["first_call_seconds"] = config.stash.get(FIRST_CALL, None)
    output_json["fixed_cost"] = config.stash.get(FIXED_COST, None)


def compared(rates, used, group, above, below):
    """Return the spread of the ratios of rates in the same turn, by elapsed time and by processor time."""
    by_clock, by_work = (
        spread([a / b for a, b in zip(found[f"{group}/{above}"], found[f"{group}/{below}"], strict=True)])
        for found in (rates, used)
    )
    return {**by_clock, "processor": by_work}


FIRST_CALL = pytest.StashKey[dict[str, float]]()
FIXED_COST = pytest.StashKey[dict[str, object]]()
