"""Read options are stored with the trajectory: they apply to later ingests, and cannot change."""

import json
import os

import numpy as np
import pytest

from logs import random_walk, write_log, write_step
from natgrad.app import run
from natgrad.app.describe import describe_run
from natgrad.schema.errors import InputError
from natgrad.store import open_trajectory
from opened import ingest

STEPS = 8
LONG_AGO = 10**9
"""Modification time of scalar logs that are complete."""


@pytest.fixture
def out(tmp_path):
    return tmp_path / "trajectory.zarr"


def stored_data(out):
    states = open_trajectory(out)
    # Numbers are compared as text, because missing numbers are NaN.
    numbers = [str(states.scalar(name).tolist()) for name in ("step", "attempt", "loss", "learning_rate")]
    return states.fingerprint(), *numbers


def renamed(states):
    """States with quantities under other keys, and with different values under the usual keys."""
    return [
        {f"net/{key}" if "/" in key else f"my_{key}": value for key, value in state.items()}
        | {key: -value for key, value in state.items()}
        for state in states
    ]


MAPPING = {"parameter": "net/parameter", "gradient": "net/gradient", "loss": "my_loss"}


@pytest.mark.parametrize(
    ("original", "requested", "message"),
    [
        ({}, {"shift": {"gradient": -1}}, "without --shift for gradient, but --shift gradient=-1 is passed now"),
        ({"shift": {"loss": -1}}, {"shift": {"loss": -2}}, "created with --shift loss=-1, but --shift loss=-2 is"),
        ({"shift": {"loss": -1}}, {"shift": {"loss": 0}}, "created with --shift loss=-1, but --shift loss=0 is"),
        ({"shift": {"loss": -1}}, {"shift": {"loss": -1, "hvp": 1}}, "created without --shift for hvp"),
        ({}, {"mapping": {"loss": "my_loss"}}, "without --map for loss, but --map loss=my_loss is passed now"),
        ({"mapping": MAPPING}, {"mapping": {"loss": "loss"}}, "created with --map loss=my_loss, but --map loss="),
    ],
)
def test_changed_read_options_are_rejected_and_change_nothing(tmp_path, out, original, requested, message):
    log = write_log(tmp_path / "log", renamed(random_walk(STEPS - 2)))
    ingest(log, out, **original)
    before = stored_data(out)
    for step, state in enumerate(renamed(random_walk(STEPS))):
        write_step(log, step, state)
    with pytest.raises(InputError, match="the read options of a trajectory cannot change") as refusal:
        ingest(log, out, **requested)
    assert message in refusal.value.what
    assert "--overwrite" in refusal.value.remedy
    assert refusal.value.where == str(out)
    assert stored_data(out) == before
    ingest(log, out, overwrite=True, **requested)
    ingest(log, tmp_path / "other.zarr", **requested)
    assert stored_data(out) == stored_data(tmp_path / "other.zarr") != before


@pytest.mark.parametrize("repeated", ["nothing", "a part", "all"])
def test_a_run_resumes_with_its_original_read_options(tmp_path, out, repeated):
    options = {"mapping": MAPPING, "shift": {"loss": 1, "gradient": -1}}
    log = write_log(tmp_path / "log", renamed(random_walk(STEPS - 2)))
    ingest(log, out, **options)
    for step, state in list(enumerate(renamed(random_walk(STEPS))))[-2:]:
        write_step(log, step, state)
    part = {"mapping": {"loss": "my_loss"}, "shift": {"gradient": -1}}
    assert ingest(log, out, **{"nothing": {}, "a part": part, "all": options}[repeated]).new_steps == 2
    ingest(log, tmp_path / "whole.zarr", **options)
    assert stored_data(out) == stored_data(tmp_path / "whole.zarr")
    assert ingest(log, out).new_steps == 0


def test_stored_read_options_are_described(tmp_path):
    log = write_log(tmp_path / "log", random_walk(STEPS))
    run.ingest_run(log, tmp_path / "plain")
    assert not {"map", "shift"} & set(describe_run(tmp_path / "plain"))
    run.ingest_run(log, tmp_path / "mapped", shift={"loss": -1}, mapping={"loss": "loss"})
    described = describe_run(tmp_path / "mapped")
    assert (described["map"], described["shift"]) == ({"loss": "loss"}, {"loss": -1})


def test_a_shifted_scalar_is_available_one_step_later(tmp_path, out):
    log = write_log(tmp_path / "log", random_walk(STEPS - 2))
    ingest(log, out, shift={"loss": -1})
    write_log(tmp_path / "log", random_walk(STEPS)[-2:], range(STEPS - 2, STEPS))
    summary = ingest(log, out)
    assert (summary.new_steps, summary.attempts) == (2, 1)
    assert (summary.completed_steps, summary.last_step_lacks) == (1, ["loss"])
    losses = [float(state["loss"]) for state in random_walk(STEPS)][1:]
    np.testing.assert_array_equal(open_trajectory(out).scalar("loss"), [*losses, np.nan])
    write_step(log, 7, random_walk(STEPS, seed=1)[7])  # a changed state is still detected
    assert ingest(log, out).attempts == 2


# Run files and several sources ---------------------------------------------------------------------------------


def write_scalars(folder, states, key="nll"):
    path = folder / "metrics.jsonl"
    rows = [{"step": step, key: float(state["loss"]), "lr": 0.1} for step, state in enumerate(states)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def write_tensors(folder, states):
    return write_log(folder, [{k: v for k, v in state.items() if "/" in k} for state in states])


def test_options_of_a_run_file_are_compared_by_path(tmp_path, out):
    states = random_walk(STEPS)
    write_tensors(tmp_path / "log", states)
    write_scalars(tmp_path, states)
    file = tmp_path / "run.toml"

    def write(shift, more=""):
        scalars = f'[[source]]\npath = "metrics.jsonl"\nmap = {{ loss = "nll" }}\nshift = {{ loss = {shift} }}\n'
        file.write_text(f'[[source]]\npath = "log"\n{scalars}{more}')

    write(0)
    ingest(file, out)
    write(-1)
    with pytest.raises(InputError, match=r"the run file had .* for 'metrics.jsonl', and now it has") as refusal:
        ingest(file, out)
    assert "'shift': {'loss': -1}" in refusal.value.what
    write(0, '[[source]]\npath = "more.jsonl"\n')
    write_scalars(tmp_path, states, "loss").rename(tmp_path / "more.jsonl")
    write_scalars(tmp_path, states)
    assert ingest(file, out).new_steps == 0


def test_keys_of_a_scalar_log_do_not_apply_to_tensors(tmp_path, out):
    """The folder of a restarted run is passed alone, and is read with the options of the log of its kind."""
    states = random_walk(STEPS)
    log = write_tensors(tmp_path / "log", [{f"net/{k}": v for k, v in state.items()} for state in states[:5]])
    scalars = write_scalars(tmp_path, states[:5])
    tensors = {"parameter": "net/parameter", "gradient": "net/gradient"}
    ingest([log, scalars], out, mapping={**tensors, "loss": "nll"})
    again = write_log(
        tmp_path / "again",
        [{f"net/{k}": v for k, v in state.items()} for state in random_walk(STEPS, seed=1)[3:]],
        range(3, STEPS),
    )
    assert ingest(again, out).attempts == 2


def test_scalar_keys_of_a_single_source_do_not_apply_to_several_sources(tmp_path, out):
    states = [{**state, "my_loss": state["loss"]} for state in random_walk(STEPS)]
    log = write_log(tmp_path / "log", states)
    ingest(log, out, mapping={"loss": "my_loss"})
    scalars = write_scalars(tmp_path, states)
    with pytest.raises(InputError, match="from one SOURCE with --map loss=my_loss, but there are several now"):
        ingest([log, scalars], out)
    plain = tmp_path / "plain.zarr"
    ingest(log, plain)
    assert ingest([log, scalars], plain, mapping={"loss": "nll"}).new_steps == 0
