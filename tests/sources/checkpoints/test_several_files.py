"""The files of one step, such as params_3.npz and grads_3.npz, are read as one step."""

import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from test_formats import arrays_of, ledger_of, write_native

from lazy import Lazy
from logs import random_walk
from natgrad.schema.errors import InputError
from natgrad.store import open_trajectory
from opened import ingest, open_source

torch = Lazy("torch")

TENSORS = {"layers.10.weight": (4, 3), "layers.9.weight": (3, 2), "layers.9.bias": (3,), "scale": ()}
STEPS = 4
FORMS = [
    ("params_{}", "grads_{}"),
    ("model-{:04}", "gradients-{:04}"),
    ("step_{}_params", "step_{}_grads"),
    ("step {}", "grad {}"),
]
SCALARS = ("loss", "learning_rate")


@pytest.fixture(scope="module")
def run():
    return random_walk(STEPS, TENSORS, dtype="float64")


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("native")
    return ledger_of(folder, write_native(folder / "log", run))


def save(path, tree):
    """Write flat arrays and numbers into a container that the suffix names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **tree)
    elif path.suffix == ".safetensors":
        safetensors.numpy.save_file({key: np.asarray(value, order="C") for key, value in tree.items()}, path)
    else:
        torch.save(
            {
                k: torch.from_numpy(np.array(v)) if np.ndim(v) or k not in SCALARS else float(v)
                for k, v in tree.items()
            },
            path,
        )


def bare(state, array):
    return {key.removeprefix(f"{array}/"): value for key, value in state.items() if key.startswith(f"{array}/")}


def write_parts(folder, run, forms, suffix, scalars_in="gradient"):
    for step, state in enumerate(run):
        scalars = {name: state[name] for name in SCALARS}
        for array, form in zip(("parameter", "gradient"), forms, strict=True):
            more = scalars if array == scalars_in else {}
            save(folder / (form.format(step) + suffix), bare(state, array) | more)
    return [folder]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
@pytest.mark.parametrize("forms", FORMS)
def test_parameters_and_gradients_in_two_files_give_the_same_ledger(tmp_path, run, expected, forms, suffix):
    sources = write_parts(tmp_path / "log", run, forms, suffix)
    assert ledger_of(tmp_path, sources) == expected
    assert all(len(step.others) == 1 for step in open_source(sources[0]).steps())


@pytest.mark.parametrize("options", [{}, {"mapping": {"parameter": ".", "gradient": "."}}])
def test_scalars_may_be_in_either_file_and_the_entire_files_may_be_mapped(tmp_path, run, expected, options):
    sources = write_parts(tmp_path / "log", run, FORMS[0], ".npz", scalars_in="parameter")
    assert ledger_of(tmp_path, sources, **options) == expected


def test_files_with_the_usual_keys_are_read_by_them(tmp_path, run, expected):
    for step, state in enumerate(run):
        scalars = {"loss": float(state["loss"]), "lr": float(state["learning_rate"]), "step": step}
        tmp_path.joinpath("log").mkdir(exist_ok=True)
        torch.save({"model": arrays_of(state, "parameter"), **scalars}, tmp_path / "log" / f"model_{step}.pt")
        grads = {"grads": arrays_of(state, "gradient"), "step": step, "loss": -1.0}
        torch.save(grads, tmp_path / "log" / f"grads_{step}.pt")
    assert ledger_of(tmp_path, [tmp_path / "log"]) == expected


def moments(state, step, names):
    entries = {
        index: {"step": torch.tensor(float(step)), "exp_avg": torch.ones(np.shape(state[f"parameter/{name}"]))}
        for index, name in enumerate(names)
    }
    return {"state": entries, "param_groups": [{"lr": 0.1, "params": list(range(len(names)))}]}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_optimizer_of_another_file_is_read_on_request(tmp_path, run, suffix, caplog):
    write_parts(tmp_path / "log", run, FORMS[0], suffix)
    for step, state in enumerate(run):
        torch.save(moments(state, step, list(TENSORS)), tmp_path / "log" / f"optimizer_{step}.pt")
        shutil.copy(tmp_path / "log" / f"params_{step}{suffix}", tmp_path / "log" / f"ema_params_{step}{suffix}")
    if suffix == ".safetensors":  # which does not preserve the order of tensors
        (tmp_path / "log" / "natgrad.toml").write_text(f"order = {list(TENSORS)}".replace("'", '"'))
    ingest(tmp_path / "log", tmp_path / "store", include=["optimizer"])
    stored = open_trajectory(tmp_path / "store")
    assert set(stored.dtypes) == {"parameter", "gradient", "exp_avg"}
    assert (stored.scalar("updates") == np.arange(STEPS)[:, None]).all()
    assert "4 files are not read because other files of the same steps contain the model" in caplog.text
    # An array that was not requested has no effect, even if it cannot be read.
    os.truncate(tmp_path / "log" / "optimizer_2.pt", 100)
    ingest(tmp_path / "log", tmp_path / "plain")
    with pytest.raises(InputError, match=r"cannot read the state of the optimizer: optimizer_2\.pt"):
        ingest(tmp_path / "log", tmp_path / "again", include=["optimizer"])


def test_the_optimizers_of_several_ranks_are_not_read(tmp_path, run):
    write_parts(tmp_path / "log", run, FORMS[0], ".pt")
    for step, state in enumerate(run):
        for rank in range(2):
            torch.save(moments(state, step, list(TENSORS)), tmp_path / "log" / f"optim_{step}_rank{rank}.pt")
    ingest(tmp_path / "log", tmp_path / "plain")
    with pytest.raises(InputError, match=r"it is in several files: optim_0_rank0\.pt, optim_0_rank1\.pt"):
        ingest(tmp_path / "log", tmp_path / "store", include=["optimizer"])


@pytest.mark.parametrize(("one", "other"), [("params_{}", "step_{}"), ("grad_{}", "step_{}_grads")])
def test_two_files_of_the_same_role_are_refused(tmp_path, run, one, other):
    write_parts(tmp_path / "log", run, ("net_{}" if one.startswith("grad") else one, "grads-{}"), ".npz")
    write_parts(
        tmp_path / "log", run[:1], (one, "ignored") if one.startswith("params") else ("net_{}", one), ".npz"
    )
    save(tmp_path / "log" / (other.format(0) + ".npz"), bare(run[0], "parameter"))
    (tmp_path / "log" / "ignored.npz").unlink(missing_ok=True)
    with pytest.raises(InputError, match="step 0 exists twice") as refused:
        open_source(tmp_path / "log").steps()
    assert "--pattern" in refused.value.remedy


def test_a_change_of_either_file_is_detected(tmp_path, run):
    write_parts(tmp_path / "log", run, FORMS[0], ".npz")
    ingest(tmp_path / "log", tmp_path / "store")
    assert ingest(tmp_path / "log", tmp_path / "store").new_steps == 0
    changed = {key: value + 1 for key, value in bare(run[1], "gradient").items()}
    save(tmp_path / "log" / "grads_1.npz", changed | {name: run[1][name] for name in SCALARS})
    with pytest.raises(InputError, match="step 1 is already ingested, with a different gradient"):
        ingest(tmp_path / "log", tmp_path / "store")


@pytest.mark.parametrize("lacking", ["params", "optimizer"])
def test_a_last_step_that_is_being_written_is_left_for_the_next_pass(tmp_path, run, lacking, caplog):
    write_parts(tmp_path / "log", run, FORMS[0], ".pt")
    for step, state in enumerate(run):
        torch.save(moments(state, step, list(TENSORS)), tmp_path / "log" / f"optimizer_{step}.pt")
    path = tmp_path / "log" / f"{lacking}_3.pt"
    content = path.read_bytes()
    path.unlink()
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2]
    assert "step 3 is left for the next pass" in caplog.text
    path.write_bytes(content)
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3]
    path.unlink()
    for file in (tmp_path / "log").iterdir():
        os.utime(file, (1, 1))
    assert [step.number for step in open_source(tmp_path / "log").steps()] == [0, 1, 2, 3]
