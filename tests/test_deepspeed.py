"""Checkpoints that DeepSpeed's engine wrote, in every stage of ZeRO, read without it."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import random_walk, write_log
from test_formats import TENSORS, arrays_of, ledger_of, refusal, trees_of

from pipeline.schema import InputError
from pipeline.sources.formats import FORMATS, open_source

reads_only = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
WRITER = Path(__file__).with_name("write_deepspeed.py")
SHAPES = {**TENSORS, "scale": (1,)}  # its engine does not take scalars
STATES = random_walk(5, SHAPES)
STAGES = ["stage 0", "stage 1, bf16", "stage 2", "stage 2, bf16", "stage 3", "stage 3, bf16"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder of the logs of one run in all stages, each by two processes."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.save(trees_of(STATES), folder / "states")
    arguments = ["2", str(folder / "rendezvous"), str(folder / "states"), str(folder / "log")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", WRITER, *arguments],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder / "log"


@pytest.fixture
def log(job, tmp_path):
    """A log of the first step, to be changed."""

    def copy(stage):
        shutil.copytree(job / stage / "global_step0", tmp_path / "log" / "global_step0")
        return tmp_path / "log"

    return copy


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """The gradients of the run, as a further source."""
    states = [{key: value for key, value in state.items() if key.startswith("gradient")} for state in STATES]
    return write_log(tmp_path_factory.mktemp("gradients"), states)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return ledger_of(folder, [write_log(folder / "log", STATES)])


def read(log, tensor, start=0, stop=None, step=0):
    size = int(np.prod(SHAPES[tensor])) if stop is None else stop
    out = np.zeros(size - start, np.float32)
    with log.open(log.steps()[step]) as reader:
        reader.read("parameter", tensor, start, out)
    return out


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_gives_the_ledger_of_the_run(tmp_path, job, gradients, expected, stage):
    assert next(name for name, format in FORMATS.items() if format.found(job / stage)) == "deepspeed"
    assert ledger_of(tmp_path, [job / stage, gradients]) == expected


def test_gradients_of_the_client_state_need_no_further_source(tmp_path, job, expected):
    shutil.copytree(job / "stage 3", tmp_path / "log")
    for step, state in enumerate(STATES):
        path = tmp_path / "log" / f"global_step{step}" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        tree = torch.load(path, weights_only=False)
        torch.save(tree | {"grad": arrays_of(state, "gradient")}, path)
    assert ledger_of(tmp_path, [tmp_path / "log"]) == expected


@given(stage=st.sampled_from(STAGES), tensor=st.sampled_from(list(SHAPES)), a=st.integers(0), b=st.integers(0))
@reads_only
def test_slices_across_the_shares_of_ranks_equal_the_tensor(job, stage, tensor, a, b):
    expected = STATES[2][f"parameter/{tensor}"].ravel()
    start, stop = sorted((a % (expected.size + 1), b % (expected.size + 1)))
    np.testing.assert_array_equal(read(open_source(job / stage), tensor, start, stop, step=2), expected[start:stop])


def test_the_weights_of_the_forward_pass_are_there_too(job):
    stored = open_source(job / "stage 2, bf16", mapping={"parameter": "module"})
    with stored.open(stored.steps()[0]) as reader:
        content = reader.content()
    assert content.arrays["parameter"]["layers.9.bias"].dtype == "bfloat16"
    assert "running_mean" in content.arrays["parameter"]
    assert content.ties == {"tied.weight": "layers.9.weight"}


@pytest.mark.parametrize("stage", STAGES)
def test_scalars_and_tied_weights_are_those_of_the_engine(job, stage):
    stored = open_source(job / stage)
    with stored.open(stored.steps()[3]) as reader:
        content = reader.content()
    assert content.scalars == {"loss": float(STATES[3]["loss"]), "learning_rate": 0.1}
    assert content.ties == {"tied.weight": "layers.9.weight"}


def test_a_checkpoint_that_is_not_the_latest_yet_is_left_out_aloud(tmp_path, job, caplog):
    shutil.copytree(job / "stage 2", tmp_path / "log")
    (tmp_path / "log" / "latest").write_text("global_step3")
    os.utime(tmp_path / "log" / "global_step4" / "mp_rank_00_model_states.pt")
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3]
    assert "still names global_step3" in caplog.text


def test_a_checkpoint_that_is_old_needs_no_latest(tmp_path, job):
    shutil.copytree(job / "stage 2", tmp_path / "log")
    (tmp_path / "log" / "latest").write_text("global_step3")
    for path in (tmp_path / "log" / "global_step4").iterdir():
        os.utime(path, (1e9, 1e9))
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3, 4]


def test_the_trainer_s_checkpoints_may_hold_the_weights_in_deepspeed_s_alone(tmp_path, job, gradients, expected):
    for step, state in enumerate(STATES):
        checkpoint = tmp_path / "log" / f"checkpoint-{step}"
        shutil.copytree(job / "stage 3" / f"global_step{step}", checkpoint / f"global_step{step}")
        entry = {"step": step + 1, "loss": float(state["loss"]), "learning_rate": 0.1}
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
    assert ledger_of(tmp_path, [tmp_path / "log", gradients]) == expected


# What does not fit together ----------------------------------------------------------------------------------


def only(folder, pattern):
    (path,) = folder.glob(f"global_step0/*{pattern}")
    return path


def rewritten(path, change):
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize("stage", ["stage 2", "stage 3", "stage 2, bf16"])
def test_a_rank_that_is_missing_or_too_many_is_refused(log, stage):
    folder = log(stage)
    lost = only(folder, "rank_1_mp_rank_00_optim_states.pt")
    stale = lost.with_name(re.sub("rank_1", "rank_2", lost.name, count=1))
    shutil.copy(lost, stale)
    assert "2 ranks wrote it, and 3" in refusal(folder).what
    stale.unlink()
    lost.unlink()
    assert "2 ranks wrote it, and 1" in refusal(folder).what


def state_of(tree):
    return tree["optimizer_state_dict"]


def cut(tree):
    flat = state_of(tree)["single_partition_of_fp32_groups"]
    flat[0] = flat[0][:-9].clone()


@pytest.mark.parametrize(
    ("stage", "file", "change", "what"),
    [
        ("stage 2", "rank_1_*optim_states.pt", cut, "the shapes of group 0 have 1235 elements, its ranks 1226"),
        (
            "stage 2",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree)["single_partition_of_fp32_groups"].pop(),
            "param_shapes has 2 groups",
        ),
        (
            "stage 2",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree).update(partition_count=[2, 1]),
            "different numbers of ranks",
        ),
        (
            "stage 2",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree).update(fp32_flat_groups=[torch.zeros(3)]),
            "different stages or dtypes",
        ),
        (
            "stage 3",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree)["fp32_flat_groups"].append(torch.zeros(9)),
            "rank 1 has",
        ),
        (
            "stage 3",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree).update(fp32_flat_groups=[]),
            "of dtypes none",
        ),
        (
            "stage 3",
            "rank_1_*optim_states.pt",
            lambda tree: state_of(tree).update(fp32_flat_groups=[None]),
            "not flat tensors",
        ),
        ("stage 3", "rank_0_*optim_states.pt", lambda tree: tree.clear(), "malformed"),
        (
            "stage 2",
            "mp_rank_00_model_states.pt",
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": torch.Size((1 << 59, 2))}),
            "its ranks 1235",
        ),
        (
            "stage 2",
            "mp_rank_00_model_states.pt",
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": (-1, -35)}),
            "no number of elements",
        ),
        (
            "stage 2",
            "mp_rank_00_model_states.pt",
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": None}),
            "no shape for 'layers.9.weight'",
        ),
        ("stage 2", "mp_rank_00_model_states.pt", lambda tree: tree.pop("param_shapes"), "malformed"),
        (
            "stage 2",
            "rank_0_*optim_states.pt",
            lambda tree: state_of(tree).update(param_alignment_paddings=[[0, 1 << 60], [0, 0]]),
            "no number of elements",
        ),
        (
            "stage 2",
            "rank_0_*optim_states.pt",
            lambda tree: state_of(tree).update(param_alignment_paddings=[[0, 4], [0, 0]]),
            "have 1239 elements",
        ),
    ],
)
def test_ranks_that_do_not_fit_together_are_refused(log, stage, file, change, what):
    folder = log(stage)
    rewritten(only(folder, file), change)
    assert what in refusal(folder).what


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mp_rank_01_model_states.pt", "model parallel"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "model parallel"),
        ("layer_02-model_00-model_states.pt", "stages of a pipeline"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_1_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_models_in_parts_that_no_file_describes_are_refused_with_the_way_out(log, name, why):
    folder = log("stage 2")
    (folder / "global_step0" / name).touch()
    refused = refusal(folder)
    assert why in refused.what
    assert "ds_to_universal" in refused.remedy


class Payload:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "rank_1_*optim_states.pt"])
def test_a_payload_never_runs_and_the_official_way_is_named(log, tmp_path, file):
    folder = log("stage 2")
    rewritten(only(folder, file), lambda tree: tree.update(more=Payload(tmp_path / "trace")))
    refused = refusal(folder)
    assert "posix.mkdir" in refused.what
    assert "zero_to_fp32.py" in refused.remedy
    assert not (tmp_path / "trace").exists()
    torch.load(only(folder, file), weights_only=False)
    assert (tmp_path / "trace").exists()  # the trap works


@given(
    stage=st.sampled_from(["stage 2", "stage 3"]),
    file=st.integers(0, 9),
    changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
    length=st.none() | st.integers(0),
)
@reads_only
def test_a_damaged_checkpoint_is_read_or_refused_and_nothing_else(tmp_path, job, stage, file, changes, length):
    folder = tmp_path / stage
    if not folder.exists():
        shutil.copytree(job / stage / "global_step0", folder / "global_step0")
    names = sorted(path.name for path in (folder / "global_step0").iterdir())
    path = folder / "global_step0" / names[file % len(names)]
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for position, byte in changes:
        damaged[position % len(damaged)] = byte
    path.write_bytes(damaged if length is None else damaged[: length % len(damaged)])
    with contextlib.suppress(InputError):
        stored = open_source(folder)
        with stored.open(stored.steps()[0]) as reader:
            for name, logged in reader.content().arrays["parameter"].items():
                reader.read("parameter", name, 0, np.zeros(np.prod(logged.shape, dtype=int), np.float32))
    path.write_bytes(whole)


def test_what_was_removed_while_it_was_read_is_refused(log):
    folder = log("stage 3")
    stored = open_source(folder)
    with stored.open(stored.steps()[0]) as reader:
        only(folder, "rank_1_*optim_states.pt").unlink()
        with pytest.raises(InputError, match="removed it while it was read"):
            reader.read("parameter", "layers.10.weight", 0, np.zeros(1200, np.float32))
