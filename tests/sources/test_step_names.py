"""The number of a step is found in its name by one rule, in every container, or not at all."""

import os

import h5py
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import natgrad
from lazy import Lazy
from logs import random_walk
from natgrad.schema.errors import InputError
from natgrad.sources.step_names import AUTOMATIC, Naming, checked_pattern, parse_name, step_number
from natgrad.sources.steps import NotYet
from natgrad.store import open_trajectory
from opened import ingest, open_source

torch = Lazy("torch")

TAKEN = {
    "step_3": 3,
    "step-000": 0,
    "step 4": 4,
    "step<7>": 7,
    "grad-000001": 1,
    "params_3": 3,
    "model000100": 100,
    "model_7": 7,
    "12": 12,
    "0012": 12,
    "checkpoint-500": 500,
    "checkpoint-1000-best": 1000,
    "ckpt_1k": 1000,
    "step_10k": 10_000,
    "step_1.5M": 1_500_000,
    "10k": 10_000,
    "iter_0000010": 10,
    "global_step14": 14,
    "ModelStep100": 100,
    "rl_model_10000_steps": 10_000,
    "epoch=1-step=200": 200,
    "epoch3_iter200": 200,
    "200steps_epoch3": 200,
    "ep0-ba100-rank0": 100,
    "step1000-tokens4B": 1000,
    "epoch=2-train_loss_step=1-step=30": 30,
    "epoch=2-step=30-val_loss=-0.5": 30,
    "epoch=0-lr=1e-05-step=7": 7,
    "sample-mnist_epoch=1_global_step=50": 50,
    "model_step=100": 100,
    "ema_0.9999_010000": 10_000,
    "epoch=0-step=3-v1": 3,
}
NOT_TAKEN = {
    "epoch_3": "counts epochs",
    "model_epoch_3": "counts epochs",
    "checkpoint_epoch_3": "counts epochs",
    "net-epoch-3": "counts epochs",
    "3_epochs": "counts epochs",
    "epoch=3-train_loss_step=0.25": "counts epochs",
    "epoch_3_100": "counts epochs",
    "train_loss_step=3": "not marked",
    "loss=0.5": "not marked",
    "reward=-100": "not marked",
    "step_1.5": "not marked",
    "gpt-125m": "not marked",
    "step_1_iter_2": "may each be",
    "2024-01-05": "may each be",
    "step_" + "9" * 30: "too large",
    "model-00001-of-00002": "",
    "rng_state_0": "",
    "run-1": "",
    "seed_2": "",
    "gpt2": "",
    "a3f9c2": "",
    "model-v1": "",
    "final": "",
    "step_٣": "",
}


@pytest.mark.parametrize("name", TAKEN)
def test_the_number_of_updates_is_taken_from_a_name(name):
    assert step_number(name) == TAKEN[name]


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_number_that_counts_something_else_is_not_taken(name):
    found = parse_name(name)
    assert found.number is None
    assert NOT_TAKEN[name] in found.problem
    assert bool(found.problem) == bool(NOT_TAKEN[name])


@given(
    st.integers(0, 10**17),
    st.sampled_from(
        ["step_{}", "ckpt-{}", "epoch=7-step={}", "{}", "global_step{}", "a_{}", "iter {}", "{}_steps"]
    ),
    st.integers(0, 5),
    st.sampled_from(["", "-v1", "-v12"]),
)
def test_padding_and_attempts_do_not_change_the_number(number, form, zeros, attempt):
    found = parse_name(form.format("0" * zeros + str(number)) + attempt)
    assert (found.number, found.attempt) == (number, int(attempt[2:] or 0))


@given(st.text(max_size=60))
def test_every_name_is_parsed(name):
    found = parse_name(name)
    assert found.number is None or (found.number >= 0 and not found.problem)
    assert AUTOMATIC.parse((name,), name) == found


@pytest.mark.parametrize(
    ("pattern", "names", "number"),
    [
        ("weights.{step}", ("weights.12",), 12),
        ("ckpt-*{step}.pt", ("ckpt-a100.pt",), 100),
        ("epoch=*-step={step}.ckpt", ("epoch=1-step=10-v2.ckpt",), 10),
        ("m{step}.pt", ("m1.5M.pt",), 1_500_000),
        ("m{step}.pt", ("m1.5.pt",), None),
        ("{step}/w.pt", ("12", "w.pt"), 12),
        ("{step}/w.pt", ("12", "v.pt"), None),
        ("model_epoch_{step}.pt", ("model_epoch_3.pt",), 3),
        ("model_epoch_{step}.pt", ("model_epoch_3.pth",), None),
    ],
)
def test_a_pattern_selects_names_and_their_number(pattern, names, number):
    assert Naming(checked_pattern(pattern)).parse(names, names[-1]).number == number


@pytest.mark.parametrize(
    "pattern", ["a", "{step}{step}", "{epoch}-{step}", "../{step}", "/{step}", "{step}/", "*" * 9]
)
def test_an_invalid_pattern_is_refused(pattern):
    with pytest.raises(InputError, match="not a pattern of names"):
        checked_pattern(pattern)


# Logs -----------------------------------------------------------------------------------------------------------


def save(path, state):
    """Write a state into a container that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".safetensors"):
        safetensors.numpy.save_file({key: np.asarray(value, order="C") for key, value in state.items()}, path)
    elif path.name.endswith(".npz"):
        np.savez(path, **state)
    elif path.name.endswith((".h5", ".hdf5")):
        with h5py.File(path, "w") as file:
            for key, value in state.items():
                file[key] = value
    else:
        arrays = {"model": {}, "grad": {}}
        for key, value in state.items():
            array, _, tensor = key.partition("/")
            if tensor:
                arrays["model" if array == "parameter" else "grad"][tensor] = torch.from_numpy(np.array(value))
        torch.save({**arrays, "loss": float(state["loss"]), "lr": float(state["learning_rate"])}, path)


def steps_of(folder, **options):
    return {step.number: step.storage.name for step in open_source(folder, **options).steps()}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".pth.tar", ".h5", ".hdf5"])
@pytest.mark.parametrize(
    "form", ["step-{:03}", "params_{}", "grad-{:06}", "step {}", "model{:06}", "epoch=0-step={}"]
)
def test_one_rule_holds_for_all_containers(tmp_path, suffix, form):
    states = random_walk(3)
    for step, state in enumerate(states):
        save(tmp_path / "log" / (form.format(step) + suffix), state)
    ingest(tmp_path / "log", tmp_path / "out")
    stored = open_trajectory(tmp_path / "out")
    assert stored.scalar("step").tolist() == [0, 1, 2]
    assert stored.scalar("loss").tolist() == [state["loss"] for state in states]


def test_units_sort_as_numbers_and_the_summary_names_their_origin(tmp_path):
    for name, state in zip(("500", "1k", "2k"), random_walk(3), strict=True):
        save(tmp_path / f"ckpt_{name}.pt", state)
    assert list(steps_of(tmp_path)) == [500, 1000, 2000]
    summary = natgrad.inspect(tmp_path)
    assert summary.step_numbers == {"500": "'ckpt_500' in 'ckpt_500.pt'", "2000": "'ckpt_2k' in 'ckpt_2k.pt'"}


@pytest.mark.parametrize("form", ["epoch_{}.pt", "model_epoch_{}.pt", "checkpoint_epoch_{}.pt", "net-epoch-{}.npz"])
def test_epochs_are_refused_and_the_remedy_works(tmp_path, form):
    for epoch, state in enumerate(random_walk(3), 1):
        save(tmp_path / form.format(epoch), state)
    with pytest.raises(InputError, match="no name in this folder has a step number") as refused:
        steps_of(tmp_path)
    assert "counts epochs" in refused.value.why
    pattern = form.format("{step}")
    assert f"--pattern '{pattern}'" in refused.value.remedy
    assert list(steps_of(tmp_path, pattern=pattern)) == [1, 2, 3]


def write_lightning(folder, names, numbers):
    folder.mkdir(exist_ok=True)
    for name, number in zip(names, numbers, strict=True):
        tree = {"state_dict": {"w": torch.full((2,), float(number))}, "gradient": {"w": torch.ones(2)}}
        torch.save({**tree, "global_step": number, "epoch": 0}, folder / f"{name}.ckpt")


@pytest.mark.parametrize("format", [None, "lightning", "torch"])
def test_the_number_is_taken_from_the_file_if_the_name_has_none(tmp_path, format):
    names = ["epoch=0-val_loss=0.91", "epoch=1-val_loss=0.54", "epoch=2-train_loss_step=0.32", "last"]
    write_lightning(tmp_path / "log", names, [100, 200, 300, 300])
    with pytest.raises(InputError, match="no name in this folder") as refused:
        steps_of(tmp_path / "log", format=format)
    assert "--map step=global_step" in refused.value.remedy
    found = steps_of(tmp_path / "log", format=format, mapping={"step": "global_step"})
    assert found == dict(zip((100, 200, 300), (f"{name}.ckpt" for name in names[:3]), strict=True))


def test_names_without_any_number_need_the_key(tmp_path):
    write_lightning(tmp_path / "log", ["first", "second"], [10, 20])
    (tmp_path / "log" / "notes.ckpt").write_text("no checkpoint")
    with pytest.raises(NotYet):
        steps_of(tmp_path / "log")
    assert steps_of(tmp_path / "log", mapping={"step": "global_step"}) == {10: "first.ckpt", 20: "second.ckpt"}


def test_a_file_of_an_epoch_among_steps_is_omitted_with_a_warning(tmp_path, caplog):
    write_lightning(tmp_path, ["epoch=0-step=1", "epoch=0-step=2", "epoch=3", "last"], [1, 2, 3, 3])
    assert list(steps_of(tmp_path)) == [1, 2]
    assert "1 entries are skipped" in caplog.text
    assert "epoch=3.ckpt" in caplog.text


def test_the_newest_attempt_is_read_and_steps_abandoned_by_it_are_not(tmp_path, caplog):
    names = [f"epoch=0-step={number}{ending}" for number, ending in enumerate(["", "", "", "", "-v1", "-v1", ""])]
    write_lightning(tmp_path, [*(f"epoch=0-step={number}" for number in (4, 5, 8)), *names], [4, 5, 8, *range(7)])
    for age, name in enumerate(("epoch=0-step=6", "epoch=0-step=4-v1", "epoch=0-step=8", "epoch=0-step=4")):
        os.utime(tmp_path / f"{name}.ckpt", (1_700_000_000 - age,) * 2)
    found = steps_of(tmp_path)
    assert list(found) == [0, 1, 2, 3, 4, 5, 6]
    assert (found[4], found[5], found[6]) == (
        "epoch=0-step=4-v1.ckpt",
        "epoch=0-step=5-v1.ckpt",
        names[6] + ".ckpt",
    )
    assert "1 steps after step 4" in caplog.text


def test_a_pattern_reads_folders_and_files_of_any_name(tmp_path):
    states = random_walk(3)
    for step, state in enumerate(states):
        save(tmp_path / "log" / f"{step}_of_run" / "weights.pt", state)
        save(tmp_path / "log" / f"{step}_of_run" / "other.pt", state)
    pattern = "{step}_of_run/weights.pt"
    assert list(steps_of(tmp_path / "log", pattern=pattern)) == [0, 1, 2]
    ingest(tmp_path / "log", tmp_path / "out", pattern=pattern)
    assert open_trajectory(tmp_path / "out").scalar("step").tolist() == [0, 1, 2]
    assert ingest(tmp_path / "log", tmp_path / "out").steps == 3
    with pytest.raises(InputError, match="--pattern"):
        ingest(tmp_path / "log", tmp_path / "out", pattern="{step}_of_run/other.pt")


def test_a_run_file_and_a_mapping_file_give_patterns(tmp_path):
    for step, state in enumerate(random_walk(3)):
        save(tmp_path / "log" / f"epoch_{step}.npz", state)
    (tmp_path / "run.toml").write_text('[[source]]\npath = "log"\npattern = "epoch_{step}.npz"\n')
    assert list(steps_of(tmp_path / "run.toml")) == [0, 1, 2]
    (tmp_path / "log" / "natgrad.toml").write_text('pattern = "epoch_{step}.npz"\n')
    assert list(steps_of(tmp_path / "log")) == [0, 1, 2]


@pytest.mark.parametrize("container", ["files", "stacked", "joined"])
def test_a_mapping_file_declares_pairs_of_states(tmp_path, container):
    states, numbers = list(random_walk(6)), [0, 1, 10, 11, 20, 21]
    log, sources = tmp_path / "log", [tmp_path / "log"]
    log.mkdir()
    if container == "stacked":
        stacked = {key: np.stack([state[key] for state in states]) for key in states[0]}
        np.savez(log / "all.npz", step=numbers, **stacked)
        sources = [log / "all.npz"]
    else:
        for number, state in zip(numbers, states, strict=True):
            save(log / f"step_{number}.npz", state)
    if container == "joined":
        (tmp_path / "loss.csv").write_text("step,loss\n" + "".join(f"{number},1.0\n" for number in numbers))
        sources.append(tmp_path / "loss.csv")
    with pytest.raises(InputError, match=r"evenly spaced|is missing"):
        natgrad.ingest(sources, tmp_path / "out")
    (log / "natgrad.toml").write_text("step_span = 1\n")
    natgrad.ingest(sources, tmp_path / "out")
    assert open_trajectory(tmp_path / "out" / "trajectory.zarr").spans().tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("value", ["-1", "true", '"1"', "1.0"])
def test_an_invalid_step_span_is_refused(tmp_path, value):
    save(tmp_path / "step_0.npz", next(iter(random_walk(1))))
    (tmp_path / "natgrad.toml").write_text(f"step_span = {value}\n")
    with pytest.raises(InputError, match=r"(?s)invalid values.*step_span = N"):
        steps_of(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".h5"])
@pytest.mark.parametrize("other", [".weird", "", ".of.node-3"])
def test_the_content_decides_for_names_with_another_suffix_that_match_a_pattern(tmp_path, suffix, other):
    for step, state in enumerate(random_walk(3)):
        save(tmp_path / f"ckpt_{step}{suffix}", state)
        (tmp_path / f"ckpt_{step}{suffix}").rename(tmp_path / f"ckpt_{step}{other}")
    (tmp_path / f"ckpt_9{other}").write_text("text")
    os.mkfifo(tmp_path / f"ckpt_8{other}")
    with pytest.raises(NotYet):
        steps_of(tmp_path)
    pattern = "ckpt_{step}" + other
    assert list(steps_of(tmp_path, pattern=pattern)) == [0, 1, 2]
    ingest(tmp_path, tmp_path / "out", pattern=pattern)
    assert open_trajectory(tmp_path / "out").scalar("learning_rate").tolist() == [0.1] * 3


def test_a_folder_of_pytorch_model_files_is_read(tmp_path):
    for step, state in enumerate(random_walk(3)):
        save(tmp_path / "log" / f"step<{step}>" / "pytorch_model.bin", state)
        weights = {key.removeprefix("gradient/"): state[key] for key in state if key.startswith("gradient/")}
        save(tmp_path / "grads" / f"grad-{step:06}.safetensors", weights)
    assert list(steps_of(tmp_path / "log")) == [0, 1, 2]
