"""Processes that are killed, race and read at random moments; `make torture` runs this longer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import torture


def count(*options):
    """Counts of a short run, in a separate process, because it forks and this process has threads."""
    command = [sys.executable, Path(__file__).parents[1] / "torture.py", "--damages", "0", "--seed", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def counted():
    return count("--kills", "5", "--races", "2")


def test_nothing_is_lost_doubled_or_different_when_processes_are_killed(counted):
    assert counted["kills"] == 5
    assert {counted[name] for name in ("lost", "doubled", "differing", "damaged", "other_bytes")} == {0}


def test_the_same_holds_for_states_in_place():
    counted = count("--kills", "3", "--races", "0", "--in-place")
    assert counted["kills"] == 3
    assert {counted[name] for name in ("lost", "doubled", "differing", "damaged", "other_bytes")} == {0}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("trajectory.zarr record", "flip"),
        ("trajectory.zarr reads", "flip"),
        ("ledger.zarr gram", "zero"),
        ("results.zarr array", "flip"),
    ],
)
def test_a_damaged_file_gives_the_same_results_or_a_refusal_with_advice(tmp_path, kind, way):
    in_place = kind == "trajectory.zarr reads"
    found = list(torture.damage_trials(tmp_path, 1, seed=1, ways=[way], kinds=[kind], in_place=in_place))
    assert len(found) == 2  # a log that has grown, and one that has not
    assert [text for consequence, text in found if consequence not in torture.GOOD] == []


def test_at_least_one_of_two_writers_succeeds(counted):
    assert set(counted["races"]) <= {"done", "refused"}
    assert sum(counted["races"].values()) == 4
    assert counted["races"]["done"] >= 2
    assert counted["race_other_bytes"] == 0


def test_a_concurrent_reader_never_sees_a_torn_step(counted):
    assert counted["reader"]["torn"] == 0
    assert counted["reader"]["looks"] >= len(counted["reader"]["seen"]) > 1
