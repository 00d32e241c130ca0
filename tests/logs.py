"""Training logs for tests, written by the libraries that users write them with."""

import ml_dtypes
import numpy as np
import safetensors.numpy

TENSORS = {"layer.weight": (4, 3), "layer.bias": (4,), "scale": ()}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def random_walk(steps, tensors=TENSORS, dtype="float32", seed=0, learning_rate=0.1):
    """States of a noisy gradient descent on |theta|^2 / 2: a list of flat mappings of the native keys to arrays.

    The update is the negative gradient plus noise of its size, so most updates are effective and none is exact.
    """
    rng = np.random.default_rng(seed)
    theta = {name: rng.standard_normal(shape) for name, shape in tensors.items()}
    states = []
    for _ in range(steps):
        state = {f"parameter/{name}": np.asarray(value, DTYPES[dtype]) for name, value in theta.items()}
        state |= {f"gradient/{name}": np.asarray(value, DTYPES[dtype]) for name, value in theta.items()}
        state["loss"] = np.float64(sum((value**2).sum() for value in theta.values()) / 2)
        state["learning_rate"] = np.float64(learning_rate)
        states.append(state)
        for name, value in theta.items():
            theta[name] = value - learning_rate * (value + 0.5 * rng.standard_normal(value.shape))
    return states


def write_step(folder, number, state, container="safetensors"):
    """Write one step file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{number}.{container}"
    if container == "npz":
        np.savez(path, **state)
    else:
        safetensors.numpy.save_file({key: np.asarray(value, order="C") for key, value in state.items()}, path)
    return path


def write_log(folder, states, numbers=None, container="safetensors"):
    """Write a run and return its folder."""
    for number, state in zip(numbers or range(len(states)), states, strict=True):
        write_step(folder, number, state, container)
    return folder
