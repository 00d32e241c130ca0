"""Generate the runs for the measured tasks. They are removed when the next runs are generated."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from zarr.codecs import BloscCodec

from benchmarks.options import (
    HIDDEN,
    IN_MEMORY,
    LOGGED_SWEEP,
    MEMORY_DISK,
    ONE_RUN,
    STEP_BYTES,
    SWEEP_ELEMENTS,
    SWEEP_STEPS,
    TALL_ELEMENTS,
    WIDE_STATES,
    Scale,
)
from natgrad.compute.ledger_pass import compute_ledger
from natgrad.ingestion import ingest
from natgrad.schema.layout import Layout, chunk_shape, storage_dtype
from natgrad.storage import open_storage
from natgrad.store import Trajectory, checksum, open_store, open_trajectory

_COMMIT_BYTES = 1 << 26
_POOL = 1 << 22
_CODECS = {name: BloscCodec(cname=name, shuffle="shuffle", typesize=4) for name in ("zstd", "lz4")}


@dataclass(frozen=True)
class Files:
    """A generated run: its log, its trajectory, the reference ledger, and the output of tasks."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def trajectory(self) -> Path:
        return self.folder / "trajectory.zarr"

    @property
    def reference(self) -> Path:
        return self.folder / "reference.zarr"

    @property
    def written(self) -> Path:
        folder = Path(MEMORY_DISK) / "natgrad-benchmark" if self.folder.name == IN_MEMORY else self.folder
        return folder / "written"

    def clear(self) -> None:
        """Remove the output of a task before the next round, outside of the timed part."""
        shutil.rmtree(self.written, ignore_errors=True)
        self.written.mkdir(parents=True)

    def logged(self) -> list[Path]:
        return sorted(path for path in self.log.rglob("*") if path.is_file())

    def chunks(self) -> list[Path]:
        """Return the chunk files of the training state, which the pass must read."""
        return sorted(path for name in ("parameter", "gradient") for path in (self.trajectory / name).glob("c/*/*"))

    def runs(self) -> int:
        """Return the number of runs in the trajectory."""
        return len(open_trajectory(self.trajectory).runs)


# States -------------------------------------------------------------------------------------------------------


def descent(elements: int, states: int, seed: int = 0) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Yield the flat parameters and gradients of noisy gradient descent on a quadratic loss, state by state.

    The noise of each state is a slice of one pool of random numbers, because drawing new numbers would take longer
    than the measured tasks.
    """
    generator = np.random.default_rng(seed)
    pool = generator.standard_normal(_POOL, np.float32)
    theta = _noise(pool, 0, elements)
    for _ in range(states):
        of_gradient, of_step = (_noise(pool, shift, elements) for shift in generator.integers(_POOL, size=2))
        yield {"parameter": theta, "gradient": theta + of_gradient / 8}
        theta = theta - (theta + of_step / 2) / 100


def _noise(pool: NDArray[np.float32], shift: int, elements: int) -> NDArray[np.float32]:
    """Return elements of the pool, starting at an offset and wrapping around at the end."""
    parts, wanted = [], elements
    while wanted:
        parts.append(pool[shift : shift + wanted])
        wanted, shift = wanted - len(parts[-1]), 0
    return np.concatenate(parts)


def stacked_descent(elements: int, states: int, seed: int) -> dict[str, NDArray[np.float32]]:
    """Return all states of a small run like `descent`, as arrays (step, element)."""
    generator = np.random.default_rng(seed)
    theta = generator.standard_normal(elements, np.float32)
    noise = generator.standard_normal((states, elements), np.float32)
    parameter = theta * np.exp(-np.arange(states, dtype="<f4") / 100)[:, None] + np.cumsum(noise, axis=0) / 200
    return {"parameter": parameter, "gradient": parameter + noise[::-1] / 8}


def as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the upper half of each word."""
    return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def write_states(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    states: Iterator[Mapping[str, NDArray[Any]]],
    count: int,
    *,
    dtype: str = "float32",
    codec: BloscCodec | None = None,
) -> None:
    """Write states to a trajectory as ingest does, without a log, in commits of some megabytes."""
    layout = Layout.from_shapes({name: (shape, dtype) for name, shape in shapes.items()})
    dtypes = dict.fromkeys(("parameter", "gradient"), dtype)
    chunk = chunk_shape(count, layout.elements)
    compressors = dict.fromkeys(dtypes, codec) if codec is not None else None
    trajectory = Trajectory.create(open_store(path), layout, dtypes, chunk, compressors=compressors)
    together = max(1, _COMMIT_BYTES // (chunk[0] * layout.elements * STEP_BYTES)) * chunk[0]
    words = {name: np.empty((together, layout.elements), storage_dtype(dtype)) for name in dtypes}
    while trajectory.n_states < count:
        length = min(together, count - trajectory.n_states)
        for index in range(length):
            state = next(states)
            for name, array in words.items():
                array[index] = as_bfloat16(state[name]) if dtype == "bfloat16" else state[name]
        commit(trajectory, {name: array[:length] for name, array in words.items()})


def commit(trajectory: Trajectory, words: Mapping[str, NDArray[Any]]) -> None:
    """Append states to a trajectory and make them visible."""
    start, count = trajectory.n_states, len(words["parameter"])
    checksums: dict[str, list[list[int]]] = {name: [[] for _ in range(count)] for name in words}
    for column in range(trajectory.columns):
        first, last = trajectory.column(column)
        for name, array in words.items():
            block = np.zeros((count, trajectory.chunk[1]), array.dtype)
            block[:, : last - first] = array[:, first:last]
            trajectory.write(name, start, column, block)
            for index in range(count):
                checksums[name][index].append(checksum(block[index, : last - first]))
    numbers = range(start, start + count)
    scalars = {"loss": [1.0 / (step + 1) for step in numbers], "learning_rate": [0.01] * count}
    trajectory.commit(numbers, scalars, [{}] * count, checksums)


def states_of(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the states of a trajectory."""
    trajectory = open_trajectory(path)
    width = trajectory.chunk[1]
    for index in range(trajectory.n_states):
        state = {}
        for name, dtype in trajectory.dtypes.items():
            blocks = np.zeros((trajectory.columns, width), storage_dtype(dtype))
            for column in range(trajectory.columns):
                trajectory.read(name, index, index + 1, column, blocks[column : column + 1])
            columns = (trajectory.column(column) for column in range(trajectory.columns))
            state[name] = np.concatenate([block[: b - a] for block, (a, b) in zip(blocks, columns, strict=True)])
        yield state


# Runs ---------------------------------------------------------------------------------------------------------

Maker = Callable[[Files, Scale], None]

_STORED_OTHERWISE = ("zstd", "lz4", "bfloat16")
"""Codecs and dtypes of additional copies of the main run."""


def logged_run(files: Files, scale: Scale) -> None:
    """Write the log of a run with one file per step, and ingest it."""
    shapes = scale.shapes()
    layout = Layout.from_shapes({name: (shape, "float32") for name, shape in shapes.items()})
    files.log.mkdir(parents=True)
    for step, state in enumerate(descent(layout.elements, scale.states)):
        tensors = {"loss": np.asarray(1.0 / (step + 1)), "learning_rate": np.asarray(0.01)}
        for name, values in state.items():
            for tensor in layout.tensors:
                part = values[tensor.offset : tensor.offset + tensor.size]
                tensors[f"{name}/{tensor.name}"] = part.reshape(tensor.shape)
        safetensors.numpy.save_file(tensors, files.log / f"step_{step}.safetensors")
    ingest([open_storage(files.log)], open_store(files.trajectory))


def longer_run(files: Files, scale: Scale, size: float) -> None:
    """Write a longer run of the same model, with a size in gigabytes."""
    shapes = scale.shapes()
    elements = sum(int(np.prod(shape)) for shape in shapes.values())
    states = max(2, round(size * 1e9 / (elements * STEP_BYTES)))
    write_states(files.trajectory, shapes, descent(elements, states), states)


def tall_run(files: Files, scale: Scale) -> None:
    """Write many states of a small model."""
    shapes = {"weight": (TALL_ELEMENTS - 40, 1), "bias": (40,)}
    write_states(files.trajectory, shapes, descent(TALL_ELEMENTS, scale.tall), scale.tall)


def wide_run(files: Files, scale: Scale) -> None:
    """Write few states of a large model."""
    shapes = {"weight": (scale.wide - HIDDEN,), "bias": (HIDDEN,)}
    write_states(files.trajectory, shapes, descent(scale.wide, WIDE_STATES), WIDE_STATES)


def stored_otherwise(files: Files, scale: Scale, run: Files, *, codec: str = "", dtype: str = "float32") -> None:
    """Write the states of an existing run with compression or in another dtype."""
    states = states_of(run.trajectory)
    write_states(files.trajectory, scale.shapes(), states, scale.states, dtype=dtype, codec=_CODECS.get(codec))


def sweep(files: Files, scale: Scale, runs: int | None = None) -> None:
    """Write the logs of many small runs, one file each, and ingest them as a sweep."""
    for run in range(min(runs or scale.sweep, scale.sweep)):
        stacked_log(files.log / f"run_{run:05d}.npz", SWEEP_STEPS, run)
    ingest([open_storage(files.log)], open_store(files.trajectory), sweep=True)


def one_run(files: Files, scale: Scale, runs: int) -> None:
    """Write the log of one run with as many states as ``runs`` runs of the sweep, in one file, and ingest it."""
    stacked_log(files.log / "run.npz", SWEEP_STEPS * min(runs, scale.sweep), 0)
    ingest([open_storage(files.log)], open_store(files.trajectory))


def without_log(make: Maker, files: Files, scale: Scale) -> None:
    """Generate a run and remove its log."""
    make(files, scale)
    shutil.rmtree(files.log)


def stacked_log(path: Path, steps: int, seed: int) -> None:
    """Write a log as one file with arrays (step, ...)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {"step": np.arange(steps), "loss": 1.0 / np.arange(1, steps + 1)}
    arrays["learning_rate"] = np.full(steps, 0.01)
    cut = SWEEP_ELEMENTS - 50
    for name, values in stacked_descent(SWEEP_ELEMENTS, steps, seed).items():
        arrays[f"{name}/weight"] = values[:, :cut].reshape(steps, cut // 50, 50)
        arrays[f"{name}/bias"] = values[:, cut:]
    np.savez(path, **arrays)


class Runs:
    """The runs on disk.

    Parameters
    ----------
    folder : Path
        Folder of the runs, which is emptied at the start and at the end.
    scale : Scale
    """

    def __init__(self, folder: Path, scale: Scale) -> None:
        self.folder, self.scale = folder, scale
        self.clear()

    def clear(self) -> None:
        """Remove all runs."""
        for folder in (self.folder, Files(self.folder / IN_MEMORY).written.parent):
            shutil.rmtree(folder, ignore_errors=True)

    def need(self, names: Collection[str]) -> None:
        """Remove all runs except the named ones and those from which they are generated."""
        kept = {*names, *(["run"] if set(names) & {*_STORED_OTHERWISE, IN_MEMORY} else [])}
        for path in self.folder.glob("*"):
            if path.name not in kept:
                shutil.rmtree(path)

    def get(self, name: str) -> Files:
        """Return a run and its reference ledger. They are generated if they do not exist."""
        files = Files(self.folder / name)
        if not files.written.exists():
            files.folder.mkdir(parents=True, exist_ok=True)
            if name in _STORED_OTHERWISE:
                options = {"dtype": name} if name == "bfloat16" else {"codec": name}
                stored_otherwise(files, self.scale, self.get("run"), **options)
            elif name == IN_MEMORY:
                run = self.get("run")
                files.log.symlink_to(run.log)
                files.trajectory.symlink_to(run.trajectory)
            elif name.startswith("size_"):
                longer_run(files, self.scale, float(name.removeprefix("size_")))
            else:
                _MAKERS[name](files, self.scale)
            compute_ledger(open_store(files.trajectory), open_store(files.reference))
            files.clear()
        return files


_MAKERS: dict[str, Maker] = {
    "run": logged_run,
    "tall": tall_run,
    "wide": wide_run,
    "sweep": partial(without_log, sweep),
    "one_run": partial(without_log, partial(one_run, runs=ONE_RUN)),
    "logged_sweep": partial(sweep, runs=LOGGED_SWEEP),
    "logged_one_run": partial(one_run, runs=LOGGED_SWEEP),
}
