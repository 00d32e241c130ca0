"""Compare the reported contents of a log and the projected cost of processing with the actual ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from logs import TENSORS, random_walk, write_log, write_step
from natgrad.app.folder import RunFolder
from natgrad.app.inspection import NEEDED_FOR, inspect_source
from natgrad.app.run import analyze_run, ingest_run
from natgrad.schema.errors import InputError
from natgrad.schema.names import REPLICATE_LOSS, REPLICATE_PARAMETER, REPLICATE_STATES, SCALARS, STATES


def chunk_bytes(store, *arrays):
    return sum(path.stat().st_size for name in arrays for path in (store / name / "c").rglob("*") if path.is_file())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspection_agrees_with_ingest_and_projected_sizes_with_written_sizes(tmp_path, dtype):
    log = write_log(tmp_path / "log", random_walk(70, dtype=dtype))
    found = inspect_source([log])
    summary = ingest_run(log, tmp_path / "out")
    analyzed = analyze_run(tmp_path / "out")
    assert found.format == "steps"
    for name in ("source", "steps", "first_step", "last_step", "tensors", "elements", "dtypes"):
        assert getattr(found, name) == getattr(summary, name), name
    assert found.holds["parameter"] == f"{len(TENSORS)} tensors"
    assert set(found.missing) == {"hvp", REPLICATE_PARAMETER, *SCALARS[2:]}
    assert (found.gaps, found.changes, found.notes, found.unused_keys) == (0, [], [], [])
    assert found.trajectory_bytes == chunk_bytes(
        RunFolder.of(tmp_path / "out").trajectory.local_path, "parameter", "gradient"
    )
    assert found.worker_memory == analyzed.projected_memory
    ledger = RunFolder.of(tmp_path / "out").ledger.local_path
    updates = json.loads((ledger / "gram" / "zarr.json").read_text())["shape"][0]
    per_update = chunk_bytes(ledger, "gram", "residual_ratio") / 128  # updates of a chunk of this run
    assert found.ledger_bytes == updates * per_update


def test_missing_quantities_are_listed_with_their_uses_and_remedies(tmp_path):
    states = random_walk(4)
    for state in states:
        for key in [key for key in state if not key.startswith("parameter/")]:
            del state[key]
    states[3]["loss"] = np.float64(1)
    states[3]["parameter/more"] = np.ones(2)
    states[1]["accuracy"] = np.float64(1)
    log = write_log(tmp_path / "log", states, numbers=[0, 10, 20, 40])
    found = inspect_source([log])
    assert set(found.missing) == {"gradient", "loss", "learning_rate", "hvp", REPLICATE_PARAMETER, *SCALARS[2:]}
    assert "another SOURCE" in found.missing["gradient"]
    assert found.changes == [
        "parameter 'more': none, then float64 [2]",
        "loss: missing at the first step",
    ]
    assert (found.step_span, found.gaps) == (10, 1)
    assert "worker_memory" not in found.to_json()
    assert set(NEEDED_FOR) == {*STATES, *SCALARS, *REPLICATE_STATES, REPLICATE_LOSS}


def test_a_sweep_is_counted_by_runs(tmp_path):
    for name, length in {"a": 3, "b": 5}.items():
        write_log(tmp_path / "sweep" / name, random_walk(length))
    found = inspect_source([tmp_path / "sweep"], sweep=True)
    assert (found.runs, found.steps, found.gaps, found.format) == (2, 8, 0, "steps")
    stacked = {key: np.stack([state[key] for state in random_walk(4)]) for key in random_walk(1)[0]}
    for name in "ab":
        (tmp_path / "stacked" / name).mkdir(parents=True)
        np.savez(tmp_path / "stacked" / name / "run.npz", **stacked)
    found = inspect_source([tmp_path / "stacked"], sweep=True)
    assert (found.runs, found.steps, found.gaps, found.format) == (2, 8, 0, "npz")


def test_a_low_memory_limit_is_reported_and_a_missing_log_is_an_error(tmp_path):
    log = write_log(tmp_path / "log", random_walk(3))
    assert inspect_source([log], memory_limit=1).worker_memory.startswith(
        "exceeds --memory-limit: a worker would need"
    )
    with pytest.raises(InputError, match="no such file or folder"):
        inspect_source([tmp_path / "no"])
    broken = write_step(log, 2, {"parameter/theta": np.ones(2)})
    broken.write_bytes(b"broken")
    found = inspect_source([log])
    assert (found.steps, found.command) == (2, f"natgrad process {log} OUT")
    assert any("still being written: cannot read a safetensors file" in note for note in found.notes)
    os.utime(broken, (1, 1))
    found = inspect_source([log])
    assert found.command is None
    assert found.error["what"].startswith("cannot read a safetensors file")


def test_the_command_prints_one_line_per_entry(tmp_path):
    log = write_log(tmp_path / "log", random_walk(3))
    natgrad = Path(sys.executable).with_name("natgrad")
    shown = subprocess.run([natgrad, "inspect", log], check=True, capture_output=True, text=True).stdout
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert ["steps", "3"] in lines
    assert ["hvp", f"needed for {NEEDED_FOR['hvp'][0]}; {NEEDED_FOR['hvp'][1]}"] in lines
