"""Test the transfer of steps by processes that are killed or run at the same time, and its memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
from test_log_to_store import DEEP, WIDE, assert_holds, content

from logs import random_walk, write_log
from natgrad.schema.errors import InputError
from opened import ingest

ONE_THREAD = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

WAITING_INGEST = """
import sys
from natgrad.ingestion import ingest
from natgrad.storage import open_storage

def wait(done, total):
    sys.stdout.write("writing\\n")
    sys.stdout.flush()
    sys.stdin.readline()

ingest([open_storage(sys.argv[1])], open_storage(sys.argv[2]), progress=wait)
"""


def test_a_second_writer_is_rejected_but_readers_are_not(log, store):
    states = random_walk(3)
    write_log(log, states)
    command = [sys.executable, "-c", WAITING_INGEST, str(log), str(store)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD
    ) as first:
        assert first.stdout.readline() == "writing\n"
        for overwrite in (False, True):
            with pytest.raises(InputError, match="another process is writing this trajectory") as caught:
                ingest(log, store, overwrite=overwrite)
            assert caught.value.where == str(store)
        assert_holds(store, states)
        first.communicate("continue\n")
    assert first.returncode == 0
    assert ingest(log, store).new_steps == 0


# Runs an ingest repeatedly in separate processes, kills each, and lets another process finish the work. A process
# is a fork, so Zarr starts its threads in it, and nothing has to be imported again. The process counts its changes
# to files, and is killed before one of them or after a delay.
KILLED_INGESTS = """
import os, signal, sys, time
from pathlib import Path
from natgrad.ingestion import ingest
from natgrad.schema.layout import IngestLimits
from natgrad.storage import open_storage

os.fsync = lambda descriptor: None
limits = IngestLimits(chunk_elements=int(sys.argv[3]), commit_bytes=1)
log, folder = Path(sys.argv[1]), Path(sys.argv[2])

def run(name, last_change=None, delay=None):
    started, ready = os.pipe()
    process = os.fork()
    if process == 0:
        changes = 0

        def watch(event, arguments):
            nonlocal changes
            if event in ("os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir") or (
                event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wx")
            ):
                if changes == last_change:
                    os.kill(os.getpid(), signal.SIGKILL)
                changes += 1

        sys.addaudithook(watch)
        os.write(ready, b"!")
        ingest([open_storage(log)], open_storage(folder / name / "trajectory.zarr"), limits=limits)
        (folder / (name + ".changes")).write_text(str(changes))
        os._exit(0)
    os.read(started, 1)
    os.close(started)
    os.close(ready)
    if delay is not None:
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    assert status in (0, signal.SIGKILL), status
    return status

start = time.monotonic()
assert run("undisturbed") == 0
duration = time.monotonic() - start
changes = int((folder / "undisturbed.changes").read_text())
if sys.argv[4] == "changes":
    trials = [{"last_change": change} for change in range(int(sys.argv[5]), changes, int(sys.argv[6]))]
else:
    trials = [{"delay": float(share) * duration} for share in sys.argv[5:]]
killed = 0
for number, trial in enumerate(trials):
    killed += run(f"killed-{number}", **trial) == signal.SIGKILL
    assert run(f"killed-{number}") == 0
sys.stdout.write(f"{len(trials)} {killed}")
"""


def killed_ingests(tmp_path, log, chunk_elements, *how):
    """Run killed and resumed ingests; return how many, and how many of them were killed before their end."""
    command = [sys.executable, "-c", KILLED_INGESTS, str(log), str(tmp_path), str(chunk_elements), *map(str, how)]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_THREAD, check=False)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


def assert_equal_the_undisturbed(tmp_path, trials):
    expected = content(tmp_path / "undisturbed" / "trajectory.zarr")
    for number in range(trials):
        assert content(tmp_path / f"killed-{number}" / "trajectory.zarr") == expected, number


@pytest.mark.parametrize(("chunk_elements", "every"), [(DEEP, 13), (WIDE, 29)], ids=["deep", "wide"])
def test_an_ingest_killed_at_any_change_of_a_file_and_run_again_gives_the_same_bytes(
    tmp_path, log, chunk_elements, every
):
    write_log(log, random_walk(7))
    trials, killed = killed_ingests(tmp_path, log, chunk_elements, "changes", 0, every)
    assert trials == killed > 10
    assert_equal_the_undisturbed(tmp_path, trials)
    assert_holds(tmp_path / "undisturbed" / "trajectory.zarr", random_walk(7))


def test_an_ingest_killed_at_random_moments_and_run_again_gives_the_same_bytes(tmp_path, log):
    write_log(log, random_walk(7))
    moments = np.random.default_rng(2).uniform(0.05, 0.95, size=6)
    trials, _ = killed_ingests(tmp_path, log, DEEP, "delays", *moments)
    assert trials == len(moments)
    assert_equal_the_undisturbed(tmp_path, trials)


# Memory ------------------------------------------------------------------------------------------------------


MEASURED = """
import resource, sys
from natgrad.app.run import ingest_run
from natgrad.ingestion import buffer_bytes
from natgrad.compute.plan import PlanLimits
from natgrad.store import open_trajectory

def peak():
    # Unlike that of getrusage on Linux, this peak does not include the parent, which was forked.
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

ingest_run(sys.argv[1], sys.argv[3])
before = peak()
ingest_run(sys.argv[2], sys.argv[4])
buffers = buffer_bytes(open_trajectory(sys.argv[4] + "/trajectory.zarr").shape)
print(before, peak(), buffers, PlanLimits().reserved_bytes)
"""


def test_ingest_needs_the_memory_that_is_planned(tmp_path):
    # The second log has 96 MB. Buffers of two arrays with a chunk of 4 MB each are planned.
    write_log(tmp_path / "small", random_walk(2))
    write_log(tmp_path / "log", random_walk(4, {"weight": (3_000_000,)}))
    names = ("small", "log", "small-out", "out")
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *(tmp_path / name for name in names)],
        capture_output=True,
        text=True,
        check=True,
    )
    before, peak, buffers, reserved = map(int, done.stdout.split())
    assert buffers == 2 * 4 * 1_000_000
    assert peak <= reserved + buffers
    # Writes wait for the disk in at most four further buffers; the pages of one mapped step of 24 MB may count.
    assert peak - before <= 5 * buffers + 24e6
