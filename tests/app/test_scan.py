"""Test finding, processing and showing many runs below one folder, without Prefect."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import psutil
import pytest
import xarray as xr

import natgrad
from logs import random_walk, write_log, write_step
from natgrad.app import cli, run, scan
from natgrad.app.status import status as status_of_runs
from natgrad.app.status import status_of_run
from natgrad.schema.errors import InputError, Unavailable
from natgrad.schema.version import RESULTS_VERSION
from natgrad.store import open_trajectory
from servers import wait_for


@pytest.fixture
def root(tmp_path):
    return tmp_path / "logs"


def found(root, out):
    return {one.name: (one.source, one.out) for one in scan.find_runs(root, out)}


# Finding runs ----------------------------------------------------------------------------------------


def test_runs_are_found_by_the_contents_of_folders_at_any_depth(root, out):
    write_log(root / "a", random_walk(2))
    write_log(root / "group" / "deeper" / "b", random_walk(2), container="npz")
    (root / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (root / "checkpoints" / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("no run")
    assert found(root, out) == {name: (root / name, out / name) for name in ("a", "checkpoints", "group/deeper/b")}


def test_runs_with_a_number_in_their_names_are_not_the_steps_of_one(root, out):
    for number in range(3):
        write_log(root / f"seed-{number}", random_walk(2, seed=number))
    assert set(found(root, out)) == {"seed-0", "seed-1", "seed-2"}


def test_a_folder_with_one_file_of_all_steps_is_a_run_unless_it_contains_runs(root, out):
    states = random_walk(3)
    for folder in ("alone", "above"):
        (root / folder).mkdir(parents=True)
        np.savez(
            root / folder / "run.npz", **{key: np.stack([state[key] for state in states]) for key in states[0]}
        )
    write_log(root / "above" / "below", states)
    assert set(found(root, out)) == {"alone", "above/below"}
    run.ingest_run(root / "alone", out / "alone")


def test_a_root_that_is_a_run_itself_is_the_only_one(root, out):
    write_log(root, random_walk(2))
    assert found(root, out) == {".": (root, out)}


def test_outputs_of_runs_are_not_found_as_runs(root):
    write_log(root / "a", random_walk(3))
    out = root / "made"
    run.ingest_run(root / "a", out / "a")
    assert set(found(root, out)) == {"a"}
    # A store that another user put among the logs is not a run either.
    (out / "a").rename(root / "elsewhere")
    assert set(found(root, out)) == {"a"}


def test_links_are_searched_once_and_hidden_folders_never(root, out):
    write_log(root / "a", random_walk(2))
    write_log(root / ".trash" / "b", random_walk(2))
    elsewhere = write_log(root.parent / "elsewhere" / "c", random_walk(2))
    (root / "linked").symlink_to(elsewhere)
    (root / "group").mkdir()
    (root / "group" / "circle").symlink_to(root)
    assert set(found(root, out)) == {"a", "linked"}


def test_a_processed_run_is_still_found_if_its_log_was_removed(root, out):
    log = write_log(root / "a", random_walk(1))
    scan.Outcome(str(log), "", {}).record(out / "a")
    next(log.iterdir()).unlink()
    assert set(found(root, out)) == {"a"}


def test_a_missing_root_is_an_error(root, out):
    with pytest.raises(InputError, match="no such folder"):
        scan.find_runs(root, out)


# Changes ------------------------------------------------------------------------------------------------


def appended(log):
    write_step(log, 3, random_walk(4)[3])


def rewritten_with_its_old_time(log):
    path = log / "step_1.safetensors"
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def renamed(log):
    (log / "step_2.safetensors").rename(log / "step_7.safetensors")


def cleared(log):
    (log / "step_0.safetensors").unlink()


def deeper(log):
    (log / "part" / "file").write_text("more")


@pytest.mark.parametrize("change", [appended, rewritten_with_its_old_time, renamed, cleared, deeper])
def test_the_identity_of_a_log_changes_with_every_change(root, change):
    log = write_log(root, random_walk(3))
    (log / "part").mkdir()
    (log / "part" / "file").write_text("some")
    before = scan.listing(log)
    assert scan.listing(log) == before
    change(log)
    assert scan.listing(log) != before


def outcome(log, out, options, **kept):
    scan.Outcome(str(log), scan.listing(log), options, **kept).record(out)
    return scan.Outcome.of(out)


@pytest.fixture
def processed(root, out):
    """Return a processed run and its options."""
    log = write_log(root / "a", random_walk(3))
    run.ingest_run(log, out / "a")
    run.analyze_run(out / "a", run.Analysis(workers=1))
    run.report_run([out / "a"])
    return log, {"windows": [1], "workers": 1, "scheduler": None, "cluster": None}


def test_an_outcome_is_valid_until_log_options_version_or_(processed, out):
    (log, options), out = processed, out / "a"
    done = outcome(log, out, options, summary={"updates": 2})
    assert done.is_current(scan.listing(log), options, out)
    assert done.is_current(scan.listing(log), options | {"workers": 8, "scheduler": "tcp://host:8786"}, out)
    assert not done.is_current(scan.listing(log), options | {"windows": [1, 2]}, out)
    assert not done.is_current("another", options, out)
    assert replace(done, version="99").is_current(scan.listing(log), options, out)
    assert not replace(done, results_version=RESULTS_VERSION + 1).is_current(scan.listing(log), options, out)
    run.RunFolder.of(out).report.delete()
    assert not done.is_current(scan.listing(log), options, out)


def test_an_outcome_of_invalid_input_is_valid_and_one_that_may_heal_is_not(root, out):
    log = write_log(root / "a", random_walk(3))
    for error, stands in (
        (InputError("truncated"), True),
        (Unavailable("the scheduler was lost"), False),
        (OSError("no space left"), False),
    ):
        failed = outcome(log, out, {}, error=scan.error_parts(error))
        assert failed.is_current(scan.listing(log), {}, out) == stands


def test_an_unreadable_outcome_is_none(out):
    assert scan.Outcome.of(out) is None
    out.mkdir()
    (out / ".outcome.json").write_text('{"listing": "half a')
    assert scan.Outcome.of(out) is None
    (out / ".outcome.json").write_text('{"of": "another version"}')
    assert scan.Outcome.of(out) is None


# One at a time -----------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from natgrad.app.scan import only_processor
with only_processor(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder_of(out):
    """Let another process work on a run, and kill it at the end."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, out], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield
        holder.kill()


def test_one_process_works_on_a_run_and_the_lock_ends_with_its_holder(out):
    with holder_of(out):
        with pytest.raises(scan.Busy, match="another process") as refusal, scan.only_processor(out):
            raise AssertionError
        assert str(out) in str(refusal.value)
        assert scan.error_parts(refusal.value)["heals"]
    with scan.only_processor(out):
        pass


# Status ------------------------------------------------------------------------------------------------------


def test_status_shows_progress_and_failures_of_each_run(root, out, processed, capsys):
    log, _ = processed
    assert natgrad.scan(root, out, workers=1).processed == 1
    write_log(root / "new", random_walk(4))
    error = InputError("truncated", remedy="write it again")
    outcome(write_log(root / "bad", random_walk(2)), out / "bad", {}, error=scan.error_parts(error))
    by_hand = write_log(root / "by hand", random_walk(5))
    run.ingest_run(by_hand, out / "by hand")

    def rows():
        return {row["run"]: row for row in status_of_runs(out)}

    keys = ("state", "steps", "last_step", "lag", "error", "do")
    assert {name: tuple(row[key] for key in keys) for name, row in rows().items()} == {
        "a": ("done", 3, 2, 0, None, None),
        "bad": ("failed", 0, None, 2, "truncated", "write it again"),
        "by hand": ("done", 5, 4, 0, None, None),
        "new": ("waiting", 0, None, 4, None, None),
    }
    appended(log)
    with holder_of(out / "new"), scan.only_processor(out / "by hand"):
        shown = {name: (row["state"], row["lag"]) for name, row in rows().items() if name != "bad"}
    assert shown == {"a": ("behind", 1), "by hand": ("working", 0), "new": ("working", 4)}
    cli.status(root=out)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "state", "last", "step", "lag", "processed", "last", "error"]
    assert [line.split()[0] for line in lines[1:]] == ["a", "bad", "by", "new"]


def test_the_status_of_a_removed_log_has_no_lag(root, out):
    log = write_log(root / "a", random_walk(3))
    run.ingest_run(log, out / "a")
    for path in log.iterdir():
        path.unlink()
    (row,) = status_of_runs(out)
    assert (row["last_step"], row["lag"]) == (2, None)


def test_status_of_a_folder_without_runs_is_refused(out):
    out.mkdir()
    with pytest.raises(InputError, match="no run"):
        status_of_runs(out)


# Scans -------------------------------------------------------------------------------------------------------


def numbers(summary):
    return summary.processed, summary.unchanged, summary.skipped, summary.failed


def test_a_scan_processes_changed_runs_and_a_bad_run_fails_alone(root, out):
    for name in ("a", "group/b", "bad"):
        write_log(root / name, random_walk(3))
    bad = root / "bad" / "step_1.safetensors"
    content = bad.read_bytes()
    bad.write_bytes(content[:-3])
    summary = natgrad.scan(root, str(out), workers=1, at_once=2)
    assert numbers(summary) == (2, 0, 0, 1)
    assert set(summary.failures) == {"bad"}
    assert [(one.run, one.state) for one in summary.runs if one.state == "failed"] == [("bad", "failed")]
    assert numbers(natgrad.scan(root, out, workers=1)) == (0, 2, 0, 1)
    bad.write_bytes(content)
    appended(root / "a")
    summary = natgrad.scan(root, out)
    assert numbers(summary) == (2, 1, 0, 0)
    assert scan.Outcome.of(out / "a").summary["new_steps"] == 1
    assert summary.message == "3 runs: 2 processed, 1 unchanged"
    assert "runs" not in summary.to_json()


def test_a_scan_with_other_options_processes_again_and_explicit_defaults_do_not(root, out):
    write_log(root / "a", random_walk(5))
    assert numbers(natgrad.scan(root, out)) == (1, 0, 0, 0)
    assert numbers(natgrad.scan(root, out, windows=[1], evaluation="unknown")) == (0, 1, 0, 0)
    assert numbers(natgrad.scan(root, out, windows=[2])) == (1, 0, 0, 0)
    assert natgrad.open_results(out / "a")["model"]["window"].values.tolist() == [1, 2]


def test_a_run_that_another_process_works_on_is_skipped(root, out):
    write_log(root / "a", random_walk(3))
    with scan.only_processor(out / "a"):
        summary = natgrad.scan(root, out)
    assert numbers(summary) == (0, 0, 1, 0)
    assert summary.runs[0].what == "another process is working on this run"


SCAN = """
import sys, natgrad
summary = natgrad.scan(sys.argv[1], sys.argv[2], workers=1)
print(summary.processed, summary.unchanged + summary.skipped, summary.failed)
"""


def test_two_concurrent_scans_process_every_run_once(root, out):
    runs = 3
    for number in range(runs):
        write_log(root / f"run-{number}", random_walk(3, seed=number))
    command = [sys.executable, "-c", SCAN, root, out]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [list(map(int, one.communicate()[0].split())) for one in started]
    assert [sum(count) for count in zip(*counts, strict=True)] == [runs, runs, 0]
    assert {row["state"] for row in status_of_runs(out)} == {"done"}


def test_a_scan_of_sweeps_makes_one_trajectory_of_each_folder_of_runs(root, out):
    for name in ("one/r0", "one/r1", "two/r0"):
        write_log(root / name, random_walk(3))
    assert numbers(natgrad.scan(root, out, sweep=True)) == (2, 0, 0, 0)
    assert open_trajectory(out / "one" / "trajectory.zarr").runs == ("r0", "r1")
    assert numbers(natgrad.scan(root, out, sweep=True)) == (0, 2, 0, 0)
    rows = {row["run"]: (row["state"], row["steps"], row["lag"]) for row in status_of_runs(out)}
    assert rows == {"one": ("done", 6, 0), "two": ("done", 3, 0)}
    appended(root / "one" / "r1")
    assert [row["lag"] for row in status_of_runs(out)] == [1, 0]


# Every process has this clock, which differs from that of the system by some seconds. Times in records, which are
# only shown, still come from the clock of the system.
CLOCK = """
import os, time

now, now_ns = time.time, time.time_ns
time.time = lambda: now() + float(os.environ["CLOCK_SHIFT"])
time.time_ns = lambda: now_ns() + int(float(os.environ["CLOCK_SHIFT"]) * 1e9)
"""

# The program and the processes that it starts for each scan have the clock of the scan.
SCANS = """
import json, os, sys, natgrad
for shift in sys.stdin:
    os.environ["CLOCK_SHIFT"] = shift
    summary = natgrad.scan(sys.argv[1], sys.argv[2], workers=1)
    print(json.dumps([[run.state for run in summary.runs], summary.failures]), flush=True)
"""


def test_a_clock_that_is_set_back_between_scans_has_no_effect(root, out, tmp_path):
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join([str(tmp_path / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])
    states, before = random_walk(8), 0
    with subprocess.Popen(
        [sys.executable, "-c", SCANS, root, out],
        env=os.environ | {"PYTHONPATH": path, "CLOCK_SHIFT": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as scans:
        for shift, steps in ((0, 3), (-3600, 5), (-7200, 5), (-400 * 86400, 7), (86400, 8)):
            for number in range(before, steps):
                file = write_step(root / "a", number, states[number])
                os.utime(file, (file.stat().st_mtime + shift,) * 2)
            grown, before = steps > before, steps
            print(shift, file=scans.stdin, flush=True)
            assert json.loads(scans.stdout.readline()) == [["processed" if grown else "unchanged"], {}]
            row = status_of_run(out / "a", root / "a")
            assert (row["state"], row["steps"], row["last_step"], row["lag"]) == ("done", steps, steps - 1, 0)
    assert natgrad.verify(out / "a").damages == ()
    natgrad.process(root / "a", out / "again", workers=1)
    one, other = (xr.open_datatree(out / name / "results.zarr") for name in ("a", "again"))
    xr.testing.assert_identical(one, other)


def test_options_of_a_scan_are_checked_before_a_folder_is_listed(root, out):
    with pytest.raises(InputError, match="--at-once must be at least 1"):
        natgrad.scan(root, out, at_once=0)
    assert not out.exists()


# Runs that hang, crash or exhaust memory ------------------------------------------------------------------------


@pytest.mark.usefixtures("hostile")
def test_a_run_that_hangs_crashes_or_exhausts_memory_fails_alone(root, out):
    for name in ("a-hang", "b-kill", "d-allocate"):
        (root / name).mkdir(parents=True)
        (root / name / name[2:]).touch()
    for name in ("a", "e", "z"):
        write_log(root / name, random_walk(3))
    natgrad.process(root / "e", out / "by hand", workers=1)
    summary = natgrad.scan(root, out, workers=1, stall_timeout=20)
    assert numbers(summary) == (3, 0, 0, 3)
    assert summary.failures == {
        "a-hang": "timeout: no progress for 20 s",
        "b-kill": "the process of the run was killed by signal 9 (SIGKILL)",
        "d-allocate": "out of memory",
    }
    assert scan.Outcome.of(out / "a-hang").error["what"] == "timeout: no progress for 20 s"
    # The same bits as without other processes.
    one, other = (xr.open_datatree(out / name / "results.zarr") for name in ("e", "by hand"))
    xr.testing.assert_identical(one, other)
    (root / "a-hang" / "hang").unlink()
    write_log(root / "a-hang", random_walk(3))
    assert numbers(natgrad.scan(root, out, workers=1)) == (1, 3, 0, 2)


@pytest.mark.usefixtures("hostile")
def test_status_names_runs_that_do_not_respond_and_shows_the_others(root, out, caplog):
    write_log(root / "a", random_walk(3))
    assert numbers(natgrad.scan(root, out, workers=1)) == (1, 0, 0, 0)
    for name in ("b-hang", "c-kill"):
        (root / name).mkdir()
        (root / name / name[2:]).touch()
    rows = {row["run"]: row for row in status_of_runs(out, seconds=10)}
    assert {name: (row["state"], row["lag"], row["error"]) for name, row in rows.items()} == {
        "a": ("done", 0, None),
        "b-hang": ("failed", None, "timeout: no progress for 10 s"),
        "c-kill": ("failed", None, "the process of the run was killed by signal 9 (SIGKILL)"),
    }
    assert "file systems" in rows["b-hang"]["do"]
    # A search of the logs that does not end does not hide the runs in OUT.
    (root / "d").mkdir()
    (root / "d" / "search").touch()
    assert {row["run"] for row in status_of_runs(out, seconds=10)} == {"a"}
    assert "only runs in" in caplog.text


@pytest.mark.usefixtures("hostile")
def test_a_scan_that_is_killed_leaves_no_process(root, out):
    (root / "a").mkdir(parents=True)
    (root / "a" / "hang").touch()
    with subprocess.Popen([sys.executable, "-c", SCAN, root, out], start_new_session=True) as running:
        wait_for(lambda: (out / "a" / ".processing.lock").exists())
        # The reader sleeps in a separate process.
        children = wait_for(lambda: psutil.Process(running.pid).children(recursive=True))
        running.kill()
    psutil.wait_procs(children, timeout=60)
    assert not [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    with scan.only_processor(out / "a"):
        pass
