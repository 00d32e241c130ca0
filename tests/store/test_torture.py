"""Processes that are killed, race and read at random moments; `make torture` runs this longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def counted():
    """Counts of a short run, in a separate process, because it forks and this process has threads."""
    command = [
        sys.executable,
        Path(__file__).parents[1] / "torture.py",
        "--kills",
        "10",
        "--races",
        "3",
        "--seed",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_nothing_is_lost_doubled_or_different_when_processes_are_killed(counted):
    assert counted["kills"] == 10
    assert {counted[name] for name in ("lost", "doubled", "differing", "damaged", "other_bytes")} == {0}


def test_at_least_one_of_two_writers_succeeds(counted):
    assert set(counted["races"]) <= {"done", "refused"}
    assert sum(counted["races"].values()) == 6
    assert counted["races"]["done"] >= 3
    assert counted["race_other_bytes"] == 0


def test_a_concurrent_reader_never_sees_a_torn_step(counted):
    assert counted["reader"]["torn"] == 0
    assert counted["reader"]["looks"] >= len(counted["reader"]["seen"]) > 1
