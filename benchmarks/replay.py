"""Measure what a replay takes in addition to the evaluations, how it scales, and what a recovery takes.

    python -m benchmarks.replay

writes checkpoints of a transformer of 10 million parameters, and evaluates its loss at each of them with one
thread: in a bare loop that loads a checkpoint and runs the forward and backward passes, in the same process by the
code of a worker, and as ``natgrad replay`` with one and with two workers, whose start is not counted. The
checkpoints with the states of their optimizer are then ingested without gradients, and with gradients that are
recovered from these states.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import natgrad
from benchmarks.recording import WORDS, Transformer
from natgrad.compute.executors import Executor, processes, serial
from natgrad.objectives.evaluation import Curvature
from natgrad.objectives.replay import LogOptions, evaluate_log
from natgrad.sources.replayed import Replays
from natgrad.storage import LocalStorage

LIMITS = {"overhead": 0.05, "speed-up of two workers": 1.8}
"""Largest share of the time of the bare loop, and smallest ratio of times, that are promised."""

TOKENS, SEQUENCES = 256, 4


def factory() -> natgrad.TorchObjective:
    """Return the objective that workers evaluate."""
    torch.manual_seed(0)
    tokens = torch.randint(0, WORDS, (SEQUENCES, TOKENS))
    return natgrad.TorchObjective(Transformer(), natgrad.causal_lm_loss, [tokens])


def write_checkpoints(folder: Path, states: int) -> None:
    """Train for some steps, and save the model and the optimizer before each."""
    folder.mkdir()
    torch.manual_seed(1)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(states):
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"step-{step}.pt")
        optimizer.zero_grad()
        natgrad.causal_lm_loss(model, torch.randint(0, WORDS, (1, TOKENS))).mean().backward()
        optimizer.step()


def bare_loop(folder: Path, states: int) -> None:
    """Load each checkpoint, and run the forward and backward passes."""
    torch.manual_seed(0)
    tokens, model = torch.randint(0, WORDS, (SEQUENCES, TOKENS)), Transformer().eval()
    for step in range(states):
        model.load_state_dict(torch.load(folder / f"step-{step}.pt", mmap=True)["model"])
        model.zero_grad()
        natgrad.causal_lm_loss(model, tokens).mean().backward()


def replay(folder: Path, out: Path, executor: Executor, workers: int) -> None:
    """Evaluate the objective at each checkpoint, as ``natgrad replay`` does."""
    shutil.rmtree(out, ignore_errors=True)
    (out / "replay").mkdir(parents=True)
    evaluate_log(
        LogOptions((LocalStorage(folder.absolute()),), None, {}, {}, "", False),
        Replays(LocalStorage((out / "replay").absolute())),
        executor,
        objective="benchmarks.replay:factory",
        folder=str(Path.cwd()),
        curvature=Curvature(),
        workers=workers,
    )


def seconds(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Return the wall time of a call."""
    start = time.perf_counter()
    function(*arguments, **options)
    return time.perf_counter() - start


def seconds_of_update(out: Path, workers: int) -> float:
    """Return the wall time for each update, from the first one of each worker on."""
    times = sorted(path.stat().st_mtime for path in (out / "replay").glob("update_*"))
    return (times[-1] - times[workers - 1]) / (len(times) - workers)


def measured(folder: Path, states: int) -> dict[str, float]:
    """Return the wall times of all tasks, in seconds."""
    log, out = folder / "log", folder / "out"
    write_checkpoints(log, states)
    bare_loop(log, 1)
    replay(log, out, serial, 1)  # loads the compiler
    # The probe evaluates one state twice.
    found = {"bare loop": seconds(bare_loop, log, states) * (states + 1) / states}
    found["worker in this process"] = seconds(replay, log, out, serial, 1)
    for workers in (1, 2):
        replay(log, out, processes(workers, 1), workers)
        found[f"update with {workers} workers"] = seconds_of_update(out, workers)
    for name, options in {"ingest": {}, "recover": {"gradient": "from-optimizer"}}.items():
        shutil.rmtree(out, ignore_errors=True)
        found[name] = seconds(natgrad.ingest, log, out, **options)
    return found


def main() -> None:
    """Print the times and the ratios that are promised."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", type=int, default=24, help="Checkpoints; each takes 120 MB of disk.")
    parser.add_argument("--folder", type=Path, help="Folder for the checkpoints. Default: a temporary one.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measured(Path(folder), arguments.states)
    ratios = {
        "overhead": found["worker in this process"] / found["bare loop"] - 1.0,
        "speed-up of two workers": found["update with 1 workers"] / found["update with 2 workers"],
        "recovery to ingest": found["recover"] / found["ingest"],
    }
    print(json.dumps({"seconds": found, "ratios": ratios, "limits": LIMITS}, indent=1))


if __name__ == "__main__":
    main()
