"""Recorder of a training run in the native format, for a trainer that has its tensors as NumPy arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.names import REPLICATE_HVP, REPLICATE_LOSS, REPLICATE_PARAMETER, SCALARS

__all__ = ["CONTAINERS", "Recorder"]

Arrays = dict[str, NDArray[Any]]


def _write_safetensors(file: IO[bytes], arrays: Arrays) -> None:
    file.write(safetensors.numpy.save(arrays))


def _write_npz(file: IO[bytes], arrays: dict[str, Any]) -> None:
    np.savez(file, **arrays)


# Container to its writer and the dtypes of STORAGE_DTYPES that it cannot hold.
_WRITERS: dict[str, tuple[Callable[[IO[bytes], Arrays], None], frozenset[str]]] = {
    "safetensors": (_write_safetensors, frozenset()),
    "npz": (_write_npz, frozenset({"bfloat16"})),
}

CONTAINERS = tuple(_WRITERS)
"""Containers of a step: the suffixes of ``step_<N>.<container>``."""


class Recorder:
    """Writer of one run: a folder with one file ``step_<N>.<container>`` per step.

    A step is written aside and then renamed, so a reader sees the whole file or none, also while the run goes on.

    Parameters
    ----------
    folder : Path
        Folder of the run; made where it does not exist.
    container : {"safetensors", "npz"}
        Container of a step.
    resume : bool
        Continue a run that the folder already holds, replacing the steps that are recorded again.

    Raises
    ------
    InputError
        Where the container is not known, or the folder already holds steps and the run is not resumed in the
        container that it was begun in.

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
        if container not in _WRITERS:
            raise InputError(
                f"container {container!r} is not known", remedy=f"choose one of {', '.join(CONTAINERS)}"
            )
        self.folder, self.container = Path(folder), container
        present = {path.suffix.removeprefix(".") for path in self.folder.glob("step_*")} & set(CONTAINERS)
        if present - {container} or (present and not resume):
            raise InputError(
                f"the folder already holds steps ({', '.join(sorted(present))})",
                where=str(self.folder),
                why="another run was logged there: two runs in one folder would be read as one",
                remedy="give an empty folder, or resume the run (resume=True) in the container it was begun in",
            )
        self.folder.mkdir(parents=True, exist_ok=True)

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
            Number of updates done before this state.
        parameter : mapping
            Name of each tensor to its value theta_t, in any shape and one of the dtypes of `STORAGE_DTYPES`
            (bfloat16 in safetensors only); stored as it is.
        gradient : mapping
            The same names to the gradient of the loss at theta_t, in the shapes of the parameters.
        loss : float, optional
            Loss L(theta_t), the one that the gradient is of.
        learning_rate : float, optional
            Learning rate eta of the update that follows, eq. (2).
        hvp : mapping, optional
            The same names to the Hessian times the displacement, H (theta_{t+1} - theta_t), eq. (16).
        replicates : mapping, optional
            R draws of the update of a stochastic rule from theta_t, R the same in all: ``parameter``, the same
            names to the states that they lead to, of shape (R, ...); and, optional, ``hvp``, the same names to the
            Hessian times the displacement of each, of shape (R, ...), eq. (19), and ``loss``, the losses of these
            states, of shape (R,). A run has them at every step, the last one included, or at none.
        **scalars : float
            Further numbers of `natgrad.schema.names.SCALARS`: ``loss_time_derivative``, dL/dt of a loss that
            changes with time (section 2.1), and ``hessian_min_eigenvalue``, eq. (18).

        Returns
        -------
        Path
            The file written.

        Raises
        ------
        InputError
            Where the step is negative, there is no tensor, names, shapes or numbers of replicates differ, a dtype
            cannot be stored, or a scalar is not known.
        """
        if step < 0:
            raise InputError(f"step {step} is negative", where=str(self.folder), remedy="count updates from 0")
        path = self.folder / f"step_{step}.{self.container}"
        arrays = self._arrays(path, "parameter", parameter)
        if not arrays:
            raise InputError("no parameters in this step", where=str(path), remedy="record at least one tensor")
        shapes = {key.partition("/")[2]: array.shape for key, array in arrays.items()}
        for state, tensors in (("gradient", gradient), ("hvp", hvp)):
            if tensors is None:
                continue
            others = self._arrays(path, state, tensors)
            found = {key.partition("/")[2]: array.shape for key, array in others.items()}
            if found != shapes:
                differing = sorted(dict(shapes.items() ^ found.items()))
                raise InputError(
                    f"{state} and parameter differ in name or shape: {state} {found}, parameter {shapes}",
                    where=f"{path}, tensors {differing}",
                    remedy="record both under the same names and in the same shapes",
                )
            arrays |= others
        if replicates is not None:
            arrays |= self._replicates(path, replicates, shapes)
        for name, value in {"loss": loss, "learning_rate": learning_rate, **scalars}.items():
            if name not in SCALARS:
                known = ", ".join(SCALARS)
                raise InputError(f"{name} is no number of a step", where=str(path), remedy=f"record {known}")
            if value is not None:
                arrays[name] = self._scalar(path, name, value)
        self._write(path, arrays)
        return path

    def _arrays(self, path: Path, state: str, tensors: Mapping[str, ArrayLike]) -> Arrays:
        arrays = {}
        for name, value in tensors.items():
            # safetensors takes the memory of an array as it lies, so it must lie in C order.
            array = np.asarray(value, order="C")
            dtype = array.dtype.name
            if not name or dtype not in STORAGE_DTYPES or dtype in _WRITERS[self.container][1]:
                possible = [known for known in STORAGE_DTYPES if known not in _WRITERS[self.container][1]]
                raise InputError(
                    f"{state} {name!r} of dtype {dtype} cannot be recorded in {self.container}",
                    where=f"{path}, {state} of tensor {name!r}",
                    remedy=f"give it a name and one of the dtypes {', '.join(possible)}",
                )
            arrays[f"{state}/{name}"] = array
        return arrays

    def _replicates(
        self, path: Path, replicates: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> Arrays:
        names = {"parameter": REPLICATE_PARAMETER, "hvp": REPLICATE_HVP}
        if not {"parameter"} <= set(replicates) <= {*names, "loss"}:
            raise InputError(
                f"replicates of {', '.join(replicates) or 'nothing'}",
                where=str(path),
                remedy="give those of the parameter, and of hvp and loss where you have them",
            )
        arrays: Arrays = {}
        losses = [np.asarray(replicates["loss"], dtype=np.float64)] if "loss" in replicates else []
        for kind, array in names.items():
            arrays |= self._arrays(path, array, replicates.get(kind, {}))
        counts = {array.shape[:1] for array in (*arrays.values(), *losses)}
        for kind in names.keys() & replicates.keys():
            logged = {name: arrays[f"{names[kind]}/{name}"].shape[1:] for name in replicates[kind]}
            if logged != shapes or len(counts) != 1 or counts & {(), (0,)}:
                raise InputError(
                    f"replicates of the {kind} are {sorted(counts)} of {logged}, of parameters {dict(shapes)}",
                    where=f"{path}, {names[kind]}",
                    remedy="record as many of each tensor, replicates first, and as many losses",
                )
        if losses and losses[0].ndim != 1:
            raise InputError(
                f"losses of replicates have shape {losses[0].shape}", where=str(path), remedy="record one for each"
            )
        return {**arrays, **({REPLICATE_LOSS: losses[0]} if losses else {})}

    def _scalar(self, path: Path, name: str, value: float) -> NDArray[np.float64]:
        array = np.asarray(value, dtype=np.float64)
        if array.size != 1:
            raise InputError(
                f"{name} has shape {array.shape}, it must be one number", where=str(path), remedy="record a float"
            )
        return array.reshape(())

    def _write(self, path: Path, arrays: Arrays) -> None:
        # Hidden and with a suffix of its own: no reader of step_<N>.* takes it for a step. The process number
        # keeps two writers of one folder from writing into the same file.
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with aside.open("wb") as file:
                _WRITERS[self.container][0](file, arrays)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
