"""Checkpoints of verl: every rank saves its part of each tensor, as a DTensor."""

import contextlib
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats import TENSORS, arrays_of, has_copies, ledger_of, run_of

from damage import changes, damage, reads_only
from lazy import Lazy
from logs import run_writer, write_log
from natgrad.schema.errors import InputError
from natgrad.sources.completion import complete
from natgrad.sources.opening import format_of
from natgrad.storage import open_storage
from natgrad.store import open_trajectory
from opened import ingest, open_source

torch = Lazy("torch")

RANKS = 3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The checkpoints of three ranks, and a log with the gradients and scalars of the same run."""
    folder, states = tmp_path_factory.mktemp("verl"), run_of("float32")
    torch.save([{"model": arrays_of(state, "parameter")} for state in states], folder / "states")
    run_writer("write_ranks.py", folder / "states", folder / "log", str(RANKS))
    others = [{k: v for k, v in state.items() if not k.startswith("parameter")} for state in states]
    return folder / "log", write_log(folder / "gradients", others)


@pytest.fixture
def log(job, tmp_path):
    shutil.copytree(job[0], tmp_path / "log")
    return tmp_path / "log"


def test_the_parts_of_all_ranks_give_the_ledger_of_the_run(tmp_path, job):
    assert format_of(open_storage(job[0])) == "verl"
    expected = ledger_of(tmp_path / "native", [write_log(tmp_path / "log", run_of("float32"))])
    assert ledger_of(tmp_path / "verl", list(job)) == expected
    assert ledger_of(tmp_path / "in place", list(job), in_place=True) == expected
    assert not has_copies(tmp_path / "in place")


def test_the_optimizer_is_assembled_in_the_same_way(tmp_path, job):
    ingest(job, tmp_path / "out", include=["optimizer"])
    states = open_trajectory(tmp_path / "out")
    assert set(states.dtypes) == {"parameter", "gradient", "exp_avg"}
    assert states.columns == 1
    parameter, moment = (np.zeros((states.n_states, states.chunk[1]), np.float32) for _ in range(2))
    states.read("parameter", 0, states.n_states, 0, parameter)
    states.read("exp_avg", 0, states.n_states, 0, moment)
    np.testing.assert_array_equal(moment, parameter * 2)
    assert (states.scalar("updates") == np.arange(states.n_states)[:, None]).all()


@given(tensor=st.sampled_from(list(TENSORS)), a=st.integers(0), b=st.integers(0))
@reads_only
def test_slices_across_the_parts_equal_the_tensor(job, tensor, a, b):
    expected = run_of("float32")[1][f"parameter/{tensor}"].ravel()
    start, stop = sorted((a % (expected.size + 1), b % (expected.size + 1)))
    log = open_source(job[0])
    with log.open(log.steps()[1]) as reader:
        reader.read("parameter", tensor, start, out := np.zeros(stop - start, np.float32))
    np.testing.assert_array_equal(out, expected[start:stop])


def test_a_checkpoint_that_lacks_ranks_is_left_for_the_next_pass(log, caplog):
    last = log / "global_step_4" / "actor" / "model_world_size_3_rank_1.pt"
    last.unlink()
    assert [step.number for step in open_source(log).steps()] == [0, 1, 2, 3]
    assert "it lacks the files of 1 of 3 ranks, the first is 1" in caplog.text
    for file in log.rglob("*"):
        os.utime(file, (1, 1))
    with pytest.raises(InputError, match="never completed: it lacks the files"):
        open_source(log).steps()


def test_a_checkpoint_newer_than_the_tracker_is_left_for_the_next_pass(log):
    (log / "latest_checkpointed_iteration.txt").write_text("3")
    assert [step.number for step in open_source(log).steps()] == [0, 1, 2, 3]


def test_the_critic_is_selected_with_a_pattern(log):
    for step in range(5):
        shutil.copytree(log / f"global_step_{step}" / "actor", log / f"global_step_{step}" / "critic")
    steps = open_source(log).steps()
    with open_source(log).open(steps[0]) as reader:
        (note,) = (note for note in reader.content().notes if "critic" in note)
    pattern = "global_step_{step}/critic"
    assert f"--pattern '{pattern}'" in note
    assert [step.storage.name for step in open_source(log, pattern=pattern).steps()] == ["critic"] * 5


def refusal(log, step=0):
    source = open_source(log)
    step = source.steps()[step]
    with pytest.raises(InputError) as caught, source.open(step) as reader:
        complete(step, reader.content())
    return caught.value


@pytest.mark.parametrize("plain", [False, True])
def test_files_that_contradict_each_other_are_refused(log, plain):
    path = log / "global_step_0" / "actor" / "model_world_size_3_rank_1.pt"
    shutil.copy(path.with_name("model_world_size_3_rank_2.pt"), path)
    if plain:
        torch.save(arrays_of(run_of("float32")[0], "parameter"), path)
    assert ("have different objects for" if plain else "do not add up to its shape") in refusal(log).what


def test_the_part_of_one_rank_alone_is_refused_with_a_remedy(tmp_path, job):
    shutil.copy(job[0] / "global_step_0" / "actor" / "model_world_size_3_rank_0.pt", tmp_path / "step_0.pt")
    error = refusal(tmp_path)
    assert "DTensor" in error.what
    assert "verl.model_merger" in error.remedy


@given(changes=changes(), rank=st.integers(0, RANKS - 1))
@reads_only
def test_a_corrupt_file_is_either_read_or_refused(tmp_path, job, changes, rank):
    folder = tmp_path / "global_step_0"
    if not folder.exists():
        shutil.copytree(job[0] / "global_step_0", folder)
    name = f"actor/model_world_size_3_rank_{rank}.pt"
    (folder / name).write_bytes(damage((job[0] / "global_step_0" / name).read_bytes(), changes))
    log = open_source(tmp_path)
    with contextlib.suppress(InputError), log.open(log.steps()[0]) as reader:
        for tensor, logged in reader.content().arrays.get("parameter", {}).items():
            if logged.dtype == "float32" and np.prod(logged.shape) < 10_000:
                reader.read("parameter", tensor, 0, np.zeros(int(np.prod(logged.shape)), np.float32))
    shutil.copy(job[0] / "global_step_0" / name, folder / name)
