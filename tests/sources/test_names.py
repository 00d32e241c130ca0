"""The usual keys of a quantity are tried in every container."""

import h5py
import numpy as np
import pytest
import safetensors.numpy

from lazy import Lazy
from natgrad.schema.errors import InputError
from opened import open_source

torch = Lazy("torch")
W, G = np.array([3.0, -2.0]), np.array([1.0, 4.0])


def save(path, tree, metadata=None):
    """Write a flat tree of arrays and numbers into the container that the suffix names."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file({key: np.asarray(value) for key, value in tree.items()}, path, metadata)
    elif path.suffix == ".npz":
        np.savez(path, **tree)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            for key, value in tree.items():
                file[key] = value
    else:
        nested = {}
        for key, value in tree.items():
            *levels, name = key.split("/")
            level = nested
            for part in levels:
                level = level.setdefault(part, {})
            level[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        torch.save(nested, path)


def content_of(path, **options):
    log = open_source(path, **options)
    with log.open(log.steps()[0]) as reader:
        content = reader.content()
        values = {}
        for array, tensors in content.arrays.items():
            for tensor, logged in tensors.items():
                values[array, tensor] = np.zeros(logged.shape)
                reader.read(array, tensor, 0, values[array, tensor].reshape(-1))
        return content, values


CONTAINERS = [".safetensors", ".npz", ".hdf5", ".pt"]


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize(
    ("parameter", "gradient", "rate"),
    [("params", "grads", "lr"), ("state_dict", "grad", "lr"), ("model", "gradients", "learning_rate")],
)
def test_the_usual_keys_are_found(tmp_path, suffix, parameter, gradient, rate):
    save(tmp_path / "log" / f"step_0{suffix}", {f"{parameter}/w": W, f"{gradient}/w": G, "loss": 0.5, rate: 0.25})
    content, values = content_of(tmp_path / "log")
    assert content.scalars == {"loss": 0.5, "learning_rate": 0.25}
    np.testing.assert_array_equal(values["parameter", "w"], W)
    np.testing.assert_array_equal(values["gradient", "w"], G)


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("mapping", [{}, {"parameter": "theta", "gradient": "dtheta"}])
def test_a_quantity_may_be_one_array(tmp_path, suffix, mapping):
    keys = mapping or {"parameter": "params", "gradient": "grads"}
    save(tmp_path / "log" / f"step_0{suffix}", {keys["parameter"]: W, keys["gradient"]: G})
    _, values = content_of(tmp_path / "log", mapping=mapping)
    np.testing.assert_array_equal(values["parameter", "theta"], W)
    np.testing.assert_array_equal(values["gradient", "theta"], G)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_bare_names_are_parameters_or_gradients_as_the_file_name_indicates(tmp_path, suffix):
    save(tmp_path / "a" / f"params_3{suffix}", {"w": W})
    save(tmp_path / "b" / f"grad-000003{suffix}", {"w": G})
    assert {key: list(value) for key, value in content_of(tmp_path / "a")[1].items()} == {("parameter", "w"): [*W]}
    assert {key: list(value) for key, value in content_of(tmp_path / "b")[1].items()} == {("gradient", "w"): [*G]}


def test_other_arrays_next_to_gradients_are_not_parameters(tmp_path):
    save(tmp_path / "log" / "step_0.npz", {"gradient/w": G, "momentum/w": W})
    content, _ = content_of(tmp_path / "log")
    assert list(content.arrays) == ["gradient"]
    assert content.unused == ("momentum/w",)


def test_tensors_of_another_dtype_are_refused_under_native_keys_and_buffers_of_a_model(tmp_path):
    count = np.array([1, 2])
    save(tmp_path / "a" / "step_0.npz", {"params/w": W, "params/n": count, "grads/w": G})
    with pytest.raises(InputError, match="not a float dtype"):
        content_of(tmp_path / "a")
    save(tmp_path / "b" / "step_0.npz", {"state_dict/w": W, "state_dict/n": count, "grads/w": G})
    content, _ = content_of(tmp_path / "b")
    assert list(content.arrays["parameter"]) == ["w"]
    assert content.untrained


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("1e-3", 1e-3), (" -2 ", -2.0), ("inf", np.inf)])
def test_numbers_in_the_metadata_of_safetensors_are_read(tmp_path, text, value):
    tree = {"parameter/w": W, "gradient/w": G}
    save(tmp_path / "log" / "step_3.safetensors", tree, {"format": "pt", "loss": text, "lr": "0.1", "step": "3"})
    assert content_of(tmp_path / "log")[0].scalars == {"loss": value, "learning_rate": 0.1}


def test_text_in_the_metadata_that_is_not_a_number_is_reported(tmp_path):
    save(tmp_path / "log" / "step_3.safetensors", {"parameter/w": W, "gradient/w": G}, {"loss": "tensor(0.5)"})
    content, _ = content_of(tmp_path / "log")
    assert not content.scalars
    assert "loss is not used: its value 'tensor(0.5)' is not a number" in content.notes


def test_another_step_in_the_metadata_is_refused(tmp_path):
    save(tmp_path / "log" / "step_3.safetensors", {"parameter/w": W, "gradient/w": G}, {"step": "4"})
    with pytest.raises(InputError, match="contains step 4"):
        content_of(tmp_path / "log")


def test_a_file_of_several_steps_in_a_folder_is_refused(tmp_path):
    save(tmp_path / "log" / "log_1.npz", {"parameter/w": np.zeros((3, 2)), "step": np.arange(3)})
    with pytest.raises(InputError, match="contains several steps"):
        content_of(tmp_path / "log")
