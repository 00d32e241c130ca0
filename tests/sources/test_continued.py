"""The attempts, or the epochs, of one run in numbered folders are one log, also while it grows."""

import pytest
import torch

from logs import random_walk, write_log
from natgrad.app.scan import find_runs
from natgrad.schema.errors import InputError
from natgrad.sources.search import logs_below
from natgrad.store import open_trajectory
from opened import ingest, open_source

FIRST, SECOND = random_walk(6), random_walk(5, seed=1)
"""The second attempt begins at step 3, from which it logs other states."""


def numbers(log):
    return [(step.number, step.storage.parent.name) for step in log.steps()]


def write_attempt(folder, states, start=0):
    write_log(folder, states, range(start, start + len(states)))


def test_an_attempt_replaces_the_later_steps_of_the_one_before(tmp_path, caplog):
    write_attempt(tmp_path / "attempt_2", SECOND, 3)
    write_attempt(tmp_path / "attempt_1", FIRST)
    (tmp_path / "attempt_10").mkdir()  # which has logged nothing
    (tmp_path / "notes_1").mkdir()
    log = open_source(tmp_path)
    assert numbers(log) == [
        *((step, "attempt_1") for step in range(3)),
        *((step, "attempt_2") for step in range(3, 8)),
    ]
    assert "3 steps from step 3 on are skipped" in caplog.text
    for step in open_source(tmp_path).steps():
        with log.open(step) as reader:
            state = FIRST[step.number] if step.number < 3 else SECOND[step.number - 3]
            assert reader.content().scalars["loss"] == state["loss"]


def test_an_attempt_that_appears_later_is_a_restart(tmp_path):
    write_attempt(tmp_path / "run" / "attempt_1", FIRST)
    ingest([tmp_path / "run"], tmp_path / "grown.zarr")
    write_attempt(tmp_path / "run" / "attempt_2", SECOND, 3)
    ingest([tmp_path / "run"], tmp_path / "grown.zarr")
    grown = open_trajectory(tmp_path / "grown.zarr")
    states = zip(*(grown.scalar(name).tolist() for name in ("step", "attempt", "loss")), strict=True)
    assert [*states] == [
        *((step, 0, float(state["loss"])) for step, state in enumerate(FIRST)),
        *((step, 1, float(state["loss"])) for step, state in enumerate(SECOND, 3)),
    ]


def test_epochs_are_joined_and_counters_that_start_again_are_refused(tmp_path):
    for epoch in range(3):
        (tmp_path / f"epoch_{epoch}").mkdir()
        for batch in range(2):
            step = 2 * epoch + batch
            content = {"params": {"w": torch.full((2,), step)}, "grads": {"w": torch.ones(2)}, "updates": step}
            torch.save(content, tmp_path / f"epoch_{epoch}" / f"batch_{batch}.pt")
    with pytest.raises(InputError, match=r"step 0 is in epoch_0, but (.|\n)*--map step=KEY"):
        open_source(tmp_path).steps()
    assert [step.number for step in open_source(tmp_path, mapping={"step": "updates"}).steps()] == [*range(6)]


@pytest.mark.parametrize(("names", "runs"), [(("attempt_1", "attempt_2"), ["run"]), (("restart1",), ["run"])])
def test_a_scan_finds_one_run(tmp_path, names, runs):
    for name in names:
        write_attempt(tmp_path / "root" / "run" / name, FIRST[:2])
    assert [run.name for run in find_runs(tmp_path / "root", tmp_path / "out")] == runs
    assert [found.path for found in logs_below(tmp_path / "root")] == [tmp_path / "root" / "run"]


@pytest.mark.parametrize("name", ["version_{}", "run-{}", "seed_{}", "trial{}"])
def test_other_numbered_folders_are_runs(tmp_path, name):
    for number in range(2):
        write_attempt(tmp_path / "root" / name.format(number), FIRST[:2])
    assert len(find_runs(tmp_path / "root", tmp_path / "out")) == 2
    with pytest.raises(InputError, match="no step files"):
        open_source(tmp_path / "root").steps()
