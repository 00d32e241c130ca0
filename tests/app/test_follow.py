"""Test logs that are being written: incomplete steps are deferred, and are errors if they stay incomplete."""

import itertools
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from commands import started
from logs import random_walk, write_log, write_step
from natgrad.app.follow import follow
from natgrad.app.run import ingest_run
from natgrad.ingestion import StepWait
from natgrad.schema.errors import InputError
from natgrad.sources import changes
from natgrad.sources.steps import NotYet
from natgrad.store import open_trajectory
from opened import ingest, read_results
from servers import process, wait_for


def truncate(path, part=0.7):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    return whole


def age(path, seconds=2 * changes.SETTLED_SECONDS):
    for entry in (*path.rglob("*"), path):
        os.utime(entry, (time.time() - seconds,) * 2)


def steps(store):
    return open_trajectory(store).scalar("step").tolist()


# Files of a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["safetensors", "npz"])
@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("first", [True, False], ids=["first ingest", "later"])
def test_an_incomplete_last_step_is_left_for_the_next_pass(log, store, container, part, first):
    states = random_walk(5)
    if not first:
        ingest(write_log(log, states[:2], container=container), store)
    write_log(log, states, container=container)
    path = log / f"step_4.{container}"
    whole = truncate(path, part)
    summary = ingest(log, store)
    assert steps(store) == [0, 1, 2, 3]
    (warning,) = summary.warnings
    assert warning.startswith(
        f"{path}, step 4 is left for the next pass, because it is still being written: cannot read"
    )
    path.write_bytes(whole)
    assert ingest(log, store).new_steps == 1
    assert steps(store) == [0, 1, 2, 3, 4]


def test_several_last_steps_may_be_incomplete_at_a_time(log, store):
    write_log(log, random_walk(6))
    for number in (4, 5):
        truncate(log / f"step_{number}.safetensors")
    assert len(ingest(log, store).warnings) == 2
    assert steps(store) == [0, 1, 2, 3]


def test_a_last_step_that_remains_truncated_is_an_error_with_its_name(log, store):
    write_log(log, random_walk(5))
    path = log / "step_4.safetensors"
    truncate(path)
    ingest(log, store)
    age(log)
    for _ in range(2):
        with pytest.raises(InputError, match="cannot read a safetensors file") as caught:
            ingest(log, store)
        assert caught.value.where.startswith(f"{path}, step 4")
    assert steps(store) == [0, 1, 2, 3]


def test_a_truncated_step_in_the_middle_is_an_error_immediately(log, store):
    write_log(log, random_walk(5))
    truncate(log / "step_2.safetensors")
    for allow_gaps in (False, True):
        with pytest.raises(InputError, match="cannot read a safetensors file"):
            ingest(log, store, allow_gaps=allow_gaps)
    assert not store.exists()


def test_an_incomplete_first_step_is_not_available_yet(log, store):
    write_log(log, random_walk(1))
    truncate(log / "step_0.safetensors")
    with pytest.raises(NotYet, match="cannot read a safetensors file"):
        ingest(log, store)
    write_log(log, random_walk(2))
    for number in range(2):
        truncate(log / f"step_{number}.safetensors")
    with pytest.raises(NotYet, match="no step is finished yet"):
        ingest(log, store)
    assert not store.parent.exists()


def test_a_step_that_a_restarted_run_overwrites_is_left_until_it_is_complete(log, store):
    states, again = random_walk(6), random_walk(6, seed=1)
    ingest(write_log(log, states), store)
    path = write_step(log, 4, again[4])
    whole = truncate(path)
    assert ingest(log, store).new_steps == 0
    path.write_bytes(whole)
    write_step(log, 5, again[5])
    assert ingest(log, store).attempts == 2
    assert open_trajectory(store).scalar("attempt").tolist() == [0] * 6 + [1, 1]


def test_a_file_with_a_temporary_name_is_not_a_step(log, store):
    write_log(log, random_walk(3))
    (log / "step_3.safetensors.tmp").write_bytes(b"begun")
    (log / ".step_3.safetensors").write_bytes(b"begun")
    assert ingest(log, store).warnings == []
    assert steps(store) == [0, 1, 2]


# Follow ------------------------------------------------------------------------------------------------------


def follow_log(log, out, *, gap_timeout=60.0, **options):
    """Ingest a log repeatedly."""
    wait = StepWait(gap_timeout)

    def once(first):
        found = ingest_run(log, out, wait=wait)
        return found if first or found.new_steps else None

    return follow(once, wait=wait, **options)


def test_following_ends_after_the_idle_timeout(log, tmp_path):
    states = random_walk(6)
    write_log(log, states[:2])
    writer = threading.Timer(0.3, lambda: write_log(log, states))
    writer.start()
    answer = follow_log(log, tmp_path / "out", interval=0.05, idle_timeout=1.5)
    writer.join()
    assert (answer.new_steps, answer.steps) == (6, 6)


def test_following_waits_for_a_gap_to_close(log, store):
    states = random_walk(7)
    write_log(log, [*states[:3], *states[4:]], numbers=[0, 1, 2, 4, 5, 6])
    with pytest.raises(InputError, match="step 3 is missing"):
        ingest(log, store)
    for _ in range(2):
        ingest(log, store, wait=StepWait(60.0))
        assert steps(store) == [0, 1, 2]
    write_step(log, 3, states[3])
    ingest(log, store, wait=StepWait(60.0))
    assert steps(store) == list(range(7))


def test_following_does_not_wait_if_waiting_cannot_help(log, store):
    write_log(log, random_walk(7), numbers=[0, 10, 20, 25, 30, 40, 50])
    with pytest.raises(InputError, match="the steps are not evenly spaced"):
        ingest(log, store, wait=StepWait(60.0))


def test_following_waits_for_the_first_step(log, tmp_path):
    log.mkdir()
    writer = threading.Timer(0.3, lambda: write_log(log, random_walk(2)))
    writer.start()
    answer = follow_log(log, tmp_path / "out", interval=0.05, idle_timeout=1.5)
    writer.join()
    assert answer.steps == 2


def test_following_an_empty_log_raises_an_error_at_the_end(log, tmp_path):
    log.mkdir()
    with pytest.raises(NotYet, match="no step files"):
        follow_log(log, tmp_path / "out", interval=0.01, idle_timeout=0.05)


def test_only_the_first_pass_overwrites(log, tmp_path):
    requested = []
    wait, requested = StepWait(0.0), []
    write_log(log, random_walk(2))

    def once(first):
        requested.append(first)
        if len(requested) == 1:
            raise NotYet("nothing there")
        if len(requested) == 5:
            raise KeyboardInterrupt
        return ingest_run(log, tmp_path / "out", overwrite=True, wait=wait)

    assert follow(once, wait=wait, interval=0).new_steps == 6
    assert requested == [True, True, False, False, False]


def test_an_error_ends_following():
    def once(first):
        raise InputError("of another model")

    with pytest.raises(InputError, match="of another model"):
        follow(once, wait=StepWait(0.0))


# Runs that remove their old steps -----------------------------------------------------------------------------


def numbers_in(log):
    """Return the steps that a folder contains."""
    return {int(re.search(r"\d+", path.name)[0]) for path in log.iterdir()} if log.exists() else set()


@pytest.mark.parametrize("kind", ["safetensors", "torch", "folder"])
def test_no_step_that_two_scans_list_is_lost_if_the_run_removes_its_steps(log, tmp_path, store, kind):
    # One step every 0.2 s, and the last 20 are kept: each file exists for four seconds.
    writer = (sys.executable, Path(__file__).parents[1] / "write_rotating.py", log, kind, "35", "0.2", "20")
    wait, listings = StepWait(60.0), []

    def once(first):
        listings.append(numbers_in(log))
        found = ingest_run(log, tmp_path / "out", wait=wait)
        return found if first or found.new_steps else None

    with process(*writer, log=tmp_path / "writer.log") as running:
        wait_for(lambda: numbers_in(log))
        answer = follow(once, wait=wait, interval=0.5, idle_timeout=5.0)
        assert running.wait() == 0, (tmp_path / "writer.log").read_text()
    stored = steps(store)
    in_two_scans = set().union(*(one & other for one, other in itertools.pairwise(listings)))
    # The newest step is listed while it is written.
    assert in_two_scans <= set(stored)
    assert stored[-1] == 34
    assert answer.new_steps == len(stored)
    missing = set(range(stored[0], 35)) - set(stored)
    assert bool(missing) == any(warning.startswith("missing step") for warning in answer.warnings)
    trajectory, expected = open_trajectory(store), random_walk(35)
    found = np.empty((len(stored), trajectory.chunk[1]), np.float32)
    trajectory.read("parameter", 0, len(stored), 0, found)
    for number, state in zip(stored, found, strict=True):
        parameters = [expected[number][f"parameter/{name}"] for name in trajectory.layout.names]
        np.testing.assert_array_equal(state[: trajectory.layout.elements], np.concatenate(parameters, axis=None))


def test_steps_that_the_run_removed_are_a_gap_with_a_warning(log, tmp_path, store, caplog):
    states = random_walk(60)
    write_log(log, states[:20])
    listed = iter([range(20), range(50, 57), range(51, 59), range(51, 60)])

    def rotate():
        kept = next(listed, range(52, 60))
        for path in log.iterdir():
            path.unlink()
        write_log(log, [states[number] for number in kept], numbers=list(kept))

    wait = StepWait(60.0)

    def once(first):
        rotate()
        found = ingest_run(log, tmp_path / "out", wait=wait)
        return found if first or found.new_steps else None

    answer = follow(once, wait=wait, interval=0.0, idle_timeout=0.3)
    assert steps(store) == [*range(20), *range(50, 60)]
    assert open_trajectory(store).spans().tolist() == [*[1] * 19, 31, *[1] * 9]
    (warning,) = (warning for warning in answer.warnings if "missing step" in warning)
    assert warning.startswith("missing steps 20 to 49: the run removed checkpoints before they were read")
    assert "missing steps 20 to 49" in caplog.text
    assert "the update from step 19 to step 50 has step_span 31" in caplog.text
    # Later ingests accept the gap, because the steps before it were evenly spaced.
    write_log(log, [states[59]] * 2, numbers=[60, 61])
    ingest(log, store)
    assert steps(store)[-2:] == [60, 61]


def test_following_reports_the_missing_step_and_continues_without_it(log, tmp_path, store, caplog):
    states = random_walk(10)
    write_log(log, [*states[:3], *states[5:]], numbers=[0, 1, 2, 5, 6, 7, 8, 9])
    answer = follow_log(log, tmp_path / "out", interval=0.05, gap_timeout=0.3, idle_timeout=5.0)
    assert steps(store) == [0, 1, 2, 5, 6, 7, 8, 9]
    waiting = "waiting for steps 3 to 4 (5 later steps from step 5 on are logged); after 0.3 s"
    assert sum(waiting in record.getMessage() for record in caplog.records) == 1
    assert any(
        warning.startswith("missing steps 3 to 4: they were not logged in time") for warning in answer.warnings
    )


def test_steps_after_a_gap_are_read_when_the_log_is_complete(log, tmp_path, store):
    states = random_walk(6)
    write_log(log, [*states[:3], *states[4:]], numbers=[0, 1, 2, 4, 5])
    answer = follow_log(log, tmp_path / "out", interval=0.05, gap_timeout=1000.0, idle_timeout=0.2)
    assert steps(store) == [0, 1, 2, 4, 5]
    assert any("missing step 3: they were not logged in time" in warning for warning in answer.warnings)


def test_a_step_that_appears_after_a_pass_continued_without_it_is_omitted(log, tmp_path, store):
    states = random_walk(7)
    write_log(log, [*states[:3], *states[4:]], numbers=[0, 1, 2, 4, 5, 6])
    follow_log(log, tmp_path / "out", gap_timeout=0.0, idle_timeout=0.0)
    write_step(log, 3, states[3])
    answer = follow_log(log, tmp_path / "out", interval=0.01, idle_timeout=0.1)
    assert steps(store) == [0, 1, 2, 4, 5, 6]
    assert any("skipped steps 3" in warning for warning in answer.warnings)
    with pytest.raises(InputError, match="step 3 is new, but steps up to 6 are already ingested"):
        ingest(log, store)


def test_a_log_that_is_emptied_while_it_is_followed_is_a_warning(log, tmp_path, store):
    write_log(log, random_walk(3))
    remover = threading.Timer(0.5, lambda: [path.unlink() for path in log.iterdir()])
    remover.start()
    answer = follow_log(log, tmp_path / "out", interval=0.05, idle_timeout=1.5)
    remover.join()
    assert steps(store) == [0, 1, 2]
    assert any("the last pass read nothing" in warning for warning in answer.warnings)


def test_the_command_follows_a_log_until_it_is_interrupted(log, tmp_path):
    states = random_walk(5)
    write_log(log, states[:1])
    out = tmp_path / "out"
    words = ["process", log, out, "--follow", "--interval", "0.5", "--workers", "1", "--json"]
    with started(*words) as process:
        wait_until(lambda: (out / "trajectory.zarr" / "commits" / "00000000.json").exists())
        write_log(log, states[1:3], numbers=[1, 2])
        wait_until(lambda: (out / "report.html").exists())
        write_log(log, states)
        first = (out / "report.html").stat().st_mtime_ns
        wait_until(lambda: (out / "report.html").stat().st_mtime_ns > first)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"new_steps": 5' in output
    assert steps(out / "trajectory.zarr") == list(range(5))
    np.testing.assert_array_equal(read_results(out / "results.zarr")["model"]["step"], range(4))


def wait_until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
