"""Measure the fixed cost of commands on a tiny run in new processes, and the time of each phase of ``process``.

    python -m benchmarks.fixed_cost LOG OUT

processes a log phase by phase and prints the seconds of each phase as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

if __name__ == "__main__":
    _BEGAN = time.perf_counter()

ROOT = Path(__file__).parent.parent
TURNS = 3
REFERENCE = "import numpy, zarr, numba, pandas, xarray"
"""Program whose processor time the others are compared with: other load affects both equally."""

_SHOWN = 8


# In a new process: the imports above are fast, so that the phases include all slow imports --------------------


def phases(log: Path, out: Path) -> dict[str, float]:
    """Process a log and return the seconds of each phase, which add up to the time of the process."""
    import psutil

    found: dict[str, float] = {}

    @contextmanager
    def phase(name: str) -> Any:
        begin = time.perf_counter()
        yield
        found[name] = time.perf_counter() - begin

    found["interpreter"] = time.time() - psutil.Process().create_time() - (time.perf_counter() - _BEGAN)
    with phase("import: command line"):
        import natgrad_flows.cli  # noqa: F401
    with phase("import: stores, kernel, results"):
        from natgrad.app import run
        from natgrad.compute import ledger_pass as compute
    with phase("ingest"):
        run.ingest_run(log, out)
    with phase("first call of the kernel"):
        from benchmarks.first_call import seconds_of_a_call

        seconds_of_a_call()
    options = run.Analysis()
    folder = run.RunFolder.of(out)
    with phase("pass, and the cluster if one is started"):
        compute.compute_ledger(
            folder.trajectory, folder.ledger, executor=options.executor(), memory_limit=options.memory_limit
        )
    with phase("results"):
        run.analyze_run(out, options)
    with phase("import: drawing"):
        from natgrad.reporting import page as report  # noqa: F401
    with phase("report"):
        run.report_run([out])
    return found


# In the process of the benchmarks -----------------------------------------------------------------------------


def write_tiny_log(folder: Path) -> None:
    """Write 25 steps of a model with 17 elements."""
    import numpy as np
    import safetensors.numpy

    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for step in range(25):
        state = {"loss": np.asarray(1.0 / (step + 1)), "learning_rate": np.asarray(0.01)}
        for name, shape in {"weight": (4, 3), "bias": (4,), "scale": (1,)}.items():
            state |= {f"{array}/{name}": generator.standard_normal(shape) for array in ("parameter", "gradient")}
        safetensors.numpy.save_file(state, folder / f"step_{step}.safetensors")


def seconds_of(command: list[str], environment: dict[str, str]) -> tuple[float, float, str]:
    """Return the elapsed time and the processor time of a command in seconds, and its standard output."""
    begin, before = time.perf_counter(), os.times()
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - begin, used, output


def imported(code: str) -> list[tuple[str, float]]:
    """Return the packages whose own modules take the longest to import, with the seconds."""
    command = [sys.executable, "-X", "importtime", "-c", code]
    timings = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stderr
    seconds: Counter[str] = Counter()
    for line in timings.splitlines():
        own, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
        if own.isdigit():
            seconds[name.partition(".")[0]] += int(own) / 1e6
    return seconds.most_common(_SHOWN)


def fixed_cost_of(folder: Path) -> dict[str, Any]:
    """Measure commands on a tiny log in new processes, with compilation and with a cached kernel."""
    log = folder / "log"
    write_tiny_log(log)
    natgrad = [sys.executable, "-c", "from natgrad_flows.cli import program; program()"]
    process = [*natgrad, "process", str(log), "--quiet"]
    compiled = os.environ | {"NUMBA_CACHE_DIR": str(folder / "compiled")}
    first = seconds_of([*process, str(folder / "first")], compiled)
    totals, parts = [], []
    processor: dict[str, list[float]] = {"reference": [], "process": [], "info": [], "--help": []}
    for turn in range(TURNS):
        processor["reference"].append(seconds_of([sys.executable, "-c", REFERENCE], compiled)[1])
        wall, used, _ = seconds_of([*process, str(folder / f"out_{turn}")], compiled)
        totals.append(wall)
        processor["process"].append(used)
        processor["info"].append(seconds_of([*natgrad, "info", str(folder / "first")], compiled)[1])
        processor["--help"].append(seconds_of([*natgrad, "--help"], compiled)[1])
        command = [sys.executable, "-m", "benchmarks.fixed_cost", str(log), str(folder / f"phases_{turn}")]
        parts.append(json.loads(seconds_of(command, compiled)[2]))
    return {
        "first_ever": {"seconds": first[0], "processor_seconds": first[1]},
        "total": {"median": median(totals), "min": min(totals), "max": max(totals)},
        "processor": {
            name: {"median": median(used), "min": min(used), "max": max(used)} for name, used in processor.items()
        },
        "ratios": {
            name: median(own / of for own, of in zip(used, processor["reference"], strict=True))
            for name, used in processor.items()
            if name != "reference"
        },
        "phases": {
            name: {
                "median": median(part[name] for part in parts),
                "min": min(part[name] for part in parts),
                "max": max(part[name] for part in parts),
            }
            for name in parts[0]
        },
        "imports": imported("import natgrad_flows.cli, natgrad.app.run, natgrad.reporting.page"),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(phases(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
