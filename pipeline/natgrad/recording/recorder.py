"""Record a training run in the native format, from a training loop that has its tensors as NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.arguments import number, real_array, shown
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import REPLICATE_HVP, REPLICATE_LOSS, REPLICATE_PARAMETER, SCALARS

__all__ = ["CONTAINERS", "Recorder"]

Arrays = dict[str, NDArray[Any]]


def _write_safetensors(file: IO[bytes], arrays: Arrays) -> None:
    file.write(safetensors.numpy.save(arrays))


def _write_npz(file: IO[bytes], arrays: dict[str, Any]) -> None:
    np.savez(file, **arrays)


# For each container: its writer, and the STORAGE_DTYPES that it cannot store.
_WRITERS: dict[str, tuple[Callable[[IO[bytes], Arrays], None], frozenset[str]]] = {
    "safetensors": (_write_safetensors, frozenset()),
    "npz": (_write_npz, frozenset({"bfloat16"})),
}

CONTAINERS = tuple(_WRITERS)
"""File formats of a step, which are the suffixes of ``step_<N>.<container>``."""


def _mapping(path: Path, what: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"{what} must be a mapping, got {shown(value)}",
            where=str(path),
            remedy="pass a dictionary, for example {'weight': array}",
        )
    return value


def _array(where: str, value: Any) -> NDArray[Any]:
    """Convert a value to an array in C order, because safetensors writes the memory of an array unchanged."""
    try:
        return np.asarray(value, order="C")
    except Exception as error:  # converting an array of another library may raise any exception
        raise InputError(
            f"{shown(value)} cannot be converted to an array: {error}",
            where=where,
            why="it is not an array, its rows differ in length, or it is not in host memory",
            remedy="pass a NumPy array",
        ) from error


def _numbers(path: Path, what: str, value: Any) -> NDArray[np.float64]:
    try:
        return real_array(value)
    except ValueError as error:
        raise InputError(f"{what} {error}", where=str(path), remedy="record a float") from error


class Recorder:
    """Write one run into a folder, with one file ``step_<N>.<container>`` per step.

    A step is written to a temporary file, which is then renamed. A reader sees either the complete file or no file.

    Parameters
    ----------
    folder : str or Path
        Folder of the run. It is created if it does not exist.
    container : {"safetensors", "npz"}
        File format of a step.
    resume : bool
        Resume the run in the folder. Steps that are recorded again are replaced.

    Raises
    ------
    InputError
        If the container is unknown, or if the folder contains steps and ``resume`` is False or the container
        differs from that of the existing steps.

    Examples
    --------
    >>> import tempfile
    >>> theta = np.ones(3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     recorder = Recorder(Path(folder))
    ...     for step in range(3):
    ...         path = recorder.record(
    ...             step,
    ...             parameter={"theta": theta},
    ...             gradient={"theta": 2 * theta},
    ...             loss=theta @ theta,
    ...             learning_rate=0.1,
    ...         )
    ...         theta = theta - 0.1 * (2 * theta)
    >>> path.name
    'step_2.safetensors'
    """

    def __init__(self, folder: str | Path, container: str = "safetensors", *, resume: bool = False) -> None:
        path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise InputError(f"the folder must be a path, got {shown(folder)}", remedy="pass the folder of the run")
        if not isinstance(container, str) or container not in CONTAINERS:
            raise InputError(
                f"unknown container {shown(container)}", remedy=f"choose one of {', '.join(CONTAINERS)}"
            )
        if not isinstance(resume, bool):
            raise InputError(f"resume must be True or False, got {shown(resume)}", remedy="pass resume=True")
        self.folder, self.container = Path(folder), container
        present = {path.suffix.removeprefix(".") for path in self.folder.glob("step_*")} & set(CONTAINERS)
        if present - {container} or (present and not resume):
            raise InputError(
                f"the folder already contains steps ({', '.join(sorted(present))})",
                where=str(self.folder),
                why="two runs in one folder would be read as one run",
                remedy="use an empty folder, or resume the run (resume=True) with the container of its first steps",
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"the folder cannot be created: {error.strerror}",
                where=str(self.folder),
                remedy="use another folder",
            ) from error

    def __repr__(self) -> str:
        return f"Recorder({str(self.folder)!r}, {self.container!r})"

    def record(
        self,
        step: int,
        *,
        parameter: Mapping[str, ArrayLike],
        gradient: Mapping[str, ArrayLike],
        loss: float | None = None,
        learning_rate: float | None = None,
        hvp: Mapping[str, ArrayLike] | None = None,
        replicates: Mapping[str, Any] | None = None,
        **scalars: float,
    ) -> Path:
        """Record the state of the run before an update.

        Parameters
        ----------
        step : int
            Number of updates before this state.
        parameter : mapping
            Value theta_t of each tensor, by name, with any shape and one of the dtypes of
            `natgrad.schema.layout.STORAGE_DTYPES` (bfloat16 in safetensors only). Stored without conversion.
        gradient : mapping
            Gradient of the loss at theta_t, with the names and shapes of the parameters.
        loss : float, optional
            Loss L(theta_t), for the same objective as the gradient.
        learning_rate : float, optional
            Learning rate eta of the update that follows, eq. (2).
        hvp : mapping, optional
            Hessian times the displacement, H (theta_{t+1} - theta_t), eq. (16), with the names and shapes of the
            parameters.
        replicates : mapping, optional
            R draws of the update of a stochastic rule from theta_t. ``parameter`` contains the states after each
            draw, by tensor name, with shape (R, ...). Optionally, ``hvp`` contains the Hessian times the
            displacement of each draw, by tensor name, with shape (R, ...), eq. (19), and ``loss`` the losses of
            these states, with shape (R,). Record replicates at every step, including the last one, or never.
        **scalars : float
            Other scalars in `natgrad.schema.names.SCALARS`: ``loss_time_derivative``, dL/dt of a loss that changes
            with time (section 2.1), and ``hessian_min_eigenvalue``, eq. (18).

        Returns
        -------
        Path
            File of the step.

        Raises
        ------
        InputError
            If the step is negative, there are no tensors, names, shapes or numbers of replicates differ, a dtype
            cannot be stored, or a scalar is unknown.
        """
        try:
            step = number(step, int, minimum=0)
        except ValueError as error:
            raise InputError(
                f"the step {error}", where=str(self.folder), remedy="count updates from 0: record(0, ...)"
            ) from error
        path = self.folder / f"step_{step}.{self.container}"
        arrays = self._arrays(path, "parameter", parameter)
        if not arrays:
            raise InputError("no parameters in this step", where=str(path), remedy="record at least one tensor")
        shapes = {key.partition("/")[2]: array.shape for key, array in arrays.items()}
        for state, tensors in {"gradient": gradient, **({} if hvp is None else {"hvp": hvp})}.items():
            others = self._arrays(path, state, tensors)
            found = {key.partition("/")[2]: array.shape for key, array in others.items()}
            if found != shapes:
                differing = sorted(dict(shapes.items() ^ found.items()))
                raise InputError(
                    f"{state} and parameter differ in name or shape: {state} {found}, parameter {shapes}",
                    where=f"{path}, tensors {differing}",
                    remedy="record both with the same names and shapes",
                )
            arrays |= others
        if replicates is not None:
            arrays |= self._replicates(path, replicates, shapes)
        for name, value in {"loss": loss, "learning_rate": learning_rate, **scalars}.items():
            if name not in SCALARS:
                known = ", ".join(SCALARS)
                raise InputError(f"unknown scalar {name!r}", where=str(path), remedy=f"choose from {known}")
            if value is not None:
                arrays[name] = self._scalar(path, name, value)
        self._write(path, arrays)
        return path

    def _arrays(self, path: Path, state: str, tensors: Mapping[str, ArrayLike]) -> Arrays:
        arrays = {}
        for name, value in _mapping(path, state, tensors).items():
            array = _array(f"{path}, {state} of tensor {shown(name)}", value)
            dtype = array.dtype.name
            possible = [known for known in STORAGE_DTYPES if known not in _WRITERS[self.container][1]]
            if not isinstance(name, str) or not name or dtype not in possible:
                raise InputError(
                    f"{state} {shown(name)} of dtype {dtype} cannot be recorded in {self.container}",
                    where=f"{path}, {state} of tensor {shown(name)}",
                    remedy=f"use a nonempty name and one of the dtypes {', '.join(possible)}",
                )
            arrays[f"{state}/{name}"] = array
        return arrays

    def _replicates(
        self, path: Path, replicates: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> Arrays:
        names = {"parameter": REPLICATE_PARAMETER, "hvp": REPLICATE_HVP}
        replicates = _mapping(path, "replicates", replicates)
        if not {"parameter"} <= set(replicates) <= {*names, "loss"}:
            raise InputError(
                f"invalid replicates: {', '.join(map(str, replicates)) or 'none'}",
                where=str(path),
                remedy="record replicates of parameter, and optionally of hvp and loss",
            )
        arrays: Arrays = {}
        losses = [_numbers(path, "loss of replicates", replicates["loss"])] if "loss" in replicates else []
        for kind, array in names.items():
            arrays |= self._arrays(path, array, replicates.get(kind, {}))
        counts = {array.shape[:1] for array in (*arrays.values(), *losses)}
        for kind in names.keys() & replicates.keys():
            logged = {name: arrays[f"{names[kind]}/{name}"].shape[1:] for name in replicates[kind]}
            if logged != shapes or len(counts) != 1 or counts & {(), (0,)}:
                raise InputError(
                    f"replicates of {kind} have counts {sorted(counts)} and shapes {logged}, "
                    f"but the parameters have shapes {dict(shapes)}",
                    where=f"{path}, {names[kind]}",
                    remedy="record the same number of replicates, on the first axis, for every tensor and the loss",
                )
        if losses and losses[0].ndim != 1:
            raise InputError(
                f"the losses of replicates have shape {losses[0].shape}",
                where=str(path),
                remedy="record one loss per replicate, as a one-dimensional array",
            )
        return {**arrays, **({REPLICATE_LOSS: losses[0]} if losses else {})}

    def _scalar(self, path: Path, name: str, value: float) -> NDArray[np.float64]:
        array = _numbers(path, name, value)
        if array.size != 1:
            raise InputError(
                f"{name} must be one number, got an array of shape {array.shape}",
                where=str(path),
                remedy="record a float",
            )
        return array.reshape(())

    def _write(self, path: Path, arrays: Arrays) -> None:
        # Readers ignore a hidden file with another suffix. Its name contains the process number, so that two
        # writers in one folder do not use the same file.
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                _WRITERS[self.container][0](file, arrays)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
