"""The steps in one file are found at any level of its keys, and layers or models are not mistaken for steps."""

import h5py
import numpy as np
import pytest
import zarr

from lazy import Lazy
from logs import random_walk
from natgrad.schema.errors import InputError
from natgrad.sources.formats import find_format
from natgrad.sources.opening import open_source
from natgrad.storage import open_storage

torch = Lazy("torch")

TENSORS = {"0.weight": (4, 3), "2.bias": (2,)}
STATES = random_walk(4, TENSORS, "float32")


def arrays(state, array):
    return {key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{array}/")}


def tensors(state, array):
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays(state, array).items()}


def entry(state, **more):
    scalars = {name: float(state[name]) for name in ("loss", "learning_rate")}
    return {"params": tensors(state, "parameter"), "grads": tensors(state, "gradient")} | scalars | more


def lists(states):
    """Return a dict of lists, whose last state has no gradient."""
    return {
        "params": [tensors(state, "parameter") for state in states],
        "grads": [tensors(state, "gradient") for state in states[:-1]],
        "losses": [float(state["loss"]) for state in states[:-1]],
        "lrs": [float(state["learning_rate"]) for state in states[:-1]],
    }


def lists_of_tensors(states):
    found = {"losses": [float(state["loss"]) for state in states]}
    found["lr"] = [float(state["learning_rate"]) for state in states]
    for state in states:
        for array, prefix in (("parameter", "p_"), ("gradient", "g_")):
            for name, value in tensors(state, array).items():
                found.setdefault(prefix + name, []).append(value)
    return found


LAYOUTS = {
    "list": lambda states: [entry(state) for state in states],
    "list below a key": lambda states: {"history": [entry(state) for state in states], "config": {"width": 3}},
    "dict of steps": lambda states: {step: entry(state) for step, state in enumerate(states)},
    "dict of named steps": lambda states: {f"iter_{step:03}": entry(state) for step, state in enumerate(states)},
    "dict of lists": lists,
    "dict of lists of tensors": lists_of_tensors,
}


def check(path, states=STATES, numbers=range(4), last=True, **options):
    log = open_source(open_storage(path), **options)
    steps = log.steps()
    assert [step.number for step in steps] == list(numbers)
    for position, (step, state) in enumerate(zip(steps, states, strict=True)):
        with log.open(step) as reader:
            content = reader.content()
            is_complete = last or position < len(states) - 1
            for array in ("parameter", "gradient")[: 1 + is_complete]:
                assert content.arrays[array].keys() == TENSORS.keys()
                for name, value in arrays(state, array).items():
                    found = np.zeros(value.size, np.float32)
                    reader.read(array, name, 0, found)
                    np.testing.assert_array_equal(found, value.ravel())
            if is_complete:
                assert content.scalars == {name: float(state[name]) for name in ("loss", "learning_rate")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_in_one_torch_file(tmp_path, layout):
    torch.save(LAYOUTS[layout](STATES), tmp_path / "history.pt")
    assert find_format(tmp_path / "history.pt") == "torch"
    check(tmp_path, last=layout != "dict of lists")


def test_the_step_number_of_an_entry_precedes_its_position(tmp_path):
    torch.save([entry(state, step=10 * step) for step, state in enumerate(STATES)], tmp_path / "history.pt")
    check(tmp_path / "history.pt", numbers=[0, 10, 20, 30])


def test_two_entries_of_one_step_are_refused(tmp_path):
    torch.save([entry(state, step=5) for state in STATES], tmp_path / "history.pt")
    with pytest.raises(InputError, match="step 5 exists twice, in '0' and '1'"):
        open_source(open_storage(tmp_path / "history.pt"), "torch").steps()


@pytest.mark.parametrize(
    "tree",
    [
        lambda: tensors(STATES[0], "parameter"),
        lambda: {"model": tensors(STATES[0], "parameter"), "loss": 1.0},
        # An ensemble, and layers with their gradients.
        lambda: [tensors(state, "parameter") for state in STATES],
        lambda: {"params": [torch.ones(2), torch.ones(2)], "grads": [torch.ones(2), torch.ones(2)], "loss": 1.0},
    ],
)
def test_other_files_are_not_runs(tmp_path, tree):
    torch.save(tree(), tmp_path / "final.pt")
    assert find_format(tmp_path / "final.pt") is None


def write_hdf5(path, name, states=STATES):
    with h5py.File(path, "w") as file:
        for step, state in enumerate(states):
            group = file.create_group(name.format(step))
            for array, short in (("parameter", "params"), ("gradient", "grads")):
                for key, value in arrays(state, array).items():
                    group[f"{short}/{key}"] = value
            group.attrs["lr"] = state["learning_rate"]
            group.attrs["note"] = "text"
            group.attrs["loss"] = state["loss"]


@pytest.mark.parametrize("name", ["step_{}", "{}", "{:06}", "run/steps/{}"])
def test_groups_of_hdf5_with_attributes(tmp_path, name):
    write_hdf5(tmp_path / "log.h5", name)
    check(tmp_path)


def test_groups_with_other_names_need_a_pattern(tmp_path):
    write_hdf5(tmp_path / "log.h5", "state {} of 4")
    check(tmp_path / "log.h5", pattern="state {step} of *")
    with pytest.raises(InputError, match="no groups whose names match"):
        check(tmp_path / "log.h5", pattern="{step} x")


def test_a_series_beside_the_groups_is_that_of_their_steps(tmp_path):
    write_hdf5(tmp_path / "log.h5", "step_{}")
    with h5py.File(tmp_path / "log.h5", "a") as file:
        for name in file:
            del file[name].attrs["loss"]
        file["losses"] = np.array([float(state["loss"]) for state in STATES])
        file["other"] = np.ones(3)
    check(tmp_path)
    log = open_source(open_storage(tmp_path / "log.h5"))
    with log.open(log.steps()[0]) as reader:
        assert "other was not read: it belongs to no step" in reader.content().notes


def test_one_learning_rate_of_a_file_is_used_for_all_steps(tmp_path):
    write_hdf5(tmp_path / "log.h5", "step_{}")
    with h5py.File(tmp_path / "log.h5", "a") as file:
        for name in file:
            del file[name].attrs["lr"]
        file.attrs["lr"] = 0.25
    log = open_source(open_storage(tmp_path / "log.h5"))
    for step in log.steps():
        with log.open(step) as reader:
            content = reader.content()
            assert content.scalars["learning_rate"] == 0.25
            assert "lr is one number, 0.25, which is used for all steps" in content.notes


def test_groups_of_layers_are_not_steps(tmp_path):
    with h5py.File(tmp_path / "model.h5", "w") as file:
        for layer in range(3):
            file[f"{layer}/weight"], file[f"{layer}/bias"] = np.ones((2, 2)), np.ones(2)
    with pytest.raises(InputError, match="no step numbers"):
        open_source(open_storage(tmp_path / "model.h5")).steps()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", ["run.zarr", "run"])
def test_groups_of_zarr_with_attributes(tmp_path, version, name):
    with zarr.config.set({"array.write_empty_chunks": True}):
        file = zarr.open_group(tmp_path / name, mode="w", zarr_format=version)
        for step, state in enumerate(STATES):
            group = file.create_group(f"step_{step}")
            for array in ("parameter", "gradient"):
                for key, value in arrays(state, array).items():
                    group.create_array(f"{array}/{key}", data=value)
            group.attrs.update({"loss": float(state["loss"]), "lr": float(state["learning_rate"]), "tag": "x"})
    check(tmp_path / name)


def test_keys_of_an_npz_file_may_contain_the_step(tmp_path):
    flat = {f"step_{step}/{key}": value for step, state in enumerate(STATES) for key, value in state.items()}
    np.savez(tmp_path / "run.npz", **flat)
    check(tmp_path)


def test_stacked_arrays_with_flat_and_plural_keys_need_no_step_numbers(tmp_path):
    flat = {"losses": np.array([s["loss"] for s in STATES]), "lrs": np.array([s["learning_rate"] for s in STATES])}
    for array, prefix, states in (("parameter", "p_", STATES), ("gradient", "g_", STATES[:-1])):
        flat |= {prefix + name: np.stack([arrays(s, array)[name] for s in states]) for name in TENSORS}
    np.savez(tmp_path / "run.npz", **flat)
    check(tmp_path, last=False)
    np.savez(tmp_path / "run.npz", **flat, steps=np.arange(0, 40, 10))
    check(tmp_path, numbers=[0, 10, 20, 30], last=False)
