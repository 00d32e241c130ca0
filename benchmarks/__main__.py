"""Run the benchmarks, write ``bench/benchmark.json``, and print it as tables."""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import psutil
import pytest
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.options import (
    IN_MEMORY,
    LOGGED_SWEEP,
    MANY_LOGS,
    MEMORY_DISK,
    ONE_RUN,
    RUN_BYTES,
    STEP_BYTES,
    TALL_ELEMENTS,
    WIDE_STATES,
    Scale,
)

ROOT = Path(__file__).parent.parent
SPARE_BYTES = 2e9
"""Bytes of disk space to leave free."""


def main(
    size: Annotated[
        float, typer.Option(help="Approximate gigabytes of training state of the main run.")
    ] = Scale.size,
    states: Annotated[
        int, typer.Option(help="Logged states of the main run. The model has size / states / 8 elements.")
    ] = Scale.states,
    sizes: Annotated[
        str,
        typer.Option(help="Sizes of longer runs of the same model in gigabytes: 1,4,16,32 for all, '' for none."),
    ] = ",".join(f"{size:g}" for size in Scale.sizes),
    tall: Annotated[
        float, typer.Option(help="States of the run with 1,000 parameters (full benchmark: 1e6).")
    ] = Scale.tall,
    wide: Annotated[
        float, typer.Option(help="Parameters of the run with 64 states (full benchmark: 1e8).")
    ] = Scale.wide,
    sweep: Annotated[int, typer.Option(help="Runs of the sweep (full benchmark: 2000).")] = Scale.sweep,
    rounds: Annotated[int, typer.Option(help="Number of times that each task is timed.")] = 5,
    only: Annotated[str, typer.Option(help="Tasks to run, as an expression for pytest -k.")] = "",
) -> None:
    """Measure the throughput of the pipeline and its limits. The main run needs four times its size on disk."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    report = ROOT / "bench" / "benchmark.json"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    fitting, skipped, beyond = [], {}, {}
    for wanted in sorted(float(part) for part in sizes.split(",") if part):
        why = missing_space(wanted * 1e9, report.parent)
        if why:
            skipped[f"{wanted:g} GB"] = why
        else:
            fitting.append(wanted)
            beyond[f"{wanted:g} GB"] = beyond_memory(wanted * 1e9)
    needed = {
        "tall": tall * TALL_ELEMENTS * STEP_BYTES,
        "wide": wide * WIDE_STATES * STEP_BYTES,
        # The sweep, and one run with the same states. While each is generated, its log also exists.
        "sweep": (max(2 * sweep, sweep + 2 * min(sweep, ONE_RUN))) * RUN_BYTES,
        # Two runs, each with its log and two ingested copies.
        MANY_LOGS: 6 * min(sweep, LOGGED_SWEEP) * RUN_BYTES,
    }
    skipped |= {name: why for name, bytes_ in needed.items() if (why := missing_space(bytes_, report.parent))}
    beyond |= {name: beyond_memory(needed[name]) for name in ("tall", "wide") if name not in skipped}
    if not Path(MEMORY_DISK).exists() or missing_space(size * 1e9, Path(MEMORY_DISK)):
        skipped[IN_MEMORY] = f"the memory file system ({MEMORY_DISK}) does not have {size:.1f} GB free"
    excluded = [f"not {name}" for name in skipped if name in (*needed, IN_MEMORY)]
    selection = " and ".join([f"({only})"] * bool(only) + excluded)
    arguments = [
        str(ROOT / "benchmarks"),
        f"--rootdir={ROOT}",
        f"--size={size}",
        f"--states={states}",
        "--sizes",
        *map(str, fitting),
        f"--tall={int(tall)}",
        f"--wide={int(wide)}",
        f"--sweep={sweep}",
        f"--rounds={rounds}",
        f"--benchmark-json={report}",
        f"--benchmark-storage={report.parent}",
        "--benchmark-quiet",
        "--timeout=0",
        "--quiet",
        # If a task fails, its timer is unused. Report only the failure.
        "-Wignore::pytest_benchmark.logger.PytestBenchmarkWarning",
        # Another user may run a Dask scheduler on this machine.
        "-Wignore:Port 8787 is already in use:UserWarning",
        "-Wignore:unclosed <socket:ResourceWarning",
        "-pno:cacheprovider",
    ]
    code = pytest.main([*arguments, *(["-k", selection] if selection else [])])
    if code:
        sys.exit(int(code))
    show(json.loads(report.read_text()), console)
    for name, why in skipped.items():
        console.print(f"skipped: {name}, because {why}")
    for name, why in beyond.items():
        if why:
            console.print(f"{name}: {why}")


def missing_space(size: float, folder: Path) -> str:
    """Return a message if this many bytes do not fit on the disk, else an empty string."""
    free = shutil.disk_usage(folder).free
    fits = size + SPARE_BYTES <= free
    return "" if fits else f"{size / 1e9:.1f} GB do not fit on the disk, which has {free / 1e9:.0f} GB free"


def beyond_memory(size: float) -> str:
    """Return a message if this many bytes do not fit into memory: the disk then limits all reads."""
    memory = psutil.virtual_memory().available
    return (
        f"it does not fit into {memory / 1e9:.0f} GB of memory, so the speed of the disk is measured"
        if size > memory
        else ""
    )


def show(report: dict[str, Any], console: Console) -> None:
    """Print rates and memory, ratios of rates, and the fixed cost of a pass."""
    tasks = {entry["name"]: entry for entry in report["benchmarks"]}
    title = {name: entry["extra_info"]["title"] for name, entry in tasks.items()}
    rates = Table(
        "task", title="rate", caption="GB/s of elapsed time; resident MB of all processes and of the largest"
    )
    for heading in ("GB", "GB/s", "min", "max", "ms/run", "idle MB", "peak MB", "largest", "plan"):
        rates.add_column(heading, justify="right")
    for name, entry in tasks.items():
        facts = entry["extra_info"]
        memory = [facts[key] for key in ("memory_before", "memory_peak", "memory_of_a_process")]
        rates.add_row(
            title[name],
            f"{facts['bytes'] / 1e9:.2f}",
            *(f"{facts['gigabytes_per_second'][key]:.2f}" for key in ("median", "min", "max")),
            f"{entry['stats']['median'] * 1e3 / facts['runs']:.1f}" if facts["runs"] > 1 else "",
            *(f"{each / 1e6:.0f}" for each in memory),
            f"{facts['memory_projected'] / 1e6:.0f}" if "memory_projected" in facts else "",
        )
    ratios = Table("task", "to", title="ratio of rates in the same turn", caption="cpu: ratio by processor time")
    for heading in ("median", "min", "max", "cpu"):
        ratios.add_column(heading, justify="right")
    for ratio in report["ratios"]:
        numbers = [*(ratio[key] for key in ("median", "min", "max")), ratio["processor"]["median"]]
        ratios.add_row(title[ratio["of"]], title[ratio["to"]], *(f"{number:.3g}" for number in numbers))
    if tasks:
        console.print(rates, ratios)
    if call := report["first_call_seconds"]:
        console.print(
            f"first call of the kernel in a process: {call['compiled']:.1f} s with compilation, "
            f"{call['from_cache']:.2f} s from the cache"
        )
    if cost := report["fixed_cost"]:
        show_fixed_cost(cost, console)


def show_fixed_cost(cost: dict[str, Any], console: Console) -> None:
    """Print how the time of a tiny run is spent."""
    phases = Table("natgrad process, 25 steps of 17 elements", title="seconds of a new process")
    for heading in ("median", "min", "max"):
        phases.add_column(heading, justify="right")
    processor = {f"processor time: {name}": seconds for name, seconds in cost["processor"].items()}
    rows = {**cost["phases"], "complete command": cost["total"], **processor}
    for name, seconds in rows.items():
        phases.add_row(name, *(f"{seconds[key]:.2f}" for key in ("median", "min", "max")))
    console.print(phases)
    first = cost["first_ever"]
    console.print(
        f"first run after installation, with compilation: {first['seconds']:.1f} s, "
        f"{first['processor_seconds']:.1f} s of processor time"
    )
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in cost["ratios"].items())
    console.print(f"processor time relative to importing the libraries (reference): {ratios}")
    imports = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cost["imports"])
    console.print(f"seconds to import the modules of each package: {imports}")


if __name__ == "__main__":
    typer.run(main)
