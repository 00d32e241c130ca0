"""Write training logs for tests, with the libraries that users use."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from natgrad.schema.layout import Layout, storage_dtype
from natgrad.schema.names import REPLICATE_PARAMETER, replicate_of
from natgrad.store import checksum, open_trajectory
from opened import create_trajectory

TENSORS = {"layer.weight": (4, 3), "layer.bias": (4,), "scale": ()}
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def run_writer(name, *arguments, **environment):
    """Run a script in this folder, in which a library writes its own format, in a separate process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name(name), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def random_walk(steps, tensors=TENSORS, dtype="float32", seed=0, learning_rate=0.1):
    """Return states of noisy gradient descent on |theta|^2 / 2: a list of mappings from native keys to arrays.

    The update is the negative gradient plus noise of the same size, so most updates are effective and none is
    exact.
    """
    rng = np.random.default_rng(seed)
    theta = {name: rng.standard_normal(shape) for name, shape in tensors.items()}
    states = []
    for _ in range(steps):
        state = {f"parameter/{name}": np.array(value, DTYPES[dtype]) for name, value in theta.items()}
        state |= {f"gradient/{name}": np.array(value, DTYPES[dtype]) for name, value in theta.items()}
        state["loss"] = np.float64(sum((value**2).sum() for value in theta.values()) / 2)
        state["learning_rate"] = np.float64(learning_rate)
        states.append(state)
        for name, value in theta.items():
            theta[name] = value - learning_rate * (value + 0.5 * rng.standard_normal(value.shape))
    return states


def with_replicates(states, count=3, seed=0):
    """Add replicates to states: states after updates with noise of the size of the gradient, and their losses."""
    rng = np.random.default_rng(seed)
    for state in states:
        drawn, loss = {}, np.zeros(count)
        for key, value in state.items():
            array, _, name = key.partition("/")
            if array == "parameter":
                noise = 0.1 * rng.standard_normal((count, *np.shape(value)))
                drawn[f"replicate_parameter/{name}"] = (value - noise).astype(np.asarray(value).dtype)
                drawn[f"replicate_hvp/{name}"] = (-noise).astype(np.asarray(value).dtype)
                loss += (drawn[f"replicate_parameter/{name}"].astype(float).reshape(count, -1) ** 2).sum(axis=1) / 2
        state |= drawn | {"replicate_loss": loss}
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


def walk_arrays(rows, elements, dtypes=None, seed=0):
    """Return arrays (row, element) of a trajectory: a random walk, and gradients of similar size."""
    rng = np.random.default_rng(seed)
    values = {
        "parameter": np.cumsum(rng.standard_normal((rows, elements)), axis=0),
        "gradient": rng.standard_normal((rows, elements)),
        "hvp": rng.standard_normal((rows, elements)),
    }
    dtypes = dtypes or {"parameter": "float32", "gradient": "float32"}
    return {name: values[name].astype(DTYPES[dtype]) for name, dtype in dtypes.items()}


def write_trajectory(path, arrays, shapes, chunk, compressors=None):
    """Write a trajectory store with any chunks, replacing an existing one, and return its path.

    ``arrays`` are like the result of `walk_arrays`, ``shapes`` maps tensor names to shapes, ``chunk`` is (steps,
    elements), and ``compressors`` maps arrays to codecs. Each replicate is a separate array.
    """
    dtypes = {replicate_of(name)[0]: array.dtype.name for name, array in arrays.items()}
    replicates = sum(replicate_of(name)[0] == REPLICATE_PARAMETER for name in arrays)
    layout = Layout.from_shapes({name: (shape, dtypes["parameter"]) for name, shape in shapes.items()})
    create_trajectory(path, layout, dtypes, chunk, compressors=compressors, replicates=replicates)
    return append_states(path, arrays)


def append_states(path, arrays):
    """Commit the rows of arrays to an existing trajectory store, and return its path."""
    trajectory = open_trajectory(path)
    start, rows = trajectory.n_states, len(arrays["parameter"])
    checksums = {name: [[] for _ in range(rows)] for name in arrays}
    for (name, array), column in itertools.product(arrays.items(), range(trajectory.columns)):
        first, last = trajectory.column(column)
        words = np.ascontiguousarray(array[:, first:last]).view(storage_dtype(trajectory.dtypes[name]))
        block = np.zeros((rows, trajectory.chunk[1]), words.dtype)
        block[:, : last - first] = words
        trajectory.write(name, start, column, block)
        for row in range(rows):
            checksums[name][row].append(checksum(words[row]))
    scalars = {"loss": np.zeros(rows), "learning_rate": np.full(rows, 0.1)}
    trajectory.commit(range(start, start + rows), scalars, [{}] * rows, checksums)
    return path
