"""Record a training run from a loop that has its tensors at hand: states, or the ledgers of its updates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import ArrayLike, NDArray

from natgrad.recording.arrays import host_array, numbers_of
from natgrad.recording.declared import declare, store_configuration
from natgrad.recording.ledger_writer import require_folder, require_no_ledgers
from natgrad.recording.pairs_of_states import LedgersOfStates, StateBefore
from natgrad.schema.arguments import number, real_array, shown
from natgrad.schema.configuration import declared_configuration
from natgrad.schema.errors import InputError
from natgrad.schema.layout import STORAGE_DTYPES
from natgrad.schema.logs import logger
from natgrad.schema.names import EVALUATIONS, REPLICATE_HVP, REPLICATE_LOSS, REPLICATE_PARAMETER, SCALARS

__all__ = ["CONTAINERS", "Recorder"]

Arrays = dict[str, NDArray[Any]]


_log = logger("natgrad.recording")


def _write_safetensors(path: Path, arrays: Arrays, texts: Mapping[str, str]) -> None:
    try:
        # Unlike `save`, it writes the memory of the arrays without copies.
        safetensors.numpy.save_file(arrays, path, dict(texts) or None)
    except safetensors.SafetensorError as error:
        raise OSError(f"{error}: {path}") from error


def _write_npz(path: Path, arrays: dict[str, Any], texts: Mapping[str, str]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


# For each container: its writer, and the STORAGE_DTYPES that it cannot store.
_WRITERS: dict[str, tuple[Callable[[Path, Arrays, Mapping[str, str]], None], frozenset[str]]] = {
    "safetensors": (_write_safetensors, frozenset()),
    "npz": (_write_npz, frozenset({"bfloat16"})),
}

MODES = ("full", "ledger")

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


def _rate_texts(rates: Mapping[str, float]) -> dict[str, str]:
    """Return the learning rates of tensors, as the groups of a torch optimizer whose members have names."""
    groups: dict[tuple[float, bool], list[str]] = {}
    for index, (name, rate) in enumerate(rates.items()):
        # Two groups or more, even with equal rates: a reader takes the rate of a single group as that of the model.
        groups.setdefault((rate, index > 0), []).append(name)
    texts = {}
    for number_of_group, ((rate, _), names) in enumerate(groups.items()):
        group = f"optimizer/param_groups/{number_of_group}"
        texts[f"{group}/lr"] = repr(rate)
        texts |= {f"{group}/params/{member}": name for member, name in enumerate(names)}
    return texts


def _numbers(path: Path, what: str, value: Any) -> NDArray[np.float64]:
    try:
        return real_array(numbers_of(value))
    except ValueError as error:
        raise InputError(f"{what} {error}", where=str(path), remedy="record a float") from error


class Recorder:
    """Write one run into a folder, with one file ``step_<N>.<container>`` per step, or the ledgers of its updates.

    A step is written to a temporary file, which is then renamed. A reader sees either the complete file or no file.

    Parameters
    ----------
    folder : str or Path
        Folder of the run. It is created if it does not exist.
    container : {"safetensors", "npz"}
        File format of a step.
    resume : bool
        Resume the run in the folder. Steps that are recorded again are replaced.
    mode : {"full", "ledger"}
        Record complete states, or only the inner products of each update, which take 88 bytes per tensor. The
        latter are computed when the next step is recorded, so that each step must be recorded, and `close` flushes
        the log.
    evaluation : {"batch", "fixed", "unknown"}
        What loss and gradient are evaluated on. A log of states declares it in ``natgrad.toml``.
    configuration : mapping, optional
        Options of the run, for example ``vars(args)``, which pages show and compare. They are stored in
        ``configuration.json``.

    Raises
    ------
    InputError
        If an option is not valid, or if the folder contains steps and ``resume`` is False, or the container or the
        mode differs from that of the existing steps.

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

    def __init__(
        self,
        folder: str | Path,
        container: str = "safetensors",
        *,
        resume: bool = False,
        mode: str = "full",
        evaluation: str = "unknown",
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        path = os.fspath(folder) if isinstance(folder, str | os.PathLike) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise InputError(f"the folder must be a path, got {shown(folder)}", remedy="pass the folder of the run")
        if not isinstance(container, str) or container not in CONTAINERS:
            raise InputError(
                f"unknown container {shown(container)}", remedy=f"choose one of {', '.join(CONTAINERS)}"
            )
        if not isinstance(resume, bool):
            raise InputError(f"resume must be True or False, got {shown(resume)}", remedy="pass resume=True")
        for name, value, known in (("mode", mode, MODES), ("evaluation", evaluation, EVALUATIONS)):
            if value not in known:
                raise InputError(
                    f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}",
                    remedy="correct the argument",
                )
        declared = None if configuration is None else declared_configuration(configuration)
        self.folder, self.container = Path(folder), container
        self._ledgers: LedgersOfStates | None = None
        self._names: frozenset[str] = frozenset()
        self._end: int | None = None
        if mode == "ledger":
            require_folder(self.folder, resume=resume, remedy="resume the run with resume=True")
            self._ledgers = LedgersOfStates(self.folder, evaluation)
            store_configuration(self.folder, declared)
            return
        require_no_ledgers(self.folder)
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
        if evaluation != "unknown":
            declare(self.folder, "evaluation", evaluation, argument=f"evaluation={evaluation!r}")
        store_configuration(self.folder, declared)

    def __repr__(self) -> str:
        kind = f"{self.container!r}" if self._ledgers is None else 'mode="ledger"'
        return f"Recorder({str(self.folder)!r}, {kind})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush a log of ledgers to the disk. States are complete when `record` returns."""
        if self._ledgers is not None:
            self._ledgers.close()

    def record(
        self,
        step: int,
        *,
        parameter: Mapping[str, ArrayLike],
        gradient: Mapping[str, ArrayLike | None] | None = None,
        loss: float | None = None,
        learning_rate: float | Mapping[str, float] | None = None,
        hvp: Mapping[str, ArrayLike] | None = None,
        replicates: Mapping[str, Any] | None = None,
        **scalars: float,
    ) -> Path:
        """Record the state of the run before an update.

        Tensors of PyTorch are accepted with or without a graph, on any device. A log of ledgers contains no hvp,
        no replicates and no other scalars.

        Parameters
        ----------
        step : int
            Number of updates before this state.
        parameter : mapping
            Value theta_t of each tensor, by name, with any shape and one of the dtypes of
            `natgrad.schema.layout.STORAGE_DTYPES` (bfloat16 in safetensors only). Stored without conversion.
        gradient : mapping, optional
            Gradient of the loss at theta_t, with the shapes of the parameters. Tensors without a gradient, or with
            the gradient None, are not recorded, with a warning. These must be the same at every step. Omit it for
            the state after the last update, so that this update has a result.
        loss : float, optional
            Loss L(theta_t), for the same objective as the gradient.
        learning_rate : float or mapping, optional
            Learning rate eta of the update that follows, eq. (2), or that of each recorded tensor, by name (in
            safetensors only).
        hvp : mapping, optional
            Hessian times the displacement, H (theta_{t+1} - theta_t), eq. (16), with the names and shapes of the
            recorded tensors.
        replicates : mapping, optional
            R draws of the update of a stochastic rule from theta_t. ``parameter`` contains the states after each
            draw, by tensor name, with shape (R, ...). Optionally, ``hvp`` contains the Hessian times the
            displacement of each draw, by tensor name, with shape (R, ...), eq. (19), and ``loss`` the losses of
            these states, with shape (R,). Record replicates at every step or never.
        **scalars : float
            Other scalars in `natgrad.schema.names.SCALARS`: ``loss_time_derivative``, dL/dt of a loss that changes
            with time (section 2.1), and ``hessian_min_eigenvalue``, eq. (18).

        Returns
        -------
        Path
            File of the step, or the folder of a log of ledgers.

        Raises
        ------
        InputError
            If the step is negative or follows a state without a gradient, there are no tensors, names, shapes or
            numbers of replicates differ, the tensors are not those of the step before, a dtype cannot be stored, a
            scalar is unknown, or a log of ledgers cannot contain a value or lacks the step before.
        """
        try:
            step = number(step, int, minimum=0)
        except ValueError as error:
            raise InputError(
                f"the step {error}", where=str(self.folder), remedy="count updates from 0: record(0, ...)"
            ) from error
        path = self.folder / f"step_{step}.{self.container}"
        parameter = _mapping(path, "parameter", parameter)
        if self._end is not None and step > self._end:
            raise InputError(
                f"the state at step {self._end} has no gradient, but is not the last",
                where=str(path),
                why="only the state after the last update may lack its gradient",
                remedy=f"record step {self._end} again, with its gradient",
            )
        if gradient is None:
            names = self._names_of_last(path, parameter)
        else:
            names = self._recorded(path, parameter, _mapping(path, "gradient", gradient))
        arrays = self._arrays(path, "parameter", {name: parameter[name] for name in names})
        shapes = {key.partition("/")[2]: array.shape for key, array in arrays.items()}
        states: dict[str, Mapping[str, Any]] = {} if hvp is None else {"hvp": hvp}
        if gradient is not None:
            states["gradient"] = {name: gradient[name] for name in names}
        for state, tensors in states.items():
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
        rate, texts = self._rates(path, learning_rate, names)
        for name, value in {"loss": loss, "learning_rate": rate, **scalars}.items():
            if name not in SCALARS:
                known = ", ".join(SCALARS)
                raise InputError(f"unknown scalar {name!r}", where=str(path), remedy=f"choose from {known}")
            if value is not None:
                arrays[name] = self._scalar(path, name, value)
        if self._ledgers is None:
            self._write(path, arrays, texts)
        else:
            path = self._write_ledger(self._ledgers, step, arrays, learning_rate)
        self._names, self._end = frozenset(names), step if gradient is None else None
        return path

    def _write_ledger(self, ledgers: LedgersOfStates, step: int, arrays: Arrays, rates: Any) -> Path:
        """Pass a state to a log of ledgers."""
        states: dict[str, Arrays] = {"parameter": {}, "gradient": {}}
        numbers: dict[str, float] = {}
        for key, array in arrays.items():
            kind, slash, name = key.partition("/")
            if kind not in (*states, "loss", "learning_rate"):
                raise InputError(
                    f"a log of ledgers cannot contain {kind}",
                    where=f"{self.folder}, step {step}",
                    why="it has only the inner products of each update, its loss and its learning rate",
                    remedy='omit it, or record states (mode="full")',
                )
            if slash:
                states[kind][name] = array
            else:
                numbers[kind] = float(array)
        loss, rate = (numbers.get(name, math.nan) for name in ("loss", "learning_rate"))
        if isinstance(rates, Mapping):
            rates = {name: float(self._scalar(self.folder, "learning_rate", one)) for name, one in rates.items()}
        else:
            rates = rate
        ledgers.record(StateBefore(step, states["parameter"], states["gradient"] or None, loss, rates))
        return self.folder

    def _names_of_last(self, path: Path, parameter: Mapping[Any, Any]) -> list[Any]:
        """Return the names of the tensors of a state without a gradient: those of the states before it."""
        names = [name for name in parameter if not self._names or name in self._names]
        if missing := self._names - set(names):
            raise InputError(
                f"parameter {shown(min(missing))} is missing",
                where=str(path),
                why="all steps of a run must have the same tensors",
                remedy="record the tensors of the states before",
            )
        if not names:
            raise InputError("no parameters in this step", where=str(path), remedy="record at least one tensor")
        return names

    def _recorded(self, path: Path, parameter: Mapping[Any, Any], gradient: Mapping[Any, Any]) -> list[Any]:
        """Return the names of the tensors that have a gradient. They are the same at every step."""
        if not parameter:
            raise InputError("no parameters in this step", where=str(path), remedy="record at least one tensor")
        unknown = [name for name in gradient if name not in parameter]
        if unknown:
            raise InputError(
                f"gradient and parameter differ in name: {shown(unknown[0])} has a gradient, but there is no such "
                f"parameter among {shown(list(parameter))}",
                where=str(path),
                remedy="record both with the same names",
            )
        names = [name for name in parameter if gradient.get(name) is not None]
        if not names:
            raise InputError(
                "no tensor has a gradient",
                where=str(path),
                why="the backward pass has not run yet, or the gradients were set to None (zero_grad) before",
                remedy="record each step after loss.backward() and before the update",
            )
        if self._names and self._names != frozenset(names):
            changed = sorted(map(str, self._names ^ frozenset(names)))
            kind = "no gradient" if changed[0] in self._names else "a new gradient"
            raise InputError(
                f"tensor {changed[0]!r} has {kind} at this step",
                where=str(path),
                why="all steps of a run must have the same tensors",
                remedy="if the loss did not depend on the tensor, record zeros as its gradient; record a run whose "
                "trained tensors change as several runs",
            )
        without = [name for name in parameter if gradient.get(name) is None]
        if without and not self._names:
            _log.warning(
                "%d tensors have no gradient and are not recorded; the first is %r", len(without), without[0]
            )
        return names

    def _rates(
        self, path: Path, learning_rate: float | Mapping[str, float] | None, names: list[str]
    ) -> tuple[Any, dict[str, str]]:
        """Return the learning rate of the step, or the texts that contain that of each tensor."""
        if not isinstance(learning_rate, Mapping):
            return learning_rate, {}
        if set(learning_rate) != set(names):
            differing = sorted(map(str, set(learning_rate) ^ set(names)))
            raise InputError(
                f"the learning rates are not those of the recorded tensors: {shown(differing)}",
                where=f"{path}, learning_rate",
                remedy="pass the learning rate of each tensor with a gradient, or one number",
            )
        rates = {name: float(self._scalar(path, "learning_rate", rate)) for name, rate in learning_rate.items()}
        if self.container != "safetensors":
            raise InputError(
                f"learning rates of tensors cannot be recorded in {self.container}",
                where=f"{path}, learning_rate",
                remedy="use safetensors, or pass one number",
            )
        return None, _rate_texts(rates)

    def _arrays(self, path: Path, state: str, tensors: Mapping[str, Any]) -> Arrays:
        arrays = {}
        for name, value in _mapping(path, state, tensors).items():
            where = f"{path}, {state} of tensor {shown(name)}"
            array = host_array(value, where)
            dtype = array.dtype.name
            possible = [known for known in STORAGE_DTYPES if known not in _WRITERS[self.container][1]]
            if not isinstance(name, str) or not name or dtype not in possible:
                raise InputError(
                    f"{state} {shown(name)} of dtype {dtype} cannot be recorded in {self.container}",
                    where=where,
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

    def _write(self, path: Path, arrays: Arrays, texts: Mapping[str, str]) -> None:
        # Readers ignore a hidden file with another suffix. Its name contains the process number, so that two
        # writers in one folder do not use the same file.
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            _WRITERS[self.container][0](aside, arrays, texts)
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
