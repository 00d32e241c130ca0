"""Checkpoints written by the DeepSpeed engine in every stage of ZeRO, read without DeepSpeed."""

import contextlib
import json
import os
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats import TENSORS, arrays_of, has_copies, ledger_of, refusal, trees_of
from test_saved_state import stored

from damage import LENGTHS, Payload, changes, damage, reads_only
from lazy import Lazy
from logs import random_walk, run_writer, write_log
from natgrad.schema.errors import InputError
from natgrad.sources.formats import FORMATS
from natgrad.sources.optimizers.recovery import RULE_NAMES
from opened import ingest, open_source
from optimizer_states import WithoutGradients, recovered

torch = Lazy("torch")
safetensors_torch = Lazy("safetensors.torch")

SHAPES = {**TENSORS, "scale": (1,)}  # the engine does not support scalars
STATES = random_walk(5, SHAPES)
# Powers of two: moments of gradients of few digits are exact, even if the processor fuses operations.
GROUPS = [
    {"lr": rate, "weight_decay": decay, "betas": (0.5, 0.75), "eps": 2.0**-10}
    for rate, decay in ((0.125, 0.25), (0.03125, 0.0))
]
DIGITS = np.random.default_rng(0)
EXACT = [{t: (DIGITS.integers(-8, 9, s) / 8).astype(np.float32) for t, s in SHAPES.items()} for _ in STATES]
STAGES = ["stage 0", "stage 1, bf16", "stage 2", "stage 2, bf16", "stage 3", "stage 3, bf16"]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Folder with the logs of one run in all stages, each written by two processes, some by three."""
    folder = tmp_path_factory.mktemp("deepspeed")
    more = [{"exact": {t: torch.from_numpy(g) for t, g in exact.items()}, "groups": GROUPS} for exact in EXACT]
    torch.save([one | other for one, other in zip(trees_of(STATES), more, strict=True)], folder / "states")
    run_writer(
        "write_deepspeed.py", *(folder / name for name in ("rendezvous", "states", "log")), DS_ACCELERATOR="cpu"
    )
    return folder / "log"


@pytest.fixture
def log(job, tmp_path):
    """A log of the first step that tests may modify."""

    def copy(stage):
        shutil.copytree(job / stage / "global_step0", tmp_path / "log" / "global_step0")
        return tmp_path / "log"

    return copy


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """The gradients of the run, as an additional source."""
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
    assert next(name for name, format in FORMATS.items() if format.find(job / stage)) == "deepspeed"
    assert ledger_of(tmp_path, [job / stage, gradients]) == expected
    assert ledger_of(tmp_path / "in place", [job / stage, gradients], in_place=True) == expected
    assert not has_copies(tmp_path / "in place")


@pytest.mark.parametrize("stage", STAGES)
def test_partitioned_states_of_deepspeed_give_the_gradients(job, stage):
    log = WithoutGradients(open_source(job / f"{stage}, trained"))
    gradients, figures = recovered(log)
    assert len(gradients) == len(EXACT)
    for found, exact, numbers in zip(gradients, EXACT, figures, strict=True):
        for name, values in found.items():
            error = np.linalg.norm(values - exact[name].ravel()) / np.linalg.norm(exact[name])
            assert error <= numbers["gradient_error_bound"][name]
            assert RULE_NAMES[int(numbers["gradient_rule"][name])] in ("AdamW", "Adam")


def test_gradients_in_the_client_state_need_no_additional_source(tmp_path, job, expected):
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


def test_the_weights_of_the_forward_pass_are_available(job):
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


def test_a_checkpoint_newer_than_the_tracker_file_is_omitted_with_a_warning(tmp_path, job, caplog):
    shutil.copytree(job / "stage 2", tmp_path / "log")
    (tmp_path / "log" / "latest").write_text("global_step3")
    os.utime(tmp_path / "log" / "global_step4" / "mp_rank_00_model_states.pt")
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3]
    assert "still contains global_step3" in caplog.text


def test_an_old_checkpoint_needs_no_tracker_file(tmp_path, job):
    shutil.copytree(job / "stage 2", tmp_path / "log")
    (tmp_path / "log" / "latest").write_text("global_step3")
    for path in (tmp_path / "log" / "global_step4").iterdir():
        os.utime(path, (1e9, 1e9))
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3, 4]


def test_trainer_checkpoints_may_contain_weights_only_in_the_deepspeed_folder(tmp_path, job, gradients, expected):
    for step, state in enumerate(STATES):
        checkpoint = tmp_path / "log" / f"checkpoint-{step}"
        shutil.copytree(job / "stage 3" / f"global_step{step}", checkpoint / f"global_step{step}")
        entry = {"step": step + 1, "loss": float(state["loss"]), "learning_rate": 0.1}
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [entry]}))
    assert ledger_of(tmp_path, [tmp_path / "log", gradients]) == expected


# Optimizer state ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth():
    """Return the state of the torch optimizer by tensor, before each update and after the last one."""
    parameters = {name: torch.nn.Parameter(value) for name, value in arrays_of(STATES[0], "parameter").items()}
    groups = [{"params": [p], **GROUPS[p.ndim != 2]} for p in parameters.values()]
    optimizer = torch.optim.AdamW(groups)
    states = [{}]
    for exact in EXACT:
        for name, parameter in parameters.items():
            parameter.grad = torch.from_numpy(exact[name])
        optimizer.step()
        states.append(
            {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in parameters.items()}
        )
    return states


def trajectory_of(folder, log, **options):
    ingest([log], folder / "store", include=["optimizer"], **options)
    return stored(folder / "store")


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizer_of_every_stage_equals_that_of_torch(tmp_path, job, truth, stage):
    states, arrays = trajectory_of(tmp_path, job / f"{stage}, trained")
    assert states.n_states == len(truth)
    assert "master_parameter" not in arrays  # they are the parameters
    for step, expected in enumerate(truth):
        for tensor in states.layout.tensors:
            name, index = tensor.name, states.layout.tensors.index(tensor)
            for array in ("exp_avg", "exp_avg_sq"):
                found = arrays[array][name][step]
                if step:
                    np.testing.assert_array_equal(found, expected[name][array].numpy().ravel())
                else:
                    assert np.isnan(found).all()
            updates = states.scalar("updates")[step, index]
            assert updates == step if step else np.isnan(updates)
            found = {
                "lr": states.scalar("tensor_learning_rate")[step, index],
                "weight_decay": states.scalar("weight_decay")[step, index],
                "betas": (states.scalar("beta1")[step, index], states.scalar("beta2")[step, index]),
                "eps": states.scalar("epsilon")[step, index],
            }
            assert found == GROUPS[len(tensor.shape) != 2]


@pytest.mark.parametrize("stage", ["stage 2", "stage 3"])
def test_the_optimizer_of_three_ranks_equals_that_of_torch(tmp_path, job, truth, stage):
    """Test slices across rank boundaries inside tensors, and the padding of the last rank."""
    states, arrays = trajectory_of(tmp_path, job / f"{stage}, three")
    for array in ("exp_avg", "exp_avg_sq"):
        for name, rows in arrays[array].items():
            for step in range(1, states.n_states):
                np.testing.assert_array_equal(rows[step], truth[step][name][array].numpy().ravel())


@pytest.mark.parametrize("stage", ["stage 1, bf16", "stage 2, bf16"])
def test_master_weights_are_optimizer_state_if_forward_weights_are_saved(tmp_path, job, stage):
    log = job / f"{stage}, trained"
    _, masters = trajectory_of(tmp_path / "masters", log)
    states, arrays = trajectory_of(tmp_path / "module", log, mapping={"parameter": "module"})
    assert states.dtypes["parameter"] == "bfloat16"
    for name, rows in masters["parameter"].items():
        np.testing.assert_array_equal(arrays["master_parameter"][name], rows)
        np.testing.assert_array_equal(arrays["exp_avg"][name], masters["exp_avg"][name])
        rounded = torch.from_numpy(rows).bfloat16().view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(arrays["parameter"][name], rounded)


def trainer_folder(folder, log):
    """Return a Trainer folder with separate models and DeepSpeed checkpoints."""
    for step in range(len(STATES) + 1):
        checkpoint = folder / f"checkpoint-{step}"
        inner = checkpoint / f"global_step{step}"
        shutil.copytree(log / inner.name, inner)
        tree = torch.load(inner / "mp_rank_00_model_states.pt", weights_only=False)
        model = {name: value for name, value in tree["module"].items() if name != "tied.weight"}
        safetensors_torch.save_file(model, checkpoint / "model.safetensors")
        safetensors_torch.save_file(tree["grad"], checkpoint / "gradient.safetensors")
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": []}))
    return folder


def test_the_trainer_model_and_the_deepspeed_optimizer_form_one_checkpoint(tmp_path, job, truth):
    log = trainer_folder(tmp_path / "log", job / "stage 2, bf16, trained")
    states, arrays = trajectory_of(tmp_path, log)
    _, masters = trajectory_of(tmp_path / "masters", job / "stage 2, bf16, trained")
    assert states.dtypes["parameter"] == "bfloat16"
    for name, rows in arrays["exp_avg_sq"].items():
        np.testing.assert_array_equal(arrays["master_parameter"][name], masters["parameter"][name])
        for step in range(1, states.n_states):
            np.testing.assert_array_equal(rows[step], truth[step][name]["exp_avg_sq"].numpy().ravel())


def test_a_model_is_read_if_its_optimizer_cannot_be_read(tmp_path, job, caplog):
    log = trainer_folder(tmp_path / "log", job / "stage 2, trained")
    for path in log.glob("checkpoint-*/global_step*/*rank_1_*optim_states.pt"):
        path.unlink()
    assert ingest([log], tmp_path / "store").steps == len(STATES) + 1
    assert "global_step0/optimizer was not read" in caplog.text
    assert "written by 2 ranks, but there are 1" in caplog.text
    with pytest.raises(InputError, match="contain no optimizer state"):
        ingest([log], tmp_path / "other", include=["optimizer"])


def moments(tree):
    state = tree["optimizer_state_dict"]
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def other_numbers(tree):
    state = moments(tree)["state"]
    state[7] = state.pop(0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda tree: moments(tree)["state"][0].pop("exp_avg"),
            "group 0 of a rank has none that matches its weights",
        ),
        (
            lambda tree: moments(tree)["state"][1].update(exp_avg=torch.zeros(5)),
            "group 1 of a rank has none that matches its weights",
        ),
        (
            lambda tree: [s.update(exp_avg=s["exp_avg"].bfloat16()) for s in moments(tree)["state"].values()],
            "it has several dtypes",
        ),
        (other_numbers, "group 0 of a rank has none that matches its weights"),
    ],
)
def test_moments_that_do_not_match_the_weights_are_omitted_with_a_note(tmp_path, job, caplog, change, what):
    shutil.copytree(job / "stage 2, trained", tmp_path / "log")
    for path in (tmp_path / "log").glob("global_step[1-9]/*rank_1_*optim_states.pt"):
        rewritten(path, change)
    _, arrays = trajectory_of(tmp_path, tmp_path / "log")
    assert "exp_avg" not in arrays
    assert f"optimizer/exp_avg was not read: {what}" in caplog.text


def test_moments_of_an_elastic_checkpoint_have_no_padding_and_no_options(tmp_path, job, truth):
    """With `elastic_checkpoint`, `base_optimizer_state` is a list of the states of the groups."""
    shutil.copytree(job / "stage 2, trained", tmp_path / "log")
    for path in (tmp_path / "log").glob("global_step*/*optim_states.pt"):

        def elastic(tree):
            state = state_of(tree)
            padding = state["group_paddings"] if "rank_1" in path.name else [0, 0]  # noqa: B023
            lean = [
                {k: v[: len(v) - gap] if v.ndim else v for k, v in of.items()}
                for of, gap in zip(state["base_optimizer_state"]["state"].values(), padding, strict=False)
            ]
            state["base_optimizer_state"] = lean

        rewritten(path, elastic)
    states, arrays = trajectory_of(tmp_path, tmp_path / "log")
    for name, rows in arrays["exp_avg_sq"].items():
        for step in range(1, states.n_states):
            np.testing.assert_array_equal(rows[step], truth[step][name]["exp_avg_sq"].numpy().ravel())
    assert (states.scalar("updates")[1:] == np.arange(1, states.n_states)[:, None]).all()


# Inconsistent files ------------------------------------------------------------------------------------------


def only(folder, pattern):
    (path,) = folder.glob(f"global_step0/*{pattern}")
    return path


def rewritten(path, change):
    tree = torch.load(path, weights_only=False)
    change(tree)
    torch.save(tree, path)


@pytest.mark.parametrize("stage", ["stage 2", "stage 3", "stage 2, bf16"])
def test_a_missing_or_surplus_rank_is_refused(log, stage):
    folder = log(stage)
    lost = only(folder, "rank_1_mp_rank_00_optim_states.pt")
    stale = lost.with_name(re.sub("rank_1", "rank_2", lost.name, count=1))
    shutil.copy(lost, stale)
    assert "written by 2 ranks, but there are 3" in refusal(folder).what
    stale.unlink()
    lost.unlink()
    assert "written by 2 ranks, but there are 1" in refusal(folder).what


def state_of(tree):
    return tree["optimizer_state_dict"]


def cut(tree):
    flat = state_of(tree)["single_partition_of_fp32_groups"]
    flat[0] = flat[0][:-9].clone()


@pytest.mark.parametrize(
    ("stage", "file", "change", "what"),
    [
        (
            "stage 2",
            "rank_1_*optim_states.pt",
            cut,
            "the shapes of group 0 have 1235 elements, but its ranks have 1226",
        ),
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
            "have the dtypes none",
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
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": torch.Size((1 << 49, 2))}),
            "its ranks have 1235",
        ),
        (
            "stage 2",
            "mp_rank_00_model_states.pt",
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": (-1, -35)}),
            "is -1, which is not an integer",
        ),
        (
            "stage 2",
            "mp_rank_00_model_states.pt",
            lambda tree: tree["param_shapes"][0].update({"layers.9.weight": None}),
            "the shape of 'layers.9.weight' is None",
        ),
        ("stage 2", "mp_rank_00_model_states.pt", lambda tree: tree.pop("param_shapes"), "malformed"),
        (
            "stage 2",
            "rank_0_*optim_states.pt",
            lambda tree: state_of(tree).update(param_alignment_paddings=[[0, 1 << 60], [0, 0]]),
            "a number of elements is",
        ),
        (
            "stage 2",
            "rank_0_*optim_states.pt",
            lambda tree: state_of(tree).update(param_alignment_paddings=[[0, 4], [0, 0]]),
            "have 1239 elements",
        ),
    ],
)
def test_inconsistent_ranks_are_refused(log, stage, file, change, what):
    folder = log(stage)
    rewritten(only(folder, file), change)
    assert what in refusal(folder).what


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mp_rank_01_model_states.pt", "model parallel"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "model parallel"),
        ("layer_02-model_00-model_states.pt", "pipeline stages"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "experts"),
        ("expp_rank_1_mp_rank_00_optim_states.pt", "experts"),
    ],
)
def test_models_with_unrecorded_splits_are_refused_with_a_remedy(log, name, why):
    folder = log("stage 2")
    (folder / "global_step0" / name).touch()
    refused = refusal(folder)
    assert why in refused.what
    assert "ds_to_universal" in refused.remedy


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "rank_1_*optim_states.pt"])
def test_a_payload_never_runs_and_is_reported(log, tmp_path, file):
    folder = log("stage 2")
    rewritten(only(folder, file), lambda tree: tree.update(more=Payload(tmp_path / "trace")))
    source = open_source(folder)
    with source.open(source.steps()[0]) as reader:
        assert any("'posix.mkdir'" in note for note in reader.content().notes)
    assert not (tmp_path / "trace").exists()
    torch.load(only(folder, file), weights_only=False)
    assert (tmp_path / "trace").exists()  # the trap works


@given(
    stage=st.sampled_from(["stage 2", "stage 3"]),
    file=st.integers(0, 9),
    changes=changes(),
    length=LENGTHS,
)
@reads_only
def test_a_corrupt_checkpoint_is_either_read_or_refused(tmp_path, job, stage, file, changes, length):
    folder = tmp_path / stage
    if not folder.exists():
        shutil.copytree(job / stage / "global_step0", folder / "global_step0")
    names = sorted(path.name for path in (folder / "global_step0").iterdir())
    path = folder / "global_step0" / names[file % len(names)]
    whole = path.read_bytes()
    path.write_bytes(damage(whole, changes, length))
    with contextlib.suppress(InputError):
        stored = open_source(folder)
        with stored.open(stored.steps()[0]) as reader:
            for name, logged in reader.content().arrays["parameter"].items():
                reader.read("parameter", name, 0, np.zeros(np.prod(logged.shape, dtype=int), np.float32))
    path.write_bytes(whole)


def test_a_file_removed_during_reading_is_refused(log):
    folder = log("stage 3")
    stored = open_source(folder)
    with stored.open(stored.steps()[0]) as reader:
        only(folder, "rank_1_*optim_states.pt").unlink()
        with pytest.raises(InputError, match="removed them while they were read"):
            reader.read("parameter", "layers.10.weight", 0, np.zeros(1200, np.float32))


def test_the_float32_weights_of_a_universal_checkpoint_are_read(tmp_path):
    weights = {"layer.weight": torch.full((2, 3), 1 + 2.0**-20), "layer.bias": torch.full((3,), 2.0**-30)}
    for step in range(2):
        folder = tmp_path / "log" / f"global_step{step}"
        folder.mkdir(parents=True)
        half = {name: value.bfloat16() for name, value in weights.items()}
        torch.save({"module": half, "grad": weights, "global_steps": step}, folder / "mp_rank_00_model_states.pt")
        for name, value in weights.items():
            (folder / "zero" / name).mkdir(parents=True)
            torch.save({"param": value}, folder / "zero" / name / "fp32.pt")
    log = open_source(tmp_path / "log")
    with log.open(log.steps()[0]) as reader:
        for name, value in weights.items():
            assert reader.content().arrays["parameter"][name].dtype == "float32"
            out = np.empty(value.numel(), np.float32)
            reader.read("parameter", name, 0, out)
            assert (out == value.numpy().ravel()).all()
