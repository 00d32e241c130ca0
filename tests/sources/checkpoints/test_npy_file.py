"""Arrays in npy files are read in place or converted, and folders of them are steps."""

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy

from lazy import Lazy
from logs import random_walk
from natgrad.schema.errors import InputError
from natgrad.sources.checkpoints.npy_file import NpyFile
from natgrad.sources.formats import find_format
from natgrad.sources.opening import open_source
from natgrad.sources.steps import LoggedStep
from natgrad.storage import LocalStorage, open_storage
from natgrad.store import open_trajectory
from opened import ingest

torch = Lazy("torch")

TENSORS = {"W1": (4, 3), "b1": (4,)}
STATES = random_walk(4, TENSORS, "float32")


def arrays(state, array):
    return {key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{array}/")}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f8"])
def test_any_part_of_an_array_is_read(tmp_path, order, dtype):
    values = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    np.save(tmp_path / "a.npy", values.copy(order=order))
    with NpyFile(LoggedStep(0, LocalStorage(tmp_path / "a.npy")), "x") as container:
        assert container.tensors["x"].shape == (2, 3, 4)
        assert (container.ranges("x") is None) == (order == "F" or dtype == ">f8")
        for start, stop in ((0, 24), (5, 17), (23, 24), (7, 7)):
            found = np.zeros(stop - start, container.tensors["x"].dtype)
            container.read("x", start, found)
            np.testing.assert_array_equal(found, values.ravel()[start:stop])


def test_flat_states_in_single_files_stay_in_place(tmp_path):
    for step, state in enumerate(STATES):
        for array, name in (("parameter", "theta"), ("gradient", "grad")):
            flat = np.concatenate([value.ravel() for value in arrays(state, array).values()])
            np.save(tmp_path / f"{name}_{step:04}.npy", flat)
    assert find_format(tmp_path) == "npy"
    ingest([tmp_path], tmp_path / "out.zarr", in_place=True)
    trajectory = open_trajectory(tmp_path / "out.zarr")
    assert [(tensor.name, tensor.shape) for tensor in trajectory.layout.tensors] == [("theta", (16,))]
    words = np.zeros((4, 16), np.float32)
    trajectory.read("gradient", 0, 4, 0, words)
    flat = [np.concatenate([value.ravel() for value in arrays(state, "gradient").values()]) for state in STATES]
    np.testing.assert_array_equal(words, flat)
    assert not any((tmp_path / "out.zarr/parameter/c").glob("**/*"))


def save_whole(folder, state):
    for array, name in (("parameter", "params"), ("gradient", "grads")):
        np.savez(folder / f"{name}.npz", **arrays(state, array))


def save_folders(folder, state):
    for array, name in (("parameter", "params"), ("gradient", "grads")):
        (folder / name).mkdir()
        for tensor, value in arrays(state, array).items():
            np.save(folder / name / tensor, value)


def save_torch(folder, state):
    for array, name in (("parameter", "model"), ("gradient", "grad")):
        tree = {tensor: torch.from_numpy(np.array(value)) for tensor, value in arrays(state, array).items()}
        torch.save(tree, folder / f"{name}.pt")
    (folder / "notes.txt").write_text("x")


def save_pickles(folder, state):
    for array, name in (("parameter", "params"), ("gradient", "gradients")):
        tree = {tensor: np.array(value) for tensor, value in arrays(state, array).items()}
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(tree))
    (folder / "ema_params.pkl").write_bytes(b"")


@pytest.mark.parametrize("save", [save_whole, save_folders, save_torch, save_pickles])
@pytest.mark.parametrize("name", ["step_{}", "ckpt-{:05}"])
def test_folders_of_arrays_are_steps(tmp_path, save, name):
    for step, state in enumerate(STATES):
        folder = tmp_path / name.format(step)
        folder.mkdir()
        save(folder, state)
        (folder / "info.json").write_text(json.dumps({"loss": float(state["loss"]), "opt": {"lr": 3}, "lr": 0.5}))
        (folder / "config.json").write_text('{"learning_rate": 9}')
    assert find_format(tmp_path) == "npy"
    log = open_source(open_storage(tmp_path))
    assert [step.number for step in log.steps()] == [0, 1, 2, 3]
    for step, state in zip(log.steps(), STATES, strict=True):
        with log.open(step) as reader:
            content = reader.content()
            assert content.scalars == {"loss": float(state["loss"]), "learning_rate": 0.5}
            for array in ("parameter", "gradient"):
                assert content.arrays[array].keys() == TENSORS.keys()
                for tensor, value in arrays(state, array).items():
                    found = np.zeros(value.size, np.float32)
                    reader.read(array, tensor, 0, found)
                    np.testing.assert_array_equal(found, value.ravel())


def test_a_numbered_folder_with_only_the_model_is_the_last_step(tmp_path):
    for step, state in enumerate(STATES):
        (tmp_path / f"{step:06}").mkdir()
        save_torch(tmp_path / f"{step:06}", state)
    (tmp_path / "000003" / "grad.pt").unlink()
    assert find_format(tmp_path) == "npy"
    assert [step.number for step in open_source(open_storage(tmp_path)).steps()] == [0, 1, 2, 3]


def test_files_of_single_tensors_of_torch_in_a_folder_are_a_step(tmp_path):
    for step, state in enumerate(STATES):
        (tmp_path / f"step_{step}").mkdir()
        for array, end in (("parameter", "weight"), ("gradient", "weight.grad")):
            for tensor, value in arrays(state, array).items():
                torch.save(torch.from_numpy(np.array(value)), tmp_path / f"step_{step}" / f"{tensor}.{end}.pt")
    log = open_source(open_storage(tmp_path))
    with log.open(log.steps()[2]) as reader:
        assert reader.content().arrays["gradient"].keys() == {f"{tensor}.weight" for tensor in TENSORS}
        found = np.zeros(12, np.float32)
        reader.read("gradient", "W1.weight", 0, found)
        np.testing.assert_array_equal(found, STATES[2]["gradient/W1"].ravel())


def test_other_folders_are_not_steps(tmp_path):
    for name in ("seed-0", "seed-1"):  # runs
        (tmp_path / name).mkdir()
        save_whole(tmp_path / name, STATES[0])
    for name in ("0", "1"):  # runs of several steps
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "params_0.npz", w=np.ones(2))
        np.savez(tmp_path / name / "params_1.npz", w=np.ones(2))
    (tmp_path / "ckpt-5").mkdir()  # an incomplete checkpoint of the Trainer
    torch.save({}, tmp_path / "ckpt-5" / "optimizer.pt")
    torch.save({}, tmp_path / "ckpt-5" / "rng_state.pth")
    assert find_format(tmp_path) is None


def test_an_incomplete_file_is_named(tmp_path):
    np.save(tmp_path / "theta_0.npy", np.ones(9))
    content = (tmp_path / "theta_0.npy").read_bytes()
    (tmp_path / "theta_0.npy").write_bytes(content[:-8])
    log = open_source(open_storage(tmp_path))
    with pytest.raises(InputError, match=r"does not have the 64 bytes of the file(.|\n)*theta_0\.npy"):
        log.open(log.steps()[0])


def test_arrays_of_all_steps_in_several_files_are_a_run(tmp_path):
    rows = {"parameter": STATES, "gradient": STATES[:-1]}
    for array, stem in (("parameter", "params"), ("gradient", "grads")):
        tensors = {name: np.stack([arrays(state, array)[name] for state in rows[array]]) for name in TENSORS}
        np.savez(tmp_path / f"{stem}.npz", **tensors)
    np.save(tmp_path / "losses.npy", np.array([state["loss"] for state in STATES[:-1]]))
    np.save(tmp_path / "lr.npy", np.array(0.5))
    assert find_format(tmp_path) == "npy"
    log = open_source(open_storage(tmp_path))
    for step, state in zip(log.steps(), STATES, strict=True):
        with log.open(step) as reader:
            content = reader.content()
            assert content.scalars["learning_rate"] == 0.5
            assert "lr is one number, 0.5, which is used for all steps" in content.notes
            for array in ("parameter", "gradient")[: 1 + (step.number < 3)]:
                for tensor, value in arrays(state, array).items():
                    found = np.zeros(value.size, np.float32)
                    reader.read(array, tensor, 0, found)
                    np.testing.assert_array_equal(found, value.ravel())


def test_arrays_without_losses_are_not_a_run(tmp_path):
    for name in ("params", "grads"):
        np.save(tmp_path / f"{name}.npy", np.ones((3, 2)))
    assert find_format(tmp_path) is None


def test_scalars_beside_a_model_are_read(tmp_path):
    for step, state in enumerate(STATES):
        (tmp_path / f"step_{step}").mkdir()
        for array, stem in (("parameter", "model"), ("gradient", "gradient")):
            safetensors.numpy.save_file(arrays(state, array), tmp_path / f"step_{step}" / f"{stem}.safetensors")
        (tmp_path / f"step_{step}" / "metrics.json").write_text(json.dumps({"loss": step / 4, "lr": 0.5}))
        (tmp_path / f"step_{step}" / "tokenizer_config.json").write_text('{"loss": 9}')
    log = open_source(open_storage(tmp_path))
    for step in log.steps():
        with log.open(step) as reader:
            assert reader.content().scalars == {"loss": step.number / 4, "learning_rate": 0.5}


NAMES = {
    "{tensor}_{step:04}": ("d{tensor}_{step:04}", ""),
    "step{step}_{tensor}.weight": ("step{step}_{tensor}.weight.grad", ""),
    "{tensor}.weight_step{step}": ("{tensor}.weight_grad_step{step}", ""),
    "epoch{step}-{step}_steps-{tensor}": ("epoch{step}-{step}_steps-grad_{tensor}", ""),
    "params/{step:06}/{tensor}": ("grads/{step:06}/{tensor}", "*/{step}/*.npy"),
    "weights/{tensor}.{step}": ("gradients/{tensor}.{step}", "*/*.{step}.npy"),
    "{tensor}/param_{step}": ("{tensor}/grad_{step}", "*/*_{step}.npy"),
    "3_{tensor}_2_{step}": ("grad_3_{tensor}_2_{step}", "*_{step}.npy"),
}


def save_tensors(folder, step, state, parameter, gradient):
    for array, form in (("parameter", parameter), ("gradient", gradient)):
        for tensor, value in arrays(state, array).items():
            path = folder / (form.format(tensor=tensor, step=step) + ".npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, value)


@pytest.mark.parametrize("name", NAMES)
def test_files_of_single_tensors_are_steps(tmp_path, name):
    gradient, pattern = NAMES[name]
    for step, state in enumerate(STATES):
        save_tensors(tmp_path, 10 * step, state, name, gradient)
    log = open_source(open_storage(tmp_path), pattern=pattern)
    assert [step.number for step in log.steps()] == [0, 10, 20, 30]
    for step, state in zip(log.steps(), STATES, strict=True):
        with log.open(step) as reader:
            content = reader.content()
            for array in ("parameter", "gradient"):
                expected = arrays(state, array)
                assert len(content.arrays[array]) == len(expected)
                for key in content.arrays[array]:
                    (tensor,) = (tensor for tensor in expected if tensor in key)
                    values = np.zeros(expected[tensor].size, np.float32)
                    reader.read(array, key, 0, values)
                    np.testing.assert_array_equal(values, expected[tensor].ravel())


def test_a_last_step_that_lacks_tensors_is_left_for_the_next_pass(tmp_path):
    for step, state in enumerate(STATES):
        save_tensors(tmp_path, step, state, "{tensor}_{step}", "d{tensor}_{step}")
    log = open_source(open_storage(tmp_path))
    for name in TENSORS:
        (tmp_path / f"d{name}_3.npy").unlink()
    assert len(log.steps()) == 4  # a last state without a gradient is complete
    (tmp_path / "b1_3.npy").unlink()
    assert [step.number for step in log.steps()] == [0, 1, 2]


def test_two_files_of_one_tensor_at_one_step_are_refused(tmp_path):
    save_tensors(tmp_path, 3, STATES[0], "{tensor}_{step}", "d{tensor}_{step}")
    save_tensors(tmp_path, 3, STATES[0], "{tensor}_{step:04}", "d{tensor}_{step:04}")
    with pytest.raises(InputError, match="step 3 exists twice"):
        open_source(open_storage(tmp_path)).steps()
