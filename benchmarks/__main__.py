"""Run the benchmarks, write ``bench/benchmark.json`` and print a table of it."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent


def main(
    size: Annotated[float, typer.Option(help="Gigabytes of training state, about.")] = 1.0,
    states: Annotated[int, typer.Option(help="Logged states; the model has size / states / 8 elements.")] = 10,
    rounds: Annotated[int, typer.Option(help="Times that each work is run and timed.")] = 5,
    only: Annotated[str, typer.Option(help="Works to run, as an expression of pytest -k.")] = "",
) -> None:
    """Measure the throughput of the pipeline beside its limits; it takes four times the size on disk."""
    report = ROOT / "bench" / "benchmark.json"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    arguments = [
        str(ROOT / "benchmarks"),
        f"--rootdir={ROOT}",
        f"--size={size}",
        f"--states={states}",
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
    code = pytest.main([*arguments, *(["-k", only] if only else [])])
    if code:
        sys.exit(int(code))
    show(json.loads(report.read_text()), Console())


def show(report: dict[str, Any], console: Console) -> None:
    """Print rates and memory, the ratios of rates within the run, and the first call of the kernel."""
    works = {entry["name"]: entry for entry in report["benchmarks"]}
    title = {name: entry["extra_info"]["title"] for name, entry in works.items()}
    rates = Table("work", title="rate")
    for heading in ("GB", "GB/s", "min", "max", "peak MB", "idle MB"):
        rates.add_column(heading, justify="right")
    for name, entry in works.items():
        facts = entry["extra_info"]
        rates.add_row(
            title[name],
            f"{facts['bytes'] / 1e9:.2f}",
            *(f"{facts['gigabytes_per_second'][key]:.2f}" for key in ("median", "min", "max")),
            *(f"{facts[key] / 1e6:.0f}" for key in ("memory_peak", "memory_before")),
        )
    ratios = Table("work", "to", title="ratio of rates, turn by turn")
    for heading in ("median", "min", "max"):
        ratios.add_column(heading, justify="right")
    for ratio in report["ratios"]:
        ratios.add_row(
            title[ratio["of"]], title[ratio["to"]], *(f"{ratio[key]:.3g}" for key in ("median", "min", "max"))
        )
    console.print(rates, ratios)
    if call := report["first_call_seconds"]:
        console.print(
            f"first call of the kernel in a process: {call['compiled']:.1f} s where it is compiled, "
            f"{call['from_cache']:.2f} s from the cache"
        )


typer.run(main)
