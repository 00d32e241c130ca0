"""Time complete commands against a short torch script, and measure their peak memory and the bytes that they write.

    python -m benchmarks.commands [--only gpt2] [--scale 1.0] [--rounds 3]

Every command is a new process with a warm page cache. In each round, all commands of a log run one after another,
and their ratios are taken within the round, so that other load on the machine affects them equally. The tables show
medians of the rounds. `benchmarks.torch_script` is what a user would write instead.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
_POOL = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
_SPARE = 3e9
"""Bytes of disk space and of memory that stay free."""


# Logs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """A log of safetensors files.

    Attributes
    ----------
    title : str
    states : int
    shapes : mapping
        Shape by tensor.
    in_place, copied : float
        Goals: how many times faster than the script the command is.
    """

    title: str
    states: int
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)
    in_place: float
    copied: float | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the parameters and gradients of a state, float32."""
        return 8 * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def write(self, folder: Path, numbers: range) -> None:
        """Write the files of steps: noisy gradient descent, with slices of one pool of random numbers."""
        header: dict[str, Any] = {}
        offset = 0
        for array in ("gradient", "parameter"):
            for name, shape in self.shapes.items():
                stop = offset + 4 * int(np.prod(shape))
                header[f"{array}/{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, stop]}
                offset = stop
        for name in ("learning_rate", "loss"):
            header[name] = {"dtype": "F32", "shape": [], "data_offsets": [offset, offset + 4]}
            offset += 4
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        elements = self.state_bytes // 8
        for number in numbers:
            noise = np.resize(np.roll(_POOL, 7919 * number), elements)
            parameter = np.resize(_POOL, elements) * np.float32(0.99**number) + noise / 100
            with (folder / f"step_{number}.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.write((parameter + noise / 8).tobytes() + parameter.tobytes())
                file.write(np.array([0.01, 1 / (number + 1)], "<f4").tobytes())


def _gpt2() -> dict[str, tuple[int, ...]]:
    """Return the shapes of the 148 tensors of GPT-2 with 124 million parameters."""
    layer = {
        **{f"{name}.{kind}": (768,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")},
        **{"attn.c_attn.weight": (768, 2304), "attn.c_attn.bias": (2304,)},
        **{"attn.c_proj.weight": (768, 768), "attn.c_proj.bias": (768,)},
        **{"mlp.c_fc.weight": (768, 3072), "mlp.c_fc.bias": (3072,)},
        **{"mlp.c_proj.weight": (3072, 768), "mlp.c_proj.bias": (768,)},
    }
    found: dict[str, tuple[int, ...]] = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    found |= {f"h.{index}.{name}": shape for index in range(12) for name, shape in layer.items()}
    return found | {"ln_f.weight": (768,), "ln_f.bias": (768,)}


def logs(scale: float) -> dict[str, Log]:
    """Return the measured logs; ``scale`` multiplies their numbers of states."""
    medium = {f"{k}.{name}": shape for k in range(25) for name, shape in (("w", (316, 316)), ("b", (316,)))}
    small = {f"layer.{k}.weight": (10, 10) for k in range(300)}
    return {
        "gpt2": Log("GPT-2, 124M parameters", max(3, round(10 * scale)), _gpt2(), 5, 1),
        "medium": Log("2.5M parameters", max(3, round(200 * scale)), medium, 2),
        "small": Log("300 tensors of 100 elements", max(3, round(10_000 * scale)), small, 8),
    }


# Processes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Time and processor time in seconds, peak bytes of memory, bytes of all files in OUT, and the summary."""

    seconds: float
    processor: float
    memory: int
    written: int = 0
    summary: Mapping[str, Any] = field(default_factory=dict)


def measure(command: list[str], out: Path | None = None) -> Measured:
    """Run a process to its end. Its peak memory is that of the largest process, as the system reports it."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    took = time.perf_counter() - begin
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exits with {process.returncode}")
    written = 0 if out is None else sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    processor = usage.ru_utime + usage.ru_stime
    return Measured(took, processor, usage.ru_maxrss * 1024, written, json.loads(answer) if answer else {})


def natgrad(command: str, *words: object, out: Path) -> Measured:
    """Run a command of natgrad."""
    program = Path(sys.executable).parent / "natgrad"
    return measure([str(program), command, *map(str, words), "--json"], out)


# Rounds -------------------------------------------------------------------------------------------------------


def round_of(log: Log, folder: Path, copies: bool) -> Iterator[tuple[str, Measured]]:
    """Run all commands of a log once, and yield their names and measurements."""
    source = folder / "log"

    def fresh(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        return folder / name

    script = [sys.executable, "-m", "benchmarks.torch_script", str(source), str(folder / "script.json")]
    yield "script", measure(script)
    yield "process --in-place", natgrad("process", source, out := fresh("placed"), "--in-place", out=out)
    if copies:
        yield "process", natgrad("process", source, out := fresh("copied"), out=out)
    # The same in parts: memory, the pass, and new steps.
    grown = max(1, log.states // 10)
    later = [source / f"step_{number}.safetensors" for number in range(log.states - grown, log.states)]
    aside = folder / "aside"
    aside.mkdir(exist_ok=True)
    for file in later:
        file.rename(aside / file.name)
    try:
        out = fresh("parts")
        yield "ingest --in-place", natgrad("ingest", source, out, "--in-place", out=out)
        yield "analyze in place", natgrad("analyze", out, out=out)
    finally:
        for file in later:
            (aside / file.name).rename(file)
    yield "process, grown by a tenth", natgrad("process", source, out, out=out)
    yield "report", natgrad("report", out, out=out)
    yield "verify in place", natgrad("verify", out, out=out)
    if copies:
        for name in ("placed", "copied"):
            shutil.rmtree(folder / name / "ledger.zarr")
            shutil.rmtree(folder / name / "results.zarr")
        # Both compare the same checksums.
        yield "analyze of copies", natgrad("analyze", folder / "copied", out=folder / "copied")
        yield "analyze again in place", natgrad("analyze", folder / "placed", out=folder / "placed")


def warm_up(folder: Path) -> None:
    """Fill the caches of compiled code."""
    log = Log("", 3, {"a": (5,)}, 0)
    (folder / "log").mkdir(parents=True)
    log.write(folder / "log", range(log.states))
    for _ in round_of(log, folder, copies=True):
        pass


def available(log: Log, folder: Path) -> tuple[int, bool]:
    """Return how many states fit into the page cache, and whether a copy of them also fits on the disk."""
    memory, disk = psutil.virtual_memory().available - _SPARE, shutil.disk_usage(folder).free - _SPARE
    states = min(log.states, int(min(memory / 2, disk) / log.state_bytes))
    return states, disk > 2 * states * log.state_bytes


def main(
    only: Annotated[str, typer.Option(help="Names of logs, separated by commas: gpt2, medium, small.")] = "",
    scale: Annotated[float, typer.Option(help="Multiplies the numbers of states: 1 for 10, 200 and 10,000.")] = 1,
    rounds: Annotated[int, typer.Option(help="Number of times that each command is timed.")] = 3,
) -> None:
    """Measure the commands and print the tables."""
    console = Console(width=None if Console().is_terminal else 120)
    chosen = only.split(",") if only else list(logs(1))
    for name in chosen:
        log = logs(scale)[name]
        folder = ROOT / "bench" / "commands"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "log").mkdir(parents=True)
        try:
            states, copies = available(log, folder)
            if states < log.states:
                console.print(f"{log.title}: only {states} of {log.states} states fit into memory")
                log = Log(log.title, states, log.shapes, log.in_place, log.copied)
            # The system reports the peak memory of this process for its children if theirs is smaller.
            with ProcessPoolExecutor(1) as pool:
                pool.submit(log.write, folder / "log", range(log.states)).result()
                pool.submit(warm_up, folder / "warm_up").result()
            found: dict[str, list[Measured]] = {}
            for _ in range(rounds):
                for command, measured in round_of(log, folder, copies):
                    found.setdefault(command, []).append(measured)
            show(console, log, found)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def show(console: Console, log: Log, found: Mapping[str, list[Measured]]) -> None:
    """Print times and memory, and ratios with their goals."""
    size = log.states * log.state_bytes
    table = Table(title=f"{log.states} states, {log.title}: {size / 1e9:.2g} GB")
    for column in ("command", "seconds", "processor", "peak memory", "projected", "written / log"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for command, each in found.items():
        projected = each[0].summary.get("projected_memory")
        table.add_row(
            command,
            f"{statistics.median(one.seconds for one in each):.2f}",
            f"{statistics.median(one.processor for one in each):.2f}",
            f"{max(one.memory for one in each) / 1e6:.0f} MB",
            f"{projected / 1e6:.0f} MB" if projected else "",
            f"{each[0].written / size:.3%}" if each[0].written else "",
        )
    console.print(table)

    def compared(first: str, second: str, goal: str) -> None:
        pairs = list(zip(found.get(first, []), found.get(second, []), strict=True))
        if pairs:
            times, processor = (
                [getattr(one, name) / getattr(other, name) for one, other in pairs]
                for name in ("seconds", "processor")
            )
            extent = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            table.add_row(first, second, extent, f"{statistics.median(processor):.2f}", goal)

    table = Table("time of", "divided by that of", "time", "processor", "goal")
    compared("script", "process --in-place", f">= {log.in_place:g}")
    compared("script", "process", f">= {log.copied:g}" if log.copied else "")
    compared("analyze of copies", "analyze again in place", ">= 0.9")
    compared("process, grown by a tenth", "process --in-place", "start-up + 0.1")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
