"""Compare results that are stored block by block with those of the complete table, bit by bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from logs import random_walk, write_log
from natgrad.app.run import Analysis, RunFolder, analyze_run, ingest_run
from natgrad.compute import executors
from natgrad.compute.clusters import local_scheduler
from natgrad.results import dataset
from natgrad.results.blocks import BLOCKS
from natgrad.results.inputs import update_table
from natgrad.store import open_ledger, open_trajectory
from natgrad.store.journal import Journal

STEPS = 150
"""More than two blocks of the minimum size, 64."""

WITH_EVERYTHING = {"windows": (1, 3), "weight_decay": {"*": 0.1}, "gammas": (0.5, 1.0)}


class On(Analysis):
    """Options of an analysis on a certain executor."""

    chosen = staticmethod(executors.serial)

    def executor(self, stack=None):
        return self.chosen


class InThreads(On):
    chosen = staticmethod(executors.threads(2))


def states(count, seed=0):
    """Return states whose single updates are not all effective, with losses of few bits at first."""
    return random_walk(count, seed=seed)


def ingested(out, count=STEPS, *, runs=1, **options):
    """Ingest a log of one or several runs of different lengths."""
    log = out.parent / f"log of {out.name}"
    if runs == 1:
        write_log(log, states(count))
    for run in range(runs if runs > 1 else 0):
        write_log(log / f"run_{run}", states(count - 7 * run, seed=run))
    ingest_run(log, out, sweep=runs > 1, **options)
    return out


def expected(out, **options):
    """Return the results of the complete table, in memory."""
    analysis = Analysis(**options)
    _, table = update_table(
        open_trajectory(out / "trajectory.zarr"),
        open_ledger(out / "ledger.zarr"),
        weight_decay=analysis.weight_decay,
        evaluation=analysis.evaluation,
    )
    return dataset.label(table, gammas=analysis.gammas, windows=analysis.windows)


def stored(out):
    return dataset.read(RunFolder.of(out).results)


def assert_same(found, wanted):
    """Compare variables, attributes and bits. The order of variables in a group may differ."""
    assert {group.path for group in found.subtree} == {group.path for group in wanted.subtree}
    for group in wanted.subtree:
        ours, theirs = found[group.path].to_dataset(), group.to_dataset()
        xr.testing.assert_identical(ours.load(), theirs.assign_attrs(ours.attrs))
        for name, variable in theirs.variables.items():
            assert variable.dtype.kind == "O" or ours[name].dtype == variable.dtype
            if variable.dtype.kind == "f":  # also the sign of zeros
                same = np.signbit(ours[name].values) == np.signbit(variable.values)
                assert (same | np.isnan(variable.values)).all(), name


def bits(out):
    """Return all files of the results except the record of times and versions."""
    folder = out / "results.zarr"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "runs", "count"),
    [
        ({}, 1, STEPS),
        (WITH_EVERYTHING, 1, STEPS),
        ({"windows": (1, 100)}, 1, STEPS),
        (WITH_EVERYTHING, 3, 40),
        ({"windows": (1, 20)}, 2, STEPS),
        ({}, 1, 3),
    ],
)
def test_stored_results_are_those_of_the_complete_table_to_the_bit(tmp_path, options, runs, count):
    out = ingested(tmp_path / "out", count, runs=runs)
    analyze_run(out, On(**options))
    assert_same(stored(out), expected(out, **options))
    # xarray can open them without natgrad.
    assert_same(xr.open_datatree(out / "results.zarr", engine="zarr"), expected(out, **options))


def test_every_executor_stores_the_same_bits(tmp_path):
    out = ingested(tmp_path / "out")
    analyze_run(out, On(**WITH_EVERYTHING))
    reference = bits(out)
    for kind in ("threads", "processes"):
        other = Path(shutil.copytree(out, tmp_path / kind / "out"))
        shutil.rmtree(other / "results.zarr")
        if kind == "threads":
            analyze_run(other, InThreads(**WITH_EVERYTHING))
        else:
            with local_scheduler(2) as address:
                analyze_run(other, Analysis(scheduler=address, **WITH_EVERYTHING))
        assert bits(other) == reference


# Reuse -------------------------------------------------------------------------------------------------------


def records(out):
    folder = RunFolder.of(out).results / BLOCKS
    return {name: (folder / f"{name}.json").get() for name in Journal(folder).names()}


def inodes(out):
    """Return the files of the chunks of tensors, and the inode of each."""
    return {path: path.stat().st_ino for path in (out / "results.zarr" / "tensor" / "angle").glob("c.*")}


def test_when_a_run_has_grown_only_blocks_whose_windows_include_new_updates_are_computed(tmp_path):
    out = wide_run(tmp_path / "out", 530, 300)
    analyze_run(out, On())
    before, files = records(out), inodes(out)
    wide_run(out, 540, 300)
    analyze_run(out, On())
    assert_same(stored(out), expected(out))
    # A block has 160 updates, and windows of up to 256 are tried.
    assert [name for name in before if records(out)[name] == before[name]] == [f"{0:08d}"]
    assert {path.name.split(".")[1] for path in files} == {"0", "1", "2", "3"}
    same = [path for path, inode in inodes(out).items() if files[path] == inode]
    assert {path.name.split(".")[1] for path in same} == {"0"}


def test_results_with_other_options_are_computed_again(tmp_path):
    out = ingested(tmp_path / "out")
    analyze_run(out, On())
    first = records(out)
    analyze_run(out, On(evaluation="batch"))
    assert_same(stored(out), expected(out, evaluation="batch"))
    assert not {first[name] for name in first} & set(records(out).values())
    analyze_run(out, On())
    assert records(out) == first


def test_a_damaged_file_of_a_block_is_computed_again(tmp_path, caplog):
    out = ingested(tmp_path / "out")
    analyze_run(out, On())
    reference = bits(out)
    damaged = out / "results.zarr" / "model" / "angle" / "c.0.0.0"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (out / "results.zarr" / BLOCKS / f"{1:08d}.json").write_text("{}")
    analyze_run(out, On())
    assert bits(out) == reference
    assert "its block is computed again" in caplog.text


KILLED = """
import os, signal, sys
from natgrad.app.run import Analysis, analyze_run

def kill(event, arguments):
    global left
    if event in ("os.rename", "os.link", "os.rmdir", "os.remove") and "results.zarr" in str(arguments):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

left = int(sys.argv[2])
sys.addaudithook(kill)
analyze_run(sys.argv[1], Analysis(workers=1))
"""


def test_a_killed_computation_resumes_and_readers_see_the_old_results(tmp_path):
    reference = ingested(tmp_path / "reference")
    analyze_run(reference, On())
    wanted = bits(reference)
    out = Path(shutil.copytree(reference, tmp_path / "out"))
    analyze_run(out, On(evaluation="batch"))
    old = bits(out)
    resumed = []
    for left in (0, 40, 150, 200, 250, 10**6):
        done = subprocess.run([sys.executable, "-c", KILLED, out, str(left)], check=False)
        assert done.returncode in (0, -9)
        assert bits(out) in (old, wanted)  # never a mixture
        staged = out / ".results.zarr.new" / BLOCKS
        resumed.append(len(list(staged.glob("[0-9]*.json"))) if staged.exists() else 0)
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert bits(out) == wanted
    assert max(resumed) > 0  # a later process started with complete blocks
    assert not (out / ".results.zarr.new").exists()


# Memory and size ----------------------------------------------------------------------------------------------

MEASURED = """
import sys
from pathlib import Path
from natgrad.app.run import Analysis, analyze_run

summary = analyze_run(sys.argv[1], Analysis(workers=int(sys.argv[2])))
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024, summary.projected_memory)
"""


def wide_run(out, steps, tensors):
    """Ingest a log of many small tensors in one file, or its new steps."""
    log = out.parent / "log"
    log.mkdir(parents=True, exist_ok=True)
    arrays = {"step": np.arange(steps), "loss": 1 / np.arange(1, steps + 1), "learning_rate": np.full(steps, 0.1)}
    for index in range(tensors):
        noise = np.random.default_rng(index).standard_normal((steps, 2, 3))
        arrays[f"parameter/layer.{index}.weight"] = np.cumsum(noise[:, 0], axis=0)
        arrays[f"gradient/layer.{index}.weight"] = -noise[:, 1]
    np.savez(log / "run.npz", **arrays)
    ingest_run(log / "run.npz", out)
    return out


def test_the_complete_command_takes_no_more_memory_than_projected(tmp_path):
    out = wide_run(tmp_path / "out", 400, 300)
    for workers in (1, 2):
        shutil.rmtree(out / "results.zarr", ignore_errors=True)
        output = subprocess.run(
            [sys.executable, "-c", MEASURED, out, str(workers)], check=True, capture_output=True, text=True
        ).stdout
        peak, projected = map(int, output.split())
        assert peak <= projected


def test_results_of_tensors_have_the_family_only_if_gammas_are_set(tmp_path):
    out = ingested(tmp_path / "out", 5)
    analyze_run(out, On())
    tree = stored(out)
    family = {name for name in tree["model"].data_vars if name.startswith("family_")}
    assert len(family) == 4
    assert not family & set(tree["tensor"].data_vars)
    analyze_run(out, On(gammas=tuple(dataset.GAMMAS)))
    assert family <= set(stored(out)["tensor"].data_vars)


def test_chunks_of_missing_values_are_not_stored(tmp_path):
    out = ingested(tmp_path / "out", 5)
    analyze_run(out, On())
    # Without Hessian-vector products, eq. (16) cannot be evaluated.
    assert np.isnan(stored(out)["tensor"]["angle"].sel(descent="taylor")).all()
    chunks = (out / "results.zarr" / "tensor" / "angle").glob("c*")
    assert sorted(path.name for path in chunks) == ["c.0.0.0.0", "c.0.0.1.0", "c.0.0.2.0"]
    assert not [*(out / "results.zarr" / "model" / "learning_rate_bound").glob("c*")]
