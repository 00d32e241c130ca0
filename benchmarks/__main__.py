"""Run the benchmarks, write ``bench/benchmark.json`` and print tables of it."""

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
"""Disk that is left free."""


def main(
    size: Annotated[float, typer.Option(help="Gigabytes of training state of the main run, about.")] = Scale.size,
    states: Annotated[
        int, typer.Option(help="Its logged states; the model has size / states / 8 elements.")
    ] = Scale.states,
    sizes: Annotated[
        str, typer.Option(help="Gigabytes of longer runs of that model: 1,4,16,32 for all, '' for none.")
    ] = ",".join(f"{size:g}" for size in Scale.sizes),
    tall: Annotated[float, typer.Option(help="States of the run of 1,000 parameters: 1e6 in full.")] = Scale.tall,
    wide: Annotated[float, typer.Option(help="Parameters of the run of 64 states: 1e8 in full.")] = Scale.wide,
    sweep: Annotated[int, typer.Option(help="Runs of the sweep: 2000 in full.")] = Scale.sweep,
    rounds: Annotated[int, typer.Option(help="Times that each work is run and timed.")] = 5,
    only: Annotated[str, typer.Option(help="Works to run, as an expression of pytest -k.")] = "",
) -> None:
    """Measure the throughput of the pipeline beside its limits; the main run takes four times its size on disk."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    report = ROOT / "bench" / "benchmark.json"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    fitting, left_out, beyond = [], {}, {}
    for wanted in sorted(float(part) for part in sizes.split(",") if part):
        why = short_of(wanted * 1e9, report.parent)
        if why:
            left_out[f"{wanted:g} GB"] = why
        else:
            fitting.append(wanted)
            beyond[f"{wanted:g} GB"] = beyond_memory(wanted * 1e9)
    needed = {
        "tall": tall * TALL_ELEMENTS * STEP_BYTES,
        "wide": wide * WIDE_STATES * STEP_BYTES,
        # A run of these states, and one by itself, each with its log while it is made.
        "sweep": (max(2 * sweep, sweep + 2 * min(sweep, ONE_RUN))) * RUN_BYTES,
        # Two runs, each with its log and what ingest writes again.
        MANY_LOGS: 6 * min(sweep, LOGGED_SWEEP) * RUN_BYTES,
    }
    left_out |= {name: why for name, bytes_ in needed.items() if (why := short_of(bytes_, report.parent))}
    beyond |= {name: beyond_memory(needed[name]) for name in ("tall", "wide") if name not in left_out}
    if not Path(MEMORY_DISK).exists() or short_of(size * 1e9, Path(MEMORY_DISK)):
        left_out[IN_MEMORY] = f"no {size:.1f} GB of a file system in memory, {MEMORY_DISK}"
    works_left_out = [f"not {name}" for name in left_out if name in (*needed, IN_MEMORY)]
    wanted_works = " and ".join([f"({only})"] * bool(only) + works_left_out)
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
        # A work that fails leaves its timer unused: the failure is what should be read.
        "-Wignore::pytest_benchmark.logger.PytestBenchmarkWarning",
        # A Dask scheduler of someone else's on this machine is no error.
        "-Wignore:Port 8787 is already in use:UserWarning",
        "-Wignore:unclosed <socket:ResourceWarning",
        "-pno:cacheprovider",
    ]
    code = pytest.main([*arguments, *(["-k", wanted_works] if wanted_works else [])])
    if code:
        sys.exit(int(code))
    show(json.loads(report.read_text()), console)
    for name, why in left_out.items():
        console.print(f"left out: {name}, {why}")
    for name, why in beyond.items():
        if why:
            console.print(f"{name}: {why}")


def short_of(size: float, folder: Path) -> str:
    """Say whether so many bytes are more than the disk has free; empty where they are not."""
    free = shutil.disk_usage(folder).free
    fits = size + SPARE_BYTES <= free
    return "" if fits else f"{size / 1e9:.1f} GB do not fit on the disk, which has {free / 1e9:.0f} GB free"


def beyond_memory(size: float) -> str:
    """Say whether memory cannot keep so many bytes: then the disk is the limit of whatever reads them."""
    memory = psutil.virtual_memory().available
    return f"{memory / 1e9:.0f} GB of memory cannot keep it: the disk is measured" if size > memory else ""


def show(report: dict[str, Any], console: Console) -> None:
    """Print rates and memory, the ratios of rates within the run, and what a pass costs however small it is."""
    works = {entry["name"]: entry for entry in report["benchmarks"]}
    title = {name: entry["extra_info"]["title"] for name, entry in works.items()}
    rates = Table("work", title="rate", caption="GB/s by the clock; MB resident: of all processes, of the largest")
    for heading in ("GB", "GB/s", "min", "max", "ms/run", "idle MB", "peak MB", "largest", "plan"):
        rates.add_column(heading, justify="right")
    for name, entry in works.items():
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
    ratios = Table(
        "work", "to", title="ratio of rates, turn by turn", caption="cpu: by the time that processors worked"
    )
    for heading in ("median", "min", "max", "cpu"):
        ratios.add_column(heading, justify="right")
    for ratio in report["ratios"]:
        numbers = [*(ratio[key] for key in ("median", "min", "max")), ratio["processor"]["median"]]
        ratios.add_row(title[ratio["of"]], title[ratio["to"]], *(f"{number:.3g}" for number in numbers))
    if works:
        console.print(rates, ratios)
    if call := report["first_call_seconds"]:
        console.print(
            f"first call of the kernel in a process: {call['compiled']:.1f} s where it is compiled, "
            f"{call['from_cache']:.2f} s from the cache"
        )
    if cost := report["fixed_cost"]:
        show_fixed_cost(cost, console)


def show_fixed_cost(cost: dict[str, Any], console: Console) -> None:
    """Print where the time of a tiny run goes."""
    phases = Table("natgrad process, 25 steps of 17 elements", title="seconds of a new process")
    for heading in ("median", "min", "max"):
        phases.add_column(heading, justify="right")
    rows = {**cost["phases"], "the command": cost["total"], "  processors worked": cost["processor"]}
    for name, seconds in rows.items():
        phases.add_row(name, *(f"{seconds[key]:.2f}" for key in ("median", "min", "max")))
    console.print(phases)
    first = cost["first_ever"]
    console.print(
        f"the first time ever, the kernel compiled: {first['seconds']:.1f} s, {first['processor_seconds']:.1f} s "
        "of the processors"
    )
    imports = ", ".join(f"{name} {seconds:.2f}" for name, seconds in cost["imports"])
    console.print(f"seconds of importing the modules of: {imports}")


if __name__ == "__main__":
    typer.run(main)
